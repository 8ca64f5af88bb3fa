"""A fleet of stub engines in one process, with real sockets to a real buffer service, in real time.

Each engine does what `rollout/worker.py` says to the service: it follows versions, keeps a sample
queued behind the one it writes, asks for evaluations, sends heartbeats, hands in trajectories of
full size. Only its tokens are made up, at `TOKENS_PER_S`.
"""

import heapq
import itertools
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq
from slipstream.buffer import codec, messages
from slipstream.buffer.records import (
    SamplingParams,
    Score,
    Timings,
    Trajectory,
    Version,
    VersionSpan,
)
from slipstream.rollout.worker import HEARTBEAT_S, POLL_S, VERSION_POLL_S

TOKENS_PER_S, SHORTEST, LONGEST, PROMPT = 2000, 6144, 10_240, 64
CONNECTIONS = 128
"""Engines share them, so that one process can be all of them."""
AHEAD = 2
"""Samples of an engine: one being written, one behind it."""
TOKENS_L = np.arange(PROMPT + LONGEST, dtype=np.int32) % 32_000
MASK_L = np.arange(PROMPT + LONGEST) >= PROMPT
LOGPROBS_N = np.full(LONGEST, -1.0, np.float32)


@dataclass
class Engine:
    """One stub."""

    number: int
    socket: zmq.Socket
    serving: Version | None = None
    queue: list[tuple[messages.Claim, int]] = field(default_factory=list)
    """The first is being written."""
    began_s: float = 0.0
    asking: bool = False
    idle_since_s: float | None = None
    idle_s: float = 0.0


