"""vLLM's sleep mode: an engine without samples leaves its device's memory to the learner on it.

    new weights, or a sample, arrive      wake
    the last sample in the engine ends    sleep: weights go to the host, keys and values are dropped
    it is handed out                      so a learner that has its whole batch is alone

On processors vLLM's workers keep their memory, and all else happens as it does on a GPU.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


class Sleeper:
    """Whether a core is asleep. One change at a time, and whoever waits for it may be cancelled:
    the change goes on."""

    def __init__(self, tell: Callable[[Awaitable[Any]], Awaitable[None]]) -> None:
        """Awake.

        Args:
            tell: waits for the core to do what it is told, or ends it; raises nothing.
        """
        self._tell, self._lock = tell, asyncio.Lock()
        self.asleep = False

    async def sleep(self, llm: Any, is_idle: Callable[[], bool]) -> None:
        """Let the core sleep if it is idle, still, when those before are through."""
        await asyncio.shield(self._sleep(llm, is_idle))

    async def wake(self, llm: Any) -> None:
        """Return once the core is awake, or ended."""
        if self.asleep or self._lock.locked():
            await asyncio.shield(self._wake(llm))

    async def _sleep(self, llm: Any, is_idle: Callable[[], bool]) -> None:
        async with self._lock:
            if not self.asleep and is_idle():
                await self._tell(llm.sleep(level=1, mode="keep"))
                self.asleep = True

    async def _wake(self, llm: Any) -> None:
        async with self._lock:
            if self.asleep:
                await self._tell(llm.wake_up())
                self.asleep = False
