"""Where the processes of a run go on a Ray cluster, and in words what it lacks for them."""

import functools
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..buffer.errors import ConfigError
from .cluster import ClusterConfig
from .ray_child import ProcessActor, answer, unfit, versions
from .schema import Experiment, with_workers
from .specs import learner_names

PLACE_DEADLINE_S = 60.0
RELEASE_S, REPLACE_S = 10.0, 60.0
"""What a start waits for room: until Ray has noticed that the run before ended; until a node that
was lost with the branch before is replaced, when not even one worker fits."""
LOOK_S = 0.5
FACTS_S = 120.0
"""So long no further actor answers: its node fetches our code and starts Python meanwhile."""

Bundle = dict[str, float]


def bundles(experiment: Experiment) -> tuple[list[Bundle], list[Bundle]]:
    """What is reserved: one bundle per learner rank, one per rollout worker.

    With `placement = "shared"` a worker lives in the bundle of a learner rank.
    """
    config, workers = experiment.cluster, experiment.rollout.workers
    learner = [_bundle(config.learner_cpus, config.learner_gpus)] * config.learner_ranks
    worker = _bundle(config.worker_cpus, config.worker_gpus)
    if config.placement == "split":
        return learner, [worker] * workers
    shared = [
        {key: rank.get(key, 0) + (worker.get(key, 0) if number < workers else 0)
         for key in rank.keys() | worker.keys()}
        for number, rank in enumerate(learner)
    ]  # fmt: skip
    return shared, [worker] * (workers - len(learner))


def _bundle(cpus: float, gpus: float) -> Bundle:
    return {key: amount for key, amount in (("CPU", cpus), ("GPU", gpus)) if amount}


def shortage(experiment: Experiment, nodes: list[Bundle]) -> str:
    """What a cluster of free resources lacks for an experiment, in words; empty when it fits."""
    learner, workers = bundles(experiment)
    config = experiment.cluster
    for key, word in (("GPU", "GPUs"), ("CPU", "processors")):
        asked = sum(bundle.get(key, 0) for bundle in (*learner, *workers))
        free = sum(node.get(key, 0) for node in nodes)
        if asked > free + 1e-6:
            return (
                f"the run asks for {asked:g} {word} ({_ask(config, key, experiment)}), and "
                f"{free:g} are free on {len(nodes)} nodes; add nodes, or lower "
                f"cluster.learner_ranks, rollout.workers or cluster.worker_{key.lower()}s"
            )
        largest = max((node.get(key, 0) for node in nodes), default=0)
        biggest = max((bundle.get(key, 0) for bundle in (*learner, *workers)), default=0)
        if biggest > largest + 1e-6:
            return (
                f"one process asks for {biggest:g} {word}, and the largest node has {largest:g} "
                "free; a process cannot span nodes"
            )
    return ""


def _ask(config: ClusterConfig, key: str, experiment: Experiment) -> str:
    each = (config.learner_gpus, config.worker_gpus)
    if key == "CPU":
        each = (config.learner_cpus, config.worker_cpus)
    workers = experiment.rollout.workers
    ranks = f"{config.learner_ranks} learner ranks of {each[0]:g}"
    return f"{ranks}, {workers} rollout workers of {each[1]:g}"


def _fewest(experiment: Experiment) -> Experiment:
    """The same with as few workers as a run can go on with: one, or one beside each rank."""
    config, workers = experiment.cluster, experiment.rollout.workers
    fewest = min(workers, config.learner_ranks if config.placement == "shared" else 1)
    return with_workers(experiment, fewest)


def _room(asked: list[Bundle], nodes: list[Bundle]) -> int:
    """How many bundles like the first fit on nodes with so much free."""
    ask = asked[0] if asked else {}
    if not ask:
        return sys.maxsize
    return sum(
        int(min((node.get(key, 0) + 1e-6) / amount for key, amount in ask.items()))
        for node in nodes
    )


