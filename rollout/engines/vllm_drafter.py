"""Our drafter as a proposer of vLLM's: what followed the same tokens in any sample so far.

    [rollout.vllm.speculative_config]
    method = "custom_class"
    model = "slipstream.rollout.engines.vllm_drafter.SiblingsProposer"
    num_speculative_tokens = 6

vLLM tells a proposer neither which sample a row holds nor where its prompt ends, only its tokens
and how many are new. So one automaton holds the text of all samples; a sibling's is found because
the context begins in the prompt that they share. A row's place in it is known by a digest of its
text: rows with one text have one place.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from ..drafters import SuffixAutomaton

HISTORY_TOKENS = 200_000
"""Then all is forgotten, at some 1 kB each."""


class SiblingsProposer:
    """Drafts for vLLM's batch; runs in its core, which verifies."""

    def __init__(self, vllm_config: Any) -> None:
        """Draft as many tokens as `num_speculative_tokens` says."""
        self._depth = vllm_config.speculative_config.num_speculative_tokens
        self._forget()

    def _forget(self) -> None:
        self._automaton, self._num_read = SuffixAutomaton(), 0
        self._places: dict[int, int] = {}

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts of each row, none for rows that wrote nothing in this step.

        Args:
            sampled_token_ids: the tokens that each row has just written.
            num_tokens_no_spec: [rows] int, of prompt and answer, those included.
            token_ids_cpu: [rows, longest] int, the tokens themselves.
            slot_mappings: not looked at.
        """
        if self._num_read > HISTORY_TOKENS:
            self._forget()
        places, drafts = {}, []
        for row, new in enumerate(sampled_token_ids):
            if not new:
                drafts.append([])
                continue
            text = token_ids_cpu[row, : num_tokens_no_spec[row]]
            place = self._places.get(_digest(text[: len(text) - len(new)]))
            state, unread = (0, text) if place is None else (place, new)
            for token in unread:
                state = self._automaton.append(state, int(token))
            self._num_read += len(unread)
            places[_digest(text)] = state
            drafts.append(self._automaton.propose(state, self._depth).tokens)
        self._places = places
        return drafts

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is no draft model."""


def _digest(text: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(text.tobytes())
