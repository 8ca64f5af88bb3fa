"""What a run reports while it goes on: the lines its processes append to their JSONL files."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

EventKind = Literal["sft", "step", "evaluation"]

FILES: dict[EventKind, str] = {
    "sft": "sft_metrics.jsonl",
    "step": "metrics.jsonl",
    "evaluation": "eval.jsonl",
}

Row = dict[str, Any]


class Event(NamedTuple):
    """One reported line: an SFT update, a learner step or an evaluation."""

    kind: EventKind
    row: Row


class Tail:
    """The complete JSON lines that a file has gained since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Row]:
        """New lines, oldest first; a line still being written is left for the next look."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [row for line in complete.splitlines() if (row := _decode(line)) is not None]


class Feed:
    """All events of a run folder, each once, in the order of the three files.

    Trace:
        feed = Feed(run_dir)   # a resumed run's folder holds earlier lines
        feed.poll()            # -> those
        feed.poll()            # -> only what came since
    """

    def __init__(self, run_dir: Path) -> None:
        self._tails: dict[EventKind, Tail] = {
            kind: Tail(run_dir / name) for kind, name in FILES.items()
        }

    def poll(self) -> list[Event]:
        """What was appended since the last call."""
        return [
            Event(kind=kind, row=row) for kind, tail in self._tails.items() for row in tail.read()
        ]


def read_rows(path: Path) -> list[Row]:
    """Every complete line of a JSONL file; none when it does not exist."""
    return Tail(path).read()


def latest_by_step(rows: list[Row]) -> list[Row]:
    """One row per step, in order of step: a step redone after a resume replaces the lost one."""
    by_step = {row["step"]: row for row in rows if "step" in row}
    return [by_step[step] for step in sorted(by_step)]


def _decode(line: bytes) -> Row | None:
    """A line as a dict; None for one that tells nothing new.

    These are lines that a crash cut (the next line then follows on it), and the learner's last
    line repeated with a status when it was stopped.
    """
    try:
        row = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return None
    return row if isinstance(row, dict) and "status" not in row else None
