"""What a killed supervisor leaves ends before anybody goes on with the run."""

import errno
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slipstream.buffer.errors import SlipstreamError
from slipstream.buffer.filesystem import put_text
from slipstream.configs import leftovers as module
from slipstream.configs.leftovers import end_leftovers, leftovers

Start = Callable[[str, str], subprocess.Popen[bytes]]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "processes").mkdir()
    return tmp_path


@pytest.fixture
def start(run_dir: Path) -> Iterator[Start]:
    """Starts a process of the run as its launcher does: its spec is its last argument."""
    started: list[subprocess.Popen[bytes]] = []

    def start_one(name: str, script: str) -> subprocess.Popen[bytes]:
        spec = run_dir / "processes" / f"{name}.json"
        spec.write_text("{}")
        command = [sys.executable, "-c", script, "slipstream.module", str(spec)]
        process = subprocess.Popen(command)
        started.append(process)
        end = time.monotonic() + 10.0
        # Popen returns inside execve, before the kernel shows the new arguments.
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes() and time.monotonic() < end:
            time.sleep(0.01)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.wait()


def test_who_ends_by_itself_is_waited_for(run_dir: Path, start: Start) -> None:
    ends = start("buffer", "import time; time.sleep(1)")
    assert leftovers(run_dir) == {"buffer": ends.pid}
    said: list[str] = []
    end_leftovers(run_dir, said.append)
    assert ends.wait(10) == 0
    assert said == [f"waiting for what a killed supervisor left: buffer (pid {ends.pid})"]


def test_who_is_frozen_is_killed_and_named(
    run_dir: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.3)
    frozen = start("learner-1", "import time; time.sleep(600)")
    os.kill(frozen.pid, signal.SIGSTOP)
    said: list[str] = []
    end_leftovers(run_dir, said.append)
    assert frozen.wait(10) == -signal.SIGKILL
    assert f"learner-1 (pid {frozen.pid})" in said[1]


def test_who_may_not_be_killed_is_named(
    run_dir: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    monkeypatch.setattr(module, "KILL_S", 0.1)
    other = start("buffer", "import time; time.sleep(600)")

    def forbidden(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", forbidden)
        with pytest.raises(
            SlipstreamError, match=rf"not even SIGKILL ends buffer \(pid {other.pid}"
        ):
            end_leftovers(run_dir, lambda line: None)


def test_other_processes_are_left_alone(run_dir: Path, tmp_path: Path, start: Start) -> None:
    """One of another run, and one that only names a file of this run."""
    start("worker-0", "import time; time.sleep(600)")
    spec = str(run_dir / "processes" / "worker-0.json")
    other = tmp_path / "other"
    (other / "processes").mkdir(parents=True)
    assert leftovers(other) == {}
    looks = subprocess.Popen(["tail", "-f", "/dev/null", spec], stdout=subprocess.DEVNULL)
    try:
        assert list(leftovers(run_dir)) == ["worker-0"]
        assert looks.pid not in leftovers(run_dir).values()
    finally:
        looks.kill()
        looks.wait()


def far_rank(run_dir: Path, beat: int, host: str = "elsewhere") -> Path:
    """What a learner on another node publishes."""
    path = run_dir / "processes" / "learner.waits.json"
    put_text(
        path, json.dumps({"pid": 7, "beat": beat, "loop_silent_s": 0, "waits": [], "host": host})
    )
    return path


@pytest.mark.parametrize("beats", [0, 12])
def test_a_learner_on_another_node_is_waited_for_until_it_is_silent(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, beats: int
) -> None:
    monkeypatch.setattr(module, "QUIET_S", 1.0)
    far_rank(run_dir, 0)
    spoke = [time.monotonic()]

    def speak() -> None:
        for beat in range(1, beats + 1):
            time.sleep(0.1)
            far_rank(run_dir, beat)
            spoke[0] = time.monotonic()

    speaker = threading.Thread(target=speak)
    speaker.start()
    said: list[str] = []
    end_leftovers(run_dir, said.append)
    assert time.monotonic() - spoke[0] >= 0.9
    speaker.join()
    assert said == [
        "waiting until learner ranks on other nodes are silent: learner (pid 7 on elsewhere)"
    ]


def test_a_learner_that_goes_on_on_another_node_is_named_and_the_run_is_left_to_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUIET_S", 1.0)
    monkeypatch.setattr(module, "PATIENCE_S", 0.5)
    beats = itertools.count()
    monkeypatch.setattr(module, "_far_ranks", lambda run_dir: {"learner (pid 7 on n)": next(beats)})
    with pytest.raises(SlipstreamError, match=r"still runs on another node \(learner \(pid 7 on n"):
        end_leftovers(run_dir, lambda line: None)


@pytest.mark.parametrize("fails", ["read_bytes", "stat"])
def test_a_look_that_fails_neither_ends_the_wait_for_a_learner_elsewhere_nor_prolongs_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    monkeypatch.setattr(module, "QUIET_S", 1.0)
    path, looks, does = far_rank(run_dir, 0), itertools.count(), getattr(Path, fails)
    spoke = [time.monotonic()]

    def look(self: Path, **options: Any) -> Any:
        if self == path and (number := next(looks)):
            if number == 5:
                far_rank(run_dir, 1)
                spoke[0] = time.monotonic()
            if number % 2:
                raise OSError(errno.ESTALE, "Stale file handle")
        return does(self, **options)

    monkeypatch.setattr(Path, fails, look)
    end_leftovers(run_dir, lambda line: None)
    assert next(looks) > 6
    assert 0.9 <= time.monotonic() - spoke[0] < 1.9


@pytest.mark.parametrize("host", ["elsewhere", platform.node()])
def test_nobody_waits_for_a_learner_that_ended_long_ago_or_was_here(
    run_dir: Path, host: str
) -> None:
    path = far_rank(run_dir, 3, host)
    if host == "elsewhere":
        os.utime(path, (0, 0))
    began = time.monotonic()
    end_leftovers(run_dir, lambda line: pytest.fail(line))
    assert time.monotonic() - began < 2.0
