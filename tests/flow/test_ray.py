"""The same experiment under Ray, on three nodes of this machine."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from . import test_sizes
from .test_resume import losses, run_file, sampled

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
START_DEADLINE_S = 240.0


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    for _ in range(2):
        made.add_node(num_cpus=2)
    yield made
    ray.shutdown()
    made.shutdown()


def test_at_no_staleness_a_run_under_ray_equals_the_local_one_to_the_bit(
    system: Any, cluster: Cluster
) -> None:
    system.make_inputs(torch.float64)
    steps = 8
    system.experiment(steps=steps, dtype="float64", max_concurrent=1)
    address = ("--launcher", "ray", "--address", cluster.address)
    plain = ("run", "experiment.toml", "--no-export", "--output")
    system.start(*plain, "local").ended()
    told = system.start(*plain, "ray", *address, "cluster.tcp=true").ended()
    local, placed = system.folder / "local", system.folder / "ray"
    assert "audit: ok" in told
    assert losses(placed) == losses(local)
    assert list(losses(local)) == list(range(1, steps + 1))
    for step in range(1, steps + 1):
        assert sampled(placed, step) == sampled(local, step), f"step {step}"
    assert (placed / "logs" / "worker-0.log").exists()
    specs = [path.read_text() for path in (placed / "processes").glob("*.json")]
    assert sum('"endpoint": "tcp://' in spec for spec in specs) >= 4
    assert not any("SLIPSTREAM_CURVE" in spec for spec in specs)


def test_the_quickstart_on_three_nodes_and_two_ranks_reaches_the_reward_of_a_local_run(
    system: Any, cluster: Cluster, record_property: Callable[[str, object], None]
) -> None:
    address = ("--launcher", "ray", "--address", cluster.address, "cluster.learner_ranks=2")
    system.start("run", "quickstart", "--output", "local").ended(timeout_s=900)
    run, folder = (
        system.start("run", "quickstart", *address, "--output", "ray"),
        system.folder / "ray",
    )
    wait_for(run, lambda: (folder / "metrics.jsonl").exists())
    nodes = {node_of(cluster, folder, name) for name in ("learner", "worker-0", "worker-1")}
    assert len(nodes) >= 2, "workers are spread"
    assert "audit: ok" in run.ended(timeout_s=1500)
    local, placed = (run_file(system.folder / name)["result"] for name in ("local", "ray"))
    for name, result in (("local", local), ("ray", placed)):
        record_property(
            f"{name}, held-out reward", [result["reward_first"], result["reward_final"]]
        )
        record_property(f"{name}, seconds", result["total_seconds"])
        assert result["reward_final"]["ci95_low"] > result["reward_first"]["ci95_high"]
        assert (result["staleness_violations"], result["orphaned_tokens"]) == (0, 0)
        assert result["export"]["ok"]
    finals = [local["reward_final"], placed["reward_final"]]
    assert max(r["ci95_low"] for r in finals) <= min(r["ci95_high"] for r in finals)


def test_sizes_that_adapt_and_spare_samples_keep_the_books_under_ray(
    system: Any, cluster: Cluster
) -> None:
    address = ("--launcher", "ray", "--address", str(cluster.address))
    test_sizes.check(system, test_sizes.run(system, *address))


def test_two_learner_ranks_under_ray_equal_two_local_ones_and_meet_on_the_loopback_address(
    system: Any, cluster: Cluster
) -> None:
    system.make_inputs(torch.float64)
    system.experiment(steps=4, dtype="float64", max_concurrent=1)
    plain = ("run", "experiment.toml", "--no-export", "cluster.learner_ranks=2", "--output")
    system.start(*plain, "local").ended()
    address = ("--launcher", "ray", "--address", cluster.address)
    local, placed = system.folder / "local", system.folder / "ray"
    run = system.start(*plain, "ray", *address, "cluster.tcp=true")
    wait_for(run, lambda: bool(losses(placed)))
    listening = {name: listens(placed, name) for name in ("learner", "learner-1")}
    assert "audit: ok" in run.ended()
    assert losses(placed) == losses(local)
    assert list(losses(local)) == [1, 2, 3, 4]
    host = (placed / "processes" / "learner.b0.meet").read_text().split()[0]
    assert host == "127.0.0.1"
    assert set(listening["learner-1"]) == {"127.0.0.1"}
    beyond = [ip for ip in listening["learner"] if ip != "127.0.0.1"]
    assert len(beyond) <= 1, "the weights it serves, to a key"
    assert (placed / "logs" / "learner-1.log").exists()


def test_a_run_goes_on_when_a_worker_its_node_and_the_learner_are_lost(
    system: Any, cluster: Cluster
) -> None:
    system.make_inputs(torch.float32)
    system.experiment(steps=60, dtype="float32", workers=2, checkpoint_every=2)
    file = system.folder / "experiment.toml"
    file.write_text(
        file.read_text().replace('mode = "sequential"', "").replace(":reward", ":slow")
        + "[cluster]\nrestarts = 10\nworker_cpus = 2\nlearner_cpus = 1\n"
    )
    run = system.start(
        "run", "experiment.toml", "--no-export", "--output", "run",
        "--launcher", "ray", "--address", cluster.address,
    )  # fmt: skip
    folder = system.folder / "run"

    def step_reached(step: int) -> None:
        wait_for(run, lambda: max(losses(folder), default=0) >= step)

    step_reached(3)
    os.kill(pid(folder, "worker-0"), signal.SIGKILL)
    step_reached(max(losses(folder)) + 5)
    os.kill(pid(folder, "learner"), signal.SIGKILL)
    lost = len((folder / "metrics.jsonl").read_text().splitlines())
    wait_for(run, lambda: len((folder / "metrics.jsonl").read_text().splitlines()) >= lost + 4)
    cluster.remove_node(node_of(cluster, folder, "worker-1"), allow_graceful=False)
    step_reached(max(losses(folder)) + 5)  # with one worker
    os.kill(pid(folder, "learner"), signal.SIGKILL)  # now there is no room for the other
    wait_for(run, lambda: len(run_file(folder)["branches"]) == 3)
    lost = len((folder / "metrics.jsonl").read_text().splitlines())
    wait_for(run, lambda: len((folder / "metrics.jsonl").read_text().splitlines()) >= lost + 4)
    cluster.add_node(num_cpus=2)
    assert "audit: ok" in run.ended()
    assert max(losses(folder)) == 60
    branches = run_file(folder)["branches"]
    assert [b["status"] for b in branches] == ["failed", "failed", "finished"]


def listens(folder: Path, name: str) -> list[str]:
    """The addresses on which a process listens."""
    found = psutil.Process(pid(folder, name)).net_connections(kind="inet")
    return [each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN]


def pid(folder: Path, name: str) -> int:
    return int((folder / "processes" / f"{name}.pid").read_text())


def node_of(cluster: Cluster, folder: Path, name: str) -> Any:
    """The node that started a process."""
    above = {parent.pid for parent in psutil.Process(pid(folder, name)).parents()}
    return next(n for n in cluster.list_all_nodes() if _raylet(n) in above)


def _raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def wait_for(run: Any, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + START_DEADLINE_S
    while not condition():
        assert run.process.poll() is None, run.output.read_text()
        assert time.monotonic() < end, run.output.read_text()
        time.sleep(0.05)
