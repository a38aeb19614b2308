"""What the in-memory log adds for tests: faults, a clock that is moved by hand, expiry; and Kafka's unkindness."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stream.errors import Fenced, Rebalanced, Retryable
from stream.memory import Fault, ManualClock, MemoryLog
from stream.memory_clients import MemoryConsumer
from stream.transport import Polled, Position, TopicPartition, TopicSpec

EVENTS = TopicPartition("events", 0)
OUT = TopicPartition("out", 0)


@pytest.fixture
def log() -> Iterator[MemoryLog]:
    log = MemoryLog(clock=ManualClock(), session_timeout_s=10, transaction_timeout_s=5)
    log.admin().create([TopicSpec(name="events", partitions=2), TopicSpec(name="out", partitions=2)])
    log.append("events", 0, ((b"k", b"%d" % n, n) for n in range(10)))
    yield log


def ready(log: MemoryLog) -> tuple[MemoryConsumer, Polled]:
    consumer = log.consumer(group="g", topics=["events"])
    consumer.resume(consumer.poll(0, 100).assigned)
    return consumer, consumer.poll(0, 100)


def values(log: MemoryLog) -> list[bytes | None]:
    return [record.value for record in log.reader().read(OUT, 0, 0)]


def clock_of(log: MemoryLog) -> ManualClock:
    assert isinstance(log.now, ManualClock)
    return log.now


@pytest.mark.parametrize("fault", [Fault.LOSE, Fault.HIDE])
@pytest.mark.parametrize("point", ["begin", "send", "flush", "send_offsets", "commit"])
def test_a_fault_is_told_as_retryable_and_the_position_tells_the_truth(
    log: MemoryLog, point: str, fault: Fault
) -> None:
    """Lost or hidden, the caller hears the same; only a commit that was hidden has happened."""
    consumer, polled = ready(log)
    log.faults = lambda at, who: fault if at == point and who == "slot" else None
    producer = log.producer(transactional_id="slot")
    with pytest.raises(Retryable):
        producer.begin()
        producer.send("out", 0, b"k", b"v")
        producer.flush()
        producer.send_offsets({EVENTS: Position(10)}, polled.group)
        producer.commit()
    with pytest.raises(Retryable, match="throw it away"):
        producer.abort()
    log.faults = None
    log.producer(transactional_id="slot")
    happened = point == "commit" and fault is Fault.HIDE
    assert consumer.committed([EVENTS]) == {EVENTS: Position(10) if happened else None}
    assert values(log) == ([b"v"] if happened else [])


def test_a_hook_may_raise_to_kill(log: MemoryLog) -> None:
    """A simulated kill passes through; what it left open is aborted by the next producer of the id."""

    class Killed(Exception):
        pass

    def kill(point: str, who: str) -> None:
        if point == "commit":
            raise Killed

    consumer, polled = ready(log)
    log.faults = kill
    producer = log.producer(transactional_id="slot")
    producer.begin()
    producer.send("out", 0, b"k", b"v")
    producer.send_offsets({EVENTS: Position(10)}, polled.group)
    with pytest.raises(Killed):
        producer.commit()
    with pytest.raises(Retryable, match="open transaction"):
        consumer.committed([EVENTS])
    log.producer(transactional_id="slot")
    assert consumer.committed([EVENTS]) == {EVENTS: None}


def test_an_open_transaction_holds_readers_and_positions_until_its_timeout(log: MemoryLog) -> None:
    """As on Kafka: what is committed behind it becomes visible when the clock has passed its timeout."""
    consumer, polled = ready(log)
    dead = log.producer(transactional_id="dead")
    dead.begin()
    dead.send("out", 0, b"k", b"never")
    dead.send_offsets({EVENTS: Position(3)}, polled.group)
    other = log.producer(transactional_id="other")
    other.begin()
    other.send("out", 0, b"k", b"behind")
    other.commit()
    assert values(log) == []
    assert log.reader().bounds(OUT) == (0, 0)
    clock_of(log).advance(6)
    assert values(log) == [b"behind"]
    assert consumer.committed([EVENTS]) == {EVENTS: None}
    with pytest.raises(Retryable, match="too long"):
        dead.commit()


def test_a_transaction_decided_after_a_rebalance_still_counts(log: MemoryLog) -> None:
    """As on Kafka, the membership is checked when the offsets are sent, not at the commit: positions stay unstable."""
    _, polled = ready(log)
    producer = log.producer(transactional_id="slot")
    producer.begin()
    producer.send_offsets({EVENTS: Position(10)}, polled.group)
    other = log.consumer(group="g", topics=["events"])
    with pytest.raises(Retryable):
        other.committed([EVENTS])
    producer.commit()
    assert other.committed([EVENTS]) == {EVENTS: Position(10)}


def test_the_broker_does_not_check_who_owns_a_partition(log: MemoryLog) -> None:
    """As on Kafka: with the right generation any partition's position is taken; dropping revoked records is our job."""
    first, _ = ready(log)
    second = log.consumer(group="g", topics=["events"])
    first.poll(0, 1)
    second.poll(0, 1)
    stranger = TopicPartition("events", 1)
    producer = log.producer(transactional_id="slot")
    producer.begin()
    producer.send_offsets({stranger: Position(0, "not mine")}, first.poll(0, 1).group)
    producer.commit()
    assert second.committed([stranger]) == {stranger: Position(0, "not mine")}


@pytest.mark.parametrize("by_clock", [True, False])
def test_an_expired_member_loses_all_and_joins_anew(log: MemoryLog, by_clock: bool) -> None:
    """Its partitions go to others, its proof is void, and its next poll tells it that it lost them."""
    sleeper, polled = ready(log)
    heir = log.consumer(group="g", topics=["events"])
    if by_clock:
        clock_of(log).advance(8)
        heir.poll(0, 1)
        clock_of(log).advance(8)
    else:
        log.expire(sleeper)
    assert len(heir.poll(0, 1).assigned) == 2
    producer = log.producer(transactional_id="slot")
    producer.begin()
    with pytest.raises(Rebalanced):
        producer.send_offsets({EVENTS: Position(10)}, polled.group)
    producer.abort()
    back = sleeper.poll(0, 1)
    assert set(back.revoked) == {EVENTS, TopicPartition("events", 1)} and not back.records


def test_waiting_moves_the_clock_and_never_sleeps(log: MemoryLog) -> None:
    """With a clock of its own a test polls for hours at once."""
    consumer, _ = ready(log)
    before_s = clock_of(log)()
    assert not consumer.poll(3_600, 10).records
    assert clock_of(log)() >= before_s + 3_600
    assert log.reader().read(OUT, 0, 3_600) == []


def test_offsets_have_holes_as_on_kafka(log: MemoryLog) -> None:
    """Markers and aborted records take offsets: nobody may count on dense ones."""
    producer = log.producer(transactional_id="slot")
    for n in range(4):
        producer.begin()
        producer.send("out", 0, b"k", b"%d" % n)
        producer.abort() if n % 2 else producer.commit()
    assert [(r.offset, r.value) for r in log.reader().read(OUT, 0, 0)] == [(0, b"0"), (4, b"2")]


def test_every_call_of_a_fenced_producer_raises(log: MemoryLog) -> None:
    """Whatever it tries next."""
    older = log.producer(transactional_id="slot")
    older.begin()
    log.producer(transactional_id="slot")
    for call in (older.begin, older.flush, older.commit, older.abort, lambda: older.send("out", 0, b"k", b"v")):
        with pytest.raises(Fenced):
            call()
