"""Engine and learner compute one and the same log-probability for every token that is trained.

Nothing is taken for granted between them: the weights go through a file, the samples through the
records, and the learner scores them as it does in a step.
"""

import asyncio
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from slipstream.buffer.mailbox import file_digest
from slipstream.buffer.messages import Claim
from slipstream.buffer.records import (
    Message,
    Prompt,
    Score,
    Shard,
    SizingDecision,
    Ticket,
    TrainingSample,
    TrajectoryGroup,
    Version,
    WeightsManifest,
)
from slipstream.kernels.models import load_policy, policy_weights
from slipstream.learner.batch import MicroBatch, collate, plan_micro_batches, samples_of
from slipstream.learner.config import ObjectiveConfig
from slipstream.learner.policy import score, weights_digest
from slipstream.rollout.config import RolloutConfig, SamplingConfig
from slipstream.rollout.engine import Engine
from slipstream.rollout.engines.native import NativeEngine
from slipstream.rollout.samples import training_requests, trajectory_of
from torch import Tensor
from transformers import PreTrainedModel

TINY = Path(__file__).parents[2] / "kernels" / "tiny"
VOCABULARY, MAX_NEW_TOKENS, LONGEST_PROMPT = 448, 24, 60
NUM_GROUPS, G = 125, 4
BOUND = 1e-4
"""float32 against float32, in another order: rows of one token against whole rows."""

LAWS = {
    "temperature": ("temperature", {}),
    "top-p under temperature alone": ("temperature", {"top_p": 0.9}),
    "top-k kept set": ("kept_set", {"top_k": 20}),
    "top-k and top-p kept set": ("kept_set", {"top_k": 50, "top_p": 0.9}),
}


@pytest.fixture
def policy(tmp_path: Path) -> PreTrainedModel:
    """The built-in architecture, its random weights large enough for uneven distributions."""
    for file in TINY.iterdir():
        shutil.copy(file, tmp_path)
    config = tmp_path / "config.json"
    plain = config.read_text()
    config.write_text(plain.replace('"initializer_range": 0.05', '"initializer_range": 0.2'))
    assert config.read_text() != plain
    return load_policy(tmp_path, "float32", seed=11)


def publish(model: PreTrainedModel, folder: Path) -> WeightsManifest:
    weights, path = policy_weights(model), folder / "weights-0.0.safetensors"
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
    num_bytes, digest = file_digest(path)
    return WeightsManifest(
        version=Version(branch=0, step=0, digest=weights_digest(weights)),
        shards=(Shard(path=str(path), num_bytes=num_bytes, digest=digest),),
    )


def claims() -> list[tuple[Claim, list[int]]]:
    """Claims of whole groups, with prompts of 1 to 60 tokens and budgets of 1 to 24."""
    random, made = np.random.default_rng(5), []
    for uid in range(NUM_GROUPS):
        prompt_ids = random.integers(3, VOCABULARY, size=random.integers(1, LONGEST_PROMPT + 1))
        budget = MAX_NEW_TOKENS if uid % 2 else int(random.integers(1, MAX_NEW_TOKENS + 1))
        sizing = SizingDecision(sizer="fixed", num_samples=G, max_new_tokens=budget, reason="test")
        message = Message(role="user", content=f"prompt {uid}")
        prompt = Prompt(uid=uid, source_id=f"t/{uid}", task="t", messages=(message,))
        ticket = Ticket(prompt=prompt, sizing=sizing)
        indices = tuple(range(G))
        claim = Claim(lease_id=f"l{uid}", ticket=ticket, attempt=0, indices=indices, lease_s=60.0)
        made.append((claim, prompt_ids.tolist()))
    return made


def native(model_dir: Path, config: RolloutConfig) -> Engine:
    return NativeEngine(
        model_dir,
        dtype="float32",
        max_concurrent=48,
        kv=config.kv,
        ratio_law=config.ratio_law,
        threads=1,
        engine_id="engine",
    )


