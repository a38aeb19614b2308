"""Drifts in the pipeline: river's detectors on what all users do, told in the records of `metrics`, exactly once."""

from __future__ import annotations

import logging
import random
from functools import cache
from typing import Any

import msgspec
import orjson
import pytest
from pipelines import START_MS, make, run
from prometheus_client import CollectorRegistry

from stream.metrics import Health, WorkerMetrics
from stream.records import BatchMetrics, Drift
from stream.transport import LogRecord

EVENTS = 18_000
TURN = 12_000  # the event at which everything changes


def shop(seed: int, drift: str = "", partition: int = 0) -> list[LogRecord]:
    """200 users with tastes from 40 interests, a few of them common; from TURN on those of all, or of segment `b`,
    become others."""
    rng = random.Random(seed)
    records = []
    for offset in range(EVENTS):
        user = rng.randrange(200)
        segment = "ab"[user % 2]
        number = min(39, int(rng.expovariate(0.25)))
        if offset >= TURN and drift in ("all", segment):
            number = 39 - number
        event = {"user": f"u{user}", "interest": f"i{number}", "time": START_MS + offset * 60_000, "segment": segment}
        records.append(LogRecord("events", partition, offset, event["time"], f"u{user}".encode(), orjson.dumps(event)))
    return records


@cache
def told(seed: int, drift: str, batch: int = 2_048) -> list[Drift]:
    """The drifts that a pipeline tells of such a shop."""
    return drifts_in(run(make(share=0.0), shop(seed, drift), batch)[1])


def drifts_in(outputs: list[tuple[str, Any]]) -> list[Drift]:
    metrics = [msgspec.convert(value, BatchMetrics) for stream, value in outputs if stream == "metrics"]
    return [drift for m in metrics for drift in m.drifts]


def test_a_calm_shop_has_no_drift_of_interests() -> None:
    """What all users do stays as it is."""
    assert told(1, "") == []


def test_new_interests_of_all_are_told_with_their_onset() -> None:
    """All users turn to what was rare: it is seen within 12 slices, and said since when."""
    found = [d for d in told(2, "all") if d.scope == "all"]
    first = found[0]
    assert first.figure == "interests" and first.after > first.before + 0.5
    assert TURN <= first.source.offset <= TURN + 12 * 256
    assert abs((first.onset_ms - START_MS) / 60_000 - TURN) <= 512


def test_a_segments_drift_is_told_of_the_segment() -> None:
    """Only users of segment b change: its drift is told under its name, and segment a has none."""
    found = told(3, "b")
    assert {d.segment for d in found if d.scope == "segment"} == {"b"}


def test_any_cut_into_batches_tells_the_same_drifts() -> None:
    """The same records in batches of another size: the same drifts, at the same events."""
    assert told(2, "all", 97) == told(2, "all") != []


def test_a_restored_table_tells_the_same_drifts() -> None:
    """A worker that takes over in the middle of a slice goes on where the other stopped."""
    outputs = run(make(share=0.0), shop(2, "all"), 1_000, restored=True)[1]
    assert drifts_in(outputs) == told(2, "all")


def test_only_partition_0_speaks() -> None:
    """Every partition sees a fair sample of the users; one of them tells."""
    outputs = run(make(share=0.0, partitions=2), shop(2, "all", partition=1), 2_048, partition=1)[1]
    assert outputs
    assert drifts_in(outputs) == []


def test_worse_forecasts_are_told() -> None:
    """Users that keep to their three favourites, then do anything: the forecasts' error drifts."""
    rng = random.Random(5)
    records = []
    for offset in range(EVENTS):
        user = rng.randrange(50)
        number = 3 * user + rng.randrange(3) if offset < TURN else rng.randrange(150)
        event = {"user": f"u{user}", "interest": f"i{number}", "time": START_MS + offset * 60_000}
        records.append(LogRecord("events", 0, offset, event["time"], f"u{user}".encode(), orjson.dumps(event)))
    found = [d for d in drifts_in(run(make(), records, 2_048)[1]) if d.figure == "forecast_error"]
    worse = [d for d in found if d.after > d.before]
    assert worse and worse[0].source.offset >= TURN
    assert worse[0].scope == "all" and 0.0 <= worse[0].before < worse[0].after <= 1.0


def test_a_drift_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What a committed batch found: a metric with its labels and a line in the log."""
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, Health())
    (first, *_) = [d for d in told(2, "all") if d.scope == "all"]
    record = BatchMetrics(
        partition=0, first_offset=0, next_offset=1, time_ms=1, weights_version=0, records=1, events=1, drifts=[first]
    )
    with caplog.at_level(logging.WARNING):
        metrics._drifts(record)
    labels = {"figure": "interests", "scope": "all", "detector": first.detector}
    assert registry.get_sample_value("driftline_drifts_total", labels) == 1.0
    assert f"event=drift figure=interests scope=all segment=- detector={first.detector}" in caplog.text
