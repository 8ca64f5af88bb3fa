"""The gradient noise scale, on a problem whose noise is known and in a step."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from slipstream.buffer.records import Version
from slipstream.buffer.staleness import LivePath
from slipstream.learner.config import LearnerConfig, ObjectiveConfig
from slipstream.learner.noise import looked_back, noise_and_signal, scale, squared_norm
from slipstream.learner.policy import Policy
from slipstream.learner.step import train_step

HELD = Version(branch=0, step=0)


@pytest.mark.parametrize(("num_small", "num"), [(4, 8), (3, 7), (1, 16)])
def test_noise_and_signal_of_known_gaussian_gradients_are_found_without_bias(num_small, num):
    """Gradients of one prompt are N(g, diag(s^2)): |g|^2 = 5, tr(Sigma) = 14, scale 2.8."""
    rng, draws = np.random.default_rng(0), 40_000
    g, s = np.array([1.0, 2.0, 0.0]), np.array([3.0, 1.0, 2.0])
    means = np.cumsum(g + s * rng.standard_normal((draws, num, 3)), axis=1)
    small = ((means[:, num_small - 1] / num_small) ** 2).sum(1)
    whole = ((means[:, -1] / num) ** 2).sum(1)
    noise, signal = noise_and_signal(small, whole, num_small, num)  # pyright: ignore
    for found, known in ((noise, 14.0), (signal, 5.0)):
        error = found.std() / draws**0.5  # pyright: ignore
        assert abs(found.mean() - known) < 4 * error  # pyright: ignore
    assert noise.mean() / signal.mean() == pytest.approx(2.8, rel=0.15)  # pyright: ignore


def test_sums_are_divided_and_a_hidden_signal_gives_no_scale():
    sums = looked_back(torch.zeros(2, dtype=torch.float64), 6.0, 1.0)
    assert scale(sums) == 6.0
    sums = looked_back(sums, 2.0, 3.05)
    assert scale(sums) == pytest.approx((0.95 * 6 + 2) / (0.95 + 3.05))
    assert scale(looked_back(sums, 0.0, -9.0)) is None


def settings(**changes):
    objective = ObjectiveConfig(advantage="group_mean", aggregation="prompt")
    return LearnerConfig(
        noise_scale=True, objective=objective, micro_batch_tokens=60,
        optimizer={"learning_rate": 1e-5}, **changes,  # pyright: ignore
    )  # fmt: skip


def step(policy, groups, config, number=1):
    held = Version(branch=0, step=number - 1)
    return train_step(
        policy, groups, step=number, held=held, config=config, path=LivePath(0),
        max_staleness_steps=9,
    ).metrics  # fmt: skip


def gradient_of(policy, groups, monkeypatch):
    """Squared norm of the mean gradient over these prompts alone."""
    seen = []
    config = settings().model_copy(update={"noise_scale": False})
    with monkeypatch.context() as patch:
        patch.setattr(policy, "update", lambda rate, norm: seen.append(float(norm) ** 2))
        step(policy, groups, config)
    policy.clear_gradients()
    return seen[0]


@pytest.mark.parametrize("silent", [None, 0, 4])
def test_a_step_reports_what_its_halves_say(make, build_policy, monkeypatch, silent):
    """Also where a prompt has nothing to train: its half has one prompt more, not one less."""
    groups, config = make.groups(5, 4, seed=3), settings()
    if silent is not None:
        untrained = [replace(s, trained=False, drop_reason="stale") for s in groups[silent].samples]
        groups[silent] = replace(groups[silent], samples=tuple(untrained))
    policy = Policy(build_policy(), config.optimizer)
    small = gradient_of(policy, groups[:2], monkeypatch)
    whole = gradient_of(policy, groups, monkeypatch)
    metrics = step(policy, groups, config)
    noise, signal = noise_and_signal(small, whole, 2, 5)
    assert metrics["gradient_noise"] == pytest.approx(noise, rel=1e-6)
    assert metrics["gradient_signal"] == pytest.approx(signal, rel=1e-6, abs=1e-12)


def test_asking_for_it_changes_no_weight_beyond_rounding_and_survives_a_restore(make, build_policy):
    config, groups = settings(), make.groups(4, 4)
    plain = config.model_copy(update={"noise_scale": False})
    ours, theirs = (Policy(build_policy(), config.optimizer) for _ in range(2))
    assert step(ours, groups, config)["loss"] == pytest.approx(step(theirs, groups, plain)["loss"])
    for name, weight in ours.weights().items():
        torch.testing.assert_close(weight, theirs.weights()[name], rtol=1e-6, atol=1e-9)
    twin = Policy(build_policy(), config.optimizer)
    twin.restore(ours.weights(), ours.optimizer_state())
    after = make.groups(4, 4, seed=8, version=Version(branch=0, step=1))
    assert (
        step(ours, after, config, 2)["noise_scale"] == step(twin, after, config, 2)["noise_scale"]
    )
    assert torch.equal(ours.noise_sums, twin.noise_sums)
    assert "noise.sums" not in theirs.optimizer_state()


def test_a_single_prompt_has_no_halves(make, build_policy):
    config = settings()
    assert "noise_scale" not in step(
        Policy(build_policy(), config.optimizer), make.groups(1), config
    )


def test_norms_are_those_of_everything_together():
    ones = torch.ones(3, dtype=torch.bfloat16)
    assert squared_norm([2 * ones, None, torch.tensor([4.0])]) == pytest.approx(28, rel=1e-6)
