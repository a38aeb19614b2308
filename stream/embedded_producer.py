"""Transactions on the embedded log, and bulk appends; see transport.Producer.

Nothing is written before `commit`, which checks and writes all in one SQLite transaction:
1. no newer producer has the id
2. the group's generation is that of the batch, the member owns the partitions; its lease is lengthened
3. positions, 4. records, 5. now and then a bounded part of what retention gives up
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice

from stream import leases
from stream.assignment import Membership
from stream.embedded_records import Columns, Partitions, delete_head, insert
from stream.errors import Fenced, Rebalanced
from stream.logfile import LogFile
from stream.transport import Position, TopicPartition

RETENTION_PAUSE_S = 5.0
DELETE_RECORDS_MAX = 20_000
_APPEND_RECORDS = 5_000
_APPEND_BYTES = 8 << 20


class EmbeddedProducer:
    """Transactions; see transport.Producer. Also the writer of bulk appends, then without an id."""

    def __init__(self, file: LogFile, lease_s: float, clock: Callable[[], float], transactional_id: str | None) -> None:
        self._id = transactional_id
        self._clock = clock
        self._lease_s = lease_s
        self._epoch = 0
        self._open = False
        self._sent: dict[int, Columns] = {}
        self._positions: dict[Membership, dict[TopicPartition, Position]] = {}
        self._retain_at_s = 0.0
        self._file = file
        try:
            self._partitions = Partitions(self._file)
            if transactional_id is not None:
                with self._file.write() as db:
                    row = "INSERT INTO producers VALUES (?, 0) ON CONFLICT (id) DO UPDATE SET epoch = epoch + 1"
                    db.execute(row, (transactional_id,))
                    self._epoch = self._stored_epoch()
        except BaseException:
            self._file.close()
            raise

    def _stored_epoch(self) -> int:
        with self._file.translated():
            epoch: int = self._file.db.execute("SELECT epoch FROM producers WHERE id = ?", (self._id,)).fetchone()[0]
        return epoch

    def _check_fence(self) -> None:
        if self._stored_epoch() != self._epoch:
            raise Fenced(f"a newer producer has the id {self._id!r}; this process must stop")

    def begin(self) -> None:
        if self._open:
            raise ValueError("begin inside an open transaction")
        self._check_fence()
        self._open = True

    def send(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, timestamp_ms: int | None = None
    ) -> None:
        self._check_open()
        number = self._partitions.id(topic, partition)
        columns = self._sent.get(number)
        if columns is None:
            columns = self._sent[number] = Columns()
        columns.timestamps.append(int(self._clock() * 1000) if timestamp_ms is None else timestamp_ms)
        columns.keys.append(key)
        columns.values.append(value)

    def flush(self) -> None:
        """Nothing to wait for: the records are written by `commit`, together with all else."""
        self._check_open()

    def send_offsets(self, positions: Mapping[TopicPartition, Position], group: object) -> None:
        self._check_open()
        if not positions:
            raise ValueError("no positions: an empty set would not fence a process that lost its partitions")
        if not isinstance(group, Membership):
            raise ValueError(f"group must be the proof of a poll (Polled.group), not {group!r}")
        self._check_fence()
        with self._file.translated():
            self._check_member(self._file.db, group, positions)
        self._positions.setdefault(group, {}).update(positions)

    def _check_member(self, db: sqlite3.Connection, group: Membership, positions: Iterable[TopicPartition]) -> None:
        if not leases.is_current(db, group):
            raise Rebalanced(f"group {group.group!r} moved on since the batch was polled")
        owned = {
            row[0]
            for row in db.execute(
                "SELECT number FROM shares WHERE group_name = ? AND owner = ?", (group.group, group.member)
            )
        }
        for partition in positions:
            if partition.partition not in owned:
                raise Rebalanced(
                    f"{partition.topic}-{partition.partition} is not owned by this member of {group.group!r}"
                )

    def commit(self) -> None:
        self._check_open()
        with self._file.write() as db:
            self._check_fence()
            for group, positions in self._positions.items():
                self._check_member(db, group, positions)
                leases.renew(db, group, self._lease_s)
                rows = [(group.group, *partition, *position) for partition, position in positions.items()]
                db.executemany("INSERT OR REPLACE INTO positions VALUES (?, ?, ?, ?, ?)", rows)
            for number, columns in self._sent.items():
                insert(db, number, columns)
            self._retain(db)
        self._clear()

    def abort(self) -> None:
        self._check_open()
        self._clear()
        self._check_fence()

    def close(self) -> None:
        """Forget what is open. Idempotent."""
        self._clear()
        self._file.close()

    def append(self, topic: str, partition: int, records: Iterable[tuple[bytes | None, bytes | None, int]]) -> int:
        """Store records in transactions of a bounded size; see transport.Transport."""
        number = self._partitions.id(topic, partition)
        source = iter(records)
        count = 0
        while True:
            columns = Columns()
            size = 0
            for key, value, timestamp_ms in islice(source, _APPEND_RECORDS):
                columns.keys.append(key)
                columns.values.append(value)
                columns.timestamps.append(timestamp_ms)
                size += len(value or b"")
                if size > _APPEND_BYTES:
                    break
            if not columns.values:
                return count
            with self._file.write() as db:
                insert(db, number, columns)
                self._retain(db)
            count += len(columns.values)

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError("no open transaction; call begin first")

    def _clear(self) -> None:
        self._open = False
        self._sent.clear()
        self._positions.clear()

    def _retain(self, db: sqlite3.Connection) -> None:
        """Now and then, delete what the topics' retention gives up; a bounded part at a time."""
        if time.monotonic() < self._retain_at_s:
            return
        self._retain_at_s = time.monotonic() + RETENTION_PAUSE_S
        now_s = self._clock()
        query = "SELECT id, end, bytes, settings FROM partitions JOIN topics ON topic = name"
        for number, end, size, text in db.execute(query).fetchall():
            settings = json.loads(text)
            keep_s = int(settings.get("retention.ms", -1)) / 1000
            keep_bytes = int(settings.get("retention.bytes", -1))
            if keep_s >= 0:
                db.execute("INSERT OR IGNORE INTO marks VALUES (?, ?, ?)", (number, end, now_s))
                old = "SELECT max(offset) FROM marks WHERE partition = ? AND at_s <= ?"
                (before,) = db.execute(old, (number, now_s - keep_s)).fetchone()
                if before is not None:
                    delete_head(db, number, before, DELETE_RECORDS_MAX)
                    db.execute("DELETE FROM marks WHERE partition = ? AND offset < ?", (number, before))
            if 0 <= keep_bytes < size:
                delete_head(db, number, end, DELETE_RECORDS_MAX, keep_bytes)
