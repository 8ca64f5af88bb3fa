"""Settings of the learner, of supervised warm starts and of checkpoints."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ..buffer.config import Settings
from ..buffer.errors import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dapo": {"proximal": "behaviour", "clip_high": 0.28},
    "dr_grpo": {
        "proximal": "behaviour", "clip_high": 0.2, "advantage": "group_mean",
        "aggregation": "prompt",
    },
    "cispo": {"surrogate": "cispo", "proximal": "behaviour", "clip_high": 4.0},
    "gspo": {
        "ratio": "sequence", "proximal": "behaviour", "clip_low": 3e-4, "clip_high": 4e-4,
        "aggregation": "sequence",
    },
    "scalerl": {
        "surrogate": "cispo", "proximal": "behaviour", "clip_high": 4.0,
        "advantage": "group_mean_batch_std", "aggregation": "prompt_token",
    },
    "ppo": {"proximal": "behaviour", "clip_high": 0.2, "advantage": "gae"},
    "raft": {"surrogate": "raft", "correction": "none", "advantage": "best"},
}  # fmt: skip
"""What a preset sets; the rest is the default. DAPO also filters: `buffer.drop_no_signal`."""

BatchAdvantage = Literal["group_std", "group_mean", "leave_one_out", "group_mean_batch_std", "best"]
AdvantageKind = BatchAdvantage | Literal["batch_std", "gigpo", "gae"]
Proximal = Literal["auto", "recomputed", "first_pass", "behaviour", "interpolated", "ewma"]
EXPORT_DTYPES = ("bfloat16", "float16", "float32")


class ObjectiveConfig(Settings):
    """`[learner.objective]`: the decoupled three-policy objective, composed of its parts.

    ratio = current / proximal, correction = proximal / behaviour. With one update per step and the
    proximal policy taken at its start, ratio is 1 and clipping cannot act: then the correction's
    bound is what limits an update.
    """

    preset: str = "grpo"
    """Sets the keys below where they are not given: grpo (decoupled), dapo, dr_grpo, cispo, gspo,
    scalerl, ppo (with a critic) or raft."""
    surrogate: Annotated[str, Field(min_length=1)] = "ppo"
    """`ppo`: clipped on both sides; `cispo`: capped weight without gradient, no token is silenced;
    `raft`: plain likelihood; an entry point of `slipstream.surrogates`; or `module:function` with
    the signature of `clipped_surrogate` in learner/objective.py."""
    ratio: Literal["token", "sequence"] = "token"
    """`sequence`: all tokens of a sample share the geometric mean of their ratios (GSPO)."""
    proximal: Proximal = "auto"
    """The policy an update is anchored to. `recomputed`: the one at the start of the step, one more
    forward; `first_pass`: the current one itself; `auto`: the second with one update per step, else
    the first; `behaviour`: the one that sampled, as in PPO, so that nothing is decoupled;
    `interpolated`: between behaviour and current by staleness (A-3PO), no more forward; `ewma`: an
    average of the weights (PPO-EWMA), one more forward and one more float32 copy of the weights."""
    proximal_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of `ewma`, per update; its centre of mass is 1 / (1 - decay) - 1 updates ago."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Acts only where the ratio can leave 1, see `proximal`."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """As `clip_low`."""
    correction: Literal["truncate", "mask", "none"] = "truncate"
    """Importance correction proximal / behaviour: `truncate` caps it at `correction_high`; `mask`
    zeroes tokens outside [correction_low, correction_high] (IcePop)."""
    correction_level: Literal["token", "sequence"] = "token"
    """`sequence`: of the product over the sample's tokens, so that whole samples are capped or
    masked."""
    correction_low: Annotated[float, Field(ge=0, lt=1)] = 0.125
    correction_high: Annotated[float, Field(ge=1)] = 2.0
    advantage: AdvantageKind = "group_std"
    """`group_std`: (reward - mean) / (std + eps), GRPO; `group_mean`: reward - mean, Dr.GRPO;
    `leave_one_out`: reward - mean of the others, RLOO; `group_mean_batch_std`: `group_mean` over
    its root mean square in the batch, ScaleRL; `batch_std`: whitened over the batch's tokens,
    REINFORCE++; `best`: 1 for the highest reward, else 0, RAFT; `gigpo`: `group_mean` of episodes
    plus that of turns taken in the same state; `gae`: of each token by a critic, a value head on
    the policy trained beside it, whitened over the batch, one more forward (PPO)."""
    discount: Annotated[float, Field(ge=0, le=1)] = 1.0
    """`gae`: how much a token counts of the reward that comes one token later."""
    gae_decay: Annotated[float, Field(ge=0, le=1)] = 1.0
    """`gae`: lambda; 1: from the reward alone, 0: from the critic's next value alone."""
    value_coefficient: Annotated[float, Field(ge=0)] = 0.1
    """`gae`: weight of the critic's loss, through which it also moves the policy's layers."""
    value_clip: Annotated[float, Field(gt=0)] = 0.2
    """`gae`: how far a value may move in a step, in units of reward."""
    step_discount: Annotated[float, Field(ge=0, le=1)] = 0.95
    """`gigpo`: how much a turn counts of the rewards that come one turn later."""
    step_weight: Annotated[float, Field(ge=0)] = 1.0
    """`gigpo`: of the turns' advantage beside the episodes'."""
    aggregation: Literal["token", "sequence", "prompt", "prompt_token"] = "token"
    """`token`: the mean over all trained tokens of the batch; `sequence`: the mean over samples of
    each one's mean; `prompt`: the mean over prompts, by their sizing weight, of the mean over
    samples of each one's sum / max_new_tokens, with `leave_one_out` an unbiased policy gradient
    whatever the sizes of the groups; `prompt_token`: the mean over prompts of the mean over each
    one's tokens."""
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the estimate of KL(current || reference); keeps a frozen copy of the policy the
    run started from when above 0."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    demonstration_coefficient: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the demonstrations' mean -log pi, see `buffer.demonstrations_per_step`."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("preset", "grpo"), str):
            return given
        name = given.get("preset", "grpo")
        if name not in PRESETS:
            raise ValueError(
                f'learner.objective.preset = "{name}" is none of {", ".join(PRESETS)}; a function '
                'of your own goes into learner.objective.surrogate = "module:function"'
            )
        return {**PRESETS[name], **given}

    @property
    def needs_whole_samples(self) -> bool:
        """Whether the loss of a token depends on the other tokens of its sample."""
        return "sequence" in (self.ratio, self.correction_level)

    @property
    def has_kernel(self) -> bool:
        """Whether `kernels/fused.py` knows this objective: its terms, all by token."""
        kl_known = self.kl_coefficient == 0 or self.kl_estimator == "k3"
        by_token = not self.needs_whole_samples
        return self.surrogate in ("ppo", "cispo") and by_token and kl_known

    def anchor(self, updates_per_step: int) -> Proximal:
        """`proximal`, with `auto` decided."""
        if self.proximal != "auto":
            return self.proximal
        return "recomputed" if updates_per_step > 1 else "first_pass"


