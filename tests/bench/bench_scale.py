"""How far the loop around the engines scales, with engines that only wait.

w1..w16  the real service, and rollout workers that are real but for their engine, whose ROWS rows
         take LATENCY_S for a sample; a learner takes and publishes. Samples handed in, against rows
         over latency. `local` starts the processes itself, `ray` in actors on this machine.
ghost    up to 1,024 engines of 2,000 tokens/s and samples of 8k tokens, and RANKS learner ranks, in
         real time, over real sockets: claims, ledger, codec, take and packing; nothing is computed.
         Beside ranks that are a little faster than the engines: the share of time in which an
         engine has nothing to write, and the p99 of a claim from its sending to its arrival.
         Beside ranks that are a little slower: the share of a step in which they do not compute.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from common import emit, numbers
from slipstream.buffer.client import BufferClient
from slipstream.buffer.config import BufferConfig, ServiceSpec
from slipstream.buffer.messages import Batch, Part
from slipstream.buffer.records import (
    Message,
    Prompt,
    SizingDecision,
    Ticket,
    TrajectoryGroup,
    Version,
    WeightsManifest,
)
from slipstream.buffer.service import BufferService
from slipstream.configs.child import Child
from slipstream.configs.load import load_table
from slipstream.configs.run_dir import create_run_dir, update_run

HERE, TINY = Path(__file__), Path(__file__).parents[2] / "kernels" / "tiny"
ROWS, LATENCY_S, TOKENS, GROUP = 32, 4.0, 256, 8
GROUPS_PER_WORKER = ROWS // GROUP
"""Of a step: as many samples as a worker's rows, so that a step takes LATENCY_S."""
SETTLE_S, WINDOW_S = 2 * LATENCY_S, LATENCY_S
START_S = 300.0
"""Sixteen processes import torch on two cores."""
SAMPLES, ENGINES_PER_PROMPT, RANKS, MICRO_BATCH_TOKENS = 16, 8, 32, 32_768
"""Of the ghost fleet: a step of 2,048 samples for 1,024 engines takes 8 s at their speed."""
TOKENS_PER_S = 2000
SPEEDS = {"engine": 1.1, "ranks": 0.9}
"""Who is waited for -> speed of all ranks over that of all engines."""
GHOST_WARM_S, GHOST_S = 22.0, 25.0
"""Two steps to get going, and three that are measured."""


def version(step: int) -> Version:
    """Of the one branch."""
    return Version(branch=0, step=step, digest=str(step))


def manifest(step: int) -> WeightsManifest:
    """A version without files: engines that only wait load nothing."""
    return WeightsManifest(version=version(step), shards=())


def ticket(uid: int, samples: int) -> Ticket:
    """A short prompt."""
    prompt = Prompt(
        uid=uid, source_id=str(uid), task="scale",
        messages=(Message(role="user", content=f"{uid} + 1 ="),), payload={"answer": "0"},
    )  # fmt: skip
    sizing = SizingDecision(
        sizer="fixed", num_samples=samples, max_new_tokens=TOKENS, reason="fixed"
    )
    return Ticket(prompt=prompt, sizing=sizing)


def serve(spec: ServiceSpec) -> None:
    """The process of the buffer."""
    asyncio.run(BufferService(spec).serve())


@contextmanager
def service(folder: Path, prompts_per_step: int, bound: float):
    """A real buffer service in a process of its own; yields its endpoint and that process."""
    endpoint = f"ipc://{folder}/buffer"
    spec = ServiceSpec(
        run_id="scale", run_dir=folder, endpoint=endpoint, prompts_per_step=prompts_per_step,
        branch=0, config=BufferConfig(max_staleness_steps=bound, drop_no_signal=False),
    )  # fmt: skip
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(spec,))
    process.start()
    try:
        yield endpoint, psutil.Process(process.pid)
    finally:
        process.kill()
        process.join()


