"""The wire format: what goes in comes out, and nothing else gets in."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.buffer import codec
from slipstream.buffer.errors import WireError
from slipstream.buffer.messages import (
    SCHEMA_VERSION,
    Batch,
    Claims,
    Envelope,
    FinishSamples,
    Heartbeat,
    ProofLine,
    Reply,
    Request,
    TakeGroups,
)
from slipstream.buffer.records import RaggedArray, TrainingSample, Trajectory, TrajectoryGroup

from .make import ticket, trajectory, version


def rich_trajectory() -> Trajectory:
    """Every kind of array: float64 log-probs, a ragged extra, a bool mask."""
    plain = trajectory(7, 1, (3, 3, 4), value=0.25)
    kept = RaggedArray(
        values=np.array([5, 9, 2, 8], dtype=np.int32), offsets=np.array([0, 1, 1, 4])
    )
    return msgspec.structs.replace(
        plain,
        behaviour_logprobs=np.array([-0.1, -1e-300, -np.inf]),
        extras={"kept_ids": kept},
    )


def plain_bytes(frames: list) -> list[bytes]:
    """As a socket delivers them."""
    return [bytes(frame) for frame in frames]


def assert_same(left: object, right: object) -> None:
    """Equal records, arrays compared bit by bit with their dtypes."""
    assert type(left) is type(right)
    if isinstance(left, np.ndarray):
        assert isinstance(right, np.ndarray)
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.tobytes() == right.tobytes()
    elif isinstance(left, msgspec.Struct):
        for name in left.__struct_fields__:
            assert_same(getattr(left, name), getattr(right, name))
    elif isinstance(left, dict):
        assert isinstance(right, dict)
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, tuple):
        assert isinstance(right, tuple)
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def a_batch() -> Batch:
    """A reply with many arrays."""
    samples = tuple(
        TrainingSample(trajectory=trajectory(3, i, (0,) * (i + 1)), trained=True) for i in range(3)
    )
    group = TrajectoryGroup(
        prompt=ticket(3).prompt, attempt=0, sizing=ticket(3).sizing, samples=samples
    )
    proof = ProofLine(
        step=1,
        bound=1,
        max_lag=0,
        violations=0,
        orphaned_tokens=0,
        lag_counts={0: 6},
        trained_tokens=6,
        trimmed_tokens=0,
        mixed_trajectories=0,
        trained_trajectories=3,
        dropped={"stale": 2},
        length_bias=1.0,
    )
    return Batch(step=1, groups=(group,), proof=proof, journal_sequence=9)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (FinishSamples(trajectories=(rich_trajectory(),), lease_ids=("0.1",)), Request),
        (TakeGroups(step=4, request_id="a", wait_s=1.5), Request),
        (Heartbeat(worker="worker-0", serving=version(3), stats={"tokens": 1.0}), Request),
        (a_batch(), Reply),
        (Claims(closing=True), Reply),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_message_comes_out_as_it_went_in(body: object, kind: object) -> None:
    frames = plain_bytes(codec.encode(body, 17))
    assert codec.open_envelope(frames).request_number == 17
    assert_same(codec.decode(frames, kind), body)
    assert_same(codec.decode(codec.unpack(b"".join(codec.pack(frames))), kind), body)


@given(
    dtype=st.sampled_from(sorted(codec.DTYPES)),
    shape=st.lists(st.integers(0, 4), max_size=3),
    data=st.data(),
)
def test_an_array_of_any_accepted_dtype_and_shape_survives(
    dtype: str, shape: list[int], data: st.DataObject
) -> None:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = data.draw(st.binary(min_size=size, max_size=size))
    array = np.frombuffer(raw, np.uint8)
    array = (array % 2 if dtype == "|b1" else array).view(dtype).reshape(shape)
    record = RaggedArray(values=array, offsets=np.zeros(0))
    assert_same(codec.decode(plain_bytes(codec.encode(record)), RaggedArray), record)


def test_decoded_arrays_are_read_only_views_of_their_frames() -> None:
    frames = plain_bytes(codec.encode(trajectory(0, 0)))
    decoded = codec.decode(frames, Trajectory)
    assert not decoded.token_ids.flags.writeable
    assert np.shares_memory(decoded.token_ids, np.frombuffer(frames[1], np.uint8))


def test_encoding_copies_no_large_array() -> None:
    large = np.zeros(codec.OWN_FRAME_BYTES, np.uint8)
    frames = codec.encode(RaggedArray(values=large, offsets=np.zeros(1)))
    assert len(frames) == 3, "each of the two kinds has its frame"
    assert np.shares_memory(np.frombuffer(frames[1], np.uint8), large)


def test_small_arrays_share_a_frame_and_large_ones_do_not() -> None:
    small, large = np.arange(3, dtype=np.int8), np.arange(codec.OWN_FRAME_BYTES // 4, dtype="<i4")
    for order in ([small] * 3, [small, large, small], [large, large, small], [small, small, large]):
        frames = plain_bytes(codec.encode(order))
        decoded = codec.decode(frames, list[np.ndarray])
        for one, other in zip(order, decoded, strict=True):
            assert_same(one, other)
        sizes = [len(frame) for frame in frames[1:]]
        assert sum(sizes) == sum(a.nbytes if a is large else 8 for a in order)


def test_arrays_that_are_not_contiguous_are_sent_in_order() -> None:
    record = RaggedArray(values=np.arange(12).reshape(3, 4).T, offsets=np.arange(6)[::2])
    assert_same(
        codec.decode(plain_bytes(codec.encode(record)), RaggedArray),
        RaggedArray(
            values=np.ascontiguousarray(record.values),
            offsets=np.ascontiguousarray(record.offsets),
        ),
    )


def test_numpy_scalars_arrive_as_numbers() -> None:
    stats: dict[str, Any] = {"a": np.float32(0.5), "b": np.int64(3)}
    heartbeat = Heartbeat(worker="w", serving=None, stats=stats)
    assert codec.decode(codec.encode(heartbeat), Request).stats == {"a": 0.5, "b": 3}


@pytest.mark.parametrize(
    "values",
    [np.array(["text"]), np.array([object()]), np.zeros(2, dtype=">i4"), np.zeros((1,) * 5)],
    ids=["text", "object", "big endian", "five dimensions"],
)
def test_other_arrays_are_not_sent(values: np.ndarray) -> None:
    with pytest.raises(WireError):
        codec.encode(RaggedArray(values=values, offsets=np.zeros(0)))


def test_another_schema_is_refused_with_both_numbers() -> None:
    frame = msgspec.msgpack.encode(Envelope(schema=99, request_number=1, body=msgspec.Raw(b"\xc0")))
    with pytest.raises(WireError, match=f"schema 99 .* speaks {SCHEMA_VERSION}"):
        codec.open_envelope([frame])


MESSAGE = plain_bytes(
    codec.encode(FinishSamples(trajectories=(rich_trajectory(),), lease_ids=("0.1",)), 3)
)
STORED = b"".join(codec.pack(MESSAGE))


def decode_or_refuse(frames: list[bytes]) -> None:
    """Whatever the input, decoding gives a valid record or `WireError`."""
    try:
        body = codec.decode(frames, Request)
    except WireError:
        return
    assert isinstance(body, msgspec.Struct)


@settings(max_examples=1500)
@given(frame=st.integers(0, len(MESSAGE) - 1), data=st.data())
def test_a_mutated_message_is_decoded_or_refused(frame: int, data: st.DataObject) -> None:
    mutated = bytearray(MESSAGE[frame])
    for _ in range(data.draw(st.integers(1, 3))):
        if mutated:
            position = data.draw(st.integers(0, len(mutated) - 1))
            mutated[position] = data.draw(st.integers(0, 255))
    frames = [*MESSAGE]
    frames[frame] = bytes(mutated)
    decode_or_refuse(frames)


@pytest.mark.parametrize("frame", range(len(MESSAGE)))
def test_every_truncation_of_a_frame_is_refused(frame: int) -> None:
    for length in range(len(MESSAGE[frame])):
        frames = [*MESSAGE]
        frames[frame] = MESSAGE[frame][:length]
        with pytest.raises(WireError):
            codec.decode(frames, Request)


@given(st.permutations(range(len(MESSAGE))), st.integers(0, len(MESSAGE)))
def test_frames_lost_or_out_of_order_are_decoded_or_refused(order: list[int], kept: int) -> None:
    decode_or_refuse([MESSAGE[number] for number in order[:kept]])


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=60), max_size=4))
def test_random_bytes_are_refused(frames: list[bytes]) -> None:
    decode_or_refuse(frames)


def test_frames_that_nothing_uses_are_refused() -> None:
    with pytest.raises(WireError, match="frames were sent"):
        codec.decode([*MESSAGE, b"smuggled"], Request)


def test_deep_nesting_is_refused() -> None:
    body = msgspec.Raw(b"\x91" * 100_000 + b"\x01")
    envelope = Envelope(schema=SCHEMA_VERSION, request_number=1, body=body)
    with pytest.raises(WireError):
        codec.decode([msgspec.msgpack.encode(envelope)], Request)


def test_a_length_that_is_not_there_allocates_nothing() -> None:
    huge = b"\xdd\xff\xff\xff\xff"
    envelope = b"\x93" + bytes([SCHEMA_VERSION]) + b"\x01" + huge
    with pytest.raises(WireError):
        codec.decode([envelope], Request)


def test_booleans_are_zero_or_one() -> None:
    frames = plain_bytes(codec.encode(RaggedArray(values=np.ones(3, bool), offsets=np.zeros(1))))
    frames[1] = b"\x00\x01\x02"
    with pytest.raises(WireError, match="boolean"):
        codec.decode(frames, RaggedArray)


@settings(max_examples=500)
@given(st.integers(0, len(STORED) - 1), st.integers(0, 255), st.booleans())
def test_a_mutated_stored_payload_is_cut_or_refused(position: int, value: int, cut: bool) -> None:
    mutated = bytearray(STORED)
    mutated[position] = value
    payload = bytes(mutated[:position]) if cut else bytes(mutated)
    try:
        frames = codec.unpack(payload)
    except WireError:
        return
    decode_or_refuse([bytes(frame) for frame in frames])
