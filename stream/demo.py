"""What a finished run was worth: its output topics against the planted truth, as a table and a report.

At the end of the way of an event: reads `metrics`, `alerts`, `dead-letters`, `forecasts` and `events` as anybody could,
by the public records alone. Forecast quality is what the workers measured event by event (each forecast judged before
its event was learned); shifts are judged by scoring.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from stream.findings import AlertMark, Bar, Outlook, QualityPoint, Report, SeenEvent, ShiftMark, Story
from stream.partition import partition_of
from stream.records import BatchMetrics, DeadLetter, Forecast, ShiftAlert
from stream.report import render_html
from stream.scoring import FOUND_WITHIN_EVENTS, AlertScore, ShiftOutcome, match_alerts
from stream.summary import DemoScore, Quality, summary
from stream.transport import LogReader, Record, TopicPartition
from stream.truth import Truth

READ_TIMEOUT_S = 2.0
READ_RECORDS = 5_000
POINTS = 48  # of a curve over time
STORY_EVENTS_MIN, STORY_EVENTS_MAX = 60, 300


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoTopics:
    """Where a run's records lie. All topics have the same number of partitions."""

    events: str
    forecasts: str
    alerts: str
    dead_letters: str
    metrics: str
    partitions: int


class _Seen(msgspec.Struct):
    """As much of an input event as the story needs."""

    time: int
    interest: str
    type: str = ""


@dataclass(kw_only=True, slots=True)
class _Watched:
    """The good events of one user, in order."""

    times_ms: list[int] = field(default_factory=list)
    events: list[SeenEvent] = field(default_factory=list)


def score(reader: LogReader, topics: DemoTopics, truth: Truth, elapsed_s: float) -> DemoScore:
    """Read a finished run's topics and judge it."""
    metrics = [msgspec.json.decode(r.value or b"", type=BatchMetrics) for r in _all(reader, topics.metrics, topics)]
    alerts = [msgspec.json.decode(r.value or b"", type=ShiftAlert) for r in _all(reader, topics.alerts, topics)]
    letters = [msgspec.json.decode(r.value or b"", type=DeadLetter) for r in _all(reader, topics.dead_letters, topics)]
    metrics.sort(key=lambda m: (m.time_ms, m.partition, m.first_offset))
    events = sum(m.events for m in metrics)
    shifting = {shift.user for shift in truth.shifts}
    dead = {(letter.source.topic, letter.source.partition, letter.source.offset) for letter in letters}
    watched = _watch(reader, topics, shifting, dead)
    judged = match_alerts(truth.shifts, alerts, {user: w.times_ms for user, w in watched.items()}, events)
    return DemoScore(
        events=events,
        forecasts=sum(m.forecasts for m in metrics),
        elapsed_s=elapsed_s,
        quality=_quality(metrics),
        second_half=_quality(_later_half(metrics)),
        curve=_curve(metrics),
        alerts=judged,
        dead_letters=dict(sorted(Counter(letter.reason for letter in letters).items())),
        planted_bad=dict(truth.stream.bad),
        weights_version=max((m.weights_version for m in metrics), default=0),
        truth=truth,
        story=_story(reader, topics, judged, alerts, watched),
    )


def render(score: DemoScore, path: Path, title: str = "Driftline demo") -> None:
    """Write the self-contained HTML report of a run."""
    stream = score.truth.stream
    path.write_text(
        render_html(
            Report(
                title=title,
                subtitle=f"{stream.events:,} events of {stream.users:,} users of a generated shop (seed {stream.seed})",
                summary=summary(score),
                curve=score.curve,
                shifts=[
                    ShiftMark(
                        user=o.shift.user,
                        time_ms=o.shift.time_ms,
                        kind=o.shift.kind,
                        delay_events=o.delay_events,
                        sentence=o.alert.sentence if o.alert else "",
                    )
                    for o in score.alerts.outcomes
                ],
                false=[
                    AlertMark(user=a.user, time_ms=a.detected_at_ms, kind=a.kind, sentence=a.sentence)
                    for a in score.alerts.false
                ],
                seasons=[(s.interest, s.from_ms, s.until_ms) for s in score.truth.seasons],
                found_within_events=FOUND_WITHIN_EVENTS,
                story=score.story,
            )
        ),
        encoding="utf-8",
    )


def _all(reader: LogReader, topic: str, topics: DemoTopics) -> Iterator[Record]:
    for partition in range(topics.partitions):
        yield from _partition(reader, TopicPartition(topic, partition))


def _partition(reader: LogReader, partition: TopicPartition) -> Iterator[Record]:
    """Everything from the head to the end as of now."""
    offset, end = reader.bounds(partition)
    while offset < end:
        records = reader.read(partition, offset, READ_TIMEOUT_S, READ_RECORDS)
        if not records:  # the rest are the marks of transactions
            return
        yield from records
        offset = records[-1].offset + 1


