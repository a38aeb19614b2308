"""A finished run's score: alerts are matched by the stated policy, every figure comes from the records themselves."""

import math
from pathlib import Path
from typing import Any

import pytest

from stream.demo import DemoTopics, render, score
from stream.memory import MemoryLog
from stream.partition import partition_of
from stream.records import (
    BatchMetrics,
    Candidate,
    Contribution,
    Forecast,
    ForecastStep,
    ShiftAlert,
    Source,
    dead_letter,
    encode,
)
from stream.scoring import FOUND_WITHIN_EVENTS, match_alerts, median_delay
from stream.summary import DemoScore, summary
from stream.transport import TopicSpec
from stream.truth import PlantedShift, StreamTruth, Truth

TOPICS = DemoTopics(
    events="events",
    forecasts="forecasts",
    alerts="alerts",
    dead_letters="dead-letters",
    metrics="metrics",
    partitions=2,
)
MINUTE_MS = 60_000


def shift(user: str = "ada", start: int = 100, kind: str = "abrupt", until: int | None = None) -> PlantedShift:
    """A shift at the user's event number `start`; events are a minute apart from minute 0."""
    return PlantedShift(
        user=user,
        time_ms=start * MINUTE_MS,
        until_ms=(start if until is None else until) * MINUTE_MS,
        kind=kind,
        events_before=start,
        events_after=200 - start,
        before=["tea", "coffee"],
        after=["tents", "maps"],
    )


def alert(minute: int, user: str = "ada", scope: str = "user", gained: str = "tents", **changes: Any) -> ShiftAlert:
    fields: dict[str, Any] = {
        "id": f"{user}/{minute}/{scope}",
        "user": user,
        "source": Source(topic="events", partition=partition_of(user.encode(), 2), offset=minute),
        "scope": scope,
        "shares": {"user": 1.0},
        "detected_at_ms": minute * MINUTE_MS,
        "onset_ms": minute * MINUTE_MS,
        "onset_events": 5,
        "severity": 0.5,
        "confidence": 3.0,
        "kind": "abrupt",
        "gained": [Contribution(gained, 0.3)],
        "lost": [Contribution("tea", 0.2)],
        "before": [],
        "after": [],
        "threshold": 8.0,
        "evidence_sum": 9.0,
        "weights_version": 1,
        "sentence": f"{user} moved to {gained}",
        "dedup_key": "d",
    }
    return ShiftAlert(**(fields | changes))


TIMES = {user: [n * MINUTE_MS for n in range(200)] for user in ("ada", "ben")}


@pytest.mark.parametrize(
    ("minute", "delay"),
    [(99, None), (100, 1), (101, 2), (100 + FOUND_WITHIN_EVENTS - 1, 60), (100 + FOUND_WITHIN_EVENTS, None)],
)
def test_an_alert_counts_from_the_shifts_first_event_to_the_windows_last(minute: int, delay: int | None) -> None:
    """One event too early or too late is false, and the shift is missed."""
    judged = match_alerts([shift()], [alert(minute)], TIMES, 400)
    assert judged.outcomes[0].delay_events == delay
    assert len(judged.false) == (delay is None) and len(judged.missed) == (delay is None)


def test_a_gradual_shift_has_time_until_it_is_complete() -> None:
    """The window starts to run out when the change is complete, the delay counts from its start."""
    judged = match_alerts([shift(kind="gradual", until=130)], [alert(185)], TIMES, 400)
    assert judged.outcomes[0].delay_events == 86
    assert not match_alerts([shift(kind="gradual", until=130)], [alert(190)], TIMES, 400).found


