"""Batched speculative decoding: who drafts, how deep, and what of a draft is accepted.

A drafter proposes, for each sample, one token per place. The engine feeds all drafts of a batch in
one forward, and goes on for as long as they were right. Two rules say what is right:

Point drafts. The target's own token is drawn at every place with that place's own uniform number;
a draft is right when it is that token. The uniform depends on (seed, prompt, attempt, sample,
place) alone, so the output is the output without speculation, token for token, at any temperature,
depth and batch: a draft decides only how much of a forward was useful.

Drafts with their laws. A token drawn from a law q is taken with probability min(1, p / q), else
another is drawn from what p has more than q. The law of the output is the target's, p; the output
itself depends on where drafts were made, so a seed alone does not repeat it.

Nothing here knows an engine. Source: Leviathan et al. (arXiv:2211.17192) for the second rule; the
first, position-keyed coupling, accepts as often as the second does with a deterministic draft.
Depth: our own rule.
"""

import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from ..buffer.records import SamplingParams
from .config import SpeculationConfig

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
        """Keep at most `history_tokens`; the prompts seen longest ago are forgotten first."""
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
        while self.num_tokens > self._limit:
            self.num_tokens -= self._past.popitem(last=False)[1].num_tokens

    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        """See `Drafter`."""
        self._to_read = _READ_A_STEP
        return super().propose(asked)

    def _open(self, prompt: tuple[int, ...]) -> _Reader:
        return _begin(self._of(prompt), prompt)

    def _catch_up(self, past: _Past) -> None:
        while past.unread and self._to_read > 0:
            other, tokens = past.unread.pop()
            other = other or _Reader(past)
            other.read(tokens[: self._to_read])
            if left := tokens[self._to_read :]:
                past.unread.append((other, left))
            self._to_read -= len(tokens) - len(left)

    def _of(self, prompt: tuple[int, ...]) -> _Past:
        past = self._past.setdefault(prompt, _Past())
        self._past.move_to_end(prompt)
        return past


_MEMORY = 0.99
"""Share of what was measured that is kept from one step to the next."""
_FIRST_PROBE_STEPS, _LAST_PROBE_STEPS = 16, 64
"""Between two probes while speculation is off; doubled after each."""
_TRIED_TOKENS = 8.0
"""Worth of time for looking, to begin with; it fades as all that was measured does."""
_PROBE_SHARE = 1 / 16
"""Of the rows, that a probe drafts for."""
_PROBE_TIME = 1 / 200
"""Of the time since speculation went off, that its probes may take, reading included: the next one
waits until they have."""


class DepthController:
    """How far to draft, from measured time and measured acceptance.

    A step over M tokens takes a + b M seconds, fitted to the recent steps. A drafted token that is
    accepted with probability p costs b and brings p tokens; the best throughput r takes the token
    in when p >= b r (the optimality condition of a ratio, Dinkelbach 1967), so `least` = b r. Where
    a forward costs as much per token whatever M is, b r is 1 and nothing is drafted: speculation is
    off. So it is while the accepted tokens are worth less than the time that looking for drafts
    takes. Then a few rows are drafted for now and then, lest a change be missed, and between two
    looks at the numbers a step costs some additions.
    """

    def __init__(self) -> None:
        self._hits, self._tries = [0.5] * NUM_CLASSES, [1.0] * NUM_CLASSES
        self._sums = [0.0] * 5  # of 1, M, M^2, t, M t
        self._rows = self._written = 0.0
        self._steps, self._probe_every = 0, _FIRST_PROBE_STEPS
        self._asked_s, self._gained = 0.0, _TRIED_TOKENS
        self._looked_s = 0.0
        """As `_asked_s`, reading included."""
        self._settled = False
        self._off_s = self._probes_s = 0.0

    def start(self, num_rows: int) -> tuple[float, range]:
        """Of the step to come: the least acceptance worth a draft, and for which rows."""
        self._steps += 1
        if self._settled and self._steps % _FIRST_PROBE_STEPS:
            return 1.0, range(0)
        least = self._least()
        if least < 1.0 and self._pays():
            self._settled, self._probe_every = False, _FIRST_PROBE_STEPS
            self._off_s = self._probes_s = 0.0
            return least, range(num_rows)
        self._settled = True
        if self._steps % self._probe_every or self._probes_s > _PROBE_TIME * self._off_s:
            return 1.0, range(0)
        self._settled, self._probe_every = False, min(2 * self._probe_every, _LAST_PROBE_STEPS)
        first = self._steps // _FIRST_PROBE_STEPS % num_rows
        count = max(1, int(num_rows * _PROBE_SHARE))
        return 0.0, range(first, min(first + count, num_rows))

    @property
    def speed_up(self) -> float:
        """Tokens per second over those at the fitted cost of steps without drafts; 0: not known."""
        slope, (_, m, _, t, _) = self._slope(), self._sums
        if slope is None:
            return 0.0
        plain_s = t - slope * (m - self._rows)
        return plain_s / (t + self._looked_s) * self._written / self._rows

    def trim(self, draft: Draft, least: float) -> Draft:
        """The part of a draft that is likely enough to be reached and accepted."""
        reached = 1.0
        for depth, place in enumerate(draft.classes):
            reached *= self._hits[place] / self._tries[place]
            if reached < least:
                laws = None if draft.laws is None else draft.laws[:depth]
                return Draft(draft.tokens[:depth], draft.classes[:depth], laws)
        return draft

    def saw_step(self, num_rows: int, num_tokens: int, num_written: int, seconds: float) -> None:
        """A step fed `num_tokens`, one a row and drafts, wrote `num_written` and took so long, but
        for the looking."""
        m, t = float(num_tokens), seconds
        new = (1.0, m, m * m, t, m * t)
        self._sums = [_MEMORY * old + more for old, more in zip(self._sums, new, strict=True)]
        self._rows = _MEMORY * self._rows + num_rows
        self._written = _MEMORY * self._written + num_written
        self._asked_s, self._gained = _MEMORY * self._asked_s, _MEMORY * self._gained
        self._looked_s *= _MEMORY
        self._off_s += seconds

    def saw_draft(self, classes: Sequence[int], num_accepted: int) -> None:
        """Of a draft, so many tokens were right; the one after them was wrong, if there is one."""
        for place in classes[: num_accepted + 1]:
            self._hits[place] *= _MEMORY
            self._tries[place] = _MEMORY * self._tries[place] + 1
        for place in classes[:num_accepted]:
            self._hits[place] += 1

    def saw_asking(self, seconds: float, reading_s: float, num_accepted: int) -> None:
        """Looking for drafts took so long, for one step, and so many tokens were accepted. What it
        read beforehand is no part of a look's price: it is read once for all looks to come."""
        self._probes_s += seconds
        self._looked_s += seconds
        self._asked_s += seconds - reading_s
        self._gained += num_accepted

    def _pays(self) -> bool:
        """More tokens a second than without drafts: without what was gained, what looking took, and
        what the drafts cost in the forward."""
        (_, m, _, t, _), slope = self._sums, self._slope() or 0.0
        cost_s = self._asked_s + slope * (m - self._rows)
        return self._gained * (t + self._asked_s) >= cost_s * self._written

    def _least(self) -> float:
        """b r; 1 while the slope is not known."""
        slope, t = self._slope(), self._sums[3] + self._asked_s
        return 1.0 if slope is None else min(1.0, slope * self._written / t)

    def _slope(self) -> float | None:
        """b; None while steps have been too much alike to know it."""
        n, m, mm, t, mt = self._sums
        spread = n * mm - m * m
        if spread < 1e-6 * max(1.0, n * mm) or t <= 0:
            return None
        return max(0.0, (n * mt - m * t) / spread)


