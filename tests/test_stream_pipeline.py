"""The way of an event: the same results however a stream is cut into batches, late events, alerts, live quality."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest
from pipelines import START_MS, TP, make, run, stream

from models.features import interest_key
from models.learner import Learner
from models.settings import LearningSettings, NetworkSettings
from stream.engine import PartitionState, merge
from stream.partition import crc32_partition_of, partition_of
from stream.records import BatchMetrics, Forecast, ShiftAlert
from stream.state import Arena
from stream.transport import LogRecord, TopicPartition


def by_stream(outputs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Everything but the metrics; each topic in its own order."""
    kept = [(s, without_probabilities(r)) for s, r in outputs if s != "metrics"]
    return sorted(kept, key=lambda output: output[0])


def without_probabilities(record: dict[str, Any]) -> dict[str, Any]:
    """A forecast by its best interest only: float32 sums may differ in the last digits between batch sizes."""
    if "steps" in record:
        record = {
            **record,
            "steps": [s["interests"][0]["interest"] for s in record["steps"]],
            "next_types": None,
            "purchases": None,
        }
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


def with_ids(records: list[LogRecord], again: float, rng: random.Random) -> list[LogRecord]:
    """The stream with event ids, and some records sent twice, the second up to two events of the user later."""
    sent: list[LogRecord] = []
    waiting: list[tuple[int, LogRecord]] = []
    for number, record in enumerate(records):
        value = orjson.dumps(orjson.loads(record.value or b"") | {"event_id": f"e{number}"})
        sent.append(record._replace(value=value))
        waiting = [(n - 1, r) for n, r in waiting]
        if rng.random() < again:
            waiting.append((rng.randrange(3), sent[-1]))
        sent += [r for n, r in waiting if n <= 0]
        waiting = [(n, r) for n, r in waiting if n > 0]
    return [record._replace(offset=offset) for offset, record in enumerate(sent)]


@pytest.mark.parametrize("batch", [1, 37, 4_096])
def test_an_event_that_comes_twice_counts_once(batch: int) -> None:
    """With events.dedupe the second is dropped and counted, and the states are those of a stream without it."""
    records = stream(500)
    twice = with_ids(records, 0.2, random.Random(2))
    added = len(twice) - len(records)
    whole, _ = run(make(), records, 4_096)
    state, outputs = run(make(dedupe="event_id"), twice, batch)
    metrics = [msgspec.convert(r, BatchMetrics) for s, r in outputs if s == "metrics"]
    assert added > 50 and sum(m.duplicates for m in metrics) == added
    assert sum(m.events for m in metrics) == 500 and sum(m.records for m in metrics) == len(twice)
    mine, wanted = state.arena.all(), whole.arena.all()
    for name in ("key", "events", "ring_interest", "last_time_ms", "purchases"):
        assert (mine[name] == wanted[name]).all(), name


def test_without_the_setting_ids_change_nothing() -> None:
    """Off by default: both are events."""
    twice = with_ids(stream(100), 0.5, random.Random(2))
    _, outputs = run(make(), twice, 64)
    metrics = [msgspec.convert(r, BatchMetrics) for s, r in outputs if s == "metrics"]
    assert sum(m.events for m in metrics) == len(twice) > 120 and sum(m.duplicates for m in metrics) == 0


def test_clicks_and_purchases_are_taken_in_the_order_of_their_records() -> None:
    """Two input topics of one partition: a batch takes them by record time, each topic in its own order."""
    records = stream(200)
    clicks = TopicPartition("clicks", 0)
    purchases = TopicPartition("purchases", 0)
    split: dict[TopicPartition, list[LogRecord]] = {clicks: [], purchases: []}
    for record in records:
        place = purchases if b'"buy"' in (record.value or b"") else clicks
        split[place].append(record._replace(topic=place.topic, offset=len(split[place])))
    pipeline = make()
    whole = PartitionState(arena=Arena(pipeline.dtype), groups=pipeline.new_groups())
    state = PartitionState(arena=Arena(pipeline.dtype), groups=pipeline.new_groups())
    for into, inputs in ((whole, {TP: records[:64]}), (state, {tp: r[:64] for tp, r in split.items()})):
        if into is state:
            inputs = {tp: [r for r in mine if r.timestamp <= records[63].timestamp] for tp, mine in split.items()}
        (step,) = pipeline.process({0: into}, inputs)
        merge(pipeline, into, step)
        assert set(step.positions) == set(inputs)
    for name in whole.arena.all().dtype.names or ():
        if name != "block":
            np.testing.assert_allclose(whole.arena.all()[name], state.arena.all()[name], atol=1e-6)


def test_mixed_partitioners_are_counted_by_new_user() -> None:
    """Users that neither rule would put here show that both are in use: one rule alone leaves its count at 0."""
    events = [{"user": f"u{n}", "interest": "x", "time": START_MS} for n in range(400)]
    here = {
        rule: [e for e in events if rule(e["user"].encode(), 4) == 0] for rule in (partition_of, crc32_partition_of)
    }
    found = {}
    for name, chosen in (
        ("murmur2", here[partition_of]),
        ("crc32", here[crc32_partition_of]),
        ("mixed", here[partition_of] + here[crc32_partition_of]),
    ):
        records = [
            LogRecord("events", 0, i, START_MS, e["user"].encode(), orjson.dumps(e)) for i, e in enumerate(chosen)
        ]
        _, outputs = run(make(partitions=4), records, 50)
        metrics = [msgspec.convert(r, BatchMetrics) for s, r in outputs if s == "metrics"]
        found[name] = (sum(m.not_murmur2 for m in metrics), sum(m.not_crc32 for m in metrics))
    assert found["murmur2"][0] == 0 < found["murmur2"][1]
    assert found["crc32"][1] == 0 < found["crc32"][0]
    assert min(found["mixed"]) > 20


def test_a_forecast_says_what_is_bought() -> None:
    """Once the weights have met a purchase: the interests of step 1 by the chance that they are bought."""
    pipeline = make(policy="every")
    records = stream(600)
    assert not any(r.get("purchases") for s, r in run(pipeline, records[:100], 100)[1] if s == "forecasts")
    learner = Learner(NetworkSettings(), LearningSettings(warmup_steps=1), seed=7, device="cpu")
    decoded = pipeline._decoder.decode(records)
    learner.observe(decoded.user_key_B, decoded.columns, decoded.interest_names)
    learner.learn(100)
    pipeline.forecaster = learner.forecaster()
    told = [r for s, r in run(pipeline, records[:100], 100)[1] if s == "forecasts"]
    assert told
    for forecast in (msgspec.convert(r, Forecast) for r in told):
        shares = [c.probability for c in forecast.purchases]
        assert {c.interest for c in forecast.purchases} == {c.interest for c in forecast.steps[0].interests}
        assert shares == sorted(shares, reverse=True) and all(0 < share < 1 for share in shares)
        assert forecast.purchase_events == 5