async def feed(endpoint: str, samples: int) -> None:
    """Keep prompts WAITING, as the feeder does."""
    async with BufferClient(endpoint, "scale", "feeder") as client:
        uid = 0
        while True:
            tickets = [ticket(uid + i, samples) for i in range(32)]
            uid += (await client.put_prompts(tickets, wait_s=10.0)).count


@asynccontextmanager
async def fed(endpoint: str, samples: int) -> AsyncIterator[BufferClient]:
    """The learner's client, its first version published, with a feeder beside it."""
    async with BufferClient(endpoint, "scale", "learner") as client:
        await client.publish(manifest(0))
        feeder = asyncio.create_task(feed(endpoint, samples))
        try:
            yield client
            await client.close_run("measured")
        finally:
            feeder.cancel()
            with suppress(asyncio.CancelledError):
                await feeder


# Workers ------------------------------------------------------------------------------------------


def worker_specs(folder: Path, endpoint: str, number: int) -> list[list[str]]:
    """The commands of so many workers; see `fixed_latency.work_on`."""
    from slipstream.rollout.config import RewardConfig, RolloutConfig, WorkerSpec

    commands = []
    for name in (f"worker-{i}" for i in range(number)):
        spec = WorkerSpec(
            name=name, seed=0, model_dir=TINY, dtype="float32", run_id="scale", run_dir=folder,
            endpoint=endpoint, reward=RewardConfig(name="exact_match", processes=1),
            rollout=RolloutConfig(max_concurrent_samples=ROWS, samples_per_prompt=GROUP),
        )  # fmt: skip
        path = folder / "processes" / f"{name}.json"
        path.write_text(spec.model_dump_json())
        commands.append([sys.executable, str(HERE), "--worker", str(path)])
    return commands


@contextmanager
def local_workers(folder: Path, commands: Sequence[Sequence[str]]):
    """Plain processes."""
    started = [Child(f"worker-{i}", c, run_dir=folder) for i, c in enumerate(commands)]
    try:
        yield
    finally:
        end(started)


@contextmanager
def ray_workers(folder: Path, commands: Sequence[Sequence[str]]):
    """The same processes, each held by an actor."""
    import ray
    from slipstream.configs.ray_child import ProcessActor, RayChild

    ray.init(num_cpus=len(commands), log_to_driver=False, include_dashboard=False)
    started: list[Child] = []
    try:
        for i, command in enumerate(commands):
            actor = ray.remote(ProcessActor).options(num_cpus=1, max_concurrency=4).remote()
            start = (list(command), str(folder), 1, {})
            started.append(RayChild(f"worker-{i}", folder, actor, start))
        yield
    finally:
        end(started)
        ray.shutdown()


def end(started: Sequence[Child]) -> None:
    """They leave by themselves when the run has closed."""
    for child in started:
        child.wait(10)
        child.kill()


LAUNCHERS: dict[str, Callable[..., Any]] = {"local": local_workers, "ray": ray_workers}


async def take_and_publish(client: BufferClient) -> None:
    """The learner, whose training takes no time."""
    for step in itertools.count(1):
        while not isinstance(await client.take(step, wait_s=10.0), Batch):
            pass
        await client.publish(manifest(step))


async def throughput(folder: Path, endpoint: str, number: int, windows: int) -> list[float]:
    """Samples per second in so many windows, once every worker has been at work for a while."""
    async with fed(endpoint, GROUP) as client:
        learner = asyncio.create_task(take_and_publish(client))
        deadline = time.monotonic() + START_S
        while len((await client.stats()).workers) < number:
            assert time.monotonic() < deadline, f"{number} workers did not start"
            await asyncio.sleep(0.5)
        await asyncio.sleep(SETTLE_S)
        found, before = [], finished(folder)
        for _ in range(windows):
            await asyncio.sleep(WINDOW_S - (time.monotonic() - before[1]))
            after = finished(folder)
            found.append((after[0] - before[0]) / (after[1] - before[1]))
            before = after
        learner.cancel()
        with suppress(asyncio.CancelledError):
            await learner
        return found


