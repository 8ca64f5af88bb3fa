"""The durable log of a run: `ledger.sqlite` (events) and `segments/` (payloads).

append(record) ... append(record), commit(events): segments are synced, then one SQLite
transaction holds the events. What `commit` has returned from survives power loss; before that
nothing of it is known to anybody, because replies leave only afterwards.
"""

import sqlite3
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from . import codec
from .errors import CorruptData
from .events import AnyEvent, Ref, columns, decode_event, encode_event
from .filesystem import naming_a_full_disk, require_local
from .segments import Segments

T = TypeVar("T")

MAX_SEQUENCE = 2**63 - 1
"""SQLite's largest integer."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    sequence INTEGER PRIMARY KEY,
    branch INTEGER NOT NULL,
    kind TEXT NOT NULL,
    uid INTEGER,
    step INTEGER,
    body BLOB NOT NULL
);
"""


class Journal:
    """The log of one run folder; one writer, any number of readers."""

    def __init__(self, run_dir: Path, *, writable: bool = True) -> None:
        """Open the log, making it when it is new.

        Args:
            run_dir: the run folder.
            writable: False to look into a run, alive or not.
        Raises:
            CorruptData: there is no ledger to read, or it is not one.
            ConfigError: a new one would be on a network file system.
        """
        path = run_dir / "ledger.sqlite"
        if not writable and not path.exists():
            raise CorruptData(f"{path} is missing: the folder holds no run")
        if writable:
            require_local(run_dir)
        self.segments = Segments(run_dir / "segments", writable=writable)
        self.branch = 0
        """Written beside each event."""
        mode = "rwc" if writable else "ro"
        self._database = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode={mode}", uri=True, isolation_level=None
        )
        try:
            if writable:
                self._database.execute("PRAGMA journal_mode = WAL")
                # FULL syncs the write-ahead log at every commit; NORMAL would lose the last ones.
                self._database.execute("PRAGMA synchronous = FULL")
                self._database.executescript(_SCHEMA)
            self.sequence = int(self._one("SELECT COALESCE(MAX(sequence), 0) FROM events"))
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise CorruptData(f"{path} is not a ledger: {error}") from error

    def _one(self, query: str, *arguments: Any) -> Any:
        row = self._database.execute(query, arguments).fetchone()
        return None if row is None else row[0]

    def append(self, record: Any) -> Ref:
        """Store a record's bytes and say where; durable with the next `commit`."""
        with naming_a_full_disk(self.segments.folder):
            return self.segments.append(codec.pack(codec.encode(record)))

    def read(self, ref: Ref, record_type: type[T]) -> T:
        """Load a stored record.

        Raises:
            CorruptData: its bytes are not those written.
        """
        return codec.decode(codec.unpack(self.segments.read(ref)), record_type)

    def intact(self, ref: Ref) -> bool:
        """Whether a payload's bytes are those written."""
        try:
            self.segments.read(ref)
        except CorruptData:
            return False
        return True

    def commit(self, new: list[AnyEvent]) -> int:
        """Make events and the payloads appended before durable: all of them, or none if it fails.

        Returns:
            The last sequence.
        """
        with naming_a_full_disk(self.segments.folder.parent):
            # Before the ledger: an event never refers to bytes that are not there.
            self.segments.sync()
            self._insert(new)
        return self.sequence

    def _insert(self, new: list[AnyEvent]) -> None:
        if new:
            rows = [
                (self.sequence + i, self.branch, *columns(event), encode_event(event))
                for i, event in enumerate(new, start=1)
            ]
            try:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", rows)
                self._database.execute("COMMIT")
            except sqlite3.Error:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
            self.sequence += len(new)

    def events(self, after: int = 0, until: int | None = None) -> list[AnyEvent]:
        """The events behind a sequence number, oldest first.

        Args:
            after: the last one that is not wanted.
            until: the last one that is; None: the newest.
        Raises:
            CorruptData: a row is not an event.
        """
        try:
            query = "SELECT body FROM events WHERE sequence > ? AND sequence <= ? ORDER BY sequence"
            span = (after, MAX_SEQUENCE if until is None else until)
            return [decode_event(body) for (body,) in self._database.execute(query, span)]
        except (sqlite3.DatabaseError, msgspec.MsgspecError) as error:
            raise CorruptData(f"the ledger holds a row that is not an event: {error}") from error

    def rows(self) -> list[tuple[int, int, str, int | None, int | None]]:
        """(sequence, branch, kind, uid, step) of every event."""
        query = "SELECT sequence, branch, kind, uid, step FROM events ORDER BY sequence"
        return self._database.execute(query).fetchall()

    def remember(self, key: str, value: str) -> str:
        """Store a fact of the run once; return what is stored (the first value)."""
        self._database.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))
        return str(self._one("SELECT value FROM meta WHERE key = ?", key))

    def close(self) -> None:
        """Close; committed events stay, others never were."""
        self.segments.close()
        self._database.close()
