"""Maps of probabilities: they keep order and sum, hold what they promise on outcomes, and forget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from made_events import rounds

from models.calibration import KNOTS, Calibration, map_of
from models.forecaster import Forecaster
from models.learner import Learner
from models.settings import LearningSettings, NetworkSettings
from models.snapshot import Weights

ROWS, SLOTS = 40, 5


def forecasts(random: np.random.Generator, count: int) -> dict[str, Any]:
    """Distributions over a vocabulary and candidates, the last of which is in no vocabulary; the gate at .4."""
    general_EV = random.dirichlet(np.full(ROWS, 0.3), count).astype(np.float32)
    copied_EC = (0.4 * random.dirichlet(np.full(SLOTS, 0.6), count)).astype(np.float32)
    row_EC = np.stack([random.permutation(ROWS)[:SLOTS] for _ in range(count)]).astype(np.int32)
    row_EC[:, -1] = -1
    key_EC = np.where(row_EC >= 0, row_EC + 1, 10_000).astype(np.uint32)
    return {
        "general_EV": general_EV,
        "copied_EC": copied_EC,
        "rest_E": np.full(count, 0.6, np.float32),
        "row_EC": row_EC,
        "key_EC": key_EC,
    }


def mixed(made: dict[str, Any]) -> Any:
    """(E, ROWS + 1): the probabilities themselves, the interest without a row last."""
    whole = np.zeros((len(made["rest_E"]), ROWS + 1))
    whole[:, :ROWS] = made["rest_E"][:, None].astype(np.float64) * made["general_EV"]
    for e, rows in enumerate(made["row_EC"]):
        whole[e, rows] += made["copied_EC"][e]
    return whole


def test_a_map_keeps_order_and_sum_and_is_the_power_of_its_bands() -> None:
    """Against the formula, interest by interest."""
    random = np.random.default_rng(0)
    made = forecasts(random, 50)
    before = mixed(made)
    calibration = Calibration.empty()
    slope_K = np.array([0.5, -0.6, 0.8, 0.3, -0.4, 0.2])
    calibration.slope_MK[1] = slope_K
    calibration.apply(**made, map_E=np.ones(50, np.int64))
    after = mixed(made)
    assert after.sum(axis=1) == pytest.approx(before.sum(axis=1), abs=1e-5)
    assert (np.argsort(after, axis=1) == np.argsort(before, axis=1)).all()
    factor = np.ones_like(before)
    for knot, end, slope in zip(KNOTS, [*KNOTS[1:], np.inf], slope_K, strict=True):
        factor *= np.where(before > knot, (np.clip(before, knot, end) / knot) ** slope, 1.0)
    expected = before * factor
    assert after == pytest.approx(expected / expected.sum(axis=1, keepdims=True), rel=1e-4, abs=1e-7)


def test_other_maps_leave_a_forecast_as_it_is() -> None:
    """Known and unknown times have their own: only that of the forecast is used."""
    made = forecasts(np.random.default_rng(1), 4)
    before = mixed(made)
    calibration = Calibration.empty()
    calibration.slope_MK[0] = 1.0
    calibration.apply(**made, map_E=np.ones(4, np.int64))
    assert (mixed(made) == before).all()
    assert map_of(np.array([1.0, np.nan], np.float32), 2).tolist() == [1, 0]
    assert map_of(None, 2).tolist() == [0, 0]


@pytest.mark.parametrize("power", [0.6, 1.0, 1.8])
def test_it_learns_how_sure_to_be(power: float) -> None:
    """What comes is drawn from sharper or flatter distributions: the likeliest interest is given what it gets right."""
    random = np.random.default_rng(2)
    calibration = Calibration.empty()
    gaps = []
    for _ in range(150):
        made = forecasts(random, 64)
        whole = mixed(made)
        true = whole**power / (whole**power).sum(axis=1, keepdims=True)
        came = np.array([random.choice(ROWS + 1, p=p) for p in true])
        used = {name: values.copy() for name, values in made.items()}
        calibration.apply(**used, map_E=np.zeros(64, np.int64))
        given = mixed(used).max(axis=1)
        gaps.append([given.mean() - (whole.argmax(axis=1) == came).mean(), whole.max(axis=1).mean() - given.mean()])
        target = np.where(came == ROWS, 10_000, came + 1).astype(np.uint32)
        rows = np.where(came == ROWS, -1, came).astype(np.int32)
        calibration.learn(**made, target_E=target, target_row_E=rows, map_E=np.zeros(64, np.int64))
    late = np.array(gaps[50:]).mean(axis=0)
    assert abs(late[0]) < 0.015
    assert late[1] * (1.0 - power) > 0.02 or power == 1.0  # without the map it would have been off
    assert not calibration.slope_MK[1:].any()


def test_slopes_are_forgotten_where_nothing_speaks_for_them() -> None:
    """After a change of the stream the map follows it within some thousand forecasts."""
    random = np.random.default_rng(3)
    calibration = Calibration.empty()
    calibration.slope_MK[0] = 0.8
    calibration.information_MKK[0] *= 100.0
    for _ in range(150):
        made = forecasts(random, 64)
        came = np.array([random.choice(ROWS + 1, p=p / p.sum()) for p in mixed(made)])
        target = np.where(came == ROWS, 10_000, came + 1).astype(np.uint32)
        rows = np.where(came == ROWS, -1, came).astype(np.int32)
        calibration.learn(**made, target_E=target, target_row_E=rows, map_E=np.zeros(64, np.int64))
    assert np.abs(calibration.slope_MK[0, :4]).max() < 0.4


def test_what_nobody_can_name_makes_forecasts_more_careful() -> None:
    """Interests that are never among those that could be forecast: less is given to the likeliest."""
    random = np.random.default_rng(4)
    calibration = Calibration.empty()
    for _ in range(40):
        nobody = np.full(64, 99_999, np.uint32)
        calibration.learn(
            **forecasts(random, 64), target_E=nobody, target_row_E=np.full(64, -1, np.int32),
            map_E=np.zeros(64, np.int64),
        )  # fmt: skip
    made = forecasts(random, 64)
    before = mixed(made).max(axis=1)
    calibration.apply(**made, map_E=np.zeros(64, np.int64))
    assert (mixed(made).max(axis=1) < before).all()


def test_a_learner_makes_maps_of_the_next_event_and_its_weights_carry_them() -> None:
    """At a known time and not; forecasts use them for the next event alone."""
    events = rounds(np.random.default_rng(5), 3_000)
    learner = Learner(NetworkSettings(), LearningSettings(warmup_steps=5, horizon_steps=3), seed=1, device="cpu")
    for start in range(0, 3_000, 500):
        span = slice(start, start + 500)
        learner.observe(events.user_row[span].astype(np.uint64) + np.uint64(1), events.take(span), {})
        learner.learn(100)
    weights = Weights.from_bytes(learner.weights_bytes())
    slope_MK = weights.tensors["calibration.slope"]
    assert slope_MK.any(axis=1).all()
    row_E = np.arange(2_900, 3_000)
    snapshot, hidden_EH = learner._history.snapshot(row_E), learner._history.hidden[row_E]
    with_maps = Forecaster.from_weights(weights).forecast(hidden_EH, snapshot, None, steps=3, top_k=5)
    weights.tensors["calibration.slope"] = np.zeros_like(slope_MK)
    without = Forecaster.from_weights(weights).forecast(hidden_EH, snapshot, None, steps=3, top_k=5)
    assert (
        with_maps.interest_ENK == without.interest_ENK
    ).mean() > 0.99  # floats of two kinds may order equals otherwise
    assert (with_maps.probability_ENK[:, 0, 0] != without.probability_ENK[:, 0, 0]).mean() > 0.9
    assert (with_maps.probability_ENK[:, 1:] == without.probability_ENK[:, 1:]).all()
