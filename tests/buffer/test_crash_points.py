"""Power is lost on each side of every durable operation; what was acknowledged is there, what was
not is there whole or not at all, and the run goes on to the same end."""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from slipstream.buffer import segments as segments_module
from slipstream.buffer.audit import audit
from slipstream.buffer.coordinator import Coordinator
from slipstream.buffer.journal import Journal
from slipstream.buffer.messages import (
    Batch,
    CheckpointSaved,
    Claims,
    ClaimSamples,
    ExtendGroup,
    FinishSamples,
    Part,
    PublishVersion,
    PutPrompts,
    ReleaseSamples,
    Reply,
    Request,
    TakeGroups,
)
from slipstream.buffer.records import Ticket
from slipstream.buffer.segments import Segments

from .conftest import SpecMaker
from .make import manifest, prompt, ticket, trajectory, version
from .test_journal import ask

POINTS = {
    "before segments.sync": 13,
    "after segments.sync": 13,
    "before ledger.commit": 20,
    "during ledger.commit": 20,
    "after ledger.commit": 20,
    "after commit": 20,
    "before compaction": 1,
    "after an unlink": 2,
    "after compaction": 1,
}
"""What is to be visited, and how often at least."""

SETTINGS: dict[str, Any] = {
    "keep_rollouts_gb": 4e-6,
    "demonstrations_per_step": 1,
    "success_reward": 1.5,
    "lease_s": 5,
}


class Life:
    """The life of a run, one request after the other; each may be repeated after a crash."""

    def __init__(self, open_: Callable[[int], Coordinator], branch: int = 0) -> None:
        self.open, self.coordinator = open_, open_(branch)
        self.claims: dict[int, Claims] = {}

    def ask(self, request: Request) -> Reply:
        return ask(self.coordinator, request)

    def put(self, first: int, number: int, samples: int = 2, *, staged: bool = False) -> None:
        tickets = []
        for uid in range(first, first + number):
            sizing = msgspec.structs.replace(ticket(0, samples).sizing, staged=staged)
            same = msgspec.structs.replace(prompt(uid), source_id=f"p/{min(uid, 3)}")
            tickets.append(Ticket(prompt=same, sizing=sizing))
        self.ask(PutPrompts(tickets=tuple(tickets)))

    def claim(self, key: int, step: int, branch: int, number: int = 4) -> None:
        request = ClaimSamples(
            worker="w", serving=version(step, branch), max_samples=number, request_id=f"{key}"
        )
        reply = self.ask(request)
        assert isinstance(reply, Claims)
        assert reply.claims
        self.claims[key] = reply

    def finish(self, key: int, step: int, branch: int, values: tuple[float, ...] = ()) -> None:
        """Hand in all samples of a claim in one message."""
        samples, leases = [], []
        for claim in self.claims[key].claims:
            for index in claim.indices:
                samples.append(
                    trajectory(
                        claim.ticket.prompt.uid,
                        index,
                        (step, step),
                        attempt=claim.attempt,
                        branch=branch,
                        value=values[len(samples)] if values else None,
                    )
                )
                leases.append(claim.lease_id)
        self.ask(FinishSamples(trajectories=tuple(samples), lease_ids=tuple(leases)))

    def release(self, key: int) -> None:
        claim = self.claims[key].claims[0]
        self.ask(
            ReleaseSamples(
                uid=claim.ticket.prompt.uid,
                attempt=claim.attempt,
                indices=claim.indices,
                lease_id=claim.lease_id,
                reason="expired",
            )
        )

    def extend(self, uid: int, samples: int) -> None:
        self.ask(ExtendGroup(uid=uid, sizing=ticket(uid, samples).sizing))

    def take(self, step: int, received: int | None = None, kind: type = Batch) -> None:
        reply = self.ask(TakeGroups(step=step, request_id="a", wait_s=0, received=received))
        assert isinstance(reply, kind), reply

    def publish(self, step: int, branch: int) -> None:
        self.ask(PublishVersion(manifest=manifest(step, branch)))

    def save(self, step: int, branch: int) -> None:
        self.ask(CheckpointSaved(version=version(step, branch), resumable_step=step))

    def expire(self, now: float) -> None:
        self.coordinator.tick(now)
        self.coordinator.commit()

    def resume(self, branch: int) -> None:
        """Close, and open again as a new branch."""
        self.coordinator.close()
        self.coordinator = self.open(branch)