class OptimizerConfig(Settings):
    """`[learner.optimizer]`: AdamW."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit`: moments in 8 bits by blocks of 256 (torchao), a quarter of their memory."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of the value head of `objective.advantage = "gae"`; it warms up and scales with the other."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    tuned_at: Annotated[int, Field(ge=0)] = 0
    """Prompts per update (P / U) at which `learning_rate`, `betas` and `proximal_decay` were tuned.
    With c times fewer now, the rate is divided by sqrt(c), betas become beta^(1/c), and the average
    of `proximal = "ewma"` looks back c times as many updates (PPO-EWMA, arXiv:2110.00641). 0: all
    three are as given."""

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: it rises in equal parts over `warmup_steps`."""
        return self.learning_rate * (min(1.0, step / self.warmup_steps) if self.warmup_steps else 1)


class LoraConfig(Settings):
    """`[learner.lora]`: train low-rank adapters instead of the weights, in warm starts, too."""

    rank: Annotated[int, Field(ge=0)] = 0
    """0: all weights are trained."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Adapters count alpha / rank."""
    targets: tuple[str, ...] = ()
    """Last parts of the names of linear layers, such as "q_proj"; empty: all but the LM head."""
    publish: Literal["adapter", "merged"] = "adapter"
    """What engines are sent of each version. `adapter`: A, B and their scale, which they merge into
    weights that they were sent once; `merged`: all weights."""


