"""What the native engine keeps in memory, shares and gives back; nothing of it changes a sample."""

import asyncio
import gc
import heapq
import sys
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slipstream.buffer.records import Version
from slipstream.kernels.models import policy_weights
from slipstream.rollout.drafters import SiblingsDrafter
from slipstream.rollout.engines import decoder as decoder_module
from slipstream.rollout.engines import waiting
from slipstream.rollout.engines.kv_cache import KvShape, RaggedCache
from slipstream.rollout.engines.memory import Lengths, peak_tokens

from .test_native_engine import prompts, turns
from .test_speculation import speculate

MIB = 2**20
TOKEN_BYTES = 2 * 2 * 2 * 8 * 8
"""Keys and values, layers, heads, dimensions, bytes: of the tiny model in float64."""
PAGE_TOKENS = 64
"""Of one of its heads: 4096 / (8 * 8)."""
NEVER_ENDS = ((0, -1e9),)
"""Logit bias that rules the end token out."""


@pytest.fixture
def shared(monkeypatch):
    """Every prompt with siblings is shared, however short."""
    monkeypatch.setattr(decoder_module, "_SHARED_BYTES", 0)


def resident_bytes():
    """Memory of this process that is not a file's."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def in_pages(lengths):
    """Tokens that rows of such lengths take, of the tiny model in float64."""
    return sum(-(-length // PAGE_TOKENS) * PAGE_TOKENS for length in lengths)


def played(batch):
    """Outputs of a batch, step by step."""
    with torch.inference_mode():
        while batch.running or batch.queued:
            yield batch.step()


async def exactly(tiny, model, outputs, requests):
    """Every log-probability is that of a full forward."""
    for request in requests:
        output = outputs[request.request_id]
        assert not output.error
        reference = tiny.logprobs(model, request.prompt_token_ids, output.token_ids)
        np.testing.assert_allclose(output.behaviour_logprobs, reference, rtol=0, atol=1e-9)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next sample of a row has it")
def test_a_row_takes_the_pages_of_its_own_tokens_and_gives_them_back_at_its_end():
    """32 KiB a page of 16 tokens, 16 MiB the longest row; every token's key is its row's number."""
    shape = KvShape(2, 2, 64, torch.float32)
    cache, lengths = RaggedCache(shape, 64), [8192, 100, 4096, 8192, 3]
    cache.reserve(8192)
    start = resident_bytes()

    def holds(rows):
        """The system counts what these (name, length) need; and their tokens are there."""
        needed = sum(-(-length // 16) * 16 for _, length in rows) * shape.bytes_per_token
        assert cache.num_tokens * shape.bytes_per_token == needed
        assert resident_bytes() - start == pytest.approx(needed, abs=MIB / 2)
        for row, (name, length) in enumerate(rows):
            for layer in cache.layers:
                tokens = layer[:, row, :, :length]
                assert tokens.amin() == tokens.amax() == name

    for row, length in enumerate(lengths):
        same = torch.tensor(row + 1.0).expand(2, 2, length, 64)
        cache.put(slice(row, row + 1), [same, same])
    holds([(1, 8192), (2, 100), (3, 4096), (4, 8192), (5, 3)])
    cache.release(0, 4)
    holds([(5, 3), (2, 100), (3, 4096), (4, 8192)])
    cache.reserve(10_000)
    assert cache.capacity >= 10_000
    holds([(5, 3), (2, 100), (3, 4096), (4, 8192)])
    cache.release(3, 3)
    holds([(5, 3), (2, 100), (3, 4096)])
    for last in (2, 1, 0):
        cache.release(0, last)
    holds([])
    assert not cache.layers[0][:, 0].any()


@pytest.mark.parametrize(("ended", "last"), [(100, 3), (3, 100), (20, 20), (100, 0)])
def test_a_row_that_moves_leaves_nothing_of_the_one_whose_place_it_takes(ended, last):
    cache = RaggedCache(KvShape(2, 2, 64, torch.float32), 3)
    cache.reserve(128)
    for row, (length, value) in enumerate([(ended, torch.nan), (7, 2.0), (last, 3.0)]):
        cache.put(slice(row, row + 1), [torch.full((2, 2, length, 64), value)] * 2)
    cache.release(0, 2)
    assert cache.stored_R.tolist() == [last, 7, 0]
    for layer in cache.layers:
        assert (layer[:, 0, :, :last] == 3).all()
        assert not layer[:, 0, :, last:].any()
        assert not layer[:, 2].any()
        assert (layer[:, 1, :, :7] == 2).all()


async def test_rows_take_memory_by_their_own_lengths_and_return_it_while_the_longest_goes_on(tiny):
    folder = tiny.folder("llama", max_position_embeddings=2048)
    batch = tiny.batch(folder, tiny.policy(folder, 3, torch.float64))
    lengths = {"0": 300, **{str(i): 10 * i for i in range(1, 12)}}
    peak = last = 0
    batch.submit(
        [
            tiny.request([3, 4 + int(name)], int(name), max_new_tokens=n, logit_bias=NEVER_ENDS)
            for name, n in lengths.items()
        ]
    )
    for _ in played(batch):
        rows = batch._slots.row_lengths.tolist()
        assert batch.kv_bytes - TOKEN_BYTES * batch._memory.outside_rows == (
            TOKEN_BYTES * in_pages(rows)
        )
        peak = max(peak, batch.kv_bytes)
        last = batch.kv_bytes if batch.running else last
    assert last == TOKEN_BYTES * in_pages([300])  # 2 + 299 - 1: the last token has no key
    assert peak < TOKEN_BYTES * 8 * in_pages([300]) / 2
    assert batch.kv_bytes == 0


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
async def test_a_swap_computes_nothing_or_few_rows_at_a_time(tiny, kv, shared, monkeypatch):
    """8 rows of 60 tokens of prompt, the same for all, and 4 more."""
    monkeypatch.setattr(decoder_module, "_PREFILL_TOKENS", 150)
    folder = tiny.folder("llama")
    models = [tiny.policy(folder, seed, torch.float64) for seed in (20, 21)]
    batch, held = tiny.batch(folder, models[0], kv=kv), []
    batch.submit([tiny.request(range(2, 62), i, logit_bias=NEVER_ENDS) for i in range(8)])
    with torch.inference_mode():
        for _ in range(4):
            batch.step()
        assert set(batch._slots.lengths) == {64}
        weights, fill = batch.prepare(policy_weights(models[1])), batch._fill_whole

        def watched(prompts):
            held.append(sum(map(len, prompts)))
            fill(prompts)

        monkeypatch.setattr(batch, "_fill_whole", watched)
        computed, layers = [], batch._forward._layers
        monkeypatch.setattr(
            batch._forward, "_layers", lambda *given: computed.append(given) or layers(*given)
        )
        batch.swap(Version(branch=0, step=1, digest="1" * 32), weights)
    assert held == ([] if kv == "keep" else [60, 192, 192, 128])  # the prompt; 3, 3 and 2 rows
    assert bool(computed) == (kv == "recompute")


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
    short = tiny.request([5, 6], 1, "short", max_new_tokens=60, logit_bias=NEVER_ENDS)
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
    batch = tiny.batch(folder, model, max_concurrent=64, kv_memory_mb=1)
    free = tiny.batch(folder, model, max_concurrent=64)
    random = np.random.default_rng(0)
    few = prompts(10, longest=20, seed=5)
    requests = [
        tiny.request(few[i % 10], i, max_new_tokens=int(n), logit_bias=NEVER_ENDS)
        for i, n in enumerate(random.lognormal(5.0, 1.0, size=60).clip(1, 700))
    ]
    free.submit(requests)
    expected = {output.request_id: output for outputs in played(free) for output in outputs}
    peak = 0
    for _ in range(50):
        batch._memory.lengths.saw(3)  # so far samples were short: too many will begin

    def stored(method):
        """Watch memory whenever a row takes some, not only between steps."""

        def watched(*arguments):
            nonlocal peak
            result = method(*arguments)
            peak = max(peak, batch._cache.num_tokens + batch._memory.outside_rows)
            return result

        return watched

    batch._cache.put, batch._cache.places = map(stored, (batch._cache.put, batch._cache.places))
    outputs = {output.request_id: output for output in batch.submit(requests)}
    for finished in played(batch):
        outputs |= {output.request_id: output for output in finished}
        assert batch.kv_bytes <= MIB
    assert MIB / 2 < peak * TOKEN_BYTES <= MIB
    assert len(outputs) == 60
    assert batch.paused > 0  # some lengths were longer than predicted
    for name, output in outputs.items():
        assert output.token_ids.tolist() == expected[name].token_ids.tolist()
        gap = np.abs(output.behaviour_logprobs - expected[name].behaviour_logprobs)
        assert gap.max() < 1e-9


async def test_the_share_in_use_is_what_samples_in_flight_take_and_falls_as_they_end(tiny):
    folder = tiny.folder("llama", max_position_embeddings=4096)
    model, shares = tiny.policy(folder, 3, torch.float64), []
    batch = tiny.batch(folder, model, max_concurrent=64, kv_memory_mb=1)
    free = tiny.batch(folder, model, max_concurrent=64)
    requests = [
        tiny.request([3, 4], i, talk=f"c{i}", max_new_tokens=300 if i < 2 else 40,
                     logit_bias=NEVER_ENDS)
        for i in range(20)
    ]  # fmt: skip
    batch.submit(requests)
    for _ in played(batch):
        shares.append((batch.running, batch.kv_share))
    assert len(batch._kept) == 20
    for step, (running, share) in enumerate(shares[:-1]):
        assert share * MIB == pytest.approx(running * (step + 3) * TOKEN_BYTES, rel=1e-9)
    assert min(share for running, share in shares if running) < max(shares)[1] / 4
    assert batch.kv_share == 0.0
    free.submit(requests)
    with torch.inference_mode():
        free.step()
    assert (free.running, free.kv_share) == (20, 0.0)  # not what limits


async def test_a_sample_that_could_not_end_alone_is_refused_with_the_numbers(tiny):
    folder = tiny.folder("llama", max_position_embeddings=8192)
    engine = tiny.engine(folder, dtype="float64", kv_memory_mb=1)
    await engine.load(tiny.publish(tiny.policy(folder, 3, torch.float64), 0))
    most = MIB // TOKEN_BYTES
    outputs = await tiny.outputs(
        engine,
        [
            tiny.request([3, 4], 0, max_new_tokens=most - PAGE_TOKENS + 1),
            tiny.request([3, 4], 1, max_new_tokens=most - PAGE_TOKENS),
        ],
    )
    assert f"{most + PAGE_TOKENS} tokens, 1.0 MiB" in outputs["0"].error
    assert f"allows {most}" in outputs["0"].error
    assert "rollout.kv_memory_mb" in outputs["0"].error
    assert outputs["1"].error == ""


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(1 << 60),
        lambda: mmap(-1, 1 << 60, MAP_PRIVATE | MAP_ANONYMOUS),
        lambda: np.empty(1 << 50),
    ],
    ids=["torch", "mmap", "numpy"],
)
async def test_an_engine_that_gets_no_memory_ends_with_the_key_that_bounds_it(
    tiny, monkeypatch, allocate
):
    engine = tiny.engine(tiny.folder("llama"))
    await engine.load(tiny.publish(tiny.policy(tiny.root / "llama", 3), 0))
    monkeypatch.setattr(decoder_module.Decoder, "step", lambda self: allocate())
    with pytest.raises(RuntimeError, match=r"lower rollout\.kv_memory_mb \(now 0: no bound\)"):
        await tiny.outputs(engine, [tiny.request([3, 4])])


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


async def test_conversations_that_begin_alike_compute_their_first_prompt_once(tiny, shared):
    folder = tiny.folder("llama")
    model = tiny.policy(folder, 3, torch.float64)
    engine = tiny.engine(folder, dtype="float64")
    await engine.load(tiny.publish(model, 0))
    first = [*range(2, 42)]
    names = [f"c{i}" for i in range(6)]
    begun = [tiny.request(first, i, talk=name, max_new_tokens=5) for i, name in enumerate(names)]
    outputs = await tiny.outputs(engine, begun)
    await exactly(tiny, model, outputs, begun)
    assert engine.stats().prefilled_tokens == 40
    answers = [outputs[str(i)].token_ids.tolist() for i in range(6)]
    later = [
        tiny.request([*first, *answer, 7, 8], 10 + i, talk=name, max_new_tokens=5)
        for i, (name, answer) in enumerate(zip(names, answers, strict=True))
    ]
    await exactly(tiny, model, await tiny.outputs(engine, later), later)
    assert engine.stats().prefilled_tokens == 40 + 6 * 3  # the last of an answer has no key
    assert engine.stats().kept_tokens == sum(40 + len(answer) - 1 for answer in answers)


async def test_a_turn_is_kept_while_its_next_may_come_and_no_longer(tiny, monkeypatch):
    monkeypatch.setattr(waiting, "MOST_IDLE_STEPS", 20)
    folder = tiny.folder("llama")
    batch, kept = tiny.batch(folder, tiny.policy(folder, 3, torch.float64)), []
    batch.submit(
        [
            tiny.request([3, 4], i, talk=talk, max_new_tokens=1 + steps, logit_bias=NEVER_ENDS)
            for i, (talk, steps) in enumerate([("a", 5), ("b", 10), ("", 40)])
        ]
    )
    for _ in played(batch):
        kept.append(sorted(name for name in "ab" if name in batch._kept))
        assert batch._memory.outside_rows == sum(2 + {"a": 5, "b": 10}[name] for name in kept[-1])
    assert kept == [[]] * 4 + [["a"]] * 5 + [["a", "b"]] * 16 + [["b"]] * 5 + [[]] * 10


@pytest.mark.parametrize(("kv", "computed"), [("keep", 40), ("recompute", 20)])
async def test_siblings_that_come_later_read_the_prompt_that_is_there(tiny, kv, computed, shared):
    """As long as the weights that computed it serve; new keys are the newest weights' alone."""
    folder, prompt = tiny.folder("llama"), [*range(2, 22)]
    models = [tiny.policy(folder, seed, torch.float64) for seed in (20, 21)]
    batch = tiny.batch(folder, models[0], kv=kv)

    def one(name):
        return tiny.request(prompt, ord(name), name, max_new_tokens=4, logit_bias=NEVER_ENDS)

    long = [
        tiny.request(prompt, i, max_new_tokens=60, logit_bias=NEVER_ENDS, temperature=0.8)
        for i in range(2)
    ]
    with torch.inference_mode():
        batch.submit(long)
        batch.step()
        for step, name in enumerate("ab"):
            batch.submit([one(name)])
            (output,) = [output for _ in range(4) for output in batch.step()]
            assert {span.version.step for span in output.kv_version_min} == {step}
            reference = tiny.logits(models[step], prompt, output.token_ids)
            reference[:, 0] -= 1e9
            chosen = torch.from_numpy(output.token_ids).long()[:, None]
            reference = reference.log_softmax(-1).gather(1, chosen)[:, 0].numpy()
            np.testing.assert_allclose(output.behaviour_logprobs, reference, rtol=0, atol=1e-9)
            assert batch.prefilled_tokens == (computed if step else 20)
            if not step:
                weights = batch.prepare(policy_weights(models[1]))
                batch.swap(Version(branch=0, step=1, digest="1" * 32), weights)