class Placement:
    """The reserved bundles of a run: the learner's packed, the workers' spread.

    The learner's group comes first: it takes whole nodes, and engines fill what is left. A worker
    that joins later, or for which a run that began has no room any more, has a bundle of its own,
    which waits for room, and is given back with it.
    """

    def __init__(
        self,
        experiment: Experiment,
        patience_s: float = 0.0,
        *,
        began: bool = False,
        waits: Callable[[str], None] = lambda what: None,
    ) -> None:
        """Reserve.

        Args:
            experiment: says how much.
            patience_s: for what a process that has just ended holds.
            began: the run goes on with fewer workers, rather than not at all.
            waits: told again and again what is waited for; raises to give up.
        Raises:
            ConfigError: what is asked is not there, in words.
        """
        self._experiment, self._config, self._waits = experiment, experiment.cluster, waits
        self._began = began
        self._groups: list[PlacementGroup] = []
        self._later: dict[str, PlacementGroup] = {}
        self.only_at = ""
        """The address that all must be at, because the run's sockets reach no further."""
        problem = self._lacking(experiment, patience_s)
        if problem and began:
            problem = self._lacking(_fewest(experiment), REPLACE_S)
        if problem:
            raise ConfigError(problem)
        learner, workers = bundles(experiment)
        self._sharing = experiment.rollout.workers - len(workers)
        """How many of the workers live in bundles of the learner's."""
        try:
            self._learner = self._reserve(learner, "PACK", "the learner's ranks")
            if began:
                fewest = len(bundles(_fewest(experiment))[1])
                workers = workers[: max(fewest, _room(workers[:1], free_resources()))]
            spread = "SPREAD" if self._config.spread else "PACK"
            self._workers = self._reserve(workers, spread, "rollout workers") if workers else None
        except BaseException:
            self.remove()
            raise

    def _lacking(self, experiment: Experiment, patience_s: float) -> str:
        """What the cluster lacks after waiting for so long; empty once it fits."""
        end = time.monotonic() + patience_s
        while (problem := shortage(experiment, free_resources())) and time.monotonic() < end:
            self._waits(f"room on the Ray cluster: {problem}")
            time.sleep(LOOK_S)
        return problem

    def _reserve(self, bundles: list[Bundle], strategy: str, what: str) -> PlacementGroup:
        empty_allowed = [bundle or {"CPU": 0.001} for bundle in bundles]  # Ray refuses empty ones
        group = placement_group(empty_allowed, strategy=strategy)
        self._groups.append(group)
        end = time.monotonic() + PLACE_DEADLINE_S
        while not group.wait(1):  # whole seconds
            self._waits(f"Ray to place {what}: {bundles}")
            if time.monotonic() > end:
                raise ConfigError(
                    f"Ray could not place {what} within {PLACE_DEADLINE_S:.0f} s: {bundles}; the "
                    f"free resources are in pieces: {free_resources()}"
                )
        return group

    def bundle(self, name: str) -> tuple[PlacementGroup, int, Bundle]:
        """Where a process goes, and with what."""
        config = self._config
        if name.startswith("learner"):
            index = int(name.partition("-")[2] or 0)
            return self._learner, index, _bundle(config.learner_cpus, config.learner_gpus)
        ask, number = _bundle(config.worker_cpus, config.worker_gpus), int(name.partition("-")[2])
        if number < self._sharing:
            return self._learner, number, ask
        if self._workers is not None and number - self._sharing < self._workers.bundle_count:
            return self._workers, number - self._sharing, ask
        if name not in self._later:
            place = {f"node:{self.only_at}": 0.001} if self.only_at else {}
            self._later[name] = placement_group([(ask or {"CPU": 0.001}) | place], strategy="PACK")
        return self._later[name], 0, ask

    def free(self, name: str) -> None:
        """Give back what a worker that joined later had."""
        if name in self._later:
            with suppress(RayError):
                remove_placement_group(self._later.pop(name))

    def words(self, name: str) -> str:
        """What a process asks for."""
        ask = self.bundle(name)[2]
        told = ", ".join(f"{amount:g} {key}" for key, amount in ask.items()) or "nothing"
        return f"{told} at {self.only_at}" if self.only_at and name in self._later else told

    def actor(self, name: str) -> Any:
        """A new actor in its bundle."""
        group, index, ask = self.bundle(name)
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=index
        )
        remote = ray.remote(ProcessActor).options(
            num_cpus=ask.get("CPU", 0),
            num_gpus=ask.get("GPU", 0),
            max_concurrency=4,  # `ended` waits while the others answer
            scheduling_strategy=strategy,
        )
        return remote.remote()

    def check_nodes(self, run_dir: Path) -> list[dict[str, Any]]:
        """Compare the nodes that are reserved with the head, before anything starts.

        Of a run that began only the learner's: a worker waits for a node that cannot take part.

        Returns:
            The facts of each learner rank, then of each worker that was looked at, in order.
        Raises:
            ConfigError: versions differ, a file is not seen there, the engine does not work, or a
                node is silent.
        """
        placed = self._sharing + (self._workers.bundle_count if self._workers else 0)
        workers = [] if self._began else [f"worker-{n}" for n in range(placed)]
        names = [*learner_names(self._experiment), *workers]
        actors = [self.actor(name) for name in names]
        try:
            asked = {a.facts.remote(str(run_dir)): n for a, n in zip(actors, names, strict=True)}
            self._await_all(asked)
            facts = [answer(reference) for reference in asked]
        finally:
            for actor in actors:
                ray.kill(actor)
        for name, each in zip(names, facts, strict=True):
            if problem := unfit(each, versions(), str(run_dir), name):
                raise ConfigError(problem)
        return facts

    def _await_all(self, asked: dict[Any, str]) -> None:
        """Wait for the answers of the actors of so named processes."""
        end, before = time.monotonic() + FACTS_S, len(asked)
        node = functools.cache(self._node)  # it asks Ray, and a place stays where it is
        while silent := ray.wait([*asked], num_returns=len(asked), timeout=LOOK_S)[1]:
            if len(silent) < before:
                end, before = time.monotonic() + FACTS_S, len(silent)
            names = [asked[reference] for reference in silent]
            what = ", ".join(f"{name} on node {node(name)}" for name in names)
            self._waits(f"the Ray actors of {what}")
            if time.monotonic() > end:
                raise ConfigError(
                    f"the Ray actors of {what} have not answered for {FACTS_S:.0f} s; mend those "
                    "nodes, or remove them from the cluster"
                )

    def _node(self, name: str) -> str:
        """The address of the node where a process has its place."""
        group, index, _ = self.bundle(name)
        held = placement_group_table(group)["bundles_to_node_id"][index]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return f"{addresses.get(held, 'unknown')} ({held[:8]})"

    def remove(self) -> None:
        """Give everything back."""
        for group in (*self._groups, *self._later.values()):
            with suppress(RayError):
                remove_placement_group(group)
        self._groups.clear()
        self._later.clear()


def free_resources() -> list[Bundle]:
    """Processors and devices that are free on each living node."""
    from ray._private.state import available_resources_per_node  # what `ray status` reads

    free = available_resources_per_node()
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    return [{k: free.get(n, {}).get(k, 0.0) for k in ("CPU", "GPU")} for n in alive]
