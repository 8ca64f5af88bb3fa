"""The boundary of every slipstream process: signals, the parent's death, the record of an error.

A process ends in one of three ways: its coroutine returns (exit 0), SIGTERM cancels it (exit 0), or
an error escapes, which is written to `processes/NAME.error.json` for the supervisor to quote.
"""

import asyncio
import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NoReturn

from . import waits
from .errors import SlipstreamError
from .filesystem import put_text

PARENT_VARIABLE = "SLIPSTREAM_PARENT_PID"
PARENT_POLL_S = 0.5
ORPHAN_GRACE_S = 10.0
"""After the parent died: time for a clean end before the process is cut off."""


def run_process(name: str, run_dir: Path, coroutine: Coroutine[Any, Any, Any]) -> NoReturn:
    """Run a process's main coroutine to its end and exit.

    SIGTERM cancels the coroutine; SIGINT is ignored, because the supervisor relays Ctrl-C in its
    own order; SIGUSR1 prints every thread's stack.

    Args:
        name: file stem in `run_dir/processes`, such as `worker-0`.
        run_dir: the run folder; `processes/` is made when missing.
        coroutine: the main coroutine, not started.
    Raises:
        SystemExit: always; code 0, a `SlipstreamError`'s own code, or 1.
    """
    folder = run_dir / "processes"
    folder.mkdir(parents=True, exist_ok=True)
    error_file = folder / f"{name}.error.json"
    error_file.unlink(missing_ok=True)
    put_text(folder / f"{name}.pid", f"{os.getpid()}\n")
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Told by the supervisor, because it may have died while this process was still importing torch.
    parent_pid = int(os.environ.get(PARENT_VARIABLE, os.getppid()))
    threading.Thread(target=_end_with, args=(parent_pid,), daemon=True).start()
    waits.publish_for_ever(folder / f"{name}.waits.json")
    try:
        asyncio.run(_until_sigterm(coroutine))
    except Exception as error:  # the process boundary: record, then exit
        sys.exit(_record(error, error_file))
    sys.exit(0)


async def _until_sigterm(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Run the coroutine; SIGTERM cancels it, and that is a clean end."""
    task = asyncio.ensure_future(coroutine)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    pulse = asyncio.ensure_future(waits.pulse())
    await asyncio.wait({task})
    pulse.cancel()
    if not task.cancelled():
        task.result()


def _record(error: Exception, error_file: Path) -> int:
    """Write what went wrong, the traceback to stderr as well; return the exit code."""
    cause = _first_cause(error)
    exit_code = cause.exit_code if isinstance(cause, SlipstreamError) else 1
    text = "".join(traceback.format_exception(error))
    record = {
        "type": type(cause).__name__,
        "message": str(cause),
        "exit_code": exit_code,
        "traceback": text,
    }
    with contextlib.suppress(OSError):  # a full disk: then the exit code is all that is left
        print(text, file=sys.stderr, flush=True)
        put_text(error_file, json.dumps(record, indent=2) + "\n")
    return exit_code


def _first_cause(error: BaseException) -> BaseException:
    """The error of a task group that says most: one raised on purpose, else the first."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    causes = [_first_cause(inner) for inner in error.exceptions]
    return next((cause for cause in causes if isinstance(cause, SlipstreamError)), causes[0])


def _end_with(parent_pid: int) -> None:
    """End this process when its parent is gone, so that a killed supervisor leaves nothing.

    A thread that polls, not PR_SET_PDEATHSIG: that signal is sent when the *thread* that forked
    ends, which kills the processes of a run started from a notebook's worker thread.
    """
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os._exit(1)
