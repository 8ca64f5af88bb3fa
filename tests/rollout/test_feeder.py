"""The feeder: prompts in uid order under back-pressure; the right versions evaluated, once."""

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slipstream.buffer.errors import CorruptData, PeerLost, Refused
from slipstream.buffer.messages import (
    Accepted,
    EvaluationResults,
    FinishEvaluation,
    Newest,
    NotYet,
    Welcome,
)
from slipstream.buffer.records import Score, Version, WeightsManifest
from slipstream.rollout import feeder
from slipstream.rollout.config import EvalConfig, FeederSpec, PromptsConfig, RolloutConfig
from slipstream.rollout.evaluation import (
    EvaluationSchedule,
    append_line,
    last_evaluated_step,
    mean_interval,
    read_lines,
    summary,
)
from slipstream.rollout.prompts import HELD_OUT_UIDS


class FakeBuffer:
    """A buffer service in memory: takes so many prompts, publishes versions when told to."""

    def __init__(self, next_uid: int = 0, room: int = 100) -> None:
        self.next_uid, self.room = next_uid, room
        self.uids: list[int] = []
        self.tickets: list = []
        self.newest: Version | None = None
        self.retired: set[int] = set()
        self.evaluated: dict[str, dict] = {}
        self.closing = False
        self.changed = asyncio.Condition()
        self.connected = False

    def client(self, *_: object) -> "FakeBuffer":
        return self

    async def connect(self) -> Welcome:
        self.connected = True
        return Welcome(run_id="r", branch=0, next_uid=self.next_uid)

    async def close(self) -> None:
        self.connected = False

    async def change(self, **attributes) -> None:
        async with self.changed:
            for name, value in attributes.items():
                setattr(self, name, value)
            self.changed.notify_all()

    async def _until(self, condition) -> None:
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(lambda: self.closing or condition()), 10)

    async def put_prompts(self, tickets, wait_s) -> Accepted:
        await self._until(lambda: self.room > 0)
        taken = tickets[: self.room] if not self.closing else []
        self.room -= len(taken)
        self.tickets += taken
        self.uids += [ticket.prompt.uid for ticket in taken]
        return Accepted(count=len(taken), closing=self.closing)

    async def await_version(self, after=None, wait_s=0.0) -> Newest:
        if wait_s:
            await self._until(lambda: self.newest not in (None, after))
        manifest = self.newest and WeightsManifest(version=self.newest, shards=())
        return Newest(manifest=manifest, closing=self.closing)

    async def put_evaluation(self, *, job_id, version, **request) -> None:
        if version.step in self.retired:
            await self.change(newest=Version(branch=version.branch, step=version.step + 1))
            raise Refused("retired")
        self.evaluated[job_id] = {"version": version, "asked": 0, **request}

    async def await_evaluation(self, job_id, wait_s):
        job = self.evaluated[job_id]
        job["asked"] += 1
        if self.closing or job["asked"] == 1:
            return NotYet(waiting_on=f"{job['asked']}", closing=self.closing)
        results = tuple(
            FinishEvaluation(
                job_id=job_id,
                uid=prompt.uid,
                index=index,
                text="",
                score=Score(value=float(prompt.uid % 2)),
                num_tokens=7,
            )
            for prompt in job["prompts"]
            for index in range(job["samples_per_prompt"])
        )
        return EvaluationResults(job_id=job_id, version=job["version"], results=results)


def spec(tmp_path, steps=5, every_steps=2, **evaluation) -> FeederSpec:
    return FeederSpec(
        run_id="r",
        run_dir=tmp_path,
        endpoint="ipc://nowhere",
        seed=0,
        prompts=PromptsConfig(size=1000, held_out=10),
        rollout=RolloutConfig(samples_per_prompt=4),
        eval=EvalConfig(every_steps=every_steps, **evaluation),
        steps=steps,
    )


@pytest.fixture
def buffer(monkeypatch):
    fake = FakeBuffer()
    monkeypatch.setattr(feeder, "BufferClient", fake.client)
    return fake


def steps_of(tmp_path) -> list[int]:
    return [line["step"] for line in read_lines(tmp_path / "eval.jsonl")]


async def publish_up_to(buffer, tmp_path, last: int, first: int = 0, branch: int = 0) -> None:
    for step in range(first, last + 1):
        await buffer.change(newest=Version(branch=branch, step=step))
        await asyncio.sleep(0.02)


