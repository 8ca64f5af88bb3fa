"""The staleness law: how old a trained token may be, as pure functions on integers.

Step k = 1, 2, ... trains P groups and publishes version k; while it runs the learner holds k - 1.
A token written by version w has, at step k, the lag (k - 1) - w. Every token with weight must have
0 <= lag <= ceil(S), on the live path.

Why the bound holds. Let C be the groups INFLIGHT + READY + TAKEN (TRAINED included), w(g) the step
of the oldest version that can have written a token of group g, R_k(v) the groups with w(g) <= v
that are not TAKEN when step k has been taken, and take S whole.

1. *Admission* hands out a sample under w only while C <= (w + S + 1) P, its own group included.
   kP of them are TAKEN once step k has been, so that all groups left, and R_k(v) for every v >= w,
   number at most (w + S + 1 - k) P <= (v + S + 1 - k) P. For v < w nothing changes.
2. *Oldest first with wait*: step k is taken only if afterwards R_k(v) <= (v + S + 1 - k) P for
   every v (`first_late`): the steps k + 1 ... v + S + 1 can still train all of them in time. If all
   groups are READY, taking the P oldest keeps this (earliest deadline first); else step k waits
   for those INFLIGHT.
3. Hence R_k(v) = 0 once k >= v + S + 1: no group is left whose oldest token would have, at step
   k + 1, a lag k - v > S. This is the bound.

Step 2 has a deadline (`straggler_wait_s`); beyond it, or were any line above wrong, *consumption*
(`judge`, at every take, per token) takes the weight from what is over the bound. So the bound holds
unconditionally, and admission and wait only decide how much is lost to it: admission alone let
14.9% of samples over it at S = 1 with long-tailed latencies.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import msgspec

from .messages import ProofLine
from .records import Record, TrainingSample, Version, VersionSpan


def capacity(version_step: int, max_staleness_steps: float, prompts_per_step: int) -> int:
    """Groups that may exist on the live path under a version: floor((w + S + 1) P)."""
    # By its decimal digits: 0.3 is a little less than 3/10 in binary, and the floor would show it.
    allowed = version_step + 1 + Fraction(str(max_staleness_steps))
    return math.floor(allowed * prompts_per_step)


def admits(
    num_groups: int, version_step: int, max_staleness_steps: float, prompts_per_step: int
) -> bool:
    """Whether a new group may be opened under a version.

    Args:
        num_groups: groups INFLIGHT + READY + TAKEN (TRAINED included) on the live path, now.
        version_step: w, of the version the claiming engine serves.
        max_staleness_steps: S; a fraction scales admission only.
        prompts_per_step: P.
    """
    return num_groups < capacity(version_step, max_staleness_steps, prompts_per_step)


def token_bound(max_staleness_steps: float) -> int:
    """ceil(S): the largest lag of a token with weight."""
    return math.ceil(max_staleness_steps)


def would_exceed(oldest_step: int, step: int, max_staleness_steps: float) -> bool:
    """Whether taking `step` pushes a sample left behind over the bound.

    Args:
        oldest_step: of the oldest version that wrote, or may yet write, a token of the sample.
        step: the step about to be taken; the sample could next be trained at step + 1.
        max_staleness_steps: S.
    """
    return step - oldest_step > token_bound(max_staleness_steps)


def first_late(
    remaining: Mapping[int, int],
    step: int,
    max_staleness_steps: float,
    prompts_per_step: int,
    open_places: int = 0,
) -> int | None:
    """The first version v of which too many groups are left behind, R_k(v) > (v + S + 1 - k) P.

    Generalises `would_exceed`: a group that could still be trained at step + 1 is late all the
    same when more than P of its kind are left. None: the steps to come can train them all.

    Args:
        remaining: groups left behind, by the step of their oldest version.
        step: k, the step about to be taken.
        max_staleness_steps: S.
        prompts_per_step: P.
        open_places: groups that step k itself can still take, while its batch is handed out in
            parts: R_k(v) <= (v + S + 1 - k) P + open_places then.
    """
    num_left = 0
    for oldest_step in sorted(remaining):
        num_left += remaining[oldest_step]
        steps_left = oldest_step + token_bound(max_staleness_steps) + 1 - step
        if num_left > max(0, steps_left) * prompts_per_step + open_places:
            return oldest_step
    return None


class LivePath:
    """The versions that the live branch descends from, and those it published itself.

    A resume from checkpoint (b, c) opens branch b' whose parent is (b, c): versions of b up to c,
    and of b's own parents up to where b left them, are on the path; the others are orphaned.
    """

    def __init__(self, branch: int, parents: Mapping[int, tuple[int, int]] | None = None) -> None:
        """Walk from the live branch to the root.

        Args:
            branch: the live branch.
            parents: branch -> (parent branch, step at which it left).
        Raises:
            ValueError: the ancestry has a cycle, which no sequence of resumes makes.
        """
        self.branch = branch
        self.parents = dict(parents or {})
        self.digests: dict[tuple[int, int], str] = {}
        self._last_step: dict[int, float] = {branch: math.inf}
        while branch in self.parents:
            parent, left_at = self.parents[branch]
            if parent in self._last_step:
                raise ValueError(f"branch {parent} is its own ancestor: {self.parents}")
            self._last_step[parent] = min(left_at, self._last_step[branch])
            branch = parent

    def publish(self, version: Version) -> None:
        """Remember a published version's digest."""
        self.digests[version.branch, version.step] = version.digest

    def __contains__(self, version: Version) -> bool:
        """Whether lag is defined for the version.

        An orphaned version counts when the live branch published the same step with an equal
        digest: those weights are the same weights. A digest that differs from the published one is
        never on the path, whatever its name.
        """
        if version.step <= self._last_step.get(version.branch, -1):
            published = self.digests.get((version.branch, version.step), "")
            return not (published and version.digest and published != version.digest)
        twin = self.digests.get((self.branch, version.step), "")
        return bool(version.digest) and twin == version.digest


