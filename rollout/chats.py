"""Chats in a user's data: as prompts, and as examples of a supervised warm start."""

import json
from pathlib import Path
from typing import Any

from ..buffer.errors import ConfigError
from ..buffer.records import Message
from .config import PromptsConfig
from .prompts import worded

ROLES = ("system", "user", "assistant", "tool")


def question_of(value: Any) -> str | tuple[Message, ...]:
    """What an item asks: its text, or its chat.

    Raises:
        ValueError: it is neither; says what it must be.
    """
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        if value[-1]["role"] == "assistant":
            raise ValueError(
                "the prompt's last message is the assistant's; the policy is to write it, so leave "
                "it out of the prompt"
            )
        return tuple(Message(role=m["role"], content=m["content"]) for m in value)
    raise ValueError(
        f"the prompt is {str(value)[:60]!r}; it must be a text that is not empty, or a list of "
        f"messages with a role ({', '.join(ROLES)}) and a content"
    )


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ROLES
        and isinstance(value.get("content"), str)
    )


def convert_chats(data: Path, prompts: PromptsConfig, path: Path) -> int:
    """Write the examples of a JSONL file as one chat a line, {"messages": [...]}.

    A line with `messages` is taken as it is; the `prompt` of a line with `prompt` and `completion`
    is worded as the run's own prompts are (`prompts.template`, `prompts.system`). Lines without a
    character are passed over.

    Returns:
        The number of examples; all of the file's.
    Raises:
        ConfigError: the file cannot be read or is empty, or a line (which one) is not an example.
    """
    count = 0
    with path.open("w") as file:
        for number, line in enumerate(_lines(data), start=1):
            if line.strip():
                try:
                    chat = _chat(json.loads(line), prompts)
                except ValueError as error:
                    raise ConfigError(f"sft.data: {data}, line {number}: {error}") from None
                file.write(json.dumps({"messages": chat}) + "\n")
                count += 1
    if not count:
        raise ConfigError(f"sft.data: {data} holds no examples; write one JSON object a line")
    return count


def _lines(data: Path) -> list[str]:
    try:
        # Not splitlines: it also cuts at characters that JSON allows inside a string.
        return data.expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f'sft.data = "{data}" cannot be read: {reason}; give a JSONL file, or "demonstrations"'
        ) from None


def _chat(row: Any, prompts: PromptsConfig) -> list[dict[str, str]]:
    """The messages of one line, the last one the assistant's.

    Raises:
        ValueError: it is not an example; says what it must be.
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}, not an object with named fields")
    if "messages" in row:
        return _checked(row["messages"])
    asked, answer = row.get("prompt"), row.get("completion")
    if not (
        isinstance(asked, str) and asked.strip() and isinstance(answer, str) and answer.strip()
    ):
        raise ValueError(
            "it needs `messages`, or `prompt` and `completion` as texts that are not empty; it has "
            f"{', '.join(row) or 'nothing'}"
        )
    messages = (*worded(prompts, asked), Message(role="assistant", content=answer))
    return [{"role": message.role, "content": message.content} for message in messages]


def _checked(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError("`messages` must be a list of two or more, the last one the assistant's")
    for message in messages:
        if not _is_message(message):
            raise ValueError(
                f"each message needs a `role` ({', '.join(ROLES)}) and a `content` that is text"
            )
    if messages[-1]["role"] != "assistant" or not _is_text(messages[-1]["content"]):
        raise ValueError("the last message must be the assistant's, and not empty")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
