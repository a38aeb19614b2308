"""S4: one interest surges, for all users or for one segment, in made streams: who is alerted, and as what?

Beside the way of an event: for the evaluation and the tests. Users have tastes of their own and lean to what their
segment likes; they come for short visits. After a calm beginning there are trials, each with a calm part and a part in
which something happens:

    all       every event is, with some probability, of one rare interest, whoever makes it
    segment   the same for the users of one segment
    user      a few users change their tastes; nothing else happens

The stream goes through the very walk and group table of a worker, in batches, epochs included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.features import I64, U8, U32, EventColumns
from models.profile import Advanced, EmissionSettings, advance
from models.shift import ShiftSettings
from models.shift_groups import GroupTable
from models.suspicion import Rows, Suspects, rows_of, shares_of
from models.walk import USER

F64 = npt.NDArray[np.float64]

KINDS = ("all", "segment", "user")
_OWN_SHARE_MIN = 0.5  # as in stream/alerts.py: below that a user's alarm is a surge's
_INTERESTS = 300
_SEGMENTS = 4
_BATCH = 512
_VISIT_S = 40.0
_MOVED_SHARE = 0.02  # of the users, in a trial of the kind `user`


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What came of one trial.

    Attributes:
        kind: all, segment or user.
        said: scopes of the alerts while it lasted, right interest only: all, segment (the right one), other.
        active, alerted: users with events while it lasted, and those of them with an alert of their own.
        alerted_calm, active_calm: the same in the calm part before, which is as long.
        suppressed: users' alarms that the surge explains.
        moved, found: users whose tastes changed, and those of them that were alerted.
    """

    kind: str
    said: frozenset[str]
    active: int
    alerted: int
    active_calm: int
    alerted_calm: int
    suppressed: int
    moved: int
    found: int

    @property
    def right(self) -> bool:
        """The scope is what was made: that of the surge, or of users alone."""
        return self.said == (frozenset() if self.kind == "user" else frozenset({self.kind}))


@dataclass(frozen=True, kw_only=True, slots=True)
class SurgeOutcome:
    """All trials together; shares between 0 and 1."""

    trials: list[Trial]

    @property
    def users_alerted(self) -> float:
        """Share of the active users that get an alert of their own while something surges for all."""
        of_all = [t for t in self.trials if t.kind == "all"]
        return sum(t.alerted for t in of_all) / max(1, sum(t.active for t in of_all))

    @property
    def users_alerted_calm(self) -> float:
        """The same in calm parts of the same length."""
        return sum(t.alerted_calm for t in self.trials) / max(1, sum(t.active_calm for t in self.trials))

    @property
    def scope_accuracy(self) -> float:
        return sum(t.right for t in self.trials) / max(1, len(self.trials))


def surge_trials(
    seed: int,
    *,
    settings: ShiftSettings | None = None,
    trials: int = 12,
    users: int = 1_500,
    part_events: int = 6_000,
    warm_events: int = 60_000,
    strength: float = 0.25,
) -> SurgeOutcome:
    """Made streams with surges through the live detector.

    Args:
        trials: kinds take turns.
        part_events: of a calm part, and of the part in which something happens.
        strength: probability that an event is of the surging interest.
    """
    shop = _Shop(seed, users)
    run = _Run(shop, settings or ShiftSettings())
    run.through(shop.events(warm_events))
    found = []
    for number in range(trials):
        kind = KINDS[number % len(KINDS)]
        calm = run.through(shop.events(part_events))
        interest, segment = shop.rare(), int(shop.rng.integers(1, _SEGMENTS + 1))
        moved = shop.move() if kind == "user" else np.zeros(0, np.int64)
        surge = {"all": (interest, 0, strength), "segment": (interest, segment, strength)}.get(kind)
        part = run.through(shop.events(part_events, surge))
        said = frozenset(
            ("segment" if s == segment else "other") if s else "all" for s, i in part.surges if i == interest
        ) | frozenset("other" for _, i in part.surges if i != interest)
        found.append(
            Trial(
                kind=kind,
                said=said,
                active=len(part.active),
                alerted=len(part.alerted),
                active_calm=len(calm.active),
                alerted_calm=len(calm.alerted),
                suppressed=part.suppressed,
                moved=len(moved),
                found=len(set(moved.tolist()) & part.alerted),
            )
        )
    return SurgeOutcome(trials=found)