def test_each_alert_serves_one_shift_and_each_shift_one_alert() -> None:
    """A return has a window of its own; second alerts in a window are repeats, neither found nor false."""
    shifts = [shift(start=100), shift(start=140, kind="returning")]
    judged = match_alerts(shifts, [alert(110), alert(120), alert(145)], TIMES, 400)
    assert [o.delay_events for o in judged.outcomes] == [11, 6]
    assert [a.detected_at_ms // MINUTE_MS for a in judged.repeated] == [120] and not judged.false
    late = match_alerts(shifts, [alert(145)], TIMES, 400)
    assert [o.delay_events for o in late.outcomes] == [None, 6]


def test_other_users_and_wider_alerts() -> None:
    """An alert about somebody else is false; one about a segment is counted apart."""
    judged = match_alerts([shift()], [alert(110, user="ben"), alert(110, scope="segment")], TIMES, 400)
    assert [a.user for a in judged.false] == ["ben"] and len(judged.wider) == 1 and not judged.found
    assert judged.events_per_false == 400


def test_chance_is_what_random_alerts_would_find() -> None:
    """Strewing as many alerts over the events finds, on average, the share that is printed."""
    import random

    rng = random.Random(0)
    alerts = [alert(n, user="ben") for n in range(8)]
    printed = match_alerts([shift()], alerts, TIMES, 400).by_chance
    hits = sum(any(100 <= rng.randrange(400) < 160 for _ in range(8)) for _ in range(4_000))
    assert abs(hits / 4_000 - printed) < 4 * math.sqrt(printed * (1 - printed) / 4_000) + 0.02


def test_the_median_delay_counts_missed_ones_as_never() -> None:
    """Finding only the easy half does not look fast."""
    shifts = [shift(user=user, start=start) for user, start in (("ada", 20), ("ben", 20), ("ben", 120))]
    judged = match_alerts(shifts, [alert(24)], TIMES, 400)
    assert median_delay(judged.outcomes) == math.inf and median_delay(judged.found) == 5
    assert math.isnan(median_delay([]))


@pytest.fixture(scope="module")
def run() -> DemoScore:
    """Two users' events, one bad record, one alert each, and the metrics of four batches."""
    log = MemoryLog()
    topics = [TOPICS.events, TOPICS.forecasts, TOPICS.alerts, TOPICS.dead_letters, TOPICS.metrics]
    log.admin().create([TopicSpec(name=name, partitions=2) for name in topics])
    users = {"ada": 0, "ben": 1}
    assert {user: partition_of(user.encode(), 2) for user in users} == {"ada": 1, "ben": 1}
    lines = []
    for n in range(200):
        for user in users:
            interest = "tents" if user == "ada" and n >= 100 else "tea"
            value = f'{{"user":"{user}","interest":"{interest}","time":{n * MINUTE_MS},"type":"browse"}}'
            lines.append((user.encode(), value.encode(), n))
    lines.insert(150, (b"ada", b'{"user":"ada","interest":"maps","time":9e15}', 0))
    log.append("events", 1, iter(lines))
    bad = dead_letter(
        reason="in_the_future",
        message="far",
        source=Source(topic="events", partition=1, offset=150),
        timestamp_ms=0,
        key=b"ada",
        value=lines[150][1],
    )
    log.append("dead-letters", 1, iter([(b"ada", encode(bad), 0)]))
    log.append("alerts", 1, iter([(b"ada", encode(alert(114)), 0), (b"ben", encode(alert(50, user="ben")), 0)]))
    forecast = Forecast(
        id="1",
        user="ada",
        source=Source(topic="events", partition=1, offset=10),
        time_ms=5 * MINUTE_MS,
        weights_version=1,
        reasons=["every"],
        steps=[ForecastStep(1, [Candidate("tea", 0.7), Candidate("tents", 0.1)])],
    )
    log.append("forecasts", 1, iter([(b"ada", encode(forecast), 0), (b"ben", encode(forecast), 0)]))
    log.append("metrics", 1, iter((None, encode(m), 0) for m in reversed(METRICS)))
    truth = Truth(
        stream=StreamTruth(seed=1, users=2, events=400, first_ms=0, last_ms=1, bad={"in_the_future": 1}),
        shifts=[shift()],
        seasons=[],
        new_interests=[],
    )
    return score(log.reader(), TOPICS, truth, elapsed_s=4.0)


METRICS = [
    BatchMetrics(
        partition=1,
        first_offset=n * 100,
        next_offset=(n + 1) * 100,
        time_ms=n * 50 * MINUTE_MS,
        weights_version=n,
        records=100,
        events=100,
        forecasts=1,
        scored=90,
        reciprocal_ranks=90 * (0.5 + n / 10),
        hits_10=81,
        recency_reciprocal_ranks=90 * 0.4,
        recency_hits_10=72,
        scored_moves=10,
        reciprocal_ranks_moves=3.0,
        hits_10_moves=5,
        recency_reciprocal_ranks_moves=1.0,
        recency_hits_10_moves=4,
    )
    for n in range(4)
]


def test_quality_is_the_sum_of_the_batches(run: DemoScore) -> None:
    """MRR and HR@10 over all events, over the later half, and over the moves, by hand."""
    assert run.events == 400 and run.events_per_s == 100.0 and run.forecasts == 4 and run.weights_version == 3
    assert run.quality.mrr == pytest.approx(0.65) and run.second_half.mrr == pytest.approx(0.75)
    assert run.quality.recency_mrr == pytest.approx(0.4) and run.quality.hits_10 == pytest.approx(0.9)
    moves = run.quality.moves
    assert moves is not None and moves.scored == 40 and moves.mrr == pytest.approx(0.3)
    assert [point.mrr for point in run.curve] == pytest.approx([0.5, 0.6, 0.7, 0.8])


def test_the_shift_is_found_and_bad_records_are_no_events(run: DemoScore) -> None:
    """The delay counts the user's good events only: the bad record between them is not one."""
    assert [o.delay_events for o in run.alerts.outcomes] == [15]
    assert [a.user for a in run.alerts.false] == ["ben"]
    assert run.dead_letters == {"in_the_future": 1} == run.planted_bad


def test_the_story_is_that_users(run: DemoScore) -> None:
    """Events, alert and forecasts of the user whose shift was found, and of nobody else."""
    assert run.story is not None and run.story.user == "ada" and run.story.delay_events == 15
    assert len(run.story.events) == 200 and {e.interest for e in run.story.events} == {"tea", "tents"}
    assert [o.shares for o in run.story.outlooks] == [{"tea": 0.7, "tents": 0.1}]
    assert run.story.sentence == "ada moved to tents" and run.story.gained[0].name == "tents"


def test_the_table_says_it_all(run: DemoScore) -> None:
    """Every promised line is there with its figures."""
    rows = {row.name.strip(): row for row in summary(run)}
    assert rows["Events handled"].ours == "400" and "100 a second" in rows["Events handled"].note
    assert (rows["MRR, all events"].ours, rows["MRR, all events"].rule) == ("0.650", "0.400")
    assert (rows["HR@10, second half, moves"].ours, rows["HR@10, second half, moves"].rule) == ("0.500", "0.400")
    assert rows["Shifts found"].ours == "1 of 1" and "missed 0" in rows["Shifts found"].note
    assert rows["abrupt"].ours == "1 of 1" and "15 events" in rows["abrupt"].note
    assert rows["cause named"].ours == "1 of 1"
    assert rows["False alerts"].ours == "1" and "one in 400 events" in rows["False alerts"].note
    assert rows["Dead letters"].ours == "1 of 1" and "each with its reason" in rows["Dead letters"].note


def test_dead_letters_that_differ_from_the_truth_are_named(run: DemoScore) -> None:
    """A missing or unexpected dead letter is never hidden by an equal total."""
    from dataclasses import replace

    other = replace(run, planted_bad={"broken_json": 1})
    note = {row.name: row for row in summary(other)}["Dead letters"].note
    assert note == "not as planted: broken_json 0 of 1, in_the_future 1 of 0"


def test_an_empty_run_is_scored_too(tmp_path: Path) -> None:
    """A run that did nothing has a table and a report that say so."""
    log = MemoryLog()
    topics = [TOPICS.events, TOPICS.forecasts, TOPICS.alerts, TOPICS.dead_letters, TOPICS.metrics]
    log.admin().create([TopicSpec(name=name, partitions=2) for name in topics])
    truth = Truth(
        stream=StreamTruth(seed=1, users=0, events=0, first_ms=0, last_ms=0, bad={}),
        shifts=[shift()],
        seasons=[],
        new_interests=[],
    )
    result = score(log.reader(), TOPICS, truth, elapsed_s=1.0)
    rows = {row.name: row for row in summary(result)}
    assert rows["Shifts found"].ours == "0 of 1" and rows["Events handled"].ours == "0"
    assert result.story is None
    render(result, tmp_path / "report.html")
    assert "no story to tell" in (tmp_path / "report.html").read_text(encoding="utf-8")
