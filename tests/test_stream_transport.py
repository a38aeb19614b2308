"""One contract, three logs: every promise of stream/transport.py, checked on each of them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from stream.errors import ConfigError, Fenced, Rebalanced, Retryable
from stream.transport import (
    GroupConsumer,
    LogReader,
    Polled,
    Position,
    Producer,
    Record,
    TopicPartition,
    TopicSpec,
    Transport,
)

POLLS_MAX = 400  # bounds every wait below


class Bench:
    """A log with a topic `events` (2 partitions) and a topic `out`, and everything that a test opens on it."""

    def __init__(self, log: Transport, stack: ExitStack) -> None:
        self.log = log
        self.tag = uuid.uuid4().hex[:12]
        self._stack = stack
        self.events = self.topic("events", 2)
        self.out = self.topic("out", 2)

    def topic(self, name: str, partitions: int) -> str:
        # The records carry made-up times: a broker's default retention would delete them at some moment.
        spec = TopicSpec(name=f"{name}-{self.tag}", partitions=partitions, settings={"retention.ms": "-1"})
        admin = self.log.admin()
        try:
            assert admin.create([spec]) == [spec.name]
        finally:
            admin.close()
        return spec.name

    def fill(self, topic: str, partition: int, count: int, first: int = 0) -> None:
        records = ((b"key", b"%d" % n, 1_000 + n) for n in range(first, first + count))
        assert self.log.append(topic, partition, records) == count

    def consumer(self, *topics: str, group: str = "group", reset: str = "earliest") -> GroupConsumer:
        consumer = self.log.consumer(group=f"{group}-{self.tag}", topics=topics or (self.events,), reset=reset)
        self._stack.callback(consumer.close)
        return consumer

    def producer(self, name: str = "worker") -> Producer:
        producer = self.log.producer(transactional_id=f"{name}-{self.tag}")
        self._stack.callback(producer.close)
        return producer

    def reader(self) -> LogReader:
        reader = self.log.reader()
        self._stack.callback(reader.close)
        return reader

    def values(self, topic: str, partition: int) -> list[bytes | None]:
        """All committed values of a partition, by a fresh look from its head to its end."""
        reader = self.log.reader()
        try:
            place = TopicPartition(topic, partition)
            found: list[bytes | None] = []
            offset, end = reader.bounds(place)
            for _ in range(POLLS_MAX):
                records = reader.read(place, offset, 0.3 if self.log.name == "kafka" else 0.01)
                if not records:
                    assert offset <= end
                    return found
                assert [r.offset for r in records] == sorted({r.offset for r in records})
                assert records[0].offset >= offset
                found += [r.value for r in records]
                offset = records[-1].offset + 1
            raise AssertionError("the reader does not come to an end")
        finally:
            reader.close()


@pytest.fixture
def bench(transport: Transport) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(transport, stack)


def poll_until(consumer: GroupConsumer, done: Callable[[Polled], bool], max_records: int = 1_000) -> Polled:
    """Poll until a poll fits; what other polls bring is dropped."""
    for _ in range(POLLS_MAX):
        polled = consumer.poll(0.05, max_records)
        if done(polled):
            return polled
    raise AssertionError("the expected poll never came")


def take_all(consumer: GroupConsumer, count: int) -> tuple[TopicPartition, ...]:
    """Poll until `count` partitions are assigned; they are still paused."""
    assigned: list[TopicPartition] = []
    for _ in range(POLLS_MAX):
        polled = consumer.poll(0.05, 1_000)
        assert not polled.records, "records came before the owner resumed the partition"
        assigned += polled.assigned
        if len(assigned) == count:
            return tuple(sorted(assigned))
    raise AssertionError(f"only {assigned} were assigned")


def collect(consumer: GroupConsumer, count: int) -> tuple[dict[TopicPartition, list[Record]], Polled]:
    """Poll until `count` records came; they and the last poll."""
    found: dict[TopicPartition, list[Record]] = {}
    total = 0
    for _ in range(POLLS_MAX):
        polled = consumer.poll(0.05, 1_000)
        for partition, records in polled.records.items():
            found.setdefault(partition, []).extend(records)
            total += len(records)
        if total >= count:
            assert total == count
            return found, polled
    raise AssertionError(f"only {total} of {count} records came")


def numbers(records: Sequence[Record]) -> list[int]:
    return [int(r.value or b"-1") for r in records]


def spin(*consumers: GroupConsumer) -> list[Polled]:
    """Poll each once without waiting for records."""
    return [consumer.poll(0.02, 1_000) for consumer in consumers]


def share_out(
    consumers: Sequence[GroupConsumer], first_owns: Sequence[TopicPartition], count: int
) -> list[set[TopicPartition]]:
    """Poll all in turn until they own `count` partitions between them, nobody more than its share."""
    owned: list[set[TopicPartition]] = [set() for _ in consumers]
    owned[0].update(first_owns)
    largest = -(-count // len(consumers))
    for _ in range(POLLS_MAX):
        for mine, polled in zip(owned, spin(*consumers), strict=True):
            mine.difference_update(polled.revoked)
            mine.update(polled.assigned)
        if sum(map(len, owned)) == count and max(map(len, owned)) == largest:
            return owned
    raise AssertionError(f"the shares stay at {owned}")


# ── topics and plain reading ──────────────────────────────────────────────────────────────────────────────────────────


def test_topics_are_created_once_and_described(bench: Bench) -> None:
    """`create` names what it made and leaves the rest alone; `describe` tells partitions and settings, or None."""
    admin = bench.log.admin()
    spec = TopicSpec(
        name=f"state-{bench.tag}", partitions=3, settings={"retention.ms": "-1", "cleanup.policy": "delete"}
    )
    assert admin.create([spec]) == [spec.name]
    assert admin.create([spec, TopicSpec(name=spec.name, partitions=7)]) == []
    found = admin.describe([spec.name, "nowhere"])
    admin.close()
    assert found["nowhere"] is None
    state = found[spec.name]
    assert state is not None and state.partitions == 3
    assert state.settings["retention.ms"] == "-1" and state.settings["cleanup.policy"] == "delete"


def test_a_topic_needs_partitions(bench: Bench) -> None:
    """Zero partitions are refused with the topic's name."""
    admin = bench.log.admin()
    with pytest.raises(ConfigError, match="empty"):
        admin.create([TopicSpec(name=f"empty-{bench.tag}", partitions=0)])
    admin.close()


