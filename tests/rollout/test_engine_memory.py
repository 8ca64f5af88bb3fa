"""What the native engine keeps in memory, shares and gives back; nothing of it changes a sample."""

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slipstream.rollout.engines import decoder as decoder_module
from slipstream.rollout.engines.memory import Lengths, peak_tokens

from .test_native_engine import prompts, turns

MIB = 2**20
TOKEN_BYTES = 2 * 2 * 2 * 8 * 8
"""Keys and values, layers, heads, dimensions, bytes: of the tiny model in float64."""


@pytest.fixture
def shared(monkeypatch):
    """Every prompt with siblings is shared, however short."""
    monkeypatch.setattr(decoder_module, "_SHARED_BYTES", 0)


async def exactly(tiny, model, outputs, requests):
    """Every log-probability is that of a full forward."""
    for request in requests:
        output = outputs[request.request_id]
        assert not output.error
        reference = tiny.logprobs(model, request.prompt_token_ids, output.token_ids)
        np.testing.assert_allclose(output.behaviour_logprobs, reference, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
async def test_a_shared_prompt_is_computed_once_and_read_as_if_each_row_held_it(
    tiny, family, shared
):
    folder = tiny.folder(family)
    model = tiny.policy(folder, 3, torch.float64)
    engine = tiny.engine(folder, dtype="float64", max_concurrent=7, prefill_tokens=16)
    await engine.load(tiny.publish(model, 0))
    few = prompts(6, seed=3)
    requests = [tiny.request(few[i % 6], i, max_new_tokens=1 + i) for i in range(40)]
    outputs = await tiny.outputs(engine, requests)
    await exactly(tiny, model, outputs, requests)
    assert engine.stats().prefilled_tokens == sum(map(len, few))  # 40 samples, 7 rows, 6 prompts
    copied = tiny.engine(folder, dtype="float64", max_concurrent=7)
    await copied.load(tiny.publish(model, 0))
    decoder_module._SHARED_BYTES = 1 << 60
    for name, output in (await tiny.outputs(copied, requests)).items():
        assert output.token_ids.tolist() == outputs[name].token_ids.tolist()


@pytest.mark.parametrize("kv", ["keep", "recompute"])
async def test_shared_prompts_follow_new_weights_as_rows_do(tiny, kv, shared, paced):
    folder = tiny.folder("llama")
    models = [tiny.policy(folder, seed, torch.float64) for seed in (20, 21)]
    manifests = [tiny.publish(model, step) for step, model in enumerate(models)]
    engine = tiny.engine(folder, kv=kv, dtype="float64", max_concurrent=4)
    await engine.load(manifests[0])
    requests = [tiny.request([5, 6, 7, 8], i, max_new_tokens=60) for i in range(12)]
    task = asyncio.create_task(tiny.outputs(engine, requests))
    await paced.walk(5)
    await paced.load(engine, manifests[1])
    paced.release(10_000)
    outputs, pure = await task, 0
    for request in requests:
        output = outputs[request.request_id]
        steps, oldest = (
            np.array([span.version.step for span in spans for _ in range(span.length)])
            for spans in (output.versions, output.kv_version_min)
        )
        assert (oldest == (steps if kv == "recompute" else steps[0])).all()
        for step, model in enumerate(models):
            held = (steps == step) & (oldest == step)
            reference = tiny.logprobs(model, request.prompt_token_ids, output.token_ids)
            np.testing.assert_allclose(
                output.behaviour_logprobs[held], reference[held], rtol=0, atol=1e-9
            )
            pure += held.sum() * step
    assert pure > 20  # samples that began after the swap share keys of the new weights alone


async def test_decoding_goes_on_while_a_long_prompt_is_computed_in_pieces(tiny, paced):
    folder = tiny.folder("llama")
    model = tiny.policy(folder, 3, torch.float64)
    engine = tiny.engine(folder, dtype="float64", prefill_tokens=10)
    await engine.load(tiny.publish(model, 0))
    short = tiny.request([5, 6], 1, "short", max_new_tokens=60, logit_bias=((0, -1e9),))
    long = tiny.request([*range(2, 62)] * 3, 2, "long", max_new_tokens=5)
    first = asyncio.create_task(tiny.outputs(engine, [short]))
    await paced.walk(3)
    second = asyncio.create_task(tiny.outputs(engine, [long]))
    while not engine.stats().queued:
        paced.release()
        await asyncio.sleep(0.005)
    written = []
    while engine.stats().queued:
        await paced.walk(1)
        await asyncio.sleep(0.005)
        written.append(engine.stats().generated_tokens)
    assert len(written) >= 17  # 180 tokens, 10 a step
    assert (np.diff(written[:-1]) == 1).all()  # and in each step the short one wrote a token
    paced.release(10_000)
    await first
    await exactly(tiny, model, await second, [long])


async def test_memory_is_never_passed_and_every_sample_comes_out_as_without_a_bound(tiny):
    folder = tiny.folder("llama", num_hidden_layers=2, max_position_embeddings=4096)
    model = tiny.policy(folder, 3, torch.float64)
    engine = tiny.engine(folder, dtype="float64", max_concurrent=64, kv_memory_mb=1)
    free = tiny.engine(folder, dtype="float64", max_concurrent=64)
    for of in (engine, free):
        await of.load(tiny.publish(model, 0))
    random = np.random.default_rng(0)
    few = prompts(10, longest=20, seed=5)
    requests = [
        tiny.request(few[i % 10], i, max_new_tokens=int(n), logit_bias=((0, -1e9),))
        for i, n in enumerate(random.lognormal(4.0, 1.0, size=60).clip(1, 700))
    ]
    expected = await tiny.outputs(free, requests)
    batch, peak = engine._decoder, 0
    for _ in range(50):
        batch._memory.lengths.saw(3)  # so far samples were short: too many will begin
    outputs = {output.request_id: output for output in batch.submit(requests)}
    with torch.inference_mode():
        while batch.running or batch.queued:
            outputs |= {output.request_id: output for output in batch.step()}
            peak = max(peak, batch.kv_bytes)
    assert MIB / 2 < peak <= MIB
    assert len(outputs) == 60
    assert batch.paused > 0  # some lengths were longer than predicted
    for name, output in outputs.items():
        assert output.token_ids.tolist() == expected[name].token_ids.tolist()
        gap = np.abs(output.behaviour_logprobs - expected[name].behaviour_logprobs)
        assert gap.max() < 1e-9


async def test_the_share_in_use_is_what_samples_in_flight_take_and_falls_as_they_end(tiny):
    folder = tiny.folder("llama", max_position_embeddings=4096)
    engine = tiny.engine(folder, dtype="float64", max_concurrent=64, kv_memory_mb=1)
    free = tiny.engine(folder, dtype="float64", max_concurrent=64)
    for of in (engine, free):
        await of.load(tiny.publish(tiny.policy(folder, 3, torch.float64), 0))
    requests = [
        tiny.request([3, 4], i, talk=f"c{i}", max_new_tokens=300 if i < 2 else 40,
                     logit_bias=((0, -1e9),))
        for i in range(20)
    ]  # fmt: skip
    batch, shares = engine._decoder, []
    batch.submit(requests)
    with torch.inference_mode():
        while batch.running or batch.queued:
            batch.step()
            shares.append((batch.running, batch.kv_share))
    assert len(batch._kept) == 20
    for step, (running, share) in enumerate(shares[:-1]):
        assert share * MIB == pytest.approx(running * (step + 3) * TOKEN_BYTES, rel=1e-9)
    assert min(share for running, share in shares if running) < max(shares)[1] / 4
    assert engine.stats().kv_share == 0.0
    await tiny.outputs(free, requests)
    assert free.stats().kv_share == 0.0  # not what limits


async def test_a_sample_that_could_not_end_alone_is_refused_with_the_numbers(tiny):
    folder = tiny.folder("llama", max_position_embeddings=8192)
    engine = tiny.engine(folder, dtype="float64", kv_memory_mb=1)
    await engine.load(tiny.publish(tiny.policy(folder, 3, torch.float64), 0))
    most = MIB // TOKEN_BYTES
    outputs = await tiny.outputs(
        engine,
        [
            tiny.request([3, 4], 0, max_new_tokens=most - 1),
            tiny.request([3, 4], 1, max_new_tokens=most - 2),
        ],
    )
    assert f"{most + 1} tokens" in outputs["0"].error
    assert "rollout.kv_memory_mb" in outputs["0"].error
    assert outputs["1"].error == ""


async def test_turns_of_conversations_share_and_keep_within_the_bound(tiny, shared):
    folder = tiny.folder("llama")
    model = tiny.policy(folder, 3, torch.float64)
    engine = tiny.engine(folder, dtype="float64", kv_memory_mb=1)
    await engine.load(tiny.publish(model, 0))
    talks = await asyncio.gather(*(turns(tiny, engine, number, 4) for number in range(8)))
    for prompt, output in (turn for talk in talks for turn in talk):
        reference = tiny.logprobs(model, prompt, output.token_ids)
        np.testing.assert_allclose(output.behaviour_logprobs, reference, rtol=0, atol=1e-9)
    assert engine.stats().kv_bytes <= MIB


@pytest.mark.slow
async def test_no_memory_leaks_over_ten_thousand_requests(tiny):
    folder = tiny.folder("llama", num_hidden_layers=1)
    engine = tiny.engine(folder, max_concurrent=64)
    await engine.load(tiny.publish(tiny.policy(folder, 1), 0))
    random, few, levels = np.random.default_rng(0), prompts(50, seed=1), []
    for start in range(0, 10_000, 500):
        requests = [
            tiny.request(few[i % 50], start + i, max_new_tokens=int(random.integers(1, 40)))
            for i in range(500)
        ]
        assert len(await tiny.outputs(engine, requests)) == 500
        levels.append(engine.stats().kv_bytes)
    assert levels == [0] * 20
    assert not engine._streams
    assert not engine._decoder._waiting.keyed


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_the_predicted_peak_is_that_of_the_rows_played_through(rows):
    lengths, left = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)) if (
        rows
    ) else (np.zeros(0, dtype=np.int64),) * 2  # fmt: skip
    played = [
        sum(left >= t) * max((lengths + t)[left >= t], default=0)
        for t in range(left.max(initial=0) + 1)
    ]
    assert peak_tokens(lengths, left) == max(played)


def test_lengths_still_possible_predict_what_is_left():
    lengths = Lengths()
    assert lengths.left(np.array([3]), np.array([50])).tolist() == [47]  # nothing seen: the budget
    for length in (10, 20, 30, 40, 100):
        lengths.saw(length)
    left = lengths.left(np.array([0, 15, 35, 100]), np.array([500, 500, 500, 120]))
    assert left.tolist() == [100, 85, 65, 20]
    assert lengths.left(np.array([0]), np.array([16])).tolist() == [16]
