"""Events for the tests of models/: columns from a few lists, and a stream in which something can be learned."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.features import EventColumns
from models.profile import USER, Advanced, EmissionSettings, advance
from models.shift import GroupTable, ShiftSettings

EVERY = EmissionSettings(policy="every")
HOUR_MS = 3_600_000


def made(users: Any, interests: Any, times_ms: Any = None, types: Any = None, price: Any = None) -> EventColumns:
    """Columns of events; `users` are rows."""
    count = len(users)
    missing = np.full(count, np.nan, np.float32)
    times = np.arange(count) * 60_000 + 10**12 if times_ms is None else np.asarray(times_ms)
    return EventColumns(
        user_row=np.asarray(users, np.int64),
        interest=np.asarray(interests, np.uint32),
        item=(np.asarray(interests) * 7 + np.arange(count) % 3).astype(np.uint32),
        type=np.ones(count, np.uint8) if types is None else np.asarray(types, np.uint8),
        time_ms=times.astype(np.int64),
        price=missing if price is None else np.asarray(price, np.float32),
        dwell_s=missing.copy(),
        rating=missing.copy(),
        sentiment=missing.copy(),
        segment=np.zeros(count, np.uint8),
    )


def walked(events: EventColumns, users: int) -> Advanced:
    """The walk over events of new users, with a snapshot before and after each event."""
    shift = ShiftSettings()
    return advance(np.zeros(users, USER), events, GroupTable(shift), shift, EVERY, np.ones(len(events), np.bool_))


def rounds(random: np.random.Generator, count: int, *, users: int = 40, interests: int = 60) -> EventColumns:
    """Every user goes round in the same order i -> i + 1, from a start of the own; one step in five repeats."""
    at = random.integers(0, interests, users)
    user_B = random.integers(0, users, count)
    repeats_B = random.random(count) < 0.2
    interest_B = np.empty(count, np.uint32)
    for b, (user, repeats) in enumerate(zip(user_B.tolist(), repeats_B.tolist(), strict=True)):
        at[user] = (at[user] + (not repeats)) % interests
        interest_B[b] = at[user] + 1
    return made(user_B, interest_B)
