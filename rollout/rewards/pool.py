"""Scores completions in child processes, so that no reward can stop, crash or corrupt a worker."""

import asyncio
import contextlib
from collections import deque
from types import TracebackType
from typing import Self

import msgspec
import xxhash

from ...buffer.errors import ConfigError, PeerLost, TrainingFailed
from ...buffer.records import Completion, Prompt, Score
from ..config import RewardConfig
from .base import failed
from .child import Job, RewardChild
from .process import MAX_REQUEST_BYTES

REQUESTS_AHEAD = 4
"""Sent to one child at a time: hides the round trip, yet leaves little queued behind a slow one."""
MAX_STARTS = 3
"""Attempts to replace a child that was lost; then the machine is at fault, not one sample."""
MAX_CACHED = 20_000
"""Scores remembered of a cacheable reward; the oldest goes first."""
FAILURE_WINDOW = 200
MIN_REWARDS_JUDGED = 20
"""Fewer than this say nothing about the rate of failure."""
_CLOSED = failed("the reward pool was closed", "infrastructure_failed")


class RewardPool:
    """Scores completions in `num_processes` children; safe for concurrent use by many tasks.

        async with RewardPool(config) as pool:
            score = await pool.score(completion, prompt)
            pool.raise_if_failing()

    `start` may run beside other start-up work (loading a model): `score` waits for it, and starts
    the children itself when nobody did.
    """

    def __init__(self, config: RewardConfig, num_processes: int | None = None) -> None:
        """Keep the settings; nothing is started yet."""
        self.config = config
        self.restarts = 0
        """Children replaced because a reward hung or crashed."""
        self.cached = 0
        """Scores given without a call: of equal samples of a reward that declares `cacheable`."""
        self._num_processes = num_processes or config.processes
        self._children: list[RewardChild] = []
        self._jobs: deque[Job] = deque()
        self._encode = msgspec.msgpack.Encoder().encode
        self._cache: dict[bytes, Score] = {}
        self._cacheable, self._batch_size = False, 1
        self._failed: deque[bool] = deque(maxlen=FAILURE_WINDOW)
        self._last_reason = ""
        self._starting: asyncio.Task[None] | None = None
        self._replacing: set[asyncio.Task[None]] = set()
        self._broken: PeerLost | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the children and wait until the reward is loaded in each; may be called again.

        Raises:
            ConfigError: the reward cannot be loaded, with the child's message.
        """
        if self._starting is None:
            self._starting = asyncio.create_task(self._start_all())
        await asyncio.shield(self._starting)

    async def score(self, completion: Completion, prompt: Prompt) -> Score:
        """Score one completion; whatever the reward does, there is an answer in bounded time.

        Returns:
            A score whose status is `reward_failed`, with the reason, when the reward raised,
            returned something else than a finite number, took too long or took its process down;
            `infrastructure_failed` when the pool was closed, or a lost child could not be replaced,
            meanwhile.
        Raises:
            ConfigError: the reward could not be loaded at all.
            PeerLost: a child that was lost before could not be replaced.
        """
        if self._closed:
            return _CLOSED
        if not self._children and not self._replacing:
            await self.start()
        if self._broken is not None:
            raise self._broken
        sample = self._encode((completion, prompt))
        if len(sample) > MAX_REQUEST_BYTES:
            return failed(f"the request takes {len(sample)} bytes, over {MAX_REQUEST_BYTES}")
        key = self._key(completion, prompt) if self._cacheable else b""
        if key and key in self._cache:
            self.cached += 1
            return self._cache[key]
        job = Job(sample, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._pump()
        score = await job.future
        self.note(score)
        if key and score.status == "scored":
            self._remember(key, score)
        return score

    def describe(self) -> str:
        """The reward and its processes, for people who wait for it."""
        pids = ", ".join(str(child.pid) for child in self._children) or "starting"
        return f"{self.config.name}, pid {pids}"

    def _key(self, completion: Completion, prompt: Prompt) -> bytes:
        """A digest of all that a reward may look at but the sample's number in the stream."""
        asked = (prompt.task, prompt.messages, prompt.payload)
        seen = (completion.text, completion.finish_reason, completion.turns, asked)
        return xxhash.xxh3_128_digest(self._encode(seen))

    def _remember(self, key: bytes, score: Score) -> None:
        if len(self._cache) >= MAX_CACHED:
            self._cache.pop(next(iter(self._cache)))
        self._cache[key] = score

    @property
    def failure_rate(self) -> float:
        """Share of the last 200 rewards that failed; 0 before the first."""
        return sum(self._failed) / max(1, len(self._failed))

    def raise_if_failing(self) -> None:
        """End the run when rewards fail more often than `reward.max_failure_rate` allows.

        Raises:
            TrainingFailed: with the rate and the last reason.
        """
        allowed = self.config.max_failure_rate
        if len(self._failed) >= MIN_REWARDS_JUDGED and self.failure_rate > allowed:
            raise TrainingFailed(
                f"{sum(self._failed)} of the last {len(self._failed)} rewards of "
                f"{self.config.name!r} failed (reward.max_failure_rate = {allowed:g}); the last "
                f"reason: {self._last_reason}"
            )

    async def close(self) -> None:
        """End the children; what waits for a score gets `infrastructure_failed`."""
        self._closed = True
        for task in (*self._replacing, *filter(None, [self._starting])):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConfigError, OSError):
                await task
        await asyncio.gather(*(child.stop() for child in list(self._children)))
        self._drain()

    def _pump(self) -> None:
        """Send waiting jobs to the least loaded children, as many in a call as the reward takes.

        Few calls are sent ahead, so what is queued here waits without costing a worker anything:
        the engine's rows bound it.
        """
        while self._jobs:
            usable = [child for child in self._children if child.usable]
            child = min(usable, key=lambda child: child.load, default=None)
            if child is None or child.load >= (REQUESTS_AHEAD if self._batch_size == 1 else 2):
                return
            if jobs := self._next_call():
                child.send(jobs)

    def _next_call(self) -> list[Job]:
        """The jobs of the next call; those that nobody waits for any more are left out."""
        jobs: list[Job] = []
        while self._jobs and len(jobs) < self._batch_size:
            if jobs and (jobs[0].alone or self._jobs[0].alone):
                break
            job = self._jobs.popleft()
            if not job.future.done():
                jobs.append(job)
        return jobs

    def _child_lost(self, child: RewardChild, jobs: list[Job]) -> None:
        """Take back the jobs that a lost child had not begun, and replace it."""
        self._jobs.extendleft(reversed(jobs))
        if child not in self._children:
            return  # it never became ready: whoever started it is told
        self._children.remove(child)
        if self._closed:
            self._drain()
            return
        self.restarts += 1
        task = asyncio.get_running_loop().create_task(self._replace())
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    async def _start_all(self) -> None:
        await asyncio.gather(*(self._start_one() for _ in range(self._num_processes)))

    async def _start_one(self) -> None:
        child = await RewardChild.start(self.config, self._pump, self._child_lost)
        self._batch_size = child.declared.batch_size
        self._cacheable = child.declared.cacheable
        self._children.append(child)
        self._pump()

    async def _replace(self) -> None:
        """Start a successor; give up when that fails several times."""
        for attempt in range(1, MAX_STARTS + 1):
            try:
                return await self._start_one()
            except (ConfigError, OSError) as error:  # OSError: no process or memory to be had
                if attempt == MAX_STARTS:
                    self._broken = PeerLost(f"the reward process cannot be restarted: {error}")
        self._drain()

    def _drain(self) -> None:
        """Answer every job that no child will take any more."""
        while self._jobs:
            job = self._jobs.popleft()
            broken = self._broken
            job.resolve(failed(str(broken), "infrastructure_failed") if broken else _CLOSED)

    def note(self, score: Score) -> None:
        """Count a score, also one that an environment gave, in the rate of failure."""
        self._failed.append(score.status == "reward_failed")
        if score.status == "reward_failed":
            self._last_reason = score.reason
