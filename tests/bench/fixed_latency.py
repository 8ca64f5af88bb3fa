"""An engine that only waits: a row is held for a fixed time by each sample, whatever its tokens."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
from slipstream.buffer.records import Version, VersionSpan, WeightsManifest
from slipstream.rollout.engine import (
    EngineState,
    EngineStats,
    GenerationOutput,
    GenerationRequest,
)


class FixedLatencyEngine:
    """`rows / latency_s` samples a second, of `tokens` tokens each, as `rollout.engine.Engine`."""

    def __init__(self, rows: int, latency_s: float, tokens: int) -> None:
        """Start cold.

        Args:
            rows: samples at once.
            latency_s: of each sample; the first ones end one after the other, and so do all later.
            tokens: of each sample.
        """
        self._rows, self._latency_s = rows, latency_s
        self._free = asyncio.Semaphore(rows)
        self._begun = self._running = self._queued = self._swaps = 0
        self._tokens_N = np.arange(tokens, dtype=np.int32) + 3
        self._logprobs_N = np.full(tokens, -1.0, np.float32)
        self._none_N = np.zeros(tokens, np.float32)
        self._serving: Version | None = None

    @property
    def state(self) -> EngineState:
        return "SERVING" if self._serving else "COLD"

    @property
    def serving(self) -> Version | None:
        return self._serving

    async def generate(
        self, requests: Sequence[GenerationRequest]
    ) -> AsyncIterator[GenerationOutput]:
        tasks = [asyncio.create_task(self._sample(request)) for request in requests]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()

    async def _sample(self, request: GenerationRequest) -> GenerationOutput:
        self._queued += 1
        try:
            await self._free.acquire()
        finally:
            self._queued -= 1
        try:
            self._begun += 1
            self._running += 1
            await asyncio.sleep(self._latency_s * min(1.0, self._begun / self._rows))
        finally:
            self._running -= 1
            self._free.release()
        assert self._serving is not None
        spans = (VersionSpan(version=self._serving, length=len(self._tokens_N)),)
        now_s = time.time()
        return GenerationOutput(
            request_id=request.request_id, token_ids=self._tokens_N,
            behaviour_logprobs=self._logprobs_N, versions=spans, kv_version_min=spans,
            text=str(request.sample_key % 10), finish_reason="stop",
            first_token_s=now_s, finished_s=now_s, removed_mass=self._none_N,
        )  # fmt: skip

    async def load(self, manifest: WeightsManifest) -> None:
        self._serving, self._swaps = manifest.version, self._swaps + 1

    def stats(self) -> EngineStats:
        done = (self._begun - self._running) * len(self._tokens_N)
        return EngineStats(
            running=self._running, queued=self._queued, generated_tokens=done, swaps=self._swaps,
            last_swap_s=0.0,
        )  # fmt: skip

    async def close(self) -> None:
        pass


def work_on(spec_path: str, latency_s: float, tokens: int) -> None:
    """The rollout worker's process, with such an engine."""
    from slipstream.buffer.process import run_process
    from slipstream.rollout import worker
    from slipstream.rollout.config import WorkerSpec

    spec = WorkerSpec.model_validate_json(Path(spec_path).read_bytes())
    rows = spec.rollout.max_concurrent_samples
    worker.make_engine = lambda *_: FixedLatencyEngine(rows, latency_s, tokens)
    run_process(spec.name, spec.run_dir, worker.work(spec))
