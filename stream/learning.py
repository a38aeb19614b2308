"""The learner's loop: events in, weights out. A consumer of its own; nothing but topics joins it to the workers.

    poll -> decode -> observe (histories) -> learn (gradients, as the budget allows) -> publish: one transaction of
    weights + everything that learning needs to go on + the consumed positions

A restart goes on where the last commit stands: it loads the newest `learner` snapshot, re-reads a span before the
committed positions to rebuild the histories (without gradients), and learns from there. No event is learned twice or
lost, unless gradient work is shed under lag, which is counted.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from stream import weights
from stream.checkpoint import TopicNames
from stream.errors import ConfigError, LostPosition, Rebalanced, Retryable
from stream.events import Decoded, EventDecoder
from stream.orders import Erasures
from stream.start import EARLIEST, Start
from stream.transport import (
    GroupConsumer,
    LogReader,
    Position,
    Producer,
    Record,
    Scope,
    TopicPartition,
    Transport,
    close_all,
)

log = logging.getLogger(__name__)

BARRIER_TIMEOUT_S = 60.0
OLD_POSITION_TRIES = 4
ORDERS_INTERVAL_S = 5.0
FAR_BEHIND_TURNS = 8  # more turns' worth of records to read than this: gradients are shed
_REBUILD_READ_RECORDS = 5_000


class LearnerModel(Protocol):
    """What learns: models/learner.py. Pure: no I/O, no clock."""

    version: int

    def observe(
        self, user_key_B: Any, events: Any, names: Mapping[int, str], *, learn: bool = True, id_hash_B: Any = None
    ) -> None: ...
    def learn(self, max_steps: int) -> Any: ...
    def forget(self, keys: Any) -> int: ...
    def weights_bytes(self) -> bytes:
        """The next version, serialised; `version` is its number from now on."""

    def state_bytes(self) -> bytes: ...


class LearnerObserver(Protocol):
    """Told what happens; never decides anything."""

    def learned(self, report: Any, backlog_events: int) -> None: ...
    def published(self, version: int, bytes_sent: int, seconds: float) -> None: ...
    def event(self, name: str, **facts: object) -> None: ...


class LearnerProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Committed with the learner's positions: the version of the snapshot that belongs to them."""

    learner: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerPace:
    """How the loop divides its time.

    Attributes:
        publish_interval_s: seconds between two versions.
        steps_per_turn_max: gradient steps after each poll, at most.
        cpu_share: share of wall time spent on gradients; the rest is left to the workers. 1 = all.
        rebuild_events: events before the committed position that a restart re-reads, per partition.
        keep_versions: complete versions kept in the topic.
    """

    publish_interval_s: float
    steps_per_turn_max: int
    cpu_share: float
    rebuild_events: int
    keep_versions: int
    batch_events_max: int
    poll_timeout_s: float
    retries_max: int
    backoff_s: float


