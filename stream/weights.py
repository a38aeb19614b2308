"""Weights on their way from the learner to the workers: whole snapshots, in chunks, through one partition of a topic.

A version is one run of records in partition 0, written in one transaction. The record key says what it is:

    weights/<version>/<chunk>/<chunks>/<sha256 of the whole>
    learner/<version>/<chunk>/<chunks>/<sha256 of the whole>     all else that learning needs to go on

    barrier/<nonce>/0/1/-            the learner's own mark: what its predecessor committed lies before it

A reader takes the newest complete version whose checksum holds. Older versions are deleted from the head, never the
newest three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stream.errors import Corrupt, Retryable
from stream.transport import LogReader, Producer, TopicPartition

CHUNK_BYTES = 900_000
PARTITION = 0
KINDS = ("weights", "learner")
_BARRIER = b"barrier/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A complete version as it came from the log. `first_offset` is where its first chunk lies."""

    kind: str
    version: int
    payload: bytes
    first_offset: int


def chunks(kind: str, version: int, payload: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of the records that carry a snapshot."""
    digest = hashlib.sha256(payload).hexdigest()
    count = max(1, -(-len(payload) // CHUNK_BYTES))
    for i in range(count):
        yield f"{kind}/{version}/{i}/{count}/{digest}".encode(), payload[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]


def send(producer: Producer, topic: str, kind: str, version: int, payload: bytes) -> None:
    """Send a snapshot inside the producer's open transaction."""
    for key, value in chunks(kind, version, payload):
        producer.send(topic, PARTITION, key, value)


def send_barrier(producer: Producer, topic: str, nonce: str) -> None:
    """A transaction of its own with nothing but the learner's mark."""
    producer.begin()
    producer.send(topic, PARTITION, _BARRIER + nonce.encode(), b"")
    producer.flush()
    producer.commit()


class WeightsFeed:
    """Follows the topic and hands out each complete snapshot once, oldest first."""

    def __init__(self, reader: LogReader, topic: str, kinds: tuple[str, ...] = ("weights",)) -> None:
        self._reader = reader
        self._tp = TopicPartition(topic, PARTITION)
        self._kinds = kinds
        self._offset = 0
        self._parts: dict[tuple[str, int], list[bytes]] = {}
        self._first: dict[tuple[str, int], int] = {}
        self._barriers: set[str] = set()

    def poll(self, timeout_s: float, max_records: int = 64) -> list[Snapshot]:
        """Snapshots completed by what lies in the log now; at most `max_records` records are read."""
        done = []
        for record in self._reader.read(self._tp, self._offset, timeout_s, max_records):
            self._offset = record.offset + 1
            if record.key is not None and record.key.startswith(_BARRIER):
                self._barriers.add(record.key[len(_BARRIER) :].decode())
                continue
            where = f"{self._tp.topic}-{PARTITION}@{record.offset}"
            kind, version, chunk, count, digest = _parse(record.key, where)
            if kind not in self._kinds:
                continue
            name = (kind, version)
            if chunk == 0:
                self._parts[name], self._first[name] = [], record.offset
            parts = self._parts.get(name)
            if parts is None or len(parts) != chunk:
                self._parts.pop(name, None)  # its head was deleted before we came: a newer one follows
                continue
            parts.append(record.value or b"")
            if chunk + 1 == count:
                payload = b"".join(self._parts.pop(name))
                if hashlib.sha256(payload).hexdigest() != digest:
                    raise Corrupt(
                        f"{where}: {kind} version {version} fails its checksum; the topic was written by something else"
                    )
                done.append(Snapshot(kind=kind, version=version, payload=payload, first_offset=self._first.pop(name)))
        return done

    def latest(self, timeout_s: float) -> dict[str, Snapshot]:
        """Read on until the log yields nothing more; the newest snapshot of each kind."""
        newest: dict[str, Snapshot] = {}
        for _ in range(10_000):
            before = self._offset
            for snapshot in self.poll(timeout_s):
                newest[snapshot.kind] = snapshot
            if self._offset == before:
                break
        return newest

    def until(self, nonce: str, timeout_s: float, clock: Callable[[], float]) -> dict[str, Snapshot]:
        """Read up to a barrier that has been committed; the newest snapshot of each kind before it.

        Raises:
            Retryable: the barrier did not become visible for `timeout_s` without any progress.
        """
        newest: dict[str, Snapshot] = {}
        last_progress_s = clock()
        while nonce not in self._barriers:
            before = self._offset
            for snapshot in self.poll(0.5):
                newest[snapshot.kind] = snapshot
            if self._offset != before:
                last_progress_s = clock()
            elif clock() - last_progress_s > timeout_s:
                raise Retryable(f"topic {self._tp.topic}: a committed mark did not become visible in {timeout_s:.0f} s")
        return newest

    def close(self) -> None:
        self._reader.close()


def _parse(key: bytes | None, where: str) -> tuple[str, int, int, int, str]:
    try:
        kind, version, chunk, count, digest = (key or b"").decode().split("/")
        return kind, int(version), int(chunk), int(count), digest
    except ValueError:
        raise Corrupt(f"{where}: not a chunk of weights; the topic was written by something else") from None
