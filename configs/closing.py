"""The closing screen: what happened, where things are, what to try next."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .progress import clock
from .result import Evaluated, Result, RunResult, verdict

STATUS_STYLE = {"finished": "bold green", "failed": "bold red", "interrupted": "bold yellow"}


def print_closing(run: RunResult, console: Console, *, tensorboard: bool = True) -> None:
    """Print the screen; every line stands alone, so that a log can be searched."""
    result, style = run.result, STATUS_STYLE.get(run.status, "bold")
    console.print()
    console.rule(f"[{style}]{run.run_dir.name} {run.status}[/]", align="left", style="dim")
    if run.status == "failed":
        _say(console, [f"reason: {result.reason}"], style="red")
    _section(console, "What happened", what_happened(result))
    _section(console, "Where things are", where_things_are(run, tensorboard))
    _section(console, "What to try next", what_next(run))


def _section(console: Console, title: str, lines: Iterator[str]) -> None:
    console.print(f"[bold]{title}[/]")
    _say(console, list(lines))


def _say(console: Console, lines: Sequence[str], style: str | None = None) -> None:
    for line in lines:
        console.print(f"  {escape(line)}", style=style, highlight=False, soft_wrap=True)


def what_happened(result: Result) -> Iterator[str]:
    """Yield the run in sentences, the ones that have something to say."""
    yield from _reward(result)
    yield _time(result)
    if not result.steps:
        return
    yield (
        f"max lag {result.max_lag} (bound {result.bound}): "
        f"{result.staleness_violations} staleness violations, {result.orphaned_tokens} orphaned "
        "tokens"
    )
    yield f"{result.mixed_fraction:.1%} of the trained trajectories hold two versions or more"
    yield _drops(result)
    if result.logprob_gap_max is not None:
        yield (
            f"log-prob gap between rollout and learner: at most {result.logprob_gap_max:.1e} on "
            "tokens of one version"
        )
    if result.logprob_certificate:
        yield f"log-prob certificate: {result.logprob_certificate}"
    if result.audit is not None:
        yield f"audit: {'ok' if result.audit.ok else 'FAILED'}, {result.audit.line}"


def _reward(result: Result) -> Iterator[str]:
    first, final = result.reward_first, result.reward_final
    if first is None:
        yield "held-out reward: not evaluated"
    elif final is None:
        yield f"held-out reward {_interval(first)} on {first.prompts} prompts at step {first.step}"
    else:
        word = verdict(first, final)
        rise = "" if result.reward_rise is None else f"{result.reward_rise:+.3f}, "
        yield (
            f"held-out reward {word}: from {_interval(first)} to {_interval(final)} on "
            f"{final.prompts} prompts ({rise}step {final.step})"
        )
        if word in ("fell", "did not change measurably") and result.status == "finished":
            yield f"this run did not improve the policy: {_advice(result)}"


def _interval(evaluated: Evaluated) -> str:
    if evaluated.mean is None:
        return "unknown (no sample could be scored)"
    if evaluated.ci95_low is None or evaluated.ci95_high is None:
        return f"{evaluated.mean:.3f} [no interval]"
    return f"{evaluated.mean:.3f} [95% CI {evaluated.ci95_low:.3f}, {evaluated.ci95_high:.3f}]"


def _advice(result: Result) -> str:
    """What usually explains a reward that did not rise, from what the run saw."""
    no_signal = result.dropped.get("no_signal", 0)
    first = result.reward_first.mean if result.reward_first is not None else None
    if first is not None and first < 0.02:
        return "it starts near 0, so groups hold no signal; give it a (longer) warm start: [sft]"
    if no_signal > 2 * result.steps:
        return f"{no_signal} samples were in groups of equal rewards; try more samples_per_prompt"
    return "more steps or another learner.optimizer.learning_rate may help"


def _time(result: Result) -> str:
    if result.status == "finished" and not result.steps:
        return f"warm start in {clock(result.total_seconds)}"
    parts = [f"{result.steps} of {result.planned_steps} steps in {clock(result.total_seconds)}"]
    if result.first_step_seconds is not None:
        parts.append(f"first step after {result.first_step_seconds:.1f} s")
    if result.steps:
        parts.append(f"{result.tokens_trained:,} tokens trained ({result.tokens_per_s:,.0f}/s)")
    return ", ".join(parts)


def _drops(result: Result) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in result.dropped.items() if count)
    bias = "" if result.length_bias is None else (
        f"; length bias {result.length_bias:.3f} (mean tokens trained / issued)"
    )  # fmt: skip
    return f"samples dropped: {counts or 'none'}{bias}"


def where_things_are(run: RunResult, tensorboard: bool) -> Iterator[str]:
    """Yield each thing's path."""
    yield f"run          {_path(run.run_dir)}"
    export = run.result.export
    if export is not None:
        gap = export.max_logit_difference
        checked = f"reloads with logits equal to {gap:.1e}" if gap is not None else "reloads"
        state = checked if export.ok else f"NOT exported: {export.message}"
        yield f"model        {_path(Path(export.path))} ({state})"
    yield f"metrics      {_path(run.run_dir / 'metrics.jsonl')}"
    if tensorboard:
        yield f"tensorboard  tensorboard --logdir {_quoted(run.run_dir / 'tensorboard')}"


def what_next(run: RunResult) -> Iterator[str]:
    """Yield three commands that can be pasted."""
    folder = _quoted(run.run_dir)
    if run.status != "finished":
        yield resume_line(run.run_dir)
        yield f"tail -n 30 {folder}/logs/*.log"
        yield f"slipstream audit {folder}"
        return
    again = f"slipstream run {folder}/resolved.toml"
    if not run.result.steps:
        yield again
        yield f"{again} model={folder}/export sft=false"
        return
    yield f"slipstream show {folder} --step {run.result.steps} --pick worst"
    yield f"slipstream audit {folder}"
    yield f"{again} seed={run.seed + 1}"


def resume_line(run_dir: Path) -> str:
    """The exact command that continues a run."""
    return f"slipstream resume {_quoted(run_dir)}"


def _quoted(path: Path) -> str:
    return shlex.quote(_path(path))


def _path(path: Path) -> str:
    """Relative to here when that is shorter and inside, as a person would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _mean(evaluated: Evaluated | None) -> str:
    return "-" if evaluated is None or evaluated.mean is None else f"{evaluated.mean:.3f}"


def seeds_table(runs: Sequence[RunResult]) -> Table:
    """One row per sibling."""
    table = Table("run", "status", "reward from", "to", "rise", "first step", "total", box=None)
    for each in runs:
        result = each.result
        first, final, rise = result.reward_first, result.reward_final, result.reward_rise
        table.add_row(
            each.run_dir.name,
            each.status,
            _mean(first),
            _mean(final),
            f"{rise:+.3f}" if rise is not None else "-",
            f"{result.first_step_seconds:.1f} s" if result.first_step_seconds else "-",
            f"{result.total_seconds:.0f} s",
        )
    return table
