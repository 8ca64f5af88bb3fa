"""Speculation changes how many forwards a sample takes, and nothing of the sample."""

import asyncio
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.buffer.errors import ConfigError
from slipstream.buffer.records import SamplingParams, Version
from slipstream.kernels.models import policy_weights
from slipstream.rollout.config import SpeculationConfig
from slipstream.rollout.drafters import (
    Asked,
    Draft,
    LookupDrafter,
    SiblingsDrafter,
    SuffixAutomaton,
)
from slipstream.rollout.engines import decoder
from slipstream.rollout.engines.draft_model import DraftModel
from slipstream.rollout.sampling import RowLaws, probabilities, verify
from slipstream.rollout.speculation import DepthController, Speculation

from .test_native_engine import prompts

LAWS = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.5, "stop": ("ab", "c")},
    {"temperature": 1.2, "min_p": 0.05, "top_p": 0.95},
    {"logit_bias": ((0, -1e9), (7, 2.0), (9, -3.0))},
    {"stop_token_ids": (9, 20, 33)},
)


class Always(DepthController):
    """Drafts for every row, whatever it costs."""

    most_rows = 0
    """Of one step."""

    def start(self, written_B, has_past):
        self.most_rows = max(self.most_rows, len(written_B))
        return 0.0, range(len(written_B))


class Oracle:
    """Knows what will be written, but for each third token; or, without that, guesses at random."""

    reading_s, right = 0.0, 0
    """`right`: the first tokens of a sample that it knows without exception."""

    def __init__(self, texts=None):
        self.texts, self.random = texts or {}, np.random.default_rng(0)

    def propose(self, asked):
        return [self.guess(*of[:4]) for of in asked]

    def guess(self, sample, prompt, written, limit):
        if len(written) >= self.right:
            limit = int(self.random.integers(0, limit + 1))
        tokens = self.texts.get(sample, self.random.integers(0, 64, size=512))
        tokens = tokens[len(written) : len(written) + limit].copy()
        if len(written) >= self.right:
            tokens[2::3] = (tokens[2::3] + 1) % 64
        return Draft(tokens.tolist(), [0] * len(tokens))

    def finish(self, sample, prompt, written):
        pass

    def forget(self, sample):
        pass

    def remembers(self, prompt):
        return False


def speculate(engine, drafter, depth=8):
    """Have an engine, or its batch, draft in every step."""
    batch = getattr(engine, "_decoder", engine)
    speculation = batch.speculation = Speculation(drafter, depth)
    speculation._controller = Always()
    return speculation


def played(tiny, batch, requests):
    """Outputs of requests, of which two wait at any time, and of the second turns of those in
    conversations."""
    left, asked, outputs = list(requests), {r.request_id: r for r in requests}, {}
    with torch.inference_mode():
        while left or batch.running or batch.queued:
            coming = max(0, batch._max_concurrent + 2 - batch.running - batch.queued)
            assert not batch.submit(left[:coming])
            left = left[coming:]
            for output in batch.step():
                outputs[output.request_id] = output
                first = asked.get(output.request_id)
                if first is not None and (talk := first.conversation):
                    prompt, key = first.prompt_token_ids, 1000 + first.sample_key
                    prompt = (*prompt, *output.token_ids.tolist(), 5, 6)
                    left.insert(0, tiny.request(prompt, key, talk=talk, max_new_tokens=9))
    return outputs


def same(outputs, expected):
    """Outputs are the expected ones, log-probabilities to rounding."""
    for key, output in outputs.items():
        wanted = expected[key]
        assert output.token_ids.tolist() == wanted.token_ids.tolist()
        assert (output.text, output.finish_reason) == (wanted.text, wanted.finish_reason)
        assert output.versions == wanted.versions
        assert output.kv_version_min == wanted.kv_version_min
        gap = np.abs(output.behaviour_logprobs - wanted.behaviour_logprobs)
        assert gap.max() < 1e-9
        np.testing.assert_allclose(output.removed_mass, wanted.removed_mass, atol=1e-6)
        if wanted.kept_ids is None:
            assert output.kept_ids is None
        else:
            assert output.kept_ids.values.tolist() == wanted.kept_ids.values.tolist()
            assert output.kept_ids.offsets.tolist() == wanted.kept_ids.offsets.tolist()


def texts_of(outputs):
    return {name: output.token_ids.astype(np.int64) for name, output in outputs.items()}


@pytest.fixture(scope="module")
def plain(make_tiny, tmp_path_factory):
    """A folder, its policy, requests under every law, some of them in conversations, and what comes
    of them without speculation."""
    tiny = make_tiny(tmp_path_factory.mktemp("plain"))
    folder, few = tiny.folder("llama", head_dim=16), prompts(5, seed=2)  # 32 tokens a page
    model = tiny.policy(folder, 1, torch.float64)
    requests = [
        tiny.request(
            few[i % 5], i, max_new_tokens=2 + 7 * i % 60 - i // 64, kept=True,
            talk=f"c{i}" if i % 4 == 1 else "", **LAWS[i % len(LAWS)],
        )
        for i in range(90)
    ]  # fmt: skip
    batch = tiny.batch(folder, model, max_concurrent=64)
    return folder, model, requests, played(tiny, batch, requests)


