"""vLLM as an engine, against transformers' own forward and by the stamps of its tokens.

Run by `test_vllm.py` in the environment that `make setup-vllm-cpu` makes. The tests share an
engine where they can: a start of vLLM takes tens of seconds.
"""

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from slipstream.buffer.records import Version, WeightsManifest
from slipstream.kernels.models import policy_weights
from slipstream.rollout.config import VllmConfig
from slipstream.rollout.engines.vllm import VllmEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")
DEADLINE_S = 120.0


def stamps(spans):
    """One version per token."""
    return [span.version for span in spans for _ in range(span.length)]


def prompts(count, longest=40, seed=0):
    """Random prompts of 1 to `longest` tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(2, 64, size=random.integers(1, longest + 1)) for _ in range(count)]


@pytest.fixture(scope="module")
def tiny(make_tiny, tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def build(folder, **changes):
    """An engine of 16 rows."""
    settings = {
        "dtype": "float32",
        "max_concurrent": 16,
        "kv": "keep",
        "threads": 1,
        "engine_id": "vllm",
        "settings": VllmConfig(kv_cache_gib=0.05),
    }
    return VllmEngine(folder, **{**settings, **changes})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny):
    made = await asyncio.to_thread(build, tiny.folder("llama", tie_word_embeddings=False))
    yield made
    await made.close()


async def test_cold_until_weights_that_verify_are_loaded(tiny, engine):
    assert (engine.state, engine.serving) == ("COLD", None)
    with pytest.raises(RuntimeError, match="serves no weights"):
        await tiny.outputs(engine, [tiny.request([3])])
    manifest = tiny.publish(tiny.policy(tiny.root / "llama", 1), 0)
    await engine.load(manifest)
    assert (engine.state, engine.serving) == ("SERVING", manifest.version)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
async def test_behaviour_log_probs_equal_transformers_full_forward(tiny, engine, temperature):
    model = tiny.policy(tiny.root / "llama", 3)
    await engine.load(tiny.publish(model, 1))
    requests = [
        tiny.request(p, i, max_new_tokens=60, temperature=temperature, stop_token_ids=())
        for i, p in enumerate(prompts(60, seed=4))
    ]
    outputs = await tiny.outputs(engine, requests)
    gaps = []
    for request in requests:
        output = outputs[request.request_id]
        assert not output.error
        assert {version.step for version in stamps(output.versions)} == {1}
        assert output.finish_reason == ("stop" if output.token_ids[-1] == tiny.end else "length")
        gaps.append(
            np.abs(
                output.behaviour_logprobs
                - tiny.logprobs(model, request.prompt_token_ids, output.token_ids, temperature)
            )
        )
    gaps = np.concatenate(gaps)
    print(len(gaps), gaps.max())
    assert len(gaps) > 1000
    assert gaps.max() < 1e-4
