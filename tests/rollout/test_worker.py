"""The worker's loop: against a scripted buffer for what goes wrong, then against the real one."""

import asyncio
import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from slipstream.buffer import waits
from slipstream.buffer.client import BufferClient
from slipstream.buffer.config import BufferConfig, ServiceSpec
from slipstream.buffer.errors import CorruptData, Refused, TrainingFailed
from slipstream.buffer.messages import (
    Batch,
    Claim,
    Claims,
    Done,
    EvaluationClaim,
    EvaluationResults,
    Newest,
)
from slipstream.buffer.records import (
    Message,
    Prompt,
    SamplingParams,
    Score,
    SizingDecision,
    Ticket,
)
from slipstream.buffer.service import BufferService
from slipstream.rollout.config import (
    EnvironmentConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    WorkerSpec,
)
from slipstream.rollout.engines.native import NativeEngine
from slipstream.rollout.rewards.pool import RewardPool
from slipstream.rollout.samples import training_requests
from slipstream.rollout.sampling import sample_key
from slipstream.rollout.worker import Worker, make_engine

DEADLINE_S = 20
TINY = Path(__file__).parents[2] / "kernels" / "tiny"


def ticket(uid: int, text: str = "ab", samples: int = 4, tokens: int = 12, **more) -> Ticket:
    """A prompt of `len(text)` tokens; `more` are fields of its sizing decision."""
    prompt = Prompt(
        uid=uid, source_id=f"t/{uid}", task="t", messages=(Message(role="user", content=text),)
    )
    sizing = SizingDecision(
        sizer="fixed", num_samples=samples, max_new_tokens=tokens, reason="test", **more
    )
    return Ticket(prompt=prompt, sizing=sizing)


class ScriptedBuffer:
    """Hands out what the test puts in, and remembers what comes back."""

    def __init__(self, manifest) -> None:
        self.manifest, self.closing = manifest, False
        self.claims, self.evaluations = [], []
        self.asked, self.finished, self.released, self.beats = [], [], [], []
        self.evaluated, self.refuse = [], set()
        self.changed = asyncio.Condition()

    async def change(self, **values) -> None:
        """Set fields, and wake who waits."""
        async with self.changed:
            for name, value in values.items():
                setattr(self, name, value)
            self.changed.notify_all()

    async def until(self, condition, wait_s: float = DEADLINE_S) -> None:
        """Wait for a condition on this object."""
        async with self.changed, asyncio.timeout(wait_s):
            await self.changed.wait_for(condition)

    async def await_version(self, after=None, wait_s=0.0):
        await self.until(lambda: self.closing or self.manifest.version != after)
        return Newest(manifest=self.manifest, closing=self.closing)

    async def claim(self, serving, max_samples, *, wait_s=0.0, request_id=""):
        def ready():
            return self.closing or self.evaluations or (self.claims and max_samples)

        self.asked.append((serving, max_samples))
        try:
            await self.until(ready, 0.2)
        except TimeoutError:
            return Claims()
        given = [self.claims.pop(0)] if self.claims and max_samples else []
        evaluations, self.evaluations = self.evaluations, []
        return Claims(claims=tuple(given), evaluations=tuple(evaluations), closing=self.closing)

    async def finish(self, trajectory, lease_id):
        await self.change(finished=[*self.finished, (trajectory, lease_id)])
        if trajectory.uid in self.refuse:
            raise Refused("the lease expired")
        return Done()

    async def release(self, **what):
        await self.change(released=[*self.released, what])
        return Done()

    async def heartbeat(self, serving, stats):
        await self.change(beats=[*self.beats, (serving, stats)])
        return Done()

    async def finish_evaluation(self, **what):
        await self.change(evaluated=[*self.evaluated, what])
        return Done()


class ScriptedRewards:
    """Scores with the number of tokens; can be made slow or failing."""

    def __init__(self) -> None:
        self.delay_s, self.error = 0.0, None

    async def score(self, completion, prompt):
        await asyncio.sleep(self.delay_s)
        return Score(value=float(len(completion.token_ids)))

    def describe(self):
        return "scripted"

    def note(self, score):
        """An episode brings its own."""

    def raise_if_failing(self):
        if self.error:
            raise self.error


def claim(uid: int, indices=(0, 1, 2, 3), **sizes) -> Claim:
    """All samples of one prompt."""
    return Claim(
        lease_id=f"lease-{uid}",
        ticket=ticket(uid, **sizes),
        attempt=2,
        indices=tuple(indices),
        lease_s=0.4,
    )