CASES = {
    "alone": {"max_concurrent": 1},
    "shared": {"max_concurrent": 7},
    "many": {"max_concurrent": 64},
    "tight": {"max_concurrent": 64, "kv_memory_mb": 1},
}
SAMPLES = {"alone": 12, "shared": 40, "many": 90, "tight": 60}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *itertools.product(["lookup", "siblings", "oracle", "random", "self"], CASES),
        ("model", "shared"),
        ("model", "many"),
    ],
)
def test_output_with_speculation_equals_output_without_token_for_token(
    tiny, plain, name, case, monkeypatch
):
    """`shared`: all prompts are read from one place; `tight`: samples begin, pause and go on in
    memory for a few of them, which drafts never pass."""
    folder, model, requests, expected = plain
    if case == "shared":
        monkeypatch.setattr(decoder, "_SHARED_BYTES", 0)
    small = tiny.folder("qwen3", hidden_size=16, num_hidden_layers=1)
    tiny.policy(small, 3).save_pretrained(small)
    drafters = {
        "model": lambda: DraftModel(small, 64, "coupled"),
        "self": lambda: DraftModel(tiny.saved(tiny.policy(folder, 1)), 64, "coupled"),
        "lookup": LookupDrafter,
        "siblings": lambda: SiblingsDrafter(10_000),
        "oracle": lambda: Oracle(texts_of(expected)),
        "random": Oracle,
    }
    batch, most = tiny.batch(folder, model, prefill_tokens=50, **CASES[case]), 0
    speculation, places = speculate(batch, drafters[name]()), batch._cache.places
    if case == "tight":  # and all are thought to end soon: too many begin
        batch._memory.most_tokens = 500
        short = lambda written_N, budget_N: np.minimum(3, budget_N - written_N)  # noqa: E731
        monkeypatch.setattr(batch._memory.lengths, "left", short)

    def stored(*of):
        nonlocal most
        taken = places(*of)
        most = max(most, batch._cache.num_tokens + batch._memory.outside_rows)
        return taken

    monkeypatch.setattr(batch._cache, "places", stored)
    requests = requests[: SAMPLES[case]]
    outputs = played(tiny, batch, requests)
    assert len(outputs) == len(requests) + sum(bool(of.conversation) for of in requests)
    assert speculation.drafted > 30
    assert speculation.accepted > {"random": -1, "oracle": 10, "self": 10}.get(name, 0)
    if case == "tight":
        assert batch.paused > 0, "or nothing was tight"
        assert most <= 500
    else:
        assert batch.kept_tokens > 0
        assert isinstance(speculation._controller, Always)
        assert speculation._controller.most_rows == batch._max_concurrent
    same(outputs, expected)


async def test_a_swap_changes_a_sample_with_drafts_as_it_does_one_without(tiny, monkeypatch):
    """Keys are kept. Three right drafts a row bring all samples in 4 steps as far as they come in
    13 without; weights change there, and drafts are sometimes wrong from then on."""
    monkeypatch.setattr(decoder, "_SHARED_BYTES", 0)
    folder = tiny.folder("llama")
    old, new = (tiny.policy(folder, 5 + k, torch.float64) for k in range(2))
    few = prompts(3, seed=2)
    requests = [
        tiny.request(few[i % 3], i, max_new_tokens=1 + 5 * i, kept=True, **LAWS[i % len(LAWS)])
        for i in range(16)
    ]

    def swapped(batch, steps):
        batch.submit(requests)
        with torch.inference_mode():
            outputs = [output for _ in range(steps) for output in batch.step()]
            used, names = batch._slots.used, [r.request_id for r in batch._slots.requests]
            reached = dict(zip(names, used["num_written"].tolist(), strict=True))
            version = Version(branch=0, step=1, digest="1" * 32)
            batch.swap(version, batch.prepare(policy_weights(new)))
        return {o.request_id: o for o in outputs} | played(tiny, batch, []), reached

    expected, reached = swapped(tiny.batch(folder, old, max_concurrent=16), 12)
    batch, oracle = tiny.batch(folder, old, max_concurrent=16), Oracle(texts_of(expected))
    oracle.right = 13
    speculation = speculate(batch, oracle, depth=3)
    outputs, also = swapped(batch, 3)
    assert set(reached.values()) == {13}
    assert also == reached
    assert 0 < speculation.accepted < speculation.drafted
    same(outputs, expected)
    mixed = [output for output in outputs.values() if len(output.versions) == 2]
    assert len(mixed) == len(reached) > 5


