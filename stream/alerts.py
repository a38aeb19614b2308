"""From alarms to alerts: the records of the `alerts` topic, each with everything that explains it.

On the way of an event: after the walk and the forecasts, for the few events of a batch with an alarm. A user's alarm is
suppressed, and counted, when a surge explains at least half of its evidence; the surge itself is told once, by the
owner of partition 0 alone (users are spread over the partitions by their hash, so each is a fair sample of all).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from models.features import I64, U8, U64
from models.profile import Advanced
from models.shift import Reason, ShiftSettings, day_of, divergence_parts, reasons
from models.shift_groups import GroupTable
from models.surges import Surge
from models.suspicion import Rows, Suspects, rows_of, shares_of
from models.walk import AGE_EDGES
from stream import records as out
from stream.confirming import Allowed, Following, judged_by_age, verdict_outputs
from stream.engine import Output
from stream.events import Decoded

OWN_SHARE_MIN = 0.5
SPEAKER = 0  # the partition whose owner speaks for all users and for segments
_ROUND = 6
Places = tuple[I64, U8]


@dataclass(kw_only=True, slots=True)
class Told:
    """What became of a batch's alarms in one partition.

    Attributes:
        outputs: alerts in the order of their events.
        evidence: rows for the side table.
        suppressed: users' alarms that surges explain, and those of users that had three alerts within the hour.
        pending: suppressed since the last surge was told, this batch included; goes with the group table.
        notices: alerts for which the day's budget had no room.
        followup: what the batch adds to what became of alerts; goes with the group table too.
        started_keys: users whose trials began.
        judged: trials that are over, by age of the user.
    """

    outputs: list[Output] = field(default_factory=list)
    evidence: Rows
    suppressed: int = 0
    pending: int = 0
    alerts: int = 0
    notices: int = 0
    followup: bytes = b""
    started_keys: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    judged: list[out.JudgedGroup] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One partition's share of a batch, as far as alerts need it.

    Attributes:
        forecast: by event, the likeliest next interests, where a forecast was due.
        topics: the input topics, for the ids of events.
        moment_B: the events that are random moments.
        where: offset of each event's record, and the number of its topic.
        allowed: how many alerts of a day people may see; None: all.
    """

    partition: int
    decoded: Decoded
    advanced: Advanced
    groups: GroupTable
    suspects: Suspects
    settings: ShiftSettings
    weights_version: int
    name: Callable[[int], str]
    forecast: Mapping[int, list[out.Candidate]]
    topics: tuple[str, ...]
    moment_B: npt.NDArray[np.bool_]
    where: Places
    allowed: Allowed | None = None


def places(decoded: Decoded, topics: tuple[str, ...]) -> Places:
    """Offset of each event's record, and the number of its topic."""
    number = {name: i for i, name in enumerate(topics)}
    return (
        np.array([r.offset for r in decoded.records], np.int64),
        np.array([number.get(r.topic, 0) for r in decoded.records], np.uint8),
    )


def tell(batch: Batch) -> Told:
    """Every alarm of the batch as an alert, or as one that is suppressed; alarms of surges among them."""
    advanced, decoded = batch.advanced, batch.decoded
    rows = _rows(batch)
    told = Told(evidence=rows, pending=batch.groups.suppressed)
    later = _RowsByUser(rows)
    shares: dict[int, dict[str, float]] = {}
    since: dict[int, Rows] = {}
    for event in advanced.alarmed.event_E.tolist():
        key = int(decoded.user_key_B[event])
        since[event] = batch.suspects.since_onset(key, later.up_to(key, int(advanced.age_B[event])))
        shares[event], surging = shares_of(since[event])
        if surging and shares[event]["user"] < OWN_SHARE_MIN:
            del shares[event]
    found = {
        reason.event: reason
        for reason in reasons(advanced, decoded.columns, batch.groups, batch.settings, since)
        if reason.event in shares
    }
    surges = {surge.event: surge for surge in advanced.surges}
    following = Following(batch.groups, decoded, advanced, batch.settings, batch.where)
    moments = {e: row for row, e in enumerate(advanced.before.event_E.tolist()) if batch.moment_B[e]}
    for event in sorted({*advanced.alarmed.event_E.tolist(), *surges, *moments}):
        if event in moments:
            following.moment(event, moments[event])
        if event in found and following.hurried(event):
            told.suppressed += 1
            advanced.tallies.alarms_G[int(np.searchsorted(AGE_EDGES, advanced.age_B[event], side="right"))] -= 1
        elif event in found:
            alert = _user_alert(batch, found[event], shares[event], following)
            told.notices += alert.tier == out.NOTICE
            told.outputs.append(_output(batch, event, alert))
        elif event in since:
            told.suppressed += 1
            told.pending += 1
            group = int(np.searchsorted(AGE_EDGES, advanced.age_B[event], side="right"))
            advanced.tallies.alarms_G[group] -= 1
        if event in surges:
            if batch.partition == SPEAKER:
                alert = _surge_alert(batch, surges[event], told.pending)
                told.outputs.append(Output(stream="alerts", key=None, value=out.encode(alert)))
            told.pending = 0
    told.alerts = len(told.outputs)
    done = following.done()
    told.outputs += verdict_outputs(done, decoded, batch.partition, batch.topics)
    told.followup, told.judged = batch.groups.followup.delta(done), judged_by_age(done)
    told.started_keys = following.started_keys()
    return told


