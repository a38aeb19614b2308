"""The traps of the Kafka client, each against a real broker; and settings, secrets and messages without one."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from kafka_broker import Broker, broker_or_skip, start

from stream import kafka_client, kafka_consumer
from stream.config import Secret
from stream.errors import ConfigError, DriftlineError, Fenced, Retryable
from stream.kafka import KafkaLog
from stream.kafka_client import ConnectionSettings
from stream.kafka_consumer import KafkaConsumer
from stream.transport import Polled, Position, TopicPartition, TopicSpec

POLLS_MAX = 400  # of 0.05 s


@pytest.fixture(scope="module")
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker that a test may stop and continue."""
    with broker_or_skip(elsewhere=True):
        broker = start(tmp_path_factory.mktemp("own"), heap="-Xmx512m")
    yield broker
    broker.stop()


@pytest.fixture
def log(kafka_bootstrap: str) -> Iterator[KafkaLog]:
    log = KafkaLog({"bootstrap_servers": kafka_bootstrap, "heartbeat_interval_ms": 200}, transaction_timeout_s=10)
    yield log
    log.close()


@pytest.fixture
def topic(log: KafkaLog) -> str:
    return new_topic(log)


def new_topic(log: KafkaLog, **settings: str) -> str:
    name = f"topic-{uuid.uuid4().hex[:12]}"
    admin = log.admin()
    given = {k.replace("_", "."): v for k, v in settings.items()}
    admin.create([TopicSpec(name=name, partitions=2, settings={"retention.ms": "-1", **given})])
    admin.close()
    return name


def take(consumer: KafkaConsumer, count: int) -> list[TopicPartition]:
    assigned: list[TopicPartition] = []
    for _ in range(POLLS_MAX):
        assigned += consumer.poll(0.05, 100).assigned
        if len(assigned) == count:
            return sorted(assigned)
    raise AssertionError(f"only {assigned} came")


def next_batch(consumer: KafkaConsumer) -> Polled:
    for _ in range(POLLS_MAX):
        polled = consumer.poll(0.05, 100)
        if polled.records:
            return polled
    raise AssertionError("no records came")


def committed_values(log: KafkaLog, topic: str) -> list[bytes | None]:
    reader = log.reader()
    records = reader.read(TopicPartition(topic, 0), 0, 1.0)
    reader.close()
    return [record.value for record in records]


# ── traps, against the broker ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.kafka
def test_a_lost_record_stops_the_commit(own_broker: Broker) -> None:
    """Trap 1: a record that was not stored within its delivery timeout is found before the offsets and the commit."""
    log = KafkaLog(
        {"bootstrap_servers": own_broker.bootstrap, "request_timeout_ms": 800, "delivery_timeout_ms": 1_200},
        transaction_timeout_s=8,
    )
    topic = new_topic(log)
    producer = log.producer(transactional_id=f"id-{topic}")
    producer.begin()
    producer.send(topic, 0, b"k", b"stored")
    producer.flush()
    os.kill(own_broker.pid, signal.SIGSTOP)
    try:
        producer.send(topic, 0, b"k", b"lost")
        time.sleep(2.5)
    finally:
        os.kill(own_broker.pid, signal.SIGCONT)
    with pytest.raises(Retryable):
        producer.commit()
    with pytest.raises(Retryable, match="throw it away"):
        producer.abort()
    producer.close()
    heir = log.producer(transactional_id=f"id-{topic}")
    assert committed_values(log, topic) == []
    heir.close()
    log.close()


