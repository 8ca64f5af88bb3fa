"""Rows a second through the buffer service, durable, against TransferQueue and a Ray actor queue.

A row is a trajectory of 512 tokens. Ours: one service process, one client process, the ledger and
the segments on this machine's disk; a put counts when its acknowledgement has come back, which is
after both are synced; a take when its batch is TAKEN on disk and decoded by the client. The peers
keep rows in memory. Each repeat runs ours and both peers in turn; medians over repeats.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from common import ROOT, emit
from slipstream.buffer.client import BufferClient
from slipstream.buffer.config import BufferConfig, ServiceSpec
from slipstream.buffer.messages import Batch
from slipstream.buffer.records import (
    Message,
    Prompt,
    SizingDecision,
    Ticket,
    Version,
    WeightsManifest,
)

HERE = Path(__file__).parent
ENVIRONMENT = ROOT / ".venvs" / "transferqueue" / "bin" / "python"
PEERS = {"TransferQueue 0.1.11": "transferqueue", "Ray actor queue": "ray"}
BATCH, GROUP = 64, 8
P = 512


def spec_for(folder: Path, **changes: Any) -> ServiceSpec:
    """A run with room for (8 + 1) x 512 groups."""
    config = BufferConfig(
        max_staleness_steps=8, drop_no_signal=False, max_waiting_prompts=1 << 20, lease_s=3600
    )
    values = {"prompts_per_step": P, "config": config, **changes}
    return ServiceSpec(
        run_id="bench",
        run_dir=folder,
        endpoint=f"ipc://{folder}/s",
        branch=0,
        **values,
    )


@contextmanager
def service(spec: ServiceSpec) -> Iterator[psutil.Process]:
    """A service process."""
    path = spec.run_dir / "spec.json"
    path.write_text(spec.model_dump_json())
    process = subprocess.Popen([sys.executable, "-m", "slipstream.buffer.service", str(path)])
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


class Clients:
    """Client processes that obey the same command at the same time."""

    def __init__(self, spec: ServiceSpec, number: int) -> None:
        command = [sys.executable, str(HERE / "buffer_client.py"), spec.endpoint]
        self._processes = [
            subprocess.Popen(
                [*command, f"worker-{i}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for i in range(number)
        ]

    def all(self, words: str) -> list[dict[str, Any]]:
        """Give the command to all; their answers."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(words + "\n")
            process.stdin.flush()
        return [json.loads(p.stdout.readline()) for p in self._processes if p.stdout]

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("quit\n")
            process.stdin.close()
            process.wait()


def ticket(uid: int, samples: int) -> Ticket:
    """A prompt and its size."""
    message = Message(role="user", content=f"what is {uid} + 1?")
    sizing = SizingDecision(sizer="fixed", num_samples=samples, max_new_tokens=480, reason="")
    prompt = Prompt(uid=uid, source_id=f"sum/{uid}", task="sum", messages=(message,))
    return Ticket(prompt=prompt, sizing=sizing)


async def put_prompts(client: BufferClient, first: int, number: int, samples: int) -> None:
    """Put so many prompts."""
    for start in range(first, first + number, 256):
        stop = min(start + 256, first + number)
        await client.put_prompts([ticket(uid, samples) for uid in range(start, stop)])


def weights(step: int) -> WeightsManifest:
    """Weights without files."""
    return WeightsManifest(version=Version(branch=0, step=step, digest=f"{step}"), shards=())