class _RowsByUser:
    """Rows of a batch, to be found by user."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def up_to(self, key: int, age: int) -> Rows:
        mine = self._rows[self._rows["key"] == key]
        before: Rows = mine[mine["age"] <= age]
        return before


def _rows(batch: Batch) -> Rows:
    place_B, topic_B = batch.where
    return rows_of(batch.advanced, batch.decoded.columns, batch.decoded.user_key_B, place_B, topic_B.astype(np.int64))


def _user_alert(batch: Batch, reason: Reason, shares: dict[str, float], following: Following) -> out.ShiftAlert:
    b, name, decoded = reason.event, batch.name, batch.decoded
    user, source = decoded.users[b], decoded.source(b)
    rate = batch.groups.rate()
    confidence = _confidence(reason, batch.groups)
    identity = f"{source.topic}/{source.partition}/{source.offset}"
    return out.ShiftAlert(
        id=identity,
        alert_id=identity,
        user=user,
        source=source,
        scope="user",
        shares=shares,
        detected_at_ms=int(decoded.columns.time_ms[b]),
        onset_ms=reason.onset_ms,
        onset_events=reason.onset_events,
        severity=round(reason.severity, _ROUND),
        confidence=round(confidence, 3),
        **following.alert(b, reason.severity, confidence, batch.allowed),
        kind=reason.kind,
        gained=[out.Contribution(name(i), c) for i, c in reason.gained],
        lost=[out.Contribution(name(i), c) for i, c in reason.lost],
        evidence=[_evidence(batch, e) for e in reason.evidence],
        before=[out.Candidate(name(i), round(p, 4)) for i, p in reason.before],
        after=[out.Candidate(name(i), round(p, 4)) for i, p in reason.after],
        forecast=batch.forecast.get(b, []),
        threshold=round(reason.threshold, 3),
        evidence_sum=round(reason.evidence_sum, 3),
        calibrated=rate.calibrated,
        false_alarm_events=round(rate.requested, 1),
        measured_false_alarm_events=_rounded(rate.measured),
        measured_interval=[_rounded(end) for end in rate.interval],
        measured_alarms=rate.alarms,
        weights_version=batch.weights_version,
        sentence=reason.sentence(name),
        dedup_key=f"{user}/{reason.onset_ms}",
    )


def _confidence(reason: Reason, groups: GroupTable) -> float:
    """Log10 of the events between such alarms without a shift: by the calibrated rate and tail where there are some."""
    rate = groups.rate()
    if not rate.calibrated:
        return reason.confidence
    above = groups.rule.tail * (reason.evidence_sum - reason.threshold)
    return math.log10(rate.requested) + max(0.0, above) / math.log(10.0)


def _evidence(batch: Batch, said: tuple[int, int, float, int, tuple[int, int] | None]) -> out.Evidence:
    interest, time_ms, ratio, ago, where = said
    event_id = None if where is None else f"{batch.topics[where[0]]}/{batch.partition}/{where[1]}"
    return out.Evidence(
        interest=batch.name(interest), time_ms=time_ms, ratio=round(ratio, 3), events_ago=ago, event_id=event_id
    )


def _surge_alert(batch: Batch, surge: Surge, suppressed: int) -> out.ShiftAlert:
    """An alert on all users or on a segment: what surges, against everything else."""
    b, name, decoded = surge.event, batch.name, batch.decoded
    source, time_ms = decoded.source(b), int(decoded.columns.time_ms[b])
    scope = "segment" if surge.segment else "all"
    before = {surge.interest: surge.usual, 0: 1.0 - surge.usual}
    after = {surge.interest: surge.now, 0: 1.0 - surge.now}
    parts = divergence_parts(before, after)
    segment = decoded.segments[b] or "" if surge.segment else ""
    who = f"Users of segment {segment}" if segment else "Users of all segments"
    identity = f"{source.topic}/{source.partition}/{source.offset}"
    return out.ShiftAlert(
        id=f"{identity}/{scope}",
        alert_id=f"{identity}/{scope}",
        user="",
        segment=segment,
        source=source,
        scope=scope,
        shares={"user": 0.0, "segment": float(scope == "segment"), "all": float(scope == "all")},
        detected_at_ms=time_ms,
        onset_ms=surge.since_ms,
        onset_events=surge.since,
        severity=round(sum(parts.values()), _ROUND),
        confidence=round(
            (surge.score - surge.bar) / math.log(10.0) + math.log10(batch.settings.surge_false_alarm_events), 3
        ),
        kind="abrupt",
        gained=[out.Contribution(name(surge.interest), parts[surge.interest])],
        lost=[out.Contribution(name(0), parts[0])],
        before=[out.Candidate(name(surge.interest), round(surge.usual, 6))],
        after=[out.Candidate(name(surge.interest), round(surge.now, 6))],
        threshold=round(surge.bar, 3),
        evidence_sum=round(surge.score, 3),
        calibrated=False,
        false_alarm_events=batch.settings.surge_false_alarm_events,
        weights_version=batch.weights_version,
        sentence=f"{who} suddenly turn to {name(surge.interest)}: {surge.adoptions} users came to it for the first "
        f"time among the last {surge.since} such steps, {surge.now / surge.usual:.0f} times as often as usual.",
        dedup_key=f"{scope}/{segment}/{name(surge.interest)}/{day_of(surge.since_ms)}",
        suppressed_count=suppressed,
    )


def _output(batch: Batch, event: int, alert: out.ShiftAlert) -> Output:
    return Output(stream="alerts", key=batch.decoded.users[event].encode(), value=out.encode(alert))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