@pytest.fixture
async def started(tiny):
    """A function that starts a worker; returns (buffer, rewards, engine, task, spec)."""
    tasks = []

    async def start(folder=None, environment=None, stall_s=300.0, **rollout):
        folder = folder or tiny.folder("llama")
        settings = {"max_concurrent_samples": 8, "samples_per_prompt": 4, **rollout}
        spec = WorkerSpec(
            run_id="r", run_dir=tiny.root, endpoint="", name="worker-0", seed=7, dtype="float32",
            model_dir=folder, rollout=RolloutConfig(**settings), reward=RewardConfig(),
            environment=environment, stall_s=stall_s,
        )  # fmt: skip
        engine = make_engine(spec)
        tiny.engines.append(engine)
        buffer = ScriptedBuffer(tiny.publish(tiny.policy(folder, 1), 0))
        rewards = ScriptedRewards()
        task = asyncio.create_task(Worker(spec, engine, rewards, buffer).run())  # type: ignore
        tasks.append(task)
        return buffer, rewards, engine, task, spec

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_claimed_samples_come_back_as_scored_trajectories_of_the_named_law(tiny, started):
    buffer, _, _, task, spec = await started(
        sampling=SamplingConfig(temperature=0.8, top_k=9), ratio_law="kept_set"
    )
    await buffer.change(claims=[claim(uid) for uid in range(6)])
    await buffer.until(lambda: len(buffer.finished) == 24)
    again = tiny.engine(spec.model_dir, ratio_law="kept_set")
    await again.load(buffer.manifest)
    for trajectory, lease_id in buffer.finished:
        assert lease_id == f"lease-{trajectory.uid}"
        assert (trajectory.attempt, trajectory.engine_id) == (2, "worker-0")
        assert trajectory.score.value == trajectory.num_policy_tokens <= 12
        assert (
            trajectory.policy_mask.tolist() == [False] * 2 + [True] * trajectory.num_policy_tokens
        )
        assert {span.version for span in trajectory.versions} == {buffer.manifest.version}
        assert [turn.role for turn in trajectory.turns] == ["prompt", "policy"]
        assert len(trajectory.extras["kept_ids"].offsets) == trajectory.num_policy_tokens + 1
        assert len(trajectory.extras["removed_mass"].values) == trajectory.num_policy_tokens
        times = trajectory.timings
        assert times.claimed_s <= times.first_token_s <= times.generated_s <= times.scored_s
        key = sample_key(7, trajectory.uid, 2, trajectory.index)
        same = tiny.request(trajectory.token_ids[:2], key, temperature=0.8, top_k=9,
                            max_new_tokens=12)  # fmt: skip
        output = (await tiny.outputs(again, [same]))[str(key)]
        assert output.token_ids.tolist() == trajectory.token_ids[2:].tolist()
    assert len({(t.uid, t.index) for t, _ in buffer.finished}) == 24
    await buffer.change(closing=True)
    await asyncio.wait_for(task, 5)
    assert not buffer.released


async def test_claims_ask_for_no_more_than_there_is_room_and_heartbeats_say_how_it_goes(started):
    buffer, rewards, _, _, _ = await started()
    rewards.delay_s = 0.3  # slow rewards hold up neither the engine nor the heartbeats
    await buffer.change(claims=[claim(uid, tokens=40) for uid in range(12)])
    await buffer.until(lambda: len(buffer.finished) == 48)
    assert all(0 <= number <= 9 for _, number in buffer.asked)  # 8 rows and 1 ahead
    await buffer.until(lambda: len(buffer.beats) >= 3)  # every quarter of the lease of 0.4 s
    serving, stats = buffer.beats[-1]
    assert serving == buffer.manifest.version
    assert {"running", "queued", "tokens", "tokens_per_s", "swaps", "idle"} <= stats.keys()
    assert all(0 <= beat["idle"] <= 1.01 for _, beat in buffer.beats)


async def test_new_versions_are_loaded_while_samples_are_in_flight(tiny, started, paced):
    buffer, _, engine, _, spec = await started()
    await buffer.change(claims=[claim(uid, tokens=200) for uid in range(4)])
    manifest = buffer.manifest
    for step in range(1, 6):
        paced.release(4)
        manifest = tiny.publish(tiny.policy(spec.model_dir, step), step)
        await buffer.change(manifest=manifest)
        async with asyncio.timeout(DEADLINE_S):
            while engine.serving != manifest.version:
                paced.release()  # the engine looks at its commands after each step
                await asyncio.sleep(0.01)
    paced.release(10_000)
    await buffer.until(lambda: len(buffer.finished) == 16)
    assert max(len(trajectory.versions) for trajectory, _ in buffer.finished) >= 2
    assert (await asyncio.wait_for(_asked_under(buffer, manifest.version), 5)) > 0


