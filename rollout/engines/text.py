"""Tokens to text, and stop strings that may begin in one token and end in another."""

from collections.abc import Sequence

import msgspec
import numpy as np
from transformers import PreTrainedTokenizerBase

from ..engine import GenerationRequest

_TOKENS_PER_CHARACTER = 4
"""A byte-level tokenizer may spend so many tokens on one character of a stop string."""
_SLACK_TOKENS = 8
"""Extra tokens of context, so that the window does not begin inside a character or a space."""


class Detokeniser:
    """Texts of samples."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = {str(token): token_id for token_id, token in added if token.special}

    def with_stop_ids(self, request: GenerationRequest) -> GenerationRequest:
        """The request, with the ids of stop strings that are special tokens: no text holds them."""
        law = request.sampling
        if not (ids := [self._special[string] for string in law.stop if string in self._special]):
            return request
        law = msgspec.structs.replace(law, stop_token_ids=(*law.stop_token_ids, *ids))
        return msgspec.structs.replace(request, sampling=law)

    def text(self, token_ids: np.ndarray) -> str:
        """The tokens as text, special tokens left out."""
        return str(self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))

    def first_stop(
        self, written: np.ndarray, token_ids: np.ndarray, stop: Sequence[str]
    ) -> int | None:
        """Which of the next tokens of a text that has none completes a stop string, the first that
        does; looks back just far enough."""
        window = _TOKENS_PER_CHARACTER * max(map(len, stop)) + _SLACK_TOKENS
        near = np.concatenate([written[-window:], token_ids])
        for i in range(len(token_ids)):
            end = len(near) - len(token_ids) + i + 1
            tail = self.text(near[max(0, end - window) : end])
            if any(string in tail for string in stop):
                return i
        return None

    def cut(self, token_ids: np.ndarray, stop: Sequence[str]) -> str:
        """The text before the first stop string in it; all of it when there is none."""
        text = self.text(token_ids)
        found = [place for string in stop if (place := text.find(string)) >= 0]
        return text[: min(found, default=len(text))]
