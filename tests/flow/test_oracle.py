"""At S = 0 the distributed system equals the one-file oracle: samples, rewards and losses.

The system runs as a user runs it, with all its processes; the oracle runs beside it on the same
model folder and prompts. Planted errors show that the comparison can fail.
"""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from slipstream.configs.rollouts import read_rollouts
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

HERE = Path(__file__).parent
TINY = HERE.parents[1] / "kernels" / "tiny"
P, G, MAX_NEW_TOKENS = 4, 4, 6
TIMEOUT_S = 240

IN_THE_LEARNER = """
import sys
if "slipstream.learner.loop" in sys.orig_argv:
"""


def load_oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("oracle", HERE / "oracle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["oracle"] = module
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


def make_inputs(folder: Path, dtype: torch.dtype) -> None:
    """A random two-layer Llama, prompts, and the oracle's reward as a plug-in."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=448,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / "model")
    lines = [json.dumps({"prompt": f"{n % 9} + {n % 7} ="}) for n in range(400)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "reward.py").write_text(
        "def reward(completion, prompt):\n"
        "    text = completion.text\n"
        "    return sum(c in '02468' for c in text) / max(1, len(text)) + 0.01 * len(text)\n"
    )


def experiment(*, steps: int, dtype: str, workers: int, truncated: bool, refill: bool) -> str:
    law = 'top_k = 12\ntop_p = 0.9\n[rollout]\nratio_law = "kept_set"' if truncated else "[rollout]"
    return f"""
name = "oracle"
model = "model"
dtype = "{dtype}"
mode = "sequential"
seed = 3
[prompts]
source = "dataset"
path = "prompts.jsonl"
answer_column = ""
shuffle = false
held_out = 0
[reward]
name = "reward.py:reward"
[rollout.sampling]
max_new_tokens = {MAX_NEW_TOKENS}
temperature = 0.9
{law}
workers = {workers}
samples_per_prompt = {G}
max_concurrent_samples = 5
[buffer]
drop_no_signal = {str(refill).lower()}
[learner]
steps = {steps}
prompts_per_step = {P}
micro_batch_tokens = 128
[learner.optimizer]
learning_rate = 1e-3
warmup_steps = 4
max_grad_norm = 0.3
[learner.checkpoint]
every_steps = 100
[eval]
enabled = false
[track]
tensorboard = false
"""


def run_system(folder: Path, text: str, plant: str = "") -> Path:
    """Run the experiment in processes of its own, with an error planted in the learner."""
    (folder / "experiment.toml").write_text(text)
    environment = dict(os.environ)
    if plant:
        (folder / "plant").mkdir()
        (folder / "plant" / "sitecustomize.py").write_text(
            IN_THE_LEARNER + textwrap.indent(plant, "    ")
        )
        environment["PYTHONPATH"] = str(folder / "plant")
    run_dir = folder / "run"
    command = [sys.executable, "-P", "-m", "slipstream.configs.cli", "run", "experiment.toml"]
    done = subprocess.run(
        [*command, "--output", str(run_dir)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def run_oracle(folder: Path, *, steps: int, dtype: torch.dtype, truncated: bool, refill: bool):
    return oracle.run(
        oracle.OracleConfig(
            model_dir=folder / "model",
            prompts_file=folder / "prompts.jsonl",
            dtype=dtype,
            seed=3,
            steps=steps,
            prompts_per_step=P,
            samples_per_prompt=G,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=0.9,
            top_k=12 if truncated else 0,
            top_p=0.9 if truncated else 1.0,
            learning_rate=1e-3,
            warmup_steps=4,
            max_grad_norm=0.3,
            drop_no_signal=refill,
        )
    )


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def assert_equal(run_dir: Path, expected: list[dict], tolerance: float) -> None:
    assert losses(run_dir) == pytest.approx([e["loss"] for e in expected], abs=tolerance, rel=0)
    for entry in expected:
        taken = [
            rollout
            for rollout in read_rollouts(run_dir, entry["step"], "all")
            if rollout.entry.decision is not None
        ]
        wanted = [
            (group["uid"], index, tokens, reward)
            for group in entry["groups"]
            for index, (tokens, reward) in enumerate(
                zip(group["tokens"], group["rewards"], strict=True)
            )
        ]
        assert [(r.entry.uid, r.entry.index) for r in taken] == [w[:2] for w in wanted]
        for rollout, (_, _, tokens, reward) in zip(taken, wanted, strict=True):
            trajectory = rollout.trajectory
            assert trajectory.token_ids[trajectory.policy_mask].tolist() == tokens
            assert trajectory.score.value == pytest.approx(reward, abs=tolerance, rel=0)


@pytest.mark.parametrize("truncated", [False, True], ids=["whole", "truncated"])
@pytest.mark.parametrize("workers", [1, 2])
def test_thirty_steps_in_float64_equal_the_oracle(tmp_path, workers, truncated):
    make_inputs(tmp_path, torch.float64)
    refill = truncated  # the truncated arm also refills groups without signal
    text = experiment(
        steps=30, dtype="float64", workers=workers, truncated=truncated, refill=refill
    )
    run_dir = run_system(tmp_path, text)
    expected = run_oracle(
        tmp_path, steps=30, dtype=torch.float64, truncated=truncated, refill=refill
    )
    assert_equal(run_dir, expected, 1e-9)


def test_first_five_steps_in_float32_equal_the_oracle(tmp_path):
    make_inputs(tmp_path, torch.float32)
    text = experiment(steps=5, dtype="float32", workers=2, truncated=False, refill=False)
    run_dir = run_system(tmp_path, text)
    expected = run_oracle(tmp_path, steps=5, dtype=torch.float32, truncated=False, refill=False)
    assert_equal(run_dir, expected, 1e-5)


PLANTS = {
    "advantage": """
import slipstream.learner.advantage as module
module.EPS = 0.05
""",
    "mask shift": """
import slipstream.learner.batch as module
pad = module.pad
def shifted(tokens, places):
    inputs, positions, targets = pad(tokens, places)
    return inputs, (positions - 1).clamp(min=0), targets
module.pad = shifted
""",
    "loss scaling": """
import slipstream.learner.objective as module
token_weights = module.token_weights
def scaled(counts, aggregation):
    weights, denominator = token_weights(counts, aggregation)
    return weights, denominator + 1
module.token_weights = scaled
""",
    "optimizer order": """
from slipstream.learner.policy import Policy
update = Policy.update
def with_the_rate_of_the_step_before(self, rate, norm):
    update(self, self.__dict__.setdefault("late", rate), norm)
    self.late = rate
Policy.update = with_the_rate_of_the_step_before
""",
}


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS.keys())
def test_a_planted_error_in_the_learner_differs_from_the_oracle(tmp_path, plant):
    make_inputs(tmp_path, torch.float64)
    text = experiment(steps=4, dtype="float64", workers=1, truncated=False, refill=False)
    run_dir = run_system(tmp_path, text, plant)
    expected = run_oracle(tmp_path, steps=4, dtype=torch.float64, truncated=False, refill=False)
    with pytest.raises(AssertionError):
        assert_equal(run_dir, expected, 1e-9)