@pytest.mark.parametrize(
    ("seen", "begin"),
    [(40, 30), (300, 6), (None, 2)],
)
async def test_as_many_begin_as_fit_by_the_lengths_of_earlier_samples(tiny, seen, begin):
    """2048 tokens; each sample's prompt of 4, once as it is computed and once in a row that grows:
    30 x (4 + 64) = 2040, 6 x (4 + 320) = 1944, by its budget of 700 alone 2 x (4 + 704) = 1416."""
    folder = tiny.folder("llama", max_position_embeddings=2048)
    model = tiny.policy(folder, 3, torch.float64)
    batch = tiny.batch(folder, model, max_concurrent=64, kv_memory_mb=1)
    for _ in range(50 if seen else 0):
        batch._memory.lengths.saw(seen)
    batch.submit(
        [
            tiny.request([3, 4, 5, 6 + i], i, max_new_tokens=700, logit_bias=NEVER_ENDS)
            for i in range(40)
        ]
    )
    with torch.inference_mode():
        batch.step()
    assert (batch.running, batch.queued) == (begin, 40 - begin)


async def test_samples_of_a_prompt_begin_together_whoever_came_between_them(tiny):
    folder = tiny.folder("llama")
    batch = tiny.batch(folder, tiny.policy(folder, 3, torch.float64), max_concurrent=2)
    begun = {}
    batch.submit(
        [
            tiny.request([5, 6 + prompt], i, f"{prompt}/{i}", max_new_tokens=3 + i,
                         logit_bias=NEVER_ENDS)
            for i in range(4)
            for prompt in range(3)
        ]
    )  # fmt: skip
    for finished in played(batch):
        in_flight = [*finished, *batch._slots.requests]
        begun |= {of.request_id: None for of in in_flight if of.request_id not in begun}
    assert [name[0] for name in begun] == [*"000011112222"]
    assert batch.prefilled_tokens == 3 * 2


