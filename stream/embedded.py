"""The embedded log: Kafka's promises in one SQLite file on this machine, for any number of processes.

A producer keeps a transaction in memory; `commit` writes its records, the consumed positions and the lengthened lease
in ONE SQLite transaction, in which it also checks that no newer producer has its id, that the group's generation is
still that of the batch and that the member owns the partitions. So nothing is ever half visible, offsets are dense,
there are no open transactions to wait for, and whoever was stopped in the middle stores nothing.

Consumers wait by looking at SQLite's data version every few milliseconds. Retention: `retention.ms` counts from the
moment of the append (records may carry old event times), `retention.bytes` counts keys and values of a partition.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from stream import leases
from stream.assignment import Membership, reset_position
from stream.errors import ConfigError, Fenced, Rebalanced, Retryable
from stream.logfile import OFFSET_BITS, OFFSET_MASK, LogFile
from stream.transport import LogRecord, Polled, Position, TopicPartition, TopicSpec

_POLL_PAUSE_S = (0.0005, 0.01)
_READ_BYTES_MAX = 32 << 20
_APPEND_RECORDS = 5_000
_APPEND_BYTES = 8 << 20
_RETENTION_PAUSE_S = 5.0
_RETENTION_RECORDS = 20_000
_VACUUM_PAGES = 1_024
_CHECK_MEMBERS_S = 1.0

_new_record = partial(tuple.__new__, LogRecord)


class EmbeddedLog:
    """The log in one file; see transport.Transport."""

    name = "embedded"

    def __init__(
        self,
        path: Path,
        *,
        lease_s: float = 30.0,
        lock_timeout_s: float = 10.0,
        check_bytes_max: int = 256 << 20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the log and create the file where it is missing; look for damage.

        Args:
            path: the database file; its folder is created.
            lease_s: a member that neither polls nor commits for so long loses its partitions.
            lock_timeout_s: how long a write waits for another process.
            check_bytes_max: larger files are checked at the ends of their partitions only.
            clock: wall time in seconds, for timestamps and retention.

        Raises:
            ConfigError: the path cannot be used, or holds something else.
            Corrupt: the file is damaged or in quarantine.
        """
        self.path = path
        self.lease_s = lease_s
        self.clock = clock
        self._lock_timeout_s = lock_timeout_s
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create the folder of the embedded log {path}: {error.strerror}") from None
        self._file = self.open_file()
        try:
            self._file.check(check_bytes_max)
        except BaseException:
            self._file.close()
            raise
        self._writer: EmbeddedProducer | None = None

    def open_file(self) -> LogFile:
        return LogFile(self.path, lock_timeout_s=self._lock_timeout_s)

    def admin(self) -> EmbeddedAdmin:
        return EmbeddedAdmin(self)

    def consumer(self, *, group: str, topics: Sequence[str], reset: str = "earliest") -> EmbeddedConsumer:
        return EmbeddedConsumer(self, group, tuple(topics), reset)

    def producer(self, *, transactional_id: str) -> EmbeddedProducer:
        return EmbeddedProducer(self, transactional_id)

    def reader(self) -> EmbeddedReader:
        return EmbeddedReader(self)

    def append(self, topic: str, partition: int, records: Iterable[tuple[bytes | None, bytes | None, int]]) -> int:
        if self._writer is None:
            self._writer = EmbeddedProducer(self, None)
        return self._writer.append(topic, partition, records)

    def close(self) -> None:
        """Close the log's own connection; what was created from it is closed by its owner. Idempotent."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._file.close()


class _Partitions:
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

    def read(self, partition: TopicPartition, offset: int, records_max: int) -> list[LogRecord]:
        """Records from `offset` on, up to `records_max` of them or about `_READ_BYTES_MAX` bytes."""
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
                    if size > _READ_BYTES_MAX:
                        break
            rows.close()
        return found


class EmbeddedConsumer:
    """A member of a group; see transport.GroupConsumer."""

    def __init__(self, log: EmbeddedLog, group: str, topics: tuple[str, ...], reset: str) -> None:
        if reset not in ("earliest", "latest", "none"):
            raise ConfigError(f"reset is earliest, latest or none, not {reset!r}")
        self._lease_s = log.lease_s
        self._topics = topics
        self._reset = reset
        self._positions: dict[TopicPartition, int | None] = {}
        self._paused: set[TopicPartition] = set()
        self._turn = 0
        self._closed = False
        self._seen: tuple[int, int] = (-1, -1)  # data version of the file, revision of the group
        self._renew_at_s = 0.0
        self._check_at_s = 0.0
        self._file = log.open_file()
        try:
            self._partitions = _Partitions(self._file)
            with self._file.write() as db:
                self._membership = leases.join(db, group, topics, self._lease_s)
        except BaseException:
            self._file.close()
            raise

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        if self._closed:
            raise ValueError("the consumer is closed")
        until_s = time.monotonic() + timeout_s
        pause_s = _POLL_PAUSE_S[0]
        fetch = True
        while True:
            now_s = time.monotonic()
            version = self._file.data_version()
            if version != self._seen[0] or now_s >= min(self._renew_at_s, self._check_at_s):
                assigned, revoked = self._follow_group(version, now_s)
                if assigned or revoked:
                    return Polled(group=self._membership, assigned=assigned, revoked=revoked)
                fetch = True
            if fetch and (records := self._fetch(max_records)):
                return Polled(group=self._membership, records=records)
            fetch = False
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return Polled(group=self._membership)
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _POLL_PAUSE_S[1])

    def _follow_group(
        self, version: int, now_s: float
    ) -> tuple[tuple[TopicPartition, ...], tuple[TopicPartition, ...]]:
        """Notice changes of the group and keep the lease; writes only where there is something to write."""
        group, _, member = self._membership
        with self._file.translated():
            db = self._file.db
            query = "SELECT revision, (SELECT count(*) FROM members WHERE group_name = name AND member = ?) FROM groups"
            revision, living = db.execute(query + " WHERE name = ?", (member, group)).fetchone()
            others_gone = False
            if now_s >= self._check_at_s:
                self._check_at_s = now_s + min(_CHECK_MEMBERS_S, self._lease_s / 4)
                others_gone = any(other != member for other in leases.gone(db, group, self._lease_s))
        if living and revision == self._seen[1] and not others_gone and now_s < self._renew_at_s:
            self._seen = (version, revision)
            return (), ()
        return self._sync(version)

    def _sync(self, version: int) -> tuple[tuple[TopicPartition, ...], tuple[TopicPartition, ...]]:
        group, _, member = self._membership
        with self._file.write() as db:
            leases.evict(db, group, self._lease_s, spare=member)
            lost = not leases.renew(db, self._membership, self._lease_s)
            if lost:
                member = leases.join(db, group, self._topics, self._lease_s).member
            taken, given = leases.hand_over(db, group, member)
            query = "SELECT generation, revision FROM groups WHERE name = ?"
            generation, revision = db.execute(query, (group,)).fetchone()
            found = db.execute("SELECT topic, number FROM partitions ORDER BY topic, number").fetchall()
        self._membership = Membership(group, generation, member)
        self._seen = (version, revision)
        self._renew_at_s = time.monotonic() + self._lease_s / 3
        revoked = tuple(p for p in self._positions if lost or p.partition in given)
        assigned = tuple(TopicPartition(*p) for p in found if p[0] in self._topics and p[1] in taken)
        for partition in revoked:
            del self._positions[partition]
        self._paused &= self._positions.keys()
        self._positions.update(dict.fromkeys(assigned))
        self._paused.update(assigned)
        return assigned, revoked

    def _fetch(self, max_records: int) -> dict[TopicPartition, Sequence[LogRecord]]:
        active = [p for p in self._positions if p not in self._paused]
        records: dict[TopicPartition, Sequence[LogRecord]] = {}
        room = max_records
        self._turn += 1
        for n in range(len(active)):
            partition = active[(self._turn + n) % len(active)]
            head, end = self._partitions.bounds(partition)
            position = self._place(partition, head, end)
            if position < end and room > 0:
                found = self._partitions.read(partition, position, -(-room // (len(active) - n)))
                if found:
                    records[partition] = found
                    room -= len(found)
                    self._positions[partition] = found[-1].offset + 1
        return records

    def _place(self, partition: TopicPartition, head: int, end: int) -> int:
        """The position to read at, after the reset rule where there is none or it is out of range."""
        position = self._positions[partition]
        if position is None:
            stored = self.committed([partition])[partition]
            position = stored.offset if stored else -1
        if not head <= position <= end:
            position = reset_position(self._reset, partition, position, head, end)
        self._positions[partition] = position
        return position

    def pause(self, partitions: Sequence[TopicPartition]) -> None:
        self._paused.update(self._owned(partitions))

    def resume(self, partitions: Sequence[TopicPartition]) -> None:
        self._paused.difference_update(self._owned(partitions))

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._owned([partition])
        self._positions[partition] = offset

    def _owned(self, partitions: Sequence[TopicPartition]) -> Sequence[TopicPartition]:
        for partition in partitions:
            if partition not in self._positions:
                raise ValueError(f"{partition.topic}-{partition.partition} is not assigned to this consumer")
        return partitions

    def committed(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Position | None]:
        query = "SELECT offset, metadata FROM positions WHERE group_name = ? AND topic = ? AND number = ?"
        found: dict[TopicPartition, Position | None] = {}
        with self._file.translated():
            for partition in partitions:
                row = self._file.db.execute(query, (self._membership.group, *partition)).fetchone()
                found[partition] = Position(*row) if row else None
        return found

    def lag(self) -> dict[TopicPartition, int]:
        return {
            partition: max(0, self._partitions.bounds(partition)[1] - position)
            for partition, position in self._positions.items()
            if position is not None
        }

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            with self._file.write() as db:
                leases.leave(db, self._membership.group, self._membership.member)
        except Retryable:
            pass  # the lease runs out by itself
        finally:
            self._file.close()


class _Columns:
    """The records of one partition in an open transaction."""

    __slots__ = ("keys", "timestamps", "values")

    def __init__(self) -> None:
        self.timestamps: list[int] = []
        self.keys: list[bytes | None] = []
        self.values: list[bytes | None] = []


class EmbeddedProducer:
    """Transactions; see transport.Producer. Also the writer of bulk appends, then without an id."""

    def __init__(self, log: EmbeddedLog, transactional_id: str | None) -> None:
        self._id = transactional_id
        self._clock = log.clock
        self._lease_s = log.lease_s
        self._epoch = 0
        self._open = False
        self._sent: dict[int, _Columns] = {}
        self._positions: dict[Membership, dict[TopicPartition, Position]] = {}
        self._retain_at_s = 0.0
        self._file = log.open_file()
        try:
            self._partitions = _Partitions(self._file)
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
            columns = self._sent[number] = _Columns()
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
                self._insert(db, number, columns)
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
            columns = _Columns()
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
                self._insert(db, number, columns)
                self._retain(db)
            count += len(columns.values)

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError("no open transaction; call begin first")

    def _clear(self) -> None:
        self._open = False
        self._sent.clear()
        self._positions.clear()

    def _insert(self, db: sqlite3.Connection, number: int, columns: _Columns) -> None:
        (end,) = db.execute("SELECT end FROM partitions WHERE id = ?", (number,)).fetchone()
        count = len(columns.values)
        first = (number << OFFSET_BITS) + end
        ids = range(first, first + count)
        rows = zip(ids, columns.timestamps, columns.keys, columns.values, strict=True)
        db.executemany("INSERT INTO records VALUES (?, ?, ?, ?)", rows)
        size = sum(map(len, filter(None, columns.keys))) + sum(map(len, filter(None, columns.values)))
        change = "UPDATE partitions SET end = end + ?, bytes = bytes + ? WHERE id = ?"
        db.execute(change, (count, size, number))

    def _retain(self, db: sqlite3.Connection) -> None:
        """Now and then, delete what the topics' retention gives up; a bounded part at a time."""
        if time.monotonic() < self._retain_at_s:
            return
        self._retain_at_s = time.monotonic() + _RETENTION_PAUSE_S
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
                    delete_head(db, number, before, _RETENTION_RECORDS)
                    db.execute("DELETE FROM marks WHERE partition = ? AND offset < ?", (number, before))
            if 0 <= keep_bytes < size:
                delete_head(db, number, end, _RETENTION_RECORDS, keep_bytes)


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


