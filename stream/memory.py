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
from collections.abc import Callable, Iterable, Sequence

from stream.assignment import assign
from stream.errors import ConfigError
from stream.memory_clients import MemoryAdmin, MemoryConsumer, MemoryProducer, MemoryReader
from stream.memory_state import Fault, FaultHook, Group, ManualClock, PartitionLog, Transaction
from stream.transport import LogRecord, Scope, TopicPartition, TopicSpec

__all__ = ["Fault", "FaultHook", "ManualClock", "MemoryLog"]


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
        self._logs: dict[TopicPartition, PartitionLog] = {}
        self._groups: dict[str, Group] = {}
        self._epochs: dict[str, int] = {}
        self._open: dict[str, Transaction] = {}

    # ── the transport ─────────────────────────────────────────────────────────────────────────────────────────────

    def admin(self) -> MemoryAdmin:
        return MemoryAdmin(self)

    def consumer(self, *, group: str, topics: Sequence[str], reset: str = "earliest") -> MemoryConsumer:
        return MemoryConsumer(self, group, tuple(topics), reset)

    def producer(self, *, transactional_id: str, scope: Scope | None = None) -> MemoryProducer:
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

    def log(self, partition: TopicPartition) -> PartitionLog:
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
            self._logs[TopicPartition(spec.name, number)] = PartitionLog()

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

    def group(self, name: str) -> Group:
        return self._groups[name]

    def join(self, name: str, topics: tuple[str, ...]) -> str:
        """A new member id in the group."""
        for topic in topics:
            self.log(TopicPartition(topic, 0))
        group = self._groups.get(name)
        if group is None or not group.members:
            numbers = tuple(range(max(self._specs[topic].partitions for topic in topics)))
            if group is None:
                group = self._groups[name] = Group(topics=topics, numbers=numbers)
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

    def _drop_member(self, group: Group, member: str) -> None:
        if group.members.pop(member, None) is not None:
            group.owners = {number: owner for number, owner in group.owners.items() if owner != member}
            self._rebalance(group)

    def _rebalance(self, group: Group) -> None:
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

    def open(self, transactional_id: str) -> Transaction:
        transaction = Transaction(transactional_id, self.now() + self.transaction_timeout_s)
        self._open[transactional_id] = transaction
        return transaction

    def decide(self, transaction: Transaction, *, commit: bool) -> None:
        """Make the records and positions of a transaction visible together, or none of them."""
        transaction.committed = commit
        del self._open[transaction.transactional_id]
        if commit:
            for name, positions in transaction.offsets.items():
                self._groups[name].take(positions)
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