@pytest.mark.parametrize("drafter", ["lookup", "siblings", "model"])
async def test_an_engine_told_to_draft_writes_what_one_without_drafts_does(tiny, drafter):
    """As users set it up, twice, where drafts are made when the controller says so."""
    folder = tiny.folder("llama")
    manifest = tiny.publish(tiny.policy(folder, 1, torch.float64), 0)
    similar = tiny.saved(tiny.policy(folder, 1, noise=0.1)) if drafter == "model" else None
    config = SpeculationConfig(drafter=drafter, draft_model=similar, max_depth=5)
    plain = tiny.engine(folder, dtype="float64")
    engine = tiny.engine(folder, dtype="float64", speculation=config)
    never_ends = ((0, -1e9),)
    requests = [
        tiny.request([5, 6 + i % 3], i, temperature=i % 4 / 4, max_new_tokens=100,
                     logit_bias=never_ends)
        for i in range(12)
    ]  # fmt: skip
    await plain.load(manifest)
    await engine.load(manifest)
    expected = await tiny.outputs(plain, requests)
    for _ in range(2):
        same(await tiny.outputs(engine, requests), expected)
    kinds = {"lookup": LookupDrafter, "siblings": SiblingsDrafter, "model": DraftModel}
    assert type(engine._decoder.speculation.drafter) is kinds[drafter]
    assert engine.stats().drafted_tokens > 0
    assert plain.stats().drafted_tokens == 0


async def test_a_draft_model_that_cannot_draft_for_the_policy_is_refused(tiny):
    folder = tiny.folder("llama")
    with pytest.raises(ConfigError, match=r"needs rollout\.speculation\.draft_model, a folder"):
        tiny.engine(folder, speculation=SpeculationConfig(drafter="model"))
    other = tiny.folder("qwen2", vocab_size=70)
    tiny.policy(other, 1).save_pretrained(other)
    for place, reason in ((other, "70 tokens, the policy 64"), (tiny.root / "nowhere", "nowhere")):
        config = SpeculationConfig(drafter="model", draft_model=place)
        with pytest.raises(ConfigError, match=r"rollout\.speculation\.draft_model.*" + reason):
            tiny.engine(folder, speculation=config)


async def test_a_second_epoch_takes_fewer_forwards_than_tokens(tiny):
    """Greedy, so that the second epoch repeats the first: all of it but the start is foreseen."""
    folder = tiny.folder("llama")
    engine = tiny.engine(folder, dtype="float64", max_concurrent=4)
    speculation = speculate(engine, SiblingsDrafter(10_000))
    await engine.load(tiny.publish(tiny.policy(folder, 5, torch.float64), 0))
    requests = [
        tiny.request(p, i, temperature=0.0, max_new_tokens=50)
        for i, p in enumerate(prompts(4, seed=8))
    ]
    first = await tiny.outputs(engine, requests)
    before = speculation.forwards
    second = await tiny.outputs(engine, requests)
    assert all(second[k].token_ids.tolist() == first[k].token_ids.tolist() for k in first)
    longest = max(len(output.token_ids) for output in first.values())
    assert longest > 30
    assert speculation.forwards - before < longest / 2


async def test_weights_swapped_between_steps_are_stamped_on_the_tokens_they_wrote(tiny, paced):
    folder = tiny.folder("llama")
    models = [tiny.policy(folder, 5 + k, torch.float64) for k in range(2)]
    manifests = [tiny.publish(model, step) for step, model in enumerate(models)]
    engine = tiny.engine(folder, dtype="float64", kv="recompute")
    speculate(engine, LookupDrafter())
    await engine.load(manifests[0])
    requests = [tiny.request([3, 9], i, max_new_tokens=200, temperature=0.8) for i in range(8)]
    task = asyncio.create_task(tiny.outputs(engine, requests))
    await paced.walk(10)
    await paced.load(engine, manifests[1])
    paced.release(10_000)
    outputs = await task
    for request in requests:
        output = outputs[request.request_id]
        steps = [s.version.step for s in output.versions for _ in range(s.length)]
        references = [
            tiny.logprobs(model, request.prompt_token_ids, output.token_ids, 0.8)
            for model in models
        ]
        wanted = [references[step][place] for place, step in enumerate(steps)]
        np.testing.assert_allclose(output.behaviour_logprobs, wanted, rtol=0, atol=1e-9)


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=4), st.data())
@settings(max_examples=100, deadline=None)
def test_the_automaton_holds_exactly_the_substrings_of_what_it_read(texts, data):
    automaton = SuffixAutomaton()
    for text in texts:
        state = 0
        for token in text:
            state = automaton.append(state, token)
    substrings = {
        tuple(text[i:j])
        for text in texts
        for i in range(len(text))
        for j in range(i, len(text) + 1)
    } | {()}
    asked = tuple(data.draw(st.lists(st.integers(0, 2), max_size=6)))
    state: int | None = 0
    for token in asked:
        state = None if state is None else automaton._next[state].get(token)
    assert (state is not None) == (asked in substrings)


