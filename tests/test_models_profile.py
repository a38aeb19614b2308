"""The walk over a batch: exact for any cut into batches, bounded, never NaN where it must not be."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.features import EventColumns
from models.profile import (
    EMIT_ALERT,
    EMIT_EVERY,
    EMIT_STALE,
    EMIT_TOP_CHANGED,
    PROFILE,
    RING,
    TYPE_MASK,
    USER,
    Advanced,
    EmissionSettings,
    Snapshot,
    advance,
    emission_names,
    user_dtype_of,
    weight_of,
)
from models.shift import GroupTable, ShiftSettings
from stream.changelog import migrate

QUICK = ShiftSettings(age_min_events=3, refractory_events=4, threshold=1.5, slow_half_life_events=8)
EVERY = EmissionSettings(policy="every")


def columns(
    users: Any, interests: Any, times_ms: Any = None, types: Any = None, price: Any = None, segments: Any = None
) -> EventColumns:
    count = len(users)
    missing = np.full(count, np.nan, np.float32)
    return EventColumns(
        user_row=np.asarray(users, np.int64),
        interest=np.asarray(interests, np.uint32),
        item=np.zeros(count, np.uint32),
        type=np.ones(count, np.uint8) if types is None else np.asarray(types, np.uint8),
        time_ms=np.arange(count, dtype=np.int64) * 60_000 + 10**12
        if times_ms is None
        else np.asarray(times_ms, np.int64),
        price=missing if price is None else np.asarray(price, np.float32),
        dwell_s=missing,
        rating=missing,
        sentiment=missing,
        segment=np.zeros(count, np.uint8) if segments is None else np.asarray(segments, np.uint8),
    )


def learned_groups(events: EventColumns, shift: ShiftSettings) -> GroupTable:
    """A table that has been through an epoch of these events."""
    table = GroupTable(shift)
    nobody = np.zeros(len(events), np.bool_)
    records = np.zeros(int(events.user_row.max(initial=0)) + 1, USER)
    table.apply_delta(table.delta(events, advance(records, events, table, shift, EVERY, nobody), {}))
    return table.cut()


def random_events(seed: int, count: int, users: int, interests: int) -> EventColumns:
    rng = np.random.default_rng(seed)
    steps_ms = rng.choice([-7_200_000, -5_000, 0, 0, 1_000, 60_000, 4_000_000], count)
    price = np.where(rng.random(count) < 0.3, np.nan, rng.lognormal(2, 1, count))
    price[rng.random(count) < 0.05] = np.inf
    taste = (np.arange(count) * 4 // max(1, count)) * 3  # tastes move: alarms happen
    return columns(
        rng.integers(0, users, count) if users > 1 else np.zeros(count),
        1 + (taste + rng.integers(0, 3, count) ** 2) % interests,
        10**12 + np.cumsum(steps_ms),
        rng.integers(0, 32, count),
        price,
        rng.integers(0, 3, count),
    )


def same(one: Any, other: Any) -> None:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Snapshot):
            same(a, b)
        elif field.name == "surges":
            assert a == b
        elif isinstance(a, np.ndarray) and field.name != "crowd_keys_K":
            assert a.tobytes() == b.tobytes(), field.name


def joined(parts: list[Advanced], starts: list[int]) -> Advanced:
    """The outcome of several batches as if they had been one."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Advanced):
        pieces = [getattr(part, field.name) for part in parts]
        if isinstance(pieces[0], Snapshot):
            moved = [dataclasses.replace(p, event_E=p.event_E + s) for p, s in zip(pieces, starts, strict=True)]
            values[field.name] = Snapshot(
                **{f.name: np.concatenate([getattr(m, f.name) for m in moved]) for f in dataclasses.fields(Snapshot)}
            )
        elif isinstance(pieces[0], np.ndarray):
            moves = starts if field.name == "shadow_E" else [0] * len(starts)
            values[field.name] = np.concatenate([p + m if m else p for p, m in zip(pieces, moves, strict=True)])
        elif field.name == "surges":
            values[field.name] = [
                dataclasses.replace(surge, event=surge.event + s)
                for part, s in zip(pieces, starts, strict=True)
                for surge in part
            ]
        elif field.name == "crowd":
            values[field.name] = None
        else:
            values[field.name] = pieces[0]
            values[field.name].flat[:] = sum(p.flat for p in pieces)
    return Advanced(**values)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    users=st.sampled_from([1, 2, 7]),
    batch=st.sampled_from([1, 3, 64]),
    evidence=st.sampled_from(["session", "event"]),
    policy=st.sampled_from(["every", "on-change", "interval"]),
)
def test_batches_of_any_size_are_bit_for_bit_equal(
    seed: int, users: int, batch: int, evidence: Any, policy: Any
) -> None:
    """One large batch gives the same records, evidence, alarms, snapshots as small ones with restores between."""
    shift = ShiftSettings(
        evidence=evidence,
        age_min_events=3,
        refractory_events=4,
        threshold=1.5,
        slow_half_life_events=8,
    )
    emission = EmissionSettings(policy=policy, max_events=5)
    events = random_events(seed, 150, users, 40)
    groups = learned_groups(events, shift)
    score = np.random.default_rng(seed).random(150) < 0.3
    whole = np.zeros(users, USER)
    one = advance(whole, events, groups, shift, emission, score)
    parted = np.zeros(users, USER)
    parts, starts = [], list(range(0, 150, batch))
    for start in starts:
        span = slice(start, min(150, start + batch))
        parted = np.frombuffer(parted.tobytes(), USER).copy()  # as after a restart
        groups = GroupTable.from_snapshot(groups.snapshot(), shift)
        parts.append(advance(parted, events.take(span), groups, shift, emission, score[span]))
        groups.apply_delta(groups.delta(events.take(span), parts[-1], {}))
    assert whole.tobytes() == parted.tobytes()
    many = joined(parts, starts)
    same(one, many)
    assert one.tallies.flat.tobytes() == many.tallies.flat.tobytes()


