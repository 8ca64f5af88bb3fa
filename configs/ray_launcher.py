"""`launcher = "ray"`: the processes of a run, placed on a cluster by Ray.

    supervisor (head) -> RayChild -> ProcessActor (placed) -> Child (the same process as ever)

The buffer and the feeder run on the head, beside the supervisor. Run folder, model and data must be
visible under the same paths on every node; without that nothing is started.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._private.utils import read_ray_address
from ray.exceptions import RayError
from ray.util import get_node_ip_address

from ..buffer.curve import SECRET, new_keys
from ..buffer.errors import ConfigError
from .child import Child
from .placement import RELEASE_S, Placement
from .policy import kind_of
from .ray_child import RayChild
from .ray_cluster import resolve
from .ray_code import runtime_environment
from .scratch import Scratch, host_dir, scratch
from .secrecy import named_variables
from .specs import Launch, ProcessPlan, user_module_path

CONNECT_S = 5.0

Start = Callable[[ProcessPlan], Child]


@contextmanager
def ray_launcher(
    launch: Launch, bytes_per_version: int, waits: Callable[[str], None]
) -> Iterator[tuple[Scratch, Callable[[ProcessPlan], Child]]]:
    """Connect, check, reserve; then start processes as told, and leave nothing behind.

    Args:
        launch: the run.
        bytes_per_version: of its weights.
        waits: see `Placement`.
    Raises:
        ConfigError: the cluster cannot be reached, lacks something, or its nodes differ.
    """
    connect(launch.experiment.cluster.address, launch.run_dir, with_code=True)
    try:
        placement = Placement(launch.experiment, RELEASE_S, began=launch.branch > 0, waits=waits)
        try:
            facts = placement.check_nodes(launch.run_dir)
            here = get_node_ip_address()
            nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
            far = launch.experiment.cluster.tcp or nodes != {here}
            placement.only_at = "" if far else here
            fetch = launch.experiment.buffer.weights == "zmq"
            run_id = launch.run.run_id
            with scratch(launch.run_dir, run_id, bytes_per_version, fetch=fetch) as places:
                if far:
                    learners = facts[: launch.experiment.cluster.learner_ranks]
                    hosts = {each["address"] for each in learners}
                    places = _reachable(places, here, launch, len(hosts))
                with _keys(new_keys() if far else {}) as keys:
                    yield places, lambda plan: start_on_ray(plan, launch, placement, keys)
        finally:
            shutil.rmtree(launch.run_dir / "weights", ignore_errors=True)
            placement.remove()
    finally:
        ray.shutdown()


def _reachable(places: Scratch, address: str, launch: Launch, learner_hosts: int) -> Scratch:
    """The same places for processes on other machines: a port, and weights where the learner is or,
    as files or written by ranks on several hosts, in the run folder."""
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
    apart = learner_hosts > 1
    places = dataclasses.replace(places, endpoint=f"tcp://{address}:{port}", ranks_apart=apart)
    run_id, as_files = launch.run.run_id, launch.experiment.buffer.weights == "files"
    fetched = None if as_files else host_dir(run_id, "fetched")
    if as_files or learner_hosts > 1:
        published = launch.run_dir / "weights"
        published.mkdir(mode=0o700, exist_ok=True)
    else:
        published = host_dir(run_id, "published")
    return dataclasses.replace(places, weights_dir=published, fetched_dir=fetched)


@contextmanager
def _keys(keys: dict[str, str]) -> Iterator[dict[str, str]]:
    """Have the supervisor and its own children know the run's keys; yields what the others need."""
    os.environ.update(keys)
    try:
        yield {key: value for key, value in keys.items() if key != SECRET}
    finally:
        for key in keys:
            os.environ.pop(key, None)


def find_cluster(address: str) -> str:
    """HOST:PORT of a cluster that answers; Ray itself waits for minutes on one that does not.

    Raises:
        ConfigError: there is none.
    """
    found = resolve(address)
    if found == "auto":  # the one this machine is part of
        found = read_ray_address() or ""
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster at {address!r}: {error}. `slipstream cluster up --local 1` starts one "
            "on this machine"
        ) from None
    return found


def connect(address: str, folder: Path, *, with_code: bool = False) -> None:
    """Join a cluster, from the run folder: Ray puts the driver's directory on its workers' path.

    Args:
        address: `auto`, or HOST:PORT of its head.
        folder: the run folder.
        with_code: bring the code that is installed here to the nodes.
    Raises:
        ConfigError: there is none, or it refuses.
    """
    found, ours = find_cluster(address), signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.chdir(folder), tempfile.TemporaryDirectory() as code:
            brought = runtime_environment(Path(code)) if with_code else None
            ray.init(address=found, namespace="slipstream", log_to_driver=False,
                     logging_level=logging.ERROR, runtime_env=brought)  # fmt: skip
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)  # Ray's would exit instead of saving first
    except (OSError, RayError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the Ray cluster at {found} refuses: {error}") from None


def start_on_ray(
    plan: ProcessPlan, launch: Launch, placement: Placement, keys: dict[str, str]
) -> Child:
    """Start one process: learner ranks and workers in their bundles, the others here."""
    working_dir = Path(launch.run.working_dir)
    if plan.name in ("buffer", "feeder"):
        return plan.start(launch.run_dir, working_dir)
    argv = plan.write(launch.run_dir)
    experiment = launch.experiment
    given = [
        section.arguments for section in (experiment.reward, experiment.environment) if section
    ]
    extra = user_module_path(plan.spec, working_dir) | named_variables(*given) | keys
    actor = placement.actor(plan.name)
    return RayChild(
        plan.name,
        launch.run_dir,
        actor,
        (argv, str(launch.run_dir), plan.threads, extra),
        asks=placement.words(plan.name),
        gone=lambda: placement.free(plan.name),
        # `check_nodes` saw the first nodes; one that joins later must not end a run that is well.
        patient=kind_of(plan.name) == "worker",
        again=lambda: placement.actor(plan.name),
    )
