"""The disk under the ledger: on this machine, and when it is full nothing acknowledged is lost."""

import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from slipstream.buffer import filesystem
from slipstream.buffer.client import BufferClient
from slipstream.buffer.coordinator import Coordinator
from slipstream.buffer.errors import ConfigError, PeerLost
from slipstream.buffer.filesystem import file_system_of, require_local

from .conftest import SpecMaker
from .make import ticket

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/me/scratch xfs rw 0 0
server:/a /with\\040space nfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/runs/a", "ext4"),
        ("/home/me/runs", "nfs4"),
        ("/home/me/scratch/runs", "xfs"),
        ("/home/me/scratches", "nfs4"),
        ("/with space/runs", "nfs"),
    ],
)
def test_the_longest_mount_point_decides(path: str, kind: str) -> None:
    assert file_system_of(Path(path), MOUNTS) == kind


def test_a_ledger_on_a_network_file_system_is_refused_with_the_remedy(
    make_spec: SpecMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_local(tmp_path, f"/dev/sda1 {tmp_path} ext4 rw 0 0")
    mounts = f"/dev/sda1 / ext4 rw 0 0\nserver:/a {tmp_path.resolve()} nfs4 rw 0 0\n"
    monkeypatch.setattr(filesystem, "file_system_of", lambda path, _: file_system_of(path, mounts))
    with pytest.raises(ConfigError, match=r"is on nfs4.*local disk \(--output\)"):
        Coordinator(make_spec(), 0.0)
    assert not (tmp_path / "ledger.sqlite").exists()


async def test_a_full_disk_is_named_and_nothing_acknowledged_is_lost(make_spec: SpecMaker) -> None:
    """The service may not write files over 200 kB: like a disk that is full from then on."""
    spec = make_spec({"max_waiting_prompts": 100_000})
    path = spec.run_dir / "spec.json"
    path.write_text(spec.model_dump_json())
    start = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "runpy.run_module('slipstream.buffer.service', run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, "-c", start, str(path)], stderr=subprocess.DEVNULL)
    put = 0
    try:
        async with BufferClient(spec.endpoint, "run", "feeder", timeout_s=8) as client:
            with contextlib.suppress(PeerLost):
                while put < 20_000:
                    tickets = [ticket(put + i) for i in range(20)]
                    put += (await client.put_prompts(tickets)).count
    finally:
        code = await asyncio.to_thread(process.wait, 20)
    assert (code, put > 0) == (1, True)
    told = json.loads((spec.run_dir / "processes" / "buffer.error.json").read_text())
    assert told["type"] == "DiskFull"
    assert "cannot grow" in told["message"]
    assert "slipstream resume" in told["message"]
    again = Coordinator(spec, 0.0)  # there is room again
    assert again.replay.state.next_uid >= put
    assert again.replay.state.counts["DROPPED"] == 0, "every ticket can be read"
    again.close()
