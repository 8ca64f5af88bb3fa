"""What a session does around its supervisor, with stand-ins for the launcher."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from slipstream.buffer.messages import Stats
from slipstream.configs import session
from slipstream.configs.load import load_table
from slipstream.configs.reporter import Reporter
from slipstream.configs.run_dir import Branch, create_run_dir, read_run
from slipstream.configs.scratch import Scratch
from slipstream.configs.specs import Launch
from slipstream.configs.supervisor import StopRequests


def test_a_launcher_that_waits_says_what_for_and_a_stop_ends_its_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_table({"runs_dir": str(tmp_path), "learner": {"steps": 2}}, name="waits")
    run_dir, stop, out = create_run_dir(loaded, None), StopRequests(), io.StringIO()
    told = Launch(
        experiment=loaded.experiment, run=read_run(run_dir), run_dir=run_dir, model_dir=run_dir
    )

    @contextmanager
    def launcher(_: Launch, waits: Callable[[str], None]) -> Iterator[None]:
        for what in ("room", "room", "a node"):
            waits(what)
        stop.add()
        waits("a node")
        yield

    monkeypatch.setattr(session, "SILENT_S", 0.0)
    monkeypatch.setattr(session, "_launcher", launcher)
    with Reporter(told, Console(file=out)) as reporter:
        outcome = session._supervise(told, reporter, stop)
    assert outcome.status == "interrupted"
    assert [out.getvalue().count(f"waits for {what}") for what in ("room", "a node")] == [1, 1]
    assert "waits for room" in (run_dir / "logs" / "supervisor.log").read_text()


def test_a_prompt_is_said_to_be_quarantined_once_and_after_a_branch_only_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_table({"runs_dir": str(tmp_path), "learner": {"steps": 2}}, name="poisoned")
    run_dir, out = create_run_dir(loaded, None), io.StringIO()
    run = read_run(run_dir)
    stats = Stats(
        counts={}, dropped={}, newest=None, lags={}, oldest_inflight_s=0.0, capacity_groups=1,
        workers={}, waits=[],
    )  # fmt: skip
    monkeypatch.setattr(Reporter, "tick", lambda self, phase: None)

    def around(*branches: Branch) -> session._Around:
        told = Launch(
            experiment=loaded.experiment,
            run=msgspec.structs.replace(run, branches=(*run.branches, *branches)),
            run_dir=run_dir,
            model_dir=run_dir,
        )
        places = Scratch(endpoint=f"ipc://{tmp_path}/none", weights_dir=run_dir)
        reporter = Reporter(told, Console(file=out))
        return session._Around(told, reporter, places, lambda plan: pytest.fail(plan.name))

    def seen(found: dict[int, str], turn: session._Around) -> list[str]:
        out.truncate(0)
        out.seek(0)
        turn._reporter.progress.stats = msgspec.structs.replace(stats, quarantined=found)
        turn.tick("training")
        turn.tick("training")
        return [line.partition(":")[0] for line in out.getvalue().splitlines()]

    first = around()
    assert seen(dict.fromkeys(range(12), "crashes"), first) == [
        f"prompt {uid} is quarantined" for uid in range(12)
    ]
    second = around(Branch(branch=1, started_s=0.0))
    second.tick("starting")  # the buffer has not answered yet
    assert seen(dict.fromkeys(range(12), "crashes"), second) == ["prompts quarantined before"]
    assert "12 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)" in out.getvalue()
    assert seen(dict.fromkeys(range(13), "crashes"), second) == ["prompt 12 is quarantined"]
    third = around(Branch(branch=1, started_s=0.0))
    assert seen({}, third) == []
    assert seen({3: "crashes"}, third) == ["prompt 3 is quarantined"]
