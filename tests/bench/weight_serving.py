"""What `bench_weights.py` measures of learner and engines: publishing, loading, the pause.

By itself it prints the lines of one engine: vLLM's, in the environment that has it.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from slipstream.buffer.mailbox import confirm
from slipstream.buffer.records import SamplingParams, Version, WeightsManifest
from slipstream.buffer.weight_files import Outbox
from slipstream.configs.sizes import SMOLLM2_CONFIG
from slipstream.kernels.models import policy_weights
from slipstream.learner.config import LearnerConfig, LearnerSpec
from slipstream.learner.policy import pieces
from slipstream.learner.trainer import Trainer
from slipstream.rollout.config import VllmConfig
from slipstream.rollout.engine import Engine, GenerationRequest
from slipstream.rollout.engines.native import NativeEngine
from slipstream.rollout.engines.weights import read_verified
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

TINY = Path(__file__).parents[2] / "kernels" / "tiny"
SHM = "/dev/shm"
DECODE_ROWS = 16
RANKS = 4
POLL_S = 0.002


def line(case: str, ours: float, peer: float, peer_name: str, unit: str, **more: Any) -> dict:
    """A line of results; the ratio says how many times faster we are."""
    return {"bench": "weights", "case": case, "ours": ours, "peer": peer, "peer_name": peer_name,
            "ratio": peer / ours, "unit": unit, **more}  # fmt: skip


def make_folder(folder: Path, layers: int | None) -> LlamaConfig:
    """A folder without weights: with the built-in tokenizer, which is not used."""
    changes = {} if layers is None else {"num_hidden_layers": layers}
    settings: dict[str, Any] = SMOLLM2_CONFIG | changes
    config = LlamaConfig(**settings)
    config.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(TINY)).save_pretrained(str(folder))
    return config


def make_engine(name: str, folder: Path) -> Engine:
    """Of `DECODE_ROWS` rows and one thread."""
    common: dict[str, Any] = {
        "dtype": "float32", "max_concurrent": DECODE_ROWS, "kv": "keep", "threads": 1,
        "engine_id": "bench",
    }  # fmt: skip
    if name == "native":
        return NativeEngine(folder, ratio_law="temperature", **common)
    from slipstream.rollout.engines.vllm import VllmEngine

    settings = VllmConfig(kv_cache_gib=0.5, max_model_len=1024)
    return VllmEngine(folder, settings=settings, **common)


class Publisher:
    """Publishes one version after the other, as the learner does."""

    def __init__(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        self.folder, self.outbox, self.weights = folder, Outbox(folder), weights
        self.step, self.held = 0, []

    def publish(self) -> WeightsManifest:
        """File, its digest and the version's, retirement of the third newest."""
        self.step += 1
        path = self.folder / "weights.held"
        written = self.outbox.write(path, pieces(self.weights))
        version = Version(branch=0, step=self.step, digest=written.tensors)
        manifest = self.outbox.announce(version, path, written.file)
        self.held = [*self.held[-1:], version]
        self.outbox.keep(self.held)
        return manifest


async def publishing(runs: int, layers: int | None, name: str) -> list[dict]:
    """publish and pause of an engine; of the native one publish-mapped, too."""
    with tempfile.TemporaryDirectory(dir=SHM) as scratch:
        folder = Path(scratch)
        torch.manual_seed(0)
        weights = policy_weights(LlamaForCausalLM(make_folder(folder / "model", layers)))
        num_bytes = sum(tensor.nbytes for tensor in weights.values())
        publisher = Publisher(folder / "weights", weights)
        engine = await asyncio.to_thread(make_engine, name, folder / "model")
        copies: list[float] = []
        served: list[float] = []
        mapped: list[float] = []
        for _ in range(runs + 3):  # the first three publish into new pages
            copies.append(copied(weights, num_bytes))
            began = time.perf_counter()
            await engine.load(publisher.publish())
            served.append(time.perf_counter() - began)
            began = time.perf_counter()
            manifest = publisher.publish()
            views = read_verified(manifest)
            confirm(manifest)
            mapped.append(time.perf_counter() - began)
            del views
        copies, served, mapped = (each[3:] for each in (copies, served, mapped))
        memcpy = statistics.median(copies)
        kinds = [(name, served, "3.5 times" if name == "native" else "none")]
        kinds += [("mapped", mapped, "2 times")] if name == "native" else []
        lines = [
            line(f"publish-{kind}", statistics.median(found), memcpy,
                 "memcpy of the same bytes into fresh memory", "s", runs=runs,
                 spread=[min(found), max(found)],
                 notes=f"target: {bound}; {num_bytes / 2**20:.0f} MiB; peer spread "
                 f"{min(copies):.3f} to {max(copies):.3f} s")
            for kind, found, bound in kinds
        ]  # fmt: skip
        lines.append(await pause(engine, publisher, runs, name))
        await engine.close()
    return lines


