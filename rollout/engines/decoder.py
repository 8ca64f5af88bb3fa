"""Continuous batching: samples enter and leave a batch that is decoded one token at a time.

Synchronous and single-threaded; `native.py` runs it in a thread of its own.
"""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...buffer.records import FinishReason, Version
from ...kernels.models import end_token_ids
from ..config import KvPolicy, RatioLaw
from ..drafters import NO_DRAFT, Asked, Draft
from ..engine import GenerationOutput, GenerationRequest
from ..sampling import ACCEPT_STREAM, Draws, sample, uniform, verify
from ..speculation import Speculation
from .forward import PolicyForward
from .kv_cache import PromptKeys, RaggedCache
from .memory import Memory
from .outputs import Limits, ended, unstarted
from .slots import Slots
from .text import Detokeniser
from .waiting import Group, KeptTurns, Waiting
from .weights import Weights

_PREFILL_TOKENS = 8192
"""Prompt tokens of one forward while no sample waits for its next token: bounds its memory."""
_SHARED_BYTES = 1 << 20
"""Of a prompt's keys and values in one layer, as often as they would be read too often each step:
from so many on they are read once for all of a group. An estimate: what the bytes cost to read
against what a second attention costs to set up and merge."""


class _Fed(NamedTuple):
    """The tokens of one forward: of each row its last token and its draft."""

    first_N: np.ndarray
    """[N] where each row begins among the M tokens."""
    row_M: np.ndarray
    offset_M: np.ndarray
    """[M] 0 for the token a row wrote last, 1 for the first of its draft, ..."""
    draft_M: np.ndarray
    """[M] the token proposed to come after each; -1: none."""
    laws: dict[int, Tensor]
    """Of those proposed with a law, by their index among M: [V]."""

    @staticmethod
    def of(drafts: Sequence[Draft]) -> "_Fed":
        if not any(draft.tokens for draft in drafts):
            rows = np.arange(len(drafts))
            return _Fed(rows, rows, np.zeros_like(rows), np.full_like(rows, -1), {})
        counts = np.array([len(draft.tokens) + 1 for draft in drafts])
        first, row = np.cumsum(counts) - counts, np.repeat(np.arange(len(drafts)), counts)
        following = [token for draft in drafts for token in (*draft.tokens, -1)]
        laws = {
            int(first[n]) + place: law
            for n, draft in enumerate(drafts)
            for place, law in enumerate(draft.laws or ())
        }
        return _Fed(first, row, np.arange(len(row)) - first[row], np.array(following), laws)


