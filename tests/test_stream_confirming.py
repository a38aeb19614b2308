"""Alerts are put to the test on what comes next, beside random moments, and the best of a day go to people."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest
from pipelines import START_MS, TP, make, run

from models.confirmation import (
    ALERT,
    FEATURE_COUNT,
    FEATURES,
    MOMENT,
    NEXT_EVENTS,
    STARTS_MAX,
    TRIAL,
    VERDICT,
    judge,
    moments,
)
from models.followup import FollowUp
from models.ranking import DAY_MS, Budget, allowance, learned, promise_of, worth_of
from models.shift_groups import GroupTable
from stream.engine import PartitionState, merge
from stream.state import Arena
from stream.transport import LogRecord


def turning(users: int, events: int, seed: int, stays: bool = True) -> list[LogRecord]:
    """Users with three favourites that turn to three others halfway; some, or all, go back after five events."""
    rng = random.Random(seed)
    records = []
    for n in range(events):
        for u in range(users):
            moved = n >= events // 2 and (stays or n < events // 2 + 5)
            favourite = u * 7 + rng.randrange(3) + (1_000 if moved else 0)
            interest = favourite if rng.random() < 0.9 else 5_000 + rng.randrange(300)
            now_ms = START_MS + n * 4_000_000 + u
            event = {"user": f"u{u}", "interest": f"i{interest}", "time": now_ms}
            if u % 2:
                event |= {"type": "purchase", "price": 40.0}
            records.append(LogRecord("events", 0, len(records), now_ms, f"u{u}".encode(), orjson.dumps(event)))
    return records


def of(outputs: list[tuple[str, Any]], stream: str) -> list[dict[str, Any]]:
    return [record for name, record in outputs if name == stream]


@pytest.fixture(scope="module")
def turned() -> tuple[PartitionState, list[tuple[str, Any]]]:
    """Twenty users that turn and stay there."""
    return run(make(false_alarm_events=60.0, daily_budget=2), turning(20, 130, 1), 4_096)


@pytest.mark.parametrize("batch", [1, 64])
def test_any_cut_gives_the_same_verdicts(turned: tuple[PartitionState, list[tuple[str, Any]]], batch: int) -> None:
    """Verdicts, tiers, scores and what is remembered of trials are those of batches of 4,096."""
    whole, wanted = turned
    state, outputs = run(make(false_alarm_events=60.0, daily_budget=2), turning(20, 130, 1), batch)
    for stream in ("verdicts", "alerts"):
        assert of(outputs, stream) == of(wanted, stream) != []
    assert state.groups.cut().snapshot() == whole.groups.cut().snapshot()
    assert msgspec.msgpack.encode(state.groups.followup.dump()) == msgspec.msgpack.encode(whole.groups.followup.dump())
    assert len(whole.groups.followup.verdicts) > 50


def test_alerts_on_lasting_shifts_hold(turned: tuple[PartitionState, list[tuple[str, Any]]]) -> None:
    """Each alert is judged after thirty events, once; those on real shifts hold, random moments half of the time."""
    _, outputs = turned
    alerts, verdicts = of(outputs, "alerts"), of(outputs, "verdicts")
    planted = {a["alert_id"] for a in alerts if a["source"]["offset"] >= 65 * 20}
    mine = [v for v in verdicts if v["alert_id"] in planted]
    assert len({v["alert_id"] for v in verdicts}) == len(verdicts) <= len(alerts)
    assert len(mine) >= 10 and sum(v["confirmed"] for v in mine) >= 0.9 * len(mine)
    for verdict in mine:
        alert = next(a for a in alerts if a["alert_id"] == verdict["alert_id"])
        assert verdict["source"]["offset"] - alert["source"]["offset"] == NEXT_EVENTS * 20  # the users take turns
    sums = [g for m in of(outputs, "metrics") for g in m["judged"]]
    assert sum(g["alerts"] for g in sums) == len(verdicts)
    assert sum(g["alerts_confirmed"] for g in sums) == sum(v["confirmed"] for v in verdicts)
    assert sum(g["moments"] for g in sums) > 20
    assert sum(g["moments_confirmed"] for g in sums) < sum(g["moments"] for g in sums)


def test_alerts_on_an_excursion_do_not_hold() -> None:
    """Who goes back to the old interests after five events was alerted for nothing, and that is said."""
    _, outputs = run(make(false_alarm_events=60.0), turning(20, 130, 2, stays=False), 512)
    planted = {a["alert_id"] for a in of(outputs, "alerts") if 65 * 20 <= a["source"]["offset"] < 72 * 20}
    mine = [v for v in of(outputs, "verdicts") if v["alert_id"] in planted]
    assert len(mine) >= 5 and sum(v["confirmed"] for v in mine) <= 0.2 * len(mine)


def test_a_move_in_the_middle_changes_nothing(turned: tuple[PartitionState, list[tuple[str, Any]]]) -> None:
    """State, group table included, goes through its bytes halfway, trials pending: the rest is the same."""
    records = turning(20, 130, 1)
    pipeline = make(false_alarm_events=60.0, daily_budget=2)
    state = PartitionState(arena=Arena(pipeline.dtype), groups=pipeline.new_groups())
    outputs, done, moved = [], 0, False
    while done < len(records):
        if done >= 1_600 and not moved:
            moved = True
            other = Arena(pipeline.dtype)
            other.merge(state.arena.all())
            assert len(state.groups.followup.trials) > 5
            groups = pipeline.groups_from_snapshot(state.groups.snapshot())
            state = PartitionState(
                arena=other, groups=groups, seen=state.seen, watermark_ms=state.watermark_ms, suspects=state.suspects
            )
        end = min(len(records), done + min(100, pipeline.next_cut(state.seen) - state.seen))
        for step in pipeline.process({0: state}, {TP: records[done:end]}):
            merge(pipeline, state, step)
            outputs += [(o.stream, orjson.loads(o.value)) for o in step.outputs]
        done = end
    for stream in ("verdicts", "alerts"):
        assert of(outputs, stream) == of(turned[1], stream)


def test_the_budget_is_kept_and_nothing_is_lost(turned: tuple[PartitionState, list[tuple[str, Any]]]) -> None:
    """At most so many alerts of a day of event time are for people; the others come as notices and are counted."""
    _, outputs = turned
    alerts = of(outputs, "alerts")
    days: dict[int, int] = {}
    for alert in alerts:
        assert alert["rank_score"] == pytest.approx(alert["severity"] * alert["confidence"] * alert["value"], rel=2e-3)
        if alert["tier"] == "alert":
            days[alert["detected_at_ms"] // DAY_MS] = days.get(alert["detected_at_ms"] // DAY_MS, 0) + 1
    notices = sum(a["tier"] == "notice" for a in alerts)
    assert 0 < max(days.values()) <= 2 and notices > 0
    assert sum(m["notices"] for m in of(outputs, "metrics")) == notices
    assert {a["worth"] for a in alerts if int(a["user"][1:]) % 2 == 0} == {1.0}
    assert all(a["worth"] > 2.0 for a in alerts if int(a["user"][1:]) % 2)


def test_the_budget_takes_the_best_of_a_stream() -> None:
    """On thirty days of Poisson traffic with a busy evening: never over the budget, and 85 % of the best sum."""
    rng = np.random.default_rng(4)
    budget, taken, best = Budget(), 0.0, 0.0
    for day in range(30):
        hours = np.sort(np.concatenate([rng.uniform(0, 24, rng.poisson(30)), rng.uniform(18, 22, rng.poisson(50))]))
        scores = rng.lognormal(0.0, 0.7, len(hours))
        chosen = []
        for hour, score in zip(hours.tolist(), scores.tolist(), strict=True):
            told, budget = budget.offered(score, int((20_000 + day) * DAY_MS + hour * 3_600_000), lambda _: 10)
            chosen += [score] * told
        assert len(chosen) <= 10
        if day >= 5:
            taken, best = taken + sum(chosen), best + float(np.sort(scores)[-10:].sum())
    assert taken >= 0.85 * best


def test_a_budget_shared_by_partitions_is_spent_exactly() -> None:
    """Whatever the numbers, the shares of all partitions on any day add up to the budget."""
    for partitions in (1, 3, 7, 16):
        for asked in (1, 2, 10, 1_000):
            for day in range(20_000, 20_030):
                assert sum(allowance(day, p, partitions, asked) for p in range(partitions)) == asked


def test_the_promise_is_learned_from_verdicts() -> None:
    """Where what comes is foretold by a feature, its alerts get the higher chance; few verdicts teach nothing."""
    rng = np.random.default_rng(1)
    rows = np.zeros(400, VERDICT)
    rows["features"] = rng.normal(size=(400, FEATURE_COUNT))
    rows["kind"] = ALERT
    place = FEATURES.index("foretold")
    rows["confirmed"] = rng.random(400) < 1 / (1 + np.exp(-2 * rows["features"][:, place]))
    coefficients = learned(rows)
    low, high = np.zeros(FEATURE_COUNT), np.zeros(FEATURE_COUNT)
    low[place], high[place] = -1.0, 1.0
    assert promise_of(coefficients, low) < 0.35 < 0.65 < promise_of(coefficients, high)
    assert promise_of(learned(rows[:10]), high) == 0.5


def test_trials_are_bounded() -> None:
    """In an epoch no more than so many begin, whatever the traffic; those are named, the rest is left out."""
    followup = FollowUp()
    followup.starts = STARTS_MAX
    assert followup.room() == 0 and followup.cut().room() == STARTS_MAX
    followup.trials = np.zeros(10_000, TRIAL)
    assert len(followup.cut().trials) < 10_000


def test_erasure_takes_trials_along(turned: tuple[PartitionState, list[tuple[str, Any]]]) -> None:
    """Nothing of a forgotten user is pending."""
    groups: GroupTable = turned[0].groups
    copy = GroupTable.from_snapshot(groups.snapshot(), groups._settings)
    key = copy.followup.trials["key"][:1].copy()
    assert len(key) and copy.knows(key)
    copy.erase(key)
    assert not copy.followup.knows(key)


def test_moments_are_as_frequent_as_asked_and_seldom_confirmed() -> None:
    """Two for each alarm asked for; of users that do not change, most moments foretell nothing new."""
    place = np.arange(200_000)
    assert 180 <= int(moments(place, np.zeros(200_000, np.uint8), 2_000.0).sum()) <= 220
    _, outputs = run(make(false_alarm_events=60.0, threshold=1e6), turning(10, 300, 3)[: 10 * 150], 512)
    sums = [g for m in of(outputs, "metrics") for g in m["judged"]]
    judged, confirmed = sum(g["moments"] for g in sums), sum(g["moments_confirmed"] for g in sums)
    assert judged > 15 and confirmed <= 0.65 * judged


def test_a_trial_in_progress_adds_up_over_any_cut() -> None:
    """Gains are whole units: one batch of thirty events equals thirty of one."""
    rng = np.random.default_rng(2)
    rows = np.zeros(1, TRIAL)
    rows["key"], rows["left"], rows["since_total"], rows["before_total"] = 5, NEXT_EVENTS, 8, 40.0
    rows["since_interest"][0, :3], rows["since_count"][0, :3] = [1, 2, 3], [4, 3, 1]
    rows["before_interest"][0, :2], rows["before_weight"][0, :2] = [7, 8], [30.0, 10.0]
    interest = rng.choice(np.array([1, 2, 7, 9], np.uint32), NEXT_EVENTS)
    keys, share = np.full(NEXT_EVENTS, 5, np.uint64), np.full(NEXT_EVENTS, 0.01)
    whole, parted = rows.copy(), rows.copy()
    _, (judged,) = judge(whole, np.array([-1]), keys, interest, lambda e: share[e])
    for i in range(NEXT_EVENTS):
        judge(parted, np.array([-1]), keys[i : i + 1], interest[i : i + 1], lambda e: share[e])
    assert whole["gain"] == parted["gain"] and judged.confirmed == (whole["gain"][0] > 0)
    assert MOMENT != ALERT


def test_worth_needs_no_prices() -> None:
    """Without prices a purchase counts one; nothing known, a user is worth 1; never NaN."""
    assert worth_of(0.0, float("nan")) == 1.0
    assert worth_of(9.0, float("nan")) == pytest.approx(2.0)
    assert worth_of(3.0, float(np.log1p(33.0))) == pytest.approx(1.0 + np.log10(100.0))
