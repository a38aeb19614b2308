"""The in-memory log: the same promises as Kafka, in one process, for tests and for the simulator.

It is built to be as unkind as Kafka is. Records take their offsets when they are sent, a commit or abort takes one more
(so offsets have holes), readers stop at the first open transaction, an open transaction holds the group's positions
unstable, a transaction that stays open too long is aborted, and the check of a membership looks at generation and
member only, NOT at who owns the partition. A worker that is right here is right there.

A test may pass a `ManualClock` (then nothing ever sleeps: a wait moves the clock) and a fault hook, that is asked at
every call and may lose it, hide its success, or raise (a simulated kill). A killed worker's objects are dropped without
`close`: its member lives on until the session times out or the test calls `expire`.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from operator import itemgetter

from stream.assignment import Membership, assign, reset_position
from stream.errors import ConfigError, Fenced, Rebalanced, Retryable
from stream.transport import LogRecord, Polled, Position, TopicPartition, TopicSpec

_OFFSET = itemgetter(2)


class ManualClock:
    """Seconds that pass only when told."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


class Fault(Enum):
    """What a fault hook does to a call. The caller sees Retryable either way and cannot tell which."""

    LOSE = "lose"  # the call has no effect
    HIDE = "hide"  # the call has its full effect, but reports failure


# Asked as hook(point, who): point is begin, send, flush, send_offsets, commit, abort, poll, committed or read; who is
# the transactional id or the group ("" for a reader).
FaultHook = Callable[[str, str], Fault | None]


@dataclass(slots=True, eq=False)
class _Transaction:
    transactional_id: str
    deadline_s: float
    logs: set[_Log] = field(default_factory=set)
    offsets: dict[str, dict[TopicPartition, Position]] = field(default_factory=dict)  # by group
    committed: bool | None = None  # None while it is open
    timed_out: bool = False


class _Log:
    """One partition: what readers may see, and the tail from the first open transaction on."""

    __slots__ = ("end", "head", "tail", "visible")

    def __init__(self) -> None:
        self.head = 0
        self.end = 0
        self.visible: list[LogRecord] = []
        self.tail: deque[tuple[LogRecord | None, _Transaction | None, int]] = deque()

    @property
    def stable_end(self) -> int:
        return self.tail[0][2] if self.tail else self.end

    def add(self, record: LogRecord | None, transaction: _Transaction | None) -> None:
        """Take the next offset for a record, or (None) for a transaction's marker."""
        if transaction is not None or self.tail:
            self.tail.append((record, transaction, self.end))
        elif record is not None:
            self.visible.append(record)
        self.end += 1

    def settle(self) -> None:
        """Move on what is decided: committed records become visible, aborted ones are gone."""
        while self.tail and ((transaction := self.tail[0][1]) is None or transaction.committed is not None):
            record = self.tail.popleft()[0]
            if record is not None and (transaction is None or transaction.committed) and record.offset >= self.head:
                self.visible.append(record)

    def read(self, offset: int, max_records: int) -> list[LogRecord]:
        first = bisect_left(self.visible, max(offset, self.head), key=_OFFSET)
        return self.visible[first : first + max_records]

    def delete(self, before: int) -> None:
        self.head = max(self.head, min(before, self.stable_end))
        del self.visible[: bisect_left(self.visible, self.head, key=_OFFSET)]


@dataclass(slots=True)
class _Group:
    topics: tuple[str, ...]
    numbers: tuple[int, ...]
    generation: int = 0
    joined: int = 0
    members: dict[str, float] = field(default_factory=dict)  # member -> last seen, seconds
    owners: dict[int, str] = field(default_factory=dict)
    target: dict[int, str] = field(default_factory=dict)
    positions: dict[TopicPartition, Position] = field(default_factory=dict)


