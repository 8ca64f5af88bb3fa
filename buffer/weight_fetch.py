"""Fetching weights from another host: in chunks, each verified, each served on at once.

    local(manifest) -> DIGEST.partial     chunks verified so far, also after a crash
                    -> DIGEST.safetensors loaded by every process of this host

What is refused or does not come is fetched again from somebody else; only the publisher's silence,
or a chunk that is refused again and again, is an error.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import xxhash
import zmq

from . import codec
from .errors import CorruptData, PeerLost, WireError
from .mailbox import KEPT_VERSIONS
from .records import Shard, WeightsManifest
from .weight_chunks import (
    Answer,
    Ask,
    AskChunk,
    AskPlan,
    AskSources,
    Chunk,
    Gone,
    Plan,
    Sources,
    chunk_digest,
    chunk_slice,
    num_chunks,
)
from .weight_files import Mappings, copy_digested
from .weight_holder import Holder, Offer, connect

WINDOW = 4
"""Chunks on their way to us: enough to keep a connection busy while one is verified."""
AGAIN_S = 0.02
"""How soon we ask again when all we lack is on its way to others."""
DEADLINE_S = 30.0
RELAY_DEADLINE_S = 10.0
"""A relay that is silent for so long is not asked again for this shard."""
MAX_REFUSALS = 5
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""glibc's numbers of what `keep_freed_memory` sets."""


class Inbox:
    """Brings manifests' shards to this host, and serves on what it has of them."""

    def __init__(
        self, folder: Path, endpoint: str, *, always: bool = True, deadline_s: float = DEADLINE_S
    ) -> None:
        """Serve on an endpoint; the folder is shared by the run's processes on this host.

        Args:
            folder: made when missing, see `remove_unused`.
            endpoint: of our `Holder`.
            always: fetch what the publisher's own file shows, too.
            deadline_s: of the publisher's silence.
        """
        self._folder, self._always, self._deadline_s = folder, always, deadline_s
        keep_freed_memory()
        self._users = use(folder)
        self.holder, self.mappings = Holder(endpoint), Mappings()
        self.resumed, self.refused, self.lost = 0, 0, 0
        """Chunks that an earlier try had left; whose digest differed; relays that fell silent."""

    def close(self) -> None:
        """Stop serving; the files stay while the folder is used."""
        self.holder.close()
        self._users.close()
        remove_unused(self._folder)

    def local(self, manifest: WeightsManifest) -> WeightsManifest:
        """The same version in files of this host; blocks while it is fetched.

        Raises:
            PeerLost: a publisher was silent for the deadline, and its file is not visible here.
            CorruptData: a publisher no longer has it, or sends what is not what was published.
        """
        base = self._here(manifest.base) if manifest.base else None
        shards = tuple(map(self._here, manifest.shards))
        with _locked(self._folder / "lock"):  # one more may be evaluated
            self._forget(len(shards) * (KEPT_VERSIONS + 1) + (base is not None))
        return WeightsManifest(version=manifest.version, shards=shards, base=base)

    def _here(self, shard: Shard) -> Shard:
        seen = not shard.holder or (not self._always and Path(shard.path).exists())
        return shard if seen else self._fetch(shard)

    def _fetch(self, shard: Shard) -> Shard:
        path = self._folder / f"{shard.digest}.safetensors"
        with _locked(self._folder / "lock"):
            if not path.exists():
                partial = path.with_suffix(".partial")
                for other in set(self._folder.glob("*.partial")) - {partial}:
                    other.unlink()  # of a version that was retired before all of it was here
                if fresh := not partial.exists():
                    with contextlib.suppress(FileNotFoundError):  # pages that need not be made
                        os.replace(self._folder / "spare", partial)
                try:
                    Fetch(self, shard, partial, fresh).run(self._deadline_s)
                except PeerLost:  # the last version is still wanted when the learner has ended
                    if not Path(shard.path).exists():
                        raise
                    return msgspec.structs.replace(shard, holder="")
                os.replace(partial, path)
            # By atime alone: who loads the file tells by its mtime that it has not changed.
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        return msgspec.structs.replace(shard, path=str(path), holder="")

    def _forget(self, num_kept: int) -> None:
        """Remove all but the files that were used last; one is kept for its pages."""
        files = {f: f.stat().st_atime_ns for f in self._folder.glob("*.safetensors")}
        for file in sorted(files, key=lambda f: files[f])[:-num_kept]:
            with contextlib.suppress(FileNotFoundError):
                os.replace(file, self._folder / "spare")
        kept = {file.stem for file in self._folder.glob("*.*")}
        for digest in [digest for digest in list(self.holder.offers) if digest not in kept]:
            self.holder.offers.pop(digest, None)


