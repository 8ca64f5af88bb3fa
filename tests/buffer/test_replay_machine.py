"""The replay under any interleaving of its callers, checked from the records alone.

The machine keeps its own idea of what was trained: which tokens carried weight at which step, along
which lineage. It never asks `staleness.py`, so a mistake there cannot hide.
"""

import math
import random
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from slipstream.buffer import take as take_module
from slipstream.buffer.config import BufferConfig
from slipstream.buffer.errors import Refused
from slipstream.buffer.events import AnyEvent, ProofLine, Ref, decode_event, encode_event
from slipstream.buffer.records import Trajectory, Version
from slipstream.buffer.replay import Replay
from slipstream.buffer.staleness import Verdict
from slipstream.buffer.take import TakePlan

from .make import manifest, trajectory

P, G = 2, 3
WORKERS: tuple[str, ...] = ("worker-0", "worker-1")
REWARDS = [0.0, 0.0, 0.0, 0.0, -1.0, None]
"""Added to the sample's index: two samples with 0.0 make a signal, 0.0 and -1.0 make none."""
FOREVER = 1e9
COUNTED = ("INFLIGHT", "READY", "TAKEN", "TRAINED")
NO_PROOF = ProofLine(
    step=0,
    bound=0,
    max_lag=0,
    violations=0,
    orphaned_tokens=0,
    lag_counts={},
    trained_tokens=0,
    trimmed_tokens=0,
    mixed_trajectories=0,
    trained_trajectories=0,
    dropped={},
    length_bias=1.0,
)

Batch = dict[int, list[Version]]
"""uid -> the versions of its tokens that carried weight."""


STEPS_PER_EXAMPLE = 50
SPARE = 1.2
"""More examples than needed: some end early."""


