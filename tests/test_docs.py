"""README and docs/: every command runs as printed, every file loads, every link leads somewhere.

Fenced blocks carry what the test needs to know behind their language: `title="x.toml"` is written
to that file before the commands below it run, `slow` leaves commands to `make test-long`.
All pages share one folder, as a reader's would.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
import pytest
from slipstream.configs.cli import app
from slipstream.configs.load import load_experiment
from slipstream.configs.ray_cluster import Hosts
from slipstream.configs.schema import all_keys, all_sections

ROOT = Path(__file__).parents[1]
ORDER = (
    "README.md", "docs/first-run.md", "docs/model-and-data.md", "docs/reward.md",
    "docs/environment.md", "docs/run-folder.md", "docs/staleness.md", "docs/sizing.md",
    "docs/architecture.md", "docs/config.md", "docs/coming-from.md", "docs/cluster.md",
    "docs/vllm.md", "docs/gpu.md",
)  # fmt: skip
"""As a reader goes on; later pages use what earlier ones made."""
NEEDS: dict[str, tuple[str, ...]] = {
    "docs/run-folder.md": ("docs/first-run.md",),
    "docs/sizing.md": ("docs/first-run.md",),
}
"""Pages that must have run before, also when the test of one page runs alone."""
TIMEOUT_S = 240
LEAVE_S = 15
"""A process that sees its parent gone ends within this."""
LANGUAGES = {"bash", "python", "toml", "jsonl", "text"}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`slipstream ([a-z]+)")
LINK = re.compile(r"\]\(([^)#:]*)(#[^)]*)?\)")
FILES = (".py", ".md", ".toml", ".jsonl")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    info: str
    text: str

    @property
    def title(self) -> str:
        """The file it is; empty when it is none."""
        found = re.search(r'title="([^"]+)"', self.info)
        return found[1] if found else ""

    @property
    def is_make(self) -> bool:
        """Whether it is for make, which CI runs itself."""
        return all(line.startswith("make ") for line in self.text.splitlines())


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """The fenced blocks of a page, in its order."""
    text = (ROOT / page).read_text()
    return tuple(_blocks(page, text))


def _blocks(page: str, text: str) -> Iterator[Block]:
    for found in FENCE.finditer(text):
        language, _, info = found[1].partition(" ")
        yield Block(page, text.count("\n", 0, found.start()) + 1, language, info, found[2])


ALL = [block for page in ORDER for block in blocks(page)]


def named(chosen: list[Block]) -> list:
    """Parameters with the place as their name."""
    return [pytest.param(block, id=f"{block.page}:{block.line}") for block in chosen]


class Reader:
    """Somebody who types a page's commands into a shell, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: set[str] = set()

    def read(self, page: str) -> None:
        """Write the page's files and run its commands, once; slow ones are left out."""
        if page in self._read:
            return
        for needed in NEEDS.get(page, ()):
            self.read(needed)
        for block in blocks(page):
            if block.title:
                (self.folder / block.title).write_text(block.text)
            elif block.language == "bash" and block.info != "slow" and not block.is_make:
                self.run(block)
        self._read.add(page)

    def run(self, block: Block) -> None:
        """Run a block as it stands; any command that fails ends it."""
        bin_folder = Path(sys.executable).parent
        environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
        # Into a file and a session of its own: killing bash alone would leave its commands running,
        # and a pipe that they hold open would be waited for without end.
        with tempfile.TemporaryFile("w+") as printed:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", block.text],
                cwd=self.folder, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                ended = f"exit code {process.wait(TIMEOUT_S)}"
            except subprocess.TimeoutExpired:
                ended = f"nothing after {TIMEOUT_S} s"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            printed.seek(0)
            said = f"{block.page}:{block.line}\n{block.text}\n{printed.read()}"
        assert ended == "exit code 0", f"{said}\n{ended}"
        deadline_s = time.monotonic() + LEAVE_S
        while left := self._processes():
            assert time.monotonic() < deadline_s, f"{said}\nleft running: {left}"
            time.sleep(0.1)

    def _processes(self) -> list[str]:
        """What still runs in our folder."""
        found = []
        for process in psutil.process_iter(["cmdline", "cwd", "status"]):
            info = process.info
            ours = (info["cwd"] or "").startswith(str(self.folder))
            if ours and info["status"] != psutil.STATUS_ZOMBIE:
                found.append(" ".join(info["cmdline"] or ()))
        return found


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("reader"))