async def test_a_sample_that_the_engine_lost_is_given_back_by_name_while_it_writes_others(
    started, monkeypatch
):
    lost, generate = [], NativeEngine.generate

    async def losing_one(self, requests):
        async for output in generate(self, requests):
            if lost:
                yield output
            lost.append(output.request_id)
        await asyncio.sleep(3600 if requests[0].request_id[:-1] == lost[0][:-1] else 0)

    monkeypatch.setattr(NativeEngine, "generate", losing_one)
    buffer, _, _, task, _ = await started(stall_s=0.5)
    await buffer.change(claims=[claim(uid, tokens=40) for uid in range(60)])
    await buffer.until(lambda: buffer.released)
    [released] = buffer.released
    assert (released["reason"], released["lease_id"]) == ("expired", f"lease-{released['uid']}")
    name = f"group {released['uid']} sample {released['indices'][0]}"
    told = waits.published(0, time.monotonic())
    assert any(line.startswith(f"{name} was lost by the engine of") for line in told.remarks)
    assert not any(wait.owner == name for wait in told.waits)
    assert not task.done()


async def _asked_under(buffer, version) -> int:
    while not (count := sum(serving == version for serving, _ in buffer.asked)):
        await asyncio.sleep(0.01)
    return count


async def test_weights_retired_while_being_read_are_skipped_and_corrupt_ones_end_the_worker(
    tiny, started
):
    buffer, _, engine, task, spec = await started()
    await buffer.until(lambda: buffer.asked)
    gone = tiny.publish(tiny.policy(spec.model_dir, 2), 1)
    (tiny.root / "weights-0.1.safetensors").unlink()
    await buffer.change(manifest=gone)
    await asyncio.sleep(0.05)
    await buffer.change(manifest=tiny.publish(tiny.policy(spec.model_dir, 3), 2))
    async with asyncio.timeout(DEADLINE_S):
        while engine.serving.step != 2:
            await asyncio.sleep(0.001)
    await buffer.change(manifest=gone)
    with pytest.raises(ExceptionGroup) as raised:
        await asyncio.wait_for(task, DEADLINE_S)
    assert raised.group_contains(CorruptData, match="does not exist")


async def test_impossible_prompts_are_quarantined_and_lost_leases_do_not_stop_the_worker(started):
    buffer, _, _, _, _ = await started()
    buffer.refuse = {5}
    await buffer.change(claims=[claim(4, text="x" * 300), claim(5), claim(6)])
    await buffer.until(lambda: len(buffer.finished) == 8 and len(buffer.released) == 4)
    for released in buffer.released:
        assert released["reason"] == "quarantined"
        assert released["uid"] == 4
        assert "300 tokens" in released["detail"]


async def test_nothing_but_impossible_samples_ends_the_run_with_the_reason(started):
    buffer, _, _, task, _ = await started()
    await buffer.change(claims=[claim(uid, text="x" * 300) for uid in range(16)])
    with pytest.raises(ExceptionGroup) as raised:
        await asyncio.wait_for(task, DEADLINE_S)
    assert raised.group_contains(TrainingFailed, match="64 samples in a row.*300 tokens")


async def test_rewards_that_keep_failing_end_the_run(started):
    buffer, rewards, _, task, _ = await started()
    rewards.error = TrainingFailed("too many")
    await buffer.change(claims=[claim(1)])
    with pytest.raises(ExceptionGroup) as raised:
        await asyncio.wait_for(task, DEADLINE_S)
    assert raised.group_contains(TrainingFailed, match="too many")


async def test_a_cancelled_worker_gives_its_samples_back(started):
    buffer, rewards, _, task, _ = await started()
    rewards.delay_s = 60  # whether a sample is in the engine or being scored when it ends
    await buffer.change(claims=[claim(1), claim(2, tokens=240), claim(3, tokens=240)])
    await buffer.until(lambda: not buffer.claims)
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    given_back = {(what["uid"], *what["indices"]) for what in buffer.released}
    assert given_back == {(uid, index) for uid in (1, 2, 3) for index in range(4)}
    assert {what["reason"] for what in buffer.released} == {"expired"}