async def test_prompts_are_put_in_uid_order_without_gaps_as_room_allows(buffer, tmp_path):
    buffer.next_uid, buffer.room = 17, 40
    feeding = asyncio.create_task(feeder.feed(spec(tmp_path)))
    for _ in range(100):
        await asyncio.sleep(0.02)
        if buffer.room == 0 and len(buffer.uids) < 90:
            await buffer.change(room=7)
        if len(buffer.uids) >= 90:
            break
    assert buffer.uids == list(range(17, 17 + len(buffer.uids)))
    assert {(t.sizing.sizer, t.sizing.num_samples) for t in buffer.tickets} == {("fixed", 4)}
    await buffer.change(closing=True)
    await asyncio.wait_for(feeding, 30)
    assert not buffer.connected


async def test_first_scheduled_and_final_versions_are_evaluated_and_then_it_ends(buffer, tmp_path):
    feeding = asyncio.create_task(feeder.feed(spec(tmp_path, samples_per_prompt=2, temperature=0)))
    await publish_up_to(buffer, tmp_path, last=5)
    await asyncio.wait_for(feeding, 30)
    assert steps_of(tmp_path) == [0, 2, 4, 5]
    line = read_lines(tmp_path / "eval.jsonl")[1]
    expected = {"version": "0.2", "branch": 0, "prompts": 10, "samples": 20, "failed": 0}
    assert expected.items() <= line.items()
    assert (line["reward_mean"], line["mean_tokens"]) == (0.5, 7.0)
    job = buffer.evaluated["eval-0.2"]
    assert [prompt.uid for prompt in job["prompts"]] == list(
        range(HELD_OUT_UIDS, HELD_OUT_UIDS + 10)
    )
    assert job["sampling"].temperature == 0
    assert not set(buffer.uids) & {prompt.uid for prompt in job["prompts"]}


async def test_a_retired_version_gives_way_to_the_newer_one(buffer, tmp_path):
    buffer.retired = {2}
    feeding = asyncio.create_task(feeder.feed(spec(tmp_path, steps=4)))
    await publish_up_to(buffer, tmp_path, last=2)
    await asyncio.sleep(0.1)
    await publish_up_to(buffer, tmp_path, first=4, last=4)
    await asyncio.wait_for(feeding, 30)
    assert steps_of(tmp_path) == [0, 3, 4]


async def test_a_refusal_that_no_newer_version_explains_is_an_error(buffer, tmp_path, monkeypatch):
    async def refuse(**_: object) -> None:
        raise Refused("two prompts have one uid")

    monkeypatch.setattr(buffer, "put_evaluation", refuse)
    buffer.newest = Version(branch=0, step=0)
    with pytest.raises(Refused, match="one uid"):
        await asyncio.wait_for(feeder.feed(spec(tmp_path)), 30)
    assert not buffer.connected


async def test_a_resume_evaluates_nothing_twice_and_redoes_what_the_lost_branch_did(
    buffer, tmp_path
):
    for branch, step in ((0, 0), (0, 2), (0, 4)):
        append_line(tmp_path / "eval.jsonl", {"version": f"{branch}.{step}", "step": step})
    buffer.newest = Version(branch=1, step=2)
    feeding = asyncio.create_task(feeder.feed(spec(tmp_path)))
    await publish_up_to(buffer, tmp_path, first=2, last=5, branch=1)
    await asyncio.wait_for(feeding, 30)
    lines = read_lines(tmp_path / "eval.jsonl")
    assert [line["version"] for line in lines[3:]] == ["1.4", "1.5"]


async def test_without_evaluations_it_ends_with_the_final_version(buffer, tmp_path):
    feeding = asyncio.create_task(feeder.feed(spec(tmp_path, enabled=False)))
    await publish_up_to(buffer, tmp_path, last=5)
    await asyncio.wait_for(feeding, 30)
    assert not (tmp_path / "eval.jsonl").exists()


