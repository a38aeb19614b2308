"""The forecaster: the same for any cut into batches, untrained as good as the rule, and ranks that hide nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from made_events import made, rounds, walked

from models.forecaster import Forecaster, Packing
from models.learner import Learner
from models.profile import HIDDEN
from models.settings import LearningSettings, NetworkSettings


def trained() -> Forecaster:
    """A little learned of many interests, so that no part of the network is at its start."""
    random = np.random.default_rng(3)
    events = rounds(random, 1_500, interests=200)
    learner = Learner(NetworkSettings(), LearningSettings(warmup_steps=1), seed=3, device="cpu")
    names = {int(k): f"i{k}" for k in np.unique(events.interest)}
    learner.observe(events.user_row.astype(np.uint64) + np.uint64(1), events, names)
    learner.learn(20)
    return Forecaster.from_weights(learner.weights())


@pytest.fixture(scope="module")
def forecaster() -> Forecaster:
    return trained()


def encoded(forecaster: Forecaster, events: Any, users: int, cuts: list[int]) -> Any:
    advanced = walked(events, users)
    hidden_UH = np.zeros((users, HIDDEN), np.float32)
    before, after = [], []
    for start, end in zip([0, *cuts], [*cuts, len(events)], strict=True):
        span = slice(start, end)
        b, a, hidden_UH = forecaster.encode(
            events.take(span), advanced.gap_s_B[span], advanced.aggregates_BA[span], hidden_UH
        )
        before.append(b)
        after.append(a)
    return np.concatenate(before), np.concatenate(after), hidden_UH


def test_states_do_not_depend_on_the_cut_into_batches(forecaster: Forecaster) -> None:
    """One batch, single events, empty batches: the same states before and after each event."""
    events = rounds(np.random.default_rng(5), 300, users=7)
    whole = encoded(forecaster, events, 7, [])
    for cuts in ([1, 1, 150], list(range(1, 300)), [299]):
        for one, two in zip(whole, encoded(forecaster, events, 7, cuts), strict=True):
            assert one == pytest.approx(two, abs=1e-5)


def test_a_state_before_is_the_state_after_the_event_before(forecaster: Forecaster) -> None:
    """Users do not mix: each one's chain of states is unbroken."""
    events = rounds(np.random.default_rng(6), 200, users=9)
    before, after, hidden_UH = encoded(forecaster, events, 9, [])
    for user in range(9):
        own = np.flatnonzero(events.user_row == user)
        assert np.array_equal(before[own[1:]], after[own[:-1]])
        assert np.array_equal(hidden_UH[user], after[own[-1]])
        assert not before[own[0]].any()


def test_packing_holds_every_event_once() -> None:
    """Users by falling count, time-major; users without events are left out."""
    packing = Packing.of(np.array([2, 0, 2, 2, 0, 5]), 7)
    assert packing.batch_sizes_T.tolist() == [3, 2, 1]
    assert packing.user_S.tolist() == [2, 0, 5]
    assert packing.event_P.tolist() == [0, 1, 5, 2, 4, 3]
    assert packing.earlier_P.tolist() == [0, 1, 3]


def test_untrained_it_ranks_like_the_recency_rule() -> None:
    """Own interests by recency, the slow profile by weight, then what is popular; a miss is 0."""
    interests = [8, 8, 8, 9] + [1, 2, 3, 2] * 4 + [5]
    events = made([0] * len(interests), interests)
    fresh = Forecaster.initial(NetworkSettings(), 7)
    after = walked(events, 1).after.take(slice(len(events) - 1, len(events)))
    hidden = np.random.default_rng(0).standard_normal((1, HIDDEN)).astype(np.float32)
    found = fresh.forecast(hidden, after, np.array([60.0], np.float32), steps=1, top_k=8)
    assert found.interest_ENK[0, 0].tolist() == [5, 2, 3, 1, 8, 9, 0, 0]
    ranks = [int(fresh.rank(hidden, after, None, np.array([[k]], np.uint32))[0, 0]) for k in (5, 2, 3, 1, 8, 9, 77)]
    assert ranks == [1, 2, 3, 4, 5, 6, 0]


