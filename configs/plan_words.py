"""The sentences of a plan: batch algebra, what bounds an update, staleness, memory."""

import math
from collections.abc import Iterator

from ..learner.config import ObjectiveConfig
from ..rollout.config import SAME_SIZE
from .rank_memory import rank_peak, rank_tokens
from .schema import Experiment
from .sizes import ModelSize, bytes_text, machine_memory, memory_costs, total_bytes


def algebra(experiment: Experiment) -> Iterator[str]:
    """Yield what a step and the run amount to."""
    learner, rollout = experiment.learner, experiment.rollout
    prompts, updates, new = learner.prompts_per_step, learner.updates_per_step, rollout.sampling
    samples = experiment.samples_per_step
    yield (
        f"A step trains {prompts} prompts x {rollout.samples_per_prompt} samples = {samples:,} "
        f"samples (at most {samples * new.max_new_tokens:,} written tokens) in {updates} optimizer "
        f"update{'s' if updates > 1 else ''} of {prompts // updates} prompts."
    )
    if (scaled := learner.scaled()) != learner:
        betas = ", ".join(f"{beta:.4g}" for beta in scaled.optimizer.betas)
        yield (
            f"Tuned at {learner.optimizer.tuned_at} prompts an update, this batch is trained with "
            f"learning_rate {scaled.optimizer.learning_rate:.3g}, betas ({betas}) and "
            f"proximal_decay {scaled.objective.proximal_decay:.4g}."
        )
    yield (
        f"Engines may work ahead: (S + 1) x P = ({experiment.buffer.max_staleness_steps:g} + 1) x "
        f"{prompts} = {experiment.capacity_groups} groups in flight, ready or being trained."
    )
    least = learner.steps * prompts
    refilled = "; groups without signal are refilled" if experiment.buffer.drop_no_signal else ""
    yield (
        f"The run: {learner.steps} steps, {learner.steps * updates:,} updates, at least "
        f"{least:,} prompts{_epochs(experiment, least)} and "
        f"{least * rollout.samples_per_prompt:,} samples{refilled}."
    )
    yield from _mix(experiment)
    yield from _sizing(experiment)
    yield from _before_and_beside(experiment)


def _mix(experiment: Experiment) -> Iterator[str]:
    """Yield how a mixed stream is made up."""
    prompts = experiment.prompts
    if not prompts.mix:
        return
    total = sum(part.weight for part in prompts.mix.values())
    parts = [f"{part.weight / total:.0%} {name}" for name, part in prompts.mix.items()]
    yield f"Prompts: {', '.join(parts)}."
    if prompts.follows_pass_rates:
        yield (
            f"Levels open, and close again, at a pass rate of {prompts.raise_at:g} on the level "
            f"before, decided at most {experiment.waiting_prompts} prompts before use; "
            f"{prompts.review:.0%} of a part's prompts come from easier levels. The warm start "
            "sees the easiest alone."
        )


def _sizing(experiment: Experiment) -> Iterator[str]:
    """Yield how samples per prompt and their lengths are decided, when not by the defaults."""
    rollout, sizing = experiment.rollout, experiment.rollout.sizing
    n = rollout.samples_per_prompt
    if sizing.staged:
        yield (
            f"probe_then_commit draws {sizing.probe_samples} samples of a prompt, and the other "
            f"{n - sizing.probe_samples} with a probability between {sizing.min_commit:g} and 1 "
            "that follows from them; their weight makes up for it."
        )
    elif sizing.sizer not in SAME_SIZE:
        budget = f"what {n} samples of each would cost"
        if sizing.tokens_per_prompt:
            budget = f"{sizing.tokens_per_prompt:g} expected tokens a prompt on average"
        yield (
            f"{sizing.sizer} gives a prompt {sizing.min_samples} to {sizing.most_samples(n)} "
            f"samples within {budget}, from what was seen of it (half-life "
            f"{sizing.half_life_steps:g} versions), decided at most {experiment.waiting_prompts} "
            "prompts before use."
        )
    if sizing.skip_below:
        yield (
            "A seen prompt whose group would be mixed with a probability below "
            f"{sizing.skip_below:g} is skipped, at most {sizing.max_skips} visits in a row."
        )
    if sizing.spare_samples:
        yield (
            f"{sizing.spare_samples} samples of each group are spare: the last ones are cut, but "
            f"in {sizing.wait_share:.0%} of the groups, where they weigh "
            f"{1 / sizing.wait_share:.3g} times. A group that several workers share is not cut."
        )
    if sizing.length_quantile or sizing.length_schedule:
        yield (
            "Answers are cut where the length budget ends: the update follows the reward of the "
            "cut answers, not of what they would have become."
        )


def _epochs(experiment: Experiment, prompts: int) -> str:
    if experiment.prompts.mix or experiment.prompts.source != "reasoning_gym":
        return ""
    return f" ({prompts / experiment.prompts.size:.2g} epochs)"


