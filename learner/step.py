"""One learner step: a batch of groups -> U optimizer updates -> metrics and proof.

Shape suffix: T trained tokens of a micro-batch.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..buffer.errors import TrainingFailed
from ..buffer.messages import ProofLine
from ..buffer.records import TrainingSample, Trajectory, TrajectoryGroup, Version
from ..buffer.staleness import LivePath, proof_line
from ..kernels import dispatch
from . import noise, objective
from .batch import (
    MicroBatch,
    RatioLaw,
    Sample,
    collate,
    moved,
    own_share,
    plan_micro_batches,
    samples_of,
    updates_of,
)
from .config import LearnerConfig, ObjectiveConfig
from .critic import judged, value_term
from .imitation import imitate
from .metrics import Sums, step_metrics
from .policy import Policy, expected_returns, fused_loss, score_frozen, whole_loss
from .ranks import ALONE, Ranks
from .shards import local


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The share of one optimizer update: what is trained, and how its losses are averaged."""

    samples: list[Sample]
    batches: list[MicroBatch]
    """This rank's."""
    denominator: float
    proximal: list[Tensor | None]
    """Per micro-batch; None: derived from the current policy while the loss is computed."""
    num_prompts: int = 0
    half: tuple[int, int] | None = None
    """Micro-batches and prompts of its first half, when the two are apart (`noise_scale`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step leaves behind, besides the policy."""

    metrics: dict[str, Any]
    proof: ProofLine
    """Recomputed here from the tokens that carried weight."""


def train_step(
    policy: Policy,
    groups: Sequence[TrajectoryGroup],
    *,
    step: int,
    held: Version,
    config: LearnerConfig,
    path: LivePath,
    max_staleness_steps: float,
    ratio_law: RatioLaw = "temperature",
    reference: PreTrainedModel | None = None,
    demonstrations: Sequence[Trajectory] = (),
) -> StepResult:
    """Train one batch. The exact order of operations, for whoever reproduces it:

    1. Samples in the order (uid, index). Per group, over all samples with a reward, trained or not:
       advantage = (reward - mean) / (std + 1e-6), std of the population (`group_std`), or as
       `advantage.batch_advantages` says of the other kinds; float64. Under `gae` values come from
       one more forward of the policy as it is before the first update, see `critic.judged`.
    2. The groups are cut, in order of uid, into U parts [P i // U, P (i + 1) // U); each part is
       one optimizer update. The proximal policy is, by `proximal`: the current one without
       gradient (`first_pass`); that before the first update, scored for the whole batch
       (`recomputed`); the recorded one (`behaviour`); `objective.interpolated_proximal`; or the
       averaged weights before each update (`ewma`).
    3. Log-probabilities and entropy are those of softmax(logits / temperature), under the law
       `kept_set` restricted to the recorded kept ids. Per trained token:
       log ratio = clamp(current - proximal, -10, 10), likewise for the correction and the KL;
       surrogate = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), or another one;
       loss = correction * surrogate + kl_coefficient * KL - entropy_coefficient * entropy, where
       correction (no gradient) = min(proximal / behaviour, correction_high), or zeroed, or 1.
       The correction weighs the surrogate alone. Under `gae` value_coefficient *
       `objective.clipped_value_loss` is added.
    4. The loss of an update is the sum over its trained tokens divided by their number (`token`),
       or the mean over samples of each one's token mean (`sequence`), or the mean over prompts of
       token sums / (samples x max_new_tokens) (`prompt`) or of token means (`prompt_token`);
       prompts' tokens, stale prefixes and untrained samples count in none. Micro-batches add up
       gradients of sums already divided.
    5. Gradients are scaled by min(1, max_grad_norm / (norm + 1e-6)), the norm taken over all
       parameters together; then AdamW (torch; decay on every parameter; bias-corrected) with rate
       learning_rate * min(1, step / warmup_steps).

    With several ranks each gets the whole batch and plans the same micro-batches, of which it takes
    its share; denominators, norms and metrics are those of all ranks.

    Args:
        policy: trained in place.
        groups: the batch, as the buffer handed it out.
        step: k >= 1.
        held: the version the policy is at, k - 1.
        config: of the learner.
        path: the live path, for the proof.
        max_staleness_steps: S, for the proof.
        ratio_law: the law of all log-probabilities, the engine's included.
        reference: frozen policy for the KL term; needed when its coefficient is above 0.
        demonstrations: join the first update, see `imitation.imitate`.
    Returns:
        Metrics (`loss` is the minimised total, the mean over updates) and the proof line.
    Raises:
        TrainingFailed: nothing to train on, a token over the bound, or a loss or gradient norm
            that is not finite; the weights are then as the last update left them.
        CorruptData: a record that cannot be trained on.
    """
    started, ranks = time.perf_counter(), policy.ranks
    samples = samples_of(groups, config.objective)
    dtype = policy.loss_dtype
    line_up = partial(collate, held=held, dtype=dtype, law=ratio_law, packed=config.packed)
    parts = [
        _part(own, part, config, line_up, ranks)
        for part in updates_of(groups, config.updates_per_step)
        if (uids := {group.prompt.uid for group in part})
        if (own := [s for s in samples if s.trajectory.uid in uids])
    ]
    proof = _prove(parts, step, max_staleness_steps, path, ranks)
    if policy.critic is not None:
        values = partial(expected_returns, policy.critic, policy.model)
        every = [batch for part in parts for batch in part.batches]
        batches = iter(judged(values, every, config.objective, ranks.total))
        for part in parts:
            part.batches[:] = islice(batches, len(part.batches))
    anchor = config.objective.anchor(config.updates_per_step)
    if anchor == "recomputed" and len(parts) > 1:
        for part in parts:
            part.proximal[:] = [score_frozen(policy.model, batch) for batch in part.batches]
    rate = config.optimizer.rate_at(step)
    sums, norms, noisy, shown = Sums(), [], [], {}
    for part in parts:
        if anchor == "ewma":
            with policy.averaged():
                part.proximal[:] = [score_frozen(policy.model, batch) for batch in part.batches]
        args = (config.objective, reference, sums, step)
        of_half = _accumulate(policy, part, *args, updated=part is not parts[0])
        if part.half is not None:
            sizes = part.half[1], part.num_prompts
            noisy.append(noise.noise_and_signal(of_half, _squared_norm(policy), *sizes))
        if part is parts[0]:
            shown = imitate(policy, demonstrations, config, held=held, step=step)
        norms.append(_checked_norm(policy, step))
        policy.update(rate, norms[-1])
    sums = Sums.merged(ranks.exchange(asdict(sums)))
    metrics = step_metrics(sums, groups, len(parts)) | shown
    metrics |= {"grad_norm": float(max(norms)), "learning_rate": rate}
    if noisy:
        means = (sum(values) / len(noisy) for values in zip(*noisy, strict=True))
        metrics |= policy.note_noise(*means)
    metrics["train_seconds"] = time.perf_counter() - started
    metrics["train_tokens_per_s"] = sums.inputs / metrics["train_seconds"]
    return StepResult(metrics=metrics, proof=proof)