class Speculation:
    """A drafter and its controller, and the counts a run reports."""

    def __init__(self, drafter: Drafter, max_depth: int) -> None:
        """Draft at most `max_depth` tokens for a sample in one step."""
        self.drafter, self._max_depth = drafter, max_depth
        self._controller = DepthController()
        self.drafted = self.accepted = self.forwards = 0
        self._asking_s = 0.0

    @property
    def speed_up(self) -> float:
        """See `EngineStats`."""
        return self._controller.speed_up

    def propose(self, num_samples: int, ask: Callable[[range], Sequence[Asked]]) -> list[Draft]:
        """One draft a sample, most of them empty when they would not pay.

        Args:
            num_samples: of the step to come.
            ask: tells of those in some of its rows; not called where nothing is drafted.
        """
        least, rows = self._controller.start(num_samples)
        drafts, self._asking_s = [NO_DRAFT] * num_samples, 0.0
        if not rows:
            return drafts
        started_s = time.perf_counter()
        asked = [of._replace(limit=min(self._max_depth, of.limit)) for of in ask(rows)]
        for row, draft in zip(rows, self.drafter.propose(asked), strict=True):
            drafts[row] = self._controller.trim(draft, least)
        self._asking_s = time.perf_counter() - started_s
        return drafts

    def saw(self, drafts: Sequence[Draft], written: Sequence[int], seconds: float) -> None:
        """How the step went: tokens written by each sample (an accepted draft's, and one more), and
        the time it took, `propose` included."""
        num_rows = num_tokens = len(drafts)
        if self._asking_s:
            before = self.accepted
            for draft, num_written in zip(drafts, written, strict=True):
                if draft.tokens:
                    right = min(num_written - 1, len(draft.tokens))
                    self._controller.saw_draft(draft.classes, right)
                    self.drafted += len(draft.tokens)
                    self.accepted += right
                    num_tokens += len(draft.tokens)
            reading_s = self.drafter.reading_s
            self._controller.saw_asking(self._asking_s, reading_s, self.accepted - before)
        self.forwards += 1
        seconds -= self._asking_s
        self._controller.saw_step(num_rows, num_tokens, sum(written), seconds)


def make_speculation(config: SpeculationConfig, model: Drafter | None = None) -> Speculation | None:
    """As the settings ask for it, with the draft model where there is one; None: off."""
    if config.drafter == "off":
        return None
    siblings = config.drafter == "siblings"
    drafter = SiblingsDrafter(config.history_tokens) if siblings else LookupDrafter()
    return Speculation(model or drafter, config.max_depth)
