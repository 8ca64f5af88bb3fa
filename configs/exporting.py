"""Export in a process of its own: it loads the model, and the supervisor never imports torch."""

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from ..buffer.errors import SlipstreamError
from ..learner.config import check_export_dtype
from .child import Child, module_argv
from .result import Exported
from .supervisor import POLL_S, StopRequests

EXPORT_DEADLINE_S = 900.0
"""Writing and reloading a model of some billion parameters from a slow disk."""


def export_run(
    run_dir: Path,
    out: Path,
    *,
    checkpoint: str | None = None,
    dtype: str | None = None,
    tick: Callable[[], None] = lambda: None,
    stop: StopRequests | None = None,
) -> Exported:
    """Export a run's policy as a Hugging Face folder, verified by reloading it.

    Args:
        run_dir: the run folder.
        out: the folder to write.
        checkpoint: `step-000010.b0`; None: the newest.
        dtype: of the weights; None: as trained.
        tick: called while waiting.
        stop: ends the export early when asked to stop.
    """
    argv = [*module_argv("learner.export", run_dir), str(out)]
    if checkpoint is not None:
        argv += ["--checkpoint", str(run_dir / "checkpoints" / checkpoint)]
    argv += ["--dtype", dtype] if dtype else []
    child = Child("export", argv, run_dir=run_dir, threads=2)
    end = time.monotonic() + EXPORT_DEADLINE_S
    try:
        while child.poll() is None and time.monotonic() < end and not (stop and stop.count):
            tick()
            time.sleep(POLL_S)
        late = child.poll() is None
    finally:
        child.kill()
    if late:
        return Exported(path=str(out), ok=False, message="was ended before it was done")
    if child.poll() != 0:
        return Exported(path=str(out), ok=False, message=child.why())
    difference, check = _verified(out)
    return Exported(path=str(out), ok=True, max_logit_difference=difference, check=check)


def export(
    run_dir: Path, out: Path, checkpoint: str | None = None, dtype: str | None = None
) -> Exported:
    """`slipstream export`: as `export_run`, but a failure is an error.

    Raises:
        ConfigError: models are not exported in this dtype.
        SlipstreamError: the export failed or its reload differs from the live policy.
    """
    if dtype is not None:
        check_export_dtype(dtype)
    run_dir, out = run_dir.expanduser().absolute(), out.expanduser().absolute()
    done = export_run(run_dir, out, checkpoint=checkpoint, dtype=dtype)
    if not done.ok:
        raise SlipstreamError(f"export to {out} failed: {done.message}")
    return done


def _verified(out: Path) -> tuple[float | None, str]:
    """What the export's own check measured against the live policy, and in words."""
    try:
        lineage = msgspec.json.decode((out / "slipstream.json").read_bytes())
        return float(lineage["max_logit_difference"]), str(lineage["check"])
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None, ""
