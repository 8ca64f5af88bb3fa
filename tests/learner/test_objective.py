"""The objective's parts, by numbers a reader can check."""

import math

import pytest
import torch
from slipstream.learner.objective import (
    MAX_LOG_RATIO,
    clipped_surrogate,
    importance_correction,
    kl_to_reference,
    token_weights,
)

RATIOS = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0], dtype=torch.float64)


def test_clip_takes_the_worse_branch_and_stops_its_gradient():
    current = RATIOS.log().requires_grad_()
    loss, clipped = clipped_surrogate(
        current, torch.zeros(5, dtype=torch.float64), ADVANTAGES, clip_low=0.2, clip_high=0.28
    )
    loss.sum().backward()
    # -min(1.5, 1.28), -min(-1.5, -1.28), -min(0.5, 0.8), -min(-0.5, -0.8), -min(2.2, 2.2)
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.28, 1.5, -0.5, 0.8, -2.2]).double())
    assert clipped.tolist() == [True, False, False, True, False]
    torch.testing.assert_close(current.grad, torch.tensor([0, 1.5, -0.5, 0, -2.2]).double())


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    current = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, clipped = clipped_surrogate(
        current, current.detach(), torch.tensor([3.0, -2.0]), clip_low=0.2, clip_high=0.28
    )
    loss.sum().backward()
    assert current.grad is not None
    assert current.grad.tolist() == [-3.0, 2.0]
    assert not clipped.any()


@pytest.mark.parametrize(
    ("kind", "want", "limited"),
    [
        ("truncate", [2.0, 1.0, 0.05], [True, False, False]),
        ("mask", [0.0, 1.0, 0.0], [True, False, True]),
        ("none", [1.0, 1.0, 1.0], [False, False, False]),
    ],
)
def test_corrections(kind, want, limited):
    proximal = torch.tensor([3.0, 1.0, 0.05], dtype=torch.float64).log().requires_grad_()
    correction, capped = importance_correction(
        proximal, torch.zeros(3, dtype=torch.float64), kind=kind, low=0.125, high=2.0
    )
    torch.testing.assert_close(correction, torch.tensor(want, dtype=torch.float64))
    assert capped.tolist() == limited
    assert not correction.requires_grad


def test_log_ratios_are_clamped_before_exp():
    far, near = torch.tensor([-1000.0, 1000.0]), torch.zeros(2)
    loss, _ = clipped_surrogate(far, near, torch.tensor([-1.0, -1.0]), clip_low=0.2, clip_high=0.2)
    assert loss.isfinite().all()
    assert loss[1] == pytest.approx(math.exp(MAX_LOG_RATIO))
    assert kl_to_reference(far, near).isfinite().all()


def test_k3_is_zero_at_equality_and_positive_elsewhere():
    current = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    reference = torch.tensor([-1.0, -2.0, 0.0], dtype=torch.float64)
    want = [0.0, math.exp(-1) + 1 - 1, math.e - 1 - 1]
    torch.testing.assert_close(kl_to_reference(current, reference), torch.tensor(want).double())


def test_aggregation_weights():
    losses = [[1.0, 1.0, 1.0], [5.0]]
    for (weights, denominator), want in (
        (token_weights([3, 1], "token"), 8 / 4),
        (token_weights([3, 1], "sequence"), (1 + 5) / 2),
    ):
        assert sum(w * sum(x) for w, x in zip(weights, losses, strict=True)) / denominator == want


def test_shapes_never_broadcast():
    with pytest.raises(ValueError, match=r"current \(3,\), proximal \(3, 1\)"):
        clipped_surrogate(
            torch.zeros(3), torch.zeros(3, 1), torch.zeros(3), clip_low=0.2, clip_high=0.2
        )
    with pytest.raises(ValueError, match="shapes differ"):
        importance_correction(torch.zeros(2), torch.zeros(3), kind="none", low=0, high=2)
