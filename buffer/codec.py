"""How records become frames: one msgpack header, then the numpy arrays as raw frames.

    frame 0   [schema, request number, body]     body: msgpack, an array is [frame, dtype, shape]
    frame 1.. the arrays' bytes, little-endian, C order, in the order of the body

An array of `OWN_FRAME_BYTES` or more is a frame of its own, sent from where it lies. Smaller ones
share a frame, each on a multiple of 8 bytes: a frame costs a socket more than the copy of a small
array. A decoded array is a read-only view of its frame, never a copy. Decoding is bounded (frames,
bytes, dtypes, dimensions) and strict (every frame is used to its end); whatever is wrong with the
input, the caller sees `WireError`.
"""

import functools
import struct
import threading
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from .errors import WireError
from .messages import SCHEMA_VERSION, Envelope

Frame = bytes | bytearray | memoryview
"""Anything with the buffer protocol that holds contiguous bytes."""

MAX_FRAMES = 1 << 18
"""A batch of 512 groups x 32 samples x 10 arrays fits."""
MAX_HEADER_BYTES = 1 << 28
"""Texts and gold answers of a large batch; bounds what one header may make us build."""
MAX_TOTAL_BYTES = 1 << 32
MAX_DIMENSIONS = 4
OWN_FRAME_BYTES = 1 << 16
COPIED_BYTES = 1 << 12
"""Below this a copy costs less than a view; the frame that small arrays share copies both."""

DTYPES = {
    name: np.dtype(name)
    for name in ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8")
}
"""No object, string or structured arrays: their bytes could mean more than numbers."""

PARKED = msgspec.Raw(b"\xc0")
"""The body (nil) with which the service answers the repeat of a request that it holds parked."""


def encode(body: Any, number: int = 0) -> list[Frame]:
    """Return the frames of a message.

    Args:
        body: a record, or anything msgspec encodes, holding numpy arrays of `DTYPES`.
        number: pairs a reply with its request.
    Raises:
        WireError: the body holds something that has no place on the wire.
    """
    frames: list[list[Frame]] = []
    shared = False  # whether the last frame takes more arrays

    def array_to_frame(value: Any) -> Any:
        nonlocal shared
        if isinstance(value, np.generic):
            return value.item()
        if not isinstance(value, np.ndarray):
            raise WireError(f"{type(value).__name__} has no place on the wire")
        if value.dtype.str not in DTYPES or value.ndim > MAX_DIMENSIONS:
            raise WireError(f"arrays of {value.dtype}, {value.ndim} dimensions, are not sent")
        small = value.nbytes < OWN_FRAME_BYTES
        if not (small and shared):
            frames.append([])
        shared = small
        if value.nbytes < COPIED_BYTES:
            frames[-1] += value.tobytes(), bytes(-value.nbytes % 8)
        else:
            frames[-1].append(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            if small:
                frames[-1].append(bytes(-value.nbytes % 8))
        return len(frames), value.dtype.str, value.shape

    try:
        raw = msgspec.msgpack.encode(body, enc_hook=array_to_frame)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"cannot encode {type(body).__name__}: {error}") from error
    envelope = Envelope(schema=SCHEMA_VERSION, request_number=number, body=msgspec.Raw(raw))
    arrays = [pieces[0] if len(pieces) == 1 else b"".join(pieces) for pieces in frames]
    return [msgspec.msgpack.encode(envelope), *arrays]


def decode(frames: Sequence[Frame], body_type: Any) -> Any:
    """Return the body of a message as `body_type` (a record type or a union of them).

    Raises:
        WireError: anything is wrong with the frames.
    """
    return decode_body(open_envelope(frames), frames, body_type)