def test_records_come_back_as_they_were_written(bench: Bench) -> None:
    """Keys, values and timestamps survive: null, empty, and a block of 900 kB."""
    block = bytes(range(256)) * 3_516
    rows = [(b"k", b"v", 0), (None, b"", 5), (b"", None, 1_700_000_000_123), (b"\xff\x00", block, 7)]
    bench.log.append(bench.events, 0, iter(rows))
    reader = bench.reader()
    found: list[Record] = []
    for _ in range(POLLS_MAX):
        found += reader.read(TopicPartition(bench.events, 0), len(found), 0.2)
        if len(found) == len(rows):
            break
    assert [(r.key, r.value, r.timestamp) for r in found] == rows
    assert [(r.topic, r.partition, r.offset) for r in found] == [(bench.events, 0, n) for n in range(4)]


def test_a_reader_reads_from_any_offset_within_its_limit(bench: Bench) -> None:
    """`read` starts at the offset, keeps to `max_records`, and gives nothing at the end."""
    bench.fill(bench.events, 1, 50)
    reader, place = bench.reader(), TopicPartition(bench.events, 1)
    assert reader.bounds(place) == (0, 50)
    first = reader.read(place, 10, 5.0, max_records=7)
    assert numbers(first) == list(range(10, 10 + len(first))) and 0 < len(first) <= 7
    assert numbers(reader.read(place, 49, 5.0)) == [49]
    assert reader.read(place, 50, 0.05) == []
    assert numbers(reader.read(place, 3, 5.0, max_records=1)) == [3]


def test_a_reader_starts_at_the_head_when_the_offset_was_deleted(bench: Bench) -> None:
    """After `delete_records` the log starts later; a reader from an older offset gets the head, not an error."""
    bench.fill(bench.events, 0, 30)
    place, admin, reader = TopicPartition(bench.events, 0), bench.log.admin(), bench.reader()
    assert numbers(reader.read(place, 0, 5.0, max_records=2))[0] == 0
    admin.delete_records(place, 20)
    admin.delete_records(place, 20)
    admin.delete_records(place, 5)
    admin.close()
    assert reader.bounds(place) == (20, 30)
    assert numbers(reader.read(place, 0, 5.0))[0] == 20
    assert bench.values(bench.events, 0) == [b"%d" % n for n in range(20, 30)]


