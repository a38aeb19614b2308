"""Figures of merit over ranks: what `driftline evaluate` reports, for every model by the same rule.

A rank is the place of the true interest among ALL interests, 1 = best, ties count against the model, 0 = a miss (the
interest was not known). An event is in several strata:

    all            every event
    repeat         the user's interest of the event before
    non_repeat     not that, and the user is known: here an interest moves
    seen           of those, an interest that the user had before
    new_to_user    of those, an interest that the user never had
    new_user       the user's first event
    new_interest   nobody had it before
    purchase       the event is a purchase
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.features import TYPE_CODES

STRATA = ("all", "repeat", "non_repeat", "seen", "new_to_user", "new_user", "new_interest", "purchase")
CUTS = (1, 5, 10, 20)
CALIBRATION_BINS = 15
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Figures of some events. Shares are 0..1; None where there is nothing to say."""

    n: int
    mrr: float | None
    hr: Mapping[int, float | None]
    ndcg_10: float | None

    @property
    def accuracy(self) -> float | None:
        return self.hr[1]


def figures(rank_E: Ints) -> Figures:
    """MRR, hit rates and NDCG@10 of ranks.

    Example:
        >>> found = figures(np.array([1, 2, 0, 11]))
        >>> found.n, found.mrr, found.hr[10]
        (4, 0.397727, 0.5)
    """
    count = len(rank_E)
    if not count:
        return Figures(n=0, mrr=None, hr=dict.fromkeys(CUTS), ndcg_10=None)
    hit_E = rank_E > 0
    safe_E = np.maximum(rank_E, 1)
    gain_E = np.where(hit_E & (rank_E <= 10), 1.0 / np.log2(safe_E + 1.0), 0.0)
    return Figures(
        n=count,
        mrr=round(float(np.where(hit_E, 1.0 / safe_E, 0.0).mean()), 6),
        hr={cut: round(float((hit_E & (rank_E <= cut)).mean()), 6) for cut in CUTS},
        ndcg_10=round(float(gain_E.mean()), 6),
    )


def strata(user_E: Ints, interest_E: Ints, type_E: npt.NDArray[np.uint8]) -> dict[str, Bools]:
    """Which events belong to which stratum, from the whole stream in order."""
    count = len(user_E)
    repeat, new_user, seen, known = (np.zeros(count, np.bool_) for _ in range(4))
    last: dict[int, int] = {}
    had: set[tuple[int, int]] = set()
    interests: set[int] = set()
    for e, (user, interest) in enumerate(zip(user_E.tolist(), interest_E.tolist(), strict=True)):
        previous = last.get(user)
        new_user[e] = previous is None
        repeat[e] = previous == interest
        seen[e] = (user, interest) in had
        known[e] = interest in interests
        last[user] = interest
        had.add((user, interest))
        interests.add(interest)
    moved = ~repeat & ~new_user
    return {
        "all": np.ones(count, np.bool_),
        "repeat": repeat,
        "non_repeat": moved,
        "seen": moved & seen,
        "new_to_user": moved & ~seen,
        "new_user": new_user,
        "new_interest": ~known,
        "purchase": type_E == TYPE_CODES["purchase"],
    }


def next_events(user_E: Ints, steps: int) -> Ints:
    """(E, steps): index of the user's event 0, 1, 2, ... events on, the event itself first; -1 where there is none."""
    count = len(user_E)
    index_EN = np.full((count, steps), -1, np.int64)
    following: dict[int, int] = {}
    after_E = np.full(count, -1, np.int64)
    for e in range(count - 1, -1, -1):
        user = int(user_E[e])
        after_E[e] = following.get(user, -1)
        following[user] = e
    index_EN[:, 0] = np.arange(count)
    for step in range(1, steps):
        before = index_EN[:, step - 1]
        index_EN[:, step] = np.where(before >= 0, after_E[before], -1)
    return index_EN


def expected_calibration_error(confidence_E: Floats, correct_E: Bools) -> float | None:
    """Mean gap between confidence and accuracy over bins of confidence of equal width, weighted by events.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks.
    """
    if not len(confidence_E):
        return None
    bin_E = np.minimum((confidence_E * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    gap = 0.0
    for number in range(CALIBRATION_BINS):
        inside = bin_E == number
        if inside.any():
            gap += abs(float(confidence_E[inside].mean()) - float(correct_E[inside].mean())) * int(inside.sum())
    return round(gap / len(confidence_E), 6)
