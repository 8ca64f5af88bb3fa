"""Reward of a transformers sequence classifier: a reward model, or one label's probability."""

from pathlib import Path
from typing import ClassVar


class Classifier:
    """Scores the chat of prompt and completion; one output is the reward itself, more are a
    softmax of which `label` is taken. Runs on the CPU of the reward process."""

    batch_size: ClassVar[int] = 16
    cacheable: ClassVar[bool] = True

    def __init__(self, *, model: str, label: int = 0, max_tokens: int = 1024) -> None:
        """Load tokenizer and model.

        Args:
            model: a folder with weights.
            label: which output, of several.
            max_tokens: of prompt and completion; the beginning is cut off.
        Raises:
            ValueError: no folder, no such label, or no padding token.
        """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if not Path(model).is_dir():
            raise ValueError(f"model = {model!r} is not a folder")
        self._torch, self._max_tokens, self._label = torch, max_tokens, label
        self._tokenizer = AutoTokenizer.from_pretrained(model, truncation_side="left")
        self._model = AutoModelForSequenceClassification.from_pretrained(model).eval()
        if not 0 <= label < self._model.config.num_labels:
            raise ValueError(f"label = {label}: the model has {self._model.config.num_labels}")
        if self._tokenizer.pad_token is None:
            raise ValueError(f"the tokenizer of {model!r} has no padding token")

    def score(self, completions: list, prompts: list) -> list[float]:
        """One reward for each."""
        texts = [self._text(prompt, answer) for prompt, answer in zip(prompts, completions)]  # noqa: B905
        inputs = self._tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=self._max_tokens,
            add_special_tokens=not self._tokenizer.chat_template,
        )  # fmt: skip
        with self._torch.inference_mode():
            logits = self._model(**inputs).logits.float()
        single = logits.shape[1] == 1
        return (logits[:, 0] if single else logits.softmax(-1)[:, self._label]).tolist()

    def _text(self, prompt: str | list, answer: str | list) -> str:
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        said = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        if self._tokenizer.chat_template:
            return str(self._tokenizer.apply_chat_template([*asked, *said], tokenize=False))
        return "\n".join(message["content"] for message in (*asked, *said))