class StreamedStep:
    """`train_step` for U = 1 whose groups come in parts, each trained as it comes.

    The same update to rounding: gradients of sums are accumulated undivided, and divided by the
    denominator of the whole batch at its end. The law is checked before each part and counted
    again over all of them. Left half-way, it has changed nothing but gradients.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        step: int,
        held: Version,
        config: LearnerConfig,
        path: LivePath,
        max_staleness_steps: float,
        ratio_law: RatioLaw = "temperature",
        reference: PreTrainedModel | None = None,
    ) -> None:
        """As `train_step`; `LearnerConfig` refuses what looks at the whole batch at once."""
        self._policy, self._config, self._step, self._held = policy, config, step, held
        self._path, self._bound = path, max_staleness_steps
        self._law: RatioLaw = ratio_law
        self._reference = reference
        self.groups: list[TrajectoryGroup] = []
        """What was added."""
        self._samples: list[Sample] = []
        self._denominators: list[float] = []
        self._weighted = 0
        self._sums, self._seconds = Sums(), 0.0
        policy.clear_gradients()

    def add(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Accumulate the gradients of some groups of the batch.

        Raises:
            TrainingFailed, CorruptData: as `train_step`.
        """
        began_s = time.perf_counter()
        self.groups += groups
        if samples := samples_of(groups, self._config.objective):
            line_up = partial(
                collate, held=self._held, dtype=self._policy.loss_dtype, law=self._law,
                packed=self._config.packed,
            )  # fmt: skip
            ranks = self._policy.ranks
            part = _part(samples, groups, self._config, line_up, ranks)
            proof = _prove([part], self._step, self._bound, self._path, ranks)
            self._weighted += proof.trained_tokens
            anchor = self._config.objective.anchor(1)
            if anchor == "ewma":
                with self._policy.averaged():
                    part.proximal[:] = [score_frozen(self._policy.model, b) for b in part.batches]
            undivided = replace(part, denominator=1.0)
            args = (self._config.objective, self._reference, self._sums, self._step)
            _accumulate(self._policy, undivided, *args)
            self._samples += part.samples
            self._denominators.append(part.denominator)
        self._seconds += time.perf_counter() - began_s

    def close(self, demonstrations: Sequence[Trajectory] = ()) -> StepResult:
        """Update the policy with what was added, and with demonstrations.

        Raises:
            TrainingFailed: as `train_step`.
        """
        began_s, config = time.perf_counter(), self._config
        whole = _Part(samples=self._samples, batches=[], denominator=1.0, proximal=[])
        ranks = self._policy.ranks
        proof = _prove([whole], self._step, self._bound, self._path, ranks, self._weighted)
        denominator = sum(self._denominators)
        if config.objective.aggregation == "prompt":  # num_prompts x the largest budget of all
            denominator = float(len(self.groups) * _largest_budget(self.groups))
        for parameter in self._policy.parameters.values():
            if parameter.grad is not None:
                parameter.grad /= denominator
        self._sums.loss /= denominator
        shown = imitate(self._policy, demonstrations, config, held=self._held, step=self._step)
        rate = config.optimizer.rate_at(self._step)
        norm = _checked_norm(self._policy, self._step)
        self._policy.update(rate, norm)
        self._sums = Sums.merged(ranks.exchange(asdict(self._sums)))
        metrics = step_metrics(self._sums, self.groups, 1) | shown
        metrics |= {"grad_norm": float(norm), "learning_rate": rate}
        metrics["train_seconds"] = self._seconds + time.perf_counter() - began_s
        metrics["train_tokens_per_s"] = self._sums.inputs / metrics["train_seconds"]
        return StepResult(metrics=metrics, proof=proof)


