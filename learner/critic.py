"""The critic of PPO: a value head on the policy's last hidden states, and the advantages from it.

    values of every trained token (no gradient)  ->  GAE by sample  ->  whitened over the batch
    the same values as anchor  ->  clipped regression on the returns, beside the policy's loss

The head is float32 (float64 for a float64 policy), starts at zero, has a learning rate of its own,
and is saved with the optimizer's state: engines and exports know nothing of it.

Shape suffixes: T trained tokens of a micro-batch, N of one sample, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .advantage import Total, generalised_advantages, whitened
from .batch import MicroBatch
from .config import ObjectiveConfig
from .objective import clipped_value_loss

PREFIX = "critic."
"""Of its parameters' names beside those of the model."""


def make_critic(model: PreTrainedModel) -> nn.Linear:
    """A head D -> 1 whose values are all 0: before it has learned, advantages are the returns."""
    weight = model.get_output_embeddings().weight  # pyright: ignore
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    critic = nn.Linear(weight.shape[1], 1, dtype=dtype, device=weight.device)  # pyright: ignore
    for parameter in critic.parameters():
        nn.init.zeros_(parameter)
    return critic


def values_of(critic: nn.Linear, hidden_TD: Tensor) -> Tensor:
    """[T] what the critic expects of the rest of a sample, before each token is written."""
    return critic(hidden_TD.to(critic.weight.dtype))[:, 0]


def judged(
    score: Callable[[MicroBatch], Tensor],
    batches: Sequence[MicroBatch],
    config: ObjectiveConfig,
    total: Total = list,
) -> list[MicroBatch]:
    """The batches with values, returns and whitened advantages in them.

    Args:
        score: [T] values of a micro-batch under the held version, without gradient.
        batches: all of a step; their `advantages_T` hold the reward of each token's sample.
        config: for `discount` and `gae_decay`.
        total: sums over the learner's ranks, each of which has its own batches.
    """
    valued = []
    for batch in batches:
        values_T = score(batch)
        rewards, lengths = _by_sample(batch)
        raw = [
            generalised_advantages(
                reward, own.double().numpy(), discount=config.discount, decay=config.gae_decay
            )
            for reward, own in zip(rewards, values_T.cpu().split(lengths), strict=True)
        ]
        valued.append((batch, values_T, np.concatenate(raw)))
    weighted = [(batch.weights_T != 0).cpu().numpy() for batch, _, _ in valued]
    white = whitened([raw_T for _, _, raw_T in valued], weighted, total)
    return [
        replace(
            batch,
            values_T=values_T,
            returns_T=values_T + torch.from_numpy(raw_T).to(values_T),
            advantages_T=torch.from_numpy(white_T).to(values_T),
        )
        for (batch, values_T, raw_T), white_T in zip(valued, white, strict=True)
    ]


def _by_sample(batch: MicroBatch) -> tuple[list[float], list[int]]:
    """Reward and trained tokens of each sample; `owner_T` counts up from 0."""
    lengths = torch.bincount(batch.owner_T)
    last = lengths.cumsum(0) - 1
    return batch.advantages_T[last].tolist(), lengths.tolist()


def value_term(
    critic: nn.Linear,
    batch: MicroBatch,
    config: ObjectiveConfig,
    denominator: float,
    seen_T: dict[str, Tensor],
) -> Callable[[Tensor], Tensor]:
    """The critic's loss as a function of hidden states, weighed like the policy's.

    Args:
        critic: the head.
        batch: from `judged`.
        config: for `value_coefficient` and `value_clip`.
        denominator: what weighted sums are divided by.
        seen_T: gets what is reported of each token.
    """
    values_T, returns_T = batch.values_T, batch.returns_T
    assert values_T is not None
    assert returns_T is not None

    def term(hidden_TD: Tensor) -> Tensor:
        loss_T, clipped_T = clipped_value_loss(
            values_of(critic, hidden_TD), values_T, returns_T, clip=config.value_clip
        )
        seen_T.update(
            value_loss=loss_T.detach(), value_clipped=clipped_T, returns=returns_T,
            returns_squared=returns_T.square(), value_error=(returns_T - values_T).square(),
        )  # fmt: skip
        return config.value_coefficient * (loss_T * batch.weights_T).sum() / denominator

    return term