def test_delete_records_stops_at_the_end(bench: Bench) -> None:
    """Deleting beyond the end empties the partition; the next record takes the next offset."""
    bench.fill(bench.events, 0, 5)
    place, admin = TopicPartition(bench.events, 0), bench.log.admin()
    admin.delete_records(place, 1_000)
    admin.close()
    reader = bench.reader()
    assert reader.bounds(place) == (5, 5)
    bench.fill(bench.events, 0, 1, first=99)
    assert [(r.offset, r.value) for r in reader.read(place, 0, 5.0)] == [(5, b"99")]


def test_a_missing_topic_is_a_config_error(bench: Bench) -> None:
    """Consumer, producer, reader and append each name the missing topic; nothing creates it by accident."""
    name = f"missing-{bench.tag}"
    with pytest.raises(ConfigError, match=name):
        bench.consumer(name)
    producer = bench.producer()
    producer.begin()
    with pytest.raises(ConfigError, match=name):
        producer.send(name, 0, None, b"x")
    with pytest.raises(ConfigError, match=name):
        bench.reader().read(TopicPartition(name, 0), 0, 0.1)
    with pytest.raises(ConfigError, match=name):
        bench.log.append(name, 0, iter([(None, b"x", 0)]))
    with pytest.raises(ConfigError, match="2 partitions"):
        bench.log.append(bench.events, 2, iter([(None, b"x", 0)]))
    admin = bench.log.admin()
    assert admin.describe([name]) == {name: None}
    admin.close()


# ── the group ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_new_partitions_wait_for_their_owner(bench: Bench) -> None:
    """Assigned partitions are paused: no record comes until `resume`, then all of them, each once and in order."""
    for partition in (0, 1):
        bench.fill(bench.events, partition, 20)
    consumer = bench.consumer()
    assigned = take_all(consumer, 2)
    assert not any(polled.records for polled in [*spin(consumer), *spin(consumer)])
    consumer.resume(assigned)
    found, polled = collect(consumer, 40)
    assert {p: numbers(records) for p, records in found.items()} == {p: list(range(20)) for p in assigned}
    assert polled.group is not None
    assert consumer.lag() == dict.fromkeys(assigned, 0)


def test_seek_goes_to_the_offset_and_drops_what_was_buffered(bench: Bench) -> None:
    """After a seek the next record is the one at the offset, forwards and back, whatever had been fetched."""
    bench.fill(bench.events, 0, 100)
    consumer = bench.consumer()
    place = take_all(consumer, 2)[0]
    consumer.seek(place, 40)
    consumer.resume([place])
    first = poll_until(consumer, lambda polled: bool(polled.records), max_records=5)
    assert numbers(first.records[place]) == [40, 41, 42, 43, 44]
    for offset in (90, 0, 45):
        consumer.seek(place, offset)
        polled = poll_until(consumer, lambda polled: bool(polled.records), max_records=3)
        assert numbers(polled.records[place]) == [offset, offset + 1, offset + 2]
    assert consumer.lag()[place] == 100 - 48


def test_pause_holds_records_and_resume_loses_none(bench: Bench) -> None:
    """A paused partition gives nothing, the others go on; after `resume` it continues where it was."""
    for partition in (0, 1):
        bench.fill(bench.events, partition, 60)
    consumer = bench.consumer()
    assigned = take_all(consumer, 2)
    consumer.resume(assigned)
    found: dict[TopicPartition, list[int]] = {p: [] for p in assigned}

    def gather(polled: Polled) -> bool:
        assert sum(map(len, polled.records.values())) <= 10
        for partition, records in polled.records.items():
            found[partition] += numbers(records)
        return len(found[assigned[0]]) > 0

    poll_until(consumer, gather, max_records=10)
    before = len(found[assigned[0]])
    consumer.pause([assigned[0]])
    poll_until(consumer, lambda polled: gather(polled) and len(found[assigned[1]]) == 60, max_records=10)
    assert len(found[assigned[0]]) == before
    consumer.resume([assigned[0]])
    poll_until(consumer, lambda polled: gather(polled) and len(found[assigned[0]]) == 60, max_records=10)
    assert found == {p: list(range(60)) for p in assigned}


