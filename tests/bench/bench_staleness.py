"""What a staleness bound costs: our buffer service against AReaL 1.0.4's dispatcher, on one trace.

The protocol, fixed before the runs:

Trace. Episode i lasts lognormal(0, 1) x 0.2 s (numpy `default_rng(0)`) and writes 500 tokens a
    second, at least one. One sample per prompt, P = 32 a step, a train step of 0.3 s. Episodes are
    sleeps; both systems may run (S + 1) P of them at once. Everything is in real time.
Arms, at the same time for each S in {0, 1, 2, 4}, in processes that mostly sleep:
    areal       its dispatcher and staleness manager, unchanged, driven as its trainer drives them
    trim, requeue, drop   ours, `straggler_wait_s = 0`: nothing is waited for
    wait        ours, `stale = "wait"`
Ours is the whole service process over its socket, durable, with a client that claims, sleeps and
    hands in, and one that takes, sleeps and publishes. Weights are swapped in flight: a token's
    version is the newest when it was written. A sample given back starts anew as its next attempt,
    with the duration of the trace's episode (uid + 1,009 x attempt).
Length. 20 steps of warm-up, then 400 (`--steps`; fewer are a development run, not recorded).
Metrics. Step rate. In-bound trained tokens a second: for ours, tokens that carried weight with a
    lag in [0, S]; for AReaL, which trains samples whole, the tokens of samples whose first token is
    in the bound (the others, over the bound, are not counted), and beside it the count by token,
    which AReaL does not make. Violations: tokens over the bound that were trained. Waste: tokens of
    finished samples that were not trained, over all; the least possible for trimming is
    E[(L - (S + 1) d)+] / E[L] with d the measured step. Length bias: mean length of the samples
    trained over that of all finished. `docs/results/staleness.svg` draws the frontier.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, emit
from slipstream.buffer.client import BufferClient
from slipstream.buffer.config import BufferConfig, ServiceSpec
from slipstream.buffer.errors import Refused
from slipstream.buffer.messages import Batch, Claim
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

HERE = Path(__file__).parent
P, TRAIN_S, WARM_UP, STEPS, SEED = 32, 0.3, 20, 400, 0
TOKENS_PER_S = 500
POLICIES = ("trim", "wait", "requeue", "drop")
BOUNDS = (0, 1, 2, 4)
AREAL = ROOT / ".venvs" / "areal" / "bin" / "python"


def durations() -> list[float]:
    """The trace, in seconds."""
    return (np.random.default_rng(SEED).lognormal(0.0, 1.0, 40_000) * 0.2).tolist()


class Ours:
    """One policy under one bound."""

    def __init__(self, policy: str, bound: int, steps: int) -> None:
        self.policy, self.bound, self.last = policy, bound, WARM_UP + steps
        self.trace = durations()
        self.published: list[float] = []
        self.newer = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        self.began_s = self.ended_s = 0.0
        self.lags: dict[int, int] = {}
        self.finished = self.trained = self.trimmed = 0
        self.lengths: dict[str, list[int]] = {"finished": [], "trained": []}

    async def run(self) -> dict[str, Any]:
        """The service, its three clients, and what they counted."""
        with tempfile.TemporaryDirectory(prefix="slip-", dir=ROOT / "runs") as name:
            config = BufferConfig(
                max_staleness_steps=self.bound,
                stale=self.policy,  # type: ignore[arg-type]
                straggler_wait_s=0,
                drop_no_signal=False,
            )
            spec = ServiceSpec(
                run_id="bench",
                run_dir=Path(name),
                endpoint=f"ipc://{name}/s",
                config=config,
                prompts_per_step=P,
                branch=0,
            )
            path = Path(name) / "spec.json"
            path.write_text(spec.model_dump_json())
            command = [sys.executable, "-m", "slipstream.buffer.service", str(path)]
            process = subprocess.Popen(command)
            try:
                return await self._with_clients(spec)
            finally:
                process.kill()
                process.wait()

    async def _with_clients(self, spec: ServiceSpec) -> dict[str, Any]:
        clients = [BufferClient(spec.endpoint, "bench", n) for n in ("feeder", "worker", "learner")]
        for client in clients:
            await client.connect()
        loops = [self._feed(clients[0]), self._work(clients[1])]
        others = [asyncio.create_task(loop) for loop in loops]
        await self._learn(clients[2])
        for task in [*others, *self.tasks]:
            task.cancel()
        for client in clients:
            await client.close()
        seconds = self.ended_s - self.began_s
        in_bound = sum(n for lag, n in self.lags.items() if 0 <= lag <= self.bound)
        lengths = {name: float(np.mean(values)) for name, values in self.lengths.items()}
        return {
            "steps_per_s": (self.last - WARM_UP) / seconds,
            "tokens_per_s": in_bound / seconds,
            "violations": sum(self.lags.values()) - in_bound,
            "waste": 1 - in_bound / self.finished,
            "length_bias": lengths["trained"] / lengths["finished"],
            "max_lag": max(lag for lag, number in self.lags.items() if number),
        }

    async def _feed(self, client: BufferClient) -> None:
        uid = 0
        while True:
            tickets = [self._ticket(uid + i) for i in range(64)]
            uid += (await client.put_prompts(tickets, wait_s=5)).count

    def _ticket(self, uid: int) -> Ticket:
        message = Message(role="user", content=str(uid))
        sizing = SizingDecision(sizer="fixed", num_samples=1, max_new_tokens=1, reason="")
        prompt = Prompt(uid=uid, source_id=str(uid), task="t", messages=(message,))
        return Ticket(prompt=prompt, sizing=sizing)

    async def _work(self, client: BufferClient) -> None:
        """Claim all that is admitted, again and again; as the rollout worker does, ask anew when a
        version is published, beside the claim that is parked under the one before."""
        while True:
            newer = asyncio.create_task(self.newer.wait())
            self.newer.clear()
            claim = None
            if self.published:
                claim = asyncio.create_task(self._claim(client))
                self._keep(claim)
            asked = {claim, newer} if claim else {newer}
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            newer.cancel()

    async def _claim(self, client: BufferClient) -> None:
        try:
            claims = await client.claim(version(len(self.published) - 1), 4 * P, wait_s=2.0)
        except Refused:  # published meanwhile
            return
        for claim in claims.claims:
            self._keep(asyncio.create_task(self._episode(client, claim)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _episode(self, client: BufferClient, claim: Claim) -> None:
        began = time.monotonic()
        uid = claim.ticket.prompt.uid
        await asyncio.sleep(self.trace[(uid + 1009 * claim.attempt) % len(self.trace)])
        sample = trajectory(claim, spans(began, time.monotonic(), self.published))
        if self.began_s:
            self.finished += sample.num_policy_tokens
            self.lengths["finished"].append(sample.num_policy_tokens)
        await client.finish(sample, claim.lease_id)

    async def _learn(self, client: BufferClient) -> None:
        for step in range(self.last + 1):
            if step:
                batch = None
                while not isinstance(batch, Batch):
                    batch = await client.take(step, wait_s=5)
                if step > WARM_UP:
                    self._count(batch)
                await asyncio.sleep(TRAIN_S)
            if step == WARM_UP:
                self.began_s = time.monotonic()
            manifest = WeightsManifest(version=version(step), shards=())
            await client.publish(manifest)
            self.published.append(time.monotonic())
            self.newer.set()
        self.ended_s = time.monotonic()

    def _count(self, batch: Batch) -> None:
        """Lags from the tokens themselves."""
        for sample in (s for group in batch.groups for s in group.samples if s.trained):
            self.lengths["trained"].append(sample.trajectory.num_policy_tokens)
            skip = sample.stale_prefix
            for span in sample.trajectory.versions:
                weighted = max(0, span.length - skip)
                skip = max(0, skip - span.length)
                lag = batch.step - 1 - span.version.step
                self.lags[lag] = self.lags.get(lag, 0) + weighted


def version(step: int) -> Version:
    """The version of a step."""
    return Version(branch=0, step=step, digest=str(step))


def spans(began: float, ended: float, published: list[float]) -> list[tuple[int, int]]:
    """(version, tokens) of an episode: each token by the newest version when it was written."""
    total = max(1, round((ended - began) * TOKENS_PER_S))
    times = began + (np.arange(total) + 0.5) / TOKENS_PER_S
    steps = np.maximum(np.searchsorted(published, times, side="right") - 1, 0)
    found, counts = np.unique(steps, return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))


def trajectory(claim: Claim, written: list[tuple[int, int]]) -> Trajectory:
    """The episode as a record."""
    total = sum(number for _, number in written)
    own = tuple(VersionSpan(version=version(step), length=number) for step, number in written)
    return Trajectory(
        uid=claim.ticket.prompt.uid,
        attempt=claim.attempt,
        index=claim.indices[0],
        token_ids=np.zeros(total, np.int32),
        policy_mask=np.ones(total, bool),
        behaviour_logprobs=np.zeros(total, np.float32),
        versions=own,
        kv_version_min=own,
        sampling=SamplingParams(),
        finish_reason="stop",
        text="",
        score=Score(value=1.0),
        turns=(),
        timings=Timings(claimed_s=0.0, first_token_s=0.0, generated_s=0.0, scored_s=0.0),
        engine_id="bench",
    )


def areal(answer: dict[str, Any], bound: int, steps: int) -> dict[str, Any]:
    """The same numbers from what AReaL trained."""
    published, seconds = answer["published"], answer["seconds"]
    by_sample = by_token = total = over_samples = 0
    for step, _, start, end in answer["rows"]:
        written = spans(start, end, published)
        number = sum(n for _, n in written)
        total += number
        by_token += sum(n for v, n in written if 0 <= step - 1 - v <= bound)
        if step - 1 - written[0][0] <= bound:
            by_sample += number
        else:
            over_samples += 1
    return {
        "steps_per_s": steps / seconds,
        "tokens_per_s": by_sample / seconds,
        "tokens_per_s_by_token": by_token / seconds,
        "violations": total - by_token,
        "samples_over_bound": over_samples / len(answer["rows"]),
        "max_lag": max(s - 1 - spans(b, e, published)[0][0] for s, _, b, e in answer["rows"]),
    }


def measure(bound: int, steps: int, policies: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """All arms of one bound at the same time."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as trace:
        json.dump(durations(), trace)
        trace.flush()
        peer = [str(AREAL), str(HERE / "staleness_areal.py")]
        peer += [str(v) for v in (bound, P, TRAIN_S, WARM_UP, steps, trace.name)]
        commands = {"areal": peer}
        for policy in policies:
            me = [sys.executable, str(HERE / "bench_staleness.py"), "--arm", policy]
            commands[policy] = [*me, "--bounds", str(bound), "--steps", str(steps)]
        running = {
            name: subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            for name, command in commands.items()
        }
        results = {name: _result(process, name) for name, process in running.items()}
    return results | {"areal": areal(results["areal"], bound, steps)}


