"""Samples that an engine took and no longer holds, while it writes others: they are given back.

Nobody else finds them: the tokens of others show that the engine lives, and heartbeats renew the
lease. An engine that writes nothing is the doctor's.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Guarded:
    """Samples of one block."""

    samples: Mapping[str, object]
    """By request id: those that have not finished."""
    limit: asyncio.Timeout
    held_s: float
    """When the engine last held one of them."""
    is_lost: bool = False


class Lost:
    """Trace, with a patience of 300 s:

    async with guard({"a": 0, "b": 1})     the engine holds a and b
    look({"a"})                            b is lost, or is being handed over; a goes on
    look({}), for 300 s                    the block ends, `is_lost`
    """

    def __init__(self, patience_s: float) -> None:
        """Wait for so long until what the engine does not hold is lost."""
        self._patience_s = patience_s
        self._guarded: set[Guarded] = set()

    @asynccontextmanager
    async def guard(self, samples: Mapping[str, object]) -> AsyncIterator[Guarded]:
        """A block that generates samples and takes out those that finish; it ends early, and
        without an error, when all that are left are lost."""
        guarded = Guarded(samples, asyncio.timeout(None), time.monotonic())
        try:
            async with guarded.limit:
                self._guarded.add(guarded)
                try:
                    yield guarded
                finally:
                    self._guarded.discard(guarded)
        except TimeoutError:
            if not guarded.is_lost:
                raise

    def look(self, held: Collection[str]) -> None:
        """Note what the engine holds, when it has just written tokens."""
        now_s = time.monotonic()
        for guarded in self._guarded:
            if any(name in held for name in guarded.samples):
                guarded.held_s = now_s
            elif not guarded.is_lost and now_s - guarded.held_s > self._patience_s:
                guarded.is_lost = True
                guarded.limit.reschedule(asyncio.get_running_loop().time())