async def test_a_row_that_ends_is_taken_by_the_next_sample_in_the_next_step(tiny):
    """As many steps as a scheduler without gaps takes: a sample of n tokens, its first from the
    prompt and its second in the same step, has a row for n - 1 steps."""
    folder = tiny.folder("llama")
    batch = tiny.batch(folder, tiny.policy(folder, 3, torch.float64), max_concurrent=4)
    lengths = np.random.default_rng(1).integers(2, 40, size=30).tolist()
    free = [0] * 4
    for length in lengths:
        heapq.heappush(free, heapq.heappop(free) + length - 1)
    batch.submit(
        [
            tiny.request([5, 6 + i // 5], i, max_new_tokens=length, logit_bias=NEVER_ENDS)
            for i, length in enumerate(lengths)
        ]
    )
    assert sum(len(finished) for finished in played(batch)) == 30
    assert batch.forwards == max(free)


@pytest.mark.slow
async def test_no_memory_leaks_over_ten_thousand_requests(tiny, shared, monkeypatch):
    """Siblings with their prompt shared, drafts, and conversations left after a turn or two."""
    monkeypatch.setattr(waiting, "MOST_IDLE_STEPS", 20)
    folder = tiny.folder("llama", num_hidden_layers=1)
    engine = tiny.engine(folder, max_concurrent=64)
    await engine.load(tiny.publish(tiny.policy(folder, 1), 0))
    drafting = speculate(engine, SiblingsDrafter(5000), depth=2)
    batch, shape = engine._decoder, engine._decoder._cache.shape
    random, few, held, second = np.random.default_rng(0), prompts(50, seed=1), [], []
    for start in range(0, 10_000, 500):
        requests = second + [
            tiny.request(
                few[i % 50], start + i, talk=f"c{start + i}" if i % 5 == 0 else "",
                max_new_tokens=int(random.integers(1, 40)),
            )
            for i in range(500 - len(second))
        ]  # fmt: skip
        batch.speculation = None if start % 2000 else drafting  # it takes twice as long
        outputs = await tiny.outputs(engine, requests)
        assert len(outputs) == 500
        second = [
            tiny.request(
                [*of.prompt_token_ids, *outputs[of.request_id].token_ids, 7],
                int(of.request_id), f"{of.request_id}/1", talk=of.conversation, max_new_tokens=9,
            )
            for of in requests[-100:]
            if of.conversation and of.sample_key % 2
        ]  # fmt: skip
        assert engine.stats().kv_bytes == shape.bytes_per_token * batch._kept.num_tokens
        held.append(resident_bytes() if sys.platform == "linux" else 0)
    assert engine.stats().kept_tokens > 100
    await tiny.outputs(engine, [tiny.request([2], logit_bias=NEVER_ENDS, max_new_tokens=200)])
    assert engine.stats().kv_bytes == 0
    assert held[-1] - held[4] < 2 * MIB  # a page a request would be 30
    assert not engine._streams
    assert not batch._waiting.keyed


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_the_predicted_peak_is_that_of_the_rows_played_through(rows):
    lengths, left = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)) if (
        rows
    ) else (np.zeros(0, dtype=np.int64),) * 2  # fmt: skip
    shape = KvShape(1, 1, PAGESIZE // 16, torch.float32)  # 4 tokens a page
    steps = [
        sum(-(-(length + t) // 4) * 4 for length, n in zip(lengths, left, strict=True) if n >= t)
        for t in range(left.max(initial=0) + 1)
    ]
    assert peak_tokens(lengths, left, shape) == max(steps)


def test_lengths_still_possible_predict_what_is_left():
    lengths = Lengths()
    assert lengths.left(np.array([3]), np.array([50])).tolist() == [47]  # nothing seen: the budget
    for length in (10, 20, 30, 40, 100):
        lengths.saw(length)
    left = lengths.left(np.array([0, 15, 35, 100]), np.array([500, 500, 500, 120]))
    assert left.tolist() == [100, 85, 65, 20]
    assert lengths.left(np.array([0]), np.array([16])).tolist() == [16]
