"""Metrics to TensorBoard and Weights & Biases, from the same lines that the displays read."""

import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..buffer.errors import ConfigError
from .feed import Event, EventKind
from .schema import TrackConfig

PREFIX: dict[EventKind, str] = {"sft": "sft/", "step": "", "evaluation": "eval/"}

NOT_SCALARS = frozenset({"step", "time", "version", "update"})


class Tracker(Protocol):
    """Takes events in; one call per look at the files."""

    def write(self, events: list[Event]) -> None: ...

    def close(self) -> None: ...


def check_tracking(config: TrackConfig) -> None:
    """Refuse what cannot work, before anything starts.

    Raises:
        ConfigError: a W&B project is named but wandb is not installed.
    """
    if config.wandb_project and find_spec("wandb") is None:
        raise ConfigError(
            f'track.wandb_project = "{config.wandb_project}" needs wandb: '
            "pip install 'slipstream[wandb]', or remove the key"
        )


def make_trackers(
    config: TrackConfig, run_dir: Path, *, run_id: str, settings: Mapping[str, Any], step: int
) -> list[Tracker]:
    """Those that the config asks for.

    Args:
        config: `[track]`.
        run_dir: the run folder.
        run_id: names the run in W&B, so that a resumed run goes on in the same place.
        settings: the resolved experiment, shown by W&B.
        step: the step that a resumed run starts from; what was written of later ones is void.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(run_dir / "tensorboard", step))
    if config.wandb_project:
        trackers.append(WandB(config.wandb_project, run_dir, run_id, settings))
    return trackers


def scalars(event: Event) -> dict[str, float]:
    """Name -> value of every finite number of a line; nested tables become `a/b`."""
    return dict(_flat(event.row, PREFIX[event.kind]))


def _flat(row: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in NOT_SCALARS and math.isfinite(value):
            yield f"{prefix}{key}", float(value)


def _step(event: Event) -> int:
    key = "update" if event.kind == "sft" and "update" in event.row else "step"
    return int(event.row.get(key, 0))


class TensorBoard:
    """Event files, written with TensorBoard's own classes (no torch, no TensorFlow)."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # Any: generated protobuf modules declare their classes at import, which checkers miss.
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._writer = EventFileWriter(str(folder))
        if step:
            # TensorBoard drops what an earlier file said of this step and later ones.
            start = events.SessionLog(status=events.SessionLog.START)
            self._writer.add_event(self._event(step=step + 1, session_log=start))

    def write(self, events: list[Event]) -> None:
        for event in events:
            numbers = scalars(event).items()
            values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in numbers]
            record = self._event(step=_step(event), summary=self._summary(value=values))
            record.wall_time = event.row.get("time", 0.0)
            self._writer.add_event(record)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """One W&B run per run folder."""

    def __init__(
        self, project: str, run_dir: Path, run_id: str, settings: Mapping[str, Any]
    ) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # an extra

        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=dict(settings),
        )

    def write(self, events: list[Event]) -> None:
        for event in events:
            # W&B wants one growing step: the warm start's updates are counted on their own axis.
            axis = "sft/update" if event.kind == "sft" else "step"
            self._run.log({**scalars(event), axis: _step(event)})

    def close(self) -> None:
        self._run.finish()
