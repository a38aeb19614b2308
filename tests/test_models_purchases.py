"""Forecasts of purchases: learned from what came n events later, calibrated, and blind to what they are to foretell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from made_events import made, walked

from models.evaluate import purchase_figures
from models.features import TYPE_CODES, EventColumns
from models.forecaster import Forecaster
from models.learner import Learner
from models.profile import HIDDEN
from models.purchases import Purchases, came
from models.settings import LearningSettings, NetworkSettings
from models.snapshot import Weights

NETWORK = NetworkSettings(interest_width=16, item_rows=64, item_width=4, copy_width=8)
LEARNING = LearningSettings(warmup_steps=5, horizon_steps=3)
BROWSE, CART, BUY = TYPE_CODES["browse"], TYPE_CODES["cart"], TYPE_CODES["purchase"]
USERS = 30


def shop(count: int, seed: int = 0) -> EventColumns:
    """Users look around; one look in eight ends in a cart; what lies in a cart is bought with the next event or never.

    Half of what is carted is bought, of interests 1 to 4 alone; 5 to 8 are carted as often and never bought.
    """
    random = np.random.default_rng(seed)
    carted = np.zeros(USERS, np.int64)
    users, interests, types = random.integers(0, USERS, count), np.zeros(count, np.int64), np.zeros(count, np.int64)
    for b, user in enumerate(users.tolist()):
        interests[b], types[b] = random.integers(1, 9), BROWSE
        if carted[user]:
            if carted[user] <= 4 and random.random() < 0.5:
                interests[b], types[b] = carted[user], BUY
            carted[user] = 0
        elif random.random() < 0.125:
            types[b], carted[user] = CART, interests[b]
    return made(users, interests, types=types)


def observed(learner: Learner, events: EventColumns, span: slice) -> None:
    learner.observe(events.user_row[span].astype(np.uint64) + np.uint64(1), events.take(span), {})


def taught(events: EventColumns, learning: LearningSettings = LEARNING) -> Learner:
    learner = Learner(NETWORK, learning, seed=1, device="cpu")
    for start in range(0, len(events), 512):
        observed(learner, events, slice(start, start + 512))
        learner.learn(100)
    return learner


def asked(forecaster: Forecaster, events: EventColumns) -> tuple[Any, Any, Any]:
    """Interests, probabilities and what became of them, after each event with three more to come."""
    advanced = walked(events, USERS)
    hidden_UH = np.zeros((USERS, HIDDEN), np.float32)
    _before, after_BH, _new = forecaster.encode(events, advanced.gap_s_B, advanced.aggregates_BA, hidden_UH)
    found = forecaster.forecast(after_BH, advanced.after, None, steps=1, top_k=8)
    key_EK, bought_EK = found.interest_ENK[:, 0], np.zeros((len(events), 8), np.bool_)
    whole = np.zeros(len(events), np.bool_)
    for e, user in enumerate(events.user_row.tolist()):
        later = [b for b in range(e + 1, len(events)) if events.user_row[b] == user][:3]
        whole[e] = len(later) == 3
        for k, key in enumerate(key_EK[e].tolist()):
            bought_EK[e, k] = any(events.interest[b] == key and events.type[b] == BUY for b in later)
    return key_EK[whole], found.purchase_probability_EK[whole], bought_EK[whole]


def test_it_learns_what_is_bought_and_how_likely() -> None:
    """What lies in the cart is told from what was carted and is never bought; probabilities mean what they say."""
    events = shop(9_000)
    forecaster = taught(events.take(slice(0, 8_000))).forecaster()
    key_EK, p_EK, bought_EK = asked(forecaster, events.take(slice(8_000, 9_000)))
    used = key_EK != 0
    ours = purchase_figures(p_EK[used], bought_EK[used])
    rate = np.full(used.sum(), bought_EK[used].mean())
    constant = purchase_figures(rate, bought_EK[used])
    assert ours.auc is not None and ours.log_loss is not None and constant.log_loss is not None and ours.ece is not None
    assert ours.auc > 0.7 and ours.log_loss < 0.95 * constant.log_loss
    assert ours.ece < 0.01 < 0.02 < p_EK.max()
    never = p_EK[used & (key_EK > 4)]
    assert never.mean() < 0.3 * p_EK[used & (key_EK <= 4)].mean()


def test_it_starts_as_counts_alone() -> None:
    """With its head at the start the probability is that of the shares: pairs, interest, user."""
    forecaster = taught(shop(3_000), LearningSettings(warmup_steps=10**9, horizon_steps=3)).forecaster()
    key_EK, p_EK, bought_EK = asked(forecaster, shop(1_500, seed=5))
    used = key_EK != 0
    assert p_EK[used].mean() == pytest.approx(bought_EK[used].mean(), abs=0.02)
    assert p_EK[used & (key_EK > 4)].mean() < 0.3 * p_EK[used & (key_EK <= 4)].mean()


def test_nothing_is_said_where_nothing_was_bought() -> None:
    """Without a purchase there is no loss, no random number is drawn for one, and no probability is given."""
    events = shop(1_200)
    events.type[events.type == BUY] = BROWSE
    learner, without = taught(events), taught(events, LearningSettings(warmup_steps=5, horizon_steps=3))
    without._purchase_loss = lambda number_B: 0.0  # type: ignore[method-assign]
    assert not learner.forecaster().knows_purchases
    assert not asked(learner.forecaster(), events.take(slice(0, 200)))[1].any()
    assert learner.weights_bytes() == without.weights_bytes()


def test_its_own_events_are_taken_out_of_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted after a moment is not seen by its gradient: the counts are as if its events had not come."""
    from models import learner as module

    checked = 0
    genuine = module.pairs_of

    def careful(knowledge: Any, purchases: Any, *rest: Any, seen_EK: Any, bought_EK: Any) -> Any:
        nonlocal checked
        row_EK = knowledge.find(rest[3].ravel()).reshape(rest[3].shape)
        there = row_EK >= 0
        assert (seen_EK[there] <= knowledge.popularity_V[row_EK[there]] * 1.001 + 1e-3).all()
        assert (bought_EK[there] <= purchases.weight_V[row_EK[there]] * 1.001 + 1e-3).all()
        assert (bought_EK <= seen_EK).all()
        checked += int(bought_EK.sum())
        return genuine(knowledge, purchases, *rest, seen_EK=seen_EK, bought_EK=bought_EK)

    monkeypatch.setattr(module, "pairs_of", careful)
    taught(shop(4_000))
    assert checked > 50


