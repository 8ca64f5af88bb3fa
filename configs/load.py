"""From TOML to an `Experiment`: `extends`, overrides, where each value came from, clear refusals.

    quickstart.toml <- mine.toml (extends = "quickstart") <- learner.steps=5 on the command line

Each is a layer; the later wins, key by key.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..buffer.errors import ConfigError
from . import toml
from .layers import Layer, file_layers, find_experiment, override_layer, with_bases
from .refusals import explain
from .schema import Experiment, all_sections
from .toml import Table

SECTIONS = all_sections()

NAMES_CODE = (
    "reward.name", "sft.demonstration", "prompts.task", "environment.name",
    "learner.objective.surrogate",
)  # fmt: skip
MAY_BE_PATHS = (
    "model", "prompts.path", "sft.data", "rollout.speculation.draft_model", *NAMES_CODE,
)  # fmt: skip

ARGUMENTS_OF = (
    ("prompts", "task_config", "task"),
    ("reward", "arguments", "name"),
    ("prompts", "prompt_column", "path"),
    ("prompts", "answer_column", "path"),
)
"""(section, key, owner): a layer that changes the owner does not inherit the key, which means
something only beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An experiment and where it came from."""

    experiment: Experiment
    origins: dict[str, str]
    """Dotted key -> `file:line`, `command line`, ...; keys that are not here are defaults."""
    layers: tuple[Layer, ...]
    """All that was given, the oldest first."""
    table: Table
    """The same as one."""
    as_given: str = ""
    """The file it came from, as the person wrote it."""

    @property
    def source_text(self) -> str:
        """All that was given (files, `extends`, overrides) as one TOML that loads by itself; the
        file it came from is at its end, as comments."""
        written = self.as_given.splitlines()
        comments = [f"# {line}".rstrip() + "\n" for line in ("", *written) if written]
        return toml.document(self.table, list(SECTIONS)).lstrip() + "".join(comments)


def load_experiment(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read an experiment.

    Args:
        path_or_name: a TOML file, or the name of an experiment that ships (`quickstart`).
        overrides: `learner.steps=5`; values as in TOML, strings may be bare.
    Raises:
        ConfigError: the file is not there or not TOML, a key is unknown, a value is wrong, or a
            combination is impossible; the message names key, place, reason and remedy.
    """
    path = find_experiment(str(path_or_name))
    layers = [*file_layers(path), override_layer(overrides)]
    return _compose(
        layers, path.stem, f"{path.name}, as given:\n{path.read_text(encoding='utf-8')}"
    )


def load_table(
    table: Table, overrides: Sequence[str] = (), *, source: str = "argument", name: str = "run"
) -> Loaded:
    """The same from a nested table built in Python; its `extends` is honoured.

    Raises:
        ConfigError: as `load_experiment`.
    """
    return _compose([*with_bases(Layer(table, source)), override_layer(overrides)], name)


def with_overrides(loaded: Loaded, overrides: Sequence[str], source: str) -> Loaded:
    """The experiment with some values changed; `source` is what their origin says.

    Raises:
        ConfigError: as `load_experiment`.
    """
    layers = [*loaded.layers, override_layer(overrides, source)]
    return _compose(layers, loaded.experiment.name, loaded.as_given)


def _compose(layers: Sequence[Layer], name: str, as_given: str = "") -> Loaded:
    table: Table = {"name": name}
    origins: dict[str, str] = {}
    for layer in layers:
        _discard_orphaned_arguments(table, layer.table)
        _merge(table, layer.table, "", layer, origins)
    if table.get("sft") is False:
        del table["sft"]
    if table.get("mode") == "sequential" and "buffer.max_staleness_steps" not in origins:
        toml.put(table, "buffer.max_staleness_steps", 0, 'mode = "sequential"')
        origins["buffer.max_staleness_steps"] = 'mode = "sequential"'
    return Loaded(
        experiment=validate(table, origins),
        origins=origins,
        layers=tuple(layers),
        table=table,
        as_given=as_given,
    )


def _merge(into: Table, table: Table, prefix: str, layer: Layer, origins: dict[str, str]) -> None:
    """Put a layer's values over those that are there, and note where they came from."""
    for key, value in table.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value, f"{path}.", layer, origins)
        else:
            into[key] = _resolved(path, value, layer.folder)
        if not isinstance(value, dict) or path not in SECTIONS:
            origins[path] = layer.origin(path)


def _resolved(path: str, value: Any, folder: Path) -> Any:
    """Make a path absolute that is relative to the file it is written in, when it exists there."""
    path = re.sub(r"^prompts\.mix\.[^.]+\.", "prompts.", path)
    if path not in MAY_BE_PATHS or not isinstance(value, str):
        return value
    file, colon, function = value.partition(":")
    there = (folder / file).expanduser()
    if not file or not there.exists() or (path in NAMES_CODE and there.suffix != ".py"):
        return value
    return f"{there.resolve()}{colon}{function}"


def _discard_orphaned_arguments(table: Table, layer: Table) -> None:
    for section, key, owner in ARGUMENTS_OF:
        ours, theirs = table.get(section), layer.get(section)
        if (
            isinstance(ours, dict) and isinstance(theirs, dict)
            and theirs.get(owner, ours.get(owner)) != ours.get(owner)
        ):  # fmt: skip
            ours.pop(key, None)


def validate(table: Table, origins: Mapping[str, str]) -> Experiment:
    """Build the experiment.

    Raises:
        ConfigError: one line for each thing that is wrong.
    """
    try:
        # Through JSON, because strict validation of Python values would refuse lists for tuples
        # and lax validation would take "5" and true for numbers.
        return Experiment.model_validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        problems = [explain(detail, origins) for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(problems)) from None
