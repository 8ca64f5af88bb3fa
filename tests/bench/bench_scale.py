"""How far the loop around the engines scales, with engines that only wait.

w1..w16  real buffer service, real clients in processes of their own, each with ROWS samples that
         take LATENCY_S: throughput against N times that of one worker's rows without any loop.
         `local` starts the processes itself, `ray` in actors on a cluster of this machine.
ghost    1,024 engines of 2,000 tokens/s and 8k-token samples in virtual time around the real
         claim, ledger, codec and take: what one coordinator costs of a step, and p99 of a claim.
"""

import argparse
import asyncio
import heapq
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import emit
from slipstream.buffer import codec, messages
from slipstream.buffer.client import BufferClient
from slipstream.buffer.config import BufferConfig, ServiceSpec
from slipstream.buffer.coordinator import Coordinator
from slipstream.buffer.records import (
    Message,
    Prompt,
    SamplingParams,
    Score,
    SizingDecision,
    Ticket,
    Timings,
    Trajectory,
    Version,
    VersionSpan,
    WeightsManifest,
)
from slipstream.buffer.service import BufferService

ROWS, LATENCY_S, TOKENS = 32, 1.0, 256
GROUP = 8
SECONDS = 8.0
ENGINES, TOKENS_PER_S, LONG = 1024, 2000, 8192
PROMPTS, SAMPLES, STEPS = 128, 16, 6
ENDLESS = BufferConfig(max_staleness_steps=64, drop_no_signal=False, max_waiting_prompts=100_000)


def version(step: int) -> Version:
    """Of the one branch."""
    return Version(branch=0, step=step, digest=str(step))


def ticket(uid: int, samples: int) -> Ticket:
    """A prompt of 64 characters."""
    prompt = Prompt(
        uid=uid, source_id=str(uid), task="ghost",
        messages=(Message(role="user", content=f"{uid:064d}"),), payload={"answer": "0"},
    )  # fmt: skip
    sizing = SizingDecision(sizer="fixed", num_samples=samples, max_new_tokens=LONG, reason="")
    return Ticket(prompt=prompt, sizing=sizing)


def trajectory(claim: messages.Claim, index: int, step: int, tokens: int) -> Trajectory:
    """What an engine would hand in."""
    n, prompt = tokens, 64
    return Trajectory(
        uid=claim.ticket.prompt.uid, attempt=claim.attempt, index=index,
        token_ids=np.arange(prompt + n, dtype=np.int32) % 32_000,
        policy_mask=np.arange(prompt + n) >= prompt,
        behaviour_logprobs=np.full(n, -1.0, np.float32),
        versions=(VersionSpan(version=version(step), length=n),),
        kv_version_min=(VersionSpan(version=version(step), length=n),),
        sampling=SamplingParams(), finish_reason="stop", text="", turns=(),
        score=Score(value=float(index % 2)), engine_id="ghost",
        timings=Timings(claimed_s=0, first_token_s=0, generated_s=0, scored_s=0),
    )  # fmt: skip


async def fixed_latency_worker(endpoint: str, name: str) -> None:
    """Claim, wait, hand in, until the run closes."""
    async with BufferClient(endpoint, "scale", name) as client:
        room, open_tasks, free = asyncio.Event(), set(), ROWS

        async def one(claim: messages.Claim, index: int) -> None:
            nonlocal free
            await asyncio.sleep(LATENCY_S)
            free += 1  # the next sample's row; handing in overlaps it, as in a real worker
            room.set()
            await client.finish(trajectory(claim, index, 0, TOKENS), claim.lease_id)

        while (await client.await_version(wait_s=1.0)).manifest is None:
            pass
        while True:
            room.clear()
            if not free:
                await room.wait()
                continue
            claims = await client.claim(version(0), free, wait_s=2.0)
            if claims.closing:
                return
            for claim in claims.claims:
                for index in claim.indices:
                    free -= 1
                    task = asyncio.create_task(one(claim, index))
                    open_tasks.add(task)
                    task.add_done_callback(open_tasks.discard)


