"""A copy of the run folder elsewhere, on shared storage for instance: what a run goes on from when
its machine is lost.

Segments first, then checkpoints, then the ledger: whatever the copied ledger refers to and a resume
needs is there before it. A copy that was interrupted leaves the one before it usable, because every
file appears under its name only when it is complete.
"""

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterable
from pathlib import Path

LEDGER = "ledger.sqlite"
MANIFEST = "manifest.json"
LIVE = ("logs", "processes", "tensorboard", "export", "segments", "checkpoints", "weights")
"""Copied in another way, or not needed to go on."""


def copy_run(run_dir: Path, target: Path, sealed_before: int, sequence: int) -> None:
    """Bring the copy up to date.

    Args:
        run_dir: the run folder; the run may be alive.
        target: made when it is missing.
        sealed_before: segments below this one do not change any more.
        sequence: of the last event that refers to them alone. Later ones are left out, and so are
            checkpoints whose steps they took: in the copy nothing is TRAINED that is not TAKEN.
    Raises:
        OSError, sqlite3.Error: it cannot be read or written.
    """
    target.mkdir(parents=True, exist_ok=True, mode=0o700)
    segments = sorted((run_dir / "segments").glob("*.seg"))
    saved = sorted((run_dir / "checkpoints").glob(f"*/{MANIFEST}"))
    for path in segments:
        if int(path.stem) < sealed_before:
            _copy(path, target / "segments" / path.name)
    copied = [manifest for manifest in saved if _copy_checkpoint(manifest, target, sequence)]
    if saved and not copied:
        raise OSError("every checkpoint was replaced by a newer one while it was copied")
    for path in sorted(run_dir.rglob("*")):
        inside = path.relative_to(run_dir)
        if path.is_file() and inside.parts[0] not in LIVE and not inside.name.startswith(LEDGER):
            with contextlib.suppress(FileNotFoundError):  # a temporary file
                _copy(path, target / inside)
    _copy_ledger(run_dir, target, sequence)
    _remove_others((target / "segments").glob("*.seg"), segments)
    _remove_others((target / "checkpoints").glob("*"), [each.parent for each in copied])


def _copy_checkpoint(manifest: Path, target: Path, sequence: int) -> bool:
    """Copy a checkpoint that the ledger up to `sequence` has seen; False when it is gone."""
    folder = manifest.parent
    with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
        if json.loads(manifest.read_bytes())["journal_sequence"] > sequence:
            return False
        files = sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST)
        for path in files:  # the manifest last: it makes the checkpoint
            _copy(path, target / "checkpoints" / folder.name / path.name)
        return True
    return False


def _copy(source: Path, target: Path) -> None:
    """Copy a file unless the copy has its size and time already."""
    here = source.stat()
    if target.exists():
        there = target.stat()
        if (there.st_size, there.st_mtime_ns) == (here.st_size, here.st_mtime_ns):
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.copy2(source, partial)
    _sync(partial)
    partial.replace(target)


def _copy_ledger(run_dir: Path, target: Path, sequence: int) -> None:
    """Copy the ledger as of one event. SQLite's own backup makes it, on the run's disk: where the
    copy goes, SQLite's locks may not hold."""
    made = run_dir / f".{LEDGER}.copy"
    made.unlink(missing_ok=True)
    with (
        contextlib.closing(
            sqlite3.connect(f"{(run_dir / LEDGER).resolve().as_uri()}?mode=ro", uri=True)
        ) as ledger,
        contextlib.closing(sqlite3.connect(made)) as copy,
    ):
        ledger.backup(copy)
        copy.execute("DELETE FROM events WHERE sequence > ?", (sequence,))
        copy.commit()
        copy.execute("PRAGMA journal_mode = DELETE")  # no file beside it
    _copy(made, target / LEDGER)
    made.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _remove_others(copies: Iterable[Path], originals: Iterable[Path]) -> None:
    """Drop what the run had dropped; the newer things that replace it are copied already."""
    kept = {path.name for path in originals}
    for copy in copies:
        if copy.name not in kept:
            if copy.is_dir():
                (copy / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(copy)
            else:
                copy.unlink()