def test_with_a_vocabulary_but_no_step_own_interests_come_before_popular_ones() -> None:
    """The gate's start lets nothing of the vocabulary pass before the last candidate, however popular."""
    others = made([1] * 300, [42] * 200 + [41] * 100)
    own = made([0] * 48, range(1, 49))
    learner = Learner(NetworkSettings(), LearningSettings(), seed=1, device="cpu")
    learner.observe(np.full(300, 2, np.uint64), others, {})
    learner._count(np.arange(300))
    after = walked(own, 1).after.take(slice(47, 48))
    found = learner.forecaster().forecast(np.zeros((1, HIDDEN), np.float32), after, None, steps=1, top_k=50)
    keys = found.interest_ENK[0, 0].tolist()
    assert keys[:16] == list(range(48, 32, -1))
    new_user = walked(made([0], [1]), 1).before
    found = learner.forecaster().forecast(np.zeros((1, HIDDEN), np.float32), new_user, None, steps=1, top_k=2)
    assert found.interest_ENK[0, 0].tolist() == [42, 41]


def test_ranks_agree_with_the_probabilities(forecaster: Forecaster) -> None:
    """The rank of each interest is its place among all probabilities, for every step; probabilities sum to 1."""
    events = rounds(np.random.default_rng(8), 60, users=4, interests=200)
    after = walked(events, 4).after.take(slice(20, 60))
    _b, hidden, _n = encoded(forecaster, events, 4, [])
    hidden = hidden[20:60]
    gap = np.full(40, 30.0, np.float32)
    found = forecaster.forecast(hidden, after, gap, steps=3, top_k=260)
    assert found.probability_ENK.sum(axis=2) == pytest.approx(1.0, abs=1e-4)
    assert (np.diff(found.probability_ENK, axis=2) <= 0).all()
    assert found.type_probability_ET.sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    for place in (0, 1, 5, 40):
        target_EN = found.interest_ENK[:, :, place]
        rank_EN, p_EN = forecaster.rank_and_probability(hidden, after, gap, target_EN)
        assert p_EN == pytest.approx(found.probability_ENK[:, :, place], rel=1e-3)
        assert (rank_EN >= place + 1).all()
        ties = found.probability_ENK <= found.probability_ENK[:, :, place : place + 1] * (1 - 1e-4)
        first_worse = np.where(ties.any(axis=2), ties.argmax(axis=2), 260)
        assert (rank_EN <= first_worse).all()


def test_an_unknown_interest_is_a_miss_unless_it_is_the_users_own(forecaster: Forecaster) -> None:
    """Outside of vocabulary and candidates the rank is 0; a candidate that no vocabulary holds is ranked."""
    events = made([0, 0], [999_999, 3])
    after = walked(events, 1).after.take(slice(1, 2))
    hidden = np.zeros((1, HIDDEN), np.float32)
    rank_EN, p_EN = forecaster.rank_and_probability(hidden, after, None, np.array([[888_888, 999_999]], np.uint32))
    assert (rank_EN[0, 0], p_EN[0, 0]) == (0, 0.0)
    assert rank_EN[0, 1] > 0
    known = int(forecaster.forecast(hidden, after, None, steps=1, top_k=3).interest_ENK[0, 0, 2])
    assert forecaster.name(known) == f"i{known}"
    assert forecaster.name(999_999) is None


def test_a_batch_of_forecasts_equals_single_ones(forecaster: Forecaster) -> None:
    """What is forecast for one user does not depend on who else is in the batch."""
    events = rounds(np.random.default_rng(9), 50, users=5)
    after = walked(events, 5).after
    _b, hidden, _n = encoded(forecaster, events, 5, [])
    whole = forecaster.forecast(hidden, after, None, steps=2, top_k=5)
    for e in (0, 17, 49):
        one = forecaster.forecast(hidden[e : e + 1], after.take(slice(e, e + 1)), None, steps=2, top_k=5)
        assert one.probability_ENK[0] == pytest.approx(whole.probability_ENK[e], abs=1e-5)
    nobody = forecaster.forecast(hidden[:0], after.take(slice(0, 0)), None, steps=2, top_k=5)
    assert nobody.interest_ENK.shape == (0, 2, 5)
