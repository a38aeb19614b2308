"""How often alarms were asked for, and how often they come: two numbers that stand side by side in every alert.

On the way of an event: part of a partition's group table. Counted are the events at which an alarm could have come and
the alarms, of all users of the partition, since the rule in force was made and up to the last epoch cut: none of these
events took part in making the rule. Real shifts are among the alarms, so the true rate of false ones is lower.
"""

from __future__ import annotations

import math

from msgspec import Struct

_Z = 1.959964  # of a two-sided interval of 95 %
_DAY_MS = 86_400_000.0
_RATE_HALF_LIFE_DAYS = 7.0
_DAYS_MIN = 0.02  # half an hour of event time: before that a rate says nothing
WANTED_MIN = 20.0  # events between alarms: no rule can be matched to less


def poisson_interval(count: int) -> tuple[float, float]:
    """Interval of 95 % of a Poisson mean of which `count` was seen.

    Source: Byar's approximation (Breslow and Day 1987), within 1 % of the exact interval.

    Example:
        >>> [round(end, 1) for end in poisson_interval(10)]
        [4.8, 18.4]
    """
    low = 0.0
    if count:
        low = count * (1.0 - 1.0 / (9.0 * count) - _Z / (3.0 * math.sqrt(count))) ** 3
    above = count + 1
    return max(0.0, low), above * (1.0 - 1.0 / (9.0 * above) + _Z / (3.0 * math.sqrt(above))) ** 3


class AlarmRate(Struct, frozen=True, kw_only=True):
    """Requested and measured events between two alarms.

    Attributes:
        requested: what the settings ask for, or what `alerts_per_day` comes to.
        calibrated: whether the thresholds in force were made for it; else they are the setting `threshold`.
        monitored, alarms: counted since the rule in force was made.
    """

    requested: float
    calibrated: bool
    monitored: int
    alarms: int

    @property
    def measured(self) -> float | None:
        """Monitored events for each alarm; None before the first one."""
        return self.monitored / self.alarms if self.alarms else None

    @property
    def interval(self) -> tuple[float, float | None]:
        """Interval of 95 % of the events between alarms; no upper end before the first alarm."""
        few, many = poisson_interval(self.alarms)
        return self.monitored / many, self.monitored / few if few else None


class Traffic(Struct, frozen=True, kw_only=True):
    """How many monitored events come in a day of event time; older days count less.

    Attributes:
        newest_ms: newest event time up to the last cut; 0 = none.
        days, monitored: event time passed and monitored events in it, both decayed.
    """

    newest_ms: int = 0
    days: float = 0.0
    monitored: float = 0.0

    def after(self, started_ms: int, newest_ms: int, monitored: int) -> Traffic:
        """With one more epoch."""
        since_ms = self.newest_ms or started_ms
        days = max(0, newest_ms - since_ms) / _DAY_MS
        kept = 0.5 ** (days / _RATE_HALF_LIFE_DAYS)
        return Traffic(
            newest_ms=max(self.newest_ms, newest_ms),
            days=self.days * kept + days,
            monitored=self.monitored * kept + monitored,
        )

    def wanted(self, alerts_per_day: float, otherwise: float) -> float:
        """Events between alarms that come to so many alarms a day; `otherwise` while the traffic is not known."""
        if not alerts_per_day or self.days < _DAYS_MIN or not self.monitored:
            return otherwise
        return max(WANTED_MIN, self.monitored / self.days / alerts_per_day)
