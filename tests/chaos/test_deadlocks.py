"""Deadlocks that other systems' users reported, staged: each run ends, and says what it waited for.

A planted fault acts once: it leaves a file, and the restarted process finds it.
"""

import json
import textwrap
from pathlib import Path

import pytest

from .conftest import Run

pytestmark = pytest.mark.slow

ONCE = """
import os, sys
if "slipstream.{module}" in sys.orig_argv and not os.path.exists({flag!r}):
    import asyncio, time
{body}
"""
NEVER_LOADED = """
from slipstream.rollout.engines.native import NativeEngine as Engine
real, calls = Engine.load, []
async def load(self, manifest):
    calls.append(1)
    if len(calls) == 3:
        open(FLAG, "w").close()
        await asyncio.sleep(3600)
    await real(self, manifest)
Engine.load = load
"""
RETURNS_NOTHING = """
from slipstream.rollout.engines.native import NativeEngine as Engine
async def generate(self, requests):
    open(FLAG, "w").close()
    await asyncio.sleep(3600)
    yield
Engine.generate = generate
"""
ONE_NEVER_ENDS = """
from slipstream.rollout.engines.native import NativeEngine as Engine
real = Engine.generate
async def generate(self, requests):
    async for output in real(self, requests):
        if not os.path.exists(FLAG):
            open(FLAG, "w").close()
            continue
        yield output
    await asyncio.sleep(3600)
Engine.generate = generate
"""
STEP_HANGS = """
from slipstream.learner.trainer import Trainer
real, calls = Trainer.train, []
def train(self, batch):
    calls.append(1)
    if len(calls) == 4:
        open(FLAG, "w").close()
        time.sleep(3600)
    return real(self, batch)
Trainer.train = train
"""
RANK_HANGS = """
from slipstream.learner import trainer
real = trainer.load_policy
def load(*arguments):
    if sys.orig_argv[-1].endswith("learner-1.json"):
        open(FLAG, "w").close()
        time.sleep(3600)
    return real(*arguments)
trainer.load_policy = load
"""
WORKER, LEARNER = "rollout.worker", "learner.loop"


@pytest.mark.parametrize(
    ("module", "body", "settings", "told"),
    [
        (WORKER, NEVER_LOADED, (), "worker-0 has waited .* its engine to load"),
        (WORKER, RETURNS_NOTHING, (), "has waited .* for the engine of worker-0"),
        (
            WORKER,
            ONE_NEVER_ENDS,
            ("buffer.max_staleness_steps=0", "buffer.take_deadline_s=20"),
            "has waited .* for the engine of worker-0|got no batch within",
        ),
        (LEARNER, STEP_HANGS, (), "learner has waited .* for its training thread at step 4"),
        (
            LEARNER,
            RANK_HANGS,
            ("cluster.learner_ranks=2", "cluster.stall_s=15"),
            "learner-1 has waited .* for the model in .* to be loaded; stacks",
        ),
    ],
    ids=["weights that never load", "a worker that returns nothing", "a sample that never ends",
         "a training step that hangs", "a rank that never has its model"],
)  # fmt: skip
def test_who_hangs_is_found_and_restarted_and_the_run_finishes(
    run: Run, module: str, body: str, settings: tuple[str, ...], told: str
) -> None:
    flag = plant_once(run, module, body)
    output = finishes(run, "cluster.stall_s=5", *settings)
    assert Path(flag).exists()
    assert run.matches(told), output
    assert not run.matches("for the other learner ranks"), output


def test_a_sample_that_is_lost_among_others_is_issued_again_and_nobody_is_restarted(
    run: Run,
) -> None:
    flag = plant_once(run, WORKER, ONE_NEVER_ENDS)
    output = finishes(
        run, "cluster.stall_s=10", "buffer.max_staleness_steps=2", "buffer.straggler_wait_s=1",
        steps=100,
    )  # fmt: skip
    assert Path(flag).exists()
    assert run.matches(r"worker-0: group \d+ sample \d was lost by the engine of worker-0"), output
    assert not run.matches("stalled|restart"), output


