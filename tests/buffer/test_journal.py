"""What is acknowledged survives: torn tails, kill -9, power loss; and resume is a fold."""

import asyncio
import contextlib
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from slipstream.buffer import client as client_module
from slipstream.buffer import journal as journal_module
from slipstream.buffer.client import BufferClient
from slipstream.buffer.coordinator import Coordinator
from slipstream.buffer.errors import CorruptData
from slipstream.buffer.events import Dropped, Put, Taken
from slipstream.buffer.journal import Journal
from slipstream.buffer.messages import (
    Batch,
    Claims,
    ClaimSamples,
    FinishSamples,
    Heartbeat,
    PublishVersion,
    PutPrompts,
    Reply,
    Request,
    TakeGroups,
)
from slipstream.buffer.records import Ticket, Trajectory
from slipstream.buffer.service import BufferService
from slipstream.buffer.state import Lengths

from .conftest import SpecMaker, service_process
from .make import manifest, ticket, trajectory, version


def ask(coordinator: Coordinator, request: Request) -> Reply:
    """One request, committed."""
    reply = coordinator.answer(request, 0.0, final=True)
    coordinator.commit()
    assert reply is not None
    return reply


def run_step(coordinator: Coordinator, step: int, branch: int = 0) -> list[int]:
    """Claim, finish and take one step, and publish its version; return the uids trained."""
    uids = coordinator.replay.state.next_uid
    ask(coordinator, PutPrompts(tickets=tuple(ticket(uid) for uid in range(uids, uids + 2))))
    serving = version(step - 1, branch)
    request = ClaimSamples(
        worker="worker-0", serving=serving, max_samples=4, request_id=f"{branch}/{step}"
    )
    claims = ask(coordinator, request)
    assert isinstance(claims, Claims)
    for claim in claims.claims:
        for index in claim.indices:
            uid = claim.ticket.prompt.uid
            sample = trajectory(uid, index, (step - 1,) * 3, attempt=claim.attempt, branch=branch)
            ask(coordinator, FinishSamples(trajectories=(sample,), lease_ids=(claim.lease_id,)))
    batch = ask(coordinator, TakeGroups(step=step, request_id="a", wait_s=0))
    assert isinstance(batch, Batch)
    ask(coordinator, PublishVersion(manifest=manifest(step, branch)))
    return [group.prompt.uid for group in batch.groups]


def test_a_stored_record_comes_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    refs = [journal.append(trajectory(uid, 0)) for uid in range(3)]
    journal.commit([])
    assert [journal.read(ref, Trajectory).uid for ref in refs] == [0, 1, 2]
    assert all(journal.intact(ref) for ref in refs)
    journal.close()


@pytest.mark.parametrize("place", ["header", "payload", "cut", "gone"])
def test_a_damaged_payload_is_never_used(tmp_path: Path, place: str) -> None:
    journal = Journal(tmp_path)
    first, second = journal.append(ticket(0)), journal.append(ticket(1))
    journal.commit([])
    journal.close()
    path = tmp_path / "segments" / "000001.seg"
    raw = bytearray(path.read_bytes())
    match place:
        case "header":
            raw[second.offset + 5] ^= 1
        case "payload":
            raw[-1] ^= 1
        case "cut":
            del raw[-1]
        case _:
            path.unlink()
    if place != "gone":
        path.write_bytes(raw)
    journal = Journal(tmp_path)
    with pytest.raises(CorruptData, match=r"000001\.seg"):
        journal.read(second, Ticket)
    assert not journal.intact(second)
    assert journal.intact(first) == (place != "gone")
    assert journal.append(ticket(2)).segment == (1 if place == "gone" else 2)
    journal.close()


def test_payloads_are_synced_before_events_and_events_before_the_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (order.append("segment"), real(fd))[1])
    journal = Journal(tmp_path)
    journal._database.set_trace_callback(order.append)
    event = Put(uid=0, num_samples=2, ticket=journal.append(ticket(0)))
    journal.commit([event])
    kinds = ["segment" if line == "segment" else line.split()[0] for line in order]
    assert kinds == ["segment", "BEGIN", "INSERT", "COMMIT"]
    assert journal._database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert journal.segments.synced == {1: (tmp_path / "segments" / "000001.seg").stat().st_size}
    journal.close()


