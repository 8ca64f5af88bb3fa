"""A whole step against a plain re-statement of its docstring, and what must stop it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from slipstream.buffer.errors import TrainingFailed
from slipstream.buffer.records import SamplingParams, Turn, Version, VersionSpan
from slipstream.buffer.staleness import LivePath
from slipstream.learner import batch as batch_module
from slipstream.learner import objective
from slipstream.learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from slipstream.learner.policy import Policy
from slipstream.learner.step import StreamedStep, train_step

HELD = Version(branch=0, step=0)


def config(updates=1, micro=16_384, rate=1e-2, warmup=0, norm=1.0, **of_objective) -> LearnerConfig:
    return LearnerConfig(
        updates_per_step=updates,
        micro_batch_tokens=micro,
        share_prompts=False,  # the comparisons below are to 1e-9
        objective=ObjectiveConfig(**of_objective),
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=warmup, max_grad_norm=norm),
    )


def train(model, groups, settings, step=1, held=HELD, bound=1.0, policy=None, **more):
    policy = policy or Policy(model, settings.optimizer)
    result = train_step(
        policy,
        groups,
        step=step,
        held=held,
        config=settings,
        path=LivePath(0),
        max_staleness_steps=bound,
        **more,
    )
    return result


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def sample_logits(model, sample):
    trajectory = sample.trajectory
    ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))
    logits = model(ids[None]).logits[0] / trajectory.sampling.temperature
    where = np.flatnonzero(trajectory.policy_mask)[sample.stale_prefix :]
    logp = logits.log_softmax(-1)[where - 1]
    return logp.gather(1, ids[where][:, None])[:, 0], torch.special.entr(logp.exp()).sum(1)


def oracle_step(model, optimizer, groups, settings, reference=None):
    """The docstring of `train_step`, sample by sample, for U = 1 and without kept sets."""
    o, terms = settings.objective, []
    for group in groups:
        rewards = np.array([s.trajectory.score.value for s in group.samples])
        advantages = rewards - rewards.mean()
        if o.advantage == "group_std":
            advantages = advantages / (rewards.std() + 1e-6)
        for sample, advantage in zip(group.samples, advantages, strict=True):
            if not sample.trained:
                continue
            current, entropy = sample_logits(model, sample)
            behaviour = torch.from_numpy(
                sample.trajectory.behaviour_logprobs[sample.stale_prefix :]
            )
            correction = (current.detach() - behaviour).exp().clamp(max=o.correction_high)
            loss = -correction * (current - current.detach()).exp() * advantage
            loss = loss - o.entropy_coefficient * entropy
            if reference is not None:
                x = sample_logits(reference, sample)[0].detach() - current
                loss = loss + o.kl_coefficient * (x.exp() - x - 1)
            terms.append(loss)
    if o.aggregation == "token":
        loss = torch.cat(terms).sum() / sum(map(len, terms))
    else:
        loss = torch.stack([term.mean() for term in terms]).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.max_grad_norm)
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize(
    ("aggregation", "advantage"), [("token", "group_std"), ("sequence", "group_mean")]
)
def test_thirty_steps_equal_the_plain_statement(make, build_policy, aggregation, advantage):
    ours, theirs = build_policy(), build_policy()
    settings = config(aggregation=aggregation, advantage=advantage, micro=64, rate=1e-3)
    policy = Policy(ours, settings.optimizer)
    optimizer = torch.optim.AdamW(theirs.parameters(), 1e-3, (0.9, 0.95), 1e-8, weight_decay=0)
    for step in range(30):
        groups = make.groups(2, 3, seed=step, model=ours)
        result = train(ours, groups, settings, policy=policy)
        want = oracle_step(theirs, optimizer, groups, settings)
        assert result.metrics["loss"] == pytest.approx(want, abs=1e-9)


def test_every_term_of_the_loss_equals_the_plain_statement(make, build_policy):
    ours, theirs, reference = build_policy(), build_policy(), build_policy(seed=1)
    settings = config(
        correction_high=1.5, kl_coefficient=0.3, entropy_coefficient=0.2, norm=0.1, rate=1e-3
    )

    def trajectory(uid, index):
        rng = np.random.default_rng(9 * uid + index)
        return make.trajectory(
            uid, index, rng, num_written=4, reward=float(index), temperature=0.5 + uid
        )

    groups = [
        make.group(0, [trajectory(0, i) for i in range(3)], s1={"trained": False}),
        make.group(1, [trajectory(1, i) for i in range(3)], s1={"stale_prefix": 2}),
    ]
    result = train(ours, groups, settings, reference=reference)
    optimizer = torch.optim.AdamW(theirs.parameters(), 1e-3, (0.9, 0.95), 1e-8, weight_decay=0)
    want = oracle_step(theirs, optimizer, groups, settings, reference)
    assert result.metrics["loss"] == pytest.approx(want, abs=1e-9)
    assert 0 < result.metrics["capped_fraction"] < 1
    assert result.metrics["kl_reference"] > 0
    for name, weight in weights_of(ours).items():
        torch.testing.assert_close(weight, theirs.get_parameter(name), rtol=0, atol=1e-9)


@pytest.mark.parametrize("updates", [1, 2])
def test_micro_batch_split_changes_nothing(make, build_policy, updates):
    results = []
    for micro in (1, 40, 16_384):
        model = build_policy()
        metrics = train(model, make.groups(4, 3), config(updates, micro)).metrics
        results.append((metrics["loss"], metrics["grad_norm"], weights_of(model)))
    for loss, norm, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-12)
        assert norm == pytest.approx(results[0][1], rel=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, results[0][2][name], rtol=0, atol=1e-8)


def test_a_mask_shift_by_one_is_caught_by_the_equivalence(make, build_policy, monkeypatch):
    straight = batch_module._piece

    def shifted(sample):
        piece = straight(sample)
        return replace(piece, places=piece.places - 1)

    groups, settings = make.groups(2, 3), config()
    want = train(build_policy(), groups, settings).metrics["loss"]
    monkeypatch.setattr(batch_module, "_piece", shifted)
    assert abs(train(build_policy(), groups, settings).metrics["loss"] - want) > 1e-3


def test_on_policy_the_ratio_and_correction_are_one_and_the_gap_is_zero(make, build_policy):
    model = build_policy()
    metrics = train(model, make.groups(3, 4, model=model), config()).metrics
    assert metrics["ratio_mean"] == 1
    assert metrics["correction_mean"] == pytest.approx(1, abs=1e-6)
    assert metrics["capped_fraction"] == metrics["clipped_fraction"] == metrics["kv_mixture"] == 0
    assert metrics["logprob_gap_max"] < 1e-6
    assert metrics["logprob_gap_tokens"] == metrics["tokens_trained"]
    assert metrics["kl_behaviour"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("proximal", ["first_pass", "behaviour", "ewma", "recomputed"])
def test_our_own_updates_are_no_gap_to_the_engine(make, build_policy, proximal):
    model, settings = build_policy(), config(2, proximal=proximal)
    decay = settings.objective.proximal_decay if proximal == "ewma" else None
    policy = Policy(model, settings.optimizer, decay)
    groups = make.groups(4, 4, model=model)
    metrics = train(model, groups, settings, policy=policy).metrics
    assert metrics["logprob_gap_max"] < 1e-6
    assert 0 < metrics["logprob_gap_tokens"] <= metrics["tokens_trained"]
    assert (metrics["logprob_gap_tokens"] == metrics["tokens_trained"]) == (
        proximal == "recomputed"
    )


def test_two_updates_share_one_proximal_policy_and_the_clip_can_act(make, build_policy):
    model, groups = build_policy(), make.groups(4, 4)
    anchored, single = (
        train(model, groups, config(2, rate=0.05)),
        train(build_policy(), groups, config(1, rate=0.05)),
    )
    assert anchored.metrics["updates"] == 2
    assert anchored.metrics["ratio_mean"] != 1
    assert anchored.metrics["clipped_fraction"] > 0
    assert single.metrics["clipped_fraction"] == 0


def test_kept_sets_renormalise_current_proximal_and_reference(make, build_policy):
    model = build_policy()
    rng = np.random.default_rng(3)

    def kept_trajectory(index):
        base = make.trajectory(0, index, np.random.default_rng(index), num_written=5)
        rows = [sorted({int(t), *rng.integers(0, 64, 6).tolist()}) for t in base.token_ids[-5:]]
        with torch.no_grad():
            logits = model(torch.from_numpy(base.token_ids.astype(np.int64))[None]).logits[0]
        logprobs = [
            float(logits[-6 + j][row].log_softmax(0)[row.index(int(base.token_ids[-5 + j]))])
            for j, row in enumerate(rows)
        ]
        changes = {
            "extras": {"kept_ids": make.ragged(rows)},
            "reward": float(index),
            "sampling": SamplingParams(top_k=7),
        }
        return make.trajectory(
            0, index, np.random.default_rng(index), num_written=5,
            behaviour_logprobs=np.array(logprobs), **changes,
        )  # fmt: skip

    groups = [make.group(0, [kept_trajectory(i) for i in range(3)])]
    settings = config(kl_coefficient=1.0)
    reference = copy.deepcopy(model)
    plain = train(build_policy(), groups, settings, reference=reference).metrics
    metrics = train(model, groups, settings, reference=reference, ratio_law="kept_set").metrics
    assert metrics["logprob_gap_max"] < 1e-6
    assert plain["logprob_gap_max"] > 1
    assert metrics["kl_reference"] == pytest.approx(0, abs=1e-12)
    assert metrics["entropy"] < np.log(7)


def test_warmup_scales_the_rate_by_step(make, build_policy):
    groups, settings = make.groups(2, 2), config(warmup=4, rate=1e-2)
    rates = [
        train(build_policy(), groups, settings, step=k, held=Version(branch=0, step=k - 1), bound=9)
        .metrics["learning_rate"]
        for k in (1, 3, 4, 9)
    ]  # fmt: skip
    assert rates == [0.0025, 0.0075, 0.01, 0.01]


def test_a_token_over_the_bound_stops_the_step_before_the_weights_move(make, build_policy):
    model = build_policy()
    before = weights_of(model)
    groups = make.groups(2, 2)
    train(build_policy(), groups, config(), step=2, held=Version(branch=0, step=1), bound=1.0)
    with pytest.raises(TrainingFailed, match=r"step 3: .* break the staleness bound 1"):
        train(model, groups, config(), step=3, held=Version(branch=0, step=2), bound=1.0)
    orphan = make.groups(2, 2, version=Version(branch=3, step=0, digest="x"))
    with pytest.raises(TrainingFailed, match="orphaned"):
        train(model, orphan, config())
    assert all(torch.equal(w, before[n]) for n, w in weights_of(model).items())


def test_trimming_the_stale_prefix_is_what_the_proof_counts(make, build_policy):
    old, new = Version(branch=0, step=0), Version(branch=0, step=2)
    spans = (VersionSpan(version=old, length=3), VersionSpan(version=new, length=2))
    changes = {"num_written": 5, "versions": spans, "kv_version_min": spans}
    rng = np.random.default_rng(0)
    group = make.group(
        0,
        [make.trajectory(0, i, rng, reward=float(i), **changes) for i in (0, 1)],
        s0={"stale_prefix": 3},
        s1={"stale_prefix": 3},
    )
    proof = train(build_policy(), [group], config(), step=3, held=new, bound=1.0).proof
    assert (proof.violations, proof.max_lag, proof.trained_tokens) == (0, 0, 4)
    assert (proof.trimmed_tokens, proof.mixed_trajectories) == (6, 2)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_what_is_not_finite_stops_the_step_before_the_weights_move(
    make, build_policy, monkeypatch, what
):
    model, groups = build_policy(), make.groups(2, 2)
    before = weights_of(model)
    if what == "loss":
        with torch.no_grad():
            model.model.norm.weight[0] = before["model.norm.weight"][0] = torch.inf
    else:
        model.model.norm.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(TrainingFailed, match=rf"step 1: the {what} is nan"):
        train(model, groups, config())
    assert all(torch.equal(w, before[n]) for n, w in weights_of(model).items())


def test_a_batch_without_trained_tokens_is_an_error(make, build_policy):
    rng = np.random.default_rng(0)
    group = make.group(0, [make.trajectory(0, 0, rng)], s0={"trained": False})
    with pytest.raises(TrainingFailed, match="no token to train on"):
        train(build_policy(), [group], config())


def test_bfloat16_trains_float32_masters_and_publishes_them_rounded(make, build_policy):
    model = build_policy("bfloat16")
    settings = config(rate=1e-5)
    policy = Policy(model, settings.optimizer)
    groups = make.groups(2, 3)
    start = {n: m.detach().clone() for n, m in policy.masters.items()}
    for _ in range(3):
        train(model, groups, settings, policy=policy)
    for name, master in policy.masters.items():
        assert torch.equal(master.bfloat16(), policy.weights()[name])
    moved = [not torch.equal(m, start[n]) for n, m in policy.masters.items()]
    assert all(moved)


def test_the_objective_module_is_what_the_step_calls(make, build_policy, monkeypatch):
    monkeypatch.setattr(objective, "token_weights", lambda lengths, _: ([1.0] * len(lengths), 1.0))
    wrong = train(build_policy(), make.groups(2, 2), config()).metrics["loss"]
    monkeypatch.undo()
    assert wrong != train(build_policy(), make.groups(2, 2), config()).metrics["loss"]


def test_gradient_is_exactly_zero_where_no_policy_token_is_predicted(build_policy, make):
    """An episode of three turns: what stands between the policy's turns teaches nothing."""
    model, rng = build_policy("float64"), np.random.default_rng(0)
    mask = np.array([0, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1], dtype=bool)
    written = int(mask.sum())
    turns = (
        Turn(start=3, end=5, role="policy", state_hash="a", reward=0.0),
        Turn(start=7, end=8, role="policy", state_hash="b", reward=1.0),
        Turn(start=9, end=11, role="policy", state_hash="a", reward=2.0),
    )
    episodes = [
        make.trajectory(
            1, index, rng, num_prompt=len(mask) - written, num_written=written, policy_mask=mask,
            reward=float(index), turns=turns,
        )
        for index in range(2)
    ]  # fmt: skip
    hidden = []

    def keep(module, arguments, output):
        output.last_hidden_state.retain_grad()
        hidden.append(output.last_hidden_state)

    model.model.register_forward_hook(keep)
    train(model, [make.group(1, episodes)], config(advantage="gigpo"))
    [states] = hidden
    moved = states.grad.abs().sum(-1) > 0
    predicts = np.append(mask[1:], False)[: moved.shape[1]]
    assert (moved.numpy() == predicts).all()


