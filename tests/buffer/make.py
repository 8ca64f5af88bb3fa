"""Small honest records for buffer tests: groups of two, trajectories of a few tokens."""

from collections.abc import Sequence

import numpy as np
from slipstream.buffer.records import (
    Message,
    Prompt,
    SamplingParams,
    Score,
    ScoreStatus,
    SizingDecision,
    Ticket,
    Timings,
    Trajectory,
    Version,
    VersionSpan,
    WeightsManifest,
)


def version(step: int, branch: int = 0) -> Version:
    """A version whose digest names it, as equal weights have equal digests."""
    return Version(branch=branch, step=step, digest=f"{branch}.{step}")


def manifest(step: int, branch: int = 0) -> WeightsManifest:
    """Published weights without files."""
    return WeightsManifest(version=version(step, branch), shards=())


def prompt(uid: int) -> Prompt:
    """A prompt with everything a reward may need."""
    question = Message(role="user", content=f"what is {uid} + 1?")
    return Prompt(
        uid=uid,
        source_id=f"sum/{uid}",
        task="sum",
        messages=(question,),
        payload={"answer": str(uid + 1), "digits": [1, 2.5, None, {"deep": True}]},
    )


def ticket(uid: int, num_samples: int = 2) -> Ticket:
    """The prompt with a fixed sizing decision."""
    sizing = SizingDecision(
        sizer="fixed", num_samples=num_samples, max_new_tokens=8, reason="fixed"
    )
    return Ticket(prompt=prompt(uid), sizing=sizing)


def trajectory(
    uid: int,
    index: int,
    steps: Sequence[int | Version] = (0, 0, 0),
    *,
    attempt: int = 0,
    branch: int = 0,
    value: float | None = None,
    status: ScoreStatus = "scored",
) -> Trajectory:
    """A sample whose i-th policy token was written by the i-th version of `steps`.

    Its reward is its index unless `value` says otherwise, so that groups have a signal.
    """
    versions = [s if isinstance(s, Version) else version(s, branch) for s in steps]
    spans = tuple(VersionSpan(version=v, length=1) for v in versions)
    num_prompt, num_policy = 2, len(steps)
    reward = (float(index) if value is None else value) if status == "scored" else None
    return Trajectory(
        uid=uid,
        attempt=attempt,
        index=index,
        token_ids=np.arange(num_prompt + num_policy, dtype=np.int32),
        policy_mask=np.arange(num_prompt + num_policy) >= num_prompt,
        behaviour_logprobs=np.full(num_policy, -0.5, dtype=np.float32),
        versions=spans,
        kv_version_min=spans,
        sampling=SamplingParams(),
        finish_reason="stop",
        text=f"answer {uid}.{index}",
        score=Score(value=reward, status=status),
        turns=(),
        timings=Timings(claimed_s=0.0, first_token_s=0.0, generated_s=0.0, scored_s=0.0),
        engine_id="engine",
    )
