"""Rewards for the form of a completion: JSON, length, format, and answers that grow too long."""

import json
import re
from typing import Any

from ...buffer.records import Completion, Prompt, Score
from .base import Example, example

_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
_JSON_TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
    "boolean": bool, "null": type(None),
}  # fmt: skip
_KEYWORDS = {
    "type", "enum", "const", "properties", "required", "additionalProperties", "items", "minItems",
    "maxItems", "minLength", "maxLength", "pattern", "minimum", "maximum", "anyOf", "title",
    "description",
}  # fmt: skip


class JsonSchema:
    """1 when the completion is (or holds in a fenced block) JSON of the schema, else 0.

    The schema is the prompt's `schema`, else the argument. Of JSON Schema it knows what `_KEYWORDS`
    lists and refuses others, rather than to pass over a condition.
    """

    def __init__(self, *, schema: dict[str, Any] | None = None) -> None:
        """Check the schema.

        Raises:
            ValueError: it uses a keyword that is not known here.
        """
        _check_schema(schema or {})
        self._schema = schema

    def score(self, completion: Completion, prompt: Prompt) -> Score:
        """1.0 or 0.0, with what is wrong."""
        schema = prompt.payload.get("schema", self._schema)
        if schema is None:
            raise ValueError("there is no schema: neither in the prompt's payload nor as argument")
        schema = json.loads(schema) if isinstance(schema, str) else schema
        _check_schema(schema)
        fenced = _FENCED.findall(completion.text)
        try:
            value = json.loads(fenced[-1] if fenced else completion.text)
        except (ValueError, RecursionError) as error:
            return Score(value=0.0, reason=f"not JSON: {error}")
        wrong = mismatch(value, schema)
        return Score(value=float(not wrong), reason=wrong)

    @staticmethod
    def examples() -> list[Example]:
        """Golden cases and near misses."""
        schema = {
            "type": "object", "required": ["n"], "additionalProperties": False,
            "properties": {"n": {"type": "integer", "minimum": 0}},
        }  # fmt: skip
        return [
            example('{"n": 3}', correct=True, schema=schema),
            example('Here:\n```json\n{"n": 0}\n```', correct=True, schema=schema),
            example('{"n": -1}', correct=False, schema=schema),
            example('{"n": true}', correct=False, schema=schema),
            example('{"n": 1, "m": 2}', correct=False, schema=schema),
            example('{"n": 1', correct=False, schema=schema),
            example("", correct=False, schema=schema),
        ]


def _check_schema(schema: Any) -> None:
    unknown = set(schema) - _KEYWORDS
    if unknown:
        raise ValueError(f"schema: {', '.join(sorted(unknown))} is not supported")
    for inner in (*schema.get("properties", {}).values(), *schema.get("anyOf", ())):
        _check_schema(inner)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            _check_schema(schema[name])


def mismatch(value: Any, schema: dict[str, Any], at: str = "$") -> str:
    """The first way in which a value is not of the schema; "" when it is."""
    kinds = schema.get("type", list(_JSON_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(_is(value, kind) for kind in kinds):
        return f"{at} is not a {' or '.join(kinds)}"
    if "const" in schema and value != schema["const"]:
        return f"{at} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{at} is none of {schema['enum']!r}"
    if "anyOf" in schema and all(mismatch(value, inner, at) for inner in schema["anyOf"]):
        return f"{at} fits none of anyOf"
    if isinstance(value, dict):
        return _object_mismatch(value, schema, at)
    if isinstance(value, list):
        wrong = _range(len(value), schema, "minItems", "maxItems", f"{at}'s length")
        inner = schema.get("items", {})
        return wrong or next(
            (w for i, v in enumerate(value) if (w := mismatch(v, inner, f"{at}[{i}]"))), ""
        )
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            return f"{at} does not match {schema['pattern']!r}"
        return _range(len(value), schema, "minLength", "maxLength", f"{at}'s length")
    if _is(value, "number"):
        return _range(value, schema, "minimum", "maximum", at)
    return ""


def _object_mismatch(value: dict[str, Any], schema: dict[str, Any], at: str) -> str:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            return f"{at} has no {name}"
    for name, inner in value.items():
        allowed = known.get(name, others)
        if allowed is False:
            return f"{at} has {name}"
        if isinstance(allowed, dict) and (wrong := mismatch(inner, allowed, f"{at}.{name}")):
            return wrong
    return ""


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _JSON_TYPES[kind])


def _range(number: float, schema: dict[str, Any], low: str, high: str, what: str) -> str:
    if number < schema.get(low, number):
        return f"{what} is below {schema[low]}"
    return f"{what} is above {schema[high]}" if number > schema.get(high, number) else ""


class Format:
    """1 when the whole completion matches a pattern, else 0; meant as a part of a `Sum`."""

    def __init__(self, *, pattern: str = r"<think>.+?</think>\s*<answer>.+?</answer>") -> None:
        """Compile the pattern.

        Raises:
            ValueError: it is not a regular expression.
        """
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error

    def score(self, completion: Completion) -> float:
        """1.0 or 0.0."""
        return float(self._pattern.fullmatch(completion.text.strip()) is not None)

    @staticmethod
    def examples() -> list[Example]:
        """Golden cases and near misses."""
        return [
            example("<think>2 + 2</think>\n<answer>4</answer>", correct=True),
            example("<answer>4</answer>", correct=False),
            example("<think></think><answer></answer>", correct=False),
            example("<think>a</think><answer>4</answer> so", correct=False),
        ]


class Length:
    """1 up to `target` tokens, falling linearly to 0 at `limit`; 0 when cut off.

    With `limit = max_new_tokens` and `target = limit - buffer`, minus 1, it is DAPO's overlong
    punishment (arXiv:2503.14476, eq. 13): use it in a `Sum`. Counts the tokens the policy wrote;
    completions without token ids are counted in words.
    """

    def __init__(self, *, target: int = 128, limit: int = 256) -> None:
        """Set the two lengths.

        Raises:
            ValueError: not 0 <= target < limit.
        """
        if not 0 <= target < limit:
            raise ValueError(f"target = {target} must be at least 0 and below limit = {limit}")
        self._target, self._limit = target, limit

    def score(self, completion: Completion) -> float:
        """Between 0 and 1."""
        if completion.finish_reason == "length":
            return 0.0
        length = len(completion.token_ids) or len(completion.text.split())
        return min(1.0, max(0.0, (self._limit - length) / (self._limit - self._target)))

    @staticmethod
    def examples() -> list[Example]:
        """Golden cases and near misses."""
        return [
            example("short", correct=True),
            example("w " * 128, correct=True),
            example("w " * 129, correct=False),
            example("w " * 300, correct=False),
        ]
