"""Hostile and odd streams through the whole pipeline: no NaN anywhere, no flood of alerts."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import orjson
import pytest
from pipelines import START_MS, make, run

from stream.transport import LogRecord

HOUR_MS, DAY_MS = 3_600_000, 86_400_000


def records(events: Iterable[tuple[str, str, int]]) -> list[LogRecord]:
    """(user, interest, time) as records whose own time is the event's."""
    return [
        LogRecord("events", 0, i, ms, user.encode(), orjson.dumps({"user": user, "interest": interest, "time": ms}))
        for i, (user, interest, ms) in enumerate(events)
    ]


def shop(events: int, users: int, seed: int, step_ms: int = 60_000) -> list[tuple[str, str, int]]:
    """Users with three favourites each."""
    rng = random.Random(seed)
    made = []
    for n in range(events):
        user = rng.randrange(users)
        interest = user * 3 + rng.randrange(3) if rng.random() < 0.9 else rng.randrange(3 * users)
        made.append((f"u{user}", f"i{interest}", START_MS + n * step_ms))
    return made


def alerts_of(stream: list[tuple[str, str, int]]) -> list[dict[str, Any]]:
    """The alerts of a stream, after a look at every number that came out and stayed."""
    state, outputs = run(make(), records(stream), 2_048)
    for _, record in outputs:
        check_finite(record)
    for name in ("hidden", "evidence", "session_nats", "slow_total", "mean_dwell_s", "mean_log_price"):
        assert np.isfinite(state.arena.all()[name]).all(), name
    events = sum(r["events"] for s, r in outputs if s == "metrics")
    assert events == len(stream)
    return [r for s, r in outputs if s == "alerts"]


def check_finite(value: Any) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            check_finite(part)
    assert not isinstance(value, float) or math.isfinite(value)


def odd_times(how: str) -> list[tuple[str, str, int]]:
    made = shop(1_500, 15, 3)
    if how == "equal":
        return [(user, interest, START_MS) for user, interest, _ in made]
    if how == "backwards":
        return [(u, i, START_MS + 1_500 * 60_000 - n * 1_000) for n, (u, i, _) in enumerate(made)]
    return [(u, i, ms + (DAY_MS if n >= 750 else 0)) for n, (u, i, ms) in enumerate(made)]


@pytest.mark.parametrize("how", ["equal", "backwards", "jump"])
def test_odd_times_raise_no_flood(how: str) -> None:
    """Equal times, times that go backwards, a clock that jumps by a day: what users like has not changed."""
    assert len(alerts_of(odd_times(how))) <= 8


def test_users_with_one_event_are_left_alone() -> None:
    """Nothing is known of them, so nothing is said."""
    assert alerts_of([(f"u{n}", f"i{n % 40}", START_MS + n) for n in range(1_200)]) == []


def test_a_user_of_one_interest_does_not_shift() -> None:
    """It only ever does the same."""
    assert alerts_of([(f"u{n % 4}", f"i{n % 4}", START_MS + n * 60_000) for n in range(1_200)]) == []


def test_an_interest_never_seen_is_not_a_shift() -> None:
    """One event of a new interest for each user, now and then, is no lasting change."""
    made = shop(1_500, 15, 5)
    for n in range(700, 1_500, 61):
        made[n] = (made[n][0], f"new{n}", made[n][2])
    assert len(alerts_of(made)) <= 8


def test_a_shop_that_opens_today_is_quiet() -> None:
    """No history at all: nobody is alerted before the profile is learned."""
    assert [a for a in alerts_of(shop(400, 40, 6)) if a["onset_events"] > 10] == []


@pytest.mark.parametrize("count", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["random", "cycle"])
def test_a_bot_raises_no_flood(kind: str, count: int) -> None:
    """100,000 events an hour of one user among others: three alerts an hour of it, few of the others."""
    rng = random.Random(7)
    calm = shop(600, 12, 8, step_ms=6_000)
    bot = [
        ("bot", f"i{rng.randrange(300) if kind == 'random' else n % 300}", START_MS + n * HOUR_MS // 100_000)
        for n in range(count)
    ]
    said = alerts_of(sorted(calm + bot, key=lambda event: event[2]))
    assert sum(a["user"] == "bot" for a in said) <= 3
    assert sum(a["user"] not in ("bot", "") for a in said) <= 4