def worker_main(endpoint: str, name: str) -> None:
    """The process of one worker."""
    asyncio.run(fixed_latency_worker(endpoint, name))


def service_main(endpoint: str, folder: str) -> None:
    """The process of the buffer."""
    spec = ServiceSpec(
        run_id="scale", run_dir=Path(folder), endpoint=endpoint, config=ENDLESS,
        prompts_per_step=10_000, branch=0,
    )  # fmt: skip
    asyncio.run(BufferService(spec).serve())


class LocalWorkers:
    """Plain processes."""

    def __init__(self, endpoint: str, number: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        names = [f"worker-{i}" for i in range(number)]
        self.processes = [spawn.Process(target=worker_main, args=(endpoint, n)) for n in names]
        for process in self.processes:
            process.start()

    def end(self) -> None:
        for process in self.processes:
            process.join(10)
            process.kill()


class RayWorkers:
    """The same processes, each held by an actor."""

    def __init__(self, endpoint: str, number: int) -> None:
        import ray
        from slipstream.configs.ray_child import ProcessActor, RayChild

        self.folder = Path(tempfile.mkdtemp())
        for name in ("logs", "processes"):
            (self.folder / name).mkdir()
        ray.init(num_cpus=number, log_to_driver=False, include_dashboard=False)
        self.children = []
        for i in range(number):
            argv = [sys.executable, __file__, "--worker", endpoint, f"worker-{i}"]
            actor = ray.remote(ProcessActor).options(num_cpus=1, max_concurrency=4).remote()
            start = (argv, str(self.folder), 1, {})
            self.children.append(RayChild(f"worker-{i}", self.folder, actor, start))

    def end(self) -> None:
        import ray

        for child in self.children:
            child.wait(10)
            child.kill()
        ray.shutdown()


async def throughput(endpoint: str, number: int) -> float:
    """Samples per second once every worker takes part, over SECONDS."""
    async with BufferClient(endpoint, "scale", "learner") as client:
        await client.publish(WeightsManifest(version=version(0), shards=()))
        needed = int(number * ROWS / LATENCY_S * (SECONDS + 60) / GROUP)
        for start in range(0, needed, 512):
            uids = range(start, min(needed, start + 512))
            await client.put_prompts([ticket(uid, GROUP) for uid in uids], wait_s=5.0)

        async def ready() -> tuple[int, float]:
            counts = (await client.stats()).counts
            return counts.get("READY", 0), time.monotonic()

        while (await ready())[0] < 4 * number:
            await asyncio.sleep(0.2)
        await asyncio.sleep(2.0)
        first, began = await ready()
        await asyncio.sleep(SECONDS)
        last, ended = await ready()
        await client.close_run("measured")
        return (last - first) * GROUP / (ended - began)


def measure(number: int, launcher: str) -> float:
    """One run with so many workers."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        endpoint = f"ipc://{folder}/buffer"
        spawn = multiprocessing.get_context("spawn")
        service = spawn.Process(target=service_main, args=(endpoint, folder))
        service.start()
        workers = (LocalWorkers if launcher == "local" else RayWorkers)(endpoint, number)
        try:
            return asyncio.run(throughput(endpoint, number))
        finally:
            workers.end()
            service.kill()


def bench_workers(numbers: list[int], launchers: list[str], runs: int, record: bool) -> None:
    """w1..w16."""
    for launcher, number in itertools.product(launchers, numbers):
        ideal = number * ROWS / LATENCY_S
        found = sorted(measure(number, launcher) for _ in range(runs))
        ours = statistics.median(found)
        emit(
            {
                "bench": "scale", "case": f"w{number}-{launcher}", "ours": round(ours, 2),
                "peer": ideal, "peer_name": "linear", "ratio": round(ours / ideal, 4),
                "unit": "samples/s", "runs": runs, "spread": [round(f, 2) for f in found],
                "notes": f"{ROWS} rows of {LATENCY_S} s; linear is rows / latency",
            },
            record=record,
        )  # fmt: skip


def ghost(engines: int) -> dict[str, Any]:
    """Drive the coordinator with a fleet in virtual time; what it cost in real time."""
    with tempfile.TemporaryDirectory(prefix="ghost-") as folder:
        config = BufferConfig(max_staleness_steps=1, drop_no_signal=False, lease_s=1e6)
        spec = ServiceSpec(
            run_id="ghost", run_dir=Path(folder), endpoint="ipc://none", config=config,
            prompts_per_step=PROMPTS, branch=0,
        )  # fmt: skip
        return _drive(Coordinator(spec, 0.0), engines)


def _drive(coordinator: Coordinator, engines: int) -> dict[str, Any]:
    chance = np.random.default_rng(0)
    claims_s: list[float] = []
    busy_s, numbers = 0.0, itertools.count(1)

    def ask(request: Any, now: float) -> Any:
        nonlocal busy_s
        frames = codec.encode(request, next(numbers))  # the sender's time, not ours
        began = time.perf_counter()
        body = codec.decode_body(codec.open_envelope(frames), frames, messages.Request)
        reply = coordinator.answer(body, now, final=True)
        coordinator.commit()
        codec.encode(reply, 1)
        took = time.perf_counter() - began
        busy_s += took
        if isinstance(request, messages.ClaimSamples):
            claims_s.append(took)
        return reply

    ask(messages.PublishVersion(manifest=WeightsManifest(version=version(0), shards=())), 0.0)
    uid, step, now, idle = 0, 1, 0.0, list(range(engines))
    events: list[tuple[float, int, Any]] = []
    while step <= STEPS:
        while coordinator.replay.state.counts["WAITING"] < 2 * PROMPTS:
            ask(
                messages.PutPrompts(tickets=tuple(ticket(uid + i, SAMPLES) for i in range(32))), now
            )
            uid += 32
        while idle:  # one sample at a time on each engine, at its full speed
            granted = ask(
                messages.ClaimSamples(
                    worker=f"engine-{idle[-1]}", serving=version(step - 1), max_samples=1,
                    request_id=str(next(numbers)),
                ),
                now,
            ).claims  # fmt: skip
            if not granted:
                break
            engine = idle.pop()
            tokens = int(chance.integers(LONG // 2, LONG))
            heapq.heappush(events, (now + tokens / TOKENS_PER_S, engine, (granted[0], tokens)))
        batch = ask(messages.TakeGroups(step=step, request_id=str(step), wait_s=0.0), now)
        if isinstance(batch, messages.Batch):
            manifest = WeightsManifest(version=version(step), shards=())
            ask(messages.PublishVersion(manifest=manifest), now)
            step += 1
            continue
        now, engine, (claim, tokens) = heapq.heappop(events)
        sample = trajectory(claim, claim.indices[0], step - 1, tokens)
        ask(messages.FinishSamples(trajectories=(sample,), lease_ids=(claim.lease_id,)), now)
        idle.append(engine)
    return {
        "overhead": busy_s / now,
        "claim_p99_ms": 1000 * float(np.quantile(claims_s, 0.99)),
        "step_s": now / STEPS,
        "samples_per_s": STEPS * PROMPTS * SAMPLES / now,
    }


def bench_ghost(sizes: list[int], record: bool) -> None:
    """The fleet; smaller ones tell how large a fleet stays below the target."""
    for engines in sizes:
        found = ghost(engines)
        emit(
            {
                "bench": "scale", "case": f"ghost-{engines}", "ours": round(found["overhead"], 4),
                "peer": 0.02, "peer_name": "target: 2% of step time",
                "ratio": round(0.02 / found["overhead"], 3), "unit": "share of step time",
                "runs": 1, "spread": [], "notes": {k: round(v, 3) for k, v in found.items()},
            },
            record=record,
        )  # fmt: skip


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", default="1,2,4,8,16")
    parser.add_argument("--launchers", default="local,ray")
    parser.add_argument("--engines", default="64,256,1024")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return worker_main(*given.worker)
    numbers = json.loads(f"[{given.workers}]")
    bench_workers(numbers, given.launchers.split(","), given.runs, not given.dry_run)
    bench_ghost(json.loads(f"[{given.engines}]"), not given.dry_run)


if __name__ == "__main__":
    main()