def finished(folder: Path) -> tuple[int, float]:
    """Samples that are durable in the ledger, and when it was asked."""
    database = sqlite3.connect(f"file:{folder}/ledger.sqlite?mode=ro", uri=True)
    query = "SELECT COUNT(*) FROM events WHERE kind = 'finish'"
    count = database.execute(query).fetchone()[0]
    database.close()
    return count, time.monotonic()


def measure(number: int, launcher: str, windows: int) -> list[float]:
    """One fleet of so many workers."""
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        experiment = load_table({"learner": {"steps": 1}}, name="scale")
        folder = create_run_dir(experiment, Path(name, "run"))  # nodes look at it
        update_run(folder, model_dir=str(TINY))
        with service(folder, GROUPS_PER_WORKER * number, bound=4) as (endpoint, _):
            commands = worker_specs(folder, endpoint, number)
            with LAUNCHERS[launcher](folder, commands):
                return asyncio.run(throughput(folder, endpoint, number, windows))


def bench_workers(fleets: list[int], launchers: list[str], windows: int, record: bool) -> None:
    """w1..w16."""
    for launcher, number in itertools.product(launchers, fleets):
        ideal = number * ROWS / LATENCY_S
        found = sorted(measure(number, launcher, windows))
        ours = statistics.median(found)
        emit(
            {
                "bench": "scale", "case": f"w{number}-{launcher}", "ours": round(ours, 2),
                "peer": ideal, "peer_name": "linear", "ratio": round(ours / ideal, 4),
                "unit": "samples/s", "runs": windows, "spread": [round(f, 2) for f in found],
                "notes": f"real workers, engine of {ROWS} rows of {LATENCY_S:g} s; linear is rows "
                f"/ latency; runs are windows of {WINDOW_S:g} s of one fleet",
            },
            record=record,
        )  # fmt: skip


# Ghost fleet --------------------------------------------------------------------------------------


def pack(groups: Sequence[TrajectoryGroup]) -> int:
    """What every rank does with a batch before it computes; the micro-batches of one."""
    import torch
    from slipstream.learner.batch import collate, own_share, plan_micro_batches, samples_of
    from slipstream.learner.config import ObjectiveConfig

    samples = samples_of(groups, ObjectiveConfig())
    plan = plan_micro_batches(samples, MICRO_BATCH_TOKENS, packed=True, num_ranks=RANKS)
    own = own_share(plan, 0, RANKS)
    for rows in own:
        collate(rows, version(0), torch.float32, packed=True)
    return len(own)


class Ranks:
    """The learner's loop with `learner.stream`, and RANKS ranks that compute at a given speed."""

    def __init__(self, client: BufferClient, tokens_per_s: float) -> None:
        self.client, self.tokens_per_s = client, tokens_per_s
        self.rows: list[dict[str, float]] = []
        """Of each step: when it ended, and the seconds that its ranks computed or packed."""

    async def run(self, until_s: float) -> None:
        """Steps, until a moment."""
        for step in itertools.count(1):
            self.computed_s = self.packed_s = 0.0
            received, reply = 0, None
            while not isinstance(reply, Batch):
                if time.monotonic() > until_s:
                    return
                if isinstance(reply, Part):  # the next ones come while these are trained
                    received += len(reply.groups)
                    after = asyncio.create_task(self.client.take_part(step, received, wait_s=10.0))
                    await self.train(reply.groups)
                    reply = await after
                else:
                    reply = await self.client.take_part(step, received, wait_s=10.0)
            await self.train(reply.groups)
            await self.client.publish(manifest(step))
            self.rows.append(
                {"ended": time.monotonic(), "computed": self.computed_s, "packed": self.packed_s}
            )

    async def train(self, groups: Sequence[TrajectoryGroup]) -> None:
        began_s = time.monotonic()
        await asyncio.to_thread(pack, groups)
        packed_s = time.monotonic()
        samples = [sample.trajectory for group in groups for sample in group.samples]
        compute_s = sum(t.num_policy_tokens for t in samples) / self.tokens_per_s
        await asyncio.sleep(
            compute_s
        )  # what it takes longer, because this process is busy, is ours
        self.packed_s += packed_s - began_s
        self.computed_s += compute_s


