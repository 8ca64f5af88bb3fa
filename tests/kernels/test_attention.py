"""Packed attention: each segment as if it were alone, and nothing of all pairs of tokens."""

from typing import Any

import pytest
import torch
from slipstream.kernels import attention
from slipstream.kernels.attention import Segments, packed_attention
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

LONG = 32_768


def plain(query, key, value, lengths, scale):
    """Softmax attention of each token in a loop; float64."""
    groups = query.shape[1] // key.shape[1]
    out, start = torch.empty_like(query), 0
    for length in lengths:
        for t in range(start, start + length):
            for head in range(query.shape[1]):
                scores = scale * key[start : t + 1, head // groups] @ query[t, head]
                out[t, head] = scores.softmax(0) @ value[start : t + 1, head // groups]
        start += length
    return out


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_each_token_attends_to_its_own_segment_up_to_itself(heads):
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 5]
    query, key, value = (
        torch.randn(9, h, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for h in (heads[0], heads[1], heads[1])
    )
    got = packed_attention(query, key, value, Segments.of(lengths), 0.3)
    want = plain(query, key, value, lengths, 0.3)
    torch.testing.assert_close(got, want)
    weights = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((got * weights).sum(), (query, key, value))
    theirs = torch.autograd.grad((want * weights).sum(), (query, key, value))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="segments of 4 tokens"):
        packed_attention(query, key, value, Segments.of([4]), 0.3)


@pytest.mark.gpu
def test_the_varlen_kernel_agrees_with_segments_one_by_one():
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = [130, 1, 517]
    of = {"generator": generator, "dtype": torch.bfloat16, "device": "cuda"}
    query, key, value = (torch.randn(648, h, 64, **of) for h in (8, 2, 2))
    segments = Segments.of(lengths)
    segments = Segments(segments.lengths, segments.starts.cuda())
    got = packed_attention(query, key, value, segments, 0.125)
    exact = packed_attention(query.float(), key.float(), value.float(), segments, 0.125)
    torch.testing.assert_close(got.float(), exact, rtol=2e-2, atol=2e-2)  # bfloat16 has 8 bits


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return out


def largest_of_a_step(lengths: list[int], *, packed: bool) -> int:
    """Forward and backward of a small decoder over a row of these samples, without data."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = Segments.of(lengths)
    with FakeTensorMode() as fake:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2,
            )
        ).eval()  # fmt: skip
        more = {}
        if packed:
            attention.enable(model)
            more = {"segments": segments}
        places = fake.from_tensor(positions)
        ids = torch.zeros_like(places)
        with LargestTensor() as seen:
            out = model.get_decoder()(
                input_ids=ids, position_ids=places, use_cache=False, **more
            ).last_hidden_state
            out.sum().backward()
    return seen.elements


@pytest.mark.parametrize("lengths", [[LONG], [20_000, 12_000, 768]])
def test_no_tensor_of_all_pairs_of_tokens_exists_at_32768(lengths):
    assert sum(lengths) == LONG
    assert largest_of_a_step(lengths, packed=True) < LONG * LONG / 64


def test_a_mask_of_all_pairs_is_seen_by_the_same_test():
    assert largest_of_a_step([20_000, 12_000, 768], packed=False) >= LONG * LONG


def test_models_that_cannot_be_packed_are_refused():
    small: dict[str, Any] = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "vocab_size": 9,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    mistral = AutoModelForCausalLM.from_config(MistralConfig(sliding_window=4, **small))
    with pytest.raises(ValueError, match="sliding-window"):
        attention.enable(mistral)
    qwen = AutoModelForCausalLM.from_config(Qwen2Config(**small))
    ids = torch.tensor([[1, 2, 3]])
    before = qwen(ids).logits
    attention.enable(qwen)
    torch.testing.assert_close(qwen(ids).logits, before)