def test_hostile_times_and_numbers_leave_no_nan() -> None:
    """Time that goes back, equal times, infinite and missing prices: evidence, gaps, averages stay finite and >= 0."""
    events = random_events(3, 3_000, 5, 40)
    records = np.zeros(5, USER)
    shift = ShiftSettings(
        evidence="event", age_min_events=3, refractory_events=4, threshold=0.5, slow_half_life_events=8
    )
    done = advance(records, events, learned_groups(events, shift), shift, EVERY, np.ones(3_000, np.bool_))
    assert np.isfinite(done.ratio_B).all() and np.isfinite(done.evidence_B).all()
    later = done.before.events_E > 0
    assert np.isnan(done.gap_s_B[~later]).all() and (done.gap_s_B[later] >= 0).all()
    for name in ("slow_total", "evidence", "session_nats", "mean_dwell_s", "mean_log_price"):
        assert np.isfinite(records[name]).all(), name
    assert done.alert_B.any()


def test_a_user_absent_from_a_batch_is_untouched() -> None:
    """Records without events stay as they are, byte for byte."""
    events = random_events(1, 200, 3, 20)
    records = np.zeros(5, USER)
    records[4]["events"] = 9
    before = records[3:].tobytes()
    advance(records, events, GroupTable(QUICK), QUICK, EVERY, np.zeros(200, np.bool_))
    assert records[3:].tobytes() == before


@pytest.mark.parametrize("evidence", ["session", "event"])
def test_ids_of_interests_mean_nothing(evidence: Any) -> None:
    """Permuting the interests' keys changes no evidence and no alarm."""
    shift = ShiftSettings(evidence=evidence, age_min_events=3, refractory_events=4, threshold=1.5)
    events = random_events(5, 400, 3, 40)
    keys = np.concatenate([[0], np.random.default_rng(0).permutation(np.arange(1_000, 1_060))]).astype(np.uint32)
    other = dataclasses.replace(events, interest=keys[events.interest])
    one, two = (
        advance(np.zeros(3, USER), e, learned_groups(e, shift), shift, EVERY, np.zeros(400, np.bool_))
        for e in (events, other)
    )
    np.testing.assert_array_equal(one.evidence_B, two.evidence_B)
    np.testing.assert_array_equal(one.alert_B, two.alert_B)


def test_the_ring_and_the_snapshots_show_the_newest_first() -> None:
    """`before` ends before the event, `after` begins with it; only the last RING events are kept."""
    count = RING + 5
    events = columns([0] * count, np.arange(1, count + 1), types=[2] * count)
    done = advance(np.zeros(1, USER), events, GroupTable(QUICK), QUICK, EVERY, np.ones(count, np.bool_))
    last = done.after.take(np.array([count - 1]))
    assert last.ring_interest_ER[0].tolist() == list(range(count, count - RING, -1))
    assert done.before.ring_interest_ER[-1].tolist() == list(range(count - 1, count - 1 - RING, -1))
    assert done.before.ring_interest_ER[0].tolist() == [0] * RING
    assert (last.ring_type_ER == 2).all()
    assert last.events_E.tolist() == [count]


