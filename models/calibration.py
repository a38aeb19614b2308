"""Probabilities that hold: a map over all probabilities of the next event, fitted on what came after forecasts.

On the way of an event: the learner learns the map from events that the network has not learned yet; the forecaster
applies it. Some streams need it: what is counted spreads widely where few follow few, and older events that are learned
again bring rare interests more often than they come.

    p'(i) = f(p(i)) / sum of f     f(p) = p up to the first knot, then p ** (1 + slope) from knot to knot, joined up

f rises everywhere, so no rank changes, and the sum stays what it was. The slopes are those of the greatest likelihood,
of an exponential family: at the best ones events reach as far into each band of probabilities as was promised. An event
whose interest nobody could name falls below all bands.

There is a map of the next event at a time not known, as forecasts are published, and one of it at a known time. Later
steps have none: see docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from models.features import F32, I64, U32
from models.vocabulary import I32

F64 = npt.NDArray[np.float64]

KNOTS = np.array([0.003, 0.01, 0.03, 0.1, 0.3, 0.8])
MAPS = 2  # of the next event at a time not known, and at a known time
_MEMORY = 700.0  # forecasts of a step after which an older one counts 1 / e
_PRIOR = 10.0  # how firmly slopes are held at 0, in squared logarithms
_LEAST = -0.9  # f rises
_SLOPE, _INFORMATION = "calibration.slope", "calibration.information"


class Calibration:
    """The maps.

    Attributes:
        slope_MK: of each map from each knot on, beside the 1 of a map that changes nothing.
        information_MKK: how much is known of them: the covariance of the bands, summed with what was forgotten.
    """

    def __init__(self, slope_MK: F64, information_MKK: F64) -> None:
        self.slope_MK, self.information_MKK = slope_MK, information_MKK

    @staticmethod
    def empty() -> Calibration:
        """Maps that change nothing."""
        knots = len(KNOTS)
        return Calibration(np.zeros((MAPS, knots)), np.tile(np.eye(knots) * _PRIOR, (MAPS, 1, 1)))

    @staticmethod
    def of(tensors: Mapping[str, npt.NDArray[Any]]) -> Calibration:
        """The maps that stand among the tensors of weights or of a checkpoint; they are copied."""
        return Calibration(tensors[_SLOPE].copy(), tensors[_INFORMATION].copy())

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Copies, as they stand among the tensors of weights."""
        return {_SLOPE: self.slope_MK.copy(), _INFORMATION: self.information_MKK.copy()}

    def copied(self) -> Calibration:
        """One that stays as it is while this one learns."""
        return Calibration(self.slope_MK.copy(), self.information_MKK.copy())

    def apply(self, general_EV: F32, copied_EC: F32, rest_E: F32, row_EC: I32, key_EC: U32, map_E: I64) -> None:
        """Put probabilities right in place.

        Args:
            general_EV, copied_EC, rest_E: as models/forecaster.py has them: the probability of a candidate is
                copied + rest * general of its row, of everything else rest * general.
            row_EC, key_EC: rows and keys of the candidates.
            map_E: the row of each one's map, see `map_of`.
        """
        kernel: Any = _apply
        kernel(general_EV, copied_EC, rest_E, row_EC, key_EC, KNOTS, self.slope_MK, map_E)

    def learn(
        self, general_EV: F32, copied_EC: F32, rest_E: F32, row_EC: I32, key_EC: U32,
        target_E: U32, target_row_E: I32, map_E: I64,
    ) -> None:  # fmt: skip
        """One step of Newton's method with forgetting, from forecasts whose events have come.

        Args:
            general_EV, copied_EC, rest_E, row_EC, key_EC, map_E: as in `apply`, before any map.
            target_E, target_row_E: the interests that came, and their rows, -1 where they have none.
        """
        kernel: Any = _moments
        gradient_MK, covariance_MKK, count_M = kernel(
            general_EV, copied_EC, rest_E, row_EC, key_EC, target_E, target_row_E, KNOTS, self.slope_MK, map_E
        )
        for m in np.flatnonzero(count_M).tolist():
            kept = np.exp(-count_M[m] / _MEMORY)
            prior = (1.0 - kept) * _PRIOR
            self.information_MKK[m] = kept * self.information_MKK[m] + covariance_MKK[m] + prior * np.eye(len(KNOTS))
            pull_K = gradient_MK[m] - prior * self.slope_MK[m]
            moved_K = self.slope_MK[m] + np.linalg.solve(self.information_MKK[m], pull_K)
            self.slope_MK[m] = np.maximum(moved_K, _LEAST)


def map_of(gap_s_E: F32 | None, count: int) -> I64:
    """Which map each of `count` forecasts of the next event uses.

    Args:
        gap_s_E: seconds to the moment of the next event, NaN or None where they are not known.
    """
    return np.zeros(count, np.int64) if gap_s_E is None else np.isfinite(gap_s_E).astype(np.int64)


