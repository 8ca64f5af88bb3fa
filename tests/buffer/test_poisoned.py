"""A prompt that kills its workers is found and put away; its bystanders are trained."""

from slipstream.buffer.config import BufferConfig
from slipstream.buffer.events import Ref
from slipstream.buffer.replay import MAX_DEATHS, Replay
from slipstream.buffer.take import TakePlan

from .make import manifest, trajectory, version

REF = Ref(segment=0, offset=0, length=1, digest=0)


def test_the_prompt_over_which_workers_die_is_quarantined_and_its_bystanders_are_not():
    replay = Replay(BufferConfig(drop_no_signal=False), prompts_per_step=4)
    replay.open_branch(0, {}, lambda ref: True)
    replay.publish(manifest(0))
    for uid in range(4):
        assert replay.put(uid, 2, lambda: REF)
    poison, finished, poisoned, deaths = 2, set(), [], 0
    for turn in range(40):
        leases = replay.claim("worker-0", version(0), 8, f"request-{turn}", 0.0)
        if any(lease.uid == poison for _, lease in leases):
            deaths += 1
            poisoned += replay.worker_died("worker-0")
            continue
        for name, lease in leases:
            for index in sorted(lease.open):
                sample = trajectory(lease.uid, index, attempt=lease.attempt, value=1.0)
                replay.finish(sample, name, lambda: REF, 0.0)
                finished.add((lease.uid, index))
        if len(finished) == 6 and poisoned:
            break
    assert poisoned == [poison]
    assert deaths == MAX_DEATHS
    assert finished == {(uid, index) for uid in (0, 1, 3) for index in (0, 1)}
    assert replay.state.groups[poison].state == "DROPPED"
    assert replay.state.groups[poison].drop_reason == "quarantined"


def test_other_workers_go_on_while_a_suspect_runs_alone():
    replay = Replay(BufferConfig(drop_no_signal=False), prompts_per_step=4)
    replay.open_branch(0, {}, lambda ref: True)
    replay.publish(manifest(0))
    for uid in range(4):
        replay.put(uid, 2, lambda: REF)
    replay.claim("worker-0", version(0), 2, "a", 0.0)
    assert replay.worker_died("worker-0") == []
    alone = replay.claim("worker-0", version(0), 8, "b", 0.0)
    assert {lease.uid for _, lease in alone} == {0}
    others = replay.claim("worker-1", version(0), 8, "c", 0.0)
    assert {lease.uid for _, lease in others} == {1, 2, 3}


def test_a_suspect_is_forgotten_when_its_group_ends_without_another_sample():
    replay = Replay(BufferConfig(max_staleness_steps=1), prompts_per_step=1)
    replay.open_branch(0, {}, lambda ref: True)
    replay.publish(manifest(0))
    replay.put(0, 3, lambda: REF)
    replay.put(1, 1, lambda: REF)
    ((name, _),) = replay.claim("worker-1", version(0), 2, "a", 0.0)
    for index in (0, 1):
        replay.finish(trajectory(0, index), name, lambda: REF, 0.0)
    replay.claim("worker-0", version(0), 2, "b", 0.0)
    assert replay.worker_died("worker-0") == []
    assert replay.deaths == {0: 1, 1: 1}
    for worker, uid, index in (("worker-0", 0, 2), ("worker-1", 1, 0)):
        ((name, lease),) = replay.claim(worker, version(0), 1, worker, 0.0)
        assert (lease.uid, lease.indices) == (uid, (index,))
        replay.release(uid, lease.attempt, (index,), name, "quarantined")
    assert replay.state.groups[1].state == "DROPPED"
    assert replay.deaths == {0: 1}
    plan = replay.plan_take(1, 0.0, "take")
    assert isinstance(plan, TakePlan)
    replay.commit_part(plan, "take")
    assert replay.state.groups[0].state == "TAKEN"
    assert not replay.deaths
