"""What a broker has lost sight of: parts of transactions that are over stay open until our next producer ends them.

The broker here does not check that a record belongs to a transaction that its coordinator knows
(transaction.partition.verification.enable), so that a part without the coordinator's knowledge can be made at all.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from kafka.producer.transaction_manager import TransactionalRequestResult, TxnOffsetCommitHandler
from kafka.structs import OffsetAndMetadata
from kafka.structs import TopicPartition as ClientPartition
from kafka_broker import broker_or_skip, start

from stream.errors import Retryable
from stream.kafka import KafkaLog
from stream.kafka_producer import KafkaProducer, shut
from stream.transport import Position, Scope, TopicPartition, TopicSpec

pytestmark = pytest.mark.kafka


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a broker that stores records of transactions that it does not know."""
    extra = "transaction.partition.verification.enable=false"
    with broker_or_skip(elsewhere=True):
        broker = start(tmp_path_factory.mktemp("careless"), heap="-Xmx512m", extra=extra)
    yield broker.bootstrap
    broker.stop()


@pytest.fixture
def log(careless: str) -> Iterator[KafkaLog]:
    log = KafkaLog({"bootstrap_servers": careless, "heartbeat_interval_ms": 200}, transaction_timeout_s=10)
    yield log
    log.close()


@pytest.fixture
def topic(log: KafkaLog) -> str:
    name = f"topic-{uuid.uuid4().hex[:12]}"
    admin = log.admin()
    admin.create([TopicSpec(name=name, partitions=2, settings={"retention.ms": "-1"})])
    admin.close()
    return name


def scope_of(topic: str, group: str = "") -> Scope:
    return Scope(partitions=[TopicPartition(topic, 0), TopicPartition(topic, 1)], group=group)


def write(producer: KafkaProducer, topic: str, value: bytes) -> None:
    """A record to both partitions; the coordinator hears of the first one only."""
    producer.begin()
    producer.send(topic, 0, None, value)
    producer.flush()
    producer._transactions._partitions_in_transaction.add(ClientPartition(topic, 1))
    producer.send(topic, 1, None, value)
    producer.flush()


def seen(log: KafkaLog, topic: str) -> list[list[bytes | None]]:
    """The committed values of both partitions."""
    reader = log.reader()
    found = [[r.value for r in reader.read(TopicPartition(topic, p), 0, 0.7)] for p in (0, 1)]
    reader.close()
    return found


def test_a_part_of_a_committed_transaction_is_committed(log: KafkaLog, topic: str) -> None:
    """Acknowledged, and its mark is missing in one partition: the next producer puts it there, and nothing is lost."""
    older = log.producer(transactional_id=topic)
    write(older, topic, b"acknowledged")
    older.commit()
    shut(older._client)
    assert seen(log, topic) == [[b"acknowledged"], []], "nothing was left open: the fault did not bite"
    log.producer(transactional_id=topic, scope=scope_of(topic)).close()
    assert seen(log, topic) == [[b"acknowledged"], [b"acknowledged"]]
    log.producer(transactional_id=topic, scope=scope_of(topic)).close()  # where nothing is open, nothing happens
    assert seen(log, topic) == [[b"acknowledged"], [b"acknowledged"]]


def test_a_part_of_a_void_transaction_is_void(log: KafkaLog, topic: str) -> None:
    """Died before the commit: what the coordinator does not know of is ended as the rest is, and later records come."""
    older = log.producer(transactional_id=topic)
    write(older, topic, b"void")
    shut(older._client)
    log.append(topic, 1, [(None, b"later", 1)])
    assert seen(log, topic) == [[], []], "the open part holds back what comes later: the fault did not bite"
    log.producer(transactional_id=topic, scope=scope_of(topic)).close()
    assert seen(log, topic) == [[], [b"later"]]


def _refuse(producer: KafkaProducer) -> None:
    raise Retryable("not now")


def test_an_interrupted_end_is_taken_up_again(log: KafkaLog, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new producer makes the broker forget how the last transaction ended; we remember until its remains are gone."""
    older = log.producer(transactional_id=topic)
    write(older, topic, b"acknowledged")
    older.commit()
    shut(older._client)
    with monkeypatch.context() as patch:
        patch.setattr(KafkaProducer, "begin", _refuse)
        with pytest.raises(Retryable, match="not now"):
            log.producer(transactional_id=topic, scope=scope_of(topic))
    assert seen(log, topic) == [[b"acknowledged"], []]
    log.producer(transactional_id=topic, scope=scope_of(topic)).close()
    assert seen(log, topic) == [[b"acknowledged"], [b"acknowledged"]]


def test_positions_that_were_left_open_are_committed_too(log: KafkaLog, topic: str) -> None:
    """Positions of a committed transaction whose mark is missing: pending for ever, then what they were to be."""
    consumer = log.consumer(group=topic, topics=[topic])
    owned: set[TopicPartition] = set()
    for _ in range(400):
        polled = consumer.poll(0.05, 1)
        owned.update(polled.assigned)
        if len(owned) == 2:
            break
    older = log.producer(transactional_id=topic)
    older.begin()
    older.send(topic, 0, None, b"x")
    older.flush()
    result = TransactionalRequestResult()
    offsets = {ClientPartition(topic, 1): OffsetAndMetadata(7, "", -1)}
    older._transactions._pending_txn_offset_commits.update(offsets)
    older._transactions._enqueue_request(TxnOffsetCommitHandler(older._transactions, polled.group, offsets, result))
    older._wait(result, "positions")
    older.commit()
    shut(older._client)
    with pytest.raises(Retryable):
        consumer.committed([TopicPartition(topic, 1)])
    log.producer(transactional_id=topic, scope=scope_of(topic, group=topic)).close()
    assert consumer.committed([TopicPartition(topic, 1)]) == {TopicPartition(topic, 1): Position(7)}
    consumer.close()


def test_no_transaction_begins_over_another_connection(log: KafkaLog, topic: str) -> None:
    """Behind a new connection there may be a broker that was killed: what is left open has to be looked at first."""
    producer = log.producer(transactional_id=topic)
    producer.begin()
    producer.send(topic, 0, None, b"first")
    producer.commit()
    producer._client._sender._client._manager.close(node_id=producer._transactions._transaction_coordinator)
    producer.begin()
    producer.send(topic, 0, None, b"second")
    with pytest.raises(Retryable, match="connection to the transaction coordinator"):
        producer.flush()
    producer.close()
    heir = log.producer(transactional_id=topic, scope=scope_of(topic))
    reader = log.reader()
    end_before = reader.bounds(TopicPartition(topic, 0))[1]
    assert seen(log, topic) == [[b"first"], []]
    assert end_before == 3, "the first record, its mark, the mark of the remains' end: nothing of the second one"
    heir.begin()
    heir.send(topic, 0, None, b"second")
    heir.commit()
    heir.close()
    reader.close()
    assert seen(log, topic) == [[b"first", b"second"], []]


def test_the_first_producer_of_an_id_has_no_remains(log: KafkaLog, topic: str) -> None:
    """Nothing is written for an id that never had a transaction."""
    producer = log.producer(transactional_id=topic, scope=scope_of(topic))
    reader = log.reader()
    assert reader.bounds(TopicPartition(topic, 0)) == (0, 0)
    reader.close()
    producer.close()
