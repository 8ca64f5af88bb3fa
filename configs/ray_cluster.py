"""`slipstream cluster up | status | down`: Ray itself, on this machine or over ssh.

up(hosts) -> versions compared -> head -> the others -> cluster.json
down()    -> every node that cluster.json names is ended (`ray_node`); no other Ray is touched, and
             who cannot be reached stays in it
"""

import os
import secrets
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import msgspec

from ..buffer.errors import ConfigError, SlipstreamError
from . import ray_node
from .ray_node import Node, free_port, state_folder, token_variables

SSH_DEADLINE_S = ray_node.START_DEADLINE_S + 30.0
FACTS = (
    "import platform, importlib.metadata as m; "
    "print(platform.python_version(), m.version('ray'), m.version('slipstream'))"
)


class Hosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`hosts.toml`: the head, the others, and the Python that has slipstream on all of them."""

    head: str
    workers: tuple[str, ...] = ()
    python: str = sys.executable
    port: int = 6379


class Started(msgspec.Struct, frozen=True):
    """`cluster.json`: what `up` started."""

    address: str
    nodes: tuple[tuple[str, Node], ...]
    """(host, node), the head first; the host is empty on this machine."""
    python: str = ""
    """Of the hosts."""


def state_file() -> Path:
    """Where it is written down, readable by this user only."""
    return state_folder() / "cluster.json"


def up_local(nodes: int, *, cpus: int | None = None, gpus: int | None = None) -> Started:
    """Start a head and `nodes - 1` others on this machine, on the loopback address.

    Raises:
        ConfigError: a cluster is up already, Ray is not installed, or `nodes` is below 1.
        SlipstreamError: a node did not start; what had started is ended.
    """
    _refuse_second()
    if nodes < 1:
        raise ConfigError(f"--local {nodes}: a cluster has at least one node")
    address = f"127.0.0.1:{free_port()}"
    size = [f"--{key}={n}" for key, n in (("num-cpus", cpus), ("num-gpus", gpus)) if n is not None]
    size.append("--node-ip-address=127.0.0.1")

    def start(host: str, arguments: Sequence[str], token: str) -> Node:
        return ray_node.start([*arguments, *size], token)

    return _up(address, [""] * nodes, start)


def up_hosts(path: Path) -> Started:
    """Start the nodes of a `hosts.toml` over ssh; versions are compared before any is started.

    Raises:
        ConfigError: the file, a host or a version is not as needed; what had started is ended.
    """
    _refuse_second()
    try:
        hosts = msgspec.convert(tomllib.loads(path.read_text()), Hosts)
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f'{path}: {error}; it needs head = "HOST", workers = [...]') from None
    everyone = [hosts.head, *hosts.workers]
    facts = {host: _ssh(host, [hosts.python, "-c", FACTS]).strip() for host in everyone}
    if len(set(facts.values())) > 1:
        told = "; ".join(f"{host}: {versions}" for host, versions in facts.items())
        raise ConfigError(f"the hosts differ in python, ray or slipstream: {told}")

    def start(host: str, arguments: Sequence[str], token: str) -> Node:
        said = _ssh(host, _on_host(hosts.python, "start", *arguments), token)
        try:
            return msgspec.json.decode(said.splitlines()[-1], type=Node)
        except (IndexError, msgspec.DecodeError):
            raise ConfigError(
                f"{host}: a Ray node started there, but in place of its number the host said "
                f"{said[-300:]!r}; end it there: `{hosts.python} -m ray.scripts.scripts stop` ends "
                "every Ray of this user"
            ) from None

    address = f"{hosts.head.rpartition('@')[2]}:{hosts.port}"
    return _up(address, everyone, start, hosts.python)


def _up(
    address: str,
    hosts: Sequence[str],
    start: Callable[[str, Sequence[str], str], Node],
    python: str = "",
) -> Started:
    """Start the head and then the others, all or none, and write down what was started."""
    token = secrets.token_hex(32)
    ray_node.write_token(token, state_folder())
    nodes: list[tuple[str, Node]] = []
    try:
        for number, host in enumerate(hosts):
            head = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=true"]
            arguments = [f"--address={address}"] if number else head
            nodes.append((host, start(host, arguments, token)))
    except BaseException as error:
        lines = _end_all(Started(address=address, nodes=tuple(nodes), python=python))
        if read() is not None:
            raise SlipstreamError(f"{error}\n{_not_ended(lines)}") from error
        raise
    return _write(Started(address=address, nodes=tuple(nodes), python=python))


def down() -> list[str]:
    """End what `up` started; a line per node.

    Raises:
        ConfigError: nothing is up.
        SlipstreamError: a node could not be ended; it is still written down.
    """
    started = read()
    if started is None:
        raise ConfigError(f"no cluster of ours is up ({state_file()} is not there)")
    lines = _end_all(started)
    if read() is not None:
        raise SlipstreamError(_not_ended(lines))
    return lines


def status() -> list[str]:
    """The cluster that `up` started, and what is free on its nodes, in lines."""
    started = read()
    address = "auto" if started is None else started.address
    use_our_token(address)
    import ray

    from .placement import free_resources
    from .ray_launcher import connect

    lines = [] if started is None else [f"started by slipstream at {started.address}"]
    connect(address, Path.cwd())
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
    where, token = resolve(address), _our_token(address)
    use_our_token(address)
    from ray.job_submission import JobSubmissionClient

    from .load import load_experiment

    load_experiment(experiment, [*overrides, "launcher=ray"])  # refused here, not in a job's log
    words = ["run", experiment, *overrides, "--launcher", "ray", "--address", "auto"]
    command = shlex.join([sys.executable, "-P", "-m", "slipstream.configs.cli", *words])
    os.environ.pop("RAY_ADDRESS", None)  # Ray would take it for the address we name
    try:
        client = JobSubmissionClient(where)
        # `cd`: a working_dir of Ray's would be copied, and runs/ must lie where the user is.
        job = client.submit_job(entrypoint=f"cd {shlex.quote(os.getcwd())} && {command}")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray job server at {where}: {str(error).splitlines()[0]}") from None
    variables = [f"{name}={shlex.quote(value)}" for name, value in token.items()]
    return job, " ".join([*variables, "ray", "job", "logs", job, "--follow"])


def read() -> Started | None:
    """What `up` wrote down; None when nothing is up."""
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(state_file().read_bytes(), type=Started)
    return None


def use_our_token(address: str = "auto") -> None:
    """To be called before Ray is imported: a cluster of ours answers only to its own token, and
    another cluster does not know it."""
    for name, value in _our_token(address).items():
        os.environ.setdefault(name, value)


def resolve(address: str) -> str:
    """What `auto` means: RAY_ADDRESS, else the cluster that we started, else still `auto`."""
    if address != "auto":
        return address
    started = read()
    return os.environ.get("RAY_ADDRESS") or ("auto" if started is None else started.address)


def _our_token(address: str) -> dict[str, str]:
    """The variables that tell Ray our token; none for a cluster that we did not start."""
    started = read()
    ours = started is not None and _alike(resolve(address), started.address)
    return token_variables(state_folder()) if ours else {}


def _alike(address: str, other: str) -> bool:
    """Whether two HOST:PORT are one."""
    if address == other:  # a name of ~/.ssh/config only ssh resolves
        return True
    with suppress(OSError):
        found = (each.rpartition(":") for each in (address, other))
        return len({(socket.gethostbyname(host), port) for host, _, port in found}) == 1
    return False


def _write(started: Started) -> Started:
    path = state_file()
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


def _end_all(started: Started) -> list[str]:
    """End nodes, the head last; a line for each. Written down stays who could not be ended, with
    the token, by which alone it answers."""
    lines: list[str] = []
    left: list[tuple[str, Node]] = []
    for host, node in reversed(started.nodes):
        try:
            here = f"node {node.pid} {ray_node.end(node)}" if not host else ""
            told = _on_host(started.python, "end", msgspec.json.encode(node).decode())
            lines.append(here or f"{host}: {_ssh(host, told).strip()}")
        except ConfigError as error:
            lines.append(f"{host}: NOT ended: {error}")
            left.insert(0, (host, node))
    if left:
        _write(msgspec.structs.replace(started, nodes=tuple(left)))
    else:
        Path(token_variables(state_folder())["RAY_AUTH_TOKEN_PATH"]).unlink(missing_ok=True)
        state_file().unlink(missing_ok=True)
    return lines


def _not_ended(lines: Sequence[str]) -> str:
    again = "`slipstream cluster down` tries again once the host answers; if it is gone for good"
    return "\n".join([*lines, f"{again}, remove {state_file()}"])


def _on_host(python: str, *arguments: str) -> list[str]:
    return [python, "-P", "-m", "slipstream.configs.ray_node", *arguments]


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
            timeout=SSH_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{host} cannot be reached: {error}") from None
    if done.returncode:
        raise ConfigError(f"{host}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout
