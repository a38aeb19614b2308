"""The records table of the embedded log: look up partitions, read, append and delete rows.

The functions run inside the caller's write transaction.
"""

from __future__ import annotations

import sqlite3
from functools import partial

from stream.errors import ConfigError
from stream.logfile import OFFSET_BITS, OFFSET_MASK, LogFile
from stream.transport import LogRecord, TopicPartition

READ_BYTES_MAX = 32 << 20

_new_record = partial(tuple.__new__, LogRecord)


class Partitions:
    """Ids of partitions, looked up once: a topic is never changed or removed."""

    def __init__(self, file: LogFile) -> None:
        self._file = file
        self._ids: dict[tuple[str, int], int] = {}

    def id(self, topic: str, number: int) -> int:
        known = self._ids.get((topic, number))
        if known is not None:
            return known
        with self._file.translated():
            query = "SELECT id FROM partitions WHERE topic = ? AND number = ?"
            row = self._file.db.execute(query, (topic, number)).fetchone()
            (count,) = self._file.db.execute("SELECT count(*) FROM partitions WHERE topic = ?", (topic,)).fetchone()
        if row is None:
            problem = f"has {count} partitions, there is no number {number}" if count else "is missing"
            raise ConfigError(f"topic {topic!r} {problem}; create it with `driftline topics create`")
        found: int = row[0]
        self._ids[topic, number] = found
        return found

    def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        query = "SELECT head, end FROM partitions WHERE id = ?"
        with self._file.translated():
            head, end = self._file.db.execute(query, (self.id(*partition),)).fetchone()
        return head, end

    def offset_at(self, partition: TopicPartition, timestamp_ms: int) -> int:
        """The first record of this timestamp or a later one, by a walk through the partition; else its end."""
        base = self.id(*partition) << OFFSET_BITS
        query = (
            f"SELECT id & {OFFSET_MASK} FROM records WHERE id BETWEEN ? AND ? AND timestamp >= ? ORDER BY id LIMIT 1"
        )
        with self._file.translated():
            row = self._file.db.execute(query, (base, base | OFFSET_MASK, timestamp_ms)).fetchone()
        return int(row[0]) if row else self.bounds(partition)[1]

    def read(self, partition: TopicPartition, offset: int, records_max: int) -> list[LogRecord]:
        """Records from `offset` on, up to `records_max` of them or about `READ_BYTES_MAX` bytes."""
        base = self.id(*partition) << OFFSET_BITS
        found: list[LogRecord] = []
        size = 0
        with self._file.translated():
            rows = self._file.db.execute(
                f"SELECT ?, ?, id & {OFFSET_MASK}, timestamp, key, value FROM records "
                "WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?",
                (*partition, base + offset, base | OFFSET_MASK, records_max),
            )
            for row in rows:
                found.append(_new_record(row))
                if row[5] is not None:
                    size += len(row[5])
                    if size > READ_BYTES_MAX:
                        break
            rows.close()
        return found


class Columns:
    """The records of one partition in an open transaction."""

    __slots__ = ("keys", "timestamps", "values")

    def __init__(self) -> None:
        self.timestamps: list[int] = []
        self.keys: list[bytes | None] = []
        self.values: list[bytes | None] = []


def insert(db: sqlite3.Connection, number: int, columns: Columns) -> None:
    """Append to a partition; its offsets go on without a hole."""
    (end,) = db.execute("SELECT end FROM partitions WHERE id = ?", (number,)).fetchone()
    count = len(columns.values)
    first = (number << OFFSET_BITS) + end
    ids = range(first, first + count)
    rows = zip(ids, columns.timestamps, columns.keys, columns.values, strict=True)
    db.executemany("INSERT INTO records VALUES (?, ?, ?, ?)", rows)
    size = sum(map(len, filter(None, columns.keys))) + sum(map(len, filter(None, columns.values)))
    change = "UPDATE partitions SET end = end + ?, bytes = bytes + ? WHERE id = ?"
    db.execute(change, (count, size, number))


def delete_head(
    db: sqlite3.Connection, number: int, before: int, records_max: int, keep_bytes: int | None = None
) -> bool:
    """Delete up to `records_max` records below `before`, oldest first; whether more are left to delete.

    With `keep_bytes` the newest records of so many bytes stay, whatever `before` says.
    """
    head, end, size = db.execute("SELECT head, end, bytes FROM partitions WHERE id = ?", (number,)).fetchone()
    base = number << OFFSET_BITS
    before = min(before, end)
    stop = min(before, head + records_max)
    lengths = db.execute(
        "SELECT ifnull(length(key), 0) + ifnull(length(value), 0) FROM records WHERE id BETWEEN ? AND ? ORDER BY id",
        (base + head, base + stop - 1),
    ).fetchall()
    deleted = 0
    for n, (length,) in enumerate(lengths):
        if keep_bytes is not None and size - deleted <= keep_bytes:
            stop = before = head + n
            break
        deleted += length
    if stop > head:
        db.execute("DELETE FROM records WHERE id BETWEEN ? AND ?", (base + head, base + stop - 1))
        db.execute("UPDATE partitions SET head = ?, bytes = bytes - ? WHERE id = ?", (stop, deleted, number))
    return bool(stop < before)
