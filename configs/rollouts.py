"""Rollouts of a run, read back from its ledger: what was trained, and what was dropped and why."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..buffer import events
from ..buffer.errors import ConfigError, CorruptData
from ..buffer.events import AnyEvent, Decision, Finished, Ref
from ..buffer.journal import Journal
from ..buffer.records import Prompt, Ticket, Trajectory
from ..learner.advantage import batch_advantages

Pick = Literal["best", "worst", "stale", "failed", "all"]

STALE_REASONS = ("stale", "expired", "orphaned")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One finished sample as the ledger knows it; the trajectory is not opened yet."""

    uid: int
    index: int
    finished: Finished
    step: int
    """The step that took it, or during which it was dropped."""
    decision: Decision | None = None
    """None: it was dropped before a step took it."""
    drop_reason: str | None = None

    @property
    def reward(self) -> float | None:
        """None unless the reward scored it."""
        return self.finished.facts.reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sample, opened."""

    entry: Entry
    prompt: Prompt
    trajectory: Trajectory
    advantage: float | None
    """None for a sample that no step took."""

    @property
    def num_masked(self) -> int:
        """How many of the policy's first tokens carry no gradient."""
        decision, total = self.entry.decision, self.trajectory.num_policy_tokens
        if decision is None or not decision.trained:
            return total
        return min(decision.stale_prefix, total)


@dataclass(slots=True)
class Index:
    """The fold of a ledger that `show` needs: samples by the step that took or dropped them."""

    tickets: dict[int, Ref] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    _ready: dict[tuple[int, int], Finished] = field(default_factory=dict)
    _step: int = 1
    """The next step to be taken, to which drops are booked."""

    def apply(self, event: AnyEvent) -> None:
        """Take one event in."""
        match event:
            case events.Put():
                self.tickets[event.uid] = event.ticket
            case events.Finished():
                self._ready[event.uid, event.index] = event
            case events.Taken():
                self._taken(event)
            case events.StepTaken():
                self._step = event.step + 1
            case events.Returned():
                self._drop(event.uid, event.indices, event.reason)
            case events.Voided():
                self._drop(event.uid, event.indices, event.reason)
            case events.Dropped() | events.Reopened():
                indices = tuple(index for uid, index in self._ready if uid == event.uid)
                self._drop(event.uid, indices, event.reason)
            case events.BranchOpened():
                # What was taken later than the checkpoint is on a branch that was left.
                self._step = event.resumed_at + 1
                self.entries = [entry for entry in self.entries if entry.step < self._step]
            case _:
                pass

    def _taken(self, event: events.Taken) -> None:
        for decision in event.decisions:
            finished = self._ready.get((event.uid, decision.index))
            if finished is not None:
                self._add(finished, step=event.step, decision=decision, reason=decision.drop_reason)

    def _drop(self, uid: int, indices: tuple[int, ...], reason: str) -> None:
        for index in indices:
            finished = self._ready.pop((uid, index), None)
            if finished is not None:
                self._add(finished, step=self._step, decision=None, reason=reason)

    def _add(
        self, finished: Finished, *, step: int, decision: Decision | None, reason: str | None
    ) -> None:
        entry = Entry(
            uid=finished.uid,
            index=finished.index,
            finished=finished,
            step=step,
            decision=decision,
            drop_reason=reason,
        )
        self.entries.append(entry)

    def last_taken_step(self) -> int | None:
        """The newest step that took a batch."""
        return max((e.step for e in self.entries if e.decision is not None), default=None)


def read_rollouts(
    run_dir: Path, step: int | None = None, pick: Pick = "best", limit: int | None = None
) -> list[Rollout]:
    """Open the rollouts of one step.

    Args:
        run_dir: a run folder, of a living run too.
        step: which learner step; None: the newest that took a batch.
        pick: `best` and `worst` order the scored samples by reward; `stale` keeps those over the
            bound, dropped or trimmed; `failed` those that the reward could not score.
        limit: at most so many.
    Raises:
        ConfigError: no run, no ledger, or a step that was never taken.
    """
    try:
        journal = Journal(run_dir, writable=False)
    except CorruptData as error:
        raise ConfigError(f"{error}; has the run taken its first step?") from None
    try:
        index = Index()
        for event in journal.events():
            index.apply(event)
        wanted = _step(index, step, run_dir)
        chosen = _chosen([entry for entry in index.entries if entry.step == wanted], pick)
        advantages = _advantages(run_dir, [e for e in index.entries if e.step == wanted])
        return list(_open(journal, index, chosen[:limit], advantages))
    finally:
        journal.close()


def _step(index: Index, step: int | None, run_dir: Path) -> int:
    last = index.last_taken_step()
    if last is None:
        raise ConfigError(f"{run_dir} has not taken a batch yet: there is nothing to show")
    if step is not None and not any(entry.step == step for entry in index.entries):
        raise ConfigError(f"{run_dir} has no step {step}; it has taken steps 1 to {last}")
    return last if step is None else step


def _chosen(entries: list[Entry], pick: Pick) -> list[Entry]:
    scored = [entry for entry in entries if entry.reward is not None]
    match pick:
        case "best":
            return sorted(scored, key=lambda entry: -(entry.reward or 0.0))
        case "worst":
            return sorted(scored, key=lambda entry: entry.reward or 0.0)
        case "stale":
            return [entry for entry in entries if _is_stale(entry)]
        case "failed":
            return [entry for entry in entries if entry.reward is None]
        case "all":
            return sorted(entries, key=lambda entry: (entry.uid, entry.index))


def _is_stale(entry: Entry) -> bool:
    trimmed = entry.decision is not None and entry.decision.stale_prefix > 0
    return trimmed or entry.drop_reason in STALE_REASONS


def _advantages(run_dir: Path, entries: list[Entry]) -> dict[tuple[int, int], float]:
    """What the learner computed from the groups that the step took."""
    resolved = json.loads((run_dir / "resolved.json").read_bytes())
    kind = resolved["learner"]["objective"]["advantage"]
    kind = "group_mean" if kind == "gigpo" else kind  # of the whole episode
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        if entry.decision is not None:
            groups.setdefault(entry.uid, []).append(entry)
    found = {}
    rewards = [[entry.reward for entry in group] for group in groups.values()]
    for group, values in zip(groups.values(), batch_advantages(rewards, kind), strict=True):
        found |= {(e.uid, e.index): float(v) for e, v in zip(group, values, strict=True)}
    return found


def _open(
    journal: Journal, index: Index, entries: list[Entry], advantages: dict[Any, float]
) -> Iterator[Rollout]:
    for entry in entries:
        taken = entry.decision is not None
        yield Rollout(
            entry=entry,
            prompt=journal.read(index.tickets[entry.uid], Ticket).prompt,
            trajectory=journal.read(entry.finished.payload, Trajectory),
            advantage=advantages.get((entry.uid, entry.index)) if taken else None,
        )
