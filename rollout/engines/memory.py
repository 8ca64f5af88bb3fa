"""Which samples fit into memory: their predicted peak, from the lengths of earlier ones.

Counted in tokens' keys and values. Shape suffixes: N samples.
"""

from collections import deque

import numpy as np

from ..engine import GenerationRequest
from .kv_cache import KvShape, RaggedCache
from .slots import Slots
from .waiting import Group, KeptTurns, Waiting

_REMEMBERED = 1024
"""Finished samples whose lengths predict those to come: the policy, and its lengths, drift."""
_QUANTILE = 0.8
"""Of the lengths still possible, the one predicted: the median would be exceeded by half of all
samples, and each one that is exceeded may cost a pause."""


class Lengths:
    """Lengths of the samples that finished last."""

    def __init__(self) -> None:
        self._seen: deque[int] = deque(maxlen=_REMEMBERED)

    def saw(self, num_written: int) -> None:
        """A sample ended with so many tokens."""
        self._seen.append(num_written)

    def left(self, num_written_N: np.ndarray, budget_N: np.ndarray) -> np.ndarray:
        """[N] tokens each sample is predicted to write still: the quantile of the lengths seen that
        exceed what it has written; up to its budget while there are none.

        Args:
            num_written_N: [N] int, tokens so far.
            budget_N: [N] int, at most.
        """
        if not self._seen:
            return budget_N - num_written_N
        seen = np.sort(np.fromiter(self._seen, dtype=np.int64))
        first_N = np.searchsorted(seen, num_written_N, side="right")
        at_N = first_N + np.floor(_QUANTILE * (len(seen) - first_N)).astype(np.int64)
        predicted_N = np.where(first_N < len(seen), seen[at_N.clip(max=len(seen) - 1)], budget_N)
        return np.minimum(predicted_N, budget_N) - num_written_N


def peak_tokens(lengths_N: np.ndarray, left_N: np.ndarray, shape: KvShape) -> int:
    """Most tokens of memory, in whole pages, that rows take until the last has ended, none being
    added. It is reached when one of them ends, and those that go on have grown by what it had left.

    Args:
        lengths_N: [N] int, tokens in each row now.
        left_N: [N] int, tokens each is still to get.
        shape: says what a page is.
    Source: the predicted peak of Past-Future (arXiv:2507.10150).
    """
    grown_NN = shape.in_pages(lengths_N + left_N[:, None])
    return int((grown_NN * (left_N >= left_N[:, None])).sum(axis=1).max(initial=0))


class Memory:
    """Keeps to a bound on tokens: who may begin, and what there is room for."""

    def __init__(
        self,
        most_tokens: float,
        slots: Slots,
        cache: RaggedCache,
        waiting: Waiting,
        kept: KeptTurns,
    ) -> None:
        """`most_tokens` is inf where memory is not bounded."""
        self.most_tokens, self.lengths = most_tokens, Lengths()
        self._slots, self._cache, self._waiting, self._kept = slots, cache, waiting, kept

    @property
    def outside_rows(self) -> int:
        """Tokens of kept turns, and of prompts that rows share or that are being computed."""
        prompts = {id(keys): len(keys) for keys in self._slots.shared if keys}
        prompts |= {id(group.keys): len(group.keys) for group in self._waiting.keyed if group.keys}
        return self._kept.num_tokens + sum(prompts.values())

    @property
    def share_used(self) -> float:
        """Of the bound, what samples in flight need: neither the rest of their pages, nor kept
        turns, which give way to them."""
        tokens = int(self._slots.row_lengths.sum()) + self.outside_rows - self._kept.num_tokens
        return tokens / self.most_tokens

    @property
    def in_rows(self) -> float:
        """Most tokens that rows may take."""
        bounded = self.most_tokens < np.inf
        return self.most_tokens - self.outside_rows if bounded else np.inf

    def is_tight(self, group: Group) -> bool:
        """Whether copies of a prompt in the rows of its samples would not fit."""
        return self._with_copies(group) + len(group.token_ids) > self.in_rows

    def can_start(self, group: Group) -> bool:
        """Whether the rows of a group whose prompt is computed fit beside those in flight; with
        none in flight they do."""
        return not self._slots.count or self._with_copies(group) <= self.in_rows

    def _with_copies(self, group: Group) -> int:
        """Tokens in rows, once each admitted sample of a group has its prompt in its own."""
        row = 0 if group.is_shared else len(group.token_ids)
        return self._cache.num_tokens + len(group.admitted) * self._cache.shape.in_pages(row)

    def drafts(self) -> np.ndarray:
        """[n] tokens that each slot may take beyond its next one, if all of them do."""
        lengths = self._slots.row_lengths + 1
        if self.most_tokens == np.inf:
            return np.full(len(lengths), np.iinfo(np.int64).max)
        taken, page = self._cache.with_lengths(lengths), self._cache.shape.page_tokens
        spare = max(0, int(self.in_rows) - int(taken.sum()))
        return taken - lengths + spare // len(lengths) // page * page

    def fits(self, group: Group) -> bool:
        """Whether one more sample of a group fits, at the peak predicted for all of them; one
        always does."""
        begun = [(g, request) for g in self._waiting.begun for request in g.admitted]
        if self.most_tokens == np.inf or not (self._slots.count or begun):
            return True
        used = self._slots.used
        more = [self._of(g, request) for g, request in (*begun, (group, group.waiting[0]))]
        row, written, budget = np.array(more).T
        peak = peak_tokens(
            np.append(self._slots.row_lengths, row),
            self.lengths.left(
                np.append(used["num_written"], written), np.append(used["budget"], budget)
            ),
            self._cache.shape,
        )
        no_keys = {id(g): len(g.token_ids) for g in (*self._waiting.begun, group) if not g.keys}
        peak += sum(no_keys.values())
        while peak > self.in_rows and len(self._kept):
            self._kept.forget_oldest()
        return peak <= self.in_rows

    @staticmethod
    def _of(group: Group, request: GenerationRequest) -> tuple[int, int, int]:
        """Of a sample that is not in flight: tokens its row starts with, tokens written, budget."""
        written = 0 if group.paused is None else len(group.paused.written)
        row = 0 if group.keys and group.is_shared else len(group.token_ids)
        return row, written, request.sampling.max_new_tokens

    def make_room(self) -> int | None:
        """Forget what can be computed again until the next token of all rows fits; where that is
        not enough, returns the slot to pause, the one that loses least. The last one always fits.
        """
        if self.most_tokens == np.inf:
            return None
        while self._cache.with_lengths(self._slots.row_lengths + 1).sum() > self.in_rows:
            in_use = {id(keys) for keys in self._slots.shared}
            begun = [g for g in self._waiting.keyed if g.keys and id(g.keys) not in in_use]
            if len(self._kept):
                self._kept.forget_oldest()
            elif begun:
                self._waiting.put_back(begun[-1])
            else:
                several = self._slots.count > 1
                return int(self._slots.used["num_written"].argmin()) if several else None
        return None
