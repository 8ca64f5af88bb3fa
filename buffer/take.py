"""Which groups a step trains, and what each of their samples counts for.

Oldest first (by the oldest token's version, then uid); what is over the bound is trimmed, requeued
or dropped; and the step waits, up to a deadline, for samples in flight that it would make late.
"""

from collections import Counter
from typing import TYPE_CHECKING

from .events import Decision
from .records import Record
from .staleness import first_late, judge, would_exceed
from .state import Group

if TYPE_CHECKING:
    from .replay import Replay


class TakePlan(Record, frozen=True):
    """The batch of a step, decided and not yet carried out."""

    step: int
    groups: tuple[tuple[int, tuple[Decision, ...]], ...]
    """(uid, decisions) of P groups, in uid order."""


def plan_take(replay: "Replay", step: int, now: float) -> TakePlan | str:
    """Choose the batch; in words what is missing when there is none yet.

    Groups with too little left to train are reopened as soon as P are READY, even when fewer than
    P are left then.
    """
    ready = _oldest_first(replay)
    if len(ready) < replay.prompts_per_step:
        return _missing(replay, len(ready), now)
    chosen: list[tuple[int, tuple[Decision, ...]]] = []
    for uid in ready:
        if len(chosen) == replay.prompts_per_step:
            break
        decisions = _decide(replay, replay.state.groups[uid], step)
        if decisions is None:
            replay.reopen(uid, "stale")
        else:
            chosen.append((uid, decisions))
    if len(chosen) < replay.prompts_per_step:
        return _missing(replay, len(chosen), now)
    late = _made_late(replay, {uid for uid, _ in chosen}, step)
    if replay.blocked[0] != step:
        replay.blocked = (step, now)
    waited_s = now - replay.blocked[1]
    if late and waited_s < replay.config.straggler_wait_s:
        return (
            f"{_inflight(replay, late, now)} that step {step} would push over the bound; it goes "
            f"on after {replay.config.straggler_wait_s:g} s"
        )
    return TakePlan(step=step, groups=tuple(sorted(chosen)))


def _oldest_first(replay: "Replay") -> list[int]:
    """READY uids by the step of their oldest token's version, then uid."""
    groups = replay.state.groups
    ages = {uid: replay.state.oldest_step(groups[uid]) or 0 for uid in replay.state.uids("READY")}
    return sorted(ages, key=lambda uid: (ages[uid], uid))


def _decide(replay: "Replay", group: Group, step: int) -> tuple[Decision, ...] | None:
    """One decision per READY sample; None when the group has to be issued again."""
    decisions: list[Decision] = []
    for index in group.indices("READY"):
        sample = group.samples[index]
        assert sample.facts is not None
        verdict = judge(
            replay.state.spans(sample), step, replay.config.max_staleness_steps, replay.state.path
        )
        if sample.facts.reward is None:
            decisions.append(Decision(index=index, trained=False, drop_reason="reward_failed"))
        elif not verdict.stale_prefix:
            decisions.append(Decision(index=index, trained=True))
        elif replay.config.stale == "requeue":
            return None
        elif replay.config.stale == "drop" or verdict.all_stale:
            decisions.append(Decision(index=index, trained=False, drop_reason="stale"))
        else:
            decisions.append(Decision(index=index, trained=True, stale_prefix=verdict.stale_prefix))
    needed = min(2, len(group.samples))
    return tuple(decisions) if sum(d.trained for d in decisions) >= needed else None


def _made_late(replay: "Replay", chosen: set[int], step: int) -> list[int]:
    """INFLIGHT uids for which this step has to wait, by the second line of the proof.

    Those over the bound before this step are not made late by it: they had their wait.
    """
    state, bound = replay.state, replay.config.max_staleness_steps
    ages: dict[int, int] = {}
    for uid in [*state.uids("INFLIGHT"), *state.uids("READY")]:
        oldest = state.oldest_step(state.groups[uid])
        if uid not in chosen and oldest is not None and not would_exceed(oldest, step - 1, bound):
            ages[uid] = oldest
    late = first_late(Counter(ages.values()), step, bound, replay.prompts_per_step)
    if late is None:
        return []
    return [uid for uid in state.uids("INFLIGHT") if ages.get(uid, late + 1) <= late]


def _missing(replay: "Replay", num_ready: int, now: float) -> str:
    """Too few groups are READY: say how many and who has the others."""
    head = f"{num_ready} of {replay.prompts_per_step} groups READY"
    inflight = replay.state.uids("INFLIGHT")
    if inflight:
        others = _inflight(replay, inflight, now)
    elif replay.state.first_waiting() is None:
        others = "no prompts WAITING: the feeder has to put some"
    else:
        others = f"{replay.state.counts['WAITING']} WAITING, none INFLIGHT: no worker claims"
    return f"{head}; {others}{_dropped(replay.state.dropped_since)}"


def _dropped(dropped: Counter[str]) -> str:
    """Say how many samples were dropped and why; nothing when none were."""
    if not dropped:
        return ""
    reasons = list(dropped)
    if len(reasons) > 1:
        reasons = [f"{number} {reason}" for reason, number in dropped.most_common()]
    return f"; {dropped.total()} dropped since the last step: {', '.join(reasons)}"


def _inflight(replay: "Replay", uids: list[int], now: float) -> str:
    """Say who holds these groups, and since when."""
    wanted = set(uids)
    held = {name: lease for name, lease in replay.state.leases.items() if lease.uid in wanted}
    if not held:
        return f"{len(uids)} INFLIGHT with samples that no worker has claimed"
    workers = ", ".join(sorted({lease.worker for lease in held.values()}))
    since = min(replay.claimed_at.get(name, now) for name in held)
    return f"{len(uids)} INFLIGHT at {workers}; oldest sample {now - since:.1f} s"
