"""`python -m slipstream.learner.export RUN_DIR OUT`: a checkpoint as a Hugging Face folder.

The folder appears only after a fresh process has loaded it with transformers alone and found the
logits of the live policy, recorded when the checkpoint was saved.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from ..buffer.errors import ConfigError, CorruptData, SlipstreamError, TrainingFailed
from ..kernels.models import (
    ModelError,
    assign_weights,
    empty_model,
    end_token_ids,
    has_weights,
    load_tokenizer,
    read_weights,
)
from .checkpoint import ADAPTER, Checkpoint, find_checkpoint, read_checkpoint
from .config import LoraConfig
from .lora import adapter_config, linear_layers

LOGIT_BOUND = 1e-5
"""Largest difference allowed between the live policy's float32 logits and those of the reload."""

VERIFY_TIMEOUT_S = 900.0

VERIFY = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)
probe = load_file(sys.argv[2])
with torch.no_grad():
    logits = model(input_ids=probe["token_ids"], use_cache=False).logits.float()
print("difference", (logits - probe["logits"]).abs().max().item())
"""
"""Runs with `python -I`: nothing of ours and nothing of the working directory is imported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was exported, and how exactly it reloads."""

    path: str
    run_id: str
    branch: int
    step: int
    max_logit_difference: float


def export(run_dir: Path, out: Path, checkpoint_folder: Path | None = None) -> Export:
    """Write, reload and compare; `out` holds the model afterwards, or does not exist.

    Args:
        run_dir: a run folder.
        out: the new folder; may exist if it is empty.
        checkpoint_folder: one of the run's checkpoints; None for the newest that verifies.
    Raises:
        ConfigError: `out` is not empty, or the run has no checkpoint.
        CorruptData: the checkpoint or the model folder is damaged.
        TrainingFailed: the reload fails or its logits differ.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; choose another")
    if checkpoint_folder is None:
        checkpoint, _ = find_checkpoint(run_dir / "checkpoints")
    else:
        checkpoint = read_checkpoint(checkpoint_folder)
    draft = out.with_name(f".{out.name}.unverified-{os.getpid()}")
    try:
        _write(run_dir, checkpoint, draft)
        difference = verify(draft, checkpoint.folder / "probe.safetensors")
        done = _finish(run_dir, checkpoint, draft, out, difference)
    except (ModelError, OSError) as error:
        raise CorruptData(f"export of {checkpoint.folder} failed: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return done


def _write(run_dir: Path, checkpoint: Checkpoint, draft: Path) -> None:
    """Weights, config, generation config, tokenizer and chat template."""
    model_dir = run_dir / "model"
    if not (model_dir / "config.json").is_file():
        model_dir = Path(checkpoint.info["model_dir"])
    model = empty_model(model_dir, checkpoint.info["dtype"])
    assign_weights(model, read_weights([checkpoint.folder / "weights.safetensors"]))
    tokenizer = load_tokenizer(model_dir)
    if (model_dir / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(model_dir))
    settings = model.generation_config
    if settings is not None:
        settings.eos_token_id = list(end_token_ids(model, tokenizer))
        settings.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(str(draft))
    tokenizer.save_pretrained(str(draft))
    if (checkpoint.folder / ADAPTER).is_file() and has_weights(model_dir):
        _write_adapter(run_dir, checkpoint, model, draft / "adapter")


def _write_adapter(
    run_dir: Path, checkpoint: Checkpoint, model: PreTrainedModel, folder: Path
) -> None:
    """The adapters alone, as peft loads them beside the model that the run started from."""
    settings = _read_json(run_dir / "resolved.json")
    lora = LoraConfig.model_validate(settings["learner"]["lora"])
    targets = list(lora.targets) or linear_layers(model)
    folder.mkdir()
    shutil.copyfile(checkpoint.folder / ADAPTER, folder / ADAPTER)
    config = adapter_config(lora, str(settings["model"]), targets)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def verify(folder: Path, probe: Path) -> float:
    """The largest logit difference that a fresh process sees between the folder and the probe.

    Raises:
        TrainingFailed: it is above `LOGIT_BOUND`, or the folder does not load.
    """
    command = [sys.executable, "-I", "-c", VERIFY, str(folder), str(probe)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=VERIFY_TIMEOUT_S, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise TrainingFailed(
            f"the reload of {folder} did not end within {VERIFY_TIMEOUT_S:g} s; nothing exported"
        ) from error
    lines = [line.split() for line in run.stdout.splitlines() if line.startswith("difference ")]
    if run.returncode != 0 or not lines:
        raise TrainingFailed(
            f"the exported folder does not load in a fresh process: {run.stderr.strip()[-600:]}"
        )
    difference = float(lines[-1][1])
    if not difference <= LOGIT_BOUND:  # also refuses NaN
        raise TrainingFailed(
            f"the reloaded model's logits differ from the live policy's by {difference:.3g}, more "
            f"than {LOGIT_BOUND:g}: its weights or config are not what was trained; nothing "
            "exported. Try an earlier --checkpoint"
        )
    return difference


def _finish(
    run_dir: Path, checkpoint: Checkpoint, draft: Path, out: Path, difference: float
) -> Export:
    """Add the lineage and put the folder in its place."""
    done = Export(
        path=str(out),
        run_id=str(checkpoint.info.get("run_id", "")),
        branch=checkpoint.version.branch,
        step=checkpoint.version.step,
        max_logit_difference=difference,
    )
    (draft / "README.md").write_text(model_card(run_dir, checkpoint, done))
    (draft / "slipstream.json").write_text(json.dumps(asdict(done), indent=2) + "\n")
    if out.exists():
        out.rmdir()
    draft.replace(out)
    return done


def model_card(run_dir: Path, checkpoint: Checkpoint, done: Export) -> str:
    """README.md of the exported folder: where the weights come from and what they scored."""
    run, settings = _read_json(run_dir / "run.json"), _read_json(run_dir / "resolved.json")
    prompts, reward = settings.get("prompts", {}), settings.get("reward", {})
    task = prompts.get("task") if prompts.get("source") == "reasoning_gym" else prompts.get("path")
    facts = {
        "Run": done.run_id,
        "Branch and step": f"{done.branch}, {done.step}",
        "Version digest (xxh3-128)": checkpoint.version.digest,
        "Started from": settings.get("model") or Path(checkpoint.info.get("model_dir", "")).name,
        "Task": task or "",
        "Reward": reward.get("name", ""),
        "Seed": run.get("seed", ""),
        "Source commit": run.get("commit") or "",
        "Versions": ", ".join(f"{k} {v}" for k, v in sorted(run.get("versions", {}).items())),
        "Reload check": f"largest logit difference {done.max_logit_difference:.2g} "
        f"(bound {LOGIT_BOUND:g})",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value != "")
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags:\n- slipstream\n- reinforcement-learning\n---\n\n"
        f"# {run.get('name') or done.run_id}\n\n"
        "Post-trained by asynchronous reinforcement learning with slipstream.\n\n"
        f"| | |\n|---|---|\n{table}\n{_evaluations(run_dir)}"
    )


def _evaluations(run_dir: Path) -> str:
    """The held-out rewards of the run, as a table; empty when there are none."""
    path = run_dir / "eval.jsonl"
    if not path.is_file():
        return ""
    rows = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            rows[row["step"]] = (
                f"| {row['step']} | {row['reward_mean']:.3f} | {row['ci95_low']:.3f} to "
                f"{row['ci95_high']:.3f} | {row['prompts']} |"
            )
        except (ValueError, KeyError, TypeError):
            continue  # a line cut by a crash
    if not rows:
        return ""
    body = "\n".join(rows[step] for step in sorted(rows))
    return (
        "\n## Held-out reward\n\n| step | mean | 95% interval | prompts |\n|---|---|---|---|\n"
        f"{body}\n"
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is missing or unreadable: a card can do without."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def main() -> int:
    """Command line; prints one line, or the reason on stderr with a non-zero exit code."""
    parser = argparse.ArgumentParser(description="Export a checkpoint as a Hugging Face folder.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="default: the newest that verifies")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    try:
        done = export(arguments.run_dir, arguments.out, arguments.checkpoint)
    except SlipstreamError as error:
        print(f"export: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print(json.dumps(asdict(done)))
    else:
        print(
            f"ok: {done.path} holds step {done.step} of branch {done.branch}; reloaded in a fresh "
            f"process, its logits differ by at most {done.max_logit_difference:.1e}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
