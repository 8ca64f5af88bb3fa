"""From TOML to an `Experiment`: `extends`, overrides, where each value came from, clear refusals.

    quickstart.toml <- mine.toml (extends = "quickstart") <- learner.steps=5 on the command line

Each is a layer; the later wins, key by key.
"""

import dataclasses
import json
import tomllib
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

MAY_BE_PATHS = ("model", "prompts.path", "sft.data", "reward.name", "sft.demonstration")

ARGUMENTS_OF = {
    "prompts.task_config": "prompts.task",
    "reward.arguments": "reward.name",
    "prompts.prompt_column": "prompts.path",
    "prompts.answer_column": "prompts.path",
}
"""Values that mean something only beside another one: a layer that changes the key on the right
does not inherit the one on the left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An experiment and where it came from."""

    experiment: Experiment
    origins: dict[str, str]
    """Dotted key -> `file:line`, `command line`, ...; keys that are not here are defaults."""
    source_text: str
    """All that was given (files, `extends`, overrides) as one TOML that loads by itself; the file
    it came from is at its end, as comments."""


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
    layers = file_layers(path)
    as_given = f"{path.name}, as given:\n{path.read_text(encoding='utf-8')}"
    return _compose([*layers, override_layer(overrides)], path.stem, as_given)


def load_table(
    table: Table, overrides: Sequence[str] = (), *, source: str = "argument", name: str = "run"
) -> Loaded:
    """The same from a nested table built in Python; its `extends` is honoured.

    Raises:
        ConfigError: as `load_experiment`.
    """
    layers = with_bases(Layer(table, source, {}, Path.cwd()))
    return _compose([*layers, override_layer(overrides)], name)


def with_overrides(loaded: Loaded, overrides: Sequence[str], source: str) -> Loaded:
    """The experiment with some values changed; `source` is what their origin says.

    Raises:
        ConfigError: as `load_experiment`.
    """
    layers = [
        Layer(tomllib.loads(loaded.source_text), "", {}, Path.cwd()),
        override_layer(overrides, source),
    ]
    changed = _compose(layers, loaded.experiment.name)
    origins = {
        path: where or loaded.origins.get(path, "") for path, where in changed.origins.items()
    }
    return dataclasses.replace(changed, origins=origins)


def _compose(layers: Sequence[Layer], name: str, as_given: str = "") -> Loaded:
    table: Table = {}
    origins: dict[str, str] = {}
    for layer in layers:
        _discard_orphaned_arguments(table, layer.table)
        _merge(table, layer.table, "", layer, origins)
    table = {"name": name, **table}
    if table.get("sft") is False:
        del table["sft"]
    bound_given = "max_staleness_steps" in _section(table, "buffer")
    if table.get("mode") == "sequential" and not bound_given:
        table["buffer"] = {**_section(table, "buffer"), "max_staleness_steps": 0}
        origins["buffer.max_staleness_steps"] = 'mode = "sequential"'
    experiment = validate(table, origins)
    text = toml.document(table, list(SECTIONS)) + _commented(as_given)
    return Loaded(experiment=experiment, origins=origins, source_text=text)


def _commented(text: str) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in ("", *text.splitlines())) if text else ""


def _section(table: Table, name: str) -> Table:
    found = table.get(name, {})
    return found if isinstance(found, dict) else {}


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
    if path not in MAY_BE_PATHS or not isinstance(value, str):
        return value
    file, colon, function = value.partition(":")
    names_code = path in ("reward.name", "sft.demonstration")
    there = (folder / file).expanduser()
    if not file or not there.exists() or (names_code and there.suffix != ".py"):
        return value
    return f"{there.resolve()}{colon}{function}"


def _discard_orphaned_arguments(table: Table, layer: Table) -> None:
    for arguments, owner in ARGUMENTS_OF.items():
        section, owner_key = owner.split(".")
        ours, theirs = _section(table, section), _section(layer, section)
        if owner_key in theirs and theirs[owner_key] != ours.get(owner_key):
            ours.pop(arguments.split(".")[1], None)


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
