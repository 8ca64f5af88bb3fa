"""Who drafts: what a drafter is, and those that look a sample's text up.

A drafter proposes, for each sample, one token per place. None here knows an engine.
"""

import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from ..buffer.records import SamplingParams

_MIN_CONTEXT = 2
"""Shorter contexts guess too badly to be worth a look."""
_COUNTED_LINKS = 32
"""Contexts of one place whose successor is counted: bounds the work on text that repeats itself."""


class Draft(NamedTuple):
    """Tokens proposed for one sample, and how much each is to be trusted."""

    tokens: list[int]
    classes: list[int]
    """Of each token: an index below `NUM_CLASSES`; the controller learns what a class is worth.
    Where laws are given it must depend on the law alone and not on the token drawn: a draft cut off
    for what it drew would leave a biased rest."""
    laws: list[Tensor] | None = None
    """Of each token: [V] float64, the law it was drawn from; None: a point draft."""


NO_DRAFT = Draft([], [])


class Asked(NamedTuple):
    """A sample that a draft is wanted for."""

    sample: str
    """Its name."""
    prompt: tuple[int, ...]
    written: np.ndarray
    """[N] int: all it has so far."""
    limit: int
    """Most tokens to propose."""
    law: SamplingParams
    key: int
    """Of its random numbers."""


class Drafter(Protocol):
    """Proposes tokens for samples."""

    reading_s: float
    """Of the last `propose`: time for texts that it had not followed as they were written."""

    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        """For each of some samples, tokens to come after what it has written."""
        ...

    def finish(self, sample: str, prompt: tuple[int, ...], written: np.ndarray) -> None:
        """The sample has ended: what it wrote may help its siblings and later epochs."""
        ...

    def forget(self, sample: str) -> None:
        """The sample was dropped, whether or not it was ever drafted for."""
        ...

    def remembers(self, prompt: tuple[int, ...]) -> bool:
        """Whether samples of the prompt that have ended help its next one."""
        ...


_LENGTH_EDGES = (3, 5, 9)
_SHARE_EDGES = (0.5, 0.8, 0.95)
NUM_CLASSES = (len(_LENGTH_EDGES) + 1) * (len(_SHARE_EDGES) + 1)


def class_of(context_length: int, share: float) -> int:
    """A longer context and a more one-sided past make a better guess."""
    longer = bisect_right(_LENGTH_EDGES, context_length)
    return longer * (len(_SHARE_EDGES) + 1) + bisect_right(_SHARE_EDGES, share)


class SuffixAutomaton:
    """All substrings of some token sequences, with counts of what followed each.

    Trace over tokens 7 8 9, then 7 8 5:

        s = append(0, 7); s = append(s, 8); s = append(s, 9)     propose(after 7 8) -> 9
        s = append(0, 7); s = append(s, 8)                       propose(s) -> 9
        s = append(s, 5)                                         7 8 has been followed by 9 and 5

    Source: Blumer et al. (1985), the online construction; started again at state 0 for each
    sequence (a generalised automaton). The counts of successors are ours.
    """

    def __init__(self) -> None:
        self._length, self._link = [0], [-1]
        self._next: list[dict[int, int]] = [{}]
        self._count: list[dict[int, int]] = [{}]

    def __len__(self) -> int:
        return len(self._length)

    def append(self, state: int, token: int) -> int:
        """Go on with a sequence that stands at `state` (0 at its start); returns where it stands.

        Amortised constant time.
        """
        self._count_successor(state, token)
        if (known := self._next[state].get(token)) is not None:
            if self._length[known] == self._length[state] + 1:
                return known
            return self._split(state, known, token)
        new = self._add(self._length[state] + 1, {}, {}, 0)
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state >= 0:
            known = self._next[state][token]
            exact = self._length[known] == self._length[state] + 1
            self._link[new] = known if exact else self._split(state, known, token)
        return new

    def propose(self, state: int, limit: int) -> Draft:
        """What most often followed the longest known context, then what followed that, ..."""
        tokens: list[int] = []
        classes: list[int] = []
        while len(tokens) < limit:
            while state > 0 and not self._count[state]:
                state = self._link[state]
            if state <= 0 or self._length[state] < _MIN_CONTEXT:
                break
            counts = self._count[state]
            token = max(counts, key=counts.__getitem__)
            share = counts[token] / sum(counts.values())
            tokens.append(token)
            classes.append(class_of(self._length[state], share))
            state = self._next[state][token]
        return Draft(tokens, classes)

    def _count_successor(self, state: int, token: int) -> None:
        for _ in range(_COUNTED_LINKS):
            if state <= 0:
                return
            counts = self._count[state]
            counts[token] = counts.get(token, 0) + 1
            state = self._link[state]

    def _add(self, length: int, follow: dict[int, int], count: dict[int, int], link: int) -> int:
        self._length.append(length)
        self._link.append(link)
        self._next.append(follow)
        self._count.append(count)
        return len(self._length) - 1

    def _split(self, state: int, known: int, token: int) -> int:
        """Give the shorter strings of `known` a state of their own."""
        copy = self._add(
            self._length[state] + 1,
            dict(self._next[known]), dict(self._count[known]), self._link[known],
        )  # fmt: skip
        self._link[known] = copy
        while state >= 0 and self._next[state].get(token) == known:
            self._next[state][token] = copy
            state = self._link[state]
        return copy