async def test_evaluations_run_at_their_pinned_version_whatever_the_training_engine_serves(
    tiny, started
):
    buffer, _, engine, _, spec = await started()
    models = {step: tiny.policy(spec.model_dir, 1 + step) for step in range(3)}
    manifests = {step: tiny.publish(model, step) for step, model in models.items()}
    await buffer.change(manifest=manifests[2], claims=[claim(uid, tokens=60) for uid in range(6)])
    greedy = SamplingParams(temperature=0.0, max_new_tokens=10)
    jobs = [
        EvaluationClaim(
            job_id=f"eval-{step}", manifest=manifests[step], prompt=ticket(1 << 40, text).prompt,
            indices=(0, 1), sampling=greedy,
        ) for step, text in ((0, "cd"), (1, "cd"), (0, "efg"))
    ]  # fmt: skip
    await buffer.change(evaluations=jobs)
    await buffer.until(lambda: len(buffer.evaluated) == 6 and len(buffer.finished) == 24)
    assert engine.serving == manifests[2].version
    expected = defaultdict(int)
    for step, ids in ((0, [4, 5]), (1, [4, 5]), (0, [6, 7, 8])):
        reference = tiny.engine(spec.model_dir)
        await reference.load(manifests[step])
        request = tiny.request(ids, 0, temperature=0.0, max_new_tokens=10)
        output = (await tiny.outputs(reference, [request]))["0"]
        expected[f"eval-{step}", output.text, len(output.token_ids)] += 2
    found = defaultdict(int)
    for what in buffer.evaluated:
        found[what["job_id"], what["text"], what["num_tokens"]] += 1
    assert found == expected


def claim_of(uid: int, indices, **more) -> Claim:
    """Some samples of a prompt whose lengths, drawn by its keys, are far apart."""
    made = ticket(uid, tokens=240, spares=1, **more)
    lease_id = f"lease-{uid}-{min(indices)}"
    return Claim(lease_id=lease_id, ticket=made, attempt=0, indices=tuple(indices), lease_s=60)


_FOUND: list[int] = []
"""The uid that the first test needed many tries for."""


async def whole_lengths(tiny, spec, manifest) -> tuple[int, dict[int, list[int]]]:
    """A uid, and the tokens of its four samples, none of them cut: all are long enough for several
    claims to be made meanwhile, and one is by far the longest."""
    engine = tiny.engine(spec.model_dir)
    await engine.load(manifest)
    for uid in [*_FOUND, *range(200)]:
        requests = training_requests(claim_of(uid, range(4)), (2, 3), spec.rollout, spec.seed)
        outputs = await tiny.outputs(engine, [request for _, request in requests.values()])
        found = {requests[name][0]: o.token_ids.tolist() for name, o in outputs.items()}
        lengths = sorted(map(len, found.values()))
        if lengths[0] >= 30 and lengths[3] >= lengths[2] + 30:
            _FOUND[:] = [uid]
            return uid, found
    raise AssertionError("no such prompt")


@pytest.mark.parametrize(
    ("parts", "weight", "num_cut"),
    [
        ([range(4)], 0.0, 1),
        ([range(2), range(2, 4)], 0.0, 1),
        ([range(4)], 4.0, 0),
        ([range(1, 4)], 0.0, 0),
    ],
    ids=["whole", "in two claims", "waited for", "another worker has one"],
)
async def test_the_last_of_a_whole_group_is_cut_and_every_sample_is_accounted_for(
    tiny, started, parts, weight, num_cut
):
    buffer, _, engine, task, spec = await started()
    uid, whole = await whole_lengths(tiny, spec, buffer.manifest)
    await buffer.change(claims=[claim_of(uid, part, spare_weight=weight) for part in parts])
    held = {index for part in parts for index in part}
    await buffer.until(lambda: len(buffer.finished) + len(buffer.released) == len(held))
    kept = [trajectory for trajectory, _ in buffer.finished]
    cut = {i for what in buffer.released for i in what["indices"]}
    assert len(cut) == num_cut
    assert {t.index for t in kept} == held - cut
    assert all(what["reason"] == "cut" for what in buffer.released)
    for t in kept:
        assert t.token_ids[2:].tolist() == whole[t.index], "what is kept is as if nobody was cut"
    assert not cut or max(whole, key=lambda i: len(whole[i])) in cut
    assert len({t.timings.generated_s for t in kept}) == len(kept), "no two finish at once"
    async with asyncio.timeout(DEADLINE_S):
        while engine.stats().running:
            await asyncio.sleep(0.01)
    written = sum(len(tokens) for tokens in whole.values())
    assert engine.stats().generated_tokens < written or not num_cut, "it stopped early"
    await buffer.change(claims=[claim(uid + 1000)])
    await buffer.until(lambda: len(buffer.finished) == len(kept) + 4)
    await buffer.change(closing=True)
    await asyncio.wait_for(task, 5)
    assert len(buffer.released) == len(cut), "nothing is left open"


