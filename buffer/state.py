"""The state of the buffer as a fold of its events. No decisions, no clock, no input or output.

    WAITING -> INFLIGHT -> READY -> TAKEN -> TRAINED        DROPPED(reason)

A trace of one prompt with two samples:

    Put             group WAITING      samples WAITING   WAITING
    Claimed [0, 1]  group INFLIGHT     samples INFLIGHT  INFLIGHT
    Finished 0      group INFLIGHT     samples READY     INFLIGHT
    Returned [1]    group INFLIGHT     samples READY     WAITING     (lease expired: attempt 1)
    Claimed [1]     group INFLIGHT     samples READY     INFLIGHT
    Finished 1      group READY        samples READY     READY
    Taken           group TAKEN, then Checkpointed: TRAINED
"""

import heapq
import math
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from typing import Literal

from . import events
from .events import AnyEvent, Decision, Facts, Ref
from .records import DropReason, Version, VersionSpan, WeightsManifest
from .staleness import LivePath

SampleWord = Literal["WAITING", "INFLIGHT", "READY", "DROPPED"]
GroupWord = Literal["WAITING", "INFLIGHT", "READY", "TAKEN", "TRAINED", "DROPPED"]
ADMITTED: tuple[GroupWord, ...] = ("INFLIGHT", "READY", "TAKEN", "TRAINED")
"""The groups that admission counts."""
KEPT_REQUESTS = 4096
"""Claims whose repeat is still answered with the same leases; a client repeats within seconds."""


@dataclass(slots=True)
class Sample:
    """One place in a group."""

    attempt: int = 0
    state: SampleWord = "WAITING"
    lease_id: str = ""
    """Of the last claim; kept when READY, so that an exact repeat is known."""
    claimed: tuple[int, int] = (0, 0)
    """(branch, step) of the version it was claimed under: its lineage, tokens or not."""
    payload: Ref | None = None
    facts: Facts | None = None
    counted: tuple[int, int] = (0, 0)
    """(branch, step) of the take whose proof line counts its reward."""
    voided: tuple[DropReason, tuple[int, int]] | None = None
    """Why the sample cannot be made, and (branch, step) of when that was found."""


@dataclass(slots=True)
class Group:
    """One prompt and its current attempt."""

    uid: int
    ticket: Ref
    samples: list[Sample]
    task: str = ""
    source: int = 0
    """Of `Put`; 0: nothing is remembered of its prompt."""
    staged: bool = False
    """May be extended: complete, it stays INFLIGHT until somebody decides."""
    state: GroupWord = "WAITING"
    drop_reason: DropReason | None = None
    ends: list[tuple[tuple[int, int], DropReason | None]] = field(default_factory=list)
    """((branch, step), drop reason) of every take and drop, those of lineages that were left
    included: one of them may be resumed later."""
    oldest: int | None = field(default=-1, compare=False)
    """`State.oldest_step`, asked for every open group at every take; -1: to be found again."""

    @property
    def attempt(self) -> int:
        """The newest attempt among its samples."""
        return max((sample.attempt for sample in self.samples), default=0)

    @property
    def complete(self) -> bool:
        """Whether every sample is READY or cannot be made."""
        return all(sample.state in ("READY", "DROPPED") for sample in self.samples)

    def indices(self, state: SampleWord) -> list[int]:
        """The samples in a state."""
        return [i for i, sample in enumerate(self.samples) if sample.state == state]


@dataclass(slots=True)
class Lease:
    """Samples of one attempt at one worker."""

    uid: int
    attempt: int
    worker: str
    indices: tuple[int, ...]
    """As granted."""
    open: set[int]
    """Not yet finished, released or expired."""


@dataclass(slots=True)
class Lengths:
    """Number of trajectories and of their policy-written tokens."""

    trajectories: int = 0
    tokens: int = 0

    def add(self, num_tokens: int, trajectories: int = 1) -> None:
        """Count one trajectory, or as many; -1 undoes it."""
        self.trajectories += trajectories
        self.tokens += num_tokens

    @property
    def mean(self) -> float:
        """Tokens per trajectory; 0 without any."""
        return self.tokens / self.trajectories if self.trajectories else 0.0