class Fleet:
    """All engines; what happens when, and what was measured."""

    def __init__(self, endpoint: str, engines: int, seed: int) -> None:
        self.context = zmq.Context()
        self.numbers, self.chance = itertools.count(1), np.random.default_rng(seed)
        sockets = [self._connect(endpoint) for _ in range(min(engines, CONNECTIONS))]
        self.poller = zmq.Poller()
        for socket in sockets:
            self.poller.register(socket, zmq.POLLIN)
        self.engines = [Engine(n, sockets[n % len(sockets)]) for n in range(engines)]
        self.sent: dict[int, tuple[Engine, Any, float]] = {}
        """Number -> (engine, request, when)."""
        self.events: list[tuple[float, int, str]] = []
        self.claims_s: list[float] = []
        self.tokens = self.refused = 0
        self.closing = self.measuring = False
        self.cpu_s = 0.0

    def _connect(self, endpoint: str) -> zmq.Socket:
        socket = self.context.socket(zmq.DEALER)
        for option in (zmq.LINGER, zmq.SNDHWM, zmq.RCVHWM):
            socket.setsockopt(option, 0)
        socket.connect(endpoint)
        return socket

    def say(self, engine: Engine, request: Any) -> None:
        number = next(self.numbers)
        self.sent[number] = (engine, request, time.monotonic())
        engine.socket.send_multipart(codec.encode(request, number), copy=False)

    def run(self, measure_from_s: float, measure_to_s: float) -> dict[str, Any]:
        """Until the run closes; what was measured between two moments (`time.monotonic`)."""
        for engine in self.engines:
            self.say(engine, messages.AwaitVersion(wait_s=VERSION_POLL_S))
            first_s = time.monotonic() + HEARTBEAT_S * self.chance.random()
            heapq.heappush(self.events, (first_s, engine.number, "beat"))
        began_s = ended_s = 0.0
        while not self.closing:
            now = time.monotonic()
            if not self.measuring and measure_from_s <= now < measure_to_s:
                self.measuring, began_s = True, now
                self._start_clock(now)
            elif self.measuring and now >= measure_to_s:
                self.measuring, ended_s = False, now
                self._stop_clock(now)
            while self.events and self.events[0][0] <= now:
                _, number, what = heapq.heappop(self.events)
                self.happen(self.engines[number], what, now)
            wait_s = self.events[0][0] - time.monotonic() if self.events else 0.1
            for socket, _ in self.poller.poll(max(0, round(1000 * min(wait_s, 0.1)))):
                self.receive(socket)
        self.context.destroy(linger=0)
        span_s = ended_s - began_s
        return {
            "claim_p50_ms": 1000 * float(np.quantile(self.claims_s, 0.5)),
            "claim_p99_ms": 1000 * float(np.quantile(self.claims_s, 0.99)),
            "claims": len(self.claims_s),
            "engine_idle": sum(e.idle_s for e in self.engines) / len(self.engines) / span_s,
            "tokens_per_s": self.tokens / span_s,
            "refused": self.refused,
            "fleet_cpu": self.cpu_s / span_s,
        }

    def _start_clock(self, now: float) -> None:
        for engine in self.engines:
            engine.idle_s = 0.0
            engine.idle_since_s = now if engine.idle_since_s is not None else None
        self.cpu_s = -time.process_time()

    def _stop_clock(self, now: float) -> None:
        self.cpu_s += time.process_time()
        for engine in self.engines:
            if engine.idle_since_s is not None:
                engine.idle_s += now - engine.idle_since_s

    def receive(self, socket: zmq.Socket) -> None:
        while True:
            try:
                frames = [f.buffer for f in socket.recv_multipart(zmq.NOBLOCK, copy=False)]
            except zmq.Again:
                return
            envelope = codec.open_envelope(frames)
            if bytes(envelope.body) == bytes(codec.PARKED):
                continue
            engine, request, sent_s = self.sent.pop(envelope.request_number)
            reply = codec.decode_body(envelope, frames, messages.Reply)
            self.hear(engine, request, reply, time.monotonic() - sent_s)

    def hear(self, engine: Engine, request: Any, reply: Any, took_s: float) -> None:
        self.closing |= getattr(reply, "closing", False)
        match reply:
            case messages.Newest(manifest=manifest):
                if manifest is not None and manifest.version != engine.serving:
                    first, engine.serving = engine.serving is None, manifest.version
                    if first:
                        engine.idle_since_s = time.monotonic()
                        self.ask_evaluations(engine)
                    engine.asking = False  # what the old version may not claim the new one may
                    self.ask(engine)
                again = messages.AwaitVersion(after=engine.serving, wait_s=VERSION_POLL_S)
                self.say(engine, again)
            case messages.Claims(claims=claims) if request.max_samples:
                engine.asking = False
                if claims and self.measuring:
                    self.claims_s.append(took_s)
                was_idle = not engine.queue
                engine.queue += [(claim, i) for claim in claims for i in claim.indices]
                if was_idle and engine.queue:
                    self.begin(engine, time.monotonic())
                self.ask(engine)
            case messages.Claims():
                self.ask_evaluations(engine)
            case messages.Done(refused=refused) if isinstance(request, messages.FinishSamples):
                self.refused += len(refused)
            case messages.RefusedReply():
                self.refused += 1
                engine.asking = engine.asking and not isinstance(request, messages.ClaimSamples)

    def ask(self, engine: Engine) -> None:
        """Keep a sample queued behind the one that is being written."""
        if engine.asking or len(engine.queue) >= AHEAD or engine.serving is None:
            return
        engine.asking = True
        self.say(engine, self.claim(engine, AHEAD - len(engine.queue)))

    def ask_evaluations(self, engine: Engine) -> None:
        self.say(engine, self.claim(engine, 0))

    def claim(self, engine: Engine, samples: int) -> messages.ClaimSamples:
        assert engine.serving is not None
        return messages.ClaimSamples(
            worker=f"engine-{engine.number}", serving=engine.serving, max_samples=samples,
            request_id=f"{engine.number}/{next(self.numbers)}", wait_s=POLL_S,
        )  # fmt: skip

    def begin(self, engine: Engine, now: float) -> None:
        if self.measuring and engine.idle_since_s is not None:
            engine.idle_s += now - engine.idle_since_s
        engine.idle_since_s = None
        engine.began_s = now
        tokens = int(self.chance.integers(SHORTEST, LONGEST))
        done_s = now + tokens / TOKENS_PER_S
        heapq.heappush(self.events, (done_s, engine.number, f"{tokens}"))

    def happen(self, engine: Engine, what: str, now: float) -> None:
        if what == "beat":
            told = {"running": 1.0, "idle": 0.0, "tokens_per_s": float(TOKENS_PER_S)}
            beat = messages.Heartbeat(
                worker=f"engine-{engine.number}", serving=engine.serving, stats=told
            )
            self.say(engine, beat)
            heapq.heappush(self.events, (now + HEARTBEAT_S, engine.number, "beat"))
            return
        claim, index = engine.queue.pop(0)
        if engine.queue:
            self.begin(engine, now)
        else:
            engine.idle_since_s = now
        sample = trajectory(claim, index, engine.serving, int(what))
        done = messages.FinishSamples(trajectories=(sample,), lease_ids=(claim.lease_id,))
        self.say(engine, done)
        self.ask(engine)
        if self.measuring:
            self.tokens += int(what)


def trajectory(
    claim: messages.Claim, index: int, version: Version | None, tokens: int
) -> Trajectory:
    """What an engine hands in."""
    assert version is not None
    spans = (VersionSpan(version=version, length=tokens),)
    return Trajectory(
        uid=claim.ticket.prompt.uid, attempt=claim.attempt, index=index,
        token_ids=TOKENS_L[: PROMPT + tokens], policy_mask=MASK_L[: PROMPT + tokens],
        behaviour_logprobs=LOGPROBS_N[:tokens], versions=spans, kv_version_min=spans,
        sampling=SamplingParams(), finish_reason="stop", text="", turns=(),
        score=Score(value=float(index % 2)), engine_id="ghost",
        timings=Timings(claimed_s=0, first_token_s=0, generated_s=0, scored_s=0),
    )  # fmt: skip


def main() -> None:
    """ENDPOINT ENGINES: say "ready", be told from when to when to measure, run, print what was."""
    endpoint, engines = sys.argv[1:]
    fleet = Fleet(endpoint, int(engines), seed=0)
    print("ready", flush=True)
    from_s, until_s = map(float, sys.stdin.readline().split())
    print(json.dumps(fleet.run(from_s, until_s)), flush=True)


if __name__ == "__main__":
    main()
