"""Trajectory groups -> samples with advantages -> micro-batches of rows (see `rows.py`).

Shape suffixes: N tokens the policy wrote in one trajectory, T trained tokens of a micro-batch, rows
one after the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..buffer.errors import CorruptData
from ..buffer.records import (
    SizingDecision,
    TrainingSample,
    Trajectory,
    TrajectoryGroup,
    Version,
)
from ..kernels.definition import KeptSets
from .advantage import (
    batch_advantages,
    gigpo_advantages,
    spare_advantages,
    staged_advantages,
    token_whitened,
)
from .config import ObjectiveConfig
from .rows import MAX_SHARED_INPUTS, Layout, Piece, lay_out, pack, row_width

R = TypeVar("R")
RatioLaw = Literal["temperature", "kept_set"]

MAX_PADDING = 0.05
EFFICIENT_TOKENS = 512
"""More rows than this make the matrix products of a layer no faster (measured on CPUs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A trajectory that carries gradient."""

    trajectory: Trajectory
    advantage: float | np.ndarray
    """Of all trained tokens, or of each: [num_trained] float64. Under GAE the reward, see
    `critic.judged`."""
    first_trained: int
    """Policy-written tokens before this one (the stale prefix) are context with zero weight."""
    weight: float = 1.0
    """Of each trained token in the loss, see `objective.token_weights`."""
    share: float = 1.0
    """Of its prompt: the sizing weight over the samples with a reward, of the prompt or its
    stage."""

    @property
    def num_trained(self) -> int:
        """Tokens with weight."""
        return self.trajectory.num_policy_tokens - self.first_trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Token rows, and under which law the tokens in them are scored."""

    layout: Layout
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
    owner_T: Tensor
    """int64: which sample of the micro-batch it belongs to."""
    lag_T: Tensor
    """int64: versions between the one that wrote it and the one held."""
    mixed_T: Tensor
    """bool: some key is older than the version that wrote the token (`kv_mixture`)."""
    num_inputs: int
    """Inputs without padding."""
    values_T: Tensor | None = None
    """The critic's, of the held version; None without one, like the next."""
    returns_T: Tensor | None = None
    filler: bool = False
    """Whether it is there only because the other ranks have one more; nothing in it has weight."""


def samples_of(groups: Sequence[TrajectoryGroup], objective: ObjectiveConfig) -> list[Sample]:
    """The samples that carry gradient, in canonical order (uid, index).

    Rewards of samples that are not trained count in their group's advantages all the same.
    """
    samples = []
    ordered_P = sorted(groups, key=lambda group: group.prompt.uid)
    ordered_PG = [sorted(g.samples, key=lambda s: s.trajectory.index) for g in ordered_P]
    advantages_PG = _advantages([group.sizing for group in ordered_P], ordered_PG, objective)
    for group, ordered, advantages_G in zip(ordered_P, ordered_PG, advantages_PG, strict=True):
        shares = _shares(group.sizing, ordered)
        for sample, value, share in zip(ordered, advantages_G, shares, strict=True):
            trajectory, stale = sample.trajectory, sample.stale_prefix
            left = trajectory.num_policy_tokens - stale
            if sample.trained and trajectory.score.value is not None and left > 0 and share > 0:
                value = value[stale:] if isinstance(value, np.ndarray) else float(value)
                samples.append(
                    Sample(trajectory=trajectory, advantage=value, first_trained=stale, share=share)
                )
    return samples


def _stage_sizes(sizing: SizingDecision, ordered: Sequence[TrainingSample]) -> list[int]:
    """How many of a group's samples, lost ones apart, are of each stage; one without stages."""
    counts = [stage.num_samples for stage in sizing.stages[:-1]]
    indices = [sample.trajectory.index for sample in ordered]
    edges = np.searchsorted(indices, np.cumsum(counts, dtype=int)).tolist()
    return [b - a for a, b in pairwise([0, *edges, len(indices)])]


def _needed(sizing: SizingDecision, ordered: Sequence[TrainingSample]) -> np.ndarray:
    """[G] bool: the samples of a group that are not spare, those that finished first."""
    order = np.argsort([s.trajectory.timings.generated_s for s in ordered], kind="stable")
    needed_G = np.zeros(len(ordered), dtype=bool)
    needed_G[order[: sizing.num_samples - sizing.spares]] = True
    return needed_G


def _shares(sizing: SizingDecision, ordered: Sequence[TrainingSample]) -> list[float]:
    """Of each sample of a group, see `Sample.share`."""
    if sizing.spares:
        each = sizing.weight / sizing.num_samples
        needed_G = _needed(sizing, ordered)
        return np.where(needed_G, each, each * sizing.spare_weight).tolist()
    weights = [stage.weight for stage in sizing.stages] or [1.0]
    shares: list[float] = []
    for size, weight in zip(_stage_sizes(sizing, ordered), weights, strict=True):
        members = ordered[len(shares) : len(shares) + size]
        scored = sum(s.trajectory.score.value is not None for s in members)
        shares += [sizing.weight * weight / max(1, scored)] * size
    return shares


def _advantages(
    sizing_P: Sequence[SizingDecision],
    ordered_PG: Sequence[Sequence[TrainingSample]],
    objective: ObjectiveConfig,
) -> Sequence[Sequence[float | np.ndarray]]:
    """The advantage of each sample of each group; under GiGPO of each of its N tokens."""
    trajectories_PG = [[sample.trajectory for sample in ordered] for ordered in ordered_PG]
    if objective.advantage == "gigpo":
        return [_turn_advantages(trajectories, objective) for trajectories in trajectories_PG]
    if objective.advantage == "leave_one_out":
        return [_leave_one_out(*each) for each in zip(sizing_P, ordered_PG, strict=True)]
    rewards_PG = [[t.score.value for t in trajectories] for trajectories in trajectories_PG]
    if objective.advantage == "gae":
        return [[reward or 0.0 for reward in rewards_G] for rewards_G in rewards_PG]
    if objective.advantage == "batch_std":
        tokens_PG = [
            [t.num_policy_tokens for t in trajectories] for trajectories in trajectories_PG
        ]
        return [a.tolist() for a in token_whitened(rewards_PG, tokens_PG)]
    return [a.tolist() for a in batch_advantages(rewards_PG, objective.advantage)]


def _leave_one_out(sizing: SizingDecision, ordered: Sequence[TrainingSample]) -> list[float]:
    """Of one group; what a sample is compared with follows from how the group was sized."""
    rewards_G = [sample.trajectory.score.value for sample in ordered]
    if sizing.spares:
        of_spares = sizing.num_samples, sizing.spare_weight
        return spare_advantages(rewards_G, _needed(sizing, ordered), *of_spares).tolist()
    return staged_advantages(rewards_G, _stage_sizes(sizing, ordered)).tolist()


def _turn_advantages(
    trajectories: Sequence[Trajectory], objective: ObjectiveConfig
) -> list[np.ndarray]:
    """GiGPO's of one group: per sample, [N] of the tokens that the policy wrote."""
    turns = [[turn for turn in t.turns if turn.role == "policy"] for t in trajectories]
    by_turn = gigpo_advantages(
        [trajectory.score.value for trajectory in trajectories],
        [[turn.reward for turn in each] for each in turns],
        [[turn.state_hash for turn in each] for each in turns],
        kind="group_mean",
        discount=objective.step_discount,
        step_weight=objective.step_weight,
    )
    return [
        np.repeat(values, [turn.end - turn.start for turn in each])
        for values, each in zip(by_turn, turns, strict=True)
    ]


def updates_of(groups: Sequence[TrajectoryGroup], num_updates: int) -> list[list[TrajectoryGroup]]:
    """The batch cut, in order of uid, into one part of whole groups per optimizer update."""
    ordered = sorted(groups, key=lambda group: group.prompt.uid)
    cuts = [len(ordered) * i // num_updates for i in range(num_updates + 1)]
    return [ordered[a:b] for a, b in pairwise(cuts) if b > a]


def plan_micro_batches(
    samples: Sequence[Sample],
    max_tokens: int,
    *,
    share_prompts: bool = True,
    packed: bool = False,
    num_ranks: int = 1,
) -> list[list[list[Sample]]]:
    """Cut samples into micro-batches of rows, at most `max_tokens` padded inputs each.

    Rows are stably sorted by width. A row wider than `max_tokens` is a micro-batch of its own. A
    micro-batch that is large enough to compute efficiently is closed early rather than padded by
    more than `MAX_PADDING`.

    Args:
        samples: in canonical order.
        max_tokens: bounds the memory of one forward and backward; changes no gradient.
        share_prompts: whether samples of one prompt may share a row.
        packed: micro-batches are packed: rows hold one sample each, and none is padded.
        num_ranks: among whom they will be dealt (`own_share`); with one, nothing is evened out.
    Returns:
        Micro-batches of rows of samples.
    """
    shared = min(max_tokens, MAX_SHARED_INPUTS) if share_prompts and not packed else 0
    rows = _share_prefixes(samples, shared)
    wide = sorted(((_width(row), row) for row in rows), key=lambda pair: pair[0])
    plan = _cut(wide, max_tokens, packed)
    rounds = math.ceil(len(plan) / num_ranks)
    if len(plan) == rounds * num_ranks:
        return plan
    # As many as the ranks can share, and as equal as they can be: the smallest bound that does.
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_cut(wide, middle, packed)) <= rounds * num_ranks:
            high = middle
        else:
            low = middle + 1
    return _cut(wide, high, packed)


def _cut(
    wide: Sequence[tuple[int, list[Sample]]], max_tokens: int, packed: bool
) -> list[list[list[Sample]]]:
    plan: list[list[list[Sample]]] = []
    inputs = 0
    for width, row in wide:
        # Sorted: the newest row is the widest, so it sets the width of all.
        padded = inputs + width if packed else (len(plan[-1]) + 1 if plan else 1) * width
        wasteful = padded - inputs - width > MAX_PADDING * padded
        if not plan or padded > max_tokens or (wasteful and inputs >= EFFICIENT_TOKENS):
            plan.append([])
            inputs = 0
        plan[-1].append(row)
        inputs += width
    return plan


def own_share(plan: list[list[list[Sample]]], rank: int, size: int) -> list[list[list[Sample]]]:
    """Every `size`-th micro-batch: neighbours are alike in size, so ranks wait little for another.

    Every rank gets the same number; one that has fewer repeats the smallest row of all, with zero
    weight, because the ranks gather parameters together.
    """
    own = plan[rank::size]
    if len(own) < math.ceil(len(plan) / size):
        own.append([[replace(sample, weight=0.0) for sample in plan[0][0]]])
    return own


def _share_prefixes(samples: Sequence[Sample], max_inputs: int) -> list[list[Sample]]:
    """Put neighbours of one prompt in one row while it stays within `max_inputs`."""
    if not max_inputs:
        return [[sample] for sample in samples]
    rows: list[list[Sample]] = []
    for sample in samples:
        if rows and _same_prefix(rows[-1][0], sample):
            joined = [*rows[-1], sample]
            if _width(joined) <= max_inputs:
                rows[-1] = joined
                continue
        rows.append([sample])
    return rows


def _same_prefix(one: Sample, other: Sample) -> bool:
    a, b = _piece(one), _piece(other)
    return (
        one.trajectory.uid == other.trajectory.uid
        and a.num_prefix == b.num_prefix
        and np.array_equal(a.token_ids[: a.num_prefix], b.token_ids[: b.num_prefix])
    )


def _width(row: Sequence[Sample]) -> int:
    return row_width([_piece(sample) for sample in row])


def _piece(sample: Sample) -> Piece:
    """The sample as rows see it; its prefix is what stands before the first written token."""
    written = np.flatnonzero(sample.trajectory.policy_mask)
    if written[0] == 0:
        raise CorruptData(f"{_name(sample.trajectory)}: its first token has nothing before it")
    return Piece(
        token_ids=sample.trajectory.token_ids,
        places=written[sample.first_trained :],
        num_prefix=int(written[0]),
    )


def collate(
    rows: Sequence[Sequence[Sample]],
    held: Version,
    dtype: torch.dtype,
    law: RatioLaw = "temperature",
    *,
    packed: bool = False,
) -> MicroBatch:
    """Everything known of the trained tokens of some samples, lined up.

    Args:
        rows: samples of one micro-batch, by row.
        held: the version the learner holds, for `clean_T`.
        dtype: of the loss's arithmetic.
        law: `kept_set`: log-probabilities are renormalised over the recorded kept ids.
        packed: put all samples into one row, see `rows.pack`.
    Raises:
        CorruptData: a record that cannot be trained on, by uid.
    """
    samples = [sample for row in rows for sample in row]
    pieces = [[_piece(sample) for sample in row] for row in rows]
    layout = pack([piece for row in pieces for piece in row]) if packed else lay_out(pieces)
    counts = np.array([sample.num_trained for sample in samples])

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float64), counts)).to(dtype)

    behaviour = [s.trajectory.behaviour_logprobs[s.first_trained :] for s in samples]
    ages = [_ages(sample, held) for sample in samples]
    return MicroBatch(
        layout=layout,
        behaviour_T=torch.from_numpy(np.concatenate(behaviour)).to(dtype),
        advantages_T=torch.from_numpy(
            np.concatenate([np.broadcast_to(s.advantage, s.num_trained) for s in samples])
        ).to(dtype),
        weights_T=spread([sample.weight for sample in samples]),
        temperature_T=spread([_temperature(sample.trajectory) for sample in samples]),
        kept=_kept_sets(samples, layout.targets_T.numpy(), law),
        clean_T=torch.from_numpy(np.concatenate([clean for clean, _, _ in ages])),
        mixed_T=torch.from_numpy(np.concatenate([mixed for _, mixed, _ in ages])),
        owner_T=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        lag_T=torch.from_numpy(np.concatenate([lag for _, _, lag in ages])),
        num_inputs=sum(map(_width, rows)),
        filler=not any(sample.weight for sample in samples),
    )


