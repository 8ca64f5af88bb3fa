"""Settings of prompts, sampling, engines and rewards, and what their processes are started with."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..buffer.config import Settings
from ..buffer.records import SamplingParams

RatioLaw = Literal["temperature", "kept_set"]
KvPolicy = Literal["keep", "recompute"]


class PromptsConfig(Settings):
    """`[prompts]`: where prompts come from; a seeded stream over epochs that a resume continues."""

    source: Literal["reasoning_gym", "dataset", "function"] = "reasoning_gym"
    task: str = "chain_sum"
    """`source = "reasoning_gym"`: the name of the task. `source = "function"`: `module:function` or
    `file.py:function` of a seed, which returns a row: {"prompt": ..., "answer": ..., ...}."""
    task_config: dict[str, Any] = {}
    """`source = "reasoning_gym"`: arguments of the task, as reasoning-gym names them."""
    size: Annotated[int, Field(ge=1)] = 100_000
    """`source = "reasoning_gym"`, `"function"`: distinct items before the next epoch."""
    path: str = ""
    """`source = "dataset"`: a JSONL, JSON or Parquet file, a folder made by `save_to_disk`, or a
    Hugging Face dataset name."""
    split: str = "train"
    prompt_column: str = "prompt"
    """A column of strings or of chat messages ({role, content} lists)."""
    answer_column: str = "answer"
    """Handed to the reward as `payload["answer"]`; all other columns are handed over too."""
    system: str = ""
    """A system message put before every prompt; empty for none."""
    template: str = "{prompt}"
    """The user's message; `{prompt}` is the item's question."""
    shuffle: bool = True
    held_out: Annotated[int, Field(ge=0)] = 512
    """Items kept apart for evaluation, disjoint from the stream by their text."""


class SamplingConfig(Settings):
    """`[rollout.sampling]`: the law that training samples are drawn from."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    stop: tuple[str, ...] = ()

    def params(self) -> SamplingParams:
        """The same as the record that travels with each sample."""
        return SamplingParams(**self.model_dump())


class RewardConfig(Settings):
    """`[reward]`: the function that scores a completion."""

    name: str = "reasoning_gym"
    """An entry point of the group `slipstream.rewards`, `module:function`, or `file.py:function`.
    Functions of TRL's form (prompts, completions, **columns) work unchanged."""
    arguments: dict[str, Any] = {}
    """Keyword arguments for a reward that is a class."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """A reward that takes longer is killed; the sample is recorded as failed, never as 0."""
    memory_mb: Annotated[int, Field(ge=64)] = 4096
    """Address space that scoring may take in each reward process, above what it has when loaded
    (Linux); asking for more raises MemoryError in the reward."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Reward processes of each rollout worker."""
    max_failure_rate: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The run ends when more than this share of the last 200 rewards failed."""


class EnvironmentConfig(Settings):
    """`[environment]`: episodes of several turns instead of single answers."""

    name: str = "countdown"
    """An entry point of the group `slipstream.environments`, `module:Class` or `file.py:Class`; or
    a function (prompt, endpoint) that runs any agent against an OpenAI-compatible address."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the class."""
    max_turns: Annotated[int, Field(ge=1)] = 8
    """Answers of the policy in one episode. `rollout.sampling.max_new_tokens` is the budget of
    tokens of all of them together."""
    max_turn_tokens: Annotated[int, Field(ge=0)] = 0
    """New tokens of one answer; 0: whatever the episode has left."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """For one reset or step, and for the whole of an agent function."""
    show_budget: bool = True
    """Whether each observation ends with the number of turns left."""


class RolloutConfig(Settings):
    """`[rollout]`: who generates, how many at once, and how."""

    engine: Literal["native"] = "native"
    workers: Annotated[int, Field(ge=1)] = 2
    threads_per_worker: Annotated[int, Field(ge=1)] = 1
    """Threads of each worker's tensor operations."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 8
    """G, the size of a group; group-relative advantages need at least 2."""
    max_concurrent_samples: Annotated[int, Field(ge=1)] = 64
    """Rows decoded together by one engine."""
    kv: KvPolicy = "keep"
    """What becomes of the KV of samples in flight when new weights arrive: `keep` goes on at once
    (later tokens attend to older keys; reported as `kv_mixture`), `recompute` prefills them
    again."""
    ratio_law: RatioLaw = "temperature"
    """The law under which both sides of a ratio are taken: `temperature` (the mass that truncation
    removes is reported) or `kept_set` (the engine records the kept ids; needs 1 <= top_k <= 512
    when truncating)."""
    sampling: SamplingConfig = SamplingConfig()


class EvalConfig(Settings):
    """`[eval]`: held-out prompts, scored at one pinned version on the run's engines."""

    every_steps: Annotated[int, Field(ge=0)] = 20
    """Besides the first and the final policy; 0 means only those two."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0)] | None = None
    """None: as in training. 0: greedy."""
    enabled: bool = True


class FeederSpec(Settings):
    """What the launcher tells the feeder process."""

    run_id: str
    run_dir: Path
    endpoint: str
    seed: int
    prompts: PromptsConfig
    rollout: RolloutConfig
    eval: EvalConfig
    steps: int
    """The learner step after which the run ends; its version is evaluated last."""


class WorkerSpec(Settings):
    """What the launcher tells one rollout worker process."""

    run_id: str
    run_dir: Path
    endpoint: str
    name: str
    seed: int
    model_dir: Path
    """A Hugging Face folder: config and tokenizer; weights come from the mailbox."""
    dtype: Literal["float32", "float64", "bfloat16"]
    rollout: RolloutConfig
    reward: RewardConfig
    environment: EnvironmentConfig | None = None
