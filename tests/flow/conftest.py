"""A tiny system to run as a user runs it: by the command line, with all its processes."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

TINY = Path(__file__).parents[2] / "kernels" / "tiny"
TIMEOUT_S = 240

IN_THE_LEARNER = """
import sys
if "slipstream.learner.loop" in sys.orig_argv:
"""


class System:
    """One folder with a model, prompts, rewards and runs; nothing it started outlives the test.

    The numbers of `experiment` are known to the oracle, too.
    """

    prompts_per_step = samples_per_prompt = 4
    max_new_tokens = 6

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Started] = []

    def make_inputs(self, dtype: torch.dtype) -> None:
        """A random two-layer Llama, prompts, and rewards as plug-ins: `reward` and a slow one."""
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
        with torch.no_grad():
            model.get_input_embeddings().weight[2] *= 4  # the end token: samples of all lengths
        model.save_pretrained(self.folder / "model")
        AutoTokenizer.from_pretrained(TINY).save_pretrained(self.folder / "model")
        lines = [json.dumps({"prompt": f"{n % 9} + {n % 7} ="}) for n in range(400)]
        (self.folder / "prompts.jsonl").write_text("\n".join(lines))
        (self.folder / "reward.py").write_text(
            "import time\n"
            "def reward(completion, prompt):\n"
            "    text = completion.text\n"
            "    return sum(c in '02468' for c in text) / max(1, len(text)) + 0.01 * len(text)\n"
            "def slow(completion, prompt):\n"
            "    time.sleep(0.02)\n"
            "    return reward(completion, prompt)\n"
        )

    def experiment(
        self,
        *,
        steps: int,
        dtype: str,
        workers: int = 1,
        truncated: bool = False,
        refill: bool = False,
        max_concurrent: int = 5,
        checkpoint_every: int = 100,
    ) -> None:
        """Write experiment.toml, at S = 0."""
        law = 'top_k = 12\ntop_p = 0.9\n[rollout]\nratio_law = "kept_set"'
        text = f"""
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
max_new_tokens = {self.max_new_tokens}
temperature = 0.9
{law if truncated else "[rollout]"}
workers = {workers}
samples_per_prompt = {self.samples_per_prompt}
max_concurrent_samples = {max_concurrent}
[buffer]
drop_no_signal = {str(refill).lower()}
[learner]
steps = {steps}
prompts_per_step = {self.prompts_per_step}
micro_batch_tokens = 128
share_prompts = {str(dtype == "float32").lower()}
[learner.optimizer]
learning_rate = 1e-3
warmup_steps = 4
max_grad_norm = 0.3
[learner.checkpoint]
every_steps = {checkpoint_every}
[eval]
enabled = false
[track]
tensorboard = false
"""
        (self.folder / "experiment.toml").write_text(text)

    def start(self, *arguments: str, plant: str = "") -> "Started":
        """`slipstream ARGUMENTS` in the folder, with an error planted in the learner."""
        environment = dict(os.environ)
        if plant:
            (self.folder / "plant").mkdir()
            (self.folder / "plant" / "sitecustomize.py").write_text(
                IN_THE_LEARNER + textwrap.indent(plant, "    ")
            )
            environment["PYTHONPATH"] = str(self.folder / "plant")
        output = self.folder / f"output-{len(self.started)}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "slipstream.configs.cli", *arguments],
                cwd=self.folder,
                env=environment,
                stdout=file,
                stderr=file,
            )
        self.started.append(Started(process, output))
        return self.started[-1]


class Started:
    """A command that runs."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process, self.output = process, output

    def ended(self, exit_code: int = 0, timeout_s: float = TIMEOUT_S) -> str:
        """What it said, once it ended as it should."""
        code = self.process.wait(timeout=timeout_s)
        said = self.output.read_text()
        assert code == exit_code, said
        return said

    def kill(self) -> None:
        """End what a failed test left: the other processes end with their supervisor."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    """See `System`."""
    made = System(tmp_path)
    yield made
    for each in made.started:
        each.kill()
