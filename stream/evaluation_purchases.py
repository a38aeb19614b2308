"""Forecasts of purchases in an evaluation, beside two that know counts alone, on the same pairs.

Beside the way of an event, behind stream/evaluation.py. A pair is the moment before an event and an interest that
the model forecast there; it is bought where the user's next n events hold a purchase of it. Moments without n events to
come are left out. The two others, told of the past alone:

    constant   the share of the pairs so far that were bought
    shares     1 - (1 - u x i)^n: u the interest's decayed share of the user's events, i the share of its events that
               are purchases, times how much more than others the user buys; each shrunk to what is usual
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from models.evaluate import next_events, purchase_figures
from models.purchases import PURCHASE
from stream.evaluation import Asked, Outcome, Stream, Wanted

_USER_HALF_LIFE_EVENTS = 16.0
_PRIOR_EVENTS = 20.0  # of the usual share of purchases, that every user and interest has had
Doubles = npt.NDArray[np.float64]


def purchase_rows(stream: Stream, outcomes: Sequence[Outcome], wanted: Wanted) -> list[dict[str, Any]]:
    """A row for each model that forecasts purchases, and beside each the two others on its pairs."""
    rows = []
    for outcome in outcomes:
        asked = outcome.purchases
        if asked is None:
            continue
        index_EN = next_events(stream.user_E, asked.events)
        whole = (index_EN[:, -1] >= 0) & (np.arange(len(stream)) >= wanted.first(len(stream)))
        owner_P, place_P = np.nonzero((asked.key_EK != 0) & whole[:, None])
        key_P = asked.key_EK[owner_P, place_P]
        window_PN = index_EN[owner_P]
        bought_PN = (stream.type_E[window_PN] == PURCHASE) & (stream.key_E[window_PN] == key_P[:, None])
        bought_P = bought_PN.any(axis=1)
        given = {
            outcome.model: asked.probability_EK[owner_P, place_P].astype(np.float64),
            "constant": _constant(owner_P, window_PN[:, -1], bought_P),
            "shares": _shares(stream, owner_P, key_P, asked),
        }
        rows += [
            {
                "model": name,
                "pairs_of": outcome.model,
                "seed": outcome.seed,
                "events": asked.events,
                **asdict(purchase_figures(probability_P, bought_P)),
            }
            for name, probability_P in given.items()
        ]
    return rows


def _constant(owner_P: Any, known_P: Any, bought_P: Any) -> Doubles:
    """Share of the pairs bought, among those whose last event came before the moment."""
    order = np.argsort(known_P, kind="stable")
    done_P = np.searchsorted(known_P[order], owner_P, side="left")
    hits = np.concatenate([[0], np.cumsum(bought_P[order])])
    share: Doubles = (hits[done_P] + 1.0) / (done_P + 100.0)
    return share


def _shares(stream: Stream, owner_P: Any, key_P: Any, asked: Asked) -> Doubles:
    """See the module's docstring; one pass over the stream, asked before each event."""
    step = 0.5 ** (1.0 / _USER_HALF_LIFE_EVENTS)
    own: dict[int, dict[int, float]] = defaultdict(dict)  # user -> interest -> decayed count
    total: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])  # user -> decayed events, events, purchases
    of_interest: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])  # events, purchases
    purchases = 0
    first_E = np.searchsorted(owner_P, np.arange(len(stream) + 1))
    share_P = np.zeros(len(owner_P))
    for e in range(len(stream)):  # as many events lie before this one
        user, key = int(stream.user_E[e]), int(stream.key_E[e])
        decayed, seen, bought = total[user]
        usual = (purchases + 1e-3) / (e + 1.0)
        buys = (bought + _PRIOR_EVENTS * usual) / (seen + _PRIOR_EVENTS) / usual
        for p in range(first_E[e], first_E[e + 1]):
            asked_key = int(key_P[p])
            count, sold = of_interest[asked_key]
            popular = count / max(1, e)
            often = (own[user].get(asked_key, 0.0) + popular) / (decayed + 1.0)
            sells = (sold + _PRIOR_EVENTS * usual) / (count + _PRIOR_EVENTS)
            share_P[p] = 1.0 - (1.0 - min(1.0, often * sells * buys)) ** asked.events
        mine = own[user]
        for interest in mine:
            mine[interest] *= step
        mine[key] = mine.get(key, 0.0) + 1.0
        is_purchase = float(stream.type_E[e] == PURCHASE)
        total[user] = [decayed * step + 1.0, seen + 1.0, bought + is_purchase]
        of_interest[key][0] += 1.0
        of_interest[key][1] += is_purchase
        purchases += int(is_purchase)
    return share_P
