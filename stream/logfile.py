"""The SQLite file under the embedded log: one lock, short transactions, and errors that say what to do.

    NAME          the database, in WAL mode with synchronous=FULL: a commit that returned survives a power cut
    NAME-wal/-shm SQLite's own
    NAME.lock     locked (flock) around every write transaction and every checkpoint, of any process
    NAME.quarantine  written when the file is found damaged; while it lies there the log refuses to open

Why the lock: SQLite before 3.51.3 can lose a WAL reset between processes that write or checkpoint at the same time.
A checkpoint runs only inside a COMMIT, or when the last connection closes; both happen under the lock.

A `LogFile` is one connection. Each consumer, producer, reader and admin has its own and is used by one thread.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stream.errors import ConfigError, Corrupt, DriftlineError, Retryable

FORMAT_VERSION = 1
_APPLICATION_ID = 0x44524654  # "DRFT"
_PAGE_BYTES = 16_384  # state blocks are 900 kB: 70 commits/s of one block and 2,000 records, 46 with 4 kB pages
_CHECKPOINT_BYTES = 16 << 20
_LOCK_POLL_S = (0.0002, 0.005)
_CLOSE_LOCK_S = 2.0
OFFSET_BITS = 44  # records.id = partition id << 44 | offset: appends and range reads run along the table's own key
OFFSET_MASK = (1 << OFFSET_BITS) - 1

_SCHEMA = """
CREATE TABLE topics (name TEXT PRIMARY KEY, settings TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE partitions (
    id INTEGER PRIMARY KEY, topic TEXT NOT NULL, number INTEGER NOT NULL,
    head INTEGER NOT NULL, end INTEGER NOT NULL, bytes INTEGER NOT NULL, UNIQUE (topic, number)
);
CREATE TABLE records (id INTEGER PRIMARY KEY, timestamp INTEGER NOT NULL, key BLOB, value BLOB);
CREATE TABLE marks (
    partition INTEGER NOT NULL, offset INTEGER NOT NULL, at_s REAL NOT NULL, PRIMARY KEY (partition, offset)
) WITHOUT ROWID;
CREATE TABLE producers (id TEXT PRIMARY KEY, epoch INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE groups (
    name TEXT PRIMARY KEY, generation INTEGER NOT NULL, revision INTEGER NOT NULL, topics TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE members (
    group_name TEXT NOT NULL, member TEXT NOT NULL, expires_s REAL NOT NULL,
    host TEXT NOT NULL, pid INTEGER NOT NULL, started INTEGER NOT NULL, PRIMARY KEY (group_name, member)
) WITHOUT ROWID;
CREATE TABLE shares (
    group_name TEXT NOT NULL, number INTEGER NOT NULL, owner TEXT, target TEXT, PRIMARY KEY (group_name, number)
) WITHOUT ROWID;
CREATE TABLE positions (
    group_name TEXT NOT NULL, topic TEXT NOT NULL, number INTEGER NOT NULL,
    offset INTEGER NOT NULL, metadata TEXT NOT NULL, PRIMARY KEY (group_name, topic, number)
) WITHOUT ROWID;
"""


class LogFile:
    """One connection to the file, with the lock that every write takes."""

    def __init__(self, path: Path, *, lock_timeout_s: float) -> None:
        """Open the file and create it where it is missing.

        Raises:
            ConfigError: the path cannot be used, or holds something else.
            Corrupt: the file is damaged or in quarantine.
        """
        self.path = path
        self._lock_timeout_s = lock_timeout_s
        self._lock_path = path.with_name(path.name + ".lock")
        self._quarantine_path = path.with_name(path.name + ".quarantine")
        self._refuse_quarantined()
        self._was_log = self._lock_path.exists()
        try:
            self._lock_fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot open the embedded log {path}: {error.strerror}; check the path") from None
        self._close_lock = weakref.finalize(self, os.close, self._lock_fd)
        try:
            self.db = sqlite3.connect(path, timeout=lock_timeout_s, isolation_level=None, cached_statements=64)
            with self.translated(), self._locked(lock_timeout_s):
                self._prepare()
        except BaseException:
            if hasattr(self, "db"):
                self.db.close()
            self._close_lock()
            raise

    def _prepare(self) -> None:
        db = self.db
        (application,) = db.execute("PRAGMA application_id").fetchone()
        if (application, *db.execute("SELECT count(*) FROM sqlite_master").fetchone()) == (0, 0):
            db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.execute("PRAGMA journal_mode = WAL")
            script = f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {FORMAT_VERSION}; {_SCHEMA}"
            db.executescript(f"BEGIN IMMEDIATE; {script} COMMIT;")
        elif application != _APPLICATION_ID:
            raise ConfigError(f"{self.path} is a SQLite file of something else; choose another path for the log")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{self.path} has format {version}, this release reads {FORMAT_VERSION}; "
                "use the release that wrote it, or start a new file"
            )
        db.execute("PRAGMA synchronous = FULL")
        (page_bytes,) = db.execute("PRAGMA page_size").fetchone()
        db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_BYTES // page_bytes}")
        db.execute(f"PRAGMA journal_size_limit = {2 * _CHECKPOINT_BYTES}")
        db.execute("PRAGMA cache_size = -16000")

    def _refuse_quarantined(self) -> None:
        if self._quarantine_path.exists():
            reason = self._quarantine_path.read_text(errors="replace").strip()
            raise Corrupt(
                f"the embedded log {self.path} is in quarantine: {reason}. Keep a copy of it and its -wal file; "
                f"recover what can be read with `sqlite3 {self.path} .recover | sqlite3 NEW`, or move it away to start "
                f"anew; then delete {self._quarantine_path}"
            )

    def quarantine(self, reason: str) -> Corrupt:
        """Mark the file as damaged, so that nobody writes to it again; the error to raise."""
        reason = " ".join(reason.split())
        self._quarantine_path.write_text(reason + "\n")
        return Corrupt(
            f"the embedded log {self.path} is damaged: {reason}. Nothing more is written to it; "
            f"see {self._quarantine_path} and open it again for what to do"
        )

    def check(self, full_bytes_max: int) -> None:
        """Look for damage: every page of a file up to `full_bytes_max`, and the ends of every partition.

        Raises:
            Corrupt: there is damage; the file is in quarantine now.
        """
        with self.translated():
            if self.path.stat().st_size <= full_bytes_max:
                (answer,) = self.db.execute("PRAGMA quick_check(1)").fetchone()
                if answer != "ok":
                    raise self.quarantine(f"integrity check: {answer}")
            self.db.execute("BEGIN")
            try:
                for number, topic, partition, head, end in self.db.execute(
                    "SELECT id, topic, number, head, end FROM partitions"
                ).fetchall():
                    base = number << OFFSET_BITS
                    span = (base, base | OFFSET_MASK)
                    count = "SELECT min(id), max(id) FROM records WHERE id BETWEEN ? AND ?"
                    first, last = self.db.execute(count, span).fetchone()
                    expected = (None, None) if head == end else (base + head, base + end - 1)
                    if (first, last) != expected:
                        raise self.quarantine(f"records of {topic}-{partition} do not match its bounds {head}..{end}")
            finally:
                self.db.execute("ROLLBACK")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A write transaction under the lock: all of the block is stored durably on leaving it, or nothing is."""
        with self.translated(), self._locked(self._lock_timeout_s):
            self._refuse_quarantined()
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise

    @contextmanager
    def translated(self) -> Iterator[None]:
        """SQLite's errors as ours."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._translate(error) from error

    def _translate(self, error: sqlite3.Error) -> DriftlineError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT):
            if code == sqlite3.SQLITE_NOTADB and not self._was_log:
                return ConfigError(f"{self.path} is not a log of ours; choose another path, or move the file away")
            return self.quarantine(str(error))
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            free_mb = shutil.disk_usage(self.path.parent).free >> 20
            return Retryable(
                f"cannot write to the embedded log {self.path} ({error}; {free_mb} MB free on its disk): "
                "nothing of this attempt is stored; free space or lift the file-size limit, then go on"
            )
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
            return ConfigError(f"cannot use the embedded log {self.path}: {error}; check the path and its rights")
        return Retryable(f"the embedded log {self.path} did not answer: {error}")

    @contextmanager
    def _locked(self, timeout_s: float) -> Iterator[None]:
        until_s = time.monotonic() + timeout_s
        pause_s = _LOCK_POLL_S[0]
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until_s:
                    raise Retryable(
                        f"another process has held {self._lock_path} for {timeout_s:g} s; "
                        f"if it hangs (see `fuser {self._lock_path}`), end it"
                    ) from None
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LOCK_POLL_S[1])
        try:
            yield
        finally:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def data_version(self) -> int:
        """Changes whenever another connection commits; costs a few microseconds."""
        version: int = self.db.execute("PRAGMA data_version").fetchone()[0]
        return version

    def vacuum(self, pages_max: int) -> None:
        """Give a bounded part of the free space back to the disk once a quarter of the file is free."""
        (free,) = self.db.execute("PRAGMA freelist_count").fetchone()
        (pages,) = self.db.execute("PRAGMA page_count").fetchone()
        if free > pages_max // 4 and 4 * free > pages:
            with self.translated(), self._locked(self._lock_timeout_s):
                # Not `execute`: this pragma frees a page a step and `execute` takes one step only.
                self.db.executescript(f"PRAGMA incremental_vacuum({pages_max})")

    def close(self) -> None:
        """Close the connection; the last one to close writes the WAL back, so it takes the lock if it can."""
        if self._close_lock.alive:
            try:
                with self._locked(_CLOSE_LOCK_S):
                    self.db.close()
            except Retryable:  # the holder has a connection of its own, so ours is not the last one
                self.db.close()
            self._close_lock()
