"""Settings of the learner, of supervised warm starts and of checkpoints."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..buffer.config import Settings


class ObjectiveConfig(Settings):
    """`[learner.objective]`: GRPO with the decoupled three-policy objective.

    ratio = current / proximal, correction = proximal / behaviour. With one update per step and the
    proximal policy taken at its start, ratio is 1 and clipping cannot act: then the correction's
    bound is what limits an update.
    """

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Acts only with `updates_per_step` of 2 or more."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """Acts only with `updates_per_step` of 2 or more."""
    correction: Literal["truncate", "mask", "none"] = "truncate"
    """Importance correction proximal / behaviour per token: `truncate` caps it at
    `correction_high`; `mask` zeroes tokens outside [correction_low, correction_high]."""
    correction_low: Annotated[float, Field(ge=0, lt=1)] = 0.125
    correction_high: Annotated[float, Field(ge=1)] = 2.0
    advantage: Literal["group_std", "group_mean", "leave_one_out"] = "group_std"
    """`group_std`: (reward - mean) / (std + eps), GRPO; `group_mean`: reward - mean, Dr.GRPO;
    `leave_one_out`: reward - mean of the others, RLOO."""
    aggregation: Literal["token", "sequence", "prompt"] = "token"
    """`token`: the mean over all trained tokens of the batch; `sequence`: the mean over samples of
    each one's mean; `prompt`: the mean over prompts, by their sizing weight, of the mean over
    samples of each one's sum / max_new_tokens. With `leave_one_out` that is an unbiased policy
    gradient whatever the sizes of the groups."""
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the k3 estimate of KL(current || reference); keeps a frozen copy of the policy the
    run started from when above 0."""
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0


class OptimizerConfig(Settings):
    """`[learner.optimizer]`: AdamW."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class CheckpointConfig(Settings):
    """`[learner.checkpoint]`: what `resume` starts from."""

    every_steps: Annotated[int, Field(ge=1)] = 10
    """Besides the first and the last step."""
    keep_last: Annotated[int, Field(ge=1)] = 2


class LearnerConfig(Settings):
    """`[learner]`: batches, updates and what is saved."""

    steps: Annotated[int, Field(ge=1)] = 100
    prompts_per_step: Annotated[int, Field(ge=1)] = 32
    """P, the groups trained by one step."""
    updates_per_step: Annotated[int, Field(ge=1)] = 1
    """U. The batch is cut into U equal parts, one optimizer update each."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] = 16_384
    """Padded tokens of one forward and backward; bounds activation memory, changes no gradient."""
    share_prompts: bool = True
    """Compute the prompt of a group's samples once instead of once per sample. Changes gradients by
    rounding alone; no effect on samples too long to be put side by side."""
    threads: Annotated[int, Field(ge=1)] = 1
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


class SftConfig(Settings):
    """`[sft]`: a supervised warm start before the first step."""

    data: str = "demonstrations"
    """`demonstrations`: written for the run's own prompts by `demonstration`; otherwise a JSONL
    file with `messages` (the last one is the assistant's) or `prompt` and `completion`."""
    demonstration: str = "answer"
    """Who writes demonstrations: `answer` (the gold answer itself), a built-in name, or
    `module:function` taking a Prompt and returning the assistant's text."""
    examples: Annotated[int, Field(ge=1)] = 4096
    epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    threads: Annotated[int, Field(ge=1)] = 2
    """Threads while nothing else runs."""


class LearnerSpec(Settings):
    """What the launcher tells the learner process."""

    run_id: str
    run_dir: Path
    endpoint: str
    weights_dir: Path
    """Where published weights lie: tmpfs when they fit, else the run folder."""
    seed: int
    model_dir: Path
    """A Hugging Face folder; without weight files the policy is initialised from the seed."""
    dtype: Literal["float32", "float64", "bfloat16"]
    config: LearnerConfig
    sft: SftConfig | None = None
    sft_file: Path | None = None
    """JSONL of {"messages": [...]}, written by the launcher."""
    samples_per_prompt: int
    max_staleness_steps: float
    ratio_law: Literal["temperature", "kept_set"]
    take_deadline_s: float
    branch: int
    branch_parents: dict[int, tuple[int, int]] = {}
    resume_from: tuple[int, int] | None = None
    tensorboard: bool = True
    wandb_project: str = ""
