"""What comes out: the records of the output topics, as types. Their JSON Schemas in docs/ are generated from here.

Every record names its schema version, the input record it stems from (`source`), the event time and the version of the
weights. `id` is deterministic, so that a reader that is not read-committed can drop a record it has seen before.
"""

from __future__ import annotations

import base64
import hashlib

import msgspec

SCHEMA_VERSION = 1
DEAD_LETTER_BYTES_MAX = 64_000
ALERT, NOTICE = "alert", "notice"  # tiers: for people, for machines


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """The input record that caused an output."""

    topic: str
    partition: int
    offset: int


class Candidate(msgspec.Struct, frozen=True):
    """An interest with its probability, 0..1."""

    interest: str
    probability: float


class ForecastStep(msgspec.Struct, frozen=True):
    """The most likely interests of the user's step-th next event, best first."""

    step: int
    interests: list[Candidate]


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """Topic `forecasts`, keyed by user: the next n interests as seen right after the source event.

    Attributes:
        reasons: why it was emitted now: every, top-changed, alert, stale.
        next_types: probability of the next event's type (browse, cart, purchase, review, ...), the likely ones.
        purchases: of the interests of step 1, the probability that the user buys it within the next `purchase_events`
            events, the likeliest first; empty while no purchase was ever learned from.
    """

    schema: int = SCHEMA_VERSION
    id: str
    user: str
    source: Source
    time_ms: int
    weights_version: int
    reasons: list[str]
    steps: list[ForecastStep]
    next_types: dict[str, float] = {}
    purchases: list[Candidate] = []
    purchase_events: int = 0


class Contribution(msgspec.Struct, frozen=True):
    """What one interest adds to the severity; all contributions of an alert add up to it."""

    interest: str
    contribution: float


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """One event since the onset that speaks for the shift: its log-likelihood ratio, nats, how many events ago, and
    where it was read (topic/partition/offset; null where that is not known any more)."""

    interest: str
    time_ms: int
    ratio: float
    events_ago: int
    event_id: str | None = None


class ShiftAlert(msgspec.Struct, frozen=True, kw_only=True):
    """Topic `alerts`, keyed by user: this user's interests have shifted, since when, and why we say so.

    An alert on a segment or on all users has no key and an empty `user`; it is told by the owner of partition 0 alone.

    Attributes:
        alert_id: what `driftline explain` takes; equal to `id`.
        scope: user, segment or all.
        segment: whose interests have shifted, where the scope is a segment.
        shares: how much of the evidence is the user's own, the segment's and everybody's; adds up to 1.
        detected_at_ms, onset_ms: event times of the alarm and of the estimated start of the shift.
        onset_events: the user's events since the onset, the source event included; of a surge, the steps of all
            users, or of the segment's, to something new.
        severity: Jensen-Shannon divergence of the profiles before and after, 0..1 (base 2).
        confidence: log10 of the expected events between such alarms of a user whose interests do not shift.
        kind: abrupt, gradual or returning.
        gained, lost: interests with their contributions to the severity.
        evidence: the up to five events since the onset that speak loudest.
        before, after: top interests with their shares, before the onset and since.
        threshold: evidence that an alarm took when this one fired; `evidence_sum` is what there was.
        calibrated: whether the threshold was made for the requested rate; else it is the setting.
        false_alarm_events: requested events between false alarms (ARL0), in force for this alert.
        measured_false_alarm_events: what came of it: events at which an alarm could have come, for each alarm, since
            the rule was made; None before the first one. Real shifts are counted as alarms too.
        measured_interval: its interval of 95 % (Poisson); the upper end is None before the first alarm.
        measured_alarms: how many alarms that rests on.
        dedup_key: the same for repeated alerts on one shift.
        forecast: the likeliest next interests, where a forecast was due at the event.
        suppressed_count: users' alarms that were not told because a surge explains most of their evidence, in the
            speaking partition since the surge told before.
        promise: chance that the user's next events confirm the alert, learned from the verdicts on earlier ones; 1/2
            while there are few.
        worth: what the user is worth: 1 and one more for each tenfold of purchases times prices.
        value: worth x promise.
        rank_score: severity x confidence x value; what the daily budget goes by.
        tier: alert: for people; notice: the day's budget (`alerts.daily_budget`) has better use.
    """

    schema: int = SCHEMA_VERSION
    id: str
    alert_id: str = ""
    user: str
    segment: str = ""
    source: Source
    scope: str = "user"
    shares: dict[str, float]
    detected_at_ms: int
    onset_ms: int
    onset_events: int
    severity: float
    confidence: float
    kind: str
    gained: list[Contribution]
    lost: list[Contribution]
    evidence: list[Evidence] = []
    before: list[Candidate]
    after: list[Candidate]
    forecast: list[Candidate] = []
    threshold: float
    evidence_sum: float
    calibrated: bool = False
    false_alarm_events: float | None = None
    measured_false_alarm_events: float | None = None
    measured_interval: list[float | None] | None = None
    measured_alarms: int = 0
    weights_version: int
    sentence: str
    dedup_key: str
    suppressed_count: int = 0
    promise: float = 0.5
    worth: float = 1.0
    value: float = 0.5
    rank_score: float = 0.0
    tier: str = ALERT


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Topic `verdicts`, keyed by user: whether the user's next 30 events confirm an alert, without any label.

    Attributes:
        alert_id: of the alert; `source` is the event that made the verdict.
        gain: nats by which the events since the onset foretold those 30 better than the events before it did;
            confirmed if above 0. Random moments are confirmed too: compare shares (`judged` in `metrics`).
    """

    schema: int = SCHEMA_VERSION
    id: str
    alert_id: str
    user: str
    source: Source
    judged_at_ms: int
    confirmed: bool
    gain: float


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """Topic `dead-letters`: a record that cannot be used, why, and its original bytes (base64).

    Records over 64 kB are kept as their head; `bytes` and `sha256` are always those of the whole value.
    """

    schema: int = SCHEMA_VERSION
    id: str
    reason: str
    message: str
    source: Source
    timestamp_ms: int
    key_base64: str | None
    value_base64: str | None
    bytes: int
    sha256: str | None
    truncated: bool = False


class JudgedGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Trials that ended, of users of one age (events at the time, as `80-159`): alerts, and random moments beside."""

    age: str
    alerts: int = 0
    alerts_confirmed: int = 0
    moments: int = 0
    moments_confirmed: int = 0


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """What all users do, or a segment, or the forecasts' error, has drifted: seen by a detector of river, told once by
    the owner of partition 0.

    Attributes:
        figure: interests: nats by which an event's interest is rarer than the long run has it, mean of slices of 256
            events; forecast_error: 1 - 1 / rank of what came, of the scored events.
        scope: all or segment; `segment` says which.
        detector: adwin (any change of the mean) or page_hinkley (a rise).
        source: the event that completed the slice.
        onset_ms, onset_events: estimated begin of the change: event time, and events of the figure since then.
        before, after: mean of the figure up to the onset and since.
    """

    figure: str
    scope: str
    segment: str = ""
    detector: str
    source: Source
    detected_at_ms: int
    onset_ms: int
    onset_events: int
    before: float
    after: float


class BatchMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Topic `metrics`: what one transaction did in one partition. Everything is a sum: add records up for any span.

    Attributes:
        first_offset, next_offset: the input records covered, of the first input topic with records in this batch.
        time_ms: newest event time in the batch.
        records, events, dead_letters, late, duplicates, forecasts, alerts, new_users: counts.
        suppressed: users' alarms that were not told: a surge explains most of their evidence, or the user had three
            alerts within an hour of event time (bots).
        notices: those of the alerts for which the daily budget had no room.
        judged: alerts and random moments that the users' next 30 events confirmed or not, by age of the user.
        monitored, alarms: events at which an alarm could have come, and alarms, under calibrated thresholds only.
        expected_alarms: alarms that the requested rate gives for them; alarms / expected_alarms should be near 1.
        evicted, erased: users forgotten, by the bounds of state.ttl_h and state.bytes_max, and by order.
        not_murmur2, not_crc32: new users that lie elsewhere than Kafka's default partitioner, or librdkafka's, puts
            them; where both grow, producers with different partitioners write to one topic.
        scored: events whose forecast, made before them, was scored (events of the users in the quality share that
            have a history).
        reciprocal_ranks, hits_10: sums over the scored events, of our forecast for the next step.
        drifts: of what all users do, or a segment, or of the forecasts' error; in the record of partition 0 alone.
        recency_reciprocal_ranks, recency_hits_10: the same of the recency rule on the same events.
        scored_moves, ..._moves: the same over those scored events that do not repeat the user's last interest.
    """

    schema: int = SCHEMA_VERSION
    partition: int
    first_offset: int
    next_offset: int
    time_ms: int
    weights_version: int
    records: int
    events: int
    dead_letters: int = 0
    late: int = 0
    duplicates: int = 0
    forecasts: int = 0
    alerts: int = 0
    new_users: int = 0
    suppressed: int = 0
    notices: int = 0
    judged: list[JudgedGroup] = []
    monitored: int = 0
    alarms: int = 0
    expected_alarms: float = 0.0
    evicted: int = 0
    erased: int = 0
    not_murmur2: int = 0
    not_crc32: int = 0
    scored: int = 0
    reciprocal_ranks: float = 0.0
    hits_10: int = 0
    recency_reciprocal_ranks: float = 0.0
    recency_hits_10: int = 0
    scored_moves: int = 0
    reciprocal_ranks_moves: float = 0.0
    hits_10_moves: int = 0
    recency_reciprocal_ranks_moves: float = 0.0
    recency_hits_10_moves: int = 0
    drifts: list[Drift] = []


_encoder = msgspec.json.Encoder()


def encode(record: msgspec.Struct) -> bytes:
    """One output record as JSON."""
    return _encoder.encode(record)


def dead_letter(
    *, reason: str, message: str, source: Source, timestamp_ms: int, key: bytes | None, value: bytes | None
) -> DeadLetter:
    """A dead letter for an input record; a large value is cut to its head, or the letter could not be written."""
    head = None if value is None else value[:DEAD_LETTER_BYTES_MAX]
    return DeadLetter(
        id=f"{source.topic}/{source.partition}/{source.offset}",
        reason=reason,
        message=message[:1_000],
        source=source,
        timestamp_ms=timestamp_ms,
        key_base64=None if key is None else base64.b64encode(key[:1_024]).decode(),
        value_base64=None if head is None else base64.b64encode(head).decode(),
        bytes=0 if value is None else len(value),
        sha256=None if value is None else hashlib.sha256(value).hexdigest(),
        truncated=value is not None and len(value) > DEAD_LETTER_BYTES_MAX,
    )
