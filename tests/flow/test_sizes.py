"""A run whose groups differ in size and have spare samples: all samples are accounted for, and each
decision can be asked for. Locally here, under Ray in `test_ray.py`, with vLLM in `on_vllm.py`."""

import json
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from slipstream.buffer import events
from slipstream.buffer.journal import Journal
from slipstream.buffer.records import Ticket
from slipstream.rollout.history import History

TIMEOUT_S = 240

OVERRIDES = (
    "mode=async",
    "rollout.sampling.max_new_tokens=40",
    "rollout.sizing.sizer=min_variance",
    "rollout.sizing.spare_samples=1",
    "rollout.sizing.wait_share=0.5",
    "learner.objective.advantage=leave_one_out",
    "learner.objective.aggregation=prompt",
    "reward.name=reward.py:yes_or_no",
    "buffer.drop_no_signal=true",
    "buffer.max_staleness_steps=2",
)


def start(system: Any, *more: str, steps: int) -> Any:
    """Such a run, over prompts that come again and again."""
    system.make_inputs(torch.float32)
    lines = (system.folder / "prompts.jsonl").read_text().splitlines()
    (system.folder / "prompts.jsonl").write_text("\n".join(lines[:12]))
    with (system.folder / "reward.py").open("a") as file:
        file.write(
            "def yes_or_no(completion, prompt):\n    return float(slow(completion, prompt) > 0.3)\n"
        )
    system.experiment(steps=steps, dtype="float32", max_concurrent=16, checkpoint_every=2)
    return system.start(
        "run", "experiment.toml", *OVERRIDES, *more, "--output", "sized", "--no-export"
    )


def run(system: Any, *more: str) -> Path:
    """The folder of one that is done."""
    start(system, *more, steps=10).ended()
    return system.folder / "sized"


def check(system: Any, run_dir: Path) -> None:
    """The books of groups and of samples, and the words that `show` has for them."""
    journal = Journal(run_dir, writable=False)
    cut, taken, sized = Counter[int](), dict[int, int](), {}
    for event in journal.events():
        match event:
            case events.Put():
                sized[event.uid] = journal.read(event.ticket, Ticket).sizing
            case events.Voided(reason="cut"):
                cut[event.uid] += len(event.indices)
            case events.Taken():
                taken[event.uid] = len(event.decisions)
            case _:
                pass
    journal.close()
    result = json.loads((run_dir / "run.json").read_text())["result"]
    print("measured sizes", Counter(sized[uid].num_samples for uid in taken), cut.total())
    assert result["audit"]["ok"]
    assert len({sized[uid].num_samples for uid in taken}) > 1
    assert {uid: ready + cut[uid] for uid, ready in taken.items()} == {
        uid: sized[uid].num_samples for uid in taken
    }
    assert 0 < result["dropped"]["cut"] <= cut.total()
    assert all(sized[uid].spare_weight == 0 for uid in cut)
    waited = [uid for uid in taken if sized[uid].spare_weight == 2]
    for uid, words in ((max(cut), "cut once the others are in"), (waited[0], "counts 2.00 times")):
        said = system.start("show", "sized", "--prompt", str(uid)).ended()
        assert f"min_variance gave it {sized[uid].num_samples} samples" in said
        assert words in " ".join(said.split())


@pytest.mark.slow
def test_sizes_that_adapt_and_spare_samples_keep_the_books_and_are_explained(system):
    check(system, run(system))


@pytest.mark.slow
def test_a_damaged_history_ends_a_resume_by_name_and_priors_replace_it(system):
    run_dir, steps = system.folder / "sized", 8  # from the tenth on hardly a group has signal
    begun = start(system, steps=steps)
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert begun.process.poll() is None, begun.output.read_text()
        time.sleep(0.02)
    begun.process.send_signal(signal.SIGINT)
    begun.ended(130)
    stored = run_dir / "sizing.state"
    assert history(run_dir, run_dir).dump() == history(run_dir, system.folder).dump()
    stored.write_bytes(stored.read_bytes()[:-1])
    refused = system.start("resume", "sized", "--no-export")
    assert refused.process.wait(TIMEOUT_S) != 0
    said = " ".join(refused.output.read_text().split())
    assert "sizing.state is not what was written" in said
    assert "sizing.forget" in said
    (run_dir / "sizing.forget").touch()
    system.start("resume", "sized", "--no-export").ended()
    assert json.loads((run_dir / "run.json").read_text())["result"]["audit"]["ok"]
    seen, whole = history(run_dir, run_dir), history(run_dir, system.folder)
    assert 0 < seen.pass_rate("prompts")[1] < whole.pass_rate("prompts")[1]


def history(run_dir: Path, folder: Path) -> History:
    """What the ledger tells, from the stored copy in a folder on, or from its beginning."""
    made, journal = (
        History(half_life_steps=20.0, prior_strength=2.0),
        Journal(run_dir, writable=False),
    )
    made.open(folder, journal.sequence)
    made.catch_up(journal)
    journal.close()
    return made
