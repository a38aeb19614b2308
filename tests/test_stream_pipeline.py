"""The way of an event: the same results however a stream is cut into batches, late events, alerts, live quality."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest

from models.features import interest_key
from models.forecaster import Forecaster
from models.profile import EmissionSettings
from models.settings import NetworkSettings
from models.shift import ShiftSettings
from stream.engine import PartitionState, merge
from stream.events import EventDecoder, EventSettings
from stream.pipeline import Pipeline, PipelineSettings
from stream.records import BatchMetrics, Forecast, ShiftAlert
from stream.state import Arena
from stream.transport import LogRecord, TopicPartition

START_MS = 1_700_000_000_000
TP = TopicPartition("events", 0)


def make(policy: str = "on-change", share: float = 1.0, late: str = "update", threshold: float = 5.0) -> Pipeline:
    settings = PipelineSettings(
        events=EventSettings(late=late),
        shift=ShiftSettings(threshold=threshold, age_min_events=10),
        emission=msgspec.convert({"policy": policy}, EmissionSettings),
        steps=3,
        top_k=4,
        quality_share=share,
        epoch_records=1_024,
        first_epoch_records=64,
    )
    return Pipeline(settings, EventDecoder(settings.events, b"k"), Forecaster.initial(NetworkSettings(), 7))


def stream(count: int, users: int = 30, seed: int = 1) -> list[LogRecord]:
    """Users with favourites; user u0 changes all of them halfway; sessions of a few minutes."""
    rng = random.Random(seed)
    now_ms = START_MS
    records = []
    for offset in range(count):
        number = rng.choice([0, 0, rng.randrange(users)])
        moved = number == 0 and offset > count // 2
        favourite = (
            (number * 3 + rng.randrange(3) + (500 if moved else 0)) if rng.random() < 0.9 else rng.randrange(100)
        )
        now_ms += rng.choice([1_000, 20_000, 4_000_000])
        event = {"user": f"u{number}", "interest": f"i{favourite}", "time": now_ms, "type": rng.choice(["view", "buy"])}
        if rng.random() < 0.5:
            event |= {"price": rng.uniform(1, 99), "dwell": rng.uniform(0, 60), "item": f"x{rng.randrange(50)}"}
        records.append(LogRecord("events", 0, offset, now_ms, f"u{number}".encode(), orjson.dumps(event)))
    return records


def run(pipeline: Pipeline, records: Sequence[LogRecord], batch: int) -> tuple[PartitionState, list[tuple[str, Any]]]:
    state = PartitionState(arena=Arena(pipeline.dtype), groups=pipeline.new_groups())
    outputs, done = [], 0
    while done < len(records):
        count = min(batch, pipeline.next_cut(state.seen) - state.seen)
        for step in pipeline.process({0: state}, {TP: records[done : done + count]}):
            merge(pipeline, state, step)
            outputs += [(o.stream, orjson.loads(o.value)) for o in step.outputs]
        done += count
    return state, outputs


def by_stream(outputs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Everything but the metrics; each topic in its own order."""
    kept = [(s, without_probabilities(r)) for s, r in outputs if s != "metrics"]
    return sorted(kept, key=lambda output: output[0])


def without_probabilities(record: dict[str, Any]) -> dict[str, Any]:
    """A forecast by its best interest only: float32 sums may differ in the last digits between batch sizes."""
    if "steps" in record:
        record = {**record, "steps": [s["interests"][0]["interest"] for s in record["steps"]], "next_types": None}
    return record


def test_any_cut_into_batches_gives_the_same() -> None:
    """A batch of 4,096 equals batches of 1 and of 37: records bit for bit, hidden within 1e-5, the same outputs."""
    records = stream(700)
    whole, outputs = run(make(), records, 4_096)
    wanted = by_stream(outputs)
    assert Counter(s for s, _ in wanted)["alerts"] > 0, "the stream must raise an alert to say anything"
    for batch in (1, 37):
        state, others = run(make(), records, batch)
        a, b = whole.arena.all(), state.arena.all()
        for name in a.dtype.names or ():
            if name == "hidden":
                np.testing.assert_allclose(a[name], b[name], atol=1e-5)
            elif name != "block":
                assert (a[name] == b[name]).all(), name
        assert by_stream(others) == wanted
        assert state.groups.cut().snapshot() == whole.groups.cut().snapshot()


