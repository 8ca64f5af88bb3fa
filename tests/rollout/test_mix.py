"""A stream of several parts: shares, order, levels that follow pass rates, nothing held out."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slipstream.buffer.errors import ConfigError
from slipstream.configs.load import load_experiment, load_table
from slipstream.configs.plan_words import algebra
from slipstream.rollout.config import PartConfig, PromptsConfig
from slipstream.rollout.history import Evidence, History
from slipstream.rollout.mix import BLOCK, Mix
from slipstream.rollout.prompts import HELD_OUT_UIDS, PromptSource, normalised_text

SMALL = {"min_digits": 1, "max_digits": 1}
CONFIG = PromptsConfig(
    held_out=30,
    mix={
        "sums": PartConfig(
            weight=2.0,
            size=60,
            task_config=SMALL,
            levels=({"min_terms": 2, "max_terms": 2}, {"min_terms": 2, "max_terms": 3}),
        ),
        "legs": PartConfig(task="leg_counting", size=40),
    },
)


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 500),
)
def test_each_part_is_numbered_without_gaps_and_has_its_share_of_every_block(weights, seed, start):
    mix, jumping = Mix(weights, seed), Mix(weights, seed)
    places = [mix.place(uid) for uid in range(3 * BLOCK)]
    assert jumping.place(start) == Mix(weights, seed).place(start)
    for part, weight in enumerate(weights):
        numbers = [place.number for place in places if place.part == part]
        assert numbers == list(range(len(numbers)))
        wanted = 3 * BLOCK * weight / sum(weights)
        assert abs(len(numbers) - wanted) <= 3 * len(weights)
        assert len(numbers) >= 3


def test_a_prompt_depends_on_seed_uid_and_level_alone():
    forward, backward = PromptSource(CONFIG, 3), PromptSource(CONFIG, 3)
    made = [forward.prompt(uid, uid % 2 if _is_sum(forward, uid) else 0) for uid in range(150)]
    for prompt in reversed(made):
        level = backward.level_of(prompt.uid, prompt.source_id)
        assert backward.prompt(prompt.uid, level) == prompt
    assert made[0] != PromptSource(CONFIG, 4).prompt(0, 0)


def _is_sum(source: PromptSource, uid: int) -> bool:
    return source.prompt(uid).task == "chain_sum"


def test_an_epoch_of_a_part_visits_each_of_its_items_once():
    source = PromptSource(CONFIG, 0)
    legs = (p for p in map(source.prompt, itertools.count()) if p.task == "leg_counting")
    for _ in range(2):
        epoch = list(itertools.islice(legs, 40))
        assert len({prompt.source_id for prompt in epoch}) == 40
        assert len({prompt.epoch for prompt in epoch}) == 1


def test_no_prompt_of_any_part_or_level_has_the_text_of_a_held_out_one():
    source = PromptSource(CONFIG, 1)
    held_out = source.held_out()
    assert {prompt.source_id.partition("/")[0] for prompt in held_out} == {
        "sums@0",
        "sums@1",
        "legs",
    }
    assert [prompt.uid - HELD_OUT_UIDS for prompt in held_out] == list(range(len(held_out)))
    texts = {normalised_text(prompt.messages) for prompt in held_out}
    for uid, level in itertools.product(range(200), range(2)):
        prompt = source.prompt(uid, level if _is_sum(source, uid) else 0)
        assert normalised_text(prompt.messages) not in texts


def history(passes: float, fails: float) -> History:
    seen = History(half_life_steps=20.0, prior_strength=2.0)
    seen._now.tasks["sums@0"] = Evidence(passes=passes, fails=fails, samples=passes + fails)
    return seen


@pytest.mark.parametrize(
    ("passes", "fails", "opens"),
    [(90, 10, True), (60, 40, False), (10, 0, False), (0, 0, False), (71, 29, True)],
)
def test_a_level_opens_at_the_pass_rate_of_the_one_before_and_not_without_evidence(
    passes, fails, opens
):
    source, seen = PromptSource(CONFIG, 0), history(passes, fails)
    uids = [uid for uid in range(1500) if _is_sum(source, uid)]
    levels = [source.level(uid, seen.pass_rate) for uid in uids]
    assert levels == [source.level(uid, seen.pass_rate) for uid in uids]
    easy = levels.count(0) / len(levels)
    if opens:  # 1,005 draws: five standard deviations of a share of 0.2
        assert abs(easy - CONFIG.review) < 5 * (0.2 * 0.8 / len(levels)) ** 0.5
    else:
        assert easy == 1.0


def test_what_was_passed_long_ago_opens_nothing():
    seen = history(90, 10)
    seen._now.step = 200  # ten half-lives
    assert seen.pass_rate("sums@0")[1] < 1
    source = PromptSource(CONFIG, 0)
    assert {source.level(uid, seen.pass_rate) for uid in range(300)} == {0}


def test_one_source_is_the_stream_it_always_was():
    source = PromptSource(PromptsConfig(size=50, held_out=5), 7)
    assert not PromptsConfig().follows_pass_rates
    assert [source.prompt(uid).source_id.rpartition("/")[0] for uid in (0, 60)] == ["chain_sum"] * 2
    assert len({source.prompt(uid).source_id for uid in range(50)}) == 50


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prompts.mix.a.taks=x"], r"prompts\.mix\.a\.taks.*did you mean 'task'"),
        (["prompts.mix.a.weight=0"], r"prompts\.mix\.a\.weight .*greater than 0"),
        (["prompts.mix.a.source=dataset"], r"needs prompts\.mix\.a\.path"),
        (["prompts.mix.a.template=x"], r"prompts\.mix\.a\.template does not contain"),
    ],
)
def test_a_part_that_cannot_be_is_refused_by_its_name(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_table({}, overrides)


def test_levels_are_decided_shortly_before_use_and_the_plan_says_so():
    given = ["prompts.mix.a.levels=[{min_terms=2},{min_terms=3}]", "prompts.mix.b.weight=3"]
    experiment = load_table({}, given).experiment
    assert experiment.waiting_prompts == experiment.learner.prompts_per_step
    said = " ".join(algebra(experiment))
    assert "25% a, 75% b" in said
    assert "pass rate of 0.7" in said


def test_a_file_of_a_part_is_relative_to_the_experiment(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "?", "answer": "1"}\n')
    (tmp_path / "mine.toml").write_text(
        """[reward]
name = "exact_match"
[prompts.mix.mine]
source = "dataset"
path = "rows.jsonl"
"""
    )
    loaded = load_experiment(tmp_path / "mine.toml")
    assert loaded.experiment.prompts.mix["mine"].path == str(tmp_path / "rows.jsonl")
    (tmp_path / "again.toml").write_text(loaded.source_text)
    again = load_experiment(tmp_path / "again.toml").experiment
    assert again.prompts == loaded.experiment.prompts