def test_counts_travel_with_the_weights_and_the_learner() -> None:
    """A worker with the weights says the same as the learner, and so does a restored learner."""
    events = shop(3_000)
    learner = taught(events)
    few = events.take(slice(0, 300))
    expected = asked(learner.forecaster(), few)[1]
    assert expected.any()
    worker = Forecaster.from_weights(Weights.from_bytes(learner.weights().to_bytes()))
    back = Learner.restore(learner.state_bytes(), NETWORK, LEARNING, device="cpu")
    for other in (worker, back.forecaster()):
        assert asked(other, few)[1] == pytest.approx(expected, abs=1e-6)


def test_counts_of_a_row_that_is_given_up_are_cleared() -> None:
    """A row's next interest inherits no purchases; growing keeps them."""
    purchases = Purchases.empty()
    purchases.grow(3)
    purchases.count(np.array([0, 1, 1, -1], np.int32), np.array([BUY, BUY, BROWSE, BUY]), 1e9)
    assert purchases.weight_V.tolist() == pytest.approx([1.0, 1.0, 0.0]) and purchases.known
    purchases.grow(4)
    assert purchases.weight_V[:2].tolist() == pytest.approx([1.0, 1.0])
    purchases.clear(np.array([1]))
    assert purchases.weight_V[1] == 0.0


def test_what_came_is_counted_by_interest() -> None:
    """Of each interest asked about, how many of the chosen events are of it; an empty place has none."""
    found = came(
        np.array([[5, 7, 0]], np.uint32), np.array([[5, 5, 0, 7]], np.uint32), np.array([[True, True, True, False]])
    )
    assert found.tolist() == [[2, 0, 0]]


def test_figures_of_purchases() -> None:
    """Log loss, AUC with ties as a half, and calibration, against numbers worked out by hand."""
    found = purchase_figures(np.array([0.8, 0.2, 0.2, 0.2]), np.array([True, True, False, False]))
    assert found.log_loss == pytest.approx(-(np.log(0.8) + np.log(0.2) + 2 * np.log(0.8)) / 4, abs=1e-6)
    assert found.auc == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    assert found.ece == pytest.approx((0.2 + 0.8 + 0.2 + 0.2) / 4)
    assert purchase_figures(np.array([0.1]), np.array([False])).auc is None
    assert purchase_figures(np.zeros(0), np.zeros(0, np.bool_)).log_loss is None
