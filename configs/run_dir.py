"""The run folder: made once, said to be running by one supervisor at a time, read by everybody.

experiment.toml  as given          run.json       id, versions, branches, status, result
resolved.json    every value       plan.txt       what `slipstream plan` says of it
resolved.toml    the same, to be given to `slipstream run` again
metrics.jsonl eval.jsonl sft_metrics.jsonl        appended while it runs
ledger.sqlite segments/ checkpoints/ model/       what `resume` continues from
logs/ processes/ tensorboard/ export/
"""

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec

from ..buffer.errors import ConfigError
from ..buffer.filesystem import put_text
from . import toml
from .layers import split_override
from .load import SECTIONS, Loaded, validate
from .plan import plan_text
from .result import Result
from .schema import Experiment

RunStatus = Literal["running", "finished", "failed", "interrupted"]

SUBFOLDERS = ("logs", "processes", "checkpoints", "segments")

CHANGEABLE = re.compile(r"launcher|rollout\.workers|cluster\.\w+")
"""Keys that say where and by how many processes the same is trained."""

OWNER_ONLY = 0o700
"""Rollouts and weights may be private, and runs are often kept on shared machines."""


class Branch(msgspec.Struct, kw_only=True, frozen=True):
    """One stretch of a run between two starts."""

    branch: int
    parent: tuple[int, int] | None = None
    """(branch, step) of the checkpoint it continued from; None for the beginning."""
    started_s: float
    ended_s: float | None = None
    status: RunStatus = "running"


class RunFile(msgspec.Struct, kw_only=True, frozen=True):
    """`run.json`."""

    run_id: str
    name: str
    seed: int
    created_s: float
    working_dir: str
    """Where the command was given; user modules are found from there on resume too."""
    model_dir: str = ""
    commit: str | None = None
    """Of slipstream's source; None when it is installed without its history."""
    versions: dict[str, str]
    machine: dict[str, str]
    branches: tuple[Branch, ...] = ()
    status: RunStatus = "running"
    reason: str = ""
    result: Result | None = None
    """What it came to, once it ended."""

    def parents(self) -> dict[int, tuple[int, int]]:
        """branch -> (parent branch, step at which it left)."""
        return {each.branch: each.parent for each in self.branches if each.parent is not None}


