"""Metrics, health and readiness over HTTP, and what observers count."""

from __future__ import annotations

import logging
import math
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from stream.engine import Output, PartitionStep
from stream.errors import ConfigError
from stream.metrics import SILENT_MAX_S, Exposition, Health, LearnerMetrics, WorkerMetrics, markdown, new_registry
from stream.records import BatchMetrics, JudgedGroup
from stream.transport import TopicPartition
from stream.worker import Turn

ROOT = Path(__file__).resolve().parent.parent


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def served(clock: Clock) -> Iterator[tuple[CollectorRegistry, Health, str]]:
    registry, health = new_registry(), Health(clock)
    server = Exposition(registry, health, "127.0.0.1", 0)
    yield registry, health, f"http://127.0.0.1:{server.port}"
    server.close()


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def samples(text: str) -> dict[str, float]:
    return {
        s.name + "".join(f"|{v}" for _, v in sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def step(partition: int, **counts: float) -> PartitionStep:
    metrics = BatchMetrics(
        partition=partition, first_offset=0, next_offset=10, time_ms=5_000, weights_version=3, **counts
    )  # type: ignore[arg-type]
    return PartitionStep(
        partition=partition,
        positions={TopicPartition("events", partition): 10},
        records=np.zeros(0, [("key", "u8")]),
        seen=10,
        watermark_ms=5_000,
        metrics=metrics,
    )


def test_a_workers_turns_add_up(served: tuple[CollectorRegistry, Health, str]) -> None:
    """Counters are the sums over committed batches, quality is told by ranking, and /metrics is valid text."""
    registry, health, url = served
    observer = WorkerMetrics(registry, health)
    first = step(0, records=10, events=9, dead_letters=1, scored=4, reciprocal_ranks=2.0, recency_reciprocal_ranks=1.5)
    second = step(1, records=5, events=5, forecasts=2, alerts=1, scored=1, reciprocal_ranks=1.0, hits_10=1)
    observer.turn(Turn(steps=[first, second], process_s=0.01, commit_s=0.002))
    observer.turn(Turn(steps=[second], process_s=0.01, commit_s=0.002))
    observer.owned([0, 1], 123, 0, 7)
    found = samples(get(f"{url}/metrics")[1])
    assert found["driftline_records_total"] == 20
    assert found["driftline_events_total"] == 19
    assert found["driftline_dead_letters_total"] == 1
    assert found["driftline_alerts_total"] == 2
    assert found["driftline_scored_total|all"] == 6
    assert found["driftline_reciprocal_ranks_total|all|driftline"] == 4.0
    assert found["driftline_reciprocal_ranks_total|all|recency"] == 1.5
    assert found["driftline_weights_version"] == 3
    assert (found["driftline_users"], found["driftline_lag_records"]) == (123, 7)
    assert found["driftline_batch_seconds_count|commit"] == 2


def test_a_record_that_broke_the_engine_is_counted(served: tuple[CollectorRegistry, Health, str]) -> None:
    """The step of a record that became a dead letter after bisection has no metrics, and counts as one all the same."""
    registry, health, url = served
    letter = Output(stream="dead_letters", key=None, value=b"{}")
    failed = step(0, records=1, events=0)
    failed.metrics, failed.outputs = None, [letter]
    WorkerMetrics(registry, health).turn(Turn(steps=[failed], process_s=0.0, commit_s=0.0))
    found = samples(get(f"{url}/metrics")[1])
    assert found["driftline_records_total"] == found["driftline_dead_letters_total"] == 1


def test_ready_only_while_the_work_is_done(served: tuple[CollectorRegistry, Health, str], clock: Clock) -> None:
    """Not ready while starting and restoring, ready while running, neither ready nor healthy after a long silence."""
    registry, health, url = served
    observer = WorkerMetrics(registry, health)
    assert get(f"{url}/healthz")[0] == 200
    assert get(f"{url}/readyz") == (503, "starting\n")
    observer.owned([0], 0, 1, 0)
    assert get(f"{url}/readyz")[0] == 503
    observer.owned([0, 1], 0, 0, 0)
    assert get(f"{url}/readyz")[0] == 200
    clock.now_s += SILENT_MAX_S + 1
    assert get(f"{url}/healthz")[0] == get(f"{url}/readyz")[0] == 503
    assert get(f"{url}/nothing")[0] == 404


@dataclass
class Report:
    """What the learner's observer reads of a report."""

    steps: int = 0
    events: int = 0
    skipped_non_finite: int = 0
    shed: int = 0
    loss: float = 0.0


def test_a_learners_turns_add_up(
    served: tuple[CollectorRegistry, Health, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Steps, events, what was skipped or shed, versions; faults are counted by name and logged as key=value."""
    registry, health, url = served
    observer = LearnerMetrics(registry, health)
    observer.learned(Report(steps=2, events=128, skipped_non_finite=1, shed=5, loss=2.5), 40)
    observer.learned(Report(), 0)
    observer.published(4, 1_000, 0.1)
    with caplog.at_level(logging.INFO):
        observer.event("learner_retry", failures=2, error="broker gone away")
    found = samples(get(f"{url}/metrics")[1])
    assert found["driftline_learner_steps_total"] == 2
    assert found["driftline_learner_events_total"] == 128
    assert found["driftline_learner_skipped_steps_total"] == 1
    assert found["driftline_learner_loss"] == 2.5, "a turn without a step leaves the last loss"
    assert found["driftline_learner_version"] == 4
    assert found["driftline_learner_happenings_total|learner_retry"] == 1
    assert "event=learner_retry failures=2 error='broker gone away'" in caplog.text
    assert get(f"{url}/readyz")[0] == 200


def test_a_port_in_use_is_a_config_error(served: tuple[CollectorRegistry, Health, str]) -> None:
    """It names the address and says what to do."""
    _, _, url = served
    with pytest.raises(ConfigError, match="metrics_port: cannot listen"):
        Exposition(new_registry(), Health(), "127.0.0.1", int(url.rpartition(":")[2]))


def test_the_reference_is_up_to_date() -> None:
    """docs/metrics.md is what `make docs` writes now."""
    assert (ROOT / "docs" / "metrics.md").read_text() == markdown(), "run make docs"


def test_registries_are_separate() -> None:
    """Two observers of one process do not meet: nothing is registered globally."""
    WorkerMetrics(new_registry(), Health())
    WorkerMetrics(new_registry(), Health())


def test_a_loss_that_drifts_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """river's ADWIN and Page-Hinkley watch the online loss: quiet on a steady one, told when it rises, NaN or not."""
    registry = CollectorRegistry()
    metrics = LearnerMetrics(registry, Health())
    noise = random.Random(1)

    def drifts() -> float:
        return sum(
            s.value for f in registry.collect() for s in f.samples if s.name == "driftline_learner_loss_drifts_total"
        )

    for _ in range(300):
        metrics.learned(SimpleNamespace(steps=1, events=64, skipped_non_finite=0, shed=0, loss=noise.gauss(3, 0.1)), 0)
    assert drifts() == 0
    metrics.learned(SimpleNamespace(steps=1, events=64, skipped_non_finite=1, shed=0, loss=math.nan), 0)
    for _ in range(200):
        metrics.learned(SimpleNamespace(steps=1, events=64, skipped_non_finite=0, shed=0, loss=noise.gauss(4, 0.1)), 0)
    assert drifts() >= 2 and "event=loss_drifted detector=adwin" in caplog.text


def test_confirmed_shares_stand_beside_those_of_moments() -> None:
    """By age and of all; the gain weighs moments by the ages of the alerts."""
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, Health())
    metrics._confirmations([judged("40-79", 8, 6, 10, 5), judged("80-159", 2, 1, 10, 5)])
    share = {
        (s.labels["what"], s.labels["age"]): s.value
        for f in registry.collect()
        for s in f.samples
        if s.name == "driftline_confirmed_share"
    }
    assert share["alerts", "40-79"] == 0.75 and share["moments", "all"] == 0.5
    assert share["gain", "all"] == pytest.approx(0.2) and share["gain", "80-159"] == 0.0


def judged(age: str, *counts: int) -> BatchMetrics:
    names = ("alerts", "alerts_confirmed", "moments", "moments_confirmed")
    group = JudgedGroup(age=age, **dict(zip(names, counts, strict=True)))
    return BatchMetrics(
        partition=0, first_offset=0, next_offset=1, time_ms=1, weights_version=0, records=1, events=1, judged=[group]
    )
