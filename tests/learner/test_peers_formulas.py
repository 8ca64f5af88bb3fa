"""Where TRL or verl define the same formula, values and gradients are the same numbers."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from slipstream.learner import objective
from slipstream.learner.advantage import (
    batch_advantages,
    generalised_advantages,
    token_whitened,
    whitened,
)
from slipstream.learner.config import ObjectiveConfig
from slipstream.learner.step import _TokenLoss

ROOT = Path(__file__).parents[2]
PEERS = {"trl": ROOT / ".venvs/trl/bin/python", "loss": ROOT / ".venvs/loss/bin/python"}
BUDGET = 9
LENGTHS = [5, 2, 7, 1]
MASK = [[1] * n + [0] * (max(LENGTHS) - n) for n in LENGTHS]
ADVANTAGES = torch.tensor([1.0, -0.5, 0.7, -1.2], dtype=torch.float64)

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
    draw = drawing(3)
    proximal, reference = draw(), draw()
    current = (proximal + 0.6 * (draw() + 1)).requires_grad_()
    cases = [
        {
            "current": rows_of(current.detach()), "proximal": rows_of(proximal),
            "reference": rows_of(reference), "advantages": ADVANTAGES.tolist(), "budget": BUDGET,
            "mask": MASK,
            "options": {
                "epsilon_low": 0.2, "epsilon_high": 1.28 if name == "cispo" else 0.28, **theirs
            },
        }
        for name, (_, theirs) in CASES.items()
    ]  # fmt: skip
    answers = ask("trl", "trl_losses.py", cases)
    for (name, (ours, _)), theirs in zip(CASES.items(), answers, strict=True):
        config = ObjectiveConfig(correction="none", **ours)
        loss = our_loss(config, current, proximal, reference)
        (gradient,) = torch.autograd.grad(loss, current)
        assert loss.item() == pytest.approx(theirs["loss"], rel=1e-12), name
        want = torch.tensor(theirs["gradient"], dtype=torch.float64)
        got = torch.tensor(rows_of(gradient), dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14, msg=name)


def our_loss(config, current, proximal, reference, behaviour=None):
    """The step's own token loss over one micro-batch of two prompts with two samples each."""
    counts = torch.tensor(LENGTHS)
    if config.aggregation == "prompt":
        weights, denominator = objective.prompt_weights([0.5] * 4, 2, BUDGET)
    else:
        weights, denominator = objective.token_weights(LENGTHS, config.aggregation)
    batch = SimpleNamespace(
        behaviour_T=proximal if behaviour is None else behaviour,
        owner_T=torch.arange(4).repeat_interleave(counts),
        advantages_T=ADVANTAGES.repeat_interleave(counts),
        weights_T=torch.tensor(weights, dtype=torch.float64).repeat_interleave(counts),
    )
    anchor = reference if config.kl_coefficient else None
    terms = _TokenLoss(batch, config, proximal, anchor, denominator)  # pyright: ignore
    return terms(current, torch.zeros_like(current), slice(0, len(current)))[0].sum()


VERL = {
    "ppo": ({}, {}),
    "ppo, by sequence": ({"aggregation": "sequence"}, {"aggregation": "seq-mean-token-mean"}),
    "ppo, by prompt": ({"aggregation": "prompt"}, {
        "aggregation": "seq-mean-token-sum-norm", "batch_info": {"loss_scale_factor": BUDGET},
    }),
    "gspo": (
        {"ratio": "sequence", "aggregation": "sequence"},
        {"loss": "gspo", "aggregation": "seq-mean-token-mean"},
    ),
    "cispo": ({"surrogate": "cispo"}, {"loss": "cispo", "clip_low": 1.0}),
    "truncated by token": ({"correction": "truncate"}, {"correction": ["token", 1.3]}),
    "truncated by sequence": (
        {"correction": "truncate", "correction_level": "sequence"},
        {"correction": ["sequence", 1.3]},
    ),
    "IcePop": ({"correction": "mask"}, {"correction": ["token", "0.7_1.3"]}),
    "masked by sequence": (
        {"correction": "mask", "correction_level": "sequence"},
        {"correction": ["sequence", "0.7_1.3"]},
    ),
}  # fmt: skip


@pytest.mark.slow
def test_verls_policy_losses_and_corrections_are_ours():
    draw = drawing(5)
    proximal = draw()
    behaviour = proximal + 0.3 * (draw() + 1)
    current = (proximal + 0.6 * (draw() + 1)).requires_grad_()
    cases = [
        {
            "kind": "policy", "loss": "vanilla", "mask": MASK, "current": rows_of(current.detach()),
            "proximal": rows_of(proximal), "behaviour": rows_of(behaviour),
            "advantages": ADVANTAGES.tolist(), "clip_low": 0.2, "clip_high": 0.28,
            "correction": None, "aggregation": "token-mean", "batch_info": {}, **theirs,
        }
        for _, theirs in VERL.values()
    ]  # fmt: skip
    answers = ask("loss", "verl_formulas.py", cases)
    for (name, (ours, _)), (want, gradient) in zip(VERL.items(), answers, strict=True):
        settings = {"correction": "none", "correction_low": 0.7, "correction_high": 1.3, **ours}
        config = ObjectiveConfig(**settings)
        loss = our_loss(config, current, proximal, None, behaviour)
        (got,) = torch.autograd.grad(loss, current)
        # verl divides token means by tokens + 1e-8
        assert loss.item() == pytest.approx(want, rel=1e-7), name
        want_BL = tensor(gradient)
        torch.testing.assert_close(tensor(rows_of(got)), want_BL, rtol=1e-7, atol=1e-14, msg=name)
        if config.correction != "none":
            plain = our_loss(ObjectiveConfig(correction="none"), current, proximal, None, behaviour)
            assert abs(plain.item() - want) > 1e-3, f"{name} does something here"


