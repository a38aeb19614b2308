"""What tends to follow what: for each interest a short list of the interests that came after it, with decayed counts.

On the way of an event: read beside the network when interests are ranked, as a prior of the output layer and of the
candidates; the learner counts. A network needs many events to learn a transition, a count needs one.

    row a of the vocabulary -> up to M (row b, weight): the user went from a to b. A new follower takes the place of the
    lightest. Every count of `a` makes the older ones of its list lighter.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from models.features import F32, I64
from models.vocabulary import I32

SOURCES = 3  # most recent distinct interests of a user whose followers are looked up
_SOURCE_WEIGHT = (1.0, 0.3, 0.15)
_PRIOR = 2.0  # events' worth of popularity in each list


class Successors:
    """Lists by row of the vocabulary. Growing keeps them; `clear` empties those of rows that stand for nothing."""

    def __init__(self, follower_VM: I32, weight_VM: F32, total_V: F32) -> None:
        self.follower_VM, self.weight_VM, self.total_V = follower_VM, weight_VM, total_V

    @staticmethod
    def empty(length: int) -> Successors:
        return Successors(
            np.full((0, length), -1, np.int32), np.zeros((0, length), np.float32), np.zeros(0, np.float32)
        )

    def grow(self, rows: int) -> None:
        """Have lists for at least `rows` rows."""
        have, length = self.follower_VM.shape
        if rows > have:
            more = max(rows, 2 * have) - have
            self.follower_VM = np.concatenate([self.follower_VM, np.full((more, length), -1, np.int32)])
            self.weight_VM = np.concatenate([self.weight_VM, np.zeros((more, length), np.float32)])
            self.total_V = np.concatenate([self.total_V, np.zeros(more, np.float32)])

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

    def count(self, source_B: I32, follower_B: I32, decay: float) -> None:
        """Count moves in order; where either row is -1 or both are the same there is nothing to count."""
        kernel: Any = _count
        kernel(self.follower_VM, self.weight_VM, self.total_V, source_B, follower_B, decay)

    def look_up(self, candidate_EC: I32, popularity_V: F32) -> tuple[I32, F32, F32]:
        """Followers of each user's most recent interests.

        Args:
            candidate_EC: rows of the candidates, -1 where they have none; the first ones are the sources.
            popularity_V: counts.

        Returns:
            rows (E, M) with -1 where there are fewer, and log(1 + lift over popularity) of them (E, M) and of the
            candidates (E, C).
        """
        kernel: Any = _look_up
        found: tuple[I32, F32, F32] = kernel(
            self.follower_VM, self.weight_VM, self.total_V, candidate_EC, popularity_V, float(popularity_V.sum())
        )
        return found


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _count(follower_VM: I32, weight_VM: F32, total_V: F32, source_B: I32, follower_B: I32, decay: float) -> None:
    length = follower_VM.shape[1]
    for b in range(len(source_B)):
        source, follower = source_B[b], follower_B[b]
        if source < 0 or follower < 0 or source == follower:
            continue
        slot = 0
        for m in range(length):
            weight_VM[source, m] *= decay
        for m in range(length):
            if follower_VM[source, m] == follower:
                slot = m
                break
            if weight_VM[source, m] < weight_VM[source, slot]:
                slot = m
        if follower_VM[source, slot] != follower:
            follower_VM[source, slot] = follower
            weight_VM[source, slot] = 0.0
        weight_VM[source, slot] += 1.0
        total_V[source] = total_V[source] * decay + 1.0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _look_up(
    follower_VM: I32, weight_VM: F32, total_V: F32, candidate_EC: I32, popularity_V: F32, popularity: float
) -> tuple[I32, F32, F32]:
    count, slots = candidate_EC.shape
    length = follower_VM.shape[1]
    rows = len(popularity_V)
    row_EM = np.full((count, length), -1, np.int32)
    lift_EM = np.zeros((count, length), np.float32)
    lift_EC = np.zeros((count, slots), np.float32)
    share_V = np.zeros(rows, np.float32)
    touched = np.empty(SOURCES * length, np.int32)
    for e in range(count):
        used = 0
        for s in range(min(SOURCES, slots)):
            source = candidate_EC[e, s]
            if source < 0:
                continue
            factor = _SOURCE_WEIGHT[s] / (total_V[source] + _PRIOR)
            for m in range(length):
                row = follower_VM[source, m]
                if row < 0 or row >= rows:
                    continue
                if share_V[row] == 0.0:
                    touched[used] = row
                    used += 1
                share_V[row] += factor * weight_VM[source, m]
        for c in range(slots):
            row = candidate_EC[e, c]
            if row >= 0 and share_V[row] > 0.0:
                lift_EC[e, c] = math.log1p(share_V[row] * popularity / (0.2 * (popularity_V[row] + 0.5)))
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
            lift_EM[e, m] = math.log1p(share_V[row] * popularity / (0.2 * (popularity_V[row] + 0.5)))
        for t in range(used):
            share_V[touched[t]] = 0.0
    return row_EM, lift_EM, lift_EC