def _before_and_beside(experiment: Experiment) -> Iterator[str]:
    sft, evaluation, steps = experiment.sft, experiment.eval, experiment.learner.steps
    if sft is not None and sft.data != "demonstrations":
        yield (
            f"Before it, a supervised warm start on all examples of {sft.data} x {sft.epochs} "
            f"epochs in batches of {sft.batch_size}."
        )
    elif sft is not None:
        updates = -(-sft.examples // sft.batch_size) * sft.epochs
        yield (
            f"Before it, a supervised warm start: {sft.examples:,} examples x {sft.epochs} epochs "
            f"in batches of {sft.batch_size} = {updates:,} updates."
        )
    if evaluation.enabled:
        held_out, every = experiment.prompts.held_out, evaluation.every_steps
        count = 2 + (len(range(every, steps, every)) if every else 0)
        samples = held_out * evaluation.samples_per_prompt
        yield (
            f"Evaluations: {count} (first, final{f', every {every} steps' if every else ''}), each "
            f"{held_out} held-out prompts x {evaluation.samples_per_prompt} = {samples:,} samples; "
            f"the 95% interval of a yes/no reward is at most +-{0.98 / held_out**0.5:.3f}."
        )


def bounds(experiment: Experiment) -> Iterator[str]:
    """Yield which term of the objective can act in this combination."""
    objective, updates = experiment.learner.objective, experiment.learner.updates_per_step
    yield _ratio(objective, updates)
    if objective.anchor(updates) == "behaviour":
        yield "correction = proximal / behaviour is exactly 1: proximal is the behaviour policy."
    elif experiment.buffer.max_staleness_steps == 0:
        yield (
            "correction = proximal / behaviour is 1 but for arithmetic (S = 0: the policy that "
            "sampled is the one trained); what is left is the gradient norm "
            f"({experiment.learner.optimizer.max_grad_norm:g}) and the learning rate."
        )
    else:
        yield f"correction = proximal / behaviour {_correction(objective)}."
    law = "the kept set" if experiment.rollout.ratio_law == "kept_set" else "temperature alone"
    yield f"Both sides of every ratio are taken under {law}."


def _ratio(objective: ObjectiveConfig, updates: int) -> str:
    """What the clip acts on, and from when."""
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    anchor = objective.anchor(updates)
    if objective.surrogate == "raft":
        return "No ratio is taken (raft): the samples with the best reward are imitated."
    act = {
        "ppo": f"clipping keeps {{}} in [{low:g}, {high:g}]",
        "cispo": f"the weight {{}} is capped at {high:g}",
    }.get(objective.surrogate, f"{objective.surrogate} bounds {{}}")
    if anchor == "first_pass":
        return (
            "ratio = current / proximal is exactly 1 (the proximal policy is the current one, "
            f"taken {'at the start of the step' if updates == 1 else 'anew by each update'}): "
            "clip_low and clip_high cannot act."
        )
    if anchor == "recomputed":
        return (
            f"From the second of {updates} updates on, {act.format('ratio = current / proximal')}."
        )
    of = {
        "behaviour": "ratio = current / behaviour",
        "interpolated": "ratio = current / (policy between behaviour and current, by staleness)",
        "ewma": f"ratio = current / (weights averaged with decay {objective.proximal_decay:g})",
    }[anchor]
    return f"{act.format(of)[0].upper()}{act.format(of)[1:]}."


def _correction(objective: ObjectiveConfig) -> str:
    low, high, level = (
        objective.correction_low,
        objective.correction_high,
        objective.correction_level,
    )
    return {
        "truncate": f"is capped at {high:g} per {level}: this bounds an update",
        "mask": f"outside [{low:g}, {high:g}] silences a {level}: this bounds an update",
        "none": "is not taken: old samples count as if they were fresh, and nothing bounds them",
    }[objective.correction]


def staleness(experiment: Experiment) -> Iterator[str]:
    """Yield the bound, and how old samples will be under it."""
    bound, rollout = experiment.buffer.max_staleness_steps, experiment.rollout
    if bound == 0:
        yield (
            "S = 0: every token is written by the policy that is trained on it; engines wait "
            "while the learner trains, and the learner while they generate."
        )
        return
    buffer = experiment.buffer
    waits = buffer.stale == "wait"
    patience_s = buffer.take_deadline_s if waits else buffer.straggler_wait_s
    then = "trim" if waits else buffer.stale
    rows, steps = rollout.workers * rollout.max_concurrent_samples, in_flight_steps(experiment)
    yield (
        f"Every trained token lags by at most {math.ceil(bound)} steps (S = {bound:g}); over it: "
        f"wait up to {patience_s:g} s, then {then}."
    )
    yield (
        f"{rollout.workers} workers x {rollout.max_concurrent_samples} rows decode up to {rows:,} "
        f"samples at once, {steps:.2g} steps' worth: a sample's first token is about {steps:.2g} "
        "steps old when trained if generation is the slower side, and nears S if training is."
    )


def in_flight_steps(experiment: Experiment) -> float:
    """How many steps' samples are decoded at once (Little's law: also a sample's age in steps)."""
    rows = experiment.rollout.workers * experiment.rollout.max_concurrent_samples
    admitted = experiment.capacity_groups * experiment.rollout.samples_per_prompt
    return min(rows, admitted) / experiment.samples_per_step


def memory(experiment: Experiment, size: ModelSize | None) -> Iterator[str]:
    """Yield what is held in memory, written to disk and published."""
    if size is None:
        yield f'The config of model = "{experiment.model}" does not tell its size.'
        return
    costs = memory_costs(experiment, size)
    for what, cost in costs.items():
        yield f"{what}: {bytes_text(cost.num_bytes)} ({cost.how})"
    ranks, peak = experiment.cluster.learner_ranks, rank_peak(experiment, size)
    yield (
        f"device of {'the learner' if ranks == 1 else f'one of {ranks} learner ranks'}: about "
        f"{bytes_text(peak)} at its peak, activations of "
        f"{rank_tokens(experiment):,} tokens included; `plan --deep` says it exactly"
    )
    yield (
        f"together about {bytes_text(total_bytes(costs))} of this machine's "
        f"{bytes_text(machine_memory())}"
    )
