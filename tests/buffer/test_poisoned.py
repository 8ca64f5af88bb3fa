"""A prompt that kills its workers is found and put away; its bystanders are trained."""

from slipstream.buffer.config import BufferConfig
from slipstream.buffer.events import Ref, decode_event, encode_event
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
    poison, finished, deaths = 2, set(), 0
    for turn in range(40):
        leases = replay.claim("worker-0", version(0), 8, f"request-{turn}", 0.0)
        if any(lease.uid == poison for _, lease in leases):
            deaths += 1
            replay.worker_died("worker-0")
            continue
        for name, lease in leases:
            for index in sorted(lease.open):
                sample = trajectory(lease.uid, index, attempt=lease.attempt, value=1.0)
                replay.finish(sample, name, lambda: REF, 0.0)
                finished.add((lease.uid, index))
        if len(finished) == 6 and replay.state.quarantined:
            break
    assert replay.state.quarantined == {poison: "3 workers or engines died over it"}
    assert deaths == MAX_DEATHS
    assert finished == {(uid, index) for uid in (0, 1, 3) for index in (0, 1)}
    assert replay.state.groups[poison].state == "DROPPED"
    assert replay.state.groups[poison].drop_reason == "quarantined"


def test_the_prompt_over_which_engines_die_is_quarantined_and_one_death_counts_once_for_it():
    replay = Replay(BufferConfig(drop_no_signal=False), prompts_per_step=4)
    replay.open_branch(0, {}, lambda ref: True)
    replay.publish(manifest(0))
    for uid in range(3):
        replay.put(uid, 4, lambda: REF)
    poison, finished, deaths = 1, set(), 0
    for turn in range(40):
        leases = replay.claim("worker-0", version(0), 12, f"request-{turn}", 0.0)
        died = any(lease.uid == poison for _, lease in leases)
        deaths += died
        for name, lease in leases:
            for index in sorted(lease.open):  # each sample is given back by a message of its own
                if died:
                    given = (lease.uid, lease.attempt, (index,), name, "expired")
                    replay.release(*given, death=f"core {deaths}")
                else:
                    sample = trajectory(lease.uid, index, attempt=lease.attempt, value=1.0)
                    replay.finish(sample, name, lambda: REF, 0.0)
                    finished.add((lease.uid, index))
        if len(finished) == 8 and replay.state.quarantined:
            break
    assert deaths == MAX_DEATHS
    assert list(replay.state.quarantined) == [poison]
    assert finished == {(uid, index) for uid in (0, 2) for index in range(4)}
    assert not replay.deaths


def test_a_quarantine_is_known_after_a_restart_and_forgotten_where_a_resume_undoes_it():
    replay = Replay(BufferConfig(), prompts_per_step=1)
    replay.open_branch(0, {}, lambda ref: True)
    replay.publish(manifest(0))
    for uid in range(2):
        replay.put(uid, 2, lambda: REF)
    for turn in range(MAX_DEATHS):
        replay.claim("worker-0", version(0), 2, f"request-{turn}", 0.0)
        replay.worker_died("worker-0")
    again = Replay(BufferConfig(), prompts_per_step=1)
    again.restore([decode_event(encode_event(event)) for event in replay.outbox], 0.0)
    assert again.state.quarantined == replay.state.quarantined == {0: replay.state.quarantined[0]}
    again.open_branch(1, {1: (0, 0)}, lambda ref: True)  # dropped during step 1, which is lost
    assert again.state.groups[0].state == "WAITING"
    assert not again.state.quarantined


def test_other_workers_go_on_while_a_suspect_runs_alone():
    replay = Replay(BufferConfig(drop_no_signal=False), prompts_per_step=4)
    replay.open_branch(0, {}, lambda ref: True)
    replay.publish(manifest(0))
    for uid in range(4):
        replay.put(uid, 2, lambda: REF)
    replay.claim("worker-0", version(0), 2, "a", 0.0)
    replay.worker_died("worker-0")
    assert not replay.state.quarantined
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
    replay.worker_died("worker-0")
    assert not replay.state.quarantined
    assert {uid: len(deaths) for uid, deaths in replay.deaths.items()} == {0: 1, 1: 1}
    for worker, uid, index in (("worker-0", 0, 2), ("worker-1", 1, 0)):
        ((name, lease),) = replay.claim(worker, version(0), 1, worker, 0.0)
        assert (lease.uid, lease.indices) == (uid, (index,))
        replay.release(uid, lease.attempt, (index,), name, "quarantined")
    assert replay.state.groups[1].state == "DROPPED"
    assert list(replay.deaths) == [0]
    plan = replay.plan_take(1, 0.0, "take")
    assert isinstance(plan, TakePlan)
    replay.commit_part(plan, "take")
    assert replay.state.groups[0].state == "TAKEN"
    assert not replay.deaths
