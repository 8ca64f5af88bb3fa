"""Groups of different sizes in one update: under `aggregation = "prompt"` and the leave-one-out
advantage its expectation is each prompt's true gradient times the prompt's weight, exactly."""

import itertools
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from slipstream.buffer.records import SamplingParams, SizingDecision, Stage, Timings
from slipstream.learner import batch, objective
from slipstream.learner.advantage import spare_advantages
from slipstream.learner.batch import samples_of
from slipstream.learner.config import LearnerConfig, ObjectiveConfig
from slipstream.learner.step import _part
from slipstream.rollout.config import RolloutConfig, SizingConfig
from slipstream.rollout.history import Known
from slipstream.rollout.sizing import Controller
from slipstream.rollout.spares import with_spares

SIZES = (2, 3, 5)
WEIGHTS = (1.0, 3.0, 0.5)
RATES = (0.05, 0.4, 0.7)


def config(advantage: str, aggregation: str) -> LearnerConfig:
    chosen = ObjectiveConfig(advantage=advantage, aggregation=aggregation)  # type: ignore[arg-type]
    return LearnerConfig(objective=chosen)


def update(groups, learner: LearnerConfig, uid: int, p: float) -> float:
    """A prompt's part of an update along its g, over |g|^2, by the learner's own weights and
    advantages. A score averages g / p for a passing sample and -g / (1 - p) for a failing one."""
    samples = samples_of(groups, learner.objective)
    part = _part(samples, groups, learner, lambda rows: rows)  # type: ignore
    return sum(
        s.weight * float(s.advantage) / part.denominator
        * (1 / p if s.trajectory.score.value else -1 / (1 - p))
        for s in part.samples if s.trajectory.uid == uid
    )  # fmt: skip


def chance_of(outcome, p: float) -> float:
    return math.prod(p if r else 1 - p for r in outcome)


def outcomes(size: int):
    return itertools.product((0.0, 1.0), repeat=size)


def expected_factors(make, learner: LearnerConfig) -> np.ndarray:
    """[prompts] expected `update`. Exact: every outcome of one prompt's group by its probability,
    the other groups fixed."""
    rng = np.random.default_rng(0)

    def group(uid: int, rewards):
        made = make.group(
            uid, [make.trajectory(uid, i, rng, reward=r, num_written=1 + i % 2)
                  for i, r in enumerate(rewards)],
        )  # fmt: skip
        weight = msgspec.structs.replace(made.sizing, weight=WEIGHTS[uid])
        return msgspec.structs.replace(made, sizing=weight)

    factors = []
    for uid, (size, p) in enumerate(zip(SIZES, RATES, strict=True)):
        total = 0.0
        for outcome in outcomes(size):
            groups = [group(other, [0.0, 1.0] * n if other != uid else outcome)
                      for other, n in enumerate(SIZES)]  # fmt: skip
            total += chance_of(outcome, p) * update(groups, learner, uid, p)
        factors.append(total)
    return np.array(factors)


def test_the_expected_update_is_each_true_gradient_by_its_weight_whatever_the_sizes(make):
    factors = expected_factors(make, config("leave_one_out", "prompt"))
    assert factors / factors[0] == pytest.approx(np.array(WEIGHTS), rel=1e-12)
    assert factors[0] == pytest.approx(1 / (len(SIZES) * 256))


def probe_factor(make, p: float, decide) -> float:
    """Expected `update` of a prompt that is probed with 3 samples and committed, or not, to 5.

    Exact, over every outcome of both stages and the chance between them.

    Args:
        make: the fixture.
        p: its pass rate.
        decide: outcome of the probe -> [(probability, decision on the whole group)].
    """
    learner, rng = config("leave_one_out", "prompt"), np.random.default_rng(0)
    other = make.group(1, [make.trajectory(1, i, rng, reward=float(i)) for i in range(2)])

    def group(rewards, sizing):
        made = make.group(0, [make.trajectory(0, i, rng, reward=r) for i, r in enumerate(rewards)])
        return msgspec.structs.replace(made, sizing=sizing)

    total = 0.0
    for probe in outcomes(3):
        for likelihood, sizing in decide(probe):
            for rest in outcomes(sizing.num_samples - 3):
                groups = [group((*probe, *rest), sizing), other]
                chance = chance_of(probe, p) * likelihood * chance_of(rest, p)
                total += chance * update(groups, learner, 0, p)
    return total * 2 * 256


