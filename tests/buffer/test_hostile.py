"""What a broken or hostile peer can send: refused, counted, forgotten."""

import random
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import psutil
import pytest
from slipstream.buffer import codec
from slipstream.buffer.messages import (
    AwaitVersion,
    CheckpointSaved,
    ClaimSamples,
    ExtendGroup,
    FinishEvaluation,
    FinishSamples,
    GetStats,
    Heartbeat,
    Hello,
    PublishVersion,
    PutEvaluation,
    PutPrompts,
    RefusedReply,
    ReleaseSamples,
    Reply,
    Request,
    TakeGroups,
)
from slipstream.buffer.records import SamplingParams, Score
from slipstream.buffer.service import BufferService

from .conftest import SpecMaker, running
from .make import manifest, prompt, ticket, trajectory, version

NUMBERS = [-1, 2**40, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]


def requests() -> list[Request]:
    """One of each kind that changes or reads something (all but `CloseRun`)."""
    return [
        Hello(run_id="run", name="worker-0", pid=1),
        PutPrompts(tickets=(ticket(0), ticket(1)), wait_s=1.0),
        ExtendGroup(uid=0, sizing=ticket(0, 3).sizing),
        ClaimSamples(worker="w", serving=version(0), max_samples=9, request_id="a", wait_s=1.0),
        FinishSamples(trajectories=(trajectory(0, 0),), lease_ids=("0.0",)),
        FinishSamples(trajectories=(trajectory(0, 0), trajectory(1, 1)), lease_ids=("0.0", "0.1")),
        ReleaseSamples(uid=0, attempt=0, indices=(0, 1), lease_id="0.0", reason="expired"),
        Heartbeat(worker="w", serving=version(0), stats={"running": 1.0}),
        TakeGroups(step=1, request_id="a", wait_s=1.0),
        PublishVersion(manifest=manifest(0)),
        AwaitVersion(after=version(0), wait_s=1.0),
        CheckpointSaved(version=version(0)),
        PutEvaluation(
            job_id="job",
            version=version(0),
            prompts=(prompt(1 << 40),),
            samples_per_prompt=2,
            sampling=SamplingParams(),
        ),
        FinishEvaluation(
            job_id="job", uid=1 << 40, index=0, text="", score=Score(value=1.0), num_tokens=1
        ),
        GetStats(),
    ]


def mutate(frames: list[bytes], choice: random.Random) -> list[bytes]:
    """Bytes flipped, cut or repeated; frames lost, doubled or swapped; numbers made absurd."""
    broken = list(frames)
    for _ in range(choice.choice([1, 1, 2, 8])):
        at = choice.randrange(len(broken)) if broken else 0
        match choice.randrange(7):
            case 0 if broken and broken[at]:
                raw = bytearray(broken[at])
                raw[choice.randrange(len(raw))] = choice.randrange(256)
                broken[at] = bytes(raw)
            case 1 if broken:
                broken[at] = broken[at][: choice.randrange(len(broken[at]) + 1)]
            case 2 if broken:
                broken[at] += choice.randbytes(choice.randrange(64))
            case 3 if broken:
                del broken[at]
            case 4 if broken:
                broken.insert(at, broken[at])
            case 5:
                choice.shuffle(broken)
            case _ if broken:
                broken[0] = absurd(broken[0], choice)
    return broken


def absurd(header: bytes, choice: random.Random) -> bytes:
    """The header with one number or text of its body replaced by one that no honest peer sends."""
    try:
        envelope: Any = msgspec.msgpack.decode(header)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return header
    places = list(leaves(envelope))
    if places:
        holder, key = choice.choice(places)
        holder[key] = choice.choice([*NUMBERS, float("nan"), float("inf"), "", "x" * 999, None, []])
    try:
        return msgspec.msgpack.encode(envelope)
    except (msgspec.MsgspecError, OverflowError, TypeError):
        return header


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from leaves(inner)


def bombard(service: BufferService, number: int, seed: int) -> tuple[int, int]:
    """Mutated messages into the service, each answered, parked, refused or dropped at once."""
    choice = random.Random(seed)
    whole = [[bytes(f) for f in codec.encode(r, 7)] for r in requests()]
    refused = answered = 0
    for count in range(number):
        sent = mutate(choice.choice(whole), choice)
        before = service.malformed + service.coordinator.refused
        peer = choice.randbytes(4)  # each from somebody else: nothing is answered from memory
        replies = service._receive([memoryview(f) for f in [peer, *sent]])
        for _, frames in replies:
            reply = codec.decode(frames, Reply)
            if isinstance(reply, RefusedReply):
                assert service.malformed + service.coordinator.refused == before + 1
                refused += 1
            else:
                answered += 1
        if count % 64 == 0:
            service.coordinator.tick(0.0)
            service.coordinator.commit()
            service._ask_parked(1e9)
    service._ask_parked(1e9)  # all waits are over: who still parks would park for ever
    return refused, answered


@pytest.mark.parametrize(
    "number", [3_000, pytest.param(100_000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_mutated_frames_are_refused_counted_and_forgotten(
    make_spec: SpecMaker, number: int
) -> None:
    service = BufferService(make_spec({"max_waiting_prompts": 8}))
    for request in requests():
        service.coordinator.answer(request, 0.0, final=True)
    bombard(service, 500, seed=1)
    process = psutil.Process()
    before = process.memory_info().rss
    refused, answered = bombard(service, number, seed=2)
    assert process.memory_info().rss - before < 64 << 20
    assert service.malformed + service.coordinator.refused > number / 4
    assert refused > number / 8
    assert answered, "some mutations leave a valid message"
    assert not service._parked
    service.coordinator.close()


async def test_random_bytes_on_the_socket_hurt_nobody(make_spec: SpecMaker) -> None:
    spec = make_spec()
    choice = random.Random(0)
    async with running(spec) as client:
        await client.publish(manifest(0))
        for _ in range(50):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(spec.endpoint.removeprefix("ipc://"))
                raw.sendall(choice.randbytes(choice.randrange(1, 4096)))
        assert (await client.await_version()).manifest == manifest(0)
