"""Checkpoints: what a run continues from after anything, power loss included.

A checkpoint is a folder `checkpoints/step-000010.b0` that counts only once its `manifest.json` is
in place: files, fsync each, fsync the folder, then the manifest renamed into it. The newest
manifest whose files still have their digests wins. Knows nothing of tensors: the caller brings a
writer for each file, so that launcher and audit read checkpoints without torch.
"""

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..buffer.errors import ConfigError, CorruptData, TrainingFailed
from ..buffer.mailbox import file_digest
from ..buffer.records import Version

MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"
"""Under LoRA, beside the merged weights; peft's own name and format."""
SCHEMA = 1
CRASH_VARIABLE = "SLIPSTREAM_CRASH_AT"

_visits: Counter[str] = Counter()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint, as its manifest describes it."""

    folder: Path
    version: Version
    journal_sequence: int
    """What the buffer service's ledger had reached when the step's batch was taken."""
    saved_at: float
    """Wall-clock seconds since the epoch."""
    info: dict[str, Any]
    """Lineage: run id, model folder, dtype."""


def crash_point(name: str) -> None:
    """Die here, as by `kill -9`, when SLIPSTREAM_CRASH_AT is `name`, or `name:n` at the n-th visit.

    For tests of what a crash leaves behind; does nothing otherwise.
    """
    wanted, _, count = os.environ.get(CRASH_VARIABLE, "").partition(":")
    if wanted == name:
        _visits[name] += 1
        if _visits[name] >= int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def folder_name(version: Version) -> str:
    """`step-000010.b0`."""
    return f"step-{version.step:06d}.b{version.branch}"


def save_checkpoint(
    root: Path,
    version: Version,
    writers: Mapping[str, Callable[[Path], object]],
    *,
    journal_sequence: int,
    info: Mapping[str, Any],
    keep_last: int,
    keep: Callable[[int, int], bool] = lambda branch, step: False,
    first: bool = True,
    exchange: Callable[[Any], list[Any]] = lambda value: [value],
) -> Checkpoint:
    """Write a checkpoint, durable on return, and then remove older ones.

    Several processes may write its files: the first one of them makes the folder before, and the
    manifest after all files are durable.

    Args:
        root: the run's `checkpoints` folder.
        version: the published version whose weights these are.
        writers: file name -> function that writes the file at the path it is given.
        journal_sequence: goes into the manifest.
        info: lineage, plain data; goes into the manifest.
        keep_last: complete checkpoints to keep; that of step 0, what the run started from and the
            reference of a KL term, stays besides.
        keep: by branch and step, which to keep besides; asked when the new one is complete.
        first: whether this process commits; of several exactly one does.
        exchange: what it is given, of all processes; returns when all have called it.
    Raises:
        TrainingFailed: the disk is full, or the folder cannot be written; what was written of it is
            removed, and earlier checkpoints are as they were.
    """
    folder = root / folder_name(version)
    checkpoint = Checkpoint(
        folder=folder,
        version=version,
        journal_sequence=journal_sequence,
        saved_at=time.time(),
        info=dict(info),
    )
    try:
        with _named(folder, exchange):
            _make_folder(folder, first)
        files: dict[str, Any] = {}
        with _named(folder, exchange):
            files = _write_files(folder, writers)
        for each in exchange(files):
            files |= each
        with _named(folder, exchange):
            if first:
                _sync(folder)
                crash_point("checkpoint.files_synced")
                _write_manifest(checkpoint, files)
    except TrainingFailed:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if first:
        _prune(root, keep_last, keep)
        crash_point("checkpoint.pruned")
    return checkpoint


@contextmanager
def _named(folder: Path, exchange: Callable[[Any], list[Any]]) -> Iterator[None]:
    """Do a part of the saving; when it fails in one process, it fails in all.

    Raises:
        TrainingFailed: says why, and what is left.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is: the others wait for us
        problem = error
    problems = [each for each in exchange(problem and (str(problem) or repr(problem))) if each]
    if problems:
        earlier = next((f.name for f in complete_folders(folder.parent) if f != folder), "none")
        raise TrainingFailed(
            f"checkpoint {folder} cannot be written: {problems[0]} ({_free_space(folder.parent)}). "
            f"Newest earlier checkpoint: {earlier}. Make room or mend the folder, then "
            "`slipstream resume` the run"
        ) from problem


def _make_folder(folder: Path, first: bool) -> None:
    if first:
        shutil.rmtree(folder, ignore_errors=True)  # what a crash left of it, if anything
        crash_point("checkpoint.begun")
        folder.mkdir(parents=True)
        crash_point("checkpoint.folder_made")


def _write_files(
    folder: Path, writers: Mapping[str, Callable[[Path], object]]
) -> dict[str, dict[str, Any]]:
    """This process's files, durable; returns what the manifest says of each."""
    files = {}
    for name, write in writers.items():
        write(folder / name)
        crash_point(f"checkpoint.file_written.{name}")
        _sync(folder / name)
        num_bytes, digest = file_digest(folder / name)
        files[name] = {"bytes": num_bytes, "digest": digest}
        crash_point(f"checkpoint.file_synced.{name}")
    return files


