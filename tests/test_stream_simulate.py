"""The generated shop: the same bytes for a seed, a truth that the events bear out, structure worth learning."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from stream.errors import ConfigError
from stream.events import EventDecoder, EventSettings
from stream.files import open_events
from stream.mapping import Mapping
from stream.simulate import ShopSettings, ShopStream, simulate, write_events
from stream.transport import LogRecord
from stream.truth import Truth, read_truth, write_truth
from stream.workload import EVENT_BYTES, workload

SETTINGS = ShopSettings(users=800, events=60_000, seed=3)


@pytest.fixture(scope="module")
def shop() -> ShopStream:
    return simulate(SETTINGS)


def test_a_seed_gives_the_same_bytes_and_another_seed_others(shop: ShopStream) -> None:
    """Deterministic to the byte, truth included; iterating twice changes nothing."""
    records = list(shop.records())
    again = simulate(SETTINGS)
    assert records == list(again.records()) == list(shop.records())
    assert again.truth == shop.truth and len(shop) == len(records)
    other = simulate(ShopSettings(users=800, events=60_000, seed=4))
    assert [value for _, value, _ in other.records()][:100] != [value for _, value, _ in records][:100]


def test_about_as_many_events_as_asked_for(shop: ShopStream) -> None:
    """Within a tenth, in the order of time, within the weeks asked for."""
    assert abs(shop.truth.stream.events - 60_000) < 6_000
    times = [time_ms for _, _, time_ms in shop.records()]
    assert times == sorted(times)
    assert shop.truth.stream.last_ms - shop.truth.stream.first_ms <= 8 * 7 * 86_400_000


def test_good_records_are_events_and_each_bad_one_dies_of_its_planted_reason() -> None:
    """The decoder takes every good record and refuses every bad one with the reason that the truth counts."""
    shop = simulate(ShopSettings(users=200, events=8_000, bad_share=0.02, oversized=2))
    log = [LogRecord("events", 0, n, ms, key, value) for n, (key, value, ms) in enumerate(shop.records())]
    decoded = EventDecoder(EventSettings(), b"key").decode(log)
    assert len(decoded) == shop.truth.stream.events
    assert Counter(error.reason for _, error in decoded.dead) == shop.truth.stream.bad
    assert shop.truth.stream.bad["too_large"] == 2 and len(shop.truth.stream.bad) == 11


def test_planted_shifts_are_what_the_events_show(shop: ShopStream) -> None:
    """Before a shift the planted old interests lead, after it the planted new ones, and hardly ever the other way."""
    counted = Counter(shift.kind for shift in shop.truth.shifts)
    assert set(counted) == {"abrupt", "gradual", "returning"}
    by_user: dict[str, list[tuple[int, str]]] = {}
    for key, value, time_ms in shop.records():
        try:
            event = json.loads(value or b"")
            by_user.setdefault((key or b"").decode(), []).append((time_ms, event["interest"]))
        except (ValueError, KeyError, TypeError):
            continue
    old_before, old_after, new_before, new_after = [], [], [], []
    for shift in shop.truth.shifts:
        assert not set(shift.before) & set(shift.after)
        assert shift.events_before >= 15 and shift.until_ms >= shift.time_ms
        before = [i for t, i in by_user[shift.user] if t < shift.time_ms]
        after = [i for t, i in by_user[shift.user] if t >= shift.until_ms][: shift.events_after]
        if shift.kind == "returning":
            before = before[-20:]
        old_before.append(np.mean([i in shift.before for i in before]))
        new_before.append(np.mean([i in shift.after for i in before]))
        old_after.append(np.mean([i in shift.before for i in after[:40]]))
        new_after.append(np.mean([i in shift.after for i in after[:40]]))
    assert np.mean(old_before) > 0.4 and np.mean(new_after) > 0.4, (np.mean(old_before), np.mean(new_after))
    assert np.mean(new_before) < 0.08 and np.mean(old_after) < 0.12, (np.mean(new_before), np.mean(old_after))


def test_most_users_do_not_shift(shop: ShopStream) -> None:
    """The share of users with a planted shift is the one asked for, at most."""
    shifted = len({shift.user for shift in shop.truth.shifts})
    assert 0.5 * 0.1 * 800 <= shifted <= 0.1 * 800


def test_the_season_surges_for_all_and_new_interests_come_when_they_are_said_to(shop: ShopStream) -> None:
    """The season's share rises tenfold in its time, over many users; nothing is sold before its launch."""
    events, names = shop.events, shop.catalogue.names
    season = shop.truth.seasons[0]
    of_season = events.category_E == names.index(season.interest)
    inside = (events.time_ms_E >= season.from_ms) & (events.time_ms_E < season.until_ms)
    assert of_season[inside].mean() > 0.03 > 10 * of_season[~inside].mean()
    assert len(np.unique(events.user_E[of_season])) > 0.4 * len(np.unique(events.user_E[inside]))
    for new in shop.truth.new_interests:
        when = events.time_ms_E[events.category_E == names.index(new.interest)]
        assert len(when) > 20 and when.min() >= new.time_ms


