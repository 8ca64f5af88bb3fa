"""Calls a reward function written for TRL's trainers, one completion at a time.

TRL passes lists: `prompts`, `completions` (strings, or message lists when the prompt is a chat),
`completion_ids`, and one list per remaining dataset column. Source: the custom reward functions of
TRL's GRPOTrainer. Ours are batches of one, and `None`, which TRL reads as "does not apply", is a
failure here because a sample without a reward cannot be trained on.
"""

from collections.abc import Callable, Mapping
from inspect import Parameter, isawaitable
from typing import Any

from ...buffer.records import Completion, Prompt

CHAT_KEY = "conversational"
"""Set in the payload of prompts whose data column holds a chat rather than a string."""


def trl_call(
    function: Callable[..., Any], parameters: Mapping[str, Parameter]
) -> Callable[[Completion, Prompt], object]:
    """Wrap the function as one of (completion, prompt); passes only the arguments it can take."""
    takes_all = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())

    def call(completion: Completion, prompt: Prompt) -> object:
        arguments = trl_arguments(completion, prompt)
        _check_columns(parameters, arguments)
        if not takes_all:
            arguments = {name: arguments[name] for name in parameters if name in arguments}
        result = function(**arguments)
        return _awaited(result) if isawaitable(result) else _only(result)

    return call


def trl_arguments(completion: Completion, prompt: Prompt) -> dict[str, list[Any]]:
    """The keyword arguments TRL would pass for a batch of this one completion."""
    columns = {name: [value] for name, value in prompt.payload.items() if name != CHAT_KEY}
    if prompt.payload.get(CHAT_KEY, False):
        asked: Any = [{"role": m.role, "content": m.content} for m in prompt.messages]
        answered: Any = [{"role": "assistant", "content": completion.text}]
    else:
        asked, answered = prompt.messages[-1].content, completion.text
    return columns | {
        "prompts": [asked],
        "completions": [answered],
        "completion_ids": [list(completion.token_ids)],
    }


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


def _only(result: Any) -> object:
    """The one element of the list the function returned."""
    if isinstance(result, (int, float)) or not hasattr(result, "__len__") or len(result) != 1:
        raise ValueError(f"a reward for one completion must return a list of one, not {result!r}")
    return result[0]


async def _awaited(result: Any) -> object:
    return _only(await result)
