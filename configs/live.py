"""The run while it goes on: a panel on a terminal, one plain line per step everywhere else."""

import time
from typing import Protocol

from rich.console import Console
from rich.live import Live

from .feed import Event, Row
from .panel import panel
from .progress import Progress, clock, joined, sft_text, sparkline

REFRESH_S = 0.5
"""Drawing costs milliseconds of the cores that generate and train."""


class Display(Protocol):
    """Shows a run; called by the supervisor."""

    def start(self) -> None: ...

    def show(self, events: list[Event]) -> None:
        """These lines are new; the progress already holds them."""
        ...

    def stop(self) -> None: ...


def make_display(progress: Progress, console: Console) -> Display:
    """The panel on a terminal, plain lines otherwise."""
    if console.is_terminal and not console.is_dumb_terminal:
        return PanelDisplay(progress, console)
    return PlainDisplay(progress, console)


class PanelDisplay:
    """A panel that is drawn again every `REFRESH_S` and disappears at the end."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress = progress
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn_s = 0.0

    def start(self) -> None:
        self._live.start()

    def show(self, events: list[Event]) -> None:
        now_s = time.monotonic()
        if now_s - self._drawn_s >= REFRESH_S:
            self._drawn_s = now_s
            self._live.update(panel(self._progress, time.time()), refresh=True)

    def stop(self) -> None:
        self._live.stop()


class PlainDisplay:
    """One line for each step, evaluation and change of phase: reads well in a log."""

    SFT_EVERY_S = 5.0

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress = progress
        self._console = console
        self._phase = ""
        self._sft_s = 0.0
        self._waits_s = time.monotonic()

    def start(self) -> None:
        """Nothing to prepare."""

    def show(self, events: list[Event]) -> None:
        for event in events:
            self._show_event(event)
        if events:
            self._waits_s = time.monotonic()
        self._show_phase()
        self._show_waits()

    def stop(self) -> None:
        """Nothing to take down."""

    def _show_event(self, event: Event) -> None:
        if event.kind == "sft":
            now_s = time.monotonic()
            if now_s - self._sft_s < self.SFT_EVERY_S:
                return
            self._sft_s = now_s
        self._print(plain_line(event, self._progress))

    def _show_phase(self) -> None:
        if self._progress.phase != self._phase:
            self._phase = self._progress.phase
            self._print(f"{clock(time.time() - self._progress.started_s)}  {self._phase}")

    def _show_waits(self, patience_s: float = 15.0) -> None:
        """After a long silence say who holds the run up, if anybody does."""
        waits = self._progress.waits
        if time.monotonic() - self._waits_s > patience_s and waits:
            self._waits_s = time.monotonic()
            self._print("waiting: " + "; ".join(waits))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def plain_line(event: Event, progress: Progress) -> str:
    """One event in one line."""
    row = event.row
    if event.kind == "sft":
        return joined(("warm start", sft_text(row)))
    if event.kind == "evaluation":
        return f"evaluation at step {row['step']}: {evaluation_text(row)}"
    lags = " ".join(f"{lag}:{share:.0%}" for lag, share in progress.lag_shares([row]).items())
    step, width = row["step"], len(str(progress.total_steps))
    trend = sparkline(progress.rewards_until(step), 16)
    return joined(
        (
            f"step {step:>{width}}/{progress.total_steps}",
            f"reward {row.get('reward_mean', 0):.3f} {trend}",
            f"lag {lags}",
            f"{row.get('tokens_per_s', 0):,.0f} tok/s",
            f"{row.get('seconds', 0):.1f} s (waited {row.get('wait_seconds', 0):.1f} s)",
            buffer_text(progress),
        )
    )


def evaluation_text(row: Row) -> str:
    """An evaluation's result with its interval."""
    mean, low, high = row["reward_mean"], row["ci95_low"], row["ci95_high"]
    if mean is None:
        return f"no sample of {row['prompts']} held-out prompts could be scored"
    interval = "no interval" if low is None else f"95% {low:.3f} to {high:.3f}"
    return f"reward {mean:.3f} ({interval}) on {row['prompts']} held-out prompts"


def buffer_text(progress: Progress) -> str:
    """Groups by state: those the policy is at, of the (S + 1) P there may be, and the queue."""
    if progress.stats is None:
        return ""
    counts = progress.stats.counts
    inflight, ready = counts.get("INFLIGHT", 0), counts.get("READY", 0)
    used = f"INFLIGHT {inflight} + READY {ready} of {progress.capacity_groups} groups"
    return joined((used, f"WAITING {counts.get('WAITING', 0)}"))
