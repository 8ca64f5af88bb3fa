"""A growing conversation as token ids, without ever tokenising again what the policy wrote.

    first(messages)          <user>2 + 2?<assistant>
    the policy writes                                4<end>
    follow(messages)                                       \\n<user>3 + 3?<assistant>

`follow` is the difference that the chat template makes after an assistant's message, so it holds
for any template that writes messages one after the other.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...buffer.errors import ConfigError
from ...buffer.records import Message

_MARK = "slipstreammark"
"""Stands for an assistant's message; no template rewrites or trims it."""


class ChatFormat:
    """Renders the parts of a conversation; `tools` are JSON schemas shown to the policy."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict] = ()) -> None:
        """Check how the template shows tools: by itself, else we put them in a system message.

        Raises:
            ConfigError: the template does not keep an assistant's message as it is written.
        """
        self._tokenizer, self._tools = tokenizer, list(tools)
        probe = [{"role": "user", "content": "?"}]
        self._shows_tools = bool(tools) and self._text(probe) != self._text(probe, self._tools)
        self._tail = functools.lru_cache(maxsize=4096)(self._tail_ids)

    def first(self, messages: Sequence[Message]) -> list[int]:
        """Up to where the policy writes its first token."""
        chat = _dicts(messages)
        if self._tools and not self._shows_tools:
            chat = _with_system(chat, tool_text(self._tools))
        return self._ids(self._text(chat, self._tools if self._shows_tools else None))

    def follow(self, messages: Sequence[Message], last_token: int) -> list[int]:
        """From behind the policy's last token to where it goes on.

        Args:
            messages: said since.
            last_token: when it is the end token that the template writes, it is not repeated.
        """
        ended = str(self._tokenizer.decode([last_token])) if last_token in self._ends() else ""
        return list(self._tail(tuple((m.role, m.content) for m in messages), ended))

    def _tail_ids(self, messages: tuple[tuple[str, str], ...], ended: str) -> list[int]:
        said = [{"role": role, "content": content} for role, content in messages]
        start = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        _, found, tail = self._text([*start, *said]).rpartition(_MARK)
        if not found:
            raise ConfigError(
                "the model's chat template drops or rewrites the assistant's earlier messages; "
                "episodes of several turns need one that keeps them"
            )
        return self._ids(tail.removeprefix(ended) if ended else tail)

    @functools.cache  # noqa: B019, one format lives as long as its worker
    def _ends(self) -> frozenset[int]:
        """The tokens that the policy may end a message with: a stop string, a stop id or the
        model's generation config may name any special one."""
        eos: Any = self._tokenizer.eos_token_id
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return frozenset([eos, *(i for i, token in added.items() if token.special)])

    def _text(self, chat: list[dict[str, str]], tools: list[dict] | None = None) -> str:
        if not self._tokenizer.chat_template:
            return "\n".join(message["content"] for message in chat)
        extra: dict[str, Any] = {"tools": tools} if tools else {}
        return str(
            self._tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, **extra
            )
        )

    def _ids(self, text: str) -> list[int]:
        special = not self._tokenizer.chat_template
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])


def tool_text(tools: Sequence[dict]) -> str:
    """The system message for templates that know no tools (the form Hermes and Qwen use)."""
    listed = "\n".join(json.dumps(tool) for tool in tools)
    return (
        f"Tools:\n{listed}\nTo call one, write "
        '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'
    )


def _dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _with_system(chat: list[dict[str, str]], text: str) -> list[dict[str, str]]:
    if chat[0]["role"] == "system":
        return [{"role": "system", "content": f"{chat[0]['content']}\n{text}"}, *chat[1:]]
    return [{"role": "system", "content": text}, *chat]
