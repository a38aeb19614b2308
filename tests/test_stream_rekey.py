"""A topic keyed by sessions becomes one keyed by users: every record once, in order, on every log and under faults."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stream.embedded import EmbeddedLog
from stream.errors import ConfigError, Corrupt
from stream.memory import Fault, ManualClock, MemoryLog
from stream.partition import partition_of
from stream.records import DeadLetter
from stream.rekey import OURS, Moved, Rekey, RekeySettings
from stream.start import Start
from stream.testing import read_all
from stream.transport import Position, TopicPartition, TopicSpec, Transport

ROOT = Path(__file__).resolve().parent.parent
SOURCE_PARTITIONS, TARGET_PARTITIONS = 3, 5
NOW_MS = 1_700_000_000_000


class Killed(BaseException):
    """A simulated kill -9."""


def settings(tag: str, **more: Any) -> RekeySettings:
    base: dict[str, Any] = {
        "source": f"{tag}-clicks", "target": f"{tag}-events", "dead_letters": f"{tag}-dead",
        "positions": f"{tag}-positions", "user": "who.id",
        "app": tag, "slot": "0", "until_end": True, "batch_records_max": 40, "poll_timeout_s": 0.05, "backoff_s": 0.01,
    }  # fmt: skip
    return RekeySettings(**base | more)


def prepare(log: Transport, tag: str, count: int, bad: float = 0.05) -> list[bytes]:
    """Topics, and clicks keyed by session; the values that have a user."""
    rng, good = random.Random(3), []
    admin = log.admin()
    counts = {"clicks": SOURCE_PARTITIONS, "events": TARGET_PARTITIONS, "dead": 2, "positions": SOURCE_PARTITIONS}
    admin.create(
        [TopicSpec(name=f"{tag}-{n}", partitions=c, settings={"retention.ms": "-1"}) for n, c in counts.items()]
    )
    admin.close()
    by_partition: dict[int, list[Any]] = {p: [] for p in range(SOURCE_PARTITIONS)}
    for number in range(count):
        session = rng.randrange(50)
        value = msgspec.json.encode({"n": number, "who": {"id": session % 17 if session % 2 else f"u{session % 17}"}})
        if rng.random() < bad:
            value = rng.choice([b"", b"{", b'{"who": {}}', b'{"who": {"id": ""}}', None])
        else:
            good.append(value)
        by_partition[session % SOURCE_PARTITIONS].append((b"s%d" % session, value, NOW_MS + number))
    for partition, records in by_partition.items():
        log.append(f"{tag}-clicks", partition, iter(records))
    return good


def check(log: Transport, tag: str, good: list[bytes], count: int) -> None:
    """Each value with a user once, at its user's place and time, in the order of its source partition; else dead."""
    reader = log.reader()
    wait_s = 0.0 if log.name == "memory" else 0.3
    moved = list(read_all(reader, f"{tag}-events", TARGET_PARTITIONS, wait_s))
    dead = list(read_all(reader, f"{tag}-dead", 2, wait_s))
    reader.close()
    assert Counter(r.value for r in moved) == Counter(good)
    for record in moved:
        event = msgspec.json.decode(record.value or b"")
        assert record.key == str(event["who"]["id"]).encode()
        assert record.partition == partition_of(record.key, TARGET_PARTITIONS)
        assert record.timestamp == NOW_MS + event["n"]
    letters = [msgspec.json.decode(r.value or b"", type=DeadLetter) for r in dead]
    assert len(letters) == len({x.id for x in letters}) == count - len(good)
    assert {x.reason for x in letters} <= {"null_value", "broken_json", "invalid_field", "invalid_user"}


def move(log: Transport, how: RekeySettings) -> Moved:
    return Rekey(log, how, clock=time.monotonic, sleep=time.sleep).run(threading.Event())


def test_every_record_is_moved_once(transport: Transport) -> None:
    """Keys, places, timestamps and order; records without a user are dead letters; a second run finds nothing to do."""
    tag = uuid.uuid4().hex[:8]
    good = prepare(transport, tag, 600)
    first = move(transport, settings(tag))
    assert (first.records, first.dead_letters) == (len(good), 600 - len(good))
    check(transport, tag, good, 600)
    assert move(transport, settings(tag)) == Moved()


def test_one_session_keeps_its_order(transport: Transport) -> None:
    """What lay in one source partition lies in the same order behind it."""
    tag = uuid.uuid4().hex[:8]
    prepare(transport, tag, 300, bad=0.0)
    move(transport, settings(tag))
    reader = transport.reader()
    order: dict[bytes, list[int]] = {}
    for record in read_all(reader, f"{tag}-events", TARGET_PARTITIONS):
        order.setdefault(record.key or b"", []).append(msgspec.json.decode(record.value or b"")["n"])
    source = {r.value: (r.partition, r.offset) for r in read_all(reader, f"{tag}-clicks", SOURCE_PARTITIONS)}
    reader.close()
    by_number = {msgspec.json.decode(v or b"")["n"]: place for v, place in source.items()}
    for numbers in order.values():
        for partition in range(SOURCE_PARTITIONS):
            offsets = [by_number[n][1] for n in numbers if by_number[n][0] == partition]
            assert offsets == sorted(offsets)


