"""What is installed: exactly our folders, under `slipstream.`, and enough to run `plan`."""

import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE_FOLDERS = ("buffer", "configs", "kernels", "learner", "rollout")
PLAN_NEEDS = ("pydantic", "typer", "rich", "msgspec", "numpy")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def source_files() -> list[Path]:
    """Files of the code folders, relative to the root."""
    files = (file for folder in CODE_FOLDERS for file in (ROOT / folder).rglob("*"))
    kept = [file for file in files if file.is_file() and file.suffix != ".pyc"]
    return [file.relative_to(ROOT) for file in kept]


def is_data_of_a_package_above(file: Path) -> bool:
    """Whether a pattern of package-data reaches into the folder, which is no package then."""
    data = project()["tool"]["setuptools"]["package-data"]
    patterns = [
        str(Path(*package.split(".")[1:], pattern))
        for package, own in data.items()
        for pattern in own
        if "/" in pattern
    ]
    return any(file.match(pattern) for pattern in patterns)


def test_packages_list_equals_the_folders_on_disk():
    files = [file for file in source_files() if not is_data_of_a_package_above(file)]
    on_disk = {".".join(("slipstream", *file.parent.parts)) for file in files}
    assert set(project()["tool"]["setuptools"]["packages"]) == on_disk


def test_only_kernels_has_no_init():
    with_code = {file.parent for file in source_files() if file.suffix == ".py"}
    missing = {str(folder) for folder in with_code if not (ROOT / folder / "__init__.py").is_file()}
    assert missing <= {"kernels"}


def test_entry_points_name_things_that_exist():
    for name, target in project()["project"]["entry-points"]["slipstream.rewards"].items():
        module, _, attribute = target.partition(":")
        path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert f"class {attribute}" in path.read_text(), f"reward {name}: {target}"


def test_ray_comes_with_what_lists_its_ports():
    assert any(
        each.startswith("psutil") for each in project()["project"]["optional-dependencies"]["ray"]
    )


def pip(command: str, *arguments: str, python: Path = Path(sys.executable)) -> None:
    start = [sys.executable, "-m", "pip", "--python", str(python), command, "--no-deps"]
    done = subprocess.run([*start, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that no build folder is left in the tree."""
    copy = tmp_path_factory.mktemp("source")
    for folder in CODE_FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(copy / "dist"), str(copy))
    return next((copy / "dist").glob("*.whl"))


def test_the_wheel_holds_our_files_under_slipstream_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {f"slipstream/{file}" for file in source_files()}


def needed_distributions(names: tuple[str, ...]) -> set[str]:
    """The distributions and all they require, extras aside."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another platform or Python
        found.add(name)
        plain = (line for line in requires if "extra ==" not in line)
        waiting += [re.match(r"[\w.-]+", line)[0] for line in plain]  # type: ignore[index]
    return found


def link_into(site: Path, distribution: str) -> None:
    """Make an installed distribution visible in another environment, without downloading it."""
    for file in metadata.files(distribution) or []:
        top = file.parts[0]
        source = Path(str(metadata.distribution(distribution).locate_file(top)))
        if top != ".." and source.exists() and not (site / top).exists():
            (site / top).symlink_to(source)


def test_the_wheel_runs_plan_in_an_empty_environment(wheel: Path, tmp_path: Path):
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip("install", "--no-index", str(wheel), python=python)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    for distribution in needed_distributions(PLAN_NEEDS):
        link_into(site, distribution)
    done = subprocess.run(
        [str(python.parent / "slipstream"), "plan", "quickstart"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "learner.prompts_per_step" in done.stdout
    assert not (site / "kernels").exists()  # it would shadow Hugging Face's package of that name
