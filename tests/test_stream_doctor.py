"""The doctor finds what would stop or spoil a run, and says what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from stream.assembly import make_decoder, topic_specs
from stream.config import Config
from stream.doctor import Finding, examine
from stream.embedded import EmbeddedLog
from stream.errors import ConfigError, Retryable
from stream.loading import load
from stream.partition import partition_of
from stream.transport import TopicSpec, Transport

PARTITIONS = 4
USERS = [f"u{n}" for n in range(40)]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(None, [f"embedded.path={tmp_path / 'log.db'}"]).config


@pytest.fixture
def opened(config: Config) -> Iterator[EmbeddedLog]:
    log = EmbeddedLog(Path(config.embedded.path))
    yield log
    log.close()


def examined(config: Config) -> dict[str, Finding]:
    """Findings by subject; where a subject has several, the worst."""
    rank = {"ok": 0, "warn": 1, "fail": 2}
    found: dict[str, Finding] = {}
    for finding in examine(config, lambda: EmbeddedLog(Path(config.embedded.path)), lambda: make_decoder(config)):
        assert finding.status == "ok" or finding.advice or finding.subject == "log", finding
        old = found.get(finding.subject)
        if old is None or rank[finding.status] > rank[old.status]:
            found[finding.subject] = finding
    return found


def make_topics(log: Transport, config: Config) -> None:
    admin = log.admin()
    admin.create(topic_specs(config))
    admin.close()


def send(log: Transport, user: str, partition: int, *, key: str | None = None, at_s: float | None = None) -> None:
    now_ms = int((time.time() if at_s is None else at_s) * 1_000)
    value = msgspec.json.encode({"user": user, "interest": "shoes", "time": now_ms})
    log.append("events", partition, iter([((key or user).encode(), value, now_ms)]))


def test_a_sound_application_has_no_complaints(config: Config, opened: EmbeddedLog) -> None:
    """Topics as they should be, users where they belong: all is ok."""
    make_topics(opened, config)
    for user in USERS:
        send(opened, user, partition_of(user.encode(), PARTITIONS))
    found = examined(config)
    assert {f.subject for f in found.values() if f.status == "fail"} == set()
    assert found["topic events"].found == "40 of the newest 40 records can be used"
    assert found["topics"].status == found["clock"].status == "ok"


def test_it_makes_no_log_of_its_own(config: Config) -> None:
    """Looking at an application that does not exist yet leaves no file behind."""
    assert examined(config)["log"].status == "ok"
    assert not Path(config.embedded.path).exists()


def test_wrong_topics(config: Config, opened: EmbeddedLog) -> None:
    """A topic with another partition count, and one that would lose state, are failures with what to do."""
    admin = opened.admin()
    admin.create([TopicSpec(name="events", partitions=2), TopicSpec(name="state", partitions=4,
                                                                   settings={"retention.ms": "1000"})])  # fmt: skip
    admin.close()
    failures = [
        f.found + f.advice
        for f in examine(config, lambda: EmbeddedLog(Path(config.embedded.path)), lambda: make_decoder(config))
        if f.status == "fail"
    ]
    assert any("events has 2 partitions" in text for text in failures)
    assert any("state has retention.ms=1000" in text for text in failures)
    assert any("alerts is missing" in text and "topics create" in text for text in failures)


def test_keys_that_are_not_the_user(config: Config, opened: EmbeddedLog) -> None:
    """Records that would all become dead letters are a failure that names the reason."""
    make_topics(opened, config)
    for user in USERS:
        send(opened, user, 0, key=f"item-{user}")
    finding = examined(config)["topic events"]
    assert finding.status == "fail"
    assert "key_mismatch" in finding.found


def test_producers_that_partition_differently(config: Config, opened: EmbeddedLog) -> None:
    """A user in two partitions is a failure; a partitioner that is not the default one, used by all, a warning."""
    make_topics(opened, config)
    for user in USERS:
        send(opened, user, partition_of(user.encode(), PARTITIONS) ^ 1)
    assert examined(config)["topic events"].status == "warn"
    for user in USERS[:5]:
        send(opened, user, partition_of(user.encode(), PARTITIONS))
    finding = examined(config)["topic events"]
    assert finding.status == "fail"
    assert "5 of 40 sampled users" in finding.found
    assert "murmur2_random" in finding.advice


def test_a_clock_that_runs_ahead(config: Config, opened: EmbeddedLog) -> None:
    """Record timestamps far in this machine's future are said."""
    make_topics(opened, config)
    send(opened, "u1", partition_of(b"u1", PARTITIONS), at_s=time.time() + 3_600)
    assert examined(config)["clock"].status == "warn"


def test_a_log_that_cannot_be_opened(config: Config) -> None:
    """The error of the connection is the finding; the doctor itself does not fail."""
    Path(config.embedded.path).write_bytes(b"")  # it is there

    def refuse() -> Transport:
        raise ConfigError("no broker answers at 127.0.0.1:9")

    *_, last = examine(config, refuse, lambda: make_decoder(config))
    assert (last.subject, last.status) == ("log", "fail")
    assert "127.0.0.1:9" in last.found


def test_a_log_that_goes_away_meanwhile(config: Config, opened: EmbeddedLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle is a finding too."""
    make_topics(opened, config)

    def gone(*_: object) -> None:
        raise Retryable("the broker went away")

    monkeypatch.setattr(EmbeddedLog, "reader", gone)
    assert "went away" in examined(config)["log"].found


def test_secrets_that_are_missing(config: Config) -> None:
    """A setting that asks for a variable which is not set is found before a client is made."""
    asked = msgspec.structs.replace(
        config, kafka={**config.kafka, **load(None, ["kafka.ssl_password=env:NOPE"]).config.kafka}
    )
    found = {
        f.subject: f
        for f in examine(asked, lambda: EmbeddedLog(Path(config.embedded.path)), lambda: make_decoder(config))
    }
    assert found["kafka.ssl_password"].status == "fail"
    assert "NOPE" in found["kafka.ssl_password"].found