def by_the_rule(probe):
    """Both ways in which the sizer's own decision can fall, after this probe of an unseen prompt.

    The prior is that of `History`, its evidence that of the probe alone.
    """
    rollout = RolloutConfig(
        samples_per_prompt=5, sizing=SizingConfig(sizer="probe_then_commit", probe_samples=3)
    )
    controller, passes = Controller(rollout, by_std=False), sum(probe)
    unseen = Known(source_id="p/0", passes=0.2, fails=1.8, evidence=0, tokens=1.0, score_norm=1.0,
                   last_step=None)  # fmt: skip
    seen = msgspec.structs.replace(
        unseen, passes=passes + 0.2, fails=3 - passes + 1.8, evidence=3, unseen_spread=unseen.spread
    )
    (first,) = controller.decide([unseen], [(64, "")])
    assert (first.num_samples, first.staged) == (3, True)
    whole, stopped = (controller.commit(first, seen, chance) for chance in (0.0, 1.0 - 1e-12))
    assert (whole.num_samples, whole.staged, stopped.staged) == (5, False, False)
    q = 1.0 if whole == stopped else 0.4 / whole.stages[1].weight
    assert passes or 0 < q < 0.9, "a hopeless probe must be able to end the group"
    return [(q, whole), (1 - q, stopped)]


def pooled(probe):
    """The planted bias: the same decisions, trained as groups of one stage."""
    return [(q, msgspec.structs.replace(d, stages=())) for q, d in by_the_rule(probe)]


def unweighted(probe):
    """Another: stages apart, but the second not weighed by how rarely it is drawn."""
    stages = (Stage(num_samples=3, weight=0.6), Stage(num_samples=2, weight=0.4))
    return [(q, msgspec.structs.replace(d, stages=stages[: len(d.stages)]))
            for q, d in by_the_rule(probe)]  # fmt: skip


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_a_probe_and_what_follows_from_it_are_together_the_true_gradient(make, p):
    assert probe_factor(make, p, by_the_rule) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("planted", [pooled, unweighted])
@pytest.mark.parametrize("p", [0.02, 0.1])
def test_the_planted_biases_of_a_probe_are_seen(make, p, planted):
    assert abs(probe_factor(make, p, planted) - 1) > 0.02


def test_a_baseline_never_holds_a_later_stage_and_a_lost_sample_leaves_the_others_in_theirs(make):
    rng = np.random.default_rng(0)
    made = make.group(0, [make.trajectory(0, i, rng, reward=r) for i, r in
                          ((0, 1.0), (2, 0.0), (3, 1.0), (4, 0.0))])  # fmt: skip
    stages = (Stage(num_samples=3, weight=0.6), Stage(num_samples=2, weight=2.0))
    sizing = msgspec.structs.replace(made.sizing, num_samples=5, stages=stages, weight=3.0)
    samples = samples_of(
        [msgspec.structs.replace(made, sizing=sizing)], ObjectiveConfig(advantage="leave_one_out")
    )
    assert [s.advantage for s in samples] == pytest.approx([1, -1, 1 - 1 / 3, -2 / 3])
    assert [s.share for s in samples] == pytest.approx([0.9, 0.9, 3.0, 3.0])


M, SPARES, WAIT_SHARE = 5, 1, 0.25
Drawn = list[tuple[float, SizingDecision]]
"""(probability, decision)."""


def cut_at_times() -> Drawn:
    """Both ways in which the decision can fall."""
    whole = SizingDecision(sizer="fixed", num_samples=M, max_new_tokens=256, reason="")
    config = SizingConfig(spare_samples=SPARES, wait_share=WAIT_SHARE)
    waits, cuts = (with_spares(whole, config, chance) for chance in (0.0, WAIT_SHARE))
    assert (waits.spare_weight, cuts.spare_weight) == (4.0, 0.0)
    return [(WAIT_SHARE, waits), (1 - WAIT_SHARE, cuts)]


def always_cut() -> Drawn:
    """A planted bias: the first to finish as an ordinary group."""
    fewer = SizingDecision(sizer="fixed", num_samples=M - SPARES, max_new_tokens=256, reason="")
    return [(1.0, fewer)]


def unweighed() -> Drawn:
    """Another: who waited counts like everybody else."""
    return [(q, msgspec.structs.replace(d, spare_weight=min(1.0, d.spare_weight)))
            for q, d in cut_at_times()]  # fmt: skip


