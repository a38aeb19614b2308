"""What a user's record offers to the copy head: one candidate per distinct interest of the ring and the slow profile.

On the way of an event: after `advance` took a snapshot of the record, before the output layer ranks interests. A
candidate may be an interest that the vocabulary does not hold yet: here it is only a key. All numbers that describe a
candidate or the moment are made here, in compiled code, from the snapshot alone; so the order in which an untrained
network ranks (most recent first, then by slow weight) is the order of the slots.

    slot      0 .. C-1, C = R + P: interests of the ring, newest first; then those only in the slow profile, heaviest
              first; key 0 = empty slot
    feature   see FEATURES; all scaled to roughly -1..2
    context   see CONTEXT: what is known of the moment of the forecast, the same for all candidates
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from models.features import F32, I64, U8, U32
from models.profile import Snapshot
from models.walk import GAP_SCALE

FEATURES = (
    "log_rank", "is_last", "log_elapsed", "in_ring", "in_profile", "ring_share", "log_slow_share", "own_successor",
    "own_successor_of_two", "run_length", "browsed", "carted", "bought", "other_type", "ever_bought", "period",
    "log_events_ago", "run_before", "left_lately", "elapsed_short", "elapsed_session", "elapsed_day", "returns",
)  # fmt: skip
CONTEXT = (
    "gap_known", "log_gap", "gap_10s", "gap_1m", "gap_5m", "gap_30m", "gap_2h", "gap_8h", "gap_1d", "gap_4d",
    "hour_sin", "hour_cos", "run_length", "distinct", "repeat_share", "return_share", "log_events", "slow_top",
    "slow_rest", "tempo", "last_bought", "last_carted", "new_user", "gap_before",
    "run_1", "run_2", "run_3", "run_4", "run_6", "run_10",
)  # fmt: skip
FEATURE_COUNT = len(FEATURES)
CONTEXT_COUNT = len(CONTEXT)
_RUN_1 = CONTEXT.index("run_1")
_GAP_CENTRES_S = np.array([10.0, 60.0, 300.0, 1_800.0, 7_200.0, 28_800.0, 86_400.0, 345_600.0])
_CLOSE = 1.2  # width of a gap's soft bucket, in natural-log seconds
_DAY_S = 86_400.0


def candidates(snapshot: Snapshot, gap_s_E: F32) -> tuple[U32, F32, F32]:
    """Keys (E, C), features (E, C, F) and context (E, G) of the candidates of each forecast.

    Args:
        gap_s_E: seconds from the user's last event to the moment of the forecast; NaN = not known.
    """
    kernel: Any = _candidates  # a compiled function has no signature that mypy could read
    found: tuple[U32, F32, F32] = kernel(
        snapshot.ring_interest_ER,
        snapshot.ring_gap_ER,
        snapshot.ring_type_ER,
        snapshot.events_E,
        snapshot.slow_interest_EP,
        snapshot.slow_share_EP,
        snapshot.last_time_ms_E,
        gap_s_E,
    )
    return found


@njit(cache=True, nogil=True, error_model="numpy")
def _gap_seconds(code: int) -> float:
    return math.exp2(code / GAP_SCALE) - 1.0


@njit(cache=True, nogil=True, error_model="numpy")
def _candidates(
    ring_interest_ER: U32,
    ring_gap_ER: npt.NDArray[np.uint16],
    ring_type_ER: U8,
    events_E: U32,
    slow_interest_EP: U32,
    slow_share_EP: F32,
    last_time_ms_E: I64,
    gap_s_E: F32,
) -> tuple[U32, F32, F32]:
    count_E, ring = ring_interest_ER.shape
    profile = slow_interest_EP.shape[1]
    slots = ring + profile
    key_EC = np.zeros((count_E, slots), dtype=np.uint32)
    x_ECF = np.zeros((count_E, slots, FEATURE_COUNT), dtype=np.float32)
    g_EG = np.zeros((count_E, CONTEXT_COUNT), dtype=np.float32)
    at = np.zeros(ring + 1, dtype=np.int64)  # candidate of the i-th newest event
    first_elapsed = np.zeros(slots)
    second_elapsed = np.zeros(slots)
    seen = np.zeros(slots, dtype=np.int64)
    order = np.zeros(profile, dtype=np.int64)
    for e in range(count_E):
        events = int(events_E[e])
        n = min(events, ring)
        known = not math.isnan(gap_s_E[e])
        gap = max(0.0, float(gap_s_E[e])) if known else 0.0
        used = 0
        elapsed = gap
        repeats = 0
        returns = 0
        gaps_log = 0.0
        for i in range(n):
            key = ring_interest_ER[e, i]
            c = -1
            for j in range(used):
                if key_EC[e, j] == key:
                    c = j
                    break
            kind = ring_type_ER[e, i]
            if c < 0:
                c = used
                used += 1
                key_EC[e, c] = key
                first_elapsed[c] = elapsed
                second_elapsed[c] = -1.0
                seen[c] = 0
                x_ECF[e, c, 16] = math.log(1.0 + i) / 3.0
                if kind == 1:
                    x_ECF[e, c, 10] = 1.0
                elif kind == 2:
                    x_ECF[e, c, 11] = 1.0
                elif kind == 3:
                    x_ECF[e, c, 12] = 1.0
                else:
                    x_ECF[e, c, 13] = 1.0
            else:
                if second_elapsed[c] < 0.0 and at[i - 1] != c:
                    second_elapsed[c] = elapsed
                if at[i - 1] != c:
                    returns += 1
                    x_ECF[e, c, 22] += 0.25
            if kind == 3:
                x_ECF[e, c, 14] = 1.0
            seen[c] += 1
            at[i] = c
            if i > 0 and at[i - 1] == c:
                repeats += 1
            step = _gap_seconds(ring_gap_ER[e, i])
            elapsed += step
            gaps_log += math.log1p(step)
        ring_used = used
        # runs, and what followed the last interest before (without counting its own repeats)
        run = 0
        while run < n and at[run] == 0:
            run += 1
        run_of_last = min(run, 8) / 4.0
        successors = 0
        successors_two = 0
        for i in range(run + 1, n):
            if at[i] == 0 and at[i - 1] != 0:
                successors += 1
                before = i
                while before < n and at[before] == 0:
                    before += 1
                if run < n and before < n and at[before] == at[run]:
                    successors_two += 1
        i = run
        while i < n:  # length of each candidate's latest run, and how many runs ago it ended
            start = i
            while i < n and at[i] == at[start]:
                i += 1
            c = at[start]
            if x_ECF[e, c, 17] == 0.0:
                x_ECF[e, c, 17] = min(i - start, 8) / 4.0
                x_ECF[e, c, 18] = 1.0 if start == run else 0.0
        if n:
            x_ECF[e, 0, 9] = run_of_last
        for i in range(run + 1, n):
            if at[i] == 0 and at[i - 1] != 0:
                x_ECF[e, at[i - 1], 7] += 1.0 / successors
                before = i
                while before < n and at[before] == 0:
                    before += 1
                if run < n and before < n and at[before] == at[run]:
                    x_ECF[e, at[i - 1], 8] += 1.0 / successors_two
        # slow profile: heaviest first
        filled = 0
        for p in range(profile):
            if slow_interest_EP[e, p] == 0:
                continue
            j = filled
            while j > 0 and slow_share_EP[e, order[j - 1]] < slow_share_EP[e, p]:
                order[j] = order[j - 1]
                j -= 1
            order[j] = p
            filled += 1
        rest = 1.0
        for o in range(filled):
            p = order[o]
            key = slow_interest_EP[e, p]
            c = -1
            for j in range(ring_used):
                if key_EC[e, j] == key:
                    c = j
                    break
            share = slow_share_EP[e, p]
            rest -= share
            if c < 0:
                c = used
                used += 1
                key_EC[e, c] = key
                first_elapsed[c] = elapsed
                second_elapsed[c] = -1.0
                seen[c] = 0
                x_ECF[e, c, 16] = math.log(1.0 + n) / 3.0
            x_ECF[e, c, 4] = 1.0
            x_ECF[e, c, 6] = max(math.log(share + 1e-4), -8.0) / 4.0 + 1.0
        for c in range(used):
            x_ECF[e, c, 0] = math.log(1.0 + c)
            x_ECF[e, c, 1] = 1.0 if c == 0 and n > 0 else 0.0
            past = math.log1p(first_elapsed[c])
            x_ECF[e, c, 2] = past / 8.0 - 1.0
            x_ECF[e, c, 3] = 1.0 if c < ring_used else 0.0
            x_ECF[e, c, 5] = seen[c] / max(1, n)
            if x_ECF[e, c, 4] == 0.0:
                x_ECF[e, c, 6] = -1.0
            if second_elapsed[c] >= 0.0:
                between = math.log1p(max(second_elapsed[c] - first_elapsed[c], 0.0))
                x_ECF[e, c, 15] = math.exp(-((past - between) ** 2) / 2.0)
            x_ECF[e, c, 19] = math.exp(-first_elapsed[c] / 120.0)
            x_ECF[e, c, 20] = math.exp(-first_elapsed[c] / 1_800.0)
            x_ECF[e, c, 21] = math.exp(-first_elapsed[c] / _DAY_S)
        # the moment
        log_gap = math.log1p(gap)
        g_EG[e, 0] = 1.0 if known else 0.0
        if known:
            g_EG[e, 1] = log_gap / 8.0
            for b in range(len(_GAP_CENTRES_S)):
                g_EG[e, 2 + b] = math.exp(-(((log_gap - math.log(_GAP_CENTRES_S[b])) / _CLOSE) ** 2) / 2.0)
        now_s = last_time_ms_E[e] / 1000.0 + gap
        day = (now_s % _DAY_S) / _DAY_S * 2.0 * math.pi
        g_EG[e, 10] = math.sin(day)
        g_EG[e, 11] = math.cos(day)
        g_EG[e, 12] = run_of_last
        if run:  # which run lengths end soon is no matter of more and less
            g_EG[e, _RUN_1 + (run - 1 if run < 4 else 3 if run < 6 else 4 if run < 10 else 5)] = 1.0
        g_EG[e, 13] = ring_used / max(1, n)
        g_EG[e, 14] = repeats / max(1, n - 1)
        g_EG[e, 15] = returns / max(1, n - 1)
        g_EG[e, 16] = math.log1p(events) / 4.0
        if filled:
            g_EG[e, 17] = slow_share_EP[e, order[0]]
        g_EG[e, 18] = max(rest, 0.0)
        g_EG[e, 19] = gaps_log / max(1, n) / 8.0
        if n:
            last = ring_type_ER[e, 0]
            g_EG[e, 20] = 1.0 if last == 3 else 0.0
            g_EG[e, 21] = 1.0 if last == 2 else 0.0
            g_EG[e, 23] = math.log1p(_gap_seconds(ring_gap_ER[e, 0])) / 8.0
        else:
            g_EG[e, 22] = 1.0
    return key_EC, x_ECF, g_EG