class EmbeddedReader:
    """Reads committed records; see transport.LogReader."""

    def __init__(self, log: EmbeddedLog) -> None:
        self._file = log.open_file()
        self._partitions = _Partitions(self._file)

    def read(
        self, partition: TopicPartition, offset: int, timeout_s: float, max_records: int = 1_000
    ) -> list[LogRecord]:
        until_s = time.monotonic() + timeout_s
        pause_s = _POLL_PAUSE_S[0]
        version = None
        while True:
            if (seen := self._file.data_version()) != version:
                version = seen
                if records := self._partitions.read(partition, max(offset, 0), max_records):
                    return records
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return []
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _POLL_PAUSE_S[1])

    def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        return self._partitions.bounds(partition)

    def close(self) -> None:
        self._file.close()


class EmbeddedAdmin:
    """Topics and retention; see transport.Admin."""

    def __init__(self, log: EmbeddedLog) -> None:
        self._file = log.open_file()
        self._partitions = _Partitions(self._file)

    def create(self, specs: Sequence[TopicSpec]) -> list[str]:
        created = []
        with self._file.write() as db:
            for spec in specs:
                if spec.partitions < 1:
                    raise ConfigError(f"topic {spec.name!r} needs at least one partition, not {spec.partitions}")
                row = (spec.name, json.dumps(dict(spec.settings)))
                if db.execute("INSERT OR IGNORE INTO topics VALUES (?, ?)", row).rowcount:
                    new = "INSERT INTO partitions (topic, number, head, end, bytes) VALUES (?, ?, 0, 0, 0)"
                    db.executemany(new, [(spec.name, number) for number in range(spec.partitions)])
                    created.append(spec.name)
        return created

    def describe(self, names: Sequence[str]) -> dict[str, TopicSpec | None]:
        query = "SELECT settings, (SELECT count(*) FROM partitions WHERE topic = name) FROM topics WHERE name = ?"
        found: dict[str, TopicSpec | None] = {}
        with self._file.translated():
            for name in names:
                row = self._file.db.execute(query, (name,)).fetchone()
                found[name] = TopicSpec(name=name, settings=json.loads(row[0]), partitions=row[1]) if row else None
        return found

    def delete_records(self, partition: TopicPartition, before_offset: int) -> None:
        number = self._partitions.id(*partition)
        more = True
        while more:  # each round deletes at least one record, or it is the last
            with self._file.write() as db:
                more = delete_head(db, number, before_offset, _RETENTION_RECORDS)
        self._file.vacuum(_VACUUM_PAGES)

    def close(self) -> None:
        self._file.close()
