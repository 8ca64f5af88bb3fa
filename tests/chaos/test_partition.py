"""The network between the buffer and a client is cut: nothing is lost, doubled or waited for in
silence."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slipstream.buffer import curve
from slipstream.buffer.client import BufferClient
from slipstream.buffer.config import BufferConfig, ServiceSpec

from .conftest import START_DEADLINE_S, wait_until
from .networks import Link

CUT_S, PATIENCE_S = 2.0, 10.0
FEEDER = """
import asyncio, sys
from slipstream.buffer.client import BufferClient
from slipstream.buffer.records import Message, Prompt, SizingDecision, Ticket

def ticket(uid):
    asked = Message(role="user", content=str(uid))
    prompt = Prompt(uid=uid, source_id=str(uid), task="t", messages=(asked,), payload={})
    sizing = SizingDecision(sizer="fixed", num_samples=2, max_new_tokens=8, reason="fixed")
    return Ticket(prompt=prompt, sizing=sizing)

async def main():
    endpoint, patience_s = sys.argv[1], float(sys.argv[2])
    async with BufferClient(endpoint, "cut", "feeder", timeout_s=patience_s) as client:
        for uid in range(10**6):
            assert (await client.put_prompts([ticket(uid)])).count == 1
            print(uid, flush=True)
            await asyncio.sleep(0.02)

asyncio.run(main())
"""


async def test_a_short_cut_is_ridden_out_and_a_long_one_is_told(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in curve.new_keys().items():
        monkeypatch.setenv(key, value)
    with socket.create_server((link.here, 0)) as server:
        port = server.getsockname()[1]
    spec = ServiceSpec(
        run_id="cut", run_dir=tmp_path, endpoint=f"tcp://{link.here}:{port}", prompts_per_step=2,
        branch=0, config=BufferConfig(max_waiting_prompts=10**6),
    )  # fmt: skip
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    serve = [sys.executable, "-m", "slipstream.buffer.service", str(tmp_path / "spec.json")]
    feed = link.command(sys.executable, "-c", FEEDER, spec.endpoint, str(PATIENCE_S))
    said, log = tmp_path / "said", tmp_path / "log"

    def put() -> int:
        """How many prompts were acknowledged."""
        return said.read_text().count("\n")

    with said.open("w") as out, log.open("w") as err:
        service = subprocess.Popen(serve, stdout=err, stderr=err)
        feeder = subprocess.Popen(feed, stdout=out, stderr=err)
    try:
        wait_until(lambda: put() > 20, START_DEADLINE_S)
        for _ in range(2):
            link.cut()
            time.sleep(CUT_S)
            before = put()
            link.mend()
            wait_until(lambda before=before: put() > before + 20, START_DEADLINE_S)
        link.cut()
        assert feeder.wait(START_DEADLINE_S) == 1
        link.mend()
        told = log.read_text()
        assert "PeerLost: feeder waits" in told, told
        assert "the buffer service to answer PutPrompts" in told
        async with BufferClient(spec.endpoint, "cut", "looker") as looker:
            waiting = (await looker.stats()).counts["WAITING"]
        assert waiting in (put(), put() + 1), "the last one may be durable and unacknowledged"
    finally:
        for process in (feeder, service):
            process.kill()
            process.wait()
