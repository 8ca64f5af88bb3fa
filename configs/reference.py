"""`docs/config.md`, generated from the schema: `python -m slipstream.configs.reference`."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ..buffer.config import Settings
from . import toml
from .schema import all_sections, section_of

HEAD = """# Config reference

Generated from the schema by `make docs`; do not edit. Every key can be given in TOML or on the
command line (`slipstream run quickstart learner.steps=5`). `slipstream plan` shows where each value
came from, `slipstream new NAME` writes a file with all of them.

`extends = "quickstart"` (a shipped experiment or a path) starts from another file. Relative paths
are relative to the file they are written in.
"""

SIGNS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


def reference() -> str:
    """The page."""
    return HEAD + "".join(_section(path, section) for path, section in all_sections().items())


def _section(path: str, section: type[Settings]) -> str:
    title = f"`[{path}]`" if path else "The experiment"
    lines = [f"\n## {title}\n", _one_line(section.__doc__).replace(f"`[{path}]`: ", "") + "\n"]
    rows = list(_rows(section))
    if rows:
        lines += ["| key | type | default | |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _rows(section: type[Settings]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if section_of(field) is None:
            cells = (f"`{name}`", _type(field), _default(field), _one_line(field.description))
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return ""
    return "not set" if field.default is None else f"`{toml.value_text(field.default)}`"


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(constraint, name):g}"
        for constraint in field.metadata
        for name, sign in SIGNS
        if hasattr(constraint, name)
    ]
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{toml.value_text(argument)}`" for argument in arguments)
    if origin in (Union, types.UnionType):
        return _words(next(argument for argument in arguments if argument is not type(None)))
    if origin is tuple:
        return f"list of {_words(arguments[0])}s"
    names = {bool: "true/false", int: "integer", float: "number", str: "text"}
    return names.get(annotation, "table")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    print(reference(), end="")
