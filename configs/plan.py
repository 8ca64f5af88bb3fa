"""`slipstream plan`: what a run would do, in words and numbers, before anything starts.

Reads config files only: no torch, no model is loaded, nothing is fetched.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..buffer.errors import ConfigError
from . import toml
from .load import Loaded
from .plan_warnings import warnings
from .plan_words import algebra, bounds, memory, staleness
from .schema import Experiment, all_keys
from .sizes import ModelSize, model_size

PIPED_WIDTH = 120

SAID_ABOVE = ("name", "description")
"""Keys that head the plan, and so are not listed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything `plan` says."""

    loaded: Loaded
    size: ModelSize | None
    sections: dict[str, list[str]]
    """Title -> sentences."""
    warnings: list[str]


def make_plan(loaded: Loaded) -> Plan:
    """Work out what the experiment means.

    Raises:
        ConfigError: the model is missing, broken, or one that this version cannot train.
    """
    experiment = loaded.experiment
    size = model_size(experiment.model)
    _refuse_experts(experiment, size)
    sections = {
        "One step and the run": list(algebra(experiment)),
        "What bounds an update": list(bounds(experiment)),
        "Staleness to expect": list(staleness(experiment)),
        "Memory and bytes": list(memory(experiment, size)),
    }
    return Plan(loaded=loaded, size=size, sections=sections, warnings=list(warnings(loaded, size)))


def _refuse_experts(experiment: Experiment, size: ModelSize | None) -> None:
    if size is not None and size.num_experts > 1 and experiment.mode == "async":
        raise ConfigError(
            f'model = "{experiment.model}" routes tokens to {size.num_experts} experts; without '
            "replaying the engine's routing, learner and engine would take different experts for "
            'the same token, and the ratio would mean nothing. Set mode = "sequential", or use a '
            "dense model"
        )


def print_plan(plan: Plan, console: Console, *, show_all: bool = False) -> None:
    """Draw it; plain text when the console is not a terminal."""
    experiment = plan.loaded.experiment
    console.print(Text.assemble((experiment.name, "bold"), f"  {experiment.description}\n"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("key", "value", "from"):
        table.add_column(title, overflow="fold")
    for path, value, origin in resolved_values(plan.loaded):
        if show_all or (origin != "default" and path not in SAID_ABOVE):
            table.add_row(path, Text(value), origin)
    console.print(table)
    for title, sentences in plan.sections.items():
        console.print(f"\n[bold]{title}[/bold]")
        console.print(_list("-", sentences))
    console.print(f"\n[bold]Warnings[/bold]{'' if plan.warnings else ': none'}")
    console.print(_list("!", plan.warnings, style="yellow"))


def _list(mark: str, sentences: Sequence[str], style: str = "") -> Table:
    """Sentences with a mark before each, wrapped beside it."""
    table = Table.grid(padding=(0, 1))
    for sentence in sentences:
        table.add_row(f"  {mark}", Text(sentence, style=style))
    return table


def resolved_values(loaded: Loaded) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted key, value as TOML, origin) of every setting; a section that is off is one."""
    if loaded.experiment.sft is None:
        yield "sft", "false", loaded.origins.get("sft", "default")
    for key in all_keys():
        section = key.path.partition(".")[0]
        if section in ("sft", "environment") and getattr(loaded.experiment, section) is None:
            continue
        value: object = loaded.experiment
        for part in key.path.split("."):
            value = getattr(value, part)
        text = "(none)" if value is None else toml.value_text(value)
        yield key.path, text, loaded.origins.get(key.path, "default")


def differences(one: Loaded, other: Loaded) -> list[tuple[str, str, str]]:
    """(dotted key, value in the one, value in the other) where they differ, in the schema's order;
    the keys of a section that only one of them has are (unset) in the other."""
    ours, theirs = (
        {path: value for path, value, _ in resolved_values(each)} for each in (one, other)
    )
    keys = [*ours, *(key for key in theirs if key not in ours)]
    pairs = [(key, ours.get(key, "(unset)"), theirs.get(key, "(unset)")) for key in keys]
    return [each for each in pairs if each[1] != each[2]]


def plan_text(loaded: Loaded, *, show_all: bool = True) -> str:
    """The plan as plain text, for the run folder and for pipes.

    Raises:
        ConfigError: as `make_plan`.
    """
    out = io.StringIO()
    console = Console(file=out, width=PIPED_WIDTH, force_terminal=False, color_system=None)
    print_plan(make_plan(loaded), console, show_all=show_all)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
