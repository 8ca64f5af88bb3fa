"""Trajectory groups -> samples with advantages -> micro-batches of right-padded rows.

Shape suffixes: B rows, L padded inputs of a row, N tokens the policy wrote in one trajectory,
T trained tokens of a micro-batch, rows one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..buffer.errors import CorruptData
from ..buffer.records import Trajectory, TrajectoryGroup, Version
from ..kernels.definition import KeptSets
from .advantage import group_advantages

RatioLaw = Literal["temperature", "kept_set"]

MAX_PADDING = 0.05
EFFICIENT_TOKENS = 1024
"""More rows than this make the matrix products of a layer no faster (measured on CPUs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A trajectory that carries gradient."""

    trajectory: Trajectory
    advantage: float
    first_trained: int
    """Policy-written tokens before this one (the stale prefix) are context with zero weight."""
    weight: float = 1.0
    """Of each trained token in the loss, see `objective.token_weights`."""

    @property
    def num_trained(self) -> int:
        """Tokens with weight."""
        return self.trajectory.num_policy_tokens - self.first_trained

    @property
    def num_inputs(self) -> int:
        """The last token predicts nothing, so it is not fed."""
        return len(self.trajectory.token_ids) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Right-padded token rows and the tokens in them to be scored."""

    input_ids_BL: Tensor
    positions_T: Tensor
    """Where, in [B * L], the hidden state lies that predicts each scored token."""
    targets_T: Tensor
    temperature_T: Tensor
    kept: KeptSets | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch(Rows):
    """What one forward and backward works on."""

    behaviour_T: Tensor
    advantages_T: Tensor
    weights_T: Tensor
    clean_T: Tensor
    """bool: written by the version the learner holds, over keys of that version alone."""
    mixed_T: Tensor
    """bool: some key is older than the version that wrote the token (`kv_mixture`)."""
    num_inputs: int
    """Inputs without padding."""


def samples_of(
    groups: Sequence[TrajectoryGroup], advantage: Literal["group_std", "group_mean"]
) -> list[Sample]:
    """The samples that carry gradient, in canonical order (uid, index).

    Rewards of samples that are not trained count in their group's advantages all the same.
    """
    samples = []
    for group in sorted(groups, key=lambda group: group.prompt.uid):
        ordered = sorted(group.samples, key=lambda sample: sample.trajectory.index)
        rewards_G = [sample.trajectory.score.value for sample in ordered]
        advantages_G = group_advantages(rewards_G, advantage)
        for sample, reward, value in zip(ordered, rewards_G, advantages_G, strict=True):
            left = sample.trajectory.num_policy_tokens - sample.stale_prefix
            if sample.trained and reward is not None and left > 0:
                samples.append(
                    Sample(
                        trajectory=sample.trajectory,
                        advantage=float(value),
                        first_trained=sample.stale_prefix,
                    )
                )
    return samples


def updates_of(groups: Sequence[TrajectoryGroup], num_updates: int) -> list[list[TrajectoryGroup]]:
    """The batch cut, in order of uid, into one part of whole groups per optimizer update."""
    ordered = sorted(groups, key=lambda group: group.prompt.uid)
    cuts = [len(ordered) * i // num_updates for i in range(num_updates + 1)]
    return [ordered[a:b] for a, b in pairwise(cuts) if b > a]


def plan_micro_batches(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Cut samples, stably sorted by length, into rows of at most `max_tokens` padded inputs.

    A sample longer than that is a micro-batch of its own. A micro-batch that is large enough to
    compute efficiently is closed early rather than padded by more than `MAX_PADDING`.
    """
    plan: list[list[Sample]] = []
    inputs = 0
    for sample in sorted(samples, key=lambda sample: sample.num_inputs):
        # Sorted: the newest row is the longest, so it sets the width of all.
        padded = (len(plan[-1]) + 1 if plan else 1) * sample.num_inputs
        wasteful = padded - inputs - sample.num_inputs > MAX_PADDING * padded
        if not plan or padded > max_tokens or (wasteful and inputs >= EFFICIENT_TOKENS):
            plan.append([])
            inputs = 0
        plan[-1].append(sample)
        inputs += sample.num_inputs
    return plan


def pad(
    tokens: Sequence[np.ndarray], places: Sequence[np.ndarray]
) -> tuple[Tensor, Tensor, Tensor]:
    """Line rows up at the left and zero-pad them on the right.

    Padding needs no mask: under causal attention no real token attends to a later one.

    Args:
        tokens: token ids of each row; the last one is not fed, as it predicts nothing.
        places: of each row, the positions of the tokens to be scored; none of them 0.
    Returns:
        input_ids_BL, positions_T and targets_T as in `Rows`.
    """
    width = max(map(len, tokens)) - 1
    inputs_BL = np.zeros((len(tokens), width), dtype=np.int64)
    for row, ids in enumerate(tokens):
        inputs_BL[row, : len(ids) - 1] = ids[:-1]
    positions = [place - 1 + row * width for row, place in enumerate(places)]
    targets = [ids[place] for ids, place in zip(tokens, places, strict=True)]
    return (
        torch.from_numpy(inputs_BL),
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(np.concatenate(targets).astype(np.int64)),
    )


def collate(
    rows: Sequence[Sample], held: Version, dtype: torch.dtype, law: RatioLaw = "temperature"
) -> MicroBatch:
    """Everything known of the trained tokens of some samples, lined up.

    Args:
        rows: samples of one micro-batch.
        held: the version the learner holds, for `clean_T`.
        dtype: of the loss's arithmetic.
        law: `kept_set`: log-probabilities are renormalised over the recorded kept ids.
    Raises:
        CorruptData: a record that cannot be trained on, by uid.
    """
    inputs_BL, positions_T, targets_T = pad(
        [sample.trajectory.token_ids for sample in rows], [_trained_places(s) for s in rows]
    )
    counts = np.array([sample.num_trained for sample in rows])

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float64), counts)).to(dtype)

    behaviour = [s.trajectory.behaviour_logprobs[s.first_trained :] for s in rows]
    ages = [_ages(sample, held) for sample in rows]
    return MicroBatch(
        input_ids_BL=inputs_BL,
        positions_T=positions_T,
        targets_T=targets_T,
        behaviour_T=torch.from_numpy(np.concatenate(behaviour)).to(dtype),
        advantages_T=spread([sample.advantage for sample in rows]),
        weights_T=spread([sample.weight for sample in rows]),
        temperature_T=spread([_temperature(sample.trajectory) for sample in rows]),
        kept=_kept_sets(rows, targets_T.numpy(), law),
        clean_T=torch.from_numpy(np.concatenate([clean for clean, _ in ages])),
        mixed_T=torch.from_numpy(np.concatenate([mixed for _, mixed in ages])),
        num_inputs=sum(sample.num_inputs for sample in rows),
    )


def _trained_places(sample: Sample) -> np.ndarray:
    """Positions of the trained tokens in the trajectory."""
    places = np.flatnonzero(sample.trajectory.policy_mask)[sample.first_trained :]
    if places[0] == 0:
        raise CorruptData(f"{_name(sample.trajectory)}: its first token has nothing before it")
    return places


def _temperature(trajectory: Trajectory) -> float:
    if trajectory.sampling.temperature <= 0:
        raise CorruptData(f"{_name(trajectory)} was sampled greedily: it has no ratio to train on")
    return trajectory.sampling.temperature


def _ages(sample: Sample, held: Version) -> tuple[np.ndarray, np.ndarray]:
    """Per trained token: written by the held version over its own keys; written over older keys."""
    trajectory, first = sample.trajectory, sample.first_trained
    lengths = [span.length for span in trajectory.versions]
    same = np.repeat([same_weights(span.version, held) for span in trajectory.versions], lengths)
    written = np.repeat([span.version.step for span in trajectory.versions], lengths)
    oldest = np.repeat(
        [span.version.step for span in trajectory.kv_version_min],
        [span.length for span in trajectory.kv_version_min],
    )
    mixed = (written != oldest)[first:]
    return same[first:] & ~mixed, mixed


def same_weights(one: Version, other: Version) -> bool:
    """Whether two versions are one state: a resume publishes its start under a new branch."""
    if one.step != other.step:
        return False
    return one.branch == other.branch or (one.digest == other.digest != "")


def _kept_sets(rows: Sequence[Sample], targets_T: np.ndarray, law: RatioLaw) -> KeptSets | None:
    """The recorded kept sets of the trained tokens; None under the temperature law, and when the
    sampling removed nothing.

    Raises:
        CorruptData: a sample was truncated and its sets are missing, or lack the sampled token.
    """
    if law == "temperature" or not any(s.trajectory.sampling.truncates for s in rows):
        return None
    ids, sizes = [], []
    for sample in rows:
        kept = sample.trajectory.extras.get("kept_ids")
        if kept is None:
            raise CorruptData(f"{_name(sample.trajectory)} lacks the kept ids of its tokens")
        offsets = kept.offsets[sample.first_trained :]
        ids.append(kept.values[offsets[0] : offsets[-1]])
        sizes.append(np.diff(offsets))
    ids_M, sizes_T = np.concatenate(ids).astype(np.int64), np.concatenate(sizes)
    owner_M = np.repeat(np.arange(len(sizes_T)), sizes_T)
    hits_T = np.bincount(owner_M, ids_M == targets_T[owner_M], minlength=len(sizes_T))
    if not hits_T.all():
        ends = np.cumsum([sample.num_trained for sample in rows])
        row = int(np.searchsorted(ends, hits_T.argmin(), side="right"))
        raise CorruptData(f"{_name(rows[row].trajectory)}: a token is not in its own kept set")
    offsets_T1 = np.concatenate([[0], np.cumsum(sizes_T)])
    return KeptSets(torch.from_numpy(ids_M), torch.from_numpy(offsets_T1))


def _name(trajectory: Trajectory) -> str:
    return f"sample {trajectory.index} of prompt {trajectory.uid}, attempt {trajectory.attempt}"
