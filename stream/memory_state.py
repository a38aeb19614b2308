"""What the in-memory log remembers (partitions, transactions, groups), and the clock and the faults of a test.

Not on the way of an event in production; memory.py works on it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from operator import itemgetter

from stream.transport import LogRecord, Position, TopicPartition

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
    OLD = "old"  # `committed` only: positions that stood some commits ago, as from a broker that has just come back


# Asked as hook(point, who): point is begin, send, flush, send_offsets, commit, abort, poll, committed, read, bounds or
# delete; who is the transactional id or the group ("" for a reader and an admin).
FaultHook = Callable[[str, str], Fault | None]


@dataclass(slots=True, eq=False)
class Transaction:
    transactional_id: str
    deadline_s: float
    logs: set[PartitionLog] = field(default_factory=set)
    offsets: dict[str, dict[TopicPartition, tuple[int, Position]]] = field(
        default_factory=dict
    )  # (when, what) by group
    committed: bool | None = None  # None while it is open
    timed_out: bool = False


class PartitionLog:
    """One partition: what readers may see, and the tail from the first open transaction on."""

    __slots__ = ("end", "head", "tail", "visible")

    def __init__(self) -> None:
        self.head = 0
        self.end = 0
        self.visible: list[LogRecord] = []
        self.tail: deque[tuple[LogRecord | None, Transaction | None, int]] = deque()

    @property
    def stable_end(self) -> int:
        return self.tail[0][2] if self.tail else self.end

    def add(self, record: LogRecord | None, transaction: Transaction | None) -> None:
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
class Group:
    topics: tuple[str, ...]
    numbers: tuple[int, ...]
    generation: int = 0
    joined: int = 0
    members: dict[str, float] = field(default_factory=dict)  # member -> last seen, seconds
    owners: dict[int, str] = field(default_factory=dict)
    target: dict[int, str] = field(default_factory=dict)
    positions: dict[TopicPartition, Position] = field(default_factory=dict)
    sent: dict[TopicPartition, int] = field(default_factory=dict)  # when each position was sent
    sends: int = 0
    older: deque[dict[TopicPartition, Position]] = field(default_factory=lambda: deque(maxlen=8))  # before commits

    def take(self, positions: Mapping[TopicPartition, tuple[int, Position]]) -> None:
        """Commit positions. As on Kafka, of two the one that was SENT later stands, whichever is committed first."""
        self.older.append(dict(self.positions))
        for partition, (sent, position) in positions.items():
            if sent > self.sent.get(partition, -1):
                self.sent[partition] = sent
                self.positions[partition] = position
