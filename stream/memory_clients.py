"""Consumers, producers, readers and admins of the in-memory log; see transport.py for what they promise.

Each call takes the log's lock, asks the test's fault hook, and lets overdue transactions and members run out first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stream.assignment import Membership, reset_position
from stream.errors import ConfigError, Fenced, Rebalanced, Retryable
from stream.memory_state import Fault, Group, PartitionLog, Transaction
from stream.transport import LogRecord, Polled, Position, TopicPartition, TopicSpec

if TYPE_CHECKING:
    from stream.memory import MemoryLog


class MemoryConsumer:
    """A member of a group; see transport.GroupConsumer."""

    def __init__(self, log: MemoryLog, group: str, topics: tuple[str, ...], reset: str) -> None:
        if reset not in ("earliest", "latest", "none"):
            raise ConfigError(f"reset is earliest, latest or none, not {reset!r}")
        self.group = group
        self._log = log
        self._topics = topics
        self._reset = reset
        self._positions: dict[TopicPartition, int | None] = {}
        self._paused: set[TopicPartition] = set()
        self._turn = 0
        self._closed = False
        with log.lock:
            self.member = log.join(group, topics)

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        if self._closed:
            raise ValueError("the consumer is closed")
        with self._log.lock:
            if self._log.fault("poll", self.group) is not None:
                raise Retryable(f"injected fault: poll of group {self.group}")
            until_s = self._log.now() + timeout_s
            while True:
                polled = self._poll_once(max_records)
                left_s = until_s - self._log.now()
                if polled.records or polled.assigned or polled.revoked or left_s <= 0:
                    return polled
                # In slices, to see the others' sessions run out and to keep our own.
                self._log.wait(min(left_s, (self._log.session_timeout_s or 4 * left_s) / 4))

    def _poll_once(self, max_records: int) -> Polled:
        self._log.tick()
        lost: list[TopicPartition] = []
        group = self._log.group(self.group)
        if self.member not in group.members:  # expired: all is lost, start as a new member
            lost = list(self._positions)
            self._positions.clear()
            self.member = self._log.join(self.group, self._topics)
        group.members[self.member] = self._log.now()
        assigned, revoked = self._sync(group)
        token = Membership(self.group, group.generation, self.member)
        if assigned or revoked or lost:
            self._paused &= self._positions.keys()
            self._paused.update(assigned)
            return Polled(group=token, assigned=tuple(assigned), revoked=tuple(lost + revoked))
        return Polled(group=token, records=self._fetch(max_records))

    def _sync(self, group: Group) -> tuple[list[TopicPartition], list[TopicPartition]]:
        """Give up what is meant for others; take what is meant for us and free."""
        assigned: list[TopicPartition] = []
        revoked: list[TopicPartition] = []
        for number, target in group.target.items():
            owner = group.owners.get(number)
            if owner == self.member and target != self.member:
                del group.owners[number]
                revoked += [p for p in self._positions if p.partition == number]
                self._log.changed.notify_all()
            elif owner is None and target == self.member:
                group.owners[number] = self.member
                for topic in self._topics:
                    spec = self._log.spec(topic)
                    if spec is not None and number < spec.partitions:
                        assigned.append(TopicPartition(topic, number))
        for partition in revoked:
            del self._positions[partition]
        for partition in assigned:
            self._positions[partition] = None
        return assigned, revoked

    def _fetch(self, max_records: int) -> dict[TopicPartition, list[LogRecord]]:
        active = [p for p in self._positions if p not in self._paused]
        records: dict[TopicPartition, list[LogRecord]] = {}
        room = max_records
        self._turn += 1
        for n in range(len(active)):
            partition = active[(self._turn + n) % len(active)]
            log = self._log.log(partition)
            position = self._place(partition, log)
            if position >= log.stable_end or room <= 0:
                continue
            share = -(-room // (len(active) - n))
            found = log.read(position, share)
            if found:
                records[partition] = found
                room -= len(found)
            self._positions[partition] = found[-1].offset + 1 if len(found) == share else log.stable_end
        return records

    def _place(self, partition: TopicPartition, log: PartitionLog) -> int:
        """The position to read at, after the reset rule where there is none or it is out of range."""
        position = self._positions[partition]
        if position is None:
            stored = self._log.group(self.group).positions.get(partition)
            position = stored.offset if stored else -1
        if not log.head <= position <= log.end:
            position = reset_position(self._reset, partition, position, log.head, log.stable_end)
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
        with self._log.lock:
            fault, group = self._log.fault("committed", self.group), self._log.group(self.group)
            if fault is Fault.OLD and group.older:
                return {partition: group.older[0].get(partition) for partition in partitions}
            if fault in (Fault.LOSE, Fault.HIDE):
                raise Retryable(f"injected fault: committed positions of group {self.group}")
            self._log.tick()
            if (holder := self._log.unstable(self.group, partitions)) is not None:
                raise Retryable(f"an open transaction of {holder!r} holds positions of group {self.group!r}; ask again")
            return {partition: group.positions.get(partition) for partition in partitions}

    def lag(self) -> dict[TopicPartition, int]:
        with self._log.lock:
            return {
                partition: max(0, self._log.log(partition).stable_end - position)
                for partition, position in self._positions.items()
                if position is not None
            }

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with self._log.lock:
                self._log.leave(self.group, self.member)


class MemoryProducer:
    """Transactions; see transport.Producer. After a failure of unknown outcome every call but `close` is refused."""

    def __init__(self, log: MemoryLog, transactional_id: str) -> None:
        self._log = log
        self._id = transactional_id
        self._transaction: Transaction | None = None
        self._failed_send = False
        self._broken = False
        with log.lock:
            self._epoch = log.new_epoch(transactional_id)

    def begin(self) -> None:
        with self._log.lock:
            fault = self._enter("begin")
            if self._transaction is not None:
                raise ValueError("begin inside an open transaction")
            if fault is not Fault.LOSE:
                self._transaction = self._log.open(self._id)
                self._failed_send = False
            self._report("begin", fault)

    def send(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, timestamp_ms: int | None = None
    ) -> None:
        with self._log.lock:
            fault = self._enter("send")
            transaction = self._current()
            log = self._log.log(TopicPartition(topic, partition))
            if fault is not Fault.LOSE:
                when_ms = int(self._log.now() * 1000) if timestamp_ms is None else timestamp_ms
                log.add(LogRecord(topic, partition, log.end, when_ms, key, value), transaction)
                transaction.logs.add(log)
            self._failed_send |= fault is not None  # as with Kafka, only `flush` tells

    def flush(self) -> None:
        with self._log.lock:
            fault = self._enter("flush")
            self._current()
            if self._failed_send:
                self._broken = True
                raise Retryable(f"a record of the transaction of {self._id!r} was not stored")
            self._report("flush", fault)

    def send_offsets(self, positions: Mapping[TopicPartition, Position], group: object) -> None:
        if not positions:
            raise ValueError("no positions: an empty set would not fence a process that lost its partitions")
        if not isinstance(group, Membership):
            raise ValueError(f"group must be the proof of a poll (Polled.group), not {group!r}")
        self.flush()
        with self._log.lock:
            fault = self._enter("send_offsets")
            transaction = self._current()
            state = self._log.group(group.group)
            if group.generation != state.generation or group.member not in state.members:
                raise Rebalanced(f"group {group.group!r} moved on since the batch was polled")
            if fault is not Fault.LOSE:
                state.sends += 1
                sent = {partition: (state.sends, position) for partition, position in positions.items()}
                transaction.offsets.setdefault(group.group, {}).update(sent)
            self._report("send_offsets", fault)

    def commit(self) -> None:
        self.flush()
        self._end("commit")

    def abort(self) -> None:
        self._end("abort")

    def _end(self, how: str) -> None:
        with self._log.lock:
            fault = self._enter(how)
            transaction = self._current()
            if fault is not Fault.LOSE:
                self._log.decide(transaction, commit=how == "commit")
                self._transaction = None
            self._report(how, fault)

    def close(self) -> None:
        """Abort what is open. Idempotent, never raises."""
        with self._log.lock:
            transaction = self._transaction
            self._transaction = None
            self._broken = True
            if transaction is not None and transaction.committed is None:
                self._log.decide(transaction, commit=False)

    def _enter(self, point: str) -> Fault | None:
        """Every call starts here: kills and faults of the test, time, and whether this producer still counts."""
        fault = self._log.fault(point, self._id)
        self._log.tick()
        if self._log.epoch(self._id) != self._epoch:
            self._broken = True
            raise Fenced(f"a newer producer has the id {self._id!r}; this process must stop")
        if self._broken:
            raise Retryable(f"the producer {self._id!r} failed before; throw it away and create a new one")
        return fault

    def _current(self) -> Transaction:
        transaction = self._transaction
        if transaction is None:
            raise ValueError("no open transaction; call begin first")
        if transaction.timed_out:
            self._broken = True
            raise Retryable(f"the transaction of {self._id!r} was open for too long and has been aborted")
        return transaction

    def _report(self, point: str, fault: Fault | None) -> None:
        if fault is not None:
            self._broken = True
            raise Retryable(f"injected fault: {point} of {self._id!r}, outcome unknown")


class MemoryReader:
    """Reads committed records; see transport.LogReader."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log

    def read(
        self, partition: TopicPartition, offset: int, timeout_s: float, max_records: int = 1_000
    ) -> list[LogRecord]:
        with self._log.lock:
            if self._log.fault("read", "") is not None:
                raise Retryable(f"injected fault: read of {partition.topic}-{partition.partition}")
            until_s = self._log.now() + timeout_s
            while True:
                self._log.tick()
                records = self._log.log(partition).read(offset, max_records)
                left_s = until_s - self._log.now()
                if records or left_s <= 0:
                    return records
                self._log.wait(left_s)

    def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        with self._log.lock:
            if self._log.fault("bounds", "") is not None:
                raise Retryable(f"injected fault: bounds of {partition.topic}-{partition.partition}")
            log = self._log.log(partition)
            return log.head, log.stable_end

    def offset_at(self, partition: TopicPartition, timestamp_ms: int) -> int:
        with self._log.lock:
            log = self._log.log(partition)
            return next((r.offset for r in log.visible if r.timestamp >= timestamp_ms), log.stable_end)

    def close(self) -> None:
        """Nothing to give back."""


class MemoryAdmin:
    """Topics and retention; see transport.Admin."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log

    def create(self, specs: Sequence[TopicSpec]) -> list[str]:
        with self._log.lock:
            missing = [spec for spec in specs if self._log.spec(spec.name) is None]
            for spec in missing:
                if spec.partitions < 1:
                    raise ConfigError(f"topic {spec.name!r} needs at least one partition, not {spec.partitions}")
                self._log.create(spec)
            return [spec.name for spec in missing]

    def describe(self, names: Sequence[str]) -> dict[str, TopicSpec | None]:
        with self._log.lock:
            return {name: self._log.spec(name) for name in names}

    def delete_records(self, partition: TopicPartition, before_offset: int) -> None:
        with self._log.lock:
            fault = self._log.fault("delete", "")
            if fault is not Fault.LOSE:
                self._log.log(partition).delete(before_offset)
            if fault is not None:
                raise Retryable(f"injected fault: delete of {partition.topic}-{partition.partition}")

    def close(self) -> None:
        """Nothing to give back."""
