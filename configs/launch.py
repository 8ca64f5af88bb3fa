"""Runs as functions: `run`, `run_seeds`, `sft_only`, `resume`, `stop`. For example:

    from slipstream.configs.launch import run
    from slipstream.configs.load import load_experiment

    done = run(load_experiment("quickstart", ["learner.steps=5"]))
    print(done.result.reward_rise, done.export_dir)

The command line calls the same functions.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from ..buffer.errors import ConfigError, SlipstreamError
from ..buffer.journal import Journal
from ..learner.checkpoint import complete_folders, find_checkpoint
from .claim import running_supervisor, supervising
from .closing import resume_line, seeds_table
from .leftovers import end_leftovers
from .load import Loaded, with_overrides
from .models import check_folder, resolve_model
from .result import RunResult
from .run_dir import (
    SUBFOLDERS,
    Branch,
    change_experiment,
    create_run_dir,
    read_experiment,
    read_run,
    update_run,
    write_resolved,
)
from .schema import Experiment
from .session import check_launcher, run_branches, run_warm_start
from .specs import Launch, preflight_plan
from .track import check_tracking

PREFLIGHT_DEADLINE_S = 600.0
"""Importing a reward's libraries, opening a data set, writing demonstrations."""

STOP_DEADLINE_S = 180.0
"""Longer than the supervisor's own deadlines together."""


def run(
    loaded: Loaded,
    output: Path | None = None,
    *,
    console: Console | None = None,
    export: bool = True,
    files: Mapping[str, Callable[[Path], None]] | None = None,
) -> RunResult:
    """Run an experiment in a new folder, to its end.

    Args:
        loaded: the experiment.
        output: the run folder; None: a new one in `runs_dir`.
        console: where displays go; standard output when not given.
        export: whether the final policy is exported.
        files: files that belong to the run (a user's rewards): name -> who writes it.
    Raises:
        ConfigError: something the user gave cannot work; nothing was started, no folder is left.
    """
    console = console or Console()
    check_tracking(loaded.experiment.track)
    check_launcher(loaded.experiment)
    run_dir = create_run_dir(loaded, output, files)
    with supervising(run_dir):
        launch = _prepare_or_remove(loaded.experiment, run_dir, console)
        return run_branches(launch, console, lambda: _reopen(run_dir, console), export=export)


def sft_only(
    loaded: Loaded, output: Path | None = None, *, console: Console | None = None
) -> RunResult:
    """Only the supervised warm start of an experiment, exported as a model folder.

    Raises:
        ConfigError: the experiment has no `[sft]`, or as `run`.
    """
    if loaded.experiment.sft is None:
        raise ConfigError(
            "the experiment has no warm start: add a section [sft], or give sft.examples=4096"
        )
    console = console or Console()
    run_dir = create_run_dir(loaded, output)
    with supervising(run_dir):
        launch = _prepare_or_remove(loaded.experiment, run_dir, console)
        return run_warm_start(launch, console, lambda: _reopen(run_dir, console))


def run_seeds(
    loaded: Loaded,
    seeds: Sequence[int],
    output: Path | None = None,
    *,
    console: Console | None = None,
    export: bool = True,
) -> list[RunResult]:
    """Sibling runs NAME-seed0, NAME-seed1 ..., one after the other, and a table of all.

    A run that is interrupted ends the series; one that fails does not.
    """
    console = console or Console()
    done: list[RunResult] = []
    for seed in seeds:
        folder = output.with_name(f"{output.name}-seed{seed}") if output else None
        done.append(run(_sibling(loaded, seed), folder, console=console, export=export))
        if done[-1].status == "interrupted":
            break
    console.print(seeds_table(done))
    return done


def _sibling(loaded: Loaded, seed: int) -> Loaded:
    name = f"{loaded.experiment.name}-seed{seed}"
    return with_overrides(loaded, [f"seed={seed}", f'name="{name}"'], "--seeds")


def _prepare_or_remove(experiment: Experiment, run_dir: Path, console: Console) -> Launch:
    try:
        return _prepare(experiment, run_dir, console)
    except BaseException:
        shutil.rmtree(run_dir, ignore_errors=True)  # nothing in it is worth a second look
        raise


def _prepare(experiment: Experiment, run_dir: Path, console: Console) -> Launch:
    """Find the model while a process tries what the user gave.

    Raises:
        ConfigError: one of them cannot work.
    """
    launch = Launch(
        experiment=experiment, run=read_run(run_dir), run_dir=run_dir, model_dir=run_dir / "model"
    )
    child = preflight_plan(launch).start(run_dir, Path(launch.run.working_dir))
    try:
        model_dir = resolve_model(experiment.model, run_dir, lambda line: console.print(line))
        code = child.wait(PREFLIGHT_DEADLINE_S)
    finally:
        child.kill()
    if code is None:
        raise ConfigError(
            f"prompts and reward could not be tried within {PREFLIGHT_DEADLINE_S:.0f} s: importing "
            f'reward.name = "{experiment.reward.name}" or reading the prompts hangs'
        )
    if code != 0:
        error = child.error()
        if error is not None and error.type == ConfigError.__name__:
            raise ConfigError(error.message)
        raise SlipstreamError(f"trying prompts and reward failed: {child.why()}")
    run = update_run(run_dir, model_dir=str(model_dir))
    return dataclasses.replace(launch, run=run, model_dir=model_dir)