def _free_space(root: Path) -> str:
    try:
        return f"{shutil.disk_usage(root).free:,} bytes free there"
    except OSError:
        return "no such folder"


def _write_manifest(checkpoint: Checkpoint, files: dict[str, dict[str, Any]]) -> None:
    """The atomic moment: before the rename the checkpoint does not exist, after it it does."""
    body = {
        "schema": SCHEMA,
        "branch": checkpoint.version.branch,
        "step": checkpoint.version.step,
        "digest": checkpoint.version.digest,
        "journal_sequence": checkpoint.journal_sequence,
        "saved_at": checkpoint.saved_at,
        "info": checkpoint.info,
        "files": files,
    }
    body["manifest_digest"] = _json_digest(body)
    temporary = checkpoint.folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")
    crash_point("checkpoint.manifest_drafted")
    _sync(temporary)
    crash_point("checkpoint.manifest_written")
    temporary.replace(checkpoint.folder / MANIFEST)
    crash_point("checkpoint.manifest_renamed")
    _sync(checkpoint.folder)
    crash_point("checkpoint.folder_synced")
    _sync(checkpoint.folder.parent)
    crash_point("checkpoint.manifest_synced")


def read_checkpoint(folder: Path, *, checked: bool = False) -> Checkpoint:
    """Open a checkpoint after checking every byte of it; `checked`: another rank does that.

    Raises:
        CorruptData: no manifest, or a file that is missing, cut or altered; says which.
    """
    try:
        body = json.loads((folder / MANIFEST).read_text())
        stated = body.pop("manifest_digest")
        files, schema = body["files"], body["schema"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CorruptData(f"{folder / MANIFEST} cannot be read: {error!r}") from error
    if schema != SCHEMA or stated != _json_digest(body):
        raise CorruptData(f"{folder / MANIFEST} was altered, or written by another version of us")
    for name, expected in () if checked else files.items():
        path = folder / name
        if not path.is_file():
            raise CorruptData(f"{path} is missing")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise CorruptData(f"{path} has {size} bytes of {expected['bytes']}: it was cut short")
        if file_digest(path)[1] != expected["digest"]:
            raise CorruptData(f"{path} was altered: its digest is not the one it was saved with")
    return Checkpoint(
        folder=folder,
        version=Version(branch=body["branch"], step=body["step"], digest=body["digest"]),
        journal_sequence=body["journal_sequence"],
        saved_at=body["saved_at"],
        info=body["info"],
    )


def find_checkpoint(
    root: Path, wanted: tuple[int, int] | None = None, ledger_sequence: int | None = None
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint to continue from, and what was wrong with newer ones.

    Args:
        root: the run's `checkpoints` folder.
        wanted: (branch, step); None for the newest that verifies.
        ledger_sequence: what the ledger ends with; a checkpoint of steps that it has not seen (in a
            copy that was cut short) would train them again.
    Raises:
        CorruptData: the wanted one is damaged, or all are; says how and what to do.
        ConfigError: there is none.
    """
    folders = [root / folder_name(Version(branch=wanted[0], step=wanted[1]))] if wanted else []
    problems: list[str] = []
    for folder in folders or complete_folders(root):
        try:
            found = read_checkpoint(folder)
        except CorruptData as error:
            problems.append(str(error))
            continue
        if ledger_sequence is None or found.journal_sequence <= ledger_sequence:
            return found, problems
        problems.append(f"{folder} is newer than the ledger beside it")
    if problems:
        raise CorruptData(
            f"no usable checkpoint in {root}: {'; '.join(problems)}. Restore the files from a "
            "copy, or start the run again"
        )
    raise ConfigError(f"{root} holds no checkpoint: the run has to be started, not resumed")


def complete_folders(root: Path) -> list[Path]:
    """Checkpoint folders that have a manifest, newest (branch, step) first; unverified."""
    found = {}
    for manifest in root.glob(f"step-*.b*/{MANIFEST}"):
        step, _, branch = manifest.parent.name.removeprefix("step-").partition(".b")
        if step.isdigit() and branch.isdigit():
            found[int(branch), int(step)] = manifest.parent
    return [found[key] for key in sorted(found, reverse=True)]


def resumable_step(root: Path, keep_last: int) -> int:
    """The oldest step from which a resume starts while one of the `keep_last` newest verifies."""
    steps = [branch_and_step(folder)[1] for folder in complete_folders(root)]
    return min([step for step in steps if step][:keep_last], default=0)


def branch_and_step(folder: Path) -> tuple[int, int]:
    """Of a checkpoint, by its folder's name."""
    step, _, branch = folder.name.removeprefix("step-").partition(".b")
    return int(branch), int(step)


def _prune(root: Path, keep_last: int, keep: Callable[[int, int], bool]) -> None:
    """Remove what is not kept; the manifest goes first, so that no half of one counts."""
    places = {folder: branch_and_step(folder) for folder in complete_folders(root)}
    kept = [folder for folder, (_, step) in places.items() if step][:keep_last]
    kept += [folder for folder, place in places.items() if place[1] == 0 or keep(*place)]
    for folder in root.glob("step-*.b*"):
        if folder in kept:
            continue
        (folder / MANIFEST).unlink(missing_ok=True)
        crash_point("checkpoint.pruning")
        shutil.rmtree(folder)


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_digest(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