def _result(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    output, _ = process.communicate()
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    if process.returncode or not lines:
        raise SystemExit(f"{name} failed; a peer that is missing is an error")
    return json.loads(lines[-1].removeprefix("RESULT "))


def report(bound: int, steps: int, results: dict[str, dict[str, Any]], *, record: bool) -> None:
    """One line per policy."""
    peer = results.pop("areal")
    lengths = np.asarray(durations())
    for policy, ours in results.items():
        room_s = (bound + 1) / ours["steps_per_s"]
        least = float(np.maximum(lengths - room_s, 0).sum() / lengths.sum())
        line = {
            "bench": "staleness",
            "case": f"S={bound} {policy}",
            "ours": ours["tokens_per_s"],
            "peer": peer["tokens_per_s"],
            "peer_name": "AReaL 1.0.4",
            "ratio": ours["tokens_per_s"] / peer["tokens_per_s"],
            "unit": "in-bound trained tokens/s",
            "runs": 1,
            "spread": None,
            "notes": {
                "seed": SEED, "steps": steps, "ours": ours, "peer": peer, "least_waste": least,
            },
        }  # fmt: skip
        emit(line, record=record)


def draw(results: dict[int, dict[str, dict[str, Any]]], to: Path) -> None:
    """The frontier: in-bound tokens/s against the bound, and against what is thrown away."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "slipstream"  # the same figures give the same file
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for arm in ("areal", *POLICIES):
        rates = [results[bound][arm]["tokens_per_s"] for bound in results]
        style = {"color": "black", "linestyle": "--"} if arm == "areal" else {"linestyle": "-"}
        name = "AReaL 1.0.4" if arm == "areal" else f'stale = "{arm}"'
        left.plot(list(results), rates, marker="o", label=name, **style)
        if arm != "areal":
            wastes = [100 * results[bound][arm]["waste"] for bound in results]
            right.plot(wastes, rates, "o-", label=name)
    left.set_xlabel("bound S, in steps")
    right.set_xlabel("tokens finished and not trained, %")
    left.set_ylabel("in-bound trained tokens / s")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(to, metadata={"Date": None})


def main() -> None:
    """`bench_staleness.py [--bounds 1,2] [--steps N]`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bounds", default=",".join(map(str, BOUNDS)))
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--arm")
    options = parser.parse_args()
    bounds = [int(bound) for bound in options.bounds.split(",")]
    (ROOT / "runs").mkdir(exist_ok=True)
    if options.arm:
        answer = asyncio.run(Ours(options.arm, bounds[0], options.steps).run())
        print("RESULT " + json.dumps(answer), flush=True)
        return
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for bound in bounds:
        found[bound] = measure(bound, options.steps, tuple(options.policies.split(",")))
        report(bound, options.steps, found[bound].copy(), record=options.steps >= STEPS)
    if options.steps >= STEPS and options.policies.split(",") == list(POLICIES):
        draw(found, RESULTS / "staleness.svg")


if __name__ == "__main__":
    main()