class Decoder:
    """The batch. Trace:

    swap(v0, weights)   serving v0
    submit([a, b])      they wait
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
        prefill_tokens: int = 512,
        kv_memory_mb: int = 0,
    ) -> None:
        """Take over the model.

        Raises:
            ConfigError: an architecture that the forward does not support.
        """
        self._kv, self.speculation = kv, speculation
        self._ratio_law: RatioLaw = ratio_law
        self._forward = PolicyForward(model)
        self._detokeniser = Detokeniser(tokenizer)
        self._cache = RaggedCache(self._forward.kv_shape, max_concurrent)
        self._slots = Slots(max_concurrent, end_token_ids(model, tokenizer))
        self._max_concurrent, self._prefill_tokens = max_concurrent, prefill_tokens
        token_bytes = self._forward.kv_shape.bytes_per_token
        self._limits = Limits(
            context=int(model.config.max_position_embeddings),
            vocabulary=len(model.get_input_embeddings().weight),  # type: ignore[arg-type]
            most_tokens=kv_memory_mb * 2**20 // token_bytes if kv_memory_mb else np.inf,
            shape=self._forward.kv_shape,
        )
        self._waiting, self._kept = Waiting(), KeptTurns(max_concurrent)
        self._memory = Memory(
            self._limits.most_tokens, self._slots, self._cache, self._waiting, self._kept
        )
        self._versions: list[Version] = []
        self._logprob_dtype = np.float64 if model.dtype == torch.float64 else np.float32
        self.generated_tokens = self.kept_tokens = self.prefilled_tokens = 0
        self.forwards = self.paused = self.kv_bytes = 0
        self.kv_share = 0.0

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
        """Samples that wait for a free row, for memory, or for their prompt to be computed."""
        return self._waiting.num_samples

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
        for group in self._waiting:  # a first token needs a last hidden state of these weights
            if group.keys is not None and (self._kv == "recompute" or not group.keys.num_left):
                group.keys = None
        if self._kv == "recompute":
            self._kept.forget_all()
            self._recompute()
        return old

    def submit(self, requests: Sequence[GenerationRequest]) -> list[GenerationOutput]:
        """Let samples wait; returns the outputs of those that cannot be generated."""
        errors = []
        for request in requests:
            if reason := self._limits.refusal(request):
                errors.append(unstarted(request, reason))
            else:
                asked = self._detokeniser.with_stop_ids(request)
                self._waiting.add(asked, goes_on=request.conversation in self._kept)
        return errors

    def drop(self, request_ids: set[str]) -> None:
        """Forget samples, waiting or in flight, without an output."""
        self._waiting.drop(request_ids)
        for slot in range(self._slots.count - 1, -1, -1):
            if self._slots.requests[slot].request_id in request_ids:
                self._release(slot)
        if self.speculation is not None:  # paused ones were in no slot
            for sample in request_ids:
                self.speculation.drafter.forget(sample)

    def abort(self) -> list[GenerationOutput]:
        """End all samples as they are."""
        outputs = [self._output(slot, "abort") for slot in range(self._slots.count)]
        outputs += [unstarted(request, "") for group in self._waiting for request in group.requests]
        self.drop({output.request_id for output in outputs})
        return outputs

    def step(self) -> list[GenerationOutput]:
        """Compute some of the prompts that wait, then decode for every row in flight: one token,
        and as many more as a draft guessed right."""
        outputs: list[GenerationOutput] = []
        if self._waiting.num_samples:
            self._admit()
            self._fill(self._prefill_tokens if self._slots.count else _PREFILL_TOKENS)
            outputs = self._start()
        if self._slots.count:
            outputs += self._decode()
            self._kept.forget_idle(self.forwards)
        tokens = self._cache.num_tokens + self._memory.outside_rows
        self.kv_bytes = self._limits.shape.bytes_per_token * tokens
        self.kv_share = self._memory.share_used
        return outputs

    def _decode(self) -> list[GenerationOutput]:
        started_s = time.perf_counter()
        while (paused := self._memory.make_room()) is not None:
            self._pause(paused)
        slots, used = np.arange(self._slots.count), self._slots.used
        drafts = self._drafts()
        fed = _Fed.of(drafts)
        token_ids = used["last_token"][fed.row_M]
        drafted = fed.offset_M > 0
        token_ids[drafted] = fed.draft_M[np.flatnonzero(drafted) - 1]
        places = self._slots.lengths[fed.row_M] + fed.offset_M
        begins = used["begin"].copy()
        hidden = self._forward.extend(
            token_ids, fed.row_M, places, self._cache, begins, self._slots.sharing()
        )
        self.forwards += 1
        before = used["num_written"].copy()
        reasons = self._write(slots, fed, self._forward.logits(hidden))
        if self.speculation is not None:
            written = (used["num_written"] - before).tolist()
            self.speculation.saw(drafts, written, time.perf_counter() - started_s)
        return self._finish(reasons)

    def _drafts(self) -> list[Draft]:
        """One for each slot."""
        if self.speculation is None:
            return [NO_DRAFT] * self._slots.count
        return self.speculation.propose(
            self._slots.used["num_written"],
            lambda slot: self._slots.requests[slot].prompt_token_ids,
            self._asked,
        )

    def _asked(self, slots: Sequence[int]) -> list[Asked]:
        """Some samples, as a drafter is told of them; drafts are short where memory is."""
        used = self._slots.used
        room = np.minimum(used["budget"] - used["num_written"] - 1, self._memory.drafts())
        return [
            Asked(
                request.request_id, request.prompt_token_ids,
                self._slots.written(slot)["token"], int(room[slot]),
                request.sampling, request.sample_key,
            )
            for slot in slots
            for request in [self._slots.requests[slot]]
        ]  # fmt: skip

    def _admit(self) -> None:
        """Give waiting samples rows to come, group by group, as far as rows and memory go."""
        begun = self._waiting.begun
        free = self._max_concurrent - self._slots.count - sum(len(g.admitted) for g in begun)
        for group in self._waiting:
            while group.waiting and free > 0 and self._memory.fits(group):
                self._waiting.admit(group)
                free -= 1
            if group.waiting:
                break
        for group in self._waiting.begun:
            if group.keys is None:
                self._begin(group)

    def _begin(self, group: Group) -> None:
        """Reserve memory for a prompt, of a conversation from where it was left; one that rows read
        is there already."""
        shape, request, num_tokens = self._forward.kv_shape, group.admitted[0], len(group.token_ids)
        version = len(self._versions) - 1
        read_too_often = (len(group.requests) - 1) * num_tokens * shape.bytes_per_token
        group.is_shared = read_too_often >= _SHARED_BYTES * shape.num_layers
        group.is_shared |= self._memory.is_tight(group)
        if kept := self._kept.take(request.conversation, group.token_ids):
            group.keys = kept.goes_on(group.token_ids, shape)
            self.kept_tokens += len(kept)
        elif shared := self._slots.shared_prompt(group.token_ids, version):
            group.keys, group.is_shared = shared, True
        else:
            group.keys = PromptKeys(group.token_ids, shape.zeros(num_tokens), version)
        self._waiting.keyed.append(group)

    def _fill(self, budget: int) -> None:
        """Compute at most so many tokens of the prompts begun, the oldest first."""
        parts = []
        for group in self._waiting.begun:
            if group.keys and (count := min(group.keys.num_left, budget)):
                parts.append((group.keys, count))
                budget -= count
        if parts:
            self._forward.fill(parts)
            self.prefilled_tokens += sum(count for _, count in parts)

    def _start(self) -> list[GenerationOutput]:
        """Put the samples whose prompts are computed into slots, and write their first tokens."""
        ready, slots, hidden, sources = [], [], [], []
        for group in self._waiting.begun:
            if group.keys and not group.keys.num_left and self._memory.can_start(group):
                ready.append(group)
                new = self._occupy(group)
                if group.paused is None:
                    slots += new
                    sources += [len(hidden)] * len(new)
                    hidden.append(group.keys.hidden_E)
        self._waiting.start(ready)
        if not slots:
            return []
        logits_PV = self._forward.logits(torch.stack(hidden))
        fed = _Fed.of([NO_DRAFT] * len(slots))
        return self._finish(self._write(np.array(slots), fed, logits_PV[sources]))

    def _occupy(self, group: Group) -> list[int]:
        """Slots for the admitted samples of a group whose keys are computed."""
        assert group.keys is not None
        shared, version = group.keys if group.is_shared else None, group.keys.kv_version
        own = [self._limits.budget(of) + len(of.prompt_token_ids) for of in group.admitted]
        self._cache.reserve(max(own) - (len(shared) if shared else 0))
        if group.paused is not None:
            new = [self._slots.resume(group.paused, version, shared)]
        else:
            new = [
                self._slots.add(request, self._limits.budget(request), version, shared)
                for request in group.admitted
            ]
        if shared is None:
            self._cache.put(slice(new[0], new[-1] + 1), group.keys.layers)
        return new

    def _pause(self, slot: int) -> None:
        paused = self._slots.pause(slot)
        self._waiting.add_paused(paused)
        self.paused += 1
        self._cache.release(slot, self._slots.count)

    def _keep(self, slot: int) -> None:
        """Keep a finished turn's keys and values for the next turn."""
        conversation, row = self._slots.requests[slot].conversation, self._slots.used[slot]
        if not conversation or row["failed"]:
            return
        token_ids, shared = self._slots.cached_tokens(slot), self._slots.shared[slot]
        layers = self._cache.copy_of(slot, len(token_ids) - int(row["begin"]))
        if shared is not None:
            layers = [torch.cat(both, dim=2) for both in zip(shared.layers, layers, strict=True)]
        turn = PromptKeys(token_ids, layers, int(row["kv_version"]), len(token_ids))
        self._kept.keep(conversation, turn, self.forwards)

    def _recompute(self) -> None:
        """Compute all keys and values of samples in flight under the weights just loaded."""
        version, shape = len(self._versions) - 1, self._forward.kv_shape
        prompts = [prompt for prompt, _ in self._slots.sharing()]
        for prompt in prompts:
            prompt.num_done, prompt.kv_version = 0, version
        self._fill_whole(prompts)
        rows: list[PromptKeys] = []
        for slot in range(self._slots.count):
            token_ids, shared = self._slots.cached_tokens(slot), self._slots.shared[slot]
            zeros = [] if shared else shape.zeros(len(token_ids))
            row = shared.goes_on(token_ids, shape) if shared else PromptKeys(token_ids, zeros, 0)
            rows.append(row)
            # What counts is what they hold: with a shared prompt each has a copy for now.
            if sum(map(len, rows)) >= _PREFILL_TOKENS or slot + 1 == self.running:
                self._fill_whole(rows)
                for at, row in enumerate(rows, slot + 1 - len(rows)):
                    self._cache.put(slice(at, at + 1), row.layers, self._slots.used[at]["begin"])
                rows.clear()
        self._slots.used["kv_version"] = version

    def _fill_whole(self, prompts: Sequence[PromptKeys]) -> None:
        """Compute what is left of some prompts."""
        while left := [prompt for prompt in prompts if prompt.num_left]:
            budget, parts = _PREFILL_TOKENS, []
            for prompt in left:
                if count := min(prompt.num_left, budget):
                    parts.append((prompt, count))
                    budget -= count
            self._forward.fill(parts)

    def _write(self, slots_N: np.ndarray, fed: _Fed, logits_MV: Tensor) -> dict[int, FinishReason]:
        """Draw and stamp the token after each fed one, as far as the drafts were right and to the
        sample's first stop, whatever was drafted on; returns which slots ended, and how."""
        used, slots_M = self._slots.used, slots_N[fed.row_M]
        self._slots.add_bias(slots_M, logits_MV)
        places_M = used["num_written"][slots_M] + fed.offset_M
        uniforms_M = uniform(used["key"][slots_M], places_M)
        draws = sample(logits_MV, self._slots.laws(slots_M), uniforms_M, self._ratio_law)
        if fed.laws:
            self._verify(slots_M, fed, logits_MV, uniforms_M, draws)
        stops_M = self._slots.stops(slots_M, draws.token_ids_B)
        ends_M = stops_M | (places_M + 1 >= used["budget"][slots_M]) | np.isnan(draws.logprobs_B)
        last_M = np.flatnonzero(ends_M | (fed.draft_M != draws.token_ids_B))
        last_N = last_M[np.searchsorted(last_M, fed.first_N)]  # what was fed last has no draft
        for row in np.flatnonzero(used["has_stop_strings"][slots_N]).tolist():
            slot, first = int(slots_N[row]), int(fed.first_N[row])
            new = draws.token_ids_B[first : last_N[row] + 1]
            stop = self._slots.requests[slot].sampling.stop
            found = self._detokeniser.first_stop(self._slots.written(slot)["token"], new, stop)
            if found is not None:
                last_N[row] = first + found
                stops_M[first + found] = ends_M[first + found] = True
        rows_W = np.flatnonzero(np.arange(len(slots_M)) <= last_N[fed.row_M])
        counts_N, version = last_N - fed.first_N + 1, len(self._versions) - 1
        self._slots.record(slots_N, counts_N, draws, rows_W, version, time.time())
        self.generated_tokens += len(rows_W)
        return {
            int(slots_N[row]): "stop" if stops_M[last_N[row]] else "length"
            for row in np.flatnonzero(ends_M[last_N])
        }

    def _verify(
        self,
        slots_M: np.ndarray,
        fed: _Fed,
        logits_MV: Tensor,
        uniforms_M: np.ndarray,
        draws: Draws,
    ) -> None:
        """Replace what was drawn after tokens whose drafts come with their laws."""
        rows = np.array(list(fed.laws))
        used, slots_B = self._slots.used, slots_M[rows]
        places_B = used["num_written"][slots_B] + fed.offset_M[rows]
        accept_B = uniform(used["key"][slots_B] ^ ACCEPT_STREAM, places_B)
        verified = verify(
            logits_MV[rows], self._slots.laws(slots_B), uniforms_M[rows], fed.draft_M[rows],
            torch.stack(list(fed.laws.values())), accept_B, self._ratio_law,
        )  # fmt: skip
        draws.put(rows, verified)

    def _finish(self, reasons: Mapping[int, FinishReason]) -> list[GenerationOutput]:
        """The outputs of ended slots, which become free."""
        outputs = []
        # From the last one down: `_release` moves the last slot, which then has been looked at.
        for slot in sorted(reasons, reverse=True):
            outputs.append(self._output(slot, reasons[slot]))
            self._memory.lengths.saw(len(outputs[-1].token_ids))
            self._keep(slot)
            self._release(slot)
        return outputs

    def _release(self, slot: int) -> None:
        if self.speculation is not None:
            request, written = self._slots.requests[slot], self._slots.written(slot)["token"]
            self.speculation.drafter.finish(request.request_id, request.prompt_token_ids, written)
        self._slots.release(slot)
        self._cache.release(slot, self._slots.count)

    def _output(self, slot: int, reason: FinishReason) -> GenerationOutput:
        return ended(
            self._slots, slot, reason, self._versions, self._detokeniser, self._logprob_dtype
        )
