"""Sizers: the expected update is the target gradient, budgets and revisit bounds hold, and every
decision says why. The unbiasedness tests draw whole windows on softmax problems whose gradients are
known exactly; each states, and checks, the power it has."""

import math
import re

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.buffer.events import Facts, Finished, Put, Ref
from slipstream.buffer.journal import Journal
from slipstream.buffer.records import SizingDecision
from slipstream.learner.advantage import staged_advantages
from slipstream.rollout.config import (
    EvalConfig,
    FeederSpec,
    PromptsConfig,
    RolloutConfig,
    SamplingConfig,
    SizerName,
    SizingConfig,
)
from slipstream.rollout.history import Known
from slipstream.rollout.prompts import PromptSource
from slipstream.rollout.sizing import Controller
from slipstream.rollout.spares import with_spares
from slipstream.rollout.tickets import TicketMaker, commit_chance, length_limit, wait_chance

WINDOWS = 1500
GROUPS = 32
Z = 4.0
"""A true null fails with a probability below 1e-4 per prompt."""


class Softmax:
    """Prompts with K answers each: pi = softmax(theta), a set of correct answers, exact gradients.

    grad p = pi * (r - p) in theta, for p = sum of pi over the correct ones.
    """

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        rates = np.array([0.05, 0.15, 0.3, 0.5, 0.7, 0.95])
        num_correct, num_wrong = 2, 3
        shares = random.dirichlet(np.ones(num_correct) * 3, len(rates))
        others = random.dirichlet(np.ones(num_wrong) * 3, len(rates))
        self.pi_XK = np.concatenate([rates[:, None] * shares, (1 - rates)[:, None] * others], 1)
        self.reward_K = np.array([1.0] * num_correct + [0.0] * num_wrong)
        self.tokens_X = np.array([2.0, 3.0, 1.0, 2.0, 4.0, 2.0])
        self.rates = rates
        self.gradient_XK = self.pi_XK * (self.reward_K - rates[:, None])
        self.random = random

        scores_XKK = np.eye(num_correct + num_wrong) - self.pi_XK[:, None, :]
        norms_X = (self.gradient_XK**2).sum(axis=1)
        self.along_XK = np.einsum("xkj,xj->xk", scores_XKK, self.gradient_XK) / norms_X[:, None]
        """Score of each answer along g: weighted by advantages its mean is 1 without bias."""

    def draw(self, x: int, *shape: int) -> np.ndarray:
        """Answers to prompt x."""
        return np.searchsorted(np.cumsum(self.pi_XK[x])[:-1], self.random.random(shape))

    def known(self, x: int, seen: int) -> Known:
        """What `seen` earlier samples, drawn afresh, tell."""
        passes = self.reward_K[self.draw(x, seen)].sum()
        return Known(
            source_id=f"p/{x}", passes=passes + 1, fails=seen - passes + 1, evidence=seen,
            tokens=self.tokens_X[x], score_norm=1.0, last_step=0,
        )  # fmt: skip


def estimates(problem: Softmax, x: int, answers_MN: np.ndarray) -> np.ndarray:
    """[M] leave-one-out estimates of g, along g, of M groups of n."""
    rewards_MN, n = problem.reward_K[answers_MN], answers_MN.shape[1]
    advantages_MN = (rewards_MN - rewards_MN.mean(axis=1, keepdims=True)) * n / (n - 1)
    return (advantages_MN * problem.along_XK[x][answers_MN]).mean(axis=1)


def check_mean_is(expected: np.ndarray, draws: np.ndarray, *, detects: float) -> None:
    """Each column's mean is what is expected, by a test that would find a relative error of
    `detects` with a probability of 99%."""
    error = draws.std(axis=0, ddof=1) / math.sqrt(len(draws))
    assert (error * (Z + 2.33) <= detects * np.abs(expected)).all(), "the test has not its power"
    assert (np.abs(draws.mean(axis=0) - expected) <= Z * error).all()


