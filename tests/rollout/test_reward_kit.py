"""`slipstream reward ...`: what is written works as it is, and each broken promise is found."""

import subprocess
import sys
from pathlib import Path

import pytest
from slipstream.buffer.errors import ConfigError
from slipstream.configs import reward_kit
from slipstream.rollout.config import RewardConfig
from slipstream.rollout.rewards.kit import check

CASES = """
from slipstream.rollout.rewards.base import example

def examples():
    return [
        example("Answer: 2", correct=True, question="Say Answer: 1 or 2.", answer="2"),
        example("Answer: 3", correct=False, question="Say Answer: 1 or 2.", answer="2"),
    ]
"""
BROKEN = {
    "has golden cases": """
def examples():
    return []
def score(completion, prompt):
    return 1.0""",
    "golden cases score 1": "def score(completion, prompt):\n    return 0.5",
    "within its time-out": """
import time
def score(completion, prompt):
    time.sleep(30 if "3" in completion.text else 0)
    return float("2" in completion.text)""",
    "in another process": """
import os
def score(completion, prompt):
    return 1.0 if "2" in completion.text else os.getpid() % 9973 / 10000""",
    "calls share no state": """
SEEN = []
def score(completion, prompt):
    SEEN.append(completion.text)
    return 1.0 if "2" in completion.text else len(SEEN) / 100""",
    "an empty answer": """
def score(completion, prompt):
    return float(completion.text.strip() in prompt.payload["answer"] or "2" in completion.text)""",
    "blank lines": """
def score(completion, prompt):
    last = completion.text.splitlines()[-1].split()[-1]
    return float(last == prompt.payload["answer"])""",
    "the prompt echoed": """
def score(completion, prompt):
    return float(prompt.payload["answer"] in completion.text)""",
    "a very long answer": """
def score(completion, prompt):
    assert len(completion.text) < 100_000, "too long for me"
    return float(completion.text == "Answer: 2")""",
}


def findings(tmp_path: Path, code: str) -> dict[str, str]:
    """What is wrong with a reward: check -> why."""
    (tmp_path / "mine.py").write_text(CASES + code)
    found = check(RewardConfig(name=f"{tmp_path / 'mine.py'}:score", timeout_s=2.0))
    return {each.check: each.detail for each in found if not each.ok}


@pytest.mark.parametrize("promise", BROKEN)
def test_each_broken_promise_is_found_and_explained(tmp_path: Path, promise: str):
    wrong = findings(tmp_path, BROKEN[promise])
    (broken,) = [name for name in wrong if promise in name]
    assert wrong[broken]


def test_a_reward_that_keeps_its_promises_has_no_findings(tmp_path: Path):
    kept = "def score(completion, prompt):\n    return float(completion.text == 'Answer: 2')"
    assert findings(tmp_path, kept) == {}


@pytest.mark.parametrize("name", ["exact_match", "pattern", "math_answer"])
def test_ours_keep_the_contract(name: str):
    ok, lines = reward_kit.test(name, [])
    assert ok, "\n".join(lines)


def test_a_new_reward_is_a_package_whose_contract_and_own_test_hold(tmp_path: Path):
    folder = tmp_path / "last_line"
    files = reward_kit.new(folder)
    assert {file.name for file in files} == {"pyproject.toml", "last_line.py", "test_last_line.py"}
    ok, lines = reward_kit.test(str(folder), [])
    assert ok, "\n".join(lines)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_last_line.py"],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["My-Reward", "class", "1st", "pattern"])
def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=name):
        reward_kit.new(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_what_is_there_is_not_overwritten(tmp_path: Path):
    reward_kit.new(tmp_path / "mine")
    with pytest.raises(ConfigError, match="is there already"):
        reward_kit.new(tmp_path / "mine")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("patern", "did you mean 'pattern'"),
        ("nowhere.py", "there is no file"),
        (".", "names no reward"),
        ("no_such_module_x:f", "cannot be imported"),
    ],
)
def test_what_is_no_reward_is_refused(tmp_path: Path, monkeypatch, target: str, words: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        reward_kit.test(target, [])


def test_every_registered_reward_is_listed_with_what_it_does():
    lines = list(reward_kit.registered())
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    (pattern,) = [line for line in lines if line.startswith("pattern ")]
    assert "regular expression" in pattern
    assert "slipstream.rollout.rewards.pattern:PatternMatch" in pattern
    assert not [line for line in lines if "cannot be imported" in line]
