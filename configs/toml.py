"""TOML beyond the standard library's: on which line each key is, and writing it."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..buffer.errors import ConfigError

Table = dict[str, Any]

PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")


def parse(text: str, source: str) -> tuple[Table, dict[str, int]]:
    """The values of a TOML document, and the line number of each dotted key and section.

    Args:
        text: the document.
        source: what messages call it.
    Raises:
        ConfigError: it is not TOML.
    """
    try:
        return tomllib.loads(text), _line_numbers(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from None


def _line_numbers(text: str) -> dict[str, int]:
    """Dotted key -> line, found by letting tomllib parse one statement at a time."""
    found: dict[str, int] = {}
    section, statement, start = "", "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        start = start if statement else number
        statement += f"{line}\n"
        try:
            table = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # a value over several lines
        is_header = statement.lstrip().startswith("[")
        paths = list(_paths(table, "" if is_header else section))
        found = dict.fromkeys(paths, start) | found
        section, statement = f"{paths[-1]}." if is_header else section, ""
    return found


def _paths(table: Table, prefix: str) -> Iterator[str]:
    """Yield every dotted key, the outer ones first."""
    for name, value in table.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")


def put(table: Table, path: str, value: Any, given: str) -> None:
    """Put a value at a dotted path, into what is there.

    Args:
        table: nested values.
        path: `learner.steps`.
        value: a table is merged with one that is there.
        given: what a message calls it.
    Raises:
        ConfigError: a part of the path is a value already.
    """
    *sections, last = path.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{given} contradicts {section} = {table!r}")
    both = isinstance(value, Mapping) and isinstance(table.get(last), dict)
    table[last] = {**table[last], **value} if both else value


def value_text(value: object) -> str:
    """A value as TOML writes it, on one line.

    Raises:
        ConfigError: TOML has no such value.
    """
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return f"{value:_}" if abs(value) >= 10_000 else str(value)
        case float():
            return repr(value)
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False)
        case BaseModel():  # what was given of it
            return value_text(value.model_dump(exclude_unset=True))
        case Mapping():
            pairs = (f"{key_text(key)} = {value_text(item)}" for key, item in value.items())
            return "{ " + ", ".join(pairs) + " }" if value else "{}"
        case Sequence():
            return "[" + ", ".join(value_text(item) for item in value) + "]"
    raise ConfigError(f"{value!r} ({type(value).__name__}) cannot be written as TOML")


def key_text(key: str) -> str:
    """A key, in quotes when it needs them."""
    return key if PLAIN_KEY.fullmatch(key) else json.dumps(key)


def document(table: Table, sections: Sequence[str], prefix: str = "") -> str:
    """A whole table as TOML.

    Args:
        table: the values; nested where they are sections. None is left out.
        sections: which dotted paths are written as `[section]`; other tables go on one line.
        prefix: of the section that the table is, with its dot.
    """
    nested = {k for k, v in table.items() if f"{prefix}{k}" in sections and isinstance(v, Mapping)}
    values = {k: v for k, v in table.items() if k not in nested and v is not None}
    text = "".join(f"{key_text(key)} = {value_text(value)}\n" for key, value in values.items())
    if text and prefix:
        text = f"\n[{prefix.removesuffix('.')}]\n{text}"
    return text + "".join(
        document(table[key], sections, f"{prefix}{key}.") for key in table if key in nested
    )
