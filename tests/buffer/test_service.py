"""Service and client over real sockets: waits, retries, refusals, and nobody hangs."""

import asyncio
import contextlib
import json
import re
import signal
import time

import msgspec
import pytest
import zmq
import zmq.asyncio
from slipstream.buffer import client as client_module
from slipstream.buffer import codec
from slipstream.buffer.audit import audit
from slipstream.buffer.client import BufferClient
from slipstream.buffer.coordinator import Coordinator
from slipstream.buffer.errors import CorruptData, PeerLost, Refused
from slipstream.buffer.messages import (
    SCHEMA_VERSION,
    AwaitVersion,
    Batch,
    Claims,
    ClaimSamples,
    EvaluationResults,
    FinishEvaluation,
    GetStats,
    Heartbeat,
    Hello,
    NotYet,
    Part,
    PublishVersion,
    PutEvaluation,
    PutPrompts,
    RefusedReply,
    Reply,
    Stats,
)
from slipstream.buffer.records import SamplingParams, Score, SizingDecision, Ticket
from slipstream.buffer.staleness import LivePath, proof_line

from .conftest import SpecMaker, running, service_process
from .make import manifest, prompt, ticket, trajectory, version


async def finish_all(client: BufferClient, claims: Claims, *, step: int = 0) -> None:
    """Hand in every sample of the claims, written by the version of `step`."""
    for claim in claims.claims:
        for index in claim.indices:
            uid = claim.ticket.prompt.uid
            sample = trajectory(uid, index, (step,) * 3, attempt=claim.attempt)
            await client.finish(sample, claim.lease_id)


