"""What `plan` warns of: possible, but probably not what was meant."""

import math
import os
from collections.abc import Iterator
from importlib.util import find_spec

from ..rollout.config import SourceConfig, VllmConfig
from .load import Loaded
from .schema import Experiment
from .sizes import ModelSize, bytes_text, machine_memory, memory_costs, total_bytes

STALE_SHARE_TO_WARN = 0.01
"""Of written tokens that could not be trained on in time."""


def warnings(loaded: Loaded, size: ModelSize | None) -> Iterator[str]:
    """Yield one sentence each, with the remedy."""
    experiment = loaded.experiment
    yield from _about_pace(experiment)
    yield from _about_learning(experiment)
    yield from _about_machine(experiment, size)
    for key, reason in _without_effect(experiment):
        if key in loaded.origins:
            yield f"{key} ({loaded.origins[key]}) has no effect: {reason}"


def _about_pace(experiment: Experiment) -> Iterator[str]:
    rollout, bound = experiment.rollout, experiment.buffer.max_staleness_steps
    rows = rollout.workers * rollout.max_concurrent_samples
    admitted = experiment.capacity_groups * rollout.samples_per_prompt
    if rows > admitted:
        fitting = admitted // rollout.workers
        yield (
            f"{rows - admitted:,} of {rows:,} rows stay empty: the law admits {admitted:,} samples "
            f"at once; set rollout.max_concurrent_samples = {fitting}, or raise "
            "learner.prompts_per_step or buffer.max_staleness_steps"
        )
    age = 2 * min(rows, admitted) / experiment.samples_per_step
    share, fits = late_share(age, bound), math.ceil(0.9 * age)
    if bound and share > STALE_SHARE_TO_WARN and fits > bound:
        yield (
            f"about {share:.0%} of tokens may not meet S = {bound:g} without waiting for "
            f"stragglers (if lengths spread evenly up to max_new_tokens and generation is the "
            f"slower side); buffer.max_staleness_steps = {fits} fits, or fewer rows at once"
        )


def late_share(longest_age_steps: float, bound: float) -> float:
    """The share of tokens older than `bound` steps when their sample is trained.

    Lengths spread evenly up to the longest, L, and a token's age is the time from it to the end of
    its sample: a sample of length d loses max(0, d - S), so the share is
    E[max(0, d - S)] / E[d] = (1 - S / L)^2 with all lengths in steps.
    """
    return (1 - bound / longest_age_steps) ** 2 if longest_age_steps > bound else 0.0


def _about_learning(experiment: Experiment) -> Iterator[str]:
    learner = experiment.learner
    sizing, objective = experiment.rollout.sizing, learner.objective
    unbiased = (objective.advantage, objective.aggregation) == ("leave_one_out", "prompt")
    if (sizing.skips or sizing.sizer not in ("fixed", "filter_refill")) and not unbiased:
        yield (
            "groups differ in size or weight (rollout.sizing), and learner.objective counts them "
            f'by "{objective.advantage}" and "{objective.aggregation}", so prompts with more '
            'samples pull more; advantage = "leave_one_out" with aggregation = "prompt" is unbiased'
        )
    if learner.optimizer.warmup_steps >= learner.steps:
        yield (
            f"learner.optimizer.warmup_steps = {learner.optimizer.warmup_steps} is not over when "
            f"the run is ({learner.steps} steps)"
        )
    if objective.advantage == "gae" and experiment.buffer.drop_no_signal:
        yield (
            "buffer.drop_no_signal = true drops groups of equal rewards, from which a critic "
            '(learner.objective.advantage = "gae") learns, too; set it to false'
        )
    objective, behaviour = learner.objective, learner.objective.proximal == "behaviour"
    if objective.correction == "none" and experiment.buffer.max_staleness_steps and not behaviour:
        yield (
            'learner.objective.correction = "none" trains old samples as if they were fresh; '
            '"truncate" corrects for it'
        )
    if learner.micro_batch_tokens <= experiment.rollout.sampling.max_new_tokens:
        yield (
            f"learner.micro_batch_tokens = {learner.micro_batch_tokens} is less than one sample of "
            f"{experiment.rollout.sampling.max_new_tokens} tokens and its prompt; such a sample is "
            "a micro-batch of its own and takes more memory than this says"
        )