def ghost(engines: int, speed: float) -> dict[str, float]:
    """One fleet beside ranks of `speed` times its own; see the module's docstring."""
    with tempfile.TemporaryDirectory(prefix="ghost-") as name:
        folder, prompts = Path(name), max(1, engines // ENGINES_PER_PROMPT)
        with service(folder, prompts, bound=2) as (endpoint, process):
            return asyncio.run(_ghost(endpoint, engines, speed, process))


async def _ghost(
    endpoint: str, engines: int, speed: float, process: psutil.Process
) -> dict[str, float]:
    from slipstream.learner import batch  # noqa: F401  (torch: not while it is measured)

    async with fed(endpoint, SAMPLES) as client:
        command = [sys.executable, str(HERE.with_name("ghost_fleet.py")), endpoint, str(engines)]
        fleet = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert fleet.stdin is not None
        assert fleet.stdout is not None
        await fleet.stdout.readline()
        from_s = time.monotonic() + GHOST_WARM_S
        until_s = from_s + GHOST_S
        fleet.stdin.write(f"{from_s} {until_s}\n".encode())
        ranks = Ranks(client, speed * engines * TOKENS_PER_S)
        learner = asyncio.create_task(ranks.run(until_s + 1.0))
        await asyncio.sleep(from_s - time.monotonic())
        cpu_s = sum(process.cpu_times()[:2])
        await asyncio.sleep(until_s - time.monotonic())
        cpu_s = sum(process.cpu_times()[:2]) - cpu_s
        await learner
    told = json.loads(await asyncio.wait_for(fleet.stdout.readline(), 60))
    await fleet.wait()
    steps = [row for row in ranks.rows if row["ended"] >= from_s]
    if len(steps) < 2:
        raise SystemExit(f"{engines} engines: {len(steps)} steps in {GHOST_S:g} s; a busy machine?")
    span_s = steps[-1]["ended"] - steps[0]["ended"]
    return told | {
        "ranks_idle": 1 - sum(row["computed"] for row in steps[1:]) / span_s,
        "packing": sum(row["packed"] for row in steps[1:]) / span_s,
        "step_s": span_s / (len(steps) - 1),
        "steps": len(steps) - 1,
        "service_cpu": cpu_s / GHOST_S,
    }


def bench_ghost(sizes: list[int], record: bool) -> None:
    """The fleet; smaller ones tell how large a fleet stays below the targets."""
    for engines, (side, speed) in itertools.product(sizes, SPEEDS.items()):
        found = ghost(engines, speed)
        ours = found[f"{side}_idle"]
        held = ours < 0.02 and (side == "ranks" or found["claim_p99_ms"] < 20)
        emit(
            {
                "bench": "scale", "case": f"ghost-{engines}-{side}", "ours": round(ours, 4),
                "peer": 0.02, "peer_name": "target: 2% of step time",
                "ratio": round(0.02 / max(ours, 1e-4), 3), "unit": "share of step time",
                "runs": found["steps"], "spread": [], "held": held,
                "notes": {k: round(v, 4) for k, v in found.items()} | {"ranks_speed": speed},
            },
            record=record,
        )  # fmt: skip


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", default="1,2,4,8,16")
    parser.add_argument("--launchers", default="local,ray")
    parser.add_argument("--engines", default="64,256,1024")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        from fixed_latency import work_on

        return work_on(given.worker, LATENCY_S, TOKENS)
    record = not given.dry_run
    launchers = [name for name in given.launchers.split(",") if name]
    bench_workers(numbers(given.workers), launchers, given.windows, record)
    if sizes := numbers(given.engines):
        bench_ghost(sizes, record)


if __name__ == "__main__":
    main()