async def test_a_prompt_travels_from_feeder_to_batch(make_spec: SpecMaker) -> None:
    spec = make_spec()
    async with running(spec) as client:
        assert (await client.put_prompts([ticket(uid) for uid in range(5)])).count == 5
        await client.publish(manifest(0))
        claims = await client.claim(version(0), 64)
        assert [claim.ticket.prompt.uid for claim in claims.claims] == [0, 1, 2, 3]
        assert claims.newest == manifest(0)
        await finish_all(client, claims)
        batch = await client.take(1, wait_s=5)
        assert isinstance(batch, Batch)
        assert [group.prompt for group in batch.groups] == [prompt(0), prompt(1)]
        assert [s.trajectory.index for g in batch.groups for s in g.samples] == [0, 1, 0, 1]
        assert batch.proof.lag_counts == {0: 12}
        again = await client.take(1, wait_s=5)
        assert isinstance(again, Batch)
        assert again.proof == batch.proof
        assert codec.encode(again.groups)[1:] == codec.encode(batch.groups)[1:]
        with pytest.raises(Refused, match="TAKEN already by another request"):
            await client.take(1, wait_s=0, request_id="somebody else")
        assert (await client.checkpoint_saved(version(0))).journal_sequence > 0
        stats = await client.stats()
        assert stats.counts == {"WAITING": 1, "READY": 2, "TAKEN": 2}
        assert stats.capacity_groups == 4
    lines = (spec.run_dir / "proof.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


async def test_a_step_is_handed_out_in_parts_that_repeats_and_restarts_do_not_change(
    make_spec: SpecMaker,
) -> None:
    spec = make_spec()
    client = BufferClient(spec.endpoint, spec.run_id, "learner", timeout_s=30)
    with service_process(spec):
        await client.connect()
        await client.put_prompts([ticket(uid) for uid in range(3)])
        await client.publish(manifest(0))
        first, second, _ = (await client.claim(version(0), 64)).claims
        await finish_all(client, Claims(claims=(second,)))
        reply = await client.take_part(1, 0, wait_s=5)
        assert isinstance(reply, Part)
        assert [group.prompt.uid for group in reply.groups] == [1]
        again = await client.take_part(1, 0, wait_s=5)  # as if its answer had been lost
        assert isinstance(again, Part)
        assert codec.encode(again.groups)[1:] == codec.encode(reply.groups)[1:]
        waiting = await client.take_part(1, 1, wait_s=0)
        assert isinstance(waiting, NotYet)
        assert "0 of 1 groups READY besides the 1 handed out" in waiting.waiting_on
        with pytest.raises(Refused, match="another request"):
            await client.take(1, wait_s=0, request_id="somebody else")
    assert audit(spec.run_dir, range(3)).ok, "half a step is no fault while it is the last"
    with service_process(spec):  # after kill -9, on the same branch
        await finish_all(client, Claims(claims=(first,)))
        batch = await client.take_part(1, 1, wait_s=5)
        assert isinstance(batch, Batch)
        assert [group.prompt.uid for group in batch.groups] == [0]
        assert (batch.proof.trained_trajectories, batch.proof.lag_counts) == (4, {0: 12})
        whole = await client.take(1, wait_s=5)
        assert isinstance(whole, Batch)
        assert [group.prompt.uid for group in whole.groups] == [0, 1]
        assert whole.proof == batch.proof
        await client.close()


async def test_a_probed_group_waits_for_its_sizer_and_is_then_topped_up(
    make_spec: SpecMaker,
) -> None:
    spec = make_spec(prompts_per_step=1)
    probe = SizingDecision(
        sizer="probe", num_samples=2, max_new_tokens=8, reason="probe", staged=True
    )
    whole = msgspec.structs.replace(probe, num_samples=4, reason="hard", staged=False)
    async with running(spec) as client:
        await client.put_prompts([Ticket(prompt=prompt(0), sizing=probe)])
        await client.publish(manifest(0))
        await finish_all(client, await client.claim(version(0), 4))
        reply = await client.take(1, wait_s=0)
        assert isinstance(reply, NotYet)
        assert "1 staged until the feeder extends them" in reply.waiting_on
        await client.extend(0, whole)
        await client.extend(0, whole)  # a repeat
        claims = await client.claim(version(0), 8)
        assert [(claim.indices, claim.ticket.sizing) for claim in claims.claims] == [
            ((2, 3), whole)
        ]
        await finish_all(client, claims)
        batch = await client.take(1, wait_s=5)
        assert isinstance(batch, Batch)
        assert batch.groups[0].sizing == whole
        assert [sample.trajectory.index for sample in batch.groups[0].samples] == [0, 1, 2, 3]
        with pytest.raises(Refused, match="cannot be extended to 6 samples: it is TAKEN with 4"):
            await client.extend(0, msgspec.structs.replace(whole, num_samples=6))
    assert audit(spec.run_dir, [0]).ok


async def test_a_group_is_trained_again_when_rollouts_lag_and_at_most_so_often(
    make_spec: SpecMaker,
) -> None:
    spec = make_spec({"max_uses": 2, "max_staleness_steps": 4}, prompts_per_step=1)
    async with running(spec) as client:
        await client.put_prompts([ticket(0)])
        await client.publish(manifest(0))
        await finish_all(client, await client.claim(version(0), 2))
        for step in (1, 2):
            batch = await client.take(step, wait_s=5)
            assert isinstance(batch, Batch)
            assert [group.prompt.uid for group in batch.groups] == [0]
            assert batch.proof.lag_counts == {step - 1: 6}
            await client.publish(manifest(step))
        assert isinstance(await client.take(3, wait_s=0), NotYet)
        assert (await client.stats()).counts == {"TAKEN": 1}
    assert audit(spec.run_dir, [0], max_uses=2).ok
    assert audit(spec.run_dir, [0]).faults == ["uid 0 is step 1 and step 2"]


async def test_a_task_with_a_tighter_bound_is_claimed_under_it_and_proved_under_it(
    make_spec: SpecMaker,
) -> None:
    config = {"max_staleness_steps": 2, "task_max_staleness_steps": {"sum": 0}}
    async with running(make_spec(config, prompts_per_step=1)) as client:
        await client.put_prompts([ticket(0), ticket(1)])
        await client.publish(manifest(0))
        claims = await client.claim(version(0), 8)
        assert [claim.ticket.prompt.uid for claim in claims.claims] == [0]
        await finish_all(client, claims)
        batch = await client.take(1, wait_s=5)
        assert isinstance(batch, Batch)
        assert {sample.bound for sample in batch.groups[0].samples} == {0}
        assert (
            proof_line(
                batch.groups[0].samples, step=2, max_staleness_steps=2, path=LivePath(0)
            ).violations
            == 6
        )
        await client.publish(manifest(1))
        assert (await client.claim(version(0), 8)).claims == ()
        assert len((await client.claim(version(1), 8)).claims) == 1


async def test_a_waiting_claim_is_answered_when_something_changes(make_spec: SpecMaker) -> None:
    async with running(make_spec()) as client:
        await client.publish(manifest(0))
        claim = asyncio.create_task(client.claim(version(0), 4, wait_s=30))
        version_ = asyncio.create_task(client.await_version(after=version(0), wait_s=30))
        await asyncio.sleep(0.3)
        assert not claim.done()
        assert not version_.done()
        words = (await client.stats()).waits
        assert any("worker-0 waits" in line and "ClaimSamples" in line for line in words)
        await client.put_prompts([ticket(0)])
        assert len((await asyncio.wait_for(claim, 5)).claims) == 1
        await client.publish(manifest(1))
        assert (await asyncio.wait_for(version_, 5)).manifest == manifest(1)


async def test_a_wait_ends_in_time_and_says_on_whom(make_spec: SpecMaker) -> None:
    async with running(make_spec()) as client:
        await client.publish(manifest(0))
        began = time.monotonic()
        reply = await client.take(1, wait_s=0.3)
        assert isinstance(reply, NotYet)
        assert reply.waiting_on.startswith("0 of 2 groups READY; no prompts WAITING")
        assert 0.25 < time.monotonic() - began < 3
        await client.put_prompts([ticket(0), ticket(1)])
        await client.claim(version(0), 4)
        reply = await client.take(1, wait_s=0)
        assert isinstance(reply, NotYet)
        assert reply.waiting_on.startswith("0 of 2 groups READY; 2 INFLIGHT at worker-0; oldest")
        assert (await client.claim(version(0), 4, wait_s=0.1)).claims == ()
        assert (await client.await_version(version(0), wait_s=0.1)).manifest == manifest(0)


async def test_the_queue_pushes_back_on_the_feeder(make_spec: SpecMaker) -> None:
    async with running(make_spec({"max_waiting_prompts": 3})) as client:
        assert (await client.put_prompts([ticket(uid) for uid in range(5)])).count == 3
        put = asyncio.create_task(client.put_prompts([ticket(3), ticket(4)], wait_s=30))
        await asyncio.sleep(0.2)
        assert not put.done()
        await client.publish(manifest(0))
        await client.claim(version(0), 2)
        assert (await asyncio.wait_for(put, 5)).count == 1
        with pytest.raises(Refused, match="uid 9"):
            await client.put_prompts([ticket(9)])


async def test_lost_leases_are_issued_again_and_finished_siblings_kept(
    make_spec: SpecMaker,
) -> None:
    spec = make_spec({"lease_s": 0.4})
    async with running(spec) as dead, BufferClient(spec.endpoint, "run", "worker-1") as alive:
        await dead.put_prompts([ticket(0)])
        await dead.publish(manifest(0))
        (claim,) = (await dead.claim(version(0), 2)).claims
        await dead.finish(trajectory(0, 1), claim.lease_id)
        (again,) = (await alive.claim(version(0), 2, wait_s=10)).claims
        assert (again.indices, again.attempt) == ((0,), 1)
        with pytest.raises(Refused, match="has ended"):
            await dead.finish(trajectory(0, 0), claim.lease_id)
        await dead.finish(trajectory(0, 1), claim.lease_id)  # an exact repeat
        for _ in range(4):  # heartbeats keep a lease alive for longer than it lasts
            await asyncio.sleep(0.2)
            await alive.heartbeat(version(0), {"running": 1.0})
        await alive.finish(trajectory(0, 0, attempt=1), again.lease_id)
        assert (await alive.stats()).counts == {"READY": 1}


async def test_a_new_process_under_an_old_name_inherits_no_leases(make_spec: SpecMaker) -> None:
    spec = make_spec()
    coordinator = Coordinator(spec, 0.0)
    hello = {"run_id": "run", "name": "worker-0"}
    coordinator.answer(Hello(**hello, pid=1), 0.0, final=True)
    coordinator.answer(PutPrompts(tickets=(ticket(0),)), 0.0, final=True)
    coordinator.answer(PublishVersion(manifest=manifest(0)), 0.0, final=True)
    request = ClaimSamples(worker="worker-0", serving=version(0), max_samples=2, request_id="a")
    coordinator.answer(request, 0.0, final=True)
    assert coordinator.replay.state.counts["INFLIGHT"] == 1
    coordinator.answer(Hello(**hello, pid=2), 0.0, final=True)
    assert coordinator.replay.state.counts["WAITING"] == 1
    coordinator.close()


async def test_what_a_worker_held_that_went_with_its_node_is_issued_again_and_not_suspected(
    make_spec: SpecMaker,
) -> None:
    spec = make_spec()
    async with running(spec, "supervisor") as supervisor:
        await supervisor.put_prompts([ticket(uid) for uid in range(2)])
        await supervisor.publish(manifest(0))
        async with BufferClient(spec.endpoint, "run", "worker-0") as gone:
            await gone.claim(version(0), 4)
            await gone.heartbeat(version(0), {"idle": 0.0})
            assert "worker-0" in (await supervisor.stats()).workers
            await supervisor.lost("worker-0")
            assert "worker-0" not in (await supervisor.stats()).workers
        async with BufferClient(spec.endpoint, "run", "worker-1") as other:
            claims = (await other.claim(version(0), 4)).claims
            assert [(c.ticket.prompt.uid, c.attempt) for c in claims] == [(0, 1), (1, 1)]


def test_stats_leave_out_workers_that_were_not_heard_of_for_a_lease(make_spec: SpecMaker) -> None:
    coordinator = Coordinator(make_spec({"lease_s": 30}), 0.0)
    heartbeat = Heartbeat(worker="worker-0", serving=None, stats={"idle": 1.0})
    coordinator.answer(heartbeat, 0.0, final=True)
    for now, shown in ((29.0, ["worker-0"]), (31.0, [])):
        stats = coordinator.answer(GetStats(), now, final=True)
        assert isinstance(stats, Stats)
        assert list(stats.workers) == shown
    coordinator.close()


async def test_work_granted_to_a_cancelled_claim_goes_back(make_spec: SpecMaker) -> None:
    async with running(make_spec()) as client:
        await client.publish(manifest(0))
        claim = asyncio.create_task(client.claim(version(0), 2, wait_s=30))
        await asyncio.sleep(0.2)
        claim.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await claim
        await client.put_prompts([ticket(0)])
        async with asyncio.timeout(5):
            while (await client.stats()).counts != {"WAITING": 1}:
                await asyncio.sleep(0.05)


async def test_evaluations_are_pinned_collected_and_outside_the_states(
    make_spec: SpecMaker,
) -> None:
    spec = make_spec({"lease_s": 0.5})
    async with running(spec, "gone") as gone, BufferClient(spec.endpoint, "run", "there") as there:
        await gone.publish(manifest(0))
        job = {
            "job_id": "first",
            "version": version(0),
            "prompts": [prompt((1 << 40) + i) for i in range(3)],
            "samples_per_prompt": 2,
            "sampling": SamplingParams(temperature=0.0),
        }
        await gone.put_evaluation(**job)
        await gone.put_evaluation(**job)
        for step in (1, 2, 3):
            await gone.publish(manifest(step))
        assert len((await gone.claim(version(3), 0)).evaluations) == 3  # and never finishes them
        reply = await there.await_evaluation("first", wait_s=0)
        assert isinstance(reply, NotYet)
        assert reply.waiting_on == "version 0.0: 0 of 6 samples; 6 in flight at gone"
        claims = (await there.claim(version(3), 0, wait_s=10)).evaluations
        assert {claim.manifest.version for claim in claims} == {version(0)}
        for claim in claims:
            for index in claim.indices:
                await there.finish_evaluation(
                    job_id="first",
                    uid=claim.prompt.uid,
                    index=index,
                    text="4",
                    score=Score(value=1.0),
                    num_tokens=1,
                )
        results = await there.await_evaluation("first", wait_s=5)
        assert isinstance(results, EvaluationResults)
        assert len(results.results) == 6
        assert (await there.stats()).counts == {}
        with pytest.raises(Refused, match=r"0\.1 is not held"):
            await there.put_evaluation(**{**job, "job_id": "late", "version": version(1)})


async def test_a_repeated_claim_gets_the_same_evaluations_and_no_more(
    make_spec: SpecMaker,
) -> None:
    coordinator = Coordinator(make_spec(), 0.0)

    def claim(request_id: str, max_samples: int = 0) -> Claims:
        request = ClaimSamples(
            worker="w", serving=version(0), max_samples=max_samples, request_id=request_id
        )
        reply = coordinator.answer(request, 0.0, final=False)
        assert isinstance(reply, Claims)
        return reply

    coordinator.answer(PublishVersion(manifest=manifest(0)), 0.0, final=True)
    many = PutEvaluation(
        job_id="first",
        version=version(0),
        prompts=tuple(prompt((1 << 40) + i) for i in range(100)),
        samples_per_prompt=1,
        sampling=SamplingParams(),
    )
    coordinator.answer(many, 0.0, final=True)
    first = claim("a")
    assert len(first.evaluations) == 64
    assert claim("a") == first
    for granted in first.evaluations:
        finished = FinishEvaluation(
            job_id="first", uid=granted.prompt.uid, index=0, text="", score=Score(value=1.0),
            num_tokens=1,
        )  # fmt: skip
        coordinator.answer(finished, 0.0, final=True)
    second = claim("b", 4)
    assert len(second.evaluations) == 36
    coordinator.answer(PutPrompts(tickets=(ticket(0),)), 0.0, final=True)
    assert claim("b", 4) == second, "nor training samples that the first answer did not hold"
    training = claim("c", 1)
    assert (len(training.claims), training.evaluations) == (1, ())
    coordinator.evaluations.expire_worker("w")
    assert claim("c", 1) == training
    coordinator.close()


async def test_stats_say_what_the_learner_waits_for_and_since_when(make_spec: SpecMaker) -> None:
    async with running(make_spec(), "learner") as client:
        await client.publish(manifest(0))
        for _ in range(2):
            await client.take(1, wait_s=0.2)
        (line,) = (await client.stats()).waits
        found = re.fullmatch(
            r"learner waits (.*) s of 600 s for the batch of step 1: 0 of 2 groups READY; .*", line
        )
        assert found, line
        assert float(found[1]) >= 0.4, "over all requests of the step"


def test_repeats_come_later_than_usual_answers() -> None:
    assert client_module.RESEND_S >= 3 * 2.0, "the worker's POLL_S"


async def test_closing_ends_every_wait_and_then_the_service(make_spec: SpecMaker) -> None:
    spec = make_spec()
    with service_process(spec) as process:
        async with BufferClient(spec.endpoint, "run", "worker-0") as client:
            await client.publish(manifest(0))
            parked = [
                asyncio.create_task(client.claim(version(0), 2, wait_s=60)),
                asyncio.create_task(client.take(1, wait_s=60)),
                asyncio.create_task(client.await_version(version(0), wait_s=60)),
            ]
            await asyncio.sleep(0.2)
            await client.close_run("done")
            for reply in await asyncio.wait_for(asyncio.gather(*parked), 5):
                assert reply.closing
            assert (await client.put_prompts([ticket(0)])).closing
        assert await asyncio.to_thread(process.wait, 10) == 0


async def test_sigterm_is_a_clean_end(make_spec: SpecMaker) -> None:
    spec = make_spec()
    with service_process(spec) as process:
        async with BufferClient(spec.endpoint, "run", "feeder") as client:
            await client.put_prompts([ticket(0)])
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 10) == 0
    assert not (spec.run_dir / "processes" / "buffer.error.json").exists()
    coordinator = Coordinator(spec, 0.0)
    assert coordinator.replay.state.next_uid == 1
    coordinator.close()


