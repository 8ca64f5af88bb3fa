"""The chaos matrix under Ray: nodes and the driver are lost, too, and a network is cut in two."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster
from slipstream.configs.ray_launcher import find_cluster

from .conftest import Run, wait_until
from .disks import Disk
from .faults import SETTINGS, Fault, Matrix, Replaced
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
LOST = "worker-1: was killed by SIGKILL"
ON_RAY = (*SETTINGS, "launcher=ray", "rollout.workers=2")

QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}
"""A node that is not heard of for some 10 s is lost."""
SHORT_S, LONG_S = (2.0, 5.0), (25.0, 35.0)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Room for two learner ranks on the head, and for a worker on each of two nodes."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    for _ in range(2):
        made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def test_a_run_under_ray_survives_every_fault_at_seeded_moments(
    run: Run, cluster: Cluster, disk: Disk | None
) -> None:
    run.deadline_s = DEADLINE_S
    run.find_quickly()
    run.begin(*ON_RAY, f'cluster.address="{cluster.address}"')

    def lose_node(_: str) -> Replaced:
        """One with a worker, which waits for another to come."""
        old, told = run.pid("worker-1"), run.output.read_text().count(LOST)
        above = {process.pid for process in psutil.Process(old).parents()}
        node = next(n for n in cluster.worker_nodes if raylet(n) in above)
        cluster.remove_node(node, allow_graceful=False)
        wait_until(lambda: run.output.read_text().count(LOST) > told, run.deadline_s)
        cluster.add_node(num_cpus=1)
        return lambda: run.pid("worker-1") != old

    kinds = FAULTS + ([Fault("slow disk", "")] if disk else [])
    with Matrix(run, 0, launcher="ray", disk=disk) as matrix:
        matrix.add("kill -9 of the raylet", lose_node)
        for number in range(ROUNDS):
            for fault in random.Random(number).sample(kinds, len(kinds)):
                matrix.harm(fault)


def raylet(node: object) -> int:
    return node.all_processes["raylet"][0].process.pid  # pyright: ignore


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
        wait_until(self._answers, DEADLINE_S)
        self.add_far_one()

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

    def _answers(self) -> bool:
        with contextlib.suppress(Exception):
            return bool(find_cluster(self.address))
        return False

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

    def cut(length: str) -> Replaced:
        name = far_worker()
        old = run.pid(name)
        link.cut()
        end = time.monotonic() + matrix.choice.uniform(*(SHORT_S if length == "short" else LONG_S))
        before = run.lines()
        wait_until(lambda: time.monotonic() > end and run.lines() > before, DEADLINE_S)
        link.mend()
        if length == "short":
            return lambda: run.pid(name) == old and psutil.pid_exists(old)
        # Ray has given the node up; when it hears so it ends, and somebody starts another.
        wait_until(lambda: not nodes.far_one_lives, DEADLINE_S)
        nodes.add_far_one()
        return lambda: run.pid(name) != old and link.has(run.pid(name))

    with Matrix(run, 0, launcher="ray") as matrix:
        matrix.add("network partition", cut)
        for length in ("short", "long", "short", "long", "short"):
            matrix.harm(Fault("network partition", length))
