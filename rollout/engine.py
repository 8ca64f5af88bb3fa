"""The Engine protocol: what a rollout worker needs of whatever generates tokens."""

from collections.abc import AsyncIterator, Sequence
from typing import Literal, Protocol

import numpy as np

from ..buffer.records import (
    FinishReason,
    RaggedArray,
    Record,
    SamplingParams,
    Version,
    VersionSpan,
    WeightsManifest,
)

EngineState = Literal["COLD", "LOADING", "SERVING"]
"""COLD -> LOADING(v) -> SERVING(v) -> LOADING(v + 1) ...; only SERVING engines get work."""
START_S = 1800.0
"""How long an engine may take to start: vLLM compiles for many minutes, the first time."""


class GenerationRequest(Record):
    """One sample to generate."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    sample_key: int
    """64-bit key of the sample's random numbers (`sampling.sample_key`): token i draws
    `sampling.uniform(sample_key, i)`, so a sample does not depend on its batch."""
    record_kept_ids: bool = False
    conversation: str = ""
    """Of turns that continue one another, the same name. The engine may keep the keys and values of
    a turn for the next one, whose prompt begins with this one's prompt and answer."""


class GenerationOutput(Record):
    """One finished sample. N tokens were generated, the end token included."""

    request_id: str
    token_ids: np.ndarray
    """[N] int32."""
    behaviour_logprobs: np.ndarray
    """[N] float32 (float64 for a float64 engine), under the ratio law."""
    versions: tuple[VersionSpan, ...]
    kv_version_min: tuple[VersionSpan, ...]
    text: str
    """Decoded without the end token, cut before a stop string."""
    finish_reason: FinishReason
    first_token_s: float
    finished_s: float
    removed_mass: np.ndarray
    """[N] float32: probability that truncation removed."""
    kept_ids: RaggedArray | None = None
    error: str = ""
    """Why the sample cannot be generated (prompt longer than the context, NaN logits ...)."""
    death: str = ""
    """Names the death of the engine that cut the sample off: the same for all that it cut off, and
    of no other death. One of them may be the cause."""


class EngineStats(Record):
    """For metrics and displays."""

    running: int
    queued: int
    generated_tokens: int
    swaps: int
    last_swap_s: float
    drafted_tokens: int = 0
    """Proposed by speculation; `accepted_tokens` of them needed no forward of their own."""
    accepted_tokens: int = 0
    speed_up: float = 0.0
    """By speculation, estimated from the measured cost of recent steps; 0 where it is not known."""
    kept_tokens: int = 0
    """Prompt tokens that needed no forward: an earlier turn's keys and values were kept."""
    kv_share: float = 0.0
    """Of the memory for keys and values that is in use; 0 where it is not what limits."""
    preemptions: int = 0
    """Times a sample in flight lost its keys for want of it (others grew longer than predicted),
    and computed them again."""
    prefilled_tokens: int = 0
    """Prompt tokens computed; a group's prompt counts once."""
    forwards: int = 0
    """Decode steps: each wrote a token for every sample in flight, and accepted drafts."""
    kv_bytes: int = 0
    """Taken by keys and values now."""
    held: frozenset[str] | None = None
    """Request ids of the samples that run or wait in it; None where that is not known."""


class Engine(Protocol):
    """Generates samples, each token stamped with the version that wrote it."""

    @property
    def state(self) -> EngineState: ...

    @property
    def serving(self) -> Version | None:
        """The version the next token will be written by; None until the first load is done."""
        ...

    def generate(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[GenerationOutput]:
        """Yield each sample when it is finished, in any order."""
        ...

    async def load(self, manifest: WeightsManifest) -> None:
        """Verify and load weights, in flight: at a token boundary, without draining.

        Raises:
            CorruptData: bytes differ from their digest; the engine keeps serving what it had.
        """
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...
