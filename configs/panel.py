"""The panel: everything a run has reported, on one screen."""

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .progress import Progress, clock, sft_text, sparkline

LAG_COLOURS = ("green", "yellow", "dark_orange", "red")
BAR_WIDTH = 30

LAG_STEPS = 10
"""The lag histogram is taken over so many of the newest steps."""


def panel(progress: Progress, now_s: float) -> RenderableType:
    """The whole display as it stands."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, content in _lines(progress):
        grid.add_row(label, content)
    body = Group(_header(progress, now_s), Text(), grid)
    title = f"[bold]slipstream[/] [cyan]{progress.name}[/]"
    return Panel(body, title=title, title_align="left", border_style="blue", padding=(0, 1))


def _header(progress: Progress, now_s: float) -> RenderableType:
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(justify="right", no_wrap=True)
    eta_s = progress.eta_s
    times = clock(now_s - progress.started_s) + (f"  about {clock(eta_s)} left" if eta_s else "")
    row.add_row(
        Text(f"step {progress.step}/{progress.total_steps}", style="bold"),
        ProgressBar(total=progress.total_steps, completed=progress.step),
        Text(times, style="dim"),
    )
    return row


def _lines(progress: Progress) -> list[tuple[str, RenderableType]]:
    """Label and content of each row; rows with nothing to say yet are left out."""
    lines: list[tuple[str, RenderableType]] = [("now", Text(progress.phase, style="cyan"))]
    if progress.sft and not progress.steps:
        lines.append(("warm start", Text(sft_text(progress.sft))))
    if progress.latest.get("reward_mean") is not None:
        lines.append(("reward", _reward(progress)))
    if progress.evaluations:
        lines.append(("held out", _evaluations(progress)))
    if progress.steps:
        lines += [("lag", _lags(progress)), ("tokens/s", _speed(progress))]
    if progress.stats is not None:
        lines += [("buffer", _buffer(progress)), ("workers", _workers(progress))]
        lines.append(("waits", _waits(progress)))
    return lines


def _reward(progress: Progress) -> Text:
    rewards = progress.rewards_until(progress.step)
    text = Text(f"{rewards[-1]:.3f}  ", style="bold green")
    text.append(sparkline(rewards), style="green")
    text.append(f"  from {rewards[0]:.3f}", style="dim")
    return text


def _evaluations(progress: Progress) -> Text:
    rows = [progress.evaluations[step] for step in sorted(progress.evaluations)]
    means = [row["reward_mean"] for row in rows[-6:]]
    shown = ("-" if mean is None else f"{mean:.3f}" for mean in means)
    text = Text(" → ".join(shown), style="green")
    low, high = rows[-1]["ci95_low"], rows[-1]["ci95_high"]
    half = "" if low is None or high is None else f"  ±{(high - low) / 2:.3f}"
    text.append(f"{half} at step {rows[-1]['step']}", style="dim")
    if progress.stats is not None and progress.stats.evaluation:
        text.append(f"  {progress.stats.evaluation}", style="cyan")
    return text


def _lags(progress: Progress) -> Text:
    text = Text()
    for lag, share in progress.lag_shares(progress.rows[-LAG_STEPS:]).items():
        colour = LAG_COLOURS[min(lag, len(LAG_COLOURS) - 1)]
        text.append(f"{lag} ")
        text.append("█" * max(1 if share else 0, round(share * BAR_WIDTH)), style=colour)
        text.append(f" {share:.0%}   ", style="dim")
    fine = progress.violations == 0
    text.append(f"bound {progress.bound}, ", style="dim")
    text.append(f"{progress.violations} violations", style="green" if fine else "bold red")
    return text


def _speed(progress: Progress) -> Text:
    row = progress.latest
    generated = progress.generated_per_s
    text = Text(f"{generated:,.0f} generated   " if generated else "")
    text.append(f"{row.get('tokens_per_s', 0):,.0f} trained   ")
    seconds, waited = row.get("seconds", 0.0), row.get("wait_seconds", 0.0)
    text.append(f"last step {seconds:.1f} s, the learner waited {waited:.1f} s of it", style="dim")
    return text


def _buffer(progress: Progress) -> Text:
    """INFLIGHT, READY and TAKEN as parts of the (S + 1) P groups there may be."""
    assert progress.stats is not None
    counts, capacity = progress.stats.counts, progress.capacity_groups
    colours = {"INFLIGHT": "yellow", "READY": "green", "TAKEN": "blue"}
    bar, legend, used = Text(), Text(), 0
    for word, colour in colours.items():
        width = min(BAR_WIDTH - used, round(counts.get(word, 0) / capacity * BAR_WIDTH))
        bar.append("█" * width, style=colour)
        legend.append(f"  {word} {counts.get(word, 0)}", style=colour)
        used += width
    bar.append("░" * (BAR_WIDTH - used), style="dim")
    legend.append(f"  of {capacity} groups", style="dim")
    legend.append(f"   WAITING {counts.get('WAITING', 0)}")
    return bar.append_text(legend)


def _workers(progress: Progress) -> Text:
    assert progress.stats is not None
    text = Text()
    for name, values in sorted(progress.stats.workers.items()):
        text.append(f"{name} ", style="bold")
        text.append(
            f"{values.get('running', 0):.0f} rows, {values.get('tokens_per_s', 0):,.0f} tok/s, "
        )
        text.append(f"{values.get('idle', 0):.0%} idle, ")
        text.append(f"{values.get('swaps', 0):.0f} swaps   ", style="dim")
    return text or Text("none yet", style="dim")


def _waits(progress: Progress) -> Text:
    waits = progress.waits[:3]
    more = len(progress.waits) - len(waits)
    text = "\n".join(waits) + (f"\n(and {more} more)" if more else "")
    return Text(text or "nobody", style="yellow" if text else "dim")