@pytest.mark.parametrize("aggregation", ["token", "sequence", "prompt", "prompt_token"])
@pytest.mark.parametrize("arrival", [[[3], [0, 2], [1]], [[0, 1, 2, 3]], [[2, 3], [1, 0]]])
def test_groups_trained_as_they_arrive_make_the_update_of_the_full_batch(
    make, build_policy, monkeypatch, aggregation, arrival
):
    gradients = []
    update = Policy.update

    def spy(policy, *arguments):
        gradients.append({name: p.grad.clone() for name, p in policy.parameters.items()})
        update(policy, *arguments)

    monkeypatch.setattr(Policy, "update", spy)
    settings = config(
        aggregation=aggregation, micro=64, kl_coefficient=0.1, entropy_coefficient=0.1
    )
    groups, reference = make.groups(4, 3), build_policy(seed=1)
    result = train(build_policy(), groups, settings, reference=reference)
    law = {"step": 1, "held": HELD, "config": settings, "path": LivePath(0)}
    policy = Policy(build_policy(), settings.optimizer)
    stream = StreamedStep(policy, **law, max_staleness_steps=1.0, reference=reference)
    for uids in arrival:
        stream.add([groups[uid] for uid in uids])
    streamed = stream.close()
    assert streamed.proof == result.proof
    for key in ("loss", "entropy", "kl_reference", "tokens_trained"):
        assert streamed.metrics[key] == pytest.approx(result.metrics[key], rel=1e-10)
    for name, gradient in gradients[1].items():  # the model's norms round to float32
        torch.testing.assert_close(gradient, gradients[0][name], rtol=0, atol=1e-8)


def test_a_part_over_the_bound_stops_the_step_before_the_weights_move(make, build_policy):
    model, settings = build_policy(), config()
    before = weights_of(model)
    stream = StreamedStep(
        Policy(model, settings.optimizer),
        step=3,
        held=HELD,
        config=settings,
        path=LivePath(0),
        max_staleness_steps=1.0,
    )
    with pytest.raises(TrainingFailed, match="break the staleness bound"):
        stream.add(make.groups(1, 2))  # written by version 0: lag 2
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, before[name])