KILLS_ITS_WORKER = """
import os, signal, sys
if "slipstream.rollout.worker" in sys.orig_argv:
    from slipstream.rollout.engines.native import NativeEngine as Engine
    real = Engine.generate
    async def generate(self, requests):
        if any(request.request_id.rpartition("/")[2].startswith("3.") for request in requests):
            os.kill(os.getpid(), signal.SIGKILL)
        async for output in real(self, requests):
            yield output
    Engine.generate = generate
"""


def test_a_prompt_that_kills_its_workers_is_quarantined_by_name_and_the_run_finishes(
    run: Run,
) -> None:
    (run.folder / "plant").mkdir()
    (run.folder / "plant" / "sitecustomize.py").write_text(KILLS_ITS_WORKER)
    run.add_path(run.folder / "plant")
    output = finishes(run)
    told = [line for line in output.splitlines() if "is quarantined" in line]
    assert len(told) == 1, output
    assert "prompt 3 is quarantined: 3 workers or engines died over it" in told[0]
    run.start_also("show", "run", "--prompt", "3")


def plant_once(run: Run, module: str, body: str) -> str:
    """Put a fault into the processes of a module; the file that says that it has acted."""
    flag = str(run.folder / "planted")
    body = body.replace("FLAG", repr(flag))
    plant = ONCE.format(module=module, flag=flag, body=textwrap.indent(body, "    "))
    (run.folder / "plant").mkdir()
    (run.folder / "plant" / "sitecustomize.py").write_text(plant)
    run.add_path(run.folder / "plant")
    return flag


def test_a_reward_that_hangs_fails_its_samples_and_nothing_else(run: Run) -> None:
    (run.folder / "reward.py").write_text(
        "import time\n"
        "def slow(completion, prompt):\n"
        "    if prompt.uid % 3 == 1:\n"
        "        time.sleep(3600)\n"
        "    return (len(completion.text) % 7) / 7\n"
    )
    finishes(run, "reward.timeout_s=0.5", "reward.max_failure_rate=1.0")


def few_prompts(run: Run, held_out: int = 2) -> str:
    """Five to train on: the epoch ends in the middle of a batch of four."""
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(5 + held_out)]
    (run.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"prompts.held_out={held_out}"


def test_the_end_of_an_epoch_and_a_batch_that_does_not_divide_it_are_nothing_special(
    run: Run,
) -> None:
    finishes(run, few_prompts(run), "learner.prompts_per_step=4", "learner.steps=12")


def test_an_epoch_that_leaves_the_buffer_empty_is_followed_by_the_next(run: Run) -> None:
    """None of its groups has a signal, so that each is dropped and no batch fills."""
    (run.folder / "reward.py").write_text(
        "import zlib\n"
        "def slow(completion, prompt):\n"
        "    return prompt.epoch and (zlib.crc32(completion.text.encode()) % 100) / 100\n"
    )
    finishes(run, few_prompts(run), "buffer.drop_no_signal=true")


def test_a_buffer_that_stays_empty_ends_the_run_with_the_reason(run: Run) -> None:
    (run.folder / "reward.py").write_text("def slow(completion, prompt):\n    return 0.0\n")
    run.begin(few_prompts(run), "buffer.drop_no_signal=true", "buffer.take_deadline_s=8",
              "cluster.restarts=1")  # fmt: skip
    assert run.wait(400) == 1
    told = run.output.read_text()
    assert run.matches(r"got no batch within .* waiting on \d of 2 groups READY"), told
    assert run.matches("went back 1 times to one checkpoint"), told
    assert run.processes() == []


def finishes(run: Run, *settings: str, steps: int = 12) -> str:
    run.start(
        "run", "chaos.toml", f"learner.steps={steps}", *settings, "--output", "run", "--no-export"
    )
    assert run.wait(400) == 0, run.output.read_text()
    output = run.output.read_text()
    assert run.step() == steps
    assert "audit: ok, issued" in output
    assert run.processes() == []
    return output
