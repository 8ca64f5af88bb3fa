"""One Ray node on this machine: started in a session of its own, and ended by its number.

    start(arguments, folder) -> Node        with a token in the folder, log beside it
    end(node)                               it and all it started, if it is still that process

`cluster up` does so here, or over ssh by `python -m slipstream.configs.ray_node`. No other Ray is
touched: `ray stop` would end every one that this user has on the machine.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from ..buffer.errors import SlipstreamError
from .claim import process_start_time

START_DEADLINE_S = 120.0
STOP_S = 20.0
PORTS = {"dashboard-port": 8265, "ray-client-server-port": 10001}
"""Of a head; `AGENT_PORTS` of every node. Another is taken where these are in use."""
AGENT_PORTS = {"dashboard-agent-listen-port": 52365}
SESSION = re.compile(r"/[^\0=,]*/session_\d[\d_-]*")
"""Ray's folder of logs and sockets, which the nodes of a cluster on one machine share."""


class Node(msgspec.Struct, frozen=True):
    """A node on the machine that started it."""

    pid: int
    started: str | None
    """With the pid, it names the process for good."""
    folder: str
    """Its token and log, removed with it."""


def state_folder() -> Path:
    """Where slipstream writes what outlives a command."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "slipstream"


def token_variables(folder: Path) -> dict[str, str]:
    """What tells Ray its token. Its default, ~/.ray/auth_token, is left to the user."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "ray.token")}


def write_token(token: str, folder: Path) -> None:
    """Put a token where only this user can read it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / "ray.token"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(token)


def start(arguments: Sequence[str], token: str) -> Node:
    """Start a node and wait until it says that it is up.

    Args:
        arguments: of `ray start`.
        token: of the cluster.
    Raises:
        SlipstreamError: it ended, or the time is up; with the end of its log. Nothing is left.
    """
    folder = state_folder() / f"ray-{os.getpid()}-{time.monotonic_ns()}"
    write_token(token, folder)
    ports = (PORTS if "--head" in arguments else {}) | AGENT_PORTS
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
               "--disable-usage-stats", *arguments,
               *(f"--{name}={_port(usual)}" for name, usual in ports.items())]  # fmt: skip
    with (folder / "node.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"} | token_variables(folder),
        )  # fmt: skip
    node = Node(process.pid, process_start_time(process.pid), str(folder))
    try:
        _wait(node)
    except BaseException:
        end(node)
        raise
    return node


def _wait(node: Node) -> None:
    deadline, log = time.monotonic() + START_DEADLINE_S, Path(node.folder) / "node.log"
    while time.monotonic() < deadline and process_start_time(node.pid) == node.started:
        if "Ray runtime started" in log.read_text(errors="replace"):
            return
        time.sleep(0.2)
    raise SlipstreamError(f"a Ray node did not start:\n{log.read_text(errors='replace')[-1500:]}")


def end(node: Node) -> str:
    """End a node and everything it started; only if it is still the process we started."""
    ours = process_start_time(node.pid) == node.started
    sessions = {path for pid, path in _sessions() if _leader(pid) == node.pid} if ours else set()
    if ours:
        with suppress(ProcessLookupError):
            os.kill(node.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while process_start_time(node.pid) == node.started and time.monotonic() < deadline:
            with suppress(ChildProcessError):
                os.waitpid(node.pid, os.WNOHANG)
            time.sleep(0.05)
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        while time.monotonic() < deadline and any(_leader(p) == node.pid for p, _ in _sessions()):
            time.sleep(0.05)
    for path in [node.folder, *(sessions - {path for _, path in _sessions()})]:
        shutil.rmtree(path, ignore_errors=True)
    return "ended" if ours else "had ended already"


def _sessions() -> Iterator[tuple[int, str]]:
    """(pid, Ray's folder of logs and sockets) of each process that names one; of Linux alone."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            for found in SESSION.findall(path.read_text(errors="replace")):
                yield int(path.parent.name), found


def _leader(pid: int) -> int:
    """Of a process's session; 0 when it is gone."""
    with suppress(OSError):
        return os.getsid(pid)
    return 0


def free_port() -> int:
    """A port of the loopback address that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _port(usual: int) -> int:
    try:
        socket.create_server(("", usual)).close()
    except OSError:
        return free_port()
    return usual


def main() -> None:
    """`start ARGUMENT...` with the token as input, or `end NODE`: for a host, over ssh."""
    verb, *arguments = sys.argv[1:]
    try:
        if verb == "start":
            _start_for_caller(arguments)
        else:
            print(end(msgspec.json.decode(arguments[0], type=Node)))
    except SlipstreamError as error:
        sys.exit(str(error))


def _start_for_caller(arguments: Sequence[str]) -> None:
    node = start(arguments, sys.stdin.read().strip())
    try:
        print(msgspec.json.encode(node).decode(), flush=True)
    except OSError as error:  # nobody has the node's number, so nobody would end it
        end(node)
        raise SlipstreamError(f"the caller went away, and the node was ended: {error}") from error


if __name__ == "__main__":
    main()
