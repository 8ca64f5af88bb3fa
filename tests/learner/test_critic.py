"""PPO's critic: GAE, whitening, the clipped value loss, the head in a step and in a checkpoint."""

import numpy as np
import pytest
import torch
from slipstream.buffer.records import Version
from slipstream.buffer.staleness import LivePath
from slipstream.learner.advantage import generalised_advantages, whitened
from slipstream.learner.config import LearnerConfig, ObjectiveConfig
from slipstream.learner.objective import clipped_value_loss
from slipstream.learner.policy import Policy
from slipstream.learner.step import train_step

PPO = {"preset": "ppo", "gae_decay": 0.9, "discount": 0.95, "value_coefficient": 0.5}


def test_gae_by_hand():
    # deltas: 0.5 * 4 - 2 = 0, 0.5 * 8 - 4 = 0, 10 - 8 = 2; each step back counts half of a half
    got = generalised_advantages(10.0, np.array([2.0, 4.0, 8.0]), discount=0.5, decay=0.5)
    np.testing.assert_array_equal(got, [0.125, 0.5, 2.0])


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_gae_is_the_weighted_mean_of_n_step_advantages(decay):
    """Eq. 16 of the paper says so: (1 - lambda) sum of lambda^(n-1) A^(n), the last one for all
    that would reach beyond the end."""
    values, reward, gamma = np.array([0.3, -0.2, 0.9, 0.4]), 1.5, 0.8
    ends = len(values)
    for t, got in enumerate(generalised_advantages(reward, values, discount=gamma, decay=decay)):
        n_step = []
        for n in range(1, ends - t + 1):
            last = t + n == ends
            beyond = gamma ** (n - 1) * reward if last else gamma**n * values[t + n]
            n_step.append(beyond - values[t])
        weights = [(1 - decay) * decay**i for i in range(len(n_step) - 1)]
        want = sum(w * a for w, a in zip(weights, n_step, strict=False))
        want += decay ** (len(n_step) - 1) * n_step[-1]
        assert got == pytest.approx(want, abs=1e-12)


def test_whitening_counts_what_has_weight_and_moves_everything():
    first, second = whitened(
        [np.array([1.0, 3.0]), np.array([5.0, 100.0])],
        [np.array([True, True]), np.array([True, False])],
    )
    np.testing.assert_allclose(first, [-1.0, 0.0], atol=1e-8)  # mean 3, variance 8 / 2
    np.testing.assert_allclose(second, [1.0, 48.5], atol=1e-6)
    np.testing.assert_array_equal(whitened([np.array([7.0])], [np.array([True])])[0], [7.0])


def test_the_value_loss_takes_the_worse_error_and_its_clip_stops_the_gradient():
    values = torch.tensor([0.5, 0.1, -0.5], dtype=torch.float64, requires_grad=True)
    held, returns = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    loss, clipped = clipped_value_loss(values, held, returns, clip=0.2)
    loss.sum().backward()
    np.testing.assert_allclose(loss.tolist(), [0.8**2 / 2, 0.9**2 / 2, 1.5**2 / 2])
    assert clipped.tolist() == [True, False, False]
    assert values.grad is not None
    np.testing.assert_allclose(values.grad.tolist(), [0.0, -0.9, -1.5])
    with pytest.raises(ValueError, match="shapes differ"):
        clipped_value_loss(values, held[:1], returns, clip=0.2)


def settings(updates=1, micro=16_384, rate=1e-2, **objective) -> LearnerConfig:
    return LearnerConfig(
        updates_per_step=updates, micro_batch_tokens=micro, share_prompts=False,
        objective=ObjectiveConfig(**{**PPO, **objective}),
        optimizer={"learning_rate": rate, "critic_learning_rate": 0.05, "max_grad_norm": 1e9},  # pyright: ignore
    )  # fmt: skip


def run_step(policy, groups, config, step=1):
    held = Version(branch=0, step=step - 1)
    return train_step(
        policy, groups, step=step, held=held, config=config, path=LivePath(0),
        max_staleness_steps=9,
    ).metrics  # fmt: skip


def ready(model, config, seed=0):
    """A policy whose critic has something to say."""
    policy = Policy(model, config.optimizer, critic=True)
    generator = torch.Generator().manual_seed(seed)
    assert policy.critic is not None
    with torch.no_grad():
        policy.critic.weight.normal_(0, 0.1, generator=generator)
        policy.critic.bias.fill_(0.2)
    return policy


def gradients_of_step(policy, groups, config, monkeypatch):
    """What the optimizer is given, by name, and the metrics."""
    seen = {}

    def keep(rate, norm):
        seen.update({n: p.grad.clone() for n, p in policy.parameters.items() if p.grad is not None})
        policy.clear_gradients()

    with monkeypatch.context() as patch:
        patch.setattr(policy, "update", keep)
        metrics = run_step(policy, groups, config)
    return seen, metrics