class ReplayMachine(RuleBasedStateMachine):
    """Feeder, two workers, a learner, crashes and resumes around one `Replay`."""

    checked = 0
    """Steps after which the invariants were looked at, of all machines."""
    compacted = 0
    """Checkpoints after which segments were removed."""
    parts = 0
    """Batches of which a part was handed out before the rest."""

    @initialize(
        bound=st.sampled_from([0, 0.5, 1, 2]),
        stale=st.sampled_from(["wait", "trim", "requeue", "drop"]),
        wait_s=st.sampled_from([0, 3, FOREVER]),
        seed=st.integers(0, 2**32),
        order=st.sampled_from(["oldest", "oldest", *take_module.ORDERS]),
        max_uses=st.sampled_from([1, 1, 3]),
        compact=st.booleans(),
        stream=st.booleans(),
    )
    def start(
        self,
        bound: float,
        stale: str,
        wait_s: float,
        seed: int,
        order: str = "oldest",
        max_uses: int = 1,
        compact: bool = False,
        stream: bool = False,
    ) -> None:
        self.bound, self.max_uses = bound, max_uses
        self.patient = order == "oldest" and (wait_s == FOREVER or stale == "wait")
        self.tight, self.plain = min(bound, 1), False
        """`plain`: no group is staged."""
        self.random = random.Random(seed)  # details; hypothesis chooses what happens when
        self.config = BufferConfig(
            max_staleness_steps=bound,
            stale=stale,  # type: ignore[arg-type]
            straggler_wait_s=wait_s,
            take_deadline_s=FOREVER,
            take_order=order,  # type: ignore[arg-type]
            max_uses=max_uses,
            task_max_staleness_steps={"tight": self.tight},
            lease_s=10,
            max_waiting_prompts=6,
            keep_rollouts_gb=0,
        )
        self.compact, self.stream = compact, stream
        self.begun = False
        """Whether a part of the next batch is TAKEN."""
        self.now, self.branch = 0.0, 0
        self.parents: dict[int, tuple[int, int]] = {}
        self.log: list[bytes] = []
        self.stored: list[Trajectory] = []
        self.torn: set[int] = set()
        self.lineage: dict[int, Batch] = {}
        self.saved: dict[tuple[int, int], dict[int, Batch]] = {}
        self.held: dict[tuple[str, int, int], tuple[int, Version]] = {}
        self.slow: set[tuple[str, int, int]] = set()
        self.ended: list[tuple[str, int, int, int]] = []
        self.requests = 0
        self.replay = Replay(self.config, P)
        self.replay.open_branch(0, {}, self.intact)
        self.replay.publish(manifest(0, 0))
        self.serving = dict.fromkeys(WORKERS, manifest(0, 0).version)
        self.save_checkpoint()
        self.commit()

    # Helpers -----------------------------------------------------------------------------------

    @property
    def segment(self) -> int:
        """The one being written: a few records each."""
        return 1 + len(self.stored) // 5

    def intact(self, ref: Ref) -> bool:
        assert ref.segment >= self.replay.state.first_segment, "needed, and removed"
        return ref.offset not in self.torn

    def store(self, sample: Trajectory) -> Ref:
        self.stored.append(sample)
        return Ref(segment=self.segment, offset=len(self.stored) - 1, length=0, digest=0)

    def ticket(self) -> Ref:
        return Ref(segment=self.segment, offset=-1, length=0, digest=0)

    def commit(self) -> None:
        self.log += [encode_event(event) for event in self.replay.outbox]
        self.replay.outbox.clear()

    def fold(self) -> Replay:
        replay = Replay(self.config, P)
        events: list[AnyEvent] = [decode_event(raw) for raw in self.log]
        replay.restore(events, self.now)
        return replay

    @property
    def newest(self) -> Version:
        newest = self.replay.state.newest
        assert newest is not None
        return newest

    def save_checkpoint(self) -> None:
        step = self.newest.step
        self.saved[self.branch, step] = {k: v for k, v in self.lineage.items() if k <= step}

    def num_counted(self) -> int:
        again = sum(map(len, self.lineage.values())) - len(
            {uid for batch in self.lineage.values() for uid in batch}
        )
        return again + sum(g.state in COUNTED for g in self.replay.state.groups.values())

    # Rules -------------------------------------------------------------------------------------

    @rule(claims=st.sampled_from([1, 4, 8]), finishes=st.sampled_from([0, 2, 4, 8]))
    def work(self, claims: int, finishes: int) -> None:
        """A turn of the workers: perhaps new weights, claims, samples finished in any order."""
        self.put(self.random.randint(0, 4))
        for worker in WORKERS:
            if self.random.random() < 0.6:
                self.serving[worker] = self.newest
            self.claim(worker, claims)
        for _ in range(min(finishes, len(self.held))):
            key = self.random.choice(sorted(self.held))
            if key not in self.slow or self.random.random() < 0.05:
                self.finish(key)

    def put(self, number: int) -> None:
        for _ in range(number):
            uid = self.replay.state.next_uid
            waiting = sum(g.state == "WAITING" for g in self.replay.state.groups.values())
            task = "tight" if uid % 5 == 0 else ""
            staged = uid % 4 == 0 and not self.plain
            put = self.replay.put(uid, G, self.ticket, task, staged=staged)
            assert put == (waiting < 6)
        if self.replay.state.next_uid:
            assert self.replay.put(self.replay.state.next_uid - 1, G, self.ticket)  # a repeat
        self.commit()

    def claim(self, worker: str, max_samples: int) -> None:
        serving, before = self.serving[worker], self.num_counted()
        opened = {uid for uid, g in self.replay.state.groups.items() if g.state == "WAITING"}
        self.requests += 1
        name = f"request-{self.requests}"
        leases = self.replay.claim(worker, serving, max_samples, name, self.now)
        opened &= {lease.uid for _, lease in leases}
        allowed = math.floor((serving.step + 1 + Fraction(str(self.bound))) * P)
        assert not opened or before + len(opened) <= allowed, "admission exceeded"
        assert not leases or self.bound > 0 or serving == self.newest
        assert sum(len(lease.indices) for _, lease in leases) <= max_samples
        again = self.replay.claim(worker, serving, max_samples, name, self.now)
        assert [lease_id for lease_id, _ in again] == [lease_id for lease_id, _ in leases]
        for lease_id, lease in leases:
            for index in lease.indices:
                self.held[lease_id, lease.uid, index] = (lease.attempt, serving)
                if self.random.random() < 0.15:
                    self.slow.add((lease_id, lease.uid, index))
        self.commit()

    def finish(self, key: tuple[str, int, int]) -> None:
        lease_id, uid, index = key
        reward = self.random.choice(REWARDS)
        attempt, claimed = self.held.pop(key)
        lease = self.replay.state.leases[lease_id]
        # In-flight swaps: each token's version is what the worker served when it was written.
        last = self.serving[lease.worker].step
        length = self.random.randint(0, 3)
        steps = sorted(self.random.randint(claimed.step, last) for _ in range(length))
        sample = trajectory(
            uid,
            index,
            steps,
            attempt=attempt,
            branch=claimed.branch,
            value=None if reward is None else reward + index,
            status="scored" if reward is not None else "reward_failed",
        )
        self.replay.finish(sample, lease_id, lambda: self.store(sample), self.now)
        self.commit()
        self.replay.finish(sample, lease_id, lambda: self.store(sample), self.now)
        assert not self.replay.outbox, "an exact repeat changes nothing"

    @rule(more=st.integers(0, 2))
    def extend(self, more: int) -> None:
        """The sizer decides on the oldest staged group; a repeat of its decision says nothing."""
        staged = [uid for uid in self.replay.state.staged if self.random.random() < 0.8]
        for uid in staged:
            number = len(self.replay.state.groups[uid].samples) + more
            self.replay.extend(uid, number, self.ticket)
            self.commit()
            self.replay.extend(uid, number, self.ticket)
            assert not self.replay.outbox
            with pytest.raises(Refused, match="cannot be extended"):
                self.replay.extend(uid, 1, self.ticket)

    @precondition(lambda self: len(self.held) > 3)
    @rule(reason=st.sampled_from(["expired", "quarantined", "cut"]))
    def release(self, reason: str) -> None:
        lease_id, uid, index = self.random.choice(sorted(self.held))
        attempt, _ = self.held.pop((lease_id, uid, index))
        for _ in range(2):
            self.replay.release(uid, attempt, (index,), lease_id, reason)  # type: ignore[arg-type]
            self.commit()

    @precondition(lambda self: self.ended)
    @rule()
    def finish_too_late(self) -> None:
        lease_id, uid, index, attempt = self.random.choice(self.ended)
        sample = trajectory(uid, index, (0,), attempt=attempt)
        with pytest.raises(Refused, match=r"has ended|any more"):
            self.replay.finish(sample, lease_id, lambda: self.store(sample), self.now)
        assert not self.replay.outbox

    @rule(seconds=st.integers(1, 6))
    def time_passes(self, seconds: int) -> None:
        """Each worker is alive with four chances in five; silence of 10 s loses its leases."""
        self.now += seconds
        for worker in WORKERS:
            if self.random.random() < 0.8:
                self.replay.heartbeat(worker, self.now)
        self.replay.expire(self.now)
        self.replay.settle_staged(self.now)
        self.forget_leases()
        self.commit()

    def forget_leases(self) -> None:
        """Forget what the replay has taken back; a late finish of it is refused from now on."""
        for key in [key for key in self.held if key[0] not in self.replay.state.leases]:
            attempt, _ = self.held.pop(key)
            self.ended.append((*key, attempt))

    @rule(publish=st.sampled_from([True, True, False]))
    def learn(self, publish: bool) -> None:
        step = self.newest.step + 1
        if step not in self.lineage or self.begun:
            if self.begun:
                with pytest.raises(Refused, match="another request"):
                    self.replay.plan_take(step, self.now, "another")
            part = self.stream and self.random.random() < 0.8
            plan = self.replay.plan_take(step, self.now, "request", part=part)
            if isinstance(plan, TakePlan):
                self.train(plan)
        if step in self.lineage and not self.begun and publish:
            self.replay.publish(manifest(step, self.branch))
        self.commit()

    def train(self, plan: TakePlan) -> None:
        """Note every token that gets weight, from the stored trajectories."""
        batch: Batch = {}
        before = self.lineage.get(plan.step, {})
        assert plan.groups
        assert plan.completes == (len(before) + len(plan.groups) == P)
        for uid, decisions in plan.groups:
            group = self.replay.state.groups[uid]
            assert sum(d.trained for d in decisions) >= min(2, G)
            assert (group.state == "READY") == (uid not in self.trained_before())
            weighted: list[Version] = []
            for decision in decisions:
                ref = group.samples[decision.index].payload
                assert ref is not None
                assert ref.segment >= self.replay.state.first_segment, "trained, and removed"
                sample = self.stored[ref.offset]
                assert (sample.uid, sample.index) == (uid, decision.index)
                tokens = [span.version for span in sample.versions for _ in range(span.length)]
                if decision.trained:
                    assert sample.score.status == "scored"
                    weighted += tokens[decision.stale_prefix :]
                if self.patient:
                    assert not decision.stale_prefix, "waiting long enough, nothing gets stale"
                    assert decision.drop_reason != "stale"
            batch[uid] = weighted
        self.begun = not plan.completes
        if plan.completes:
            self.replay.commit_take(plan, "request", NO_PROOF)
        else:
            ReplayMachine.parts += 1
            self.replay.commit_part(plan, "request")
        self.lineage[plan.step] = before | batch

    def trained_before(self) -> set[int]:
        return {uid for batch in self.lineage.values() for uid in batch}

    @rule()
    def checkpoint(self) -> None:
        self.replay.checkpoint(self.newest)
        self.save_checkpoint()
        if self.compact:
            self.saved = {name: self.saved[name] for name in sorted(self.saved)[-2:]}
            sizes = dict.fromkeys(range(self.replay.state.first_segment, self.segment + 1), 1)
            self.replay.compact(sizes, min(step for _, step in self.saved))
            ReplayMachine.compacted += self.replay.state.first_segment > min(sizes)
        self.commit()

    @rule()
    def restart(self) -> None:
        """The service dies and comes back: the fold is the state."""
        fresh, live = self.fold(), self.replay.state
        assert fresh.state.groups == live.groups
        assert fresh.state.leases == live.leases
        assert +fresh.state.counts == +live.counts
        assert fresh.state.requests == live.requests
        for counts in ("begun", "dropped", "dropped_since", "rewards_since", "finished", "trained"):
            assert getattr(fresh.state, counts) == getattr(live, counts)
        self.replay = fresh

    @precondition(lambda self: self.lineage and self.random.random() < 0.3)
    @rule(torn=st.booleans(), old=st.sampled_from([False, False, True]))
    def resume(self, torn: bool, old: bool) -> None:
        """The run dies; a new branch starts from the last checkpoint, or from any ever saved."""
        parent = self.random.choice(sorted(self.saved)) if old else max(self.saved)
        if torn:
            self.torn.add(self.random.randrange(len(self.stored)))
        self.branch += 1
        self.parents[self.branch] = parent
        self.lineage, self.begun = dict(self.saved[parent]), False
        attempts = {
            uid: [sample.attempt for sample in group.samples]
            for uid, group in self.replay.state.groups.items()
        }
        self.replay = self.fold()
        self.replay.open_branch(self.branch, dict(self.parents), self.intact)
        for uid, group in self.replay.state.groups.items():
            assert [s.attempt for s in group.samples] == attempts[uid], "same attempt after a crash"
        self.replay.publish(manifest(parent[1], self.branch))
        self.serving = dict.fromkeys(WORKERS, self.newest)
        self.held.clear()
        self.ended.clear()
        self.save_checkpoint()
        self.commit()

    # Invariants --------------------------------------------------------------------------------

    def ancestors(self) -> dict[int, float]:
        """branch -> last step on the path, worked out from the resumes."""
        last: dict[int, float] = {self.branch: math.inf}
        branch = self.branch
        while branch in self.parents:
            parent, step = self.parents[branch]
            last[parent] = min(step, last[branch])
            branch = parent
        return last

    @invariant()
    def every_step_is_checked(self) -> None:
        ReplayMachine.checked += 1

    @invariant()
    def no_token_over_the_bound_is_trained(self) -> None:
        last = self.ancestors()
        for step, batch in self.lineage.items():
            for uid, versions in batch.items():
                bound = self.tight if uid % 5 == 0 else self.bound
                for written in versions:
                    assert written.step <= last.get(written.branch, -1), f"orphan in {uid}"
                    assert 0 <= step - 1 - written.step <= math.ceil(bound), (
                        f"step {step} trained {written}"
                    )

    @invariant()
    def no_prompt_is_lost_or_trained_twice(self) -> None:
        trained = [uid for batch in self.lineage.values() for uid in batch]
        assert max(map(trained.count, trained), default=0) <= self.max_uses
        groups = self.replay.state.groups
        assert sorted(groups) == list(range(self.replay.state.next_uid))
        ended = {uid for uid, group in groups.items() if group.state in ("TAKEN", "TRAINED")}
        assert ended == set(trained), "issued = trained + dropped + open"
        for group in groups.values():
            assert (group.drop_reason is not None) == (group.state == "DROPPED")
            assert group.drop_reason not in ("stale", "expired", "orphaned")
            whole = group.complete and bool(group.indices("READY"))
            held = group.staged and whole and group.state == "INFLIGHT"
            assert held == (group.uid in self.replay.state.staged)
            assert group.state != "READY" or not (group.staged and whole)

    @invariant()
    def counts_are_what_can_be_counted(self) -> None:
        state = self.replay.state
        words = [group.state for group in state.groups.values()]
        assert {word: n for word, n in state.counts.items() if n} == {
            word: words.count(word) for word in set(words)
        }
        for group in state.groups.values():
            told = state.oldest_step(group)
            group.oldest = -1
            assert told == state.oldest_step(group), f"{group.uid} is older than it was told"
        waiting = [uid for uid, group in state.groups.items() if group.state == "WAITING"]
        assert state.first_waiting() == min(waiting, default=None)
        leased = {
            (sample.lease_id, uid, index)
            for uid, group in state.groups.items()
            for index, sample in enumerate(group.samples)
            if sample.state == "INFLIGHT"
        }
        assert leased == {
            (name, lease.uid, index) for name, lease in state.leases.items() for index in lease.open
        }


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(20_000, id="20,000 steps"),
        pytest.param(1_000_000, id="a million steps", marks=pytest.mark.slow),
    ],
)
def test_the_law_and_the_books_hold_under_any_interleaving(steps: int) -> None:
    ReplayMachine.checked = ReplayMachine.compacted = ReplayMachine.parts = 0
    run_state_machine_as_test(
        ReplayMachine,
        settings=settings(
            max_examples=math.ceil(SPARE * steps / STEPS_PER_EXAMPLE),
            stateful_step_count=STEPS_PER_EXAMPLE,
            deadline=None,
            suppress_health_check=list(HealthCheck),  # type: ignore[arg-type]
        ),
    )
    assert ReplayMachine.checked >= steps
    assert ReplayMachine.compacted > 0
    assert ReplayMachine.parts > 0