def asked(name, prompt, written, limit):
    return Asked(name, prompt, np.array(written), limit, SamplingParams(), 0)


def test_a_drafter_proposes_what_most_often_followed_the_longest_known_context():
    drafter = SiblingsDrafter(1000)
    for written in ([7, 8, 9, 1], [7, 8, 9, 2], [7, 8, 5, 3], [4, 8, 6]):
        drafter.finish("past", (3,), np.array(written))
    assert drafter.propose([asked("a", (3,), [7, 8], 1)])[0].tokens == [9]
    assert drafter.propose([asked("b", (3,), [1, 7, 8], 1)])[0].tokens == [9]
    assert drafter.propose([asked("c", (3,), [4, 8], 5)])[0].tokens == [6]
    assert drafter.propose([asked("d", (2,), [7, 8], 5)])[0].tokens == []


def test_a_drafter_remembers_a_prompt_from_when_a_sample_of_it_has_ended():
    drafter = SiblingsDrafter(100)
    drafter.propose([asked("a", (3,), [7, 8], 1)])
    assert not drafter.remembers((3,))
    drafter.finish("a", (3,), np.array([7, 8]))
    assert drafter.remembers((3,))
    assert not drafter.remembers((4,))


def test_history_keeps_to_its_bound_and_forgets_the_oldest_prompt():
    drafter = SiblingsDrafter(110)
    for prompt in range(50):
        drafter.finish("x", (prompt,), np.arange(10))
        assert drafter.num_tokens <= 110
    assert list(drafter._past) == [(prompt,) for prompt in range(40, 50)]


def test_prompts_count_in_the_history_from_when_they_are_read():
    """An automaton has at most two states for each of its tokens, and its start."""
    drafter, random = SiblingsDrafter(1000), np.random.default_rng(0)
    for name in map(str, range(20)):
        prompt = tuple(random.integers(0, 50, 300).tolist())
        drafter.propose([asked(name, prompt, [1, 2], 4)])
        kept = drafter._past.values()
        assert sum(len(past.automaton) - 1 for past in kept) <= 2 * 1000
        drafter.finish(name, prompt, np.arange(10))
        assert drafter.num_tokens == sum(past.num_tokens for past in kept) <= 1000
    assert len(drafter._past) == 3  # of 310
    huge = tuple(range(2000))
    drafter.propose([asked("huge", huge, [1, 2], 4)])
    drafter.finish("huge", huge, np.arange(10))
    assert (drafter.num_tokens, len(drafter._past)) == (0, 0)


@pytest.mark.parametrize("drafter", ["siblings", "lookup", "model"])
async def test_nothing_is_kept_of_samples_that_were_dropped_in_flight_or_paused(tiny, drafter):
    folder = tiny.folder("llama")
    batch = tiny.batch(folder, tiny.policy(folder, 2, torch.float64))
    if drafter == "model":
        made = DraftModel(tiny.saved(tiny.policy(folder, 2)), 64, "coupled")
        kept = made._samples
    else:
        made = SiblingsDrafter(1000) if drafter == "siblings" else LookupDrafter()
        kept = made._readers
    speculate(batch, made)
    batch.submit([tiny.request([5, 6], i, max_new_tokens=99) for i in range(3)])
    with torch.inference_mode():
        for _ in range(2):
            batch.step()
        assert len(kept) == batch.running > 1
        batch._pause(0)
    assert len(kept) == batch.running + 1
    batch.drop({"0", "1", "2"})
    assert not kept


def anything(row):
    """Every row's prompt has a past."""
    return True


@pytest.mark.parametrize(
    ("seconds_per_token", "acceptance", "drafts"),
    [(1.0, 0.6, False), (0.01, 0.9, True), (0.01, 0.0, False)],
)
def test_depth_follows_measured_cost_and_acceptance(seconds_per_token, acceptance, drafts):
    """A step of 8 rows that costs 1 s and so much a token."""
    controller, random = DepthController(), np.random.default_rng(0)
    fed, written, seconds = 0, 0, 0.0
    for step in range(3000):
        least, rows = controller.start(np.full(8, 100), anything)
        draft = controller.trim(Draft([1] * 6, [5] * 6), least) if rows else Draft([], [])
        accepted = 0
        for _ in rows:
            right = int(random.geometric(1 - acceptance)) - 1 if acceptance else 0
            right = min(right, len(draft.tokens))
            controller.saw_draft(draft.classes, right)
            accepted += right
        if rows:
            controller.saw_asking(0.0, 0.0, accepted)
        tokens = 8 + len(rows) * len(draft.tokens)
        fed += len(rows) * len(draft.tokens) * (step >= 1000)
        took = 1.0 + seconds_per_token * tokens
        written, seconds = written + 8 + accepted, seconds + took
        controller.saw_step(8, tokens, 8 + accepted, took)
    assert (fed > 2000 * 8 * 2) if drafts else (fed < 2000 * 8 * 0.02)
    without = 8 / (1.0 + 8 * seconds_per_token)
    assert controller.speed_up == pytest.approx(written / seconds / without, rel=0.1)


