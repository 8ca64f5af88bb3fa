"""A sample whose reward process was lost is issued again, and not for ever."""

from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from slipstream.buffer.messages import Claim
from slipstream.buffer.records import (
    Message,
    Prompt,
    SamplingParams,
    Score,
    SizingDecision,
    Ticket,
    Version,
    VersionSpan,
)
from slipstream.rollout.engine import GenerationOutput, GenerationRequest
from slipstream.rollout.hand_in import MAX_SCORING_ATTEMPTS, HandIn

LOST = Score(value=None, status="infrastructure_failed", reason="no process to be had")
BAD = Score(value=None, status="reward_failed", reason="raised")


class Buffer:
    """Remembers what is handed in and given back."""

    def __init__(self) -> None:
        self.finished: list[Any] = []
        self.released: list[dict[str, Any]] = []

    async def finish(self, trajectory: Any, lease_id: str) -> None:
        self.finished.append(trajectory)

    async def release(self, **what: Any) -> None:
        self.released.append(what)


async def hand_in(score: Score, attempt: int, death: str = "") -> Buffer:
    """What the buffer is told of one sample with this score."""

    async def give(*_: Any) -> Score:
        return score

    prompt = Prompt(uid=1, source_id="t/1", task="t", messages=(Message(role="user", content="?"),))
    sizing = SizingDecision(sizer="fixed", num_samples=1, max_new_tokens=4, reason="")
    claim = Claim(
        lease_id="l",
        ticket=Ticket(prompt=prompt, sizing=sizing),
        attempt=attempt,
        indices=(0,),
        lease_s=60,
    )
    spans = (VersionSpan(version=Version(branch=0, step=0), length=2),)
    output = GenerationOutput(
        request_id="a",
        token_ids=np.array([3, 4], dtype=np.int32),
        behaviour_logprobs=np.zeros(2, dtype=np.float32),
        versions=spans,
        kv_version_min=spans,
        text="x",
        finish_reason="stop",
        first_token_s=0,
        finished_s=0,
        removed_mass=np.zeros(2, dtype=np.float32),
    )
    if death:
        output = msgspec.structs.replace(output, finish_reason="abort", death=death)
    request = GenerationRequest(
        request_id="a", prompt_token_ids=(1,), sampling=SamplingParams(), sample_key=7
    )
    buffer = Buffer()
    rewards = SimpleNamespace(
        score=give, raise_if_failing=lambda: None, describe=lambda: "stand-in, pid 1"
    )
    samples = HandIn(cast(Any, buffer), cast(Any, rewards), "worker-0")
    samples.lease(claim, "a", 0)
    await samples.finish(claim, 0, request, output, 0.0)
    assert samples.num_open == 0
    return buffer


async def test_a_sample_whose_reward_process_was_lost_is_issued_again():
    buffer = await hand_in(LOST, attempt=0)
    assert not buffer.finished
    [released] = buffer.released
    assert (released["reason"], released["detail"]) == ("expired", LOST.reason)
    assert (released["uid"], released["indices"], released["lease_id"]) == (1, [0], "l")


async def test_the_death_of_an_engine_is_told_with_the_samples_that_it_cut_off():
    buffer = await hand_in(BAD, attempt=0, death="core 1")
    [released] = buffer.released
    assert (released["reason"], released["death"]) == ("expired", "core 1")


@pytest.mark.parametrize(
    ("score", "attempt"), [(LOST, MAX_SCORING_ATTEMPTS - 1), (BAD, 0), (Score(value=1.0), 0)]
)
async def test_the_last_attempt_and_every_other_score_are_handed_in(score: Score, attempt: int):
    buffer = await hand_in(score, attempt)
    assert not buffer.released
    assert [trajectory.score for trajectory in buffer.finished] == [score]
