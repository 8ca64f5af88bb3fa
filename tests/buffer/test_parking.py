"""A turn asks only the waiting requests that it may have answered, and misses none."""

import asyncio
import random

import pytest
from slipstream.buffer import client as client_module
from slipstream.buffer import messages
from slipstream.buffer.client import BufferClient
from slipstream.buffer.coordinator import Coordinator
from slipstream.buffer.errors import PeerLost, Refused
from slipstream.buffer.messages import Claims, ClaimSamples, RefusedReply, Request
from slipstream.buffer.parking import Parked, Parking
from slipstream.buffer.records import DropReason, SamplingParams
from slipstream.buffer.waits import Wait

from .conftest import SpecMaker, running
from .make import manifest, prompt, ticket, trajectory, version


class Clients:
    """Feeder, workers, learner and an evaluation, acting at random on one coordinator."""

    def __init__(self, coordinator: Coordinator, seed: int) -> None:
        self.coordinator, self.choice = coordinator, random.Random(seed)
        self.now, self.number, self.step, self.uid = 0.0, 0, 0, 0
        self.held: list[tuple[str, messages.Claim, int]] = []
        self.parked: list[Request] = []
        self.jobs = self.answered = self.left_alone = 0

    def ask(self, request: Request, final: bool = False) -> object:
        return self.coordinator.answer(request, self.now, final=final)

    def act(self) -> None:
        """One request that is not parked, or is when it has to wait."""
        kinds = ("put", "claim", "claim", "finish", "finish", "release", "die", "publish", "take",
                 "version", "evaluate", "silence")  # fmt: skip
        getattr(self, self.choice.choice(kinds))()

    def wait_or_hear(self, request: Request) -> None:
        reply = self.ask(request)
        if reply is None:
            self.parked.append(request)
        else:
            self.hear(request, reply)

    def hear(self, request: Request, reply: object) -> None:
        self.answered += 1
        if isinstance(reply, Claims) and isinstance(request, ClaimSamples):
            self.held += [(request.worker, c, i) for c in reply.claims for i in c.indices]
        elif isinstance(reply, messages.Batch):
            self.step = reply.step
            self.ask(messages.PublishVersion(manifest=manifest(self.step)))
        elif isinstance(reply, messages.Accepted):
            self.uid += reply.count

    def put(self) -> None:
        if not any(isinstance(r, messages.PutPrompts) for r in self.parked):
            tickets = tuple(ticket(self.uid + i) for i in range(2))
            self.wait_or_hear(messages.PutPrompts(tickets=tickets, wait_s=9))

    def claim(self) -> None:
        self.number += 1
        step = max(0, self.step - self.choice.choice([0, 0, 1]))
        self.wait_or_hear(
            ClaimSamples(worker=f"worker-{self.number % 3}", serving=version(step), wait_s=9,
                         max_samples=self.choice.choice([0, 1, 4]), request_id=str(self.number))
        )  # fmt: skip

    def finish(self) -> None:
        if self.held:
            _, claim, index = self.held.pop(self.choice.randrange(len(self.held)))
            uid, value = claim.ticket.prompt.uid, self.choice.choice([0.0, 1.0])
            sample = trajectory(uid, index, (self.step,) * 2, attempt=claim.attempt, value=value)
            self.ask(messages.FinishSamples(trajectories=(sample,), lease_ids=(claim.lease_id,)))

    def release(self) -> None:
        if self.held:
            _, claim, index = self.held.pop()
            reasons: list[DropReason] = ["expired", "quarantined"]
            reason = self.choice.choice(reasons)
            self.ask(
                messages.ReleaseSamples(uid=claim.ticket.prompt.uid, attempt=claim.attempt,
                                        indices=(index,), lease_id=claim.lease_id, reason=reason)
            )  # fmt: skip

    def die(self) -> None:
        if self.choice.random() < 0.3:
            self.number += 1
            pid = self.choice.choice([0, self.number])
            self.ask(messages.Hello(run_id="run", name=f"worker-{self.number % 3}", pid=pid))

    def publish(self) -> None:
        self.ask(messages.CheckpointSaved(version=version(self.step)))

    def take(self) -> None:
        if not any(isinstance(r, messages.TakeGroups) for r in self.parked):
            step = self.step + 1
            self.wait_or_hear(messages.TakeGroups(step=step, request_id=str(step), wait_s=9))

    def version(self) -> None:
        self.wait_or_hear(messages.AwaitVersion(after=version(self.step), wait_s=9))

    def evaluate(self) -> None:
        if self.choice.random() < 0.2:
            self.jobs += 1
            self.ask(
                messages.PutEvaluation(
                    job_id=str(self.jobs), version=version(self.step), samples_per_prompt=1,
                    prompts=(prompt((1 << 40) + self.jobs),), sampling=SamplingParams(),
                )
            )  # fmt: skip

    def silence(self) -> None:
        self.now += self.choice.choice([0.05, 1.0, 30.0])
        self.coordinator.tick(self.now)

    def turn_ends(self) -> None:
        """Ask what is woken, to the end; then all others would have been asked in vain."""
        seen = -1
        while (kinds := self.coordinator.woken(self.now, seen)) is not None:
            seen = len(self.coordinator.replay.outbox)
            for request in [r for r in self.parked if type(r) in kinds]:
                if (reply := self.ask(request)) is not None:
                    self.parked.remove(request)
                    self.hear(request, reply)
        for request in self.parked:
            if not isinstance(request, messages.TakeGroups):  # which is asked again within 0.1 s
                assert self.ask(request) is None, request
                self.left_alone += 1
        self.coordinator.commit()


