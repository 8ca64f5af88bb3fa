"""Which optimizer, and settings that follow the batch."""

import subprocess
from pathlib import Path

import pytest
import torch
from slipstream.buffer.errors import ConfigError
from slipstream.learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from slipstream.learner.policy import make_optimizer

ROOT = Path(__file__).parents[2]
EXTRAS = ROOT / ".venvs" / "extras" / "bin" / "python"


def test_without_the_package_the_remedy_is_named():
    with pytest.raises(ConfigError, match=r"pip install 'slipstream\[adam8bit\]'"):
        make_optimizer([torch.zeros(1)], OptimizerConfig(name="adamw_8bit"))


@pytest.mark.slow
def test_8_bit_adam_in_an_environment_that_has_it():
    assert EXTRAS.exists(), "make .venvs/extras/.installed"
    done = subprocess.run(
        [EXTRAS, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/learner/eight_bit.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_settings_tuned_for_another_batch_look_back_over_as_many_prompts_as_before():
    """A quarter of the batch: half the rate, and every average spans four times the updates."""
    tuned = LearnerConfig(
        prompts_per_step=16, updates_per_step=2,
        optimizer=OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.95), tuned_at=32),
        objective=ObjectiveConfig(proximal="ewma", proximal_decay=0.9),
    )  # fmt: skip
    now = tuned.scaled()
    assert now.optimizer.learning_rate == pytest.approx(5e-4)
    assert [beta**4 for beta in now.optimizer.betas] == pytest.approx([0.9, 0.95])
    decay = now.objective.proximal_decay
    assert 1 / (1 - decay) - 1 == pytest.approx(4 * (1 / (1 - 0.9) - 1))
    assert now.scaled() == now, "scaled once"
    same = tuned.model_copy(update={"prompts_per_step": 64})
    assert same.scaled() == same
    assert LearnerConfig().scaled() == LearnerConfig()
