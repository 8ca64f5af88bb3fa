"""Writes the examples of a warm start: worked answers to training prompts, or the user's own."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import xxhash

from ..buffer.errors import ConfigError
from ..buffer.records import Prompt
from .chats import ROLES, convert_chats
from .config import PromptsConfig
from .imports import import_object, where_raised
from .prompts import PromptSource
from .suggest import did_you_mean

Demonstrator = Callable[[Prompt], Any]
"""Returns the assistant's text for a prompt, or the messages of an episode after it; then each of
the assistant's is an example of its own."""

ANSWERED_SHARE = 0.35
"""`chain_sum_mixed` ends with the answer line for this share of the prompts."""
_CHAIN = re.compile(r"(-?\d+)((?:\s*[+-]\s*-?\d+)*)")
_STEP = re.compile(r"([+-])\s*(-?\d+)")


class WarmStart(Protocol):
    """What we read of `[sft]`, which belongs to the learner."""

    @property
    def data(self) -> str: ...
    @property
    def demonstration(self) -> str: ...
    @property
    def examples(self) -> int: ...


def write_sft_file(prompts: PromptsConfig, sft: WarmStart, seed: int, path: Path) -> int:
    """Write one chat a line, {"messages": [...]}: those of the file that `sft.data` names, else
    training prompts and their demonstrations.

    The prompts are taken from the end of the first epoch backwards (and around again when there are
    more examples than items), so that the run, which starts at its beginning, meets other prompts
    first. Held-out prompts are never among them: see `PromptSource`.

    Returns:
        The number of lines.
    Raises:
        ConfigError: the file or the prompts cannot be read, or the demonstrator is unknown or
            fails.
    """
    if sft.data != "demonstrations":
        return convert_chats(Path(sft.data), prompts, path)
    demonstrate = load_demonstrator(sft.demonstration)
    source = PromptSource(prompts, seed)
    with path.open("w") as file:
        for number in range(sft.examples):
            prompt = source.prompt(len(source) - 1 - number % len(source))
            chat = [{"role": m.role, "content": m.content} for m in prompt.messages]
            for message in _demonstration(demonstrate, sft, prompt):
                chat.append(message)
                if message["role"] == "assistant":
                    file.write(json.dumps({"messages": chat}) + "\n")
    return sft.examples


def load_demonstrator(name: str) -> Demonstrator:
    """The built-in demonstrator of this name, or the function of that name.

    Raises:
        ConfigError: there is none.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" not in name:
        raise ConfigError(
            f"sft.demonstration = {name!r} is not built in{did_you_mean(name, BUILT_IN)}. There "
            f"are: {', '.join(BUILT_IN)}. Your own is named `module:function` or `file.py:function`"
        )
    found = import_object(name, "sft.demonstration")
    if not callable(found):
        raise ConfigError(f"sft.demonstration = {name!r} is a {type(found).__name__}, no function")
    return cast(Demonstrator, found)


def _demonstration(demonstrate: Demonstrator, sft: WarmStart, prompt: Prompt) -> list[dict]:
    """The demonstrator's text, or messages, checked."""
    where = f"sft.demonstration = {sft.demonstration!r} on prompt {prompt.source_id}"
    try:
        text = demonstrate(prompt)
    except Exception as error:  # the user's code: a config that cannot work ends the run early
        raise ConfigError(f"{where} raised {where_raised(error)}") from error
    messages = [{"role": "assistant", "content": text}] if isinstance(text, str) else text
    known = isinstance(messages, list) and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
        for m in messages
    )
    if not known or not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise ConfigError(
            f"{where} returned {text!r}; it must return a text, or messages with one of the "
            "assistant's"
        )
    return messages


def answer(prompt: Prompt) -> str:
    """The gold answer itself.

    Raises:
        ValueError: the prompt has none.
    """
    gold = prompt.payload.get("answer")
    if gold is None:
        raise ValueError("the prompt's payload has no answer")
    return str(gold)


def chain_sum(prompt: Prompt) -> str:
    r"""The running partial sums of a chain of additions and subtractions, then the answer.

    The text for "7 - 9 + 4" is "7 - 9 = -2\n-2 + 4 = 2\nAnswer: 2".
    """
    lines, total = _partial_sums(_expression(prompt))
    return "\n".join([*lines, f"Answer: {total}"])


def chain_sum_mixed(prompt: Prompt) -> str:
    """`chain_sum`, but most of the texts stop after the work, without the line `Answer: N`.

    Demonstrations as they are found: right, and rarely in the form that the reward looks for. The
    policy starts able to do both; which of them pays is for reinforcement to find out.
    """
    lines, total = _partial_sums(_expression(prompt))
    coin = xxhash.xxh3_64_intdigest(prompt.source_id.encode()) / 2**64
    answered = coin < ANSWERED_SHARE or not lines  # a single term leaves no work to stop after
    return "\n".join([*lines, *([f"Answer: {total}"] if answered else [])])


def _expression(prompt: Prompt) -> str:
    """The chain as the task recorded it, else the longest one in the question."""
    recorded = prompt.payload.get("metadata", {}).get("expression")
    if isinstance(recorded, str):
        return recorded
    found = [match.group() for match in _CHAIN.finditer(prompt.messages[-1].content)]
    if not found:
        raise ValueError("the question holds no sum")
    return max(found, key=len)


def _partial_sums(expression: str) -> tuple[list[str], int]:
    """One line per operation, and the result.

    Raises:
        ValueError: it is not a chain of integers joined by + and -.
    """
    chain = _CHAIN.fullmatch(expression.strip())
    if chain is None:
        raise ValueError(f"{expression!r} is not a chain of integers joined by + and -")
    total, lines = int(chain[1]), []
    for sign, term in _STEP.findall(chain[2]):
        before, total = total, total + (int(term) if sign == "+" else -int(term))
        lines.append(f"{before} {sign} {term} = {total}")
    return lines, total


BUILT_IN: Mapping[str, Demonstrator] = {
    "answer": answer,
    "chain_sum": chain_sum,
    "chain_sum_mixed": chain_sum_mixed,
}
