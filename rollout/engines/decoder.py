"""Continuous batching: samples enter and leave a batch that is decoded one token at a time.

Synchronous and single-threaded; `native.py` runs it in a thread of its own.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...buffer.records import FinishReason, Version
from ...kernels.models import end_token_ids
from ..config import KvPolicy, RatioLaw
from ..engine import GenerationOutput, GenerationRequest
from ..sampling import sample, uniform
from ..speculation import Draft, Speculation
from .forward import PolicyForward
from .slots import Slots, spans
from .text import Detokeniser
from .weights import Weights

_PREFILL_TOKENS = 8192
"""Prompt tokens, padding included, of one forward: bounds the memory of a prefill."""
_CONTINUED_TOKENS = 1024
"""The same where prompts go on from kept keys: attention scores are held for each of them."""

_NO_DRAFT = Draft([], [])


class _Fed(NamedTuple):
    """The tokens of one forward: of each row its last token and its draft."""

    first_N: np.ndarray
    """[N] where each row begins among the M tokens."""
    row_M: np.ndarray
    offset_M: np.ndarray
    """[M] 0 for the token a row wrote last, 1 for the first of its draft, ..."""
    draft_M: np.ndarray
    """[M] the token proposed to come after each; -1: none."""

    @staticmethod
    def of(drafts: Sequence[Draft]) -> "_Fed":
        counts = np.array([len(draft.tokens) + 1 for draft in drafts])
        first, row = np.cumsum(counts) - counts, np.repeat(np.arange(len(drafts)), counts)
        following = [token for draft in drafts for token in (*draft.tokens, -1)]
        return _Fed(first, row, np.arange(len(row)) - first[row], np.array(following))


class _Kept(NamedTuple):
    """What a turn leaves for the next of its conversation."""

    token_ids: np.ndarray
    """[n] int64: prompt and answer but for its last token, whose keys were never computed."""
    layers: list[Tensor]
    """Their keys and values, from `RaggedCache.copy_of`."""
    kv_version: int


class Decoder:
    """The batch. Trace:

    swap(v0, weights)   serving v0
    submit([a, b])      queued
    step()              prompts of a and b computed together, one token each; then one more
    swap(v1, weights)   a and b go on under v1, at a token boundary
    step() ...          returns a's output when a is finished; b goes on
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_concurrent: int,
        kv: KvPolicy,
        ratio_law: RatioLaw,
        speculation: Speculation | None = None,
    ) -> None:
        """Take over the model.

        Raises:
            ConfigError: an architecture that the forward does not support.
        """
        self._kv, self.speculation = kv, speculation
        self._ratio_law: RatioLaw = ratio_law
        self._forward = PolicyForward(model)
        self._detokeniser = Detokeniser(tokenizer)
        self._cache = self._forward.make_cache(max_concurrent)
        self._slots = Slots(max_concurrent, end_token_ids(model, tokenizer))
        self._max_concurrent = max_concurrent
        self._context = int(model.config.max_position_embeddings)
        self._vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        self._queue: deque[GenerationRequest] = deque()
        self._kept: dict[str, _Kept] = {}
        """By conversation, at most as many as there are slots, the oldest first."""
        self.kept_tokens = 0
        self._versions: list[Version] = []
        self._logprob_dtype = np.float64 if model.dtype == torch.float64 else np.float32
        self.generated_tokens = 0

    @property
    def serving(self) -> Version | None:
        """The version whose weights the model holds."""
        return self._versions[-1] if self._versions else None

    @property
    def running(self) -> int:
        """Samples in the batch."""
        return self._slots.count

    @property
    def queued(self) -> int:
        """Samples that wait for a free row."""
        return len(self._queue)

    def prepare(self, tensors: Mapping[str, Tensor]) -> Weights:
        """Lay new weights out, beside those in use; may run in another thread.

        Raises:
            ModelError: the tensors do not fit.
            ConfigError: with the first weights: the forward does not suit the model.
        """
        return self._forward.prepare(tensors)

    def swap(self, version: Version, weights: Weights) -> Weights | None:
        """Go on with new weights between two steps, samples in flight included; the old ones are
        returned, because giving their memory back takes longer than all of the rest."""
        old, self._forward.weights = self._forward.weights, weights
        self._versions.append(version)
        if self._kv == "recompute":
            self._kept.clear()
            if self._slots.count:
                self._recompute()
        return old

    def submit(self, requests: Sequence[GenerationRequest]) -> list[GenerationOutput]:
        """Queue samples; returns the outputs of those that cannot be generated."""
        errors = []
        for request in requests:
            if reason := self._impossible(request):
                errors.append(_unstarted(request, reason))
            else:
                self._queue.append(request)
        return errors

    def drop(self, request_ids: set[str]) -> None:
        """Forget samples, queued or in flight, without an output."""
        self._queue = deque(r for r in self._queue if r.request_id not in request_ids)
        for slot in range(self._slots.count - 1, -1, -1):
            if self._slots.requests[slot].request_id in request_ids:
                self._release(slot)

    def abort(self) -> list[GenerationOutput]:
        """End all samples as they are."""
        outputs = [self._output(slot, "abort", time.time()) for slot in range(self._slots.count)]
        outputs += [_unstarted(request, "") for request in self._queue]
        self.drop({output.request_id for output in outputs})
        return outputs

    def step(self) -> list[GenerationOutput]:
        """Admit queued samples to free rows, then decode for every row in flight: one token, and
        as many more as a draft guessed right."""
        outputs = self._admit()
        return outputs + (self._decode() if self._slots.count else [])

    def _decode(self) -> list[GenerationOutput]:
        started_s = time.perf_counter()
        slots, used = np.arange(self._slots.count), self._slots.used
        drafts = self._drafts()
        fed = _Fed.of(drafts)
        token_ids = used["last_token"][fed.row_M]
        drafted = fed.offset_M > 0
        token_ids[drafted] = fed.draft_M[np.flatnonzero(drafted) - 1]
        places = self._slots.lengths[fed.row_M] + fed.offset_M
        self._cache.reserve(int(places.max()) + 1)
        hidden = self._forward.extend(token_ids, fed.row_M, places, self._cache)
        logits = self._forward.logits(hidden)
        before = used["num_written"].copy()
        reasons = self._write(slots, fed, logits)
        if self.speculation is not None:
            written = (used["num_written"] - before).tolist()
            self.speculation.saw(drafts, written, time.perf_counter() - started_s)
        return self._finish(reasons)

    def _drafts(self) -> list[Draft]:
        """One for each slot."""
        if self.speculation is None:
            return [_NO_DRAFT] * self._slots.count
        used = self._slots.used
        room = (used["budget"] - used["num_written"] - 1).tolist()
        return self.speculation.propose(
            [
                (request.request_id, request.prompt_token_ids, self._slots.written(slot)["token"],
                 room[slot])
                for slot, request in enumerate(self._slots.requests)
            ]
        )  # fmt: skip

    def _admit(self) -> list[GenerationOutput]:
        """Compute the prompts of queued samples, each prompt once however many samples have it and
        of a conversation only what is new, and write their first tokens."""
        start, room = self._slots.count, self._max_concurrent - self._slots.count
        requests = [self._queue.popleft() for _ in range(min(room, len(self._queue)))]
        if not requests:
            return []
        fresh: dict[tuple[int, ...], list[int]] = {}
        continued: list[tuple[GenerationRequest, _Kept]] = []
        for request in requests:
            if kept := self._take_kept(request):
                continued.append((request, kept))
            else:
                slot = self._add(request, len(self._versions) - 1)
                fresh.setdefault(request.prompt_token_ids, []).append(slot)
        hidden = []
        if fresh:
            prompts = [np.array(prompt, dtype=np.int64) for prompt in fresh]
            hidden.append(self._prefill(prompts, list(fresh.values()), start))
        if continued:
            hidden.append(self._continue(continued))
        slots = np.arange(start, self._slots.count)
        fed = _Fed.of([_NO_DRAFT] * len(slots))
        return self._finish(self._write(slots, fed, self._forward.logits(torch.cat(hidden))))

    def _add(self, request: GenerationRequest, kv_version: int) -> int:
        room = self._context - len(request.prompt_token_ids)
        return self._slots.add(request, min(request.sampling.max_new_tokens, room), kv_version)

    def _take_kept(self, request: GenerationRequest) -> _Kept | None:
        """What the sample's conversation left, if its prompt goes on from there."""
        kept = self._kept.pop(request.conversation, None) if request.conversation else None
        if kept is None:
            return None
        prompt, length = request.prompt_token_ids, len(kept.token_ids)
        goes_on = length < len(prompt) and np.array_equal(prompt[:length], kept.token_ids)
        return kept if goes_on else None

    def _keep(self, slot: int) -> None:
        """Keep a finished turn's keys and values, in place of the oldest when there are many."""
        conversation, row = self._slots.requests[slot].conversation, self._slots.used[slot]
        if not conversation or row["failed"]:
            return
        token_ids = self._slots.cached_tokens(slot)
        layers = self._cache.copy_of(slot, len(token_ids))
        self._kept[conversation] = _Kept(token_ids, layers, int(row["kv_version"]))
        if len(self._kept) > self._max_concurrent:
            del self._kept[next(iter(self._kept))]

    def _continue(self, continued: Sequence[tuple[GenerationRequest, _Kept]]) -> Tensor:
        """Give samples slots with what their conversations kept, and compute the rest of their
        prompts; returns the last hidden states, [A, E]."""
        self._cache.reserve(max(len(request.prompt_token_ids) for request, _ in continued))
        slots, rests, begins = [], [], []
        for request, kept in continued:
            slots.append(self._add(request, kept.kv_version))
            self._cache.put_back(slots[-1], kept.layers)
            begins.append(len(kept.token_ids))
            rests.append(np.array(request.prompt_token_ids[begins[-1] :], dtype=np.int64))
            self.kept_tokens += begins[-1]
        last: dict[int, Tensor] = {}
        for chunk in _chunks([len(rest) for rest in rests], _CONTINUED_TOKENS):
            for at in range(0, len(rests[chunk[-1]]), _CONTINUED_TOKENS):
                rows = [row for row in chunk if at < len(rests[row])]
                parts = [rests[row][at : at + _CONTINUED_TOKENS] for row in rows]
                counts = [len(part) for part in parts]
                places = [
                    begins[row] + at + np.arange(n) for row, n in zip(rows, counts, strict=True)
                ]
                hidden_ME = self._forward.extend(
                    np.concatenate(parts),
                    np.repeat(np.arange(len(rows)), counts),
                    np.concatenate(places),
                    self._cache,
                    np.array([slots[row] for row in rows]),
                )
                last |= zip(rows, hidden_ME[np.cumsum(counts) - 1], strict=True)
        return torch.stack([last[row] for row in range(len(rests))])

    def _recompute(self) -> None:
        """Compute all keys and values again under the weights just loaded."""
        slots = range(self._slots.count)
        self._prefill([self._slots.cached_tokens(s) for s in slots], [[s] for s in slots], 0)
        self._slots.used["kv_version"] = len(self._versions) - 1

    def _prefill(
        self, prompts: Sequence[np.ndarray], slots: Sequence[Sequence[int]], start: int
    ) -> Tensor:
        """Compute prompts, short ones with short ones, into the slots of each; `slots` together
        are all those from `start` on. Returns their last hidden states, [A, E] in slot order."""
        self._cache.reserve(max(map(len, prompts)))
        hidden_AE: Tensor | None = None
        for chunk in _chunks([len(prompt) for prompt in prompts], _PREFILL_TOKENS):
            targets = np.concatenate([slots[i] for i in chunk])
            sources = np.repeat(np.arange(len(chunk)), [len(slots[i]) for i in chunk])
            hidden_ME = self._forward.prefill(
                [prompts[i] for i in chunk], targets, sources, self._cache
            )
            if hidden_AE is None:
                hidden_AE = hidden_ME.new_empty(self._slots.count - start, hidden_ME.shape[1])
            hidden_AE[targets - start] = hidden_ME[sources]
        assert hidden_AE is not None
        return hidden_AE

    def _write(self, slots_N: np.ndarray, fed: _Fed, logits_MV: Tensor) -> dict[int, FinishReason]:
        """Draw and stamp the token after each fed one, as far as the drafts were right; returns
        which slots ended, and how.

        Position by position, so that a sample ends at its first stop, whatever was drafted on.
        """
        used, slots_M = self._slots.used, slots_N[fed.row_M]
        uniforms_M = uniform(used["key"][slots_M], used["num_written"][slots_M] + fed.offset_M)
        draws = sample(logits_MV, self._slots.laws(slots_M), uniforms_M, self._ratio_law)
        now_s, ended = time.time(), {}
        slots_A, rows_A = slots_N, fed.first_N
        while len(slots_A):
            self._slots.record(slots_A, draws, rows_A, len(self._versions) - 1, now_s)
            self.generated_tokens += len(slots_A)
            stopped_A = self._stopped(slots_A)
            state = used[slots_A]
            ended_A = stopped_A | (state["num_written"] >= state["budget"]) | (state["failed"] > 0)
            for row in np.flatnonzero(ended_A):
                ended[int(slots_A[row])] = "stop" if stopped_A[row] else "length"
            on_A = ~ended_A & (fed.draft_M[rows_A] == draws.token_ids_B[rows_A])
            slots_A, rows_A = slots_A[on_A], rows_A[on_A] + 1
        return ended

    def _finish(self, reasons: Mapping[int, FinishReason]) -> list[GenerationOutput]:
        """The outputs of ended slots, which become free."""
        outputs, now_s = [], time.time()
        # From the last one down: `_release` moves the last slot, which then has been looked at.
        for slot in sorted(reasons, reverse=True):
            outputs.append(self._output(slot, reasons[slot], now_s))
            self._keep(slot)
            self._release(slot)
        return outputs

    def _stopped(self, slots_A: np.ndarray) -> np.ndarray:
        """[A] bool: which samples ended by a stop id or a stop string."""
        stopped_A = self._slots.stopped(slots_A)
        searched = ~stopped_A & (self._slots.used["has_stop_strings"][slots_A] > 0)
        for row in np.flatnonzero(searched):
            slot = int(slots_A[row])
            stop = self._slots.requests[slot].sampling.stop
            stopped_A[row] = self._detokeniser.just_stopped(
                self._slots.written(slot)["token"], stop
            )
        return stopped_A

    def _release(self, slot: int) -> None:
        if self._slots.used["failed"][slot]:
            self._cache.wipe(slot)
        if self.speculation is not None:
            request, written = self._slots.requests[slot], self._slots.written(slot)["token"]
            self.speculation.drafter.finish(request.request_id, request.prompt_token_ids, written)
        moved = self._slots.release(slot)
        if moved is not None:
            self._cache.move(moved, slot, int(self._slots.lengths[slot]))

    def _output(self, slot: int, reason: FinishReason, now_s: float) -> GenerationOutput:
        request, row = self._slots.requests[slot], self._slots.used[slot]
        written, error = self._slots.written(slot), ""
        if row["failed"]:
            error = f"NaN or infinite logits at token {len(written)}, version {self.serving}"
            reason, written = "abort", written[:-1]
        tokens = written["token"].copy()
        ends = reason == "stop" and self._slots.ends_with_stop_id(slot)
        return GenerationOutput(
            request_id=request.request_id,
            token_ids=tokens,
            behaviour_logprobs=written["logprob"].astype(self._logprob_dtype),
            versions=spans(written["version"], self._versions),
            kv_version_min=spans(written["kv_version"], self._versions),
            text=self._detokeniser.cut(tokens[:-1] if ends else tokens, request.sampling.stop),
            finish_reason=reason,
            first_token_s=float(row["first_token_s"]),
            finished_s=now_s,
            removed_mass=written["removed_mass"].copy(),
            kept_ids=None if error else self._slots.kept_ids(slot),
            error=error,
        )

    def _impossible(self, request: GenerationRequest) -> str:
        """Why a sample cannot be generated; empty when it can."""
        prompt = request.prompt_token_ids
        if not prompt:
            return "the prompt has no tokens"
        if len(prompt) >= self._context:
            return (
                f"the prompt has {len(prompt)} tokens, which leaves none of the model's context of "
                f"{self._context} for the answer"
            )
        if min(prompt) < 0 or max(prompt) >= self._vocabulary:
            odd = next(i for i in prompt if not 0 <= i < self._vocabulary)
            return f"the prompt has token id {odd}, the model knows 0 to {self._vocabulary - 1}"
        if request.sampling.max_new_tokens < 1:
            return f"max_new_tokens is {request.sampling.max_new_tokens}, at least 1 is needed"
        return ""


def _chunks(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts, shortest first, in chunks whose padded size is bounded."""
    chunk: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunk and lengths[index] * (len(chunk) + 1) > max_tokens:
            yield chunk
            chunk = []
        chunk.append(index)
    yield chunk


def _unstarted(request: GenerationRequest, error: str) -> GenerationOutput:
    """The output of a sample that never wrote a token."""
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
    )
