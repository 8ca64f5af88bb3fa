"""The command line: `slipstream ...`. Each command is one call of a function that scripts can use.

Imports of each command are inside it, so that `--help` and `plan` answer at once.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..buffer.errors import SlipstreamError

INTERRUPTED_EXIT_CODE = 130

app = typer.Typer(
    name="slipstream",
    help="Asynchronous RL post-training for language models.",
    epilog="Start here: `slipstream run quickstart`. Your own: `slipstream new NAME`.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ExperimentArgument = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help="A .toml file or a shipped name: quickstart.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as learner.steps=5.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
ExportOption = Annotated[
    bool, typer.Option("--export/--no-export", help="Whether a finished run is exported.")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Run folder; else one is made in runs_dir.")
]


@app.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    """Asynchronous RL post-training for language models."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Of the experiment; NAME.toml is written.")],
    extends: Annotated[str, typer.Option(help="What it starts from.")] = "quickstart",
) -> None:
    """Write a commented experiment file."""
    from .new import write_experiment

    path = write_experiment(Path(name), extends)
    print(f"wrote {path}; next: slipstream plan {path}")


@app.command()
def plan(
    experiment: ExperimentArgument,
    overrides: OverridesArgument = None,
    all: Annotated[bool, typer.Option("--all", help="Defaults, too.")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also a learner rank's real step, without data.")
    ] = False,
) -> None:
    """Say what a run would do: every value and its origin, batches, staleness, memory."""
    from rich.console import Console

    from .load import load_experiment
    from .plan import make_plan, plan_text, print_plan

    loaded = load_experiment(experiment, overrides or ())
    if sys.stdout.isatty():
        print_plan(make_plan(loaded), Console(), show_all=all)
    else:
        print(plan_text(loaded, show_all=all), end="")
    if deep:
        from .deep import dry_run, require_fit, sentences

        found = dry_run(loaded.experiment)
        print("\nOne learner rank, its step run without data")
        for sentence in sentences(loaded.experiment, found):
            print(f"  - {sentence}")
        require_fit(loaded.experiment, found)


@app.command()
def diff(
    one: Annotated[str, typer.Argument(help="An experiment, a TOML file or a run folder.")],
    other: Annotated[str, typer.Argument(help="What it is compared with.")],
) -> None:
    """Say in which settings two experiments or runs differ, defaults included."""
    from .load import load_experiment
    from .plan import differences

    folders = [Path(name) for name in (one, other)]
    found = differences(
        *(load_experiment(f / "resolved.toml" if f.is_dir() else str(f)) for f in folders)
    )
    if not found:
        print("no setting differs")
        return
    width = max(len(key) for key, _, _ in found)
    for key, ours, theirs in found:
        print(f"{key:{width}}  {ours}  ->  {theirs}")


@app.command()
def run(
    experiment: ExperimentArgument,
    overrides: OverridesArgument = None,
    seeds: Annotated[str, typer.Option(help="Sibling runs, one after another: 0,1,2.")] = "",
    output: OutputOption = None,
    export: ExportOption = True,
    launcher: Annotated[str, typer.Option(help="`local` or `ray`; else the experiment's.")] = "",
    address: Annotated[str, typer.Option(help="Of the Ray cluster: auto, or HOST:PORT.")] = "",
) -> None:
    """Train, evaluate and export."""
    from . import launch
    from .load import load_experiment

    given = [*(overrides or ())]
    given += [f"launcher={launcher}"] if launcher else []
    given += [f'cluster.address="{address}"'] if address else []
    numbers, loaded = _seeds(seeds), load_experiment(experiment, given)
    if numbers:
        runs = launch.run_seeds(loaded, numbers, output, export=export)
    else:
        runs = [launch.run(loaded, output, export=export)]
    raise typer.Exit(max(each.exit_code for each in runs))


