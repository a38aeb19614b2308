"""The walk through a visit: from why somebody comes to the events that are seen of it.

On the way of an event: before the log, the middle of the generated shop (shoppers.py before it, simulate.py after it).
All visits walk at once, step by step; those that are over drop out. Times are ms since the start of the stream.

Shapes: U shoppers, S visits, A visits under way, E events, C categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from stream.catalogue import ITEMS_PER_CATEGORY, Catalogue
from stream.shoppers import DAY_MS, EXPLORE, REPLENISH, ROUTINE, Shoppers, Visits

F64 = npt.NDArray[np.float64]
INT = npt.NDArray[np.int64]

VISIT_EVENTS_MAX = 40
TYPES = ("browse", "cart", "purchase", "review")
BROWSE, CART, PURCHASE, REVIEW = range(4)
STAY, GO_ON, GO_BACK, LOOK_AROUND = range(4)  # how a walk goes on
STEP_SHARES = np.array([0.43, 0.29, 0.19, 0.09])
STEP_SHARES_BOUGHT = np.array([0.10, 0.45, 0.32, 0.13])
REVIEWED = 0.12  # share of the purchases
NEW_DAYS = 10  # how long a launched category is talked about


@dataclass(frozen=True, kw_only=True, slots=True)
class ShopEvents:
    """Events as columns. `item_E` counts within the category; `stars_E` is 0 where the event is no review."""

    user_E: INT
    visit_E: INT
    category_E: INT
    item_E: INT
    type_E: INT
    time_ms_E: INT
    dwell_s_E: F64
    stars_E: INT

    def take(self, index: INT | npt.NDArray[np.bool_]) -> ShopEvents:
        """The same columns for a subset or another order."""
        return ShopEvents(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @staticmethod
    def join(parts: Sequence[ShopEvents]) -> ShopEvents:
        """The events of all parts, one part after the other."""
        return ShopEvents(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(ShopEvents)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Calendar:
    """When the season is and when the new categories come, in ms since the start."""

    season_ms: float
    season_width_ms: float
    launch_ms_C: F64  # 0 for what is there from the start

    @classmethod
    def of(cls, catalogue: Catalogue, weeks: int) -> Calendar:
        span_ms = weeks * 7 * DAY_MS
        launch_ms_C = np.zeros(len(catalogue.names))
        launch_ms_C[catalogue.launches] = np.linspace(0.25, 0.7, len(catalogue.launches)) * span_ms
        return cls(season_ms=0.72 * span_ms, season_width_ms=0.08 * span_ms, launch_ms_C=launch_ms_C)

    def season_strength(self, time_ms: F64 | INT) -> F64:
        """0..1"""
        strength: F64 = np.exp(-(((time_ms - self.season_ms) / self.season_width_ms) ** 2))
        return strength

    def look_around(self, rng: np.random.Generator, catalogue: Catalogue, time_ms_A: INT) -> INT:
        """Categories that somebody without a purpose looks at: what is popular, what is new, what is in season."""
        count = len(time_ms_A)
        found_A: INT = rng.choice(len(catalogue.names), count, p=catalogue.popularity_C)
        fresh_A = rng.choice(catalogue.launches, count)
        age_A = time_ms_A - self.launch_ms_C[fresh_A]
        eager_A = np.where(age_A < NEW_DAYS * DAY_MS, 0.5, 0.15)
        found_A = np.where((age_A >= 0) & (rng.random(count) < eager_A), fresh_A, found_A)
        in_season_A = rng.random(count) < 0.5 * self.season_strength(time_ms_A)
        return np.where(in_season_A, catalogue.season, found_A)


def _favourite(rng: np.random.Generator, shoppers: Shoppers, user_A: INT, taste_A: INT) -> INT:
    """One of each shopper's favourites, the stronger the likelier."""
    place_A = (shoppers.cumulative_UTF[user_A, taste_A] < rng.random((len(user_A), 1))).sum(1)
    category_A: INT = shoppers.taste_UTF[user_A, taste_A, place_A]
    return category_A


def _first_category(
    rng: np.random.Generator, catalogue: Catalogue, shoppers: Shoppers, visits: Visits, calendar: Calendar
) -> INT:
    """Where each visit begins, by why they come."""
    user_S, taste_S, intent_S = visits.user_S, visits.taste_S, visits.intent_S
    category_S = _favourite(rng, shoppers, user_S, taste_S)
    turn_S = visits.ordinal_S % shoppers.routine_U[user_S]
    category_S = np.where(intent_S == ROUTINE, shoppers.taste_UTF[user_S, taste_S, turn_S], category_S)
    category_S = np.where(intent_S == REPLENISH, visits.needed_S, category_S)
    around_S = calendar.look_around(rng, catalogue, visits.start_ms_S)
    category_S = np.where(intent_S == EXPLORE, around_S, category_S)
    in_season_S = rng.random(len(user_S)) < 0.3 * calendar.season_strength(visits.start_ms_S)
    return np.where(in_season_S & (intent_S != REPLENISH), catalogue.season, category_S)


