"""Tiny policies for engine and worker tests: folders with a character tokenizer, transformers
models with weights from a seed, and weights published as the learner does it."""

import asyncio
import threading
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file
from slipstream.buffer.records import SamplingParams, Shard, Version, WeightsManifest
from slipstream.buffer.weight_files import Outbox
from slipstream.kernels.models import (
    assign_weights,
    empty_model,
    load_tokenizer,
    policy_weights,
)
from slipstream.learner import lora
from slipstream.learner.config import LoraConfig
from slipstream.learner.policy import pieces, weights_digest
from slipstream.rollout.engine import GenerationOutput, GenerationRequest
from slipstream.rollout.engines.decoder import Decoder
from slipstream.rollout.engines.native import NativeEngine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +-=.,?!ABCDEFGHIJKLMNOPQR"
"""62 characters have the ids 2 to 63; 0 is the end token, 1 a beginning token."""

_CONFIGS = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "moe": (Qwen3MoeConfig, {}),
    "smollm3": (SmolLM3Config, {"tie_word_embeddings": True}),
}
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}


class Tiny:
    """Makes folders, policies, published weights and engines; engines are closed at the end."""

    end = 0

    def __init__(self, root: Path) -> None:
        torch.set_num_threads(1)
        self.root = root
        self.engines: list[NativeEngine] = []
        self.outbox: Outbox | None = None

    def folder(self, family: str = "llama", **sizes) -> Path:
        """A Hugging Face folder without weights."""
        path = self.root / family
        config_type, extra = _CONFIGS[family]
        config_type(**{**_SIZES, **extra, **sizes}).save_pretrained(path)
        words = {"<end>": 0, "<start>": 1, **{c: i + 2 for i, c in enumerate(CHARACTERS)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<start>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore
        tokenizer.decoder = decoders.Fuse()  # type: ignore
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<end>", bos_token="<start>"
        ).save_pretrained(path)
        return path

    def policy(
        self, folder: Path, seed: int, dtype=torch.float32, noise: float = 0.0
    ) -> PreTrainedModel:
        """transformers' own model, its weights large enough for uneven distributions; with `noise`
        one that resembles that of the same seed."""
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in policy_weights(model).items():
                drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_(1 + drawn / 10 if name.endswith("norm.weight") else drawn / 4)
            if noise:
                for weight in policy_weights(model).values():
                    weight += noise / 4 * torch.randn(weight.shape, generator=generator)
        return model.eval()

    def saved(self, model: PreTrainedModel) -> Path:
        """A folder with the model's weights."""
        path = self.root / f"saved-{len(list(self.root.iterdir()))}"
        model.save_pretrained(path)
        return path

    def publish(self, model: PreTrainedModel, step: int, branch: int = 0) -> WeightsManifest:
        """Write the weights as one shard, and the manifest that names it."""
        path = self.root / f"weights-{branch}.{step}.safetensors"
        tensors = {name: weight.contiguous() for name, weight in policy_weights(model).items()}
        save_file(tensors, str(path))
        digest = xxhash.xxh3_128_hexdigest(path.read_bytes())
        shard = Shard(path=str(path), num_bytes=path.stat().st_size, digest=digest)
        version = Version(branch=branch, step=step, digest=digest)
        return WeightsManifest(version=version, shards=(shard,))

    def adapted(self, folder: Path, seed: int, base_seed: int = 1) -> PreTrainedModel:
        """A policy with adapters on all its linear layers, none of them zero."""
        model = self.policy(folder, base_seed)
        lora.add_adapters(model, LoraConfig(rank=3, alpha=6.0), seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in lora.adapters(model).items():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
        return model

    def whole(self, folder: Path, adapted: PreTrainedModel) -> PreTrainedModel:
        """A policy without adapters that computes the same."""
        model = self.policy(folder, 0)
        assign_weights(model, lora.merged_weights(adapted))
        return model

    def publish_adapter(self, model: PreTrainedModel, step: int) -> WeightsManifest:
        """The adapters alone, as the learner does it; the first one's base is published before."""
        if self.outbox is None:
            self.outbox = Outbox(self.root / "outbox")
            written = self.root / "outbox" / "base.held"
            digest = self.outbox.write(written, pieces(lora.base_weights(model))).file
            self.outbox.hold_base(written, digest)
        assert self.outbox.base is not None
        tensors = lora.published_adapter(model, self.outbox.base.digest)
        version = Version(branch=0, step=step, digest=weights_digest(tensors))
        return self.outbox.publish(version, pieces(tensors))

    def engine(self, folder: Path, **changes) -> NativeEngine:
        """An engine of 8 rows."""
        settings = {
            "dtype": "float32",
            "max_concurrent": 8,
            "kv": "keep",
            "ratio_law": "temperature",
            "threads": 1,
            "engine_id": f"engine-{len(self.engines)}",
        }
        self.engines.append(NativeEngine(folder, **{**settings, **changes}))
        return self.engines[-1]

    def batch(self, folder: Path, model: PreTrainedModel, **changes) -> Decoder:
        """What an engine's thread steps, of 8 rows and with a policy's weights, for a test to step
        itself: in an engine the thread might step, too."""
        settings = {"max_concurrent": 8, "kv": "keep", "ratio_law": "temperature", **changes}
        dtype = str(model.dtype).removeprefix("torch.")
        batch = Decoder(empty_model(folder, dtype), load_tokenizer(folder), **settings)
        with torch.inference_mode():
            weights = batch.prepare(policy_weights(model))
        batch.swap(Version(branch=0, step=0, digest="0" * 32), weights)
        return batch

    @staticmethod
    def request(
        prompt,
        key: int = 0,
        name: str | None = None,
        kept: bool = False,
        talk: str = "",
        **sampling,
    ) -> GenerationRequest:
        """One sample; `sampling` are fields of `SamplingParams`."""
        return GenerationRequest(
            request_id=name or str(key),
            prompt_token_ids=tuple(int(token) for token in prompt),
            sampling=SamplingParams(**sampling),
            sample_key=key,
            record_kept_ids=kept,
            conversation=talk,
        )

    @staticmethod
    async def outputs(engine: NativeEngine, requests) -> dict[str, GenerationOutput]:
        """All outputs by request id."""
        return {output.request_id: output async for output in engine.generate(requests)}

    @staticmethod
    @torch.no_grad()
    def logits(model: PreTrainedModel, prompt, tokens) -> torch.Tensor:
        """[N, V] logits of transformers' full forward at the places of the N tokens, in float64."""
        ids = torch.tensor([[*map(int, prompt), *map(int, tokens)]])
        return model(ids).logits[0, len(prompt) - 1 : -1].double()

    def logprobs(self, model: PreTrainedModel, prompt, tokens, temperature=1.0):
        """[N] their log-probabilities under temperature."""
        logits = self.logits(model, prompt, tokens) / temperature
        chosen = torch.tensor([*map(int, tokens)])[:, None]
        return logits.log_softmax(-1).gather(1, chosen)[:, 0].numpy()


@pytest.fixture
async def tiny(tmp_path):
    """See `Tiny`."""
    made = Tiny(tmp_path)
    yield made
    for engine in made.engines:
        await engine.close()


class Pace:
    """Lets engines take steps one by one."""

    def __init__(self) -> None:
        self.release = (steps := threading.Semaphore(0)).release
        self.taken = 0
        self._acquire = lambda: steps.acquire(timeout=60)

    def take(self) -> bool:
        """Wait for leave to take a step."""
        self.taken += 1
        return self._acquire()

    async def walk(self, count: int) -> None:
        """Let so many steps be taken; returns when the last one is on its way."""
        ahead = self.taken + count
        self.release(count)
        while self.taken < ahead:
            await asyncio.sleep(0.001)

    async def load(self, engine: NativeEngine, manifest: WeightsManifest) -> None:
        """Load weights in flight: an engine looks at its commands after each step."""
        while not engine.stats().generated_tokens:
            await asyncio.sleep(0.01)
        loading = asyncio.create_task(engine.load(manifest))
        while not loading.done():
            self.release()
            await asyncio.sleep(0.01)
        await loading


@pytest.fixture
def paced(monkeypatch):
    """Engines take the steps that `paced.release(n)` allows: however busy the machine is, samples
    are still in flight when the test goes on."""
    pace, step = Pace(), Decoder.step

    def wait_and_step(self):
        assert pace.take()
        return step(self)

    monkeypatch.setattr(Decoder, "step", wait_and_step)
    yield pace
    pace.release(10_000)  # so that engines can close


@pytest.fixture(scope="module")
def make_tiny():
    """`Tiny`, for tests that share an engine which is slow to start."""
    return Tiny
