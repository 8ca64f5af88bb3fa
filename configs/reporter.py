"""Carries what a run reports to the display and the trackers."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console

from .feed import Event, Feed
from .live import make_display
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
            bound=-int(-experiment.buffer.max_staleness_steps // 1),
            capacity_groups=experiment.capacity_groups,
            started_s=launch.run.branches[-1].started_s,
        )
        self.observer: Observer | None = None
        self.console = console
        self._launch = launch
        self._feed = Feed(launch.run_dir)
        self._display = make_display(self.progress, console)
        self._trackers: list[Tracker] | None = None
        self._looked_s = 0.0

    def __enter__(self) -> Self:
        for event in self._feed.poll():  # a resumed run's earlier lines: known, not news
            self.progress.fold(event)
        self._display.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._display.stop()
        for tracker in self._trackers or []:
            tracker.close()

    def tick(self, phase: str) -> None:
        """Look for news, at most every `LOOK_S` unless the phase changed."""
        now_s = time.monotonic()
        if now_s - self._looked_s < LOOK_S and phase == self.progress.phase:
            return
        self._looked_s = now_s
        self.progress.phase = self._phase(phase)
        if self.observer is not None:
            self.progress.stats = self.observer.latest or self.progress.stats
        events = self._feed.poll()
        for event in events:
            self.progress.fold(event)
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
            launch = self._launch
            self._trackers = make_trackers(
                launch.experiment.track,
                launch.run_dir,
                run_id=launch.run.run_id,
                settings=launch.experiment.model_dump(mode="json"),
                step=(launch.resume_from or (0, 0))[1],
            )
        for tracker in self._trackers:
            tracker.write(events)