def decide(problem: Softmax, config: RolloutConfig) -> list[SizingDecision]:
    """For one prompt of each kind, after six earlier samples of each."""
    known = [problem.known(x, 6) for x in range(len(problem.rates))]
    return Controller(config, by_std=False).decide(known, [(64, "")] * len(known))


def updates(
    problem: Softmax, config: RolloutConfig, windows: int = WINDOWS, *, peek: bool = False
) -> np.ndarray:
    """[windows, X] weight x estimate along g, mean of GROUPS groups under each decision; `peek`
    plants the bias of ending a group by its own outcomes."""
    drawn = np.empty((windows, len(problem.rates)))
    for window in range(windows):
        for x, decision in enumerate(decide(problem, config)):
            answers_MN = problem.draw(x, GROUPS, decision.num_samples)
            if peek:
                found = [
                    estimates(problem, x, until_mixed(problem, a)[None])[0] for a in answers_MN
                ]
            else:
                found = estimates(problem, x, answers_MN)
            drawn[window, x] = decision.weight * np.mean(found)
    return drawn


def until_mixed(problem: Softmax, answers: np.ndarray) -> np.ndarray:
    """The answers up to the first that differs in reward: "mixed already, enough"."""
    changes = np.flatnonzero(np.diff(problem.reward_K[answers]))
    return answers[: changes[0] + 2] if len(changes) else answers


def rollout(sizer: SizerName, **sizing) -> RolloutConfig:
    if sizer != "probe_then_commit":
        sizing = {"max_samples": 16, **sizing}
    return RolloutConfig(samples_per_prompt=8, sizing=SizingConfig(sizer=sizer, **sizing))


ADAPTIVE: tuple[SizerName, ...] = ("equal_treatment", "hardness_weighted", "min_variance")


@pytest.mark.parametrize("sizer", ADAPTIVE)
def test_sizes_from_earlier_samples_leave_the_expected_update_at_the_true_gradient(sizer):
    draws = updates(Softmax(), rollout(sizer))
    check_mean_is(np.ones(draws.shape[1]), draws, detects=0.12)


def test_the_planted_bias_of_sizing_a_group_by_its_own_outcomes_is_caught():
    draws = updates(Softmax(), rollout("min_variance"), windows=300, peek=True)
    with pytest.raises(AssertionError):
        check_mean_is(np.ones(draws.shape[1]), draws, detects=0.4)


def probed_update(problem: Softmax, controller: Controller, x: int, *, pool: bool = False) -> float:
    """One group of prompt x in two stages, along g; `pool` plants the bias of forgetting them."""
    before = problem.known(x, 6)
    (first,) = controller.decide([before], [(64, "")])
    answers = problem.draw(x, first.num_samples)
    rewards = problem.reward_K[answers]
    passes = before.passes + rewards.sum()
    after = msgspec.structs.replace(
        before, passes=passes, fails=before.passes + before.fails + len(rewards) - passes
    )
    whole = controller.commit(first, after, problem.random.random())
    answers = np.append(answers, problem.draw(x, whole.num_samples - len(answers)))
    sizes = [stage.num_samples for stage in whole.stages]
    weights = [stage.weight / stage.num_samples for stage in whole.stages]
    if pool:
        sizes, weights = [whole.num_samples], [1.0 / whole.num_samples]
    advantages = staged_advantages(problem.reward_K[answers].tolist(), sizes)
    shares = np.repeat(weights, sizes)
    return float((shares * advantages * problem.along_XK[x][answers]).sum())


@pytest.mark.parametrize("pool", [False, True])
def test_a_probe_then_commit_update_is_the_true_gradient_and_pooling_its_stages_is_not(pool):
    problem = Softmax()
    controller = Controller(rollout("probe_then_commit", min_commit=0.2), by_std=False)
    draws = np.array([
        [probed_update(problem, controller, x, pool=pool) for x in range(len(problem.rates))]
        for _ in range(8000)
    ])  # fmt: skip
    if pool:
        draws = draws[:, [0, 5]]  # where a probe says most
        with pytest.raises(AssertionError, match="<="):
            check_mean_is(np.ones(2), draws, detects=0.2)
    else:
        check_mean_is(np.ones(draws.shape[1]), draws, detects=0.2)


