"""Synchronous RL in one process from the system's own parts, for benchmarks that count tokens.

Prompt stream, history, controller, native engine, reward, `train_step`: the code of a run with
S = 0; only processes, sockets and disk are left out, which change no token. So one run of the tiny
model takes seconds, and one machine can do the hundreds that a comparison of sizers needs.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from slipstream.buffer import events
from slipstream.buffer.mailbox import publish_file
from slipstream.buffer.messages import Claim
from slipstream.buffer.records import (
    Completion,
    Prompt,
    Score,
    Ticket,
    TrainingSample,
    Trajectory,
    TrajectoryGroup,
    Version,
    WeightsManifest,
)
from slipstream.buffer.staleness import LivePath
from slipstream.kernels import models
from slipstream.learner.config import LearnerConfig, SftConfig
from slipstream.learner.policy import Policy, weights_digest
from slipstream.learner.sft import read_examples, run_sft
from slipstream.learner.step import train_step
from slipstream.rollout.config import PromptsConfig, RolloutConfig
from slipstream.rollout.demonstrations import write_sft_file
from slipstream.rollout.engines.native import NativeEngine
from slipstream.rollout.history import History
from slipstream.rollout.prompts import PromptSource
from slipstream.rollout.samples import completion_of, training_requests, trajectory_of
from slipstream.rollout.sizing import Controller
from slipstream.rollout.tickets import commit_chance

TINY = Path(models.__file__).parent / "tiny"
NOWHERE = events.Ref(segment=0, offset=0, length=0, digest=0)
EVALUATION_SEED = 10_000
"""Of the samples of held-out prompts: the same random numbers for every policy."""


def warm_start(prompts: PromptsConfig, sft: SftConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights of the tiny model after supervised training on demonstrations."""
    model = models.load_policy(TINY, "float32", seed)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sft.jsonl"
        write_sft_file(prompts, sft, seed, file)
        examples = read_examples(file, models.load_tokenizer(TINY))
    run_sft(model, examples, sft, seed=seed)
    return {name: tensor.clone() for name, tensor in models.policy_weights(model).items()}


MOST_ROUNDS = 50
"""Of refilling one batch."""


