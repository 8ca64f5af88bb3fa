"""The rollout worker process: claims samples, generates, scores and hands them in.

    claim -> Claims -> _work_on -> engine.generate -> HandIn.finish -> client.finish
    _follow_versions -> engine.load                 (in flight, between two tokens)
    _heartbeat -> leases renewed, stats

One event loop; tokens are made in the engine's thread and rewards in processes of their own, so
none of these waits for another. Run as `python -m slipstream.rollout.worker SPEC.json`.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..buffer.client import BufferClient
from ..buffer.errors import ConfigError, CorruptData, Refused
from ..buffer.messages import Claim, Claims
from ..buffer.process import run_process
from ..buffer.records import Message, WeightsManifest
from ..buffer.waits import progressed, waiting
from ..buffer.weight_fetch import Inbox
from ..buffer.weight_holder import own_endpoint
from ..kernels.models import load_tokenizer, render_prompt
from .config import EngineSpec, WorkerSpec
from .engine import START_S, Engine, GenerationRequest
from .engines.native import NativeEngine
from .engines.vllm_law import gpu_name, law_proved
from .environments.episode import EpisodeFailed, Player
from .evaluator import Evaluator
from .hand_in import HandIn
from .load import InFlight
from .lost import Lost
from .rewards.pool import RewardPool
from .samples import training_requests
from .spares import Spares

POLL_S = 2.0
"""How long a claim stays parked; a new version or free rows do not wait for it."""
EVALUATION_POLL_S = 20.0
"""The same for held-out samples, which come seldom; a thousand workers ask."""
VERSION_POLL_S = 10.0
HEARTBEAT_S = 2.0
"""Or a quarter of the lease, when that is shorter."""
LOAD_ATTEMPTS = 5
"""Weights may be retired while we read them; the newest that cannot be read so often is corrupt."""


class Worker:
    """The loop, given its engine, reward pool and buffer client."""

    def __init__(
        self,
        spec: WorkerSpec,
        engine: Engine,
        rewards: RewardPool,
        client: BufferClient,
        inbox: Inbox | None = None,
    ) -> None:
        """Prepare; `run` starts. Without an inbox the learner's files are seen from here.

        Raises:
            ConfigError: see `NativeEngine`.
        """
        self._spec, self._engine, self._rewards, self._client = spec, engine, rewards, client
        self._inbox = inbox
        self._sent = sender_of(spec) is not None
        """Whether weights for training samples come from device to device, not as files."""
        self._tokenizer = load_tokenizer(spec.model_dir)
        self._player = Player(spec.environment, self._tokenizer) if spec.environment else None
        # While an environment or an agent is at work the engine may have nothing to write.
        deadline_s = spec.stall_s + spec.environment.timeout_s if spec.environment else 0.0
        self._evaluator = Evaluator(
            lambda: make_engine(spec, "eval"),
            self._render,
            rewards,
            client,
            spec.seed,
            spec.name,
            self._player,
            self._local,
            deadline_s,
        )
        self._hand_in = HandIn(client, rewards, spec.name, deadline_s)
        rows = spec.rollout.max_concurrent_samples
        self._prefetch = max(1, rows // 8)
        self._in_flight, self._spares = InFlight(rows), Spares()
        self._lost = Lost(spec.stall_s)
        self._generating = self._generated = 0
        self._room, self._loaded, self._closing = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._lease_s = HEARTBEAT_S  # until a claim says how long its lease is
        self._idle_s, self._idle_since_s = 0.0, time.monotonic()

    async def run(self) -> None:
        """Work until the run closes; when cancelled instead, give back what is not handed in.

        What a closing run leaves INFLIGHT stays so: resumed, it issues the same attempts again.

        Raises:
            TrainingFailed: rewards, or samples, fail more often than allowed.
            PeerLost: the buffer service is gone.
            CorruptData: the newest weights cannot be read.
        """
        work = asyncio.create_task(self._work())
        closing = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait({work, closing}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, closing):
                task.cancel()
            await asyncio.gather(work, closing, return_exceptions=True)
            if self._player is not None:
                await self._player.close()
            if not self._closing.is_set():
                await self._hand_in.give_back()

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            for loop in (
                self._follow_versions(),
                self._claim_training(),
                self._claim_evaluations(),
                self._evaluator.run(),
                self._heartbeat(),
            ):
                self._tasks.create_task(loop)

    async def _follow_versions(self) -> None:
        """Load each newest version as soon as it is there."""
        failures = 0
        while True:
            serving = self._engine.serving
            newest = await self._client.await_version(after=serving, wait_s=VERSION_POLL_S)
            if newest.closing:
                self._closing.set()
                return
            if newest.manifest is None or newest.manifest.version == serving:
                continue
            try:
                with waiting(self._spec.name, f"its engine to load {newest.manifest.version}"):
                    manifest = newest.manifest
                    await self._engine.load(manifest if self._sent else await self._local(manifest))
                failures = 0
                self._loaded.set()
            except CorruptData:
                failures += 1
                if failures == LOAD_ATTEMPTS:
                    raise
                await asyncio.sleep(0.1 * failures)

    async def _local(self, manifest: WeightsManifest) -> WeightsManifest:
        """The version in files that are seen from here."""
        if self._inbox is None:
            return manifest
        return await asyncio.to_thread(self._inbox.local, manifest)

    async def _claim_training(self) -> None:
        """Keep the engine's rows filled, and a few samples queued behind them.

        Claims are small, one group at most, so that workers that ask at the same time share.
        """
        await self._loaded.wait()
        while not self._closing.is_set():
            self._room.clear()
            self._loaded.clear()
            room = self._in_flight.limit + self._prefetch - self._generating
            if 2 * room < self._prefetch:
                await self._room.wait()
                continue
            wanted = min(room, max(self._prefetch, self._spec.rollout.samples_per_prompt))
            claim = self._tasks.create_task(self._claim(wanted))
            # What an old version may not claim a new one may: then ask again at once. The parked
            # claim is left alone: a granted one whose answer nobody reads would be lost.
            loaded = asyncio.create_task(self._loaded.wait())
            await asyncio.wait({claim, loaded}, return_when=asyncio.FIRST_COMPLETED)
            loaded.cancel()

    async def _claim_evaluations(self) -> None:
        """Ask for held-out samples all the time: their engine has room when the other has none."""
        while self._engine.serving is None:
            await asyncio.sleep(0.05)
        while not self._closing.is_set():
            await self._claim(0, EVALUATION_POLL_S)

    async def _claim(self, max_samples: int, wait_s: float = POLL_S) -> None:
        """Ask once, and start what is granted."""
        serving = self._engine.serving
        if serving is None:  # it died: `_follow_versions` starts it again
            await asyncio.sleep(0.1)
            return
        try:
            claims = await self._client.claim(serving, max_samples, wait_s=wait_s)
        except Refused:  # our version left the live path: the newest is on its way
            await asyncio.sleep(0.1)
            return
        if claims.closing:
            self._closing.set()
        self._start(claims)

    def _start(self, claims: Claims) -> None:
        self._evaluator.put(claims.evaluations)
        for claim in claims.claims:
            self._lease_s = claim.lease_s
            self._tasks.create_task(self._work_on(claim))

    def _render(self, messages: Sequence[Message]) -> list[int]:
        return render_prompt(self._tokenizer, messages)

    async def _work_on(self, claim: Claim) -> None:
        """Generate a claim's samples; each is scored and handed in by a task of its own."""
        claimed_s = time.time()
        token_ids = self._render(claim.ticket.prompt.messages)
        samples = training_requests(claim, token_ids, self._spec.rollout, self._spec.seed)
        for name, (index, _) in samples.items():
            self._hand_in.lease(claim, name, index)
        self._count(len(samples))
        if self._player is not None:
            for index, request in samples.values():
                self._tasks.create_task(self._play(self._player, claim, index, request, claimed_s))
            return
        requests = [request for _, request in samples.values()]
        try:
            race = self._spares.race(claim, claim.indices)
            async with race, self._lost.guard(samples) as guarded:
                async for output in self._engine.generate(requests):
                    self._count(-1)
                    index, request = samples.pop(output.request_id)
                    output = self._spares.finished(claim, index, output)
                    finish = self._hand_in.finish(claim, index, request, output, claimed_s)
                    self._tasks.create_task(finish)
        finally:
            self._count(-len(samples))
        left = {name: index for name, (index, _) in samples.items()}
        if guarded.is_lost:
            await self._hand_in.lose(claim, left)
        elif claim.ticket.sizing.spares:
            await self._hand_in.cut(claim, left)

    async def _play(
        self, player: Player, claim: Claim, index: int, request: GenerationRequest, claimed_s: float
    ) -> None:
        """Play one sample as an episode, and hand it in."""
        episode = None
        try:
            async with self._spares.race(claim, (index,)):
                episode = await player.play(self._engine, request, claim.ticket.prompt)
        except EpisodeFailed as error:
            await self._hand_in.reject(claim, index, request.request_id, str(error))
            return
        finally:
            self._count(-1)
        if episode is None:
            await self._hand_in.cut(claim, {request.request_id: index})
            return
        output = self._spares.finished(claim, index, episode.output)
        finish = self._hand_in.finish(claim, index, request, output, claimed_s, episode)
        self._tasks.create_task(finish)

    def _count(self, change: int) -> None:
        """Keep track of the samples in the engine, and of the time without any."""
        now_s = time.monotonic()
        if not self._generating:
            self._idle_s += now_s - self._idle_since_s
        self._generating += change
        self._idle_since_s = now_s
        if change < 0:
            self._generated -= change
            self._room.set()

    async def _heartbeat(self) -> None:
        """Keep the leases and say how it goes."""
        written, beat_s = 0, time.monotonic()
        while True:
            await asyncio.sleep(min(HEARTBEAT_S, self._lease_s / 4))
            self._count(0)
            stats, now_s = self._engine.stats(), time.monotonic()
            self._in_flight.observe(
                kv_share=stats.kv_share,
                preemptions=stats.preemptions,
                running=stats.running,
                queued=stats.queued,
                finished=self._generated,
            )
            self._room.set()
            if stats.generated_tokens > written:
                progressed(f"the engine of {self._spec.name}")
                if stats.held is not None:
                    self._lost.look(stats.held)
            self._evaluator.beat()
            await self._client.heartbeat(
                self._engine.serving,
                {
                    "running": stats.running,
                    "queued": stats.queued,
                    "limit": self._in_flight.limit,
                    "preemptions": stats.preemptions,
                    "scoring": self._hand_in.num_open - self._generating,
                    "tokens": stats.generated_tokens,
                    "tokens_per_s": (stats.generated_tokens - written) / (now_s - beat_s),
                    "swaps": stats.swaps,
                    "last_swap_s": stats.last_swap_s,
                    "drafted": stats.drafted_tokens,
                    "accepted": stats.accepted_tokens,
                    "speed_up": stats.speed_up,
                    "idle": self._idle_s / (now_s - beat_s),
                },
            )
            written, beat_s, self._idle_s = stats.generated_tokens, now_s, 0.0


