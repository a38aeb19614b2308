"""The Kafka log, by kafka-python; see transport.py for the contract and kafka_*.py for consumer and producer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from kafka import KafkaAdminClient, errors
from kafka import KafkaConsumer as ConsumerClient
from kafka import KafkaProducer as ProducerClient
from kafka.admin import ACLOperation, ConfigResource, ConfigResourceType
from kafka.structs import TopicPartition as ClientPartition

from stream.errors import ConfigError, Retryable
from stream.kafka_client import ConnectionSettings, Topics, check_codec, hushed, translated, translating
from stream.kafka_consumer import KafkaConsumer
from stream.kafka_producer import BATCH_BYTES, LINGER_MS, KafkaProducer, shut
from stream.transport import Record, Scope, TopicPartition, TopicSpec

_APPEND_RECORDS = 20_000
_APPEND_TIMEOUT_S = 60.0
_ADMIN_TIMEOUT_MS = 20_000
_ASK_AGAIN_S = 0.1
_NO_RIGHT = errors.TopicAuthorizationFailedError.errno
_READ_FETCH = {
    "fetch_max_wait_ms": 100,
    "max_partition_fetch_bytes": 8 << 20,
    "fetch_max_bytes": 32 << 20,
    "receive_buffer_bytes": 4 << 20,
}


class KafkaLog:
    """Kafka as a log; see transport.Transport. Clients are made by the thread that uses them."""

    name = "kafka"

    def __init__(self, settings: Mapping[str, object], *, transaction_timeout_s: float = 15.0) -> None:
        """Connect.

        Args:
            settings: connection settings by kafka-python's names; values may be secrets (config.Secret, env:, file:).
            transaction_timeout_s: the broker aborts a transaction that is open for longer; also the limit of waits.

        Raises:
            ConfigError: a setting is wrong, a package is missing, no broker answers or it refuses us.
        """
        self._settings = ConnectionSettings(settings)
        self._transaction_timeout_s = transaction_timeout_s
        self._lock = threading.Lock()  # of the admin client, which several threads ask about topics
        self._admin: KafkaAdminClient | None = self._settings.connect(KafkaAdminClient)
        self._topics = Topics(self._partition_count)
        self._writer: ProducerClient | None = None
        # How the last transaction of an id ended, from when we ask until its remains are ended as well.
        self._committed: dict[str, bool] = {}

    def __repr__(self) -> str:
        return f"KafkaLog({self._settings!r})"

    def admin(self) -> KafkaAdmin:
        return KafkaAdmin(self._settings)

    def consumer(self, *, group: str, topics: Sequence[str], reset: str = "earliest") -> KafkaConsumer:
        for topic, settings in self._describe(topics).items():
            if settings is not None:
                check_codec(settings.settings.get("compression.type", ""), f"compression.type of topic {topic!r}")
        return KafkaConsumer(self._settings, self._topics, group, tuple(topics), reset)

    def producer(self, *, transactional_id: str, scope: Scope | None = None) -> KafkaProducer:
        if scope is not None and transactional_id not in self._committed:  # else an earlier try has forgotten it below
            committed = self._was_committed(transactional_id)
            if committed is not None:
                self._committed[transactional_id] = committed
        producer = KafkaProducer(self._settings, self._topics, transactional_id, self._transaction_timeout_s)
        if scope is not None and transactional_id in self._committed:
            try:
                producer.end_remains(scope, committed=self._committed[transactional_id])
            except BaseException:
                producer.close()
                raise
            del self._committed[transactional_id]
        return producer

    def _was_committed(self, transactional_id: str) -> bool | None:
        """Whether the last transaction of an id is committed, or will be whatever happens; None: there was none.

        The admin client asks once; a coordinator that is still coming up is waited for here.
        """
        until_s = time.monotonic() + self._transaction_timeout_s
        while True:
            try:
                return self._ask_how_it_ended(transactional_id)
            except Retryable:
                if time.monotonic() > until_s:
                    raise
                time.sleep(_ASK_AGAIN_S)

    def _ask_how_it_ended(self, transactional_id: str) -> bool | None:
        if self._admin is None:
            raise ValueError("the log is closed")
        with self._lock, translating(f"cannot ask how transactions of {transactional_id!r} ended"):
            try:
                found = self._admin.describe_transactions([transactional_id])[transactional_id]
            except (errors.TransactionalIdNotFoundError, errors.UnsupportedVersionError):  # brokers before 3.0
                return None
        return str(found.state.value) in ("PrepareCommit", "CompleteCommit")

    def reader(self) -> KafkaReader:
        return KafkaReader(self._settings, self._topics)

    def append(self, topic: str, partition: int, records: Iterable[tuple[bytes | None, bytes | None, int]]) -> int:
        self._topics.check(topic, partition)
        if self._writer is None:
            self._writer = self._settings.connect(
                ProducerClient,
                batch_size=self._settings.get("batch_size", BATCH_BYTES),
                linger_ms=self._settings.get("linger_ms", LINGER_MS),
                delivery_timeout_ms=int(_APPEND_TIMEOUT_S * 1000),
            )
        source = iter(records)
        count = 0
        try:
            while taken := self._append(self._writer, topic, partition, islice(source, _APPEND_RECORDS)):
                count += taken
        except BaseException:  # a client that had to give up a record under way never sends another one
            self._end_writer()
            raise
        return count

    def _append(
        self,
        writer: ProducerClient,
        topic: str,
        partition: int,
        records: Iterable[tuple[bytes | None, bytes | None, int]],
    ) -> int:
        doing = f"append to {topic}-{partition}"
        with translating(doing):
            sent = [writer.send(topic, value, key, None, partition, at_ms) for key, value, at_ms in records]
            writer.flush(timeout=_APPEND_TIMEOUT_S)
        for future in sent:
            if not future.succeeded():
                raise translated(future.exception or errors.KafkaTimeoutError("not stored in time"), doing)
        return len(sent)

    def _end_writer(self) -> None:
        if self._writer is not None:
            shut(self._writer)
            self._writer = None

    def close(self) -> None:
        """Close the log's own clients; what was created from it is closed by its owner. Idempotent."""
        self._end_writer()
        if self._admin is not None:
            with hushed():
                self._admin.close()
            self._admin = None

    def _describe(self, names: Sequence[str]) -> dict[str, TopicSpec | None]:
        if self._admin is None:
            raise ValueError("the log is closed")
        with self._lock:
            return describe(self._admin, names)

    def _partition_count(self, topic: str) -> int | None:
        if self._admin is None:
            raise ValueError("the log is closed")
        with self._lock, translating(f"metadata of topic {topic!r}"):
            (found,) = self._admin.describe_topics([topic])
        if found["error_code"] == _NO_RIGHT:
            raise _hidden(topic)
        return len(found["partitions"]) if found["error_code"] == 0 else None