def copied(weights: dict[str, torch.Tensor], num_bytes: int) -> float:
    """Seconds of a copy into fresh memory."""
    began, start = time.perf_counter(), 0
    fresh = torch.from_numpy(np.empty(num_bytes, np.uint8))
    for tensor in weights.values():
        end = start + tensor.nbytes
        fresh[start:end] = tensor.reshape(-1).view(torch.uint8)
        start = end
    return time.perf_counter() - began


async def pause(engine: Engine, publisher: Publisher, runs: int, name: str) -> dict:
    """Seconds without a token for a swap in flight, against the median decode step."""
    requests = [
        GenerationRequest(
            request_id=f"r{n}", prompt_token_ids=(5, 6, 7), sample_key=n,
            sampling=SamplingParams(max_new_tokens=60 + 40 * runs),
        )
        for n in range(DECODE_ROWS)
    ]  # fmt: skip

    async def generate() -> None:
        async for _ in engine.generate(requests):
            pass

    before = engine.stats().generated_tokens
    task = asyncio.create_task(generate())
    while engine.stats().generated_tokens < before + 2 * DECODE_ROWS:
        await asyncio.sleep(0.01)
    before, began = engine.stats().generated_tokens, time.perf_counter()
    while engine.stats().generated_tokens < before + 10 * DECODE_ROWS and not task.done():
        await asyncio.sleep(0.01)
    step_s = (time.perf_counter() - began) * DECODE_ROWS
    step_s /= engine.stats().generated_tokens - before
    pauses = []
    for _ in range(runs):
        await engine.load(publisher.publish())
        pauses.append(engine.stats().last_swap_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    target = "target: below one step, as weights are prepared beside generation"
    note = target if name == "native" else "no target: vLLM loads layer by layer in the pause"
    return line(f"pause-{name}", statistics.median(pauses), step_s,
                f"a decode step of {DECODE_ROWS} rows", "s", runs=runs,
                spread=[min(pauses), max(pauses)], notes=note)  # fmt: skip


def private_bytes() -> int:
    """Memory that this process shares with nobody and with no file."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("RssAnon:")[2].split()[0])


@contextmanager
def watched() -> Iterator[list[int]]:
    """Inside, private memory is looked at all the time; the list gets what was seen."""
    seen, done = [private_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            seen.append(private_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def publishing_rank(spec: LearnerSpec, told: "multiprocessing.Queue[tuple[int, int]]") -> None:
    """One of several learner ranks: tells the bytes of its shard, and what publishing adds."""
    trainer = Trainer(spec)
    trainer.prepare(threading.Event())
    shard_bytes = sum(rows.nbytes for rows in trainer.policy.rows.values())
    with watched() as seen:
        trainer._write_file(1)
    told.put((shard_bytes, max(seen) - seen[0]))
    trainer.ranks.exchange(None)  # nobody leaves before all are done


def ranks_memory(layers: int | None) -> dict:
    """What publishing takes of the memory of each of `RANKS` gloo ranks."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    with tempfile.TemporaryDirectory(dir=SHM) as scratch:
        folder = Path(scratch)
        make_folder(folder / "model", layers)
        (folder / "run" / "processes").mkdir(parents=True)
        spec = LearnerSpec(
            run_id="bench", run_dir=folder / "run", endpoint="ipc:///nowhere",
            weights_dir=folder / "weights", seed=0, model_dir=folder / "model", dtype="float32",
            engine_dtype="float32", config=LearnerConfig(), samples_per_prompt=2,
            max_staleness_steps=1, ratio_law="temperature", take_deadline_s=5.0, branch=0,
            ranks=RANKS,
        )  # fmt: skip
        ranks = [
            context.Process(
                target=publishing_rank, args=(spec.model_copy(update={"rank": rank}), told)
            )
            for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.start()
        found = [told.get(timeout=300) for _ in ranks]
        for rank in ranks:
            rank.join(60)
    held, shard = max((shard + extra, shard) for shard, extra in found)
    return line("ranks-memory", held / 2**20, shard / 2**20, "the rank's shard", "MiB", runs=1,
                spread=[min(s + e for s, e in found) / 2**20, held / 2**20],
                notes=f"{RANKS} gloo ranks; target: at most 1.2 shards and one bucket; the most: "
                f"{max((s + e) / s for s, e in found):.3f} shards")  # fmt: skip


def main() -> None:
    """Print an engine's lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("runs", type=int)
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for found in asyncio.run(publishing(options.runs, options.layers, options.engine)):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