@pytest.mark.slow
def test_verls_advantages_value_loss_and_kl_are_ours():
    rewards, values, uids = [1.0, 0.25, -0.5, 2.0], drawing(7)(), [0, 0, 1, 1]
    held, returns, reference = (drawing(seed)() for seed in (8, 9, 10))
    advantage = {"kind": "advantage", "mask": MASK, "rewards": rewards, "uids": uids}
    kinds = {"grpo": "group_mean", "rloo": "leave_one_out"}
    cases = [{**advantage, "estimator": name} for name in kinds]
    cases.append({**advantage, "estimator": "grpo", "by_std": True})
    cases.append({**advantage, "estimator": "reinforce_plus_plus"})
    gae = {"estimator": "gae", "values": rows_of(values), "discount": 0.9, "decay": 0.7}
    cases.append({**advantage, **gae})
    cases.append({
        "kind": "value", "mask": MASK, "values": rows_of(values), "held": rows_of(held),
        "returns": rows_of(returns), "clip": 0.4,
    })  # fmt: skip
    kls = {"k1+": "k1", "k2": "k2", "k3": "k3"}
    cases += [
        {"kind": "kl", "mask": MASK, "current": rows_of(values), "reference": rows_of(reference),
         "estimator": name}
        for name in kls
    ]  # fmt: skip
    grpo, rloo, by_std, plus_plus, gae, value, *estimates = ask("loss", "verl_formulas.py", cases)
    groups = [rewards[:2], rewards[2:]]
    for kind, (theirs,) in zip(kinds.values(), (grpo, rloo), strict=True):
        ours = np.concatenate(batch_advantages(groups, kind))  # pyright: ignore
        np.testing.assert_allclose([row[0] for row in theirs], ours, rtol=1e-12)
    # verl's deviation is the sample's, of G - 1; both add 1e-6 to it
    ours = np.concatenate(batch_advantages(groups, "group_std")) * (1 / 2) ** 0.5
    np.testing.assert_allclose([row[0] for row in by_std[0]], ours, rtol=1e-5)
    ours = np.concatenate(token_whitened(groups, [LENGTHS[:2], LENGTHS[2:]]))
    np.testing.assert_allclose([row[0] for row in plus_plus[0]], ours, rtol=1e-7)
    raw = [
        generalised_advantages(reward, own.numpy(), discount=0.9, decay=0.7)
        for reward, own in zip(rewards, values.split(LENGTHS), strict=True)
    ]
    white = whitened(raw, [np.ones(n, dtype=bool) for n in LENGTHS])
    for row, (ours, theirs) in enumerate(zip(white, gae[0], strict=True)):
        np.testing.assert_allclose(theirs[: LENGTHS[row]], ours, rtol=1e-7)
        np.testing.assert_allclose(
            gae[1][row][: LENGTHS[row]], raw[row] + values.split(LENGTHS)[row].numpy(), rtol=1e-12
        )
    leaf = values.clone().requires_grad_()
    loss = objective.clipped_value_loss(leaf, held, returns, clip=0.4)[0].mean()
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == pytest.approx(value[0], rel=1e-9)
    torch.testing.assert_close(tensor(rows_of(gradient)), tensor(value[1]), rtol=1e-7, atol=1e-14)
    for kind, (estimate, gradient) in zip(kls.values(), estimates, strict=True):
        leaf = values.clone().requires_grad_()
        ours = objective.kl_to_reference(leaf, reference, kind)  # pyright: ignore
        (slope,) = torch.autograd.grad(ours.sum(), leaf)
        torch.testing.assert_close(tensor(rows_of(ours.detach())), tensor(estimate), msg=kind)
        torch.testing.assert_close(tensor(rows_of(slope)), tensor(gradient), msg=kind)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawing(seed: int):
    """A source of [T] negative numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: -2 * torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64)


def ask(environment: str, script: str, cases: list) -> list:
    """What a peer's own code says, in its own environment."""
    python = PEERS[environment]
    assert python.is_file(), (
        f"a peer's environment is missing: make .venvs/{environment}/.installed"
    )
    peer = subprocess.run(
        [str(python), str(ROOT / "tests/bench/peers" / script)],
        input=json.dumps(cases), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert peer.returncode == 0, peer.stderr[-2000:]
    return json.loads(peer.stdout.splitlines()[-1])
