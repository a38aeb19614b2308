"""The rule by which the detector turns a unit of evidence into nats, and the evidence that an alarm takes.

On the way of an event: frozen in a partition's group table within an epoch; made by models/shift_calibration.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from models.walk import AGE_EDGES, FEATURE_COUNT

AGES = len(AGE_EDGES) + 1
UNIT_ENDLESS = 255
KEPT_SHARE = 0.4
SPREADS_ENDLESS = 1e9


class Rule(Struct, frozen=True, kw_only=True):
    """One detector.

    Attributes:
        name: event, session (the fixed rules), or learned-event, learned-session.
        by_session: the unit of evidence: a session, or one event.
        short_share: share of the user's last events in what a shifted user is expected to do.
        kappa: events' worth of the segment's shares mixed into a user's slow profile.
        usual_guarded: the user's level and spread do not learn while evidence builds.
        rise_scale: of a second statistic, the rise of the events' ratios above the user's own mean: evidence is the
            larger one of the first and so many times the second. 0: there is none.
        unit_events: a session is a unit of its own after so many events, up to 16; more: never.
        half_life_events: an event counts half in the slow profile after so many newer ones.
        kept_share: how much the slow profile of before an alarm weighs after it.
        hold_share: the slow profile does not learn while evidence is above this share of the threshold.
        hold_spreads: nor from a unit that lies further above the user's level, in the user's own spreads; what was held
            back enters it after the first usual unit.
        drift: taken from the log-likelihood ratio of every distinct interest, nats.
        coefficients: of the unit's features (models/walk.py), then the constant; a fixed rule takes the first as it is.
            A rule of a time with fewer features, which were the first ones, has as many.
        thresholds: evidence that an alarm takes, by age of the user.
        tail: how fast alarms get rarer with the threshold: log rate per nat, > 0.
        false_alarm_events: requested events between alarms; 0 = the thresholds are not calibrated.
    """

    name: str
    by_session: bool
    short_share: float
    kappa: float
    drift: float
    usual_guarded: bool = False
    rise_scale: float = 0.0
    unit_events: int = UNIT_ENDLESS
    half_life_events: float = 100.0
    kept_share: float = KEPT_SHARE
    hold_share: float = 0.15
    hold_spreads: float = SPREADS_ENDLESS
    coefficients: tuple[float, ...]
    thresholds: tuple[float, ...]
    tail: float = 1.0
    false_alarm_events: float = 0.0

    def coefficients_F(self) -> npt.NDArray[np.float64]:
        """Of all features there are, then the constant."""
        missing = (0.0,) * (FEATURE_COUNT + 1 - len(self.coefficients))
        return np.array((*self.coefficients[:-1], *missing, self.coefficients[-1]))

    def thresholds_G(self) -> npt.NDArray[np.float64]:
        return np.array(self.thresholds)


def fixed_rule(
    *,
    by_session: bool,
    threshold: float,
    drift: float,
    kappa: float = 8.0,
    short_share: float = 0.0,
    unit_events: int = UNIT_ENDLESS,
    half_life_events: float = 100.0,
    hold_share: float = 0.15,
) -> Rule:
    """The rule that nothing was learned for: the summed ratio over the square root of the number of interests."""
    return Rule(
        name="session" if by_session else "event",
        by_session=by_session,
        short_share=short_share,
        kappa=kappa,
        drift=drift,
        coefficients=(1.0,) + (0.0,) * FEATURE_COUNT,
        thresholds=(threshold,) * AGES,
        unit_events=unit_events,
        half_life_events=float(half_life_events),  # a whole number would be other bytes in a snapshot
        hold_share=float(hold_share),
    )
