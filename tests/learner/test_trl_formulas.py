"""Where TRL defines the same objective, loss and gradient are the same numbers."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from slipstream.learner import objective
from slipstream.learner.config import ObjectiveConfig
from slipstream.learner.step import _TokenLoss

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venvs/trl/bin/python"
BUDGET = 9
LENGTHS = [5, 2, 7, 1]

CASES = {
    "grpo": (
        {"aggregation": "sequence", "kl_coefficient": 0.1},
        {"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.1},
    ),
    "dapo": (
        {"aggregation": "token"},
        {"loss_type": "dapo", "importance_sampling_level": "token", "beta": 0.0},
    ),
    "dr_grpo": (
        {"aggregation": "prompt"},
        {"loss_type": "dr_grpo", "importance_sampling_level": "token", "beta": 0.0},
    ),
    "cispo": (
        {"surrogate": "cispo", "aggregation": "token"},
        {"loss_type": "cispo", "importance_sampling_level": "token", "beta": 0.0},
    ),
    "gspo": (
        {"ratio": "sequence", "aggregation": "sequence"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.0},
    ),
}


def rows_of(values_T: torch.Tensor) -> list[list[float]]:
    """[B, L] padded with zeros, as TRL has it."""
    rows = [row.tolist() for row in values_T.split(LENGTHS)]
    return [row + [0.0] * (max(LENGTHS) - len(row)) for row in rows]


@pytest.mark.slow
def test_trls_losses_and_gradients_are_ours():
    assert PEER.is_file(), "TRL's environment is missing: make .venvs/trl/.installed"
    generator = torch.Generator().manual_seed(3)
    draw = lambda: -2 * torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64)  # noqa: E731
    proximal, reference = draw(), draw()
    current = (proximal + 0.6 * (draw() + 1)).requires_grad_()
    advantages = torch.tensor([1.0, -0.5, 0.7, -1.2], dtype=torch.float64)
    cases = [
        {
            "current": rows_of(current.detach()), "proximal": rows_of(proximal),
            "reference": rows_of(reference), "advantages": advantages.tolist(), "budget": BUDGET,
            "mask": [[1] * n + [0] * (max(LENGTHS) - n) for n in LENGTHS],
            "options": {
                "epsilon_low": 0.2, "epsilon_high": 1.28 if name == "cispo" else 0.28, **theirs
            },
        }
        for name, (_, theirs) in CASES.items()
    ]  # fmt: skip
    peer = subprocess.run(
        [str(PEER), str(ROOT / "tests/bench/peers/trl_losses.py")],
        input=json.dumps(cases), capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    for (name, (ours, _)), theirs in zip(CASES.items(), json.loads(peer.stdout), strict=True):
        config = ObjectiveConfig(correction="none", **ours)
        loss = our_loss(config, current, proximal, reference, advantages)
        (gradient,) = torch.autograd.grad(loss, current)
        assert loss.item() == pytest.approx(theirs["loss"], rel=1e-12), name
        want = torch.tensor(theirs["gradient"], dtype=torch.float64)
        got = torch.tensor(rows_of(gradient), dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14, msg=name)


def our_loss(config, current, proximal, reference, advantages):
    """The step's own token loss over one micro-batch of two prompts with two samples each."""
    counts = torch.tensor(LENGTHS)
    if config.aggregation == "prompt":
        weights, denominator = objective.prompt_weights([0.5] * 4, 2, BUDGET)
    else:
        weights, denominator = objective.token_weights(LENGTHS, config.aggregation)
    batch = SimpleNamespace(
        behaviour_T=proximal,
        owner_T=torch.arange(4).repeat_interleave(counts),
        advantages_T=advantages.repeat_interleave(counts),
        weights_T=torch.tensor(weights, dtype=torch.float64).repeat_interleave(counts),
    )
    anchor = reference if config.kl_coefficient else None
    terms = _TokenLoss(batch, config, proximal, anchor, denominator)  # pyright: ignore
    return terms(current, torch.zeros_like(current), slice(0, len(current)))[0].sum()
