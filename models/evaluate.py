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

A model with probabilities is also judged by them: whether an interest that was given 0.3 comes three times in ten
(calibration), and how far the forecast share of each interest among the next n events is from its share among those
events (an interest's forecast share is the mean of its probabilities at steps 1..n).

A model that says how likely an interest is to be bought is judged by that too: pairs of a moment and an interest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from models.features import TYPE_CODES

STRATA = ("all", "repeat", "non_repeat", "seen", "new_to_user", "new_user", "new_interest", "purchase")
CUTS = (1, 5, 10, 20)
CALIBRATION_BINS = 15
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(kw_only=True, slots=True)
class Judged:
    """What became of E forecasts of N steps.

    Attributes:
        rank_EN: rank of the interest of each step, 0 = a miss, -1 = not judged (there is no such event).
        top_EN: probability of the interest that was thought the most likely; NaN where the model gives none.
        absolute_EN: sum over all interests of |forecast share - true share| among steps 1..n; NaN as above.
        square_EN: the same of its squares.
    """

    rank_EN: Ints
    top_EN: Floats
    absolute_EN: Floats
    square_EN: Floats

    @staticmethod
    def empty(events: int, steps: int) -> Judged:
        """Nothing judged yet."""
        nothing = [np.full((events, steps), np.nan, np.float32) for _ in range(3)]
        return Judged(
            rank_EN=np.full((events, steps), -1, np.int64),
            top_EN=nothing[0],
            absolute_EN=nothing[1],
            square_EN=nothing[2],
        )

    def put(self, where_E: Ints, other: Judged) -> None:
        """Take the results of some events, for the steps that `other` has."""
        steps = other.rank_EN.shape[1]
        for name in self.__slots__:
            getattr(self, name)[where_E, :steps] = getattr(other, name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Figures of some events. Shares are 0..1; None where there is nothing to say.

    Attributes:
        ece: expected calibration error of the most likely interest.
        share_mae, share_rmse: error of the forecast interest shares, over all interests and events.
    """

    n: int
    mrr: float | None
    hr: Mapping[int, float | None]
    ndcg_10: float | None
    ece: float | None = None
    share_mae: float | None = None
    share_rmse: float | None = None

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


def figures_of(judged: Judged, chosen_E: Bools, step: int, interests: int) -> Figures:
    """All figures of a step over the chosen events.

    Args:
        step: 0 = the next event. Shares are those of the events up to this step.
        interests: how many there are in all: what the errors of the shares are averaged over.
    """
    chosen_E = chosen_E & (judged.rank_EN[:, step] >= 0)
    found = figures(judged.rank_EN[chosen_E, step])
    top_E, square_E = judged.top_EN[chosen_E, step], judged.square_EN[chosen_E, step]
    has_top, has_shares = np.isfinite(top_E), np.isfinite(square_E)
    ece = mae = rmse = None
    if len(top_E) and has_top.all():
        ece = expected_calibration_error(top_E, judged.rank_EN[chosen_E, step] == 1)
    if len(square_E) and has_shares.all():
        absolute_E = judged.absolute_EN[chosen_E, step].astype(np.float64)
        mae = round(float(absolute_E.mean()) / interests, 9)
        rmse = round(float(np.sqrt(square_E.astype(np.float64).mean() / interests)), 9)
    return Figures(
        n=found.n, mrr=found.mrr, hr=found.hr, ndcg_10=found.ndcg_10, ece=ece, share_mae=mae, share_rmse=rmse
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


# ---------------------------------------------------------------------- purchases


@dataclass(frozen=True, kw_only=True, slots=True)
class PurchaseFigures:
    """Of pairs of a moment and an interest: was it bought within the user's next n events?

    Attributes:
        n, bought: pairs, and those bought.
        log_loss: mean -log of the probability given to what became of the pair.
        auc: chance that a pair that was bought was given more than one that was not; None where there is but one kind.
        ece: mean gap between probability and share bought, over 15 bins of equally many pairs.
    """

    n: int
    bought: int
    log_loss: float | None
    auc: float | None
    ece: float | None


def area_under_curve(score_P: Doubles, good_P: Bools) -> float | None:
    """Chance that a good one scores above another one, ties half; None where there is but one kind."""
    count, hits = len(good_P), int(good_P.sum())
    if not 0 < hits < count:
        return None
    return float((rankdata(score_P)[good_P].mean() - (hits + 1) / 2) / (count - hits))


def purchase_figures(probability_P: Doubles, bought_P: Bools) -> PurchaseFigures:
    """How good probabilities of purchases are; those of 0 and 1 count as one in a million from there.

    Example:
        >>> found = purchase_figures(np.array([0.5, 0.1, 0.1]), np.array([True, False, False]))
        >>> found.auc, round(found.log_loss, 3)
        (1.0, 0.301)
    """
    count, hits = len(bought_P), int(bought_P.sum())
    if not count:
        return PurchaseFigures(n=0, bought=0, log_loss=None, auc=None, ece=None)
    safe_P = np.clip(probability_P.astype(np.float64), 1e-6, 1.0 - 1e-6)
    loss = -np.where(bought_P, np.log(safe_P), np.log1p(-safe_P)).mean()
    auc = area_under_curve(safe_P, bought_P)
    bins = np.array_split(np.argsort(safe_P, kind="stable"), CALIBRATION_BINS)
    gaps = (abs(safe_P[b].mean() - bought_P[b].mean()) * len(b) for b in bins if len(b))
    return PurchaseFigures(
        n=count,
        bought=hits,
        log_loss=round(float(loss), 6),
        auc=None if auc is None else round(auc, 6),
        ece=round(float(sum(gaps)) / count, 6),
    )


# ---------------------------------------------------------------------- probabilities


def share_errors(share_I: Doubles, target_N: Ints) -> tuple[Floats, Floats]:
    """Sums over all interests of the absolute and the squared error of forecast shares, for horizons 1, 2, ...

    Args:
        share_I: forecast shares of all interests, the same at every step.
        target_N: the interests that came, in order.

    Example:
        >>> absolute, square = share_errors(np.array([0.5, 0.5, 0.0]), np.array([0, 1]))
        >>> absolute.tolist(), square.tolist()
        ([1.0, 0.0], [0.5, 0.0])
    """
    steps = len(target_N)
    absolute_N, square_N = np.empty(steps, np.float32), np.empty(steps, np.float32)
    total, squares = float(share_I.sum()), float(share_I @ share_I)
    counts: dict[int, int] = {}
    for n, target in enumerate(target_N.tolist(), 1):
        counts[target] = counts.get(target, 0) + 1
        absolute, square = total, squares
        for interest, count in counts.items():
            share = float(share_I[interest])
            gap = abs(share - count / n)
            absolute += gap - share
            square += gap * gap - share * share
        absolute_N[n - 1], square_N[n - 1] = absolute, square
    return absolute_N, square_N


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability:
    """Events by the confidence that they were forecast with, for a plot. Bins without events are left out."""

    confidence: list[float]
    accuracy: list[float]
    events: list[int]


def reliability(confidence_E: Floats, correct_E: Bools) -> Reliability:
    """Mean confidence and accuracy in bins of confidence of equal width.

    Example:
        >>> found = reliability(np.array([0.9, 0.9, 0.1], np.float32), np.array([True, False, False]))
        >>> [round(c, 2) for c in found.confidence], found.accuracy, found.events
        ([0.1, 0.9], [0.0, 0.5], [1, 2])
    """
    bin_E = np.minimum((confidence_E * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    events_K = np.bincount(bin_E, minlength=CALIBRATION_BINS)
    used = np.flatnonzero(events_K)
    confidence_K = np.bincount(bin_E, confidence_E, CALIBRATION_BINS)[used] / events_K[used]
    accuracy_K = np.bincount(bin_E, correct_E, CALIBRATION_BINS)[used] / events_K[used]
    return Reliability(confidence=confidence_K.tolist(), accuracy=accuracy_K.tolist(), events=events_K[used].tolist())


def expected_calibration_error(confidence_E: Floats, correct_E: Bools) -> float | None:
    """Mean gap between confidence and accuracy over bins of confidence of equal width, weighted by events.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks.
    """
    if not len(confidence_E):
        return None
    bins = reliability(confidence_E, correct_E)
    gaps = zip(bins.confidence, bins.accuracy, bins.events, strict=True)
    return round(sum(abs(c - a) * n for c, a, n in gaps) / len(confidence_E), 6)
