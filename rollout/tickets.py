"""Prompts become tickets: with their sizes and lengths, decided from the ledger as it stands."""

import math
from contextlib import closing
from threading import Lock

import numpy as np

from ..buffer.journal import Journal
from ..buffer.records import SizingDecision, Ticket
from .config import FeederSpec, RolloutConfig
from .history import History
from .prompts import PromptSource
from .sizing import Controller
from .spares import with_spares

SAVE_EVENTS = 5000
"""Events of the journal after which the stored copy of its fold is renewed."""
COMMIT_STREAM, WAIT_STREAM = 2, 3
"""Set the numbers that decide second stages, and who waits for spare samples, apart from each other
and from those that order and choose prompts."""


def length_limit(config: RolloutConfig, step: int) -> tuple[int, str]:
    """The most tokens a sample may have under a version, and why: the schedule's entry, cyclic when
    it says so. Target: the gradient of the expected reward of answers cut there.

    Source: SIRI's cycles of the maximum length; here any piecewise constant schedule.
    """
    sizing, most = config.sizing, config.sampling.max_new_tokens
    place = step % sizing.length_cycle_steps if sizing.length_cycle_steps else step
    limits = [tokens for start, tokens in sizing.length_schedule if start <= place]
    if limits and limits[-1] < most:
        return limits[-1], f"; at most {limits[-1]} tokens from step {step - place} on"
    return most, ""


def commit_chance(seed: int, uid: int) -> float:
    """The number in [0, 1) that decides whether a prompt's second stage is drawn."""
    return float(np.random.default_rng([seed, uid, COMMIT_STREAM]).random())


def wait_chance(seed: int, uid: int) -> float:
    """The number in [0, 1) that decides whether a prompt's group waits for its spare samples."""
    return float(np.random.default_rng([seed, uid, WAIT_STREAM]).random())


class TicketMaker:
    """Prompts of the stream with their sizes, decided from the run's journal as it stands.

    Its own state is a cache of the journal's fold, saved now and then and at the end.
    """

    def __init__(self, spec: FeederSpec, source: PromptSource) -> None:
        """Fold the journal, from the stored copy on where there is one.

        Raises:
            CorruptData: the stored copy is damaged, or the ledger.
        """
        self._spec, self._source, sizing = spec, source, spec.rollout.sizing
        self._lock = Lock()
        self._controller = Controller(spec.rollout, by_std=spec.advantage_by_std)
        self._history = History(sizing.half_life_steps, sizing.prior_strength)
        self._looks_back = sizing.adapts or spec.prompts.follows_pass_rates
        if self._looks_back:
            with self._journal() as journal:
                self._history.open(spec.run_dir, journal.sequence)
        self._saved = self._history.sequence

    def tickets(self, uids: range) -> list[Ticket]:
        """The tickets of some uids, sized together."""
        with self._lock:
            self._catch_up()
            return self._tickets(uids)

    def commits(self) -> dict[int, SizingDecision]:
        """uid -> decision on each group whose first stage is finished; the same again until the
        ledger has it."""
        with self._lock:
            self._catch_up()
            return {
                uid: self._controller.commit(decision, known, commit_chance(self._spec.seed, uid))
                for uid, decision, known in self._history.probed
            }

    def _tickets(self, uids: range) -> list[Ticket]:
        prompts = [
            self._source.prompt(uid, self._source.level(uid, self._history.pass_rate))
            for uid in uids
        ]
        budgets = [self._length(prompt.source_id) for prompt in prompts]
        known = [
            self._history.known(prompt.source_id, tokens)
            for prompt, (tokens, _) in zip(prompts, budgets, strict=True)
        ]
        decisions = self._controller.decide(known, budgets)
        sizing, seed = self._spec.rollout.sizing, self._spec.seed
        return [
            Ticket(prompt=p, sizing=with_spares(d, sizing, wait_chance(seed, p.uid)))
            for p, d in zip(prompts, decisions, strict=True)
        ]

    def _journal(self) -> closing[Journal]:
        """Opened each time: SQLite ties a connection to its thread."""
        return closing(Journal(self._spec.run_dir, writable=False))

    def _catch_up(self) -> None:
        if not self._looks_back:
            return
        with self._journal() as journal:
            self._history.catch_up(journal)
        if self._history.sequence - self._saved >= SAVE_EVENTS:
            self.save()

    def save(self) -> None:
        """Store what was folded."""
        if self._looks_back:
            self._history.save(self._spec.run_dir)
        self._saved = self._history.sequence

    def _length(self, source_id: str) -> tuple[int, str]:
        """`max_new_tokens` of one prompt, and why."""
        limit, why = length_limit(self._spec.rollout, self._history.step)
        sizing = self._spec.rollout.sizing
        if not sizing.length_quantile:
            return limit, why
        usual = self._history.length_quantile(source_id, sizing.length_quantile)
        budget = math.ceil(usual * sizing.length_margin) if usual else limit
        if budget >= limit:
            return limit, why
        return budget, f"; {budget} tokens: {sizing.length_margin:g} x the usual {usual}"