class LearnerLoop:
    """One learner process.

    Args:
        restore: makes the model from a snapshot's bytes; `fresh` makes version 0.
        publish_fresh: version 0 knows something: it is published at once, for workers that start from the seed.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        topics: TopicNames,
        app: str,
        pace: LearnerPace,
        decoder: EventDecoder,
        fresh: Callable[[], LearnerModel],
        restore: Callable[[bytes, int], LearnerModel],
        observer: LearnerObserver,
        clock: Callable[[], float],
        sleep: Callable[[float], object],
        nonce: Callable[[], str],
        start: Start = EARLIEST,
        erasures: Erasures | None = None,
        publish_fresh: bool = False,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._transport, self._topics, self._pace, self._decoder = transport, topics, pace, decoder
        self._fresh, self._restore, self._observer = fresh, restore, observer
        self._clock, self._sleep, self._nonce, self._start, self._on_step = clock, sleep, nonce, start, on_step
        self._erasures, self._publish_fresh = erasures, publish_fresh
        self._id = f"{app}.learner"
        self._failures = 0
        self._positions: dict[TopicPartition, int] = {}
        self._dirty = False
        self._publishing = False
        self._next_lag_s = self._next_orders_s = 0.0
        self._lag_records = 0
        with ExitStack() as opened:  # a later one may be refused: then those before it are closed
            if erasures is not None:
                opened.callback(close_all, erasures)
            self._producer: Producer = self._new_producer()
            opened.callback(close_all, self._producer)
            self._consumer: GroupConsumer = transport.consumer(group=self._id, topics=topics.events, reset="none")
            opened.callback(close_all, self._consumer)
            self._feed = weights.WeightsFeed(transport.reader(), topics.weights, kinds=weights.KINDS)
            opened.pop_all()
        self._snapshots: list[weights.Snapshot] = []
        self._group: object = None
        self._last_publish_s = clock()
        self.model: LearnerModel
        try:
            try:
                self.model = self._load()
            except Retryable as error:
                self._start_over(error)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ the loop

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; publishes what was learned since the last version, then leaves."""
        try:
            while not stop.is_set():
                self.turn()
            if self._dirty and self._positions:
                self.publish()
        finally:
            self.close()

    def turn(self) -> bool:
        """One poll, its gradients, and a version where one is due. Returns whether there was anything to do."""
        try:
            busy = self._read()
            start_s = self._clock()
            report = self.model.learn(self._steps_due(start_s))
            spent_s = self._clock() - start_s
            self._observer.learned(report, self._lag_records)
            if self._pace.cpu_share < 1 and report.steps:
                self._sleep(min(1.0, spent_s * (1 / self._pace.cpu_share - 1)))
            if (
                self._dirty
                and self._positions
                and self._clock() - self._last_publish_s >= self._pace.publish_interval_s
            ):
                self.publish()
            self._failures = 0
        except Rebalanced as error:
            self._abort()
            self._start_over(error)
            return True
        except Retryable as error:
            self._start_over(error)
            return True
        return busy or report.steps > 0

    def close(self) -> None:
        """Leave the group. Idempotent."""
        close_all(self._consumer, self._producer, self._feed)
        if self._erasures is not None:
            close_all(self._erasures)

    def _abort(self) -> None:
        """Close the transaction that a rebalance made void, if one is open."""
        if self._publishing:
            self._publishing = False
            try:
                self._producer.abort()
            except Retryable:  # its outcome does not matter: a new producer of the id aborts what is open
                self._producer.close()
                self._producer = self._new_producer()

    def _steps_due(self, now_s: float) -> int:
        """Gradient steps of this turn. Far behind, reading comes first; the model sheds what it cannot learn."""
        if now_s >= self._next_lag_s:  # a round trip to the log
            self._next_lag_s = now_s + 1.0
            self._lag_records = sum(self._consumer.lag().values())
        if now_s >= self._next_orders_s:
            self._next_orders_s = now_s + ORDERS_INTERVAL_S
            self._heed_orders()
        return (
            1 if self._lag_records > FAR_BEHIND_TURNS * self._pace.batch_events_max else self._pace.steps_per_turn_max
        )

    def _heed_orders(self) -> None:
        """Erase the users of new orders; their older events are not learned from any more."""
        keys = set() if self._erasures is None else self._erasures.poll()
        if keys:
            found = self.model.forget(np.array(sorted(keys), np.uint64))
            self._observer.event("users_erased", orders=len(keys), found=found)

    def _read(self) -> bool:
        try:
            polled = self._consumer.poll(self._pace.poll_timeout_s, self._pace.batch_events_max)
        except LostPosition as error:
            self._observer.event("position_lost", error=str(error))
            for tp in list(self._positions):
                self._place(tp, self._positions[tp])
            return True
        self._group = polled.group
        if polled.revoked:
            # What was learned from them since the last version is in the model already: only a restart from the
            # last commit keeps the promise that nothing is learned twice.
            raise Rebalanced(f"partitions {sorted(tp.partition for tp in polled.revoked)} moved to another learner")
        for tp in polled.assigned:
            self._take_over(tp)
        for tp, records in polled.records.items():
            self._observe(records, learn=True)
            self._positions[tp] = records[-1].offset + 1
            self._dirty = True
        return bool(polled.records)

    def _observe(self, records: Sequence[Record], *, learn: bool) -> None:
        decoded: Decoded = self._decoder.decode(records)  # dead letters are the worker's business
        if self._erasures is not None and len(self._erasures):
            erased = [
                self._erasures.erased(*event)
                for event in zip(decoded.user_key_B.tolist(), decoded.records, strict=True)
            ]
            decoded = decoded.keep(~np.array(erased, np.bool_))
        if len(decoded):
            self.model.observe(
                decoded.user_key_B,
                decoded.columns,
                decoded.interest_names,
                learn=learn,
                id_hash_B=decoded.id_hash_B,
            )

    # ------------------------------------------------------------------ publishing

    def publish(self) -> None:
        """Commit a version: weights, the learner's own state and the positions, together."""
        start_s = self._clock()
        at = self._on_step
        payload = self.model.weights_bytes()
        version = self.model.version
        state = self.model.state_bytes()
        topic = self._topics.weights
        at(1)
        self._producer.begin()
        self._publishing = True
        at(2)
        weights.send(self._producer, topic, "weights", version, payload)
        at(3)
        weights.send(self._producer, topic, "learner", version, state)
        at(4)
        self._producer.flush()
        at(5)
        metadata = msgspec.json.encode(LearnerProgress(learner=version)).decode()
        self._producer.send_offsets({tp: Position(o, metadata) for tp, o in self._positions.items()}, self._group)
        at(6)
        self._producer.commit()
        self._publishing = False
        at(7)
        self._dirty = False
        self._last_publish_s = self._clock()
        self._clean()
        self._observer.published(version, len(payload) + len(state), self._clock() - start_s)

    def _clean(self) -> None:
        """Delete what lies before the oldest version that is kept."""
        for snapshot in self._feed.poll(0.0, 1_000):
            self._snapshots.append(
                weights.Snapshot(
                    kind=snapshot.kind, version=snapshot.version, payload=b"", first_offset=snapshot.first_offset
                )
            )
        versions = sorted({s.version for s in self._snapshots})
        if len(versions) <= self._pace.keep_versions:
            return
        oldest = versions[-self._pace.keep_versions]
        self._snapshots = [s for s in self._snapshots if s.version >= oldest]
        admin = self._transport.admin()
        try:
            first = min(s.first_offset for s in self._snapshots)
            admin.delete_records(TopicPartition(self._topics.weights, weights.PARTITION), first)
        finally:
            admin.close()

    # ------------------------------------------------------------------ starting and starting over

    def _load(self) -> LearnerModel:
        """The model as of the newest committed snapshot, or version 0.

        Our producer has fenced every older learner; what one of them committed lies before our mark.
        """
        if self._erasures is not None:
            self._erasures.poll()  # before histories are rebuilt from events that are still in their topic
        nonce = self._nonce()
        weights.send_barrier(self._producer, self._topics.weights, nonce)
        newest = self._feed.until(nonce, BARRIER_TIMEOUT_S, self._clock)
        for snapshot in newest.values():
            self._snapshots.append(
                weights.Snapshot(
                    kind=snapshot.kind, version=snapshot.version, payload=b"", first_offset=snapshot.first_offset
                )
            )
        own = newest.get("learner")
        self._restored = 0  # version of the snapshot that our positions were committed with
        if own is None:
            if self._publish_fresh:
                self._dirty, self._last_publish_s = True, -math.inf
            return self._fresh()
        self._observer.event("learner_restored", version=own.version)
        self._restored = own.version
        return self._restore(own.payload, own.version)

    def _take_over(self, tp: TopicPartition) -> None:
        position = self._committed(tp)
        offset = None if position is None else position.offset
        if position is not None:
            self._check(position, tp)
            self._rebuild(tp, position.offset)
        self._place(tp, offset)
        self._consumer.resume([tp])

    def _place(self, tp: TopicPartition, offset: int | None) -> None:
        """Read on from a position, or from where a new application begins; records that are gone are passed over."""
        reader = self._transport.reader()
        try:
            first, end = reader.bounds(tp)
            if offset is None:
                offset = self._start.offset(reader, tp)
        finally:
            reader.close()
        if not first <= offset <= end:
            where = f"{tp.topic}-{tp.partition}"
            self._observer.event("records_passed_over", partition=where, records=max(0, first - offset))
            self._dirty = True
            offset = first
        self._positions[tp] = offset
        self._consumer.seek(tp, offset)

    def _committed(self, tp: TopicPartition) -> Position | None:
        return self._consumer.committed([tp])[tp]

    def _check(self, position: Position, tp: TopicPartition) -> None:
        """The snapshot that we hold must be the one that was committed with the positions."""
        try:
            progress = msgspec.json.decode(position.metadata, type=LearnerProgress)
        except msgspec.DecodeError:
            raise ConfigError(
                f"{tp.topic}-{tp.partition}: the position of group {self._id} was not committed by a learner; "
                "use another app.name"
            ) from None
        if progress.learner > self.model.version:
            raise ConfigError(
                f"learner state {progress.learner} is gone from topic {self._topics.weights} (version "
                f"{self.model.version} is the newest there); was the topic deleted? Start under a new app.name"
            )
        if progress.learner < self._restored and self._failures < OLD_POSITION_TRIES:
            # A broker that comes back may hand out old ones. It may also be right: another learner had the partition.
            raise Retryable(
                f"{tp.topic}-{tp.partition}: the position of group {self._id} belongs to learner state "
                f"{progress.learner}, and {self._restored} is the newest; it is asked for again"
            )

    def _rebuild(self, tp: TopicPartition, offset: int) -> None:
        """Re-read a span before the committed position: histories, without gradients."""
        reader: LogReader = self._transport.reader()
        try:
            at = max(0, offset - self._pace.rebuild_events)
            while at < offset:
                records = [r for r in reader.read(tp, at, 1.0, _REBUILD_READ_RECORDS) if r.offset < offset]
                if not records:
                    break
                self._observe(records, learn=False)
                at = records[-1].offset + 1
        finally:
            reader.close()

    def _start_over(self, error: Retryable) -> None:
        """Back to the last commit: new clients, the newest committed snapshot, its positions. Bounded tries."""
        while True:
            self._failures += 1
            self._observer.event("learner_retry", failures=self._failures, error=str(error))
            if self._failures > self._pace.retries_max:
                raise error
            self._sleep(min(10.0, self._pace.backoff_s * 2 ** (self._failures - 1)))
            try:
                self._connect(keep_producer=isinstance(error, Rebalanced))
                return
            except Retryable as again:
                error = again

    def _new_producer(self) -> Producer:
        place = TopicPartition(self._topics.weights, weights.PARTITION)
        return self._transport.producer(transactional_id=self._id, scope=Scope(partitions=[place], group=self._id))

    def _connect(self, *, keep_producer: bool) -> None:
        close_all(self._consumer, self._feed)
        self._positions.clear()
        self._dirty = False
        self._snapshots.clear()
        if not keep_producer:
            # After a rebalance nothing is open. A new producer would fence the other learner that may have joined;
            # the old one is told by its next call if it was fenced.
            self._producer.close()
            self._publishing = False
            self._producer = self._new_producer()
        self._consumer = self._transport.consumer(group=self._id, topics=self._topics.events, reset="none")
        self._feed = weights.WeightsFeed(self._transport.reader(), self._topics.weights, kinds=weights.KINDS)
        self.model = self._load()