async def test_closing_during_an_evaluation_ends_it_without_a_line(buffer, tmp_path, monkeypatch):
    async def never(job_id, wait_s):
        await asyncio.sleep(0.02)
        return NotYet(waiting_on="worker-0", closing=buffer.closing)

    monkeypatch.setattr(buffer, "await_evaluation", never)
    buffer.newest = Version(branch=0, step=0)
    feeding = asyncio.create_task(feeder.feed(spec(tmp_path)))
    await asyncio.sleep(0.2)
    await buffer.change(closing=True)
    await asyncio.wait_for(feeding, 30)
    assert steps_of(tmp_path) == []


async def test_an_evaluation_without_progress_ends_the_run_and_names_who_was_waited_on(
    buffer, tmp_path, monkeypatch
):
    async def stuck(job_id, wait_s):
        await asyncio.sleep(0.01)
        return NotYet(waiting_on="worker-0: 3 of 10 samples")

    monkeypatch.setattr(buffer, "await_evaluation", stuck)
    monkeypatch.setattr(feeder, "EVALUATION_STALL_S", 0.1)
    buffer.newest = Version(branch=0, step=0)
    with pytest.raises(PeerLost, match=r"eval-0\.0 made no progress .* worker-0: 3 of 10"):
        await asyncio.wait_for(feeder.feed(spec(tmp_path)), 30)


@given(
    every=st.integers(0, 10),
    final=st.integers(1, 60),
    skipped=st.sets(st.integers(1, 60)),
)
def test_whatever_versions_are_missed_each_period_first_and_final_are_evaluated(
    every, final, skipped
):
    schedule = EvaluationSchedule(every, final, None)
    seen = [step for step in range(final + 1) if step not in skipped or step == final]
    evaluated = []
    for step in seen:
        if schedule.is_due(step):
            evaluated.append(step)
            schedule.done(step)
    assert evaluated[0] == 0
    assert evaluated[-1] == final
    periods = [step // every for step in evaluated[:-1]] if every else [0]
    assert len(periods) == len(set(periods))
    assert (
        set(periods) >= {step // every for step in seen[:-1]} if every else evaluated == [0, final]
    )


def test_a_torn_last_line_is_dropped_and_other_damage_is_reported(tmp_path):
    file = tmp_path / "eval.jsonl"
    append_line(file, {"step": 0})
    with file.open("ab") as stream:
        stream.write(b'{"step": 2, "rew')
    assert last_evaluated_step(file, 10) == 0
    append_line(file, {"step": 2})
    assert [line["step"] for line in read_lines(file)] == [0, 2]
    file.write_text('{"step": 0}\n{"stp": 2}\n{"step": 4}\n')
    with pytest.raises(CorruptData, match="line 2 of"):
        read_lines(file)


def test_wilson_bounds_shares_and_prompt_means_bound_the_rest():
    mean, low, high = mean_interval([[1.0]] * 8 + [[0.0]] * 2)
    assert (mean, low, high) == (
        pytest.approx(0.8),
        pytest.approx(0.49016, abs=1e-5),
        pytest.approx(0.94332, abs=1e-5),
    )
    assert mean_interval([[1.0]] * 10)[2] == pytest.approx(1.0)
    # Four samples of one prompt that always agree say no more than one.
    agreeing = [[1.0] * 4, [0.0] * 4, [1.0] * 4]
    half = 1.959964 * np.std([1, 0, 1], ddof=1) / np.sqrt(3)
    assert mean_interval(agreeing) == (
        pytest.approx(2 / 3),
        pytest.approx(2 / 3 - half),
        pytest.approx(2 / 3 + half),
    )
    assert mean_interval([]) == (None, None, None)
    assert mean_interval([[0.3]]) == (0.3, None, None)


def test_failed_samples_are_counted_and_left_out_of_the_mean():
    def sample(uid: int, value: float | None) -> FinishEvaluation:
        status = "scored" if value is not None else "reward_failed"
        score = Score(value=value, status=status)
        return FinishEvaluation(job_id="j", uid=uid, index=0, text="", score=score, num_tokens=uid)

    results = (sample(1, 1.0), sample(2, None), sample(3, 0.0))
    version = Version(branch=2, step=7)
    line = summary(EvaluationResults(job_id="j", version=version, results=results), 1.5)
    assert json.loads(json.dumps(line)) == line
    assert (line["version"], line["failed"], line["reward_mean"]) == ("2.7", 1, 0.5)
    assert (line["prompts"], line["samples"], line["mean_tokens"]) == (3, 3, 2.0)
