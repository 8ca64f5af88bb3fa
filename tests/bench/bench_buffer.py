"""Rows a second through the buffer service, durable, against TransferQueue and a Ray actor queue.

A row is a trajectory of 512 tokens. Ours: one service process, one client process, the ledger and
the segments on this machine's disk; a put counts when its acknowledgement has come back, which is
after both are synced; a take when its batch is TAKEN on disk and decoded by the client. The peers
keep rows in memory. Ours and each peer run one after the other; medians over repeats, the first of
which is left out.

Cases without a peer, beside what they are meant to reach:
clients    durable rows a second, 1 to 64 clients that put 64 rows a message, from two processes.
memory     the service's resident memory with all that S = 8, P = 512 and groups of 16 admit READY.
recovery   100,000 groups of 8 rows (4 GB): seconds from the start of the process until it answers,
           and until a batch of 64 rows has been read from the payloads (5 s for the index).
ledger     rows of 200 bytes a second in synced transactions of 1 and 64: SQLite as the ledger uses
           it, against LMDB.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from buffer_client import TOKENS, trajectory
from common import ROOT, emit
from slipstream.buffer import events
from slipstream.buffer.client import BufferClient
from slipstream.buffer.config import BufferConfig, ServiceSpec
from slipstream.buffer.journal import Journal
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

    def __init__(self, spec: ServiceSpec, number: int, connections: int = 1) -> None:
        command = [sys.executable, str(HERE / "buffer_client.py"), spec.endpoint]
        self._processes = [
            subprocess.Popen(
                [*command, f"worker-{i}", str(connections)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
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
            measured = await _once(
                spec_for(Path(name), prompts_per_step=BATCH // GROUP), singles, batches
            )
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
        [str(ENVIRONMENT), str(script), name, *numbers],
        stdout=subprocess.PIPE, text=True, timeout=600,
    )  # fmt: skip
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


async def clients(numbers: Sequence[int]) -> dict[int, float]:
    """Rows a second of so many clients together."""
    rates: dict[int, float] = {}
    for number in numbers:
        with tempfile.TemporaryDirectory(prefix="slip-", dir=ROOT / "runs") as name:
            spec = spec_for(Path(name))
            with service(spec):
                async with BufferClient(spec.endpoint, "bench", "feeder") as feeder:
                    await put_prompts(feeder, 0, 9 * P, GROUP)
                    await feeder.publish(weights(0))
                    group = Clients(spec, min(2, number), max(1, number // 2))
                    group.all(f"claim {9 * P * GROUP // number}")
                    answers = await asyncio.to_thread(group.all, "put64")
                    group.close()
        rows = sum(answer["rows"] for answer in answers)
        rates[number] = rows / max(answer["seconds"] for answer in answers)
    return rates


async def memory() -> tuple[float, int]:
    """(MiB of the service, rows) with all that S = 8 admits READY."""
    with tempfile.TemporaryDirectory(prefix="slip-", dir=ROOT / "runs") as name:
        spec = spec_for(Path(name))
        with service(spec) as process:
            async with BufferClient(spec.endpoint, "bench", "feeder") as feeder:
                await put_prompts(feeder, 0, 10 * P, 16)
                await feeder.publish(weights(0))
                group = Clients(spec, 1)
                rows = 0
                while (claimed := group.all("claim 8192")[0]["rows"]) > 0:
                    await asyncio.to_thread(group.all, "put64")
                    rows += claimed
                group.close()
                return process.memory_info().rss / 2**20, rows


async def recovery(groups: int) -> dict[str, float]:
    """Fill a run, kill its service, start it again."""
    with tempfile.TemporaryDirectory(prefix="slip-", dir=ROOT / "runs") as name:
        spec = spec_for(Path(name), prompts_per_step=GROUP)
        bound = {"max_staleness_steps": 64, "max_waiting_prompts": 1 << 20}
        law = spec.config.model_copy(update=bound)
        fill(spec, groups)
        spec = spec.model_copy(update={"config": law})
        began = time.perf_counter()
        with service(spec) as process:
            async with BufferClient(spec.endpoint, "bench", "learner", timeout_s=300) as client:
                ready_s = time.perf_counter() - began
                batch = await client.take(1, wait_s=10)
                assert isinstance(batch, Batch)
                assert sum(len(group.samples) for group in batch.groups) == BATCH
                read_s = time.perf_counter() - began
                rss = process.memory_info().rss / 2**20
        disk = sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file())
    return {"ready_s": ready_s, "read_s": read_s, "rss_mib": rss, "disk_gb": disk / 1e9}


def fill(spec: ServiceSpec, groups: int) -> None:
    """Write the ledger and segments of a run with so many READY groups.

    Event by event and record by record as the service would: only its law, which would not admit
    so many groups at this P, is not asked.
    """
    journal = Journal(spec.run_dir)
    for key, value in (("run_id", "bench"), ("prompts_per_step", str(spec.prompts_per_step))):
        journal.remember(key, value)
    version = weights(0).version
    journal.commit(
        [
            events.BranchOpened(branch=0, parents={}, resumed_at=0),
            events.Published(manifest=weights(0)),
        ]
    )
    spans = ((0, 0, TOKENS - 32),)
    new: list[events.AnyEvent] = []
    for uid in range(groups):
        stored = journal.append(ticket(uid, GROUP))
        new.append(events.Put(uid=uid, num_samples=GROUP, ticket=stored))
        new.append(
            events.Claimed(
                uid=uid,
                attempt=0,
                indices=tuple(range(GROUP)),
                lease_id=f"0.{uid}",
                worker="worker-0",
                branch=0,
                step=0,
                request_id=f"{uid:032x}",
            )
        )
        for index in range(GROUP):
            facts = events.Facts(spans=spans, reward=float(index), score_norm=188.9)
            payload = journal.append(trajectory(uid, index, 0, version))
            new.append(events.Finished(uid=uid, index=index, payload=payload, facts=facts))
        if uid % 512 == 511:
            journal.commit(new)
            new = []
    journal.commit(new)
    journal.close()


def ledger(rows: int) -> dict[str, float]:
    """Rows a second of the ledger's own table and settings."""
    result: dict[str, float] = {}
    event = events.Returned(uid=1, indices=(0,), attempt=1, reason="x" * 180)
    for size in (1, BATCH):
        with tempfile.TemporaryDirectory(prefix="slip-", dir=ROOT / "runs") as name:
            journal = Journal(Path(name))
            number = rows if size > 1 else rows // 10
            began = time.perf_counter()
            for _ in range(number // size):
                journal.commit([event] * size)
            result[str(size)] = number / (time.perf_counter() - began)
            journal.close()
    return result


def report_alone(case: str, ours: float, unit: str, aim: float | None, **notes: Any) -> None:
    """A line of a case without a peer: the ratio is to what it is meant to reach."""
    ratio = None if aim is None else aim / ours
    emit(
        {
            "bench": "buffer", "case": case, "ours": ours, "peer": aim, "peer_name": "aim",
            "ratio": ratio, "unit": unit, "runs": 1, "spread": None, "notes": notes,
        },
        record=RECORD[0],
    )  # fmt: skip


RECORD = [True]
"""False under `--dry`."""


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
    parser.add_argument("--groups", type=int, default=100_000)
    options = parser.parse_args()
    RECORD[0] = not options.dry
    (ROOT / "runs").mkdir(exist_ok=True)
    mine = asyncio.run(ours(options.singles, options.batches, options.repeats))
    for name, script in PEERS.items():
        theirs = peer(script, min(options.singles, 576), options.batches, options.repeats)
        report(mine, theirs, name, record=not options.dry)
    rates = asyncio.run(clients((1, 2, 4, 8, 16, 32, 64)))
    for number, rate in rates.items():
        report_alone(f"clients-{number}", rate, "rows/s", None)
    mib, rows = asyncio.run(memory())
    report_alone("memory", mib, "MiB", None, rows=rows, law="S = 8, P = 512, groups of 16")
    back = asyncio.run(recovery(options.groups))
    report_alone("recovery", back["ready_s"], "s", 5.0, groups=options.groups, **back)
    own, other = ledger(20_000), peer("lmdb", 2000, 20_000 // BATCH, 1)
    for size in ("1", str(BATCH)):
        line = {
            "bench": "buffer", "case": f"ledger-{size}", "ours": own[size], "peer": other[size],
            "peer_name": "LMDB 1.6.2", "ratio": own[size] / other[size], "unit": "rows/s",
            "runs": 1, "spread": None, "notes": {"row_bytes": 200},
        }  # fmt: skip
        emit(line, record=not options.dry)


if __name__ == "__main__":
    main()
