"""A member of a consumer group of the embedded log; see transport.GroupConsumer and leases.py.

It waits by looking at SQLite's data version every few milliseconds, and writes only to keep its lease or to follow a
rebalance.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from stream import leases
from stream.assignment import Membership, reset_position
from stream.embedded_records import Partitions
from stream.errors import ConfigError, Retryable
from stream.logfile import LogFile
from stream.transport import LogRecord, Polled, Position, TopicPartition

POLL_PAUSE_S = (0.0005, 0.01)
_CHECK_MEMBERS_S = 1.0


class EmbeddedConsumer:
    """A member of a group; see transport.GroupConsumer."""

    def __init__(self, file: LogFile, lease_s: float, group: str, topics: tuple[str, ...], reset: str) -> None:
        if reset not in ("earliest", "latest", "none"):
            raise ConfigError(f"reset is earliest, latest or none, not {reset!r}")
        self._lease_s = lease_s
        self._topics = topics
        self._reset = reset
        self._positions: dict[TopicPartition, int | None] = {}
        self._paused: set[TopicPartition] = set()
        self._turn = 0
        self._closed = False
        self._seen: tuple[int, int] = (-1, -1)  # data version of the file, revision of the group
        self._renew_at_s = 0.0
        self._check_at_s = 0.0
        self._file = file
        try:
            self._partitions = Partitions(self._file)
            with self._file.write() as db:
                self._membership = leases.join(db, group, topics, self._lease_s)
        except BaseException:
            self._file.close()
            raise

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        if self._closed:
            raise ValueError("the consumer is closed")
        until_s = time.monotonic() + timeout_s
        pause_s = POLL_PAUSE_S[0]
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
            pause_s = min(2 * pause_s, POLL_PAUSE_S[1])

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
