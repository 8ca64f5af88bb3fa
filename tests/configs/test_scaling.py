"""How many workers a run should have: measured, asked for, bounded."""

import io
import os
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from slipstream.buffer.errors import ConfigError
from slipstream.buffer.messages import Stats
from slipstream.configs import scaling, session
from slipstream.configs.claim import supervising
from slipstream.configs.cluster import ClusterConfig
from slipstream.configs.load import load_table
from slipstream.configs.run_dir import create_run_dir, read_experiment, read_run
from slipstream.configs.scaling import Balance, Scaling, balance, request
from slipstream.configs.specs import Launch, process_names
from slipstream.configs.supervisor import Outcome

STATS = Stats(counts={}, dropped={}, newest=None, lags={}, oldest_inflight_s=0, capacity_groups=0,
              workers={}, waits=[])  # fmt: skip


def measured(
    wait_s: float, idle: float, workers: int = 4, serving: int | None = None
) -> Balance | None:
    rows = [{"seconds": 10.0, "wait_seconds": wait_s}] * 5
    told = {f"worker-{n}": {"idle": idle} for n in range(serving or workers)}
    stats = msgspec.structs.replace(STATS, workers=told)
    return balance(rows, stats, workers)


@pytest.mark.parametrize(
    ("wait_s", "idle", "advised"),
    [(5.0, 0.0, 8), (0.0, 0.5, 2), (0.5, 0.05, 4), (4.0, 0.4, 4), (9.9, 0.0, 40)],
)
def test_the_side_that_waits_decides_what_is_advised(
    wait_s: float, idle: float, advised: int
) -> None:
    found = measured(wait_s, idle)
    assert found is not None
    assert found.advised == advised
    assert f"{advised} rollout workers" in found.line(4) or advised == 4


def test_workers_that_wait_for_a_node_are_not_taken_for_workers_that_are_too_few() -> None:
    found = measured(5.0, 0.0, workers=8, serving=4)
    assert found is not None
    assert found.advised == 8


def test_nothing_is_advised_before_there_is_something_to_measure() -> None:
    assert balance([{"seconds": 1.0, "wait_seconds": 0.0}] * 2, STATS, 4) is None
    assert balance([{"seconds": 1.0, "wait_seconds": 0.0}] * 9, STATS, 4) is None


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    table = {"runs_dir": str(tmp_path), "learner": {"steps": 2}}
    return create_run_dir(load_table(table, name="scaled"), None)


def test_what_was_asked_for_is_wanted_and_the_newest_request_counts(run_dir: Path) -> None:
    wanted = Scaling(run_dir, ClusterConfig())
    assert wanted.wanted(2, lambda: None) == 2
    with supervising(run_dir):
        request(run_dir, 5)
        assert wanted.wanted(2, lambda: None) == 5
        request(run_dir, 3)
        assert wanted.wanted(5, lambda: None) == 3


def test_a_run_that_goes_back_keeps_the_number_asked_for_and_one_that_is_resumed_does_not(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Launch(
        experiment=read_experiment(run_dir), run=read_run(run_dir), run_dir=run_dir,
        model_dir=run_dir,
    )  # fmt: skip
    first = told.experiment.rollout.workers
    started: list[int] = []

    def work(launch: Launch, *_: object) -> Outcome:
        started.append(process_names(launch.experiment).index("feeder") - 2)
        if len(started) == 1:
            request(run_dir, 5)
            return Outcome(status="failed", process="learner", reason="died", go_back=True)
        return Outcome(status="interrupted")

    monkeypatch.setattr(session, "_supervise", work)
    with supervising(run_dir):
        for _ in range(2):
            session.run_branches(told, Console(file=io.StringIO()), lambda: told, export=False)
    assert started == [first, 5, first]


def test_a_run_that_does_not_run_or_a_senseless_number_is_refused(run_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"not running; `slipstream resume .* rollout\.workers=3`"
    ):
        request(run_dir, 3)
    with pytest.raises(ConfigError, match="must lie in 1 to"), supervising(run_dir):
        request(run_dir, 0)
    with pytest.raises(ConfigError, match="not a run folder"):
        request(run_dir.parent, 3)


def test_by_itself_the_number_stays_within_its_bounds(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "PACE_S", 0.0)
    bounded = Scaling(run_dir, ClusterConfig(min_workers=2, max_workers=6))
    assert bounded.wanted(4, lambda: Balance(0.9, 0.0, 40)) == 6
    assert bounded.wanted(4, lambda: Balance(0.0, 0.9, 1)) == 2
    assert bounded.wanted(4, lambda: None) == 4


def test_a_request_is_private(run_dir: Path) -> None:
    assert os.stat(run_dir).st_mode & 0o077 == 0