def test_dars_weighed_by_size_follows_its_own_target_and_not_the_mean_gradient():
    problem, config = Softmax(), rollout("hardness_weighted", weigh_by_size=True)
    sizes = np.mean(
        [[d.num_samples for d in decide(problem, config)] for _ in range(WINDOWS)], axis=0
    )
    check_mean_is(sizes / 8, updates(problem, config), detects=0.15)
    assert sizes[0] > 2 * sizes[-1]


def test_refilling_groups_without_signal_keeps_the_direction_and_lengthens_the_step():
    """Per kept group prompt x contributes g_x / (X E[mixed]): one factor for every prompt."""
    problem, n, groups = Softmax(), 4, 120_000
    xs = problem.random.integers(len(problem.rates), size=groups)
    contributed, kept = np.zeros((groups, len(problem.rates))), np.zeros(groups, dtype=bool)
    for x in range(len(problem.rates)):
        rows = np.flatnonzero(xs == x)
        answers_MN = problem.draw(x, len(rows), n)
        rewards_MN = problem.reward_K[answers_MN]
        kept[rows] = rewards_MN.min(axis=1) < rewards_MN.max(axis=1)
        contributed[rows, x] = estimates(problem, x, answers_MN)
    assert (contributed[~kept] == 0).all()
    mixed = np.mean(1 - problem.rates**n - (1 - problem.rates) ** n)
    expected = np.full(len(problem.rates), 1 / (len(problem.rates) * mixed))
    check_mean_is(expected, contributed[kept], detects=0.2)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(ADAPTIVE),
    st.lists(
        st.tuples(st.floats(0.1, 50), st.floats(0.1, 50), st.floats(1, 64), st.integers(0, 9)),
        min_size=1, max_size=10,
    ),
    st.floats(0, 600),
)  # fmt: skip
def test_every_decision_is_within_its_bounds_and_all_within_the_budget(sizer, prompts, budget):
    config = rollout(sizer, tokens_per_prompt=budget, min_samples=3)
    known = [
        Known(source_id=f"p/{i}", passes=a, fails=b, evidence=a + b, tokens=t, score_norm=t,
              last_step=3, skips=s)
        for i, (a, b, t, s) in enumerate(prompts)
    ]  # fmt: skip
    decisions = Controller(config, by_std=True).decide(known, [(64, "")] * len(known))
    sizes = [d.num_samples for d in decisions]
    assert all(n == 0 or 3 <= n <= 16 for n in sizes)
    most = budget * len(known) or 8 * sum(k.tokens for k in known)
    spent = sum(n * k.tokens for n, k in zip(sizes, known, strict=True))
    assert spent <= most * (1 + 1e-9)
    for decision, k in zip(decisions, known, strict=True):
        assert f"pass rate {k.pass_rate:.2f} by {k.evidence:.1f} samples" in decision.reason
        assert decision.weight == 1 + k.skips


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 6),
    st.lists(st.floats(0, 60), min_size=12, max_size=60),
    st.booleans(),
)
def test_every_prompt_is_revisited_within_its_bound_and_counts_for_the_visits_it_missed(
    max_skips, evidence, solved
):
    config = RolloutConfig(sizing=SizingConfig(skip_below=0.2, max_skips=max_skips))
    controller, skips, missed, weights = Controller(config, by_std=False), 0, 0, 0.0
    for seen in evidence:
        passes, fails = (seen + 0.5, 0.5) if solved else (0.5, seen + 0.5)
        known = Known(source_id="p/0", passes=passes, fails=fails, evidence=seen, tokens=5.0,
                      score_norm=1.0, last_step=0, skips=skips)  # fmt: skip
        (decision,) = controller.decide([known], [(64, "")])
        if decision.num_samples:
            weights += decision.weight
            skips = 0
        else:
            assert f"skipped, visit {skips + 1} in a row" in decision.reason
            skips += 1
            missed = max(missed, skips)
    assert missed <= max_skips
    assert weights + skips == len(evidence)


