"""Which alerts people should see: a score for each, and the best of a day without knowing the rest of it.

On the way of an event: beside the alerts. The score is severity x confidence x value, where the value is what the user
is worth (purchases and prices) times the chance that the alert holds, learned from the verdicts on earlier ones
(models/confirmation.py). A daily budget takes an alert when fewer better ones are expected in the rest of the day than
are left in it; what is expected is what the last days brought, by score and by hour. Days are of event time.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from models.confirmation import ALERT, FEATURE_COUNT, FEATURES

F64 = npt.NDArray[np.float64]

DAY_MS = 86_400_000
_HOURS = 24
_KEPT = 0.8  # of what is known of a day when one more is over
_DAYS_MAX = 60  # days without an alert that are told apart
_BINS = 160
_BIN_ZERO = 80
_PER_DOUBLING = 8  # bins of the score
_RIDGE = 2.0
_LEARNED = ("foretold", "log_since", "is_alert")  # the features that the chance is learned from: docs/decisions.md
_STEPS = 12  # of Newton's method
_ALERTS_MIN = 20  # verdicts on alerts before anything is learned


class AlertSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which alerts are for people."""

    daily_budget: Annotated[
        int,
        Meta(
            description="alerts on users for people in a day of event time, over all partitions: the best by severity "
            "x confidence x value; the others come as notices (tier); 0 = all are for people",
            ge=0,
            le=1_000_000_000,
        ),
    ] = 0


def worth_of(purchases: float, log_price: float) -> float:
    """What a user is worth, from 1 on: one more for each tenfold of what was spent.

    Args:
        log_price: mean log(1 + price) of the user's events; NaN: prices are not known, a purchase counts 1.
    """
    price = 1.0 if math.isnan(log_price) else math.expm1(log_price)
    return 1.0 + math.log10(1.0 + max(0.0, purchases) * max(0.0, price))


# ---------------------------------------------------------------------- the chance that an alert holds


def promise_of(coefficients: tuple[float, ...], features: Any) -> float:
    """Chance that the next events confirm an alert, 0..1; 1/2 while nothing is learned."""
    logit = coefficients[-1] + sum(c * float(f) for c, f in zip(coefficients, features, strict=False))
    return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, logit))))


def nothing_learned() -> tuple[float, ...]:
    return (0.0,) * (FEATURE_COUNT + 1)


def learned(verdicts: Any) -> tuple[float, ...]:
    """Coefficients of a ridge logistic regression on verdicts (alerts and moments); nothing while they are few."""
    if int((verdicts["kind"] == ALERT).sum()) < _ALERTS_MIN:
        return nothing_learned()
    chosen = [FEATURES.index(name) for name in _LEARNED]
    x = np.concatenate([verdicts["features"][:, chosen].astype(np.float64), np.ones((len(verdicts), 1))], axis=1)
    y = verdicts["confirmed"].astype(np.float64)
    ridge = np.full(x.shape[1], _RIDGE)
    ridge[-1] = 0.1
    w: F64 = np.zeros(x.shape[1])
    for _ in range(_STEPS):
        p = 1.0 / (1.0 + np.exp(-np.clip(x @ w, -30.0, 30.0)))
        slope = x.T @ (y - p) - ridge * w
        curve = (x * (p * (1.0 - p))[:, None]).T @ x + np.diag(ridge)
        w = w + np.linalg.solve(curve, slope)
    coefficients = np.zeros(FEATURE_COUNT + 1)
    coefficients[[*chosen, -1]] = w
    return tuple(round(float(c), 9) for c in coefficients)


# ---------------------------------------------------------------------- the best of a day


def allowance(day: int, partition: int, partitions: int, budget: int) -> int:
    """What of a daily budget falls to a partition on a day; all partitions together have exactly the budget.

    Source: Hermite's identity.

    Example:
        >>> [sum(allowance(day, p, 4, 10) for p in range(4)) for day in (0, 20_000)], allowance(3, 0, 1, 7)
        ([10, 10], 7)
    """
    return ((day + 1) * budget + partition) // partitions - (day * budget + partition) // partitions


