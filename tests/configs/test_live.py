"""What a person sees while a run goes on."""

import io
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from slipstream.buffer.messages import Stats
from slipstream.buffer.records import Version
from slipstream.configs.feed import Event, Feed, Tail
from slipstream.configs.live import Display, panel, plain_line
from slipstream.configs.progress import Progress, clock, sparkline


def step_row(step: int, reward: float = 0.5, **changes: Any) -> dict[str, Any]:
    return {
        "step": step, "time": 1000.0 + 2 * step, "seconds": 1.9, "wait_seconds": 0.4,
        "reward_mean": reward, "tokens_per_s": 2310.0,
        "proof": {
            "step": step, "bound": 1, "max_lag": 1, "violations": 0, "orphaned_tokens": 0,
            "lag_counts": {"0": 600, "1": 400}, "mixed_trajectories": 3,
        },
        **changes,
    }  # fmt: skip


def evaluation_row(step: int, mean: float) -> dict[str, Any]:
    return {
        "step": step, "prompts": 512, "samples": 512, "reward_mean": mean,
        "ci95_low": mean - 0.04, "ci95_high": mean + 0.04, "failed": 0,
    }  # fmt: skip


STATS = Stats(
    counts={"WAITING": 64, "INFLIGHT": 12, "READY": 9, "TAKEN": 16, "TRAINED": 32},
    dropped={"no_signal": 5},
    newest=Version(branch=0, step=42),
    lags={0: 9},
    oldest_inflight_s=1.5,
    capacity_groups=96,
    workers={"worker-0": {"running": 48, "tokens_per_s": 1800, "idle": 0.25, "swaps": 41}},
    waits=["learner waits for 7 READY groups since 2.1 s (deadline 600 s)"],
)


@pytest.fixture
def progress() -> Progress:
    progress = Progress(
        name="quickstart-20260101-101500",
        total_steps=100,
        bound=1,
        started_s=990.0,
        capacity_groups=64,
    )
    progress.phase = "training"
    for step in range(1, 43):
        progress.fold(Event(kind="step", row=step_row(step, reward=0.3 + step / 100)))
    progress.fold(Event(kind="evaluation", row=evaluation_row(0, 0.31)))
    progress.fold(Event(kind="evaluation", row=evaluation_row(40, 0.68)))
    progress.stats = STATS
    return progress


def rendered(progress: Progress, width: int = 100) -> str:
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(panel(progress, now_s=1090.0))
    return console.export_text()


