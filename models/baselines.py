"""Forecasts without a network: what a learned model must beat, on the same events and by the same ranking.

Beside the way of an event: only `driftline evaluate` runs them. Every model is asked for the scores of ALL interests
before an event, then told the event; nothing here sees the future or samples negatives. Another model joins by one
small class with `rank` and `update` (see docs/evaluation.md).

    recency          the user's own interests, most recent first, then everyone's, most recent first
    recency_markov   1 / (place in the own recency list) + 1.5 x P(next | last) counted over all users, then popularity
    popularity       counts of all users, decayed by the number of events
    markov           P(next | last) counted over all users, smoothed with popularity
    vsknn            session kNN: sessions like the user's newest events vote for what they held (models/sessions.py)
    lstm, gru4rec, sasrec   trained on the first part (models/sequences.py)

Users and interests are small integers in the order of their first appearance, so a score array covers what is known.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

MARKOV_WEIGHT = 1.5
HALF_LIFE_EVENTS = 20_000.0
SMOOTHING_EVENTS = 2.0  # how many events of popularity the transitions of an interest are smoothed with
_POPULARITY_ORDER = 1e-6  # popularity only orders what the rest of a score leaves equal
_SCALE_MAX = 1e100


class Seen(NamedTuple):
    """One event as the models are told it.

    Attributes:
        user, interest: numbers in the order of first appearance.
        type: code of the event type, see models/features.py.
    """

    user: int
    interest: int
    time_ms: int
    type: int = 0


class Ranker(Protocol):
    """A model that can be compared.

    Attributes:
        is_probability: its scores are probabilities: not negative, and their sum is 1 (or 0 while nothing is known).
    """

    is_probability: bool

    def rank(self, user: int, time_ms: int) -> Scores:
        """Scores of all interests for the user's event at a time, the best highest; the caller does not change them."""

    def update(self, event: Seen) -> None:
        """Take in an event that has been ranked."""


class Trainable(Ranker, Protocol):
    """A model whose weights stay as they are between two trainings."""

    def train(self) -> None:
        """Learn from all events so far, from scratch."""

    def copied(self) -> Trainable:
        """One more that stands where this one stands."""


def target_ranks(scores: Scores, targets: Numbers) -> Numbers:
    """Rank of each target among all scores: 1 is best, and all that tie with it stand before it.

    Example:
        >>> target_ranks(np.array([0.5, 0.2, 0.5, 0.0]), np.array([0, 1])).tolist()
        [2, 3]
    """
    return np.array([np.count_nonzero(scores >= scores[target]) for target in targets.tolist()], np.int64)


class Recency:
    """The rule: a user comes back to what he had last; else what anyone had last."""

    is_probability = False

    def __init__(self, users: int, interests: int) -> None:
        self._own: list[dict[int, None]] = [{} for _ in range(users)]  # oldest first
        self._last = np.full(interests, -1.0)  # number of the last event of each interest
        self._events = 0

    def rank(self, user: int, time_ms: int) -> Scores:
        scores = self._last.copy()
        own = self._own[user]
        scores[_keys(own)] = np.arange(self._events, self._events + len(own))
        return scores

    def update(self, event: Seen) -> None:
        _to_the_end(self._own[event.user], event.interest)
        self._last[event.interest] = self._events
        self._events += 1


class Popularity:
    """Shares of the interests among all events, recent events weighing more."""

    is_probability = True

    def __init__(self, users: int, interests: int, half_life_events: float = HALF_LIFE_EVENTS) -> None:
        self._count = np.zeros(interests)
        self._total = 0.0
        self._weight = 1.0  # grows instead of decaying all counts at every event
        self._growth = math.exp2(1.0 / half_life_events)

    def rank(self, user: int, time_ms: int) -> Scores:
        return self.shares()

    def shares(self) -> Scores:
        """Share of each interest; 0 everywhere before the first event."""
        return self._count / max(self._total, self._weight)

    def update(self, event: Seen) -> None:
        self._count[event.interest] += self._weight
        self._total += self._weight
        self._weight *= self._growth
        if self._weight > _SCALE_MAX:
            self._count /= self._weight
            self._total /= self._weight
            self._weight = 1.0


class Transitions:
    """How often one interest followed another in the events of one user, over all users."""

    def __init__(self, users: int, interests: int) -> None:
        self._last = np.full(users, -1, np.int64)
        self._next: list[dict[int, int]] = [{} for _ in range(interests)]

    def after_last(self, user: int) -> tuple[Numbers, Scores]:
        """The interests that followed the user's last one, and their counts."""
        last = self._last[user]
        row = self._next[last] if last >= 0 else {}
        return _keys(row), np.fromiter(row.values(), np.float64, len(row))

    def update(self, event: Seen) -> None:
        last = self._last[event.user]
        if last >= 0:
            row = self._next[last]
            row[event.interest] = row.get(event.interest, 0) + 1
        self._last[event.user] = event.interest


class RecencyMarkov:
    """The rule with what usually follows: own interests by place, lifted by the transitions of all users."""

    is_probability = False

    def __init__(self, users: int, interests: int) -> None:
        self._own: list[dict[int, None]] = [{} for _ in range(users)]
        self._transitions = Transitions(users, interests)
        self._count = np.zeros(interests)
        self._events = 0

    def rank(self, user: int, time_ms: int) -> Scores:
        scores = self._count * (_POPULARITY_ORDER / max(1, self._events))
        following, counts = self._transitions.after_last(user)
        if len(following):
            scores[following] += MARKOV_WEIGHT / counts.sum() * counts
        own = self._own[user]
        scores[_keys(own)] += 1.0 / np.arange(len(own), 0, -1)
        return scores

    def update(self, event: Seen) -> None:
        _to_the_end(self._own[event.user], event.interest)
        self._transitions.update(event)
        self._count[event.interest] += 1
        self._events += 1


class Markov:
    """First-order Markov chain over all users, smoothed with popularity as with a prior."""

    is_probability = True

    def __init__(self, users: int, interests: int) -> None:
        self._transitions = Transitions(users, interests)
        self._popularity = Popularity(users, interests)

    def rank(self, user: int, time_ms: int) -> Scores:
        following, counts = self._transitions.after_last(user)
        total = counts.sum() + SMOOTHING_EVENTS
        scores: Scores = self._popularity.shares() * (SMOOTHING_EVENTS / total)
        if len(following):
            scores[following] += counts / total
        return scores

    def update(self, event: Seen) -> None:
        self._transitions.update(event)
        self._popularity.update(event)


def _keys(row: dict[int, int] | dict[int, None]) -> Numbers:
    return np.fromiter(row, np.int64, len(row))


def _to_the_end(own: dict[int, None], interest: int) -> None:
    own.pop(interest, None)
    own[interest] = None
