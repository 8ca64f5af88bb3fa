"""The chunked implementation: equal to the definition, and small."""

import pytest
import torch
from slipstream.kernels import chunked, definition, dispatch
from slipstream.kernels.definition import KeptSets
from torch.utils._python_dispatch import TorchDispatchMode

CASES = {
    "plain": {},
    "bias": {"bias": True},
    "kept sets": {"kept": True},
    "bias and kept sets": {"bias": True, "kept": True},
    "no temperature": {"temperature": None},
    "no entropy term": {"entropy": 0.0},
    "one token": {"tokens": 1},
    "no token": {"tokens": 0},
    "seven words": {"vocabulary": 7},
    "all masked": {"masked": 1.0},
    "extreme logits": {"scale": 300.0},
    "logits of -inf": {"removed": True},
    "bfloat16": {"dtype": torch.bfloat16, "bias": True},
    "float64": {"dtype": torch.float64, "bias": True, "kept": True},
    "several chunks": {"tokens": 613, "width": 9, "vocabulary": 4099},
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_definition(lab, name):
    case = lab.make_case(**CASES[name])
    assert not lab.differences(case, case.results(chunked), case.results(definition))


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
def test_values_and_gradients_equal_the_definition_at_real_vocabularies(lab, vocabulary):
    case = lab.make_case(300, 64, vocabulary, dtype=torch.bfloat16)
    assert not lab.differences(case, case.results(chunked), case.results(definition))


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_the_chunk_changes_nothing(lab, chunk):
    case = lab.make_case(7, 5, 11, dtype=torch.float64, kept=True, bias=True)

    class Cut:
        @staticmethod
        def scores(*args):
            return chunked.scores(*args, chunk=chunk)

        @staticmethod
        def full(*args):
            return chunked.full(*args, chunk=chunk)

    assert not lab.differences(case, case.results(Cut), case.results(definition))


FAULTS = {
    "no max subtraction": (
        "torch.log_softmax(logits_BV, 1)",
        "logits_BV - logits_BV.exp().sum(1, keepdim=True).log()",
    ),
    "no entropy in its gradient": ("slope_C1 * self.entropy_C[:, None]", "0 * slope_C1"),
    "entropy of the wrong sign": ("slope_C1 = -self._by_logit", "slope_C1 = self._by_logit"),
    "temperature left out of the gradient": (
        "slope_C if temperature_T is None else slope_C / temperature_T[self.rows]",
        "slope_C",
    ),
    "the target's term missing": (
        "self.values_CV.scatter_add_(1, targets_C1, by_logprob_C1)",
        "self.values_CV",
    ),
    "only the last chunk's weight gradient": (
        "self.weight_VD.addmm_(logits_CV.T,",
        "self.weight_VD.zero_().addmm_(logits_CV.T,",
    ),
    "kept sets of the first chunk": (
        "keep_only(logits_BV, self.kept, rows)",
        "keep_only(logits_BV, self.kept, slice(0, len(logits_BV)))",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(lab, fault):
    cases = [
        lab.make_case(scale=300.0),
        lab.make_case(600, 9, 4099),
        lab.make_case(600, 9, 4099, kept=True),
    ]
    faulty = lab.mutant(chunked, *FAULTS[fault])
    assert any(lab.differences(c, c.results(faulty), c.results(definition)) for c in cases)


def test_a_kl_term_of_the_wrong_sign_is_found(lab):
    case = lab.make_case()
    wrong = case.results(chunked, sign_of_kl=-1.0)
    assert lab.differences(case, wrong, case.results(definition))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_no_tensor_of_tokens_times_vocabulary_ever_exists(lab):
    case = lab.make_case(2048, 8, 4099)
    with LargestTensor() as ours:
        case.results(chunked)
    with LargestTensor() as eager:
        case.results(definition)
    assert eager.elements == 2048 * 4099
    assert ours.elements == chunked.CHUNK_TOKENS * 4099


def test_frozen_scores_equal_those_of_training_to_the_bit(lab):
    case = lab.make_case(600, 9, 4099, bias=True)
    frozen = dispatch.frozen_scores(case.hidden, case.targets, case.head)
    trained = dispatch.full(case.hidden, case.targets, case.head, case.token_loss)
    assert torch.equal(frozen[0], trained.logprobs_T)
    assert torch.equal(frozen[1], trained.entropy_T)
    assert not frozen[0].requires_grad


def test_only_gradients_that_are_needed_are_taken(lab):
    case = lab.make_case(7, 5, 11)
    hidden = case.hidden.detach().requires_grad_()
    dispatch.full(hidden, case.targets, case.head, case.token_loss).loss.backward()
    assert hidden.grad is not None
    assert case.head.weight_VD.grad is None
    loss = chunked.full(case.hidden, case.targets, case.head, case.token_loss).loss
    assert not loss.requires_grad


def test_upstream_gradient_scales_and_a_second_backward_is_refused(lab):
    case = lab.make_case(7, 5, 11, dtype=torch.float64)
    grads = []
    for factor in (1.0, -2.5):
        hidden = case.hidden.detach().requires_grad_()
        loss = factor * chunked.full(hidden, case.targets, case.head, case.token_loss).loss
        loss.backward(retain_graph=True)
        grads.append(hidden.grad)
        with pytest.raises(RuntimeError, match="one backward pass only"):
            loss.backward()
    torch.testing.assert_close(grads[1], -2.5 * grads[0])


def test_a_tied_head_adds_its_gradient_to_the_embeddings(lab):
    case, grads = lab.make_case(9, 5, 11, dtype=torch.float64), []
    for module in (definition, chunked):
        table = case.head.weight_VD.detach().requires_grad_()
        hidden = torch.nn.functional.embedding(case.targets, table) * case.hidden
        head = case.head._replace(weight_VD=table)
        module.full(hidden, case.targets, head, case.token_loss).loss.backward()
        grads.append(table.grad)
    torch.testing.assert_close(*grads)


def test_a_token_alone_in_its_kept_set_has_probability_one_and_no_gradient(lab):
    case = lab.make_case(7, 5, 11)
    hidden = case.hidden.requires_grad_()
    head = case.head._replace(kept=KeptSets(case.targets, torch.arange(8)))
    logprobs, entropy = chunked.scores(hidden, case.targets, head)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.eq(0).all()
    assert entropy.eq(0).all()
    assert hidden.grad is not None
    assert hidden.grad.eq(0).all()
