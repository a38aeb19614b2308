"""The numbers that the GRU sees of an event, beside its interest, item and type.

On the way of an event: between the walk over the records and the GRU. Prices, dwell times and ratings are standardised
by what the learner has seen of them, and clipped. A missing number is 0 with a mask of 0, a known one has a mask of 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.features import F32, EventColumns
from models.profile import AGGREGATE_COUNT, AGGREGATES

F64 = npt.NDArray[np.float64]

_MEASURES = 3  # price, dwell, rating
_CLIP = 4.0  # standard deviations
_DAY_S = 86_400.0
_WEEK_S = 7 * _DAY_S
_YEAR_S = 365.2425 * _DAY_S
NUMBER_COUNT = 2 + 6 + 2 * _MEASURES + 2 + 2 * AGGREGATE_COUNT


@dataclass(frozen=True, kw_only=True, slots=True)
class Normaliser:
    """Mean and variance of log price, log dwell and rating, as decayed sums: count, sum, sum of squares."""

    sums_3M: F64

    @staticmethod
    def initial() -> Normaliser:
        return Normaliser(sums_3M=np.zeros((3, _MEASURES)))

    def with_events(self, events: EventColumns, half_life_events: float) -> Normaliser:
        """Counting these events too; what was counted before weighs less."""
        x_BM = _measures(events).astype(np.float64)
        known_BM = np.isfinite(x_BM)
        x_BM = np.where(known_BM, x_BM, 0.0)
        decay = 0.5 ** (len(events) / half_life_events)
        return Normaliser(sums_3M=self.sums_3M * decay + np.stack([known_BM.sum(0), x_BM.sum(0), (x_BM * x_BM).sum(0)]))

    def scaled(self, x_BM: F32) -> F32:
        """Standardised and clipped; NaN stays NaN. Before anything was counted: as it is, clipped."""
        count, total, squares = self.sums_3M
        mean = np.divide(total, count, out=np.zeros(_MEASURES), where=count > 0)
        variance = np.divide(squares, count, out=np.ones(_MEASURES), where=count > 0) - mean * mean
        scale = np.sqrt(np.where(count > 1, np.maximum(variance, 1e-4), 1.0))
        scaled: F32 = np.clip((x_BM - mean) / scale, -_CLIP, _CLIP).astype(np.float32)
        return scaled


def _measures(events: EventColumns) -> F32:
    return np.stack(
        [np.log1p(np.maximum(events.price, 0)), np.log1p(np.maximum(events.dwell_s, 0)), events.rating], axis=1
    ).astype(np.float32)


def event_numbers(events: EventColumns, gap_s_B: F32, aggregates_BA: F32, normaliser: Normaliser) -> F32:
    """(B, NUMBER_COUNT): what is known of each event, roughly within -2..2.

    Args:
        gap_s_B: seconds since the user's event before; NaN for the first.
        aggregates_BA: of the record before the event; NaN where unknown.
    """
    number_BN = np.zeros((len(events), NUMBER_COUNT), np.float32)
    number_BN[:, 0] = np.log1p(np.maximum(np.nan_to_num(gap_s_B), 0)) / 8.0
    number_BN[:, 1] = np.isfinite(gap_s_B)
    time_s = events.time_ms / 1000.0
    for i, period_s in enumerate((_DAY_S, _WEEK_S, _YEAR_S)):
        angle = (time_s % period_s) * (2 * np.pi / period_s)
        number_BN[:, 2 + 2 * i] = np.sin(angle)
        number_BN[:, 3 + 2 * i] = np.cos(angle)
    at = 8
    _masked(number_BN, at, normaliser.scaled(_measures(events)))
    at += 2 * _MEASURES
    _masked(number_BN, at, events.sentiment[:, None])
    at += 2
    _masked(number_BN, at, _aggregates(aggregates_BA, normaliser))
    return number_BN


def _masked(number_BN: F32, at: int, value_BM: F32) -> None:
    width = value_BM.shape[1]
    known = np.isfinite(value_BM)
    number_BN[:, at : at + width] = np.where(known, value_BM, 0.0)
    number_BN[:, at + width : at + 2 * width] = known


def _aggregates(aggregates_BA: F32, normaliser: Normaliser) -> F32:
    """Scaled like the events: counts and times by fixed numbers, means by the normaliser."""
    scaled = aggregates_BA.copy()
    means = np.full((len(scaled), _MEASURES), np.nan, np.float32)
    dwell, price = AGGREGATES.index("log_dwell"), AGGREGATES.index("log_price")
    means[:, 0], means[:, 1] = scaled[:, price], scaled[:, dwell]
    means = normaliser.scaled(means)
    scaled[:, price], scaled[:, dwell] = means[:, 0], means[:, 1]
    scaled[:, AGGREGATES.index("log_events")] /= 4.0
    scaled[:, AGGREGATES.index("log_since_purchase")] /= 8.0
    return scaled
