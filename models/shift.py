"""Interest shifts: the settings of the detector, and why an alarm fired.

On the way of an event: the detector itself is a few lines of the compiled walk in models/profile.py; here is what a
person can set, and what turns an alarm into an alert that says what was lost, what was gained and how sure that is.
What the detector knows across users is in models/shift_groups.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from msgspec import Meta, Struct

from models.shift_groups import GroupTable
from models.suspicion import EVIDENCE

if TYPE_CHECKING:
    from models.features import EventColumns
    from models.profile import Advanced, Snapshot
    from models.suspicion import Rows

__all__ = ["GroupTable", "Reason", "ShiftSettings", "reasons"]

Said = tuple[int, int, float, int, tuple[int, int] | None]
_NAMED = 5  # interests named in each list of an alert
_KNOWN_SHARE = 0.02  # of the slow profile: an interest with less is not what the user usually does


class ShiftSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The detector of interest shifts."""

    evidence: Annotated[
        Literal["auto", "session", "event"],
        Meta(
            description="unit of evidence: session (clicks), event (baskets), auto = decided by looking at the stream"
        ),
    ] = "auto"
    session_gap_s: Annotated[
        float, Meta(description="a pause longer than this ends a visit, seconds", gt=0, le=864_000)
    ] = 1_800.0
    statistic: Annotated[
        Literal["auto", "fixed", "learned"],
        Meta(
            description="what a unit of evidence is worth: fixed rule, learned log-likelihood ratio; auto = learned "
            "where it does better on users of this stream"
        ),
    ] = "auto"
    false_alarm_events: Annotated[
        float,
        Meta(description="requested monitored events between two false alarms; thresholds follow from it", ge=20),
    ] = 1_000.0
    alerts_per_day: Annotated[
        float,
        Meta(
            description="alarms wanted in a day of event time, over all partitions; takes the place of "
            "false_alarm_events once the traffic is known; 0 = off",
            ge=0,
        ),
    ] = 0.0
    surge_false_alarm_events: Annotated[
        float,
        Meta(
            description="requested adoptions (a user comes to an interest that is new to it) between two false alarms "
            "of an interest that surges for all or for a segment",
            ge=1_000,
        ),
    ] = 1_000_000.0
    threshold: Annotated[
        float, Meta(description="evidence that an alarm takes where nothing is calibrated yet, nats", gt=0)
    ] = 7.0
    age_min_events: Annotated[
        int, Meta(description="no evidence is gathered before a user has this many events", ge=1, le=60_000)
    ] = 25
    refractory_events: Annotated[
        int, Meta(description="events of the user after an alarm before evidence is gathered again", ge=0, le=30_000)
    ] = 50
    slow_half_life_events: Annotated[
        float, Meta(description="an event counts half in the slow profile after this many newer ones", ge=4, le=2_000)
    ] = 100.0
    profile_interests: Annotated[
        int,
        Meta(
            description="interests that a slow profile holds; more make each record 6 bytes longer and cost speed, and "
            "pay where users have long histories of many interests (128 for command logs); 0 = 32, and "
            "evaluate-shifts takes 128 where half of the users have more than 1,000 events",
            ge=0,
            le=512,
        ),
    ] = 0
    kappa: Annotated[
        float, Meta(description="events' worth of the segment's shares mixed into a user's slow profile", gt=0)
    ] = 8.0
    epsilon: Annotated[
        float, Meta(description="share of everybody's shares in the usual user's probabilities, 0..1", gt=0, lt=1)
    ] = 0.01
    ratio_clip: Annotated[
        float, Meta(description="one event's log-likelihood ratio is clipped to plus and minus this, nats", gt=0, le=20)
    ] = 4.0
    drift: Annotated[
        float, Meta(description="taken from every piece of evidence, so that it dies down by itself, nats", ge=0, le=4)
    ] = 0.25
    hold_share: Annotated[
        float,
        Meta(description="the slow profile does not learn while evidence is above this share of the threshold", gt=0),
    ] = 0.15
    population_half_life_events: Annotated[
        float, Meta(description="an event counts half in everybody's shares after this many of its partition", gt=0)
    ] = 200_000.0
    shadow_events_max: Annotated[
        int,
        Meta(description="events of shadow users (a hash share of all) that a partition keeps to calibrate by", ge=100),
    ] = 32_768
    shadow_user_events_max: Annotated[int, Meta(description="newest events kept of one shadow user", ge=50)] = 512
    group_interests_max: Annotated[
        int, Meta(description="interests (by segment) that a partition's group table keeps; the rarest go", ge=100)
    ] = 16_384


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """Why an alarm fired. Interests are keys; contributions of gained and lost add up to the severity.

    Attributes:
        event: index of the event in the batch.
        onset_ms, onset_events: estimated start of the shift; the user's events since then, this one included.
        severity: Jensen-Shannon divergence between the shares before and since the onset, base 2, 0..1.
        confidence: log10 of the expected events between such alarms without a shift, from the evidence.
        kind: abrupt, gradual or returning.
        gained, lost: interests with their part of the severity; key 0 stands for all that are not named.
        evidence: the events since the onset that speak loudest: interest, milliseconds, nats, events ago, and where
            it was read (number of the input topic, offset; None where that is not known any more).
        before, after: top interests with their shares.
    """

    event: int
    onset_ms: int
    onset_events: int
    severity: float
    confidence: float
    kind: str
    gained: list[tuple[int, float]]
    lost: list[tuple[int, float]]
    evidence: list[Said]
    before: list[tuple[int, float]]
    after: list[tuple[int, float]]
    threshold: float
    evidence_sum: float

    def sentence(self, name: Callable[[int], str]) -> str:
        """What happened, in words."""
        gained = " and ".join(name(key) for key, _ in self.gained[:2] if key)
        lost = " and ".join(name(key) for key, _ in self.lost[:2] if key)
        since, count = day_of(self.onset_ms), f"{self.onset_events} event{'s' if self.onset_events > 1 else ''}"
        then = f"; before that mostly {lost}" if lost else ""
        if self.kind == "gradual":
            return f"Turning step by step since {since} ({count}) to {gained or 'less of it all'}{then} (gradual)."
        back = "back at" if self.kind == "returning" else "mostly"
        return f"Since {since} ({count}) {back} {gained or 'less of it all'}{then} ({self.kind})."


