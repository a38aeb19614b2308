"""The benchmarks' workload: many small events of one size, made fast.

On the way of an event: before the log, in place of a real producer. Users come lognormally often, interests are drawn
by Zipf's law; most of a user's events are about a few favourites, a few in a row about the same one, so that top
interests do not change with every event. For quality use simulate.py: there is little to learn here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]
INT = npt.NDArray[np.int64]

START_MS = 1_759_708_800_000
EVENT_BYTES = 150
FAVOURITES = 6
FAVOURITE_SHARE = 0.85
IN_A_ROW = 3
TYPES = (b'"browse"  ', b'"cart"    ', b'"purchase"')
TYPE_SHARES = (0.85, 0.10, 0.05)

# Every run of # is a number, filled in per event; JSON wants no leading zeros, so prices are 100.00 to 999.99.
_TEMPLATE = (
    b'{"user":"u#########","interest":"c######","item":"i#########","type":@@@@@@@@@@,"time":#############,'
    b'"price":###.##,"event_id":"e##########"}'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """`count` events in the order of time.

    Attributes:
        user_E, interest_E: numbers; the names in the records are u000000042 and c000042.
        time_ms_E: event times, `events_per_s` of them a second on average.
        values_E: (count, EVENT_BYTES) bytes of the JSON.
    """

    user_E: INT
    interest_E: INT
    time_ms_E: INT
    values_E: U8

    def __len__(self) -> int:
        return len(self.user_E)

    def values(self) -> list[bytes]:
        """The record values."""
        data, size = self.values_E.tobytes(), self.values_E.shape[1]
        return [data[start : start + size] for start in range(0, len(data), size)]

    def keys(self) -> list[bytes]:
        """The record keys: the user ids."""
        names = [b"u%09d" % user for user in range(int(self.user_E.max(initial=0)) + 1)]
        return [names[user] for user in self.user_E.tolist()]


def workload(
    count: int,
    *,
    users: int = 100_000,
    interests: int = 1_000,
    activity_sigma: float = 1.0,
    zipf: float = 1.0,
    events_per_s: float = 1_000.0,
    seed: int = 0,
) -> Workload:
    """`count` events of `users` users over `interests` interests; the same arguments give the same bytes.

    Args:
        activity_sigma: of the lognormal number of events a user; 0 = even traffic.
        zipf: exponent of the interests' popularity.
    """
    if not (0 < users <= 10**9 and 0 < interests <= 10**6 and count >= 0):
        raise ValueError("1 to 10^9 users, 1 to 10^6 interests")
    rng = np.random.default_rng(seed)
    activity_U = np.cumsum(rng.lognormal(0.0, activity_sigma, users))
    user_E = np.searchsorted(activity_U, rng.random(count) * activity_U[-1], side="right")
    user_E = np.minimum(user_E, users - 1)
    popularity_V = np.cumsum(1.0 / np.arange(1, interests + 1) ** zipf)
    popularity_V /= popularity_V[-1]
    chapter_E = _nth_of_user(user_E) // IN_A_ROW
    place_E = (_uniform(user_E, chapter_E, 1) ** 1.7 * FAVOURITES).astype(np.int64)
    liked_E = _uniform(user_E, chapter_E, 2) < FAVOURITE_SHARE
    taste_E = np.where(liked_E, _uniform(user_E, place_E, 3), rng.random(count))
    interest_E = np.minimum(np.searchsorted(popularity_V, taste_E), interests - 1)
    time_ms_E = START_MS + (np.arange(count) * (1_000.0 / events_per_s)).astype(np.int64)
    type_E = rng.choice(len(TYPES), count, p=TYPE_SHARES)
    price_E = np.clip(rng.lognormal(5.5, 0.5, count) * 100, 10_000, 99_999).astype(np.int64)
    values_E = _fill(user_E, interest_E, user_E % 1_000 * 1_000 + interest_E, type_E, time_ms_E, price_E)
    return Workload(user_E=user_E, interest_E=interest_E, time_ms_E=time_ms_E, values_E=values_E)


def _nth_of_user(user_E: INT) -> INT:
    """0, 1, 2, ... within the events of each user."""
    order = np.argsort(user_E, kind="stable")
    ordered = user_E[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else order
    lengths = np.diff(np.append(starts, len(ordered)))
    nth = np.empty(len(user_E), np.int64)
    nth[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return nth


def _uniform(a_E: INT, b_E: INT, salt: int) -> F64:
    """0..1 by a hash of both numbers (splitmix64), so that a user keeps the same favourites without a table of them."""
    x_E = a_E.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + b_E.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    x_E += np.uint64(salt * 0x8CB92BA72F3D8DD7 % 2**64)
    x_E = (x_E ^ (x_E >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_E = (x_E ^ (x_E >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x_E ^= x_E >> np.uint64(31)
    uniform_E: F64 = (x_E >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform_E


def _fill(user_E: INT, interest_E: INT, item_E: INT, type_E: INT, time_ms_E: INT, price_E: INT) -> U8:
    """The JSON of all events, written digit by digit into copies of the template, padded with blanks."""
    template = np.frombuffer(_TEMPLATE.ljust(EVENT_BYTES), np.uint8)
    values_E = np.tile(template, (len(user_E), 1))
    numbers = [user_E, interest_E, item_E, time_ms_E, price_E // 100, price_E % 100, np.arange(len(user_E))]
    for field, number_E in zip(_digit_runs(template), numbers, strict=True):
        rest_E = number_E.copy()
        for column in reversed(field):
            values_E[:, column] = rest_E % 10 + ord("0")
            rest_E //= 10
    words = np.frombuffer(b"".join(TYPES), np.uint8).reshape(len(TYPES), -1)
    values_E[:, template == ord("@")] = words[type_E]
    return values_E


def _digit_runs(template: U8) -> list[list[int]]:
    """Columns of each run of # in the template."""
    runs: list[list[int]] = []
    for column in np.flatnonzero(template == ord("#")).tolist():
        if runs and runs[-1][-1] == column - 1:
            runs[-1].append(column)
        else:
            runs.append([column])
    return runs