def test_the_panel_shows_step_reward_lag_speed_buffer_and_waits(progress: Progress) -> None:
    text = rendered(progress)
    for part in (
        "step 42/100", "1:40", "about 1:56 left", "0.720", "from 0.310", "0.310 → 0.680",
        "±0.040 at step 40", "60%", "40%", "bound 1  0 violations", "2,310 trained",
        "INFLIGHT 12", "READY 9", "of 64, TAKEN 16 unsaved, WAITING 64", "1,800 generated",
        "worker-0 48 rows, 1,800 tok/s, 25% idle, 41 swaps", "learner waits for 7 READY groups",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_panel_fits_any_terminal(progress: Progress, width: int) -> None:
    assert all(len(line) <= width for line in rendered(progress, width).splitlines())


def test_a_line_and_a_complete_group_are_progress_and_work_in_flight_is_none(
    progress: Progress,
) -> None:
    reached = progress.reached
    counts = STATS.counts | {"WAITING": 60, "INFLIGHT": 16}
    progress.stats = msgspec.structs.replace(STATS, counts=counts)
    assert progress.reached == reached
    counts = counts | {"INFLIGHT": 15, "READY": 10}
    progress.stats = msgspec.structs.replace(STATS, counts=counts)
    complete = progress.reached
    progress.fold(Event(kind="evaluation", row=evaluation_row(42, 0.7)))
    assert len({reached, complete, progress.reached}) == 3


def test_held_out_samples_are_progress_and_what_deaths_leave_behind_is_none(
    progress: Progress,
) -> None:
    def reached(**changes: Any) -> tuple[int, int, int]:
        progress.see(msgspec.structs.replace(STATS, **changes))
        return progress.reached

    began = reached(evaluation="version 0.42: 3 of 64 samples")
    assert reached(evaluation="version 0.42: 5 of 64 samples") != began
    further = progress.reached
    assert reached(evaluation="version 0.42: 4 of 64 samples") == further, "it began anew"
    counts = STATS.counts | {"DROPPED": 1}
    poisoned = {"counts": counts, "quarantined": {7: "3 deaths"}}
    assert reached(evaluation="", **poisoned) == further


def test_the_panel_can_be_drawn_before_anything_happened() -> None:
    assert "step 0/10" in rendered(Progress(name="x", total_steps=10, bound=0))


def test_before_the_first_step_the_warm_start_is_shown() -> None:
    progress = Progress(name="x", total_steps=10, bound=1)
    progress.fold(Event(kind="sft", row={"update": 12, "updates": 64, "loss": 1.25}))
    assert "update 12/64  loss 1.250" in rendered(progress)


def test_violations_are_counted_over_the_whole_run(progress: Progress) -> None:
    bad = step_row(43)
    bad["proof"] = {**bad["proof"], "violations": 2}
    progress.fold(Event(kind="step", row=bad))
    progress.fold(Event(kind="step", row=step_row(44)))
    assert "2 violations" in rendered(progress)


def test_without_a_terminal_each_step_is_one_plain_line(progress: Progress) -> None:
    out = io.StringIO()
    display = Display(progress, Console(file=out, width=80))
    display.show([Event(kind="step", row=progress.steps[42])])
    display.show([Event(kind="evaluation", row=progress.evaluations[40])])
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step  42/100  reward 0.720 ▁")
    assert lines[0].endswith(
        "lag 0: 60%  1: 40%  bound 1  2,310 tok/s  1.9 s (waited 0.4 s)  "
        "groups INFLIGHT 12 READY 9 of 64, TAKEN 16 unsaved, WAITING 64"
    )
    assert lines[2] == (
        "evaluation at step 40: reward 0.680 (95% 0.640 to 0.720) on 512 held-out prompts"
    )


def test_on_a_terminal_the_panel_is_drawn_and_taken_away(progress: Progress) -> None:
    out = io.StringIO()
    display = Display(progress, Console(file=out, force_terminal=True, width=100))
    display.start()
    display.show([])
    display.stop()
    assert "step 42/100" in out.getvalue()


def test_each_line_tells_its_own_step_when_several_come_at_once(progress: Progress) -> None:
    out = io.StringIO()
    display = Display(progress, Console(file=out, width=80))
    display.show([Event(kind="step", row=progress.steps[step]) for step in (1, 2)])
    first, second = out.getvalue().splitlines()[:2]
    assert "reward 0.310 ▁ from" in first
    assert "reward 0.320 ▁█ from" in second


def test_a_tail_gives_each_complete_line_once_and_waits_for_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"step": 1}\n{"st')
    assert tail.read() == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert tail.read() == [{"step": 2}]
    assert tail.read() == []


def test_a_line_that_a_crash_cut_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st{"step": 2}\n{"step": 3}\n')
    assert [row["step"] for row in Tail(path).read()] == [1, 3]


def test_the_feed_tells_steps_evaluations_and_warm_start_apart(tmp_path: Path) -> None:
    for name, row in {"metrics.jsonl": {"step": 1}, "eval.jsonl": {"step": 0}}.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    feed = Feed(tmp_path)
    assert [(event.kind, event.row["step"]) for event in feed.poll()] == [
        ("step", 1), ("evaluation", 0),
    ]  # fmt: skip
    assert feed.poll() == []


def test_a_sparkline_runs_from_the_lowest_to_the_highest_block() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.0] * 16 + [1.0] * 16, width=2) == "▁█"
    assert sparkline([0.5, 0.5]) == "▁▁"
    assert sparkline([]) == ""


def test_a_clock_shows_hours_only_when_there_are_any() -> None:
    assert (clock(65), clock(7389)) == ("1:05", "2:03:09")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("worker-0 waits 9.9 s of 10 s for AwaitVersion", False),
        ("feeder waits 30.1 s of 30 s for PutPrompts (overdue)", False),  # is just being renewed
        ("worker-0 waits 14.0 s of 10 s for ClaimSamples (overdue)", True),
        ("learner waits 4.0 s of 600 s for the batch of step 3: 30 of 32 groups READY", False),
        ("learner waits 5.1 s of 600 s for the batch of step 3: 30 of 32 groups READY", True),
        ("uid 7 is at attempt 4: it may never fit the bound", True),
    ],
)
def test_only_what_holds_the_run_up_is_called_a_wait(
    progress: Progress, monkeypatch: pytest.MonkeyPatch, line: str, shown: bool
) -> None:
    progress.stats = msgspec.structs.replace(STATS, waits=[line])
    out = io.StringIO()
    display = Display(progress, Console(file=out, width=80))
    monkeypatch.setattr(display, "_news_s", time.monotonic() - 60)
    display.show([])
    assert (f"waiting: {line}" in out.getvalue()) == shown
    assert (line.split(" for ")[-1][:20] in rendered(progress)) == shown


@pytest.mark.parametrize(
    "unknown", [("ci95_low", "ci95_high"), ("ci95_low", "ci95_high", "reward_mean")]
)
def test_an_evaluation_without_an_interval_or_reward_is_shown(
    progress: Progress, unknown: tuple[str, ...]
) -> None:
    row = {**evaluation_row(42, 0.7), **dict.fromkeys(unknown)}
    progress.fold(Event(kind="evaluation", row=row))
    assert "at step 42" in rendered(progress)
    words = "could be scored" if "reward_mean" in unknown else "reward 0.700 (no interval)"
    assert words in plain_line(Event(kind="evaluation", row=row), progress)