def _seeds(text: str) -> list[int]:
    """`0,1,2` as numbers; none when the option was not given."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"{text!r} must look like 0,1,2", param_hint="--seeds") from None


@app.command()
def resume(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="rollout.workers, launcher or cluster.KEY, to change it."
        ),
    ] = None,
    export: ExportOption = True,
) -> None:
    """Continue a run from its last checkpoint, on a new branch."""
    from . import launch

    raise typer.Exit(launch.resume(run, overrides or (), export=export).exit_code)


@app.command()
def stop(run: RunArgument) -> None:
    """End a running run: it saves a checkpoint first."""
    from . import launch

    print(launch.stop(run))


@app.command()
def scale(
    run: RunArgument,
    rollout_workers: Annotated[int, typer.Option(help="How many there shall be.")],
) -> None:
    """Let rollout workers join or leave a running run."""
    from .scaling import request

    print(request(run, rollout_workers))


cluster = typer.Typer(help="Start, look at and end a Ray cluster.", no_args_is_help=True)
app.add_typer(cluster, name="cluster")


@cluster.command()
def up(
    hosts: Annotated[Path | None, typer.Argument(metavar="[hosts.toml]", help="Over ssh.")] = None,
    local: Annotated[int, typer.Option(help="So many nodes on this machine.")] = 0,
    cpus: Annotated[int | None, typer.Option(help="Of each local node; else all.")] = None,
    gpus: Annotated[int | None, typer.Option(help="Of each local node; else all.")] = None,
) -> None:
    """Start Ray: several nodes on this machine, or one on each host."""
    from . import ray_cluster

    if (hosts is None) == (local == 0):
        raise typer.BadParameter("give either hosts.toml or --local N")
    started = (
        ray_cluster.up_local(local, cpus=cpus, gpus=gpus)
        if hosts is None
        else ray_cluster.up_hosts(hosts)
    )
    print(f"Ray is up at {started.address}; `slipstream cluster down` ends it")


@cluster.command()
def status() -> None:
    """The nodes and what is free on them."""
    from . import ray_cluster

    print("\n".join(ray_cluster.status()))


@cluster.command()
def down() -> None:
    """End the cluster that `up` started."""
    from . import ray_cluster

    print("\n".join(ray_cluster.down()))


@app.command()
def submit(
    experiment: ExperimentArgument,
    overrides: OverridesArgument = None,
    address: Annotated[str, typer.Option(help="auto, or the job server's.")] = "auto",
) -> None:
    """Run an experiment as a job of a Ray cluster."""
    from . import ray_cluster

    job, follow = ray_cluster.submit(experiment, overrides or (), address)
    print(f"submitted {job}; follow it with: {follow}")


@app.command()
def buffer(run: RunArgument) -> None:
    """What the buffer of a run holds: states, law, lags, leases, drops, waits."""
    from .looking import look

    print("\n".join(look(run)))


@app.command()
def doctor(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder.")] = None,
    address: Annotated[
        str, typer.Option(help="All nodes of this Ray cluster: auto, or its head.")
    ] = "",
) -> None:
    """Say what a run waits for, alive or dead; without RUN, whether this machine can run one."""
    from .doctor import report

    ok, lines = report(run, address, Path.cwd())
    print("\n".join(lines))
    raise typer.Exit(0 if ok else 1)


@app.command()
def sft(
    experiment: ExperimentArgument,
    overrides: OverridesArgument = None,
    output: OutputOption = None,
) -> None:
    """Only the supervised warm start of an experiment, exported as a model folder."""
    from . import launch
    from .load import load_experiment

    raise typer.Exit(
        launch.sft_only(load_experiment(experiment, overrides or ()), output).exit_code
    )


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    checkpoint: Annotated[str, typer.Option(help="Such as step-000010.b0; else the newest.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32; else as trained.")] = "",
) -> None:
    """Write the trained model as a Hugging Face folder and verify it by reloading."""
    from .exporting import export as export_model

    done = export_model(run, out, checkpoint or None, dtype or None)
    print(f"export {done.path} ok: {done.check}")


@app.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A model folder, or a run: its checkpoint.")],
    overrides: OverridesArgument = None,
    experiment: Annotated[str, typer.Option(help="Else that of the run FOLDER lies in.")] = "",
    every: Annotated[bool, typer.Option("--every", help="All checkpoints of the run.")] = False,
    engine: Annotated[str, typer.Option(help="native or vllm; else the experiment's.")] = "",
    jsonl: Annotated[bool, typer.Option("--jsonl", help="One JSON object a line.")] = False,
) -> None:
    """Score a model on held-out prompts: mean reward and pass@k, with 95% intervals."""
    import json

    from .evaluating import evaluate as lines
    from .evaluating import table

    given = [*(overrides or []), *([f"rollout.engine={engine}"] if engine else [])]
    for line in lines(folder, experiment, given, every=every):
        print(json.dumps(line) if jsonl else table(line), flush=True)


@app.command()
def audit(run: RunArgument) -> None:
    """Check that every prompt issued is trained, dropped for a reason, or open."""
    from .audit import audit_run

    report = audit_run(run)
    print(*report.lines(), sep="\n")
    raise typer.Exit(0 if report.ok else 1)


reward = typer.Typer(help="Write, test and list rewards.", no_args_is_help=True)
app.add_typer(reward, name="reward")


@reward.command("new")
def reward_new(
    folder: Annotated[Path, typer.Argument(metavar="NAME", help="The package's folder.")],
) -> None:
    """Write a package with a reward, golden cases, an entry point and a test."""
    from . import reward_kit

    for path in reward_kit.new(folder):
        print(f"wrote {path}")
    print(f"next: slipstream reward test {folder}; pip install -e {folder}")


@reward.command("test")
def reward_test(
    target: Annotated[str, typer.Argument(metavar="NAME_OR_PATH")],
    overrides: OverridesArgument = None,
) -> None:
    """Check a reward's contract: golden cases, determinism, time-out, odd text."""
    from . import reward_kit

    ok, lines = reward_kit.test(target, overrides or [])
    print("\n".join(lines))
    raise typer.Exit(0 if ok else 1)


@reward.command("list")
def reward_list() -> None:
    """The rewards that are installed."""
    from . import reward_kit

    for line in reward_kit.registered():
        print(line)


class Pick(StrEnum):
    """Which rollouts `show` shows."""

    BEST = "best"
    WORST = "worst"
    STALE = "stale"
    FAILED = "failed"
    ALL = "all"


@app.command()
def show(
    run: RunArgument,
    step: Annotated[int | None, typer.Option(help="Which learner step; else the newest.")] = None,
    pick: Annotated[Pick, typer.Option(help="Which rollouts.")] = Pick.BEST,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="One JSON object a line.")] = False,
    prompt: Annotated[int | None, typer.Option(help="Why this prompt got its samples.")] = None,
) -> None:
    """Read the rollouts of a step: tokens by version, rewards, advantages, drop reasons."""
    from .show import show as show_step
    from .why import why

    if prompt is not None:
        print(why(run, prompt))
        return
    show_step(run, step, pick.value, jsonl=jsonl, limit=limit)


def main() -> None:
    """The `slipstream` script: errors are one clear message and their exit code."""
    try:
        app()
    except SlipstreamError as error:
        _print_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), (message, "red")))


if __name__ == "__main__":
    main()
