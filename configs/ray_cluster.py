"""`slipstream cluster up | status | down`: Ray itself, on this machine or over ssh.

    up(hosts) -> versions compared -> head -> the others -> cluster.json
    down()    -> every node that cluster.json names is ended; no other Ray is touched

A local node is a `ray start --block` in a session of its own, which we end by its number; on other
hosts `ray start` leaves daemons, which `ray stop` ends.
"""

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import msgspec

from ..buffer.errors import ConfigError, SlipstreamError
from .claim import process_start_time

START_DEADLINE_S = 120.0
STOP_S = 20.0
HOST_TOKEN = "~/.ray/slipstream-token"
"""Where the token lies on the hosts of an ssh cluster."""
FACTS = (
    "import platform, importlib.metadata as m; "
    "print(platform.python_version(), m.version('ray'), m.version('slipstream'))"
)


class LocalNode(msgspec.Struct, frozen=True):
    """A node on this machine."""

    pid: int
    started: str | None
    """With the pid, it names the process for good."""
    log: str


class Hosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`hosts.toml`: the head, the others, and the Python that has slipstream on all of them."""

    head: str
    workers: tuple[str, ...] = ()
    python: str = sys.executable
    port: int = 6379


class Started(msgspec.Struct, frozen=True):
    """`cluster.json`: what `up` started."""

    address: str
    local: tuple[LocalNode, ...] = ()
    hosts: Hosts | None = None


def state_file() -> Path:
    """Where it is written down, readable by this user only."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "slipstream" / "cluster.json"


def up_local(nodes: int, *, cpus: int | None = None, gpus: int | None = None) -> Started:
    """Start a head and `nodes - 1` others on this machine, on the loopback address.

    Raises:
        ConfigError: a cluster is up already, Ray is not installed, or `nodes` is below 1.
        SlipstreamError: a node did not start; what had started is ended.
    """
    _refuse_second()
    if nodes < 1:
        raise ConfigError(f"--local {nodes}: a cluster has at least one node")
    folder = state_file().parent / f"ray-{os.getpid()}"
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    address = f"127.0.0.1:{_free_port()}"
    size = [f"--{key}={n}" for key, n in (("num-cpus", cpus), ("num-gpus", gpus)) if n is not None]
    _make_token()
    started: list[LocalNode] = []
    try:
        for number in range(nodes):
            head = ["--head", f"--port={address.partition(':')[2]}", "--include-dashboard=true",
                    f"--dashboard-port={_free_port()}",
                    f"--ray-client-server-port={_free_port()}"]  # fmt: skip
            where = (
                head
                if number == 0
                else [f"--address={address}", f"--dashboard-agent-listen-port={_free_port()}"]
            )
            started.append(_start_local([*where, *size], folder / f"node-{number}.log"))
            _wait_for_node(started[-1])
    except BaseException:
        for node in started:
            _end(node)
        _token_file().unlink(missing_ok=True)
        raise
    return _write(Started(address=address, local=tuple(started)))


def up_hosts(path: Path) -> Started:
    """Start the nodes of a `hosts.toml` over ssh; versions are compared before any is started.

    Raises:
        ConfigError: the file, a host or a version is not as needed.
        SlipstreamError: a node did not start; what had started is ended.
    """
    _refuse_second()
    try:
        hosts = msgspec.convert(tomllib.loads(path.read_text()), Hosts)
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f'{path}: {error}; it needs head = "HOST", workers = [...]') from None
    everyone = (hosts.head, *hosts.workers)
    facts = {host: _ssh(host, [hosts.python, "-c", FACTS]).strip() for host in everyone}
    if len(set(facts.values())) > 1:
        told = "; ".join(f"{host}: {versions}" for host, versions in facts.items())
        raise ConfigError(f"the hosts differ in python, ray or slipstream: {told}")
    address = f"{hosts.head.rpartition('@')[2]}:{hosts.port}"
    started = Started(address=address, hosts=hosts)
    try:
        token = _make_token()
        for host in everyone:
            _ssh(host, ["sh", "-c", f"umask 077; mkdir -p ~/.ray; cat > {HOST_TOKEN}"], token)
        with_token = f'RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={HOST_TOKEN} exec "$@"'
        ray = ["sh", "-c", with_token, "sh", *_ray(hosts.python), "start", "--disable-usage-stats"]
        _ssh(hosts.head, [*ray, "--head", f"--port={hosts.port}"])
        for host in hosts.workers:
            _ssh(host, [*ray, f"--address={address}"])
    except BaseException:
        _end_hosts(hosts)
        _token_file().unlink(missing_ok=True)
        raise
    return _write(started)


def down() -> list[str]:
    """End what `up` started; a line per node.

    Raises:
        ConfigError: nothing is up.
    """
    started = read()
    if started is None:
        raise ConfigError(f"no cluster of ours is up ({state_file()} is not there)")
    lines = [f"{started.address}: node {node.pid} {_end(node)}" for node in reversed(started.local)]
    if started.hosts is not None:
        lines += _end_hosts(started.hosts)
    state_file().unlink(missing_ok=True)
    _token_file().unlink(missing_ok=True)
    for folder in {Path(node.log).parent for node in started.local}:
        shutil.rmtree(folder, ignore_errors=True)
    return lines


def status() -> list[str]:
    """The cluster that `up` started, and what is free on its nodes, in lines."""
    use_our_token()
    import ray

    from .placement import free_resources
    from .ray_launcher import connect

    started = read()
    lines = [] if started is None else [f"started by slipstream at {started.address}"]
    connect("auto" if started is None else started.address, Path.cwd())
    try:
        for node, free in zip(
            [n for n in ray.nodes() if n["Alive"]], free_resources(), strict=True
        ):
            total = node["Resources"]
            of = ", ".join(f"{free[k]:g} of {total.get(k, 0):g} {k}" for k in ("CPU", "GPU"))
            lines.append(f"{node['NodeManagerHostname']} {node['NodeID'][:8]}: {of} free")
    finally:
        ray.shutdown()
    return lines


