"""Tools: Python functions that the policy may call, described by their signatures.

A call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, the form that Qwen's and
Hermes' chat templates teach. What a tool raises is told to the policy, which may try again.
"""

import asyncio
import inspect
import json
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ...buffer.errors import ConfigError
from ...buffer.records import Prompt
from ..imports import import_object
from ..rewards.sandbox import run_python
from .base import Step
from .games import evaluate

MAX_RESULT_CHARS = 4_000
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_TYPES: dict[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"
}  # fmt: skip


def calculator(expression: str) -> str:
    """Compute an expression of integers, + - * / and brackets."""
    return f"{evaluate(expression)[0]:.12g}"


def python(code: str) -> str:
    """Run Python code, in a process without network or files; returns what it prints."""
    done = run_python(code)
    return done.stdout if done.ok else f"{done.stdout}\n{done.error}".strip()


class Tools:
    """An environment of tools alone: a message without a call is the answer, and `[reward]`
    scores it.

        [environment]
        name = "tools"
        arguments = { tools = ["calculator", "my_tools.py:look_up"], max_calls = 8 }
    """

    def __init__(self, *, tools: Sequence[str] = ("calculator",), max_calls: int = 8) -> None:
        """Find the functions.

        Raises:
            ConfigError: one cannot be found, or a parameter of it has no type that JSON has.
        """
        built_in = {"calculator": calculator, "python": python}
        functions: list[Any] = [
            built_in.get(name) or import_object(name, "environment.arguments.tools")
            for name in tools
        ]
        self._functions = {getattr(f, "__name__", "?"): f for f in functions}
        self.tools = [schema_of(function) for function in functions]
        self._calls_left = max_calls

    async def reset(self, prompt: Prompt) -> Step:
        """The prompt asks already."""
        self._said: list[str] = []
        return Step(state=[])

    async def step(self, action: str) -> Step:
        """Carry out the calls of a message, or end with it."""
        calls = _CALL.findall(action)
        if not calls:
            return Step(done=True)
        results = [await self._call(text) for text in calls]
        self._said += results
        left = f"\n(tool calls left: {self._calls_left})"
        return Step(observation="\n".join(results) + left, role="tool", state=self._said)

    async def _call(self, text: str) -> str:
        if self._calls_left < 1:
            return "error: no tool calls are left; answer now"
        self._calls_left -= 1
        try:
            call = json.loads(text)
            function = self._functions[call["name"]]
            inspect.signature(function).bind(**call["arguments"])
        except (ValueError, KeyError, TypeError) as error:
            return f"error: not a call of {', '.join(self._functions)}: {error!r}"
        try:
            if inspect.iscoroutinefunction(function):
                result = await function(**call["arguments"])
            else:
                result = await asyncio.to_thread(function, **call["arguments"])
        except Exception as error:  # a tool that fails is something to be told, not an end
            return f"error: {type(error).__name__}: {error}"[:MAX_RESULT_CHARS]
        return str(result)[:MAX_RESULT_CHARS]


class ToolCall(NamedTuple):
    """A call as OpenAI's protocol puts it."""

    name: str
    arguments: str
    """A JSON object."""


def split_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """What a message says, and its calls; what is not a well-formed call stays in the text."""
    calls: list[ToolCall] = []

    def take(found: re.Match[str]) -> str:
        try:
            call = json.loads(found[1])
            name, arguments = call["name"], call["arguments"]
        except (ValueError, KeyError, TypeError):
            return found[0]
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return found[0]
        calls.append(ToolCall(name, json.dumps(arguments)))
        return ""

    rest = _CALL.sub(take, text)
    return (rest.strip() if calls else text), tuple(calls)


def schema_of(function: Any) -> dict[str, Any]:
    """A function in the form that chat templates take tools in.

    Raises:
        ConfigError: it is no function, or a parameter's type has no place in JSON.
    """
    if not callable(function):
        raise ConfigError(f"environment.arguments.tools: {function!r} is not a function")
    hints, properties, required = get_type_hints(function), {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        properties[name] = _json_type(hints.get(name, str), function, name)
        if parameter.default is parameter.empty:
            required.append(name)
    return {
        "type": "function",
        "function": {
            "name": function.__name__,
            "description": inspect.getdoc(function) or "",
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


def _json_type(kind: Any, function: Callable[..., Any], name: str) -> dict[str, Any]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_json_type(each, function, name) for each in inner]}
    if kind is type(None):
        return {"type": "null"}
    if (origin or kind) not in _TYPES:
        raise ConfigError(
            f"environment.arguments.tools: {function.__name__}'s {name} is a {kind}; JSON has "
            f"{', '.join(t.__name__ for t in _TYPES)}"
        )
    schema: dict[str, Any] = {"type": _TYPES[origin or kind]}
    if origin is list and inner:
        schema["items"] = _json_type(inner[0], function, name)
    return schema