def lag(version: Version, step: int, path: LivePath) -> int | None:
    """Steps between the version and what the learner holds at `step`; None off the path."""
    return step - 1 - version.step if version in path else None


class Verdict(Record, frozen=True):
    """What the law says of one trajectory at one step."""

    max_lag: int
    """Over the tokens on the path; 0 without tokens."""
    stale_prefix: int
    """Tokens up to and including the last one that may not be trained."""
    stale_tokens: int
    """Tokens whose lag lies outside [0, bound]."""
    orphaned_tokens: int
    num_tokens: int

    @property
    def all_stale(self) -> bool:
        """Whether nothing is left to train (never so without tokens)."""
        return 0 < self.num_tokens == self.stale_prefix


def judge(
    spans: Sequence[VersionSpan], step: int, max_staleness_steps: float, path: LivePath
) -> Verdict:
    """Hold the tokens of one trajectory against the step that would train it.

    Args:
        spans: which version wrote each of the N tokens (`Trajectory.versions`).
        step: the step that trains.
        max_staleness_steps: S.
        path: the live path.
    """
    bound = token_bound(max_staleness_steps)
    position = stale_prefix = stale = orphaned = oldest = 0
    for span in spans:
        position += span.length
        age = lag(span.version, step, path)
        if age is None:
            orphaned += span.length
        elif span.length:
            oldest = max(oldest, age)
            stale += span.length if not 0 <= age <= bound else 0
        if span.length and (age is None or not 0 <= age <= bound):
            stale_prefix = position
    return Verdict(
        max_lag=oldest,
        stale_prefix=stale_prefix,
        stale_tokens=stale,
        orphaned_tokens=orphaned,
        num_tokens=position,
    )


def proof_line(
    samples: Iterable[TrainingSample],
    *,
    step: int,
    max_staleness_steps: float,
    path: LivePath,
    dropped: Mapping[str, int] | None = None,
    length_bias: float = 1.0,
    rewards: Sequence[float] = (),
) -> ProofLine:
    """Count what a step trains, from the samples themselves.

    Does not call `judge`: it looks at every token that carries weight, so that a mistake there
    shows here as violations. The learner calls it on what it trained.

    Args:
        samples: all samples of the batch, those without gradient too.
        step: the step that trains them.
        max_staleness_steps: S.
        path: the live path.
        dropped: trajectories dropped since the last batch by reason; the buffer alone knows.
        length_bias: mean length of trained over that of all finished; the buffer alone knows.
        rewards: of all samples finished since the last batch; the buffer alone knows.
    """
    bound = token_bound(max_staleness_steps)
    lags: Counter[int] = Counter()
    orphaned = trimmed = mixed = trained = over = 0
    for sample in samples:
        if not sample.trained:
            continue
        trained += 1
        trimmed += sample.stale_prefix
        allowed = bound if sample.bound is None else min(bound, sample.bound)
        spans = sample.trajectory.versions
        mixed += len({(s.version.branch, s.version.step) for s in spans if s.length}) > 1
        for version, length in weighted_spans(sample):
            age = lag(version, step, path)
            if age is None:
                orphaned += length
            else:
                lags[age] += length
                over += length if not 0 <= age <= allowed else 0
    return ProofLine(
        step=step,
        bound=bound,
        max_lag=max(lags, default=0),
        violations=orphaned + over,
        orphaned_tokens=orphaned,
        lag_counts=dict(sorted(lags.items())),
        trained_tokens=orphaned + sum(lags.values()),
        trimmed_tokens=trimmed,
        mixed_trajectories=mixed,
        trained_trajectories=trained,
        dropped=dict(dropped or {}),
        length_bias=length_bias,
        finished_samples=len(rewards),
        finished_reward_mean=math.fsum(rewards) / len(rewards) if rewards else None,
    )


def joined(parts: Sequence[ProofLine], end: ProofLine) -> ProofLine:
    """The proof line of a step that was handed out in parts.

    Args:
        parts: of each part, from its samples alone.
        end: of the last one, with what the buffer alone knows.
    """
    lags: Counter[int] = Counter()
    for each in (*parts, end):
        lags.update(each.lag_counts)
    sums = {
        name: sum(getattr(each, name) for each in (*parts, end))
        for name in (
            "violations", "orphaned_tokens", "trained_tokens", "trimmed_tokens",
            "mixed_trajectories", "trained_trajectories",
        )
    }  # fmt: skip
    lag_counts = dict(sorted(lags.items()))
    return msgspec.structs.replace(end, max_lag=max(lags, default=0), lag_counts=lag_counts, **sums)


def weighted_spans(sample: TrainingSample) -> Iterable[tuple[Version, int]]:
    """(version, number of tokens with weight) of a trained sample: its spans after the prefix."""
    skip = sample.stale_prefix
    for span in sample.trajectory.versions:
        weighted = max(0, span.length - skip)
        skip = max(0, skip - span.length)
        if weighted:
            yield span.version, weighted
