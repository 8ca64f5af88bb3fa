"""One child process of a run: own session, own log, and no stray descendant when it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from ..buffer.process import PARENT_VARIABLE

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Read once when the libraries load; without a bound each process would take every core."""

LOG_TAIL_BYTES = 4096
AT_ONCE = 64

T = TypeVar("T")


class ProcessError(msgspec.Struct, frozen=True):
    """What `buffer/process.py` leaves in `processes/NAME.error.json` when a process fails."""

    type: str
    message: str
    exit_code: int = 1


class Child:
    """A subprocess in a session of its own, so that Ctrl-C reaches only the supervisor.

    Guarantees that once `poll()` returned an exit code no process of its group is left: the group
    is killed while the dead leader is not yet reaped, and so still holds the group's number.
    """

    place = ""
    """The node that a process was lost with; empty when it ended by itself."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        run_dir: Path,
        threads: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it; standard output and errors go to `run_dir/logs/NAME.log` (appended).

        Args:
            name: one word, unique in the run.
            argv: program and arguments.
            run_dir: the run folder, also the child's working directory.
            threads: how many threads its tensor libraries may start.
            environment: variables on top of ours.
        """
        self._describe(name, run_dir)
        with self.log_path.open("ab") as log:
            self._popen = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=run_dir,
                env=_environment(threads, environment or {}),
                start_new_session=True,
            )
        self.pid = self._popen.pid

    def _describe(self, name: str, run_dir: Path) -> None:
        """Set what every child knows of itself."""
        self.name, self.run_dir, self.pid = name, run_dir, 0
        self.log_path = run_dir / "logs" / f"{name}.log"
        # What an earlier process of this name said is not the reason of this one's end.
        self._log_from = self.log_path.stat().st_size if self.log_path.exists() else 0
        self._exit_code: int | None = None
        # A message of an earlier branch must not be taken for the reason of this one's end.
        self._error_path.unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """Remove what it published, so that nobody takes one that left for one that hangs."""
        (self.run_dir / "processes" / f"{self.name}.waits.json").unlink(missing_ok=True)

    @property
    def waits_for(self) -> str:
        """What a process cannot start without, in words; nothing on this machine."""
        return ""

    @property
    def _error_path(self) -> Path:
        return self.run_dir / "processes" / f"{self.name}.error.json"

    def poll(self) -> int | None:
        """Exit code (negative: the signal that killed it), or None while it runs."""
        if self._exit_code is None:
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if os.waitid(os.P_PID, self.pid, flags) is not None:
                self._signal_group(signal.SIGKILL)
                self._exit_code = self._popen.wait()
        return self._exit_code

    def wait(self, deadline_s: float) -> int | None:
        """Like `poll`, after waiting at most so long."""
        end = time.monotonic() + deadline_s
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        return self.poll()

    def terminate(self) -> None:
        """Ask it to end (SIGTERM to the process itself: it tells its own children)."""
        self.send(signal.SIGTERM)

    def send(self, number: signal.Signals) -> bool:
        """Signal the process itself; False when it has ended."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    def kill(self) -> None:
        """End it and everything it started, now."""
        if self.poll() is None:
            self._signal_group(signal.SIGKILL)
            self.wait(deadline_s=10.0)

    def _signal_group(self, number: signal.Signals) -> None:
        # EPERM is what macOS answers for a group of zombies; both mean: nobody left to signal.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def error(self) -> ProcessError | None:
        """What the process itself recorded about its failure, if it could."""
        try:
            return msgspec.json.decode(self._error_path.read_bytes(), type=ProcessError)
        except (OSError, msgspec.DecodeError):
            return None

    def why(self) -> str:
        """Why it ended, in words: its own record, else its signal or code and its log's end."""
        error = self.error()
        if error is not None:
            return f"{error.type}: {error.message}"
        code = self.poll() or 0
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
        tail = self.log_tail()
        return f"{how}; the end of {self.log_path}:\n{tail}" if tail else how

    def log_tail(self, lines: int = 8) -> str:
        """The last lines of its log, indented."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(self._log_from, self.log_path.stat().st_size - LOG_TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(f"    {line}" for line in text.rstrip().splitlines()[-lines:])


def at_once(do: Callable[[Child], T], children: Iterable[Child]) -> list[T]:
    """Do the same to several processes in the time of the slowest: one on a node that is cut off
    answers only by a deadline."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(do, children))


def kill_all(children: Iterable[Child]) -> None:
    """`Child.kill` of several processes at once."""
    at_once(lambda child: child.kill(), children)


def module_argv(module: str, spec_path: Path) -> list[str]:
    """`python -m slipstream.MODULE SPEC`.

    `-P` keeps the working directory off `sys.path`, where a user's `datasets/` or `kernels/`
    folder would be taken for the library of that name.
    """
    return [sys.executable, "-P", "-m", f"slipstream.{module}", str(spec_path)]


def _environment(threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    fixed = dict.fromkeys(THREAD_VARIABLES, str(threads))
    fixed |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    fixed[PARENT_VARIABLE] = str(os.getpid())
    return {**os.environ, **fixed, **extra}


def _signal_name(number: int) -> str:
    hint = " (out of memory?)" if number == signal.SIGKILL else ""
    try:
        return signal.Signals(number).name + hint
    except ValueError:
        return f"signal {number}"