def _part(
    samples: list[Sample],
    groups: Sequence[TrajectoryGroup],
    config: LearnerConfig,
    line_up: Callable[[Sequence[Sequence[Sample]]], MicroBatch],
    ranks: Ranks = ALONE,
) -> _Part:
    """Weigh the samples of one update and cut them into micro-batches.

    Args:
        samples: those of its groups that are trained.
        groups: of the update, also those without a trained sample.
        config: of the learner.
        line_up: `collate`, for these settings.
        ranks: among whom micro-batches are dealt.
    """
    aggregation, num_prompts = config.objective.aggregation, len(groups)
    lengths = [sample.num_trained for sample in samples]
    if aggregation == "prompt":
        shares, most = [sample.share for sample in samples], _largest_budget(groups)
        weights, denominator = objective.prompt_weights(shares, num_prompts, most)
    elif aggregation == "prompt_token":
        uids = [sample.trajectory.uid for sample in samples]
        weights, denominator = objective.prompt_token_weights(lengths, uids)
    else:
        weights, denominator = objective.token_weights(lengths, aggregation)
    samples = [replace(s, weight=w) for s, w in zip(samples, weights, strict=True)]
    halves, half_prompts = [samples], 0
    if config.noise_scale and num_prompts > 1:
        halves, half_prompts = _halves(samples, groups)
    plans = [
        plan_micro_batches(
            each,
            config.micro_batch_tokens,
            share_prompts=config.share_prompts,
            packed=config.packed,
            num_ranks=ranks.size,
        )
        for each in halves
    ]
    shares = [own_share(plan, ranks.rank, ranks.size) for plan in plans]
    batches = [moved(line_up(rows), ranks.device) for plan in shares for rows in plan]
    return _Part(
        samples=samples,
        batches=batches,
        denominator=denominator,
        proximal=[None] * len(batches),
        num_prompts=num_prompts,
        half=(len(shares[0]), half_prompts) if half_prompts else None,
    )


def _largest_budget(groups: Sequence[TrajectoryGroup]) -> int:
    """Of a sample, in tokens; of all of them, trained or not, so that chance has no part in it."""
    return max(s.trajectory.sampling.max_new_tokens for group in groups for s in group.samples)


