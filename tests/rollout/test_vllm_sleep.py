"""Who sleeps and who wakes, with a core that only says what it was told."""

import asyncio

from slipstream.rollout.engines.vllm_sleep import Sleeper


class Core:
    """Does what it is told when it is let."""

    def __init__(self):
        self.told, self.may = [], asyncio.Event()

    async def sleep(self, level, mode):
        await self.may.wait()
        self.told.append(("sleep", level, mode))

    async def wake_up(self):
        await self.may.wait()
        self.told.append("wake")


async def tell(call):
    await call


async def test_a_sample_that_arrives_while_the_core_falls_asleep_finds_it_awake():
    core, sleeper = Core(), Sleeper(tell)
    falling = asyncio.create_task(sleeper.sleep(core, lambda: True))
    await asyncio.sleep(0)
    arrived = asyncio.create_task(sleeper.wake(core))
    await asyncio.sleep(0.01)
    assert [falling.done(), arrived.done()] == [False, False]
    core.may.set()
    await asyncio.gather(falling, arrived)
    assert (core.told, sleeper.asleep) == ([("sleep", 1, "keep"), "wake"], False)


async def test_a_core_that_got_work_meanwhile_does_not_fall_asleep():
    core, sleeper = Core(), Sleeper(tell)
    core.may.set()
    await sleeper.sleep(core, lambda: False)
    assert not core.told


async def test_whoever_waits_may_be_cancelled_and_the_change_goes_on():
    core, sleeper = Core(), Sleeper(tell)
    falling = asyncio.create_task(sleeper.sleep(core, lambda: True))
    await asyncio.sleep(0.01)
    falling.cancel()
    await asyncio.gather(falling, return_exceptions=True)
    core.may.set()
    await sleeper.wake(core)
    assert (core.told, sleeper.asleep) == ([("sleep", 1, "keep"), "wake"], False)
