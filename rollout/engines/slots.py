"""What the engine knows of each sample in flight: one array entry per slot.

Slots 0 .. n-1 are in use; when a sample leaves, the last one moves into its place. A step reads and
writes slices of numpy arrays; it does not loop over rows.

Shape suffixes: R slots, A some slots, M fed tokens, W tokens written in a step, N all tokens that
a slot has written, S stop ids of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...buffer.records import RaggedArray, Version, VersionSpan
from ..engine import GenerationRequest
from ..sampling import Draws, RowLaws
from .attention import Shared
from .kv_cache import PromptKeys

_NO_STOP = -1
"""Fills the rows of the stop table that have fewer ids; no token has it."""

_SLOT = np.dtype(
    [
        ("num_prompt", "i8"),
        ("begin", "i8"),  # position of the row's first key: the length of a shared prompt, or 0
        ("last_token", "i8"),
        ("num_written", "i8"),
        ("budget", "i8"),
        ("key", "u8"),
        ("kv_version", "i8"),  # of the oldest key of the row
        ("first_token_s", "f8"),
        ("temperature", "f8"),
        ("top_k", "i8"),
        ("top_p", "f8"),
        ("min_p", "f8"),
        ("has_stop_strings", "i8"),
        ("has_bias", "i8"),
        ("failed", "i8"),
    ]
)
_WRITTEN = np.dtype(
    [
        ("token", "i4"),
        ("version", "i4"),
        ("kv_version", "i4"),
        ("removed_mass", "f4"),
        ("logprob", "f8"),
    ]
)


class Paused(NamedTuple):
    """A sample taken out of its slot, to go on later; its keys are gone."""

    request: GenerationRequest
    state: np.ndarray
    written: np.ndarray
    kept_ids: list[np.ndarray]
    token_ids: np.ndarray
    """[n] int64: the tokens whose keys it needs to go on."""


class Slots:
    """The samples in flight. Trace, with two slots:

    add(a, ...), add(b, ...)     a in slot 0, b in slot 1
    record([0, 1], [1, 2], ...)  one token written to a, two to b
    release(0)                   b in slot 0
    """

    def __init__(self, num_slots: int, end_token_ids: Sequence[int]) -> None:
        self.count = 0
        self.requests: list[GenerationRequest] = []
        """Of the slots in use, in their order."""
        self.shared: list[PromptKeys | None] = []
        """The prompt that is not part of the slot's row, because others read it, too."""
        self._kept_ids: list[list[np.ndarray]] = []
        self._end_token_ids = tuple(end_token_ids)
        self._state = np.zeros(num_slots, dtype=_SLOT)
        self._stop_ids = np.full((num_slots, len(self._end_token_ids)), _NO_STOP, dtype=np.int64)
        self._written = np.zeros((num_slots, 0), dtype=_WRITTEN)

    @property
    def used(self) -> np.ndarray:
        """[n] of `_SLOT`: a view of the slots in use."""
        return self._state[: self.count]

    def add(
        self, request: GenerationRequest, budget: int, kv_version: int, shared: PromptKeys | None
    ) -> int:
        """Put a sample whose prompt is computed into the next slot, and return the slot.

        Args:
            request: the sample.
            budget: tokens it may write.
            kv_version: index of the oldest weights among those that computed the prompt.
            shared: the prompt when it is not part of the row.
        """
        slot, law = self.count, request.sampling
        self._state[slot] = (
            len(request.prompt_token_ids), len(shared) if shared else 0, 0, 0, budget,
            request.sample_key, kv_version, 0.0, law.temperature, law.top_k, law.top_p, law.min_p,
            bool(law.stop), bool(law.logit_bias), False,
        )  # fmt: skip
        self._enter(request, shared, [])
        return slot

    def pause(self, slot: int) -> Paused:
        """Take a sample out; the last one moves into its place."""
        paused = Paused(
            self.requests[slot], self._state[slot].copy(), self.written(slot).copy(),
            self._kept_ids[slot], self.cached_tokens(slot),
        )  # fmt: skip
        self.release(slot)
        return paused

    def resume(self, paused: Paused, kv_version: int, shared: PromptKeys | None) -> int:
        """Put a sample back; as `add`, where all the sample's tokens are what is computed."""
        slot = self.count
        self._state[slot] = paused.state
        self._state[slot]["begin"] = len(shared) if shared else 0
        self._state[slot]["kv_version"] = kv_version
        self._reserve(len(paused.written))
        self._written[slot, : len(paused.written)] = paused.written
        self._enter(paused.request, shared, paused.kept_ids)
        return slot

    def _enter(
        self, request: GenerationRequest, shared: PromptKeys | None, kept_ids: list[np.ndarray]
    ) -> None:
        stop_ids = self._end_token_ids + request.sampling.stop_token_ids
        if (missing := len(stop_ids) - self._stop_ids.shape[1]) > 0:
            self._stop_ids = np.pad(
                self._stop_ids, ((0, 0), (0, missing)), constant_values=_NO_STOP
            )
        self._stop_ids[self.count] = _NO_STOP
        self._stop_ids[self.count, : len(stop_ids)] = stop_ids
        self.requests.append(request)
        self.shared.append(shared)
        self._kept_ids.append(kept_ids)
        self.count += 1

    def sharing(self) -> list[Shared]:
        """The prompts that slots share, each with its slots."""
        rows: dict[int, list[int]] = {}
        for slot in np.flatnonzero(self.used["begin"]).tolist():
            rows.setdefault(id(self.shared[slot]), []).append(slot)
        found = ((self.shared[slots[0]], slots) for slots in rows.values())
        return [Shared(prompt, _rows(slots)) for prompt, slots in found if prompt]

    def shared_prompt(self, token_ids: np.ndarray, version: int) -> PromptKeys | None:
        """A prompt of these tokens that slots share, computed by these weights alone: its last
        hidden state gives first tokens only under them."""
        for keys in {id(keys): keys for keys in self.shared if keys}.values():
            if keys.kv_version == version and np.array_equal(keys.token_ids, token_ids):
                return keys
        return None

    def add_bias(self, slots_M: np.ndarray, logits_MV: Tensor) -> None:
        """Add each sample's logit bias to its rows, in place."""
        for row in np.flatnonzero(self._state["has_bias"][slots_M]):
            ids, values = zip(*self.requests[slots_M[row]].sampling.logit_bias, strict=True)
            logits_MV[row, list(ids)] += torch.tensor(values, dtype=logits_MV.dtype)

    @property
    def lengths(self) -> np.ndarray:
        """[n] tokens whose keys are there: the last one written is not yet."""
        return self.used["num_prompt"] + self.used["num_written"] - 1

    @property
    def row_lengths(self) -> np.ndarray:
        """[n] those of them in the slot's row."""
        return self.lengths - self.used["begin"]

    def laws(self, slots_A: np.ndarray) -> RowLaws:
        """Sampling parameters of slots; one may come several times."""
        used = self._state[slots_A]
        return RowLaws(
            temperature_B=used["temperature"],
            top_k_B=used["top_k"],
            top_p_B=used["top_p"],
            min_p_B=used["min_p"],
        )

    def record(
        self,
        slots_A: np.ndarray,
        counts_A: np.ndarray,
        draws: Draws,
        rows_W: np.ndarray,
        version: int,
        now_s: float,
    ) -> None:
        """Append drawn tokens to each of some slots.

        Args:
            slots_A: each at most once.
            counts_A: [A] how many, at least 1.
            draws: of a whole step.
            rows_W: [sum of counts] which of the draws they are, slot by slot.
            version: an index into the engine's list: whose weights made the logits.
            now_s: the time.
        """
        state, slots_W = self._state, np.repeat(slots_A, counts_A)
        before_A, ends_A = state["num_written"][slots_A], np.cumsum(counts_A)
        after_A = before_A + counts_A
        places_W = np.arange(len(rows_W)) + np.repeat(after_A - ends_A, counts_A)
        self._reserve(int(after_A.max()))
        written = np.empty(len(rows_W), dtype=_WRITTEN)
        written["token"] = draws.token_ids_B[rows_W]
        written["logprob"] = draws.logprobs_B[rows_W]
        written["removed_mass"] = draws.removed_mass_B[rows_W]
        written["version"], written["kv_version"] = version, state["kv_version"][slots_W]
        self._written[slots_W, places_W] = written
        state["first_token_s"][slots_A[before_A == 0]] = now_s
        last_A = written[ends_A - 1]
        state["last_token"][slots_A], state["num_written"][slots_A] = last_A["token"], after_A
        state["failed"][slots_A] = np.isnan(last_A["logprob"])
        if draws.kept_ids:
            for slot, row in zip(slots_W.tolist(), rows_W.tolist(), strict=True):
                if row in draws.kept_ids and self.requests[slot].record_kept_ids:
                    self._kept_ids[slot].append(draws.kept_ids[row])

    def stops(self, slots_M: np.ndarray, token_ids_M: np.ndarray) -> np.ndarray:
        """[M] bool: whether a token ends the sample of a slot."""
        return (self._stop_ids[slots_M] == token_ids_M[:, None]).any(axis=1)

    def ends_with_stop_id(self, slot: int) -> bool:
        """Whether the last token of a slot does."""
        return bool((self._stop_ids[slot] == self._state["last_token"][slot]).any())

    def written(self, slot: int) -> np.ndarray:
        """[N] of `_WRITTEN`: the tokens of a slot with their stamps."""
        return self._written[slot, : self._state["num_written"][slot]]

    def cached_tokens(self, slot: int) -> np.ndarray:
        """The tokens whose keys are there for a slot: all but the last one written."""
        return np.concatenate(
            [self.requests[slot].prompt_token_ids, self.written(slot)["token"][:-1]]
        ).astype(np.int64)

    def kept_ids(self, slot: int) -> RaggedArray | None:
        """The recorded kept sets of a slot; None when its law does not truncate."""
        recorded = self._kept_ids[slot]
        if not recorded:
            return None
        offsets = np.cumsum([0, *map(len, recorded)], dtype=np.int64)
        return RaggedArray(values=np.concatenate(recorded), offsets=offsets)

    def release(self, slot: int) -> None:
        """Free a slot: the sample in the last one, `count` from then on, moves into it."""
        last = self.count - 1
        self.count = last
        for of_slots in (self.requests, self.shared, self._kept_ids):
            of_slots[slot] = of_slots[last]  # type: ignore[index]
            of_slots.pop()
        for array in (self._state, self._stop_ids, self._written):
            array[slot] = array[last]

    def _reserve(self, num_tokens: int) -> None:
        capacity = self._written.shape[1]
        if num_tokens > capacity:
            sizes = (len(self._state), max(64, num_tokens, 2 * capacity))
            grown = np.zeros(sizes, dtype=_WRITTEN)
            grown[:, :capacity] = self._written
            self._written = grown


def _rows(slots: list[int]) -> Tensor | slice:
    first, end = slots[0], slots[-1] + 1
    return slice(first, end) if end - first == len(slots) else torch.tensor(slots)


def spans(indices_N: np.ndarray, versions: Sequence[Version]) -> tuple[VersionSpan, ...]:
    """Run-length code: [N] indices into `versions` -> the versions with how often each follows."""
    if not len(indices_N):
        return ()
    edges = np.flatnonzero(np.diff(indices_N)) + 1
    starts = np.concatenate([[0], edges])
    lengths = np.diff(np.concatenate([starts, [len(indices_N)]]))
    return tuple(
        VersionSpan(version=versions[int(indices_N[start])], length=int(length))
        for start, length in zip(starts, lengths, strict=True)
    )