def describe(client: KafkaAdminClient, names: Sequence[str]) -> dict[str, TopicSpec | None]:
    """Topics as the broker has them, with all their settings; None for a missing one."""
    found: dict[str, TopicSpec | None] = dict.fromkeys(names)
    with translating(f"description of topics {', '.join(names)}"):
        answers = client.describe_topics(list(names)) if names else []
        hidden = next((t["name"] for t in answers if t["error_code"] == _NO_RIGHT), None)
        if hidden is not None:
            raise _hidden(hidden)
        topics = [t for t in answers if t["error_code"] == 0]
        if topics:
            asked = [ConfigResource(ConfigResourceType.TOPIC, t["name"]) for t in topics]
            configs: dict[str, Any] = client.describe_configs(asked, config_filter="all")["topic"]
            for topic in topics:
                settings = {name: str(entry["value"]) for name, entry in configs[topic["name"]].items()}
                rights = topic["authorized_operations"]  # Describe at least; empty: the broker does not say
                found[topic["name"]] = TopicSpec(
                    name=topic["name"],
                    partitions=len(topic["partitions"]),
                    settings=settings,
                    readable=not rights or ACLOperation.READ.name in rights,
                )
    return found


def _hidden(topic: str) -> ConfigError:
    return ConfigError(f"no right to describe topic {topic!r}; grant Describe on it (docs/security.md)")


