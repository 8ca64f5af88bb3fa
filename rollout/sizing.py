"""How many samples each prompt gets: one protocol, and the rules behind `rollout.sizing.sizer`.

The target gradient of every rule is written in its docstring (and derived in docs/sizing.md): with
per-prompt normalisation (`aggregation = "prompt"`) and the leave-one-out advantage the expected
update of a prompt is w g, where g is the gradient of its expected reward and w the weight in its
decision. All rules but one look at earlier samples only (other groups), never at the group they
size, so n and w are independent of its outcomes and the claim is exact; `ProbeThenCommit` looks at
the group itself and pays for it with weights. Dividing by the group's standard deviation
(`group_std`) is outside the claim. Tokens are counted as spent, dropped groups included.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np

from ..buffer.records import Record, SizingDecision, Stage
from .allocation import (
    advantage_mass,
    allocate,
    mixed_probability,
    policy_gradient_loss,
    rejection_variance,
    treatment_sizes,
)
from .config import RolloutConfig, SizingConfig
from .history import Known


class Size(Record):
    """What a rule says of one prompt."""

    num_samples: int
    """0: the budget leaves it out."""
    reason: str
    weight: float = 1.0
    stages: tuple[Stage, ...] = ()
    """As `SizingDecision.stages`."""
    staged: bool = False
    """`ProbeThenCommit.commit` is asked when the samples are in."""


class Sizer(Protocol):
    """Decides for a window of prompts together, because a budget is shared."""

    def sizes(self, prompts: Sequence[Known], budget_tokens: float) -> list[Size]:
        """One size per prompt; expected tokens together at most `budget_tokens`."""
        ...


class Fixed:
    """The same n for every prompt. Target: the mean of g over prompts.

    Also DAPO's dynamic sampling (`filter_refill`, arXiv:2503.14476), where the buffer drops groups
    without signal and refills the batch: a dropped group's estimate is 0, so E[estimate | kept] =
    g / P(kept), and over kept groups the target is E[g] / E[P(kept)]: the same direction, longer.
    """

    def __init__(self, num_samples: int, reason: str) -> None:
        self._size = Size(num_samples=num_samples, reason=reason)

    def sizes(self, prompts: Sequence[Known], budget_tokens: float) -> list[Size]:
        """The same for all; knows no budget."""
        return [self._size] * len(prompts)


class ProbeThenCommit:
    """A probe of k samples; then, with a probability q that follows from it, the other n - k.

    Target: the mean of g over prompts. The update of a prompt is

        (k/n) e + C ((n - k) / (n q)) f                C = 1 with probability q, else 0

    e is the leave-one-out estimate of the probe; in f, that of the second stage, the baseline of a
    sample is the mean of all others of the group. Proof: E e = g. Given the probe, q is a number
    above 0, C and the second stage are independent, and no sample of it is in its own baseline,
    so E[C f / q | probe] = E[f | probe] = g; together (k/n) g + ((n - k)/n) g = g. With the
    pooled mean of what was drawn the same rule is biased (docs/sizing.md has the factors).

    q = sqrt(v / u), at least `min_commit` and at most 1. v is the posterior mean of p(1 - p) after
    the probe, u its mean for a prompt of the task before anything was seen: the second stage has
    the variance V / q, V in proportion to v, and among rules of equal expected cost sum V / q is
    least for q in proportion to sqrt(V). So a prompt as uncertain as an unseen one always commits.
    Deviation from pilot-then-commit rules that end hard (q = 0): those are biased.
    """

    def __init__(self, config: RolloutConfig) -> None:
        self._n, self._k = config.samples_per_prompt, config.sizing.probe_samples
        self._least = config.sizing.min_commit
        self._probe = Stage(num_samples=self._k, weight=self._k / self._n)

    def sizes(self, prompts: Sequence[Known], budget_tokens: float) -> list[Size]:
        """The probe of each."""
        reason = f"a probe of {self._k} of {self._n}"
        probe = Size(num_samples=self._k, reason=reason, stages=(self._probe,), staged=True)
        return [probe] * len(prompts)

    def commit(self, probe: Stage, known: Known, chance: float) -> Size:
        """Both stages, or the probe alone.

        Args:
            probe: as it was decided, under settings that a resume may have changed.
            known: the posterior with its samples.
            chance: uniform in [0, 1), and independent of all samples.
        """
        q = min(1.0, max(self._least, math.sqrt(known.spread / known.unseen_spread)))
        told = (
            f"after the probe p(1 - p) is {known.spread:.3f}, of a prompt never seen "
            f"{known.unseen_spread:.3f}: a second stage with probability {q:.2f}, chance "
            f"{chance:.2f}"
        )
        if chance >= q:
            return Size(num_samples=probe.num_samples, reason=f"{told}: none", stages=(probe,))
        rest = max(1, self._n - probe.num_samples)
        second = Stage(num_samples=rest, weight=(1.0 - probe.weight) / q)
        told += f": {rest} more, each counting {1 / q:.2f} times"
        return Size(num_samples=probe.num_samples + rest, reason=told, stages=(probe, second))


class Treatment:
    """DARS: as many samples as bring a prompt's advantage mass to its target.

    The target is the mass of a group of G at pass rate 1/2 (`equal_treatment`), times 2(1 - p)
    (`hardness_weighted`). Target gradient: the mean of g, with less variance for hard prompts; with
    `weigh_by_size` w = n / G instead, and then the paper's: the mean of n(p) g / G.
    Source: DARS (arXiv:2508.13755). Deviations: p comes from earlier groups, not from a probe
    inside this one (which would bias the update); a token budget, met max-min.
    """

    def __init__(
        self, config: RolloutConfig, bounds: tuple[int, int], *, by_std: bool, hard: bool
    ) -> None:
        self._reference, self._by_std, self._bounds = config.samples_per_prompt, by_std, bounds
        self._weigh, self._hard = config.sizing.weigh_by_size, hard

    def sizes(self, prompts: Sequence[Known], budget_tokens: float) -> list[Size]:
        """See `allocation.treatment_sizes`."""
        full = self._reference * advantage_mass(0.5, by_std=self._by_std)
        rates = [known.pass_rate for known in prompts]
        masses = [advantage_mass(p, by_std=self._by_std) for p in rates]
        targets = [full * (2.0 * (1.0 - p) if self._hard else 1.0) for p in rates]
        costs = [known.tokens for known in prompts]
        skips = [known.skips for known in prompts]
        sizes = treatment_sizes(masses, targets, costs, budget_tokens, self._bounds, skips)
        return [
            Size(
                num_samples=n,
                reason=f"advantage mass {n * mass:.1f} of {target:.1f}{_limit(n, self._bounds)}",
                weight=n / self._reference if self._weigh and n else 1.0,
            )
            for n, mass, target in zip(sizes, masses, targets, strict=True)
        ]


class MinVariance:
    """The sizes with the least variance of the batch's gradient under the budget.

    Target: the mean of g. Per prompt the variance is G^2 p(1 - p) / (n - 1), both factors as
    posterior means; with `variance = "rejection"` GVM's own (arXiv:2505.02391), for training on
    passing samples alone.
    """

    def __init__(self, config: SizingConfig, bounds: tuple[int, int]) -> None:
        self._config, self._bounds = config, bounds

    def sizes(self, prompts: Sequence[Known], budget_tokens: float) -> list[Size]:
        """See `allocation.allocate`."""
        low, high = self._bounds
        sizes_N = np.arange(low, high + 1)
        variances_P = np.array([self._variance(known) for known in prompts])
        if self._config.variance == "rejection":
            losses_PN = variances_P[:, None] / sizes_N[None, :]
        else:
            losses_PN = policy_gradient_loss(variances_P, sizes_N)
        costs_P = np.array([known.tokens for known in prompts])
        skips = [known.skips for known in prompts]
        sizes = allocate(losses_PN, sizes_N, costs_P, budget_tokens, skips)
        return [
            Size(
                num_samples=int(n),
                reason=f"variance {variance:.3g} a sample at {known.tokens:.0f} tokens"
                f"{_limit(int(n), self._bounds)}",
            )
            for n, variance, known in zip(sizes, variances_P, prompts, strict=True)
        ]

    def _variance(self, known: Known) -> float:
        norm = max(known.score_norm, 1e-9)
        if self._config.variance == "rejection":
            rate = max(known.pass_rate, 1e-3)
            return norm * rejection_variance(rate, self._config.alpha, self._config.beta)
        return norm * known.spread


def _limit(num_samples: int, bounds: tuple[int, int]) -> str:
    if num_samples == 0:
        return ", left out by the token budget"
    if num_samples in bounds:
        return f", {'least' if num_samples == bounds[0] else 'most'} allowed"
    return ""


def make_sizer(config: RolloutConfig, *, by_std: bool) -> Sizer:
    """The rule that `[rollout.sizing]` names; `by_std` as in `advantage_mass`."""
    sizing, n = config.sizing, config.samples_per_prompt
    bounds = (sizing.min_samples, sizing.most_samples(n))
    match sizing.sizer:
        case "fixed":
            return Fixed(n, "rollout.samples_per_prompt")
        case "filter_refill":
            return Fixed(n, "rollout.samples_per_prompt; refilled without signal")
        case "probe_then_commit":
            return ProbeThenCommit(config)
        case "equal_treatment" | "hardness_weighted" as name:
            return Treatment(config, bounds, by_std=by_std, hard=name == "hardness_weighted")
        case "min_variance":
            return MinVariance(sizing, bounds)


class Controller:
    """Selection, sizes and lengths of a window of prompts, each with its explanation.

    Selection: a prompt whose group would be mixed with a probability below `skip_below` is skipped
    (0 samples), at most `max_skips` visits in a row. Then it is issued with weight 1 + skips, so
    that over its visits the weights add up to one each: with a policy that stands still the target
    is the mean of g over all prompts, skipped ones included.
    """

    def __init__(self, config: RolloutConfig, *, by_std: bool) -> None:
        """Set up.

        Args:
            config: `[rollout]`.
            by_std: whether advantages are divided by the group's standard deviation.
        """
        self._config, self._sizing = config, config.sizing
        self._sizer = make_sizer(config, by_std=by_std)

    def decide(
        self, prompts: Sequence[Known], budgets: Sequence[tuple[int, str]]
    ) -> list[SizingDecision]:
        """One decision per prompt, in their order.

        Args:
            prompts: of one window.
            budgets: `max_new_tokens` of each, and why.
        """
        issued = [i for i, known in enumerate(prompts) if not self._skips(known)]
        chosen = [prompts[i] for i in issued]
        n = self._config.samples_per_prompt
        budget = self._sizing.tokens_per_prompt * len(chosen)
        if not budget:
            budget = n * math.fsum(known.tokens for known in chosen)
        sizes = dict(zip(issued, self._sizer.sizes(chosen, budget), strict=True))
        return [self._decision(known, sizes.get(i), *budgets[i]) for i, known in enumerate(prompts)]

    def _skips(self, known: Known) -> bool:
        return self._is_settled(known) and known.skips < self._sizing.max_skips

    def _is_settled(self, known: Known) -> bool:
        n = self._config.samples_per_prompt
        seen = known.evidence >= 1.0  # never on the prior alone
        return seen and mixed_probability(known.passes, known.fails, n) < self._sizing.skip_below

    def _decision(
        self, known: Known, size: Size | None, max_new_tokens: int, why_tokens: str
    ) -> SizingDecision:
        reason = size.reason if size else f"skipped, visit {known.skips + 1} in a row"
        if self._sizing.adapts:
            reason += (
                f"; pass rate {known.pass_rate:.2f} by {known.evidence:.1f} samples"
                f"{'' if known.last_step is None else f' up to version {known.last_step}'}"
            )
        weight = (size.weight if size else 1.0) * (1.0 + known.skips)
        return SizingDecision(
            sizer=self._sizing.sizer,
            num_samples=size.num_samples if size else 0,
            max_new_tokens=max_new_tokens,
            weight=weight,
            reason=reason + why_tokens,
            stages=size.stages if size else (),
            staged=size is not None and size.staged,
        )

    def commit(self, decision: SizingDecision, known: Known, chance: float) -> SizingDecision:
        """The decision on a whole group whose first stage is finished.

        Args:
            decision: that of the first stage.
            known: the posterior with its samples.
            chance: from `commit_chance`.
        """
        assert isinstance(self._sizer, ProbeThenCommit), "no other rule puts staged groups"
        size = self._sizer.commit(decision.stages[0], known, chance)
        return msgspec.structs.replace(
            decision,
            num_samples=size.num_samples,
            stages=size.stages,
            staged=False,
            reason=f"{decision.reason}; then: {size.reason}",
        )
