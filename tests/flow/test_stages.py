"""A run whose groups are sized in stages: a killed feeder changes no decision, none is missing, and
each can be asked for by name."""

import os
import signal
import time

import pytest
import torch
from slipstream.buffer import events
from slipstream.buffer.journal import Journal
from slipstream.buffer.records import Ticket
from slipstream.configs.schema import Experiment
from slipstream.rollout.history import History
from slipstream.rollout.sizing import Controller
from slipstream.rollout.tickets import commit_chance

from .test_resume import losses, run_file

STEPS, KILL_AT = 10, 3
OVERRIDES = (
    "mode=async",
    "rollout.sizing.sizer=probe_then_commit",
    "rollout.sizing.probe_samples=2",
    "rollout.sizing.min_commit=0.2",
    "learner.objective.advantage=leave_one_out",
    "learner.objective.aggregation=prompt",
    "reward.name=reward.py:yes_or_no",
    "buffer.drop_no_signal=true",
    "buffer.max_staleness_steps=2",
)


@pytest.mark.slow
def test_every_second_stage_is_decided_from_the_ledger_through_a_killed_feeder(system):
    system.make_inputs(torch.float32)
    with (system.folder / "reward.py").open("a") as file:
        file.write(
            "def yes_or_no(completion, prompt):\n    return float(slow(completion, prompt) > 0.3)\n"
        )
    system.experiment(steps=STEPS, dtype="float32", checkpoint_every=2)
    run_dir = system.folder / "staged"
    run = system.start("run", "experiment.toml", *OVERRIDES, "--output", "staged", "--no-export")
    while max(losses(run_dir), default=0) < KILL_AT:
        assert run.process.poll() is None, run.output.read_text()
        time.sleep(0.02)
    os.kill(int((run_dir / "processes" / "feeder.pid").read_text()), signal.SIGKILL)
    assert "feeder: was killed by SIGKILL" in run.ended()
    assert run_file(run_dir)["result"]["audit"]["ok"]
    assert list(losses(run_dir)) == list(range(1, STEPS + 1))

    committed, stopped = decisions(run_dir)
    assert committed
    assert stopped
    for uid, word in ((committed[0], "2 more, each counting"), (stopped[0], ": none")):
        said = system.start("show", "staged", "--prompt", str(uid)).ended()
        assert "because: a probe of 2 of 4" in said
        assert word in " ".join(said.split())


def decisions(run_dir) -> tuple[list[int], list[int]]:
    """uids whose second stage was drawn, and those without, once all decisions were made again from
    the events before each of them, and every group that was trained has one."""
    experiment = Experiment.model_validate_json((run_dir / "resolved.json").read_bytes())
    controller = Controller(experiment.rollout, by_std=False)
    sizing = experiment.rollout.sizing
    history = History(sizing.half_life_steps, sizing.prior_strength)
    journal = Journal(run_dir, writable=False)
    found: tuple[list[int], list[int]] = ([], [])
    for number, event in enumerate(journal.events(), start=1):
        if isinstance(event, events.Extended):
            probed = {uid: (first, known) for uid, first, known in history.probed}
            first, known = probed[event.uid]
            chance = commit_chance(experiment.seed, event.uid)
            again = controller.commit(first, known, chance)
            assert journal.read(event.ticket, Ticket).sizing == again
            found[event.num_samples == 2].append(event.uid)
        if isinstance(event, events.Taken):
            assert event.uid in (*found[0], *found[1]), "trained before its sizer had decided"
        history.apply(number, event, lambda ref: journal.read(ref, Ticket))
    journal.close()
    return found
