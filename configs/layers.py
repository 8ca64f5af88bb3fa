"""Where values come from: experiment files, those they extend, and overrides, each one a layer."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..buffer.errors import ConfigError
from ..rollout.suggest import did_you_mean
from . import toml
from .toml import Table

EXPERIMENTS_DIR = Path(__file__).parent / "experiments"

NOT_INHERITED = ("extends", "name", "description")
"""Inherited, the last two would make two experiments look like one."""

NUMBER = re.compile(r"[+-]?(\d+\.|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
"""`.9` and `1.`: numbers to people and shells, not to TOML."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One source of values."""

    table: Table
    source: str
    lines: Mapping[str, int] = field(default_factory=dict)
    folder: Path = field(default_factory=Path.cwd)
    """What relative paths in it are relative to."""

    def origin(self, path: str) -> str:
        """Where the layer says `path`."""
        line = self.lines.get(path)
        return self.source if line is None else f"{self.source}:{line}"

    def without(self, *keys: str) -> "Layer":
        """The same with less in it."""
        return replace(self, table={k: v for k, v in self.table.items() if k not in keys})


def find_experiment(path_or_name: str) -> Path:
    """The TOML file that is meant.

    Raises:
        ConfigError: there is none.
    """
    path = Path(path_or_name)
    if path.suffix == ".toml" or "/" in path_or_name:
        if path.is_file():
            return path
        raise ConfigError(f"there is no experiment file {path}; `slipstream new NAME` writes one")
    shipped = {file.stem: file for file in EXPERIMENTS_DIR.glob("*.toml")}
    if path_or_name in shipped:
        return shipped[path_or_name]
    if path.with_suffix(".toml").is_file():
        return path.with_suffix(".toml")
    raise ConfigError(
        f"there is no experiment {path_or_name!r}{did_you_mean(path_or_name, shipped)}; those that "
        f"ship: {', '.join(sorted(shipped))}; your own: give the path of its .toml file"
    )


def file_layers(path: Path, within: tuple[Path, ...] = ()) -> list[Layer]:
    """The file's layer after those it extends."""
    path = path.resolve()
    if path in within:
        chain = " -> ".join(file.name for file in (*within, path))
        raise ConfigError(f"extends goes round in a circle: {chain}; remove one of them")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    table, lines = toml.parse(text, str(path))
    return with_bases(Layer(table, path.name, lines, path.parent), (*within, path))


def with_bases(layer: Layer, within: tuple[Path, ...] = ()) -> list[Layer]:
    """A layer after those it extends, oldest first; files in `within` are being read already.

    Raises:
        ConfigError: `extends` names nothing, or goes round in a circle.
    """
    base = layer.table.get("extends")
    if base is None:
        return [layer]
    if not isinstance(base, str):
        raise ConfigError(f"extends ({layer.origin('extends')}) must be a name or path: {base!r}")
    beside = layer.folder / base
    inherited = file_layers(beside if beside.is_file() else find_experiment(base), within)
    return [*(each.without(*NOT_INHERITED) for each in inherited), layer.without("extends")]


def override_layer(overrides: Sequence[str], source: str = "command line") -> Layer:
    """`a.b=value` arguments as one layer.

    Raises:
        ConfigError: an argument has no `=`, or contradicts another one.
    """
    table: Table = {}
    for override in overrides:
        toml.put(table, *split_override(override), f"override {override!r}")
    return Layer(table, source)


def split_override(override: str) -> tuple[str, Any]:
    """Key and value of `a.b=value`.

    Raises:
        ConfigError: there is no `=`.
    """
    key, equals, value = override.removeprefix("--").partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} must look like learner.steps=5")
    return key.strip(), override_value(value.strip())


def override_value(text: str) -> Any:
    """A value as TOML would read it; text that is none of TOML's values is a string."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return float(text) if NUMBER.fullmatch(text) else text
    return table["value"] if len(table) == 1 else text