def test_only_owned_partitions_can_be_steered(bench: Bench) -> None:
    """`seek`, `pause` and `resume` of a partition of somebody else are mistakes and say so."""
    consumer = bench.consumer()
    stranger = TopicPartition(bench.out, 0)
    for call in (
        lambda: consumer.seek(stranger, 0),
        lambda: consumer.pause([stranger]),
        lambda: consumer.resume([stranger]),
    ):
        with pytest.raises(ValueError, match="not assigned"):
            call()


@pytest.mark.parametrize(("reset", "expected"), [("earliest", list(range(10, 20))), ("latest", [])])
def test_without_a_position_the_reset_rule_decides(bench: Bench, reset: str, expected: list[int]) -> None:
    """No committed position: from the head or from the end, as told; later records come either way."""
    bench.fill(bench.events, 0, 20)
    admin = bench.log.admin()
    admin.delete_records(TopicPartition(bench.events, 0), 10)
    admin.close()
    consumer = bench.consumer(reset=reset)
    assigned = take_all(consumer, 2)
    assert consumer.committed(assigned) == dict.fromkeys(assigned)
    consumer.resume(assigned)
    seen: list[int] = []
    for _ in range(10):
        for records in spin(consumer)[0].records.values():
            seen += numbers(records)
    bench.fill(bench.events, 0, 1, first=77)
    poll_until(consumer, lambda polled: bool([seen.extend(numbers(r)) for r in polled.records.values()]) and 77 in seen)
    assert seen == [*expected, 77]


def test_without_a_reset_rule_a_missing_position_stops(bench: Bench) -> None:
    """`none`: where no position is committed, poll stops with a message that names the partition and the way out."""
    bench.fill(bench.events, 0, 3)
    consumer = bench.consumer(reset="none")
    consumer.resume(take_all(consumer, 2))
    with pytest.raises(ConfigError, match=r"events-.*reset"):
        for _ in range(POLLS_MAX):
            consumer.poll(0.05, 10)


def test_the_first_record_of_a_time(bench: Bench) -> None:
    """`offset_at`: the first record with the timestamp or a later one; the head and the end where there is none."""
    bench.fill(bench.events, 0, 20)  # timestamps 1000 to 1019
    place, reader = TopicPartition(bench.events, 0), bench.reader()
    assert [reader.offset_at(place, t) for t in (0, 1_000, 1_007, 1_019)] == [0, 0, 7, 19]
    assert reader.offset_at(place, 1_020) == reader.bounds(place)[1] == 20
    admin = bench.log.admin()
    admin.delete_records(place, 10)
    admin.close()
    assert reader.offset_at(place, 1_003) == 10


@pytest.mark.parametrize("reset", ["earliest", "none"])
def test_a_deleted_position_follows_the_reset_rule(bench: Bench, reset: str) -> None:
    """The committed position was deleted: from the head, or a loud stop."""
    bench.fill(bench.events, 0, 20)
    place, admin = TopicPartition(bench.events, 0), bench.log.admin()
    consumer = bench.consumer(reset=reset)
    take_all(consumer, 2)
    admin.delete_records(place, 15)
    admin.close()
    consumer.seek(place, 4)
    consumer.resume([place])
    if reset == "earliest":
        found, _ = collect(consumer, 5)
        assert numbers(found[place]) == [15, 16, 17, 18, 19]
    else:
        with pytest.raises(ConfigError, match="reset"):
            for _ in range(POLLS_MAX):
                consumer.poll(0.05, 10)


def test_a_wrong_reset_rule_is_refused(bench: Bench) -> None:
    """Only earliest, latest and none are rules."""
    with pytest.raises(ConfigError, match="newest"):
        bench.consumer(reset="newest")


