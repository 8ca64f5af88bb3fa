"""A small model that drafts for the policy; the policy's engine verifies what it proposes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...buffer.errors import ConfigError
from ...buffer.records import SamplingParams
from ...kernels.models import ModelError, load_policy, policy_weights
from ..config import AcceptanceRule
from ..drafters import Asked, Draft, class_of
from ..sampling import DRAFT_STREAM, RowLaws, probabilities, sample, uniform
from .forward import PolicyForward
from .kv_cache import PromptKeys


class DraftModel:
    """Writes on for each sample with a model of its own; implements `drafters.Drafter`.

    Under `coupled` a place's token is drawn with the very uniform that the policy will draw with:
    where both laws are close, so are most tokens, and the output stays that without speculation.
    Under `rejection` it is drawn with another uniform and comes with its law, which is accepted
    more often and keeps the law of the output alone.
    """

    def __init__(self, model_dir: Path, vocabulary: int, rule: AcceptanceRule) -> None:
        """Load the model.

        Raises:
            ConfigError: the folder cannot be used, or the model has other tokens than the policy.
        """
        try:
            model = load_policy(model_dir, "float32", seed=None)
        except ModelError as error:
            raise ConfigError(f"rollout.speculation.draft_model: {error}") from error
        with torch.inference_mode():
            self._forward = PolicyForward(model)
            self._forward.weights = self._forward.prepare(policy_weights(model))
        if (mine := len(self._forward.weights.embedding_VE)) != vocabulary:
            raise ConfigError(
                f"rollout.speculation.draft_model {model_dir} has {mine} tokens, the policy "
                f"{vocabulary}: a draft model must share the policy's tokenizer"
            )
        self._rule, self._context = rule, int(model.config.max_position_embeddings)
        self._samples: dict[str, PromptKeys] = {}
        self.reading_s = 0.0  # not told apart: a sample's first fill counts as its look's price

    def propose(self, asked: Sequence[Asked]) -> list[Draft]:
        """See `Drafter`: one forward of all samples for each token of depth."""
        drafts = [Draft([], [], [] if self._rule == "rejection" else None) for _ in asked]
        texts = [np.array((*of.prompt, *of.written.tolist()), dtype=np.int64) for of in asked]
        rows = list(range(len(asked)))
        while rows := [
            row for row in rows
            if len(drafts[row].tokens) < asked[row].limit and len(texts[row]) < self._context
        ]:  # fmt: skip
            tokens = self._next([asked[row] for row in rows], [texts[row] for row in rows],
                                [drafts[row] for row in rows])  # fmt: skip
            for row, token in zip(rows, tokens, strict=True):
                texts[row] = np.append(texts[row], token)
        return drafts

    def finish(self, sample: str, prompt: tuple[int, ...], written: np.ndarray) -> None:
        """Forget the sample."""
        self.forget(sample)

    def forget(self, sample: str) -> None:
        """See `Drafter`."""
        self._samples.pop(sample, None)

    def remembers(self, prompt: tuple[int, ...]) -> bool:
        """See `Drafter`: it knows no more of one prompt than of another."""
        return False

    def _next(self, asked: list[Asked], texts: list[np.ndarray], drafts: list[Draft]) -> list[int]:
        """Draw the token after each text, and add it to the sample's draft."""
        keys = [self._read(of.sample, text) for of, text in zip(asked, texts, strict=True)]
        self._forward.fill([(of, of.num_left) for of in keys])
        logits_BV = self._forward.logits(torch.stack([of.hidden_E for of in keys]))  # type: ignore
        laws = RowLaws.of([of.law for of in asked])
        key_B = np.array([of.key for of in asked], dtype=np.uint64)
        place_B = [len(text) - len(of.prompt) for of, text in zip(asked, texts, strict=True)]
        law_BV = probabilities(logits_BV, laws)
        if self._rule == "coupled":
            draws = sample(logits_BV, laws, uniform(key_B, np.array(place_B)))
        else:
            plain = RowLaws.of([SamplingParams()] * len(asked))  # truncation is in the law already
            draws = sample(law_BV.log(), plain, uniform(key_B ^ DRAFT_STREAM, np.array(place_B)))
        tokens = draws.token_ids_B.tolist()
        for draft, token, law_V in zip(drafts, tokens, law_BV, strict=True):
            draft.tokens.append(token)
            draft.classes.append(class_of(0, float(law_V.max())))
            if draft.laws is not None:
                draft.laws.append(law_V)
        return tokens

    def _read(self, sample: str, text: np.ndarray) -> PromptKeys:
        """The sample's keys, as far as they are those of the text; the last token is to be fed."""
        keys = self._samples.get(sample)
        if keys is None or len(text) > keys.layers[0].shape[2]:
            longer = PromptKeys(text, self._forward.kv_shape.zeros(2 * len(text) + 32), 0)
            if keys is not None:
                for theirs, mine in zip(longer.layers, keys.layers, strict=True):
                    theirs[:, :, : mine.shape[2]] = mine
                longer.num_done, longer.token_ids = keys.num_done, keys.token_ids
            keys = self._samples[sample] = longer
        common = min(keys.num_done, len(text) - 1)
        differs = np.flatnonzero(keys.token_ids[:common] != text[:common])
        keys.num_done = int(differs[0]) if len(differs) else common
        keys.token_ids = text
        return keys
