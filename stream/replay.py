"""Events into the log: a file or a generated stream is appended to the `events` topic, at a pace.

On the way of an event: the last step before the log. A record's key is the user and its partition that of Kafka's
default partitioner; batches are appended one after the other, so that a user's events lie in one partition in the order
they were read. A record's own timestamp is the moment it was appended, never the event's time: a log deletes by the
former, and would throw away at once what happened years ago.

A replay that was cut off is taken up with `stored`: what lies in the topic already is passed over, partition by
partition, which is exact even when the last batch was stored by half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from stream.errors import ConfigError, Retryable
from stream.events import EventSettings
from stream.fields import nested, overlay
from stream.partition import partition_of
from stream.rows import Event, StreamRecord
from stream.transport import LogReader, TopicPartition, Transport

BATCH_RECORDS = 2_000
PLAIN = EventSettings()
AHEAD_S = 0.05  # a record may go out this much early, so that a fast replay does not wait for each of them
NAP_S = 0.25  # the longest wait between two looks at the clock
PROGRESS_S = 0.5
READ_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How fast to go. Both None: as fast as the log takes it; both given: whatever is slower.

    Attributes:
        speed: seconds of event time in a second; 3600 plays an hour in a second.
        rate_per_s: records a second.
    """

    speed: float | None = None
    rate_per_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("--speed", self.speed), ("--rate", self.rate_per_s)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; it must be over 0 (leave it out to go as fast as possible)")

    def due_s(self, count: int, event_ms: int) -> float:
        """When a record may go: seconds after the first. `count` records and `event_ms` of event time lie before it."""
        by_rate = count / self.rate_per_s if self.rate_per_s else 0.0
        by_time = event_ms / 1_000 / self.speed if self.speed else 0.0
        return max(by_rate, by_time)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clocks:
    """Time as the replay sees it; a test moves it by hand.

    Attributes:
        now_s: monotonic seconds.
        wall_ms: milliseconds since 1970, for the records' timestamps.
    """

    now_s: Callable[[], float]
    wall_ms: Callable[[], int]
    sleep: Callable[[float], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayProgress:
    """Where a replay stands. `share` (of the whole) and `left_s` are None where the length is not known."""

    records: int
    elapsed_s: float
    rate_per_s: float
    event_time_ms: int
    share: float | None
    left_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayReport:
    """What a replay did.

    Attributes:
        by_partition: records appended.
        passed_over: records that lay in the topic before, by partition.
    """

    by_partition: dict[int, int]
    passed_over: dict[int, int]
    elapsed_s: float
    first_event_ms: int | None
    last_event_ms: int | None

    @property
    def records(self) -> int:
        return sum(self.by_partition.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """What an earlier replay of the same events left in the topic: how many records, and the last one, by partition."""

    counts: dict[int, int]
    last: dict[int, tuple[bytes | None, bytes | None]]


def to_records(events: Iterable[Event], settings: EventSettings = PLAIN) -> Iterator[StreamRecord]:
    """Events in the wire form, keyed by user: under the names, at the paths and in the unit of the configuration."""
    encode = msgspec.json.Encoder().encode
    for event in events:
        yield event["user"].encode(), encode(_placed(event, settings)), event["time"]


def _placed(event: Event, settings: EventSettings) -> Mapping[str, Any]:
    """The JSON object of an event as the configuration expects to find it."""
    names, seconds = settings.fields, settings.time_unit == "s"
    if not names and not seconds:
        return event
    placed: dict[str, Any] = {}
    for name, value in event.items():
        written = event["time"] / 1_000 if seconds and name == "time" else value
        overlay(placed, nested(names[name], name, written) if name in names else {name: written})
    return placed


def stored(reader: LogReader, topic: str, partitions: int) -> Stored:
    """What lies in a topic that holds one replay and nothing else. Raises ConfigError when its beginning is gone."""
    counts, last = {}, {}
    for number in range(partitions):
        partition = TopicPartition(topic, number)
        first, end = reader.bounds(partition)
        if first > 0:
            raise ConfigError(
                f"{topic}/{number}: records below {first} are deleted, so what is left cannot be matched to the file; "
                f"replay into a new topic"
            )
        counts[number] = end
        if end:
            found = reader.read(partition, end - 1, READ_TIMEOUT_S, 1)
            if not found or found[0].offset != end - 1:
                raise ConfigError(f"{topic}/{number}: others write to this topic too; a replay cannot be resumed in it")
            last[number] = (found[0].key, found[0].value)
    return Stored(counts=counts, last=last)


def replay(
    records: Iterable[StreamRecord],
    transport: Transport,
    *,
    topic: str,
    partitions: int,
    clocks: Clocks,
    pace: Pace | None = None,
    limit: int | None = None,
    resume: Stored | None = None,
    total: int | None = None,
    fraction: Callable[[], float | None] | None = None,
    on_progress: Callable[[ReplayProgress], None] | None = None,
) -> ReplayReport:
    """Append `records` to `topic` in order.

    Args:
        limit: stop after this many records (those passed over count too).
        resume: pass over what an earlier replay of the same records stored; see `stored`.
        total: number of records, where it is known, for the share done.
        fraction: share of the source read so far, where `total` is not known (`EventSource.fraction`).
        on_progress: called about twice a second, and at the end.

    Raises:
        ConfigError: the topic to resume in holds something else.
        Retryable: the log did not take a batch; says how to go on.
    """
    run = _Replay(
        transport=transport,
        topic=topic,
        partitions=partitions,
        clocks=clocks,
        pace=pace or Pace(),
        total=min(filter(None, (total, limit)), default=None),
        fraction=fraction or (lambda: None),
        on_progress=on_progress or (lambda progress: None),
        resume=resume or Stored(counts={}, last={}),
    )
    for record in records:
        if limit is not None and run.seen >= limit:
            break
        run.take(record)
    return run.finish()


@dataclass(kw_only=True, slots=True)
class _Replay:
    """A replay under way: the batch in hand, the counts, the clock of its start."""

    transport: Transport
    topic: str
    partitions: int
    clocks: Clocks
    pace: Pace
    total: int | None
    fraction: Callable[[], float | None]
    on_progress: Callable[[ReplayProgress], None]
    resume: Stored
    seen: int = 0
    paced: int = 0
    in_batch: int = 0
    first_ms: int | None = None
    last_ms: int | None = None
    batch: dict[int, list[tuple[bytes | None, bytes | None]]] = field(init=False)
    appended: dict[int, int] = field(init=False)
    passed: dict[int, int] = field(init=False)
    start_s: float = field(init=False)
    progress_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.start_s = self.progress_s = self.clocks.now_s()
        self.batch = {partition: [] for partition in range(self.partitions)}
        self.appended = dict.fromkeys(self.batch, 0)
        self.passed = dict.fromkeys(self.batch, 0)

    def take(self, record: StreamRecord) -> None:
        """The next record: passed over, or put into the batch when it is due."""
        key, value, event_ms = record
        partition = partition_of(key, self.partitions) if key is not None else self.seen % self.partitions
        self.seen += 1
        if self.passed[partition] < self.resume.counts.get(partition, 0):
            self._pass_over(partition, key, value)
            return
        if self.first_ms is None:
            self.first_ms = event_ms
            self.start_s = self.clocks.now_s()
        self._wait_until(self.start_s + self.pace.due_s(self.paced, event_ms - self.first_ms))
        self.paced += 1
        self.last_ms = event_ms
        self.batch[partition].append((key, value))
        self.in_batch += 1
        if self.in_batch >= BATCH_RECORDS:
            self._flush()
            self._report()

    def finish(self) -> ReplayReport:
        """Append what is left and report."""
        self._flush()
        short = [p for p, count in self.resume.counts.items() if self.passed[p] < count]
        if short:
            raise ConfigError(
                f"{self.topic}/{short[0]} holds {self.resume.counts[short[0]]:,} records, more than the "
                f"{self.passed[short[0]]:,} of this source: it is not a part of this replay; use a new topic"
            )
        self._report(force=True)
        return ReplayReport(
            by_partition=dict(self.appended),
            passed_over=dict(self.passed),
            elapsed_s=self.clocks.now_s() - self.start_s,
            first_event_ms=self.first_ms,
            last_event_ms=self.last_ms,
        )

    def _pass_over(self, partition: int, key: bytes | None, value: bytes | None) -> None:
        self.passed[partition] += 1
        is_last = self.passed[partition] == self.resume.counts[partition]
        if is_last and self.resume.last[partition] != (key, value):
            raise ConfigError(
                f"{self.topic}/{partition}: record {self.passed[partition] - 1:,} is not the one of this source; "
                f"the topic holds another replay: use a new topic"
            )

    def _wait_until(self, due_s: float) -> None:
        left_s = due_s - self.clocks.now_s()
        if left_s <= AHEAD_S:
            return
        self._flush()
        while left_s > 0:  # ends: the clock moves by every nap
            self._report()
            self.clocks.sleep(min(left_s, NAP_S))
            left_s = due_s - self.clocks.now_s()

    def _flush(self) -> None:
        if not self.in_batch:
            return
        now_ms = self.clocks.wall_ms()
        for partition, batch in self.batch.items():
            if batch:
                try:
                    self.transport.append(self.topic, partition, iter([(k, v, now_ms) for k, v in batch]))
                except Retryable as error:
                    done = sum(self.appended.values())
                    raise Retryable(
                        f"{self.topic}/{partition}: the log did not take a batch after {done:,} records ({error}); "
                        f"the same replay with --resume goes on from what is stored"
                    ) from error
                self.appended[partition] += len(batch)
                batch.clear()
        self.in_batch = 0

    def _report(self, force: bool = False) -> None:
        now_s = self.clocks.now_s()
        if not force and now_s - self.progress_s < PROGRESS_S:
            return
        self.progress_s = now_s
        appended, elapsed_s = sum(self.appended.values()), now_s - self.start_s
        share = self.seen / self.total if self.total else self.fraction()
        self.on_progress(
            ReplayProgress(
                records=appended,
                elapsed_s=elapsed_s,
                rate_per_s=appended / elapsed_s if elapsed_s > 0 else 0.0,
                event_time_ms=self.last_ms or 0,
                share=share,
                left_s=elapsed_s * (1 - share) / share if share else None,
            )
        )