# ── transactions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def batch(bench: Bench, count: int = 10) -> tuple[GroupConsumer, TopicPartition, Polled]:
    """A consumer that owns both partitions and has polled `count` records of the first."""
    bench.fill(bench.events, 0, count)
    consumer = bench.consumer()
    assigned = take_all(consumer, 2)
    consumer.resume(assigned)
    _, polled = collect(consumer, count)
    return consumer, assigned[0], polled


def test_a_commit_shows_records_and_positions_together(bench: Bench) -> None:
    """Nothing before the commit; after it the records, the positions and the metadata string that went with them."""
    consumer, place, polled = batch(bench)
    producer = bench.producer()
    producer.begin()
    for n in range(5):
        producer.send(bench.out, n % 2, b"k", b"%d" % n, 123)
    producer.flush()
    assert bench.values(bench.out, 0) == bench.values(bench.out, 1) == []
    metadata = '{"model": 7, "watermark": 1700000000123, "é": "ü"}'
    producer.send_offsets({place: Position(10, metadata)}, polled.group)
    producer.commit()
    assert bench.values(bench.out, 0) == [b"0", b"2", b"4"]
    assert bench.values(bench.out, 1) == [b"1", b"3"]
    assert consumer.committed([place]) == {place: Position(10, metadata)}


def test_an_abort_leaves_nothing_and_the_batch_can_be_read_again(bench: Bench) -> None:
    """Aborted records are never read, the position stays; after a seek back the same records come again."""
    consumer, place, polled = batch(bench)
    producer = bench.producer()
    for attempt in range(3):
        producer.begin()
        producer.send(bench.out, 0, None, b"attempt %d" % attempt)
        producer.flush()
        producer.send_offsets({place: Position(10)}, polled.group)
        if attempt < 2:
            producer.abort()
            assert consumer.committed([place]) == {place: None}
            consumer.seek(place, 0)
            found, polled = collect(consumer, 10)
            assert numbers(found[place]) == list(range(10))
    producer.commit()
    assert bench.values(bench.out, 0) == [b"attempt 2"]
    assert consumer.committed([place]) == {place: Position(10)}


def test_a_transaction_without_a_commit_is_never_seen(bench: Bench) -> None:
    """A producer that is closed in the middle has done nothing; neither readers nor consumers see its records."""
    producer = bench.producer()
    producer.begin()
    producer.send(bench.events, 0, None, b"-5")
    producer.flush()
    producer.close()
    bench.fill(bench.events, 0, 2)
    consumer = bench.consumer()
    consumer.resume(take_all(consumer, 2))
    found, _ = collect(consumer, 2)
    assert [numbers(records) for records in found.values()] == [[0, 1]]
    assert bench.values(bench.events, 0) == [b"0", b"1"]


def test_an_empty_set_of_positions_is_refused(bench: Bench) -> None:
    """It would not fence: a process that lost its partitions could commit."""
    _, _, polled = batch(bench)
    producer = bench.producer()
    producer.begin()
    with pytest.raises(ValueError, match="empty"):
        producer.send_offsets({}, polled.group)
    producer.abort()


def test_a_plain_group_name_is_no_proof_of_membership(bench: Bench) -> None:
    """The broker would take it without any check of the generation, so it is refused."""
    _, place, _ = batch(bench)
    producer = bench.producer()
    producer.begin()
    for proof in (f"group-{bench.tag}", None):
        with pytest.raises(ValueError, match="proof"):
            producer.send_offsets({place: Position(10)}, proof)
    producer.abort()


def test_a_newer_producer_fences_the_older_one(bench: Bench) -> None:
    """What the older one left open is aborted at once; its commit raises Fenced and shows nothing."""
    consumer, place, polled = batch(bench)
    older = bench.producer()
    older.begin()
    older.send(bench.out, 0, None, b"zombie")
    older.flush()
    older.send_offsets({place: Position(10, "zombie")}, polled.group)
    newer = bench.producer()
    assert consumer.committed([place]) == {place: None}
    with pytest.raises(Fenced):
        older.commit()
    older.close()
    newer.begin()
    newer.send(bench.out, 0, None, b"heir")
    newer.flush()
    newer.send_offsets({place: Position(10, "heir")}, polled.group)
    newer.commit()
    assert bench.values(bench.out, 0) == [b"heir"]
    assert consumer.committed([place]) == {place: Position(10, "heir")}


