"""The child process in which a reward runs: frames come in on one pipe, scores go out on another.

Whatever the reward prints goes to the parent's stderr, so it cannot be taken for a reply. It dies
with its parent. Frames are a length (4 bytes, big-endian) and a msgpack body; never pickle.
"""

import ctypes
import faulthandler
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec

from ...buffer.errors import ConfigError
from ...buffer.records import Completion, Prompt, Record, Score
from ..config import RewardConfig
from .base import failed, load_reward

LENGTH = struct.Struct(">I")
MAX_REQUEST_BYTES = 64 << 20
MAX_REPLY_BYTES = 1 << 20
"""A reward that returns more (components without end) is recorded as failed."""
_PR_SET_PDEATHSIG = 1


class ScoreRequest(Record, frozen=True):
    """Completions to score in one call."""

    number: int
    samples: tuple[msgspec.Raw, ...]
    """Each a (Completion, Prompt)."""


class Ready(Record, frozen=True, tag=True):
    """The reward is loaded; this is what it declares."""

    batch_size: int
    cacheable: bool


class Unusable(Record, frozen=True, tag=True):
    """The reward cannot be loaded; the process ends."""

    message: str


class ScoreReply(Record, frozen=True, tag=True):
    """The answer to the request of this number; replies keep the order of requests."""

    number: int
    scores: tuple[Score, ...]


ChildMessage = Ready | Unusable | ScoreReply


def frame(body: bytes) -> bytes:
    """A body with its length before it."""
    return LENGTH.pack(len(body)) + body


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next body, or None when the other side closed the pipe."""
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(header)
    body = stream.read(length)
    return body if len(body) == length else None


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the pipes away from the standard descriptors, which the reward may read and print to.

    The copies are closed on exec, so a program the reward starts cannot hold them open.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, replies


def _die_with_parent(parent: int) -> None:
    """Ask Linux to kill us when the parent dies; elsewhere the closed pipe ends us when idle."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It died before we asked: nobody is left to read our replies.
        os._exit(1)


def _serve(requests: BinaryIO, replies: BinaryIO) -> int:
    """Load the reward, then score until the pipe closes. Returns the exit code."""
    encode = msgspec.msgpack.Encoder().encode
    decode = msgspec.msgpack.Decoder(ScoreRequest).decode

    def send(message: ChildMessage) -> None:
        replies.write(frame(encode(message)))
        replies.flush()

    config = RewardConfig.model_validate_json(read_frame(requests) or b"")
    try:
        reward = load_reward(config)
    except ConfigError as error:
        send(Unusable(message=str(error)))
        return error.exit_code
    limit_memory(config.memory_mb)
    decode_sample = msgspec.msgpack.Decoder(tuple[Completion, Prompt]).decode
    send(Ready(batch_size=reward.batch_size, cacheable=reward.cacheable))
    while (body := read_frame(requests)) is not None:
        request = decode(body)
        scores = reward.many([decode_sample(sample) for sample in request.samples])
        reply = ScoreReply(number=request.number, scores=tuple(map(_bounded, scores)))
        send(reply)
    return 0


def _bounded(score: Score) -> Score:
    """The score, unless it is too long to be sent."""
    if not score.components or len(msgspec.msgpack.encode(score)) <= MAX_REPLY_BYTES:
        return score
    return failed(f"the reward's score takes more than {MAX_REPLY_BYTES} bytes")


def limit_memory(megabytes: int) -> None:
    """Let this process, and each one that it starts, have so much more address space than now; what
    it asks for beyond that raises MemoryError."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """`python -m slipstream.rollout.rewards.process PARENT_PID`, started by `RewardPool`."""
    requests, replies = _take_pipes()
    _die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    sys.exit(_serve(requests, replies))


if __name__ == "__main__":
    main()
