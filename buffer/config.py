"""Settings of the buffer, and what its service process is started with."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

StalePolicy = Literal["wait", "trim", "requeue", "drop"]
TakeOrder = Literal["oldest", "freshest", "uniform", "priority"]


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class BufferConfig(Settings):
    """`[buffer]`: how old a trained token may be, and what happens to those that are older."""

    max_staleness_steps: Annotated[float, Field(ge=0, le=64)] = 1
    """S. Every trained token's lag lies in [0, ceil(S)]. 0 is synchronous RL; 1 overlaps
    generation with training; a fraction scales admission only."""
    stale: StalePolicy = "trim"
    """What becomes of a trajectory over the bound after the wait: `trim` keeps it as context with
    zero weight on the stale prefix, `requeue` issues the prompt again, `drop` removes it (trains on
    short answers: the length bias in the proof line shows it). `wait` waits for up to
    `take_deadline_s` in place of `straggler_wait_s`, so that nothing is lost, and trims then."""
    straggler_wait_s: Annotated[float, Field(ge=0)] = 30.0
    """How long a step waits for samples in flight that it would push over the bound."""
    drop_no_signal: bool = True
    """Whether groups whose samples all got one reward leave the batch and are refilled. Has no
    effect with one sample per prompt."""
    take_order: TakeOrder = "oldest"
    """Which READY groups a step trains. `oldest` is the one under which waiting keeps all tokens in
    the bound; `freshest`, `uniform` (at random) and `priority` (largest spread of rewards) let
    others grow stale, which `stale` then deals with."""
    max_uses: Annotated[int, Field(ge=1, le=64)] = 1
    """How many steps may train a group. Above 1, a step with fewer than P groups READY is filled
    with groups already trained, while their tokens are in the bound; has no effect with S = 0."""
    demonstrations_per_step: Annotated[int, Field(ge=0, le=1024)] = 0
    """Success pool: when no sample of a group reaches `success_reward`, and one of the same prompt
    did before, that one is handed to a step as a demonstration, beside its batch and outside the
    law, at most so many a step; `learner.objective.demonstration_coefficient` weighs them."""
    success_reward: float = 1.0
    success_pool: Annotated[int, Field(ge=1)] = 4096
    """Prompts of which a success is kept, the first one; above it the oldest is forgotten."""
    task_max_staleness_steps: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Tighter S by task name. The prompts after one that has to wait for its own bound wait too."""
    lease_s: Annotated[float, Field(gt=0)] = 60.0
    """Without a heartbeat for so long, a worker's samples are issued to another."""
    max_waiting_prompts: Annotated[int, Field(ge=1)] = 1024
    """Back-pressure on the feeder: prompts put but not yet claimed."""
    keep_rollouts_gb: Annotated[float, Field(ge=0)] = 20.0
    """Above so many 10^9 bytes the oldest stored rollouts are removed, of steps before every
    checkpoint a resume may start from; `slipstream show` and the audit's recount lose those."""
    copy_to: Path | None = None
    """A folder, on shared storage for instance, that gets a copy of the run folder with every
    checkpoint. To go on from it, copy it to a local disk and `slipstream resume` it there."""
    take_deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """A learner step that waits longer for its batch fails and says who waited on whom: the run
    goes back to its checkpoint, and ends after `cluster.restarts` of these."""

    @model_validator(mode="after")
    def _tasks_tighten(self) -> "BufferConfig":
        for task, bound in self.task_max_staleness_steps.items():
            if bound > self.max_staleness_steps:
                raise ValueError(
                    f"task_max_staleness_steps.{task} = {bound:g} is above max_staleness_steps = "
                    f"{self.max_staleness_steps:g}: a task can only tighten the bound"
                )
        return self

    def bound_of(self, task: str) -> float:
        """S of a task."""
        return self.task_max_staleness_steps.get(task, self.max_staleness_steps)


class ServiceSpec(Settings):
    """What the launcher tells the buffer service process."""

    run_id: str
    run_dir: Path
    endpoint: str
    """`ipc://...`; the service binds it."""
    config: BufferConfig
    prompts_per_step: int
    """P."""
    branch: int
    branch_parents: dict[int, tuple[int, int]] = {}
    """branch -> (parent branch, step at which it left); empty for a fresh run."""
    resume_from: tuple[int, int] | None = None
    """(branch, step) of the checkpoint the live branch starts from; later takes are undone."""