def _watch(
    reader: LogReader, topics: DemoTopics, users: set[str], dead: set[tuple[str, int, int]]
) -> dict[str, _Watched]:
    """The good events of some users, in the order of the log."""
    keys = {user.encode(): user for user in users}
    decode = msgspec.json.Decoder(_Seen).decode
    watched: dict[str, _Watched] = {user: _Watched() for user in users}
    for record in _all(reader, topics.events, topics):
        user = keys.get(record.key or b"")
        if user is None or (record.topic, record.partition, record.offset) in dead:
            continue
        event = decode(record.value or b"")
        watched[user].times_ms.append(event.time)
        watched[user].events.append(SeenEvent(time_ms=event.time, interest=event.interest, type=event.type))
    return watched


def _quality(metrics: Sequence[BatchMetrics]) -> Quality:
    def mean(total: str, count: str) -> float:
        scored = sum(getattr(m, count) for m in metrics)
        return sum(getattr(m, total) for m in metrics) / scored if scored else math.nan

    def of(suffix: str, moves: Quality | None) -> Quality:
        scored = f"scored{suffix}"
        return Quality(
            scored=sum(getattr(m, scored) for m in metrics),
            mrr=mean(f"reciprocal_ranks{suffix}", scored),
            hits_10=mean(f"hits_10{suffix}", scored),
            recency_mrr=mean(f"recency_reciprocal_ranks{suffix}", scored),
            recency_hits_10=mean(f"recency_hits_10{suffix}", scored),
            moves=moves,
        )

    return of("", of("_moves", None))


def _later_half(metrics: Sequence[BatchMetrics]) -> list[BatchMetrics]:
    total, before = sum(m.events for m in metrics), 0
    later = []
    for m in metrics:
        before += m.events
        if before > total / 2:
            later.append(m)
    return later


def _curve(metrics: Sequence[BatchMetrics]) -> list[QualityPoint]:
    """POINTS parts with about equally many scored events each."""
    size = sum(m.scored for m in metrics) / POINTS
    points: list[QualityPoint] = []
    part: list[BatchMetrics] = []
    for m in metrics:
        part.append(m)
        if sum(p.scored for p in part) >= max(size, 1):
            points.append(_point(part))
            part = []
    return points


def _point(part: Sequence[BatchMetrics]) -> QualityPoint:
    quality = _quality(part)
    moves = quality.moves
    assert moves is not None
    return QualityPoint(
        time_ms=part[-1].time_ms,
        events=sum(m.events for m in part),
        mrr=quality.mrr,
        recency_mrr=quality.recency_mrr,
        mrr_moves=moves.mrr,
        recency_mrr_moves=moves.recency_mrr,
        hits_10=quality.hits_10,
        recency_hits_10=quality.recency_hits_10,
    )


def _story(
    reader: LogReader,
    topics: DemoTopics,
    judged: AlertScore,
    alerts: Sequence[ShiftAlert],
    watched: Mapping[str, _Watched],
) -> Story | None:
    """A found shift of average speed, with what the user did and what we said; None when nothing was found."""
    outcome = _typical(judged, watched)
    if outcome is None or outcome.alert is None:
        return None
    user, alert = outcome.shift.user, outcome.alert
    key = user.encode()
    decode = msgspec.json.Decoder(Forecast).decode
    partition = TopicPartition(topics.forecasts, partition_of(key, topics.partitions))
    forecasts = [decode(r.value or b"") for r in _partition(reader, partition) if r.key == key]
    return Story(
        user=user,
        kind=outcome.shift.kind,
        delay_events=outcome.delay_events or 0,
        events=watched[user].events,
        before=outcome.shift.before,
        after=outcome.shift.after,
        shift_ms=[o.shift.time_ms for o in judged.outcomes if o.shift.user == user],
        alerts=[
            AlertMark(user=user, time_ms=a.detected_at_ms, kind=a.kind, sentence=a.sentence)
            for a in alerts
            if a.user == user and a.scope == "user"
        ],
        told_ms=alert.detected_at_ms,
        sentence=alert.sentence,
        gained=[Bar(name=c.interest, value=c.contribution) for c in alert.gained],
        lost=[Bar(name=c.interest, value=c.contribution) for c in alert.lost],
        outlooks=[
            Outlook(
                time_ms=f.time_ms,
                shares={c.interest: c.probability for c in f.steps[0].interests},
                path=[step.interests[0].interest for step in f.steps if step.interests],
            )
            for f in forecasts
            if f.steps
        ],
    )


def _typical(judged: AlertScore, watched: Mapping[str, _Watched]) -> ShiftOutcome | None:
    """The found shift whose delay is the middle one: abrupt ones of users with a readable number of events first."""
    found = judged.found

    def rank(o: ShiftOutcome) -> tuple[bool, bool]:
        size = len(watched[o.shift.user].events)
        return o.shift.kind != "abrupt", not STORY_EVENTS_MIN <= size <= STORY_EVENTS_MAX

    if not found:
        return None
    best = min(rank(o) for o in found)
    chosen = sorted((o for o in found if rank(o) == best), key=lambda o: (o.delay_events or 0, o.shift.user))
    return chosen[len(chosen) // 2]
