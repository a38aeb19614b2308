"""Fixtures of the whole suite: a real broker where one can be had, and each of the three logs, fresh for every test."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from stream.transport import Transport


def pytest_configure(config: pytest.Config) -> None:
    """Let one warning of the Kafka client pass: it reads its schemas by a deprecated call of the standard library."""
    config.addinivalue_line("filterwarnings", "ignore:(read_text|open_text|contents) is deprecated:DeprecationWarning")


settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "dev")


@pytest.fixture(autouse=True)
def clients_are_closed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whoever opens a client of Kafka closes it: one left open would go on and disturb later tests."""
    before = _client_threads()
    yield
    if request.node.get_closest_marker("kafka") is None:
        return
    give_up_s = time.monotonic() + 5.0
    while left := _client_threads() - before:
        if time.monotonic() > give_up_s:
            pytest.fail(f"clients were left open: {sorted(thread.name for thread in left)}", pytrace=False)
        time.sleep(0.02)


def _client_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("kafka-")}


@pytest.fixture(scope="session")
def kafka_bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a real broker: the one of DRIFTLINE_KAFKA, or one that is started here and ended after the run.

    Without Java and Maven the test is skipped with the reason; under CI=true that is a failure.
    """
    from kafka_broker import broker_or_skip, running_broker

    given = os.environ.get("DRIFTLINE_KAFKA")
    if given:
        yield given
        return
    with broker_or_skip(), running_broker(tmp_path_factory.mktemp("kafka")) as bootstrap:
        yield bootstrap


@pytest.fixture
def cuda() -> str:
    """The name of a CUDA device; without one the test is skipped."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture(params=["memory", "embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Transport]:
    """Each log in turn, empty (Kafka: shared by the run, so names of topics, groups and ids come from `unique`)."""
    log: Transport
    if request.param == "memory":
        from stream.memory import MemoryLog

        log = MemoryLog()
    elif request.param == "embedded":
        from stream.embedded import EmbeddedLog

        log = EmbeddedLog(tmp_path / "log.db")
    else:
        from stream.kafka import KafkaLog

        log = KafkaLog(
            {"bootstrap_servers": request.getfixturevalue("kafka_bootstrap"), "heartbeat_interval_ms": 200},
            transaction_timeout_s=10.0,
        )
    yield log
    log.close()
