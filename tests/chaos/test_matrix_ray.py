"""The chaos matrix under Ray: nodes and the driver are lost, too, and a network is cut in two."""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from .conftest import Run, wait_until
from .disks import Disk
from .faults import SETTINGS, Fault, Matrix, Replaced, on_a_disk
from .networks import Link

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

DEADLINE_S = 400.0
"""Each start is that of Ray's workers, too."""
ROUNDS = 5
PROCESSES = ("worker-0", "reward", "buffer", "feeder", "learner", "learner-1", "supervisor")
FAULTS = [
    *(Fault("kill -9", victim) for victim in PROCESSES),
    Fault("kill -9 of the raylet", "a node with a worker"),
    Fault("SIGSTOP", "worker-0"),
    Fault("SIGSTOP", "supervisor"),
]
LOST = re.compile(r"worker-1: node \w+, or its Ray actor")
ON_RAY = (*SETTINGS, "launcher=ray", "rollout.workers=2")

QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_AUTH_MODE": "disabled",  # where ~/.ray has a token `ray start` would ask for it
}
"""A node that is not heard of for some 20 s is lost."""
SHORT_S = (2.0, 5.0)


class Fleet:
    """Room for two learner ranks on a head, and for a worker on each of two nodes."""

    def __init__(self) -> None:
        with socket.create_server(("", 0)) as server:
            self._port = server.getsockname()[1]
        self.start()

    def start(self) -> None:
        """All nodes, the head at the same port as ever."""
        head = {"num_cpus": 2, "gcs_server_port": self._port}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            self.add()

    def add(self) -> None:
        """A node for a worker."""
        self.cluster.add_node(num_cpus=1)

    def kill(self, pid: int) -> None:
        """The node that a process is on, all at once."""
        above = {process.pid for process in psutil.Process(pid).parents()}
        nodes = self.cluster.worker_nodes
        self._kill(next(n for n in nodes if n.all_processes["raylet"][0].process.pid in above))

    def kill_all(self) -> None:
        """Every node, the head, too."""
        for node in reversed(self.cluster.list_all_nodes()):
            self._kill(node)
        self.cluster.shutdown()

    def _kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made = Fleet()
    yield made
    made.cluster.shutdown()


def test_a_run_under_ray_survives_every_fault_at_seeded_moments(
    run: Run, fleet: Fleet, disk: Disk | None
) -> None:
    """In the end the head is lost with everything on it; another takes its address."""
    run.deadline_s = DEADLINE_S
    run.find_quickly()
    run.begin(*ON_RAY, f'cluster.address="{fleet.cluster.address}"')

    def times_lost() -> int:
        return len(LOST.findall(run.output.read_text()))

    def lose_node(_: str) -> Replaced:
        old, told = run.pid("worker-1"), times_lost()
        fleet.kill(old)
        wait_until(lambda: times_lost() > told, run.deadline_s)
        fleet.add()
        return lambda: run.pid("worker-1") != old

    def lose_head(_: str) -> Replaced:
        old = run.pid("learner")
        assert run.supervisor is not None
        run.supervisor.kill()
        run.supervisor.wait()
        fleet.kill_all()
        fleet.start()
        run.start("resume", str(run.run_dir), "--no-export")
        return lambda: run.pid("learner") != old

    kinds = FAULTS + on_a_disk(disk, Fault("slow disk", ""))
    with Matrix(run, 0, launcher="ray", disk=disk) as matrix:
        matrix.add("kill -9 of the raylet", lose_node)
        matrix.add("kill -9 of everything", lose_head)
        for number in range(ROUNDS):
            for fault in random.Random(number).sample(kinds, len(kinds)):
                matrix.harm(fault)
        matrix.harm(Fault("kill -9 of everything", "on the head and all nodes"))


class Nodes:
    """A head here and a node on the other side of a link, each a `ray start`."""

    def __init__(self, link: Link) -> None:
        with socket.create_server((link.here, 0)) as server:
            self.address = f"{link.here}:{server.getsockname()[1]}"
        self._link, self._started = link, []
        self._folders = [tempfile.mkdtemp(prefix="r") for _ in range(2)]
        self._log = Path(self._folders[0]) / "log"
        self._start([], "--head", f"--port={self.address.rpartition(':')[2]}", "--num-cpus=3",
                    f"--node-ip-address={link.here}", "--include-dashboard=false",
                    f"--temp-dir={self._folders[0]}")  # fmt: skip
        wait_until(lambda: self._up() == 1, DEADLINE_S)
        self.add_far_one()
        wait_until(lambda: self._up() == 2, DEADLINE_S)

    def add_far_one(self) -> None:
        """The node on the other side."""
        self._start(self._link.command(), f"--address={self.address}", "--num-cpus=1",
                    f"--node-ip-address={self._link.there}",
                    f"--temp-dir={self._folders[1]}")  # fmt: skip

    def _start(self, where: list[str], *words: str) -> None:
        ray = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block")
        size = ("--disable-usage-stats", "--object-store-memory=100000000")
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [*where, *ray, *size, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | QUICK_TO_NOTICE, start_new_session=True,
            )  # fmt: skip
        self._started.append(process)

    def _up(self) -> int:
        """How many have said that they are."""
        return self._log.read_text().count("Ray runtime started")

    @property
    def far_one_lives(self) -> bool:
        return self._started[-1].poll() is None

    def end(self) -> None:
        """All that was started, and its files."""
        for process in reversed(self._started):
            process.terminate()
        for process in reversed(self._started):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nodes(link: Link) -> Iterator[Nodes]:
    made = Nodes(link)
    yield made
    made.end()


def test_a_network_cut_in_two_costs_at_most_the_worker_beyond_it(
    run: Run, link: Link, nodes: Nodes
) -> None:
    """While it is cut the run trains on with the worker on this side."""
    run.deadline_s = DEADLINE_S
    run.begin(*ON_RAY, "buffer.weights=zmq", f'cluster.address="{nodes.address}"')

    def far_worker() -> str:
        far: list[str] = []

        def found() -> bool:
            with contextlib.suppress(OSError):  # not up yet
                far.extend(name for name in ("worker-0", "worker-1") if link.has(run.pid(name)))
            return bool(far)

        wait_until(found, DEADLINE_S)
        return far[0]

    def said(name: str) -> int:
        """How often it was said that a worker is started again."""
        return len(re.findall(rf"^{name}: .*is restarted", run.output.read_text(), re.M))

    def cut(length: str) -> Replaced:
        name = far_worker()
        old, told, before = run.pid(name), said(name), run.lines()
        link.cut()
        if length == "short":
            time.sleep(matrix.choice.uniform(*SHORT_S))
            link.mend()
            return lambda: run.pid(name) == old and psutil.pid_exists(old)
        wait_until(lambda: said(name) > told and run.lines() > before, DEADLINE_S)
        link.mend()
        # Ray has given the node up; when it hears so it ends, and somebody starts another.
        wait_until(lambda: not nodes.far_one_lives, DEADLINE_S)
        nodes.add_far_one()
        return lambda: run.pid(name) != old and link.has(run.pid(name))

    with Matrix(run, 0, launcher="ray") as matrix:
        matrix.add("network partition", cut)
        for length in ("short", "long", "short", "long", "short"):
            matrix.harm(Fault("network partition", length))
