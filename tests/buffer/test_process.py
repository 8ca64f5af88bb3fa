"""The boundary of a process: its error is recorded, and it does not outlive its parent."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slipstream.buffer import errors

BODY = """
import asyncio, sys
from pathlib import Path
from slipstream.buffer.errors import ConfigError
from slipstream.buffer.process import run_process

async def main():
    {body}

run_process("toy", Path(sys.argv[1]), main())
"""


def start(tmp_path: Path, body: str) -> subprocess.Popen[bytes]:
    """A process whose main coroutine has this body."""
    script = tmp_path / "toy.py"
    script.write_text(BODY.format(body=body))
    with (tmp_path / "log").open("wb") as log:
        return subprocess.Popen([sys.executable, script, tmp_path], stderr=log, stdout=log)


@pytest.mark.parametrize(
    ("body", "code", "kind"),
    [
        ("return None", 0, None),
        ("raise ConfigError('key: no')", 2, "ConfigError"),
        ("raise KeyError('surprise')", 1, "KeyError"),
        ("raise ExceptionGroup('g', [KeyError('k'), ConfigError('key: no')])", 2, "ConfigError"),
    ],
)
def test_the_exit_code_and_the_record_say_what_happened(
    tmp_path: Path, body: str, code: int, kind: str | None
) -> None:
    process = start(tmp_path, body)
    assert process.wait(20) == code
    record = tmp_path / "processes" / "toy.error.json"
    assert record.exists() == (kind is not None)
    if kind is not None:
        assert json.loads(record.read_text())["type"] == kind
        assert json.loads(record.read_text())["exit_code"] == code
    assert (tmp_path / "processes" / "toy.pid").read_text().strip() == str(process.pid)


def test_sigterm_ends_it_cleanly_and_sigint_is_left_to_the_supervisor(tmp_path: Path) -> None:
    process = start(tmp_path, "print('up', flush=True); await asyncio.sleep(60)")
    while b"up" not in (tmp_path / "log").read_bytes():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text(BODY.format(body="print('up', flush=True); await asyncio.sleep(60)"))
    parent_code = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-c", parent_code, script, tmp_path]
        parent = subprocess.Popen(command, stdout=log, stderr=log)
    while b"up" not in (tmp_path / "log").read_bytes():
        time.sleep(0.02)
    child = int((tmp_path / "processes" / "toy.pid").read_text())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and not is_zombie(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_zombie(pid: int) -> bool:
    """Ended, and only not yet reaped by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    "kind",
    [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.SlipstreamError)
    ],
)
def test_errors_survive_pickling(kind: type[errors.SlipstreamError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what to do")))
    assert type(error) is kind
    assert str(error) == "what to do"
    assert os.EX_OK < error.exit_code <= 2