@pytest.mark.parametrize("bound", [0, 1])
def test_no_waiting_request_that_could_be_answered_is_left_waiting(
    make_spec: SpecMaker, bound: int
) -> None:
    spec = make_spec({"max_staleness_steps": bound, "max_waiting_prompts": 6, "lease_s": 20})
    coordinator = Coordinator(spec, 0.0)
    clients = Clients(coordinator, seed=bound)
    clients.ask(messages.PublishVersion(manifest=manifest(0)))
    for _ in range(3000):
        clients.act()
        clients.turn_ends()
    assert clients.step > 10
    assert clients.answered > 500
    assert clients.left_alone > 500
    coordinator.close()


def test_claims_that_are_alike_get_work_or_none_alike(make_spec: SpecMaker) -> None:
    coordinator = Coordinator(make_spec({"max_staleness_steps": 0}), 0.0)
    for request in (
        messages.PublishVersion(manifest=manifest(0)),
        messages.PutPrompts(tickets=tuple(ticket(uid) for uid in range(9))),
    ):
        coordinator.answer(request, 0.0, final=True)
    assert coordinator.claims_alike
    granted = []
    for number in range(6):
        claim = ClaimSamples(
            worker=f"w{number}", serving=version(0), max_samples=1, request_id=str(number)
        )
        reply = coordinator.answer(claim, 0.0, final=True)
        assert isinstance(reply, Claims | RefusedReply)
        granted.append(isinstance(reply, Claims) and bool(reply.claims))
    assert granted == [True] * 4 + [False] * 2, "P groups of two samples at S = 0"
    coordinator.answer(messages.Hello(run_id="run", name="w0", pid=7), 0.0, final=True)
    assert not coordinator.claims_alike, "the prompt it held is a suspect"
    coordinator.close()


def test_parked_requests_are_kept_by_kind_in_order_and_each_is_due_once() -> None:
    parking = Parking()

    def park(number: int, request: Request, since_s: float, deadline_s: float) -> None:
        wait = Wait(owner="", what="", since_s=since_s, deadline_s=deadline_s)
        parking.put((b"", number), Parked(request=request, wait=wait))

    park(1, messages.AwaitVersion(), 0.0, 9.0)
    park(2, messages.GetStats(), 1.0, 1.0)
    park(3, messages.AwaitVersion(), 2.0, 2.0)
    assert [address[1] for address, _ in parking.of((messages.AwaitVersion,))] == [1, 3]
    assert [address[1] for address, _ in parking.due(4.0)] == [2, 3]
    parking.remove((b"", 2))
    parking.remove((b"", 3))
    assert parking.due(8.0) == []
    assert [address[1] for address, _ in parking.due(9.0)] == [1]
    assert len(parking) == 1
    with pytest.raises(KeyError):
        parking.remove((b"", 2))


def test_refusals_end_a_wait(make_spec: SpecMaker) -> None:
    coordinator = Coordinator(make_spec(), 0.0)
    request = ClaimSamples(worker="w", serving=version(3), max_samples=1, request_id="a", wait_s=9)
    assert isinstance(coordinator.answer(request, 0.0, final=False), RefusedReply)
    with pytest.raises(Refused):
        coordinator.replay.claim("w", version(3), 1, "b", 0.0)
    coordinator.close()


def held_out(number: int) -> messages.PutEvaluation:
    """An evaluation of one sample for each of some prompts."""
    prompts = tuple(prompt((1 << 40) + i) for i in range(number))
    return messages.PutEvaluation(
        job_id="job", version=version(0), samples_per_prompt=1, prompts=prompts,
        sampling=SamplingParams(),
    )  # fmt: skip


