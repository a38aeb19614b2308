"""Group tables fold exactly, and an alert's reason adds up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models_profile import EVERY, QUICK, columns, learned_groups, random_events

from models.profile import USER, advance
from models.shift import GroupTable, ShiftSettings, reasons


@settings(max_examples=15)
@given(seed=st.integers(0, 1_000), batch=st.sampled_from([1, 17, 64]), cuts=st.integers(0, 2))
def test_deltas_on_a_snapshot_give_the_same_table(seed: int, batch: int, cuts: int) -> None:
    """Restoring a snapshot and folding the deltas of any batch size equals the table that lived on, also over cuts."""
    events = random_events(seed, 128, 3, 30)
    names = {key: f"name {key}" for key in range(1, 60)}
    whole, parted = GroupTable(QUICK), GroupTable(QUICK)
    one, two = np.zeros(3, USER), np.zeros(3, USER)
    none = np.zeros(128, np.bool_)
    for _ in range(cuts + 1):
        whole.apply_delta(whole.delta(events, advance(one, events, whole, QUICK, EVERY, none), names))
        for start in range(0, 128, batch):
            part = events.take(slice(start, start + batch))
            delta = parted.delta(part, advance(two, part, parted, QUICK, EVERY, none[: len(part)]), names)
            frozen = parted.snapshot()
            parted = GroupTable.from_snapshot(frozen, QUICK)
            assert parted.snapshot() == frozen
            parted.apply_delta(delta)
        whole, parted = whole.cut(), parted.cut()
        assert whole.snapshot() == parted.snapshot()
    assert whole.names == {key: names[key] for key in set(events.interest.tolist())}


def test_shares_are_frozen_within_an_epoch() -> None:
    """A delta changes no share before the next cut; the cut leaves the old table as it was."""
    events = columns([0, 0, 0, 0], [7, 7, 7, 8])
    table = GroupTable(QUICK)
    key, none = np.array([7, 8, 9], np.uint32), np.zeros(3, np.uint8)
    before = table.shares(key, none)[0].tolist()
    done = advance(np.zeros(1, USER), events, table, QUICK, EVERY, np.zeros(4, np.bool_))
    table.apply_delta(table.delta(events, done, {}))
    assert table.shares(key, none)[0].tolist() == before
    after = table.cut().shares(key, none)[0]
    assert after[0] > after[1] > after[2] > 0
    assert table.shares(key, none)[0].tolist() == before


def test_the_rarest_interests_go_at_a_cut() -> None:
    """A table never holds more than its bound; the common interests stay."""
    shift = ShiftSettings(group_interests_max=100)
    events = columns([0] * 1_000, np.concatenate([np.arange(1, 501), np.full(500, 1)]))
    table = learned_groups(events, shift)
    assert len(table) == 100
    assert table.shares(np.array([1], np.uint32), np.zeros(1, np.uint8))[0][0] > 0.2


def test_a_segment_has_shares_of_its_own() -> None:
    """What is common in a segment is more likely for its users than for all."""
    events = columns([0] * 4_000, [1] * 2_000 + [2] * 2_000, segments=[1] * 2_000 + [2] * 2_000)
    table = learned_groups(events, QUICK)
    all_B, segment_B = table.shares(np.array([1, 1, 1], np.uint32), np.array([0, 1, 2], np.uint8))
    assert segment_B[0] == all_B[0]
    assert segment_B[1] > 1.5 * all_B[1] > 3 * segment_B[2]


def test_broken_snapshots_are_refused() -> None:
    """Bytes that are not a table raise ValueError, never half a table."""
    with pytest.raises(ValueError, match="group table"):
        GroupTable.from_snapshot(b"\x01nonsense", QUICK)


def test_reasons_add_up() -> None:
    """Contributions add up to the severity, lists are bounded, and the names of the turn are there."""
    rng = np.random.default_rng(4)
    mine = np.concatenate([rng.integers(1, 4, 100), rng.integers(50, 54, 100)])
    events = columns([0] * 200, mine, np.arange(200) * 2_000_000 + 10**12)
    shift = ShiftSettings(evidence="event", threshold=7.0)
    groups = learned_groups(columns([0] * 4_000, rng.integers(1, 200, 4_000)), shift)
    done = advance(np.zeros(1, USER), events, groups, shift, EVERY, np.zeros(200, np.bool_))
    [reason] = reasons(done, events, groups, shift)
    assert sum(part for _, part in reason.gained + reason.lost) == pytest.approx(reason.severity)
    assert 0.3 < reason.severity <= 1
    assert {key for key, _ in reason.gained if key} <= {50, 51, 52, 53}
    assert {key for key, _ in reason.lost if key} <= {1, 2, 3}
    assert reason.kind == "abrupt" and reason.evidence_sum > reason.threshold
    assert reason.onset_ms <= events.time_ms[reason.event]
    assert all(len(part) <= 6 for part in (reason.gained, reason.lost, reason.before, reason.after, reason.evidence))
    sentence = reason.sentence(lambda key: f"aisle {key}")
    assert "aisle 5" in sentence and "(abrupt)" in sentence
