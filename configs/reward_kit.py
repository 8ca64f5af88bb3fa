"""`slipstream reward new | test | list`: rewards as packages of their own."""

import keyword
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from ..buffer.errors import ConfigError
from ..rollout.rewards.base import ENTRY_POINT_GROUP
from .load import load_table

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{package}"
version = "0.1.0"
description = "A reward for slipstream"
requires-python = ">=3.11"
dependencies = []  # slipstream itself is where you install this

[project.entry-points."{group}"]
{name} = "{name}:score"

[tool.setuptools]
py-modules = ["{name}"]
"""

MODULE = '''\
"""The reward `{name}`: 1 for the gold answer on the last line, 0 for anything else."""

from slipstream.buffer.records import Completion, Prompt, Score
from slipstream.rollout.rewards.base import Example, example


def score(completion: Completion, prompt: Prompt) -> Score:
    """What is paid for a completion.

    `completion.text` is what the policy wrote; `prompt.payload` holds the gold answer under
    `answer`, and every other column of the data. What raises here is recorded on the sample as a
    failure, with the reason; it never counts as 0.
    """
    lines = completion.text.strip().splitlines()
    right = bool(lines) and lines[-1].strip() == str(prompt.payload["answer"])
    return Score(value=float(right), components={{"right": float(right)}})


def examples() -> list[Example]:
    """Golden cases, which must score 1, and near misses, which must not."""
    return [
        example("4 + 3 is\\n7", correct=True, question="What is 4 + 3?", answer="7"),
        example("7", correct=True, question="What is 4 + 3?", answer="7"),
        example("7 or 8", correct=False, question="What is 4 + 3?", answer="7"),
        example("7\\nNo: 8", correct=False, question="What is 4 + 3?", answer="7"),
    ]
'''

TEST = '''\
"""`pytest` here, or `slipstream reward test .`"""

from pathlib import Path

import pytest
from slipstream.rollout.config import RewardConfig
from slipstream.rollout.rewards.kit import check

FINDINGS = check(RewardConfig(name=f"{{Path(__file__).with_name('{name}.py')}}:score"))


@pytest.mark.parametrize("finding", FINDINGS, ids=[each.check for each in FINDINGS])
def test_the_contract_of_a_reward_holds(finding):
    assert finding.ok, finding.detail
'''


def new(folder: Path) -> list[Path]:
    """Write a package with a reward, its golden cases, entry point and test.

    Args:
        folder: the package's folder; its name becomes the reward's.
    Returns:
        The files.
    Raises:
        ConfigError: the name is no Python name, the folder exists, or it cannot be written.
    """
    name = folder.name
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise ConfigError(
            f"{name!r} becomes a Python module: use small letters, digits and _, such as my_reward"
        )
    if name in (known := {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}):
        raise ConfigError(f"a reward {name!r} is installed already; choose another name than "
                          f"{', '.join(sorted(known))}")  # fmt: skip
    filled = {"name": name, "package": name.replace("_", "-"), "group": ENTRY_POINT_GROUP}
    files = {"pyproject.toml": PYPROJECT, f"{name}.py": MODULE, f"test_{name}.py": TEST}
    try:
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(text.format(**filled), encoding="utf-8")
    except FileExistsError:
        raise ConfigError(f"{folder} is there already; choose another name or remove it") from None
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}") from None
    return [folder / file for file in files]


def test(target: str, overrides: list[str]) -> tuple[bool, list[str]]:
    """Check a reward's contract.

    Args:
        target: a registered name, `module:function`, `file.py:function`, a file (its `score`), or a
            package folder (the first reward in its pyproject.toml).
        overrides: such as `reward.arguments.pattern=...` and `reward.timeout_s=2`.
    Returns:
        Whether all of it holds, and a line per finding.
    Raises:
        ConfigError: there is no such reward, or it cannot be loaded.
    """
    from ..rollout.rewards.kit import check

    table = {"reward": {"name": reward_name(target)}}
    findings = check(load_table(table, overrides).experiment.reward)
    lines = [
        f"{'ok  ' if each.ok else 'FAIL'}  {each.check}{': ' if each.detail else ''}{each.detail}"
        for each in findings
    ]
    failed = sum(not each.ok for each in findings)
    lines.append(f"{failed} of {len(findings)} fail" if failed else f"all {len(findings)} hold")
    return not failed, lines


def reward_name(target: str) -> str:
    """What `reward.name` would be.

    Raises:
        ConfigError: a folder without a reward in its pyproject.toml.
    """
    path = Path(target)
    if path.suffix == ".py":
        return f"{path}:score"
    if not path.is_dir():
        return target
    project = path / "pyproject.toml"
    try:
        points = tomllib.loads(project.read_text())["project"]["entry-points"][ENTRY_POINT_GROUP]
        module, _, attribute = next(iter(points.values())).partition(":")
    except (OSError, KeyError, StopIteration, ValueError, AttributeError):
        raise ConfigError(
            f'{project} names no reward under [project.entry-points."{ENTRY_POINT_GROUP}"]; add '
            "one, or name the function: file.py:function"
        ) from None
    for place in (path, path / "src"):
        for file in (f"{module.replace('.', '/')}.py", f"{module.replace('.', '/')}/__init__.py"):
            if (place / file).is_file():
                return f"{place / file}:{attribute}"
    raise ConfigError(
        f"{project} names {module}:{attribute}, but there is no {module}.py in {path}"
    )


def registered() -> Iterator[str]:
    """A line per registered reward: name, where it is, what it does."""
    points = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
    width = max((len(point.name) for point in points), default=0)
    for point in points:
        package = point.dist.name if point.dist else "?"
        try:
            text = (point.load().__doc__ or "").strip().partition("\n")[0]
        except Exception as error:  # somebody else's package
            text = f"cannot be imported: {type(error).__name__}: {error}"
        yield f"{point.name:<{width}}  {text}  ({package}: {point.value})"
