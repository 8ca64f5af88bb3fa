"""What `bench_rollout.py` measures: our engine, and peers in processes of their own.

A workload is a list of (prompt token ids, tokens to write); every side writes exactly so many, as
end tokens are ignored, but where a side is told not to.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

import xxhash
from common import ROOT
from safetensors.torch import save_file
from slipstream.buffer.records import SamplingParams, Shard, Version, WeightsManifest
from slipstream.kernels.models import load_policy, policy_weights
from slipstream.rollout.engine import GenerationRequest
from slipstream.rollout.engines.native import NativeEngine
from slipstream.rollout.sampling import sample_key

THREADS = os.cpu_count() or 1
ANSWER_S = 600.0
"""Longer than a peer starts, or takes for one workload."""

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


class Peer:
    """A peer in its own environment, started once: `peers/rollout_NAME.py` says what it does."""

    def __init__(self, name: str, *arguments: object) -> None:
        """Start it.

        Raises:
            SystemExit: its environment is missing, or it does not start.
        """
        self._name, python = name, ROOT / ".venvs" / name / "bin" / "python"
        if name == "transformers":
            python = Path(sys.executable)
        if not python.exists():
            raise SystemExit(f"{name} is missing: make .venvs/{name}/.installed")
        script = Path(__file__).parent / "peers" / f"rollout_{name}.py"
        self._process = subprocess.Popen(
            [str(python), str(script), *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def run(self, workload: Workload, **how: Any) -> Measured:
        """Generate at temperature 1; `how` is what the script knows besides."""
        assert self._process.stdin is not None
        work = [[list(prompt), count] for prompt, count in workload]
        self._process.stdin.write(json.dumps({"work": work, **how}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return Measured(answer["seconds"], answer["tokens"])

    def _answer(self) -> dict[str, Any]:
        """The next line that is an answer; others are what its libraries print."""
        assert self._process.stdout is not None
        limit = Timer(ANSWER_S, self._process.kill)
        limit.start()
        try:
            while line := self._process.stdout.readline():
                if line.startswith("{"):
                    return json.loads(line)
        finally:
            limit.cancel()
        raise SystemExit(f"{self._name} ended with {self._process.wait()}")

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)