async def ours(singles: int, batches: int, repeats: int) -> dict[str, Any]:
    """Puts of one, puts of 64 and durable takes of 64 rows (8 groups of 8)."""
    result: dict[str, Any] = {
        "start_s": [], "put": [], "put_64": [], "take_64": [], "rss_mib": [],
    }  # fmt: skip
    for repeat in range(repeats + 1):
        with tempfile.TemporaryDirectory(prefix="slip-", dir=ROOT / "runs") as name:
            spec = spec_for(Path(name), prompts_per_step=BATCH // GROUP)
            spec = (
                spec.model_copy(
                    update={"config": spec.config.model_copy(update={"max_staleness_steps": 64})}
                )
                if False
                else spec
            )
            measured = await _once(spec, singles, batches)
        for key, value in measured.items() if repeat else ():
            result[key].append(value)
    return result


async def _once(spec: ServiceSpec, singles: int, batches: int) -> dict[str, float]:
    began = time.perf_counter()
    with service(spec) as process:
        async with BufferClient(spec.endpoint, "bench", "feeder") as client:
            measured = {"start_s": time.perf_counter() - began}
            clients = Clients(spec, 1)
            await client.publish(weights(0))
            rates: dict[str, list[tuple[float, int]]] = {"put": [], "put64": []}
            takes: list[tuple[float, int]] = []
            step = uid = 0
            plan = ["put"] * (singles // 576) + ["put64"] * (batches // 9)
            for kind in plan:
                await put_prompts(client, uid, 72, GROUP)
                uid += 72
                clients.all("claim 576")
                (answer,) = await asyncio.to_thread(clients.all, kind)
                rates[kind].append((answer["seconds"], answer["rows"]))
                for _ in range(9):
                    step += 1
                    began = time.perf_counter()
                    batch = await client.take(step, wait_s=10)
                    takes.append((time.perf_counter() - began, BATCH))
                    assert isinstance(batch, Batch)
                    await client.publish(weights(step))
            clients.close()
            measured["rss_mib"] = process.memory_info().rss / 2**20
    measured["put"] = _rate(rates["put"])
    measured["put_64"] = _rate(rates["put64"])
    measured["take_64"] = _rate(takes)
    return measured


def _rate(pairs: list[tuple[float, int]]) -> float:
    return sum(rows for _, rows in pairs) / sum(seconds for seconds, _ in pairs)


def peer(name: str, singles: int, batches: int, repeats: int) -> dict[str, Any]:
    """What a peer's script measured.

    Raises:
        SystemExit: it failed; a peer that is missing is an error.
    """
    script, numbers = HERE / "buffer_peers.py", map(str, (singles, batches, repeats))
    done = subprocess.run(
        [str(ENVIRONMENT), str(script), name, *numbers], stdout=subprocess.PIPE, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{name} failed; `make bench-buffer` installs what it needs")
    return json.loads(lines[-1].removeprefix("RESULT "))


def sync_ms() -> float:
    """Median milliseconds of a sync after 64 rows' bytes, on the service's disk."""
    times: list[float] = []
    with tempfile.TemporaryFile(dir=ROOT / "runs") as file:
        for _ in range(50):
            os.write(file.fileno(), bytes(64 * 5300))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(1000 * (time.perf_counter() - began))
    return median(times)


def report(mine: dict[str, Any], theirs: dict[str, Any], name: str, *, record: bool) -> None:
    """One line per case; more rows a second are better, fewer seconds of start."""
    fsync_ms = round(sync_ms(), 3)
    for case in ("put", "put_64", "take_64", "start_s"):
        ours = median(mine[case])
        other = median(theirs[case]) if case != "start_s" else theirs[case]
        line = {
            "bench": "buffer",
            "case": case,
            "ours": ours,
            "peer": other,
            "peer_name": name,
            "ratio": other / ours if case == "start_s" else ours / other,
            "unit": "s" if case == "start_s" else "rows/s",
            "runs": len(mine[case]),
            "spread": [min(mine[case]), max(mine[case])],
            "notes": {
                "durable": "ours only",
                "fsync_ms": fsync_ms,
                "rss_mib": round(max(mine["rss_mib"]), 1),
                "peer_runs": theirs[case],
            },
        }
        emit(line, record=record)


def main() -> None:
    """`bench_buffer.py [--singles N] [--batches N] [--repeats N] [--dry]`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--singles", type=int, default=2304)
    parser.add_argument("--batches", type=int, default=36)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="do not record")
    options = parser.parse_args()
    (ROOT / "runs").mkdir(exist_ok=True)
    mine = asyncio.run(ours(options.singles, options.batches, options.repeats))
    for name, script in PEERS.items():
        theirs = peer(script, min(options.singles, 576), options.batches, options.repeats)
        report(mine, theirs, name, record=not options.dry)


if __name__ == "__main__":
    main()
