"""The Triton kernels, run by Triton's interpreter, against the float32 definition.

What a GPU would run is compiled in test_ahead.py; the numbers of a GPU itself are marked `gpu`.
"""

import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slipstream.kernels import definition, fused, triton_loss
from slipstream.learner.config import ObjectiveConfig
from slipstream.learner.step import _TokenLoss

CASES = {
    "plain": {},
    "bias": {"bias": True},
    "no temperature": {"temperature": None, "width": 32},
    "no entropy term": {"entropy": 0.0},
    "one token": {"tokens": 1},
    "no token": {"tokens": 0},
    "seven words": {"vocabulary": 7},
    "all masked": {"masked": 1.0},
    "extreme logits": {"scale": 300.0},
    "logits of -inf": {"removed": True},
    "bfloat16": {"dtype": torch.bfloat16, "bias": True},
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_definition(lab, name):
    case = lab.make_case(**{"vocabulary": 301, **CASES[name]})
    assert not lab.differences(case, case.results(fused), case.results(definition))


def test_slices_of_the_vocabulary_change_nothing(lab, monkeypatch):
    case = lab.make_case(vocabulary=301, bias=True)
    monkeypatch.setattr(fused, "SLICE_ELEMENTS", 1)
    assert len(fused._slices(len(case.targets), 301)) == 3
    assert not lab.differences(case, case.results(fused), case.results(definition))


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
def test_values_and_gradients_equal_the_definition_at_real_vocabularies(lab, vocabulary):
    case = lab.make_case(19, 24, vocabulary)
    assert not lab.differences(case, case.results(fused), case.results(definition))


FAULTS = {
    "no max subtraction": ("= tl.maximum(max_B, tl.max(logits_BW, 1))", "= max_B * 0"),
    "sums not shrunk": ("sum_B = shrink_B * sum_B", "sum_B = sum_B"),
    "moment about the old maximum": ("(moment_B + sum_B * step_B)", "moment_B"),
    "no entropy in its gradient": ("(logp_BW + entropy_B[:, None])", "logp_BW"),
    "words beyond the vocabulary": ("tl.where(word_ok[None, :], logits_BW, REMOVED)", "logits_BW"),
    "target of the whole vocabulary in a slice": ("other=-1) - first_word", "other=-1)"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of what overflows
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(lab, fault, monkeypatch, tmp_path):
    monkeypatch.setattr(fused, "triton_loss", planted(FAULTS[fault], tmp_path))
    monkeypatch.setattr(fused, "SLICE_ELEMENTS", 1)
    cases = [lab.make_case(vocabulary=301), lab.make_case(vocabulary=301, scale=300.0)]
    assert any(lab.differences(c, c.results(fused), c.results(definition)) for c in cases)


def planted(fault, folder):
    """The kernels with a fault in them, from a file: the interpreter reads its source again."""
    old, new = fault
    with open(triton_loss.__file__) as file:
        source = file.read()
    assert source.count(old) == 1
    path = folder / "planted.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "planted", module)
        spec.loader.exec_module(module)
    return module


def token_loss(seed=1, tokens=613, **changes) -> tuple[_TokenLoss, torch.Tensor, torch.Tensor]:
    """An objective over random policies, and the current log-probabilities and entropies."""
    g = torch.Generator().manual_seed(seed)

    def draw(scale=1.0):
        return scale * torch.randn(tokens, generator=g)

    current = draw() - 3
    proximal, behaviour, reference = (current + draw(0.5) for _ in range(3))
    proximal[:3] += torch.tensor([30.0, -30.0, 0.0])  # beyond the clamp
    reference[3:5] += torch.tensor([30.0, -30.0])
    behaviour[5:7] += torch.tensor([30.0, -30.0])
    weights = (torch.rand(tokens, generator=g) > 0.3).float()
    config = ObjectiveConfig(
        correction_low=0.5, kl_coefficient=0.2, entropy_coefficient=0.3, **changes
    )
    assert config.has_kernel
    batch: Any = SimpleNamespace(
        behaviour_T=behaviour, advantages_T=draw(), weights_T=weights, owner_T=torch.zeros(tokens),
        lag_T=torch.randint(0, 3, (tokens,), generator=g),
    )  # fmt: skip
    anchor = None if config.proximal == "interpolated" else proximal
    return _TokenLoss(batch, config, anchor, reference, 7.0), current, draw().abs()


def both_routes(terms: _TokenLoss, current, entropy) -> list[dict[str, torch.Tensor]]:
    """Loss, slopes and what is reported: by the kernel, and by learner/objective.py."""
    found = []
    for route in (terms.by_kernel, terms):
        leaves = current.clone().requires_grad_(), entropy.clone().requires_grad_()
        loss, seen = route(*leaves, slice(0, len(current)))
        loss.sum().backward()
        slopes = {"by_logprob": leaves[0].grad, "by_entropy": leaves[1].grad}
        found.append({"loss": loss.detach(), **slopes, **seen})
    return found


@pytest.mark.parametrize("surrogate", ["ppo", "cispo"])
@pytest.mark.parametrize("correction", ["truncate", "mask", "none"])
@pytest.mark.parametrize("changes", [{}, {"proximal": "interpolated"}])
@pytest.mark.parametrize("with_kl", [False, True])
def test_the_elementwise_kernel_equals_the_objective(surrogate, correction, changes, with_kl):
    terms, current, entropy = token_loss(surrogate=surrogate, correction=correction, **changes)
    if not with_kl:
        terms = replace(terms, reference_T=None)
    ours, theirs = both_routes(terms, current, entropy)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda m, n=name: f"{n}: {m}")


POLICY_FAULTS = {
    "KL of the wrong sign": ("loss_B += kl_coefficient", "loss_B -= kl_coefficient"),
    "entropy of the wrong sign": ("loss_B -= entropy_coefficient", "loss_B += entropy_coefficient"),
    "gradient of a clipped token": ("clipped_B | (moves_B == 0)", "(moves_B == 0)"),
    "correction not capped": ("tl.minimum(correction_B, correction_high)", "correction_B"),
}


@pytest.mark.parametrize("fault", POLICY_FAULTS)
def test_a_planted_fault_of_the_elementwise_kernel_is_found(fault, monkeypatch, tmp_path):
    monkeypatch.setattr(fused, "triton_loss", planted(POLICY_FAULTS[fault], tmp_path))
    ours, theirs = both_routes(*token_loss())
    assert not all(torch.allclose(ours[name], theirs[name]) for name in ours)


def test_objectives_the_kernel_does_not_know_are_left_to_the_objective():
    changes: dict[str, Any]
    for changes in ({"surrogate": "raft"}, {"ratio": "sequence"}, {"correction_level": "sequence"}):
        assert not ObjectiveConfig(**changes).has_kernel
    assert not ObjectiveConfig(kl_coefficient=0.1, kl_estimator="k1").has_kernel


def test_kept_sets_are_refused(lab):
    case = lab.make_case(kept=True)
    with pytest.raises(ValueError, match=r"no kept sets: use kernels/chunked\.py"):
        fused.scores(case.hidden, case.targets, case.head)
