"""`[cluster]`: what a run's processes may take, where they go, and what happens when one dies.

Read by both launchers; what only Ray can do is said so in its line.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..buffer.config import Settings


class ClusterConfig(Settings):
    """`[cluster]`: resources and placement of the processes, restarts and deadlines."""

    restarts: Annotated[int, Field(ge=0)] = 3
    """How often each kind of process is restarted within ten minutes or without progress of the
    run, and how often a run goes back to its checkpoint without reaching a new one. 0: any failure
    ends the run, with the command that resumes it."""
    stall_s: Annotated[float, Field(gt=0)] = 300.0
    """A training step, a model or weights being loaded, or an engine that shows no progress for so
    long is taken for hung: the chain of waits and the stacks are printed and its process is
    restarted. Longer than your longest training step, and than reading your model."""
    min_workers: Annotated[int, Field(ge=0)] = 0
    """With `max_workers`: bounds within which rollout workers are added while the learner waits for
    them, and removed while they wait for the learner. 0: their number stays as it is."""
    max_workers: Annotated[int, Field(ge=0)] = 0
    address: str = "auto"
    """Ray: `auto` (the cluster this machine is part of), or HOST:PORT of its head."""
    tcp: bool = False
    """Ray: meet over TCP, encrypted, with a key made for the run, even when all nodes are on this
    machine; between machines it is always so."""
    worker_cpus: Annotated[float, Field(ge=0)] = 1.0
    """Ray: processors reserved for one rollout worker."""
    worker_gpus: Annotated[float, Field(ge=0)] = 0.0
    """Ray: devices of one rollout worker; a fraction shares a device, a tensor-parallel engine
    takes as many as it has ranks (all on one node)."""
    learner_cpus: Annotated[float, Field(ge=0)] = 1.0
    """Ray: processors reserved for one learner rank."""
    learner_gpus: Annotated[float, Field(ge=0)] = 0.0
    """Ray: devices of one learner rank."""
    learner_ranks: Annotated[int, Field(ge=1)] = 1
    """Processes that share the learner's work: each holds a part of every weight and trains a part
    of every batch (FSDP2). Changes gradients by rounding alone; a run resumes on any number. Under
    Ray on as few nodes as possible."""
    gpu_memory_gib: Annotated[float, Field(ge=0)] = 0.0
    """Device memory that one learner rank may use, less what CUDA, NCCL and other processes on the
    device take; `slipstream plan --deep` refuses what needs more. 0: not stated."""
    spread: bool = True
    """Ray: rollout workers on as many nodes as possible; false: on as few."""
    placement: Literal["split", "shared"] = "split"
    """Ray: `shared` puts one rollout worker into each learner rank's bundle, on its device: give
    both fractions of it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_workers < self.min_workers:
            raise ValueError(
                f"cluster.max_workers = {self.max_workers} is below cluster.min_workers = "
                f"{self.min_workers}; raise it, or set both to 0"
            )
        if self.placement == "shared" and self.worker_gpus + self.learner_gpus > 1:
            raise ValueError(
                'cluster.placement = "shared" puts a worker and a learner rank on one device, but '
                f"worker_gpus + learner_gpus = {self.worker_gpus + self.learner_gpus:g}; give them "
                "fractions that add up to 1 at most"
            )
        return self
