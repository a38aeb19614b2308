"""Compiled decoding of Kafka's record batches: equal to the library's, record for record, and as strict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka.consumer.fetcher import Fetcher, IsolationLevel
from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecordBatchBuilder
from kafka.record.memory_records import MemoryRecords
from kafka.structs import TopicPartition

from models.batch_layout import locate
from stream.kafka_batches import WholeBatches

PLACE = TopicPartition("events", 3)
TIME_MS = 1_700_000_000_000
NONE, GZIP, SNAPPY, LZ4, ZSTD = range(5)

text = st.none() | st.binary(max_size=300)
record = st.tuples(
    text,
    text,
    st.integers(-(2**40), 2**40),
    st.lists(st.tuples(st.text(max_size=5), text), max_size=3),
)


def batch(records: list[tuple[Any, ...]], offset: int, codec: int = NONE) -> bytes:
    """As a producer writes it."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=codec,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=1 << 30,
    )
    for number, (key, value, time_ms, headers) in enumerate(records):
        builder.append(number, TIME_MS + time_ms, key, value, headers)
    data = builder.build()
    data[:8] = offset.to_bytes(8, "big")
    return bytes(data)


def fetched(kind: type, data: bytes, fetch_offset: int) -> Any:
    return kind(
        fetch_offset, PLACE, MemoryRecords(data), isolation_level=IsolationLevel.READ_COMMITTED, aborted_transactions=[]
    )


def drained(part: Any, size: int | None) -> list[tuple[Any, ...]]:
    """Everything, `size` at a time, with the position after each take."""
    found: list[tuple[Any, ...]] = []
    while part:
        for r in part.take(size):
            found.append((r.topic, r.partition, r.offset, r.timestamp, r.key, r.value))
    return [*found, (part.next_fetch_offset,)]


@settings(deadline=None, max_examples=200)
@given(
    batches=st.lists(st.tuples(st.lists(record, min_size=1, max_size=20), st.integers(NONE, ZSTD)), max_size=4),
    skipped=st.integers(0, 30),
    size=st.none() | st.integers(1, 7),
)
def test_reads_what_the_library_reads(batches: list[Any], skipped: int, size: int | None) -> None:
    """Record for record, position for position, whatever the codec, the holes and where a fetch begins."""
    data, offset = b"", 1_000
    for records, codec in batches:
        data += batch(records, offset, codec)
        offset += len(records) + 5  # holes, as markers and compaction leave them
    ours = drained(fetched(WholeBatches, data, 1_000 + skipped), size)
    assert ours == drained(fetched(Fetcher.PartitionRecords, data, 1_000 + skipped), size)


def test_position_is_that_of_the_next_record() -> None:
    """Between two takes, also where the rest of a batch stays behind."""
    part = fetched(WholeBatches, batch([(b"k", b"v", 0, [])] * 5, 10) + batch([(b"k", b"v", 0, [])] * 2, 20), 12)
    assert [r.offset for r in part.take(2)] == [12, 13]
    assert part.next_fetch_offset == 14
    assert [r.offset for r in part.take(2)] == [14, 20]
    assert part.next_fetch_offset == 21
    assert [r.offset for r in part.take(9)] == [21]
    assert part.next_fetch_offset == 22
    assert not part


@settings(deadline=None, max_examples=300)
@given(records=st.lists(record, min_size=1, max_size=5), at=st.integers(0), value=st.integers(1, 255))
def test_a_changed_byte_is_found_by_the_checksum(records: list[Any], at: int, value: int) -> None:
    """Damage is an error, never other records."""
    data = bytearray(batch(records, 0))
    at = 17 + at % (len(data) - 17)  # before it: offset, length, epoch, magic
    if at in range(17, 21):
        return  # the checksum itself
    data[at] ^= value
    with pytest.raises(CorruptRecordError):
        fetched(WholeBatches, bytes(data), 0).take(None)


def test_an_error_after_good_records_comes_with_the_next_call() -> None:
    """What was read before the damage is handed out first."""
    bad = bytearray(batch([(b"k", b"v", 0, [])], 1))
    bad[-1] ^= 1
    part = fetched(WholeBatches, batch([(b"k", b"v", 0, [])], 0) + bytes(bad), 0)
    assert len(part.take(10)) == 1
    assert part.next_fetch_offset == 1
    with pytest.raises(CorruptRecordError):
        part.take(10)


@settings(deadline=None, max_examples=500)
@given(data=st.binary(max_size=200), count=st.integers(0, 10))
def test_no_bytes_lead_out_of_the_buffer(data: bytes, count: int) -> None:
    """The kernel has no bounds checks of its own: what it accepts lies inside."""
    at_RF = np.full((count, 6), -7, np.int64)
    if locate(np.frombuffer(data, np.uint8), at_RF):
        ends = at_RF[:, [3, 5]]
        starts = at_RF[:, [2, 4]]
        assert ((ends == -1) | ((starts >= 0) & (starts <= ends) & (ends <= len(data)))).all()


@settings(deadline=None, max_examples=300)
@given(records=st.lists(record, min_size=1, max_size=4), cut=st.integers(1), count=st.integers(-2, 2))
def test_a_wrong_length_or_number_of_records_is_refused(records: list[Any], cut: int, count: int) -> None:
    """A batch is taken whole, to its last byte, or not at all."""
    data = np.frombuffer(batch(records, 0)[61:], np.uint8)
    at_RF = np.empty((max(0, len(records) + count), 6), np.int64)
    assert locate(data, at_RF) == (count == 0)
    assert not locate(data[: cut % len(data)], np.empty((len(records), 6), np.int64))


def test_legacy_message_sets_are_read() -> None:
    """Topics from before Kafka 0.11 may still hold them."""
    from kafka.record.legacy_records import LegacyRecordBatchBuilder

    builder = LegacyRecordBatchBuilder(magic=1, compression_type=0, batch_size=1 << 20)
    for offset in range(3):
        builder.append(offset, TIME_MS, b"k%d" % offset, b"v")
    found = fetched(WholeBatches, bytes(builder.build()), 1).take(None)
    assert [(r.offset, r.key) for r in found] == [(1, b"k1"), (2, b"k2")]
