"""Replay: every record lands once, a user's in one partition and in order, at the pace asked for, resumable."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from stream.errors import ConfigError, Retryable
from stream.memory import ManualClock, MemoryLog
from stream.partition import partition_of
from stream.replay import Clocks, Pace, ReplayProgress, ReplayReport, replay, stored, to_records
from stream.rows import Event, StreamRecord
from stream.simulate import ShopSettings, simulate
from stream.transport import Record, TopicPartition, TopicSpec

PARTITIONS = 4


@pytest.fixture
def log() -> MemoryLog:
    log = MemoryLog()
    log.admin().create([TopicSpec(name="events", partitions=PARTITIONS)])
    return log


def clocks(clock: ManualClock) -> Clocks:
    return Clocks(now_s=clock, wall_ms=lambda: 1_800_000_000_000 + round(clock.now_s * 1_000), sleep=clock.advance)


def run(
    records: Iterator[StreamRecord], log: MemoryLog, clock: ManualClock | None = None, **options: Any
) -> ReplayReport:
    return replay(
        records,
        log,
        topic="events",
        partitions=PARTITIONS,
        clocks=clocks(clock or ManualClock()),
        **options,
    )


def everything(log: MemoryLog, partition: int) -> list[Record]:
    reader = log.reader()
    tp = TopicPartition("events", partition)
    return reader.read(tp, 0, 0.0, reader.bounds(tp)[1] + 1)


def events(count: int, users: int = 10, gap_ms: int = 1_000) -> list[Event]:
    return [{"user": f"u{n % users}", "interest": "tea", "time": 1_500_000_000_000 + n * gap_ms} for n in range(count)]


def test_every_record_lands_once_and_a_users_events_in_order(log: MemoryLog) -> None:
    """The counts by partition are what lies there; each user's events are in one partition, in the order sent."""
    report = run(to_records(events(10_007, users=97)), log)
    assert report.records == 10_007 and sum(report.passed_over.values()) == 0
    seen: dict[str, list[int]] = {}
    for partition in range(PARTITIONS):
        records = everything(log, partition)
        assert len(records) == report.by_partition[partition] > 0
        for record in records:
            event = json.loads(record.value or b"")
            assert record.key == event["user"].encode()
            assert partition == partition_of(record.key, PARTITIONS)
            seen.setdefault(event["user"], []).append(event["time"])
    assert sum(len(times) for times in seen.values()) == 10_007
    assert all(times == sorted(times) and len(set(times)) == len(times) for times in seen.values())


def test_the_records_timestamp_is_the_moment_it_was_appended(log: MemoryLog) -> None:
    """Events of 2017 are not deleted at once by a log that keeps a week: their records are of today."""
    run(to_records(events(100)), log)
    assert {r.timestamp for p in range(PARTITIONS) for r in everything(log, p)} == {1_800_000_000_000}


def test_bad_records_are_replayed_as_they_are(log: MemoryLog) -> None:
    """Null keys and values, broken JSON: all of a generated stream arrives, byte for byte."""
    shop = simulate(ShopSettings(users=50, events=2_000, bad_share=0.05))
    report = run(shop.records(), log, total=len(shop))
    assert report.records == len(shop)
    sent = sorted((key or b"", value or b"") for key, value, _ in shop.records())
    assert sorted((r.key or b"", r.value or b"") for p in range(PARTITIONS) for r in everything(log, p)) == sent


def test_the_rate_is_kept(log: MemoryLog) -> None:
    """5,000 records at 1,000 a second take 5 seconds, and none goes out much before its moment."""
    clock = ManualClock()
    report = run(to_records(events(5_000)), log, clock, pace=Pace(rate_per_s=1_000))
    assert clock.now_s == pytest.approx(5.0, abs=0.1) and report.elapsed_s == clock.now_s
    stamps = sorted(r.timestamp - 1_800_000_000_000 for p in range(PARTITIONS) for r in everything(log, p))
    assert all(abs(stamp - n) <= 51 for n, stamp in enumerate(stamps))


