"""The contract between the worker and a log: what Kafka, the embedded log and the in-memory log all promise.

A log has topics of numbered partitions; a partition is an ordered list of records with ascending offsets (dense on the
embedded log; with holes on Kafka, where transaction markers take offsets). One transaction makes its records and the
consumed offsets visible together, or not at all. Readers see committed records only.

    Transport ── admin()      create and describe topics, delete the head of a partition
              ├─ consumer()   a member of a consumer group: a share of the input partitions
              ├─ producer()   transactions under a stable id; a newer producer of the same id fences the older one
              └─ reader()     committed records of given partitions from given offsets; no group

Objects are created in the process and the thread that uses them and are not thread-safe. All times are seconds.
Errors are those of errors.py: Retryable (the attempt is void or its outcome unknown), Rebalanced (the group moved on),
Fenced (a newer producer has the id: an older one hears it at the next call that reaches the log, at its commit at the
latest), Corrupt, ConfigError (a missing topic or partition, no right to it, a position that is gone and no reset rule).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from stream.errors import DriftlineError


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int


class Record(Protocol):
    """One record as it lies in the log. Read-only attributes, so that a client's own record class fits as it is."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int:
        """Milliseconds since 1970."""

    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...


class LogRecord(NamedTuple):
    """The record class of the logs that are our own."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


class Position(NamedTuple):
    """A committed position: the NEXT offset to read, and a string that is committed with it."""

    offset: int
    metadata: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Polled:
    """What one poll brought.

    Attributes:
        records: new records by partition, in offset order, only of partitions that this member owns now.
        group: opaque proof of membership as of THIS poll (group, generation, member); goes into `send_offsets`.
            A proof taken later may belong to a newer generation and would not fence.
        assigned: partitions gained since the last poll; they are paused until `resume`.
        revoked: partitions given up or lost since the last poll; their buffered records are gone already.
    """

    records: Mapping[TopicPartition, Sequence[Record]] = field(default_factory=dict)
    group: object = None
    assigned: tuple[TopicPartition, ...] = ()
    revoked: tuple[TopicPartition, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """Where the transactions of an id write: partitions, and the positions of a group where there is one."""

    partitions: Sequence[TopicPartition]
    group: str = ""

    @staticmethod
    def over(counts: Mapping[str, int], group: str = "") -> Scope:
        """All partitions of topics, given how many each has."""
        return Scope(
            partitions=[TopicPartition(t, p) for t, count in counts.items() for p in range(count)], group=group
        )


class GroupConsumer(Protocol):
    """A member of a consumer group. Reads committed records only, never commits by itself.

    A newly assigned partition is paused and has no position: the owner restores what belongs to it, asks `committed`,
    calls `seek` and then `resume`; a resume without a seek goes on from the committed position or the reset rule. A
    partition may be assigned, revoked and assigned again. `pause`, `resume` and `seek` of a partition that the last
    poll did not leave with this member raise ValueError.
    """

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        """Wait at most `timeout_s` for records or a change of the assignment; at most `max_records` records."""

    def pause(self, partitions: Sequence[TopicPartition]) -> None: ...
    def resume(self, partitions: Sequence[TopicPartition]) -> None: ...
    def seek(self, partition: TopicPartition, offset: int) -> None:
        """The next poll of this partition starts at `offset`. Records already buffered are dropped."""

    def committed(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Position | None]:
        """The stable committed positions of the group: never one that an open transaction may still change.

        Raises:
            Retryable: such a transaction is open and did not end in time; its timeout is the bound.
        """

    def lag(self) -> dict[TopicPartition, int]:
        """Records between our position and the end, by owned partition with a position; an estimate."""

    def close(self) -> None:
        """Leave the group at once. Idempotent."""


class Producer(Protocol):
    """Transactions under one id. Creating one fences every older producer of the id and ends what that left open.

    begin -> send* -> flush -> send_offsets -> commit, or abort at any point after begin. After any exception between
    begin and commit the outcome may be unknown: throw the producer away, create a new one, look at `committed`.
    """

    def begin(self) -> None: ...
    def send(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, timestamp_ms: int | None = None
    ) -> None: ...
    def flush(self) -> None:
        """Return when every record sent in this transaction is stored; Retryable if any one of them is not."""

    def send_offsets(self, positions: Mapping[TopicPartition, Position], group: object) -> None:
        """Tie the consumer's progress to this transaction. `group` is `Polled.group` of the batch.

        Raises:
            Rebalanced: the membership is no longer that of the group (a rebalance happened since the poll).
            Fenced: a newer producer has this transactional id.
            ValueError: `positions` is empty; an empty set would not fence.
        """

    def commit(self) -> None:
        """Make all of it visible. Flushes first. May raise what `send_offsets` raises: a log may check again here."""

    def abort(self) -> None: ...
    def close(self) -> None: ...


class LogReader(Protocol):
    """Reads committed records of chosen partitions; belongs to no group."""

    def read(
        self, partition: TopicPartition, offset: int, timeout_s: float, max_records: int = 1_000
    ) -> Sequence[Record]:
        """Committed records with offset >= `offset` in order; fewer or none after `timeout_s`.

        An offset below the head (deleted meanwhile) reads from the head: the caller sees the gap by the offsets.
        """

    def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        """(first offset still there, offset up to which records can be read now; an open transaction ends it)."""

    def offset_at(self, partition: TopicPartition, timestamp_ms: int) -> int:
        """Offset of the first record with this timestamp or a later one; the end where there is none."""

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicSpec:
    """A topic to create or as found. `settings` are the topic's settings by Kafka's names, as strings.

    `readable`: as found, whether we may read it; True where the log does not say.
    """

    name: str
    partitions: int
    settings: Mapping[str, str] = field(default_factory=dict)
    readable: bool = True


class Admin(Protocol):
    """Topics and retention."""

    def create(self, specs: Sequence[TopicSpec]) -> list[str]:
        """Create the topics that are missing and return their names; existing ones are left as they are."""

    def describe(self, names: Sequence[str]) -> dict[str, TopicSpec | None]:
        """What is there; None for a missing topic."""

    def delete_records(self, partition: TopicPartition, before_offset: int) -> None:
        """Drop the records below `before_offset`. Idempotent."""

    def close(self) -> None: ...


class Transport(Protocol):
    """A log, opened. Creating one connects or opens the file and raises ConfigError where that cannot work."""

    name: str

    def admin(self) -> Admin: ...
    def consumer(self, *, group: str, topics: Sequence[str], reset: str = "earliest") -> GroupConsumer:
        """Join `group`. `reset` (earliest | latest | none) applies where no position is committed or it was deleted."""

    def producer(self, *, transactional_id: str, scope: Scope | None = None) -> Producer:
        """A producer of the id.

        Args:
            scope: where transactions of the id write. A broker that comes back may have lost sight of a part of one
                that is over: it stays open there. In these places it is ended, as the transaction as a whole was.
        """

    def reader(self) -> LogReader: ...
    def append(self, topic: str, partition: int, records: Iterable[tuple[bytes | None, bytes | None, int]]) -> int:
        """Append (key, value, timestamp_ms) in bulk outside any transaction, acknowledged on return; the count."""

    def close(self) -> None: ...


class Closeable(Protocol):
    """What holds connections or files until it is closed."""

    def close(self) -> None: ...


def close_all(*parts: Closeable) -> None:
    """Close every part, whatever one of them meets: a log that is away or refuses us notices that we are gone."""
    for part in parts:
        with suppress(DriftlineError):
            part.close()