def test_a_copy_cut_to_what_was_synced_holds_everything_acknowledged(
    make_spec: SpecMaker, tmp_path: Path
) -> None:
    coordinator = Coordinator(make_spec(), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    run_step(coordinator, 1)
    before = coordinator.replay.state
    # Decided, written, and not committed: nobody was told.
    coordinator.answer(PutPrompts(tickets=(ticket(2),)), 0.0, final=True)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "segments", copy / "segments")
    for name in ("ledger.sqlite", "ledger.sqlite-wal"):
        shutil.copy(tmp_path / name, copy / name)
    for number, length in coordinator.journal.segments.synced.items():
        os.truncate(copy / "segments" / f"{number:06d}.seg", length)
    recovered = Coordinator(make_spec(run_dir=copy), 0.0)
    assert recovered.replay.state.next_uid == 2
    assert {u: g for u, g in before.groups.items() if u < 2} == recovered.replay.state.groups
    recovered.close()
    coordinator.close()


def test_the_torn_tail_of_a_segment_loses_only_its_own_samples(make_spec: SpecMaker) -> None:
    """A disk that lost acknowledged bytes: counted, issued again, and nothing else is touched."""
    coordinator = Coordinator(make_spec(), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    ask(coordinator, PutPrompts(tickets=(ticket(0), ticket(1))))
    request = ClaimSamples(worker="w", serving=version(0), max_samples=4, request_id="a")
    claims = ask(coordinator, request)
    assert isinstance(claims, Claims)
    for claim in claims.claims:
        for index in claim.indices:
            sample = trajectory(claim.ticket.prompt.uid, index)
            ask(coordinator, FinishSamples(trajectories=(sample,), lease_ids=(claim.lease_id,)))
    coordinator.close()
    path = coordinator.journal.segments.folder / "000001.seg"
    os.truncate(path, path.stat().st_size - 1)
    again = Coordinator(make_spec(branch=1, resume_from=(0, 0)), 0.0)
    states = [[s.state for s in g.samples] for g in again.replay.state.groups.values()]
    assert states == [["READY", "READY"], ["READY", "WAITING"]]
    assert again.replay.state.dropped == {"lost": 1}
    again.close()


def test_a_payload_lost_while_serving_is_issued_again(make_spec: SpecMaker) -> None:
    coordinator = Coordinator(make_spec(), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    ask(coordinator, PutPrompts(tickets=(ticket(0), ticket(1))))
    request = ClaimSamples(worker="w", serving=version(0), max_samples=4, request_id="a")
    claims = ask(coordinator, request)
    assert isinstance(claims, Claims)
    for claim in claims.claims:
        for index in claim.indices:
            sample = trajectory(claim.ticket.prompt.uid, index)
            ask(coordinator, FinishSamples(trajectories=(sample,), lease_ids=(claim.lease_id,)))
    path = coordinator.journal.segments.folder / "000001.seg"
    os.truncate(path, path.stat().st_size - 1)
    ask(coordinator, TakeGroups(step=1, request_id="a", wait_s=0))
    assert dict(+coordinator.replay.state.counts) == {"READY": 1, "INFLIGHT": 1}
    assert coordinator.replay.state.dropped == {"lost": 1}
    coordinator.close()


def test_a_resume_undoes_what_followed_the_checkpoint(make_spec: SpecMaker) -> None:
    coordinator = Coordinator(make_spec({"max_staleness_steps": 0}), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    trained = [run_step(coordinator, step) for step in (1, 2, 3)]
    assert trained == [[0, 1], [2, 3], [4, 5]]
    coordinator.close()
    spec = make_spec({"max_staleness_steps": 0}, branch=1, resume_from=(0, 1))
    resumed = Coordinator(spec, 0.0)
    words = [group.state for group in resumed.replay.state.groups.values()]
    # Step 1 is in the checkpoint. Step 2 was made by version 0.1, which is on the path; step 3 by
    # 0.2, which is not: its prompts are asked again, as the same attempt.
    assert words == ["TRAINED", "TRAINED", "READY", "READY", "WAITING", "WAITING"]
    assert {s.attempt for g in resumed.replay.state.groups.values() for s in g.samples} == {0}
    ask(resumed, PublishVersion(manifest=manifest(1, branch=1)))
    batch = ask(resumed, TakeGroups(step=2, request_id="a", wait_s=0))
    assert isinstance(batch, Batch)
    assert [group.prompt.uid for group in batch.groups] == [2, 3]
    assert (batch.proof.finished_samples, batch.proof.finished_reward_mean) == (4, 0.5)
    ask(resumed, PublishVersion(manifest=manifest(2, branch=1)))
    assert run_step(resumed, 3, branch=1) == [4, 5]
    state = resumed.replay.state
    assert state.trained == state.finished == Lengths(12, 36), "redone steps count once"
    resumed.close()


def test_a_drop_is_undone_with_its_step_and_made_again(make_spec: SpecMaker) -> None:
    coordinator = Coordinator(make_spec({"max_staleness_steps": 0}), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    ask(coordinator, PutPrompts(tickets=tuple(ticket(uid) for uid in range(3))))
    for request_id in ("first", "second"):
        request = ClaimSamples(worker="w", serving=version(0), max_samples=4, request_id=request_id)
        claims = ask(coordinator, request)
        assert isinstance(claims, Claims)
        for claim in claims.claims:
            uid = claim.ticket.prompt.uid
            for index in claim.indices:  # the first prompt has no signal
                sample = trajectory(uid, index, value=1.0 if uid == 0 else None)
                ask(coordinator, FinishSamples(trajectories=(sample,), lease_ids=(claim.lease_id,)))
    batch = ask(coordinator, TakeGroups(step=1, request_id="a", wait_s=0))
    assert isinstance(batch, Batch)
    assert [group.prompt.uid for group in batch.groups] == [1, 2]
    assert batch.proof.dropped == {"no_signal": 2}
    # The batch alone would say 1/2; the dropped group, all right, belongs to the mean.
    assert (batch.proof.finished_samples, batch.proof.finished_reward_mean) == (6, 4 / 6)
    assert coordinator.replay.state.rewards_since == {}
    coordinator.close()
    resumed = Coordinator(make_spec(branch=1, resume_from=(0, 0)), 0.0)
    assert [g.state for g in resumed.replay.state.groups.values()] == ["DROPPED", "READY", "READY"]
    assert resumed.replay.state.dropped == {"no_signal": 2}, "undone, and then made again"
    assert resumed.replay.state.dropped_since == {"no_signal": 2}
    assert sum(resumed.replay.state.rewards_since.values()) == 4.0
    drops = [event for event in resumed.journal.events() if isinstance(event, Dropped)]
    assert [(drop.uid, drop.step) for drop in drops] == [(0, 1), (0, 1)]
    resumed.close()


def test_a_failed_commit_leaves_nothing_behind(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    put = Put(uid=0, num_samples=2, ticket=journal.append(ticket(0)))
    journal.commit([put])
    journal.sequence = -1  # the second row will not be unique
    with pytest.raises(sqlite3.IntegrityError):
        journal.commit([put, put])
    journal.sequence = 1
    assert journal.commit([put]) == 2
    assert len(journal.events()) == 2
    journal.close()


def test_half_a_step_is_never_durable(
    make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of ours between `Taken` and `StepTaken` ends the service; the step never was."""
    service = BufferService(make_spec())
    ask(service.coordinator, PublishVersion(manifest=manifest(0)))
    run_step(service.coordinator, 1)

    async def broken(_: object) -> None:
        service.coordinator.replay._emit(Taken(uid=0, step=2, decisions=()))
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(service, "_turn", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        asyncio.run(service.serve())
    again = Coordinator(make_spec(), 0.0)
    assert list(again.replay.state.taken[1]) == [0, 1]
    again.close()


def spoil(coordinator: Coordinator, uid: int) -> None:
    """Change the first byte of a ticket on disk, behind the service's back."""
    ref = coordinator.replay.state.groups[uid].ticket
    path = coordinator.journal.segments.folder / f"{ref.segment:06d}.seg"
    with path.open("r+b") as file:
        file.seek(ref.offset)
        file.write(b"!")


def test_a_corrupt_ticket_is_quarantined_by_a_restart_on_the_same_branch(
    make_spec: SpecMaker,
) -> None:
    coordinator = Coordinator(make_spec(), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    ask(coordinator, PutPrompts(tickets=(ticket(0), ticket(1))))
    spoil(coordinator, 0)
    coordinator.close()
    again = Coordinator(make_spec(), 0.0)
    request = ClaimSamples(worker="w", serving=version(0), max_samples=4, request_id="a")
    claims = ask(again, request)
    assert isinstance(claims, Claims)
    assert [claim.ticket.prompt.uid for claim in claims.claims] == [1]
    group = again.replay.state.groups[0]
    assert (group.state, group.drop_reason) == ("DROPPED", "quarantined")
    again.close()


def test_a_taken_group_that_became_unreadable_stays_taken(make_spec: SpecMaker) -> None:
    coordinator = Coordinator(make_spec(), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    run_step(coordinator, 1)
    spoil(coordinator, 0)
    with pytest.raises(CorruptData, match="uid 0 was TAKEN by step 1 and is unreadable now"):
        ask(coordinator, TakeGroups(step=1, request_id="a", wait_s=0))
    assert coordinator.replay.state.groups[0].state == "TAKEN"
    coordinator.close()


def test_a_batch_says_what_speculation_did_at_all_workers(make_spec: SpecMaker) -> None:
    coordinator, steps = Coordinator(make_spec({"max_staleness_steps": 0}), 0.0), []
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    told = [{"drafted": 0.0}, {"drafted": 60.0, "accepted": 20.0, "speed_up": 0.0}]
    told += [{"drafted": 10.0, "accepted": 4.0, "speed_up": s} for s in (1.1, 1.5, 4.0)]
    for step, num_heard in enumerate((1, 2, 5), 1):
        for number, stats in enumerate(told[:num_heard]):
            ask(coordinator, Heartbeat(worker=f"worker-{number}", serving=None, stats=stats))
        run_step(coordinator, step)
        batch = ask(coordinator, TakeGroups(step=step, request_id="a", wait_s=0))
        assert isinstance(batch, Batch)
        steps.append(batch.drafts)
    assert steps == [
        {},
        {"drafted_tokens": 60, "accepted_tokens": 20},
        {"drafted_tokens": 90, "accepted_tokens": 32, "speed_up": 1.5},
    ]
    coordinator.close()


def test_without_drops_at_bound_0_the_finished_samples_are_the_batch(make_spec: SpecMaker) -> None:
    coordinator = Coordinator(make_spec({"max_staleness_steps": 0, "drop_no_signal": False}), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    for step in (1, 2, 3):
        run_step(coordinator, step)
        batch = ask(coordinator, TakeGroups(step=step, request_id="a", wait_s=0))
        assert isinstance(batch, Batch)
        rewards = [s.trajectory.score.value for g in batch.groups for s in g.samples]
        assert batch.proof.finished_samples == len(rewards) == 4
        assert batch.proof.finished_reward_mean == sum(r or 0.0 for r in rewards) / 4
    coordinator.close()


def test_a_row_that_is_no_event_is_named(make_spec: SpecMaker, tmp_path: Path) -> None:
    Coordinator(make_spec(), 0.0).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as database:
        database.execute("UPDATE events SET body = x'00'")
        database.commit()
    with pytest.raises(CorruptData, match="not an event"):
        Coordinator(make_spec(), 0.0)
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database at all, but long enough to be read")
    with pytest.raises(CorruptData, match="not a ledger"):
        Coordinator(make_spec(), 0.0)


def test_events_stay_small(make_spec: SpecMaker) -> None:
    coordinator = Coordinator(make_spec(), 0.0)
    ask(coordinator, PublishVersion(manifest=manifest(0)))
    run_step(coordinator, 1)
    usual = [
        journal_module.encode_event(event)
        for event in coordinator.journal.events()
        if type(event).__name__ not in ("StepTaken", "Published")  # once a step, not per sample
    ]
    assert max(map(len, usual)) <= 200
    coordinator.close()


async def test_acknowledged_work_survives_kill_9_and_retries_change_nothing(
    make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service is killed again and again; the client only ever repeats its requests."""
    monkeypatch.setattr(client_module, "RESEND_S", 0.1)
    spec = make_spec()
    acknowledged: set[tuple[int, int]] = set()

    async def work(client: BufferClient) -> list[int]:
        await client.connect()
        await client.publish(manifest(0))
        await client.put_prompts([ticket(uid) for uid in range(8)])
        trained: list[int] = []
        for step in (1, 2, 3):
            claims = await client.claim(version(step - 1), 4, wait_s=20)
            for claim in claims.claims:
                for index in claim.indices:
                    uid = claim.ticket.prompt.uid
                    await client.finish(trajectory(uid, index, (step - 1,)), claim.lease_id)
                    acknowledged.add((uid, index))
                    await asyncio.sleep(0.005)  # or all is done before it can be killed
            batch = await client.take(step, wait_s=20)
            assert isinstance(batch, Batch)
            trained += [group.prompt.uid for group in batch.groups]
            await client.publish(manifest(step))
        return trained

    client = BufferClient(spec.endpoint, "run", "worker-0", timeout_s=60)
    worker = asyncio.create_task(work(client))
    kills = 0
    while not worker.done():
        with service_process(spec):
            until = 2 + 3 * kills
            while not worker.done() and len(acknowledged) < until:
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.001 * kills)  # not always at the same place
            kills += 1
    assert worker.result() == [0, 1, 2, 3, 4, 5]
    assert kills == 5, "it was killed four times in the middle"
    await client.close()
    coordinator = Coordinator(spec, 0.0)
    for uid, index in acknowledged:
        assert coordinator.replay.state.groups[uid].samples[index].state == "READY"
    assert [coordinator.replay.state.groups[uid].state for uid in range(6)] == ["TAKEN"] * 6
    coordinator.close()