def walk(
    rng: np.random.Generator, catalogue: Catalogue, shoppers: Shoppers, visits: Visits, calendar: Calendar
) -> ShopEvents:
    """All visits at once, step by step; those that are over drop out."""
    count = len(visits.user_S)
    needing_S = visits.intent_S == REPLENISH
    length_S = np.clip(np.rint(rng.lognormal(1.62, 0.7, count)), 1, VISIT_EVENTS_MAX).astype(np.int64)
    length_S[needing_S] = 2 + rng.poisson(0.8, int(needing_S.sum()))
    visit_A = np.arange(count)
    category_A = _first_category(rng, catalogue, shoppers, visits, calendar)
    item_A = _items(rng, count)
    type_A = np.where(needing_S & (rng.random(count) < 0.6), CART, BROWSE)
    time_ms_A = visits.start_ms_S.copy()
    steps: list[ShopEvents] = []
    for step in range(VISIT_EVENTS_MAX):
        user_A, taste_A = visits.user_S[visit_A], visits.taste_S[visit_A]
        liked_A = (shoppers.taste_UTF[user_A, taste_A] == category_A[:, None]).any(1)
        dwell_s_A = _dwell_s(rng, type_A, liked_A)
        steps.append(
            ShopEvents(
                user_E=user_A,
                visit_E=visit_A,
                category_E=category_A,
                item_E=item_A,
                type_E=type_A,
                time_ms_E=time_ms_A,
                dwell_s_E=dwell_s_A,
                stars_E=np.zeros(len(visit_A), np.int64),
            )
        )
        on_A = length_S[visit_A] > step + 1
        if not on_A.any():
            break
        time_ms_A = (time_ms_A + 1_000 * (dwell_s_A + rng.lognormal(1.5, 0.7, len(visit_A)))).astype(np.int64)[on_A]
        visit_A, category_A, item_A, type_A = visit_A[on_A], category_A[on_A], item_A[on_A], type_A[on_A]
        category_A, item_A, type_A = _step(
            rng, catalogue, calendar, shoppers, visits, visit_A, category_A, item_A, type_A, time_ms_A
        )
    return ShopEvents.join(steps)


def _step(
    rng: np.random.Generator,
    catalogue: Catalogue,
    calendar: Calendar,
    shoppers: Shoppers,
    visits: Visits,
    visit_A: INT,
    category_A: INT,
    item_A: INT,
    type_A: INT,
    time_ms_A: INT,
) -> tuple[INT, INT, INT]:
    """(category, item, type) of the next event of each visit under way."""
    count = len(visit_A)
    needing_A = visits.intent_S[visit_A] == REPLENISH
    luck_A = rng.random(count)
    buys_A = (type_A == CART) & (luck_A < np.where(needing_A, 0.85, 0.5))
    puts_A = (type_A == BROWSE) & (luck_A < np.where(needing_A, 0.6, 0.11))
    bought_A1 = (type_A == PURCHASE)[:, None]
    cumulative_A4 = np.cumsum(np.where(bought_A1, STEP_SHARES_BOUGHT, STEP_SHARES), axis=1)
    move_A = np.minimum((cumulative_A4 < rng.random((count, 1))).sum(1), LOOK_AROUND)
    link_A = rng.choice(3, count, p=[0.55, 0.27, 0.18])
    choices = [
        category_A,
        catalogue.goes_with_C3[category_A, link_A],
        _favourite(rng, shoppers, visits.user_S[visit_A], visits.taste_S[visit_A]),
        calendar.look_around(rng, catalogue, time_ms_A),
    ]
    same_A = buys_A | puts_A
    next_A = np.where(same_A, category_A, np.choose(move_A, choices))
    keeps_item_A = same_A | ((next_A == category_A) & (rng.random(count) < 0.2))
    item_A = np.where(keeps_item_A, item_A, _items(rng, count))
    type_A = np.where(buys_A, PURCHASE, np.where(puts_A, CART, BROWSE))
    return next_A, item_A, type_A


def _items(rng: np.random.Generator, count: int) -> INT:
    """Items within a category: the first is the most popular (Zipf)."""
    weight_I = 1.0 / np.arange(1, ITEMS_PER_CATEGORY + 1)
    items: INT = rng.choice(ITEMS_PER_CATEGORY, count, p=weight_I / weight_I.sum())
    return items


def _dwell_s(rng: np.random.Generator, type_E: INT, liked_E: npt.NDArray[np.bool_]) -> F64:
    """People look longer at what they like."""
    middle_E = np.array([3.0, 1.8, 3.8, 4.4])[type_E] + 0.45 * (liked_E & (type_E == BROWSE))
    dwell_s_E: F64 = np.minimum(rng.lognormal(middle_E, 0.7), 1_800.0)
    return dwell_s_E


def with_reviews(rng: np.random.Generator, catalogue: Catalogue, events: ShopEvents, span_ms: int) -> ShopEvents:
    """Some purchases are reviewed, days later, by the quality of the item and the mood of the day."""
    bought = np.flatnonzero((events.type_E == PURCHASE) & (rng.random(len(events.type_E)) < REVIEWED))
    later_ms = (rng.lognormal(1.5, 0.5, len(bought)) * DAY_MS).astype(np.int64)
    kept = events.time_ms_E[bought] + later_ms < span_ms
    bought, later_ms = bought[kept], later_ms[kept]
    reviews = events.take(bought)
    mood = rng.normal(0.0, 0.9, len(bought))
    stars = np.rint(np.clip(catalogue.stars_CI[reviews.category_E, reviews.item_E] + mood, 1, 5))
    reviews = ShopEvents(
        user_E=reviews.user_E,
        visit_E=np.full(len(bought), -1),
        category_E=reviews.category_E,
        item_E=reviews.item_E,
        type_E=np.full(len(bought), REVIEW),
        time_ms_E=reviews.time_ms_E + later_ms,
        dwell_s_E=_dwell_s(rng, np.full(len(bought), REVIEW), np.zeros(len(bought), bool)),
        stars_E=stars.astype(np.int64),
    )
    return ShopEvents.join([events, reviews])