def test_claims_that_a_suspect_held_back_are_woken_when_it_is_cleared(
    make_spec: SpecMaker,
) -> None:
    coordinator = Coordinator(make_spec(), 0.0)

    def claim(name: str, max_samples: int) -> object:
        request = ClaimSamples(
            worker="w", serving=version(0), max_samples=max_samples, request_id=name, wait_s=9
        )
        return coordinator.answer(request, 0.0, final=False)

    def woken() -> bool:
        kinds = coordinator.woken(0.0, -1)
        assert kinds is not None
        return ClaimSamples in kinds

    for request in (
        messages.Hello(run_id="run", name="w", pid=1),
        messages.PublishVersion(manifest=manifest(0)),
        messages.PutPrompts(tickets=(ticket(0), ticket(1))),
    ):
        coordinator.answer(request, 0.0, final=True)
    assert isinstance(claim("a", 2), Claims)
    coordinator.answer(messages.Hello(run_id="run", name="w", pid=2), 0.0, final=True)
    alone = claim("b", 4)
    assert isinstance(alone, Claims)
    assert [each.ticket.prompt.uid for each in alone.claims] == [0]
    assert claim("c", 2) is None
    assert woken()
    coordinator.commit()
    finished = messages.FinishSamples(
        trajectories=(trajectory(0, 0, attempt=1),), lease_ids=(alone.claims[0].lease_id,)
    )
    done = coordinator.answer(finished, 0.0, final=True)
    assert isinstance(done, messages.Done)
    assert not done.refused
    assert woken()
    others = claim("c", 2)
    assert isinstance(others, Claims)
    assert [each.ticket.prompt.uid for each in others.claims] == [1]
    coordinator.commit()
    assert not woken(), "there is no suspect any more"
    coordinator.close()


def test_a_parked_claim_is_no_sign_of_life_and_its_lease_begins_with_the_grant(
    make_spec: SpecMaker,
) -> None:
    coordinator = Coordinator(make_spec({"lease_s": 10}), 0.0)
    counts = coordinator.replay.state.counts

    def claim(worker: str, name: str, now: float, max_samples: int, *, again: bool) -> object:
        request = ClaimSamples(
            worker=worker, serving=version(0), max_samples=max_samples, request_id=name, wait_s=99
        )
        return coordinator.answer(request, now, final=False, again=again)

    for request in (
        messages.PublishVersion(manifest=manifest(0)),
        messages.PutPrompts(tickets=(ticket(0),)),
    ):
        coordinator.answer(request, 0.0, final=True)
    assert isinstance(claim("w", "a", 0.0, 2, again=False), Claims)
    assert claim("w", "b", 1.0, 2, again=False) is None
    assert claim("w", "b", 9.0, 2, again=True) is None
    coordinator.tick(11.5)
    assert counts["WAITING"] == 1
    assert isinstance(claim("w", "b", 20.0, 2, again=True), Claims)
    coordinator.tick(29.0)
    assert counts["INFLIGHT"] == 1
    coordinator.tick(31.0)
    assert counts["WAITING"] == 1

    assert claim("e", "c", 40.0, 0, again=False) is None
    coordinator.answer(held_out(1), 40.0, final=True)
    assert isinstance(claim("e", "c", 60.0, 0, again=True), Claims)
    coordinator.tick(69.0)
    assert coordinator.evaluations.workers() == {"e"}
    coordinator.tick(71.0)
    assert coordinator.evaluations.workers() == set()
    coordinator.close()


async def until_a_claim_waits(client: BufferClient) -> None:
    async with asyncio.timeout(10):
        while not any("ClaimSamples" in line for line in (await client.stats()).waits):
            await asyncio.sleep(0.01)


async def test_a_dead_process_is_granted_nothing_once_its_successor_is_there(
    make_spec: SpecMaker,
) -> None:
    spec = make_spec()
    async with running(spec, "learner") as learner:
        await learner.publish(manifest(0))
        dead = BufferClient(spec.endpoint, "run", "worker-0")
        await dead.connect()
        claim = asyncio.create_task(dead.claim(version(0), 0, wait_s=60))
        await until_a_claim_waits(learner)
        await dead.close()
        with pytest.raises(PeerLost):
            await claim
        async with BufferClient(spec.endpoint, "run", "worker-0") as successor:
            await successor.call(messages.Hello(run_id="run", name="worker-0", pid=1))
            await learner.call(held_out(3))
            claims = await successor.claim(version(0), 0, wait_s=10)
            assert len(claims.evaluations) == 3


async def test_a_living_process_that_was_taken_for_lost_asks_again(
    make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RESEND_S", 0.1)
    spec = make_spec()
    async with (
        running(spec, "supervisor") as supervisor,
        BufferClient(spec.endpoint, "run", "worker-0") as worker,
    ):
        await supervisor.publish(manifest(0))
        claim = asyncio.create_task(worker.claim(version(0), 2, wait_s=60))
        await until_a_claim_waits(supervisor)
        await supervisor.lost("worker-0")
        await supervisor.put_prompts([ticket(0)])
        assert len((await asyncio.wait_for(claim, 10)).claims) == 1