@pytest.mark.parametrize("page", [page for page in ORDER if blocks(page) and page not in NEEDS])
def test_commands_of_a_page_and_of_those_that_go_on_from_it_work_as_printed(
    page: str, reader: Reader
) -> None:
    reader.read(page)
    for later, needed in NEEDS.items():  # here, lest another process must begin from the first
        if page in needed:
            reader.read(later)


@pytest.mark.slow
@pytest.mark.parametrize("block", named([block for block in ALL if block.info == "slow"]))
def test_slow_commands_work_as_printed(block: Block, reader: Reader) -> None:
    reader.read(block.page)
    reader.run(block)


def test_every_page_is_read() -> None:
    pages = {"README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))}
    assert set(ORDER) == pages


@pytest.mark.parametrize("block", named(ALL))
def test_every_block_says_what_it_is(block: Block) -> None:
    assert block.language in LANGUAGES
    assert not block.info or block.info == "slow" or block.info == f'title="{block.title}"'


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    lines = [line for block in ALL if block.is_make for line in block.text.splitlines()]
    assert lines == ["make run", "make test", "make gpu-check"]
    for line in lines:
        assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line


@pytest.mark.parametrize("block", named([b for b in ALL if b.language == "python"]))
def test_python_compiles(block: Block) -> None:
    compile(block.text, f"{block.page}:{block.line}", "exec")


@pytest.mark.parametrize("block", named([b for b in ALL if b.language == "toml"]))
def test_toml_is_an_experiment_or_a_package(block: Block, tmp_path: Path) -> None:
    table = tomllib.loads(block.text)
    if "project" in table:
        return
    if block.title == "hosts.toml":
        msgspec.convert(table, Hosts)
        return
    for each in blocks(block.page):  # those that it extends
        if each.title:
            (tmp_path / each.title).write_text(each.text)
    path = tmp_path / (block.title or "untitled.toml")
    path.write_text(block.text if "extends" in table else f'extends = "quickstart"\n{block.text}')
    load_experiment(path)


@pytest.mark.parametrize("page", ORDER)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target, anchor in LINK.findall(path.read_text()):
        there = (path.parent / target).resolve() if target else path
        assert there.is_file(), f"{page} links to {target}"
        if anchor:
            assert anchor[1:] in anchors(there), f"{page} links to {target}{anchor}"


def anchors(path: Path) -> set[str]:
    """What the headings of a page are linked as."""
    headings = HEADING.findall(FENCE.sub("", path.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ORDER)
def test_commands_named_in_sentences_exist(page: str) -> None:
    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    known |= {group.name for group in app.registered_groups if group.name}
    assert set(INLINE.findall((ROOT / page).read_text())) <= known


@pytest.mark.parametrize("page", ORDER)
def test_keys_named_in_sentences_exist(page: str) -> None:
    sections = {path.partition(".")[0] for path in all_sections() if path}
    known = {key.path for key in all_keys()} | set(all_sections())
    text = FENCE.sub("", (ROOT / page).read_text())
    if page == "docs/coming-from.md":  # the first column of its tables is theirs
        text = "\n".join(row.split("|")[2] for row in text.splitlines() if row.count("|") > 3)
    for name in re.findall(r"`([a-z]+(?:\.[a-z_]+)+)(?:=[^`]*| = [^`]*)?`", text):
        if name.partition(".")[0] in sections and not name.endswith(FILES):
            assert name in known, f"{page} names {name}"