@dataclass
class Loop:
    """One run; `steps` and `evaluate` are called in turn."""

    prompts: PromptsConfig
    rollout: RolloutConfig
    learner: LearnerConfig
    reward: Callable[[Completion, Prompt], Score]
    start: dict[str, torch.Tensor]
    seed: int
    refill: bool
    """Replace groups without signal (DAPO), in rounds of as many prompts as are missing."""
    folder: Path
    tokens: int = 0
    """Generated for training: probes, dropped groups and masked tokens included."""
    step: int = 0
    next_uid: int = 0
    issued: list[int] = field(default_factory=list)
    """Samples of each prompt that was visited."""

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        model = models.load_policy(TINY, "float32", self.seed)
        models.assign_weights(model, self.start)
        self.policy = Policy(model, self.learner.optimizer)
        self.tokenizer = models.load_tokenizer(TINY)
        self.engine = NativeEngine(
            TINY, dtype="float32", max_concurrent=self.rollout.max_concurrent_samples,
            kv="keep", ratio_law="temperature", threads=1, engine_id="bench",
        )  # fmt: skip
        self.source = PromptSource(self.prompts, self.seed)
        sizing = self.rollout.sizing
        self.history = History(sizing.half_life_steps, sizing.prior_strength)
        self.controller = Controller(self.rollout, by_std=False)
        self.path = LivePath(0)

    async def publish(self) -> None:
        """Hand the policy to the engine."""
        weights = models.policy_weights(self.policy.model)
        version = Version(branch=0, step=self.step, digest=weights_digest(weights))
        manifest = publish_file(
            self.folder, version,
            lambda path: save_file({n: t.detach().contiguous() for n, t in weights.items()}, path),
        )  # fmt: skip
        self.path.publish(version)
        await self.engine.load(manifest)
        Path(manifest.shards[0].path).unlink()
        self._fold(events.Published(manifest=WeightsManifest(version=version, shards=())))

    async def train(self) -> None:
        """One step: a batch of groups, one update, the next version."""
        wanted = self.learner.prompts_per_step
        groups: list[TrajectoryGroup] = []
        for _ in range(MOST_ROUNDS):  # a policy without any signal would be refilled for ever
            drawn = await self._groups(wanted - len(groups))
            groups += [group for group in drawn if not self.refill or _mixed(group)]
            if len(groups) == wanted:
                break
        held = self.engine.serving
        assert held is not None
        self.step += 1
        if any(_mixed(group) for group in groups):
            train_step(
                self.policy, groups, step=self.step, held=held, config=self.learner,
                path=self.path, max_staleness_steps=0,
            )  # fmt: skip
        await self.publish()

    async def _groups(self, count: int) -> list[TrajectoryGroup]:
        """The groups of the next prompts that are not skipped, sized together."""
        tickets: list[Ticket] = []
        while not tickets:
            uids = range(self.next_uid, self.next_uid + count)
            self.next_uid = uids.stop
            prompts = [self.source.prompt(uid) for uid in uids]
            budget = self.rollout.sampling.max_new_tokens
            known = [self.history.known(prompt.source_id, budget) for prompt in prompts]
            decisions = self.controller.decide(known, [(budget, "")] * len(known))
            all_tickets = [Ticket(prompt=p, sizing=d) for p, d in zip(prompts, decisions)]  # noqa: B905
            for ticket in all_tickets:
                self._put(ticket)
            tickets += [ticket for ticket in all_tickets if ticket.sizing.num_samples]
        return await self._sample(tickets)

    def _put(self, ticket: Ticket) -> None:
        n = ticket.sizing.num_samples
        self.issued.append(n)
        self._fold(events.Put(uid=ticket.prompt.uid, num_samples=n, ticket=NOWHERE), ticket)

    def _fold(self, event: events.AnyEvent, ticket: Ticket | None = None) -> None:
        self.history.apply(self.history.sequence + 1, event, lambda _: ticket)

    async def _sample(self, tickets: list[Ticket]) -> list[TrajectoryGroup]:
        """Generate and score all samples of some tickets, those of second stages included."""
        found = await self._generate({ticket.prompt.uid: _claim(ticket) for ticket in tickets})
        wholes, more = {ticket.prompt.uid: ticket for ticket in tickets}, {}
        for uid, first, known in self.history.probed:
            sizing = self.controller.commit(first, known, commit_chance(self.seed, uid))
            wholes[uid] = Ticket(prompt=wholes[uid].prompt, sizing=sizing)
            self.issued[uid] = n = sizing.num_samples
            self._fold(events.Extended(uid=uid, num_samples=n, ticket=NOWHERE))
            if n > first.num_samples:
                more[uid] = _claim(wholes[uid], first.num_samples)
        for uid, samples in (await self._generate(more)).items():
            found[uid] += samples
        return [_group(wholes[uid], samples) for uid, samples in found.items()]

    async def _generate(self, claims: dict[int, Claim]) -> dict[int, list[Trajectory]]:
        """uid -> the samples of its claim, in order."""
        found: dict[int, list[Trajectory]] = {uid: [] for uid in claims}
        requests = {}
        for uid, claim in claims.items():
            ids = models.render_prompt(self.tokenizer, claim.ticket.prompt.messages)
            made = training_requests(claim, ids, self.rollout, self.seed)
            requests |= {name: (uid, index, request) for name, (index, request) in made.items()}
        async for output in self.engine.generate([request for _, _, request in requests.values()]):
            uid, index, request = requests[output.request_id]
            score = self.reward(completion_of(output), claims[uid].ticket.prompt)
            made = trajectory_of(
                claims[uid], index, request, output, score,
                engine_id="bench", claimed_s=0.0, scored_s=0.0,
            )  # fmt: skip
            found[uid].append(made)
            self.tokens += made.num_policy_tokens
        for samples in found.values():  # in a fixed order, so that a run repeats itself
            samples.sort(key=lambda sample: sample.index)
            for sample in samples:
                self._finished(sample)
        return found

    def _finished(self, trajectory: Trajectory) -> None:
        facts = events.Facts(
            spans=tuple((s.version.branch, s.version.step, s.length) for s in trajectory.versions),
            reward=trajectory.score.value,
            score_norm=float(-np.expm1(trajectory.behaviour_logprobs).sum(dtype=np.float64)),
        )
        self._fold(
            events.Finished(
                uid=trajectory.uid, index=trajectory.index, payload=NOWHERE, facts=facts
            )
        )

    async def evaluate(self, samples_per_prompt: int) -> np.ndarray:
        """[held-out prompts, samples] rewards; its tokens are not counted."""
        claims = [_claim(_evaluation(p, self.rollout, samples_per_prompt))
                  for p in self.source.held_out()]  # fmt: skip
        rewards = np.zeros((len(claims), samples_per_prompt))
        requests = {}
        for row, claim in enumerate(claims):
            ids = models.render_prompt(self.tokenizer, claim.ticket.prompt.messages)
            made = training_requests(claim, ids, self.rollout, EVALUATION_SEED)
            requests |= {name: (row, index, request) for name, (index, request) in made.items()}
        async for output in self.engine.generate([request for _, _, request in requests.values()]):
            row, index, _ = requests[output.request_id]
            score = self.reward(completion_of(output), claims[row].ticket.prompt)
            rewards[row, index] = score.value or 0.0
        return rewards


def _claim(ticket: Ticket, first: int = 0) -> Claim:
    indices = tuple(range(first, ticket.sizing.num_samples))
    return Claim(lease_id="bench", ticket=ticket, attempt=0, indices=indices, lease_s=60.0)


def _evaluation(prompt: Prompt, rollout: RolloutConfig, samples: int) -> Ticket:
    (decision,) = Controller(
        rollout.model_copy(
            update={"samples_per_prompt": samples, "sizing": type(rollout.sizing)()}
        ),
        by_std=False,
    ).decide(
        [History(1.0, 1.0).known(prompt.source_id, 1)], [(rollout.sampling.max_new_tokens, "")]
    )
    return Ticket(prompt=prompt, sizing=decision)


def _group(ticket: Ticket, samples: list[Trajectory]) -> TrajectoryGroup:
    return TrajectoryGroup(
        prompt=ticket.prompt, attempt=0, sizing=ticket.sizing,
        samples=tuple(TrainingSample(trajectory=sample, trained=True) for sample in samples),
    )  # fmt: skip


def _mixed(group: TrajectoryGroup) -> bool:
    return len({sample.trajectory.score.value for sample in group.samples}) > 1
