"""Scores completions in child processes, so that no reward can stop, crash or corrupt a worker."""

import asyncio
import contextlib
from collections import deque
from types import TracebackType
from typing import Self

import msgspec

from ...buffer.errors import ConfigError, PeerLost, TrainingFailed
from ...buffer.records import Completion, Prompt, Score
from ..config import RewardConfig
from .base import failed
from .child import Job, RewardChild
from .process import MAX_REQUEST_BYTES, ScoreRequest

REQUESTS_AHEAD = 4
"""Sent to one child at a time: hides the round trip, yet leaves little queued behind a slow one."""
MAX_STARTS = 3
"""Attempts to replace a child that was lost; then the machine is at fault, not one sample."""
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

    def __init__(self, config: RewardConfig, num_processes: int = 1) -> None:
        """Keep the settings; nothing is started yet."""
        self.config = config
        self.restarts = 0
        """Children replaced because a reward hung or crashed."""
        self._num_processes = num_processes
        self._children: list[RewardChild] = []
        self._jobs: deque[Job] = deque()
        self._encode = msgspec.msgpack.Encoder().encode
        self._next_number = 0
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
        self._next_number += 1
        request = ScoreRequest(number=self._next_number, completion=completion, prompt=prompt)
        body = self._encode(request)
        if len(body) > MAX_REQUEST_BYTES:
            return failed(f"the request takes {len(body)} bytes, over {MAX_REQUEST_BYTES}")
        job = Job(self._next_number, body, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._pump()
        score = await job.future
        self._note(score)
        return score

    def describe(self) -> str:
        """The reward and its processes, for people who wait for it."""
        pids = ", ".join(str(child.pid) for child in self._children) or "starting"
        return f"{self.config.name}, pid {pids}"

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
        """Send waiting jobs to the least loaded children."""
        while self._jobs:
            usable = [child for child in self._children if child.usable]
            child = min(usable, key=lambda child: child.load, default=None)
            if child is None or child.load >= REQUESTS_AHEAD:
                return
            job = self._jobs.popleft()
            if not job.future.done():
                child.send(job)

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

    def _note(self, score: Score) -> None:
        self._failed.append(score.status == "reward_failed")
        if score.status == "reward_failed":
            self._last_reason = score.reason
