"""The Triton kernels, run by Triton's interpreter, against the float32 definition.

What a GPU would run is compiled in test_ahead.py; the numbers of a GPU itself are marked `gpu`.
"""

import importlib.util
import itertools
import sys
from typing import Any

import pytest
import torch
from slipstream.kernels import definition, fused, triton_loss
from slipstream.learner import objective

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


def policy_cases():
    return list(itertools.product(("clip", "cispo"), ("truncate", "mask", "none"), (False, True)))


def policy_terms(tokens=613) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    g = torch.Generator().manual_seed(1)

    def draw(scale=1.0):
        return scale * torch.randn(tokens, generator=g)

    current = draw() - 3
    terms = {n: current + draw(0.5) for n in ("proximal_T", "behaviour_T", "reference_T")}
    terms["proximal_T"][:3] += torch.tensor([30.0, -30.0, 0.0])  # beyond the clamp
    terms["reference_T"][3:5] += torch.tensor([30.0, -30.0])
    weights = (torch.rand(tokens, generator=g) > 0.3) / tokens
    return current, draw().abs(), terms | {"advantages_T": draw(), "weights_T": weights}


def by_objective(current, entropy, terms, surrogate, correction, with_kl):
    """The same loss by the functions of learner/objective.py."""
    proximal, advantages = terms["proximal_T"], terms["advantages_T"]
    if surrogate == "clip":
        loss, clipped = objective.clipped_surrogate(
            current, proximal, advantages, clip_low=0.2, clip_high=0.28
        )
    else:  # CISPO, eq. 4 and 5 of arXiv:2506.13585: a clipped weight without gradient
        ratio = objective.log_ratio(current, proximal).exp().detach()
        bounded = ratio.clamp(1 - 0.2, 1 + 0.28)
        loss, clipped = -bounded * advantages * current, bounded != ratio
    weight, limited = objective.importance_correction(
        proximal, terms["behaviour_T"], kind=correction, low=0.5, high=2.0
    )
    loss = weight * loss - 0.3 * entropy
    if with_kl:
        loss = loss + 0.2 * objective.kl_to_reference(current, terms["reference_T"])
    return loss * terms["weights_T"], {"clipped": clipped, "limited": limited}


@pytest.mark.parametrize(("surrogate", "correction", "with_kl"), policy_cases())
def test_the_elementwise_kernel_equals_the_objective(surrogate, correction, with_kl):
    values, entropy, terms = policy_terms()
    given: dict[str, Any] = terms if with_kl else {**terms, "reference_T": None}
    kernel = fused.PolicyLoss(
        **given, surrogate=surrogate, clip_low=0.2, clip_high=0.28, correction=correction,
        correction_low=0.5, correction_high=2.0, kl_coefficient=0.2, entropy_coefficient=0.3,
    )  # fmt: skip
    found = []
    for route in ("kernel", "objective"):
        leaves = values.clone().requires_grad_(), entropy.clone().requires_grad_()
        if route == "kernel":
            loss, seen = kernel(*leaves, slice(0, len(values)))
        else:
            loss, seen = by_objective(*leaves, terms, surrogate, correction, with_kl)
        loss.sum().backward()
        found.append((loss.detach(), leaves[0].grad, leaves[1].grad, *seen.values()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_kl_term_of_the_wrong_sign_is_found(monkeypatch, tmp_path):
    values, entropy, terms = policy_terms()
    fault = ("loss_B += kl_coefficient", "loss_B -= kl_coefficient")
    monkeypatch.setattr(fused, "triton_loss", planted(fault, tmp_path))
    wrong = fused.PolicyLoss(**terms, correction_low=0.5, kl_coefficient=0.2)
    loss = wrong(values, entropy, slice(0, len(values)))[0]
    want = by_objective(values, entropy, terms, "clip", "truncate", True)[0]
    assert not torch.allclose(loss, want)


def test_kept_sets_are_refused(lab):
    case = lab.make_case(kept=True)
    with pytest.raises(ValueError, match=r"no kept sets: use kernels/chunked\.py"):
        fused.scores(case.hidden, case.targets, case.head)
