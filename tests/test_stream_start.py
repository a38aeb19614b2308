"""Where an application begins, and what happens when the records it stood at are gone: on every log."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from digest_app import Counting, create_topics, make_worker, topic_names

from stream.errors import ConfigError, LostPosition
from stream.start import EARLIEST, Start, parse_start
from stream.testing import DigestEngine, digest_event, read_all
from stream.transport import TopicPartition, Transport
from stream.worker import Worker

PARTITIONS = 2
NOW_MS = 1_700_000_000_000


@pytest.mark.parametrize(
    ("text", "time_ms"),
    [
        ("90s", NOW_MS - 90_000),
        ("2h", NOW_MS - 7_200_000),
        ("7d", NOW_MS - 604_800_000),
        ("2023-11-14T22:13:20Z", NOW_MS),
        ("2023-11-14T22:13:20", NOW_MS),
        ("2023-11-15T00:13:20+02:00", NOW_MS),
    ],
)
def test_ages_and_times(text: str, time_ms: int) -> None:
    """An age counts back from now; a time without a zone is UTC; what is printed is read back as the same moment."""
    start = parse_start(text, NOW_MS)
    assert start == Start(edge="time", time_ms=time_ms)
    assert parse_start(str(start), 0) == start


def test_what_is_no_beginning_is_refused() -> None:
    """With the forms that there are."""
    assert parse_start("earliest", 0) == EARLIEST and str(parse_start("latest", 0)) == "latest"
    for text in ("2 hours", "soon", "-5m", "1969-01-01T00:00:00Z", "2h30m"):
        with pytest.raises(ConfigError, match=r"--from .*2026-11-01T00:00:00Z"):
            parse_start(text, NOW_MS)


@pytest.fixture
def app(transport: Transport) -> Iterator[Callable[..., tuple[Worker, Counting]]]:
    """Makes workers of one application, and closes them."""
    tag = uuid.uuid4().hex[:8]
    names = topic_names(f"{tag}-")
    create_topics(transport, names, PARTITIONS)
    made: list[Worker] = []

    def make(**kwargs: Any) -> tuple[Worker, Counting]:
        observer = Counting()
        worker = make_worker(
            transport, names, partitions=PARTITIONS, observer=observer, engine=DigestEngine(1_000), app=tag, **kwargs
        )
        made.append(worker)
        return worker, observer

    make.log, make.names, make.tag = transport, names, tag  # type: ignore[attr-defined]
    yield make
    for worker in made:
        worker.close()


def send(app: Any, partition: int, first: int, count: int) -> None:
    records = [digest_event(f"u{partition}", n, NOW_MS) for n in range(first, first + count)]
    app.log.append(app.names.events[0], partition, iter(records))


def until(worker: Worker, done: Callable[[], bool], limit_s: float = 30.0) -> None:
    until_s = time.monotonic() + limit_s
    while not done():
        worker.turn()
        assert time.monotonic() < until_s, "it did not come to that"


def outputs(app: Any) -> int:
    reader = app.log.reader()
    count = len(list(read_all(reader, app.names.outputs["forecasts"], PARTITIONS)))
    reader.close()
    return count


def test_from_the_end_begins_at_one_place_for_good(app: Any) -> None:
    """`latest` before any event: a restart reads what came in between, although nothing had been consumed."""
    for p in range(PARTITIONS):
        send(app, p, 0, 10)
    worker, _ = app(start=Start(edge="latest"))
    until(worker, lambda: len(worker.states) == PARTITIONS and not worker._uncommitted)
    worker.close()
    for p in range(PARTITIONS):
        send(app, p, 10, 5)
    worker, _ = app(start=Start(edge="latest"))
    until(worker, lambda: sum(s.seen for s in worker.states.values()) == 10)
    assert outputs(app) == 10


def test_from_a_time_begins_with_the_records_of_that_time(app: Any) -> None:
    """Records that arrived earlier are never read."""
    for p in range(PARTITIONS):
        send(app, p, 0, 20)  # one a millisecond
    worker, _ = app(start=Start(edge="time", time_ms=NOW_MS + 15))
    until(worker, lambda: sum(s.seen for s in worker.states.values()) == 10)
    assert outputs(app) == 10


def lose(app: Any, worker: Worker) -> None:
    """Ten records are consumed and committed; of the next twenty the oldest five are deleted unread."""
    send(app, 0, 0, 10)
    until(worker, lambda: len(worker.states) == PARTITIONS and worker.states[0].seen == 10)
    worker.close()
    send(app, 0, 10, 20)
    admin = app.log.admin()
    admin.delete_records(TopicPartition(app.names.events[0], 0), 15)
    admin.close()


def test_a_deleted_position_stops_loudly(app: Any) -> None:
    """By default: the partition, how many records were lost, and the setting that goes on without them."""
    worker, _ = app()
    lose(app, worker)
    worker, _ = app()
    with pytest.raises(LostPosition, match=r"position 10 of .*-0 is not .* 5 records were .*worker\.lost_positions"):
        until(worker, lambda: False, 20)
    assert outputs(app) == 10


@pytest.mark.parametrize(("rule", "read"), [("earliest", 15), ("latest", 0)])
def test_a_deleted_position_is_passed_over_where_that_is_the_rule(app: Any, rule: str, read: int) -> None:
    """Goes on with the oldest or the newest record, once, counted."""
    worker, _ = app()
    lose(app, worker)
    worker, seen = app(settings={"lost_positions": rule})
    until(worker, lambda: len(worker.states) == PARTITIONS)
    send(app, 0, 30, 1)
    until(worker, lambda: worker.states[0].seen == 11 + read)
    assert seen.events["position_passed_over"] == 1 and outputs(app) == 11 + read


def test_records_deleted_under_a_running_worker(app: Any) -> None:
    """Retention overtakes a worker that is too slow: the same rule, and no other partition is read twice."""
    worker, seen = app(settings={"lost_positions": "earliest", "batch_events_max": 10})
    for p in range(PARTITIONS):
        send(app, p, 0, 10)
    until(worker, lambda: sum(s.seen for s in worker.states.values()) == 20)
    tps = [TopicPartition(app.names.events[0], p) for p in range(PARTITIONS)]
    for p in range(PARTITIONS):
        send(app, p, 10, 30)
    admin = app.log.admin()
    admin.delete_records(tps[0], 35)
    admin.close()
    worker._consumer.seek(tps[0], 10)  # what it had fetched ahead is dropped
    until(worker, lambda: [worker._at[tp] for tp in tps] == [40, 40])
    assert seen.events["position_lost"] == seen.events["position_passed_over"] == 1
    assert [worker.states[p].seen for p in range(PARTITIONS)] == [15, 40] and outputs(app) == 55


def test_a_topic_with_more_partitions_than_before_is_refused(app: Any) -> None:
    """Also by a worker that owns a new partition only; the message names the way to migrate."""
    worker, _ = app()
    send(app, 0, 0, 5)
    until(worker, lambda: len(worker.states) == PARTITIONS and worker.states[0].seen == 5)
    worker.close()
    worker, _ = app()
    worker._parts.partitions = 3
    worker._drop(1)
    with pytest.raises(ConfigError, match=r"had 2 partitions .* have 3 now.*driftline rekey OLD NEW"):
        until(worker, lambda: False, 20)
