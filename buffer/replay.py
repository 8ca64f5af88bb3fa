"""The decisions of the buffer: what a request may do to the state, as events.

Each method checks a request against the law and the state, raises `Refused` before anything has
changed, and otherwise emits events: applied at once, and left in `outbox` for the journal. Pure but
for that: no input or output, time is passed in, equal calls give equal events.

Attempts are counted per sample: when a lease expires only the lost samples are issued again, under
the next attempt number, and finished siblings stay; a stale group that is issued again as a whole
gets the next number on all samples. What a crash undid keeps its number: the lineage in which it
was claimed no longer exists, and with the same number the same random numbers make the same sample.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from . import events
from .config import BufferConfig
from .errors import Refused
from .events import AnyEvent, Facts, Ref
from .records import REISSUED, DropReason, Trajectory, Version, WeightsManifest
from .staleness import admits, capacity, first_late, token_bound
from .state import Group, Lease, State
from .take import TakePlan, plan_take

MAX_SAMPLES = 4096
"""Of one prompt: what one request may make us build."""
MAX_WORKERS = 10_000
MAX_DEATHS = 3
"""So many workers or engines may die over one prompt before it is taken for the cause."""


class Replay:
    """The state machine WAITING -> INFLIGHT -> READY -> TAKEN -> TRAINED, DROPPED(reason)."""

    def __init__(self, config: BufferConfig, prompts_per_step: int) -> None:
        """Start empty; `restore` folds a journal in.

        Args:
            config: the law's settings.
            prompts_per_step: P.
        """
        self.config, self.prompts_per_step = config, prompts_per_step
        self.state = State(
            kept_steps=self._kept_steps(),
            success_reward=config.success_reward,
            success_pool=config.success_pool,
        )
        self.spent: set[int] = set()
        """uids whose payload could not be read when a step wanted to train them once more."""
        self.staged_since: dict[int, float] = {}
        """uid -> since when a complete group waits to be extended or not."""
        self.outbox: list[AnyEvent] = []
        self.last_seen: dict[str, float] = {}
        """worker -> when it last showed life, or was granted something, in the caller's clock."""
        self.claimed_at: dict[str, float] = {}
        """lease -> when it was granted, in the caller's clock."""
        self.deaths: dict[int, set[str]] = {}
        """Open uid -> deaths of workers that held it and of engines that were writing it, by name,
        since a sample of it was finished."""
        self._worker_deaths = 0
        self.blocked: tuple[int, float] = (0, 0.0)
        """(step, since when): it could begin but for samples that it would push over the bound."""

    def _emit(self, event: AnyEvent) -> None:
        self.state.apply(event)
        self.outbox.append(event)
        if isinstance(event, events.Dropped | events.Taken):
            self.deaths.pop(event.uid, None)

    def _kept_steps(self) -> int:
        """How long a group can be trained again: as long as a token of it is in the bound."""
        return token_bound(self.config.max_staleness_steps) if self.config.max_uses > 1 else 0

    def bound_of(self, group: Group) -> float:
        """S of the group's task."""
        return self.config.bound_of(group.task)

    def age_of(self, group: Group) -> int | None:
        """The step of the oldest version of a group, as if its task had the bound of the run.

        A task with a bound tighter by d is late d steps earlier: the proof holds for oldest - d.
        """
        oldest = self.state.oldest_step(group)
        tighter = token_bound(self.config.max_staleness_steps) - token_bound(self.bound_of(group))
        return None if oldest is None else oldest - tighter

    def put(
        self,
        uid: int,
        num_samples: int,
        ticket: Callable[[], Ref],
        task: str = "",
        *,
        staged: bool = False,
        source: int = 0,
    ) -> bool:
        """Put a prompt WAITING; False when the queue is full. A repeat is put already.

        Args:
            uid: the next of the stream; a gap would be a lost prompt.
            num_samples: G of this prompt.
            ticket: stores the ticket and says where; called only for a new prompt.
            task: whose bound it has.
            staged: see `SizingDecision`.
            source: see `events.Put`.
        Raises:
            Refused: a gap in the uids, or no samples.
        """
        if 0 <= uid < self.state.next_uid:
            return True
        if uid != self.state.next_uid or not 0 <= num_samples <= MAX_SAMPLES:
            raise Refused(
                f"uid {uid} with {num_samples} samples cannot be put: the next is "
                f"{self.state.next_uid}, and a prompt has 1 to {MAX_SAMPLES} samples, or 0 to "
                "be skipped"
            )
        if self.state.counts["WAITING"] >= self.config.max_waiting_prompts:
            return False
        self._emit(
            events.Put(
                uid=uid,
                num_samples=num_samples,
                ticket=ticket(),
                task=task,
                staged=staged,
                source=source,
            )
        )
        return True

    def extend(
        self, uid: int, num_samples: int, ticket: Callable[[], Ref], *, staged: bool = False
    ) -> None:
        """Give an open group more samples, or declare it whole; a repeat changes nothing.

        Args:
            uid: WAITING, INFLIGHT or READY.
            num_samples: in all; never fewer than before.
            ticket: stores the ticket with the new decision and says where.
            staged: whether still more may follow.
        Raises:
            Refused: there is no such open group, or it has more samples already.
        """
        group = self.state.groups.get(uid)
        if group is None:
            raise Refused(f"uid {uid} cannot be extended: it was never put")
        if len(group.samples) == num_samples and group.staged == staged:
            return
        is_open = group.state in ("WAITING", "INFLIGHT", "READY")
        if not is_open or not len(group.samples) <= num_samples <= MAX_SAMPLES:
            raise Refused(
                f"uid {uid} cannot be extended to {num_samples} samples: it is {group.state} with "
                f"{len(group.samples)}"
            )
        self._emit(
            events.Extended(uid=uid, num_samples=num_samples, ticket=ticket(), staged=staged)
        )
        self._settle(group)

    def settle_staged(self, now: float) -> None:
        """Take complete groups as whole whose sizer has been silent for `straggler_wait_s`."""
        since = self.staged_since
        self.staged_since = {uid: since.get(uid, now) for uid in self.state.staged}
        for uid, began_s in list(self.staged_since.items()):
            if now - began_s > self.config.straggler_wait_s:
                group = self.state.groups[uid]
                self.extend(uid, len(group.samples), lambda group=group: group.ticket)

    def claim(
        self, worker: str, serving: Version, max_samples: int, request_id: str, now: float
    ) -> list[tuple[str, Lease]]:
        """Lease up to `max_samples` samples to a worker; empty when the law admits none.

        Samples left over in an opened group go first. A repeat gets the same leases.

        Raises:
            Refused: the version is off the live path or newer than the newest.
        """
        if request_id in self.state.requests:
            names = self.state.requests[request_id]
            return [(name, self.state.leases[name]) for name in names if name in self.state.leases]
        self._check_serving(serving)
        granted: list[str] = []
        while max_samples > 0 and (choice := self._choose(serving)) is not None:
            group, attempt, indices = choice
            if not self._alone(worker, group.uid):
                break
            lease_id = f"{self.state.path.branch}.{self.state.leases_issued}"
            claimed = events.Claimed(
                uid=group.uid,
                attempt=attempt,
                indices=tuple(indices[:max_samples]),
                lease_id=lease_id,
                worker=worker,
                branch=serving.branch,
                step=serving.step,
                request_id=request_id,
            )
            self._emit(claimed)
            self.claimed_at[lease_id] = self.last_seen[worker] = now
            granted.append(lease_id)
            max_samples -= len(claimed.indices)
        return [(lease_id, self.state.leases[lease_id]) for lease_id in granted]

    def _alone(self, worker: str, uid: int) -> bool:
        """Whether a prompt may go to a worker that holds others: one whose worker died is given out
        alone, so that the next death tells a poisoned prompt from its bystanders."""
        held = {lease.uid for lease in self.state.leases.values() if lease.worker == worker} - {uid}
        return not held or not (self.deaths.keys() & (held | {uid}))

    def _check_serving(self, serving: Version) -> None:
        newest = self.state.newest
        if newest is None or serving not in self.state.path or serving.step > newest.step:
            raise Refused(
                f"version {serving} gets no work: the live branch is {self.state.path.branch} and "
                f"its newest version {newest}; load that one"
            )

    def _choose(self, serving: Version) -> tuple[Group, int, list[int]] | None:
        """The samples to hand out next under a version: (group, attempt, indices)."""
        state = self.state
        newest = state.newest
        law = (serving.step, self.config.max_staleness_steps, self.prompts_per_step)
        if newest is None:
            return None
        behind = serving.step < newest.step
        # An opened group counts already; under an older version its place must be admitted again.
        # Never under the newest: then a resume that kept more groups than it admits would hang.
        if not behind or state.num_admitted <= capacity(*law):
            for uid in sorted(state.unclaimed):
                group = state.groups[uid]
                if behind and self.bound_of(group) == 0:
                    continue
                if indices := group.indices("WAITING"):
                    return _same_attempt(group, indices)
        uid = state.first_waiting()
        if uid is None:
            return None
        group = state.groups[uid]
        bound = self.bound_of(group)
        if not admits(state.num_admitted, serving.step, bound, self.prompts_per_step):
            return None
        return None if behind and bound == 0 else _same_attempt(group, group.indices("WAITING"))

    def finish(
        self, trajectory: Trajectory, lease_id: str, payload: Callable[[], Ref], now: float
    ) -> None:
        """Accept one trajectory; an exact repeat changes nothing.

        Args:
            trajectory: its attempt and index must be those of the lease.
            lease_id: from the claim.
            payload: stores the trajectory and says where; called only when it is accepted.
            now: the caller's clock.
        Raises:
            Refused: the lease is not (or no longer) for this sample, or a token's version is off
                the live path; in that case the sample is issued again.
        """
        group = self._leased(trajectory, lease_id)
        if group is None:
            return
        self.last_seen[self.state.leases[lease_id].worker] = now
        spans = [span for span in trajectory.versions if span.length]
        newest = self.state.newest
        assert newest is not None, "there are leases, so there was a version"
        for span in spans:
            if span.version not in self.state.path or span.version.step > newest.step:
                self._return(group, (trajectory.index,), "orphaned")
                raise Refused(
                    f"version {span.version} of a token is not one of this run's; orphaned"
                )
        value = trajectory.score.value if trajectory.score.status == "scored" else None
        logprobs = trajectory.behaviour_logprobs
        facts = Facts(
            spans=tuple((s.version.branch, s.version.step, s.length) for s in spans),
            reward=value if value is not None and math.isfinite(value) else None,
            score_norm=len(logprobs) - float(np.add.reduce(np.exp(logprobs), dtype=np.float64)),
        )
        self.deaths.pop(group.uid, None)
        self._emit(
            events.Finished(uid=group.uid, index=trajectory.index, payload=payload(), facts=facts)
        )
        if lease_id not in self.state.leases:
            self.claimed_at.pop(lease_id, None)
        self._settle(group)

    def release(
        self,
        uid: int,
        attempt: int,
        indices: Sequence[int],
        lease_id: str,
        reason: DropReason,
        *,
        closing: bool = False,
        death: str = "",
    ) -> None:
        """Give samples back, to be issued again (`expired` ...) or as impossible (the others).

        What the lease no longer holds was finished or given back before, and stays as it is. While
        the run is closing the attempt number stays, as after a crash: nobody is issued the sample
        before a resume, which then repeats what an uninterrupted run would have sampled. When the
        death of an engine is why, the prompt is suspected of it, as of a worker's.

        Raises:
            Refused: the lease is for another attempt.
        """
        lease = self.state.leases.get(lease_id)
        if lease is None:
            return
        if (lease.uid, lease.attempt) != (uid, attempt):
            raise Refused(f"lease {lease_id} is for uid {lease.uid}, attempt {lease.attempt}")
        group, held = self.state.groups[uid], tuple(i for i in indices if i in lease.open)
        if held and reason in REISSUED:
            self._return(group, held, reason, keep_attempt=closing)
            if death and not closing:
                self._suspect(uid, death)
        elif held:
            step = self.state.next_step
            self._emit(events.Voided(uid=uid, indices=held, reason=reason, step=step))
            self._settle(group)

    def _leased(self, trajectory: Trajectory, lease_id: str) -> Group | None:
        """The group of a sample that is INFLIGHT under a lease; None when it was accepted before.

        Raises:
            Refused: naming what became of the sample.
        """
        uid, index, attempt = trajectory.uid, trajectory.index, trajectory.attempt
        group = self.state.groups.get(uid)
        if group is None or index < 0:
            raise Refused(f"uid {uid}, sample {index}: never put")
        if index >= len(group.samples):
            raise Refused(f"uid {uid} has no sample {index} (any more); it is {group.state}")
        sample = group.samples[index]
        if sample.lease_id == lease_id and sample.attempt == attempt:
            if sample.state == "READY":
                return None
            if sample.state == "INFLIGHT" and lease_id in self.state.leases:
                return group
        raise Refused(
            f"uid {uid}, sample {index}, attempt {attempt}: lease {lease_id} has ended; the group "
            f"is {group.state}, the sample {sample.state} in attempt {sample.attempt}"
        )

    def _return(
        self, group: Group, indices: tuple[int, ...], reason: str, *, keep_attempt: bool = False
    ) -> None:
        """Issue samples again, under the next attempt number unless that is to be kept."""
        for index in indices:
            attempt = group.samples[index].attempt + (0 if keep_attempt else 1)
            self._emit(
                events.Returned(uid=group.uid, indices=(index,), attempt=attempt, reason=reason)
            )

    def _settle(self, group: Group) -> None:
        """Drop a group that has just become READY when there is nothing to learn from it."""
        if group.state != "READY":
            return
        rewards = [
            sample.facts.reward
            for sample in group.samples
            if sample.facts is not None and sample.facts.reward is not None
        ]
        reason: DropReason | None = None
        if len(rewards) < min(2, len(group.samples)):
            reason = _why_unusable(group)
        elif self.config.drop_no_signal and len(group.samples) > 1 and len(set(rewards)) == 1:
            reason = "no_signal"
        if reason is not None:
            step = self.state.next_step
            self._emit(events.Dropped(uid=group.uid, reason=reason, step=step))

    def heartbeat(self, worker: str, now: float) -> None:
        """Renew all leases of a worker.

        Raises:
            Refused: there are too many names.
        """
        if worker not in self.last_seen and len(self.last_seen) >= MAX_WORKERS:
            raise Refused(f"{worker}: {MAX_WORKERS} workers are known, no more are accepted")
        self.last_seen[worker] = now

    def expire(self, now: float) -> int:
        """Issue again what silent workers hold; return how many samples."""
        silent = {
            lease.worker
            for lease in self.state.leases.values()
            if now - self.last_seen.setdefault(lease.worker, now) > self.config.lease_s
        }
        return sum(self.expire_worker(worker) for worker in sorted(silent))

    def worker_died(self, worker: str) -> None:
        """Issue again what a dead worker held, all of it suspected of the death."""
        held = {lease.uid for lease in self.state.leases.values() if lease.worker == worker}
        self._worker_deaths += 1
        self.expire_worker(worker)
        for uid in sorted(held):
            self._suspect(uid, f"worker {self._worker_deaths}")

    def _suspect(self, uid: int, death: str) -> None:
        """A prompt was in the hands of what died; once in too many, it is quarantined."""
        deaths = self.deaths.setdefault(uid, set())
        deaths.add(death)
        if len(deaths) >= MAX_DEATHS:
            self.quarantine(uid, f"{MAX_DEATHS} workers or engines died over it")

    def expire_worker(self, worker: str) -> int:
        """Issue again what one worker holds; return how many samples."""
        held = [lease for lease in self.state.leases.values() if lease.worker == worker]
        lost = [(self.state.groups[lease.uid], tuple(sorted(lease.open))) for lease in held]
        for group, indices in lost:
            self._return(group, indices, "expired")
        self.claimed_at = {k: v for k, v in self.claimed_at.items() if k in self.state.leases}
        return sum(len(indices) for _, indices in lost)

    def publish(self, manifest: WeightsManifest) -> None:
        """Make a version the newest; a repeat changes nothing.

        Raises:
            Refused: another branch, or not the step after the newest.
        """
        version, newest = manifest.version, self.state.newest
        if version == newest:
            return
        first = self.state.path.parents.get(self.state.path.branch, (0, 0))[1]
        expected = newest.step + 1 if newest else first
        if version.branch != self.state.path.branch or version.step != expected:
            raise Refused(
                f"version {version} does not extend the live branch: expected "
                f"{self.state.path.branch}.{expected}"
            )
        self._emit(events.Published(manifest=manifest))

    def plan_take(
        self, step: int, now: float, request_id: str = "", *, part: bool = False
    ) -> TakePlan | str:
        """The batch of a step (or with `part` some of it), or in words what it waits for.

        Groups too stale to be trained at this step or any later one are issued again on the way.

        Raises:
            Refused: not the step after the newest version, or another request has it.
        """
        newest, begun = self.state.newest, self.state.begun
        if step in self.state.steps or (begun is not None and begun[1] != request_id):
            raise Refused(f"step {step} is TAKEN already by another request")
        if newest is None or step != newest.step + 1:
            raise Refused(f"step {step} does not follow the newest version, {newest}")
        return plan_take(self, step, now, part=part)

    def quarantine(self, uid: int, why: str = "its ticket cannot be read") -> None:
        """Drop a prompt that nobody can be asked again: unreadable, or deadly to workers."""
        step = self.state.next_step
        self._emit(events.Dropped(uid=uid, reason="quarantined", step=step, detail=why))

    def quarantine_unreadable(self, intact: Callable[[Ref], bool]) -> None:
        """`quarantine` every open prompt whose ticket does not verify."""
        for group in list(self.state.groups.values()):
            if group.state in ("WAITING", "INFLIGHT", "READY") and not intact(group.ticket):
                self.quarantine(group.uid)

    def reopen(self, uid: int, reason: DropReason) -> None:
        """Drop a READY group's attempt and issue the prompt again as the next one."""
        attempt = self.state.groups[uid].attempt + 1
        self._emit(events.Reopened(uid=uid, attempt=attempt, reason=reason))

    def lose(self, uid: int, index: int) -> None:
        """A READY sample's payload is unreadable: issue it again, counted as `lost`."""
        self._give_up(self.state.groups[uid], index, "lost")

    def commit_part(self, plan: TakePlan, request_id: str) -> None:
        """Carry out a plan that leaves some of the batch for later."""
        if self.state.begun is None:
            self._emit(events.StepBegun(step=plan.step, request_id=request_id))
        for uid, decisions in plan.groups:
            self._emit(events.Taken(uid=uid, step=plan.step, decisions=decisions))

    def demonstrate(self, step: int, readable: Callable[[Ref], bool]) -> None:
        """Choose the demonstrations of a step, those that wait the longest first."""
        waiting = [uid for uid, each in self.state.wanted.items() if each.shown is None]
        places = self.config.demonstrations_per_step
        for uid in waiting if places else ():
            each = self.state.wanted[uid]
            if places and readable(each.payload):
                places -= 1
                success = (each.uid, each.index)
                self._emit(
                    events.Demonstrated(uid=uid, step=step, success=success, payload=each.payload)
                )

    def commit_take(self, plan: TakePlan, request_id: str, proof: events.ProofLine) -> None:
        """Carry a plan out, in the same transaction as its proof line."""
        for uid, decisions in plan.groups:
            self._emit(events.Taken(uid=uid, step=plan.step, decisions=decisions))
        self._emit(events.StepTaken(step=plan.step, request_id=request_id, proof=proof))
        self.blocked = (0, 0.0)

    def checkpoint(self, version: Version) -> None:
        """Groups TAKEN at or below a version's step are TRAINED.

        Raises:
            Refused: the version is not on the live path, or still to come.
        """
        newest = self.state.newest
        if newest is None or version not in self.state.path or version.step > newest.step:
            raise Refused(
                f"checkpoint {version} is not of this run; the newest version is {newest}"
            )
        groups, taken = self.state.groups, self.state.taken
        until = [uid for step in taken if step <= version.step for uid in taken[step]]
        if any(groups[uid].state == "TAKEN" for uid in until):
            self._emit(events.Checkpointed(step=version.step))

    def compact(self, sizes: dict[int, int], resumable_step: int) -> None:
        """Let go of the oldest segments above `keep_rollouts_gb` that no resume can need.

        Args:
            sizes: bytes of every segment, the first one first; the last is being written.
            resumable_step: of the oldest checkpoint from which a resume may still start.
        """
        excess = sum(sizes.values()) - self.config.keep_rollouts_gb * 1e9
        newest = max(sizes, default=0)
        needed = self.state.needed_segment(resumable_step)
        first = self.state.first_segment
        for number in [n for n in sizes if n < (newest if needed is None else min(needed, newest))]:
            if excess <= 0:
                break
            excess -= sizes[number]
            first = number + 1
        if first > self.state.first_segment:
            self._emit(events.Compacted(first_segment=first, step=resumable_step))

    def open_branch(
        self,
        branch: int,
        parents: dict[int, tuple[int, int]],
        intact: Callable[[Ref], bool],
    ) -> None:
        """Go on as a new branch after a crash, or start a fresh run as branch 0.

        Takes and drops after the checkpoint are undone; samples stay READY when every token's
        version is on the new path and the payload verifies, and are issued again otherwise, under
        the attempt number they had.

        Args:
            branch: a number no branch had before.
            parents: branch -> (parent, step at which it left), the new branch's included.
            intact: whether a stored payload verifies.
        """
        resumed_at = parents[branch][1] if branch in parents else 0
        self._emit(events.BranchOpened(branch=branch, parents=parents, resumed_at=resumed_at))
        self.quarantine_unreadable(intact)
        for group in list(self.state.groups.values()):
            if group.state in ("WAITING", "INFLIGHT", "READY"):
                self._keep_intact(group, intact)
                self._settle(group)
        while (surplus := self._surplus(resumed_at)) is not None:
            for index in surplus.indices("READY"):
                self._give_up(surplus, index, "resumed")

    def _surplus(self, step: int) -> Group | None:
        """A group that the steps after `step` have no room for within the bound.

        What a drop had made room for is surplus when the resume undoes the drop: keeping all of it
        would break the second line of the proof. Least is lost with one that is not complete.
        """
        state = self.state
        ages = {
            uid: age
            for uid in state.uids("READY") + state.uids("INFLIGHT")
            if (age := self.age_of(state.groups[uid])) is not None
        }
        bound = self.config.max_staleness_steps
        late = first_late(Counter(ages.values()), step, bound, self.prompts_per_step)
        if late is None:
            return None
        return state.groups[[uid for uid, age in ages.items() if age <= late][-1]]

    def _give_up(self, group: Group, index: int, reason: str) -> None:
        """Issue a READY sample again under the attempt number it has."""
        attempt = group.samples[index].attempt
        self._emit(events.Returned(uid=group.uid, indices=(index,), attempt=attempt, reason=reason))

    def _keep_intact(self, group: Group, intact: Callable[[Ref], bool]) -> None:
        """Return the READY samples of a group that are off the path or unreadable."""
        for index in group.indices("READY"):
            sample = group.samples[index]
            assert sample.payload is not None
            on_path = self.state.on_path(sample.claimed) and all(
                span.version in self.state.path for span in self.state.spans(sample)
            )
            if not on_path or not intact(sample.payload):
                self._give_up(group, index, "lost" if on_path else "orphaned")

    def restore(self, stored: Sequence[AnyEvent], now: float) -> None:
        """Fold a journal in; leases that were open run anew from `now`."""
        for event in stored:
            self.state.apply(event)
        self.last_seen = {lease.worker: now for lease in self.state.leases.values()}
        self.claimed_at = dict.fromkeys(self.state.leases, now)


def _same_attempt(group: Group, indices: list[int]) -> tuple[Group, int, list[int]]:
    """The first of the samples, with those of its attempt: a claim has one attempt number."""
    attempt = group.samples[indices[0]].attempt
    return group, attempt, [i for i in indices if group.samples[i].attempt == attempt]


def _why_unusable(group: Group) -> DropReason:
    """Why a complete group has too few rewards: the first reason a worker gave, if any did."""
    for sample in group.samples:
        if sample.voided is not None and sample.voided[0] != "cut":
            return sample.voided[0]
    return "reward_failed"