def _halves(
    samples: list[Sample], groups: Sequence[TrajectoryGroup]
) -> tuple[list[list[Sample]], int]:
    """The samples by halves of their prompts, and how many prompts the first half has. Prompts
    come in the order of the stream, so either half is as good a draw as the other: also as to how
    many of them have nothing to train, and a gradient of 0. No halves when one has no gradient.
    """
    uids = sorted(group.prompt.uid for group in groups)
    first = set(uids[: len(uids) // 2])
    inside = [s for s in samples if s.trajectory.uid in first]
    rest = [s for s in samples if s.trajectory.uid not in first]
    return ([inside, rest], len(first)) if inside and rest else ([samples], 0)


def _prove(
    parts: list[_Part],
    step: int,
    bound: float,
    path: LivePath,
    ranks: Ranks,
    weighted: int | None = None,
) -> ProofLine:
    """The law's view of exactly the tokens that are about to carry weight, or (`weighted` of them)
    have just been counted.

    Raises:
        TrainingFailed: there are none, or one of them may not be trained at this step.
    """
    trained = [
        TrainingSample(trajectory=s.trajectory, trained=True, stale_prefix=s.first_trained)
        for part in parts
        for s in part.samples
    ]
    if not trained:
        raise TrainingFailed(f"step {step}: its batch has no token to train on")
    proof = proof_line(trained, step=step, max_staleness_steps=bound, path=path)
    if weighted is None:  # a sample that two ranks took, or none, would show here
        own = sum(int((b.weights_T != 0).sum()) for part in parts for b in part.batches)
        weighted = int(ranks.total([own])[0])
    if proof.violations or proof.trained_tokens != weighted:
        raise TrainingFailed(
            f"step {step}: {proof.violations} of {weighted} tokens with weight break the staleness "
            f"bound {proof.bound} (lags {proof.lag_counts}, {proof.orphaned_tokens} orphaned; the "
            f"law counts {proof.trained_tokens}). Nothing was trained. This is a fault of "
            "slipstream: please report it with the run's ledger"
        )
    return proof


def _accumulate(
    policy: Policy,
    part: _Part,
    config: ObjectiveConfig,
    reference: PreTrainedModel | None,
    sums: Sums,
    step: int,
    *,
    updated: bool = False,
) -> float:
    """Forward and backward of one update, micro-batch by micro-batch; returns the squared norm of
    the mean gradient of its first half, if it has one. `updated`: the policy is no longer the held
    version.

    Raises:
        TrainingFailed: the loss is not finite.
    """
    value, of_half = 0.0, 0.0
    for number, (batch, anchor_T) in enumerate(zip(part.batches, part.proximal, strict=True)):
        if part.half is not None and number == part.half[0]:
            of_half = _squared_norm(policy) * (part.num_prompts / part.half[1]) ** 2
        reference_T = None
        if config.kl_coefficient > 0:
            assert reference is not None, "a KL term needs its reference policy"
            reference_T = score_frozen(reference, batch)
        terms = _TokenLoss(batch, config, anchor_T, reference_T, part.denominator)
        run = whole_loss if config.needs_whole_samples else fused_loss
        seen_T: dict[str, Tensor] = {}
        beside = None
        if policy.critic is not None:
            beside = value_term(policy.critic, batch, config, part.denominator, seen_T)
        result = run(policy.model, batch, terms, beside)
        result.loss.backward()
        if batch.filler:
            continue
        value += float(result.loss.detach())
        # The gap to the engine is that of the held version: `ewma` anchors elsewhere.
        elsewhere = config.proximal == "ewma"
        held_T = result.logprobs_T if anchor_T is None or elsewhere else anchor_T
        if updated and held_T is result.logprobs_T:  # our own updates would count as a gap
            batch = replace(batch, clean_T=torch.zeros_like(batch.clean_T))
        sums.count(batch, held_T, {**result.seen_T, **seen_T})
    if not math.isfinite(whole := policy.ranks.total([value])[0]):
        raise TrainingFailed(
            f"step {step}: the loss is {whole}; the weights are as before this update. Resume "
            "from the last checkpoint, with a lower learning rate if it comes again"
        )
    sums.loss += value
    return of_half


def _squared_norm(policy: Policy) -> float:
    """Of the model's gradients so far, over all ranks."""
    own = (p.grad for p in policy.model.parameters())
    norm = noise.squared_norm(None if grad is None else local(grad) for grad in own)
    return policy.ranks.total([norm])[0]


@dataclass(frozen=True, slots=True)
class _TokenLoss:
    """The objective of one micro-batch: called with some of its tokens by `fused_loss`, with all
    by `whole_loss`."""

    batch: MicroBatch
    config: ObjectiveConfig
    anchor_T: Tensor | None
    """Proximal log-probabilities; None: see `_proximal`."""
    reference_T: Tensor | None
    denominator: float

    def __call__(
        self, current_C: Tensor, entropy_C: Tensor, rows: slice
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted [C] loss, and what is reported of every token."""
        in_float32 = current_C.dtype == torch.float32
        if self.config.has_kernel and in_float32 and not dispatch.why_not_triton(current_C):
            return self.by_kernel(current_C, entropy_C, rows)
        config, now_C = self.config, current_C.detach()
        behaviour_C, owner_C = self.batch.behaviour_T[rows], self.batch.owner_T[rows]
        proximal_C = anchor_C = self._proximal(now_C, rows)
        if config.ratio == "sequence":
            anchor_C = objective.sequence_proximal(current_C, proximal_C, owner_C)
        surrogate_C, clipped_C = objective.find_surrogate(config.surrogate)(
            current_C,
            anchor_C,
            self.batch.advantages_T[rows],
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        gap_C = proximal_C - behaviour_C
        if config.correction_level == "sequence":
            gap_C = objective.sequence_log_ratio(proximal_C, behaviour_C, owner_C)
        correction_C, limited_C = objective.importance_correction(
            gap_C,
            torch.zeros_like(gap_C),
            kind=config.correction,
            low=config.correction_low,
            high=config.correction_high,
        )
        loss_C = correction_C * surrogate_C
        behaviour_to_now_C = objective.log_ratio(now_C, behaviour_C)
        seen_C = {
            "ratio": objective.log_ratio(now_C, anchor_C).exp(),
            "clipped": clipped_C,
            "correction": correction_C,
            "limited": limited_C,
            "entropy": entropy_C.detach(),
            "kl_behaviour": behaviour_to_now_C.expm1() - behaviour_to_now_C,
        }
        if config.entropy_coefficient > 0:
            loss_C = loss_C - config.entropy_coefficient * entropy_C
        if self.reference_T is not None:
            reference_C = self.reference_T[rows]
            kl_C = objective.kl_to_reference(current_C, reference_C, config.kl_estimator)
            loss_C = loss_C + config.kl_coefficient * kl_C
            seen_C["kl_reference"] = kl_C.detach()
        return loss_C * self.batch.weights_T[rows] / self.denominator, seen_C

    def by_kernel(
        self, current_C: Tensor, entropy_C: Tensor, rows: slice
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same in one Triton kernel, for the objectives it knows."""
        from ..kernels import fused  # imports triton

        names = {field.name for field in fields(fused.PolicyLaw)}
        loss_C, seen_C = fused.policy_loss(
            current_C,
            entropy_C,
            fused.PolicyLaw(**self.config.model_dump(include=names)),
            proximal_C=self._proximal(current_C.detach(), rows),
            behaviour_C=self.batch.behaviour_T[rows],
            advantages_C=self.batch.advantages_T[rows],
            weights_C=self.batch.weights_T[rows] / self.denominator,
            reference_C=None if self.reference_T is None else self.reference_T[rows],
        )
        return loss_C, {"entropy": entropy_C.detach(), **seen_C}

    def _proximal(self, now_C: Tensor, rows: slice) -> Tensor:
        if self.anchor_T is not None:
            return self.anchor_T[rows]
        behaviour_C = self.batch.behaviour_T[rows]
        if self.config.proximal == "interpolated":
            return objective.interpolated_proximal(now_C, behaviour_C, self.batch.lag_T[rows])
        return behaviour_C if self.config.proximal == "behaviour" else now_C


def _checked_norm(policy: Policy, step: int) -> Tensor:
    """The gradient norm of the update that is about to be made.

    Raises:
        TrainingFailed: it is not finite.
    """
    norm = policy.grad_norm()
    if not torch.isfinite(norm):
        raise TrainingFailed(
            f"step {step}: the gradient norm is {float(norm)} though the loss is finite; the "
            "weights are as before this update. Resume from the last checkpoint with a lower "
            "learning rate"
        )
    return norm
