# pyright: reportMissingImports=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""AReaL's side of `bench_staleness`, run by its own Python: prints one JSON object.

AReaL 1.0.4's `BatchTaskDispatcher` and `StalenessManager`, unchanged; an episode is a sleep. The
loop is its trainer's: take a batch, train, pause, a new version, resume.
"""

import asyncio
import itertools
import json
import logging
import sys
import time
from dataclasses import dataclass

from areal.infra.staleness_manager import StalenessManager
from areal.infra.workflow_executor import BatchTaskDispatcher


class Versions:
    """What the engine serves, and since when."""

    def __init__(self) -> None:
        self.published = [time.monotonic()]

    def get_version(self) -> int:
        """The newest."""
        return len(self.published) - 1


@dataclass
class Episode:
    """One episode of the trace."""

    task_id: int
    duration_s: float


def main(bound: int, batch: int, train_s: float, warm_up: int, steps: int, trace: str) -> dict:
    """Train so many steps on the trace; one row per trained episode."""
    with open(trace) as file:
        durations = json.load(file)
    versions = Versions()
    manager = StalenessManager(versions, (bound + 1) * batch, batch, bound)

    def make(episode: Episode):
        async def run() -> tuple[int, float, float]:
            began = time.monotonic()
            await asyncio.sleep(episode.duration_s)
            manager.on_rollout_accepted()
            return episode.task_id, began, time.monotonic()

        return run

    dispatcher = BatchTaskDispatcher((bound + 1) * batch * 16, make, manager)
    dispatcher.initialize(logging.getLogger("areal"))
    source = (Episode(i, durations[i % len(durations)]) for i in itertools.count())
    rows = []
    for step in range(1, warm_up + steps + 1):
        if step == warm_up + 1:
            began_s = time.monotonic()
        for number, start, end in dispatcher.active_submit_and_wait(source, batch):
            if step > warm_up:
                rows.append((step, number, start, end))
        time.sleep(train_s)
        dispatcher.pause()
        versions.published.append(time.monotonic())
        dispatcher.resume()
    seconds = time.monotonic() - began_s
    dispatcher.destroy()
    return {"seconds": seconds, "rows": rows, "published": versions.published}


if __name__ == "__main__":
    bound, batch, train_s, warm_up, steps = sys.argv[1:6]
    answer = main(int(bound), int(batch), float(train_s), int(warm_up), int(steps), sys.argv[6])
    print("RESULT " + json.dumps(answer), flush=True)
