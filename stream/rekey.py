"""`driftline rekey`: a topic that is keyed by something else becomes one that is keyed by the user, exactly once.

Before the way of an event, a stage of its own. Each batch is one transaction: the records under their new key, dead
letters for those without a user, and the consumed positions. There is no state, so a failure of any kind is met by new
clients, which go on from what is committed. Values and timestamps stay as they are.

The positions are committed twice: for the group, which fences, and as records of a topic of their own in the same
transaction. A broker that was killed and came back may name positions of the group that are long past (progress.py).

A user's events keep their order where they lay in one partition of the source; what came through several partitions is
taken batch by batch in the order of the timestamps.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import merge
from operator import attrgetter
from typing import Any

import msgspec

from stream import fields
from stream import records as out
from stream.errors import BadEvent, ConfigError, Corrupt, Rebalanced, Retryable
from stream.events import USER_BYTES_MAX
from stream.partition import partition_of
from stream.start import EARLIEST, Start
from stream.transport import (
    GroupConsumer,
    LogReader,
    Polled,
    Position,
    Producer,
    Record,
    Scope,
    TopicPartition,
    Transport,
)

log = logging.getLogger(__name__)

END_QUIET_S = 5.0  # without records for so long, the end is reached: a mark of a transaction may be the last
PROGRESS_S = 10.0
OURS = "rekey"  # the metadata of a position that we have committed; an operator's has none
TAIL_RECORDS = 256  # of the topic of positions, looked at first for the newest one
READ_S = 1.0
_timestamp = attrgetter("timestamp")


@dataclass(frozen=True, kw_only=True, slots=True)
class RekeySettings:
    """What to read, where to write, and the limits.

    Attributes:
        positions: topic that says how far the source was moved.
        user: path of the user id in the values.
        until_end: end when everything that is there has been moved; else go on with what comes.
        bad_share_max, bad_window: stop when more than this share of so many records have no user.
    """

    source: str
    target: str
    dead_letters: str
    positions: str
    user: str
    app: str
    slot: str
    start: Start = EARLIEST
    until_end: bool = False
    batch_records_max: int = 4_096
    poll_timeout_s: float = 0.25
    retries_max: int = 20
    backoff_s: float = 0.2
    bad_share_max: float = 0.5
    bad_window: int = 10_000


@dataclass(kw_only=True, slots=True)
class Moved:
    """Sums of one process: what it has committed."""

    records: int = 0
    dead_letters: int = 0


class Rekey:
    """One member of the group that moves a topic; several share its partitions.

    Example:
        >>> Rekey(transport, settings, clock=clock, sleep=sleep).run(stop)  # doctest: +SKIP
    """

    def __init__(
        self,
        transport: Transport,
        settings: RekeySettings,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], object],
    ) -> None:
        """Join the group.

        Raises:
            ConfigError: a topic is missing, or source and target are one.
        """
        if settings.source == settings.target:
            raise ConfigError(f"rekey: source and target are both {settings.source}; name another target topic")
        self._transport, self._settings, self._clock, self._sleep = transport, settings, clock, sleep
        self._partitions = self._count_partitions()
        self._user_of = fields.decoder({"user": (str | int, msgspec.NODEFAULT)}, {"user": settings.user})
        self._id = f"{settings.app}.rekey.{settings.target}"
        self._failures = 0
        self._seen = self._bad = 0
        self.moved = Moved()
        self._connect()

    def run(self, stop: threading.Event) -> Moved:
        """Move records until `stop` is set, or the end is reached where that was asked for."""
        quiet_since_s = said_s = self._clock()
        try:
            while not stop.is_set():
                busy = self.turn()
                now_s = self._clock()
                quiet_since_s = now_s if busy else quiet_since_s
                if now_s - said_s >= PROGRESS_S:
                    said_s = now_s
                    log.info(
                        "event=rekeyed records=%d dead_letters=%d lag=%d",
                        self.moved.records, self.moved.dead_letters, self._lag(),
                    )  # fmt: skip
                if not self._settings.until_end or busy:
                    continue
                if now_s - quiet_since_s > END_QUIET_S or (self._owned and self._lag() == 0):
                    break
            return self.moved
        finally:
            self.close()

    def turn(self) -> bool:
        """One poll and its transaction. Returns whether there was anything to do."""
        try:
            polled = self._consumer.poll(self._settings.poll_timeout_s, self._settings.batch_records_max)
            self._owned.difference_update(polled.revoked)
            self._owned.update(polled.assigned)
            for tp in polled.assigned:
                self._place(tp)
            if polled.records:
                self._commit(polled)
            self._failures = 0
        except Retryable as error:
            self._start_over(error)
            return True
        return bool(polled.records or polled.assigned or polled.revoked)

    def close(self) -> None:
        """Leave the group. Idempotent."""
        self._consumer.close()
        self._producer.close()

    def _connect(self) -> None:
        self._owned: set[TopicPartition] = set()
        topics = (self._settings.target, self._settings.dead_letters, self._settings.positions)
        self._producer: Producer = self._transport.producer(
            transactional_id=f"{self._id}.{self._settings.slot}",
            scope=Scope.over({topic: self._partitions[topic] for topic in topics}, group=self._id),
        )
        self._consumer: GroupConsumer = self._transport.consumer(
            group=self._id, topics=[self._settings.source], reset="none"
        )

    def _count_partitions(self) -> Mapping[str, int]:
        settings, admin = self._settings, self._transport.admin()
        try:
            found = admin.describe([settings.source, settings.target, settings.dead_letters, settings.positions])
        finally:
            admin.close()
        counts = {}
        for name, spec in found.items():
            if spec is None:
                raise ConfigError(f"topic {name} is missing; create it with the partitions that it shall have")
            counts[name] = spec.partitions
        return counts

    def _place(self, tp: TopicPartition) -> None:
        """Read on from the committed position, or from where a new move begins."""
        position = self._consumer.committed([tp])[tp]
        offset = None if position is None else position.offset
        reader = self._transport.reader()
        try:
            if position is None or position.metadata == OURS:
                moved = self._moved_to(reader, tp)
                if moved is not None and (offset is None or moved > offset):
                    log.warning("event=position_behind partition=%s-%d group=%s moved=%d", *tp, offset, moved)
                    offset = moved
            if offset is None:
                offset = self._settings.start.offset(reader, tp)
        finally:
            reader.close()
        self._consumer.seek(tp, offset)
        self._consumer.resume([tp])

    def _moved_to(self, reader: LogReader, tp: TopicPartition) -> int | None:
        """How far our own topic says that a partition was moved: its newest record there, looked for from the end."""
        place, key = self._place_of_position(tp)
        head, end = reader.bounds(place)
        count = TAIL_RECORDS
        while True:
            begin = at = max(head, end - count)
            newest = None
            while at < end and (records := reader.read(place, at, READ_S)):
                at = records[-1].offset + 1
                newest = next((r.value for r in reversed(records) if r.key == key), newest)
            if newest is not None or begin == head:
                return None if newest is None else int(newest)
            count *= 4

    def _place_of_position(self, tp: TopicPartition) -> tuple[TopicPartition, bytes]:
        """Where the positions of a partition lie, and under which key."""
        topic = self._settings.positions
        return TopicPartition(
            topic, tp.partition % self._partitions[topic]
        ), f"{self._id}/{tp.topic}-{tp.partition}".encode()

    def _lag(self) -> int:
        try:
            return sum(self._consumer.lag().values())
        except Retryable:  # only asked to tell, or to end: a later answer will do
            return -1

    # ------------------------------------------------------------------ one batch

    def _commit(self, polled: Polled) -> None:
        """The batch as one transaction."""
        producer = self._producer
        placed = [self._moved(record) for record in merge(*polled.records.values(), key=_timestamp)]
        dead = sum(topic == self._settings.dead_letters for topic, *_ in placed)
        moved = len(placed) - dead
        self._check_bad(len(placed), dead)
        producer.begin()
        for topic, partition, key, value, timestamp_ms in placed:
            producer.send(topic, partition, key, value, timestamp_ms)
        positions = {tp: Position(rs[-1].offset + 1, OURS) for tp, rs in polled.records.items()}
        for tp, position in positions.items():
            place, key = self._place_of_position(tp)
            producer.send(*place, key, b"%d" % position.offset)
        producer.flush()
        producer.send_offsets(positions, polled.group)
        producer.commit()
        self.moved.records += moved
        self.moved.dead_letters += dead

    def _moved(self, record: Record) -> tuple[str, int, bytes | None, bytes | None, int | None]:
        """(topic, partition, key, value, timestamp) of what becomes of a record."""
        settings = self._settings
        try:
            user = self._user(record.value)
        except BadEvent as error:
            letter = out.dead_letter(
                reason=error.reason,
                message=str(error),
                source=out.Source(topic=record.topic, partition=record.partition, offset=record.offset),
                timestamp_ms=record.timestamp,
                key=record.key,
                value=record.value,
            )
            partition = record.partition % self._partitions[settings.dead_letters]
            return settings.dead_letters, partition, record.key, out.encode(letter), None
        partition = partition_of(user, self._partitions[settings.target])
        return settings.target, partition, user, record.value, record.timestamp

    def _user(self, value: bytes | None) -> bytes:
        if value is None:
            raise BadEvent("null_value", "the record has no value")
        try:
            found: Any = self._user_of(value).user
            user = str(found).encode()
        except msgspec.ValidationError as error:
            raise BadEvent("invalid_field", str(error)) from None
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise BadEvent("broken_json", str(error)) from None
        if not 0 < len(user) <= USER_BYTES_MAX:
            raise BadEvent("invalid_user", f"the user id has {len(user)} bytes; 1 to {USER_BYTES_MAX} are allowed")
        return user

    def _check_bad(self, records: int, bad: int) -> None:
        """Stop before the source drains into the dead letters; the batch under way is not committed."""
        settings = self._settings
        self._seen, self._bad = self._seen + records, self._bad + bad
        if self._bad > settings.bad_share_max * settings.bad_window:
            raise Corrupt(
                f"{self._bad} of the last {self._seen} records of {settings.source} have no user at "
                f"{settings.user!r}; is --user right? See the newest dead letters. The last batch was not committed"
            )
        while self._seen > settings.bad_window:
            self._seen, self._bad = self._seen // 2, self._bad // 2

    def _start_over(self, error: Retryable) -> None:
        """New clients: the older transaction is void or done when the new producer is there. Bounded tries."""
        while True:
            self._failures += 1
            log.warning("event=rekey_retry failures=%d error=%r", self._failures, str(error))
            if self._failures > self._settings.retries_max:
                raise error
            if not isinstance(error, Rebalanced):
                self._sleep(min(10.0, self._settings.backoff_s * 2 ** (self._failures - 1)))
            self.close()
            try:
                self._connect()
                return
            except Retryable as again:
                error = again
