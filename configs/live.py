"""The run while it goes on: a panel on a terminal, one plain line per event everywhere else.

Both are made of the same texts; in lines the bars have no width.
"""

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .feed import Event, Row
from .progress import Progress, clock, sparkline

REFRESH_S = 0.5
"""Drawing costs milliseconds of the cores that generate and train."""
SFT_LINE_S = 5.0
WAITS_LINE_S = 15.0
"""So long nothing is reported before a line says who holds the run up."""
LAG_COLOURS = ("green", "yellow", "dark_orange", "red")
LAG_STEPS = 10
"""The panel's lag histogram is taken over so many of the newest steps."""
BAR_WIDTH = 30
BUFFER_WIDTH = 16
STATE_COLOURS = {"INFLIGHT": "yellow", "READY": "green"}


class Display:
    """Shows a run; the progress already holds the events that it is told."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress, self._console = progress, console
        on_screen = console.is_terminal and not console.is_dumb_terminal
        self._live = (
            Live(console=console, auto_refresh=False, transient=True) if on_screen else None
        )
        self._phase = ""
        self._drawn_s = self._sft_s = float("-inf")
        self._news_s = time.monotonic()

    def start(self) -> None:
        """Take the screen, if there is one."""
        if self._live is not None:
            self._live.start()

    def stop(self) -> None:
        """Give it back; the panel disappears."""
        if self._live is not None:
            self._live.stop()

    def show(self, events: list[Event]) -> None:
        """Draw the panel again when it is time, or print what is new."""
        now_s = time.monotonic()
        if self._live is None:
            self._print_news(events, now_s)
        elif now_s - self._drawn_s >= REFRESH_S:
            self._drawn_s = now_s
            self._live.update(panel(self._progress, time.time()), refresh=True)

    def _print_news(self, events: list[Event], now_s: float) -> None:
        for event in events:
            if event.kind == "sft":
                if now_s - self._sft_s < SFT_LINE_S:
                    continue
                self._sft_s = now_s
            self._print(plain_line(event, self._progress))
        if self._progress.phase != self._phase:
            self._phase = self._progress.phase
            self._print(f"{clock(time.time() - self._progress.started_s)}  {self._phase}")
        if events:
            self._news_s = now_s
        elif now_s - self._news_s > WAITS_LINE_S and self._progress.waits:
            self._news_s = now_s
            self._print("waiting: " + "; ".join(self._progress.waits))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def plain_line(event: Event, progress: Progress) -> str:
    """One event in one line."""
    row = event.row
    if event.kind == "sft":
        return f"warm start  {sft_text(row)}"
    if event.kind == "evaluation":
        return f"evaluation at step {row['step']}: {evaluation_text(row)}"
    step = row["step"]
    parts = [
        f"step {step:>{len(str(progress.total_steps))}}/{progress.total_steps}",
        f"reward {_reward(progress, step, width=16)}",
        f"lag {_lags(progress, [row], width=0)}",
        f"{row.get('tokens_per_s', 0):,.0f} tok/s",
        f"{row.get('seconds', 0):.1f} s (waited {row.get('wait_seconds', 0):.1f} s)",
    ]
    if progress.stats is not None:
        parts.append(f"groups {_buffer(progress, width=0)}")
    return "  ".join(parts)


def sft_text(row: Row) -> str:
    """Where the warm start stands."""
    return f"update {row.get('update', 0)}/{row.get('updates', '?')}  loss {row.get('loss', 0):.3f}"


def evaluation_text(row: Row) -> str:
    """An evaluation's result with its interval."""
    mean, low, high = row["reward_mean"], row["ci95_low"], row["ci95_high"]
    if mean is None:
        return f"no sample of {row['prompts']} held-out prompts could be scored"
    interval = "no interval" if low is None else f"95% {low:.3f} to {high:.3f}"
    return f"reward {mean:.3f} ({interval}) on {row['prompts']} held-out prompts"


