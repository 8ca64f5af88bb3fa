"""Packed rows: loss and gradients as sample by sample; a leak between samples shows."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from slipstream.buffer.records import Version
from slipstream.buffer.staleness import LivePath
from slipstream.kernels import attention
from slipstream.learner.batch import plan_micro_batches, samples_of
from slipstream.learner.config import LearnerConfig, ObjectiveConfig
from slipstream.learner.policy import Policy
from slipstream.learner.rows import Piece, pack
from slipstream.learner.step import train_step

HELD = Version(branch=0, step=0)


def step(policy, groups, monkeypatch, **changes):
    """Metrics of a step, and the gradients that it gave the optimizer."""
    config = LearnerConfig(objective=ObjectiveConfig(preset="dapo"), **changes)
    seen = {}
    with monkeypatch.context() as patch:
        patch.setattr(
            policy, "update", lambda rate, norm: seen.update({
                name: p.grad.clone() for name, p in policy.parameters.items()
            }),
        )  # fmt: skip
        metrics = train_step(
            policy, groups, step=1, held=HELD, config=config, path=LivePath(0),
            max_staleness_steps=1,
        ).metrics  # fmt: skip
    return metrics, seen


def largest_difference(one, other):
    """Relative to the norm of each gradient."""
    return max(float((one[n] - other[n]).norm() / other[n].norm()) for n in other)


def both(make, build_policy, monkeypatch, dtype="float32", **changes):
    config = LearnerConfig()
    groups = make.groups(4, 4, seed=2)
    alone = step(
        Policy(build_policy(dtype), config.optimizer), groups, monkeypatch,
        share_prompts=False, micro_batch_tokens=1,
    )  # fmt: skip
    policy = Policy(build_policy(dtype), config.optimizer)
    return step(policy, groups, monkeypatch, packed=True, **changes), alone


@pytest.mark.parametrize("micro_batch_tokens", [16_384, 40, 1])
def test_packing_changes_no_loss_and_no_gradient(
    make, build_policy, monkeypatch, micro_batch_tokens
):
    (metrics, packed), (wanted, alone) = both(
        make, build_policy, monkeypatch, micro_batch_tokens=micro_batch_tokens
    )
    assert metrics["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    assert largest_difference(packed, alone) < 1e-5
    assert metrics["padding"] == 0
    assert metrics["tokens_processed"] == wanted["tokens_processed"]


def test_a_leak_between_packed_samples_is_caught(make, build_policy, monkeypatch):
    """One segment too long: the second sample sees the first."""

    def leaking(query, key, value, segments, scale):
        first, second, *rest = segments.lengths
        return sound(query, key, value, attention.Segments.of([first + second, *rest]), scale)

    sound = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", leaking)
    (_, packed), (_, alone) = both(make, build_policy, monkeypatch)
    assert largest_difference(packed, alone) > 1e-3


def test_a_reference_policy_is_packed_too(make, build_policy, monkeypatch):
    reference = build_policy("float64", seed=5).requires_grad_(False)
    config = {"kl_coefficient": 0.3, "proximal": "behaviour"}
    rows = []
    for packed in (True, False):
        learner = LearnerConfig(objective=ObjectiveConfig(**config), packed=packed)  # pyright: ignore
        policy = Policy(build_policy(), learner.optimizer)
        rows.append(
            train_step(
                policy, make.groups(3, 3), step=1, held=HELD, config=learner, path=LivePath(0),
                max_staleness_steps=1, reference=reference,
            ).metrics
        )  # fmt: skip
    assert rows[0]["kl_reference"] == pytest.approx(rows[1]["kl_reference"], rel=1e-6)
    assert rows[0]["kl_reference"] > 1e-3


def test_micro_batches_are_filled_up_to_their_tokens(make):
    samples = samples_of(make.groups(3, 4), ObjectiveConfig())
    plan = plan_micro_batches(samples, 30, packed=True)
    samples.sort(key=lambda sample: len(sample.trajectory.token_ids))
    assert [s for batch in plan for row in batch for s in row] == samples
    sizes = [[len(s.trajectory.token_ids) - 1 for row in batch for s in row] for batch in plan]
    assert all(sum(own) <= 30 for own in sizes)
    assert all(sum(own) + after[0] > 30 for own, after in pairwise(sizes))


def test_positions_start_anew_and_predictors_stand_before_their_targets():
    pieces = [
        Piece(token_ids=np.array([5, 6, 7, 8]), places=np.array([2, 3])),
        Piece(token_ids=np.array([9, 4]), places=np.array([1])),
    ]
    layout = pack(pieces)
    assert layout.input_ids_BL.tolist() == [[5, 6, 7, 9]]
    assert layout.position_ids_BL.tolist() == [[0, 1, 2, 0]]
    assert layout.positions_T.tolist() == [1, 2, 3]
    assert layout.targets_T.tolist() == [7, 8, 4]
    assert layout.segments is not None
    assert layout.segments.starts.tolist() == [0, 3, 4]
    assert layout.segments.starts.dtype == torch.int32