def test_unseen_prompts_are_never_skipped_and_settled_ones_are():
    config = RolloutConfig(sizing=SizingConfig(skip_below=0.2))
    controller = Controller(config, by_std=False)

    def size(evidence: float) -> int:
        known = Known(source_id="p/0", passes=40.0, fails=0.1, evidence=evidence, tokens=5.0,
                      score_norm=1.0, last_step=None)  # fmt: skip
        return controller.decide([known], [(64, "")])[0].num_samples

    assert size(0.0) == 8
    assert size(10.0) == 0


def test_the_defaults_decide_what_they_always_did():
    config = RolloutConfig(samples_per_prompt=4)
    known = Known(source_id="p/0", passes=1.0, fails=9.0, evidence=8.0, tokens=5.0,
                  score_norm=1.0, last_step=0)  # fmt: skip
    (decision,) = Controller(config, by_std=True).decide([known], [(256, "")])
    assert (decision.sizer, decision.num_samples, decision.max_new_tokens) == ("fixed", 4, 256)
    assert (decision.weight, decision.reason) == (1.0, "rollout.samples_per_prompt")


@given(st.integers(0, 40), st.integers(0, 40), st.floats(0, 1, exclude_max=True))
def test_spare_samples_are_among_those_of_the_size_and_two_are_always_needed(size, spare, chance):
    sized = SizingDecision(sizer="fixed", num_samples=size, max_new_tokens=8, reason="by hand")
    decision = with_spares(sized, SizingConfig(spare_samples=spare, wait_share=0.25), chance)
    assert decision.num_samples == size, "what the budget allowed, and no more"
    assert decision.spares == max(0, min(spare, size - 2))
    assert (decision == sized) == (decision.spares == 0)
    if decision.spares:
        assert decision.spare_weight == (4.0 if chance < 0.25 else 0.0)
        word = "each counts 4.00 times" if chance < 0.25 else "cut once the others are in"
        assert f"by hand; {decision.spares} spare, " in decision.reason
        assert word in decision.reason


def test_who_waits_for_spare_samples_follows_from_the_seed_and_the_prompt_alone(tmp_path):
    source = PromptSource(PromptsConfig(size=50, held_out=5), 0)
    maker = TicketMaker(spec(tmp_path, spare_samples=1, wait_share=0.25), source)
    waits = [ticket.sizing.spare_weight > 0 for ticket in maker.tickets(range(800))]
    assert waits == [wait_chance(0, uid) < 0.25 for uid in range(800)]
    assert abs(np.mean(waits) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 800)


def test_a_group_of_hundreds_is_an_ordinary_size():
    config = RolloutConfig(samples_per_prompt=512, sizing=SizingConfig(sizer="equal_treatment"))
    known = Known(source_id="p/0", passes=1.0, fails=99.0, evidence=98.0, tokens=5.0,
                  score_norm=1.0, last_step=0)  # fmt: skip
    sizing = config.sizing.model_copy(update={"tokens_per_prompt": 1e9})
    config = config.model_copy(update={"sizing": sizing})
    (decision,) = Controller(config, by_std=True).decide([known], [(64, "")])
    assert decision.num_samples == 2048


