"""What each request does: the buffer service without its sockets.

`answer` returns a reply, or None for a request that has to wait; its caller asks again when
something has changed, and with `final=True` once the request's own wait is over. Nothing is durable
before `commit`; replies leave only after it.
"""

import time
from collections.abc import Sequence
from statistics import median

import msgspec
import xxhash

from . import messages
from .config import ServiceSpec
from .errors import CorruptData, Refused
from .evaluations import Evaluations
from .events import (
    BranchOpened,
    Compacted,
    Decision,
    Dropped,
    Extended,
    Published,
    Put,
    Reopened,
    Returned,
    Voided,
)
from .journal import Journal
from .mailbox import Mailbox, check_present
from .messages import Claim, Done, NotYet, ProofLine, RefusedReply, Reply, Request
from .records import Ticket, TrainingSample, Trajectory, TrajectoryGroup, WeightsManifest
from .replay import Replay
from .staleness import capacity, joined, proof_line, token_bound
from .state import Group, Lengths
from .waits import Wait

FOR_CLAIMS = (Put, Extended, Returned, Voided, Dropped, Reopened, BranchOpened)
"""What may give a waiting claim something: a prompt, a sample issued again, or room under the law.
A version does not: a claim names the one it is for, and to that the law is as before."""
TAKE_POLL_S = 0.1
"""The learner's wait depends on time, too, and says how long others have been busy."""
PUBLISHED_LEASES = 4
"""The oldest ones: what holds a batch up is among them."""
ALL_THAT_WAIT: tuple[type, ...] = (
    messages.PutPrompts,
    messages.ClaimSamples,
    messages.TakeGroups,
    messages.AwaitVersion,
    messages.AwaitEvaluation,
)
REPORTED_ATTEMPTS = 3
"""A prompt on its fourth attempt is named in the stats: it may never fit the bound."""