def create_run_dir(
    loaded: Loaded, output: Path | None, files: Mapping[str, Callable[[Path], None]] | None = None
) -> Path:
    """Make the folder of a new run and write what is known before it starts.

    Args:
        loaded: the experiment.
        output: the folder itself; None: `runs_dir`/NAME-TIME.
        files: more files that belong to the run: name -> who writes it.
    Raises:
        ConfigError: it exists and is not empty, or cannot be written; or the plan refuses.
    """
    experiment, plan = loaded.experiment, plan_text(loaded)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_dir = _free_folder(output, Path(experiment.runs_dir) / f"{experiment.name}-{stamp}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True, mode=OWNER_ONLY)
        run_dir.chmod(OWNER_ONLY)
        for name in SUBFOLDERS:
            (run_dir / name).mkdir()
        (run_dir / "experiment.toml").write_text(loaded.source_text)
        write_resolved(run_dir, experiment)
        (run_dir / "plan.txt").write_text(plan)
        for name, write in (files or {}).items():
            write(run_dir / name)
    except OSError as error:
        raise ConfigError(
            f"the run folder {run_dir} cannot be written: {error.strerror}; choose another with "
            "--output, or set runs_dir"
        ) from None
    write_run(run_dir, _new_run_file(loaded, run_dir))
    return run_dir


def write_resolved(run_dir: Path, experiment: Experiment) -> None:
    """Have this and every later start of the run read this experiment."""
    table = experiment.model_dump(mode="json")
    put_text(run_dir / "resolved.toml", toml.document(table, list(SECTIONS)))
    put_text(run_dir / "resolved.json", experiment.model_dump_json(indent=2) + "\n")


def _free_folder(output: Path | None, default: Path) -> Path:
    """The absolute path of a folder that no run is in.

    Raises:
        ConfigError: the folder asked for holds something already.
    """
    wanted = (output or default).expanduser().absolute()
    if output is None:
        number = 1
        while wanted.exists():  # two runs in one second
            number += 1
            wanted = wanted.with_name(f"{default.name}-{number}")
        return wanted
    if (wanted / "run.json").exists():
        raise ConfigError(
            f"{wanted} is already a run; continue it with `slipstream resume {output}`, or "
            "choose another folder"
        )
    if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        raise ConfigError(f"{wanted} exists and is not an empty folder; choose another")
    return wanted


def _new_run_file(loaded: Loaded, run_dir: Path) -> RunFile:
    created_s = time.time()
    return RunFile(
        run_id=f"{run_dir.name}-{os.urandom(4).hex()}",
        name=loaded.experiment.name,
        seed=loaded.experiment.seed,
        created_s=created_s,
        working_dir=os.getcwd(),
        commit=_git_commit(),
        versions=_versions(),
        machine={
            "host": platform.node(),
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": str(len(os.sched_getaffinity(0))),
        },
        branches=(Branch(branch=0, started_s=created_s),),
    )


def read_run(run_dir: Path) -> RunFile:
    """The run's description.

    Raises:
        ConfigError: the folder holds no run.
    """
    path = run_dir / "run.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunFile)
    except FileNotFoundError:
        raise ConfigError(f"{run_dir} is not a run folder: it has no run.json") from None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def read_experiment(run_dir: Path) -> Experiment:
    """The run's resolved experiment.

    Raises:
        ConfigError: the folder holds none, or one of another version of slipstream.
    """
    path = run_dir / "resolved.json"
    try:
        return Experiment.model_validate_json(path.read_bytes())
    except OSError:
        raise ConfigError(f"{run_dir} is not a run folder: it has no resolved.json") from None
    except ValueError as error:
        raise ConfigError(f"{path} does not fit this version of slipstream: {error}") from None


def change_experiment(run_dir: Path, overrides: Sequence[str]) -> Experiment:
    """The run's experiment with some values changed; nothing is written.

    Raises:
        ConfigError: a value is wrong, or its key decides what is trained.
    """
    table, origins = read_experiment(run_dir).model_dump(mode="json"), {}
    for override in overrides:
        key, value = split_override(override)
        if not CHANGEABLE.fullmatch(key):
            raise ConfigError(
                f"{key} cannot change when a run is resumed: it may decide what is trained, and "
                "the steps so far were trained as it was. What can: rollout.workers, launcher and "
                f"cluster.KEY; `slipstream run {run_dir}/resolved.toml {override}` starts another "
                "run"
            )
        toml.put(table, key, value, f"override {override!r}")
        origins[key] = "command line"
    return validate(table, origins)


def write_run(run_dir: Path, run: RunFile) -> None:
    """Replace the run's description atomically and durably: the old one or the new one is there,
    for readers and after a power cut."""
    new = run_dir / "run.json.new"
    with new.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(run), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(run_dir / "run.json")
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def update_run(run_dir: Path, **changes: Any) -> RunFile:
    """Change fields of the run's description."""
    run = msgspec.structs.replace(read_run(run_dir), **changes)
    write_run(run_dir, run)
    return run


def end_branch(run_dir: Path, status: RunStatus, reason: str, result: Result | None) -> None:
    """Record how the current branch, and so for now the run, ended."""
    run = read_run(run_dir)
    last = msgspec.structs.replace(run.branches[-1], ended_s=time.time(), status=status)
    branches = (*run.branches[:-1], last)
    update_run(run_dir, branches=branches, status=status, reason=reason, result=result)


def _git_commit() -> str | None:
    """The commit of our source when it runs from a clone, marked when files differ from it."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # installed: the version says it, and git would look above
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _versions() -> dict[str, str]:
    names = ("slipstream", "torch", "transformers", "safetensors", "numpy", "pyzmq", "datasets")
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
