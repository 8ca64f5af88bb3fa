"""What of a run can be reached, and by whom."""

import os
import signal
import stat
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from .test_resume import losses

pytestmark = pytest.mark.slow
DEADLINE_S = 150.0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_local_run_listens_on_no_address_but_the_loopback_of_its_ranks(
    system: Any, ranks: int
) -> None:
    system.make_inputs(torch.float32)
    system.experiment(steps=100_000, dtype="float32")
    run = system.start(
        "run", "experiment.toml", f"cluster.learner_ranks={ranks}", "--output", "run", "--no-export"
    )
    folder = system.folder / "run"
    end = time.monotonic() + DEADLINE_S
    while max(losses(folder), default=0) < 2:
        assert run.process.poll() is None, run.output.read_text()
        assert time.monotonic() < end, run.output.read_text()
        time.sleep(0.1)
    ours = [psutil.Process(run.process.pid)]
    ours += ours[0].children(recursive=True)
    names = {process.pid: " ".join(process.cmdline()) for process in ours}
    assert len(names) >= 5 + ranks
    listening = {
        names[process.pid]: connection.laddr.ip
        for process in ours
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN or connection.type.name == "SOCK_DGRAM"
    }
    assert set(listening.values()) <= {"127.0.0.1"}, listening
    assert all("learner.loop" in name for name in listening), "torch's own, between the ranks"
    assert bool(listening) == (ranks > 1)
    assert not run_files_that_others_may_read(folder)
    sockets = [c.laddr for p in ours for c in p.net_connections(kind="unix") if c.laddr]
    served = {path for path in map(Path, map(str, sockets)) if path.name == "buffer"}
    assert served
    assert all(stat.S_IMODE(path.parent.stat().st_mode) == 0o700 for path in served)
    run.process.send_signal(signal.SIGTERM)
    run.ended(130)


def run_files_that_others_may_read(folder: Path) -> list[Path]:
    """Those outside any folder that only their owner may enter."""
    if stat.S_IMODE(os.stat(folder).st_mode) & 0o077 == 0:
        return []
    return [path for path in folder.rglob("*") if stat.S_IMODE(path.stat().st_mode) & 0o077]
