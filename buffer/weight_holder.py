"""Serving weights: a socket and a thread that answer for the shards that a process has (of).

Outside the file system it is a CURVE socket with a key of its own, which travels in manifests and
so only inside the run: who has not been told it is not answered.
"""

import socket
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import zmq

from . import codec
from .errors import WireError
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
    Tracker,
    chunk_digests,
    chunk_slice,
)

POLL_MS = 200
"""How soon a closed holder ends."""
BUFFER_BYTES = 1 << 22
"""Of the kernel, for each connection: one chunk, so that sending and receiving overlap."""


class Offer:
    """A shard that a process serves."""

    def __init__(self, bytes_N: np.ndarray, digests_C16: np.ndarray | None = None) -> None:
        """All of it, or with given digests nothing yet: what `verified` gets to hold."""
        self.bytes_N = bytes_N
        whole = digests_C16 is None
        self.digests_C16 = chunk_digests(bytes_N) if digests_C16 is None else digests_C16
        self.verified: set[int] = set(range(len(self.digests_C16))) if whole else set()
        self.tracker = Tracker(len(self.digests_C16)) if whole else None


class Holder:
    """Serves offers until closed.

    Raises:
        zmq.ZMQError: the endpoint cannot be bound.
    """

    def __init__(self, endpoint: str, *, plain: bool = False) -> None:
        """Bind and start.

        Args:
            endpoint: `ipc://...`, or `tcp://HOST:*` for any free port.
            plain: no keys over TCP either; for loopback alone.
        """
        self.offers: dict[str, Offer] = {}
        """By the shard's digest."""
        self.sent_bytes = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.setsockopt(zmq.SNDBUF, BUFFER_BYTES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 1 << 20)  # bounds what a stranger can make us hold
        key = ""
        if endpoint.startswith("tcp://") and not plain:
            public, secret = zmq.curve_keypair()
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            key = public.decode()
        self._socket.bind(endpoint)
        bound = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.address = f"{bound} {key}".rstrip()
        """`ENDPOINT` or `ENDPOINT KEY`: all that a receiver needs."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="weights", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._closing.set()
        self._thread.join()
        self._socket.close()
        self._context.term()

    def _serve(self) -> None:
        while not self._closing.is_set():
            if not self._socket.poll(POLL_MS):
                continue
            identity, *frames = self._socket.recv_multipart()
            try:
                envelope = codec.open_envelope(frames)
                ask = codec.decode_body(envelope, frames, Ask)
            except WireError:
                continue  # whoever it is did not get this from us
            answer = codec.encode(self._answer(ask), envelope.request_number)
            self._socket.send_multipart([identity, *answer], copy=False)

    def _answer(self, ask: Ask) -> Answer:
        offer = self.offers.get(ask.digest)
        if offer is None:
            return Gone(reason=f"shard {ask.digest} is not offered (any more)")
        match ask:
            case AskPlan():
                return Plan(num_bytes=offer.bytes_N.nbytes, digests=offer.digests_C16)
            case AskChunk(number=number) if number in offer.verified:
                own_N = offer.bytes_N[chunk_slice(number, offer.bytes_N.nbytes)]
                self.sent_bytes += own_N.nbytes
                return Chunk(number=number, bytes_N=own_N)
            case AskSources() if offer.tracker is not None:
                offer.tracker.heard(ask, time.monotonic())
                chunks = offer.tracker.assign(ask.receiver, min(ask.wanted, 64))
                return Sources(chunks=tuple(chunks))
        return Gone(reason=f"{type(ask).__name__} of shard {ask.digest} is not answered here")


def connect(context: zmq.Context, address: str) -> zmq.Socket:
    """A DEALER to a `Holder.address`."""
    endpoint, _, key = address.partition(" ")
    dealer = context.socket(zmq.DEALER)
    for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
        dealer.setsockopt(option, 0)
    dealer.setsockopt(zmq.RCVBUF, BUFFER_BYTES)
    dealer.setsockopt(zmq.MAXMSGSIZE, 1 << 26)
    if key:
        public, secret = zmq.curve_keypair()
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, public)
        dealer.setsockopt(zmq.CURVE_SECRETKEY, secret)
        dealer.setsockopt(zmq.CURVE_SERVERKEY, key.encode())
    dealer.connect(endpoint)
    return dealer


def own_endpoint(buffer_endpoint: str, name: str) -> str:
    """Where a process of this name may serve: beside the buffer's own socket, or on whichever of
    this machine's addresses faces the buffer."""
    if buffer_endpoint.startswith("ipc://"):
        return f"{buffer_endpoint.rpartition('/')[0]}/{name}"
    host = urlsplit(buffer_endpoint).hostname or "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing: it only picks the route
        return f"tcp://{probe.getsockname()[0]}:*"
