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
LIVE = ("ledger.sqlite", "logs", "processes", "tensorboard", "export", "segments", "checkpoints")
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
    segments = [p for p in (run_dir / "segments").glob("*.seg") if int(p.stem) < sealed_before]
    for path in sorted(segments):
        _copy(path, target / "segments" / path.name)
    for manifest in sorted((run_dir / "checkpoints").glob(f"*/{MANIFEST}")):
        folder = manifest.parent
        with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
            if json.loads(manifest.read_bytes())["journal_sequence"] > sequence:
                continue
            files = sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST)
            for path in files:  # the manifest last: it makes the checkpoint
                _copy(path, target / "checkpoints" / folder.name / path.name)
    for path in sorted(run_dir.rglob("*")):
        inside = path.relative_to(run_dir)
        if path.is_file() and not inside.parts[0].startswith(LIVE):
            _copy(path, target / inside)
    _copy_ledger(run_dir / LEDGER, target / LEDGER, sequence)
    _remove_others((target / "segments").glob("*.seg"), run_dir / "segments")
    _remove_others((target / "checkpoints").glob("*"), run_dir / "checkpoints")


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


def _copy_ledger(source: Path, target: Path, sequence: int) -> None:
    """Copy the ledger as of one event, by SQLite's own backup."""
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    with (
        contextlib.closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as ledger,
        contextlib.closing(sqlite3.connect(partial)) as copy,
    ):
        ledger.backup(copy)
        copy.execute("DELETE FROM events WHERE sequence > ?", (sequence,))
        copy.commit()
        copy.execute("PRAGMA journal_mode = DELETE")  # no file beside it
    _sync(partial)
    partial.replace(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _remove_others(copies: Iterable[Path], originals: Path) -> None:
    """Drop what the run has dropped; the newer things that replace it are copied already."""
    for copy in copies:
        if not (originals / copy.name).exists():
            if copy.is_dir():
                (copy / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(copy)
            else:
                copy.unlink()