def submit(experiment: str, overrides: Sequence[str], address: str = "auto") -> tuple[str, str]:
    """Run an experiment as a Ray job on the cluster's head; its id, and the line that follows it.

    Raises:
        ConfigError: no job server answers, or the experiment does not load.
    """
    use_our_token()
    from ray.job_submission import JobSubmissionClient

    from .load import load_experiment

    load_experiment(experiment, [*overrides, "launcher=ray"])  # refused here, not in a job's log
    words = ["run", experiment, *overrides, "--launcher", "ray", "--address", "auto"]
    command = shlex.join([sys.executable, "-P", "-m", "slipstream.configs.cli", *words])
    started = read()
    where = started.address if address == "auto" and started is not None else address
    try:
        client = JobSubmissionClient(where)
        # `cd`: a working_dir of Ray's would be copied, and runs/ must lie where the user is.
        job = client.submit_job(entrypoint=f"cd {shlex.quote(os.getcwd())} && {command}")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray job server at {where}: {str(error).splitlines()[0]}") from None
    ours = started is not None and where == started.address
    token = _token_variables().items() if ours else ()
    variables = [f"{name}={shlex.quote(value)}" for name, value in token]
    return job, " ".join([*variables, "ray", "job", "logs", job, "--follow"])


def read() -> Started | None:
    """What `up` wrote down; None when nothing is up."""
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(state_file().read_bytes(), type=Started)
    return None


def use_our_token(address: str = "auto") -> None:
    """To be called before Ray is imported: a cluster of ours answers only to its own token, and
    another cluster does not know it."""
    started = read()
    if started is not None and (address == "auto" or _alike(address, started.address)):
        for name, value in _token_variables().items():
            os.environ.setdefault(name, value)


def _alike(address: str, other: str) -> bool:
    """Whether two HOST:PORT are one."""
    with suppress(OSError):
        found = (each.rpartition(":") for each in (address, other))
        return len({(socket.gethostbyname(host), port) for host, _, port in found}) == 1
    return False


def _make_token() -> str:
    """A new token for the cluster, in a file of ours that only this user can read."""
    token, path = secrets.token_hex(32), _token_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(token)
    return token


def _token_file() -> Path:
    return state_file().with_name("ray.token")


def _token_variables() -> dict[str, str]:
    """What tells Ray on this machine. Its default, ~/.ray/auth_token, is left to the user."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_token_file())}


def _write(started: Started) -> Started:
    path = state_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(started), indent=2))
    return started


def _refuse_second() -> None:
    if (started := read()) is not None:
        raise ConfigError(
            f"a cluster is up at {started.address}; `slipstream cluster down` ends it"
        )
    with suppress(metadata.PackageNotFoundError):
        metadata.version("ray")
        return
    raise ConfigError("Ray is not installed: pip install 'slipstream[ray]'")


def _ray(python: str) -> list[str]:
    return [python, "-m", "ray.scripts.scripts"]


def _start_local(arguments: list[str], log_path: Path) -> LocalNode:
    command = [*_ray(sys.executable), "start", "--block", "--disable-usage-stats",
               "--node-ip-address=127.0.0.1", *arguments]  # fmt: skip
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env=dict(os.environ) | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"} | _token_variables(),
        )  # fmt: skip
    return LocalNode(process.pid, process_start_time(process.pid), str(log_path))


def _wait_for_node(node: LocalNode) -> None:
    """Until a node says that it is up.

    Raises:
        SlipstreamError: it ended, or the time is up; with the end of its log.
    """
    end, log = time.monotonic() + START_DEADLINE_S, Path(node.log)
    while time.monotonic() < end and process_start_time(node.pid) == node.started:
        if "Ray runtime started" in log.read_text(errors="replace"):
            return
        time.sleep(0.2)
    tail = log.read_text(errors="replace")[-1500:]
    raise SlipstreamError(f"a Ray node did not start:\n{tail}")


def _end(node: LocalNode) -> str:
    """End a node and everything it started; only if it is still the process we started."""
    if process_start_time(node.pid) != node.started:
        return "had ended already"
    with suppress(ProcessLookupError):
        os.kill(node.pid, signal.SIGTERM)
    end = time.monotonic() + STOP_S
    while process_start_time(node.pid) == node.started and time.monotonic() < end:
        with suppress(ChildProcessError):
            os.waitpid(node.pid, os.WNOHANG)
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    return "ended"


def _end_hosts(hosts: Hosts) -> list[str]:
    lines = []
    for host in (*hosts.workers, hosts.head):
        try:
            forget = f'rm -f {HOST_TOKEN}; exec "$@"'
            _ssh(host, ["sh", "-c", forget, "sh", *_ray(hosts.python), "stop"])
            lines.append(f"{host}: ended")
        except ConfigError as error:
            lines.append(f"{host}: NOT ended: {error}")
    return lines


def _ssh(host: str, command: Sequence[str], given: str = "") -> str:
    """Run a command on a host, with something to read; its output.

    Raises:
        ConfigError: it cannot be reached, or the command failed.
    """
    words = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host, shlex.join(command)]
    try:
        done = subprocess.run(
            words,
            input=given,
            capture_output=True,
            text=True,
            timeout=START_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{host} cannot be reached: {error}") from None
    if done.returncode:
        raise ConfigError(f"{host}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
