"""Training from Python: settings, data and rewards given as objects."""

import io
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import slipstream.configs
from rich.console import Console
from slipstream.buffer.errors import ConfigError
from slipstream.buffer.records import Completion, Message, Prompt
from slipstream.configs import api
from slipstream.configs.load import Loaded, load_experiment
from slipstream.configs.result import Result, RunResult
from slipstream.configs.user_code import SourceFile, import_name
from slipstream.rollout.config import RewardConfig
from slipstream.rollout.rewards.base import load_reward

LIMIT = 3
WORD = re.compile(r"\w+")


def count_words(text: str) -> int:
    return len(WORD.findall(text))


def few_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """TRL's form; uses a constant, a module, a pattern and another function."""
    assert json.dumps(prompts)
    return [float(count_words(text) <= LIMIT) for text in completions]


def ends_with_full_stop(completion: Completion, prompt: Prompt) -> float:
    """Our form."""
    return float(completion.text.endswith("."))


class Anything:
    """A callable object that no other process has."""

    def __call__(self, completion: Completion, prompt: Prompt) -> float:
        return 1.0


ROWS = [{"prompt": f"question {i}", "answer": str(i)} for i in range(40)]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `train` would have run: the experiment, the folder and the user's files."""
    found: dict[str, Any] = {}

    def fake_run(loaded: Loaded, run_dir: Path, **arguments: Any) -> RunResult:
        run_dir.mkdir(parents=True, exist_ok=True)
        for name, write in arguments["files"].items():
            write(run_dir / name)
        found.update(loaded=loaded, experiment=loaded.experiment, run_dir=run_dir)
        result = Result(status="finished")
        return RunResult(run_dir=run_dir, seed=0, status="finished", exit_code=0, result=result)

    monkeypatch.setattr(api, "run", fake_run)
    return found


def train(tmp_path: Path, **arguments: Any) -> str:
    """Call `train`; returns what it printed."""
    out = io.StringIO()
    api.train(output=tmp_path / "run", console=Console(file=out, width=100), **arguments)
    return out.getvalue()


def score(reward: str, text: str, arguments: dict[str, Any] | None = None) -> Any:
    scorer = load_reward(RewardConfig(name=reward, arguments=arguments or {}))
    prompt = Prompt(uid=0, source_id="t/0", task="t", messages=(Message(role="user", content="q"),))
    return scorer(Completion(text=text), prompt)


def test_train_is_found_in_the_package_and_loaded_only_when_asked_for() -> None:
    assert slipstream.configs.train is api.train
    code = "import slipstream.configs, sys; print('slipstream.configs.api' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_overrides_may_be_nested_dotted_or_with_double_underscores() -> None:
    given = {
        "learner__steps": 5,
        "learner.prompts_per_step": 4,
        "rollout": {"workers": 1},
        "seed": 7,
    }
    assert api.nested(given) == {
        "learner": {"steps": 5, "prompts_per_step": 4}, "rollout": {"workers": 1}, "seed": 7,
    }  # fmt: skip


def test_overrides_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="contradicts learner"):
        api.nested({"learner": 3, "learner__steps": 5})


def test_a_function_of_a_test_module_is_copied_with_all_it_refers_to(tmp_path: Path) -> None:
    source = SourceFile()
    source.add(few_words)
    file = tmp_path / "user_rewards.py"
    file.write_text(source.text())
    assert score(f"{file}:few_words", "one two three").value == 1.0
    assert score(f"{file}:few_words", "one two three four").value == 0.0


def test_an_importable_function_is_named_and_not_copied() -> None:
    assert import_name(textwrap.dedent) == "textwrap:dedent"
    assert import_name(load_experiment) == "slipstream.configs.load:load_experiment"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lambda completion, prompt: 1.0, "a lambda has no name"),
        (lambda: _closure(3), r"uses variables of the function around it \(bonus\)"),
        (Anything, "is an instance, which other processes cannot rebuild"),
    ],
)
def test_rewards_that_no_other_process_could_run_are_refused_with_the_remedy(
    tmp_path: Path, make: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, rewards=make(), dataset=ROWS)


def _closure(bonus: int) -> Any:
    def reward(completion: Completion, prompt: Prompt) -> float:
        return float(bonus)

    return reward


def test_a_function_whose_source_cannot_be_found_is_refused(tmp_path: Path) -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec("def typed(completion, prompt):\n    return 1.0\n", scope)
    with pytest.raises(ConfigError, match="the source of the reward typed cannot be found"):
        train(tmp_path, rewards=scope["typed"], dataset=ROWS)


def test_a_global_that_cannot_be_written_to_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the reward uses_console uses CONSOLE, a Console"):
        train(tmp_path, rewards=uses_console, dataset=ROWS)


CONSOLE = Console(file=io.StringIO())


def uses_console(completion: Completion, prompt: Prompt) -> float:
    return float(CONSOLE.width)


def test_one_reward_is_named_and_several_are_summed_with_components(
    tmp_path: Path, prepared: dict[str, Any]
) -> None:
    train(tmp_path, rewards=[few_words, ends_with_full_stop], dataset=ROWS)
    reward = prepared["experiment"].reward
    scored = score(reward.name, "All is well.", reward.arguments)
    assert scored.value == 2.0
    assert scored.components == {"few_words": 1.0, "ends_with_full_stop": 1.0}
    assert score(reward.name, "a b c d", reward.arguments).components == {
        "few_words": 0.0, "ends_with_full_stop": 0.0,
    }  # fmt: skip


def test_a_sum_fails_when_a_part_fails(tmp_path: Path) -> None:
    file = tmp_path / "parts.py"
    file.write_text("def good(completion): return 1\ndef bad(completion): raise ValueError('no')\n")
    scored = score(api.SUM, "x", {"rewards": [f"{file}:good", f"{file}:bad"]})
    assert scored.status == "reward_failed"
    assert scored.reason.startswith("bad: the reward raised ValueError: no")


def test_rows_in_memory_become_a_file_of_the_run(tmp_path: Path, prepared: dict[str, Any]) -> None:
    train(tmp_path, rewards="exact_match", dataset=ROWS)
    prompts = prepared["experiment"].prompts
    assert prompts.source == "dataset"
    assert [json.loads(line) for line in Path(prompts.path).read_text().splitlines()] == ROWS
    assert prompts.held_out == 4


def test_a_datasets_dataset_is_taken_as_it_is(tmp_path: Path, prepared: dict[str, Any]) -> None:
    import datasets

    train(tmp_path, rewards=few_words, dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 30))
    prompts = prepared["experiment"].prompts
    assert len(Path(prompts.path).read_text().splitlines()) == 30
    assert prompts.answer_column == ""


def test_without_rows_for_held_out_prompts_nothing_is_evaluated(
    tmp_path: Path, prepared: dict[str, Any]
) -> None:
    train(tmp_path, rewards=few_words, dataset=[{"prompt": "Hi"}])
    assert prepared["experiment"].prompts.held_out == 0
    assert not prepared["experiment"].eval.enabled


def test_a_dataset_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset is a list; it must be a path"):
        train(tmp_path, rewards=few_words, dataset=["a", "b"])


def test_unknown_settings_are_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner\.stesp.*steps"):
        train(tmp_path, rewards=few_words, dataset=ROWS, learner__stesp=5)


def test_the_printed_toml_is_the_same_experiment(tmp_path: Path, prepared: dict[str, Any]) -> None:
    printed = train(tmp_path, rewards=[few_words], dataset=ROWS, learner__steps=5, seed=3)
    file = tmp_path / "run.toml"
    file.write_text(printed)
    assert load_experiment(file).experiment == prepared["experiment"]
