"""A turn asks only the waiting requests that it may have answered, and misses none."""

import random

import pytest
from slipstream.buffer import messages
from slipstream.buffer.coordinator import Coordinator
from slipstream.buffer.errors import Refused
from slipstream.buffer.messages import Claims, ClaimSamples, RefusedReply, Request
from slipstream.buffer.parking import Parked, Parking
from slipstream.buffer.records import DropReason, SamplingParams
from slipstream.buffer.waits import Wait

from .conftest import SpecMaker
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
