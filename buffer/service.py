"""The buffer service process: a zmq ROUTER around the coordinator.

    poll -> receive all that is there -> answer each -> ask the parked ones again -> commit -> reply

One commit serves all requests of a turn (group commit), and no reply leaves before it. A request
that has to wait is parked until something changes or its patience ends. Run as
`python -m slipstream.buffer.service SPEC.json`.
"""

import asyncio
import contextlib
import gc
import os
import resource
import sqlite3
import sys
import time
from collections import OrderedDict
from pathlib import Path

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from . import codec, waits
from .config import ServiceSpec
from .coordinator import Coordinator
from .copies import copy_run
from .curve import protect_server
from .errors import ConfigError, WireError
from .messages import ClaimSamples, Hello, RefusedReply, Reply, Request, Stats, TakeGroups, Welcome
from .parking import Address, Parked, Parking
from .process import run_process
from .records import Version
from .waits import Wait

TURN_MESSAGES = 256
"""At most so many requests share a commit: bounds the time until the first reply."""
TICK_MS = 100
"""Parked requests' deadlines, lease expiry and straggler waits are looked at so often."""
KEPT_REPLIES = 4096
"""Small replies kept for repeats of requests whose reply was lost."""
KEPT_REPLY_BYTES = 65_536
CLOSE_SILENCE_S = 60.0
"""A closed run whose clients neither speak nor leave ends after this long."""
MAX_IPC_PATH = 107
"""Bytes of a socket path that Linux accepts."""

MAX_PARKED = 4096
"""Requests that may wait at once; more are answered now, so that nobody can fill the memory."""
MAX_WAIT_S = 3600.0
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