async def test_what_ends_the_service_is_recorded(make_spec: SpecMaker) -> None:
    spec = make_spec()
    Coordinator(spec, 0.0).close()
    with service_process(make_spec(run_id="other")) as process:
        assert await asyncio.to_thread(process.wait, 10) == 1
    record = json.loads((spec.run_dir / "processes" / "buffer.error.json").read_text())
    assert record["type"] == "CorruptData"
    assert "run_id = run, not other" in record["message"]
    with pytest.raises(CorruptData, match="prompts_per_step"):
        Coordinator(make_spec(prompts_per_step=3), 0.0)


async def test_a_client_of_another_run_is_refused(make_spec: SpecMaker) -> None:
    spec = make_spec()
    async with running(spec):
        with pytest.raises(Refused, match="this is run run"):
            async with BufferClient(spec.endpoint, "another", "worker-0"):
                pass


async def test_without_a_service_the_client_gives_up_in_time(make_spec: SpecMaker) -> None:
    client = BufferClient(make_spec().endpoint, "run", "worker-0", timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(PeerLost, match=r"worker-0 waits .* for the buffer service"):
        await client.connect()
    assert time.monotonic() - began < 5
    await client.close()


async def test_a_service_that_dies_ends_the_longest_wait(make_spec: SpecMaker) -> None:
    spec = make_spec()
    with service_process(spec) as process:
        client = BufferClient(spec.endpoint, "run", "learner", timeout_s=10)
        await client.connect()
        await client.publish(manifest(0))
        client.timeout_s = 1.0
        take = asyncio.create_task(client.take(1, wait_s=3600))
        await asyncio.sleep(1.5)  # longer than the time-out: a parked request is no silence
        assert not take.done()
        process.kill()
        began = time.monotonic()
        with pytest.raises(PeerLost):
            await asyncio.wait_for(take, 10)
        assert time.monotonic() - began < 5
        await client.close()


async def test_malformed_messages_are_refused_or_dropped_and_nothing_breaks(
    make_spec: SpecMaker,
) -> None:
    spec = make_spec()
    async with running(spec) as client:
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.DEALER)
        socket.connect(spec.endpoint)
        good = [bytes(frame) for frame in codec.encode(AwaitVersion(), 5)]
        closed = b"\x93" + bytes([SCHEMA_VERSION]) + b"\x07\xc0"
        for message in ([b""], [b"rubbish"], [closed, b"extra"], [*good, b"more"]):
            await socket.send_multipart(message)
        raw = codec.encode({"type": "Unheard"}, 8)
        await socket.send_multipart([bytes(frame) for frame in raw])
        numbers: set[int] = set()
        while len(numbers) < 3:
            frames = await asyncio.wait_for(socket.recv_multipart(), 5)
            envelope = codec.open_envelope(frames)
            assert isinstance(codec.decode_body(envelope, frames, Reply), RefusedReply)
            numbers.add(envelope.request_number)
        assert numbers == {5, 7, 8}
        assert (await client.stats()).counts == {}
        socket.close(linger=0)
        context.term()


