"""An environment of the package `verifiers` trains as it is, in an environment that has both."""

import os
import subprocess
from pathlib import Path

import pytest
from slipstream.buffer.errors import ConfigError
from slipstream.configs.rollouts import read_rollouts
from slipstream.rollout.config import EnvironmentConfig
from slipstream.rollout.environments.base import load_environment

PEER = Path(__file__).parents[2] / ".venvs" / "extras" / "bin"
GUESS = """
import verifiers as vf
from datasets import Dataset


class Guess(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        return [{"role": "user", "content": f"No, not {len(state['trajectory'])}. Again!"}]

    @vf.stop
    async def guessed(self, state):
        return bool(state["trajectory"]) and "7" in str(state["trajectory"][-1]["completion"])


def sevens(completion, **kwargs):
    return float(str(completion).count("7"))


def longer(completion, **kwargs):
    return float(len(completion))


def load_environment(turns: int = 3):
    rows = [{"question": f"Guess my number. Game {i}", "answer": "7"} for i in range(64)]
    rubric = vf.Rubric(funcs=[sevens, longer], weights=[1.0, 0.0])
    return Guess(dataset=Dataset.from_list(rows), rubric=rubric, max_turns=turns,
                 system_prompt="You play.")
"""
EXPERIMENT = """
extends = "quickstart"
[prompts]
source = "function"
task = "slipstream.rollout.environments.verifiers:row"
task_config = { env = "guess-env", args = { turns = 3 } }
size = 64
held_out = 4
[environment]
name = "verifiers"
arguments = { env = "guess-env", args = { turns = 3 } }
max_turn_tokens = 4
[sft]
demonstration = "shown.py:guess"
examples = 320
"""


def test_without_the_package_the_remedy_is_named() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'slipstream\[verifiers\]'"):
        load_environment(EnvironmentConfig(name="verifiers", arguments={"env": "guess-env"}))


@pytest.mark.slow
def test_an_environment_of_the_package_trains_as_it_is(tmp_path: Path) -> None:
    assert (PEER / "slipstream").exists(), "make .venvs/extras/.installed"
    (tmp_path / "guess_env.py").write_text(GUESS)
    (tmp_path / "shown.py").write_text("def guess(prompt):\n    return '7'\n")
    (tmp_path / "guess.toml").write_text(EXPERIMENT)
    done = subprocess.run(
        [PEER / "slipstream", "run", "guess.toml", "learner.steps=2", "learner.prompts_per_step=4",
         "buffer.drop_no_signal=false", "eval.enabled=false", "--no-export", "--output", "run"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    rollouts = [r.trajectory for r in read_rollouts(tmp_path / "run", 1, "all")]
    assert len(rollouts) == 32
    turns = {len([turn for turn in each.turns if turn.role == "policy"]) for each in rollouts}
    assert turns <= {1, 2, 3}
    assert len(turns) > 1, "some guess at once, some do not"
    for each in rollouts:
        roles = [turn.role for turn in each.turns]
        assert roles[:2] == ["prompt", "policy"]
        assert each.score.status == "scored"
        assert set(each.score.components) == {"sevens", "longer", "num_turns"}
        assert each.score.components["num_turns"] == roles.count("policy")
        assert each.score.value == each.score.components["sevens"]
        spans = [
            each.token_ids[turn.start : turn.end] for turn in each.turns if turn.role == "policy"
        ]
        assert sum(map(len, spans)) == each.policy_mask.sum() == len(each.behaviour_logprobs)
