"""StreamBP: plain autograd's gradients, with a chunk's activations."""

import copy

import pytest
import torch
from slipstream.kernels import dispatch, streambp
from slipstream.kernels.definition import Head
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
ROUNDED = 1e-6
"""RMSNorm in transformers computes in float32, whatever the model: 2^-24 a norm."""
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def build(kind="llama", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = CONFIGS[kind](**{**SHAPE, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def gradients(model, ids, mask=None, positions=None):
    """Of the fused loss with an entropy term, by parameter; and the loss."""
    states = model.get_decoder()(
        input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state
    hidden = states[:, :-1].flatten(0, 1)
    head = Head(model.get_output_embeddings().weight, torch.ones(len(hidden)))
    result = dispatch.full(hidden, ids[:, 1:].flatten(), head, lambda p, h, _: (-p - 0.1 * h, {}))
    result.loss.backward()
    return result.loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_equal(got, want, tolerance):
    assert (got[0] - want[0]).abs() <= tolerance * want[0].abs()
    for name, value in want[1].items():
        assert value is not None
        error = (got[1][name] - value).norm() / value.norm()
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
def test_gradients_equal_plain_autograd(kind, chunk):
    plain, ids = build(kind), torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))
    streamed = copy.deepcopy(plain)
    streambp.enable(streamed, chunk)
    assert_equal(gradients(streamed, ids), gradients(plain, ids), ROUNDED)


def test_gradients_in_float32_equal_plain_autograd_to_1e_5():
    plain, ids = build(dtype=torch.float32), torch.arange(200)[None] % 61
    streamed = copy.deepcopy(plain)
    streambp.enable(streamed, 32)
    assert_equal(gradients(streamed, ids), gradients(plain, ids), 1e-5)


def test_a_mask_and_positions_are_obeyed():
    """Two samples behind one prompt, as learner/rows.py lays them out."""
    plain, ids = build(), torch.randint(61, (1, 14), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([0] * 4 + [1] * 5 + [2] * 5)
    mask = torch.ones(14, 14, dtype=torch.bool).tril()
    mask &= (segments[None, :] == 0) | (segments[None, :] == segments[:, None])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8]])
    streamed = copy.deepcopy(plain)
    streambp.enable(streamed, 4)
    got = gradients(streamed, ids, mask[None, None], positions)
    assert_equal(got, gradients(plain, ids, mask[None, None], positions), ROUNDED)
    unmasked = gradients(build(), ids, None, positions)
    assert (got[0] - unmasked[0]).abs() > 1e-6


def test_frozen_embeddings_leave_the_layers_their_gradients():
    plain, ids = build(tie_word_embeddings=False), torch.arange(20)[None]
    plain.get_input_embeddings().weight.requires_grad_(False)
    streamed = copy.deepcopy(plain)
    streambp.enable(streamed, 6)
    loss, of_streamed = gradients(streamed, ids)
    want_loss, of_plain = gradients(plain, ids)
    frozen = "model.embed_tokens.weight"
    assert of_streamed.pop(frozen) is None
    of_plain.pop(frozen)
    assert_equal((loss, of_streamed), (want_loss, of_plain), ROUNDED)


def test_gradients_accumulate_over_micro_batches():
    plain, (first, second) = build(), (torch.arange(20)[None], torch.arange(30, 50)[None])
    streamed = copy.deepcopy(plain)
    streambp.enable(streamed, 6)
    gradients(plain, first)
    gradients(streamed, first)
    assert_equal(gradients(streamed, second), gradients(plain, second), ROUNDED)


def saved_by_token(model, length, limit):
    """Bytes of tensors kept for backward that are larger than `limit` elements."""
    kept: list[int] = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_decoder()(input_ids=torch.zeros(1, length, dtype=torch.long))
    return [size for size in kept if size > limit]


def test_forward_keeps_one_tensor_a_layer():
    model, length = build(), 64
    many = len(saved_by_token(model, length, length * 32 - 1))
    streambp.enable(model, 8)
    few = len(saved_by_token(model, length, length * 32 - 1))
    assert few <= SHAPE["num_hidden_layers"] + 4  # and those of the last norm
    assert many > 3 * few


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (GPT2Config, {"n_layer": 1, "n_embd": 8, "n_head": 2}, "GPT2Model cannot be streamed"),
        (MistralConfig, SHAPE, "MistralDecoderLayer cannot be streamed"),
        (
            Qwen2Config,
            {**SHAPE, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
            "sliding-window",
        ),
    ],
)  # fmt: skip
def test_other_models_are_refused_with_the_reason(config, changes, message):
    model = AutoModelForCausalLM.from_config(config(**changes))
    with pytest.raises(ValueError, match=message):
        streambp.enable(model)


def test_fsdp2_is_refused_with_the_remedy(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = build()
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="Use activation checkpointing with FSDP2"):
            streambp.enable(model)
    finally:
        torch.distributed.destroy_process_group()


def test_bad_arguments_are_refused():
    model = build()
    with pytest.raises(ValueError, match="chunk_tokens = 0"):
        streambp.enable(model, 0)
    streambp.enable(model)
    with pytest.raises(ValueError, match=r"\[B, 1, L, L\] bool"):
        model.get_decoder()(torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 3))