def test_an_idle_older_producer_is_fenced_too(bench: Bench) -> None:
    """Fenced between transactions: the next one does not get through."""
    _, place, polled = batch(bench)
    older = bench.producer()
    bench.producer()
    with pytest.raises(Fenced):
        older.begin()
        older.send(bench.out, 0, None, b"zombie")
        older.flush()
        older.send_offsets({place: Position(10)}, polled.group)
        older.commit()
    older.close()
    assert bench.values(bench.out, 0) == []


@pytest.mark.parametrize("reached", ["send", "send_offsets", "commit"])
def test_a_new_producer_and_the_committed_position_resolve_an_unknown_outcome(bench: Bench, reached: str) -> None:
    """Whatever step the old producer had reached: after a new one exists, `committed` says whether it happened."""
    consumer, place, polled = batch(bench)
    lost = bench.producer()
    lost.begin()
    lost.send(bench.out, 0, None, b"result")
    lost.flush()
    if reached != "send":
        lost.send_offsets({place: Position(10, "attempt")}, polled.group)
    if reached == "commit":
        lost.commit()
    fresh = bench.producer()
    happened = consumer.committed([place])[place] == Position(10, "attempt")
    assert happened == (reached == "commit")
    if not happened:
        fresh.begin()
        fresh.send(bench.out, 0, None, b"result")
        fresh.flush()
        fresh.send_offsets({place: Position(10, "attempt")}, polled.group)
        fresh.commit()
    assert bench.values(bench.out, 0) == [b"result"]


