"""Calls a reward function written for TRL's trainers.

TRL passes lists: `prompts`, `completions` (strings, or message lists when the prompt is a chat),
`completion_ids`, and one list per remaining dataset column. Source: the custom reward functions of
TRL's GRPOTrainer. Ours hold `batch_size` samples, 1 unless declared, and `None`, which TRL reads as
"does not apply", is a failure here because a sample without a reward cannot be trained on.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, isawaitable
from typing import Any

from ...buffer.records import Completion, Prompt

CHAT_KEY = "conversational"
"""Set in the payload of prompts whose data column holds a chat rather than a string."""


def trl_call(
    function: Callable[..., Any], parameters: Mapping[str, Parameter]
) -> Callable[[Sequence[tuple[Completion, Prompt]]], Sequence[Any]]:
    """Wrap the function as one of samples; passes only the arguments it can take."""
    takes_all = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())

    def call(samples: Sequence[tuple[Completion, Prompt]]) -> Sequence[Any]:
        arguments = trl_arguments(samples)
        _check_columns(parameters, arguments)
        if not takes_all:
            arguments = {name: arguments[name] for name in parameters if name in arguments}
        result = function(**arguments)
        if isawaitable(result):
            result = asyncio.run(_awaited(result))
        return _each(result, len(samples))

    return call


def trl_arguments(samples: Sequence[tuple[Completion, Prompt]]) -> dict[str, list[Any]]:
    """The keyword arguments TRL would pass for a batch; a column that some rows lack is None."""
    names = dict.fromkeys(name for _, prompt in samples for name in prompt.payload)
    names.pop(CHAT_KEY, None)
    columns = {name: [prompt.payload.get(name) for _, prompt in samples] for name in names}
    asked: list[Any] = []
    answered: list[Any] = []
    for completion, prompt in samples:
        if prompt.payload.get(CHAT_KEY, False):
            asked.append([{"role": m.role, "content": m.content} for m in prompt.messages])
            answered.append([{"role": "assistant", "content": completion.text}])
        else:
            asked.append(prompt.messages[-1].content)
            answered.append(completion.text)
    ids = [list(completion.token_ids) for completion, _ in samples]
    return columns | {"prompts": asked, "completions": answered, "completion_ids": ids}


def _check_columns(parameters: Mapping[str, Parameter], arguments: Mapping[str, Any]) -> None:
    """Name the columns a function requires and the data does not have."""
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        if name not in arguments
    ]
    if missing:
        raise KeyError(
            f"it needs {', '.join(missing)}; the data has {', '.join(sorted(arguments))}"
        )


def _each(result: Any, count: int) -> Sequence[Any]:
    """One element per sample of what the function returned."""
    if isinstance(result, str) or not hasattr(result, "__len__") or len(result) != count:
        few = "one completion" if count == 1 else f"{count} completions"
        number = "one" if count == 1 else count
        raise ValueError(f"a reward for {few} must return a list of {number}, not {result!r}")
    return list(result)


async def _awaited(result: Any) -> Any:
    return await result
