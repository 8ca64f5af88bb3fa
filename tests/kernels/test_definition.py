"""The definition: against finite differences and by numbers a reader can check."""

import math

import pytest
import torch
from slipstream.kernels import definition
from slipstream.kernels.definition import Head, KeptSets


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_both_operations_equal_finite_differences(lab, kept, bias):
    case = lab.make_case(6, 5, 11, dtype=torch.float64, kept=kept, bias=bias, masked=0)
    tensors = [case.hidden, case.head.weight_VD] + ([case.head.bias_V] if bias else [])
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]

    def head(weight, bias=None):
        return case.head._replace(weight_VD=weight, bias_V=bias)

    def scores(hidden, *rest):
        return definition.scores(hidden, case.targets, head(*rest))

    def full(hidden, *rest):
        return definition.full(hidden, case.targets, head(*rest), case.token_loss).loss

    for function in (scores, full):
        assert torch.autograd.gradcheck(function, tensors)


def test_the_law_is_the_samplers():
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    hidden, targets = torch.ones(3, 1), torch.tensor([1, 1, 1])
    temperature = torch.tensor([1.0, 0.5, 1.0])
    kept = KeptSets(torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), torch.tensor([0, 3, 6, 8]))
    logprobs, entropy = definition.scores(hidden, targets, Head(weight, temperature, None, kept))
    # 1 : 2 : 5, squared at temperature 1/2, and 1 : 2 where the third is not kept
    torch.testing.assert_close(logprobs.exp(), torch.tensor([2 / 8, 4 / 30, 2 / 3]))
    want = -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    assert entropy[2].item() == pytest.approx(want)


def test_inputs_that_disagree_are_refused_with_both_in_the_message(lab):
    case = lab.make_case(7, 5, 11)
    head, hidden = case.head, case.hidden
    bad = [
        (hidden[:, :4], case.targets, head, r"\(7, 4\).*\(11, 5\)"),
        (hidden, case.targets[:6], head, r"targets \(6,\) must be \[7\]"),
        (hidden, case.targets.int(), head, "int64"),
        (hidden, case.targets, head._replace(bias_V=torch.zeros(10)), r"bias \(10,\).*\[11\]"),
        (
            hidden,
            case.targets,
            head._replace(kept=KeptSets(case.targets, torch.arange(7))),
            r"kept offsets \(7,\) must be \[8\]",
        ),
    ]
    for wrong_hidden, targets, wrong_head, message in bad:
        with pytest.raises(ValueError, match=message):
            definition.scores(wrong_hidden, targets, wrong_head)


def test_an_objective_over_samples_is_refused(lab):
    case = lab.make_case(7, 5, 11)
    with pytest.raises(ValueError, match=r"loss \(\) must be one value per token, \(7,\)"):
        definition.full(case.hidden, case.targets, case.head, lambda p, h, _: (p.mean(), {}))
