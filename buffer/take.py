"""Which groups a step trains, and what each of their samples counts for.

In the order of `ORDERS`, by default oldest first; what is over the bound is trimmed, requeued or
dropped; and the step waits, up to a deadline, for samples in flight that it would make late. With
`max_uses` above 1, groups that were trained before fill what is missing.
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from .config import TakeOrder
from .events import Decision
from .records import Record
from .staleness import first_late, judge, would_exceed
from .state import Group

if TYPE_CHECKING:
    from .replay import Replay


PART_SAMPLES = 64
"""At most so many samples (or one group) are handed out at once in parts: reading a large batch
would hold up everybody's claims, and its trainer starts with the first ones meanwhile."""


class TakePlan(Record, frozen=True):
    """The batch of a step, decided and not yet carried out."""

    step: int
    groups: tuple[tuple[int, tuple[Decision, ...]], ...]
    """(uid, decisions), in uid order: of P groups, or of those that the parts before leave."""
    completes: bool = True
    """Whether the step has all its groups then."""


class Candidate(NamedTuple):
    """What an order may know of a READY group."""

    uid: int
    oldest_step: int
    """Of the oldest version that wrote a token of it."""
    group: Group

    @property
    def rewards(self) -> list[float]:
        """Of its scored samples."""
        facts = [sample.facts for sample in self.group.samples]
        return [each.reward for each in facts if each is not None and each.reward is not None]


Order = Callable[[Candidate, int], float]
"""(candidate, step) -> key: the lowest is trained first; ties by age, then uid."""

ORDERS: dict[TakeOrder, Order] = {
    "oldest": lambda group, _: group.oldest_step,
    "freshest": lambda group, _: -group.oldest_step,
    "uniform": lambda group, step: xxhash.xxh3_64_intdigest(f"{step}/{group.uid}".encode()),
    "priority": lambda group, _: -statistics.pstdev(group.rewards or [0.0]),
}


def plan_take(replay: "Replay", step: int, now: float, *, part: bool = False) -> TakePlan | str:
    """Choose the batch, or with `part` what can be had of it now; in words what is missing when
    there is none yet.

    Groups with too little left to train are reopened as soon as P are READY, even when fewer than
    P are left then.
    """
    number = replay.prompts_per_step - len(_begun(replay, step))
    num_ready = replay.state.counts["READY"]
    if not part and num_ready < number and replay.config.max_uses == 1:
        return _missing(replay, step, num_ready, now)
    chosen: list[tuple[int, tuple[Decision, ...]]] = []
    for uid in _in_order(replay, replay.state.uids("READY"), step):
        # Out of order of age, one that nobody reaches would stay too old for ever.
        if len(chosen) >= number and replay.config.take_order == "oldest":
            break
        decisions = _decide(replay, replay.state.groups[uid], step)
        if decisions is None:
            replay.reopen(uid, "stale")
        elif len(chosen) < number:
            chosen.append((uid, decisions))
    num_new = len(chosen)
    chosen += _again(replay, step, number - num_new)
    if len(chosen) < number:
        plan = _part(replay, step, chosen[:num_new]) if part else None
        return plan or _missing(replay, step, num_new, now)
    late = _made_late(replay, {uid for uid, _ in chosen}, step)
    if replay.blocked[0] != step:
        replay.blocked = (step, now)
    waits = replay.config.stale == "wait"
    patience_s = replay.config.take_deadline_s if waits else replay.config.straggler_wait_s
    if late and now - replay.blocked[1] < patience_s:
        if part and (plan := _part(replay, step, chosen[:num_new])):
            return plan
        return (
            f"{_inflight(replay, late, now)} that step {step} would push over the bound; it goes "
            f"on after {patience_s:g} s"
        )
    few = _few(chosen)
    if part and few < len(chosen) and (plan := _part(replay, step, chosen[: min(few, num_new)])):
        return plan
    return TakePlan(step=step, groups=tuple(sorted(chosen)))


def _few(chosen: list[tuple[int, tuple[Decision, ...]]]) -> int:
    """How many groups, of the first, are handed out at once."""
    totals = itertools.accumulate(len(decisions) for _, decisions in chosen)
    return max(1, sum(total <= PART_SAMPLES for total in totals))


