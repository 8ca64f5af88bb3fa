"""The loss of demonstrations against its formula."""

import torch
from slipstream.buffer.records import Version
from slipstream.learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from slipstream.learner.imitation import imitate
from slipstream.learner.policy import Policy

from .test_step import config, sample_logits, train, weights_of

HELD = Version(branch=0, step=0)


def test_the_gradient_is_that_of_the_mean_negative_log_likelihood(make, build_policy):
    ours, theirs = build_policy(), build_policy()
    shown = [sample.trajectory for sample in make.groups(1, 3)[0].samples]
    settings = LearnerConfig(
        micro_batch_tokens=24, objective=ObjectiveConfig(demonstration_coefficient=0.25)
    )
    seen = imitate(Policy(ours, OptimizerConfig()), shown, settings, held=HELD, step=1)
    terms = [sample_logits(theirs, sample)[0] for sample in make.groups(1, 3)[0].samples]
    loss = -torch.cat(terms).mean()
    (0.25 * loss).backward()
    assert seen["demonstrations"] == 3
    assert abs(seen["demonstration_loss"] - loss.item()) < 1e-10
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs.get_parameter(name).grad, rtol=0, atol=1e-8
        )


def test_demonstrations_join_the_step_and_its_metrics_and_not_its_proof(make, build_policy):
    plain, taught = build_policy(), build_policy()
    groups, shown = make.groups(2, 3), [make.groups(1, 2, seed=9)[0].samples[0].trajectory]
    without = train(plain, groups, config())
    result = train(taught, groups, config(), demonstrations=shown)
    assert result.proof == without.proof
    assert result.metrics["demonstrations"] == 1
    assert "demonstrations" not in without.metrics
    assert result.metrics["loss"] == without.metrics["loss"]
    moved = [
        not torch.equal(weight, plain.get_parameter(name))
        for name, weight in weights_of(taught).items()
    ]
    assert any(moved)