@pytest.mark.parametrize("seed", range(30))
def test_the_law_and_the_books_hold_over_long_runs(seed: int) -> None:
    """As above with actions weighted as in a run, so that hundreds of steps are trained."""
    machine = ReplayMachine()
    choice = random.Random(seed)
    machine.start(
        bound=choice.choice([0, 0.5, 1, 2]),
        stale=choice.choice(["wait", "trim", "requeue", "drop"]),
        wait_s=choice.choice([0, 3, FOREVER]),
        seed=seed,
        order=choice.choice(["oldest", *take_module.ORDERS]),
        max_uses=choice.choice([1, 1, 3]),
        compact=choice.choice([True, False]),
        stream=choice.choice([True, False]),
    )
    for _ in range(250):
        act_at_random(machine, choice)
        machine.no_token_over_the_bound_is_trained()
        machine.no_prompt_is_lost_or_trained_twice()
        machine.counts_are_what_can_be_counted()
    before = machine.newest.step
    for _ in range(40):
        machine.slow.clear()
        machine.work(8, 16)
        machine.extend(0)
        machine.now += 1
        machine.learn(publish=True)
    assert machine.newest.step >= before + 10, "whatever happened, the run goes on"


def act_at_random(machine: ReplayMachine, choice: random.Random) -> None:
    """One rule of the machine, mostly work and learning."""
    action = choice.choices(
        ["work", "learn", "time", "save", "late", "crash", "extend"], [8, 8, 4, 2, 1, 0.6, 2]
    )
    match action[0]:
        case "work":
            machine.work(choice.choice([1, 4, 8]), choice.choice([0, 4, 8, 12]))
        case "learn":
            machine.learn(publish=choice.random() < 0.8)
        case "time":
            machine.time_passes(choice.randint(1, 6))
        case "save":
            machine.checkpoint()
        case "extend":
            machine.extend(choice.randint(0, 2))
        case "late" if machine.ended:
            machine.finish_too_late()
        case "late" if machine.held:
            machine.release(choice.choice(["expired", "quarantined"]))
        case "crash" if machine.lineage and choice.random() < 0.5:
            machine.resume(torn=choice.random() < 0.5, old=choice.random() < 0.5)
        case _:
            machine.restart()


