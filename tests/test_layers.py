"""Who may import whom: configs -> rollout, learner -> buffer, kernels; never upwards."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MAY_IMPORT = {
    "kernels": set(),
    "buffer": set(),
    "rollout": {"buffer", "kernels"},
    "learner": {"buffer", "kernels"},
    "configs": {"rollout", "learner", "buffer", "kernels"},
}

IMPORTING_CALLS = ("import_module", "__import__", "find_spec", "resolve_name")


def sources() -> list[Path]:
    return sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def imported_names(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, int, str]]:
    """Yield (line, level, dotted name) of every import; relative ones resolved to slipstream.x.

    Args:
        tree: a module.
        package: the package it is in, such as ("slipstream", "rollout", "engines").
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, 0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (node.module or "").split(".") if node.module else []
            for alias in node.names:
                yield node.lineno, node.level, ".".join((*base, *module, alias.name))
        elif isinstance(node, ast.Call) and called_name(node) in IMPORTING_CALLS and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, 0, argument.value


def called_name(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def violations(text: str, path: str) -> list[str]:
    """What a module at `path` (relative to the root) may not import."""
    parts = Path(path).parts
    found = []
    for line, level, name in imported_names(ast.parse(text), ("slipstream", *parts[:-1])):
        first, _, rest = name.lstrip(".").partition(".")
        folder = rest.partition(".")[0]
        if level == 0 and (first == "slipstream" or first in MAY_IMPORT or name.startswith(".")):
            found.append(f"{path}:{line}: {name} must be imported relatively, by a statement")
        elif level and first != "slipstream":
            found.append(f"{path}:{line}: the import reaches above the package")
        elif level and folder != parts[0] and folder not in MAY_IMPORT[parts[0]]:
            found.append(f"{path}:{line}: {parts[0]} may not import {folder or 'slipstream'}")
    return found


def test_no_folder_imports_what_lies_above_it():
    found = [
        problem
        for path in sources()
        for problem in violations(path.read_text(), str(path.relative_to(ROOT)))
    ]
    assert not found, "\n".join(found)


def test_every_folder_of_code_has_a_rule():
    folders = {path.parent.name for path in ROOT.glob("*/config.py")} | {"kernels", "configs"}
    assert folders == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("rollout/worker.py", "from ..learner.config import LearnerConfig"),
        ("rollout/worker.py", "from .. import learner"),
        ("rollout/engines/native.py", "from ...learner import step"),
        ("learner/step.py", "from ..rollout.config import RolloutConfig"),
        ("buffer/replay.py", "from ..kernels import definition"),
        ("buffer/replay.py", "def f():\n    from ..configs import schema"),
        ("kernels/models.py", "from ..buffer.errors import ConfigError"),
        ("configs/plan.py", "import slipstream.buffer"),
        ("configs/plan.py", "from slipstream.buffer import config"),
        ("configs/plan.py", "import importlib\nimportlib.import_module('slipstream.buffer')"),
        ("buffer/replay.py", "from importlib import import_module\nimport_module('..configs')"),
        ("configs/plan.py", "import buffer.config"),
        ("configs/plan.py", "from ...elsewhere import thing"),
        ("configs/plan.py", "from .. import __version__"),
    ],
)
def test_a_planted_violation_is_found(path: str, text: str):
    assert violations(text, path)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("rollout/worker.py", "from ..buffer.records import Prompt\nfrom .engine import Engine"),
        ("rollout/engines/native.py", "from ...kernels import models\nfrom ..config import X"),
        ("configs/plan.py", "import os, rich.console\nfrom ..learner import config"),
        ("learner/step.py", "from .. import buffer"),
    ],
)
def test_what_is_allowed_is_not_a_violation(path: str, text: str):
    assert not violations(text, path)
