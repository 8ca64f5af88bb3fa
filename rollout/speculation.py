"""Batched speculative decoding: how deep to draft, and what of a draft is accepted.

The engine feeds the drafts of a batch (`drafters`) in one forward, and goes on for as long as they
were right. Two rules say what is right:

Point drafts. The target's own token is drawn at every place with that place's own uniform number;
a draft is right when it is that token. The uniform depends on (seed, prompt, attempt, sample,
place) alone, so the output is the output without speculation, token for token, at any temperature,
depth and batch: a draft decides only how much of a forward was useful.

Drafts with their laws. A token drawn from a law q is taken with probability min(1, p / q), else
another is drawn from what p has more than q. The law of the output is the target's, p; the output
itself depends on where drafts were made, so a seed alone does not repeat it.

Source: Leviathan et al. (arXiv:2211.17192) for the second rule; the first, position-keyed coupling,
accepts as often as the second does with a deterministic draft. Depth: our own rule.
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from .config import SpeculationConfig
from .drafters import (
    NO_DRAFT,
    NUM_CLASSES,
    Asked,
    Draft,
    Drafter,
    LookupDrafter,
    SiblingsDrafter,
)

_MEMORY = 0.99
"""Share of what was measured that is kept from one step to the next."""
_PROBE_MEMORY = 0.97
"""The same of a drafted token's acceptance, in a probe: short, as it has few with which to refute
what was true of other prompts."""
_PROBE_STEPS = 64
"""Between two probes of samples in flight, while speculation is off."""
_PROBE_SHARE = 1 / 16
"""Of the rows, that a probe drafts for."""
_PROBE_TIME = 1 / 200
"""Of the time while speculation is off, that probes may take, all they cost included. What is not
used is saved up to the time of one step."""


class DepthController:
    """How far to draft, from measured time and measured acceptance.

    A step over M tokens takes a + b M seconds, fitted to the recent steps. A drafted token that is
    accepted with probability p costs b and brings p tokens; the best throughput r takes the token
    in when p >= b r (the optimality condition of a ratio, Dinkelbach 1967), so `least` = b r. Where
    a forward costs as much per token whatever M is, b r is 1 and nothing is drafted: speculation is
    off. So it is while the accepted tokens are worth less than the time that looking for drafts
    takes. Then a few rows are drafted for now and then, lest a change be missed: of samples that
    begin, as theirs may be prompts with a past, which those before had not. In between a step costs
    some additions.
    """

    def __init__(self) -> None:
        self._hits, self._tries = [0.5] * NUM_CLASSES, [1.0] * NUM_CLASSES
        self._sums = [0.0] * 5  # of 1, M, M^2, t, M t
        self._slope: float | None = None
        """b; None until steps have differed enough to know it."""
        self._rows = self._written = 0.0
        self._looked_s = 0.0
        self._asked_s = self._fed = self._gained = 0.0
        """Since the last probe: looking without reading, tokens drafted, tokens accepted."""
        self._steps = self._next_in_flight = 0
        self._credit_s = 0.0
        self._drafts: Literal["off", "probe", "on"] = "on"

    def start(self, written_B: np.ndarray) -> tuple[float, Sequence[int]]:
        """Of the step to come: the least acceptance worth a draft, and for which rows.

        Args:
            written_B: [B] int: the tokens that each row has so far.
        """
        self._steps += 1
        if self._drafts != "off":  # else nothing is known that was not before
            least = self._least()
            if least < 1.0 and self._lost_s <= 0.0:
                self._drafts = "on"
                return least, range(len(written_B))
        rows = self._probed(written_B) if self._credit_s >= 0.0 else ()
        self._drafts = "probe" if rows else "off"
        if rows:  # what others lost is no evidence against these
            self._asked_s = self._fed = self._gained = 0.0
        return 0.0, rows

    def _probed(self, written_B: np.ndarray) -> Sequence[int]:
        count = max(1, int(len(written_B) * _PROBE_SHARE))
        if self._steps >= self._next_in_flight:
            self._next_in_flight = self._steps + _PROBE_STEPS
            first = self._steps // _PROBE_STEPS * count % len(written_B)
            return range(first, min(first + count, len(written_B)))
        return np.flatnonzero(written_B == 1)[:count].tolist()

    @property
    def speed_up(self) -> float:
        """Tokens per second over those at the fitted cost of steps without drafts; 0: not known."""
        slope, (_, m, _, t, _) = self._slope, self._sums
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
        n, m, mm, t, mt = self._sums
        spread = n * mm - m * m
        if spread > 1e-6 * max(1.0, n * mm) and t > 0:
            self._slope = max(0.0, (n * mt - m * t) / spread)
        self._rows = _MEMORY * self._rows + num_rows
        self._written = _MEMORY * self._written + num_written
        self._looked_s *= _MEMORY
        self._asked_s, self._gained = _MEMORY * self._asked_s, _MEMORY * self._gained
        self._fed *= _MEMORY
        if self._drafts != "on":
            drafts_s = (self._slope or 0.0) * (num_tokens - num_rows)
            self._credit_s += _PROBE_TIME * seconds - drafts_s
            self._credit_s = min(self._credit_s, seconds)

    def saw_draft(self, classes: Sequence[int], num_accepted: int) -> None:
        """Of a draft, so many tokens were right; the one after them was wrong, if there is one."""
        memory = _PROBE_MEMORY if self._drafts == "probe" else _MEMORY
        for place in classes[: num_accepted + 1]:
            self._hits[place] *= memory
            self._tries[place] = memory * self._tries[place] + 1
        for place in classes[:num_accepted]:
            self._hits[place] += 1
        self._fed += len(classes)

    def saw_asking(self, seconds: float, reading_s: float, num_accepted: int) -> None:
        """Looking for drafts took so long, for one step, and so many tokens were accepted. What it
        read beforehand is no part of a look's price: it is read once for all looks to come."""
        if self._drafts == "probe":
            self._credit_s -= seconds
        self._looked_s += seconds
        self._asked_s += seconds - reading_s
        self._gained += num_accepted

    @property
    def _lost_s(self) -> float:
        """What looking took and drafts cost in the forward, less what the tokens gained would have
        taken. Above 0: fewer tokens a second than without drafts."""
        return self._asked_s + (self._slope or 0.0) * self._fed - self._gained * self._token_s

    @property
    def _token_s(self) -> float:
        """What a token takes."""
        return (self._sums[3] + self._asked_s) / max(1.0, self._written)

    def _least(self) -> float:
        """b r; 1 while the slope is not known."""
        return 1.0 if self._slope is None else min(1.0, self._slope / self._token_s)


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

    def propose(
        self, written_B: np.ndarray, ask: Callable[[Sequence[int]], Sequence[Asked]]
    ) -> list[Draft]:
        """One draft a sample of the step to come, most of them empty when they would not pay.

        Args:
            written_B: [B] int: the tokens that each has so far.
            ask: tells of those in some of its rows; not called where nothing is drafted.
        """
        least, rows = self._controller.start(written_B)
        drafts, self._asking_s = [NO_DRAFT] * len(written_B), 0.0
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