def test_a_long_past_is_read_piece_by_piece_and_its_reading_is_told_apart_from_the_look():
    """8 texts of 1,000 tokens are read in 8 looks, the newest first; nothing is left out."""
    drafter, random = SiblingsDrafter(1_000_000), np.random.default_rng(0)
    texts = [random.integers(0, 400, 1000) for _ in range(8)]
    for name, text in enumerate(texts):
        drafter.finish(str(name), (1, 2), text)

    def look(name, text):
        (draft,) = drafter.propose([Asked(name, (1, 2), text, 12, SamplingParams(), 0)])
        return draft.tokens

    read = []
    for _ in range(9):
        assert look("new", texts[-1][:5]) == texts[-1][5:17].tolist()
        waiting = sum(len(rest) for _, rest in drafter._past[1, 2].unread)
        read.append((waiting, drafter.reading_s))
    waiting, seconds = zip(*read, strict=True)
    assert all(a - b <= 1024 for a, b in itertools.pairwise((8 * 1000, *waiting)))
    assert waiting[-2:] == (0, 0)
    assert min(seconds[:-1]) > 10 * seconds[-1]
    for text in texts:  # a context of three tokens out of 400 has been seen nowhere else
        assert look("other", text[:40]) == text[40:52].tolist()
        drafter.forget("other")


@pytest.mark.parametrize(
    ("asked", "reading", "drafts"), [(0.5, 0.0, True), (8.0, 7.5, True), (8.0, 0.0, False)]
)
def test_drafts_are_made_while_they_bring_more_than_looking_costs(asked, reading, drafts):
    """One row, steps of 1 s that cost nothing by token, 6 drafts of which 4 are right: 5 tokens in
    1.5 s are worth it, and so they are when most of 8 s is for what is read once; 5 in 9 s are not.
    The speed-up counts all that was spent."""
    controller, fed, took_s, written = DepthController(), 0, 0.0, 0
    for step in range(4000):
        least, rows = controller.start(np.full(1, 100), anything)
        draft = controller.trim(Draft([1] * 6, [5] * 6), least) if rows else Draft([], [])
        right, seconds = min(4, len(draft.tokens)), 1.0 + 1e-4 * len(draft.tokens)
        if draft.tokens:
            controller.saw_draft(draft.classes, right)
        if rows:
            controller.saw_asking(asked, reading, right)
        controller.saw_step(1, 1 + len(draft.tokens), 1 + right, seconds)
        if step >= 2000:
            fed += bool(draft.tokens)
            took_s, written = took_s + seconds + (asked if rows else 0.0), written + 1 + right
    assert fed > 1800 if drafts else fed < 60
    if drafts:  # else nothing tells what drafts would cost
        assert controller.speed_up == pytest.approx(written / took_s, rel=0.15)


def play(
    controller, written_B, acceptance, random, *, look_s=0.05, slope_s=0.01, has_past=anything,
    fixed_s=0.0, row_look_s=0.0, most=6, only=None,
):  # fmt: skip
    """One step of 1 s and more by token; returns its rows that drafted, what drafting took, and the
    tokens it gained.

    Args:
        controller: asked, and told.
        written_B: as for it.
        acceptance: of each drafted token.
        random: a generator.
        look_s: that a look takes.
        slope_s: by token.
        has_past: as for the controller.
        fixed_s: of a step with any drafts.
        row_look_s: by row that is looked at.
        most: tokens of a draft.
        only: the row whose drafts are ever right; None: all are.
    """
    least, rows = controller.start(written_B, has_past)
    fed = gained = 0
    for row in rows:
        p = acceptance if only in (None, row) else 0.0
        draft = controller.trim(Draft([1] * most, [5] * most), least).tokens
        right = int(random.geometric(1 - p)) - 1 if p else 0
        controller.saw_draft([5] * len(draft), min(right, len(draft)))
        fed, gained = fed + len(draft), gained + min(right, len(draft))
    looked_s = bool(rows) * look_s + len(rows) * row_look_s
    if rows:
        controller.saw_asking(looked_s, 0.0, gained)
    num_rows, drafts_s = len(written_B), slope_s * fed + bool(fed) * fixed_s
    took_s = 1.0 + slope_s * num_rows + drafts_s
    controller.saw_step(num_rows, num_rows + fed, num_rows + gained, took_s)
    return rows, looked_s + drafts_s, gained