def make_engine(spec: EngineSpec, purpose: str = "") -> Engine:
    """An engine as the spec asks for; the one for evaluations has rows of its own."""
    if spec.rollout.engine == "vllm":
        from .engines.vllm import VllmEngine

        settings = spec.rollout.vllm
        drafts = settings.speculative_config
        if drafts and not purpose and not law_proved(drafts, gpu_name()):  # these are drawn
            settings = settings.model_copy(update={"speculative_config": {}})
        engine = VllmEngine(
            spec.model_dir,
            dtype=spec.dtype,
            max_concurrent=spec.rollout.max_concurrent_samples,
            kv=spec.rollout.kv,
            threads=spec.rollout.threads_per_worker,
            engine_id=f"{spec.name}-{purpose}" if purpose else spec.name,
            settings=settings,
            sender=None if purpose else sender_of(spec),
        )
        if not purpose and not engine.draws:
            raise ConfigError(
                "rollout.vllm.speculative_config: `make gpu-check` has proved its law for another "
                f"of vLLM's model runners than {engine.runner}, which this model runs on; set "
                "VLLM_USE_V2_MODEL_RUNNER to the one that was proved, or remove the setting"
            )
        return engine
    return NativeEngine(
        spec.model_dir,
        dtype=spec.dtype if spec.rollout.weights == "as_trained" else spec.rollout.weights,
        max_concurrent=spec.rollout.max_concurrent_samples,
        kv=spec.rollout.kv,
        ratio_law=spec.rollout.ratio_law,
        threads=spec.rollout.threads_per_worker,
        engine_id=f"{spec.name}-{purpose}" if purpose else spec.name,
        speculation=spec.rollout.speculation,
        prefill_tokens=spec.rollout.prefill_tokens,
        kv_memory_mb=spec.rollout.kv_memory_mb,
    )