class Budget(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A partition's day so far, and the days before.

    Attributes:
        day: of event time, since 1970; it never goes back. -1: none yet.
        newest_ms: newest event time of an alert.
        taken: alerts of the day that went to people.
        today, today_hours: alerts of the day by bin of their score, and by hour.
        past, past_hours, past_days: the same of the days before, older ones count less.
    """

    day: int = -1
    newest_ms: int = 0
    taken: int = 0
    today: dict[int, int] = {}
    today_hours: dict[int, int] = {}
    past: dict[int, float] = {}
    past_hours: dict[int, float] = {}
    past_days: float = 0.0

    def offered(self, score: float, time_ms: int, allowed: Any) -> tuple[bool, Budget]:
        """Whether an alert is taken, and the budget after it.

        Args:
            allowed: gives how many may be taken on a day.
        """
        now = self._on(time_ms)
        bin_ = _bin(score)
        taken = now.taken + now._better_expected(bin_) < allowed(now.day)
        hour = now.newest_ms % DAY_MS * _HOURS // DAY_MS
        return taken, msgspec.structs.replace(
            now,
            taken=now.taken + taken,
            today=_with(now.today, bin_),
            today_hours=_with(now.today_hours, hour),
        )

    def _on(self, time_ms: int) -> Budget:
        """The budget at a time: a new day where one has begun."""
        day, newest_ms = time_ms // DAY_MS, max(self.newest_ms, time_ms)
        if day <= self.day:
            return msgspec.structs.replace(self, newest_ms=newest_ms)
        if self.day < 0:
            return Budget(day=day, newest_ms=newest_ms)
        past, hours, days = _aged(self.past, self.today), _aged(self.past_hours, self.today_hours), self.past_days
        days = days * _KEPT + 1.0
        for _ in range(min(_DAYS_MAX, day - self.day - 1)):
            past, hours, days = _aged(past, {}), _aged(hours, {}), days * _KEPT + 1.0
        return Budget(day=day, newest_ms=newest_ms, past=past, past_hours=hours, past_days=days)

    def _better_expected(self, bin_: int) -> float:
        """How many alerts of a higher score are still to come today."""
        passed = (self.newest_ms - self.day * DAY_MS) / DAY_MS
        count = sum(self.today.values())
        if self.past_days > 0.0:
            to_come = sum(self.past.values()) / self.past_days * self._left_of_day()
        else:
            to_come = (count + 1) / max(passed, 1.0 / _HOURS) * (1.0 - passed)
        known = {b: self.past.get(b, 0.0) + self.today.get(b, 0) for b in {**self.past, **self.today}}
        better = sum(n for b, n in known.items() if b > bin_) + 0.5 * known.get(bin_, 0.0)
        return to_come * (better + 0.5) / (sum(known.values()) + 1.0)

    def _left_of_day(self) -> float:
        """Share of a day's alerts that come in what is left of it, by the hours of the days before."""
        of_day = self.newest_ms - self.day * DAY_MS
        total = sum(self.past_hours.values()) + _HOURS
        left = 0.0
        for hour in range(_HOURS):
            begins = hour * DAY_MS // _HOURS
            part = min(1.0, max(0.0, (begins + DAY_MS // _HOURS - of_day) / (DAY_MS / _HOURS)))
            left += part * (self.past_hours.get(hour, 0.0) + 1.0) / total
        return left


def _bin(score: float) -> int:
    return min(_BINS - 1, max(0, math.floor(_PER_DOUBLING * math.log2(max(score, 1e-9))) + _BIN_ZERO))


def _with(counts: dict[int, int], key: int) -> dict[int, int]:
    return dict(sorted({**counts, key: counts.get(key, 0) + 1}.items()))


def _aged(past: dict[int, float], today: dict[int, int]) -> dict[int, float]:
    """One day later; what has all but gone is left out."""
    kept = {b: past.get(b, 0.0) * _KEPT + today.get(b, 0) for b in sorted({**past, **today})}
    return {b: n for b, n in kept.items() if n >= 1e-3}
