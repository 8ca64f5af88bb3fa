"""Workers and nodes that come and go during a run: its throughput follows, its books balance.

The engine is the native one, but each sample holds its row for `LATENCY_S`: throughput is rows over
latency whatever the machine is doing.
"""

import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from slipstream.buffer import events
from slipstream.buffer.journal import Journal

from .test_resume import losses, run_file

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROWS, LATENCY_S = 8, 4.0
SAMPLES_PER_STEP = 4
SETTLED_S, WINDOW_S = 30.0, 24.0
"""After a change the throughput is the new one within the first; it is measured over the second."""
DEADLINE_S = 240.0
PLANT = f"""
import sys, time
if "slipstream.rollout.worker" in sys.orig_argv:
    import asyncio
    from slipstream.rollout.engines import native

    class Paced(native.NativeEngine):
        def __init__(self, *args, max_concurrent, **more):
            super().__init__(*args, max_concurrent=max_concurrent, **more)
            self._free, self._begun = asyncio.Semaphore(max_concurrent), 0

        async def _one(self, request):
            async with self._free:
                self._begun += 1  # the first ones end one after the other, then all in turn
                share = min(1.0, self._begun / {ROWS})
                until_s = time.monotonic() + {LATENCY_S} * share
                outputs = [output async for output in super().generate([request])]
                await asyncio.sleep(max(0.0, until_s - time.monotonic()))
                return outputs[0]

        async def generate(self, requests):
            tasks = [asyncio.create_task(self._one(request)) for request in requests]
            try:
                for done in asyncio.as_completed(tasks):
                    yield await done
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    native.NativeEngine = Paced
"""
SLOW_LEARNER = """
if "slipstream.learner.loop" in sys.orig_argv:
    from slipstream.learner import trainer

    train = trainer.Trainer.train

    def slow(self, batch):
        time.sleep(2.0)
        return train(self, batch)

    trainer.Trainer.train = slow
"""
SETTINGS = (
    "mode=async", f"rollout.max_concurrent_samples={ROWS}", "rollout.samples_per_prompt=2",
    "learner.prompts_per_step=2", "buffer.max_staleness_steps=30", "learner.steps=100000",
    "learner.checkpoint.every_steps=20", "--output", "run", "--no-export",
)  # fmt: skip


def plant(system: Any, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Have every Python started from here on run a text first, on whichever node."""
    folder = system.folder / "planted"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture
def cluster(system: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that has room for the learner, and two nodes with room for one worker each."""
    plant(system, monkeypatch, PLANT)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(2):
        made.add_node(num_cpus=2)
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_node_that_joins_or_goes_changes_throughput_within_30_s_and_no_prompt_is_lost(
    system: Any, cluster: Cluster, record_property: Callable[[str, object], None]
) -> None:
    system.make_inputs(torch.float32)
    system.experiment(steps=1, dtype="float32", workers=2, max_concurrent=ROWS)
    run = system.start(
        "run", "experiment.toml", *SETTINGS, "--launcher", "ray", "--address", cluster.address,
        "cluster.worker_cpus=1.5", "cluster.learner_cpus=0.5",
    )  # fmt: skip
    folder = system.folder / "run"
    wait_for(run, lambda: max(losses(folder), default=0) > 0)

    def measured(workers: int, what: str) -> None:
        time.sleep(SETTLED_S)
        began_s = time.time()
        time.sleep(WINDOW_S)
        rate = samples_since(folder, began_s, began_s + WINDOW_S) / WINDOW_S
        ideal = workers * ROWS / LATENCY_S
        record_property(f"{what}: samples/s (rows / latency: {ideal:g})", round(rate, 2))
        assert rate == pytest.approx(ideal, rel=0.12), run.output.read_text()

    measured(2, "two nodes")
    system.start("scale", "run", "--rollout-workers", "3").ended()
    said = r"worker-2 waits for room on the Ray cluster \(1\.5 CPU at [\d.]+\): add a node"
    wait_for(run, lambda: re.search(said, run.output.read_text()) is not None)
    node = cluster.add_node(num_cpus=2)
    measured(3, "after a third joined")
    cluster.remove_node(node, allow_graceful=False)
    measured(2, "after one was taken away")
    told = run.output.read_text()
    assert "was lost; is restarted; what it held is issued again (worker restart 1 of 3)" in told

    run.process.send_signal(signal.SIGTERM)
    assert "audit: ok" in run.ended(130)
    assert len(run_file(folder)["branches"]) == 1, "nothing was restarted but the worker"
    taken = taken_uids(folder)
    assert set(taken.values()) == {1}, "each prompt is trained once"
    result = run_file(folder)["result"]
    assert (result["staleness_violations"], result["orphaned_tokens"]) == (0, 0)


@pytest.mark.parametrize(
    ("workers", "text"), [(1, PLANT), (2, PLANT + SLOW_LEARNER)], ids=["more", "fewer"]
)
def test_the_number_of_workers_follows_the_measured_balance_within_its_bounds(
    system: Any, monkeypatch: pytest.MonkeyPatch, workers: int, text: str
) -> None:
    plant(system, monkeypatch, text)
    system.make_inputs(torch.float32)
    system.experiment(steps=1, dtype="float32", workers=workers, max_concurrent=ROWS)
    bounds = ("cluster.min_workers=1", "cluster.max_workers=2")
    run = system.start("run", "experiment.toml", *SETTINGS, "buffer.max_staleness_steps=4", *bounds)
    said = f"rollout workers: {workers} -> {3 - workers}"
    wait_for(run, lambda: said in run.output.read_text())
    reached = max(losses(system.folder / "run"))
    wait_for(run, lambda: max(losses(system.folder / "run")) > reached + 3)
    run.process.send_signal(signal.SIGTERM)
    told = run.ended(130)
    assert "audit: ok" in told
    assert told.count("rollout workers:") == 1, "the bounds hold"


def samples_since(folder: Path, began_s: float, ended_s: float) -> int:
    """Trained between two moments."""
    lines = (folder / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    times = [json.loads(line)["time"] for line in lines]
    return SAMPLES_PER_STEP * sum(began_s <= each < ended_s for each in times)


def taken_uids(folder: Path) -> Counter[int]:
    """How often each prompt was taken."""
    journal = Journal(folder, writable=False)
    taken = Counter(e.uid for e in journal.events() if isinstance(e, events.Taken))
    journal.close()
    return taken


def wait_for(run: Any, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert run.process.poll() is None, run.output.read_text()
        assert time.monotonic() < end, run.output.read_text()
        time.sleep(0.1)