def sender_of(spec: EngineSpec) -> Path | None:
    """Where the process that sends weights to vLLM leaves its address; None: they are files."""
    if (
        not isinstance(spec, WorkerSpec)
        or spec.rollout.engine != "vllm"
        or spec.rollout.vllm.weights == "files"
    ):
        return None
    return spec.run_dir / "processes" / "sender.address"


async def work(spec: WorkerSpec) -> None:
    """Run one worker until the run closes."""
    client = BufferClient(spec.endpoint, spec.run_id, spec.name)
    rewards = RewardPool(spec.reward)
    engine: Engine | None = None
    inbox: Inbox | None = None
    try:
        if spec.fetched_dir is not None:
            endpoint = own_endpoint(spec.endpoint, spec.name)
            inbox = Inbox(spec.fetched_dir, endpoint, always=spec.fetch_always)
        await client.connect()
        with waiting(spec.name, "its engine and reward processes to start", START_S):
            engine, _ = await asyncio.gather(asyncio.to_thread(make_engine, spec), rewards.start())
        await Worker(spec, engine, rewards, client, inbox).run()
    finally:
        if engine is not None:
            await engine.close()
        await rewards.close()
        await client.close()
        if inbox is not None:
            inbox.close()


def main() -> None:
    """Run the worker that a spec file describes."""
    spec = WorkerSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    run_process(spec.name, spec.run_dir, work(spec))


if __name__ == "__main__":
    main()
