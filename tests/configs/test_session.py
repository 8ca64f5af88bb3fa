"""What a session does around its supervisor, with stand-ins for the launcher."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from slipstream.configs import session
from slipstream.configs.load import load_table
from slipstream.configs.reporter import Reporter
from slipstream.configs.run_dir import create_run_dir, read_run
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