@pytest.mark.kafka
def test_appends_go_on_after_one_that_expired(own_broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client whose record expired on its way sends nothing any more: the log takes a new one for the next append."""
    monkeypatch.setattr("stream.kafka._APPEND_TIMEOUT_S", 3.0)
    log = KafkaLog({"bootstrap_servers": own_broker.bootstrap, "request_timeout_ms": 1_000})
    topic = new_topic(log)
    log.append(topic, 0, [(b"k", b"before", 1)])
    os.kill(own_broker.pid, signal.SIGSTOP)
    try:
        wait_until_it_stands(own_broker.pid)
        with pytest.raises(Retryable):
            log.append(topic, 0, [(b"k", b"expired", 1)])
    finally:
        os.kill(own_broker.pid, signal.SIGCONT)
    assert log.append(topic, 1, [(b"k", b"after", 1)]) == 1
    log.close()


def wait_until_it_stands(pid: int) -> None:
    """SIGSTOP takes effect thread by thread, and on a busy machine a thread may still answer meanwhile."""
    until_s = time.monotonic() + 10
    while any(
        stat.read_text().rsplit(")", 1)[1].split()[0] != "T" for stat in Path(f"/proc/{pid}/task").glob("*/stat")
    ):
        assert time.monotonic() < until_s, "the broker goes on"
        time.sleep(0.01)


@pytest.mark.kafka
def test_a_refused_record_stops_the_commit(log: KafkaLog) -> None:
    """Trap 1: so is one that the broker refuses, here for its size."""
    topic = new_topic(log, max_message_bytes="2000")
    producer = log.producer(transactional_id=f"id-{topic}")
    producer.begin()
    producer.send(topic, 0, b"k", b"small")
    producer.send(topic, 0, b"k", os.urandom(5_000))
    with pytest.raises(DriftlineError):
        producer.commit()
    producer.close()
    assert committed_values(log, topic) == []


@pytest.mark.kafka
def test_a_fenced_producer_does_not_take_its_id_back(log: KafkaLog, topic: str) -> None:
    """Trap 2: the client's epoch bump would fence the newer producer; ours stops and the newer one goes on."""
    older = log.producer(transactional_id=f"id-{topic}")
    older.begin()
    older.send(topic, 0, b"k", b"old 1")
    older.flush()
    newer = log.producer(transactional_id=f"id-{topic}")
    newer.begin()
    newer.send(topic, 0, b"k", b"new 1")
    older.send(topic, 0, b"k", b"old 2")  # to a partition of its transaction: the produce request itself is refused
    with pytest.raises(Fenced):
        older.flush()
    with pytest.raises(Fenced):
        older.begin()
    newer.send(topic, 0, b"k", b"new 2")
    newer.commit()
    older.close()
    newer.close()
    assert committed_values(log, topic) == [b"new 1", b"new 2"]


@pytest.mark.kafka
def test_a_transaction_that_timed_out_is_not_a_fence(own_broker: Broker) -> None:
    """The broker answers both alike; after a timeout a new producer may go on, so it is Retryable."""
    log = KafkaLog({"bootstrap_servers": own_broker.bootstrap}, transaction_timeout_s=1)
    topic = new_topic(log)
    producer = log.producer(transactional_id=f"id-{topic}")
    producer.begin()
    producer.send(topic, 0, b"k", b"late")
    producer.flush()
    time.sleep(4)
    with pytest.raises(Retryable, match="too long"):
        producer.commit()
    producer.close()
    assert committed_values(log, topic) == []
    log.close()


@pytest.mark.kafka
def test_bytes_that_nobody_can_decode_pass(log: KafkaLog, topic: str) -> None:
    """Trap 3: no deserializer runs in the client, so poison cannot stop `poll`; decoding is ours."""
    poison = [b"\xff\xfe\x00{", b"", os.urandom(100)]
    log.append(topic, 0, [(b"k", value, 0) for value in poison])
    consumer = log.consumer(group=f"g-{topic}", topics=[topic])
    consumer.resume(take(consumer, 2))
    assert [r.value for r in next_batch(consumer).records[TopicPartition(topic, 0)]] == poison
    consumer.close()


@pytest.mark.kafka
def test_transactions_follow_each_other_without_a_long_pause(log: KafkaLog, topic: str) -> None:
    """Trap 4: the client's default backoff costs 100 ms a transaction; ours is 10, also for the consumer."""
    producer = log.producer(transactional_id=f"id-{topic}")
    for n in range(20):
        producer.begin()
        producer.send(topic, 0, b"k", b"%d" % n)
        producer.commit()
    assert producer._client.config["retry_backoff_ms"] == 10
    assert committed_values(log, topic) == [b"%d" % n for n in range(20)]
    producer.close()


@pytest.mark.kafka
def test_the_proof_of_a_batch_belongs_to_its_generation(log: KafkaLog, topic: str) -> None:
    """Trap 10: a batch keeps the generation that it was polled in; what is polled after a rebalance has a newer one."""
    log.append(topic, 0, [(b"k", b"%d" % n, 0) for n in range(10)])
    log.append(topic, 1, [(b"k", b"%d" % n, 0) for n in range(10)])
    first = log.consumer(group=f"g-{topic}", topics=[topic])
    first.resume(take(first, 2))
    polled = next_batch(first)
    second = log.consumer(group=f"g-{topic}", topics=[topic])
    gained: list[TopicPartition] = []
    for _ in range(POLLS_MAX):
        later = first.poll(0.02, 100)
        gained += second.poll(0.02, 100).assigned
        if gained:
            break
    assert len(gained) == 1
    assert later.group.generation_id > polled.group.generation_id  # type: ignore[attr-defined]
    assert later.group.member_id == polled.group.member_id  # type: ignore[attr-defined]
    first.close()
    second.close()


@pytest.mark.kafka
def test_a_member_that_does_not_rejoin_holds_the_others_up_for_a_limited_time(kafka_bootstrap: str) -> None:
    """Trap: a rebalance waits for members that seem alive; with the library's `max_poll_interval_ms` for 300 s."""
    settings = {"bootstrap_servers": kafka_bootstrap, "heartbeat_interval_ms": 200, "session_timeout_ms": 6_000}
    log = KafkaLog({**settings, "max_poll_interval_ms": 7_000}, transaction_timeout_s=10)
    topic = new_topic(log)
    silent = log.consumer(group=f"g-{topic}", topics=[topic])
    take(silent, 2)  # from now on it sends heartbeats, but does not poll
    other = log.consumer(group=f"g-{topic}", topics=[topic])
    assert take(other, 2) == [TopicPartition(topic, 0), TopicPartition(topic, 1)]
    other.close()
    silent.close()
    log.close()


@pytest.mark.kafka
@pytest.mark.parametrize(
    ("settings", "milliseconds"),
    [({}, 60_000), ({"session_timeout_ms": 90_000}, 90_000), ({"max_poll_interval_ms": 200_000}, 200_000)],
)
def test_the_time_to_rejoin_is_a_minute_or_as_set(
    kafka_bootstrap: str, settings: dict[str, int], milliseconds: int
) -> None:
    """It is never below the session's timeout, which the client would refuse."""
    log = KafkaLog({"bootstrap_servers": kafka_bootstrap, **settings}, transaction_timeout_s=10)
    consumer = log.consumer(group="g", topics=[new_topic(log)])
    assert consumer._client.config["max_poll_interval_ms"] == milliseconds
    consumer.close()
    log.close()


@pytest.mark.kafka
def test_positions_under_an_open_transaction_are_not_given(
    log: KafkaLog, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 11: the input consumer is read_committed, so `committed` waits for the transaction that may change them."""
    monkeypatch.setattr(kafka_consumer, "COMMITTED_TIMEOUT_S", 0.5)
    log.append(topic, 0, [(b"k", b"v", 0)])
    consumer = log.consumer(group=f"g-{topic}", topics=[topic])
    place = take(consumer, 2)[0]
    consumer.resume([place])
    polled = next_batch(consumer)
    producer = log.producer(transactional_id=f"id-{topic}")
    producer.begin()
    producer.send_offsets({place: Position(1, "m")}, polled.group)
    with pytest.raises(Retryable):
        consumer.committed([place])
    producer.commit()
    monkeypatch.setattr(kafka_consumer, "COMMITTED_TIMEOUT_S", 10.0)
    assert consumer.committed([place]) == {place: Position(1, "m")}
    assert consumer._client.config["isolation_level"] == "read_committed"
    consumer.close()
    producer.close()


@pytest.mark.kafka
def test_positions_stay_where_the_poll_left_them_after_an_abort(log: KafkaLog, topic: str) -> None:
    """Trap 12: an abort does not rewind; the owner seeks back, and gets the very same records."""
    log.append(topic, 0, [(b"k", b"%d" % n, 0) for n in range(5)])
    consumer = log.consumer(group=f"g-{topic}", topics=[topic])
    place = take(consumer, 2)[0]
    consumer.resume([place])
    polled = next_batch(consumer)
    producer = log.producer(transactional_id=f"id-{topic}")
    producer.begin()
    producer.send_offsets({place: Position(5)}, polled.group)
    producer.abort()
    assert not consumer.poll(0.3, 100).records
    consumer.seek(place, 0)
    again = next_batch(consumer)
    assert [r.offset for r in again.records[place]] == [r.offset for r in polled.records[place]]
    consumer.close()
    producer.close()


@pytest.mark.kafka
def test_a_paused_partition_comes_back_without_news_elsewhere(log: KafkaLog, topic: str) -> None:
    """The client parks fetched records of a paused partition and would not give them back before others have news."""
    for number in (0, 1):
        log.append(topic, number, [(b"k", b"%d" % n, 0) for n in range(30)])
    consumer = log.consumer(group=f"g-{topic}", topics=[topic])
    both = take(consumer, 2)
    consumer.resume(both)
    found: dict[TopicPartition, int] = dict.fromkeys(both, 0)
    paused: TopicPartition | None = None
    for _ in range(POLLS_MAX):
        for partition, records in consumer.poll(0.05, 10).records.items():
            found[partition] += len(records)
            if paused is None:
                paused = partition
                consumer.pause([partition])
        others = sum(count for partition, count in found.items() if partition != paused)
        if paused is not None and others == 30:
            break
    assert paused is not None and found[paused] < 30
    consumer.resume([paused])
    for _ in range(50):
        found[paused] += sum(map(len, consumer.poll(0.05, 10).records.values()))
    assert found[paused] == 30
    consumer.close()


@pytest.mark.kafka
def test_a_topic_with_a_codec_that_is_missing_is_refused(log: KafkaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 15: said at the start, with the package to install, not when the first compressed record comes."""
    topic = new_topic(log, compression_type="zstd")
    monkeypatch.setitem(kafka_client._CODECS, "zstd", (lambda: False, "zstandard"))
    with pytest.raises(ConfigError, match=r"zstd.*pip install zstandard"):
        log.consumer(group=f"g-{topic}", topics=[topic])


@pytest.mark.kafka
def test_describe_tells_the_settings_that_the_state_rests_on(log: KafkaLog) -> None:
    """Retention, cleanup, message and segment size, as the broker has them."""
    topic = new_topic(log, retention_ms="-1", segment_bytes="134217728")
    admin = log.admin()
    spec = admin.describe([topic])[topic]
    admin.close()
    assert spec is not None
    assert spec.settings["retention.ms"] == "-1" and spec.settings["segment.bytes"] == "134217728"
    assert spec.settings["cleanup.policy"] == "delete" and int(spec.settings["max.message.bytes"]) > 1_000_000


@pytest.mark.kafka
def test_a_broker_that_went_away_is_no_wrong_setting(own_broker: Broker) -> None:
    """After a first connection, a broker that does not answer is Retryable: the worker waits for it within bounds."""
    settings = {
        "bootstrap_servers": own_broker.bootstrap,
        "bootstrap_timeout_ms": 700,
        "request_timeout_ms": 600,
        "connections_max_idle_ms": 60_000,
    }
    log = KafkaLog(settings, transaction_timeout_s=1)
    os.kill(own_broker.pid, signal.SIGSTOP)
    try:
        with pytest.raises(Retryable):
            log.producer(transactional_id="nobody")
    finally:
        os.kill(own_broker.pid, signal.SIGCONT)
    log.close()


# ── settings and secrets ──────────────────────────────────────────────────────────────────────────────────────────────


def test_no_broker_is_one_clear_line(caplog: pytest.LogCaptureFixture) -> None:
    """Within the bootstrap timeout: the address, and what to check."""
    with pytest.raises(ConfigError, match=r"no Kafka broker answers at 127\.0\.0\.1:1 .*bootstrap_servers") as caught:
        KafkaLog({"bootstrap_servers": "127.0.0.1:1", "bootstrap_timeout_ms": 300})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"boostrap_servers": "x:1"}, "did you mean bootstrap_servers"),
        ({"isolation_level": "read_uncommitted"}, "set by driftline itself"),
        ({"value_deserializer": "json"}, "set by driftline itself"),
        ({"transactional_id": "mine"}, "set by driftline itself"),
        ({"enable_auto_commit": True}, "set by driftline itself"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    """A typo gets the nearest name; what exactly-once rests on cannot be changed (trap 3: no deserializers)."""
    with pytest.raises(ConfigError, match=message):
        ConnectionSettings(settings)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traps 7 and 15: no fast checksum or no codec for our own compression: said before anything runs."""
    monkeypatch.setitem(kafka_client._CODECS, "lz4", (lambda: False, "lz4"))
    with pytest.raises(ConfigError, match="pip install lz4"):
        ConnectionSettings({"compression_type": "lz4"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install crc32c"):
        ConnectionSettings({})


class _Witness:
    """Stands for a client: keeps what it was given, and logs it as the real admin client does."""

    DEFAULT_CONFIG: ClassVar = dict.fromkeys(("bootstrap_servers", "sasl_plain_password", "ssl_password", "client_id"))

    def __init__(self, **settings: object) -> None:
        self.settings = settings
        logging.getLogger("kafka.witness").debug("Starting with configuration: %s", settings)
        logging.getLogger("kafka.witness").warning("Error with configuration: %r", settings)


def test_secrets_reach_the_client_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the environment, a file, or written out: the client gets the value; repr and logs do not show it."""
    monkeypatch.setattr(ConnectionSettings, "_knock", lambda self: None)
    caplog.set_level(logging.DEBUG, logger="kafka")  # a command that ran in this process before quiets it
    (tmp_path / "secret").write_text("from-a-file\n")
    monkeypatch.setenv("BROKER_SECRET", "from-the-environment")
    for written, value in (
        ("env:BROKER_SECRET", "from-the-environment"),
        (f"file:{tmp_path / 'secret'}", "from-a-file"),
        (Secret("env:BROKER_SECRET"), "from-the-environment"),
        ("written-out", "written-out"),
    ):
        settings = ConnectionSettings({"sasl_plain_password": written, "ssl_password": written, "client_id": "app"})
        client = settings.connect(_Witness)
        assert client.settings["sasl_plain_password"] == client.settings["ssl_password"] == value
        assert client.settings["client_id"] == "app"
        for shown in (repr(settings), str(settings), repr(client.settings), caplog.text):
            assert value not in shown
        assert "(hidden)" in caplog.text


def test_a_secret_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable or the file, before any connection."""
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ConfigError, match="NOT_SET"):
        KafkaLog({"bootstrap_servers": "127.0.0.1:1", "sasl_plain_password": "env:NOT_SET"})
    with pytest.raises(ConfigError, match="missing"):
        KafkaLog({"bootstrap_servers": "127.0.0.1:1", "sasl_plain_password": f"file:{tmp_path / 'missing'}"})


@pytest.mark.kafka
def test_a_refused_login_says_so_without_the_password(kafka_bootstrap: str, caplog: pytest.LogCaptureFixture) -> None:
    """A broker without SASL: the message says that it is there and what to check; no log line shows the password."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="kafka")
    settings = {
        "bootstrap_servers": kafka_bootstrap,
        "bootstrap_timeout_ms": 1_500,
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "PLAIN",
        "sasl_plain_username": "ada",
        "sasl_plain_password": "not-to-be-shown",
    }
    with pytest.raises(ConfigError, match="does not let us in") as caught:
        KafkaLog(settings)
    assert "not-to-be-shown" not in str(caught.value) + caplog.text


# ── the holes of the fence ────────────────────────────────────────────────────────────────────────────────────────────


def _raw_commit(log: KafkaLog, transactional_id: str, offsets: dict[TopicPartition, int], group: object) -> None:
    """A transaction with offsets, straight through the client library, without our producer's checks."""
    from kafka.structs import OffsetAndMetadata
    from kafka.structs import TopicPartition as ClientPartition

    producer = log.producer(transactional_id=transactional_id)
    client = producer._client
    try:
        client.begin_transaction()
        places = {ClientPartition(*tp): OffsetAndMetadata(offset, "", -1) for tp, offset in offsets.items()}
        client.send_offsets_to_transaction(places, group)
        client.commit_transaction()
    finally:
        producer.close()


@pytest.mark.kafka
def test_the_three_holes_of_the_brokers_fence(log: KafkaLog, topic: str) -> None:
    """What the broker lets pass: empty offsets of a wrong generation, a plain group id, a partition of somebody else.

    So every transaction of ours carries a real position and the proof of its own poll, and the owner drops what is
    revoked. Should a broker close one of the holes, this test says so.
    """
    group = f"g-{topic}"
    first = log.consumer(group=group, topics=[topic])
    both = take(first, 2)
    first.resume(both)
    stale = first.poll(0.1, 10).group
    second = log.consumer(group=group, topics=[topic])
    gained: list[TopicPartition] = []
    current, quiet = stale, 0
    for _ in range(POLLS_MAX):
        before, current = current, first.poll(0.02, 10).group
        gained += second.poll(0.02, 10).assigned
        quiet = quiet + 1 if gained and current == before else 0
        if quiet == 20:  # the second round of the rebalance is over too
            break
    assert len(gained) == 1
    with pytest.raises(Exception, match=r"IllegalGeneration|CommitFailed|Rebalance"):  # the fence that does hold
        _raw_commit(log, f"id-{topic}-0", {both[0]: 3}, stale)
    _raw_commit(log, f"id-{topic}-1", {}, stale)
    _raw_commit(log, f"id-{topic}-2", {gained[0]: 5}, group)
    assert first.committed(gained)[gained[0]] == Position(5)
    _raw_commit(log, f"id-{topic}-3", {gained[0]: 7}, current)
    assert first.committed(gained)[gained[0]] == Position(7), "the first one does not own it"
    ours = log.producer(transactional_id=f"id-{topic}-4")
    for positions, proof in (({}, current), ({both[0]: Position(1)}, group)):
        ours.begin()
        with pytest.raises(ValueError, match=r"proof|positions"):
            ours.send_offsets(positions, proof)
        ours.abort()
    ours.close()
    first.close()
    second.close()


@pytest.mark.kafka
def test_a_barrier_with_positions_would_rewind_the_group(log: KafkaLog, topic: str) -> None:
    """Of two positions the one that was SENT later stands: so a barrier, that is sent while another one's positions
    are pending, carries none."""
    consumer = log.consumer(group=f"g-{topic}", topics=[topic])
    place = take(consumer, 2)[0]
    consumer.resume([place])
    proof = consumer.poll(0.1, 10).group
    pending = log.producer(transactional_id=f"id-{topic}-a")
    pending.begin()
    pending.send_offsets({place: Position(100)}, proof)
    barrier = log.producer(transactional_id=f"id-{topic}-b")
    barrier.begin()
    barrier.send_offsets({place: Position(50)}, proof)
    barrier.commit()
    pending.commit()
    assert consumer.committed([place])[place] == Position(50)
    for client in (pending, barrier, consumer):
        client.close()
