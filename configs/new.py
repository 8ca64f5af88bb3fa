"""`slipstream new`: a TOML file that explains every key, with the values it would have."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..buffer.config import Settings
from ..buffer.errors import ConfigError
from . import toml
from .load import load_experiment
from .schema import section_of

WIDTH = 96


def write_experiment(path: Path, base: str = "quickstart") -> Path:
    """Write a new experiment file.

    Args:
        path: where; `.toml` is added when missing.
        base: what it extends: a shipped experiment's name or a path.
    Raises:
        ConfigError: the file is there already, cannot be written, or the base does not load.
    """
    path = path if path.suffix == ".toml" else path.with_name(f"{path.name}.toml")
    text = commented_toml(path.stem, base)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} is there already; choose another name or remove it") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    return path


def commented_toml(name: str, base: str) -> str:
    """Every setting of `base` as a comment with its explanation; loads as `base` renamed.

    Raises:
        ConfigError: the base does not load.
    """
    experiment = load_experiment(base, [f'name="{name}"']).experiment
    head = [
        f"# An experiment that starts from {base!r}. Remove the # before a key to change it.",
        f"#   slipstream plan {name}.toml    what it would do",
        f"#   slipstream run {name}.toml     do it",
        f"extends = {toml.value_text(base)}",
        f"name = {toml.value_text(name)}",
    ]
    return "\n".join([*head, *_section(experiment, "", skip=("name",))]) + "\n"


def _section(settings: Settings, prefix: str, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the lines of a section's own keys, then of the sections in it."""
    fields = type(settings).model_fields
    for name, field in fields.items():
        if name not in skip and section_of(field) is None:
            yield ""
            yield from _comment(field.description or "")
            yield _commented_value(name, getattr(settings, name))
    for name, field in fields.items():
        section = section_of(field)
        if section is not None:
            value = getattr(settings, name)
            yield ""
            yield from _comment((section.__doc__ or "").split("\n\n")[0])
            yield f"{'' if value is not None else '# '}[{prefix}{name}]"
            yield from _section(value or section(), f"{prefix}{name}.")


def _commented_value(name: str, value: Any) -> str:
    return f"# {name} is not set" if value is None else f"# {name} = {toml.value_text(value)}"


def _comment(text: str) -> list[str]:
    return [f"## {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH)]