SCRIPT: list[Callable[[Life], None]] = [
    lambda life: life.publish(0, 0),
    lambda life: life.put(0, 3),
    lambda life: life.claim(1, 0, 0, 6),
    lambda life: life.finish(1, 0, 0, (2.0, 0.0, 0.0, 1.0, 0.5, 0.5)),  # uid 2: no signal
    lambda life: life.take(1),
    lambda life: life.publish(1, 0),
    lambda life: life.save(1, 0),
    lambda life: life.put(3, 4),
    lambda life: life.claim(2, 1, 0, 2),
    lambda life: life.claim(3, 1, 0, 2),
    lambda life: life.claim(4, 1, 0, 2),
    lambda life: life.finish(2, 1, 0, (2.0, 0.0)),
    lambda life: life.take(2, 0, Part),
    lambda life: life.release(4),
    lambda life: life.finish(3, 1, 0),  # uid 4, the prompt of uid 3: without a success
    lambda life: life.take(2, 1, Batch),
    lambda life: life.publish(2, 0),
    lambda life: life.save(2, 0),
    lambda life: life.put(7, 1, staged=True),
    lambda life: life.claim(5, 2, 0, 6),
    lambda life: life.expire(1e6),
    lambda life: life.claim(6, 2, 0, 6),
    lambda life: life.finish(6, 2, 0),
    lambda life: life.extend(7, 3),
    lambda life: life.resume(1),
    lambda life: life.publish(2, 1),
    lambda life: life.claim(7, 2, 1, 8),
    lambda life: life.finish(7, 2, 1),
    lambda life: life.take(3),
    lambda life: life.publish(3, 1),
]
RESUMED = 24
"""Position of the resume in the script."""


@dataclass
class Snapshot:
    """What power loss leaves at one point."""

    point: str
    folder: Path
    position: int
    """Of the request in the script."""
    acknowledged: int
    """Events durable when the last reply left."""
    pending: int
    """Events of the commit under way, or just made."""
    claims: dict[int, Claims]


@dataclass
class Tape:
    """Copies the run folder on each side of every durable operation, cut to what was synced."""

    run_dir: Path
    target: Path
    snapshots: list[Snapshot] = field(default_factory=list)
    life: Life | None = None
    position: int = 0
    acknowledged: int = 0
    pending: int = 0
    synced: dict[int, int] = field(default_factory=dict)

    def cut(self, point: str, wal_bytes: int | None = None) -> None:
        """Take a copy, the write-ahead log cut to so many bytes."""
        folder = self.target / f"{len(self.snapshots):03d}"
        (folder / "segments").mkdir(parents=True)
        for path in (self.run_dir / "segments").iterdir():
            raw = path.read_bytes()[: self.synced.get(int(path.stem), 0)]
            (folder / "segments" / path.name).write_bytes(raw)
        shutil.copy(self.run_dir / "ledger.sqlite", folder)
        wal = self.run_dir / "ledger.sqlite-wal"
        if wal.exists():
            (folder / wal.name).write_bytes(wal.read_bytes()[:wal_bytes])
        claims = dict(self.life.claims) if self.life is not None else {}
        self.snapshots.append(
            Snapshot(point, folder, self.position, self.acknowledged, self.pending, claims)
        )


