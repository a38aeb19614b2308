"""Candidates: who they are, in which order, and what is said about them."""

from __future__ import annotations

import numpy as np
import pytest
from made_events import HOUR_MS, made, walked

from models.candidates import CONTEXT, FEATURES, candidates
from models.profile import RING


def test_candidates_are_the_ring_by_recency_then_the_profile_by_weight() -> None:
    """Distinct interests of the ring, newest first; behind them those that only the slow profile still knows."""
    interests = [8, 8, 8, 9] + [1, 2, 3, 2] * (RING // 4) + [5]
    after = walked(made([0] * len(interests), interests), 1).after
    key_EC, number_ECF, _context = candidates(after, np.full(len(after), np.nan, np.float32))
    found = [key for key in key_EC[-1].tolist() if key]
    assert found == [5, 2, 3, 1, 8, 9]
    in_ring = number_ECF[-1, :6, FEATURES.index("in_ring")].tolist()
    assert in_ring == [1, 1, 1, 1, 0, 0]
    assert number_ECF[-1, :6, 0] == pytest.approx(np.log([1, 2, 3, 4, 5, 6]))
    assert not number_ECF[-1, 6:].any()


def test_a_user_without_events_has_no_candidates() -> None:
    """The record before the first event offers nothing, and says that the user is new."""
    before = walked(made([0], [4]), 1).before
    key_EC, _numbers, context_EG = candidates(before, np.full(1, np.nan, np.float32))
    assert not key_EC.any()
    assert context_EG[0, CONTEXT.index("new_user")] == 1.0


def test_successor_share_and_run_length() -> None:
    """What followed the last interest before is told, and how long the last run is."""
    interests = [1, 2, 1, 2, 1, 3, 1, 1]
    after = walked(made([0] * 8, interests), 1).after
    key_EC, number_ECF, context_EG = candidates(after, np.full(8, np.nan, np.float32))
    share = dict(zip(key_EC[-1].tolist(), number_ECF[-1, :, FEATURES.index("own_successor")].tolist(), strict=True))
    assert share[2] == pytest.approx(2 / 3)
    assert share[3] == pytest.approx(1 / 3)
    assert context_EG[-1, CONTEXT.index("run_length")] == pytest.approx(0.5)


def test_elapsed_time_grows_with_the_gap() -> None:
    """The time since each candidate's last event counts up to the moment of the forecast."""
    after = walked(made([0, 0], [1, 2], times_ms=[10**12, 10**12 + HOUR_MS]), 1).after
    elapsed = FEATURES.index("log_elapsed")
    now = candidates(after, np.zeros(2, np.float32))[1][1, :2, elapsed]
    later = candidates(after, np.full(2, 3_600, np.float32))[1][1, :2, elapsed]
    assert now == pytest.approx([-1.0, np.log1p(3_600) / 8 - 1], abs=1e-3)
    assert later == pytest.approx([np.log1p(3_600) / 8 - 1, np.log1p(7_200) / 8 - 1], abs=1e-3)


def test_everything_is_finite_and_bounded() -> None:
    """Years between events, thousands of them, one interest only: no number leaves its range."""
    random = np.random.default_rng(4)
    times = 10**12 + np.cumsum(random.choice([0, 1_000, 10**11], 600))
    after = walked(made(random.integers(0, 3, 600), random.integers(1, 40, 600), times_ms=times), 3).after
    for gap in (np.nan, 0.0, 1e9):
        _key, number_ECF, context_EG = candidates(after, np.full(600, gap, np.float32))
        assert np.isfinite(number_ECF).all()
        assert np.isfinite(context_EG).all()
        assert np.abs(number_ECF).max() < 10
        assert np.abs(context_EG).max() < 10
