"""What a step reports of its tokens: sums while it runs, means at its end.

Shape suffix: T trained tokens of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..buffer.records import TrajectoryGroup
from .batch import MicroBatch


@dataclass(slots=True)
class Sums:
    """Over the trained tokens of a step; divided at its end."""

    loss: float = 0.0
    tokens: int = 0
    inputs: int = 0
    padded: int = 0
    gap_max: float = 0.0
    by_token: dict[str, float] = field(default_factory=dict)

    @classmethod
    def merged(cls, of_ranks: Sequence[dict[str, Any]]) -> "Sums":
        """Those of all ranks together, each given as `asdict` does."""
        sums = cls(**of_ranks[0])
        for other in (cls(**fields) for fields in of_ranks[1:]):
            sums.loss += other.loss
            sums.tokens += other.tokens
            sums.inputs += other.inputs
            sums.padded += other.padded
            sums.gap_max = max(sums.gap_max, other.gap_max)
            for name, value in other.by_token.items():
                sums.by_token[name] = sums.by_token.get(name, 0.0) + value
        return sums

    def add(self, values_T: dict[str, Tensor]) -> None:
        """Add the sum of each per-token tensor under its name."""
        for name, values in values_T.items():
            self.by_token[name] = self.by_token.get(name, 0.0) + float(values.sum())

    def mean(self, name: str, per: str = "") -> float:
        """`name` per trained token, or per token counted under `per`."""
        return self.by_token[name] / max(1.0, self.by_token[per] if per else self.tokens)

    def count(self, batch: MicroBatch, proximal_T: Tensor, seen_T: dict[str, Tensor]) -> None:
        """Add a micro-batch: what the loss saw of each token, and the gap to the engine's view."""
        apart_T = proximal_T - batch.behaviour_T
        gap_T, clean_apart_T = apart_T.abs(), apart_T[batch.clean_T]
        clean_gap_T = gap_T[batch.clean_T]
        self.tokens += len(gap_T)
        self.inputs += batch.num_inputs
        self.padded += batch.layout.input_ids_BL.numel()
        self.gap_max = max(self.gap_max, float(clean_gap_T.max()) if len(clean_gap_T) else 0.0)
        self.add(
            {
                **seen_T,
                "clean": batch.clean_T,
                "gap": clean_gap_T,
                # Of behaviour to learner, by the samples of the former: never negative.
                "gap_kl": clean_apart_T.expm1() - clean_apart_T,
                "mixed": batch.mixed_T,
                "mixed_gap": gap_T[batch.mixed_T],
            }
        )


def step_metrics(sums: Sums, groups: Sequence[TrajectoryGroup], num_updates: int) -> dict[str, Any]:
    """Means over the step, by the names that metrics.jsonl uses."""
    scores = [s.trajectory.score.value for group in groups for s in group.samples]
    rewards = np.array([value for value in scores if value is not None], dtype=np.float64)
    cut = [s.trajectory.finish_reason == "length" for group in groups for s in group.samples]
    metrics: dict[str, Any] = {
        "loss": sums.loss / num_updates,
        "updates": num_updates,
        "reward_trained_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "cut_fraction": float(np.mean(cut)),
        "entropy": sums.mean("entropy"),
        "ratio_mean": sums.mean("ratio"),
        "clipped_fraction": sums.mean("clipped"),
        "correction_mean": sums.mean("correction"),
        "capped_fraction": sums.mean("limited"),
        "kl_behaviour": sums.mean("kl_behaviour"),
        "tokens_trained": sums.tokens,
        "tokens_processed": sums.inputs,
        "padding": 1 - sums.inputs / sums.padded,
        "logprob_gap_tokens": int(sums.by_token["clean"]),
        "logprob_gap_max": sums.gap_max if sums.by_token["clean"] else None,
        "logprob_gap_mean": sums.mean("gap", per="clean") if sums.by_token["clean"] else None,
        "logprob_gap_kl": sums.mean("gap_kl", per="clean") if sums.by_token["clean"] else None,
        "kv_mixture": sums.mean("mixed"),
        "kv_mixture_gap_mean": sums.mean("mixed_gap", per="mixed"),
    }
    if "kl_reference" in sums.by_token:
        metrics["kl_reference"] = sums.mean("kl_reference")
    if "value_loss" in sums.by_token:
        variance = sums.mean("returns_squared") - sums.mean("returns") ** 2
        metrics["value_loss"] = sums.mean("value_loss")
        metrics["value_clipped_fraction"] = sums.mean("value_clipped")
        # How much of the returns the critic knew before the step; 0 when it knows their mean alone.
        metrics["value_explained"] = (
            1 - sums.mean("value_error") / variance if variance > 1e-12 else None
        )
    return metrics