@pytest.mark.parametrize("most", [1, 6])
@pytest.mark.parametrize(("share", "pays"), [(0.6, True), (1.5, False)])
def test_what_drafts_cost_at_all_is_weighed_against_what_all_rows_gain(share, pays, most):
    """A forward of 32 rows is longer by so large a share of what their drafts gain as soon as a
    single row has one: no probe of a few rows earns it."""
    controller, random = DepthController(), np.random.default_rng(0)
    right = sum(0.9**place for place in range(1, most + 1))
    gain_s = 32 * (right * 1.032 / 32 - 0.001 * most) - 0.05
    looked = [
        play(controller, np.full(32, 1), 0.9, random, slope_s=0.001, fixed_s=share * gain_s,
             most=most)[0]
        for _ in range(1000)
    ]  # fmt: skip
    on = sum(rows == range(32) for rows in looked)
    assert on > 900 if pays else on < 20


def test_what_a_drafted_token_costs_is_found_though_drafts_are_all_alike():
    """One row, drafts of 12 that cost 0.06 of a step each, 0.4 right: drafts of two or three bring
    1.4 tokens in 1.15 steps, whole ones lose."""
    controller, random = DepthController(), np.random.default_rng(0)
    took_s, written = 0.0, 0
    for step in range(3000):
        _, seconds, gained = play(
            controller, np.full(1, 1), 0.4, random, look_s=0.01, slope_s=0.06, most=12
        )
        if step >= 500:
            took_s, written = took_s + 1.06 + seconds, written + 1 + gained
    assert written / (took_s / 1.06) > 1.15


def test_what_all_rows_lose_after_a_probe_that_paid_is_within_the_share_of_time():
    """Every eighth step a sample begins whose drafts are right; those of the others never are."""
    controller, random = DepthController(), np.random.default_rng(0)
    lost_s = took_s = 0.0
    for step in range(3000):
        written = np.where(np.arange(32) < 31 + (step % 8 > 0), 100, 1)
        _, seconds, gained = play(controller, written, 0.99, random, row_look_s=0.5 / 32, only=31)
        lost_s, took_s = lost_s + seconds - gained * 1.32 / 32, took_s + 1.32 + seconds
    assert lost_s < took_s / 100 + 2 * 1.32


def test_prompts_with_a_past_are_drafted_for_once_a_sample_of_theirs_has_been_looked_at():
    """Off for 1,000 steps, as drafts were never right; then samples begin whose drafts are."""
    controller, random = DepthController(), np.random.default_rng(0)
    for _ in range(1000):
        play(controller, np.full(32, 100), 0.0, random)
    probed = ()
    for written in range(1, 9):  # those with a few tokens have just begun
        begun = np.where(np.arange(32) < 24, 100, written)
        if len(probed := play(controller, begun, 0.9, random)[0]):
            break
    assert probed
    assert set(probed) <= set(range(24, 32)), "of those that begin"
    after = [play(controller, np.full(32, 2), 0.9, random)[0] for _ in range(20)]
    assert after == [range(32)] * 20


def test_of_samples_that_begin_those_with_a_past_are_looked_at_whatever_came_before_them():
    """An epoch of new prompts, each of which begins without a past, must not use up the time in
    which the next epoch's first samples are looked at, nor must looks at samples in flight."""
    controller, random = DepthController(), np.random.default_rng(0)
    for _ in range(300):
        new = np.where(np.arange(32) < 28, 100, 1)
        looked, *_ = play(controller, new, 0.0, random, look_s=1.0, has_past=lambda row: False)
        assert set(looked) != set(range(28, 32))
    looked = [
        play(controller, np.full(32, n), 0.0, random, has_past=lambda row: row % 4 == 3)[0]
        for n in range(1, 9)
    ]
    assert [3, 7, 11, 15] in looked


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("slope_s", [1e-6, 0.001, 0.03])
@pytest.mark.parametrize("acceptance", [0.0, 0.3])
def test_looking_whether_drafts_pay_loses_no_more_than_its_share(rows, slope_s, acceptance):
    """However often samples begin, and whether drafts are never right or sometimes look as if they
    would pay: three in ten do not, where looking costs half a step."""
    controller, random = DepthController(), np.random.default_rng(0)
    lost_s, took_s, looks = 0.0, 0.0, 0
    step_s = 1.0 + slope_s * rows
    for step in range(6000):
        looked, seconds, gained = play(
            controller, np.full(rows, 1), acceptance, random, look_s=step_s / 2, slope_s=slope_s
        )
        if step >= 1000:
            lost_s += seconds - gained * step_s / rows
            took_s, looks = took_s + step_s + seconds, looks + bool(looked)
    assert lost_s <= took_s / 100 + 2 * step_s
    assert looks > 25, "a change would be seen"


