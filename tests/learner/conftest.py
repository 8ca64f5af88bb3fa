"""A tiny honest policy (Llama of 2 layers, byte-like tokenizer) and groups sampled from it."""

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from slipstream.buffer.messages import Batch, Done, NotYet, Part
from slipstream.buffer.records import (
    Message,
    Prompt,
    RaggedArray,
    SamplingParams,
    Score,
    SizingDecision,
    Timings,
    TrainingSample,
    Trajectory,
    TrajectoryGroup,
    Version,
    VersionSpan,
    WeightsManifest,
)
from slipstream.buffer.staleness import LivePath, proof_line
from slipstream.kernels.models import load_policy
from slipstream.learner.config import (
    CheckpointConfig,
    LearnerConfig,
    LearnerSpec,
    OptimizerConfig,
)
from slipstream.learner.loop import LearnerLoop
from slipstream.learner.trainer import Trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

torch.set_num_threads(1)

VOCABULARY = 64
TEMPLATE = (
    "{% for m in messages %}"
    "{{ ('<|user|>' if m['role'] == 'user' else '<|assistant|>') + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """One token per character of a small alphabet."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 +-=.,:?\n"
    names = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", *characters]
    core = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<|pad|>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
    ).save_pretrained(str(folder))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder without weights: the policy comes from the seed."""
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(str(folder))
    save_tokenizer(folder)
    return folder


@pytest.fixture
def build_policy(model_dir: Path) -> Callable:
    """`build_policy("float64")` -> a fresh model of seed 0."""
    return lambda dtype="float64", seed=0: load_policy(model_dir, dtype, seed)


@torch.no_grad()
def true_logprobs(model, token_ids: np.ndarray, num_prompt: int, temperature: float = 1.0):
    """Log-probabilities of the written tokens, from one unpadded forward."""
    logits = model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0] / temperature
    picked = logits.log_softmax(-1)[torch.arange(len(token_ids) - 1), token_ids[1:]]
    return picked[num_prompt - 1 :].numpy()


def make_trajectory(uid: int, index: int, rng: np.random.Generator, model=None, **changes):
    """A random trajectory of 3-8 prompt and 1-12 written tokens; `changes` replace fields."""
    num_prompt = changes.pop("num_prompt", 3 + uid % 6)
    num_written = changes.pop("num_written", int(rng.integers(1, 13)))
    version = changes.pop("version", Version(branch=0, step=0))
    temperature = changes.pop("temperature", 1.0)
    reward = changes.pop("reward", float(rng.integers(0, 2)))
    token_ids = rng.integers(0, VOCABULARY, num_prompt + num_written).astype(np.int32)
    token_ids[:num_prompt] = 4 + (np.arange(num_prompt) * 7 + uid) % (VOCABULARY - 4)
    if model is None:
        logprobs = np.log(rng.uniform(0.01, 0.1, num_written))
    else:
        logprobs = true_logprobs(model, token_ids, num_prompt, temperature)
    fields = {
        "uid": uid,
        "attempt": 0,
        "index": index,
        "token_ids": token_ids,
        "policy_mask": np.arange(len(token_ids)) >= num_prompt,
        "behaviour_logprobs": logprobs,
        "versions": (VersionSpan(version=version, length=num_written),),
        "kv_version_min": (VersionSpan(version=version, length=num_written),),
        "sampling": SamplingParams(temperature=temperature),
        "finish_reason": "stop",
        "text": "",
        "score": Score(value=reward)
        if reward is not None
        else Score(value=None, status="reward_failed"),
        "turns": (),
        "timings": Timings(claimed_s=0, first_token_s=0, generated_s=0, scored_s=0),
        "engine_id": "test",
        "extras": {},
    }
    return Trajectory(**(fields | changes))


def make_group(uid: int, trajectories, **sample_changes) -> TrajectoryGroup:
    """A group of trajectories, all trained unless `sample_changes` names an index otherwise."""
    return TrajectoryGroup(
        prompt=Prompt(
            uid=uid, source_id="t", task="t", messages=(Message(role="user", content="a"),)
        ),
        attempt=0,
        sizing=SizingDecision(
            sizer="fixed", num_samples=len(trajectories), max_new_tokens=16, reason=""
        ),
        samples=tuple(
            TrainingSample(**({"trajectory": t, "trained": True} | sample_changes.get(f"s{i}", {})))
            for i, t in enumerate(trajectories)
        ),
    )


def random_groups(num_groups=4, num_samples=4, seed=0, model=None, **changes):
    """A batch; every group has both rewards, so that advantages are not all zero."""
    rng = np.random.default_rng(seed)
    groups = []
    for uid in range(num_groups):
        rewards = [float(i % 2) for i in range(num_samples)]
        groups.append(
            make_group(
                uid,
                [
                    make_trajectory(uid, i, rng, model, **({"reward": rewards[i]} | changes))
                    for i in range(num_samples)
                ],
            )
        )
    return groups


@pytest.fixture
def make():
    """The factories, for test modules (importlib mode has no importable helpers)."""

    class Make:
        trajectory = staticmethod(make_trajectory)
        group = staticmethod(make_group)
        groups = staticmethod(random_groups)
        logprobs = staticmethod(true_logprobs)
        ragged = staticmethod(
            lambda rows: RaggedArray(
                values=np.concatenate(rows).astype(np.int32),
                offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
            )
        )

    return Make


class FakeBuffer:
    """What the loop needs of a client: the batch of step k is a function of k alone."""

    def __init__(self, steps_before_silence: int = 10**9, closing: bool = False) -> None:
        self.silent_from, self.closing = steps_before_silence, closing
        self.published: list[WeightsManifest] = []
        self.saved: list[Version] = []
        self.resumable: list[int] = []
        self.parts = 0
        self.on_take = lambda step: None

    async def publish(self, manifest: WeightsManifest) -> Done:
        self.published.append(manifest)
        return Done(held=tuple(each.version for each in self.published))

    async def checkpoint_saved(self, version: Version, resumable_step: int = 0) -> None:
        self.saved.append(version)
        self.resumable.append(resumable_step)

    async def take_part(self, step: int, received: int, *, wait_s: float) -> Part | Batch | NotYet:
        """One group after the other."""
        batch = await self.take(step, wait_s=wait_s)
        if isinstance(batch, NotYet) or received == len(batch.groups) - 1:
            last = {"groups": batch.groups[-1:]} if isinstance(batch, Batch) else {}
            return msgspec.structs.replace(batch, **last)
        self.parts += 1
        return Part(step=step, groups=batch.groups[received : received + 1])

    async def take(self, step: int, *, wait_s: float) -> Batch | NotYet:
        self.on_take(step)
        if step >= self.silent_from:
            await asyncio.sleep(wait_s)
            return NotYet(waiting_on="worker-0, which is asleep", closing=self.closing)
        groups = tuple(random_groups(2, 3, seed=step))
        proof = proof_line(
            [s for g in groups for s in g.samples],
            step=step,
            max_staleness_steps=64,
            path=LivePath(0),
            dropped={"stale": 1},
            length_bias=0.9,
            rewards=[1.0, 0.5] if step > 1 else [],
        )
        drafts = {"drafted_tokens": 90.0, "accepted_tokens": 32.0} if step > 1 else {}
        return Batch(
            step=step, groups=groups, proof=proof, journal_sequence=100 + step, drafts=drafts
        )


@pytest.fixture
def fake_buffer():
    """The class, see `FakeBuffer`."""
    return FakeBuffer


@pytest.fixture
def make_spec(tmp_path: Path, model_dir: Path):
    """`make_spec(steps=4, **changes)`: a learner in float64 that saves every 2 steps."""

    def build(steps: int = 4, **changes) -> LearnerSpec:
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        fields = {
            "run_id": "test",
            "run_dir": run_dir,
            "endpoint": "ipc:///nowhere",
            "weights_dir": tmp_path / "weights",
            "seed": 0,
            "model_dir": model_dir,
            "dtype": "float64",
            "config": LearnerConfig(
                steps=steps,
                optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=3),
                checkpoint=CheckpointConfig(every_steps=2),
            ),
            "samples_per_prompt": 3,
            "max_staleness_steps": 64,
            "ratio_law": "temperature",
            "take_deadline_s": 5.0,
            "branch": 0,
        }
        fields |= changes
        return LearnerSpec(**({"engine_dtype": fields["dtype"]} | fields))

    return build


@pytest.fixture
def run_loop():
    """`run_loop(spec, buffer)`: the learner process's main coroutine around a fake buffer."""

    async def run(spec: LearnerSpec, buffer: FakeBuffer) -> Trainer:
        with ThreadPoolExecutor(1) as pool:
            trainer = Trainer(spec)
            await asyncio.get_running_loop().run_in_executor(
                pool, trainer.prepare, threading.Event()
            )
            await LearnerLoop(spec, trainer, buffer, pool).run()
            return trainer

    return lambda spec, buffer: asyncio.run(run(spec, buffer))


@pytest.fixture
def rows_of():
    """`rows_of(run_dir)`: the newest metrics line of each step."""

    def read(run_dir: Path) -> dict[int, dict]:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return {row["step"]: row for row in map(json.loads, lines)}

    return read