def moved(value: R, device: torch.device) -> R:
    """Rows or a micro-batch with all tensors on a device; where they are already, themselves."""
    if isinstance(value, Tensor):
        return value.to(device)  # pyright: ignore
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(each, device) for each in value))
    if is_dataclass(value):
        of = {field.name: moved(getattr(value, field.name), device) for field in fields(value)}
        return replace(value, **of)  # pyright: ignore
    return value


def _temperature(trajectory: Trajectory) -> float:
    if trajectory.sampling.temperature <= 0:
        raise CorruptData(f"{_name(trajectory)} was sampled greedily: it has no ratio to train on")
    return trajectory.sampling.temperature


def _ages(sample: Sample, held: Version) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per trained token: written by the held version over its own keys; written over older keys;
    versions behind the held one."""
    trajectory, first = sample.trajectory, sample.first_trained
    lengths = [span.length for span in trajectory.versions]
    same = np.repeat([same_weights(span.version, held) for span in trajectory.versions], lengths)
    written = np.repeat([span.version.step for span in trajectory.versions], lengths)
    oldest = np.repeat(
        [span.version.step for span in trajectory.kv_version_min],
        [span.length for span in trajectory.kv_version_min],
    )
    mixed = (written != oldest)[first:]
    return same[first:] & ~mixed, mixed, (held.step - written)[first:]


def same_weights(one: Version, other: Version) -> bool:
    """Whether two versions are one state: a resume publishes its start under a new branch."""
    if one.step != other.step:
        return False
    return one.branch == other.branch or (one.digest == other.digest != "")


def _kept_sets(samples: Sequence[Sample], targets_T: np.ndarray, law: RatioLaw) -> KeptSets | None:
    """The recorded kept sets of the trained tokens; None under the temperature law, and when the
    sampling removed nothing.

    Raises:
        CorruptData: a sample was truncated and its sets are missing, or lack the sampled token.
    """
    if law == "temperature" or not any(s.trajectory.sampling.truncates for s in samples):
        return None
    ids, sizes = [], []
    for sample in samples:
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
        ends = np.cumsum([sample.num_trained for sample in samples])
        row = int(np.searchsorted(ends, hits_T.argmin(), side="right"))
        raise CorruptData(f"{_name(samples[row].trajectory)}: a token is not in its own kept set")
    offsets_T1 = np.concatenate([[0], np.cumsum(sizes_T)])
    return KeptSets(torch.from_numpy(ids_M), torch.from_numpy(offsets_T1))


def _name(trajectory: Trajectory) -> str:
    return f"sample {trajectory.index} of prompt {trajectory.uid}, attempt {trajectory.attempt}"