async def test_a_repeat_of_an_answered_request_gets_the_same_answer(make_spec: SpecMaker) -> None:
    spec = make_spec()
    async with running(spec) as client:
        await client.put_prompts([ticket(uid) for uid in range(4)])
        await client.publish(manifest(0))
        first = await client.claim(version(0), 2, request_id="same")
        assert await client.claim(version(0), 2, request_id="same") == first
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.DEALER)
        socket.connect(spec.endpoint)
        frames = [bytes(frame) for frame in codec.encode(GetStats(), 3)]
        answers: list[bytes] = []
        for _ in range(2):
            await socket.send_multipart(frames)
            answers += await asyncio.wait_for(socket.recv_multipart(), 5)
        assert answers[0] == answers[1]
        assert msgspec.msgpack.decode(answers[0])[1] == 3
        socket.close(linger=0)
        context.term()


async def test_samples_finished_together_share_messages_and_each_hears_its_own_answer(
    make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    async with running(spec) as client:
        await client.put_prompts([ticket(uid) for uid in range(2)])
        await client.publish(manifest(0))
        claims = (await client.claim(version(0), 4)).claims
        sent: list[int] = []
        send = client.finish_many
        monkeypatch.setattr(
            client, "finish_many", lambda batch: (sent.append(len(batch)), send(batch))[1]
        )
        places = [
            (each.ticket.prompt.uid, i, each.lease_id) for each in claims for i in each.indices
        ]
        places[1] = (*places[1][:2], "9.9")  # a lease that never was
        answers = await asyncio.gather(
            *(client.finish(trajectory(uid, index), lease) for uid, index, lease in places),
            return_exceptions=True,
        )
        assert [isinstance(answer, Refused) for answer in answers] == [False, True, False, False]
        assert len(sent) < len(places) == sum(sent)
        assert (await client.stats()).counts["READY"] == 1


async def test_who_hands_in_while_the_connection_closes_is_told(make_spec: SpecMaker) -> None:
    spec = make_spec()
    async with running(spec) as client:
        stranger = BufferClient("ipc:///nowhere/buffer", spec.run_id, "worker-9")
        stranger._open_socket()
        waiting = [
            asyncio.create_task(stranger.finish(trajectory(0, index), "0.0")) for index in range(3)
        ]
        await asyncio.sleep(0.05)
        await stranger.close()
        for answer in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(answer, PeerLost)
        assert (await client.stats()).counts == {}


async def test_a_hand_in_that_never_began_is_told_of_the_close(make_spec: SpecMaker) -> None:
    async with running(make_spec()) as client:
        finish = asyncio.create_task(client.finish(trajectory(0, 0, (0,)), "lease"))
        await asyncio.sleep(0)  # `finish` waits; what it started has not run yet
        await client.close()
        async with asyncio.timeout(10):
            with pytest.raises(PeerLost, match="closed its connection"):
                await finish
