"""`slipstream eval`: an export, any model folder, or a run's checkpoints on held-out prompts."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..buffer.errors import ConfigError, SlipstreamError
from ..learner.checkpoint import complete_folders, find_checkpoint, read_checkpoint
from ..rollout.config import EvaluateSpec, WeightsFiles
from .child import module_argv
from .engines import check_engine
from .load import load_experiment
from .models import check_folder, weight_files
from .schema import Experiment
from .specs import user_module_path


def evaluate(
    folder: Path, experiment: str, overrides: list[str], *, every: bool = False
) -> Iterator[dict[str, Any]]:
    """Score weights on an experiment's held-out prompts; a line for each, as it is done.

    Args:
        folder: a Hugging Face folder or a run folder.
        experiment: whose prompts, reward and sampling; empty: those of the run that `folder` is, or
            lies in.
        overrides: such as `eval.samples_per_prompt=8` or `rollout.engine=vllm`.
        every: all checkpoints of a run, oldest first, instead of the newest.
    Raises:
        ConfigError: no experiment is known, the folder holds no model, or the engine cannot be
            started here.
        CorruptData: weights are damaged.
        SlipstreamError: the evaluation failed, with its reason.
    """
    folder = folder.expanduser().absolute()
    loaded = load_experiment(experiment or _run_of(folder), overrides)
    check_engine(loaded.experiment.rollout)
    if (folder / "run.json").is_file():
        model_dir, weights = _of_run(folder, every=every)
    else:
        check_folder(folder, str(folder))
        model_dir = folder
        weights = [WeightsFiles(name=str(folder), files=tuple(weight_files(folder)))]
        if not weights[0].files:
            raise ConfigError(f"{folder} has no weights: there is no *.safetensors in it")
    yield from _run(_spec(loaded.experiment, model_dir, weights))


def table(line: dict[str, Any]) -> str:
    """One line of the answer, for people."""
    mean, low, high = line["reward_mean"], line["ci95_low"], line["ci95_high"]
    interval = f" (95% {low:.3f} to {high:.3f})" if low is not None else ""
    reward = "no sample could be scored" if mean is None else f"reward {mean:.3f}{interval}"
    parts = [f"{reward} on {line['prompts']} prompts, {line['samples']} samples"]
    parts += [f"{line['failed']} rewards failed"] if line["failed"] else []
    passes = [
        f"pass@{k} {value:.3f} ({low:.3f} to {high:.3f})"
        if low is not None
        else f"@{k} {value:.3f}"
        for k, (value, low, high) in line["pass_at"].items()
    ]
    parts += [", ".join(passes)] if passes else []
    return f"{line['weights']}: {'; '.join(parts)}"


def _run_of(folder: Path) -> str:
    """The resolved experiment of the run that a folder is, or lies in."""
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / "run.json").is_file():
            return str(place / "resolved.toml")
    raise ConfigError(
        f"{folder} lies in no run folder, so nothing says which prompts and reward to evaluate on; "
        "name them: --experiment mine.toml"
    )


def _of_run(run_dir: Path, *, every: bool) -> tuple[Path, list[WeightsFiles]]:
    """Model folder and weights of a run's checkpoints."""
    if every:
        found = [
            read_checkpoint(each) for each in reversed(complete_folders(run_dir / "checkpoints"))
        ]
    else:
        found = [find_checkpoint(run_dir / "checkpoints")[0]]
    if not found:
        raise ConfigError(f"{run_dir} has no checkpoint yet")
    model_dir = run_dir / "model"
    if not (model_dir / "config.json").is_file():
        model_dir = Path(found[0].info["model_dir"])
    return model_dir, [
        WeightsFiles(name=each.folder.name, files=(each.folder / "weights.safetensors",))
        for each in found
    ]


def _spec(experiment: Experiment, model_dir: Path, weights: list[WeightsFiles]) -> EvaluateSpec:
    return EvaluateSpec(
        name="eval",
        seed=experiment.seed,
        model_dir=model_dir,
        dtype=experiment.dtype,
        rollout=experiment.rollout,
        reward=experiment.reward,
        environment=experiment.environment,
        prompts=experiment.prompts,
        eval=experiment.eval,
        weights=tuple(weights),
    )


def _run(spec: EvaluateSpec) -> Iterator[dict[str, Any]]:
    """In a process of its own, which imports torch; its lines as they come."""
    with tempfile.TemporaryDirectory(prefix="slipstream-eval-") as scratch:
        path = Path(scratch) / "eval.json"
        path.write_text(spec.model_dump_json())
        path.chmod(0o600)
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        environment |= user_module_path(spec, Path.cwd())
        log = Path(scratch) / "stderr"
        with log.open("w") as stderr, subprocess.Popen(
            module_argv("rollout.evaluate", path),
            stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    yield json.loads(line)
                process.wait()
            finally:
                process.terminate()  # nothing to end, unless nobody reads on
        if code := process.returncode:
            said = log.read_text().strip().splitlines() or [f"it ended with code {code}"]
            raise SlipstreamError(f"evaluation failed: {said[-1]}")