def test_metrics_add_up_over_any_cut() -> None:
    """The sums of the metrics topic are the same however the stream was cut, and count what came out."""
    records = stream(400)

    def totals(batch: int) -> tuple[dict[str, float], Counter[str]]:
        _, outputs = run(make(), records, batch)
        metrics = [msgspec.convert(r, BatchMetrics) for s, r in outputs if s == "metrics"]
        names = [n for n in BatchMetrics.__struct_fields__ if isinstance(getattr(metrics[0], n), int | float)]
        names = [n for n in names if n not in ("schema", "partition", "first_offset", "next_offset", "time_ms")]
        return {n: round(sum(getattr(m, n) for m in metrics), 2) for n in names}, Counter(s for s, _ in outputs)

    (large, kinds), (small, _) = totals(4_096), totals(13)
    assert {k: v for k, v in large.items() if k != "weights_version"} == pytest.approx(
        {k: v for k, v in small.items() if k != "weights_version"}, abs=0.05
    )
    assert large["forecasts"] == kinds["forecasts"] and large["alerts"] == kinds["alerts"]
    assert large["records"] == large["events"] == 400 and large["new_users"] == len({r.key for r in records})
    assert large["scored"] == 400 - large["new_users"], "every event of a known user is scored at share 1"


def test_a_planted_shift_raises_an_alert_with_a_reason() -> None:
    """The user that changed everything is alerted after the change, with what was gained and lost, adding up."""
    _, outputs = run(make(), stream(900), 256)
    alerts = [msgspec.convert(r, ShiftAlert) for s, r in outputs if s == "alerts"]
    mine = [a for a in alerts if a.user == "u0" and a.source.offset > 450]
    assert mine, f"no alert for the planted shift; there were {len(alerts)} others"
    alert = mine[0]
    assert {c.interest for c in alert.gained[:2]} <= {"i500", "i501", "i502"}
    assert {c.interest for c in alert.lost[:2]} <= {"i0", "i1", "i2"}
    assert sum(c.contribution for c in alert.gained + alert.lost) == pytest.approx(alert.severity, abs=1e-4)
    assert 0 < alert.severity <= 1 and alert.onset_ms <= alert.detected_at_ms
    assert alert.evidence_sum > alert.threshold and "i50" in alert.sentence


def test_every_policy_emits_what_it_says() -> None:
    """Policy every: a forecast for each event, n steps each, probabilities in order and at most 1 in sum."""
    records = stream(150)
    _, outputs = run(make("every"), records, 64)
    forecasts = [msgspec.convert(r, Forecast) for s, r in outputs if s == "forecasts"]
    assert [f.source.offset for f in forecasts] == list(range(150))
    for forecast in forecasts:
        assert [s.step for s in forecast.steps] == [1, 2, 3]
        for step in forecast.steps:
            shares = [c.probability for c in step.interests]
            assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.001
            assert len({c.interest for c in step.interests}) == len(step.interests)
    _, fewer = run(make("on-change"), records, 64)
    changed = [r for s, r in fewer if s == "forecasts"]
    assert 0 < len(changed) < 150 and all(r["reasons"] for r in changed)


def test_the_untrained_network_starts_as_the_recency_rule() -> None:
    """Version 0 ranks like recency: on known interests it is not behind the rule (learning can then only add)."""
    _, outputs = run(make(), stream(500), 128)
    metrics = [msgspec.convert(r, BatchMetrics) for s, r in outputs if s == "metrics"]
    ours = sum(m.reciprocal_ranks for m in metrics)
    rule = sum(m.recency_reciprocal_ranks for m in metrics)
    assert ours >= 0.98 * rule


@pytest.mark.parametrize(
    ("policy", "events", "letters"), [("update", 101, 0), ("drop", 100, 0), ("dead-letter", 100, 1)]
)
def test_late_events_follow_the_policy(policy: str, events: int, letters: int) -> None:
    """An event far behind its partition's newest is used, dropped or refused, as configured, and always counted."""
    records = stream(100)
    late = orjson.dumps({"user": "u1", "interest": "i1", "time": START_MS - 40 * 86_400_000})
    records.append(LogRecord("events", 0, 100, records[-1].timestamp, b"u1", late))
    _, outputs = run(make(late=policy), records, 32)
    metrics = [msgspec.convert(r, BatchMetrics) for s, r in outputs if s == "metrics"]
    assert sum(m.events for m in metrics) == events
    assert sum(m.late for m in metrics) == 1
    assert [r["reason"] for s, r in outputs if s == "dead_letters"] == ["late"] * letters


def test_a_batch_of_nothing_but_bad_records() -> None:
    """Only dead letters, no users, positions still move on."""
    pipeline = make()
    state = PartitionState(arena=Arena(pipeline.dtype), groups=pipeline.new_groups())
    bad = [LogRecord("events", 0, i, START_MS, b"k", b"{") for i in range(5)]
    (step,) = pipeline.process({0: state}, {TP: bad})
    assert step.positions == {TP: 5} and len(step.records) == 0 and step.seen == 5
    assert Counter(o.stream for o in step.outputs) == {"dead_letters": 5, "metrics": 1}


def test_names_come_from_the_partition() -> None:
    """An interest is named in outputs although no weights know it yet."""
    pipeline = make("every")
    _, outputs = run(pipeline, stream(60), 64)
    named = {c["interest"] for s, r in outputs if s == "forecasts" for c in r["steps"][0]["interests"]}
    assert named and not any(n.startswith("#") for n in named)
    assert interest_key("i1") > 0
