"""Transactions on Kafka; see transport.Producer.

kafka-python reports a commit as done although a record of the transaction was lost, and although the broker aborted it
after an epoch bump. So nothing is in flight when a commit begins: `flush` waits for every record and looks at every
result, then come the offsets, then the commit. Its epoch bump is switched off: after a fence it would quietly take the
id back from the newer producer. And it waits without a limit, so the waits here have one.

A broker that is killed and comes back loses sight of transactions: Kafka 4.3.1 has been seen to write, as it started,
that one was committed, without the marks in its partitions. Such a part stays open there: no committed reader comes
past it, and the next transaction of the id there ends it the way that it ends itself. So a producer first ends the
remains of its last transaction as that one ended (`end_remains`); and it begins no transaction over another connection
than its first: behind that may be such a broker, and to abort the new transaction would undo the old one.

    idle ── begin ──> open ── flush, send_offsets, commit | abort ──> idle
                        └──── any failure but Rebalanced ──> broken: only `close` is left
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from kafka import KafkaProducer as Client
from kafka import errors as kafka_errors
from kafka.producer.transaction_manager import AddOffsetsToTxnHandler
from kafka.structs import ConsumerGroupMetadata, OffsetAndMetadata
from kafka.structs import TopicPartition as ClientPartition

from stream.errors import ConfigError, DriftlineError, Fenced, Rebalanced, Retryable
from stream.kafka_client import REQUEST_TIMEOUT_MS, ConnectionSettings, Topics, translated, translating
from stream.transport import Position, Scope, TopicPartition

BATCH_BYTES = 256 << 10
LINGER_MS = 20  # records gather while the worker computes; `flush` does not wait for it
REQUEST_BYTES_MAX = 1 << 20  # the library's default of max_request_size
_CLOSE_TIMEOUT_S = 2.0


def shut(client: Client) -> None:
    """Close a producer of the library, within bounds; records that are stuck are given up, and its threads end."""
    try:
        client.close(timeout=_CLOSE_TIMEOUT_S)
    except kafka_errors.KafkaTimeoutError:
        client._sender.force_close()
        client._sender.join(_CLOSE_TIMEOUT_S)


class KafkaProducer:
    """A transactional producer that fences every older one of its id."""

    def __init__(
        self, settings: ConnectionSettings, topics: Topics, transactional_id: str, transaction_timeout_s: float
    ) -> None:
        """Connect, fence older producers of the id and abort what they left open.

        Raises:
            ConfigError: no connection, or no right to the id.
            Retryable: the transaction coordinator did not answer in time.
        """
        self._id = transactional_id
        self._topics = topics
        self._timeout_s = transaction_timeout_s
        self._futures: list[Any] = []
        self._begun: set[tuple[str, int]] = set()  # partitions that are part of the open transaction
        # Larger records go the library's own way, which knows the limit and says so.
        self._plain_bytes_max = int(settings.get("max_request_size", REQUEST_BYTES_MAX)) // 2
        self._open = False
        self._broken: DriftlineError | None = None
        self._began_s = 0.0
        linger_ms = int(settings.get("linger_ms", LINGER_MS))
        request_ms = int(settings.get("request_timeout_ms", REQUEST_TIMEOUT_MS))
        delivery_ms = max(int(transaction_timeout_s * 1000) + 5_000, request_ms + linger_ms + 1_000)
        self._client = settings.connect(
            Client,
            transactional_id=transactional_id,
            transaction_timeout_ms=int(transaction_timeout_s * 1000),
            delivery_timeout_ms=settings.get("delivery_timeout_ms", delivery_ms),
            max_block_ms=int((transaction_timeout_s + 5) * 1000),
            batch_size=settings.get("batch_size", BATCH_BYTES),
            linger_ms=linger_ms,
        )
        try:
            self._transactions = self._client._transaction_manager
            self._transactions._supports_epoch_bump = lambda: False
            with translating(f"cannot begin transactions as {transactional_id!r}"):
                self._client.init_transactions()
            self._connection = self._connection_now()
            self._next_request = self._transactions.next_request_handler
            self._transactions.next_request_handler = self._on_the_same_connection
        except BaseException:
            shut(self._client)
            raise

    def begin(self) -> None:
        self._check_alive()
        if self._open:
            raise ValueError("begin inside an open transaction")
        with self._breaking("begin"):
            self._client.begin_transaction()
        self._futures.clear()
        self._begun.clear()
        self._began_s = time.monotonic()
        self._open = True

    def send(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, timestamp_ms: int | None = None
    ) -> None:
        self._check_open()
        plain = value is not None and len(value) + len(key or b"") < self._plain_bytes_max
        try:
            if plain and (topic, partition) in self._begun:
                self._append(ClientPartition(topic, partition), key, value, timestamp_ms)
                return
            self._topics.check(topic, partition)
            self._futures.append(self._client.send(topic, value, key, None, partition, timestamp_ms))
            self._begun.add((topic, partition))
        except kafka_errors.KafkaError as error:
            raise self._break(error, "send") from error

    def _append(self, place: ClientPartition, key: bytes | None, value: bytes | None, timestamp_ms: int | None) -> None:
        """What the library's `send` comes to for the next record of a partition; its checks take as long again."""
        future, full, new, _ = self._client._accumulator.append(place, timestamp_ms, key, value, [])
        self._futures.append(future)
        if full or new:
            self._client._sender.wakeup()

    def flush(self) -> None:
        self._check_open()
        with self._breaking("flush"):
            self._client.flush(timeout=self._timeout_s)
        for future in self._futures:
            if not future.succeeded():
                error = future.exception or kafka_errors.KafkaTimeoutError("not stored in time")
                raise self._break(error, "a record of the transaction was not stored") from None
        self._futures.clear()

    def send_offsets(self, positions: Mapping[TopicPartition, Position], group: object) -> None:
        if not positions:
            raise ValueError("no positions: an empty set would not fence a process that lost its partitions")
        if not isinstance(group, ConsumerGroupMetadata) or not group.member_id or group.generation_id < 0:
            raise ValueError(f"group must be the proof of a poll (Polled.group), not {group!r}")
        self.flush()
        offsets = {ClientPartition(*p): OffsetAndMetadata(at.offset, at.metadata, -1) for p, at in positions.items()}
        with self._breaking("send_offsets"):
            self._wait(self._transactions.send_offsets_to_transaction(offsets, group), "send_offsets")

    def commit(self) -> None:
        self.flush()
        with self._breaking("commit"):
            self._wait(self._transactions.begin_commit(), "commit")
        self._open = False

    def abort(self) -> None:
        self._check_open()
        with self._breaking("abort"):
            self._wait(self._transactions.begin_abort(), "abort")
        self._futures.clear()
        self._open = False

    def end_remains(self, scope: Scope, *, committed: bool) -> None:
        """End what is open in these places and is not known to the log any more, by a transaction without records.

        A crash between its two requests, some milliseconds, would abort it, and with it what was to be committed.
        """
        self.begin()
        with self._breaking("end_remains"):
            for place in scope.partitions:
                self._topics.check(*place)
                self._transactions.maybe_add_partition_to_transaction(ClientPartition(*place))
            with self._transactions._lock:
                requests = [self._transactions._add_partitions_to_transaction_handler()]
                if scope.group:
                    requests.append(_AddGroup(self._transactions, ConsumerGroupMetadata(group_id=scope.group), {}))
                for request in requests:
                    self._transactions._enqueue_request(request)
            for request in requests:
                self._wait(request.result, "end_remains")
        if committed:
            self.commit()
        else:
            self.abort()

    def close(self) -> None:
        """Abort what is open, as far as that goes quickly. Idempotent."""
        if self._open and self._broken is None:
            with suppress(DriftlineError):  # the next producer of the id, or the timeout, aborts it
                self.abort()
        self._broken = self._broken or Retryable(f"the producer {self._id!r} is closed")
        self._open = False
        shut(self._client)

    def _connection_now(self) -> object:
        """The client's connection to the transaction coordinator; None while there is none. Of the sender's thread."""
        return self._client._sender._client._manager._conns.get(self._transactions._transaction_coordinator)

    def _on_the_same_connection(self, has_incomplete_batches: bool) -> Any:
        """The library's next request; none that begins a transaction over another connection."""
        transactions = self._transactions
        asks = transactions._new_partitions_in_transaction or transactions._pending_requests
        begins = asks and not transactions._transaction_started and not transactions.has_error()
        if begins and self._connection_now() is not self._connection:
            error = kafka_errors.KafkaConnectionError("the connection to the transaction coordinator was lost")
            transactions.transition_to_fatal_error(error)
        return self._next_request(has_incomplete_batches)

    def _wait(self, result: Any, doing: str) -> None:
        """The library waits without a limit; we do not."""
        self._client._sender.wakeup()
        if not result.wait(timeout_ms=self._timeout_s * 1000):
            raise kafka_errors.KafkaTimeoutError(f"{doing} not answered within {self._timeout_s:g} s")

    def _check_alive(self) -> None:
        if isinstance(self._broken, Fenced | ConfigError):
            raise self._broken
        if self._broken is not None:
            raise Retryable(f"the producer {self._id!r} failed before; throw it away and create a new one")

    def _check_open(self) -> None:
        self._check_alive()
        if not self._open:
            raise ValueError("no open transaction; call begin first")

    def _breaking(self, doing: str) -> _Breaking:
        return _Breaking(self, doing)

    def _break(self, error: Exception, doing: str) -> DriftlineError:
        """The error to raise; all but Rebalanced end the life of this producer."""
        cause: Exception = error
        last = self._transactions.last_error
        if isinstance(last, Exception) and not isinstance(translated(error, ""), Fenced):
            cause = last  # "we are in an error state" hides what happened first
        ours = translated(cause, f"{doing} of {self._id!r}")
        if isinstance(ours, Fenced):
            ours = self._fenced_or_late(str(ours))
        if not isinstance(ours, Rebalanced):
            self._broken = ours
        return ours

    def _fenced_or_late(self, message: str) -> DriftlineError:
        """The broker speaks of a fence also when it aborted a transaction that was open for too long."""
        if self._open and time.monotonic() - self._began_s >= self._timeout_s:
            return Retryable(f"{message}: the transaction was open for too long, the broker has aborted it")
        return Fenced(f"{message}: a newer producer has the id {self._id!r}; this process must stop")


class _AddGroup(AddOffsetsToTxnHandler):  # type: ignore[misc]
    """Makes the positions of a group a part of the transaction, without new ones."""

    def handle_response(self, response: Any) -> None:
        if kafka_errors.for_code(response.error_code) is kafka_errors.NoError:
            self.transaction_manager._transaction_started = True
            self._result.done()
        else:
            super().handle_response(response)


class _Breaking:
    """`with`: errors of the client library break the producer and come out as ours."""

    __slots__ = ("_doing", "_producer")

    def __init__(self, producer: KafkaProducer, doing: str) -> None:
        self._producer = producer
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, kafka_errors.KafkaError):
            raise self._producer._break(error, self._doing) from error