def test_the_speed_is_a_time_lapse(log: MemoryLog) -> None:
    """A day of events at 3,600 times its speed takes 24 seconds; of speed and rate the slower one holds."""
    day = events(1_441, gap_ms=60_000)
    clock = ManualClock()
    run(to_records(day), log, clock, pace=Pace(speed=3_600))
    assert clock.now_s == pytest.approx(24.0, abs=0.1)
    clock = ManualClock()
    run(to_records(day), log, clock, pace=Pace(speed=3_600, rate_per_s=10))
    assert clock.now_s == pytest.approx(144.0, abs=0.1)


@pytest.mark.parametrize("pace", [{"speed": 0}, {"rate_per_s": -1}, {"speed": float("nan")}])
def test_a_pace_that_never_moves_is_refused(pace: dict[str, float]) -> None:
    """Nobody waits for ever."""
    with pytest.raises(ConfigError, match="must be over 0"):
        Pace(**pace)


def test_the_limit_ends_it(log: MemoryLog) -> None:
    """Not one record more than asked for is taken from the source."""
    source = to_records(events(100))
    assert run(source, log, limit=30).records == 30
    assert run(to_records(events(100)), log, limit=0).records == 0


def test_progress_tells_share_and_time_left(log: MemoryLog) -> None:
    """Half way through, half is done and as much time is left as has passed; the last report says all."""
    clock, seen = ManualClock(), list[ReplayProgress]()
    run(to_records(events(2_000)), log, clock, pace=Pace(rate_per_s=100), total=2_000, on_progress=seen.append)
    assert len(seen) >= 20 and seen[-1].records == 2_000 and seen[-1].share == 1.0
    middle = min(seen, key=lambda p: abs((p.share or 0) - 0.5))
    assert middle.left_s == pytest.approx(middle.elapsed_s, rel=0.15)
    assert middle.rate_per_s == pytest.approx(100, rel=0.1)
    unknown = list[ReplayProgress]()
    run(to_records(events(10)), log, on_progress=unknown.append)
    assert unknown[-1].share is None and unknown[-1].left_s is None


@pytest.mark.parametrize("cut", [1, 999, 2_000, 3_500, 4_999])
def test_a_replay_that_was_cut_off_is_taken_up_exactly(log: MemoryLog, cut: int) -> None:
    """What is stored is passed over, also when only some partitions got their share of the last batch."""
    source = events(5_000, users=23)
    run(islice(to_records(source), cut), log)
    extra = list(islice((r for r in to_records(source[cut:]) if partition_of(r[0] or b"", PARTITIONS) == 2), 5))
    log.append("events", 2, iter(extra))  # one partition got more of a batch than the others
    report = run(to_records(source), log, resume=stored(log.reader(), "events", PARTITIONS))
    assert sum(report.passed_over.values()) == cut + len(extra) and report.records == 5_000 - cut - len(extra)
    whole = MemoryLog()
    whole.admin().create([TopicSpec(name="events", partitions=PARTITIONS)])
    run(to_records(source), whole)
    for partition in range(PARTITIONS):
        values = [r.value for r in everything(log, partition)]
        assert values == [r.value for r in everything(whole, partition)]


def test_resuming_in_another_replays_topic_is_refused(log: MemoryLog) -> None:
    """A topic that holds other events, more of them, or has lost its head cannot be resumed in."""
    report = run(to_records(events(100)), log)
    other = events(200)
    for event in other:
        event["interest"] = "tents"
    with pytest.raises(ConfigError, match="not the one of this source"):
        run(to_records(other), log, resume=stored(log.reader(), "events", PARTITIONS))
    with pytest.raises(ConfigError, match="more than the"):
        run(to_records(events(50)), log, resume=stored(log.reader(), "events", PARTITIONS))
    fullest = max(report.by_partition, key=lambda partition: report.by_partition[partition])
    log.admin().delete_records(TopicPartition("events", fullest), 3)
    with pytest.raises(ConfigError, match="records below 3 are deleted"):
        stored(log.reader(), "events", PARTITIONS)


def test_a_log_that_refuses_says_how_to_go_on(log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a batch that was not taken names the partition and --resume."""

    def refuse(topic: str, partition: int, records: Iterator[StreamRecord]) -> int:
        raise Retryable("no leader")

    monkeypatch.setattr(log, "append", refuse)
    with pytest.raises(Retryable, match=r"no leader.*--resume"):
        run(to_records(events(10)), log)
