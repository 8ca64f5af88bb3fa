"""Placement on a real Ray: declared devices, real actors, real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from slipstream.buffer.errors import ConfigError
from slipstream.configs import engines, ray_child
from slipstream.configs import placement as placement_module
from slipstream.configs.load import load_table
from slipstream.configs.placement import Placement, bundles, shortage
from slipstream.configs.policy import failure_of
from slipstream.configs.ray_child import RayChild, unfit
from slipstream.configs.ray_code import runtime_environment
from slipstream.configs.ray_launcher import _reachable, connect
from slipstream.configs.run_dir import create_run_dir, read_run, update_run
from slipstream.configs.schema import Experiment
from slipstream.configs.scratch import Scratch, host_dir
from slipstream.configs.specs import Launch, learner_spec
from slipstream.configs.supervisor import Stopped, outcome_of

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray leaves sockets to the garbage collector


def experiment(workers: int = 2, **cluster: Any) -> Experiment:
    table = {
        "launcher": "ray",
        "rollout": {"workers": workers},
        "learner": {"steps": 2},
        "cluster": cluster,
    }
    return load_table(table, name="placed").experiment


FLEET = {"learner_ranks": 16, "learner_gpus": 1, "worker_gpus": 4, "worker_cpus": 0,
         "learner_cpus": 0}  # fmt: skip
"""16 learner ranks and, with 4 workers, 4 engines of tensor-parallel size 4: all of 4 x 8 GPUs."""


@pytest.mark.parametrize(
    ("workers", "cluster", "nodes", "words"),
    [
        (4, FLEET, [{"GPU": 8, "CPU": 1}] * 4, ""),
        (
            4,
            FLEET,
            [{"GPU": 8}] * 3 + [{"GPU": 7}],
            "asks for 32 GPUs (16 learner ranks of 1, 4 rollout workers of 4), and 31 are free on "
            "4 nodes",
        ),
        (1, {"worker_gpus": 16}, [{"GPU": 8, "CPU": 9}] * 2, "a process cannot span nodes"),
        (3, {"worker_cpus": 2}, [{"CPU": 6}], "asks for 7 processors"),
    ],
)
def test_what_a_cluster_lacks_is_said_in_words(
    workers: int, cluster: dict[str, Any], nodes: list[dict[str, float]], words: str
) -> None:
    told = shortage(experiment(workers, **cluster), nodes)
    assert words in told
    assert bool(told) == bool(words)


@pytest.mark.parametrize("gpus", [1, 4])
def test_a_tensor_parallel_engine_must_be_given_a_device_for_each_rank(gpus: int) -> None:
    table = {
        "launcher": "ray",
        "rollout": {"engine": "vllm", "vllm": {"tensor_parallel": 4}},
        "cluster": {"worker_gpus": gpus},
    }
    said = ""
    try:
        load_table(table, name="parallel")
    except ConfigError as error:
        said = str(error)
    assert ("set cluster.worker_gpus = 4" in said) == (gpus == 1), said


def test_shared_placement_puts_a_worker_and_a_rank_into_one_bundle() -> None:
    shared = experiment(
        3, placement="shared", learner_ranks=2, learner_gpus=0.6, worker_gpus=0.4, worker_cpus=1
    )
    learner, workers = bundles(shared)
    assert learner == [{"CPU": 2.0, "GPU": 1.0}] * 2
    assert workers == [{"CPU": 1.0, "GPU": 0.4}]


@pytest.mark.parametrize("weights", ["auto", "zmq", "files"])
@pytest.mark.parametrize("learner_hosts", [1, 2])
def test_ranks_on_several_hosts_write_weights_where_all_of_them_see_the_file(
    tmp_path: Path, weights: str, learner_hosts: int
) -> None:
    table = {"launcher": "ray", "runs_dir": str(tmp_path), "buffer": {"weights": weights},
             "cluster": {"learner_ranks": 2}}  # fmt: skip
    loaded = load_table(table, name="placed")
    run_dir = create_run_dir(loaded, None)
    told = Launch(
        experiment=loaded.experiment, run=read_run(run_dir), run_dir=run_dir, model_dir=tmp_path
    )
    here = Scratch(endpoint="ipc://none", weights_dir=tmp_path)
    places = _reachable(here, "127.0.0.1", told, learner_hosts)
    alone = learner_hosts == 1 and weights != "files"
    shared = run_dir / "weights"
    assert places.weights_dir == (host_dir(told.run.run_id, "published") if alone else shared)
    assert shared.is_dir() != alone
    assert (places.fetched_dir is None) == (weights == "files")
    spec = learner_spec(told, places)
    assert spec.ranks_apart == (learner_hosts > 1), "ranks of one host meet on its loopback address"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
    table = {"launcher": "ray", "learner": {"steps": 2}}
    create_run_dir(load_table(table, name="placed"), tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    update_run(tmp_path, model_dir=str(tmp_path / "model"))
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_process_on_a_node_is_signalled_and_ends_as_a_local_one(
    cluster: Cluster, tmp_path: Path
) -> None:
    connect(cluster.address or "", tmp_path)
    placement = Placement(experiment(1, worker_cpus=0.5, learner_cpus=0.5))
    placement.check_nodes(tmp_path)
    script = "import os, time; print('up', os.getcwd(), flush=True); time.sleep(600)"
    argv = [sys.executable, "-c", script]

    def start() -> RayChild:
        actor = placement.actor("worker-0")
        child = RayChild("worker-0", tmp_path, actor, (argv, str(tmp_path), 1, {}))
        wait_for(lambda: child.placed() and "up" in child.log_tail(), 30)
        return child

    child = start()
    assert child.poll() is None
    assert str(tmp_path) in child.log_tail()
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    assert "was killed by SIGKILL" in child.why()

    child = start()
    actor = psutil.Process(child.pid).ppid()
    os.kill(actor, signal.SIGSTOP)
    began = time.monotonic()
    child.terminate()  # does not wait for an actor that is cut off
    assert time.monotonic() - began < 5
    os.kill(actor, signal.SIGCONT)
    assert child.wait(10) == -signal.SIGTERM

    child = start()
    pid = child.pid
    child.kill()
    assert child.poll() == -signal.SIGKILL
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 10)
    placement.remove()


@pytest.mark.slow
def test_sixteen_ranks_and_four_engines_of_four_share_no_device_and_survive_a_lost_node(
    cluster: Cluster, tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_gpus=8, num_cpus=1) for _ in range(4)]
    cluster.wait_for_nodes()
    connect(cluster.address or "", tmp_path)
    fleet = experiment(4, **FLEET)
    placement = Placement(fleet)
    facts = placement.check_nodes(tmp_path)
    ranks, engines = facts[:16], facts[16:]
    assert [len(each["devices"]) for each in ranks] == [1] * 16
    assert [len(each["devices"]) for each in engines] == [4] * 4
    held = [(each["node"], device) for each in facts for device in each["devices"]]
    assert len(held) == len(set(held)) == 32
    assert len({each["node"] for each in ranks}) == 2, "packed: two whole nodes"
    assert len({each["node"] for each in engines}) == 2
    placement.remove()

    too_many = experiment(4, **FLEET | {"learner_ranks": 17})
    wait_for_gpus(32)
    with pytest.raises(ConfigError, match=r"asks for 33 GPUs .* and 32 are free on 5 nodes"):
        Placement(too_many)

    cluster.remove_node(nodes[0])
    wait_for_gpus(24)
    with pytest.raises(ConfigError, match=r"asks for 32 GPUs .* and 24 are free on 4 nodes"):
        Placement(fleet)
    cluster.add_node(num_gpus=8, num_cpus=1)
    wait_for_gpus(32)
    again = Placement(fleet).check_nodes(tmp_path)
    held = [(each["node"], device) for each in again for device in each["devices"]]
    assert len(held) == len(set(held)) == 32


@pytest.mark.slow
def test_a_worker_for_which_there_is_no_room_starts_when_a_node_joins_and_gives_its_place_back(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_child, "PLACE_PATIENCE_S", 0.5)
    connect(cluster.address or "", tmp_path)
    placement = Placement(experiment(1))  # the two processors of the head
    argv = [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)"]

    def start(name: str) -> RayChild:
        return RayChild(
            name, tmp_path, placement.actor(name), (argv, str(tmp_path), 1, {}),
            asks=placement.words(name), gone=lambda: placement.free(name),
        )  # fmt: skip

    late, later = start("worker-1"), start("worker-2")
    wait_for(lambda: bool(late.waits_for), 5)
    assert late.waits_for == "room on the Ray cluster (1 CPU): add a node"
    assert late.poll() is None
    later.terminate()  # one that has no place yet leaves at once
    assert later.poll() == -signal.SIGKILL
    node = cluster.add_node(num_cpus=1)
    wait_for(lambda: late.placed() and "up" in late.log_tail(), 30)
    assert late.waits_for == ""
    cluster.remove_node(node, allow_graceful=False)
    wait_for(lambda: late.poll() is not None, 30)
    assert late.place
    assert late.why() == f"node {late.place[:8]}, or its Ray actor there, was lost"
    wait_for(lambda: len(live_groups()) == 2, 10)
    placement.remove()
    wait_for(lambda: not live_groups(), 10)


@pytest.mark.slow
def test_under_shared_placement_a_rank_and_its_worker_see_the_same_device(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=2, num_gpus=2)
    cluster.wait_for_nodes()
    connect(cluster.address or "", tmp_path)
    shared = experiment(
        2, placement="shared", learner_ranks=2, learner_gpus=0.6, worker_gpus=0.4,
        learner_cpus=0.5, worker_cpus=0.5,
    )  # fmt: skip
    placement = Placement(shared)
    facts = placement.check_nodes(tmp_path)
    seen = [(each["node"], each["devices"]) for each in facts]
    assert seen[:2] == seen[2:]
    assert sorted(devices for _, devices in seen[:2]) == [["0"], ["1"]]
    placement.remove()


def test_a_run_that_began_goes_on_with_the_workers_for_which_there_is_room(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    connect(cluster.address or "", tmp_path)
    asked = experiment(2, worker_cpus=1.5)  # and 1 for the learner: 4 are there, in two pieces
    placement = Placement(asked, began=True)
    argv = [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)"]
    first, late = (
        RayChild(
            name, tmp_path, placement.actor(name), (argv, str(tmp_path), 1, {}),
            gone=partial(placement.free, name),
        )
        for name in ("worker-0", "worker-1")
    )  # fmt: skip
    wait_for(lambda: first.placed() and "up" in first.log_tail(), 30)
    time.sleep(3.0)  # as long as the other would have needed
    assert late.poll() is None
    assert not late.placed()
    first.kill()
    with pytest.raises(ConfigError, match="asks for 4 processors"):
        Placement(asked)
    cluster.add_node(num_cpus=2)
    wait_for(lambda: late.placed() and "up" in late.log_tail(), 30)
    late.kill()
    placement.remove()


def test_a_run_that_began_is_not_ended_by_a_workers_node_for_which_the_worker_can_wait(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(cluster.address or "", tmp_path)
    lacking = "worker"
    monkeypatch.setattr(
        placement_module, "unfit", lambda *facts: "lacks" if facts[3].startswith(lacking) else ""
    )
    asked = experiment(1, worker_cpus=0.5, learner_cpus=0.5)
    first, again = Placement(asked), Placement(asked, began=True)
    with pytest.raises(ConfigError, match="lacks"):
        first.check_nodes(tmp_path)
    assert len(again.check_nodes(tmp_path)) == 1, "the learner's"
    lacking = "learner"
    with pytest.raises(ConfigError, match="lacks"):
        again.check_nodes(tmp_path)
    first.remove()
    again.remove()


@pytest.mark.slow
def test_whoever_waits_for_the_cluster_is_told_what_for_and_can_give_up(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    connect(cluster.address or "", tmp_path)
    told: list[str] = []

    def waits(what: str) -> None:
        told.append(what)
        raise Stopped

    for asked in (experiment(9), experiment(2, worker_cpus=1.5)):  # too much; in pieces
        with pytest.raises(Stopped):
            Placement(asked, 60.0, waits=waits)
    assert told[0].startswith("room on the Ray cluster: the run asks for 10 processors")
    assert told[1].startswith("Ray to place rollout workers")
    wait_for(lambda: not live_groups(), 10)

    placement = Placement(experiment(1, worker_cpus=2, learner_cpus=2), 10.0)
    raylet = node.all_processes["raylet"][0].process
    raylet.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(placement_module, "FACTS_S", 5.0)
    with pytest.raises(ConfigError, match=r"actors of \S+ on node [\d.]+ \(\w{8}\) have not answ"):
        placement.check_nodes(tmp_path)
    raylet.send_signal(signal.SIGCONT)
    placement.remove()


def test_a_worker_waits_on_a_node_that_cannot_take_part_and_a_rank_ends_with_its_words(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_child, "PLACE_PATIENCE_S", 0.5)
    connect(cluster.address or "", tmp_path)
    placement = Placement(experiment(1, worker_cpus=0.5, learner_cpus=0.5))
    argv = [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)"]
    with monkeypatch.context() as another:
        here = ray_child.versions()
        another.setattr(ray_child, "versions", lambda: here | {"torch": "0"})
        rank, worker = (
            RayChild(
                name, tmp_path, placement.actor(name), (argv, str(tmp_path), 1, {}), patient=patient
            )
            for name, patient in (("learner", False), ("worker-0", True))
        )
        wait_for(lambda: rank.poll() is not None, 30)
        assert failure_of(rank) == "refused"
        assert rank.why().startswith("ConfigError: node ")
        assert outcome_of(rank).exit_code == 2
        wait_for(lambda: "which cannot take part: node " in worker.waits_for, 30)
        assert worker.poll() is None
    wait_for(lambda: worker.placed() and "up" in worker.log_tail(), 30)  # the node was mended
    assert worker.waits_for == ""
    worker.kill()
    placement.remove()


class Unmade:
    """An actor whose node lacks what its module imports."""

    def __init__(self) -> None:
        raise ModuleNotFoundError("No module named 'pydantic'")

    def start(self, *arguments: Any) -> None: ...


@pytest.mark.slow
def test_an_actor_that_cannot_be_made_is_a_node_that_cannot_take_part_until_it_can(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_child, "PLACE_PATIENCE_S", 2.0)
    connect(cluster.address or "", tmp_path)
    placement = Placement(experiment(1, worker_cpus=0.5, learner_cpus=0.5))
    argv = [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)"]
    unmade, mended = ray.remote(Unmade).options(num_cpus=0), threading.Event()

    def again() -> Any:
        return placement.actor("worker-0") if mended.is_set() else unmade.remote()

    rank, worker = (
        RayChild(
            name, tmp_path, again(), (argv, str(tmp_path), 1, {}), patient=patient, again=again
        )
        for name, patient in (("learner", False), ("worker-0", True))
    )
    wait_for(lambda: rank.poll() is not None, 30)
    assert "No module named" in rank.why()
    assert "SIGKILL" not in rank.why()
    wait_for(lambda: "which cannot take part: " in worker.waits_for, 30)
    assert "No module named" in worker.waits_for
    assert worker.poll() is None
    mended.set()
    wait_for(lambda: worker.placed() and "up" in worker.log_tail(), 60)
    worker.kill()
    placement.remove()


def live_groups() -> list[str]:
    """Ids of the placement groups that hold or want resources."""
    table = ray.util.placement_group_table()
    return [key for key, group in table.items() if group["state"] != "REMOVED"]


@pytest.mark.slow
def test_a_node_runs_the_code_that_the_head_has(cluster: Cluster, tmp_path: Path) -> None:
    connect(cluster.address or "", tmp_path, with_code=True)
    placement = Placement(experiment(1, worker_cpus=0.5, learner_cpus=0.5))
    script = (
        "import slipstream.buffer as b, importlib.metadata as m; "
        "print(b.__file__, m.version('slipstream'))"
    )
    argv = [sys.executable, "-P", "-c", script]
    start = (argv, str(tmp_path), 1, {"PYTHONPATH": "/the/user's"})
    child = RayChild("worker-0", tmp_path, placement.actor("worker-0"), start)
    assert child.wait(60) == 0, child.why()
    assert "py_modules_files" in child.log_tail(), "brought by Ray, before what is installed"
    placement.remove()


def test_what_is_brought_to_nodes_is_the_installed_package_with_its_plug_ins(
    tmp_path: Path,
) -> None:
    modules = runtime_environment(tmp_path)["py_modules"]
    assert all(Path(module).parent == tmp_path for module in modules)
    script = (
        "import slipstream.buffer.errors as e, slipstream.configs as c, importlib.metadata as m; "
        "print(e.__file__, c.__file__, m.version('slipstream'), "
        "len(m.entry_points(group='slipstream.rewards')))"
    )
    said = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    ).stdout.split()  # fmt: skip
    assert all(path.startswith(str(tmp_path)) for path in said[:2])
    assert said[2] == metadata.version("slipstream")
    assert int(said[3]) >= len(metadata.entry_points(group="slipstream.rewards"))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({}, ""),
        ({"sees": False}, "node n does not see /runs/r: put runs_dir"),
        (
            {"versions": {"ray": "1", "torch": "2"}},
            "node n has {'ray': '1'}, this one {'ray': '2'}",
        ),
        ({"unseen": "/m/config.json"}, "node n does not see /m/config.json: put it on a file"),
        ({"engine": "vLLM is not installed"}, "node n: vLLM is not installed"),
    ],
)
def test_a_node_that_joins_must_have_what_the_head_has(other: dict[str, Any], words: str) -> None:
    facts = {"host": "n", "sees": True, "unseen": "", "engine": "",
             "versions": {"ray": "2", "torch": "2"}} | other  # fmt: skip
    told = unfit(facts, {"ray": "2", "torch": "2"}, "/runs/r", "worker-1")
    assert words in told
    assert bool(told) == bool(words)
    rank = unfit(facts, {"ray": "2", "torch": "2"}, "/runs/r", "learner-1")
    assert rank == ("" if "engine" in other else told), "an engine is its workers' alone"


def test_a_node_tells_what_it_lacks_of_a_run_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def score(completion, prompt): return 1.0\n")
    (tmp_path / "model").mkdir()
    table = {"runs_dir": str(tmp_path), "learner": {"steps": 2}, "rollout": {"engine": "vllm"},
             "reward": {"name": f"{tmp_path}/mine.py:score"}}  # fmt: skip
    run_dir = create_run_dir(load_table(table, name="lacking"), None)
    update_run(run_dir, model_dir=str(tmp_path / "model"))
    assert ray_child.unseen(run_dir) == str(tmp_path / "model" / "config.json")
    (tmp_path / "model" / "config.json").touch()
    assert ray_child.unseen(run_dir) == ""
    (tmp_path / "mine.py").unlink()
    assert ray_child.unseen(run_dir) == str(tmp_path / "mine.py")
    monkeypatch.setattr(engines, "version", lambda name: "")
    told = ray_child.engine_problem(run_dir)
    assert told.startswith('rollout.engine = "vllm" does not work: vLLM is not installed')
    monkeypatch.setattr(ray_child, "version", lambda name: "")
    assert ray_child.versions()["transformers"] == "missing"


def wait_for_gpus(number: int) -> None:
    wait_for(lambda: ray.available_resources().get("GPU", 0) == number, 60)


def wait_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "condition did not come true in time"
        time.sleep(0.05)


def test_without_a_cluster_the_refusal_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="slipstream cluster up --local 1"):
        connect("127.0.0.1:1", tmp_path)
