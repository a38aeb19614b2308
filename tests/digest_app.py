"""A digest application on any transport: topics, a worker, and the oracle's verdict. Used by several test files."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import msgspec

from stream.checkpoint import OnStep, TopicNames
from stream.config import WorkerSettings
from stream.errors import DriftlineError
from stream.memory import FaultHook, ManualClock
from stream.memory_state import Group
from stream.start import EARLIEST, Start
from stream.testing import DigestEngine, Verdict, arena_content, fold_inputs, judge, read_all
from stream.transport import Position, Record, TopicPartition, TopicSpec, Transport
from stream.worker import Turn, WeightsSource, Worker, WorkerParts

log = logging.getLogger(__name__)

STREAMS = ("forecasts", "alerts", "warnings", "dead_letters", "metrics")


def topic_names(prefix: str = "") -> TopicNames:
    return TopicNames(
        events=(prefix + "events",),
        state=prefix + "state",
        weights=prefix + "weights",
        outputs={stream: prefix + stream for stream in STREAMS},
    )


def create_topics(transport: Transport, names: TopicNames, partitions: int) -> None:
    admin = transport.admin()
    every = [*names.events, names.state, names.weights, *names.outputs.values()]
    kept = {"retention.ms": "-1"}  # the events' times are old ones
    admin.create([TopicSpec(name=name, partitions=partitions, settings=kept) for name in every])
    admin.close()


class NoWeights:
    """The digest engine has no weights to swap."""

    def swap(self, at_least: int = 0) -> None:
        assert at_least == 0

    def close(self) -> None: ...


class Counting:
    """Counts what a worker reports, so that a test can prove that its fault bit."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.turns = 0

    def turn(self, turn: Turn) -> None:
        self.turns += 1

    def event(self, name: str, **facts: object) -> None:
        self.events[name] += 1
        log.info("event=%s %s", name, facts)
        if "outcome" in facts:
            self.outcomes[str(facts["outcome"])] += 1

    def owned(self, partitions: object, users: int, restoring: int, lag_records: int) -> None:
        pass


class AtOnce(Executor):
    """Runs a restore at once, in the caller's thread: for tests of one thread. A simulated kill goes through."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*arguments, **options))
        except DriftlineError as error:
            future.set_exception(error)
        return future


_nonces = itertools.count()


def make_worker(
    transport: Transport,
    names: TopicNames,
    *,
    partitions: int,
    on_step: OnStep = lambda step: None,
    observer: Counting | None = None,
    settings: dict[str, Any] | None = None,
    clock: ManualClock | None = None,
    executor: Executor | None = None,
    engine: DigestEngine | None = None,
    weights: WeightsSource | None = None,
    app: str = "app",
    log_bytes_min: int = 3_000,
    cleaning_factor: float = 3.0,
    block_bytes_max: int = 10_000,
    start: Start = EARLIEST,
    nonce: Callable[[], bytes] | None = None,
) -> Worker:
    base = {"batch_events_max": 50, "poll_timeout_s": 0.05, "batch_wait_s": 0.0, "backoff_s": 0.01}
    return Worker(
        WorkerParts(
            transport=transport,
            engine=engine or DigestEngine(epoch_records=70),
            weights=weights or NoWeights(),
            observer=observer or Counting(),
            topics=names,
            app=app,
            partitions=partitions,
            settings=msgspec.convert(base | (settings or {}), WorkerSettings),
            block_bytes_max=block_bytes_max,
            cleaning_factor=cleaning_factor,
            clock=clock or time.monotonic,
            sleep=clock.advance if clock else time.sleep,
            nonce=nonce or (lambda: f"{time.monotonic_ns()}-{next(_nonces)}".encode()),
            on_step=on_step,
            executor=executor,
            log_bytes_min=log_bytes_min,
            start=start,
        )
    )


def verdict_of(transport: Transport, names: TopicNames, partitions: int) -> tuple[Verdict, list[Record]]:
    """Judge what lies in the log now; also the inputs."""
    reader = transport.reader()
    wait_s = 0.0 if transport.name == "memory" else 0.5
    inputs = list(read_all(reader, names.events[0], partitions, wait_s))
    outputs = list(read_all(reader, names.outputs["forecasts"], partitions, wait_s))
    dead = list(read_all(reader, names.outputs["dead_letters"], partitions, wait_s))
    reader.close()
    return judge(inputs, outputs, dead), inputs


def check_arena(worker: Worker, inputs: list[Record]) -> list[str]:
    """I4: arena == fold(inputs), for every partition that the worker runs; the differences."""
    expected = fold_inputs(inputs)
    return [
        f"I4: partition {partition} differs"
        for partition, state in worker.states.items()
        if arena_content(state) != expected.get(partition, {})
    ]


def put_right_when_asked(group: Group, positions: dict[TopicPartition, Position], times: int) -> FaultHook:
    """A fault hook: the group's positions become these when they are asked for the given time."""
    left = times

    def faults(point: str, who: str) -> None:
        nonlocal left
        left -= point == "committed"
        if left == 0:
            group.positions = positions

    return faults