def test_calls_out_of_order_are_mistakes(bench: Bench) -> None:
    """send, send_offsets, commit and abort need a transaction; begin inside one is refused."""
    _, place, polled = batch(bench)
    producer = bench.producer()
    calls: list[Callable[[], Any]] = [
        lambda: producer.send(bench.out, 0, None, b"x"),
        lambda: producer.send_offsets({place: Position(1)}, polled.group),
        producer.flush,
        producer.commit,
        producer.abort,
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no open transaction"):
            call()
    producer.begin()
    with pytest.raises(ValueError, match="begin"):
        producer.begin()
    producer.abort()


def test_a_transaction_may_carry_thousands_of_records_and_large_blocks(bench: Bench) -> None:
    """3,000 small records and three blocks of 900 kB become visible as one, in the order of sending."""
    _, place, polled = batch(bench)
    producer = bench.producer()
    producer.begin()
    block = b"\x01" * 900_000
    for n in range(3_000):
        producer.send(bench.out, 0, b"k", b"%d" % n)
    for _ in range(3):
        producer.send(bench.out, 1, None, block)
    producer.flush()
    producer.send_offsets({place: Position(10)}, polled.group)
    producer.commit()
    assert bench.values(bench.out, 0) == [b"%d" % n for n in range(3_000)]
    assert bench.values(bench.out, 1) == [block] * 3


# ── rebalances ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_members_share_and_a_leaver_gives_back_at_once(bench: Bench) -> None:
    """Each partition has one owner; when a member closes, the other one gets the rest without waiting for a timeout."""
    first = bench.consumer()
    assigned = take_all(first, 2)
    second = bench.consumer()
    owned = share_out([first, second], assigned, 2)
    assert owned[0] | owned[1] == {TopicPartition(bench.events, n) for n in (0, 1)}
    assert not owned[0] & owned[1]
    second.close()
    second.close()
    polled = poll_until(first, lambda polled: bool(polled.assigned))
    assert set(polled.assigned) == owned[1]


def test_a_revoked_partition_gives_no_more_records(bench: Bench) -> None:
    """Records that were fetched before the revocation never come out after it."""
    for partition in (0, 1):
        bench.fill(bench.events, partition, 500)
    first = bench.consumer()
    assigned = take_all(first, 2)
    first.resume(assigned)
    poll_until(first, lambda polled: bool(polled.records), max_records=10)  # the rest lies in the client's buffers
    second = bench.consumer()
    gone: set[TopicPartition] = set()
    for _ in range(POLLS_MAX):
        polled = first.poll(0.02, 5)
        gone.update(polled.revoked)
        assert not gone.intersection(polled.records)
        if gone and second.poll(0.02, 5).assigned:
            break
        second.poll(0.02, 5)
    assert len(gone) == 1
    for _ in range(10):
        assert not gone.intersection(first.poll(0.02, 50).records)
    with pytest.raises(ValueError, match="not assigned"):
        first.seek(next(iter(gone)), 0)


def test_a_batch_of_an_older_generation_is_not_committed(bench: Bench) -> None:
    """The proof of a poll from before a rebalance is rejected; after an abort the producer works with a new one."""
    consumer, place, polled = batch(bench)
    producer = bench.producer()
    producer.begin()
    producer.send(bench.out, 0, None, b"stale")
    producer.flush()
    other = bench.consumer()
    both = [TopicPartition(bench.events, n) for n in (0, 1)]
    owned = share_out([consumer, other], both, 2)
    with pytest.raises(Rebalanced):
        producer.send_offsets({place: Position(10, "stale")}, polled.group)
        producer.commit()
    producer.abort()
    owner = consumer if place in owned[0] else other
    assert owner.committed([place]) == {place: None}
    fresh = owner.poll(0.02, 10)
    producer.begin()
    producer.send(bench.out, 0, None, b"fresh")
    producer.flush()
    producer.send_offsets({place: Position(10, "fresh")}, fresh.group)
    producer.commit()
    assert bench.values(bench.out, 0) == [b"fresh"]
    assert owner.committed([place]) == {place: Position(10, "fresh")}


def test_partitions_of_one_number_stay_together(bench: Bench) -> None:
    """A user's clicks and purchases lie at the same number of two topics: one member owns both."""
    clicks, purchases = bench.topic("clicks", 4), bench.topic("purchases", 4)
    members = [bench.consumer(clicks, purchases) for _ in range(3)]
    owned: list[set[TopicPartition]] = [set() for _ in members]
    for _ in range(POLLS_MAX):
        for mine, polled in zip(owned, spin(*members), strict=True):
            mine.difference_update(polled.revoked)
            mine.update(polled.assigned)
        if sorted(map(len, owned)) == [2, 2, 4]:
            break
    for mine in owned:
        assert {p.partition for p in mine if p.topic == clicks} == {p.partition for p in mine if p.topic == purchases}
    assert set.union(*owned) == {TopicPartition(t, n) for t in (clicks, purchases) for n in range(4)}


def test_records_are_processed_exactly_once_over_a_handover(bench: Bench) -> None:
    """One member works, a second joins, the first leaves: every record's result is committed exactly once, in order."""
    for partition in (0, 1):
        bench.fill(bench.events, partition, 300)
    members = [bench.consumer()]
    producers = [bench.producer("slot-0")]
    end = {TopicPartition(bench.events, n): 300 for n in (0, 1)}
    done: dict[TopicPartition, int] = {}
    joined = left = False
    for _ in range(3 * POLLS_MAX):
        for consumer, producer in zip(members, producers, strict=True):
            polled = consumer.poll(0.02, 25)
            try:
                for partition, position in consumer.committed(polled.assigned).items():
                    consumer.seek(partition, position.offset if position else 0)
            except Retryable:
                consumer.close()  # cannot happen without an open transaction of somebody dead
                raise
            consumer.resume(polled.assigned)
            if not polled.records:
                continue
            positions = {p: Position(records[-1].offset + 1) for p, records in polled.records.items()}
            producer.begin()
            for partition, records in polled.records.items():
                for record in records:
                    producer.send(bench.out, partition.partition, record.key, record.value)
            try:
                producer.flush()
                producer.send_offsets(positions, polled.group)
                producer.commit()
                done.update({p: position.offset for p, position in positions.items()})
            except Rebalanced:
                producer.abort()
                for partition, records in polled.records.items():
                    consumer.seek(partition, records[0].offset)
        if not joined and sum(done.values()) > 100:
            joined = True
            members.append(bench.consumer())
            producers.append(bench.producer("slot-1"))
        if joined and not left and sum(done.values()) > 350:
            left = True
            members.pop(0).close()
            producers.pop(0).close()
        if done == end:
            break
    assert done == end and left
    for partition in (0, 1):
        assert bench.values(bench.out, partition) == [b"%d" % n for n in range(300)]