def open_envelope(frames: Sequence[Frame]) -> Envelope:
    """Check bounds and schema and return the envelope, its body still closed.

    Raises:
        WireError: no or too many frames, too many bytes, not an envelope, or another schema.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise WireError(f"{len(frames)} frames; 1 to {MAX_FRAMES} are accepted")
    sizes = [memoryview(frame).nbytes for frame in frames]
    if sizes[0] > MAX_HEADER_BYTES or sum(sizes) > MAX_TOTAL_BYTES:
        raise WireError(f"message of {sum(sizes)} bytes, header of {sizes[0]}, is too large")
    try:
        envelope = msgspec.msgpack.decode(frames[0], type=Envelope)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"not an envelope: {error}") from error
    if envelope.schema != SCHEMA_VERSION:
        raise WireError(f"schema {envelope.schema} was sent, this side speaks {SCHEMA_VERSION}")
    return envelope


def decode_body(envelope: Envelope, frames: Sequence[Frame], body_type: Any) -> Any:
    """Decode an opened envelope.

    Raises:
        WireError: the body does not follow `body_type`, or its arrays do not fit their frames.
    """
    decoder = _decoder(body_type)
    message = _open.message = _Message([memoryview(frame).toreadonly() for frame in frames])
    try:
        body = decoder.decode(envelope.body)
    except (msgspec.MsgspecError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise WireError(f"not a valid message: {error}") from error
    finally:
        _open.message = _Message(())
    if message.number != len(frames) - 1 or message.rest():
        raise WireError(
            f"{len(frames) - 1} array frames were sent, {message.number} are used, "
            f"{message.rest()} bytes of the last are left"
        )
    return body


class _Message:
    """The frames of the message that a thread decodes, and how far it is."""

    __slots__ = ("end", "frames", "number")

    def __init__(self, frames: Sequence[memoryview]) -> None:
        self.frames, self.number, self.end = frames, 0, 0

    def rest(self) -> int:
        """Bytes of the present frame that no array has taken."""
        return self.frames[self.number].nbytes - self.end if self.number else 0


class _Open(threading.local):
    message = _Message(())


_open = _Open()


@functools.cache
def _decoder(body_type: Any) -> "msgspec.msgpack.Decoder[Any]":
    return msgspec.msgpack.Decoder(body_type, dec_hook=_frame_to_array)


def _frame_to_array(wanted: type, value: Any) -> np.ndarray:
    """Build the array that `[frame, dtype, shape]` stands for; frames come in order.

    Called for each array of a batch: whatever else `value` may be, numpy refuses it.
    """
    if wanted is not np.ndarray:
        raise ValueError(f"{wanted} is not decoded")
    number, dtype, shape = value
    message = _open.message
    if number != message.number:
        if number != message.number + 1 or number >= len(message.frames) or message.rest():
            raise ValueError(f"array frame {number} of {len(message.frames) - 1} is out of order")
        message.number, message.end = number, 0
    if number == 0 or dtype not in DTYPES or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"arrays of {dtype!r} and shape {shape} are not accepted")
    frame, start = message.frames[number], message.end
    array = np.ndarray(shape, DTYPES[dtype], frame, start)
    size = array.nbytes
    message.end = start + (size if size >= OWN_FRAME_BYTES else size + -size % 8)
    if dtype == "|b1" and bytes(frame[start : start + size]).translate(None, b"\0\1"):
        raise ValueError("a boolean array holds bytes other than 0 and 1")
    return array


_LENGTH = struct.Struct("<I")


def pack(frames: Sequence[Frame]) -> list[Frame]:
    """The frames as one stored payload: count, lengths, then the bytes (to be joined)."""
    sizes = [memoryview(frame).nbytes for frame in frames]
    table = b"".join(_LENGTH.pack(number) for number in (len(frames), *sizes))
    return [table, *frames]


def unpack(payload: Frame) -> list[Frame]:
    """Cut a stored payload back into views of its frames.

    Raises:
        WireError: counts or lengths do not add up to the payload.
    """
    view = memoryview(payload)
    count = _LENGTH.unpack_from(view)[0] if view.nbytes >= 4 else 0
    start = 4 * (count + 1)
    if not 1 <= count <= MAX_FRAMES or view.nbytes < start:
        raise WireError(f"a stored payload of {view.nbytes} bytes cannot hold {count} frames")
    frames: list[Frame] = []
    for (size,) in _LENGTH.iter_unpack(view[4:start]):
        frames.append(view[start : start + size])
        start += size
    if start != view.nbytes:
        raise WireError(f"stored frames end at {start} of {view.nbytes} bytes")
    return frames
