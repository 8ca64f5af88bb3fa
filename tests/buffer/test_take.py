"""What a step takes, waits for and leaves: small scenes with numbers to check by hand."""

import pytest
from slipstream.buffer.config import BufferConfig, StalePolicy
from slipstream.buffer.errors import Refused
from slipstream.buffer.events import Decision, Ref
from slipstream.buffer.records import DropReason, ScoreStatus, Version
from slipstream.buffer.replay import Replay
from slipstream.buffer.take import TakePlan

from .make import manifest, trajectory, version
from .test_replay_machine import NO_PROOF

NOWHERE = Ref(segment=0, offset=0, length=0, digest=0)


class Scene:
    """A replay with one group of two samples a step, unless told otherwise."""

    def __init__(
        self, bound: float = 1, stale: StalePolicy = "trim", prompts_per_step: int = 1
    ) -> None:
        config = BufferConfig(max_staleness_steps=bound, stale=stale, straggler_wait_s=30)
        self.replay = Replay(config, prompts_per_step)
        self.replay.open_branch(0, {}, lambda _: True)
        self.replay.publish(manifest(0))
        self.leases: dict[tuple[int, int], tuple[str, int]] = {}

    def open(self, serving: int, samples: int = 2, now: float = 0.0) -> list[int]:
        """Put a prompt and claim; return the uids granted."""
        self.replay.put(self.replay.state.next_uid, 2, lambda: NOWHERE)
        name = f"request-{len(self.replay.outbox)}"
        granted = self.replay.claim("worker-0", version(serving), samples, name, now)
        for lease_id, lease in granted:
            for index in lease.indices:
                self.leases[lease.uid, index] = (lease_id, lease.attempt)
        return [lease.uid for _, lease in granted]

    def finish(
        self,
        uid: int,
        index: int,
        steps: tuple[int, ...],
        status: ScoreStatus = "scored",
        value: float | None = None,
    ) -> None:
        """Hand in one sample, its tokens written by these versions."""
        lease_id, attempt = self.leases[uid, index]
        sample = trajectory(uid, index, steps, attempt=attempt, status=status, value=value)
        self.replay.finish(sample, lease_id, lambda: NOWHERE, 0.0)

    def step(self, step: int, now: float = 0.0) -> list[int]:
        """Take and publish; return the uids trained."""
        plan = self.replay.plan_take(step, now)
        assert isinstance(plan, TakePlan), plan
        self.replay.commit_take(plan, "request", NO_PROOF)
        self.replay.publish(manifest(step))
        return [uid for uid, _ in plan.groups]


def test_a_step_waits_for_what_it_would_make_late_and_then_goes_on() -> None:
    scene = Scene()
    scene.open(serving=0)
    scene.open(serving=0)
    for index in (0, 1):
        scene.finish(1, index, (0,))
    assert scene.step(1) == [1]  # uid 0 can still be trained by step 2, at lag 1
    scene.open(serving=1)
    for index in (0, 1):
        scene.finish(2, index, (1,))
    words = scene.replay.plan_take(2, 100.0)
    assert words == (
        "1 INFLIGHT at worker-0; oldest sample 100.0 s that step 2 would push over the bound; it "
        "goes on after 30 s"
    )
    assert isinstance(scene.replay.plan_take(2, 129.0), str)
    assert isinstance(scene.replay.plan_take(2, 130.0), TakePlan)
    for index in (0, 1):
        scene.finish(0, index, (0,))
    plan = scene.replay.plan_take(2, 129.0)
    assert isinstance(plan, TakePlan)
    assert plan.groups[0][0] == 0, "the oldest goes first"


def test_a_step_waits_when_more_are_in_flight_than_the_next_one_can_train() -> None:
    scene = Scene(bound=2)
    for _ in range(3):
        scene.open(serving=0)
    for index in (0, 1):
        scene.finish(2, index, (0,))
    assert scene.step(1) == [2]  # steps 2 and 3 remain for uids 0 and 1
    scene.open(serving=1)
    for index in (0, 1):
        scene.finish(3, index, (1,))
    # After step 2 only step 3 could train version 0, and two groups of it are left.
    assert isinstance(scene.replay.plan_take(2, 0.0), str)


@pytest.mark.parametrize("stale", ["trim", "requeue", "drop"])
def test_what_is_over_the_bound_is_handled_as_configured(stale: StalePolicy) -> None:
    scene = Scene(bound=0, stale=stale)
    # Straight into the state: at S = 0 admission would not let this happen.
    scene.replay.config = BufferConfig(max_staleness_steps=1, stale=stale, straggler_wait_s=0)
    scene.open(serving=0)
    scene.open(serving=0)
    for index in (0, 1):
        scene.finish(1, index, (0,))
    scene.step(1)
    scene.finish(0, 0, (0, 0, 1))
    scene.replay.config = BufferConfig(max_staleness_steps=0, stale=stale, straggler_wait_s=0)
    scene.finish(0, 1, (1, 1))
    plan = scene.replay.plan_take(2, 0.0)
    if stale == "trim":
        assert isinstance(plan, TakePlan)
        assert plan.groups == (
            (
                0,
                (
                    Decision(index=0, trained=True, stale_prefix=2),
                    Decision(index=1, trained=True),
                ),
            ),
        )
        return
    # `requeue` issues the prompt again; `drop` leaves one trajectory, too few for a baseline.
    assert isinstance(plan, str)
    group = scene.replay.state.groups[0]
    assert (group.state, group.attempt) == ("WAITING", 1)
    assert scene.replay.state.dropped == {"stale": 2}


