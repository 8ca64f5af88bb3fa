"""Weights between hosts: what is said, and who gets which chunk from whom.

    receiver -> publisher   AskPlan -> Plan          the digest of every chunk
    receiver -> publisher   AskSources -> Sources    what I have now; what do I fetch next, where?
    receiver -> anybody     AskChunk -> Chunk        refused by the receiver when its digest differs

A publisher hands each chunk out once and then names those who have verified it, so what it sends
does not grow with the number of receivers (Source: the tracker and rarest-first rule of BitTorrent,
BEP 3; here the tracker picks, because it knows who has what).
"""

import zlib
from collections import Counter
from collections.abc import Iterable

import msgspec
import numpy as np
import xxhash

from .records import Record

CHUNK_BYTES = 1 << 22
MAX_COPIES = 2
"""A publisher sends no chunk more often while somebody else has it or is about to."""
MAX_LOAD = 4
"""Chunks that one relay is asked for at once."""
SILENCE_S = 30.0
"""A receiver that has said nothing for so long will not deliver what it was given."""


class AskPlan(Record, tag=True):
    """How is this shard cut?"""

    digest: str
    """Of the shard: its name between hosts."""


class Plan(Record, tag=True):
    """The chunks of a shard, `CHUNK_BYTES` each but the last."""

    num_bytes: int
    digests: np.ndarray
    """[C, 16] uint8, xxh3-128 of each."""


class AskSources(Record, tag=True):
    """Report, and ask for more."""

    digest: str
    receiver: str
    """Where the asker serves what it has, see `Holder.address`."""
    verified: tuple[int, ...]
    """Chunks that it has since it last asked."""
    begins: bool
    """What was known of this receiver is of an earlier fetch, whose file may be gone."""
    corrupt: tuple[tuple[int, str], ...]
    """(chunk, source) that were refused."""
    silent: tuple[str, ...]
    """Sources that did not answer."""
    wanted: int


class Sources(Record, tag=True):
    """(chunk, where to get it); an empty source is the one who answers."""

    chunks: tuple[tuple[int, str], ...]


class AskChunk(Record, tag=True):
    """Send me this one."""

    digest: str
    number: int


class Chunk(Record, tag=True):
    """Its bytes."""

    number: int
    bytes_N: np.ndarray


class Gone(Record, tag=True):
    """It is not offered (any more)."""

    reason: str


Ask = AskPlan | AskSources | AskChunk
Answer = Plan | Sources | Chunk | Gone


def num_chunks(num_bytes: int) -> int:
    """C."""
    return -(-num_bytes // CHUNK_BYTES)


def chunk_slice(number: int, num_bytes: int) -> slice:
    """Where a chunk lies in its shard."""
    return slice(number * CHUNK_BYTES, min(num_bytes, (number + 1) * CHUNK_BYTES))


def chunk_digest(bytes_N: np.ndarray) -> bytes:
    """16 bytes."""
    return xxhash.xxh3_128_digest(bytes_N.data)


def chunk_digests(bytes_N: np.ndarray) -> np.ndarray:
    """[C, 16] uint8 of a whole shard."""
    count = num_chunks(bytes_N.nbytes)
    found = (chunk_digest(bytes_N[chunk_slice(n, bytes_N.nbytes)]) for n in range(count))
    return np.frombuffer(b"".join(found), np.uint8).reshape(count, 16)


class _Receiver(msgspec.Struct):
    """What the tracker knows of one receiver."""

    heard_s: float
    given: dict[int, str] = {}
    """Chunk on its way to it -> source."""


class Tracker:
    """Who has which chunk of one shard, and who is to get it from whom.

    Trace (two chunks, receivers a and b):
        assign(a, 1)                 # [(0, "")]: from us
        assign(b, 2)                 # [(1, ""), (0, "")]: nobody has 0 yet, and b has nothing to do
        heard(a, verified 0)
        assign(a, 2)                 # [(1, "")]
        heard(b, verified 1)
        assign(c, 2)                 # [(0, a), (1, b)]
    """

    def __init__(self, num_chunks: int) -> None:
        """Nobody but the publisher has anything."""
        self.copies = [0] * num_chunks
        """How often we were to send each chunk."""
        self._having: list[set[str]] = [set() for _ in range(num_chunks)]
        self._coming: Counter[int] = Counter()
        self._load: Counter[str] = Counter()
        self._receivers: dict[str, _Receiver] = {}

    def heard(self, ask: AskSources, now: float) -> None:
        """Take in a report."""
        if ask.begins:
            self._forget(ask.receiver)
            self._give_up(ask.receiver)
        receiver = self._receivers.setdefault(ask.receiver, _Receiver(heard_s=now))
        receiver.heard_s = now
        for number in self._known(ask.verified):
            self._settle(receiver, number)
            self._having[number].add(ask.receiver)
        for number, source in ask.corrupt:
            for known in self._known((number,)):
                self._settle(receiver, known)
                self._having[known].discard(source)
        for source in ask.silent:
            self._forget(source)
            for number in [n for n, given in receiver.given.items() if given == source]:
                self._settle(receiver, number)
        for name in [n for n, r in self._receivers.items() if now - r.heard_s > SILENCE_S]:
            self._give_up(name)

    def hosts(self) -> dict[str, bool]:
        """Of each host that asked, whether one of its processes has all chunks; from any thread."""
        whole: dict[str, bool] = {}
        for name in list(self._receivers):
            host = name.partition(" ")[0].rpartition(":")[0]
            whole[host] = whole.get(host, False) or all(name in each for each in self._having)
        return whole

    def assign(self, receiver: str, wanted: int) -> list[tuple[int, str]]:
        """Up to so many chunks that it lacks: those nobody has first, then the rarest."""
        asker, chosen = self._receivers[receiver], []
        # Each begins elsewhere, so that receivers that start together fetch different chunks.
        first = zlib.crc32(receiver.encode()) % max(1, len(self.copies))
        lacking = [
            number
            for number in (*range(first, len(self.copies)), *range(first))
            if receiver not in self._having[number] and number not in asker.given
        ]
        for number in sorted(lacking, key=self._rank):
            if len(chosen) == wanted:
                break
            source = self._source(number)
            if source is not None:
                asker.given[number] = source
                self._coming[number] += 1
                self._load[source] += 1
                self.copies[number] += not source
                chosen.append((number, source))
        return chosen

    def _rank(self, number: int) -> tuple[int, int]:
        fresh = not self._having[number] and not self._coming[number]
        return (0, 0) if fresh else (1 if self._having[number] else 2, len(self._having[number]))

    def _source(self, number: int) -> str | None:
        """The least busy relay, or ourselves; None: not now."""
        if self._having[number]:
            source = min(self._having[number], key=lambda name: self._load[name])
            return source if self._load[source] < MAX_LOAD else None
        return "" if not self._coming[number] or self.copies[number] < MAX_COPIES else None

    def _known(self, numbers: Iterable[int]) -> list[int]:
        return [number for number in numbers if 0 <= number < len(self.copies)]

    def _settle(self, receiver: _Receiver, number: int) -> None:
        source = receiver.given.pop(number, None)
        if source is not None:
            self._coming[number] -= 1
            self._load[source] -= 1

    def _forget(self, source: str) -> None:
        for having in self._having:
            having.discard(source)

    def _give_up(self, name: str) -> None:
        receiver = self._receivers.pop(name, None)
        if receiver is not None:
            for number in list(receiver.given):
                self._settle(receiver, number)