def test_a_step_has_the_loss_and_gradients_of_plain_ppo(make, build_policy, monkeypatch):
    """Sample by sample, by autograd over plain logits; nothing shared with the step."""
    groups, config = make.groups(3, 2, seed=4), settings()
    policy, model = ready(build_policy(), config), build_policy()
    got, metrics = gradients_of_step(policy, groups, config, monkeypatch)
    o = config.objective
    critic = ready(model, config).critic
    assert critic is not None
    rows = []
    for group in groups:
        for sample in group.samples:
            t = sample.trajectory
            ids = torch.from_numpy(t.token_ids.astype(np.int64))
            where = np.flatnonzero(t.policy_mask)
            out = model(ids[None], output_hidden_states=True)
            logp = out.logits[0].log_softmax(-1)[where - 1].gather(1, ids[where][:, None])[:, 0]
            values = critic(out.hidden_states[-1][0, where - 1])[:, 0]
            held, advantages, last = values.detach(), [], 0.0
            for i in reversed(range(len(where))):
                end = i + 1 == len(where)
                delta = (t.score.value if end else o.discount * float(held[i + 1])) - float(held[i])
                last = delta + o.discount * o.gae_decay * last
                advantages.insert(0, last)
            behaviour = torch.from_numpy(np.asarray(t.behaviour_logprobs, dtype=np.float64))
            rows.append((logp, behaviour, torch.tensor(advantages, dtype=torch.float64), values))
    flat = torch.cat([a for _, _, a, _ in rows])
    total = torch.zeros((), dtype=torch.float64)
    for logp, behaviour, a, values in rows:
        white = (a - flat.mean()) / (flat.var(correction=1) + 1e-8).sqrt()
        ratio = (logp - behaviour).exp()
        clipped = ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
        total = total - torch.minimum(ratio * white, clipped * white).sum()
        returns = a + values.detach()  # at the values themselves the clip cannot act
        total = total + o.value_coefficient * (values - returns).square().sum() / 2
    loss = total / len(flat)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
    want = {n: p.grad for n, p in model.named_parameters()}
    want |= {f"critic.{n}": p.grad for n, p in critic.named_parameters()}
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-7, atol=1e-10, msg=name)
    spread = float(flat.var(correction=0))
    assert metrics["value_loss"] == pytest.approx(float(flat.square().mean()) / 2)
    assert spread > 0


def test_micro_batches_and_row_order_change_no_advantage_and_no_gradient(
    make, build_policy, monkeypatch
):
    results = []
    for micro in (16_384, 20):
        config = settings(micro=micro)
        policy = ready(build_policy(), config)
        results.append(gradients_of_step(policy, make.groups(4, 3, seed=1), config, monkeypatch)[0])
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-9, atol=1e-12, msg=name)


def test_the_critic_learns_what_samples_are_worth_and_the_clip_acts_in_later_updates(
    make, build_policy
):
    config = settings(updates=2, rate=1e-5, value_clip=0.05)
    policy = Policy(build_policy(), config.optimizer, critic=True)
    seen = []
    for step in range(1, 31):
        held = Version(branch=0, step=step - 1)
        seen.append(run_step(policy, make.groups(4, 4, seed=0, version=held), config, step))
    assert seen[-1]["value_loss"] < 0.6 * seen[0]["value_loss"]
    assert seen[-1]["value_explained"] > 0.2
    assert max(row["value_clipped_fraction"] for row in seen) > 0


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_restored_policy_goes_on_bit_for_bit_with_its_critic(make, build_policy, dtype):
    config = settings(updates=2)
    policy = Policy(build_policy(dtype), config.optimizer, critic=True)
    run_step(policy, make.groups(4, 4), config)
    weights = {name: w.clone() for name, w in policy.weights().items()}
    state = {name: w.clone() for name, w in policy.optimizer_state().items()}
    assert not any("critic" in name for name in weights), "engines know no critic"
    twin = Policy(build_policy(dtype, seed=9), config.optimizer, critic=True)
    twin.restore(weights, state)
    groups = make.groups(4, 4, seed=5, version=Version(branch=0, step=1))
    ours, theirs = (run_step(each, groups, config, 2) for each in (policy, twin))
    assert ours["loss"] == theirs["loss"]
    for name, parameter in policy.parameters.items():
        assert torch.equal(parameter, twin.parameters[name]), name
    assert policy.critic is not None
    assert policy.critic.weight.abs().sum() > 0
    assert policy.critic.weight.dtype == torch.promote_types(torch.float32, policy.model.dtype)


def test_the_head_has_its_own_rate(make, build_policy):
    config = settings(rate=1e-3)
    policy = Policy(build_policy(), config.optimizer, critic=True)
    run_step(policy, make.groups(4, 4), config)
    rates = [group["lr"] for group in policy.optimizer.param_groups]
    assert rates == pytest.approx([1e-3, 0.05])
    tuned = LearnerConfig(prompts_per_step=8, optimizer={"tuned_at": 32})  # pyright: ignore
    assert tuned.scaled().optimizer.critic_learning_rate == pytest.approx(0.5e-4)


def test_a_resumed_run_goes_on_bit_for_bit(make_spec, fake_buffer, run_loop, rows_of):
    spec = make_spec(steps=4)
    learner = spec.config.model_copy(update={"objective": ObjectiveConfig(preset="ppo")})
    spec = spec.model_copy(update={"config": learner})
    run_loop(spec, fake_buffer())
    want = rows_of(spec.run_dir)
    changes = {"branch": 1, "branch_parents": {1: (0, 2)}, "resume_from": (0, 2)}
    run_loop(spec.model_copy(update=changes), fake_buffer())
    rows = rows_of(spec.run_dir)
    for name in ("loss", "value_loss", "digest"):
        assert [rows[step][name] for step in (3, 4)] == [want[step][name] for step in (3, 4)]