def day_of(time_ms: int) -> str:
    """The day of an event time, in UTC."""
    try:
        return datetime.fromtimestamp(time_ms / 1_000, UTC).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):
        return f"{time_ms} ms"


def reasons(
    advanced: Advanced,
    events: EventColumns,
    groups: GroupTable,
    settings: ShiftSettings,
    since: Mapping[int, Rows] | None = None,
) -> list[Reason]:
    """The reason of every alarm of the batch, in the order of `advanced.alarmed`.

    Args:
        since: by event, the rows of evidence since the onset (models/suspicion.py); without them the ring must do.
    """
    none = np.zeros(0, EVIDENCE)
    rows = [(since or {}).get(event, none) for event in advanced.alarmed.event_E.tolist()]
    return [_reason(advanced, e, groups, settings, rows[e]) for e in range(len(advanced.alarmed))]


def _reason(advanced: Advanced, e: int, groups: GroupTable, settings: ShiftSettings, rows: Rows) -> Reason:
    alarmed = advanced.alarmed
    event = int(alarmed.event_E[e])
    onset_events = int(advanced.onset_events_B[event])
    in_ring = min(int(alarmed.events_E[e]), alarmed.ring_interest_ER.shape[1], max(1, onset_events))
    whole = len(rows) > in_ring or (len(rows) == in_ring and len(rows) > 0)
    since = rows["interest"] if whole else alarmed.ring_interest_ER[e, :in_ring]
    before = _slow_shares(alarmed, e)
    keys, counts = np.unique(since, return_counts=True)
    after = dict(zip(keys.tolist(), (counts / len(since)).tolist(), strict=True))
    parts = divergence_parts(before, after)
    severity = sum(parts.values())
    evidence_sum = float(advanced.evidence_B[event])
    return Reason(
        event=event,
        onset_ms=int(rows["time_ms"][0]) if whole else _time_ago(alarmed, e, in_ring - 1),
        onset_events=max(1, onset_events),
        severity=severity,
        confidence=evidence_sum / math.log(10.0),
        kind=_kind(before, after, onset_events),
        gained=_named({k: v for k, v in parts.items() if after.get(k, 0.0) >= before.get(k, 0.0)}),
        lost=_named({k: v for k, v in parts.items() if after.get(k, 0.0) < before.get(k, 0.0)}),
        evidence=_loudest_rows(rows) if whole else _loudest(alarmed, e, in_ring, groups, settings),
        before=_top(before),
        after=_top(after),
        threshold=float(advanced.threshold_B[event]),
        evidence_sum=evidence_sum,
    )