class Coordinator:
    """States, journal, mailbox and evaluations of one run, behind one request at a time."""

    def __init__(self, spec: ServiceSpec, now: float) -> None:
        """Open the journal and fold it; open the spec's branch unless it is the live one already.

        Args:
            spec: which run and branch.
            now: the clock that `answer` will be given.
        Raises:
            CorruptData: the journal cannot be read, or belongs to another run.
        """
        self.spec = spec
        self.journal = Journal(spec.run_dir)
        self.replay = Replay(spec.config, spec.prompts_per_step)
        self.mailbox = Mailbox()
        self.evaluations = Evaluations(self.mailbox)
        self.closing = ""
        self.copy_due, self.copy_problem = False, ""
        """Whether there is a checkpoint to be copied, and why the last copy failed."""
        self.refused = 0
        self._pids: dict[str, int] = {}
        self._stats: dict[str, dict[str, float]] = {}
        self._tickets: dict[int, Ticket] = {}
        self._proofs: list[ProofLine] = []
        self._parts: tuple[int, int, list[ProofLine]] = (0, 0, [])
        """(step, groups, a line for each part) of what was handed out of the step begun."""
        self._step_wait: Wait | None = None
        """The learner's, over all requests of a step."""
        self._asked_take: tuple[int, float] = (-1, 0.0)
        """(READY groups, when) of the last time that a waiting take was to be asked."""
        self._told_closing = False
        self._held_back = False
        """Whether a suspected prompt may have kept claims waiting when they were last asked."""
        self._check_same_run()
        self._open_branch(now)
        self.commit()

    def _check_same_run(self) -> None:
        """The journal's first facts: another run, or another P, would break the arithmetic."""
        for key, value in (
            ("run_id", self.spec.run_id),
            ("prompts_per_step", str(self.spec.prompts_per_step)),
        ):
            stored = self.journal.remember(key, value)
            if stored != value:
                self.journal.close()
                raise CorruptData(
                    f"{self.spec.run_dir}: the journal has {key} = {stored}, not {value}; a run "
                    "keeps it for life, start a new one to change it"
                )

    def _open_branch(self, now: float) -> None:
        """Fold the journal and go on where it ends, or as a new branch."""
        stored, spec = self.journal.events(), self.spec
        self.replay.restore(stored, now)
        branches = [event.branch for event in stored if isinstance(event, BranchOpened)]
        self.journal.branch = spec.branch
        if branches and spec.branch < branches[-1]:
            raise CorruptData(f"branch {spec.branch} is behind the journal's {branches[-1]}")
        state = self.replay.state
        self.journal.segments.remove_before(state.first_segment)  # if a crash came before us
        if not branches or spec.branch > branches[-1]:
            parents = dict(spec.branch_parents)
            if spec.resume_from is not None:
                parents[spec.branch] = spec.resume_from
            if (resumed_at := parents.get(spec.branch, (0, 0))[1]) < state.compacted_step:
                raise CorruptData(
                    f"{spec.run_dir}: a resume from step {resumed_at} needs rollouts that were "
                    f"removed (buffer.keep_rollouts_gb = {spec.config.keep_rollouts_gb:g}); "
                    f"checkpoints from step {state.compacted_step} on can be resumed, older ones "
                    "be exported, or start a run of their own"
                )
            self.replay.open_branch(spec.branch, parents, self.journal.intact)
        else:
            self.replay.quarantine_unreadable(self.journal.intact)
        for manifest in self.replay.state.manifests.values():
            self.mailbox.add(manifest)
        self.replay.state.finalize_branch()

    def commit(self) -> int:
        """Make everything decided so far durable; then the proof lines are for people to read."""
        sequence = self.journal.commit(self.replay.outbox)
        for event in self.replay.outbox:
            if isinstance(event, Dropped):
                self._tickets.pop(event.uid, None)
            elif isinstance(event, Compacted):  # only now that nothing refers to them for good
                self.journal.segments.remove_before(event.first_segment)
        self.replay.outbox.clear()
        if self._proofs:
            with (self.spec.run_dir / "proof.jsonl").open("ab") as file:
                for proof in self._proofs:
                    where = {"branch": self.spec.branch, "time": round(time.time(), 3)}
                    file.write(msgspec.json.encode(where | msgspec.to_builtins(proof)) + b"\n")
            self._proofs.clear()
        return sequence

    def close(self) -> None:
        """End with everything durable."""
        self.commit()
        self.abandon()

    def abandon(self) -> None:
        """End without what is not committed: after an error it may be half of a decision."""
        self.journal.close()

    @property
    def sequence(self) -> int:
        """What the next commit will have reached."""
        return self.journal.sequence + len(self.replay.outbox)

    def tick(self, now: float) -> None:
        """Expire the leases of silent workers."""
        self.replay.expire(now)
        self.replay.settle_staged(now)
        for worker in self.evaluations.workers():
            seen = self.replay.last_seen.setdefault(worker, now)
            if now - seen > self.spec.config.lease_s:
                self.evaluations.expire_worker(worker)

    @property
    def claims_alike(self) -> bool:
        """Whether waiting claims under one version all get work or none: no prompt is suspected,
        so that it would go to certain workers alone, or has a bound of its own."""
        return not (
            self.replay.deaths
            or self.spec.config.task_max_staleness_steps
            or self.evaluations.waiting
        )

    def woken(self, now: float, seen: int) -> tuple[type, ...] | None:
        """The kinds of waiting requests that may be answered now, by what was decided since the
        last commit or by time; the others need not be asked before their patience ends.

        Args:
            now: monotonic seconds.
            seen: events since the last commit that were asked about before, -1 at first; None is
                returned when there are no others.
        """
        outbox = self.replay.outbox
        if len(outbox) == seen:
            return None
        if self.closing and not self._told_closing:
            self._told_closing = True
            return ALL_THAT_WAIT
        kinds = {type(event) for event in outbox[max(seen, 0) :]}
        woken: list[type] = [messages.AwaitEvaluation]
        if kinds:
            woken.append(messages.PutPrompts)
        if Published in kinds:
            woken.append(messages.AwaitVersion)
        # Once more after the last suspect is cleared: claims were held back because of it.
        held_back, self._held_back = self._held_back, bool(self.replay.deaths)
        if (
            self.evaluations.waiting
            or held_back
            or self._held_back
            or not kinds.isdisjoint(FOR_CLAIMS)
        ):
            woken.append(messages.ClaimSamples)
        ready = self.replay.state.counts["READY"]
        if ready != self._asked_take[0] or now - self._asked_take[1] >= TAKE_POLL_S:
            self._asked_take = (ready, now)
            woken.append(messages.TakeGroups)
        return tuple(woken)

    def answer(
        self, request: Request, now: float, *, final: bool, again: bool = False
    ) -> Reply | None:
        """Carry a request out.

        Args:
            request: any; a refused one changes nothing (but see `Replay.finish`).
            now: monotonic seconds.
            final: the request has waited long enough: answer now.
            again: it was asked before, and is no new sign of its sender's life.
        Returns:
            The reply; None while the request has to wait, only when not `final`.
        """
        try:
            if isinstance(request, messages.ClaimSamples) and not again:
                self.replay.heartbeat(request.worker, now)
            reply = self._dispatch(request, now, final)
        except Refused as refusal:
            self.refused += 1
            return RefusedReply(reason=str(refusal))
        return reply

    def _dispatch(self, request: Request, now: float, final: bool) -> Reply | None:
        match request:
            case messages.PutPrompts():
                return self._put_prompts(request, final)
            case messages.ClaimSamples():
                return self._claim(request, now, final)
            case messages.TakeGroups():
                return self._take(request, now, final)
            case messages.AwaitVersion():
                return self._await_version(request, final)
            case messages.AwaitEvaluation():
                return self._await_evaluation(request, final)
            case messages.Hello():
                return self._hello(request)
            case messages.GetStats():
                return self._get_stats(now)
            case messages.FinishSamples():
                return self._finish_many(request, now)
            case _:
                self._carry_out(request, now)
                held = self.mailbox.held if isinstance(request, messages.PublishVersion) else ()
                return Done(journal_sequence=self.sequence, held=held)

    def _carry_out(self, request: Request, now: float) -> None:
        """The requests that are answered at once with `Done`."""
        match request:
            case messages.ExtendGroup():
                self._extend(request)
            case messages.ReleaseSamples():
                self.replay.release(
                    request.uid,
                    request.attempt,
                    request.indices,
                    request.lease_id,
                    request.reason,
                    closing=bool(self.closing),
                    death=request.death,
                )
            case messages.Heartbeat():
                self.replay.heartbeat(request.worker, now)
                self._stats[request.worker] = dict(request.stats) | (
                    {"serving": float(request.serving.step)} if request.serving else {}
                )
            case messages.PublishVersion(manifest=manifest):
                check_present(manifest)
                self.replay.publish(manifest)
                self.mailbox.add(manifest)
            case messages.CheckpointSaved(version=version, resumable_step=step):
                self.replay.checkpoint(version)
                self.replay.compact(self.journal.segments.sizes(), min(step, version.step))
                self.copy_due = self.spec.config.copy_to is not None
            case messages.PutEvaluation():
                self.evaluations.put(request)
            case messages.FinishEvaluation():
                self.evaluations.finish(request)
            case messages.CloseRun(reason=reason):
                self.closing = self.closing or reason or "closed"
            case _:
                raise Refused(f"{type(request).__name__} is not served")

    def _hello(self, request: messages.Hello) -> Reply:
        """Welcome a process; a new one under an old name inherits no leases.

        A node that is lost takes its workers along, and no prompt is suspected of it.
        """
        if request.run_id != self.spec.run_id:
            raise Refused(f"this is run {self.spec.run_id}, {request.name} is of {request.run_id}")
        if self._pids.get(request.name) != request.pid:
            self._pids[request.name] = request.pid
            if request.pid:
                self.replay.worker_died(request.name)
            else:
                self.replay.expire_worker(request.name)
                self._stats.pop(request.name, None)
            self.evaluations.expire_worker(request.name)
        return messages.Welcome(
            run_id=self.spec.run_id, branch=self.spec.branch, next_uid=self.replay.state.next_uid
        )

    def _put_prompts(self, request: messages.PutPrompts, final: bool) -> Reply | None:
        count, remembers = 0, self.spec.config.demonstrations_per_step > 0
        for ticket in request.tickets if not self.closing else ():
            prompt = ticket.prompt
            if not self.replay.put(
                prompt.uid,
                ticket.sizing.num_samples,
                lambda t=ticket: self.journal.append(t),
                prompt.task if prompt.task in self.spec.config.task_max_staleness_steps else "",
                staged=ticket.sizing.staged,
                source=xxhash.xxh3_64_intdigest(prompt.source_id.encode()) if remembers else 0,
            ):
                break
            if self.replay.state.groups[prompt.uid].state == "WAITING":
                self._tickets[prompt.uid] = ticket
            count += 1
        if count or not request.tickets or self.closing or final:
            return messages.Accepted(count=count, closing=bool(self.closing))
        return None

    def _finish_many(self, request: messages.FinishSamples, now: float) -> Reply:
        """Every sample on its own: its refusal is its own, too."""
        if len(request.trajectories) != len(request.lease_ids):
            raise Refused("as many trajectories as lease ids must be handed in")
        refused: dict[int, str] = {}
        store = self.journal.append
        pairs = zip(request.trajectories, request.lease_ids, strict=True)
        for position, (trajectory, lease_id) in enumerate(pairs):
            try:
                self.replay.finish(trajectory, lease_id, lambda t=trajectory: store(t), now)
            except Refused as refusal:
                refused[position] = str(refusal)
        self.refused += len(refused)
        return Done(journal_sequence=self.sequence, refused=refused)

    def _extend(self, request: messages.ExtendGroup) -> None:
        """Size a group again; the ticket is stored anew, with the decision it now has."""
        uid, sizing = request.uid, request.sizing
        group = self.replay.state.groups.get(uid)
        old = self._ticket(group) if group is not None else None
        made = Ticket(prompt=old.prompt, sizing=sizing) if old is not None else None
        store = self.journal.append
        self.replay.extend(uid, sizing.num_samples, lambda: store(made), staged=sizing.staged)
        if made is not None and group is not None and group.state in ("WAITING", "INFLIGHT"):
            self._tickets[uid] = made

    def _claim(self, request: messages.ClaimSamples, now: float, final: bool) -> Reply | None:
        if self.closing:
            return messages.Claims(newest=self._newest(), closing=True)
        # A repeat gets what the first one got and nothing besides: nobody might read it.
        evaluations = self.evaluations.granted(request.worker, request.request_id)
        repeated = bool(evaluations) or request.request_id in self.replay.state.requests
        wanted = 0 if repeated else request.max_samples
        leases = self.replay.claim(request.worker, request.serving, wanted, request.request_id, now)
        claims = tuple(
            Claim(
                lease_id=lease_id,
                ticket=self._ticket(self.replay.state.groups[lease.uid]),
                attempt=lease.attempt,
                indices=lease.indices,
                lease_s=self.spec.config.lease_s,
            )
            for lease_id, lease in leases
        )
        if not repeated:
            evaluations = self.evaluations.claim(request.worker, request.request_id)
            if evaluations:  # their lease begins now
                self.replay.heartbeat(request.worker, now)
        if claims or evaluations or repeated or final:
            return messages.Claims(claims=claims, evaluations=evaluations, newest=self._newest())
        return None

    def _newest(self) -> WeightsManifest | None:
        manifests = self.replay.state.manifests
        return manifests[next(reversed(manifests))] if manifests else None

    def _ticket(self, group: Group) -> Ticket:
        if group.uid not in self._tickets:
            self._tickets[group.uid] = self.journal.read(group.ticket, Ticket)
        return self._tickets[group.uid]

    def _await_version(self, request: messages.AwaitVersion, final: bool) -> Reply | None:
        newest = self._newest()
        known = request.after
        newer = newest is not None and (
            known is None
            or (newest.version.branch, newest.version.step) > (known.branch, known.step)
        )
        if newer or final or self.closing:
            return messages.Newest(manifest=newest, closing=bool(self.closing))
        return None

    def _await_evaluation(self, request: messages.AwaitEvaluation, final: bool) -> Reply | None:
        results = self.evaluations.results(request.job_id)
        if not isinstance(results, str):
            return results
        if final or self.closing:
            return NotYet(waiting_on=results, closing=bool(self.closing))
        return None

    def _take(self, request: messages.TakeGroups, now: float, final: bool) -> Reply | None:
        step, state = request.step, self.replay.state
        taken, name = state.steps.get(step), request.request_id
        part, received = request.received is not None, request.received or 0
        handed_out = tuple(state.taken.get(step, {}).items())
        if taken is not None and taken.request_id == name:
            return self._batch(step, self._load_all(step, handed_out[received:]), taken.proof)
        if state.begun != (step, name):
            handed_out = ()
        elif part and received < len(handed_out):  # the reply was lost
            return self._part(step, self._load_all(step, handed_out[received:]))
        self._step_wait, since = None, self._step_wait
        if self.closing:
            return NotYet(waiting_on=f"the run is closing: {self.closing}", closing=True)
        while not isinstance(plan := self.replay.plan_take(step, now, name, part=part), str):
            groups = self._load_all(step, plan.groups)
            if len(groups) < len(plan.groups):
                continue
            if not plan.completes:
                self._note_part(step, len(handed_out), groups)
                self.replay.commit_part(plan, name)
                return self._part(step, groups)
            noted = self._parts[0] == step and self._parts[1] == len(handed_out)
            before = [] if noted and part else self._load_all(step, handed_out)
            proofs = self._parts[2] if noted else [self._count(step, before)]
            proof = self._prove(step, proofs, groups)
            self.replay.demonstrate(step, self.journal.intact)
            self.replay.commit_take(plan, name, proof)
            self._proofs.append(proof)
            return self._batch(step, groups if part else before + groups, proof)
        what = f"the batch of step {step}"
        began_s = since.since_s if since is not None and since.what.startswith(f"{what}:") else now
        self._step_wait = Wait(
            owner="learner",
            what=f"{what}: {plan}",
            since_s=began_s,
            deadline_s=self.spec.config.take_deadline_s,
        )
        return NotYet(waiting_on=plan) if final else None

    def _batch(
        self, step: int, groups: Sequence[TrajectoryGroup], proof: ProofLine
    ) -> messages.Batch:
        for uid in self.replay.state.taken[step]:
            self._tickets.pop(uid, None)
        shown = [
            s for s in self.replay.state.wanted.values() if s.shown == (self.spec.branch, step)
        ]
        return messages.Batch(
            step=step,
            groups=tuple(sorted(groups, key=lambda group: group.prompt.uid)),
            proof=proof,
            journal_sequence=self.sequence,
            demonstrations=tuple(
                self.journal.read(s.payload, Trajectory)
                for s in shown
                if self.journal.intact(s.payload)
            ),
            drafts=self._drafts(),
        )

    def _drafts(self) -> dict[str, float]:
        """Tokens drafted and accepted by all engines since their starts, and the median speed-up of
        those that know theirs."""
        told = self._stats.values()
        drafted, accepted = (sum(s.get(k, 0.0) for s in told) for k in ("drafted", "accepted"))
        if not drafted:
            return {}
        known = [speed_up for stats in told if (speed_up := stats.get("speed_up", 0.0))]
        counts = {"drafted_tokens": drafted, "accepted_tokens": accepted}
        return counts | ({"speed_up": median(known)} if known else {})

    def _part(self, step: int, groups: Sequence[TrajectoryGroup]) -> messages.Part:
        return messages.Part(step=step, groups=tuple(groups))

    def _load_all(
        self, step: int, decided: Sequence[tuple[int, tuple[Decision, ...]]]
    ) -> list[TrajectoryGroup]:
        """Groups from disk; fewer when one is unreadable, and then it is issued again.

        Raises:
            CorruptData: a group that is TAKEN already is unreadable.
        """
        groups: list[TrajectoryGroup] = []
        for uid, decisions in decided:
            group = self.replay.state.groups[uid]
            was_ready = group.state == "READY"
            loaded = self._load(group, decisions)
            if loaded is None and uid in self.replay.state.taken.get(step, ()):
                raise CorruptData(f"uid {uid} was TAKEN by step {step} and is unreadable now")
            if loaded is None and not was_ready:
                self.replay.spent.add(uid)
            if loaded is not None:
                groups.append(loaded)
        return groups

    def _load(self, group: Group, decisions: tuple[Decision, ...]) -> TrajectoryGroup | None:
        """One group; None (and counted as lost) when its bytes are not those written."""
        try:
            ticket = self._ticket(group)
        except CorruptData:
            if group.state == "READY":
                self.replay.quarantine(group.uid)
            return None
        samples: list[TrainingSample] = []
        for decision in decisions:
            payload = group.samples[decision.index].payload
            assert payload is not None
            try:
                trajectory = self.journal.read(payload, Trajectory)
            except CorruptData:
                if group.state == "READY":
                    self.replay.lose(group.uid, decision.index)
                return None
            samples.append(
                TrainingSample(
                    trajectory=trajectory,
                    trained=decision.trained,
                    stale_prefix=decision.stale_prefix,
                    drop_reason=decision.drop_reason,
                    bound=token_bound(self.replay.bound_of(group)) if group.task else None,
                )
            )
        return TrajectoryGroup(
            prompt=ticket.prompt,
            attempt=group.attempt,
            sizing=ticket.sizing,
            samples=tuple(samples),
        )

    def _note_part(self, step: int, before: int, groups: list[TrajectoryGroup]) -> None:
        """Count a part of a step, so that its end need not read again what was handed out."""
        follows = self._parts[:2] == (step, before)
        if before and not follows:  # others were handed out by a process that ended
            return
        proofs = self._parts[2] if before else []
        self._parts = (step, before + len(groups), [*proofs, self._count(step, groups)])

    def _count(self, step: int, groups: Sequence[TrajectoryGroup]) -> ProofLine:
        """What the samples of some groups are to a step's proof."""
        samples = [sample for group in groups for sample in group.samples]
        bound = self.spec.config.max_staleness_steps
        path = self.replay.state.path
        return proof_line(samples, step=step, max_staleness_steps=bound, path=path)

    def _prove(
        self, step: int, before: Sequence[ProofLine], last: list[TrajectoryGroup]
    ) -> ProofLine:
        """The proof line, from the samples themselves and not from the decisions on their facts.

        Args:
            step: k.
            before: of the parts handed out: what they drop and train is counted already.
            last: the other groups.
        """
        state = self.replay.state
        samples = [sample for group in last for sample in group.samples]
        dropped = state.dropped_since.copy()
        dropped.update(s.drop_reason for s in samples if s.drop_reason and not s.trained)
        trained = Lengths(state.trained.trajectories, state.trained.tokens)
        for sample in samples:
            if sample.trained:
                trained.add(sample.trajectory.num_policy_tokens)
        issued_mean = state.finished.mean
        end = proof_line(
            samples,
            step=step,
            max_staleness_steps=self.spec.config.max_staleness_steps,
            path=state.path,
            dropped=dropped,
            length_bias=trained.mean / issued_mean if issued_mean else 1.0,
            rewards=list(state.rewards_since.values()),
        )
        return joined(before, end)

    def _get_stats(self, now: float) -> Reply:
        """What displays show; the service adds the waits it has parked."""
        replay, state = self.replay, self.replay.state
        lags: dict[int, int] = {}
        for uid in state.uids("READY"):
            age = state.next_step - 1 - (state.oldest_step(state.groups[uid]) or 0)
            lags[age] = lags.get(age, 0) + 1
        ages = [now - replay.claimed_at.get(name, now) for name in state.leases]
        law = (replay.config.max_staleness_steps, replay.prompts_per_step)
        waiting = [self._step_wait.describe(now)] if self._step_wait is not None else []
        return messages.Stats(
            counts={word: number for word, number in state.counts.items() if number},
            dropped=dict(state.dropped),
            newest=state.newest,
            lags=dict(sorted(lags.items())),
            oldest_inflight_s=max(ages, default=0.0),
            capacity_groups=capacity(state.newest.step, *law) if state.newest else 0,
            workers={
                name: told
                for name, told in self._stats.items()
                if now - replay.last_seen.get(name, now) < replay.config.lease_s
            },
            waits=[
                *waiting,
                *self._often_issued(),
                *([self.copy_problem] if self.copy_problem else []),
            ],
            evaluation=self.evaluations.describe(),
            quarantined=dict(state.quarantined),
        )

    def waits(self, now: float) -> list[Wait]:
        """What the learner waits for, and the samples that have been in flight the longest."""
        leases, since = self.replay.state.leases, self.replay.claimed_at
        oldest = sorted(leases, key=lambda name: since.get(name, now))[:PUBLISHED_LEASES]
        inflight = [
            Wait(
                owner="buffer",
                what=f"group {leases[name].uid} sample {index} at {leases[name].worker}",
                since_s=since.get(name, now),
            )
            for name in oldest
            for index in sorted(leases[name].open)
        ]
        return [*([self._step_wait] if self._step_wait is not None else []), *inflight]

    def _often_issued(self) -> list[str]:
        """Name the open prompts that had to be issued again and again."""
        groups = self.replay.state.groups
        open_uids = self.replay.state.uids("INFLIGHT") + self.replay.state.uids("READY")
        return [
            f"uid {uid} is at attempt {groups[uid].attempt}: it may never fit the bound"
            for uid in open_uids
            if groups[uid].attempt >= REPORTED_ATTEMPTS
        ]