def test_without_the_check_at_consumption_the_machine_sees_the_violation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clean = Verdict(max_lag=0, stale_prefix=0, stale_tokens=0, orphaned_tokens=0, num_tokens=1)
    monkeypatch.setattr(take_module, "judge", lambda *_: clean)
    monkeypatch.setattr(take_module, "first_late", lambda *_: None)
    with pytest.raises(AssertionError, match=r"step 4 trained 0\.0"):
        stale_run()


def test_with_the_check_the_same_run_trains_nothing_stale() -> None:
    stale_run()


def stale_run() -> None:
    """One group is finished long after the others; the machine's invariant looks at the outcome."""
    machine = ReplayMachine()
    machine.start(bound=1, stale="trim", wait_s=3, seed=0)
    machine.plain = True
    machine.put(4)
    machine.claim("worker-0", G)
    slow = sorted(machine.held)
    for step in range(1, 5):
        machine.serving["worker-1"] = machine.newest
        machine.put(2)
        machine.claim("worker-1", P * G)
        for key in sorted(machine.held):
            if key not in slow or step == 4:
                finish_one(machine, key)
        machine.replay.heartbeat("worker-0", machine.now)
        machine.now += 1
        machine.learn(publish=True)
        machine.now += 9
        machine.replay.heartbeat("worker-1", machine.now)
        machine.learn(publish=True)
        machine.no_token_over_the_bound_is_trained()
        assert machine.newest.step == step


def finish_one(machine: ReplayMachine, key: tuple[str, int, int]) -> None:
    """Hand a sample in, all of it written by the version it was claimed under."""
    lease_id, uid, index = key
    attempt, claimed = machine.held.pop(key)
    sample = trajectory(uid, index, (claimed.step,) * 3, attempt=attempt)
    machine.replay.finish(sample, lease_id, lambda: machine.store(sample), machine.now)
    machine.commit()