def test_there_is_more_to_learn_than_what_was_seen_last(shop: ShopStream) -> None:
    """Counted links between categories, learned on the first half, rank the other half's moves better than recency."""
    categories = len(shop.catalogue.names)
    links = np.zeros((categories, categories))
    last: dict[int, list[int]] = {}
    ours, rule = [], []
    half = len(shop.events.user_E) // 2
    for place, (user, category) in enumerate(
        zip(shop.events.user_E.tolist(), shop.events.category_E.tolist(), strict=True)
    ):
        seen = last.setdefault(user, [])
        if seen and seen[0] != category:
            if place < half:
                links[seen[0], category] += 1
            else:
                rule.append(1 / (1 + seen.index(category)) if category in seen else 1 / categories)
                scores = links[seen[0]] / (links[seen[0]].sum() + 1)
                scores[seen[1:6]] += 0.15
                ours.append(1 / (1 + (scores > scores[category]).sum()))
        if category in seen:
            seen.remove(category)
        seen.insert(0, category)
    assert np.mean(ours) > 1.2 * np.mean(rule)


def test_types_prices_and_reviews_hang_together(shop: ShopStream) -> None:
    """Purchases follow carts, an item keeps its price, reviews have stars and text and come days after the purchase."""
    prices: dict[str, float] = {}
    kinds: Counter[str] = Counter()
    for _, value, _ in shop.records():
        try:
            event = json.loads(value or b"")
            kind, stars = event["type"], event.get("rating")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        kinds[kind] += 1
        if isinstance(event["price"], float) and event["price"] == event["price"]:
            assert prices.setdefault(event["item"], event["price"]) == event["price"] > 0
        assert (stars is not None) == (kind == "review") == ("text" in event)
        assert event["dwell"] > 0
    assert kinds["browse"] > 4 * kinds["cart"] > 4 * kinds["purchase"] > 20 * kinds["review"] > 0


def test_the_truth_survives_its_file(shop: ShopStream, tmp_path: Path) -> None:
    """What is written is read back the same; another file is refused by name."""
    write_truth(tmp_path / "truth.jsonl", shop.truth)
    assert read_truth(tmp_path / "truth.jsonl") == shop.truth
    assert isinstance(shop.truth, Truth)
    (tmp_path / "other.jsonl").write_text('{"truth": "lie"}\n')
    for name in ("other.jsonl", "none.jsonl"):
        with pytest.raises(ConfigError, match=name):
            read_truth(tmp_path / name)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="0 lines about the stream"):
        read_truth(tmp_path / "empty.jsonl")


@pytest.mark.parametrize("name", ["shop.jsonl", "shop.jsonl.gz"])
def test_a_written_stream_is_read_back_as_the_same_events(shop: ShopStream, tmp_path: Path, name: str) -> None:
    """The good events go to a file and come back through the reader of files, one for one and in order."""
    assert write_events(shop, tmp_path / name) == shop.truth.stream.events
    fields = "user=user,interest=interest,time=time,item=item,type=type,price=price,dwell=dwell,rating=rating,text=text"
    source = open_events(tmp_path / name, Mapping.parse(fields))
    table = source.table()
    assert table.time_ms.tolist() == shop.events.time_ms_E.tolist() and not source.counts.bad
    assert table.interest.tolist() == [shop.catalogue.names[c] for c in shop.events.category_E.tolist()]
    assert np.isfinite(table.price).all() and (table.rating > 0).sum() == (shop.events.stars_E > 0).sum()


@pytest.mark.parametrize("users", [1, 7])
def test_tiny_streams_work(users: int) -> None:
    """One user and a handful of events are a stream too."""
    shop = simulate(ShopSettings(users=users, events=20, weeks=1))
    assert len(list(shop.records())) == len(shop) >= users


@pytest.mark.parametrize("bad", [{"users": 0}, {"events": 0}, {"weeks": 0}, {"shift_share": 1.5}, {"bad_share": -1}])
def test_impossible_settings_are_refused(bad: dict[str, int]) -> None:
    """No stream without users, events or time."""
    with pytest.raises(ValueError):
        ShopSettings(**bad)  # type: ignore[arg-type]


def test_the_workload_is_valid_fixed_size_and_deterministic() -> None:
    """Every record decodes, has 150 bytes and says what its columns say; a seed gives the same bytes."""
    load = workload(5_000, users=300, interests=50, seed=1)
    log = [
        LogRecord("events", 0, n, int(load.time_ms_E[n]), key, value)
        for n, (key, value) in enumerate(zip(load.keys(), load.values(), strict=True))
    ]
    decoded = EventDecoder(EventSettings(), b"key").decode(log)
    assert len(decoded) == 5_000 and not decoded.dead
    assert decoded.interests == [f"c{number:06d}" for number in load.interest_E.tolist()]
    assert decoded.users == [f"u{number:09d}" for number in load.user_E.tolist()]
    assert decoded.columns.time_ms.tolist() == load.time_ms_E.tolist()
    assert {len(value) for value in load.values()} == {EVENT_BYTES}
    assert load.values() == workload(5_000, users=300, interests=50, seed=1).values()
    assert load.values() != workload(5_000, users=300, interests=50, seed=2).values()


def test_the_workload_is_skewed_over_users_and_interests() -> None:
    """A few users and interests own much of the traffic, as asked for; even traffic can be had."""
    load = workload(50_000, users=2_000, interests=200)
    per_user = np.sort(np.bincount(load.user_E, minlength=2_000))[::-1]
    assert per_user[:200].sum() > 0.35 * 50_000
    per_interest = np.bincount(load.interest_E, minlength=200)
    assert per_interest[:20].sum() > 0.4 * 50_000
    even = np.bincount(workload(50_000, users=2_000, interests=200, activity_sigma=0.0).user_E, minlength=2_000)
    assert even.max() < 25 + 6 * 25**0.5


def test_an_empty_workload_and_a_wrong_one() -> None:
    """No events is an empty list; no users is an error."""
    assert workload(0).values() == [] == workload(0).keys()
    with pytest.raises(ValueError):
        workload(10, users=0)
