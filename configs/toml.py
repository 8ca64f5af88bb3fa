"""TOML beyond the standard library's: on which line each key is, and writing it."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..buffer.errors import ConfigError

Table = dict[str, Any]


def parse(text: str, source: str) -> tuple[Table, dict[str, int]]:
    """The values of a TOML document, and the line number of each dotted key and section.

    Args:
        text: the document.
        source: what messages call it.
    Raises:
        ConfigError: it is not TOML.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from None
    return table, _line_numbers(text)


def _line_numbers(text: str) -> dict[str, int]:
    """Dotted key -> line, found by letting tomllib parse one statement at a time."""
    section: tuple[str, ...] = ()
    found: dict[str, int] = {}
    for number, statement in _statements(text):
        table = tomllib.loads(statement)
        if statement.lstrip().startswith("["):
            section = next(_paths(table), ())
            found.setdefault(".".join(section), number)
            continue
        for path in _paths(table):
            for depth in range(1, len(path) + 1):
                found.setdefault(".".join(section + path[:depth]), number)
    return found


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, statement); a value over several lines is one statement."""
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not pending and (not line.strip() or line.lstrip().startswith("#")):
            continue
        start = start if pending else number
        pending += line + "\n"
        try:
            tomllib.loads(pending)
        except tomllib.TOMLDecodeError:
            continue
        yield start, pending
        pending = ""


def _paths(table: Table) -> Iterator[tuple[str, ...]]:
    """Yield the path of each leaf; lists and empty tables are leaves."""
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from ((name, *path) for path in _paths(value))
        else:
            yield (name,)


def value_text(value: object) -> str:
    """A value as TOML writes it, on one line.

    Raises:
        ConfigError: TOML has no such value.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, Mapping):
        pairs = (f"{key_text(key)} = {value_text(item)}" for key, item in value.items())
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(value_text(item) for item in value) + "]"
    raise ConfigError(f"{value!r} ({type(value).__name__}) cannot be written as TOML")


def key_text(key: str) -> str:
    """A key, in quotes when it needs them."""
    plain = key.replace("-", "").replace("_", "")
    return key if plain.isascii() and plain.isalnum() else json.dumps(key)


def document(table: Table, sections: Sequence[str]) -> str:
    """A whole table as TOML.

    Args:
        table: the values; nested where they are sections.
        sections: which dotted paths are written as `[section]`; other tables go on one line.
    """
    return "\n".join(_lines(table, sections, "")).strip() + "\n"


def _lines(table: Table, sections: Sequence[str], prefix: str) -> Iterator[str]:
    nested = {key: f"{prefix}{key}" for key in table if f"{prefix}{key}" in sections}
    nested = {key: path for key, path in nested.items() if isinstance(table[key], Mapping)}
    for key, value in table.items():
        if key not in nested and value is not None:
            yield f"{key_text(key)} = {value_text(value)}"
    for key, path in nested.items():
        body = list(_lines(table[key], sections, f"{path}."))
        if body and not body[0].startswith("\n["):
            yield f"\n[{path}]"
        yield from body
