"""Requested and measured alarm rates: intervals that cover, budgets that become rates, thresholds that follow."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_models_profile import EVERY, columns

from models.profile import USER, advance
from models.shift import GroupTable, ShiftSettings
from models.shift_calibration import aimed
from models.shift_rate import AlarmRate, Traffic, poisson_interval
from models.shift_rule import fixed_rule


@pytest.mark.parametrize("mean", [0.5, 3.0, 20.0, 200.0])
def test_the_interval_covers_the_mean(mean: float) -> None:
    """Of many Poisson draws at least 95 % (less three standard errors) have the true mean in their interval."""
    draws = np.random.default_rng(1).poisson(mean, 2_000)
    ends = [poisson_interval(int(n)) for n in draws]
    covered = np.mean([low <= mean <= high for low, high in ends])
    assert covered >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 2_000)


def test_a_rate_without_alarms_has_no_upper_end() -> None:
    """Before the first alarm nothing is measured, and the lower end is what 3.7 alarms at most would give."""
    rate = AlarmRate(requested=1_000, calibrated=True, monitored=5_000, alarms=0)
    assert rate.measured is None and rate.interval[1] is None
    assert rate.interval[0] == pytest.approx(5_000 / 3.69, rel=0.01)


def test_a_daily_budget_becomes_events_between_alarms() -> None:
    """1,000 monitored events a day and a budget of 4 alerts a day are one alarm in 250 events."""
    day_ms = 86_400_000
    traffic = Traffic()
    for day in range(1, 15):
        traffic = traffic.after(10**12, 10**12 + day * day_ms, 1_000)
    assert traffic.wanted(4.0, 777.0) == pytest.approx(250, rel=0.02)
    assert traffic.wanted(0.0, 777.0) == 777.0
    assert Traffic().wanted(4.0, 777.0) == 777.0, "nothing is known of the traffic yet"


def test_the_table_follows_the_traffic() -> None:
    """A table with a budget asks for the rate that its own event times and monitored events come to."""
    shift = ShiftSettings(alerts_per_day=2.0, age_min_events=1, threshold=50.0)
    table, records = GroupTable(shift), np.zeros(5, USER)
    for day in range(4):
        events = columns(
            np.arange(400) % 5, np.arange(400) % 7 + 1, 10**12 + day * 86_400_000 + np.arange(400) * 216_000
        )
        done = advance(records, events, table, shift, EVERY, np.zeros(400, np.bool_))
        table.apply_delta(table.delta(events, done, {}))
        table = GroupTable.from_snapshot(table.cut().snapshot(), shift)
    assert table.wanted() == pytest.approx(200, rel=0.05)
    assert table.rate().requested == table.wanted() and not table.rate().calibrated


def test_thresholds_move_along_the_tail() -> None:
    """A rule aimed at a tenth of the alarms asks for log(10) / tail more evidence."""
    rule = fixed_rule(by_session=True, threshold=5.0, drift=0.25)
    rule = type(rule)(
        **{f: getattr(rule, f) for f in rule.__struct_fields__} | {"tail": 0.5, "false_alarm_events": 100.0}
    )
    moved = aimed(rule, 1_000.0)
    assert moved.thresholds_G() == pytest.approx(rule.thresholds_G() + math.log(10) / 0.5)
    assert moved.false_alarm_events == 1_000.0