async def sampled(
    model_dir: Path, weights: WeightsManifest, config: RolloutConfig, make_engine=native
):
    """All groups, generated as a worker does it."""
    asked = {}
    for claim, prompt_ids in claims():
        for name, (index, request) in training_requests(claim, prompt_ids, config, 3).items():
            asked[name] = (claim, index, request)
    engine = await asyncio.to_thread(make_engine, model_dir, config)
    samples: dict[int, list[TrainingSample]] = {}
    try:
        await engine.load(weights)
        async for output in engine.generate([request for _, _, request in asked.values()]):
            assert not output.error
            claim, index, request = asked[output.request_id]
            trajectory = trajectory_of(
                claim, index, request, output, Score(value=float(index)),
                engine_id="engine", claimed_s=0.0, scored_s=0.0,
            )  # fmt: skip
            samples.setdefault(trajectory.uid, []).append(
                TrainingSample(trajectory=trajectory, trained=True)
            )
    finally:
        await engine.close()
    return [
        TrajectoryGroup(
            prompt=claim.ticket.prompt,
            attempt=0,
            sizing=claim.ticket.sizing,
            samples=tuple(sorted(samples[uid], key=lambda sample: sample.trajectory.index)),
        )
        for uid, (claim, _) in enumerate(claims())
    ]


@torch.no_grad()
def gaps(
    model: PreTrainedModel,
    groups: list[TrajectoryGroup],
    config: RolloutConfig,
    fault: Callable[[MicroBatch], MicroBatch] = lambda batch: batch,
) -> tuple[Tensor, Tensor]:
    """|behaviour - learner| and entropy of every token, as a learner step scores them."""
    held = groups[0].samples[0].trajectory.versions[0].version
    found, entropies = [], []
    for rows in plan_micro_batches(samples_of(groups, ObjectiveConfig()), 2048):
        batch = collate(rows, held, torch.float32, config.ratio_law)
        assert batch.clean_T.all()
        logprobs_T, entropy_T = score(model, fault(batch))
        found.append((logprobs_T - batch.behaviour_T).abs())
        entropies.append(entropy_T)
    return torch.cat(found), torch.cat(entropies)


def one_percent_hotter(batch: MicroBatch) -> MicroBatch:
    return dataclasses.replace(batch, temperature_T=batch.temperature_T * 1.01)


@pytest.mark.parametrize(("ratio_law", "truncation"), LAWS.values(), ids=LAWS.keys())
async def test_the_learner_gives_every_token_of_500_samples_the_engines_log_prob(
    policy, tmp_path, ratio_law, truncation
):
    torch.set_num_threads(1)
    sampling = SamplingConfig(temperature=0.8, max_new_tokens=MAX_NEW_TOKENS, **truncation)
    config = RolloutConfig(ratio_law=ratio_law, sampling=sampling)
    groups = await sampled(tmp_path, publish(policy, tmp_path), config)
    trajectories = [sample.trajectory for group in groups for sample in group.samples]
    assert len(trajectories) == 500
    gap_T, entropy_T = gaps(policy, groups, config)
    assert len(gap_T) == sum(trajectory.num_policy_tokens for trajectory in trajectories)
    assert entropy_T.mean() < 0.8 * np.log(VOCABULARY)  # else any law would do
    largest = float(gap_T.max())
    assert largest <= BOUND, f"largest |behaviour - learner| of {len(gap_T)} tokens: {largest:.2e}"

    wrong_T, _ = gaps(policy, groups, config, one_percent_hotter)
    largest = float(wrong_T.max())
    assert largest > BOUND, f"largest gap with a wrong temperature: only {largest:.2e}"
    print(
        float(gap_T.max()),
        float(gap_T.mean()),
        len(gap_T),
        float(entropy_T.mean()),
        largest,
        float(wrong_T.median()),
    )
