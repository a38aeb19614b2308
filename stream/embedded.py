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
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from stream.embedded_consumer import POLL_PAUSE_S, EmbeddedConsumer
from stream.embedded_producer import DELETE_RECORDS_MAX, EmbeddedProducer
from stream.embedded_records import Partitions, delete_head
from stream.errors import ConfigError
from stream.logfile import LogFile
from stream.transport import LogRecord, Scope, TopicPartition, TopicSpec

_VACUUM_PAGES = 1_024


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
        self._lease_s = lease_s
        self._clock = clock
        self._lock_timeout_s = lock_timeout_s
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create the folder of the embedded log {path}: {error.strerror}") from None
        self._file = self._open()
        try:
            self._file.check(check_bytes_max)
        except BaseException:
            self._file.close()
            raise
        self._writer: EmbeddedProducer | None = None

    def _open(self) -> LogFile:
        return LogFile(self.path, lock_timeout_s=self._lock_timeout_s)

    def admin(self) -> EmbeddedAdmin:
        return EmbeddedAdmin(self._open())

    def consumer(self, *, group: str, topics: Sequence[str], reset: str = "earliest") -> EmbeddedConsumer:
        return EmbeddedConsumer(self._open(), self._lease_s, group, tuple(topics), reset)

    def producer(self, *, transactional_id: str, scope: Scope | None = None) -> EmbeddedProducer:
        return EmbeddedProducer(self._open(), self._lease_s, self._clock, transactional_id)

    def reader(self) -> EmbeddedReader:
        return EmbeddedReader(self._open())

    def append(self, topic: str, partition: int, records: Iterable[tuple[bytes | None, bytes | None, int]]) -> int:
        if self._writer is None:
            self._writer = EmbeddedProducer(self._open(), self._lease_s, self._clock, None)
        return self._writer.append(topic, partition, records)

    def close(self) -> None:
        """Close the log's own connection; what was created from it is closed by its owner. Idempotent."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._file.close()


class EmbeddedReader:
    """Reads committed records; see transport.LogReader."""

    def __init__(self, file: LogFile) -> None:
        self._file = file
        self._partitions = Partitions(self._file)

    def read(
        self, partition: TopicPartition, offset: int, timeout_s: float, max_records: int = 1_000
    ) -> list[LogRecord]:
        until_s = time.monotonic() + timeout_s
        pause_s = POLL_PAUSE_S[0]
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
            pause_s = min(2 * pause_s, POLL_PAUSE_S[1])

    def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        return self._partitions.bounds(partition)

    def offset_at(self, partition: TopicPartition, timestamp_ms: int) -> int:
        return self._partitions.offset_at(partition, timestamp_ms)

    def close(self) -> None:
        self._file.close()


class EmbeddedAdmin:
    """Topics and retention; see transport.Admin."""

    def __init__(self, file: LogFile) -> None:
        self._file = file
        self._partitions = Partitions(self._file)

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
                more = delete_head(db, number, before_offset, DELETE_RECORDS_MAX)
        self._file.vacuum(_VACUUM_PAGES)

    def close(self) -> None:
        self._file.close()
