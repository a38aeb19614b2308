"""What surges for everybody is told once, and evidence is kept exactly since the onset."""

from __future__ import annotations

import numpy as np
import pytest

from models.surge_trial import surge_trials
from models.suspicion import EVIDENCE, USER_ROWS_MAX, Suspects, shares_of
from models.walk import CLEARED, SURGING_ALL, SUSPECT


def rows_of_users(seed: int, events: int, users: int = 5) -> np.ndarray:  # type: ignore[type-arg]
    """Suspicions that begin, grow and end, of several users, in the order of events."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(events, EVIDENCE)
    watch, age = np.zeros(users, np.int64), np.zeros(users, np.int64)
    for i, user in enumerate(rng.integers(0, users, events).tolist()):
        ends = watch[user] > 0 and rng.random() < 0.1
        watch[user] = 0 if ends else watch[user] + 1
        rows[i]["key"], rows[i]["age"], rows[i]["place"] = user + 1, age[user], i
        rows[i]["watch"], rows[i]["flags"] = watch[user], CLEARED if ends else SUSPECT
        age[user] += 1
    return rows


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_any_cut_leaves_the_same_evidence(batch: int) -> None:
    """Rows appended in any batches, some of them twice as a cleaned log brings them, have one normal form."""
    rows = rows_of_users(3, 400)
    whole, parted = Suspects(), Suspects()
    whole.append(rows)
    for start in range(0, 400, batch):
        parted.append(rows[start : start + batch])
        parted.append(parted.alive(rows[max(0, start - 5) : start]))
    assert whole.normal().tobytes() == parted.normal().tobytes()
    for key in range(1, 6):
        since = whole.since_onset(key)
        assert len(since) <= USER_ROWS_MAX
        live = whole.normal()
        assert since.tobytes() == live[live["key"] == key].tobytes() or not len(live[live["key"] == key])


def test_the_side_table_is_bounded_and_forgets() -> None:
    """After a cut there are at most so many rows, the newest; nothing stays of a forgotten user."""
    table = Suspects(rows_max=6)
    rows = rows_of_users(1, 300)
    table.append(rows)
    alive = table.normal()
    table.trim()
    assert len(table.normal()) == min(6, len(alive))
    assert table.normal()["place"].min(initial=10**6) >= np.sort(alive["place"])[-min(6, len(alive)) :].min()
    table.forget(table.normal()["key"][:1].copy())
    assert not (table.normal()["key"] == alive["key"][0]).any() or len(alive) > 6


def test_what_a_user_left_before_it_was_forgotten_is_dead() -> None:
    """A user who comes back has rows of the same ages; those from before are none of the live ones."""
    table = Suspects()
    before, after = np.zeros(2, EVIDENCE), np.zeros(2, EVIDENCE)
    before["key"] = after["key"] = 7
    before["age"] = after["age"] = [20, 21]
    before["watch"] = after["watch"] = [1, 2]
    before["place"], after["place"] = [100, 101], [900, 901]
    table.append(before)
    table.forget(np.array([7], np.uint64))
    table.append(after)
    assert len(table.alive(before)) == 0
    assert table.alive(after).tobytes() == after.tobytes()


def test_shares_add_up() -> None:
    """The user's own, the segment's and everybody's evidence add up to 1; an interest that surges is not the user's."""
    rows = np.zeros(3, EVIDENCE)
    rows["ratio"], rows["from_all"] = [1.0, 0.5, 0.0], [0.0, 2.0, 0.5]
    rows["flags"] = [0, SURGING_ALL, SURGING_ALL]
    shares, surging = shares_of(rows)
    assert sum(shares.values()) == pytest.approx(1.0) and surging
    assert shares == {"user": 0.25, "segment": 0.0, "all": 0.75}


def test_a_surge_is_told_once_and_users_are_left_alone() -> None:
    """Surges of all, of a segment and none: at least two of three scopes right, at most 2 % of the users alerted."""
    outcome = surge_trials(11, trials=3, users=800, part_events=4_000, warm_events=30_000)
    assert outcome.scope_accuracy >= 2 / 3
    assert outcome.users_alerted <= 0.02