class _Shop:
    """Users with tastes and segments that make visits."""

    def __init__(self, seed: int, users: int) -> None:
        self.rng = np.random.default_rng(seed)
        popularity = 1.0 / np.arange(3.0, _INTERESTS + 3.0) ** 0.9
        self._popularity = popularity / popularity.sum()
        self.segment_U: U8 = self.rng.integers(1, _SEGMENTS + 1, users).astype(np.uint8)
        lean = self._popularity * self.rng.gamma(0.5, 2.0, (_SEGMENTS + 1, _INTERESTS))
        self._lean = lean / lean.sum(axis=1, keepdims=True)
        self._activity = self.rng.lognormal(0.0, 0.7, users)
        self._activity /= self._activity.sum()
        self._taste_UK = np.stack([self._tastes(int(s)) for s in self.segment_U])
        self._now_ms = 1_700_000_000_000

    def _tastes(self, segment: int) -> I64:
        return self.rng.choice(_INTERESTS, 5, replace=False, p=self._lean[segment])

    def rare(self) -> int:
        """An interest of the rarer half, as the walk names it."""
        return int(self.rng.integers(_INTERESTS // 2, _INTERESTS)) + 1

    def move(self) -> I64:
        """Some of the more active users get other tastes."""
        users = len(self.segment_U)
        active = np.argsort(-self._activity)[: users // 3]
        moved: I64 = self.rng.choice(active, max(1, int(users * _MOVED_SHARE)), replace=False)
        for user in moved.tolist():
            self._taste_UK[user] = self._tastes(int(self.segment_U[user]))
        return moved

    def events(self, count: int, surge: tuple[int, int, float] | None = None) -> EventColumns:
        """Visits of about four events; `surge` is (interest, segment or 0 for all, probability)."""
        rng = self.rng
        visits = rng.geometric(0.25, count)
        visits = visits[: int(np.searchsorted(np.cumsum(visits), count)) + 1]
        user = np.repeat(rng.choice(len(self.segment_U), len(visits), p=self._activity), visits)[:count]
        own = self._taste_UK[user, rng.integers(0, self._taste_UK.shape[1], count)]
        leaned = np.zeros(count, np.int64)
        for segment in range(1, _SEGMENTS + 1):
            mine = np.flatnonzero(self.segment_U[user] == segment)
            leaned[mine] = rng.choice(_INTERESTS, len(mine), p=self._lean[segment])
        interest = np.where(rng.random(count) < 0.75, own, leaned) + 1
        if surge is not None:
            taken = rng.random(count) < surge[2]
            taken &= (self.segment_U[user] == surge[1]) | (surge[1] == 0)
            interest[taken] = surge[0]
        time_ms = self._now_ms + np.cumsum(rng.exponential(_VISIT_S * 1_000 / 4, count)).astype(np.int64)
        self._now_ms = int(time_ms[-1])
        return _columns(user, interest.astype(np.uint32), time_ms, self.segment_U[user])


def _columns(user: I64, interest: U32, time_ms: I64, segment: U8) -> EventColumns:
    missing = np.full(len(user), np.nan, np.float32)
    return EventColumns(
        user_row=user,
        interest=interest,
        item=np.zeros(len(user), np.uint32),
        type=np.ones(len(user), np.uint8),
        time_ms=time_ms,
        price=missing,
        dwell_s=missing,
        rating=missing,
        sentiment=missing,
        segment=segment,
    )


@dataclass(kw_only=True, slots=True)
class _Part:
    surges: list[tuple[int, int]]
    alerted: set[int]
    active: set[int]
    suppressed: int = 0


class _Run:
    """The walk and the group table of one partition, with its epochs."""

    def __init__(self, shop: _Shop, settings: ShiftSettings) -> None:
        self._settings = settings
        self._records: Any = np.zeros(len(shop.segment_U), USER)
        self._records["key"] = np.random.default_rng(7).permutation(1 << 20)[: len(self._records)].astype(
            np.uint64
        ) << np.uint64(44)
        self._table, self._suspects = GroupTable(settings), Suspects()
        self._seen, self._cut = 0, 256

    def through(self, events: EventColumns) -> _Part:
        """Walk some events; what was said meanwhile."""
        part = _Part(surges=[], alerted=set(), active=set(events.user_row.tolist()))
        done = 0
        while done < len(events):
            end = min(len(events), done + _BATCH, done + self._cut - self._seen)
            batch = events.take(slice(done, end))
            said = advance(self._records, batch, self._table, self._settings, _SILENT, np.zeros(len(batch), np.bool_))
            self._tell(part, batch, said)
            self._table.apply_delta(self._table.delta(batch, said, {}))
            self._seen += end - done
            done = end
            if self._seen == self._cut:
                self._table = self._table.cut()
                self._suspects.trim()
                self._cut = min(2 * self._cut, self._cut + 65_536)
        return part

    def _tell(self, part: _Part, batch: EventColumns, said: Advanced) -> None:
        count = np.arange(len(batch))
        key_B = self._records["key"][batch.user_row]
        rows: Rows = rows_of(said, batch, key_B, self._seen + count, np.zeros(len(batch), np.int64))
        for event in said.alarmed.event_E.tolist():
            mine = rows[(rows["key"] == key_B[event]) & (rows["age"] <= said.age_B[event])]
            shares, surging = shares_of(self._suspects.since_onset(int(key_B[event]), mine))
            if surging and shares["user"] < _OWN_SHARE_MIN:
                part.suppressed += 1
            else:
                part.alerted.add(int(batch.user_row[event]))
        part.surges += [(surge.segment, surge.interest) for surge in said.surges]
        self._suspects.append(rows)


_SILENT = EmissionSettings(policy="interval", max_events=2**31, max_age_s=1e12)