def test_the_slow_profile_is_the_decayed_count() -> None:
    """Weights and total equal the exact exponentially decayed counts within a thousandth."""
    rng = np.random.default_rng(2)
    interests = rng.choice([11, 12, 13, 14], 500, p=[0.6, 0.25, 0.1, 0.05])
    shift = ShiftSettings(slow_half_life_events=64, threshold=30, hold_share=1)
    records = np.zeros(1, USER)
    advance(records, columns([0] * 500, interests), GroupTable(shift), shift, EVERY, np.zeros(500, np.bool_))
    decay = 0.5 ** (np.arange(499, -1, -1) / 64)
    assert records["slow_total"][0] == pytest.approx(decay.sum(), rel=1e-3)
    for interest in (11, 12, 13, 14):
        code = int(records["slow_weight"][0][records["slow_interest"][0] == interest][0])
        assert weight_of(code) == pytest.approx(decay[interests == interest].sum(), rel=2e-3)


def test_the_lightest_interest_makes_room() -> None:
    """A full slow profile keeps what weighs most and takes in what is new."""
    interests = [1] * 5 + [2] * 5 + list(range(3, PROFILE + 3))
    records = np.zeros(1, USER)
    shift = ShiftSettings(threshold=30, hold_share=1)
    count = len(interests)
    advance(records, columns([0] * count, interests), GroupTable(shift), shift, EVERY, np.zeros(count, np.bool_))
    kept = set(records["slow_interest"][0].tolist())
    assert {1, 2, PROFILE + 2} <= kept and 3 not in kept and len(kept) == PROFILE


def test_a_longer_profile_holds_more() -> None:
    """A record made for 128 interests keeps them, its snapshots hold the heaviest, and other lengths read it."""
    long = user_dtype_of(128)
    interests = [i for i in range(1, 101) for _ in range(1 + i // 70)]
    shift, count = ShiftSettings(threshold=30, hold_share=1, slow_half_life_events=2_000), len(interests)
    records = np.zeros(1, long)
    done = advance(records, columns([0] * count, interests), GroupTable(shift), shift, EVERY, np.ones(count, np.bool_))
    assert set(records["slow_interest"][0].tolist()) - {0} == set(range(1, 101))
    seen = done.after.slow_interest_EP[-1]
    assert len(seen) == PROFILE and len(set(seen.tolist())) == PROFILE and seen.min() >= 69
    short = migrate(records, USER)
    assert set(range(70, 101)) <= set(short["slow_interest"][0].tolist())
    back = migrate(short, long)
    assert set(back["slow_interest"][0].tolist()) - {0} == set(short["slow_interest"][0].tolist())


def test_emission_policies() -> None:
    """every: each event; interval: when stale; on-change: when the top interest changed, too."""
    interests = [1] * 30 + [2] * 30
    none = np.zeros(60, np.bool_)

    def bits(policy: Any) -> np.ndarray[Any, Any]:
        emission = EmissionSettings(policy=policy, max_events=20, max_age_s=1e9)
        shift = ShiftSettings(threshold=30)
        return advance(np.zeros(1, USER), columns([0] * 60, interests), GroupTable(shift), shift, emission, none).emit_B

    assert (bits("every") == EMIT_EVERY).all()
    assert np.flatnonzero(bits("interval")).tolist() == [0, 20, 40]
    changed = np.flatnonzero(bits("on-change") & EMIT_TOP_CHANGED)
    assert changed[0] == 0 and len(changed) == 2 and 30 < changed[1] < 40
    assert emission_names(EMIT_ALERT | EMIT_STALE) == ["alert", "stale"]


@pytest.mark.parametrize("evidence", ["session", "event"])
def test_a_change_of_taste_is_found_and_the_user_learned_anew(evidence: Any) -> None:
    """A user who turns to other interests raises one alarm soon after, with the onset near the turn, then none."""
    rng = np.random.default_rng(4)
    others = rng.integers(1, 200, 4_000)
    mine = np.concatenate([rng.integers(1, 4, 100), rng.integers(50, 54, 100)])
    users = np.concatenate([rng.integers(1, 50, 4_000), np.zeros(200)])
    times = np.concatenate([np.arange(4_000), np.arange(200) * 2_000]) * 1_000 + 10**12
    shift = ShiftSettings(evidence=evidence, threshold=7.0)
    events = columns(users, np.concatenate([others, mine]), times)
    groups = learned_groups(events, shift)
    records = np.zeros(50, USER)
    done = advance(records, events, groups, shift, EVERY, np.zeros(4_200, np.bool_))
    alarms = np.flatnonzero(done.alert_B[4_000:])
    assert len(alarms) == 1 and 100 <= alarms[0] < 130
    onset = alarms[0] + 1 - done.onset_events_B[4_000 + alarms[0]]
    assert abs(onset - 100) <= 8
    assert done.onset_events_B[4_099] <= 8
    assert (records["ring_type"][0] & TYPE_MASK == 1).all()