def _begun(replay: "Replay", step: int) -> Collection[int]:
    """The groups of a step that are TAKEN while it waits for more."""
    begun = replay.state.begun
    return replay.state.taken[step] if begun is not None and begun[0] == step else ()


def _part(
    replay: "Replay", step: int, chosen: list[tuple[int, tuple[Decision, ...]]]
) -> TakePlan | None:
    """The first of the chosen that the step can take before the others are known.

    The second line of the proof, with the places that the step has left: what stays behind must fit
    into those and into the steps to come. It gets tighter with every group that is taken, because a
    place that an older one may need is gone.
    """
    places = replay.prompts_per_step - len(_begun(replay, step))
    chosen = chosen[: _few(chosen)]
    while chosen:
        uids = {uid for uid, _ in chosen}
        if not _made_late(replay, uids, step, open_places=places - len(chosen)):
            return TakePlan(step=step, groups=tuple(sorted(chosen)), completes=False)
        chosen = chosen[:-1]
    return None


def _in_order(replay: "Replay", uids: list[int], step: int) -> list[int]:
    """The uids as the configured order wants them."""
    order, keys = ORDERS[replay.config.take_order], {}
    for uid in uids:
        group = replay.state.groups[uid]
        candidate = Candidate(uid, replay.age_of(group) or 0, group)
        keys[uid] = (order(candidate, step), candidate.oldest_step, uid)
    return sorted(uids, key=keys.__getitem__)


def _again(replay: "Replay", step: int, number: int) -> list[tuple[int, tuple[Decision, ...]]]:
    """Groups that earlier steps trained, of which nothing is over the bound yet."""
    if number <= 0 or replay.config.max_uses == 1:
        return []
    state = replay.state
    uids = {uid for taken in state.taken.values() for uid in taken} - replay.spent
    uids -= set(state.taken.get(step, ()))
    used = [uid for uid in sorted(uids) if state.uses(state.groups[uid]) < replay.config.max_uses]
    found: list[tuple[int, tuple[Decision, ...]]] = []
    for uid in _in_order(replay, used, step):
        decisions = _decide(replay, state.groups[uid], step)
        if decisions is not None and not any(
            decision.stale_prefix or decision.drop_reason == "stale" for decision in decisions
        ):
            found.append((uid, decisions))
    return found[:number]


def _decide(replay: "Replay", group: Group, step: int) -> tuple[Decision, ...] | None:
    """One decision per READY sample; None when the group has to be issued again."""
    decisions: list[Decision] = []
    for index in group.indices("READY"):
        sample = group.samples[index]
        assert sample.facts is not None
        verdict = judge(replay.state.spans(sample), step, replay.bound_of(group), replay.state.path)
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


def _made_late(replay: "Replay", chosen: set[int], step: int, open_places: int = 0) -> list[int]:
    """INFLIGHT uids for which this step has to wait, by the second line of the proof.

    Those over the bound before this step are not made late by it: they had their wait.
    """
    state, bound = replay.state, replay.config.max_staleness_steps
    ages: dict[int, int] = {}
    for uid in [*state.uids("INFLIGHT"), *state.uids("READY")]:
        oldest = replay.age_of(state.groups[uid])
        if uid not in chosen and oldest is not None and not would_exceed(oldest, step - 1, bound):
            ages[uid] = oldest
    ages_left = Counter(ages.values())
    late = first_late(ages_left, step, bound, replay.prompts_per_step, open_places)
    if late is None:
        return []
    return [uid for uid in state.uids("INFLIGHT") if ages.get(uid, late + 1) <= late]


def _missing(replay: "Replay", step: int, num_ready: int, now: float) -> str:
    """Too few groups are READY: say how many and who has the others."""
    num_begun = len(_begun(replay, step))
    head = f"{num_ready} of {replay.prompts_per_step - num_begun} groups READY"
    if num_begun:
        head += f" besides the {num_begun} handed out"
    if replay.state.staged:
        head += f", {len(replay.state.staged)} staged until the feeder extends them or not"
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
