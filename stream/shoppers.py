"""The people of the generated shop: their tastes, when they come, and whose tastes shift.

On the way of an event: before the log. A shopper has a first taste and, if a shift is planted, a second one with no
interest in common. Everything is drawn at once as arrays; the walk through a visit is in simulate.py.

Shapes: U shoppers, T = 2 tastes, F favourites of a taste (the strongest first), S visits in the order of time of each
shopper, C categories.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stream.catalogue import GROUPS, Catalogue

F64 = npt.NDArray[np.float64]
INT = npt.NDArray[np.int64]

FAVOURITES = 6
FAVOURITES_MIN = 3
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
WEEK_HOURS = 168

ROUTINE, FAVOURITE, REPLENISH, EXPLORE = range(4)  # why somebody comes
KINDS = ("", "abrupt", "gradual", "returning")  # of a planted shift; a returning one leaves abruptly and comes back
KIND_SHARES = (0.45, 0.30, 0.25)  # of the shifting shoppers: abrupt, gradual, returning
REPLENISHING_LENGTH = 0.45  # of a visit for what is used up, against other visits
RAMP_VISITS = 6  # a gradual shift takes this many
BEFORE_VISITS_MIN, AWAY_VISITS_MIN, AFTER_VISITS_MIN = 9, 9, 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Shoppers:
    """Who they are.

    Attributes:
        group_U: customer group.
        activity_U: how often they come, relative, lognormal.
        joined_U: when they first may come, as a share of the whole span.
        taste_UTF: favourite categories of both tastes.
        cumulative_UTF: running sums of how strongly they are liked; the last is 1.
        routine_U: over how many of the favourites their visits rotate.
    """

    group_U: INT
    activity_U: F64
    joined_U: F64
    taste_UTF: INT
    cumulative_UTF: F64
    routine_U: INT


@dataclass(frozen=True, kw_only=True, slots=True)
class Visits:
    """When they come, why, and with which taste.

    Attributes:
        ordinal_S: 0, 1, 2, ... within the shopper.
        taste_S: 0 or 1.
        needed_S: what a replenishing visit is for; -1 for other visits.
        kind_U: planted shift, index into KINDS.
        shift_U, until_U: first visit of the shift and of its end (gradual: the ramp is over; returning: the old taste
            is back), as ordinals; -1 where there is none.
    """

    user_S: INT
    start_ms_S: INT
    ordinal_S: INT
    intent_S: INT
    taste_S: INT
    needed_S: INT
    kind_U: INT
    shift_U: INT
    until_U: INT


def draw_shoppers(rng: np.random.Generator, catalogue: Catalogue, count: int, activity_sigma: float) -> Shoppers:
    """`count` shoppers whose groups lean to departments."""
    group_U = rng.integers(0, len(GROUPS), count)
    taste_UTF = np.empty((count, 2, FAVOURITES), np.int64)
    for start in range(0, count, 20_000):  # bounds the memory of the (users, categories) scores
        part = slice(start, min(start + 20_000, count))
        taste_UTF[part] = _tastes(rng, catalogue, group_U[part])
    decay_UT1 = rng.uniform(0.5, 0.8, (count, 2, 1))
    weight_UTF = decay_UT1 ** np.arange(FAVOURITES)
    weight_UTF[np.arange(FAVOURITES) >= rng.integers(FAVOURITES_MIN, FAVOURITES + 1, (count, 2, 1))] = 0.0
    cumulative_UTF = np.cumsum(weight_UTF, axis=2)
    joined_U = np.where(rng.random(count) < 0.75, 0.0, rng.uniform(0.0, 0.6, count))
    return Shoppers(
        group_U=group_U,
        activity_U=rng.lognormal(0.0, activity_sigma, count),
        joined_U=joined_U,
        taste_UTF=taste_UTF,
        cumulative_UTF=cumulative_UTF / cumulative_UTF[:, :, -1:],
        routine_U=rng.integers(2, 4, count),
    )


def draw_visits(
    rng: np.random.Generator, catalogue: Catalogue, shoppers: Shoppers, total: float, weeks: int, shift_share: float
) -> Visits:
    """About `total` visits in `weeks`, with shifts in `shift_share` of the shoppers where there are visits enough."""
    count = len(shoppers.group_U)
    expected_U = shoppers.activity_U * (1 - shoppers.joined_U)
    expected_U *= total / expected_U.sum()
    bought_user, bought_hours, bought_need = _replenishing(rng, catalogue, shoppers, expected_U, weeks)
    other = max(0.5, 1 - REPLENISHING_LENGTH * len(bought_user) / total)  # the rest of the visits
    user_S = np.repeat(np.arange(count), np.maximum(1, rng.poisson(other * expected_U)))
    hours_S = _moments(rng, shoppers.joined_U[user_S], weeks)
    intent_S = rng.choice([ROUTINE, FAVOURITE, EXPLORE], len(user_S), p=[0.48, 0.40, 0.12])
    user_S = np.concatenate([user_S, bought_user])
    start_ms_S = (np.concatenate([hours_S, bought_hours]) * HOUR_MS).astype(np.int64)
    intent_S = np.concatenate([intent_S, np.full(len(bought_user), REPLENISH)])
    needed_S = np.concatenate([np.full(len(hours_S), -1), bought_need])
    order = np.lexsort((start_ms_S, user_S))
    user_S = user_S[order]
    visits_U = np.bincount(user_S, minlength=count)
    ordinal_S = np.arange(len(user_S)) - np.repeat(np.cumsum(visits_U) - visits_U, visits_U)
    kind_U, shift_U, until_U = _plant(rng, visits_U, shift_share)
    return Visits(
        user_S=user_S,
        start_ms_S=start_ms_S[order],
        ordinal_S=ordinal_S,
        intent_S=intent_S[order],
        taste_S=_taste_of_visits(rng, user_S, ordinal_S, kind_U, shift_U, until_U),
        needed_S=needed_S[order],
        kind_U=kind_U,
        shift_U=shift_U,
        until_U=until_U,
    )


def _tastes(rng: np.random.Generator, catalogue: Catalogue, group_U: INT) -> INT:
    """Distinct favourites of both tastes, of other departments each time (Gumbel noise draws without replacement)."""
    count, departments = len(group_U), int(catalogue.department_C.max()) + 1
    lean_GD = np.zeros((len(GROUPS), departments))
    for group, leanings in enumerate(catalogue.group_departments):
        lean_GD[group, leanings] = 2.5
    with np.errstate(divide="ignore"):
        base_C = np.log(catalogue.popularity_C)
    tastes = np.empty((count, 2, FAVOURITES), np.int64)
    taken_UD = np.zeros((count, departments), bool)
    for taste in range(2):
        score_UD = (lean_GD[group_U] if taste == 0 else 0.0) + rng.gumbel(size=(count, departments))
        score_UD[taken_UD] = -np.inf
        main_UD = np.zeros((count, departments), bool)
        np.put_along_axis(main_UD, np.argsort(-score_UD, axis=1)[:, :2], True, axis=1)
        score_UC = base_C + rng.gumbel(size=(count, len(base_C))) + 3.0 * main_UD[:, catalogue.department_C]
        score_UC[taken_UD[:, catalogue.department_C]] = -np.inf
        tastes[:, taste] = np.argsort(-score_UC, axis=1)[:, :FAVOURITES]
        np.put_along_axis(taken_UD, catalogue.department_C[tastes[:, taste]], True, axis=1)
    return tastes


def _moments(rng: np.random.Generator, joined_S: F64, weeks: int) -> F64:
    """Hours since the start, by the rhythm of the week: evenings, noon, more on Saturday and Sunday."""
    hour = np.arange(WEEK_HOURS) % 24
    day = np.arange(WEEK_HOURS) // 24
    intensity = 0.05 + np.exp(-((hour - 20.0) ** 2) / 8) + 0.6 * np.exp(-((hour - 12.5) ** 2) / 6)
    intensity *= np.array([0.9, 0.85, 0.9, 0.95, 1.0, 1.4, 1.5])[day]
    cumulative = np.concatenate([[0.0], np.cumsum(np.tile(intensity, weeks))])
    grid = np.arange(len(cumulative), dtype=float)
    from_S = np.interp(joined_S * weeks * WEEK_HOURS, grid, cumulative)
    hours_S: F64 = np.interp(from_S + rng.random(len(joined_S)) * (cumulative[-1] - from_S), cumulative, grid)
    return hours_S


def _replenishing(
    rng: np.random.Generator, catalogue: Catalogue, shoppers: Shoppers, expected_U: F64, weeks: int
) -> tuple[INT, F64, INT]:
    """(shopper, hours, category) of the visits for what is used up: about the same days apart each time."""
    days = 7.0 * weeks
    needs_U = np.where(expected_U >= 5, rng.choice(3, len(expected_U), p=[0.45, 0.4, 0.15]), 0)
    user_N = np.repeat(np.arange(len(expected_U)), needs_U)
    need_N = rng.choice(catalogue.replenished, len(user_N))
    period_N = rng.choice([5.0, 7.0, 10.0, 14.0, 21.0], len(user_N))
    phase_N = rng.random(len(user_N)) * period_N
    times_N = np.ceil((days - phase_N) / period_N).astype(np.int64)
    each = np.repeat(np.arange(len(user_N)), times_N)
    turn = np.arange(len(each)) - np.repeat(np.cumsum(times_N) - times_N, times_N)
    day = phase_N[each] + turn * period_N[each] + rng.normal(0.0, 0.06, len(each)) * period_N[each]
    hours = np.floor(day) * 24 + rng.normal(19.0, 1.5, len(each))
    kept = (day >= shoppers.joined_U[user_N[each]] * days) & (hours >= 0) & (hours < days * 24)
    return user_N[each][kept], hours[kept], need_N[each][kept]


def _plant(rng: np.random.Generator, visits_U: INT, share: float) -> tuple[INT, INT, INT]:
    """(kind, first visit, end visit) of each shopper's shift; only where there are visits enough on both sides."""
    count = len(visits_U)
    kind_U, shift_U, until_U = np.zeros(count, np.int64), np.full(count, -1), np.full(count, -1)
    able = np.flatnonzero(visits_U >= BEFORE_VISITS_MIN + RAMP_VISITS + AFTER_VISITS_MIN)
    chosen = rng.permutation(able)[: round(share * count)]
    kind = rng.choice([1, 2, 3], len(chosen), p=KIND_SHARES)
    short = visits_U[chosen] < BEFORE_VISITS_MIN + AWAY_VISITS_MIN + AFTER_VISITS_MIN
    kind[(kind == 3) & short] = 1
    visits = visits_U[chosen]
    ramp = np.where(kind == 2, RAMP_VISITS, np.where(kind == 3, AWAY_VISITS_MIN, 0))
    room = visits - BEFORE_VISITS_MIN - AFTER_VISITS_MIN - ramp
    latest = np.where(kind == 3, room // 2, room)  # leaves a returning shopper time to stay away
    first = BEFORE_VISITS_MIN + (rng.random(len(chosen)) * (latest + 1)).astype(np.int64)
    stay = ((visits - AFTER_VISITS_MIN - first - AWAY_VISITS_MIN) * rng.random(len(chosen)) * 0.7).astype(np.int64)
    kind_U[chosen] = kind
    shift_U[chosen] = first
    until_U[chosen] = np.where(kind == 2, first + RAMP_VISITS, np.where(kind == 3, first + AWAY_VISITS_MIN + stay, -1))
    return kind_U, shift_U, until_U


def _taste_of_visits(
    rng: np.random.Generator, user_S: INT, ordinal_S: INT, kind_U: INT, shift_U: INT, until_U: INT
) -> INT:
    kind_S, since_S = kind_U[user_S], ordinal_S - shift_U[user_S]
    shifted_S = (kind_S > 0) & (since_S >= 0)
    ramp_S = (since_S + 1.0) / (RAMP_VISITS + 1.0)
    shifted_S &= (kind_S != 2) | (rng.random(len(user_S)) < ramp_S)
    shifted_S &= (kind_S != 3) | (ordinal_S < until_U[user_S])
    return shifted_S.astype(np.int64)