class BufferService:
    """Serves one run until it is closed and everybody has left, or until cancelled."""

    def __init__(self, spec: ServiceSpec) -> None:
        """Open the journal; `serve` binds the endpoint.

        Args:
            spec: which run, branch and endpoint.
        Raises:
            CorruptData: the journal cannot be read, or belongs to another run.
        """
        self.spec = spec
        self.coordinator = Coordinator(spec, time.monotonic())
        self.malformed = 0
        self._parked = Parking()
        self._ticked_s = 0.0
        self._replies: OrderedDict[Address, list[codec.Frame]] = OrderedDict()
        self._names: dict[bytes, str] = {}
        self._connections = 0
        self._last_heard = time.monotonic()
        self._told_s = 0.0
        self._copying: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Bind and serve; everything acknowledged is durable, however it ends.

        What is decided and not yet acknowledged is kept on return and when cancelled (which happens
        between turns), and not after an error, which may have come halfway through a decision.
        """
        end = self.coordinator.abandon
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.ROUTER)
        monitor = socket.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | HANDSHAKE_FAILED
        )
        watcher = asyncio.create_task(self._count_connections(monitor))
        try:
            self._bind(socket)
            while not self._finished():
                await self._turn(socket)
            end = self.coordinator.close
        except asyncio.CancelledError:
            end = self.coordinator.close
            raise
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=1000)  # milliseconds: the last replies may still leave
            context.term()
            if self._copying is not None:
                await self._copying
            end()
            if self.spec.config.copy_to is not None:
                self._copy(sealed_before=1 << 62, sequence=self.coordinator.journal.sequence)

    def _bind(self, socket: zmq.asyncio.Socket) -> None:
        """Bind a private socket.

        Raises:
            ConfigError: the path is longer than Linux accepts.
        """
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, codec.MAX_TOTAL_BYTES)
        path = Path(self.spec.endpoint.removeprefix("ipc://"))
        if self.spec.endpoint.startswith("ipc://"):
            if len(os.fsencode(path)) > MAX_IPC_PATH:
                raise ConfigError(f"endpoint {self.spec.endpoint}: over {MAX_IPC_PATH} bytes")
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        protect_server(socket, self.spec.endpoint)
        socket.bind(self.spec.endpoint)
        if self.spec.endpoint.startswith("ipc://"):
            path.chmod(0o600)

    def _finished(self) -> bool:
        """Whether the run is closed and nobody is left who could ask."""
        if not self.coordinator.closing:
            return False
        silent_s = time.monotonic() - self._last_heard
        return self._connections <= 0 or silent_s > CLOSE_SILENCE_S

    async def _count_connections(self, monitor: zmq.asyncio.Socket) -> None:
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())["event"]
            if event & HANDSHAKE_FAILED:
                self.coordinator.refused += 1
            else:
                self._connections += 1 if event == zmq.EVENT_ACCEPTED else -1

    async def _turn(self, socket: zmq.asyncio.Socket) -> None:
        """One round: everything that has arrived, one commit, then the replies."""
        replies: list[tuple[Address, list[codec.Frame]]] = []
        plain = zmq.Socket.shadow(socket.underlying)  # a call on it costs a tenth
        if await socket.poll(TICK_MS):
            for _ in range(TURN_MESSAGES):
                try:
                    message = plain.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                replies += self._receive([frame.buffer for frame in message])
        now = time.monotonic()
        if now - self._ticked_s >= TICK_MS / 1000:
            self._ticked_s = now
            self.coordinator.tick(now)
        if now - self._told_s >= waits.PUBLISH_S:
            self._told_s = now
            waits.put("buffer", *self.coordinator.waits(now))
        replies += self._ask_parked(now)
        self.coordinator.commit()
        if self.coordinator.copy_due and (self._copying is None or self._copying.done()):
            self.coordinator.copy_due = False
            at = (self.coordinator.journal.segments.seal(), self.coordinator.journal.sequence)
            self._copying = asyncio.create_task(asyncio.to_thread(self._copy, *at))
        for (identity, _), frames in replies:
            plain.send_multipart([identity, *frames], copy=False)  # no limit is set: never blocks

    def _copy(self, sealed_before: int, sequence: int) -> None:
        """Bring `copy_to` up to date; a failure is told, and no reason to stop."""
        target = self.spec.config.copy_to
        assert target is not None
        try:
            copy_run(self.spec.run_dir, target, sealed_before, sequence)
            self.coordinator.copy_problem = ""
        except (OSError, sqlite3.Error, ValueError, KeyError) as error:  # a manifest may be damaged
            self.coordinator.copy_problem = (
                f"the copy to {target} (buffer.copy_to) failed: {error}; it is tried again with "
                "the next checkpoint"
            )

    def _receive(self, message: list[memoryview]) -> list[tuple[Address, list[codec.Frame]]]:
        """Answer or park one message; what is malformed is refused, or dropped without a number."""
        self._last_heard = now = time.monotonic()
        identity, frames = bytes(message[0]), message[1:]
        address = (identity, 0)
        try:
            envelope = codec.open_envelope(frames)
            address = (identity, envelope.request_number)
            if address in self._parked:
                return [(address, codec.encode(codec.PARKED, envelope.request_number))]
            if address in self._replies:
                return [(address, self._replies[address])]
            request: Request = codec.decode_body(envelope, frames, Request)
        except WireError as error:
            self.malformed += 1
            return [self._reply(address, RefusedReply(reason=str(error)))] if address[1] else []
        self._learn_name(identity, request)
        wait_s = getattr(request, "wait_s", 0.0)
        wait_s = min(wait_s, MAX_WAIT_S) if wait_s > 0 and len(self._parked) < MAX_PARKED else 0.0
        reply = self.coordinator.answer(request, now, final=wait_s <= 0)
        if reply is None:
            self._park(address, request, wait_s, now)
            return []
        if isinstance(request, Hello) and isinstance(reply, Welcome):
            self._drop_claims(request.name, identity)
        return [self._reply(address, reply)]

    def _learn_name(self, identity: bytes, request: Request) -> None:
        name = getattr(request, "name", None) or getattr(request, "worker", None)
        if name:
            self._names[identity] = name
            if len(self._names) > KEPT_REPLIES:
                del self._names[next(iter(self._names))]

    def _park(self, address: Address, request: Request, wait_s: float, now: float) -> None:
        owner = self._names.get(address[0], "a client")
        wait = Wait(owner=owner, what=type(request).__name__, since_s=now, deadline_s=wait_s)
        self._parked.put(address, Parked(request=request, wait=wait))

    def _drop_claims(self, worker: str, identity: bytes) -> None:
        """Forget what was asked under a worker's name by others than the process that has it now.

        What a dead one is granted nobody would work on, and heartbeats under its name would
        keep the lease alive; a living one that is cut off asks again.
        """
        for address, each in self._parked.of((ClaimSamples,)):
            if address[0] != identity and getattr(each.request, "worker", "") == worker:
                self._parked.remove(address)

    def _ask_parked(self, now: float) -> list[tuple[Address, list[codec.Frame]]]:
        """Ask again what is over, and what the turn may have answered, first come first served;
        until nothing follows from the answers."""
        replies = self._ask(self._parked.due(now), now)
        coordinator, seen = self.coordinator, -1
        while (kinds := coordinator.woken(now, seen)) is not None:
            seen = len(coordinator.replay.outbox)
            replies += self._ask(self._parked.of(kinds), now)
        return replies

    def _ask(
        self, parked: list[tuple[Address, Parked]], now: float
    ) -> list[tuple[Address, list[codec.Frame]]]:
        """Ask parked requests again; of claims that are alike only until one gets nothing."""
        replies: list[tuple[Address, list[codec.Frame]]] = []
        in_vain: set[tuple[Version, bool]] = set()
        for address, each in parked:
            request, final = each.request, now >= each.ends_s
            alike = None
            if isinstance(request, ClaimSamples) and not final and self.coordinator.claims_alike:
                alike = (request.serving, request.max_samples > 0)
                if alike in in_vain:
                    continue
            reply = self.coordinator.answer(request, now, final=final, again=True)
            if reply is not None:
                self._parked.remove(address)
                replies.append(self._reply(address, reply))
            elif alike is not None:
                in_vain.add(alike)
        return replies

    def _reply(self, address: Address, reply: Reply) -> tuple[Address, list[codec.Frame]]:
        """Encode a reply, and keep it for a repeat when it is small."""
        if isinstance(reply, Stats):
            now = time.monotonic()
            reply.waits.extend(
                parked.wait.describe(now)
                for parked in self._parked.values()
                if not isinstance(parked.request, TakeGroups)  # the coordinator says it better
            )
        frames = codec.encode(reply, address[1])
        if len(frames) == 1 and len(frames[0]) <= KEPT_REPLY_BYTES:
            self._replies[address] = frames
            if len(self._replies) > KEPT_REPLIES:
                self._replies.popitem(last=False)
        return address, frames


def allow_many_connections() -> None:
    """As many open files as the system lets us have: each process of a run is a connection, and
    the usual 1,024 are soon used up by a fleet."""
    with contextlib.suppress(ValueError, OSError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """Serve the run that a spec file describes."""
    allow_many_connections()
    spec = ServiceSpec.model_validate_json(Path(sys.argv[1]).read_bytes())

    async def serve() -> None:
        # What the ledger folds to lives as long as the process: collections over it are in vain.
        gc.disable()
        service = BufferService(spec)
        gc.freeze()
        gc.enable()
        await service.serve()

    run_process("buffer", spec.run_dir, serve())


if __name__ == "__main__":
    main()