class _Past:
    """What was written for one prompt: read into the automaton, or still to be read."""

    __slots__ = ("after_prompt", "automaton", "num_tokens", "unread")

    def __init__(self) -> None:
        self.automaton, self.num_tokens = SuffixAutomaton(), 0
        self.after_prompt = -1
        """State after the prompt; -1: it is not read."""
        self.unread: list[tuple[_Reader | None, list[int]]] = []
        """Tokens of ended samples, each with the reader that they go on from; None: the prompt."""


class _Reader:
    """A sample's place in the automaton of its prompt."""

    __slots__ = ("num_read", "past", "state")

    def __init__(self, past: _Past) -> None:
        self.past, self.state, self.num_read = past, past.after_prompt, 0

    def read(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.state = self.past.automaton.append(self.state, token)


_AT_ONCE = 16
"""Tokens, more than a step mostly writes. So many of an ended sample are read at once for its
siblings; a longer rest means that nobody drafts."""


class LookupDrafter:
    """Prompt lookup: what followed the same tokens earlier in the sample's own text."""

    def __init__(self) -> None:
        self._readers: dict[str, _Reader] = {}
        self.reading_s = 0.0

    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        """See `Drafter`."""
        self.reading_s = 0.0
        return [self._continue(*of[:4]) for of in asked]

    def _continue(
        self, sample: str, prompt: tuple[int, ...], written: np.ndarray, limit: int
    ) -> Draft:
        began_s, reader = time.perf_counter(), self._readers.get(sample)
        if reader is None:
            reader = self._readers[sample] = self._open(prompt)
        unread = written[reader.num_read :].tolist()
        reader.read(unread)
        reader.num_read = len(written)
        if len(unread) <= _AT_ONCE:  # reading them is part of every look, as is a new prompt
            began_s = time.perf_counter()
        self._catch_up(reader.past)
        self.reading_s += time.perf_counter() - began_s
        return reader.past.automaton.propose(reader.state, limit)

    def finish(self, sample: str, prompt: tuple[int, ...], written: np.ndarray) -> None:
        """Forget the sample."""
        self._readers.pop(sample, None)

    def forget(self, sample: str) -> None:
        """See `Drafter`."""
        self._readers.pop(sample, None)

    def remembers(self, prompt: tuple[int, ...]) -> bool:
        """See `Drafter`: a sample has its own text alone."""
        return False

    def _open(self, prompt: tuple[int, ...]) -> _Reader:
        return _begin(_Past(), prompt)

    def _catch_up(self, past: _Past) -> None:
        """Nobody else's text is read here."""


def _begin(past: _Past, prompt: tuple[int, ...]) -> _Reader:
    if past.after_prompt < 0:
        past.after_prompt = 0
        reader = _Reader(past)
        reader.read(prompt)
        past.after_prompt = reader.state
    return _Reader(past)


_READ_A_STEP = 1024
"""Of other samples' tokens, some 5 microseconds each: generation waits meanwhile. A sample's own
text is read whole."""


class SiblingsDrafter(LookupDrafter):
    """The same over one automaton a prompt: its own text, its siblings' so far, and what earlier
    epochs wrote for the prompt.

    Finished samples are kept as tokens, and read into the automaton only while a sample of the
    prompt is drafted for, the newest first: with speculation off, history costs next to nothing.
    """

    def __init__(self, history_tokens: int) -> None:
        """Keep at most `history_tokens`, prompts counted, too; those seen longest ago are forgotten
        first."""
        super().__init__()
        self._limit, self.num_tokens, self._to_read = history_tokens, 0, 0
        self._past: OrderedDict[tuple[int, ...], _Past] = OrderedDict()

    def finish(self, sample: str, prompt: tuple[int, ...], written: np.ndarray) -> None:
        """Remember what the sample wrote."""
        reader, past = self._readers.pop(sample, None), self._of(prompt)
        if reader is None or reader.past is not past:  # what it read is forgotten
            past.unread.append((None, written.tolist()))
        else:
            rest = written[reader.num_read :].tolist()
            if len(rest) <= _AT_ONCE:
                reader.read(rest)
            else:
                past.unread.append((reader, rest))
        past.num_tokens += len(written)
        self.num_tokens += len(written)
        self._forget_oldest()

    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        """See `Drafter`."""
        self._to_read = _READ_A_STEP
        return super().propose(asked)

    def remembers(self, prompt: tuple[int, ...]) -> bool:
        """See `Drafter`."""
        past = self._past.get(prompt)
        return past is not None and past.num_tokens > len(prompt)

    def _open(self, prompt: tuple[int, ...]) -> _Reader:
        reader = _begin(self._of(prompt), prompt)
        self._forget_oldest()
        return reader

    def _catch_up(self, past: _Past) -> None:
        while past.unread and self._to_read > 0:
            other, tokens = past.unread.pop()
            other = other or _Reader(past)
            other.read(tokens[: self._to_read])
            if left := tokens[self._to_read :]:
                past.unread.append((other, left))
            self._to_read -= len(tokens) - len(left)

    def _of(self, prompt: tuple[int, ...]) -> _Past:
        if prompt not in self._past:
            self._past[prompt] = _Past()
            self._past[prompt].num_tokens = len(prompt)
            self.num_tokens += len(prompt)
        self._past.move_to_end(prompt)
        return self._past[prompt]

    def _forget_oldest(self) -> None:
        while self.num_tokens > self._limit:
            self.num_tokens -= self._past.popitem(last=False)[1].num_tokens
