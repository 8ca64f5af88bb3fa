"""Carries what a run reports to the display and the trackers."""

import math
import time
from typing import Self

from rich.console import Console

from .feed import Event, Feed
from .live import Display
from .observer import Observer
from .progress import Progress
from .specs import Launch
from .track import Tracker, make_trackers

LOOK_S = 0.2
"""Seconds between two looks at the run's files."""


class Reporter:
    """What the supervisor calls on every turn; use as a context."""

    def __init__(self, launch: Launch, console: Console) -> None:
        experiment = launch.experiment
        self.progress = Progress(
            name=launch.run_dir.name,
            total_steps=experiment.learner.steps,
            bound=math.ceil(experiment.buffer.max_staleness_steps),
            capacity_groups=experiment.capacity_groups,
            started_s=launch.run.branches[-1].started_s,
        )
        self.observer: Observer | None = None
        self.console = console
        self._launch = launch
        self._feed = Feed(launch.run_dir)
        self._display = Display(self.progress, console)
        self._trackers: list[Tracker] | None = None
        self._looked_s = 0.0

    def __enter__(self) -> Self:
        for event in self._feed.poll():  # a resumed run's earlier lines: known, not news
            self.progress.fold(event)
        self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.stop()
        for tracker in self._trackers or []:
            tracker.close()

    def tick(self, phase: str) -> None:
        """Look for news, at most every `LOOK_S` unless the phase changed."""
        now_s = time.monotonic()
        if now_s - self._looked_s < LOOK_S and phase == self.progress.phase:
            return
        self._looked_s = now_s
        if self.observer is not None and self.observer.latest is not None:
            self.progress.see(self.observer.latest)
        events = self._feed.poll()
        for event in events:
            self.progress.fold(event)
        self.progress.phase = self._phase(phase)
        if events:
            self._track(events)
        self._display.show(events)

    def _phase(self, phase: str) -> str:
        """`training`, told apart by what the first step is waiting for."""
        if phase != "training" or self.progress.steps:
            return phase
        stats = self.progress.stats
        if stats is not None and stats.newest is not None:
            return "generating for the first step"
        return "warm start" if self.progress.sft else "starting"

    def _track(self, events: list[Event]) -> None:
        if self._trackers is None:  # here and not before: importing them takes time from the start
            self._trackers = make_trackers(
                self._launch.experiment.track,
                self._launch.run_dir,
                run_id=self._launch.run.run_id,
                settings=self._launch.experiment.model_dump(mode="json"),
                step=(self._launch.resume_from or (0, 0))[1],
            )
        for tracker in self._trackers:
            tracker.write(events)
