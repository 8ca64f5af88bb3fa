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
from itertools import islice
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
_OFF_STEPS = 8
"""While speculation is off one step in so many is looked at: the additions of each would be a
fiftieth of a small model's step."""
_PROBE_STEPS = 64
"""Between two probes of samples in flight, while speculation is off."""
_PROBE_SHARE = 1 / 8
"""Of the rows, that a probe drafts for."""
_PROBE_TIME = 1 / 200
"""Of the time while speculation is off, that probes of either kind may take, all they cost
included. What is not used is saved up to the time of one step."""


class DepthController:
    """How far to draft, from measured time and measured acceptance.

    A step over M tokens takes a + b M seconds, and c more where any of them is drafted (rows of
    unequal length are laid out), fitted to the recent steps: b to what varies among steps with
    drafts and among those without, c to what is between them. A drafted token that is accepted with
    probability p costs b and brings p tokens; the best throughput r takes the token in when
    p >= b r (the optimality condition of a ratio, Dinkelbach 1967), so `least` = b r. Where a
    forward costs as much per token whatever M is, b r is 1 and nothing is drafted: speculation is
    off. So it is while the accepted tokens are worth less than c and the time that looking for
    drafts takes. Then a few rows are drafted for now and then, lest a change be missed: of samples
    that begin and whose prompts have a past, which those before may not have had, and of samples in
    flight, whose text may have begun to repeat itself. Each kind has time of its own, so that
    looking at the one does not put off the other.
    """

    def __init__(self) -> None:
        self._hits, self._tries = [0.5] * NUM_CLASSES, [1.0] * NUM_CLASSES
        self._plain, self._drafted = [0.0] * 5, [0.0] * 5
        """Of steps without drafts and with: sums of 1, M, M^2, t, M t."""
        self._slope: float | None = None
        """b; None until steps have differed enough to know it."""
        self._fixed_s = 0.0
        """c."""
        self._told_apart = self._halves = False
        """Whether steps with drafts, or those without, have differed enough to tell b from c; while
        they have not, whether drafts are cut to half: every second time, so that they do."""
        self._rows = self._written = 0.0
        self._looked_s = 0.0
        self._asked_s = self._fed = self._gained = self._times = 0.0
        """Since the last probe: looking without reading, tokens drafted, tokens accepted, and steps
        with drafts, the probe as the share of the rows that it was of: as if all had been in it."""
        self._share = 1.0
        """Of the rows, those that are drafted for."""
        self._steps, self._seen, self._next_in_flight = -1, -1, 0
        self._credit_s = {"begun": 0.0, "in flight": 0.0}
        self._probing: Literal["begun", "in flight"] = "begun"
        self._drafts: Literal["off", "probe", "on"] = "on"

    def start(
        self, written_B: np.ndarray, has_past: Callable[[int], bool]
    ) -> tuple[float, Sequence[int]]:
        """Of the step to come: the least acceptance worth a draft, and for which rows.

        Args:
            written_B: [B] int: the tokens that each row has so far.
            has_past: whether anything was written before for the prompt of a row.
        """
        self._steps += 1
        if self._is_skipped:
            return 0.0, ()
        if self._drafts != "off":  # else nothing is known that was not before
            least = self._least()
            if least < 1.0 and self._lost_s <= 0.0:
                self._drafts, self._share, self._halves = "on", 1.0, not self._halves
                return least, range(len(written_B))
        if self._drafts == "on":  # a probe led to it, and pays
            self._credit_s[self._probing] -= max(0.0, self._lost_s)
        rows = self._probed(written_B, has_past) if self._plain[0] else ()
        self._drafts = "probe" if rows else "off"
        if rows:  # what others lost is no evidence against these
            self._asked_s = self._fed = self._gained = self._times = 0.0
            self._share, self._halves = len(rows) / len(written_B), not self._halves
        return 0.0, rows

    def _probed(self, written_B: np.ndarray, has_past: Callable[[int], bool]) -> Sequence[int]:
        count = max(1, int(len(written_B) * _PROBE_SHARE))
        if self._credit_s["begun"] >= 0.0:
            begun = np.flatnonzero(written_B <= _OFF_STEPS).tolist()
            if rows := list(islice(filter(has_past, begun), count)):
                self._probing = "begun"
                return rows
        if self._steps >= self._next_in_flight and self._credit_s["in flight"] >= 0.0:
            self._probing = "in flight"
            self._next_in_flight = self._steps + _PROBE_STEPS
            first = self._steps // _PROBE_STEPS * count % len(written_B)
            return range(first, min(first + count, len(written_B)))
        return ()

    @property
    def _is_skipped(self) -> bool:
        return self._drafts == "off" and self._steps % _OFF_STEPS > 0

    @property
    def speed_up(self) -> float:
        """Tokens per second over those at the fitted cost of steps without drafts; 0: not known."""
        if self._slope is None:
            return 0.0
        tokens, drafted = self._plain[1] + self._drafted[1], self._drafted[0]
        plain_s = self._took_s - self._slope * (tokens - self._rows) - self._fixed_s * drafted
        return plain_s / (self._took_s + self._looked_s) * self._written / self._rows

    def trim(self, draft: Draft, least: float) -> Draft:
        """The part of a draft that is likely enough to be reached and accepted."""
        reached, most = 1.0, len(draft.tokens)
        if self._halves and not self._told_apart:
            most = (most + 1) // 2
        for depth, place in enumerate(draft.classes):
            reached *= self._hits[place] / self._tries[place]
            if reached < least or depth == most:
                laws = None if draft.laws is None else draft.laws[:depth]
                return Draft(draft.tokens[:depth], draft.classes[:depth], laws)
        return draft

    def saw_step(self, num_rows: int, num_tokens: int, num_written: int, seconds: float) -> None:
        """A step fed `num_tokens`, one a row and drafts, wrote `num_written` and took so long, but
        for the looking. Those that were skipped before it had no drafts, and are taken to have been
        like it, or where it has drafts like others without."""
        if self._is_skipped:
            return
        steps, self._seen = self._steps - self._seen, self._steps
        has_drafts, m, t = num_tokens > num_rows, float(num_tokens), seconds
        new = (1.0, m, m * m, t, m * t)
        if not has_drafts:
            self._count(self._plain, new, steps, num_rows, num_written)
        else:
            if steps > 1:
                n, m = self._plain[:2]
                self._count(self._plain, [of / n for of in self._plain], steps - 1, m / n, m / n)
            self._count(self._drafted, new, 1, num_rows, num_written)
        self._fit()
        self._asked_s, self._gained = _MEMORY * self._asked_s, _MEMORY * self._gained
        self._fed = _MEMORY * self._fed
        self._times = _MEMORY * self._times + has_drafts * self._share
        if self._drafts != "on":
            drafts_s = (self._slope or 0.0) * (num_tokens - num_rows) + self._fixed_s * has_drafts
            self._credit_s[self._probing] -= drafts_s
            for kind, credit_s in self._credit_s.items():
                self._credit_s[kind] = min(credit_s + _PROBE_TIME * steps * seconds, seconds)

    def _count(
        self, kind: list[float], step: Sequence[float], times: int, rows: float, written: float
    ) -> None:
        """Steps of one kind, so many times the same."""
        memory = _MEMORY**times
        for kept in (self._plain, self._drafted):
            kept[:] = [memory * of for of in kept]
        kind[:] = [old + times * of for old, of in zip(kind, step, strict=True)]
        self._rows = memory * self._rows + times * rows
        self._written = memory * self._written + times * written
        self._looked_s *= memory

    def _fit(self) -> None:
        within = together = squares = 0.0
        for n, m, mm, t, mt in (self._plain, self._drafted):
            if n > 0.0:
                within, together = within + mm - m * m / n, together + mt - m * t / n
                squares += mm
        self._told_apart = within > 1e-6 * max(1.0, squares)
        if self._told_apart:
            self._slope = max(0.0, together / within)
        (n, m, _, t, _), (n_drafted, m_drafted, _, t_drafted, _) = self._plain, self._drafted
        if min(n, n_drafted) >= 0.5:  # else what was known of c stays
            more, longer_s = m_drafted / n_drafted - m / n, t_drafted / n_drafted - t / n
            self._slope = self._slope or 0.0
            self._fixed_s = max(0.0, longer_s - self._slope * more)

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
            self._credit_s[self._probing] -= seconds
        self._looked_s += seconds
        self._asked_s += seconds - reading_s
        self._gained += num_accepted

    @property
    def _lost_s(self) -> float:
        """What looking took and drafts cost in the forward, less what the tokens gained would have
        taken. Above 0: fewer tokens a second than without drafts."""
        cost_s = self._asked_s + (self._slope or 0.0) * self._fed + self._fixed_s * self._times
        return cost_s - self._gained * self._token_s

    @property
    def _token_s(self) -> float:
        """What a token takes."""
        return (self._took_s + self._asked_s) / max(1.0, self._written)

    @property
    def _took_s(self) -> float:
        return self._plain[3] + self._drafted[3]

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
        self,
        written_B: np.ndarray,
        prompt_of: Callable[[int], tuple[int, ...]],
        ask: Callable[[Sequence[int]], Sequence[Asked]],
    ) -> list[Draft]:
        """One draft a sample of the step to come, most of them empty when they would not pay.

        Args:
            written_B: [B] int: the tokens that each has so far.
            prompt_of: the prompt of a row.
            ask: tells of those in some of its rows; not called where nothing is drafted.
        """
        least, rows = self._controller.start(
            written_B, lambda row: self.drafter.remembers(prompt_of(row))
        )
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
