"""`scores` against the plain formula, its gradients against finite differences, its memory."""

import pytest
import torch
from slipstream.kernels.definition import KeptSets, scores
from torch.nn.functional import linear

T, D, V = 7, 5, 11


def inputs(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    hidden, weight, bias = draw(T, D), draw(V, D), draw(V)
    targets = torch.randint(V, (T,), generator=g)
    temperature = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7, 1.3, 1.0], dtype=dtype)
    return hidden, weight, targets, temperature, bias


def kept_sets(targets):
    """Each target, and 0 to 6 other ids."""
    rows = []
    for row, target in enumerate(targets.tolist()):
        rows.append(sorted({target, *((target + 1 + 2 * j) % V for j in range(row))}))
    offsets = torch.tensor([0, *torch.tensor([len(r) for r in rows]).cumsum(0).tolist()])
    return KeptSets(torch.tensor([i for r in rows for i in r]), offsets), rows


def plain(hidden, weight, targets, temperature, bias=None, rows=None):
    """The definition, with everything whole."""
    logits = linear(hidden, weight, bias) / temperature[:, None]
    if rows is not None:
        mask = torch.full_like(logits, -torch.inf)
        for t, ids in enumerate(rows):
            mask[t, ids] = 0
        logits = logits + mask
    logp = logits.log_softmax(1)
    entropy = torch.special.entr(logp.exp()).sum(1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("with_kept", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_scores_equal_the_plain_formula_whatever_the_chunk(chunk, with_kept, with_bias):
    hidden, weight, targets, temperature, bias = inputs()
    kept, rows = kept_sets(targets) if with_kept else (None, None)
    bias = bias if with_bias else None
    got = scores(hidden, weight, targets, temperature, bias, kept, chunk)
    want = plain(hidden, weight, targets, temperature, bias, rows)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_kept", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_logprob_and_entropy_equal_finite_differences(with_kept, with_bias):
    hidden, weight, targets, temperature, bias = inputs()
    kept = kept_sets(targets)[0] if with_kept else None
    tensors = [hidden, weight, bias] if with_bias else [hidden, weight]
    for tensor in tensors:
        tensor.requires_grad_()

    def function(hidden, weight, bias=None):
        return scores(hidden, weight, targets, temperature, bias, kept, chunk=3)

    assert torch.autograd.gradcheck(function, tensors)
    for only in (0, 1):
        assert torch.autograd.gradcheck(lambda *a, i=only: function(*a)[i], tensors)


def test_a_token_alone_in_its_kept_set_has_probability_one_and_no_gradient():
    hidden, weight, targets, temperature, _ = inputs()
    hidden.requires_grad_()
    kept = KeptSets(targets, torch.arange(T + 1))
    logprobs, entropy = scores(hidden, weight, targets, temperature, kept=kept)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.eq(0).all()
    assert entropy.eq(0).all()
    assert hidden.grad is not None
    assert hidden.grad.eq(0).all()


def test_no_tensor_of_tokens_times_vocabulary_is_saved_for_backward():
    tokens, width, vocabulary = 300, 8, 1000
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets, temperature = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        logprobs, entropy = scores(hidden, weight, targets, temperature, chunk=64)
        loss = logprobs.sum() + entropy.sum()
    assert saved
    assert max(saved) <= max(tokens * width, vocabulary * width)
    loss.backward()


def test_bfloat16_inputs_are_scored_in_float32():
    hidden, weight, targets, temperature, _ = inputs(torch.float32)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    logprobs, _ = scores(hidden, weight, targets, temperature)
    assert logprobs.dtype == torch.float32
    want, _ = plain(hidden.float(), weight.float(), targets, temperature)
    torch.testing.assert_close(logprobs, want)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_shapes_that_disagree_are_refused_with_both_in_the_message():
    hidden, weight, targets, temperature, _ = inputs()
    with pytest.raises(ValueError, match=r"\(7, 5\).*\(11, 4\)"):
        scores(hidden, weight[:, :4], targets, temperature)
    with pytest.raises(ValueError, match=r"targets \(6,\) must be \[7\]"):
        scores(hidden, weight, targets[:6], temperature)
    with pytest.raises(ValueError, match="kept offsets"):
        scores(hidden, weight, targets, temperature, kept=KeptSets(targets, torch.arange(T)))
