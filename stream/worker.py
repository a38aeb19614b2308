"""The loop around the pipeline: poll, process, commit, merge; and what happens when any of it fails.

    joining ──assigned──> restoring ──barrier seen──> running ──revoked or lost──> (dropped)
                                          │ ▲
                           Retryable      ▼ │  committed positions, or the state log, say whether the attempt counts
                                        resetting

What each error means, by stage:

| stage | error | the worker |
|---|---|---|
| decode | bad record | writes a dead letter, goes on; over the poison limit: Corrupt, before the batch is committed |
| poll, look-up | Retryable | puts back what it has gathered, tries again, bounded |
| process | anything unexpected | halves the batch until one record is left; that one is a dead letter |
| commit | Rebalanced | aborts, drops the attempt, seeks back what it still owns |
| commit | Retryable before the call that ends it | new producer; drops the attempt, seeks back; bounded tries |
| commit | Retryable | new producer; committed == attempted: merges; else restores the partitions; bounded tries |
| cleaning | Retryable | leaves it for a later batch |
| restore | Retryable | tries again, bounded |
| poll, seek | LostPosition | stops, or goes on where worker.lost_positions says and counts |
| any | Fenced | stops clean, exit code of its own |
| any | Corrupt, ConfigError | stops, writes nothing |
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

import numpy as np

from stream import records as out
from stream.checkpoint import Checkpoint, OnStep, TopicNames
from stream.cleaning import LOG_BYTES_MIN, Cleaner
from stream.config import WorkerSettings
from stream.engine import Engine, Output, PartitionState, PartitionStep
from stream.errors import ConfigError, Corrupt, DriftlineError, LostPosition, Rebalanced, Retryable
from stream.orders import due
from stream.progress import Progress
from stream.restore import restore
from stream.start import EARLIEST, Start
from stream.state import Records
from stream.transport import (
    GroupConsumer,
    Polled,
    Position,
    Producer,
    Record,
    Scope,
    TopicPartition,
    Transport,
    close_all,
)

log = logging.getLogger(__name__)

RENEW_AFTER = 3  # looks at positions that an open transaction holds, which may be ours
LOOKS_MAX = 6  # then the state log's own word will do, where it has one
LOOK_INTERVAL_S = 1.0  # how often lag and users are reported

Inputs = dict[TopicPartition, list[Record]]


class WeightsSource(Protocol):
    """Where newer weights come from. `swap` is called between transactions only."""

    def swap(self, at_least: int = 0) -> None:
        """Load the newest weights into the engine if there are newer ones; wait (bounded) for version `at_least`."""

    def close(self) -> None:
        """Let go of the log; the worker does it when it closes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one committed batch was, for metrics and logs."""

    steps: Sequence[PartitionStep]
    process_s: float
    commit_s: float


class Observer(Protocol):
    """Told what happens; never decides anything."""

    def turn(self, turn: Turn) -> None: ...
    def event(self, name: str, **facts: object) -> None: ...
    def owned(self, partitions: Sequence[int], users: int, restoring: int, lag_records: int) -> None: ...


@dataclass(kw_only=True, slots=True)
class WorkerParts:
    """What a worker is made of; cli.py assembles it.

    Attributes:
        cleaning_factor: a state log is cleaned above so many times its live bytes, once it is log_bytes_min long.
        on_step: called before each numbered step of a commit (tests kill the process there).
        executor: where restores run; None = on a helper thread of the worker's own.
    """

    transport: Transport
    engine: Engine
    weights: WeightsSource
    observer: Observer
    topics: TopicNames
    app: str
    partitions: int
    settings: WorkerSettings
    block_bytes_max: int
    clock: Callable[[], float]
    sleep: Callable[[float], object]
    nonce: Callable[[], bytes]
    start: Start = EARLIEST
    cleaning_factor: float = 3.0
    log_bytes_min: int = LOG_BYTES_MIN
    on_step: OnStep = lambda step: None
    executor: Executor | None = None


@dataclass(kw_only=True, slots=True)
class _Restoring:
    """A partition on its way in."""

    future: Future[PartitionState | None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    attempts: int = 1


class Worker:
    """One member of the consumer group.

    Example:
        >>> worker = Worker(parts)  # doctest: +SKIP
        >>> worker.run(stop)  # until `stop` is set; raises Fenced, Corrupt, ConfigError  # doctest: +SKIP
    """

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._id = f"{parts.app}.{parts.settings.slot}"
        topics = (parts.topics.state, *parts.topics.outputs.values())
        self._scope = Scope.over(dict.fromkeys(topics, parts.partitions), group=parts.app)
        self._barrier_id = f"{self._id}.barrier"
        self._barrier_scope = Scope.over({parts.topics.state: parts.partitions})
        self._checkpoint = Checkpoint(
            engine=parts.engine,
            topics=parts.topics,
            partitions=parts.partitions,
            block_bytes_max=parts.block_bytes_max,
            on_step=parts.on_step,
        )
        self.states: dict[int, PartitionState] = {}
        self._restoring: dict[int, _Restoring] = {}
        self._pool = parts.executor or ThreadPoolExecutor(1, "restore")
        self._poison: deque[tuple[int, int]] = deque()  # (records, dead) by batch
        self._pending: Inputs = {}  # gathered, not committed yet
        self._failures: Counter[str] = Counter()  # in a row, by kind: of looks at the log, of commits
        self._stop: threading.Event | None = None
        self._next_look_s = 0.0
        with ExitStack() as opened:  # a later one may be refused: then those before it are closed
            opened.callback(close_all, parts.weights)
            self._cleaner = Cleaner(
                engine=parts.engine,
                reader=parts.transport.reader(),
                admin=parts.transport.admin(),
                topic=parts.topics.state,
                factor=parts.cleaning_factor,
                log_bytes_min=parts.log_bytes_min,
            )
            opened.callback(close_all, self._cleaner)
            self._producer: Producer = self._new_producer()
            opened.callback(close_all, self._producer)
            self._consumer: GroupConsumer = parts.transport.consumer(
                group=parts.app, topics=parts.topics.inputs, reset="none"
            )
            opened.callback(close_all, self._consumer)
            self._reader = parts.transport.reader()
            opened.pop_all()
        self._at: dict[TopicPartition, int] = {}  # where each partition that we run stands, by what is committed
        self._waiting: dict[TopicPartition, Record] = {}  # orders whose time has not come; their partitions are paused
        self._overlong: set[int] = set()  # partitions taken over with a state log that is too long
        self._uncommitted: set[int] = set()  # partitions that began somewhere and have no position yet
        self._unanswered = False  # whether the group's positions could not be had when they were last asked for

    # ------------------------------------------------------------------ the loop

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then leave the group. The batch under way is finished first, if it can be."""
        self._stop = stop
        try:
            while not stop.is_set():
                self.turn()
        except Retryable:
            if not stop.is_set():  # else nothing is lost: what is not committed comes again at the next start
                raise
        finally:
            self.close()

    def turn(self) -> bool:
        """Gather one batch and commit it. Returns whether there was anything to do."""
        try:
            self._parts.weights.swap()
            self._let_orders_come()
            group = self._gather()
            self._hold_orders_back()
            self._finish_restores()
            self._failures["look"] = 0
            self._shorten(group)
            busy = self._work_off(deque(self._cut(self._pending)), group)
            self._commit_beginnings(group)
            if not busy:
                self._rewrite_when_idle(group)
            return busy
        except Retryable as error:  # a poll or a look-up failed: nothing was changed
            self._put_back()
            self._back_off("retry", error, "look")
            return True

    def _work_off(self, queue: deque[Inputs], group: object) -> bool:
        """Process and commit batch after batch, until one is void; whether there was any."""
        busy = bool(queue)
        while queue:
            batch = queue.popleft()
            try:
                steps, process_s = self._process(batch)
            except DriftlineError:
                raise
            except Exception as error:
                if sum(map(len, batch.values())) > 1:
                    queue.extendleft(reversed(halves(batch)))
                    continue
                steps, process_s = [self._failed_step(batch, error)], 0.0
            if not self._commit(steps, group, process_s):
                self._put_back()
                break
            for tp, records in batch.items():
                self._pending[tp] = self._pending[tp][len(records) :]
        return busy

    def _new_producer(self) -> Producer:
        """Fences an older one of this slot and ends what it left open, lost parts of finished transactions included."""
        return self._parts.transport.producer(transactional_id=self._id, scope=self._scope)

    def _end_barriers(self) -> None:
        """The same for the id that writes our barriers, in the helper thread; if it fails, the next restore does it."""
        with suppress(Retryable):
            self._parts.transport.producer(transactional_id=self._barrier_id, scope=self._barrier_scope).close()

    def close(self) -> None:
        """Leave the group and end the helper thread. Idempotent."""
        for restoring in self._restoring.values():
            restoring.cancelled.set()
        close_all(self._consumer, self._producer, self._cleaner, self._reader, self._parts.weights)
        self._pool.shutdown(wait=True, cancel_futures=True)

    # ------------------------------------------------------------------ gathering

    def _gather(self) -> object:
        """Poll until the batch is full or `batch_wait_s` is over. The batch is `_pending`; returns its proof.

        Records of partitions lost meanwhile are dropped. If the group moves on between two polls, the batch is put
        back: a proof of the new generation would not fence records that were polled in the older one.
        """
        settings, clock = self._parts.settings, self._parts.clock
        self._pending = {}
        count, size = 0, 0
        polled = self._poll(settings.poll_timeout_s, settings.batch_events_max)
        group = polled.group
        deadline_s = clock() + settings.batch_wait_s
        while polled.records:
            for batch in polled.records.values():
                count += len(batch)
                size += sum(len(r.value) for r in batch if r.value is not None)
            left_s = deadline_s - clock()
            if count >= settings.batch_events_max or size >= settings.batch_bytes_max or left_s <= 0:
                break
            polled = self._poll(left_s, settings.batch_events_max - count)
            if polled.group != group:
                self._put_back()
                break
        return group

    def _poll(self, timeout_s: float, max_records: int) -> Polled:
        try:
            polled = self._consumer.poll(timeout_s, max_records)
        except LostPosition as error:
            self._parts.observer.event("position_lost", error=str(error))
            self._pending = {}
            self._seek_back()  # stops us, or goes on, as worker.lost_positions says
            return Polled()
        for tp in polled.revoked:
            self._drop(tp.partition)
        for partition in sorted({tp.partition for tp in polled.assigned}):
            self._start_restore(partition)
        for tp, batch in polled.records.items():
            self._pending.setdefault(tp, []).extend(batch)
        return polled

    def _put_back(self) -> None:
        """What is not committed comes again: every partition goes back to its first such record.

        Also where we hold none: a poll that failed may have taken records that it did not give out.
        """
        for tp in self._running():
            if tp in self._waiting:
                continue
            records = self._pending.get(tp)
            self._consumer.seek(tp, records[0].offset if records else self._at[tp])
        self._pending = {}

    def _hold_orders_back(self) -> None:
        """Orders wait, unread, until the input that they speak of is committed: see orders.py."""
        for tp in [tp for tp in self._pending if tp.topic == self._parts.topics.control]:
            records = self._pending[tp]
            count = due(records, self._at)
            if count < len(records):
                self._waiting[tp] = records[count]
                self._consumer.pause([tp])
                self._consumer.seek(tp, records[count].offset)
            self._pending[tp] = records[:count]

    def _let_orders_come(self) -> None:
        for tp, order in list(self._waiting.items()):
            if due([order], self._at):
                del self._waiting[tp]
                self._consumer.resume([tp])

    def _cut(self, inputs: Inputs) -> list[Inputs]:
        """Cut at the epochs of each partition: what crosses users changes only there."""
        cuts: list[Inputs] = []
        for partition in {tp.partition for tp in inputs}:
            seen = self.states[partition].seen
            part, room = 0, self._parts.engine.next_cut(seen) - seen
            for tp in [tp for tp in inputs if tp.partition == partition]:
                batch = inputs[tp]
                while batch:
                    if len(cuts) <= part:
                        cuts.append({})
                    cuts[part][tp] = batch[:room]
                    taken = len(cuts[part][tp])
                    seen, room, batch = seen + taken, room - taken, batch[taken:]
                    if room == 0:
                        part, room = part + 1, self._parts.engine.next_cut(seen) - seen
        return cuts

    # ------------------------------------------------------------------ processing

    def _process(self, batch: Inputs) -> tuple[list[PartitionStep], float]:
        start_s = self._parts.clock()
        steps = self._parts.engine.process(self.states, batch)
        self._check_poison(batch, steps)
        return steps, self._parts.clock() - start_s

    def _failed_step(self, batch: Inputs, error: Exception) -> PartitionStep:
        """The single record on which the engine fails becomes a dead letter and leaves nothing else."""
        ((tp, (record,)),) = batch.items()
        log.error("event=processing_failed topic=%s partition=%d offset=%d", *tp, record.offset, exc_info=error)
        state = self.states[tp.partition]
        letter = out.dead_letter(
            reason="processing_failed",
            message=f"{type(error).__name__}: {error}",
            source=out.Source(topic=tp.topic, partition=tp.partition, offset=record.offset),
            timestamp_ms=record.timestamp,
            key=record.key,
            value=record.value,
        )
        none: Records = np.zeros(0, self._parts.engine.dtype)
        return PartitionStep(
            partition=tp.partition,
            positions={tp: record.offset + 1},
            records=none,
            seen=state.seen + 1,
            watermark_ms=state.watermark_ms,
            outputs=[Output(stream="dead_letters", key=record.key, value=out.encode(letter))],
        )

    def _check_poison(self, batch: Inputs, steps: Sequence[PartitionStep]) -> None:
        """Stop before the input drains into the dead letters (a wrong format, not a few bad records)."""
        settings = self._parts.settings
        dead = sum(output.stream == "dead_letters" for step in steps for output in step.outputs)
        self._poison.append((sum(map(len, batch.values())), dead))
        while sum(n for n, _ in self._poison) - self._poison[0][0] >= settings.poison_window:
            self._poison.popleft()
        dead = sum(d for _, d in self._poison)
        if dead > settings.poison_share_max * settings.poison_window:
            raise Corrupt(
                f"{dead} of the last {sum(n for n, _ in self._poison)} records could not be used, over "
                "worker.poison_share_max; the last batch was not committed. Look at the newest dead letters: is "
                "events.fields right, and is the topic keyed by the user id?"
            )

    # ------------------------------------------------------------------ committing

    def _commit(self, steps: Sequence[PartitionStep], group: object, process_s: float) -> bool:
        """Commit and merge; False if the attempt was void and its records will come again."""
        start_s = self._parts.clock()
        for step in steps:
            self._cleaner.extend(self.states[step.partition], step)
        try:
            self._checkpoint.commit(self._producer, self.states, steps, group)
        except Retryable as error:
            if not self._settle(steps, error):
                for step in steps:
                    self._cleaner.void(step.partition)
                return False
        self._failures.clear()
        self._checkpoint.merge(self.states, steps)
        for step in steps:
            self._at.update(step.positions)
            self._uncommitted.discard(step.partition)
            self._cleaner.committed(self.states[step.partition], step)
        self._parts.observer.turn(Turn(steps=steps, process_s=process_s, commit_s=self._parts.clock() - start_s))
        return True

    def _settle(self, steps: Sequence[PartitionStep], error: Retryable) -> bool:
        """After a failed commit: find out whether it counts. True if it did.

        Does not return before that is known: with the outcome open, neither the arena nor the positions can be right.
        """
        sealing = self._checkpoint.sealing and not isinstance(error, Rebalanced)  # that is a refusal
        # With their metadata: a step without input commits the offset that stands there already.
        attempted = self._checkpoint.positions(steps)
        name = "rebalanced" if isinstance(error, Rebalanced) else "commit_failed"
        while True:
            self._back_off(name, error, "commit")
            try:
                self._producer.close()
                # A new one of the same id aborts, or waits for, what the old one left open: then positions are final.
                self._producer = self._new_producer()
                if not isinstance(error, Rebalanced):
                    self._pool.submit(self._end_barriers)
                found = self._consumer.committed(list(attempted)) if sealing else {}
                break
            except Retryable as again:
                name, error = "outcome_open", again
        equal = [position == attempted[tp] for tp, position in found.items()]
        # Other positions than ours prove nothing: the new owner of a partition may have gone on since, and a broker
        # that comes back may hand out old ones. The state log knows: our share is read back.
        outcome = "void" if not sealing else "committed" if all(equal) else "read_back"
        self._parts.observer.event("commit_settled", outcome=outcome)
        if outcome == "read_back":
            for partition in sorted({tp.partition for tp in attempted}):
                self._consumer.pause(self._inputs_of(partition))
                self._drop(partition)
                self._start_restore(partition)
        return outcome == "committed"

    def _back_off(self, name: str, error: Retryable, kind: str) -> None:
        """Count a failure and wait; raises the error when there were too many in a row, or when we are to stop."""
        self._failures[kind] += 1
        failures, settings = self._failures[kind], self._parts.settings
        self._parts.observer.event(name, failures=failures, error=str(error))
        if failures > settings.retries_max or (self._stop is not None and self._stop.is_set()):
            raise error
        pause_s = min(settings.backoff_max_s, settings.backoff_s * 2 ** min(failures - 1, 30))
        if self._stop is not None:
            self._stop.wait(pause_s)
        else:
            self._parts.sleep(pause_s)

    def _committed(self, tps: Sequence[TopicPartition], looks_max: float) -> Mapping[TopicPartition, Position | None]:
        """Stable committed positions; waits, bounded, while an open transaction holds them. None after so many looks.

        A broker that has read its group log by halves may hold a transaction for open that is long over.
        """
        looks = 0
        while looks < looks_max:
            try:
                committed = self._consumer.committed(tps)
            except Retryable as error:
                looks += 1
                self._back_off("positions_unstable", error, "look")
                if self._failures["look"] >= RENEW_AFTER:
                    self._producer.close()
                    with suppress(Retryable):  # else the next commit notices, and settles
                        self._producer = self._new_producer()
            else:
                self._unanswered = False
                return committed
        self._unanswered = True
        return {}

    def _seek_back(self) -> None:
        """Every partition that we run goes back to its committed position."""
        for tp in self._running():
            self._seek(tp, self._at[tp])

    def _seek(self, tp: TopicPartition, offset: int | None) -> None:
        """To the position; where nothing was ever committed, to where a new application begins."""
        if offset is None:
            self._uncommitted.add(tp.partition)
            offset = self._at.get(tp)
        first, end, begin = self._bounds(tp)
        if offset is None:
            offset = begin
        elif not first <= offset <= end:
            offset = self._pass_over(tp, offset, first, end)
        self._at[tp] = offset
        self._consumer.seek(tp, offset)

    def _bounds(self, tp: TopicPartition) -> tuple[int, int, int]:
        """First offset, end, and where a new application begins; waits, bounded, for a log that does not answer."""
        while True:
            try:
                first, end = self._reader.bounds(tp)
                oldest = self._parts.start == EARLIEST or tp.topic == self._parts.topics.control
                begin = first if oldest else self._parts.start.offset(self._reader, tp)
                return first, end, begin
            except Retryable as error:
                self._back_off("bounds_unknown", error, "look")

    def _pass_over(self, tp: TopicPartition, offset: int, first: int, end: int) -> int:
        """What to do about a position that is gone; where to go on."""
        rule = self._parts.settings.lost_positions
        what = f"{first - offset} records were deleted before they were read"
        if offset > end:
            what = "the topic was made anew, or has lost its end"
        what = f"position {offset} of {tp.topic}-{tp.partition} is not in the log any more ({first} to {end}): {what}"
        if rule == "stop":
            raise LostPosition(f"{what}. Set worker.lost_positions to earliest or latest to go on without them")
        self._parts.observer.event(
            "position_passed_over", partition=tp.partition, records=max(0, first - offset), error=what
        )
        return end if rule == "latest" else first

    def _commit_beginnings(self, group: object) -> None:
        """Fix where partitions begin, if not at their oldest record: a restart before an event came begins there."""
        if self._parts.start == EARLIEST or group is None:
            return
        for partition in sorted(self._uncommitted & self.states.keys()):
            if not self._commit([self._idle_step(partition)], group, 0.0):
                return

    def _shorten(self, group: object) -> None:
        """A log that is too long when we take it over is cleaned before any input: that may be what we die of."""
        for partition in sorted(self._overlong & self.states.keys()):
            before = self.states[partition].log_bytes
            if not self._commit([self._idle_step(partition)], group, 0.0):
                return
            state = self.states[partition]
            # A very short log may be as short as the marks of the cleaning allow: then that would go on for ever.
            if not self._cleaner.is_too_long(state) or state.log_bytes >= before:
                self._overlong.discard(partition)

    def _rewrite_when_idle(self, group: object) -> None:
        """Without input nothing is committed: what erasures left in older blocks is rewritten by steps of their own."""
        for partition, state in list(self.states.items()):
            if state.rewrite_below and not self._commit([self._idle_step(partition)], group, 0.0):
                return

    def _idle_step(self, partition: int) -> PartitionStep:
        """A step without input: commits the positions that stand, which fences, and what the cleaner adds."""
        state = self.states[partition]
        none: Records = np.zeros(0, self._parts.engine.dtype)
        return PartitionStep(
            partition=partition,
            positions={tp: self._at[tp] for tp in self._inputs_of(partition)},
            records=none,
            seen=state.seen,
            watermark_ms=state.watermark_ms,
        )

    def _inputs_of(self, partition: int) -> list[TopicPartition]:
        return [TopicPartition(topic, partition) for topic in self._parts.topics.inputs]

    def _running(self) -> list[TopicPartition]:
        return [tp for partition in self.states for tp in self._inputs_of(partition)]

    # ------------------------------------------------------------------ partitions that come and go

    def _drop(self, partition: int) -> None:
        restoring = self._restoring.pop(partition, None)
        if restoring is not None:
            restoring.cancelled.set()
        self._cleaner.forget(partition)
        self._uncommitted.discard(partition)
        self._overlong.discard(partition)
        for tp in self._inputs_of(partition):
            self._at.pop(tp, None)
        for tp in [tp for tp in self._pending if tp.partition == partition]:
            del self._pending[tp]
            self._waiting.pop(tp, None)
        if self.states.pop(partition, None) is not None:
            self._parts.observer.event("partition_dropped", partition=partition)

    def _start_restore(self, partition: int) -> None:
        if partition in self._restoring or partition in self.states:
            return
        cancelled = threading.Event()
        future = self._pool.submit(self._restore, partition, cancelled)
        self._restoring[partition] = _Restoring(future=future, cancelled=cancelled)

    def _restore(self, partition: int, cancelled: threading.Event) -> PartitionState | None:
        parts = self._parts
        return restore(
            parts.transport,
            engine=parts.engine,
            topic=parts.topics.state,
            partition=partition,
            transactional_id=self._barrier_id,
            scope=self._barrier_scope,
            nonce=parts.nonce(),
            timeout_s=parts.settings.restore_timeout_s,
            clock=parts.clock,
            cancelled=cancelled.is_set,
            on_progress=lambda at: parts.observer.event(
                "restoring",
                partition=at.partition,
                share=round(at.share, 4),
                bytes=at.bytes,
                eta_s=round(at.eta_s, 1),
            ),
        )

    def _finish_restores(self) -> None:
        """Take over the partitions whose restore is done: state, then committed positions, then resume."""
        for partition, restoring in list(self._restoring.items()):
            if not restoring.future.done():
                continue
            try:
                state = restoring.future.result()
            except Retryable as error:
                if restoring.attempts > self._parts.settings.retries_max:
                    raise
                self._parts.observer.event("restore_failed", partition=partition, error=str(error))
                restoring.attempts += 1
                restoring.future = self._pool.submit(self._restore, partition, restoring.cancelled)
                continue
            if state is not None:
                self._take_over(partition, state)
            self._restoring.pop(partition, None)
        now_s = self._parts.clock()
        if now_s >= self._next_look_s:  # asking for the lag is a round trip to the log
            self._next_look_s = now_s + LOOK_INTERVAL_S
            self._parts.observer.owned(
                sorted(self.states),
                sum(len(s.arena) for s in self.states.values()),
                len(self._restoring),
                sum(self._consumer.lag().values()) if self.states else 0,
            )

    def _take_over(self, partition: int, state: PartitionState) -> None:
        """Go on from where the state log says that the input was read; the group's positions may be older.

        Raises:
            Retryable: the log says nothing (an older program wrote it) and the group's position is older than the
                state: it is asked for again.
        """
        tps = self._inputs_of(partition)
        own = state.committed
        looks_max = math.inf if own is None else 1 if self._unanswered else LOOKS_MAX
        committed = dict(self._committed(tps, looks_max))
        if own is None and not any(committed.values()):  # more partitions than there were: number 0 knows the old count
            committed |= self._committed([TopicPartition(tp.topic, 0) for tp in tps], looks_max)
        told = {tp: Progress.load(p.metadata, f"{tp.topic}-{tp.partition}") for tp, p in committed.items() if p}
        for one in filter(None, told.values()):
            self._check_partitions(one)
        newest = max(
            (found for tp in tps if (found := told.get(tp)) is not None), key=attrgetter("next_block"), default=None
        )
        if own is not None and newest is not None and newest.next_block > own.progress.next_block:
            own = None  # the log has lost its end: the group knows best
        progress = newest if own is None else own.progress
        if progress is not None:
            self._check_partitions(progress)
            if own is None and progress.next_block < state.next_block:
                raise Retryable(
                    f"partition {partition}: the committed position is older than the state committed with it; where "
                    "that stays so, look at the broker's log of group positions before this worker goes on"
                )
            self._parts.weights.swap(at_least=progress.weights)
            state.seen = max(state.seen, progress.seen)
            state.watermark_ms = max(state.watermark_ms, progress.watermark_ms)
            state.next_block = max(state.next_block, progress.next_block)
        for tp in tps:
            position = committed.get(tp)
            offset = told_offset = None if position is None else position.offset
            if own is not None and (position is None or position.metadata):  # else an operator has set it
                offset = own.offsets.get(tp.topic, told_offset)
            if offset != told_offset:
                where = f"{tp.topic}-{tp.partition}"
                self._parts.observer.event("position_behind", partition=where, group=told_offset, state=offset)
            self._seek(tp, offset)
        self.states[partition] = state
        if self._cleaner.is_too_long(state):
            self._overlong.add(partition)
        self._consumer.resume(tps)
        self._parts.observer.event("partition_running", partition=partition, users=len(state.arena), seen=state.seen)

    def _check_partitions(self, progress: Progress) -> None:
        if progress.partitions != self._parts.partitions:
            raise ConfigError(
                f"the topics had {progress.partitions} partitions when this application's state was written and have "
                f"{self._parts.partitions} now: users have moved between partitions. Go back to the old count, or "
                "migrate: new topics (topics.prefix, topics.events), a new app.name, `driftline rekey OLD NEW` for the "
                "input"
            )


def halves(batch: Inputs) -> list[Inputs]:
    """A batch of two or more records in two, in order."""
    first: Inputs = {}
    second: Inputs = {}
    left = sum(map(len, batch.values())) // 2
    for tp, records in batch.items():
        head, tail = records[:left], records[left:]
        left -= len(head)
        if head:
            first[tp] = head
        if tail:
            second[tp] = tail
    return [first, second]


def batch_counts(steps: Sequence[PartitionStep]) -> Mapping[str, int]:
    """Sums over the metrics of a batch's steps."""
    totals: dict[str, int] = {}
    for step in steps:
        if step.metrics is not None:
            for name in ("records", "events", "dead_letters", "late", "forecasts", "alerts", "new_users", "scored"):
                totals[name] = totals.get(name, 0) + getattr(step.metrics, name)
    return totals
