"""Rollouts of a run, read back from its ledger: what was trained, and what was dropped and why."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ..buffer import events
from ..buffer.errors import ConfigError, CorruptData
from ..buffer.events import AnyEvent, Decision, Finished
from ..buffer.journal import Journal
from ..buffer.records import Prompt, Ticket, Trajectory
from ..learner.advantage import batch_advantages

Pick = Literal["best", "worst", "stale", "failed", "all"]

STALE_REASONS = ("stale", "expired", "orphaned")


class Entry(NamedTuple):
    """One finished sample as the ledger knows it; the trajectory is not opened yet."""

    finished: Finished
    step: int
    """The step that took it, or during which it was dropped."""
    decision: Decision | None
    """None: it was dropped before a step took it."""
    drop_reason: str | None

    @property
    def key(self) -> tuple[int, int]:
        """(uid, index)."""
        return self.finished.uid, self.finished.index

    @property
    def reward(self) -> float | None:
        """None unless the reward scored it."""
        return self.finished.facts.reward

    @property
    def is_stale(self) -> bool:
        """Whether it was over the bound, as a whole or its first tokens."""
        trimmed = self.decision is not None and self.decision.stale_prefix > 0
        return trimmed or self.drop_reason in STALE_REASONS


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
        stored = journal.events()
        of_step = _of_step(ended(stored), step, run_dir)
        tickets = {event.uid: event.ticket for event in stored if isinstance(event, events.Put)}
        advantages = _advantages(run_dir, of_step)
        return [
            Rollout(
                entry=entry,
                prompt=journal.read(tickets[entry.finished.uid], Ticket).prompt,
                trajectory=journal.read(entry.finished.payload, Trajectory),
                advantage=advantages.get(entry.key) if entry.decision is not None else None,
            )
            for entry in _chosen(of_step, pick)[:limit]
        ]
    finally:
        journal.close()


def ended(stored: Iterable[AnyEvent]) -> list[Entry]:
    """Every sample that was taken or dropped along the surviving path, in that order."""
    ready: dict[tuple[int, int], Finished] = {}
    entries: list[Entry] = []
    step = 1  # the next to be taken, to which drops are booked
    for event in stored:
        match event:
            case events.Finished():
                ready[event.uid, event.index] = event
            case events.Taken():
                made = [(ready.get((event.uid, each.index)), each) for each in event.decisions]
                entries += [Entry(f, event.step, each, each.drop_reason) for f, each in made if f]
            case events.StepTaken():
                step = event.step + 1
            case events.Returned() | events.Voided() | events.Dropped() | events.Reopened():
                lost = getattr(event, "indices", None)  # without: the whole group
                gone = [
                    key for key in ready if key[0] == event.uid and (not lost or key[1] in lost)
                ]
                entries += [Entry(ready.pop(key), step, None, event.reason) for key in gone]
            case events.BranchOpened():
                # What was taken later than the checkpoint is on a branch that was left.
                step = event.resumed_at + 1
                entries = [entry for entry in entries if entry.step < step]
            case _:
                pass
    return entries


def _of_step(entries: list[Entry], step: int | None, run_dir: Path) -> list[Entry]:
    last = max((entry.step for entry in entries if entry.decision is not None), default=None)
    if last is None:
        raise ConfigError(f"{run_dir} has not taken a batch yet: there is nothing to show")
    found = [entry for entry in entries if entry.step == (last if step is None else step)]
    if not found:
        raise ConfigError(f"{run_dir} has no step {step}; it has taken steps 1 to {last}")
    return found


def _chosen(entries: list[Entry], pick: Pick) -> list[Entry]:
    scored = [entry for entry in entries if entry.reward is not None]
    match pick:
        case "best":
            return sorted(scored, key=lambda entry: -(entry.reward or 0.0))
        case "worst":
            return sorted(scored, key=lambda entry: entry.reward or 0.0)
        case "stale":
            return [entry for entry in entries if entry.is_stale]
        case "failed":
            return [entry for entry in entries if entry.reward is None]
        case "all":
            return sorted(entries, key=lambda entry: entry.key)


def _advantages(run_dir: Path, entries: list[Entry]) -> dict[tuple[int, int], float]:
    """What the learner computed from the groups that the step took."""
    resolved = json.loads((run_dir / "resolved.json").read_bytes())
    kind = resolved["learner"]["objective"]["advantage"]
    if kind == "gae":  # by token, from values that only the learner had
        return {}
    kind = "group_mean" if kind == "gigpo" else kind  # of the whole episode
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        if entry.decision is not None:
            groups.setdefault(entry.finished.uid, []).append(entry)
    found = {}
    rewards = [[entry.reward for entry in group] for group in groups.values()]
    for group, values in zip(groups.values(), batch_advantages(rewards, kind), strict=True):
        found |= {entry.key: float(value) for entry, value in zip(group, values, strict=True)}
    return found