@pytest.fixture
def tape(tmp_path: Path, make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch) -> Tape:
    """A run of the script with a copy at every point."""
    monkeypatch.setattr(segments_module, "SEGMENT_BYTES", 2000)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    tape = Tape(run_dir, tmp_path / "copies")
    insert, sync, remove = Journal._insert, Segments.sync, Segments.remove_before
    commit, unlink = Coordinator.commit, Path.unlink

    def around(point: str, work: Callable[[], Any], then: Callable[[], None]) -> Any:
        tape.cut(f"before {point}")
        result = work()
        then()
        tape.cut(f"after {point}")
        return result

    def on_sync(self: Segments) -> None:
        if self._dirty:
            around("segments.sync", lambda: sync(self), lambda: tape.synced.update(self.synced))

    def on_insert(self: Journal, new: list[Any]) -> None:
        tape.pending = len(new)

        wal = run_dir / "ledger.sqlite-wal"
        before = wal.stat().st_size

        def torn() -> None:
            tape.cut("during ledger.commit", (before + wal.stat().st_size) // 2)

        if new:
            around("ledger.commit", lambda: insert(self, new), torn)

    def on_commit(self: Coordinator) -> int:
        sequence = commit(self)
        if tape.pending:
            tape.cut("after commit")
        tape.acknowledged, tape.pending = sequence, 0
        return sequence

    def on_remove(self: Segments, number: int) -> None:
        if number > min(self.sizes(), default=number):
            around("compaction", lambda: remove(self, number), lambda: None)

    def on_unlink(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok)
        if self.parent == run_dir / "segments":
            tape.cut("after an unlink")

    with monkeypatch.context() as patch:
        patch.setattr(Segments, "sync", on_sync)
        patch.setattr(Journal, "_insert", on_insert)
        patch.setattr(Coordinator, "commit", on_commit)
        patch.setattr(Segments, "remove_before", on_remove)
        patch.setattr(Path, "unlink", on_unlink)
        tape.life = life = Life(opener(make_spec, run_dir))
        for tape.position, request in enumerate(SCRIPT):
            request(life)
    life.coordinator.close()
    return tape


def opener(make_spec: SpecMaker, run_dir: Path) -> Callable[[int], Coordinator]:
    """Opens the run as branch 0, or as branch 1 from the checkpoint of step 2."""
    return lambda branch: Coordinator(
        make_spec(SETTINGS, run_dir=run_dir, branch=branch, resume_from=(0, 2) if branch else None),
        0.0,
    )


def outcome(coordinator: Coordinator) -> Any:
    """All that must not depend on a crash: not where payloads lie, nor names of leases."""
    state = coordinator.replay.state
    groups = {
        uid: (
            group.state,
            group.drop_reason,
            group.ends,
            [(s.state, s.attempt, s.facts) for s in group.samples],
        )
        for uid, group in state.groups.items()
    }
    shown = {uid: (each.uid, each.shown) for uid, each in state.wanted.items()}
    return groups, {step: list(taken) for step, taken in state.taken.items()}, shown, state.dropped


def test_power_loss_at_any_point_loses_nothing_acknowledged_and_changes_no_outcome(
    tape: Tape, make_spec: SpecMaker
) -> None:
    visited = Counter(snapshot.point for snapshot in tape.snapshots)
    assert {point: visited[point] for point in POINTS if visited[point] < POINTS[point]} == {}
    assert tape.life is not None
    expected = outcome(tape.life.coordinator)
    assert expected[2], "the script shows a demonstration"
    for snapshot in tape.snapshots:
        where = f"{snapshot.point}, request {snapshot.position}, {snapshot.folder.name}"
        journal = Journal(snapshot.folder, writable=False)
        stored = len(journal.events())
        journal.close()
        whole = snapshot.acknowledged + snapshot.pending
        assert stored in (snapshot.acknowledged, whole), f"{where}: half a commit"
        assert stored == whole or snapshot.point != "after ledger.commit", f"{where}: lost"
        assert stored < whole or snapshot.point != "during ledger.commit", f"{where}: torn"

        open_ = opener(make_spec, snapshot.folder)
        resuming = snapshot.position == RESUMED  # the new branch is opened again
        life = Life(open_, branch=1 if snapshot.position >= RESUMED else 0)
        life.claims = dict(snapshot.claims)
        for request in SCRIPT[snapshot.position + resuming :]:
            request(life)
        assert outcome(life.coordinator) == expected, where
        life.coordinator.close()
        report = audit(snapshot.folder, range(8))
        assert report.ok, f"{where}: {report.faults}"


def test_sync_returns_before_the_acknowledgement_leaves(
    make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fdatasync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (fdatasync(fd), order.append("synced"))[0])
    insert = Journal._insert
    monkeypatch.setattr(
        Journal, "_insert", lambda self, new: (insert(self, new), order.append("committed"))[0]
    )
    coordinator = Coordinator(make_spec(), 0.0)
    order.clear()
    ask(coordinator, PutPrompts(tickets=(ticket(0),)))
    order.append("answered")
    assert order == ["synced", "committed", "answered"]
    coordinator.close()
