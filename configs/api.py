"""Training from Python: `slipstream.configs.train(...)`, in a script or a notebook.

    from slipstream.configs import train

    def reward(prompts, completions, **columns):
        return [float(len(text) < 20) for text in completions]

    done = train(rewards=[reward], dataset=[{"prompt": "Hi"}, ...], learner__steps=5)

Every setting of an experiment is an argument; the equivalent TOML is printed.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..buffer.errors import ConfigError
from .launch import run
from .load import Loaded, load_table
from .result import RunResult
from .toml import Table
from .user_code import SourceFile, import_name

RewardLike = Callable[..., Any] | str
RowsLike = Any
"""A list of dicts, a path, a data set's name, or a `datasets.Dataset`."""

Writer = Callable[[Path], None]

SUM = "slipstream.rollout.rewards.combined:Sum"
REWARDS_FILE = "user_rewards.py"
ROWS_FILE = "prompts.jsonl"


def train(
    model: str | Path | None = None,
    rewards: RewardLike | Sequence[RewardLike] = (),
    dataset: RowsLike = None,
    output: str | Path | None = None,
    *,
    console: Console | None = None,
    export: bool = True,
    **overrides: Any,
) -> RunResult:
    """Train, evaluate and export; prints the equivalent TOML first.

    Args:
        model: as `model` in an experiment; a Hugging Face folder or a built-in name.
        rewards: functions in our form or TRL's, or names; several are summed, and each is logged
            as a component. A function that other processes cannot import (typed into this script
            or notebook) is copied to `user_rewards.py` in the run folder.
        dataset: rows with a `prompt` (text or chat); other columns are handed to the rewards.
        output: the run folder; a new one in `runs_dir` when not given.
        console: where displays go.
        export: whether the final policy is exported.
        **overrides: any setting: `learner__steps=5`, `learner={"steps": 5}` or
            `**{"learner.steps": 5}`; `extends="quickstart"` starts from a shipped experiment.
    Raises:
        ConfigError: a setting is wrong, or a reward cannot be found by other processes.
    """
    console = console or Console()
    table = nested(overrides)
    if model is not None:
        table["model"] = str(model)
    run_dir = _choose_folder(table, output)
    files: dict[str, Writer] = {}
    _add_dataset(table, dataset, run_dir, files)
    _add_rewards(table, rewards, run_dir, files)
    loaded = load_table(table, source="train(...)", name=run_dir.name if output else "train")
    console.print(equivalent_toml(loaded), markup=False, highlight=False, soft_wrap=True)
    return run(loaded, run_dir, console=console, export=export, files=files)


def equivalent_toml(loaded: Loaded) -> str:
    """What to put into a file for `slipstream run`."""
    return f"# equivalent experiment:\n{loaded.source_text.rstrip()}\n"


def nested(overrides: Mapping[str, Any]) -> Table:
    """`learner__steps`, `learner.steps` and `learner={...}` as one nested table.

    Raises:
        ConfigError: two of them contradict each other.
    """
    table: Table = {}
    for key, value in overrides.items():
        *sections, last = key.replace("__", ".").split(".")
        here = table
        for section in sections:
            here = here.setdefault(section, {})
            if not isinstance(here, dict):
                raise ConfigError(f"{key} contradicts {section} = {here!r}")
        if isinstance(value, Mapping) and isinstance(here.get(last), dict):
            here[last] |= value
        else:
            here[last] = _plain(value)
    return table


def _plain(value: Any) -> Any:
    """A value that TOML can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _section(table: Table, name: str) -> Table:
    return table.setdefault(name, {})


def _choose_folder(table: Table, output: str | Path | None) -> Path:
    """The run folder, known early because the user's files in it are named in the config."""
    if output is not None:
        return Path(output).expanduser().absolute()
    name, stamp = table.get("name", "train"), time.strftime("%Y%m%d-%H%M%S")
    unique = os.urandom(2).hex()
    return Path(table.get("runs_dir", "runs")).expanduser().absolute() / f"{name}-{stamp}-{unique}"


def _add_dataset(table: Table, dataset: RowsLike, run_dir: Path, files: dict[str, Writer]) -> None:
    """Point `[prompts]` at the data; rows in memory become a file of the run."""
    if dataset is None:
        return
    prompts = _section(table, "prompts")
    prompts["source"] = "dataset"
    if isinstance(dataset, str | Path):
        prompts["path"] = str(dataset)
        return
    prompts["path"] = str(run_dir / ROWS_FILE)
    columns, count = _shape(dataset)
    files[ROWS_FILE] = lambda path: _write_rows(path, dataset)
    if "answer" not in columns:
        prompts.setdefault("answer_column", "")
    if "held_out" not in prompts and count < 10 * 512:
        # The default would leave little or nothing of a small data set to train on.
        prompts["held_out"] = count // 10
        if count < 10:
            _section(table, "eval").setdefault("enabled", False)


def _shape(dataset: RowsLike) -> tuple[set[str], int]:
    """Column names and number of rows.

    Raises:
        ConfigError: it is not a table.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        if isinstance(columns, Mapping):
            raise ConfigError(
                f"dataset has the splits {', '.join(columns)}; pass one of them: dataset['train']"
            )
        return set(columns), len(dataset)
    if isinstance(dataset, Sequence) and dataset and all(isinstance(r, Mapping) for r in dataset):
        return set().union(*dataset), len(dataset)
    raise ConfigError(
        f"dataset is a {type(dataset).__name__}; it must be a path, a list of dicts that is not "
        "empty, or a datasets.Dataset"
    )


def _write_rows(path: Path, dataset: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in dataset:
            file.write(json.dumps(row, default=str, ensure_ascii=False) + "\n")


def _add_rewards(
    table: Table,
    rewards: RewardLike | Sequence[RewardLike],
    run_dir: Path,
    files: dict[str, Writer],
) -> None:
    """Name the rewards in `[reward]`; those nobody else can import become a file of the run."""
    given = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
    if not given:
        return
    source = SourceFile()
    names = [_reward_name(reward, source, run_dir / REWARDS_FILE) for reward in given]
    if source:
        files[REWARDS_FILE] = lambda path: _write_text(path, source.text())
    reward = _section(table, "reward")
    reward["name"] = names[0] if len(names) == 1 else SUM
    if len(names) > 1:
        reward["arguments"] = {**reward.get("arguments", {}), "rewards": names}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _reward_name(reward: RewardLike, source: SourceFile, file: Path) -> str:
    """What `reward.name` says of one reward.

    Raises:
        ConfigError: it is an object that no other process can rebuild.
    """
    if isinstance(reward, str):
        path, colon, name = reward.partition(":")
        return f"{Path(path).resolve()}:{name}" if colon and path.endswith(".py") else reward
    if not hasattr(reward, "__qualname__"):
        raise ConfigError(
            f"the reward {reward!r} is an instance, which other processes cannot rebuild; pass "
            "its class by name and its arguments as reward={'arguments': {...}}, or a function"
        )
    name = import_name(reward)
    if name is None:
        source.add(reward)
        name = f"{file}:{reward.__name__}"
    return name