class CheckpointConfig(Settings):
    """`[learner.checkpoint]`: what `resume` starts from."""

    every_steps: Annotated[int, Field(ge=1)] = 10
    """Besides the first and the last step."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    keep_every_steps: Annotated[int, Field(ge=0)] = 0
    """Also keep those whose step is a multiple of this; 0: none."""
    keep_best: bool = False
    """Also keep the one with the best held-out reward, and those whose evaluation is still to come;
    needs `eval.every_steps` at saved steps."""


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
    packed: bool = False
    """Put all samples of a micro-batch into one row, without padding and without `share_prompts`;
    attention stays within each sample (torch's varlen FlashAttention on CUDA). For long samples of
    different lengths. Changes gradients by rounding alone."""
    noise_scale: bool = False
    """Report the gradient noise scale, in prompts, as `noise_scale`: batches below it lose little
    by being larger. Each update's micro-batches are planned by halves of its prompts, and one more
    norm is taken. Needs 2 prompts an update."""
    activations: Literal["keep", "checkpoint", "stream"] = "keep"
    """What backward needs of the forward pass. `keep`: all of it; `checkpoint`: each layer's input,
    the layer is computed again; `stream`: the same, `stream_tokens` of a row at a time, the longest
    sequences in a given memory (StreamBP; Llama and Qwen layers). Gradients differ by rounding."""
    stream_tokens: Annotated[int, Field(ge=1)] = 512
    stream: bool = False
    """Train a step's groups as they become READY, before its batch is full: the same update to
    rounding. Needs one update per step, and an objective that looks at one group at a time."""
    compile: bool = False
    """Compile each decoder layer (torch.compile, without graph breaks, a few graphs for all layers
    and shapes): minutes at the start. Needs a C++ compiler; not together with `packed` or
    `activations = "stream"`."""
    device: Literal["cpu", "cuda"] = "cpu"
    """`cuda`: one device per learner rank, NCCL between them; not run so far."""
    threads: Annotated[int, Field(ge=1)] = 1
    logprob_band: dict[Literal["max", "mean", "kl"], Annotated[float, Field(gt=0)]] = {}
    """How far apart log-probabilities of engine and learner may be, in nats, over the tokens of one
    version: the largest difference, the mean one, the estimated KL. A step outside looks for the
    cause and says so (`certificate` in metrics.jsonl). What is not given goes by what engines
    compute in (`dtype`, `rollout.weights`): 1e-3, 1e-4 and 1e-6 in float32; 1.3, 0.01 and
    1e-3 in bfloat16."""
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def scaled(self) -> Self:
        """With rate, betas and average for the batch that there is, see `optimizer.tuned_at`."""
        tuned = self.optimizer.tuned_at * self.updates_per_step
        if tuned in (0, self.prompts_per_step):
            return self
        c = tuned / self.prompts_per_step
        center = 1 / (1 - self.objective.proximal_decay) - 1
        optimizer = {
            "learning_rate": self.optimizer.learning_rate / math.sqrt(c),
            "critic_learning_rate": self.optimizer.critic_learning_rate / math.sqrt(c),
            "betas": tuple(beta ** (1 / c) for beta in self.optimizer.betas),
            "tuned_at": 0,
        }
        objective = {"proximal_decay": 1 - 1 / (1 + c * center)}
        return self.model_copy(
            update={
                "optimizer": self.optimizer.model_copy(update=optimizer),
                "objective": self.objective.model_copy(update=objective),
            }
        )

    @model_validator(mode="after")
    def _streams(self) -> Self:
        advantage = self.objective.advantage
        if self.stream and advantage in ("batch_std", "group_mean_batch_std", "gae"):
            raise ValueError(
                f'learner.stream cannot train groups before learner.objective.advantage = "'
                f'{advantage}" has seen the whole batch; use "group_std" or set stream = false'
            )
        if self.stream and self.noise_scale:
            raise ValueError(
                "learner.noise_scale compares halves of a whole batch, which learner.stream does "
                "not have; set one of them to false"
            )
        if self.stream and self.updates_per_step > 1:
            raise ValueError(
                "learner.stream makes one update per step; set learner.updates_per_step = 1 (it "
                f"is {self.updates_per_step}) or stream = false"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.compile and self.packed:
            raise ValueError(
                "learner.compile makes one graph for all shapes, but under learner.packed the "
                "number of samples in a row belongs to the graph: almost every micro-batch would "
                "be compiled anew; set one of them to false"
            )
        if self.lora.rank and self.activations == "stream":
            raise ValueError(
                'learner.activations = "stream" knows the layers\' own weights alone, not the '
                'adapters of learner.lora; use "checkpoint"'
            )
        if self.compile and self.activations == "stream":
            raise ValueError(
                'learner.compile and learner.activations = "stream" both replace the forward pass '
                'of the layers; use "checkpoint" or compile = false'
            )
        if self.packed and self.activations == "stream":
            raise ValueError(
                "learner.packed = true makes one row, whose samples would see one another under "
                'learner.activations = "stream"; use "checkpoint"'
            )
        if "lm_head" in self.lora.targets:
            raise ValueError(
                'learner.lora.targets holds "lm_head", which the fused loss reads as one matrix; '
                "leave it out"
            )
        return self


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


class SenderSpec(Settings):
    """What the process that puts weights into vLLM's engines is told (`vllm_sender.py`)."""

    run_dir: Path
    endpoint: str
    """Of the buffer service: how far from here the engines may be."""
    backend: Literal["nccl", "ipc"]
    deadline_s: float
    """An engine that says nothing for so long while it is sent weights is given up."""

    @property
    def address_file(self) -> Path:
        """Where engines find it."""
        return self.run_dir / "processes" / "sender.address"

    @property
    def served_file(self) -> Path:
        """The version that each engine has."""
        return self.run_dir / "processes" / "sender.served.json"


def check_export_dtype(dtype: str) -> None:
    """See that a model can be exported in it.

    Raises:
        ConfigError: it cannot.
    """
    if dtype not in EXPORT_DTYPES:
        raise ConfigError(
            f'--dtype "{dtype}" is none that models are exported in: choose '
            f"{', '.join(EXPORT_DTYPES)}, or leave it out for what the run was trained in"
        )


class LearnerSpec(Settings):
    """What the launcher tells the learner process."""

    run_id: str
    run_dir: Path
    endpoint: str
    weights_dir: Path
    """Where published weights lie: tmpfs when they fit, else the run folder."""
    serve_weights: bool = False
    """Whether workers fetch them in chunks; false: they see `weights_dir`."""
    sender: SenderSpec | None = None
    """Of weights by vLLM's own backends, when `rollout.vllm.weights` asks for one."""
    seed: int
    model_dir: Path
    """A Hugging Face folder; without weight files the policy is initialised from the seed."""
    dtype: Literal["float32", "float64", "bfloat16"]
    engine_dtype: Literal["float32", "float64", "bfloat16"]
    """What engines compute in: `dtype`, or what `rollout.weights` says."""
    config: LearnerConfig
    sft: SftConfig | None = None
    sft_file: Path | None = None
    """JSONL of {"messages": [...]}, written by the launcher."""
    samples_per_prompt: int
    max_staleness_steps: float
    ratio_law: Literal["temperature", "kept_set"]
    take_deadline_s: float
    eval_every_steps: int = 0
    """At which steps held-out rewards are to be expected; 0: at none."""
    rank: int = 0
    ranks: int = 1
    """How many processes like this share the learner's work."""
    ranks_apart: bool = False
    """Whether they are on several hosts; else they meet on the loopback interface."""
    takes_turns: bool = False
    """Whether the engine on the same device sleeps while this one trains."""
    branch: int
    branch_parents: dict[int, tuple[int, int]] = {}
    resume_from: tuple[int, int] | None = None
    tensorboard: bool = True
    wandb_project: str = ""


class DrySpec(Settings):
    """What a dry run of one learner rank is told (`learner/dry.py`)."""

    model_dir: Path
    """A folder with `config.json`; weights are not looked at."""
    dtype: Literal["float32", "float64", "bfloat16"]
    config: LearnerConfig
    ranks: int
    sample_tokens: int
    """Of the longest sample, prompt included."""