def test_samples_in_flight_are_looked_at_however_many_begin():
    """What repeats itself, does so later in a text."""
    controller, random, written = DepthController(), np.random.default_rng(0), np.full(32, 1)
    written[0] = 100
    looked = [play(controller, written, 0.0, random)[0] for _ in range(3000)]
    assert sum(0 in rows for rows in looked) > 1


def chi_square_z(counts, probabilities):
    """How many standard deviations the statistic lies above its mean (Wilson and Hilferty)."""
    total = sum(counts.values())
    cells = {c: p * total for c, p in probabilities.items() if p * total >= 5}
    rest = total - sum(cells.values())
    statistic = sum((counts[c] - expected) ** 2 / expected for c, expected in cells.items())
    if rest >= 5:
        statistic += (total - sum(counts[c] for c in cells) - rest) ** 2 / rest
    k = len(cells) - (rest < 5)
    return ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / (2 / (9 * k)) ** 0.5


def laws_of_texts(tiny, model, law, length):
    """Text -> its exact probability under the model, for all texts; and the law of each next token.

    A text ends with token 0, or after `length` tokens.
    """
    following, texts = {}, {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, p in texts.items():
            if text[-1:] == (0,):
                longer[text] = p
                continue
            logits = tiny.logits(model, [5, 6], [*text, 0])[-1:]
            shares = probabilities(logits, RowLaws.of([SamplingParams(**law)]))[0]
            following[text] = shares
            ids = shares.nonzero()[:, 0].tolist()
            longer |= {(*text, token): p * float(shares[token]) for token in ids}
        texts = longer
    return texts, following


def counted(tiny, batch, law, length, samples=120_000):
    """How often each text of so many tokens came."""
    counts = Counter()
    for start in range(0, samples, 1000):
        batch.submit(
            [tiny.request([5, 6], start + i, max_new_tokens=length, **law) for i in range(1000)]
        )
        with torch.inference_mode():
            while batch.running or batch.queued:
                counts.update(tuple(output.token_ids.tolist()) for output in batch.step())
    return counts


LAW = {"temperature": 1.5, "top_k": 4}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
async def test_the_law_of_texts_is_the_targets_and_a_wrong_acceptance_rule_is_seen(
    tiny, monkeypatch, wrong, record_property
):
    """120,000 texts, the likeliest token drafted; the planted rule takes a draft whenever the
    target gives it 30 %."""
    folder = tiny.folder("llama")
    model = tiny.policy(folder, 2, torch.float64)
    texts, following = laws_of_texts(tiny, model, LAW, 3)

    class Likeliest(Oracle):
        def guess(self, sample, prompt, written, limit):
            law = following[tuple(written.tolist())]
            return Draft([int(law.argmax())][:limit], [0][:limit])

    batch = tiny.batch(folder, model, max_concurrent=64)
    speculation = speculate(batch, Likeliest(), depth=1)
    if wrong:
        plant_wrong_rule(monkeypatch)
    counts = counted(tiny, batch, LAW, 3)
    assert speculation.accepted > 5000
    assert set(counts) <= set(texts)
    z = chi_square_z(counts, texts)
    drawn = sum(len(text) * count for text, count in counts.items())
    assert drawn >= 120_000
    record_property("texts, tokens, standard deviations", (counts.total(), drawn, z))
    assert z > 20 if wrong else z < 4


def plant_wrong_rule(monkeypatch):
    """Give each place its draft instead of the target's own sample when the draft is likely."""
    fed, real = [], decoder.sample
    of = decoder._Fed.of
    monkeypatch.setattr(decoder._Fed, "of", staticmethod(lambda d: fed.append(of(d)) or fed[-1]))

    def wrong_sample(logits, laws, uniforms, ratio_law):
        draws = real(logits, laws, uniforms, ratio_law)
        shares = probabilities(logits, laws)
        for row, token in enumerate(fed[-1].draft_M):
            if token >= 0 and shares[row, token] > 0.3:
                draws.token_ids_B[row] = token
        return draws

    monkeypatch.setattr(decoder, "sample", wrong_sample)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
async def test_drafts_drawn_from_another_law_leave_the_targets_and_a_wrong_rule_is_seen(
    tiny, monkeypatch, wrong, record_property
):
    """120,000 texts with a draft model of another law, two deep; the planted rule takes a draft
    whenever the target gives it more than half of what the draft's law does."""
    folder = tiny.folder("llama")
    model = tiny.policy(folder, 2, torch.float64)
    texts, _ = laws_of_texts(tiny, model, LAW, 4)
    batch = tiny.batch(folder, model, max_concurrent=64)
    small = tiny.saved(tiny.policy(folder, 2, noise=0.1))
    speculation = speculate(batch, DraftModel(small, 64, "rejection"), depth=3)
    if wrong:

        def coin(logits, laws, uniforms, drafts, draft_laws, accept, ratio_law):
            half = np.full(len(accept), 0.5)
            return verify(logits, laws, uniforms, drafts, draft_laws, half, ratio_law)

        monkeypatch.setattr(decoder, "verify", coin)
    counts = counted(tiny, batch, LAW, 4)
    assert 0.3 < speculation.accepted / speculation.drafted < 0.95
    assert set(counts) <= set(texts)
    z = chi_square_z(counts, texts)
    drawn = sum(len(text) * count for text, count in counts.items())
    assert drawn >= 120_000
    record_property("texts, tokens, standard deviations", (counts.total(), drawn, z))
    assert z > 20 if wrong else z < 4


@pytest.mark.parametrize("ratio_law", ["temperature", "kept_set"])
async def test_log_probs_of_drafts_drawn_from_another_law_are_the_targets(tiny, ratio_law):
    folder = tiny.folder("llama")
    model = tiny.policy(folder, 2, torch.float64)
    engine = tiny.engine(folder, dtype="float64", ratio_law=ratio_law)
    await engine.load(tiny.publish(model, 0))
    small = tiny.saved(tiny.policy(folder, 2, noise=0.1))
    speculation = speculate(engine, DraftModel(small, 64, "rejection"), depth=3)
    laws = [{"temperature": 0.0}, {}, {"temperature": 1.3, "top_k": 4}, {"top_p": 0.8}]
    requests = [
        tiny.request(p, i, kept=True, max_new_tokens=30, **laws[i % 4])
        for i, p in enumerate(prompts(24, seed=4))
    ]
    outputs = await tiny.outputs(engine, requests)
    assert 0 < speculation.accepted < speculation.drafted
    for request in requests:
        output, law = outputs[request.request_id], request.sampling
        tokens = output.token_ids.astype(np.int64)
        logits = tiny.logits(model, request.prompt_token_ids, tokens)
        full = (logits / (law.temperature or 1.0)).log_softmax(-1)
        if law.temperature == 0.0:
            assert tokens.tolist() == logits.argmax(-1).tolist()
        expected = full[torch.arange(len(tokens)), tokens].numpy()
        assert (output.kept_ids is not None) == law.truncates
        if output.kept_ids is not None:
            edges = output.kept_ids.offsets
            sets = [output.kept_ids.values[a:b] for a, b in itertools.pairwise(edges)]
            shares = probabilities(logits, RowLaws.of([law] * len(tokens)))
            assert [ids.tolist() for ids in sets] == [
                row.nonzero()[:, 0].tolist() for row in shares
            ]
            masses = [
                float(full[i, ids.astype(np.int64)].logsumexp(-1)) for i, ids in enumerate(sets)
            ]
            np.testing.assert_allclose(output.removed_mass, 1 - np.exp(masses), atol=1e-6)
            expected = expected - (np.array(masses) if ratio_law == "kept_set" else 0.0)
        np.testing.assert_allclose(output.behaviour_logprobs, expected, rtol=0, atol=1e-9)


@given(st.integers(0, 2**32), st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}]))
@settings(max_examples=25)
def test_a_verified_draft_has_exactly_the_targets_law(seed, law):
    """Not sampled: the acceptance and the rest are added up over a fine grid of uniforms."""
    random, laws = np.random.default_rng(seed), RowLaws.of([SamplingParams(**law)])
    logits = torch.from_numpy(random.normal(size=(1, 6)) * 2)
    draft_law = torch.from_numpy(random.dirichlet(np.ones(6)))
    target, got, grid = probabilities(logits, laws)[0].numpy(), np.zeros(6), 400
    middles = (np.arange(grid) + 0.5) / grid
    for token in range(6):
        accepted = min(1.0, target[token] / float(draft_law[token]))
        many = RowLaws.of([SamplingParams(**law)] * grid)
        draws = verify(
            logits.expand(grid, -1), many, middles, np.full(grid, token),
            draft_law.expand(grid, -1), np.full(grid, 1 - 1e-9), "temperature",
        )  # fmt: skip
        rest = np.bincount(draws.token_ids_B, minlength=6) / grid
        got += float(draft_law[token]) * (1 - accepted) * rest
        got[token] += float(draft_law[token]) * accepted
        always = verify(
            logits, laws, middles[:1], np.array([token]), draft_law[None],
            np.array([max(0.0, accepted - 1e-9)]), "temperature",
        )  # fmt: skip
        assert accepted == 0 or always.token_ids_B[0] == token
    np.testing.assert_allclose(got, target, atol=3 / grid)


def test_settings_name_the_drafter():
    assert SpeculationConfig().drafter == "off"
    with pytest.raises(ValueError, match="max_depth"):
        SpeculationConfig(max_depth=0)
