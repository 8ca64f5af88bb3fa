"""8-bit AdamW: a quarter of the memory, close to AdamW, and resumed to the bit.

Run by `test_optimizers.py` in an environment that has torchao: where it is installed, transformers
imports it, which would cost each of our processes a second.
"""

import pytest
import torch
from slipstream.buffer.errors import ConfigError
from slipstream.learner.config import OptimizerConfig
from slipstream.learner.policy import Policy
from transformers import AutoModelForCausalLM, LlamaConfig


@pytest.fixture
def policy():
    """`policy("adamw_8bit")`: a model whose matrices are large enough to be quantised."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip

    def build(name, dtype=torch.float32):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return Policy(model, OptimizerConfig(name=name, learning_rate=1e-2, max_grad_norm=1e9))

    return build


def train(policy, steps, first=0):
    """On one batch, so that AdamW's path is smooth; returns the losses."""
    tokens = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(first, first + steps):
        loss = policy.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        policy.update(1e-2 / (1 + step), policy.grad_norm())
        losses.append(float(loss.detach()))
    return losses


def num_bytes(policy):
    state = policy.optimizer_state()
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in state.items()
        if "exp_avg" in name
    )


def test_moments_take_a_quarter_of_the_memory_and_training_goes_as_with_adamw(policy):
    ours, plain = policy("adamw_8bit"), policy("adamw")
    losses, expected = train(ours, 12), train(plain, 12)
    assert num_bytes(ours) < 0.3 * num_bytes(plain)
    assert losses[0] == expected[0]
    assert expected[-1] < 0.8 * expected[0]
    assert losses == pytest.approx(expected, rel=0.03)
    assert losses[1:] != expected[1:], "the moments are quantised"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_what_training_goes_on_from(policy, dtype):
    whole = policy("adamw_8bit", dtype)
    train(whole, 3)
    weights = {name: tensor.clone() for name, tensor in whole.weights().items()}
    state = {name: tensor.clone() for name, tensor in whole.optimizer_state().items()}
    assert not any(hasattr(tensor, "codes") for tensor in state.values())
    expected = train(whole, 3, first=3)
    again = policy("adamw_8bit", dtype)
    train(again, 1)
    again = policy("adamw_8bit", dtype)
    again.restore(weights, state)
    assert train(again, 3, first=3) == expected


def test_float64_is_refused_with_the_remedy(policy):
    with pytest.raises(ConfigError, match='use "adamw"'):
        policy("adamw_8bit", torch.float64)
