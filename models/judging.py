"""Forecasts held against what came: ranks, confidence and errors of the shares, for `driftline evaluate`.

Beside the way of an event: only the evaluation asks for this. The same distributions as those that are published (see
models/forecaster.py), with what a forecast does not need: how much the most likely interest was given, and how far the
shares of all interests among the next n events were off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from models.evaluate import Judged
from models.features import F32, I64, U32
from models.forecaster import Forecaster
from models.profile import Snapshot
from models.vocabulary import I32


def judge(
    forecaster: Forecaster, hidden_EH: F32, snapshot: Snapshot, gap_s_E: F32 | None, target_EN: U32, there_EN: Any
) -> Judged:
    """Judge the forecasts made from these states.

    Args:
        gap_s_E: seconds from the user's last event to the moment of the forecast.
        target_EN: key of the interest of each of the next N events.
        there_EN: whether there is such an event; a user's events have no holes.
    """
    count, steps = target_EN.shape
    judged = Judged.empty(count, steps)
    row_EN = forecaster.rows(target_EN.reshape(-1)).reshape(target_EN.shape)
    kernel: Any = _judge
    errors: Any = _share_errors
    add: Any = _add
    general_sum_EV = copied_sum_EC = mass_E = np.zeros(0, np.float32)
    for span, n, candidates, parts in forecaster.distributions(hidden_EH, snapshot, gap_s_E, steps):
        general_EV, copied_EC, rest_E = parts.arrays()
        kernel(
            general_EV, copied_EC, rest_E, candidates.row_EC, candidates.key_EC, forecaster.keys_V,
            np.ascontiguousarray(target_EN[span, n]), np.ascontiguousarray(row_EN[span, n]),
            judged.rank_EN[span, n], judged.top_EN[span, n],
        )  # fmt: skip
        copied_EC = np.where(candidates.key_EC != 0, copied_EC, 0.0)
        if n == 0:
            general_sum_EV, copied_sum_EC = np.zeros_like(general_EV), np.zeros_like(copied_EC)
            mass_E = np.zeros_like(rest_E)
        copied_sum_EC += copied_EC
        mass_E += copied_EC.sum(1)
        square_E = np.zeros_like(rest_E)
        add(general_EV, rest_E, general_sum_EV, mass_E, square_E)
        errors(
            general_sum_EV, square_E, copied_sum_EC, mass_E, candidates.row_EC, candidates.key_EC,
            np.ascontiguousarray(target_EN[span]), np.ascontiguousarray(row_EN[span]), n + 1,
            judged.absolute_EN[span, n], judged.square_EN[span, n],
        )  # fmt: skip
    judged.rank_EN[~there_EN] = -1
    for values in (judged.top_EN, judged.absolute_EN, judged.square_EN):
        values[~there_EN] = np.nan
    return judged


@njit(cache=True, nogil=True, error_model="numpy")
def _judge(
    general_EV: F32, copied_EC: F32, rest_E: F32, row_EC: I32, key_EC: U32, keys_V: U32,
    target_E: U32, target_row_E: I32, rank_E: I64, top_E: F32,
) -> None:  # fmt: skip
    """Rank of each target, ties against us, and the largest probability; over the mixture, without building it."""
    count, slots = key_EC.shape
    rows = len(keys_V)
    candidate = np.zeros(rows, np.bool_)
    for v in range(rows):
        candidate[v] = keys_V[v] == 0  # a free row is passed over like one that was looked at already
    mixed = np.zeros(slots)
    for e in range(count):
        found = -1
        target_row = target_row_E[e]
        top = 0.0
        for c in range(slots):
            mixed[c] = 0.0
            if key_EC[e, c] == 0:
                continue
            mixed[c] = copied_EC[e, c]
            row = row_EC[e, c]
            if row >= 0:
                mixed[c] += rest_E[e] * general_EV[e, row]
                candidate[row] = True
            top = max(top, mixed[c])
            if key_EC[e, c] == target_E[e]:
                found = c
        known = found >= 0 or target_row >= 0
        if found >= 0:
            p = mixed[found]
            bound = p / rest_E[e]
        elif target_row >= 0:
            p = rest_E[e] * general_EV[e, target_row]
            bound = general_EV[e, target_row]
        else:
            p = 2.0
            bound = np.inf
        rank = 1
        for c in range(slots):
            if key_EC[e, c] != 0 and c != found and mixed[c] >= p:
                rank += 1
        highest = 0.0
        for v in range(rows):
            x = general_EV[e, v]
            if candidate[v]:
                continue
            highest = max(highest, x)
            if x >= bound and v != target_row:
                rank += 1
        if rows:
            top = max(top, rest_E[e] * highest)
        rank_E[e] = rank if known else 0
        top_E[e] = min(1.0, top)
        for c in range(slots):
            if row_EC[e, c] >= 0:
                candidate[row_EC[e, c]] = False


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "nsz"})
def _add(general_EV: F32, rest_E: F32, sum_EV: F32, mass_E: F32, square_E: F32) -> None:
    """Add a step's probabilities of the vocabulary to the sums and to what they weigh; sums of squares of the sums."""
    count, rows = general_EV.shape
    for e in range(count):
        mass = square = np.float32(0.0)
        for v in range(rows):
            p = rest_E[e] * general_EV[e, v]
            together = sum_EV[e, v] + p
            sum_EV[e, v] = together
            mass += p
            square += together * together
        mass_E[e] += mass
        square_E[e] = square


@njit(cache=True, nogil=True, error_model="numpy")
def _share_errors(
    general_EV: F32, square_E: F32, copied_EC: F32, mass_E: F32, row_EC: I32, key_EC: U32, target_EN: U32,
    target_row_EN: I32, steps: int, absolute_E: F32, squared_E: F32,
) -> None:  # fmt: skip
    """Sums over all interests of |f - a| and (f - a)^2, from sums of probabilities over the steps so far.

    Both are first taken as if nothing had come, then mended at the few interests that did.
    """
    count, slots = key_EC.shape
    for e in range(count):
        squares = float(square_E[e])
        for c in range(slots):
            if key_EC[e, c] == 0:
                continue
            copied = float(copied_EC[e, c])
            row = row_EC[e, c]
            squares += copied * copied + (2.0 * copied * general_EV[e, row] if row >= 0 else 0.0)
        absolute = mass_E[e] / steps
        squares /= steps * steps
        for k in range(steps):
            key = target_EN[e, k]
            came = 0
            first = True
            for j in range(steps):
                if target_EN[e, j] == key:
                    came += 1
                    first = first and j >= k
            if not first:
                continue
            share = 0.0
            for c in range(slots):
                if key_EC[e, c] == key:
                    share += copied_EC[e, c]
            row = target_row_EN[e, k]
            if row >= 0:
                share += general_EV[e, row]
            share /= steps
            gap = abs(share - came / steps)
            absolute += gap - share
            squares += gap * gap - share * share
        absolute_E[e] = absolute
        squared_E[e] = max(0.0, squares)