class MemoryLog:
    """The log itself; create one per test. Consumers, producers and readers may live in several threads."""

    name = "memory"

    def __init__(
        self,
        *,
        clock: ManualClock | None = None,
        faults: FaultHook | None = None,
        session_timeout_s: float | None = None,
        transaction_timeout_s: float = 60.0,
    ) -> None:
        """Make an empty log.

        Args:
            clock: time that a test moves by hand; without it waits are real.
            faults: asked at every call; may also be set later as `log.faults`.
            session_timeout_s: a member that does not poll for so long is expired; None: only by `expire`.
            transaction_timeout_s: an open transaction is aborted after so long.
        """
        self.faults = faults
        self.session_timeout_s = session_timeout_s
        self.transaction_timeout_s = transaction_timeout_s
        self.now: Callable[[], float] = clock or time.monotonic
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._clock = clock
        self._specs: dict[str, TopicSpec] = {}
        self._logs: dict[TopicPartition, _Log] = {}
        self._groups: dict[str, _Group] = {}
        self._epochs: dict[str, int] = {}
        self._open: dict[str, _Transaction] = {}

    # ── the transport ─────────────────────────────────────────────────────────────────────────────────────────────

    def admin(self) -> MemoryAdmin:
        return MemoryAdmin(self)

    def consumer(self, *, group: str, topics: Sequence[str], reset: str = "earliest") -> MemoryConsumer:
        return MemoryConsumer(self, group, tuple(topics), reset)

    def producer(self, *, transactional_id: str) -> MemoryProducer:
        return MemoryProducer(self, transactional_id)

    def reader(self) -> MemoryReader:
        return MemoryReader(self)

    def append(self, topic: str, partition: int, records: Iterable[tuple[bytes | None, bytes | None, int]]) -> int:
        count = 0
        with self.lock:
            log = self.log(TopicPartition(topic, partition))
            for key, value, timestamp_ms in records:
                log.add(LogRecord(topic, partition, log.end, timestamp_ms, key, value), None)
                count += 1
            log.settle()
            self.changed.notify_all()
        return count

    def close(self) -> None:
        """Nothing to give back; the records stay as long as the object."""

    # ── for tests ─────────────────────────────────────────────────────────────────────────────────────────────────

    def expire(self, consumer: MemoryConsumer) -> None:
        """Throw a member out of its group as a session timeout would: the simulated death or pause of a process."""
        with self.lock:
            self._drop_member(self.group(consumer.group), consumer.member)

    def expire_transactions(self) -> None:
        """Abort every open transaction as its timeout would."""
        with self.lock:
            for transaction in list(self._open.values()):
                self.decide(transaction, commit=False)
                transaction.timed_out = True

    # ── shared by the parts below; the caller holds the lock ──────────────────────────────────────────────────────

    def fault(self, point: str, who: str) -> Fault | None:
        return self.faults(point, who) if self.faults is not None else None

    def wait(self, timeout_s: float) -> None:
        """Let time pass until something may have changed, at most `timeout_s`."""
        if self._clock is not None:
            self._clock.advance(timeout_s)
        elif timeout_s > 0:
            self.changed.wait(timeout_s)

    def log(self, partition: TopicPartition) -> _Log:
        log = self._logs.get(partition)
        if log is None:
            spec = self._specs.get(partition.topic)
            problem = (
                f"has {spec.partitions} partitions, there is no number {partition.partition}" if spec else "is missing"
            )
            raise ConfigError(f"topic {partition.topic!r} {problem}; create it with `driftline topics create`")
        return log

    def spec(self, topic: str) -> TopicSpec | None:
        return self._specs.get(topic)

    def create(self, spec: TopicSpec) -> None:
        self._specs[spec.name] = spec
        for number in range(spec.partitions):
            self._logs[TopicPartition(spec.name, number)] = _Log()

    def tick(self) -> None:
        """Do what the passing of time does: abort transactions and expire members that are overdue."""
        now_s = self.now()
        for transaction in [t for t in self._open.values() if t.deadline_s < now_s]:
            self.decide(transaction, commit=False)
            transaction.timed_out = True
        if self.session_timeout_s is not None:
            for group in self._groups.values():
                for member in [m for m, seen_s in group.members.items() if seen_s + self.session_timeout_s < now_s]:
                    self._drop_member(group, member)

    def group(self, name: str) -> _Group:
        return self._groups[name]

    def join(self, name: str, topics: tuple[str, ...]) -> str:
        """A new member id in the group."""
        for topic in topics:
            self.log(TopicPartition(topic, 0))
        group = self._groups.get(name)
        if group is None or not group.members:
            numbers = tuple(range(max(self._specs[topic].partitions for topic in topics)))
            if group is None:
                group = self._groups[name] = _Group(topics=topics, numbers=numbers)
            group.topics, group.numbers = topics, numbers
        if group.topics != topics:
            raise ConfigError(
                f"group {name!r} reads {', '.join(group.topics)}, this member asks for {', '.join(topics)}; "
                "use another group name or the same topics"
            )
        group.joined += 1
        member = f"member-{group.joined:06d}"
        group.members[member] = self.now()
        self._rebalance(group)
        return member

    def leave(self, name: str, member: str) -> None:
        self._drop_member(self.group(name), member)

    def _drop_member(self, group: _Group, member: str) -> None:
        if group.members.pop(member, None) is not None:
            group.owners = {number: owner for number, owner in group.owners.items() if owner != member}
            self._rebalance(group)

    def _rebalance(self, group: _Group) -> None:
        group.generation += 1
        group.target = assign(group.members, group.numbers, group.owners)
        self.changed.notify_all()

    def new_epoch(self, transactional_id: str) -> int:
        """Fence every older producer of the id and abort what it left open."""
        if (dangling := self._open.get(transactional_id)) is not None:
            self.decide(dangling, commit=False)
        epoch = self._epochs[transactional_id] = self._epochs.get(transactional_id, -1) + 1
        return epoch

    def epoch(self, transactional_id: str) -> int:
        return self._epochs[transactional_id]

    def open(self, transactional_id: str) -> _Transaction:
        transaction = _Transaction(transactional_id, self.now() + self.transaction_timeout_s)
        self._open[transactional_id] = transaction
        return transaction

    def decide(self, transaction: _Transaction, *, commit: bool) -> None:
        """Make the records and positions of a transaction visible together, or none of them."""
        transaction.committed = commit
        del self._open[transaction.transactional_id]
        if commit:
            for name, positions in transaction.offsets.items():
                self._groups[name].positions.update(positions)
        for log in transaction.logs:
            log.add(None, transaction)
            log.settle()
        self.changed.notify_all()

    def unstable(self, group: str, partitions: Iterable[TopicPartition]) -> str | None:
        """The id of an open transaction that may still change the position of one of the partitions."""
        wanted = set(partitions)
        for transaction in self._open.values():
            if not wanted.isdisjoint(transaction.offsets.get(group, ())):
                return transaction.transactional_id
        return None


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

    def _sync(self, group: _Group) -> tuple[list[TopicPartition], list[TopicPartition]]:
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

    def _place(self, partition: TopicPartition, log: _Log) -> int:
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
            if self._log.fault("committed", self.group) is not None:
                raise Retryable(f"injected fault: committed positions of group {self.group}")
            self._log.tick()
            if (holder := self._log.unstable(self.group, partitions)) is not None:
                raise Retryable(f"an open transaction of {holder!r} holds positions of group {self.group!r}; ask again")
            positions = self._log.group(self.group).positions
            return {partition: positions.get(partition) for partition in partitions}

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
        self._transaction: _Transaction | None = None
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
                transaction.offsets.setdefault(group.group, {}).update(positions)
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

    def _current(self) -> _Transaction:
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
            log = self._log.log(partition)
            return log.head, log.stable_end

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
            self._log.log(partition).delete(before_offset)

    def close(self) -> None:
        """Nothing to give back."""