def _about_machine(experiment: Experiment, size: ModelSize | None) -> Iterator[str]:
    if experiment.cluster.learner_gpus and experiment.learner.device == "cpu":
        yield 'cluster.learner_gpus are held but not used: set learner.device = "cuda"'
    if experiment.cluster.worker_gpus and experiment.rollout.engine == "native":
        yield 'cluster.worker_gpus are held but not used: set rollout.engine = "vllm"'
    cores = os.cpu_count() or 1
    threads = experiment.rollout.workers * experiment.rollout.threads_per_worker
    threads += experiment.learner.threads
    if threads > 2 * cores:
        yield f"{threads} threads of workers and learner share {cores} cores; fewer are faster"
    if experiment.track.wandb_project and find_spec("wandb") is None:
        yield "track.wandb_project is set but wandb is missing: pip install 'slipstream[wandb]'"
    if size is None:
        return
    needed = total_bytes(memory_costs(experiment, size))
    if needed > 0.9 * machine_memory():
        yield f"{bytes_text(needed)} are needed, but the machine has {bytes_text(machine_memory())}"
    if not size.has_weights and not experiment.model.startswith("builtin:"):
        yield f"{experiment.model} holds no safetensors: the policy starts from random weights"


def _without_effect(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Yield settings that nothing reads in this combination, with the reason."""
    if experiment.prompts.mix:
        for key in SourceConfig.model_fields:
            yield f"prompts.{key}", "[prompts.mix.NAME] sections take its place"
    elif experiment.prompts.source == "reasoning_gym":
        for key in ("path", "split", "prompt_column", "answer_column"):
            yield f"prompts.{key}", 'prompts.source = "reasoning_gym"'
    else:
        for key in ("task", "task_config", "size"):
            yield f"prompts.{key}", 'prompts.source = "dataset"'
    anchor = experiment.learner.objective.anchor(experiment.learner.updates_per_step)
    if anchor == "first_pass":
        for key in ("clip_low", "clip_high"):
            yield f"learner.objective.{key}", "the ratio is 1, see learner.objective.proximal"
    if experiment.learner.packed:
        yield "learner.share_prompts", "learner.packed = true gives each sample its own segment"
    if experiment.learner.objective.correction != "mask":
        yield "learner.objective.correction_low", 'it needs learner.objective.correction = "mask"'
    if experiment.learner.objective.correction == "none":
        yield "learner.objective.correction_high", 'learner.objective.correction = "none"'
    if experiment.buffer.max_staleness_steps == 0:
        for key in ("stale", "straggler_wait_s"):
            yield f"buffer.{key}", "with S = 0 nothing is ever stale"
        yield "rollout.kv", "with S = 0 no weights arrive while samples are in flight"
    if experiment.rollout.engine == "vllm":
        yield "rollout.prefill_tokens", "vLLM cuts long prompts by a rule of its own"
        held = "rollout.vllm.gpu_memory_utilization, or kv_cache_gib on processors"
        yield "rollout.kv_memory_mb", f"vLLM's memory is {held}"
    else:
        for key in VllmConfig.model_fields:
            yield f"rollout.vllm.{key}", 'rollout.engine is not "vllm"'
    if not experiment.eval.enabled:
        for key in ("every_steps", "samples_per_prompt", "temperature"):
            yield f"eval.{key}", "eval.enabled = false"
    if experiment.sft is not None and experiment.sft.data != "demonstrations":
        for key in ("demonstration", "examples"):
            yield f"sft.{key}", f"all examples of {experiment.sft.data} are taken (sft.data)"