def spare_factor(make, p: float, drawn: Drawn, *, uncut: bool = False) -> float:
    """Expected `update` of a prompt whose right answers are its long ones, over every outcome.

    Args:
        make: the fixture.
        p: its pass rate.
        drawn: decisions on its group.
        uncut: nobody was cut, as where several workers share a group.
    """
    learner, rng, total = config("leave_one_out", "prompt"), np.random.default_rng(0), 0.0
    other = make.group(1, [make.trajectory(1, i, rng, reward=float(i)) for i in range(2)])
    for likelihood, sizing in drawn:
        waits = sizing.spares and sizing.spare_weight
        here = M if uncut or waits else M - SPARES
        for outcome in outcomes(M):
            first = sorted(range(M), key=lambda i: (outcome[i], i))[:here]
            made = make.group(
                0,
                [make.trajectory(0, i, rng, reward=outcome[i],
                                 timings=Timings(claimed_s=0.0, first_token_s=0.0,
                                                 generated_s=float(place), scored_s=9.0))
                 for place, i in enumerate(first)],
            )  # fmt: skip
            groups = [msgspec.structs.replace(made, sizing=sizing), other]
            total += likelihood * chance_of(outcome, p) * update(groups, learner, 0, p)
    return total * 2 * 256


BINS = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)


@pytest.mark.parametrize("p", BINS)
def test_a_group_whose_spare_samples_are_cut_at_times_is_the_true_gradient(make, p):
    assert spare_factor(make, p, cut_at_times()) == pytest.approx(1, rel=1e-9)
    assert spare_factor(make, p, cut_at_times(), uncut=True) == pytest.approx(1, rel=1e-9)


def test_the_documented_bias_of_cutting_the_last_is_the_exact_one(make):
    page = (Path(__file__).parents[2] / "docs" / "sizing.md").read_text()
    (row,) = [line.split("|") for line in page.splitlines() if line.startswith("| first 4 of 5")]
    assert [cell.strip() for cell in row[2:-1]] == [
        f"{spare_factor(make, p, always_cut()):.2f}" for p in BINS
    ]


@pytest.mark.parametrize("p", [0.05, 0.9])
def test_the_planted_biases_of_spare_samples_are_seen(make, p, monkeypatch):
    assert abs(spare_factor(make, p, always_cut()) - 1) > 0.1
    assert abs(spare_factor(make, p, unweighed()) - 1) > 0.02
    monkeypatch.setattr(  # shares are right, but the baselines of needed samples are not
        batch, "spare_advantages", lambda r, needed, m, weight: spare_advantages(r, needed, m, 1.0)
    )
    assert abs(spare_factor(make, p, cut_at_times()) - 1) > 0.02


@pytest.mark.parametrize(
    ("advantage", "aggregation"),
    [("group_mean", "prompt"), ("leave_one_out", "token"), ("leave_one_out", "sequence"),
     ("group_std", "prompt")],
)  # fmt: skip
def test_every_other_combination_is_seen_to_be_off(make, advantage, aggregation):
    factors = expected_factors(make, config(advantage, aggregation))
    assert np.abs(factors / factors[0] / np.array(WEIGHTS) - 1).max() > 0.05


def test_samples_without_gradient_leave_the_shares_of_the_others_as_they_are(make):
    group = make.group(
        0, [make.trajectory(0, i, np.random.default_rng(0), reward=r)
            for i, r in enumerate((1.0, 0.0, 0.0, None))],
        s1={"trained": False, "drop_reason": "stale"},
    )  # fmt: skip
    assert [
        (s.trajectory.index, s.share)
        for s in samples_of([group], ObjectiveConfig(advantage="leave_one_out"))
    ] == [
        (0, 1 / 3),
        (2, 1 / 3),
    ]


def test_prompt_weights_divide_by_what_was_decided_before_sampling():
    assert objective.prompt_weights([0.5, 0.5, 0.25], 2, 64) == ([0.5, 0.5, 0.25], 128.0)


@pytest.mark.parametrize("trained", [True, False])
def test_a_prompt_that_got_too_old_changes_the_weight_of_no_other(make, trained):
    """That of the largest budget, of which the unit of all weights is made."""
    rng, groups = np.random.default_rng(0), []
    for uid, budget in enumerate((64, 256)):
        law = SamplingParams(max_new_tokens=budget)
        members = [make.trajectory(uid, i, rng, reward=float(i), sampling=law) for i in range(2)]
        dropped = {"trained": trained, "drop_reason": None if trained else "stale"}
        groups.append(make.group(uid, members, **({"s0": dropped, "s1": dropped} if uid else {})))
    learner = config("leave_one_out", "prompt")
    part = _part(samples_of(groups, learner.objective), groups, learner, lambda rows: rows)  # type: ignore
    assert part.denominator == 2 * 256
    assert {s.weight for s in part.samples if s.trajectory.uid == 0} == {0.5}
