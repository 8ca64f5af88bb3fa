"""From a claim to generation requests, and from a finished sample to a trajectory: pure functions.

Shape suffixes: L tokens of a trajectory, N tokens the policy wrote.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from ..buffer.messages import Claim, EvaluationClaim
from ..buffer.records import (
    Completion,
    RaggedArray,
    SamplingParams,
    Score,
    Timings,
    Trajectory,
    Turn,
)
from .config import RolloutConfig
from .engine import GenerationOutput, GenerationRequest
from .environments.conversation import Written
from .sampling import sample_key


def training_requests(
    claim: Claim, prompt_token_ids: Sequence[int], config: RolloutConfig, seed: int
) -> dict[str, tuple[int, GenerationRequest]]:
    """Request id -> (index in the group, request) of a claim's samples."""
    sampling = msgspec.structs.replace(
        config.sampling.params(), max_new_tokens=claim.ticket.sizing.max_new_tokens
    )
    uid, attempt = claim.ticket.prompt.uid, claim.attempt
    kept = config.ratio_law == "kept_set" and sampling.truncates
    return {
        (name := f"{claim.lease_id}/{uid}.{attempt}.{index}"): (
            index,
            GenerationRequest(
                request_id=name,
                prompt_token_ids=tuple(prompt_token_ids),
                sampling=sampling,
                sample_key=sample_key(seed, uid, attempt, index),
                record_kept_ids=kept,
            ),
        )
        for index in claim.indices
    }


def evaluation_requests(
    claim: EvaluationClaim, prompt_token_ids: Sequence[int], seed: int
) -> dict[str, tuple[int, GenerationRequest]]:
    """The same for held-out samples. Every version draws the same random numbers, so that two
    evaluations differ by their policies and not by luck."""
    uid = claim.prompt.uid
    return {
        (name := f"{claim.job_id}/{uid}.{index}"): (
            index,
            GenerationRequest(
                request_id=name,
                prompt_token_ids=tuple(prompt_token_ids),
                sampling=claim.sampling,
                sample_key=sample_key(seed, uid, 0, index),
            ),
        )
        for index in claim.indices
    }


def completion_of(output: GenerationOutput) -> Completion:
    """What the reward sees of a sample."""
    return Completion(
        text=output.text,
        token_ids=tuple(output.token_ids.tolist()),
        finish_reason=output.finish_reason,
    )


def trajectory_of(
    claim: Claim,
    index: int,
    request: GenerationRequest,
    output: GenerationOutput,
    score: Score,
    *,
    engine_id: str,
    claimed_s: float,
    scored_s: float,
    written: Written | None = None,
) -> Trajectory:
    """The record that travels to the learner; `written` are the tokens of an episode."""
    written = written or _single_turn(request, output)
    return Trajectory(
        uid=claim.ticket.prompt.uid,
        attempt=claim.attempt,
        index=index,
        token_ids=written.token_ids,
        policy_mask=written.policy_mask,
        behaviour_logprobs=output.behaviour_logprobs,
        versions=output.versions,
        kv_version_min=output.kv_version_min,
        sampling=request.sampling,
        finish_reason=output.finish_reason,
        text=output.text,
        score=score,
        turns=written.turns,
        timings=Timings(
            claimed_s=claimed_s,
            first_token_s=output.first_token_s,
            generated_s=output.finished_s,
            scored_s=scored_s,
        ),
        engine_id=engine_id,
        extras=_extras(request.sampling, output),
    )


def _single_turn(request: GenerationRequest, output: GenerationOutput) -> Written:
    """One prompt and one answer."""
    prompt_ids = np.array(request.prompt_token_ids, dtype=np.int32)
    token_ids_L = np.concatenate([prompt_ids, output.token_ids])
    num_prompt, num_all = len(prompt_ids), len(token_ids_L)
    return Written(
        token_ids=token_ids_L,
        policy_mask=np.arange(num_all) >= num_prompt,
        turns=(
            Turn(start=0, end=num_prompt, role="prompt"),
            Turn(start=num_prompt, end=num_all, role="policy"),
        ),
    )


def _extras(sampling: SamplingParams, output: GenerationOutput) -> dict[str, RaggedArray]:
    """What truncation did to each token; nothing when the law does not truncate."""
    if not sampling.truncates:
        return {}
    one_each = np.arange(len(output.removed_mass) + 1, dtype=np.int64)
    extras = {"removed_mass": RaggedArray(values=output.removed_mass, offsets=one_each)}
    if output.kept_ids is not None:
        extras["kept_ids"] = output.kept_ids
    return extras
