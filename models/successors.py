"""What tends to go with what: for each interest a short list of the interests that came after it, with decayed counts.

On the way of an event: read beside the network when interests are ranked, as a prior of the output layer and of the
candidates; the learner counts. A network needs many events to learn a transition, a count needs one.

    row a of the vocabulary -> up to M (row b, weight): the user went from a to b, also with one other between, or back
    from b to a. A new follower takes the place of the lightest. Every move from `a` makes the older ones of its list
    lighter. Beside the list: how often users stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from models.features import F32, I64
from models.vocabulary import I32

SOURCES = 3  # most recent distinct interests of a user whose followers are looked up
_SOURCE_WEIGHT = (1.0, 0.3, 0.15)
_BETWEEN = 0.5  # weight of a move with one other interest between
_BACK = 0.8  # of its way back
_PRIOR = 2.0  # events that each list is taken to have beside its own
_POPULARITY_WEIGHT = 0.4  # of what is popular, where a source weighs 1
_STAY_START = 0.5
_STAY_RATE = 0.02  # weight of the newest event in the share of stays


@dataclass(frozen=True, kw_only=True, slots=True)
class Followers:
    """What `look_up` finds: the probability of a row is base * share of all + extra, and its lift is the logarithm of
    that over base * share of all.

    Attributes:
        row_EM: rows of the likeliest followers of all sources, -1 where there are fewer; extra_EM: of them.
        base_E: what the lists leave to everything else.
        lift_EC: of the candidates; lift_ECS: by each source alone.
        covered_E: share of the followers of the first source that are candidates.
    """

    row_EM: I32
    extra_EM: F32
    base_E: F32
    lift_EC: F32
    lift_ECS: F32
    covered_E: F32


class Successors:
    """Lists by row of the vocabulary. Growing keeps them; `clear` empties those of rows that stand for nothing."""

    def __init__(self, follower_VM: I32, weight_VM: F32, total_V: F32, stay_V: F32) -> None:
        self.follower_VM, self.weight_VM, self.total_V, self.stay_V = follower_VM, weight_VM, total_V, stay_V

    @staticmethod
    def empty(length: int) -> Successors:
        return Successors(
            np.full((0, length), -1, np.int32),
            np.zeros((0, length), np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.float32),
        )

    def grow(self, rows: int) -> None:
        """Have lists for at least `rows` rows."""
        have, length = self.follower_VM.shape
        if rows > have:
            more = max(rows, 2 * have) - have
            self.follower_VM = np.concatenate([self.follower_VM, np.full((more, length), -1, np.int32)])
            self.weight_VM = np.concatenate([self.weight_VM, np.zeros((more, length), np.float32)])
            self.total_V = np.concatenate([self.total_V, np.zeros(more, np.float32)])
            self.stay_V = np.concatenate([self.stay_V, np.full(more, _STAY_START, np.float32)])

    def clear(self, rows: I64) -> None:
        """Forget the lists of these rows, and these rows in the lists of others."""
        if not len(rows):
            return
        gone = np.isin(self.follower_VM, rows)
        self.follower_VM[gone] = -1
        self.weight_VM[gone] = 0.0
        self.follower_VM[rows] = -1
        self.weight_VM[rows] = 0.0
        self.total_V[rows] = 0.0
        self.stay_V[rows] = _STAY_START

    def count(self, source_B2: I32, follower_B: I32, decay: float) -> None:
        """Count moves and stays in order.

        Args:
            source_B2: rows of the user's last interest and of the one before that; where the last one is -1, or the
                follower, there is nothing to count.
        """
        kernel: Any = _count
        kernel(self.follower_VM, self.weight_VM, self.total_V, self.stay_V, source_B2, follower_B, decay)

    def look_up(self, candidate_EC: I32, popularity_V: F32) -> Followers:
        """Followers of each user's most recent interests.

        Args:
            candidate_EC: rows of the candidates, -1 where they have none; the first ones are the sources.
            popularity_V: counts.
        """
        kernel: Any = _look_up
        row_EM, extra_EM, base_E, lift_EC, lift_ECS, covered_E = kernel(
            self.follower_VM, self.weight_VM, self.total_V, candidate_EC, popularity_V, float(popularity_V.sum())
        )
        return Followers(
            row_EM=row_EM, extra_EM=extra_EM, base_E=base_E, lift_EC=lift_EC, lift_ECS=lift_ECS, covered_E=covered_E
        )


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _count(
    follower_VM: I32, weight_VM: F32, total_V: F32, stay_V: F32, source_B2: I32, follower_B: I32, decay: float
) -> None:  # fmt: skip
    for b in range(len(source_B2)):
        source, before, follower = source_B2[b, 0], source_B2[b, 1], follower_B[b]
        if source < 0 or follower < 0:
            continue
        stay_V[source] += _STAY_RATE * ((1.0 if source == follower else 0.0) - stay_V[source])
        if source == follower:
            continue
        for m in range(follower_VM.shape[1]):
            weight_VM[source, m] *= decay
        total_V[source] *= decay
        _add(follower_VM, weight_VM, total_V, source, follower, 1.0)
        _add(follower_VM, weight_VM, total_V, follower, source, _BACK)
        if before >= 0 and before != follower:
            _add(follower_VM, weight_VM, total_V, before, follower, _BETWEEN)
            _add(follower_VM, weight_VM, total_V, follower, before, _BETWEEN * _BACK)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _add(follower_VM: I32, weight_VM: F32, total_V: F32, source: int, follower: int, weight: float) -> None:
    slot = 0
    for m in range(follower_VM.shape[1]):
        if follower_VM[source, m] == follower:
            slot = m
            break
        if weight_VM[source, m] < weight_VM[source, slot]:
            slot = m
    if follower_VM[source, slot] != follower:
        follower_VM[source, slot] = follower
        weight_VM[source, slot] = 0.0
    weight_VM[source, slot] += weight
    total_V[source] += weight


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _look_up(
    follower_VM: I32, weight_VM: F32, total_V: F32, candidate_EC: I32, popularity_V: F32, popularity: float
) -> tuple[I32, F32, F32, F32, F32, F32]:
    count, slots = candidate_EC.shape
    length = follower_VM.shape[1]
    rows = len(popularity_V)
    row_EM = np.full((count, length), -1, np.int32)
    extra_EM = np.zeros((count, length), np.float32)
    base_E = np.ones(count, np.float32)
    lift_EC = np.zeros((count, slots), np.float32)
    lift_ECS = np.zeros((count, slots, SOURCES), np.float32)
    covered_E = np.zeros(count, np.float32)
    share_V = np.zeros(rows, np.float32)
    share_VS = np.zeros((rows, SOURCES), np.float32)
    touched = np.empty(SOURCES * length, np.int32)
    for e in range(count):
        used = 0
        for s in range(min(SOURCES, slots)):
            source = candidate_EC[e, s]
            if source < 0:
                continue
            factor = 1.0 / (total_V[source] + _PRIOR)
            for m in range(length):
                row = follower_VM[source, m]
                if row < 0 or row >= rows or row == candidate_EC[e, 0]:  # that the user stays is not counted here
                    continue
                if share_V[row] == 0.0:
                    touched[used] = row
                    used += 1
                share_VS[row, s] += factor * weight_VM[source, m]
                share_V[row] += _SOURCE_WEIGHT[s] * factor * weight_VM[source, m]
        total = _POPULARITY_WEIGHT
        for t in range(used):
            total += share_V[touched[t]]
        base_E[e] = _POPULARITY_WEIGHT / total
        for c in range(slots):
            row = candidate_EC[e, c]
            if row >= 0 and share_V[row] > 0.0:
                rarity = popularity / (_POPULARITY_WEIGHT * (popularity_V[row] + 0.5))
                lift_EC[e, c] = math.log1p(share_V[row] * rarity)
                for s in range(SOURCES):
                    lift_ECS[e, c, s] = math.log1p(share_VS[row, s] * rarity)
                covered_E[e] += share_VS[row, 0]
        kept = 0
        for t in range(used):
            row = touched[t]
            if kept < length:
                slot = kept
                kept += 1
            else:
                slot = 0
                for m in range(1, length):
                    if share_V[row_EM[e, m]] < share_V[row_EM[e, slot]]:
                        slot = m
                if share_V[row] <= share_V[row_EM[e, slot]]:
                    continue
            row_EM[e, slot] = row
        for m in range(kept):
            row = row_EM[e, m]
            extra_EM[e, m] = share_V[row] / total
        for t in range(used):
            share_V[touched[t]] = 0.0
            share_VS[touched[t]] = 0.0
    return row_EM, extra_EM, base_E, lift_EC, lift_ECS, covered_E
