"""`driftline demo`: the real processes on an embedded log, fed with a generated shop stream whose truth is known.

Beside the way of an event: replays the stream into the log while a worker and a learner run as processes of their own,
watches the `metrics` topic until every record is handled, stops them, and hands the finished log to demo.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from stream.assembly import topic_specs
from stream.config import Config, topic_names
from stream.demo import DemoTopics, render, score
from stream.errors import DriftlineError, Retryable
from stream.records import BatchMetrics
from stream.replay import Clocks, Pace, ReplayProgress, replay
from stream.rows import StreamRecord
from stream.simulate import ShopStream
from stream.summary import DemoScore
from stream.supervise import Child, supervise
from stream.transport import LogReader, TopicPartition, Transport

LOOK_S = 0.5
STALLED_MAX_S = 90.0  # nothing handled for so long: something is wrong
FIRST_MAX_S = 300.0  # the same for the first event: a fresh machine compiles first
READ_RECORDS = 5_000


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoProgress:
    """Where a demo stands. The means are over the scored events so far; 0 before there are any."""

    total: int
    sent: int = 0
    handled: int = 0
    forecasts: int = 0
    alerts: int = 0
    dead_letters: int = 0
    weights_version: int = 0
    scored: int = 0
    reciprocal_ranks: float = 0.0
    recency_reciprocal_ranks: float = 0.0
    elapsed_s: float = 0.0

    @property
    def mrr(self) -> float:
        return self.reciprocal_ranks / self.scored if self.scored else 0.0

    @property
    def recency_mrr(self) -> float:
        return self.recency_reciprocal_ranks / self.scored if self.scored else 0.0


def run_demo(
    connect: Callable[[], Transport],
    config: Config,
    stream: ShopStream,
    children: Sequence[Child],
    *,
    rate_per_s: float | None,
    report: Path,
    on_progress: Callable[[DemoProgress], None],
) -> DemoScore:
    """Run the processes over the whole stream, score what they published and write the report.

    Args:
        connect: opens the log; each thread opens its own.

    Raises:
        DriftlineError: a process failed for good, or nothing was handled for STALLED_MAX_S.
    """
    transport = connect()
    try:
        admin = transport.admin()
        admin.create(topic_specs(config))
        admin.close()
        elapsed_s = _run_processes(connect, transport, config, stream, children, rate_per_s, on_progress)
        judged = _judge(transport, config, stream, elapsed_s)
    finally:
        transport.close()
    render(judged, report)
    return judged


def _run_processes(
    connect: Callable[[], Transport],
    transport: Transport,
    config: Config,
    stream: ShopStream,
    children: Sequence[Child],
    rate_per_s: float | None,
    on_progress: Callable[[DemoProgress], None],
) -> float:
    """Keep the processes alive while the stream goes through them; seconds that it took."""
    stop, ended = threading.Event(), threading.Event()

    def keep_alive() -> None:
        try:
            supervise(children, stop, stop_s=config.worker.shutdown_s + 5)
        finally:
            ended.set()

    keeper = threading.Thread(target=keep_alive, name="supervise")
    keeper.start()
    try:
        return _feed_and_watch(connect, transport, config, stream, rate_per_s, ended, on_progress)
    finally:
        stop.set()
        keeper.join()


def _judge(transport: Transport, config: Config, stream: ShopStream, elapsed_s: float) -> DemoScore:
    names = topic_names(config)
    reader = transport.reader()
    try:
        return score(
            reader,
            DemoTopics(
                events=config.topics.events[0],
                forecasts=names["forecasts"],
                alerts=names["alerts"],
                dead_letters=names["dead_letters"],
                metrics=names["metrics"],
                partitions=config.topics.partitions,
            ),
            stream.truth,
            elapsed_s,
        )
    finally:
        reader.close()


def _feed_and_watch(
    connect: Callable[[], Transport],
    transport: Transport,
    config: Config,
    stream: ShopStream,
    rate_per_s: float | None,
    ended: threading.Event,
    on_progress: Callable[[DemoProgress], None],
) -> float:
    """Replay on a thread and look at the metrics until all is handled; seconds from the first handled event on."""
    feeding = _Feeding(connect, config, stream, rate_per_s)
    feeding.thread.start()
    watch = _Watch(transport.reader(), topic_names(config)["metrics"], config.topics.partitions, len(stream))
    first_s = changed_s = time.monotonic()
    try:
        while watch.progress.handled < len(stream):
            if feeding.failed is not None:
                raise feeding.failed
            if ended.is_set():
                raise DriftlineError("a process of the demo ended early; its log lies beside the report")
            before = watch.progress.handled
            watch.look()
            now_s = time.monotonic()
            if watch.progress.handled > before:
                changed_s = now_s
                first_s = now_s if before == 0 else first_s
            elif now_s - changed_s > (STALLED_MAX_S if watch.progress.handled else FIRST_MAX_S):
                raise Retryable(f"nothing was handled for {now_s - changed_s:.0f} s; the logs lie beside the report")
            on_progress(replace(watch.progress, sent=feeding.sent, elapsed_s=now_s - first_s))
            ended.wait(LOOK_S)
        return max(time.monotonic() - first_s, 0.001)
    finally:
        feeding.given_up.set()
        feeding.thread.join()
        watch.reader.close()


class _Feeding:
    """The replay, on a thread of its own; ends early when it is given up."""

    def __init__(
        self, connect: Callable[[], Transport], config: Config, stream: ShopStream, rate_per_s: float | None
    ) -> None:
        self.sent = 0
        self.failed: DriftlineError | None = None
        self.given_up = threading.Event()
        self._connect, self._config, self._stream, self._rate_per_s = connect, config, stream, rate_per_s
        self.thread = threading.Thread(target=self._run, name="replay")

    def _run(self) -> None:
        def records() -> Iterator[StreamRecord]:
            for record in self._stream.records():
                if self.given_up.is_set():
                    return
                yield record

        def progress(so_far: ReplayProgress) -> None:
            self.sent = so_far.records

        try:
            transport = self._connect()
            try:
                replay(
                    records(),
                    transport,
                    topic=self._config.topics.events[0],
                    partitions=self._config.topics.partitions,
                    clocks=Clocks(now_s=time.monotonic, wall_ms=lambda: int(time.time() * 1_000), sleep=self._nap),
                    pace=Pace(rate_per_s=self._rate_per_s),
                    total=len(self._stream),
                    on_progress=progress,
                )
            finally:
                transport.close()
        except DriftlineError as error:
            self.failed = error

    def _nap(self, seconds: float) -> None:
        self.given_up.wait(seconds)


class _Watch:
    """Adds up the metrics records as they come."""

    def __init__(self, reader: LogReader, topic: str, partitions: int, total: int) -> None:
        self.reader = reader
        self.progress = DemoProgress(total=total)
        self._offsets = {TopicPartition(topic, p): 0 for p in range(partitions)}
        self._decode = msgspec.json.Decoder(BatchMetrics).decode

    def look(self) -> None:
        """Take in what is new."""
        new: list[BatchMetrics] = []
        for tp, offset in self._offsets.items():
            records = self.reader.read(tp, offset, 0.0, READ_RECORDS)
            if records:
                self._offsets[tp] = records[-1].offset + 1
                new += [self._decode(record.value or b"") for record in records]
        p = self.progress
        self.progress = replace(
            p,
            handled=p.handled + sum(m.records for m in new),
            forecasts=p.forecasts + sum(m.forecasts for m in new),
            alerts=p.alerts + sum(m.alerts for m in new),
            dead_letters=p.dead_letters + sum(m.dead_letters for m in new),
            weights_version=max([p.weights_version, *(m.weights_version for m in new)]),
            scored=p.scored + sum(m.scored for m in new),
            reciprocal_ranks=p.reciprocal_ranks + sum(m.reciprocal_ranks for m in new),
            recency_reciprocal_ranks=p.recency_reciprocal_ranks + sum(m.recency_reciprocal_ranks for m in new),
        )
