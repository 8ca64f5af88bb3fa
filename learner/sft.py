"""The supervised warm start: next-token loss on what the assistant says, and on nothing else.

Shape suffixes: T tokens of the assistant in one batch.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..buffer.errors import ConfigError, TrainingFailed
from ..buffer.waits import progressed
from ..kernels.models import render_prompts
from .batch import Rows, moved
from .config import OptimizerConfig, SftConfig
from .policy import Policy, score
from .ranks import ALONE, Ranks
from .rows import Piece, lay_out

SORT_BATCHES = 8
"""Examples are sorted by length within so many batches: little padding, still shuffled."""

FINAL_RATE = 0.1
"""The learning rate falls linearly to this share of itself."""

LOG_EVERY_UPDATES = 10
WARM_START = "its warm start"
"""What the learner waits for meanwhile; each update is progress."""
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A conversation as token ids."""

    token_ids: np.ndarray
    """Prompt, then the assistant's tokens with the end token."""
    num_prompt: int


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Conversations as the policy sees them when it samples, completed by the assistant.

    The prompt is rendered by `render_prompt`, so it is token for token what generation starts
    from; the completion is tokenised alone, as generation writes it, and the end token follows.
    Earlier messages of the assistant are context.

    Raises:
        ConfigError: no file, no example, or a line that is not {"messages": [...]} ending with the
            assistant's message; says which line.
    """
    prompts, completions = [], []
    for number, line in enumerate(_lines(path), start=1):
        try:
            *prompt, last = json.loads(line)["messages"]
            if last["role"] != "assistant" or not prompt:
                raise ValueError("the last of at least two messages must be the assistant's")
            prompts.append(prompt)
            completions.append(last["content"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number}: {error!r}; every line must be "
                '{"messages": [{"role": ..., "content": ...}, ...]}'
            ) from error
    if not prompts:
        raise ConfigError(f"{path} has no examples to learn from")
    heads = render_prompts(tokenizer, prompts)
    tails = tokenizer(completions, add_special_tokens=False)["input_ids"]
    return [
        Example(
            token_ids=np.array([*head, *tail, tokenizer.eos_token_id], dtype=np.int64),
            num_prompt=len(head),
        )
        for head, tail in zip(heads, tails, strict=True)
    ]


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def run_sft(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: SftConfig,
    *,
    seed: int,
    micro_batch_tokens: int = 16_384,
    ranks: Ranks = ALONE,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    stop: threading.Event | None = None,
) -> float:
    """Train in place with AdamW; returns the mean loss of the last updates, in nats per token.

    Deterministic in its arguments. The rate warms up over `warmup_steps` updates and falls linearly
    to a tenth; gradients are clipped to norm 1.

    Args:
        model: the policy.
        examples: from `read_examples`.
        config: `[sft]`.
        seed: of the order of examples.
        micro_batch_tokens: padded tokens of one forward and backward; changes no gradient.
        ranks: among whom the model is sharded and each batch is dealt.
        report: gets a progress line every `LOG_EVERY_UPDATES` updates.
        stop: when set, training ends at the next update.
    Raises:
        TrainingFailed: a loss or gradient that is not finite.
    """
    optimizer = OptimizerConfig(learning_rate=config.learning_rate, max_grad_norm=MAX_GRAD_NORM)
    policy = Policy(model, optimizer, ranks=ranks)
    plan = list(_batches(examples, config, seed))
    losses: list[float] = []
    tokens, started = 0, time.perf_counter()
    for update, batch in enumerate(plan, start=1):
        if ranks.any(stop is not None and stop.is_set()):
            break
        warm = min(1.0, update / max(1, config.warmup_steps))
        rate = config.learning_rate * warm * (1 - (1 - FINAL_RATE) * (update - 1) / len(plan))
        progressed(WARM_START)
        losses.append(_update(policy, batch, rate, update, micro_batch_tokens))
        tokens += sum(len(example.token_ids) for example in batch)
        if update % LOG_EVERY_UPDATES == 0 or update in (1, len(plan)):
            seconds = time.perf_counter() - started
            report(
                {
                    "update": update,
                    "updates": len(plan),
                    "loss": float(np.mean(losses[-LOG_EVERY_UPDATES:])),
                    "learning_rate": rate,
                    "tokens_per_s": tokens / seconds,
                    "seconds": seconds,
                    "time": time.time(),
                }
            )
    return float(np.mean(losses[-LOG_EVERY_UPDATES:])) if losses else math.nan


def _batches(examples: Sequence[Example], config: SftConfig, seed: int) -> Iterator[list[Example]]:
    """Yield the batches of all epochs: shuffled, sorted by length within a few batches."""
    rng = np.random.default_rng(seed)
    for _ in range(config.epochs):
        order = rng.permutation(len(examples))
        span = SORT_BATCHES * config.batch_size
        batches = []
        for start in range(0, len(order), span):
            near = sorted(order[start : start + span], key=lambda i: len(examples[i].token_ids))
            batches += [
                near[i : i + config.batch_size] for i in range(0, len(near), config.batch_size)
            ]
        for index in rng.permutation(len(batches)):
            yield [examples[i] for i in batches[index]]


def _update(
    policy: Policy, batch: Sequence[Example], rate: float, update: int, max_tokens: int
) -> float:
    """One optimizer update; returns its loss, the mean over the batch's assistant tokens.

    Raises:
        TrainingFailed: the loss or the gradient is not finite; the weights are untouched.
    """
    rows = max(1, max_tokens // max(len(example.token_ids) for example in batch))
    num_targets = sum(len(example.token_ids) - example.num_prompt for example in batch)
    value, ranks = 0.0, policy.ranks
    for start in range(0, len(batch), rows * ranks.size):
        own = batch[start : start + rows * ranks.size][ranks.rank :: ranks.size]
        # Ranks gather parameters together: one without examples repeats one, without weight.
        inputs = moved(collate(own or batch[:1], policy.loss_dtype), ranks.device)
        logprobs_T, _ = score(policy.model, inputs)
        loss = -logprobs_T.sum() * bool(own) / num_targets
        loss.backward()
        value += float(loss.detach())
    value = ranks.total([value])[0]
    norm = policy.grad_norm()
    if not (math.isfinite(value) and torch.isfinite(norm)):
        raise TrainingFailed(
            f"warm start, update {update}: loss {value}, gradient norm {float(norm)}; lower "
            "sft.learning_rate"
        )
    policy.update(rate, norm)
    return value


def collate(batch: Sequence[Example], dtype: torch.dtype) -> Rows:
    """Padded rows in which exactly the assistant's tokens are scored, at temperature 1."""
    layout = lay_out(
        [
            [Piece(token_ids=e.token_ids, places=np.arange(e.num_prompt, len(e.token_ids)))]
            for e in batch
        ]
    )
    return Rows(layout=layout, temperature_T=torch.ones(len(layout.targets_T), dtype=dtype))