@dataclass(slots=True)
class Success:
    """A sample that may be shown, or is to be shown, as a demonstration."""

    uid: int
    index: int
    payload: Ref
    since: tuple[int, int]
    """(branch, step) of the take that was next when it was finished, or asked for."""
    shown: tuple[int, int] | None = None
    """(branch, step) that trained it as a demonstration."""


@dataclass(slots=True)
class Tally:
    """What one step counts, and what resuming from an earlier one undoes."""

    trained: Lengths = field(default_factory=Lengths)
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class State:
    """Everything the buffer knows; changed by `apply` alone."""

    path: LivePath = field(default_factory=lambda: LivePath(0))
    groups: dict[int, Group] = field(default_factory=dict)
    next_uid: int = 0
    counts: Counter[GroupWord] = field(default_factory=Counter)
    """Groups by state; their sum is the prompts put."""
    open_uids: dict[GroupWord, set[int]] = field(default_factory=dict)
    """INFLIGHT and READY groups."""
    unclaimed: set[int] = field(default_factory=set)
    """The INFLIGHT groups that have samples WAITING: what a claim looks at first."""
    waiting: list[int] = field(default_factory=list)
    """Heap of uids; entries of groups that have left WAITING are skipped."""
    leases: dict[str, Lease] = field(default_factory=dict)
    leases_issued: int = 0
    requests: OrderedDict[str, list[str]] = field(default_factory=OrderedDict)
    """Recent claim requests -> their lease ids."""
    manifests: OrderedDict[int, WeightsManifest] = field(default_factory=OrderedDict)
    """What the live branch published, by step; the last is the newest."""
    steps: dict[int, events.StepTaken] = field(default_factory=dict)
    """TAKEN on the live branch since the last checkpoint, and the last one before."""
    taken: dict[int, dict[int, tuple[Decision, ...]]] = field(default_factory=dict)
    """step -> uid -> decisions, for the same steps and `kept_steps` before them."""
    begun: tuple[int, str] | None = None
    """(step, request id) of the batch of which parts are TAKEN and others to come."""
    success_reward: float = math.inf
    """From which on a sample is a success."""
    success_pool: int = 0
    successes: OrderedDict[int, Success] = field(default_factory=OrderedDict)
    """source -> the first success of a prompt; kept after the resume of an earlier step only if it
    was made before it."""
    wanted: dict[int, Success] = field(default_factory=dict)
    """uid of a group without a success -> what is to be shown, or was since the last checkpoint."""
    kept_steps: int = 0
    """Steps before the last checkpoint whose groups may be trained once more."""
    repeats: int = 0
    """Takes on the live path of groups that an earlier step had trained already."""
    quarantined: dict[int, str] = field(default_factory=dict)
    """uid -> what was found, of prompts that were DROPPED on the live path as poisoned."""
    staged: dict[int, None] = field(default_factory=dict)
    """uids of complete groups that may still be extended, in order of completion."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Trajectories dropped, by reason, over the run along the live path."""
    dropped_since: Counter[str] = field(default_factory=Counter)
    """The same since the last `StepTaken`."""
    reissued: Counter[str] = field(default_factory=Counter)
    """The part of `dropped` that no resume undoes: its attempts are used up."""
    rewards_since: dict[tuple[int, int, int], float] = field(default_factory=dict)
    """(uid, attempt, index) -> reward of the samples finished since the last `StepTaken`."""
    next_take: tuple[int, int] = (0, 1)
    """(branch, step) of the take to come."""
    finished: Lengths = field(default_factory=Lengths)
    trained: Lengths = field(default_factory=Lengths)
    tallies: dict[tuple[int, int], Tally] = field(default_factory=dict)
    """By (branch, step); `trained` and `dropped` are the sums over the live path."""
    dropped_uids: dict[int, list[int]] = field(default_factory=dict)
    """step -> uids DROPPED on the live branch since the last checkpoint."""
    ended_segments: dict[int, int] = field(default_factory=dict)
    """step -> the first segment that groups TAKEN or DROPPED at it refer to, in any lineage."""
    first_segment: int = 0
    """Those below are removed."""
    compacted_step: int = 0
    """No resume may start before it: what it needs may be removed."""
    final_branch: bool = False
    """No branch will be opened any more: one from an older checkpoint would make TRAINED groups
    READY again, until then their samples are kept."""

    @property
    def newest(self) -> Version | None:
        """The newest version of the live branch; None before its first."""
        return self.manifests[next(reversed(self.manifests))].version if self.manifests else None

    @property
    def next_step(self) -> int:
        """The step that would be taken next, to which drops are booked."""
        return self.newest.step + 1 if self.newest else 1

    @property
    def num_admitted(self) -> int:
        """Groups INFLIGHT + READY + TAKEN + TRAINED, one more for each repeated use."""
        return sum(self.counts[word] for word in ADMITTED) + self.repeats

    def uses(self, group: Group) -> int:
        """How many steps of the live path trained a group."""
        return sum(reason is None and self.on_path(place) for place, reason in group.ends)

    def uids(self, state: GroupWord) -> list[int]:
        """uids of the INFLIGHT or READY groups, in order."""
        return sorted(self.open_uids.get(state, ()))

    def first_waiting(self) -> int | None:
        """The lowest uid that is WAITING."""
        while self.waiting and self.groups[self.waiting[0]].state != "WAITING":
            heapq.heappop(self.waiting)
        return self.waiting[0] if self.waiting else None

    def spans(self, sample: Sample) -> list[VersionSpan]:
        """The versions of a READY sample, digests filled in."""
        assert sample.facts is not None
        known = self.path.digests
        return [
            VersionSpan(version=Version(branch=b, step=s, digest=known.get((b, s), "")), length=n)
            for b, s, n in sample.facts.spans
        ]

    def oldest_step(self, group: Group) -> int | None:
        """The step of the oldest version that wrote or may yet write a token of an open group.

        None while no sample is READY or INFLIGHT.
        """
        if group.oldest == -1:
            steps = [
                min((step for _, step, n in sample.facts.spans if n), default=sample.claimed[1])
                if sample.facts is not None
                else sample.claimed[1]
                for sample in group.samples
                if sample.state in ("READY", "INFLIGHT")
            ]
            group.oldest = min(steps, default=None)
        return group.oldest

    def needed_segment(self, resumable_step: int) -> int | None:
        """The first segment that a resume from this step, or a later one, can need; None: none.

        It needs what open groups refer to, and those that a later step (or, with `max_uses` above
        1, one of the last steps before) took or dropped.
        """
        uids = {*self.waiting, *self.uids("INFLIGHT"), *self.uids("READY")}
        uids.update(uid for groups in self.taken.values() for uid in groups)
        ended = [s for k, s in self.ended_segments.items() if k > resumable_step - self.kept_steps]
        return min([*ended, *(self._first_segment(self.groups[uid]) for uid in uids)], default=None)

    def _first_segment(self, group: Group) -> int:
        payloads = [sample.payload.segment for sample in group.samples if sample.payload]
        return min([group.ticket.segment, *payloads])

    def _note_segment(self, group: Group, step: int) -> None:
        first = self._first_segment(group)
        self.ended_segments[step] = min(first, self.ended_segments.get(step, first))

    def apply(self, event: AnyEvent) -> None:
        """Fold one event in."""
        match event:
            case events.Finished():  # the commonest first: a resume folds millions
                self._finished(event)
            case events.Claimed():
                self._claimed(event)
            case events.Put():
                self._put(event)
            case events.Extended():
                self._extended(event)
            case events.Returned():
                self._returned(event)
            case events.Voided():
                self._voided(event)
            case events.Dropped():
                self._dropped(event)
            case events.Reopened():
                self._reopened(event)
            case events.Taken():
                self._taken(event)
            case events.Demonstrated():
                here = (self.path.branch, event.step)
                since = self.wanted[event.uid].since if event.uid in self.wanted else here
                self.wanted[event.uid] = Success(*event.success, event.payload, since, here)
            case events.StepBegun():
                self.begun = (event.step, event.request_id)
            case events.StepTaken():
                self.steps[event.step] = event
                self.begun = None
                self.next_take = (self.path.branch, event.step + 1)
                self.dropped_since.clear()
                self.rewards_since.clear()
            case events.Published():
                self.manifests[event.manifest.version.step] = event.manifest
                self.path.publish(event.manifest.version)
            case events.Checkpointed():
                self._checkpointed(event)
            case events.BranchOpened():
                self._branch_opened(event)
            case events.Compacted():
                self._compacted(event)

    def _move(self, group: Group, state: GroupWord) -> None:
        """Change a group's state and every count and index that follows from it."""
        self.counts[group.state] -= 1
        self.open_uids.get(group.state, set()).discard(group.uid)
        group.state = state
        self.counts[state] += 1
        if state in ("INFLIGHT", "READY"):
            self.open_uids.setdefault(state, set()).add(group.uid)
        elif state == "WAITING":
            heapq.heappush(self.waiting, group.uid)
        if state != "INFLIGHT":
            self.unclaimed.discard(group.uid)

    def _settle(self, group: Group) -> None:
        """Derive what follows from the samples of a group that is not final."""
        group.oldest = -1
        words = {sample.state for sample in group.samples}
        complete = words <= {"READY", "DROPPED"}
        self.staged.pop(group.uid, None)
        if complete and not (group.staged and "READY" in words):
            state: GroupWord = "READY"
        elif words & {"READY", "INFLIGHT"}:
            state = "INFLIGHT"
        else:
            state = "WAITING"
        if complete and group.staged and state == "INFLIGHT":
            self.staged[group.uid] = None
        if state != group.state:
            self._move(group, state)
        if state == "INFLIGHT" and "WAITING" in words:
            self.unclaimed.add(group.uid)
        else:
            self.unclaimed.discard(group.uid)

    def _close_lease(self, sample: Sample, index: int) -> None:
        """Take a sample out of its lease."""
        lease = self.leases.get(sample.lease_id)
        if lease is not None and sample.state == "INFLIGHT":
            lease.open.discard(index)
            if not lease.open:
                del self.leases[sample.lease_id]

    def _tally(self, step: int) -> Tally:
        return self.tallies.setdefault((self.path.branch, step), Tally())

    def _count_drops(self, reason: str, number: int, booked: Counter[str]) -> None:
        """Count dropped trajectories, also in what they are booked to."""
        if number:
            for counts in (self.dropped, self.dropped_since, booked):
                counts[reason] += number

    def _put(self, event: events.Put) -> None:
        samples = [Sample() for _ in range(event.num_samples)]
        group = Group(
            uid=event.uid,
            ticket=event.ticket,
            samples=samples,
            task=event.task,
            source=event.source,
            staged=event.staged,
        )
        self.groups[event.uid] = group
        self.next_uid = event.uid + 1
        if not samples:  # skipped: for good, in every lineage, like its place in the stream
            group.state, group.drop_reason = "DROPPED", "skipped"
            self.counts["DROPPED"] += 1
            return
        self.counts["WAITING"] += 1
        heapq.heappush(self.waiting, event.uid)

    def _extended(self, event: events.Extended) -> None:
        group = self.groups[event.uid]
        more = event.num_samples - len(group.samples)
        group.samples += [Sample(attempt=group.attempt) for _ in range(more)]
        group.staged, group.ticket = event.staged, event.ticket
        self._settle(group)

    def _claimed(self, event: events.Claimed) -> None:
        group = self.groups[event.uid]
        for index in event.indices:
            sample = group.samples[index]
            sample.state, sample.lease_id = "INFLIGHT", event.lease_id
            sample.claimed = (event.branch, event.step)
        self.leases[event.lease_id] = Lease(
            uid=event.uid,
            attempt=event.attempt,
            worker=event.worker,
            indices=event.indices,
            open=set(event.indices),
        )
        self.leases_issued += 1
        self.requests.setdefault(event.request_id, []).append(event.lease_id)
        while len(self.requests) > KEPT_REQUESTS:
            self.requests.popitem(last=False)
        self._settle(group)

    def _finished(self, event: events.Finished) -> None:
        group = self.groups[event.uid]
        sample = group.samples[event.index]
        self._close_lease(sample, event.index)
        sample.state, sample.payload, sample.facts = "READY", event.payload, event.facts
        self.finished.add(event.facts.num_tokens)
        self._count_reward(group, event.index)
        if sample.lease_id in self.leases:  # others of its lease: the group stays INFLIGHT
            group.oldest = -1
        else:
            self._settle(group)

    def _remember_success(self, group: Group, index: int, reward: float) -> None:
        """Keep the first success of a prompt."""
        payload = group.samples[index].payload
        if not group.source or payload is None or reward < self.success_reward:
            return
        success = Success(group.uid, index, payload, self.next_take)
        self.successes.setdefault(group.source, success)
        if len(self.successes) > self.success_pool:
            self.successes.popitem(last=False)

    def _want_success(self, group: Group, step: int) -> None:
        """Note a group that ends without a success, if there is one to be shown."""
        rewards = [sample.facts.reward for sample in group.samples if sample.facts is not None]
        scored = [reward for reward in rewards if reward is not None]
        known = self.successes.get(group.source)
        if known is not None and scored and max(scored) < self.success_reward:
            since = (self.path.branch, step)
            self.wanted[group.uid] = replace(known, since=since)
            waiting = [uid for uid, each in self.wanted.items() if each.shown is None]
            if len(waiting) > self.success_pool:
                del self.wanted[waiting[0]]

    def _count_reward(self, group: Group, index: int) -> None:
        """Leave a finished sample's reward to the next take's proof line, and to the pool."""
        sample = group.samples[index]
        sample.counted = self.next_take
        if sample.facts is not None and sample.facts.reward is not None:
            self.rewards_since[group.uid, sample.attempt, index] = sample.facts.reward
            self._remember_success(group, index, sample.facts.reward)

    def _returned(self, event: events.Returned) -> None:
        group = self.groups[event.uid]
        for index in event.indices:
            sample = group.samples[index]
            self._close_lease(sample, index)
            if sample.state == "READY" and sample.facts is not None:  # it will be finished again
                self.finished.add(-sample.facts.num_tokens, trajectories=-1)
                self.rewards_since.pop((group.uid, sample.attempt, index), None)
                known = self.successes.get(group.source)
                if known is not None and known.payload == sample.payload:
                    del self.successes[group.source]
            group.samples[index] = Sample(attempt=event.attempt)
        number = len(event.indices) if event.reason != "resumed" else 0
        self._count_drops(event.reason, number, self.reissued)
        self._settle(group)

    def _voided(self, event: events.Voided) -> None:
        group = self.groups[event.uid]
        for index in event.indices:
            sample = group.samples[index]
            self._close_lease(sample, index)
            sample.state = "DROPPED"
            sample.voided = (event.reason, (self.path.branch, event.step))
        self._count_drops(event.reason, len(event.indices), self._tally(event.step).dropped)
        self._settle(group)

    def _dropped(self, event: events.Dropped) -> None:
        group = self.groups[event.uid]
        for index, sample in enumerate(group.samples):
            self._close_lease(sample, index)
        number = len(group.indices("READY"))
        self._count_drops(event.reason, number, self._tally(event.step).dropped)
        group.drop_reason = event.reason
        group.ends.append(((self.path.branch, event.step), event.reason))
        self._note_segment(group, event.step)
        self.staged.pop(event.uid, None)
        if event.detail:
            self.quarantined[event.uid] = event.detail
        if event.reason == "no_signal":
            self._want_success(group, event.step)
        self.dropped_uids.setdefault(event.step, []).append(event.uid)
        self._move(group, "DROPPED")

    def _reopened(self, event: events.Reopened) -> None:
        group = self.groups[event.uid]
        self._count_drops(event.reason, len(group.indices("READY")), self.reissued)
        group.samples = [Sample(attempt=event.attempt) for _ in group.samples]
        self._settle(group)

    def _taken(self, event: events.Taken) -> None:
        group = self.groups[event.uid]
        if self.uses(group) > 0:
            self.repeats += 1
        else:
            self._want_success(group, event.step)
        group.ends.append(((self.path.branch, event.step), None))
        self._note_segment(group, event.step)
        tally = self._tally(event.step)
        for decision in event.decisions:
            facts = group.samples[decision.index].facts
            if decision.trained and facts is not None:
                self.trained.add(facts.num_tokens)
                tally.trained.add(facts.num_tokens)
            elif decision.drop_reason:
                self._count_drops(decision.drop_reason, 1, tally.dropped)
        self.taken.setdefault(event.step, {})[event.uid] = event.decisions
        self._move(group, "TAKEN")

    def _checkpointed(self, event: events.Checkpointed) -> None:
        later = {uid for step in self.taken if step > event.step for uid in self.taken[step]}
        for step in [step for step in self.taken if step <= event.step]:
            for uid in self.taken[step]:
                if self.groups[uid].state == "TAKEN" and uid not in later:
                    self._move(self.groups[uid], "TRAINED")
            if step < event.step - self.kept_steps:  # the last one stays: it may be asked again
                self._forget(list(self.taken.pop(step)))
                self.steps.pop(step, None)
        if self.final_branch:
            kept = {k: v for k, v in self.wanted.items() if not v.shown or v.shown[1] >= event.step}
            self.wanted = kept
        for step in [step for step in self.dropped_uids if step < event.step]:
            self._forget(self.dropped_uids.pop(step))

    def _forget(self, uids: list[int]) -> None:
        """Let go of what a resume alone would need, once none can happen in this process."""
        held = {uid for groups in self.taken.values() for uid in groups}
        for uid in [uid for uid in uids if self.final_branch and uid not in held]:
            del self.groups[uid].samples[1:]

    def finalize_branch(self) -> None:
        """This process opens no further branch: samples of ended groups are not needed here."""
        self.final_branch = True
        live = {uid for uids in [*self.taken.values(), *self.dropped_uids.values()] for uid in uids}
        ended = [g.uid for g in self.groups.values() if g.state in ("TRAINED", "DROPPED")]
        self._forget([uid for uid in ended if uid not in live])

    def _compacted(self, event: events.Compacted) -> None:
        self.first_segment, self.compacted_step = event.first_segment, event.step
        ended = self.ended_segments.items()
        self.ended_segments = {k: s for k, s in ended if s >= event.first_segment}
        for pool in (self.successes, self.wanted):
            gone = [k for k, v in pool.items() if v.payload.segment < event.first_segment]
            for key in gone:
                if pool[key].shown is None:
                    del pool[key]

    def _branch_opened(self, event: events.BranchOpened) -> None:
        """Undo what is off the new path: takes, drops and counts of lost steps, and every lease.

        Samples stay READY here; `Replay.open_branch` returns those that are orphaned or lost, as
        events of their own, because that depends on bytes on disk.
        """
        digests = self.path.digests
        self.path = LivePath(event.branch, event.parents)
        self.path.digests = digests
        self.leases.clear()
        self.requests.clear()
        self.manifests.clear()
        self.steps.clear()
        self.begun = None
        self.taken.clear()
        self.staged.clear()
        self.dropped_uids.clear()
        self.next_take = (event.branch, event.resumed_at + 1)
        for pool in (self.successes, self.wanted):
            for key in [key for key, each in pool.items() if not self.on_path(each.since)]:
                del pool[key]
        for each in self.wanted.values():
            each.shown = each.shown if each.shown and self.on_path(each.shown) else None
        self._recount()
        for group in self.groups.values():
            self._onto_path(group)
        for uid in [uid for uid in self.quarantined if self.groups[uid].state != "DROPPED"]:
            del self.quarantined[uid]
        self.repeats = sum(max(0, self.uses(group) - 1) for group in self.groups.values())

    def _recount(self) -> None:
        """The totals along the live path; what lost steps counted is counted again when redone."""
        self.trained, self.dropped = Lengths(), self.reissued.copy()
        self.dropped_since.clear()
        self.rewards_since.clear()
        for place, tally in self.tallies.items():
            if self.on_path(place):
                self.trained.add(tally.trained.tokens, tally.trained.trajectories)
                self.dropped.update(tally.dropped)
        for group in self.groups.values():
            for index in group.indices("READY"):
                if not self.on_path(group.samples[index].counted):
                    self._count_reward(group, index)

    def _onto_path(self, group: Group) -> None:
        """Bring one group over to the live path as it now is."""
        if not group.samples:
            return
        group.oldest = -1
        for index, sample in enumerate(group.samples):
            lost_void = sample.voided is not None and not self.on_path(sample.voided[1])
            if sample.state == "INFLIGHT" or lost_void:
                group.samples[index] = Sample(attempt=sample.attempt)
        for ended, reason in group.ends:
            if self.on_path(ended):  # at or below the checkpoint: part of its weights, or dropped
                group.drop_reason = reason
                self._move(group, "DROPPED" if reason else "TRAINED")
                return
        group.drop_reason = None
        self._settle(group)

    def on_path(self, place: tuple[int, int]) -> bool:
        """Whether (branch, step) lies on the live path."""
        return Version(branch=place[0], step=place[1]) in self.path
