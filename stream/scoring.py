"""Alerts against planted shifts: which were found, how fast, and which alerts were false.

Beside the way of an event: pure arithmetic for demo.py. The policy, stated once:

- A planted shift is FOUND by the first alert about its user from the shift's start until FOUND_WITHIN_EVENTS events of
  that user after the shift is complete (a gradual one takes several visits), or until the user's next planted shift.
- A second alert within the same span is REPEATED: neither found nor false.
- Every other alert about a user is FALSE. Alerts about a segment or about all are counted apart.
- BY CHANCE: the share that as many alerts would find if they were strewn over all events at random. A detector must
  be well above it; with many alerts chance finds much.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from stream.records import ShiftAlert
from stream.truth import PlantedShift

FOUND_WITHIN_EVENTS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class ShiftOutcome:
    """What became of one planted shift.

    Attributes:
        alert: the one that found it; None when it was missed.
        delay_events: the user's events from the shift's first one to the alert's, both counted.
        window_events: how many events the alert could have had.
        gained_hits: how many of the alert's first three gained interests are planted ones.
    """

    shift: PlantedShift
    alert: ShiftAlert | None
    delay_events: int | None
    window_events: int
    gained_hits: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AlertScore:
    """All alerts against all planted shifts.

    Attributes:
        false, repeated, wider: alerts without a shift, second alerts on one, alerts about a segment or all.
        by_chance: share of the shifts that as many random alerts would find.
        events: all events that were watched.
    """

    outcomes: list[ShiftOutcome]
    false: list[ShiftAlert]
    repeated: list[ShiftAlert]
    wider: list[ShiftAlert]
    by_chance: float
    events: int

    @property
    def found(self) -> list[ShiftOutcome]:
        return [outcome for outcome in self.outcomes if outcome.alert is not None]

    @property
    def missed(self) -> list[ShiftOutcome]:
        return [outcome for outcome in self.outcomes if outcome.alert is None]

    @property
    def events_per_false(self) -> float:
        """Watched events per false alert; infinite without any."""
        return self.events / len(self.false) if self.false else math.inf

    def of_kind(self, kind: str) -> list[ShiftOutcome]:
        """The outcomes of the abrupt, gradual or returning ones."""
        return [outcome for outcome in self.outcomes if outcome.shift.kind == kind]


def median_delay(outcomes: Sequence[ShiftOutcome]) -> float:
    """Events, over ALL of these shifts: a missed one counts as infinitely late, so that missing does not pay."""
    delays = [math.inf if o.delay_events is None else float(o.delay_events) for o in outcomes]
    return median(delays) if delays else math.nan


def match_alerts(
    shifts: Sequence[PlantedShift], alerts: Sequence[ShiftAlert], times_ms: Mapping[str, Sequence[int]], events: int
) -> AlertScore:
    """Match alerts to planted shifts by the policy above.

    Args:
        times_ms: event times, ascending, of every user with a shift.
        events: how many events of all users were watched.
    """
    of_user: dict[str, list[ShiftAlert]] = {}
    wider = [alert for alert in alerts if alert.scope != "user"]
    for alert in sorted(alerts, key=lambda a: (a.detected_at_ms, a.source.partition, a.source.offset)):
        if alert.scope == "user":
            of_user.setdefault(alert.user, []).append(alert)
    next_ms = _next_shifts(shifts)
    outcomes: list[ShiftOutcome] = []
    repeated: list[ShiftAlert] = []
    claimed: set[str] = set()
    for shift in shifts:
        times = times_ms.get(shift.user, ())
        first = bisect_left(times, shift.time_ms)
        last = min(
            bisect_left(times, shift.until_ms) + FOUND_WITHIN_EVENTS,
            bisect_left(times, next_ms[shift.user, shift.time_ms]),
            len(times),
        )
        until_ms = times[last - 1] if last > first else shift.time_ms - 1
        inside = [
            candidate
            for candidate in of_user.get(shift.user, ())
            if shift.time_ms <= candidate.detected_at_ms <= until_ms and candidate.id not in claimed
        ]
        claimed.update(alert.id for alert in inside)
        repeated.extend(inside[1:])
        first_alert = inside[0] if inside else None
        outcomes.append(
            ShiftOutcome(
                shift=shift,
                alert=first_alert,
                delay_events=bisect_right(times, first_alert.detected_at_ms) - first if first_alert else None,
                window_events=last - first,
                gained_hits=_hits(first_alert, shift),
            )
        )
    own = [alert for alerts_of in of_user.values() for alert in alerts_of]
    return AlertScore(
        outcomes=outcomes,
        false=[alert for alert in own if alert.id not in claimed],
        repeated=repeated,
        wider=wider,
        by_chance=_by_chance(outcomes, len(own), events),
        events=events,
    )


def _hits(alert: ShiftAlert | None, shift: PlantedShift) -> int:
    return sum(gained.interest in shift.after for gained in alert.gained[:3]) if alert else 0


def _next_shifts(shifts: Sequence[PlantedShift]) -> dict[tuple[str, int], float]:
    """Start of the same user's next planted shift, by user and start; infinite for the last."""
    by_user: dict[str, list[int]] = {}
    for shift in sorted(shifts, key=lambda s: s.time_ms):
        by_user.setdefault(shift.user, []).append(shift.time_ms)
    return {
        (user, start): following
        for user, starts in by_user.items()
        for start, following in zip(starts, [*starts[1:], math.inf], strict=True)
    }


def _by_chance(outcomes: Sequence[ShiftOutcome], alerts: int, events: int) -> float:
    if not outcomes or not events:
        return 0.0
    rate = alerts / events
    return sum(1 - math.exp(-rate * outcome.window_events) for outcome in outcomes) / len(outcomes)