SLOW_ONCE = """
import asyncio, itertools
from slipstream.rollout.environments.base import Step
answers = itertools.count()
class World:
    async def reset(self, prompt):
        return Step()
    async def step(self, action):
        await asyncio.sleep(0 if next(answers) else 1000)
        return Step(reward=1.0, done=True)
"""


async def test_an_episode_that_is_spare_is_cut_in_the_middle_of_a_turn(tiny, started):
    folder = tiny.root / "tiny"
    shutil.copytree(TINY, folder)
    (tiny.root / "world.py").write_text(SLOW_ONCE)
    environment = EnvironmentConfig(name=f"{tiny.root}/world.py:World", timeout_s=500)
    buffer, _, _, _, _ = await started(folder, environment)
    await buffer.change(claims=[claim(1, text="you 1 2", spares=1, spare_weight=0.0)])
    await buffer.until(lambda: len(buffer.finished) == 3 and buffer.released)
    (cut,) = buffer.released
    assert cut["reason"] == "cut"
    assert {*cut["indices"], *(t.index for t, _ in buffer.finished)} == set(range(4))


REWARD = "def score(completion, prompt):\n    return float(completion.text.count('a') > 0)\n"


async def test_with_the_real_buffer_and_rewards_groups_are_taken_evaluated_and_closed(tiny):
    folder = tiny.folder("llama")
    (tiny.root / "reward.py").write_text(REWARD)
    endpoint = f"ipc://{tiny.root}/buffer.sock"
    service = BufferService(
        ServiceSpec(
            run_id="r", run_dir=tiny.root, endpoint=endpoint, prompts_per_step=2,
            branch=0,
            config=BufferConfig(max_staleness_steps=1, drop_no_signal=False),
        )
    )  # fmt: skip
    serving = asyncio.create_task(service.serve())
    spec = WorkerSpec(
        run_id="r", run_dir=tiny.root, endpoint=endpoint, name="worker-0", seed=7, dtype="float32",
        model_dir=folder, rollout=RolloutConfig(max_concurrent_samples=8, samples_per_prompt=4),
        reward=RewardConfig(name=f"{tiny.root}/reward.py:score"),
    )  # fmt: skip
    async with (
        BufferClient(endpoint, "r", "learner") as learner,
        BufferClient(endpoint, "r", "worker-0") as client,
        RewardPool(spec.reward) as rewards,
    ):
        engine = make_engine(spec)
        tiny.engines.append(engine)
        worker = asyncio.create_task(Worker(spec, engine, rewards, client).run())
        await learner.put_prompts([ticket(uid) for uid in range(12)])
        models = {}
        for step in range(1, 5):
            models[step - 1] = tiny.policy(folder, step)
            await learner.publish(tiny.publish(models[step - 1], step - 1))
            batch = await learner.take(step, wait_s=DEADLINE_S)
            assert isinstance(batch, Batch)
            assert batch.proof.violations == 0
            assert [len(group.samples) for group in batch.groups] == [4, 4]
            for group in batch.groups:
                for sample in group.samples:
                    _check(tiny, models, sample.trajectory)
        version = engine.serving
        assert version is not None
        await learner.put_evaluation(
            job_id="e", version=version, prompts=[ticket(1 << 40).prompt], samples_per_prompt=8,
            sampling=SamplingParams(max_new_tokens=5),
        )  # fmt: skip
        results = await learner.await_evaluation("e", wait_s=DEADLINE_S)
        assert isinstance(results, EvaluationResults)
        assert {result.score.status for result in results.results} == {"scored"}
        await learner.close_run("done")
        await asyncio.wait_for(worker, 5)
    await asyncio.wait_for(serving, 10)


def _check(tiny, models, trajectory) -> None:
    """Reward and log-probabilities are those of the text and of the versions it names."""
    assert trajectory.score.value == float("a" in trajectory.text)
    start = 0
    for span in trajectory.versions if len(trajectory.versions) == 1 else ():
        end = start + span.length
        model = models[span.version.step]
        tokens = trajectory.token_ids[2:]
        reference = tiny.logprobs(model, trajectory.token_ids[:2], tokens)[start:end]
        gap = np.abs(trajectory.behaviour_logprobs[start:end] - reference)
        assert gap.max() < 1e-4
        start = end