def _slow_shares(alarmed: Snapshot, e: int) -> dict[int, float]:
    used = alarmed.slow_interest_EP[e] > 0
    shares = alarmed.slow_share_EP[e][used].astype(np.float64)
    total = float(shares.sum()) or 1.0
    return dict(zip(alarmed.slow_interest_EP[e][used].tolist(), (shares / total).tolist(), strict=True))


def divergence_parts(before: Mapping[int, float], after: Mapping[int, float]) -> dict[int, float]:
    """Each interest's part of the Jensen-Shannon divergence; no part is negative."""
    parts = {}
    for key in sorted(before.keys() | after.keys()):
        p, q = before.get(key, 0.0), after.get(key, 0.0)
        middle = (p + q) / 2
        parts[key] = 0.5 * sum(x * math.log2(x / middle) for x in (p, q) if x > 0)
    return parts


def _named(parts: Mapping[int, float]) -> list[tuple[int, float]]:
    """The largest parts by name, the rest as key 0: they still add up."""
    ordered = sorted(parts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(part for _, part in ordered[_NAMED:])
    return ordered[:_NAMED] + ([(0, rest)] if rest > 0 else [])


def _top(shares: Mapping[int, float]) -> list[tuple[int, float]]:
    return sorted(shares.items(), key=lambda item: (-item[1], item[0]))[:_NAMED]


def _kind(before: Mapping[int, float], after: Mapping[int, float], onset_events: int) -> str:
    known = sum(share for key, share in after.items() if key in before)
    usual = sum(share for key, share in after.items() if before.get(key, 0.0) >= _KNOWN_SHARE)
    if known - usual > 0.5:
        return "returning"
    return "gradual" if onset_events > 20 and usual > 0.25 else "abrupt"


def _time_ago(alarmed: Snapshot, e: int, events_ago: int) -> int:
    """Event time of an event of the ring, from the gaps between."""
    gaps = alarmed.ring_gap_ER[e, :events_ago].astype(np.float64)
    return int(alarmed.last_time_ms_E[e]) - int(np.sum(np.exp2(gaps / 2_048.0) - 1.0) * 1_000)


def _loudest(alarmed: Snapshot, e: int, in_ring: int, groups: GroupTable, settings: ShiftSettings) -> list[Said]:
    """The events since the onset with the largest ratio against the slow profile as it was held."""
    since = np.ascontiguousarray(alarmed.ring_interest_ER[e, :in_ring])
    q_all, _ = groups.shares(since, np.zeros(in_ring, np.uint8))
    slow = dict(zip(alarmed.slow_interest_EP[e].tolist(), alarmed.slow_share_EP[e].tolist(), strict=True))
    n = float(alarmed.slow_total_E[e])
    weight = np.array([n * slow.get(k, 0.0) for k in since.tolist()])
    q0 = (1 - settings.epsilon) * (weight + settings.kappa * q_all) / (n + settings.kappa) + settings.epsilon * q_all
    ratio = np.clip(np.log(q_all / q0), -settings.ratio_clip, settings.ratio_clip)
    chosen: list[Any] = np.argsort(-ratio, kind="stable")[:_NAMED].tolist()
    return [(int(since[i]), _time_ago(alarmed, e, i), float(ratio[i]), i, None) for i in chosen]


def _loudest_rows(rows: Rows) -> list[Said]:
    """The same from the side table: what was said at the time."""
    chosen: list[int] = np.argsort(-rows["ratio"], kind="stable")[:_NAMED].tolist()
    last = int(rows["age"][-1])
    return [
        (
            int(rows["interest"][i]),
            int(rows["time_ms"][i]),
            float(rows["ratio"][i]),
            last - int(rows["age"][i]),
            (int(rows["topic"][i]), int(rows["place"][i])),
        )
        for i in chosen
    ]