class KafkaReader:
    """Reads committed records of chosen partitions; see transport.LogReader."""

    def __init__(self, settings: ConnectionSettings, topics: Topics) -> None:
        self._topics = topics
        self._client = settings.connect(
            ConsumerClient,
            auto_offset_reset="earliest",  # the head may be deleted while we read
            **{name: settings.get(name, value) for name, value in _READ_FETCH.items()},
        )
        self._place: ClientPartition | None = None
        self._position = -1

    def read(
        self, partition: TopicPartition, offset: int, timeout_s: float, max_records: int = 1_000
    ) -> Sequence[Record]:
        self._topics.check(*partition)
        place = ClientPartition(*partition)
        with translating(f"read of {partition.topic}-{partition.partition}"):
            if place != self._place:
                self._client.assign([place])
                self._place, self._position = place, -1
            if offset != self._position:
                self._client.seek(place, offset)
                self._position = offset
            until_s = time.monotonic() + timeout_s
            while True:
                left_ms = max(0.0, until_s - time.monotonic()) * 1000
                found: Sequence[Record] = self._client.poll(left_ms, max_records).get(place, [])
                if found:
                    self._position = found[-1].offset + 1
                    if found[0].offset < offset:  # the offset lay beyond the end: the log has been made anew
                        found = [record for record in found if record.offset >= offset]
                if found or time.monotonic() >= until_s:
                    return found

    def bounds(self, partition: TopicPartition) -> tuple[int, int]:
        self._topics.check(*partition)
        place = [ClientPartition(*partition)]
        with translating(f"bounds of {partition.topic}-{partition.partition}"):
            head = self._client.beginning_offsets(place, timeout_ms=_ADMIN_TIMEOUT_MS)[place[0]]
            end = self._client.end_offsets(place, timeout_ms=_ADMIN_TIMEOUT_MS)[place[0]]
        return head, end

    def offset_at(self, partition: TopicPartition, timestamp_ms: int) -> int:
        self._topics.check(*partition)
        place = ClientPartition(*partition)
        with translating(f"offsets by time of {partition.topic}-{partition.partition}"):
            found = self._client.offsets_for_times({place: timestamp_ms}, timeout_ms=_ADMIN_TIMEOUT_MS)[place]
        return self.bounds(partition)[1] if found is None else int(found.offset)

    def close(self) -> None:
        with hushed():
            self._client.close(autocommit=False, timeout_ms=2_000)


class KafkaAdmin:
    """Topics and retention; see transport.Admin."""

    def __init__(self, settings: ConnectionSettings) -> None:
        self._client = settings.connect(KafkaAdminClient)

    def create(self, specs: Sequence[TopicSpec]) -> list[str]:
        for spec in specs:
            if spec.partitions < 1:
                raise ConfigError(f"topic {spec.name!r} needs at least one partition, not {spec.partitions}")
        there = describe(self._client, [spec.name for spec in specs])
        created = []
        for spec in specs:
            if there[spec.name] is not None or spec.name in created:
                continue
            wanted = {"num_partitions": spec.partitions, "replication_factor": -1, "configs": dict(spec.settings)}
            with translating(f"cannot create topic {spec.name!r}"):
                try:
                    self._client.create_topics({spec.name: wanted}, wait_for_metadata=True)
                except errors.TopicAlreadyExistsError:
                    continue  # another process was faster
            created.append(spec.name)
        return created

    def describe(self, names: Sequence[str]) -> dict[str, TopicSpec | None]:
        return describe(self._client, names)

    def delete_records(self, partition: TopicPartition, before_offset: int) -> None:
        place = ClientPartition(*partition)
        doing = f"cannot delete records of {partition.topic}-{partition.partition}"
        with translating(doing):
            try:
                self._client.delete_records({place: before_offset}, timeout_ms=_ADMIN_TIMEOUT_MS)
            except errors.OffsetOutOfRangeError:  # beyond the end: delete all there is
                self._client.delete_records({place: -1}, timeout_ms=_ADMIN_TIMEOUT_MS)

    def close(self) -> None:
        with hushed():
            self._client.close()