@pytest.mark.parametrize("seed", range(20))
def test_under_kills_and_faults(seed: int) -> None:
    """Killed at any call, calls lost or hidden, the group's positions long past: still each record once."""
    rng = random.Random(seed)
    log = MemoryLog(clock=ManualClock(), session_timeout_s=10, transaction_timeout_s=10)
    good = prepare(log, "t", 400)
    clock = log.now
    assert isinstance(clock, ManualClock)
    bitten: Counter[str] = Counter()

    def faults(point: str, who: str) -> Fault | None:
        if point in ("read", "poll") or rng.random() > (0.001 if point == "send" else 0.05):
            return None
        kind = rng.choice(["kill", "lose", "hide", "old"])
        bitten[kind] += 1
        if kind == "kill":
            raise Killed
        return Fault(kind)

    for _ in range(60):
        try:
            log.faults = None
            stage = Rekey(log, settings("t", retries_max=50), clock=clock, sleep=clock.advance)
            log.faults = faults
            stage.run(threading.Event())
            break
        except Killed:
            clock.advance(rng.choice([0, 20]))
    else:
        raise AssertionError("it did not come to an end")
    log.faults = None
    assert sum(bitten.values()) > 0, "no fault bit"
    check(log, "t", good, 400)


def test_positions_of_the_group_that_are_long_past(transport: Transport) -> None:
    """The topic of positions knows better than such a group; a position that an operator has set is heeded."""
    tag = uuid.uuid4().hex[:8]
    good = prepare(transport, tag, 600)
    move(transport, settings(tag))
    _set_positions(transport, settings(tag), Position(0, OURS))
    assert move(transport, settings(tag)) == Moved(), "a position of ours that is long past"
    check(transport, tag, good, 600)
    _set_positions(transport, settings(tag), Position(0))
    again = move(transport, settings(tag))
    assert (again.records, again.dead_letters) == (len(good), 600 - len(good)), "an operator sent it back"


def _set_positions(log: Transport, how: RekeySettings, position: Position) -> None:
    """Commit a position of every source partition for the group."""
    group = f"{how.app}.rekey.{how.target}"
    consumer = log.consumer(group=group, topics=[how.source], reset="none")
    producer = log.producer(transactional_id="operator")
    try:
        owned: set[TopicPartition] = set()
        until_s = time.monotonic() + 30
        while len(owned) < SOURCE_PARTITIONS:
            assert time.monotonic() < until_s, "the group did not settle"
            polled = consumer.poll(0.2, 1)
            owned.update(polled.assigned)
        producer.begin()
        producer.send_offsets(dict.fromkeys(owned, position), polled.group)
        producer.commit()
    finally:
        producer.close()
        consumer.close()


def test_a_position_far_from_the_end_is_found() -> None:
    """A partition that was quiet while others moved: its newest position lies far ahead of the end of the topic."""
    log = MemoryLog()
    how = settings("t")
    prepare(log, "t", 0)
    key = b"t.rekey.t-events/t-clicks-%d"
    log.append("t-positions", 0, iter([(key % 0, b"7", NOW_MS)] + [(key % 3, b"9", NOW_MS)] * 5_000))
    stage = Rekey(log, how, clock=time.monotonic, sleep=time.sleep)
    reader = log.reader()
    assert stage._moved_to(reader, TopicPartition("t-clicks", 0)) == 7
    assert stage._moved_to(reader, TopicPartition("t-clicks", 3)) == 9
    assert stage._moved_to(reader, TopicPartition("t-clicks", 1)) is None
    stage.close()


def test_what_cannot_work_is_said() -> None:
    """One topic for both, a missing topic, a wrong path: each in one message, nothing drained."""
    log = MemoryLog()
    prepare(log, "t", 300)
    with pytest.raises(ConfigError, match="name another target"):
        move(log, settings("t", target="t-clicks"))
    with pytest.raises(ConfigError, match="topic nowhere is missing"):
        move(log, settings("t", target="nowhere"))
    with pytest.raises(Corrupt, match=r"have no user at 'whom'.*--user"):
        move(log, settings("t", user="whom", bad_window=100))
    assert sum(1 for _ in read_all(log.reader(), "t-dead", 2, 0.0)) <= 50


def test_it_begins_where_it_is_told() -> None:
    """From a time on: earlier records stay where they are."""
    log = MemoryLog()
    prepare(log, "t", 300, bad=0.0)
    assert move(log, settings("t", start=Start(edge="time", time_ms=NOW_MS + 250))).records == 50


def test_the_command_moves_what_is_there(tmp_path: Path) -> None:
    """On the embedded log, from the command line, to the end; the path of the user comes from events.fields."""
    place = tmp_path / "log.db"
    log = EmbeddedLog(place)
    admin = log.admin()
    admin.create([TopicSpec(name="clicks", partitions=2, settings={"retention.ms": "-1"})])
    admin.close()
    now_ms = int(time.time() * 1_000)
    log.append("clicks", 1, iter([(b"s1", b'{"who": {"id": "u%d"}}' % n, now_ms) for n in range(9)]))
    sets = [f"embedded.path={place}", "events.fields.user=who.id", "worker.poll_timeout_s=0.05"]
    line = [sys.executable, "-m", "stream.cli", "rekey", "clicks", "events", "--until-end"]
    line += [part for s in sets for part in ("--set", s)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "clicks -> events: 9 records moved, 0 dead letters" in done.stdout
    assert {r.key for r in read_all(log.reader(), "events", 4)} == {b"u%d" % n for n in range(9)}
    log.close()