@njit(cache=True, nogil=True, error_model="numpy")
def _bands(p: float, knot_K: F64, band_K: F64) -> None:
    """How far p reaches into each band, as a logarithm."""
    for k in range(len(knot_K)):
        top = p if k + 1 == len(knot_K) else min(p, knot_K[k + 1])
        band_K[k] = np.log(top / knot_K[k]) if p > knot_K[k] else 0.0


@njit(cache=True, nogil=True, error_model="numpy")
def _factor(p: float, knot_K: F64, slope_K: F64, band_K: F64) -> float:
    """f(p) / p; leaves the bands of p."""
    _bands(p, knot_K, band_K)
    total = 0.0
    for k in range(len(knot_K)):
        total += slope_K[k] * band_K[k]
    return float(np.exp(total))


@njit(cache=True, nogil=True, error_model="numpy")
def _apply(
    general_EV: F32, copied_EC: F32, rest_E: F32, row_EC: I32, key_EC: U32, knot_K: F64, slope_MK: F64, map_E: I64
) -> None:
    count, slots = key_EC.shape
    rows = general_EV.shape[1]
    candidate = np.zeros(rows, np.bool_)
    band_K = np.empty(len(knot_K))
    least = knot_K[0]
    for e in range(count):
        slope_K = slope_MK[map_E[e]]
        if not slope_K.any():
            continue
        total = 1.0
        for c in range(slots):
            if key_EC[e, c] == 0:
                continue
            row = row_EC[e, c]
            p = copied_EC[e, c]
            if row >= 0:
                p += rest_E[e] * general_EV[e, row]
                candidate[row] = True
            if p > least:
                factor = _factor(p, knot_K, slope_K, band_K)
                total += p * (factor - 1.0)
                copied_EC[e, c] *= factor
                if row >= 0:
                    general_EV[e, row] *= factor
        bound = np.float32(least / rest_E[e])
        for v in range(rows):
            if general_EV[e, v] > bound and not candidate[v]:
                p = rest_E[e] * general_EV[e, v]
                factor = _factor(p, knot_K, slope_K, band_K)
                total += p * (factor - 1.0)
                general_EV[e, v] *= factor
        rest_E[e] /= total
        for c in range(slots):
            copied_EC[e, c] /= total
            if row_EC[e, c] >= 0:
                candidate[row_EC[e, c]] = False


@njit(cache=True, nogil=True, error_model="numpy")
def _moments(
    general_EV: F32, copied_EC: F32, rest_E: F32, row_EC: I32, key_EC: U32, target_E: U32, target_row_E: I32,
    knot_K: F64, slope_MK: F64, map_E: I64,
) -> tuple[F64, F64, F64]:  # fmt: skip
    """By map: the gradient of the likelihood, the covariance of the bands under the map, how many forecasts."""
    count, slots = key_EC.shape
    rows, knots = general_EV.shape[1], len(knot_K)
    gradient_MK = np.zeros(slope_MK.shape)
    covariance_MKK = np.zeros((len(slope_MK), knots, knots))
    count_M = np.zeros(len(slope_MK))
    candidate = np.zeros(rows, np.bool_)
    band_K, came_K, mean_K, square_KK = np.empty(knots), np.empty(knots), np.empty(knots), np.empty((knots, knots))
    least = knot_K[0]
    for e in range(count):
        m = map_E[e]
        slope_K = slope_MK[m]
        total = 1.0
        came_K[:] = 0.0
        mean_K[:] = 0.0
        square_KK[:] = 0.0
        for i in range(slots + rows):
            if i < slots:
                if key_EC[e, i] == 0:
                    continue
                p = copied_EC[e, i]
                row = row_EC[e, i]
                if row >= 0:
                    p += rest_E[e] * general_EV[e, row]
                    candidate[row] = True
                came = key_EC[e, i] == target_E[e]
            else:
                row = i - slots
                p = rest_E[e] * general_EV[e, row]
                if p <= least or candidate[row]:
                    continue
                came = row == target_row_E[e]
            if p <= least:
                continue
            weight = p * _factor(p, knot_K, slope_K, band_K)
            total += weight - p
            if came:
                came_K[:] = band_K
            for k in range(knots):
                if band_K[k] == 0.0:
                    break
                mean_K[k] += weight * band_K[k]
                for j in range(k + 1):
                    square_KK[k, j] += weight * band_K[k] * band_K[j]
        for k in range(knots):
            mean_K[k] /= total
            gradient_MK[m, k] += came_K[k] - mean_K[k]
        for k in range(knots):
            for j in range(k + 1):
                shared = square_KK[k, j] / total - mean_K[k] * mean_K[j]
                covariance_MKK[m, k, j] += shared
                if j < k:
                    covariance_MKK[m, j, k] += shared
        count_M[m] += 1.0
        for c in range(slots):
            if row_EC[e, c] >= 0:
                candidate[row_EC[e, c]] = False
    return gradient_MK, covariance_MKK, count_M
