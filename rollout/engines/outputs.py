"""What a sample comes back as: ended, never begun, or impossible from the start."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...buffer.records import FinishReason, Version
from ..engine import GenerationOutput, GenerationRequest
from .kv_cache import KvShape
from .slots import Slots, spans
from .text import Detokeniser


class Limits(NamedTuple):
    """What the model and the memory allow."""

    context: int
    vocabulary: int
    most_tokens: float
    """Of keys and values; inf where they are not bounded."""
    shape: KvShape

    def budget(self, request: GenerationRequest) -> int:
        """Tokens a sample may write."""
        room = self.context - len(request.prompt_token_ids)
        return min(request.sampling.max_new_tokens, room)

    def refusal(self, request: GenerationRequest) -> str:
        """Why a sample cannot be generated; empty when it can."""
        prompt, law = request.prompt_token_ids, request.sampling
        if not prompt:
            return "the prompt has no tokens"
        if len(prompt) >= self.context:
            return (
                f"the prompt has {len(prompt)} tokens, which leaves none of the model's context of "
                f"{self.context} for the answer"
            )
        if min(prompt) < 0 or max(prompt) >= self.vocabulary:
            odd = next(i for i in prompt if not 0 <= i < self.vocabulary)
            return f"the prompt has token id {odd}, the model knows 0 to {self.vocabulary - 1}"
        if law.max_new_tokens < 1:
            return f"max_new_tokens is {law.max_new_tokens}, at least 1 is needed"
        if not law.temperature >= 0:
            return f"temperature is {law.temperature}, at least 0 is needed"
        if not all(law.stop):
            return "a stop string is empty"
        for key, ids in (
            ("logit_bias", [token for token, _ in law.logit_bias]),
            ("stop_token_ids", law.stop_token_ids),
        ):
            if any(not 0 <= token < self.vocabulary for token in ids):
                return f"{key} names a token id outside 0 to {self.vocabulary - 1}"
        parts = np.array([len(prompt), self.budget(request)])
        tokens = int(self.shape.in_pages(parts).sum())
        if tokens > self.most_tokens:
            mib = tokens * self.shape.bytes_per_token / 2**20
            return (
                f"a prompt of {parts[0]} tokens and an answer of up to {parts[1]} take whole pages "
                f"of keys and values: {tokens} tokens, {mib:.1f} MiB; rollout.kv_memory_mb allows "
                f"{self.most_tokens:.0f}"
            )
        return ""


def ended(
    slots: Slots,
    slot: int,
    reason: FinishReason,
    versions: Sequence[Version],
    detokeniser: Detokeniser,
    dtype: type[np.floating],
) -> GenerationOutput:
    """The output of a sample in flight that has ended for a reason.

    Args:
        slots: the samples in flight.
        slot: of the sample.
        reason: how it ended.
        versions: what the slots' stamps are indices of.
        detokeniser: of its text.
        dtype: of its log-probabilities.
    """
    request, row = slots.requests[slot], slots.used[slot]
    written, error = slots.written(slot), ""
    if row["failed"]:
        error = f"NaN or infinite logits at token {len(written)}, version {versions[-1]}"
        reason, written = "abort", written[:-1]
    tokens = written["token"].copy()
    ends = reason == "stop" and slots.ends_with_stop_id(slot)
    return GenerationOutput(
        request_id=request.request_id,
        token_ids=tokens,
        behaviour_logprobs=written["logprob"].astype(dtype),
        versions=spans(written["version"], versions),
        kv_version_min=spans(written["kv_version"], versions),
        text=detokeniser.cut(tokens[:-1] if ends else tokens, request.sampling.stop),
        finish_reason=reason,
        first_token_s=float(row["first_token_s"]),
        finished_s=time.time(),
        removed_mass=written["removed_mass"].copy(),
        kept_ids=None if error else slots.kept_ids(slot),
        error=error,
    )


def unstarted(request: GenerationRequest, error: str = "", death: str = "") -> GenerationOutput:
    """The output of a sample of which no token counts: impossible, or ended before its time."""
    nothing = np.zeros(0, dtype=np.float32)
    now_s = time.time()
    return GenerationOutput(
        request_id=request.request_id,
        token_ids=np.zeros(0, dtype=np.int32),
        behaviour_logprobs=nothing,
        versions=(),
        kv_version_min=(),
        text="",
        finish_reason="abort",
        first_token_s=now_s,
        finished_s=now_s,
        removed_mass=nothing,
        error=error,
        death=death,
    )