@given(st.integers(0, 500))
def test_the_length_schedule_holds_and_cycles(step):
    sizing = SizingConfig(length_schedule=((5, 16), (10, 32), (15, 64)), length_cycle_steps=20)
    config = RolloutConfig(sampling=SamplingConfig(max_new_tokens=48), sizing=sizing)
    expected = {0: 48, 1: 16, 2: 32, 3: 48}[step % 20 // 5]
    tokens, why = length_limit(config, step)
    assert tokens == expected
    assert bool(why) == (tokens < 48)


def spec(run_dir, **sizing) -> FeederSpec:
    return FeederSpec(
        run_id="r", run_dir=run_dir, endpoint="ipc://nowhere", seed=0,
        prompts=PromptsConfig(size=50, held_out=5),
        rollout=RolloutConfig(
            samples_per_prompt=4, sampling=SamplingConfig(max_new_tokens=64),
            sizing=SizingConfig(**sizing),
        ),
        eval=EvalConfig(), steps=5,
    )  # fmt: skip


def test_a_second_stage_is_decided_from_the_ledger_alone_and_said_in_words(tmp_path):
    journal = Journal(tmp_path)
    settings_ = {"sizer": "probe_then_commit", "probe_samples": 2, "min_commit": 0.2}
    source = PromptSource(PromptsConfig(size=50, held_out=5), 0)
    maker = TicketMaker(spec(tmp_path, **settings_), source)
    nowhere = Ref(segment=0, offset=0, length=0, digest=0)
    for uid, ticket in enumerate(maker.tickets(range(40))):
        assert (ticket.sizing.num_samples, ticket.sizing.staged) == (2, True)
        put = Put(uid=uid, num_samples=2, ticket=journal.append(ticket), staged=True)
        samples = [Finished(uid=uid, index=i, payload=nowhere,
                            facts=Facts(spans=((0, 0, 10),), reward=0.0, score_norm=5.0))
                   for i in range(2)]  # fmt: skip
        journal.commit([put, *samples])
        if uid == 20:
            maker.commits()
            maker.save()
    decided = maker.commits()
    restarted = TicketMaker(spec(tmp_path, **settings_), source)
    assert restarted.commits() == decided
    sizes = [decided[uid].num_samples for uid in range(40)]
    assert set(sizes) == {2, 4}, "some are committed, some are not"
    for uid, sizing in decided.items():
        assert not sizing.staged
        weights = [stage.weight for stage in sizing.stages]
        told = re.search(r"a probe of 2 of 4; .*probability (\S+), chance (\S+):", sizing.reason)
        assert told, sizing.reason
        q, chance = float(told[1]), float(told[2])
        assert 0.2 <= q < 1
        assert chance == pytest.approx(commit_chance(0, uid), abs=0.005)
        assert weights[0] == 0.5
        assert (sizing.num_samples == 4) == (commit_chance(0, uid) < q or abs(chance - q) < 0.01)
        if sizing.num_samples == 4:
            assert weights[1] == pytest.approx(0.5 / q, rel=0.03)
    journal.close()


def test_tickets_follow_the_journal_and_a_restart_decides_the_same(tmp_path):
    journal = Journal(tmp_path)
    settings_ = {"sizer": "min_variance", "length_quantile": 0.9, "prior_strength": 0.5}
    source = PromptSource(PromptsConfig(size=50, held_out=5), 0)
    maker = TicketMaker(spec(tmp_path, **settings_), source)
    first = maker.tickets(range(50))
    assert {t.sizing.num_samples for t in first} == {4}, "nothing is known: all alike"
    assert {t.sizing.max_new_tokens for t in first} == {64}
    nowhere = Ref(segment=0, offset=0, length=0, digest=0)
    for uid, ticket in enumerate(first):
        rewards = [float(uid % 3 == 0 or (uid % 3 == 1 and i % 2)) for i in range(4)]
        journal.commit([Put(uid=uid, num_samples=4, ticket=journal.append(ticket))])
        journal.commit([
            Finished(uid=uid, index=i, payload=nowhere,
                     facts=Facts(spans=((0, 0, 10),), reward=reward, score_norm=5.0))
            for i, reward in enumerate(rewards)
        ])  # fmt: skip
    second = maker.tickets(range(50, 100))
    maker.save()
    by_source = {t.prompt.source_id: uid % 3 for uid, t in enumerate(first)}
    sizes = {kind: {t.sizing.num_samples for t in second if by_source[t.prompt.source_id] == kind}
             for kind in range(3)}  # fmt: skip
    assert min(sizes[1]) > max(sizes[0] | sizes[2])
    lengths = {t.sizing.max_new_tokens for t in second}
    assert lengths == {18}, "1.5 x 12, the edge above 10"
    restarted = TicketMaker(spec(tmp_path, **settings_), source)
    assert restarted.tickets(range(50, 100)) == second
    journal.close()