def test_failed_rewards_carry_no_gradient_and_two_others_keep_the_group() -> None:
    scene = Scene()
    scene.replay.put(0, 3, lambda: NOWHERE)
    ((lease_id, lease),) = scene.replay.claim("worker-0", version(0), 3, "a", 0.0)
    scene.leases |= {(0, index): (lease_id, lease.attempt) for index in range(3)}
    scene.finish(0, 0, (0,))
    scene.finish(0, 1, (0,), status="reward_failed")
    scene.finish(0, 2, (0,))
    plan = scene.replay.plan_take(1, 0.0)
    assert isinstance(plan, TakePlan)
    assert [(d.trained, d.drop_reason) for d in plan.groups[0][1]] == [
        (True, None),
        (False, "reward_failed"),
        (True, None),
    ]


def test_what_was_cut_for_being_slow_does_not_say_why_its_group_is_dropped() -> None:
    scene = Scene()
    released: list[tuple[DropReason, ...]] = [("cut", "quarantined"), ("cut", "cut")]
    for uid, reasons in enumerate(released):
        scene.open(serving=0)
        for index, reason in enumerate(reasons):
            lease_id, attempt = scene.leases[uid, index]
            scene.replay.release(uid, attempt, (index,), lease_id, reason)
    groups = scene.replay.state.groups
    assert [groups[uid].drop_reason for uid in (0, 1)] == ["quarantined", "reward_failed"]


def test_without_staleness_only_the_newest_version_claims() -> None:
    scene = Scene(bound=0)
    scene.open(serving=0)
    assert scene.open(serving=0) == []  # P groups are open
    for index in (0, 1):
        scene.finish(0, index, (0,))
    scene.step(1)
    assert scene.open(serving=0) == []
    assert scene.open(serving=1) == [1]


def test_samples_left_over_go_first_and_not_to_a_version_that_admission_is_past() -> None:
    scene = Scene(bound=1)
    scene.open(serving=0, samples=1)
    assert scene.open(serving=0, samples=1) == [0]
    assert scene.open(serving=0, samples=1) == [1]
    for index in (0, 1):
        scene.finish(0, index, (0,))
    scene.step(1)
    assert scene.open(serving=1, samples=2) == [1, 2]
    # Three groups are admitted by version 1 and two by version 0: it gets no part of the third.
    assert scene.open(serving=0, samples=1) == []
    assert scene.open(serving=1, samples=1) == [2]


def test_versions_off_the_path_get_no_work() -> None:
    scene = Scene()
    for serving in (version(1), Version(branch=0, step=0, digest="half updated"), version(0, 3)):
        with pytest.raises(Refused, match="gets no work"):
            scene.replay.claim("worker-0", serving, 2, "a", 0.0)


def test_an_orphaned_token_is_refused_and_the_sample_issued_again() -> None:
    scene = Scene()
    scene.open(serving=0)
    lease_id, _ = scene.leases[0, 0]
    orphan = trajectory(0, 0, (version(0, branch=4),))
    with pytest.raises(Refused, match="orphaned"):
        scene.replay.finish(orphan, lease_id, lambda: NOWHERE, 0.0)
    assert scene.replay.state.groups[0].samples[0].attempt == 1
    assert scene.replay.state.dropped == {"orphaned": 1}


@pytest.mark.parametrize("step", [0, 2, 9])
def test_only_the_step_after_the_newest_version_is_taken(step: int) -> None:
    with pytest.raises(Refused, match="does not follow"):
        Scene().replay.plan_take(step, 0.0)


@pytest.mark.parametrize("name", [(0, 2), (1, 1)])
def test_only_the_version_after_the_newest_is_published(name: tuple[int, int]) -> None:
    with pytest.raises(Refused, match=r"expected 0\.1"):
        Scene().replay.publish(manifest(name[1], name[0]))


def test_a_wait_for_a_signal_says_what_was_dropped_and_why() -> None:
    scene = Scene()
    for _ in range(2):
        uid = scene.open(serving=0)[0]
        for index in (0, 1):
            scene.finish(uid, index, (0,), value=1.0)
    assert scene.replay.plan_take(1, 0.0) == (
        "0 of 1 groups READY; no prompts WAITING: the feeder has to put some; "
        "4 dropped since the last step: no_signal"
    )
    scene.open(serving=0)
    scene.replay.expire_worker("worker-0")
    words = scene.replay.plan_take(1, 0.0)
    assert isinstance(words, str)
    assert words.endswith("; 6 dropped since the last step: 4 no_signal, 2 expired")