class Fetch:
    """One shard on its way here."""

    def __init__(self, inbox: Inbox, shard: Shard, path: Path, fresh: bool) -> None:
        """Nothing is asked before `run`; a file that is not fresh may hold chunks already."""
        self._inbox, self._shard, self._path, self._fresh = inbox, shard, path, fresh
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._sockets: dict[str, zmq.Socket] = {}
        self._coming: dict[int, tuple[str, float]] = {}
        """Chunk -> its source, and when it was asked for."""
        self._offer: Offer | None = None
        self._news: list[int] = []
        self._corrupt: list[tuple[int, str]] = []
        self._silent: set[str] = set()
        self._refusals: Counter[int] = Counter()
        self._begins = True
        self._asking, self._ask_at_s, self._heard_s = False, 0.0, time.monotonic()

    def run(self, deadline_s: float) -> None:
        """Until every chunk is verified; see `Inbox.local`."""
        self._deadline_s = deadline_s
        try:
            self._send("", AskPlan(digest=self._shard.digest))
            while not self._offer or len(self._offer.verified) < len(self._offer.digests_C16):
                if self._offer:
                    self._ask()
                for source, answer in self._receive():
                    self._take(source, answer)
            # So that others are sent to us for the last ones, too; we have what we came for.
            with contextlib.suppress(CorruptData, PeerLost):
                while self._news or self._asking:
                    self._ask(wanted=0)
                    for source, answer in self._receive():
                        self._take(source, answer)
        finally:
            for own in self._sockets.values():
                own.close()
            self._context.term()

    def _begin(self, plan: Plan) -> None:
        """Map the file, and keep what an earlier try has verified."""
        expected = (num_chunks(self._shard.num_bytes), 16)
        if plan.num_bytes != self._shard.num_bytes or plan.digests.shape != expected:
            raise CorruptData(f"weights {self._path}: the publisher's plan is not of this shard")
        bytes_N = self._inbox.mappings.of(self._path, plan.num_bytes)
        self._offer = Offer(bytes_N, plan.digests)
        for number in range(0 if self._fresh else len(plan.digests)):
            self._verify(number, chunk_digest(bytes_N[chunk_slice(number, plan.num_bytes)]))
        self._inbox.resumed += len(self._offer.verified)
        self._inbox.holder.offers[self._shard.digest] = self._offer

    def _verify(self, number: int, digest: bytes) -> bool:
        assert self._offer is not None
        if digest != self._offer.digests_C16[number].tobytes():
            return False
        self._offer.verified.add(number)
        self._news.append(number)
        return True

    def _ask(self, wanted: int = WINDOW) -> None:
        """Report and ask for more, when there is room and no such question is open; the last report
        (`wanted` 0) waits for nothing."""
        room = max(0, wanted - len(self._coming))
        early = time.monotonic() < self._ask_at_s or (2 * room < wanted and not self._silent)
        if self._asking or (wanted and early):
            return
        self._asking = True
        self._send(
            "",
            AskSources(
                digest=self._shard.digest,
                receiver=self._inbox.holder.address,
                verified=tuple(self._news),
                begins=self._begins,
                corrupt=tuple(self._corrupt),
                silent=tuple(self._silent),
                wanted=room,
            ),
        )
        self._news, self._corrupt, self._silent, self._begins = [], [], set(), False

    def _take(self, source: str, answer: Answer) -> None:
        match answer:
            case Plan() if self._offer is None:
                self._begin(answer)
            case Sources(chunks=chunks):
                self._asking = False
                self._ask_at_s = 0.0 if chunks else time.monotonic() + AGAIN_S
                for number, named in chunks:
                    where = named or self._shard.holder
                    self._coming[number] = (where, time.monotonic())
                    self._send(where, AskChunk(digest=self._shard.digest, number=number))
            case Chunk(number=number) if self._coming.get(number, ("",))[0] == source:
                del self._coming[number]
                self._accept(number, source, answer.bytes_N)
            case Gone(reason=reason) if source == self._shard.holder:
                raise CorruptData(f"weights {self._shard.path}: {reason}")
            case Gone():  # a relay that made room for newer versions
                self._lose(source)

    def _accept(self, number: int, source: str, bytes_N: np.ndarray) -> None:
        """Write a chunk down if it is what was published; else have it sent again."""
        assert self._offer is not None
        target_N = self._offer.bytes_N[chunk_slice(number, self._offer.bytes_N.nbytes)]
        if bytes_N.nbytes == target_N.nbytes:
            copy_digested(target_N, bytes_N, hasher := xxhash.xxh3_128())
            if self._verify(number, hasher.digest()):
                return
        self._inbox.refused += 1
        self._refusals[number] += 1
        if self._refusals[number] == MAX_REFUSALS:
            raise CorruptData(
                f"weights {self._shard.path}: chunk {number} was refused {MAX_REFUSALS} times: its "
                "bytes are not what was published"
            )
        self._corrupt.append((number, "" if source == self._shard.holder else source))
        self._ask_at_s = 0.0

    def _lose(self, source: str) -> None:
        """Do without a relay: the tracker is told, and names others for what it owes."""
        self._inbox.lost += 1
        self._silent.add(source)
        self._coming = {n: (s, at) for n, (s, at) in self._coming.items() if s != source}
        self._poller.unregister(own := self._sockets.pop(source))
        own.close()

    def _send(self, address: str, ask: Ask) -> None:
        """To a source of chunks; what is not a chunk is asked of the publisher by "", over another
        connection, whose answers do not wait behind the chunks that it sends us."""
        if address not in self._sockets:
            self._sockets[address] = connect(self._context, address or self._shard.holder)
            self._poller.register(self._sockets[address], zmq.POLLIN)
        self._sockets[address].send_multipart(codec.encode(ask))

    def _receive(self) -> Iterator[tuple[str, Answer]]:
        """What has come, with its source, within `AGAIN_S`.

        Raises:
            PeerLost: the publisher has been silent for too long though it owes us something.
        """
        ready, now = dict(self._poller.poll(int(AGAIN_S * 1000))), time.monotonic()
        publisher = self._shard.holder
        for address, own in list(self._sockets.items()):
            if own not in ready:
                continue
            source = address or publisher
            if source == publisher:
                self._heard_s = now
            frames = [frame.buffer for frame in own.recv_multipart(copy=False)]
            try:
                yield source, codec.decode(frames, Answer)
            except WireError as error:
                raise CorruptData(f"weights {self._shard.path}, {source}: {error}") from error
        patience_s = min(RELAY_DEADLINE_S, self._deadline_s)
        late = {s for s, asked_s in self._coming.values() if now - asked_s > patience_s}
        for source in late - {publisher}:
            self._lose(source)
        owed = (
            self._offer is None
            or self._asking
            or any(source == publisher for source, _ in self._coming.values())
        )
        # Asked for and never sent, whatever else it answers: a connection that was lost on the way.
        lost = any(
            source == publisher and now - asked_s > self._deadline_s
            for source, asked_s in self._coming.values()
        )
        if not owed:
            self._heard_s = now
        elif lost or now - self._heard_s > self._deadline_s:
            raise PeerLost(
                f"weights {self._shard.path}: {publisher.partition(' ')[0]} has not answered for "
                f"{self._deadline_s:g} s; its process is gone or frozen"
            )


def keep_freed_memory() -> None:
    """Have the C library keep blocks of up to 32 MiB that are freed, in the whole process. It would
    give every chunk's memory back, and fresh pages for the next one cost as much as copying it.
    Nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        for setting, num_bytes in ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20)):
            ctypes.CDLL(None).mallopt(setting, num_bytes)


def use(folder: Path) -> BinaryIO:
    """Take part in the use of a folder until the result is closed, or the process ends."""
    while True:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileNotFoundError):
            users = (folder / "users").open("ab")
            fcntl.flock(users, fcntl.LOCK_SH)
            if (folder / "users").exists():  # else it was removed before we had the lock
                return users
            users.close()


def remove_unused(folder: Path) -> None:
    """Remove a folder that no living process uses."""
    with contextlib.suppress(OSError), (folder / "users").open("ab") as users:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone on this host; a process that dies lets go."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