def panel(progress: Progress, now_s: float) -> RenderableType:
    """Everything a run has reported, on one screen."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, content in _rows(progress).items():
        grid.add_row(label, content)
    body = Group(_header(progress, now_s), Text(), grid)
    title = f"[bold]slipstream[/] [cyan]{progress.name}[/]"
    return Panel(body, title=title, title_align="left", border_style="blue", padding=(0, 1))


def _header(progress: Progress, now_s: float) -> RenderableType:
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(justify="right", no_wrap=True)
    left = f"  about {clock(progress.eta_s)} left" if progress.eta_s else ""
    row.add_row(
        Text(f"step {progress.step}/{progress.total_steps}", style="bold"),
        ProgressBar(total=progress.total_steps, completed=progress.step),
        Text(clock(now_s - progress.started_s) + left, style="dim"),
    )
    return row


def _rows(progress: Progress) -> dict[str, Text]:
    """Label -> content of each row; rows with nothing to say yet are left out."""
    rows = {"now": Text(progress.phase, style="cyan")}
    if progress.sft and not progress.steps:
        rows["warm start"] = Text(sft_text(progress.sft))
    if progress.latest.get("reward_mean") is not None:
        rows["reward"] = _reward(progress, progress.step)
    if progress.evaluations:
        rows["held out"] = _evaluations(progress)
    if progress.steps:
        fine = progress.violations == 0
        rows["lag"] = _lags(progress, progress.rows[-LAG_STEPS:]).append_text(
            Text(f"  {progress.violations} violations", style="green" if fine else "bold red")
        )
        rows["tokens/s"] = _speed(progress)
    if progress.stats is not None:
        rows["buffer"] = _buffer(progress)
        rows["workers"] = _workers(progress)
        rows["waits"] = _waits(progress.waits)
    return rows


def _reward(progress: Progress, step: int, width: int = 32) -> Text:
    rewards = progress.rewards_until(step)
    if not rewards:
        return Text("-")
    text = Text(f"{rewards[-1]:.3f} ", style="bold green")
    text.append(sparkline(rewards, width), style="not bold")
    return text.append(f" from {rewards[0]:.3f}", style="not bold dim white")


def _evaluations(progress: Progress) -> Text:
    rows = [progress.evaluations[step] for step in sorted(progress.evaluations)]
    means = (row["reward_mean"] for row in rows[-6:])
    text = Text(" → ".join("-" if m is None else f"{m:.3f}" for m in means), style="green")
    low, high = rows[-1]["ci95_low"], rows[-1]["ci95_high"]
    half = "" if low is None or high is None else f"  ±{(high - low) / 2:.3f}"
    text.append(f"{half} at step {rows[-1]['step']}", style="dim")
    if progress.stats is not None and progress.stats.evaluation:
        text.append(f"  {progress.stats.evaluation}", style="cyan")
    return text


def _lags(progress: Progress, rows: list[Row], width: int = BAR_WIDTH) -> Text:
    """The share of these steps' trained tokens by lag."""
    text = Text()
    for lag, share in progress.lag_shares(rows).items():
        bar = "█" * max(1 if share else 0, round(share * width)) if width else ""
        text.append(f"{lag}: ").append(f"{bar} " if bar else "", _lag_colour(lag))
        text.append(f"{share:.0%}  ", style="dim")
    return text.append(f"bound {progress.bound}", style="dim")


def _lag_colour(lag: int) -> str:
    return LAG_COLOURS[min(lag, len(LAG_COLOURS) - 1)]


def _speed(progress: Progress) -> Text:
    row = progress.latest
    text = Text(f"{progress.generated_per_s:,.0f} generated   " if progress.generated_per_s else "")
    text.append(f"{row.get('tokens_per_s', 0):,.0f} trained   ")
    seconds, waited = row.get("seconds", 0.0), row.get("wait_seconds", 0.0)
    text.append(f"last step {seconds:.1f} s, the learner waited {waited:.1f} s of it", style="dim")
    return text


def _buffer(progress: Progress, width: int = BUFFER_WIDTH) -> Text:
    """INFLIGHT and READY as parts of the (S + 1) P groups there may be, and those before and after.

    TAKEN ones count until a checkpoint holds them, which may be many batches.
    """
    assert progress.stats is not None
    counts, capacity = progress.stats.counts, progress.capacity_groups
    bar, legend = Text(), Text()
    for word, colour in STATE_COLOURS.items():
        count = counts.get(word, 0)
        bar.append("█" * min(width - len(bar), round(count / capacity * width)), style=colour)
        legend.append(f"{word} {count} ", style=colour)
    bar.append("░" * (width - len(bar)) + ("  " if width else ""), style="dim")
    legend.append(f"of {capacity}, ", style="dim")
    legend.append(f"TAKEN {counts.get('TAKEN', 0)} unsaved, ")
    return bar.append_text(legend).append(f"WAITING {counts.get('WAITING', 0)}")


def _workers(progress: Progress) -> Text:
    assert progress.stats is not None
    text = Text()
    for name, values in sorted(progress.stats.workers.items()):
        running, speed = values.get("running", 0), values.get("tokens_per_s", 0)
        text.append(f"{name} ", style="bold").append(f"{running:.0f} rows, {speed:,.0f} tok/s, ")
        text.append(f"{values.get('idle', 0):.0%} idle, ")
        if drafted := values.get("drafted"):
            text.append(f"{values['accepted'] / drafted:.0%} of drafts right, ")
        if speed_up := values.get("speed_up"):
            text.append(f"{speed_up:.2f}x by them, ")
        text.append(f"{values.get('swaps', 0):.0f} swaps   ", style="dim")
    return text or Text("none yet", style="dim")


def _waits(waits: list[str]) -> Text:
    more = f"\n(and {len(waits) - 3} more)" if len(waits) > 3 else ""
    text = "\n".join(waits[:3]) + more
    return Text(text or "nobody", style="yellow" if text else "dim")