def resume(
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    console: Console | None = None,
    export: bool = True,
) -> RunResult:
    """Continue a run from its newest checkpoint, on a new branch.

    Args:
        run_dir: the run folder.
        overrides: `rollout.workers=12`; only keys that do not decide what is trained.
        console: where displays go; standard output when not given.
        export: whether the final policy is exported.
    Raises:
        ConfigError: it is no run, is running, has nothing left to do, or may not be changed so.
    """
    console, run_dir = console or Console(), run_dir.expanduser().absolute()
    read_run(run_dir)  # a folder that is no run is refused before anything is written into it
    for name in SUBFOLDERS:  # a copy of a run (`buffer.copy_to`) holds only what is needed
        (run_dir / name).mkdir(exist_ok=True)
    with supervising(run_dir):
        end_leftovers(run_dir, lambda line: console.print(line, highlight=False))
        launch = _reopen(run_dir, console, overrides)
        return run_branches(launch, console, lambda: _reopen(run_dir, console), export=export)


def _reopen(run_dir: Path, console: Console, overrides: Sequence[str] = ()) -> Launch:
    """Open the next branch of a run that ended.

    Raises:
        ConfigError: it is finished, may not be changed so, or its model is gone; no override is
            kept.
    """
    run_file = read_run(run_dir)
    if run_file.status == "finished":
        raise ConfigError(
            f"{run_dir} is finished; `slipstream run {run_dir}/resolved.toml learner.steps=...` "
            "starts a longer one"
        )
    experiment = change_experiment(run_dir, overrides) if overrides else read_experiment(run_dir)
    if (run_dir / "model" / "config.json").exists():  # also when the folder was moved, or is a copy
        run_file = update_run(run_dir, model_dir=str(run_dir / "model"))
    check_folder(Path(run_file.model_dir), experiment.model)
    if overrides:
        check_launcher(experiment)
    branches = (*run_file.branches, _next_branch(run_dir, run_file.branches, console))
    if overrides:
        write_resolved(run_dir, experiment)
    run_file = update_run(run_dir, branches=branches, status="running", reason="")
    return Launch(
        experiment=experiment, run=run_file, run_dir=run_dir, model_dir=Path(run_file.model_dir)
    )


def _next_branch(run_dir: Path, branches: Sequence[Branch], console: Console) -> Branch:
    """The branch that continues the newest checkpoint; without one, from the beginning."""
    number, root = branches[-1].branch + 1, run_dir / "checkpoints"
    if not complete_folders(root):
        _forget_journal(run_dir)
        console.print(f"{run_dir.name} has no checkpoint yet: it starts over", highlight=False)
        return Branch(branch=number, started_s=time.time())
    with contextlib.closing(Journal(run_dir, writable=False)) as journal:
        checkpoint, problems = find_checkpoint(root, ledger_sequence=journal.sequence)
    for problem in problems:
        console.print(f"passed over: {problem}", style="yellow", markup=False, highlight=False)
    parent = (checkpoint.version.branch, checkpoint.version.step)
    at = f"step {parent[1]} of branch {parent[0]}"
    console.print(f"{run_dir.name} continues from {at} as branch {number}", highlight=False)
    return Branch(branch=number, parent=parent, started_s=time.time())


def _forget_journal(run_dir: Path) -> None:
    """Start the prompt stream over.

    The first checkpoint is saved before the first version is published, so without a checkpoint
    nothing was generated, and there is nothing to lose.
    """
    for path in [*run_dir.glob("ledger.sqlite*"), run_dir / "proof.jsonl"]:
        path.unlink(missing_ok=True)
    shutil.rmtree(run_dir / "segments", ignore_errors=True)
    (run_dir / "segments").mkdir()


def stop(run_dir: Path, *, deadline_s: float = STOP_DEADLINE_S) -> str:
    """End a running run as Ctrl-C would, and wait for it.

    Returns:
        A line that says how it ended and how to continue.
    Raises:
        ConfigError: it is not running.
        SlipstreamError: it did not end in time.
    """
    run_dir = run_dir.expanduser().absolute()
    read_run(run_dir)
    pid = running_supervisor(run_dir)
    if pid is None:
        raise ConfigError(f"{run_dir} is not running (its status: {read_run(run_dir).status})")
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + deadline_s
    while running_supervisor(run_dir) == pid:
        if time.monotonic() > end:
            raise SlipstreamError(f"process {pid} did not end within {deadline_s:.0f} s")
        time.sleep(0.1)
    return f"{run_dir.name} {read_run(run_dir).status}; continue with: {resume_line(run_dir)}"
