"""Record batches of Kafka to records, whole batches at a time.

kafka-python 3.0.12 takes a batch apart in Python, which was a quarter of all that a worker's main thread did. Here one
compiled pass finds where each record's key and value lie, and the rest is slices. What surrounds it stays the
library's: fetching, checksums, decompression, which transactions were aborted, positions. Layout of a batch: Kafka's
documentation, "Message Format", record batch v2. Readers outside a group keep the library's decoder: what they read
are few and large records, or a command that should not wait for a compiler.
"""

from __future__ import annotations

from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
from kafka import errors as kafka_errors
from kafka.consumer.fetcher import Fetcher, IsolationLevel
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.memory_records import MemoryRecords

from models.batch_layout import FIELDS, TIME, locate
from stream.transport import LogRecord

_BATCH_V2 = 2
_RECORD_BYTES_MIN = 7  # length, attributes, two deltas, two lengths, number of headers
_record = partial(tuple.__new__, LogRecord)  # LogRecord._make without its own frame


class WholeBatches(Fetcher.PartitionRecords):  # type: ignore[misc]
    """The records of one fetch of one partition; in place of the library's `Fetcher.PartitionRecords`."""

    def __init__(self, fetch_offset: int, tp: Any, records: MemoryRecords, **options: Any) -> None:
        super().__init__(fetch_offset, tp, records, **options)
        self._batches = records
        self._ready: list[LogRecord] = []  # of the batch that is being handed out
        self._at = 0
        self._batch_end = fetch_offset  # the first offset after it

    def take(self, n: int | None = None) -> list[LogRecord]:
        """At most `n` records; an error that comes after the first of them is raised by the next call.

        Raises:
            kafka.errors.CorruptRecordError: a batch fails its checksum, or is not laid out as it should be.
        """
        self._maybe_raise_next_inline_exception()
        taken: list[LogRecord] = []
        try:
            while n is None or len(taken) < n:
                if self._at == len(self._ready) and not self._next_batch():
                    self.drain()
                    break
                part = self._ready[self._at : None if n is None else self._at + n - len(taken)]
                taken += part
                self._at += len(part)
                whole = self._at == len(self._ready)
                self.next_fetch_offset = self._batch_end if whole else self._ready[self._at].offset
        except Exception as error:
            if not taken:
                raise
            self._next_inline_exception = error
        return taken

    def _next_batch(self) -> bool:
        """Decode the next batch that has records for us; False at the end of the fetch."""
        while (batch := self._batches.next_batch()) is not None:
            if self.check_crcs and not batch.validate_crc():
                raise kafka_errors.CorruptRecordError(
                    f"{self.topic_partition}: the record batch at offset {batch.base_offset} fails its checksum"
                )
            if batch.magic == _BATCH_V2:
                self.leader_epoch = batch.leader_epoch
                self._batch_end = batch.next_offset
                if self._is_to_skip(batch):
                    self.next_fetch_offset = batch.next_offset
                    continue
                found = self._read(batch)
            else:
                found = self._read_legacy(batch)
                self._batch_end = found[-1].offset + 1 if found else self._batch_end
            first = next((i for i, record in enumerate(found) if record.offset >= self.fetch_offset), len(found))
            self._ready, self._at = found, first
            if first < len(found):
                return True
            self.next_fetch_offset = self._batch_end
        return False

    def _is_to_skip(self, batch: DefaultRecordBatch) -> bool:
        """Markers of transactions, and, for committed readers, what was aborted."""
        if self.isolation_level == IsolationLevel.READ_COMMITTED and batch.has_producer_id():
            self._consume_aborted_transactions_up_to(batch.last_offset)
            if self._contains_abort_marker(batch):
                self.aborted_producer_ids.discard(batch.producer_id)
            elif self._is_batch_aborted(batch):
                return True
        return bool(batch.is_control_batch)

    def _read(self, batch: DefaultRecordBatch) -> list[LogRecord]:
        batch._maybe_uncompress()
        data = bytes(memoryview(batch._buffer)[batch._pos :])
        count = batch.records_count
        at_RF = np.empty((max(0, min(count, len(data) // _RECORD_BYTES_MIN)), FIELDS), np.int64)
        if len(at_RF) != count or not locate(np.frombuffer(data, np.uint8), at_RF):
            raise kafka_errors.CorruptRecordError(
                f"{self.topic_partition}: the record batch at offset {batch.base_offset} has no valid structure"
            )
        self.records_read += count
        self.bytes_read += len(data)
        topic, partition = self.topic_partition
        if batch.timestamp_type == batch.LOG_APPEND_TIME:
            at_RF[:, TIME] = batch.max_timestamp
        else:
            at_RF[:, TIME] += batch.first_timestamp
        offsets, times, keys, key_ends, values, value_ends = at_RF.T.tolist()
        base = batch.base_offset
        rows = zip(
            repeat(topic),
            repeat(partition),
            [base + delta for delta in offsets],
            times,
            [data[a:b] if b >= 0 else None for a, b in zip(keys, key_ends, strict=True)],
            [data[a:b] if b >= 0 else None for a, b in zip(values, value_ends, strict=True)],
            strict=False,  # the first two have no end
        )
        return list(map(_record, rows))

    def _read_legacy(self, batch: Any) -> list[LogRecord]:
        """Message sets from before Kafka 0.11, the library's way."""
        topic, partition = self.topic_partition
        found = []
        for record in batch:
            if self.check_crcs and not record.validate_crc():
                raise kafka_errors.CorruptRecordError(
                    f"{self.topic_partition}: the record at offset {record.offset} fails its checksum"
                )
            self.records_read += 1
            self.bytes_read += record.size_in_bytes
            found.append(LogRecord(topic, partition, record.offset, record.timestamp, record.key, record.value))
        return found
