"""Surges: an interest that suddenly comes to many users at once, of all or of one segment.

On the way of an event: a part of the partition's group table. The walk (models/walk.py) counts adoptions, events by
which a user comes to an interest that is new to it, and keeps for each interest, for all and by segment, a CUSUM of the
log-likelihood ratio "SURGE_RATIO times as often as usual". A surge enters what every user is expected to do, so that
it raises one alarm of its own and not one of each user. What is usual is frozen within an epoch; everything that moves
inside one moves in the order of the partition and travels with it, so any cut into batches gives the same.

    row of `rows`   one interest of all users, or of a segment; parallel to the keys of the group table
    delta           the rows that a batch changed, the scopes with adoptions, the offset of the thresholds
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from models.features import I64, U64
from models.walk import RECENT_HALF_LIFE, SCOPE, SCOPES, SURGE, SURGE_RATIO, Crowd

F64 = npt.NDArray[np.float64]
Rows = npt.NDArray[np.signedinteger[Any]]

WATCHED_MIN = 1_000.0  # decayed adoptions of a scope before it can be in alarm: before that nothing is usual
_SEGMENT_PRIOR = 200.0  # adoptions' worth of everybody's shares in a segment's
_PRIOR = 3.0  # adoptions added to every interest: what is rare is known badly
_FORGOTTEN = 0.01
FOLLOW_STEP = 0.1  # log rate by which one alarm moves the thresholds


class SurgesDelta(msgspec.Struct, array_like=True):
    """What a batch changed. `adopted` counts by row of `keys`; rows and scopes are as they are now."""

    keys: bytes
    rows: bytes
    adopted: bytes
    scope_numbers: bytes
    scopes: bytes
    offset: float


class SurgesSnapshot(msgspec.Struct, array_like=True):
    """Everything; rows that are all zero are left out."""

    weight: bytes
    added: bytes
    places: bytes
    rows: bytes
    scope_numbers: bytes
    scopes: bytes
    offset: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Surge:
    """An alarm of a surge.

    Attributes:
        event: index of the event in the batch at which it was raised.
        segment: 0 = all users.
        interest: what surges.
        usual, now: its share of the scope's adoptions, before and since the onset.
        adoptions: how many users came to it since the onset; `since` adoptions of all interests ago, at
            `since_ms`.
        score, bar: nats, and what an alarm takes.
    """

    event: int
    segment: int
    interest: int
    usual: float
    now: float
    adoptions: int
    since: int
    since_ms: int
    score: float
    bar: float


class Surges:
    """The moving part and the frozen one; rows lie as the keys of the group table do."""

    def __init__(self) -> None:
        self.rows = np.zeros(0, SURGE)
        self.weight = np.zeros(0, np.float64)  # frozen: decayed adoptions as of the last cut
        self.added = np.zeros(0, np.int64)  # since the last cut
        self.scopes = np.zeros(SCOPES, SCOPE)
        self.total_S = np.zeros(SCOPES, np.float64)  # frozen
        self.offset = 0.0

    def append(self, count: int) -> None:
        """Room for more interests."""
        self.rows = np.concatenate([self.rows, np.zeros(count, SURGE)])
        self.weight = np.concatenate([self.weight, np.zeros(count)])
        self.added = np.concatenate([self.added, np.zeros(count, np.int64)])

    # ------------------------------------------------------------------ a batch

    def crowd(
        self, keys_K: U64, row_K: Rows, row_of_all_K: Rows, place: tuple[I64, I64], rate: tuple[float, float, float]
    ) -> Crowd:
        """The batch's own copy of what the walk reads and changes.

        Args:
            keys_K: the batch's distinct keys (segment << 32 | interest); `row_K` where they lie here, -1: nowhere yet.
            row_of_all_K: where their interests of all users lie.
            place: for each event, its place in `keys_K`, of all and of its segment (-1: none).
            rate: alarms asked for an event, the tail of the rule in force, events between false alarms of surges.
        """
        rows = np.zeros(len(keys_K), SURGE)
        known = row_K >= 0
        rows[known] = self.rows[row_K[known]]
        rows["usual"] = self._usual(keys_K, _at(self.weight, row_K), _at(self.weight, row_of_all_K))
        share, tail, between = rate
        events = len(place[0])
        return Crowd(
            live=True,
            row_all=place[0],
            row_segment=place[1],
            rows=rows,
            scopes=self.scopes.copy(),
            offset=np.array([self.offset]),
            step=FOLLOW_STEP / tail if share else 0.0,
            share=share,
            bar=math.log(max(1, int(np.count_nonzero(self.weight))) * between),
            raised_event=np.zeros(events, np.int64),
            raised_row=np.zeros(events, np.int64),
            raised=np.zeros((events, 4)),
            adopted=np.zeros(len(keys_K), np.int64),
        )

    def _usual(self, keys: U64, weight: F64, weight_of_all: F64) -> F64:
        """Share of each key among its scope's adoptions, rather too high than too low."""
        scope = (keys >> np.uint64(32)).astype(np.int64)
        share = np.minimum(1.0, (weight_of_all + _PRIOR) / max(1.0, self.total_S[0]))
        own = (weight + _PRIOR + _SEGMENT_PRIOR * share) / (self.total_S[scope] + _SEGMENT_PRIOR)
        usual: F64 = np.minimum(1.0, np.where(scope > 0, own, share))
        return usual

    def delta(self, keys_K: U64, crowd: Crowd) -> SurgesDelta:
        """What the walk changed in its copy."""
        moved = np.flatnonzero(crowd.adopted)
        scopes = np.flatnonzero(crowd.scopes["clock"] != self.scopes["clock"])
        return SurgesDelta(
            keys_K[moved].astype("<u8").tobytes(),
            crowd.rows[moved].tobytes(),
            crowd.adopted[moved].astype("<i8").tobytes(),
            scopes.astype("<i8").tobytes(),
            crowd.scopes[scopes].tobytes(),
            float(crowd.offset[0]),
        )

    def apply(self, delta: SurgesDelta, row: Rows) -> None:
        """Take a committed delta over; `row` says where its keys lie."""
        self.rows[row] = np.frombuffer(delta.rows, SURGE)
        self.added[row] += np.frombuffer(delta.adopted, "<i8")
        self.scopes[np.frombuffer(delta.scope_numbers, "<i8")] = np.frombuffer(delta.scopes, SCOPE)
        self.offset = delta.offset

    # ------------------------------------------------------------------ epochs

    def cut(self, kept: I64, keys: U64, half_life: float) -> Surges:
        """The next epoch's: old adoptions decayed, new ones usual from now on.

        Args:
            kept: which rows stay, in their new order; `keys` are theirs, ascending.
            half_life: adoptions.
        """
        after = Surges()
        scope = (keys >> np.uint64(32)).astype(np.int64)
        fresh = int(self.added[kept][scope == 0].sum())
        rows = self.rows[kept].copy()
        of_all = np.searchsorted(keys, keys & np.uint64(0xFFFFFFFF))
        of_all = np.where(keys[np.minimum(of_all, len(keys) - 1)] == keys & np.uint64(0xFFFFFFFF), of_all, -1)
        weight = self.weight[kept]
        rows["usual"] = self._usual(keys, weight, _at(weight, of_all))
        clock = self.scopes["clock"][scope]
        score = rows["score"] - (SURGE_RATIO - 1.0) * rows["usual"] * (clock - rows["at"])
        recent = rows["recent"] * 0.5 ** ((self.scopes["clock"][0] - rows["recent_at"]) / RECENT_HALF_LIFE)
        over = score <= 0.0
        rows["score"], rows["at"] = np.where(over, 0.0, score), clock
        rows["recent"], rows["recent_at"] = recent, self.scopes["clock"][0]
        for name in ("since", "since_ms", "count", "alarm", "lead"):
            rows[name] = np.where(over, 0, rows[name])
        rows[over & (recent < _FORGOTTEN)] = np.zeros((), SURGE)
        rows["usual"] = 0.0
        after.rows = rows
        after.weight = weight * 0.5 ** (fresh / half_life) + self.added[kept]
        after.added = np.zeros(len(rows), np.int64)
        after.total_S = np.bincount(scope, weights=after.weight, minlength=SCOPES).astype(np.float64)
        after.scopes = self.scopes.copy()
        after.scopes["watched"] = after.total_S >= WATCHED_MIN
        after.offset = self.offset
        return after

    # ------------------------------------------------------------------ bytes

    def dump(self) -> SurgesSnapshot:
        """Everything but what follows from it."""
        used = np.flatnonzero(self.rows["recent_at"])
        scopes = np.flatnonzero(self.scopes["clock"])
        return SurgesSnapshot(
            self.weight.astype("<f8").tobytes(),
            self.added.astype("<i8").tobytes(),
            used.astype("<i8").tobytes(),
            self.rows[used].tobytes(),
            scopes.astype("<i8").tobytes(),
            self.scopes[scopes].tobytes(),
            self.offset,
        )

    @staticmethod
    def load(saved: SurgesSnapshot, keys: U64) -> Surges:
        """What `dump` wrote, for a table of these keys."""
        surges = Surges()
        surges.weight = np.frombuffer(saved.weight, "<f8").astype(np.float64)
        surges.added = np.frombuffer(saved.added, "<i8").astype(np.int64)
        surges.rows = np.zeros(len(keys), SURGE)
        surges.rows[np.frombuffer(saved.places, "<i8")] = np.frombuffer(saved.rows, SURGE)
        surges.scopes[np.frombuffer(saved.scope_numbers, "<i8")] = np.frombuffer(saved.scopes, SCOPE)
        scope = (keys >> np.uint64(32)).astype(np.int64)
        surges.total_S = np.bincount(scope, weights=surges.weight, minlength=SCOPES).astype(np.float64)
        surges.offset = saved.offset
        return surges


def _at(weight: F64, row: Rows) -> F64:
    """Weights of rows, 0 for -1."""
    return np.where(row >= 0, weight[row], 0.0) if len(weight) else np.zeros(len(row))


def still() -> Crowd:
    """A crowd that is not there: for replays, in which nothing surges and thresholds stand."""
    none = np.zeros(0, np.int64)
    return Crowd(
        live=False,
        row_all=none,
        row_segment=none,
        rows=np.zeros(1, SURGE),
        scopes=np.zeros(1, SCOPE),
        offset=np.zeros(1),
        step=0.0,
        share=0.0,
        bar=1.0,
        raised_event=none,
        raised_row=none,
        raised=np.zeros((0, 4)),
        adopted=none,
    )


def raised(crowd: Crowd, count: int, keys_K: U64) -> list[Surge]:
    """The alarms of surges that the walk raised, in order."""
    found = []
    for e in range(count):
        key = int(keys_K[crowd.raised_row[e]])
        score, adoptions, since, since_ms = crowd.raised[e].tolist()
        found.append(
            Surge(
                event=int(crowd.raised_event[e]),
                segment=key >> 32,
                interest=key & 0xFFFFFFFF,
                usual=float(crowd.rows["usual"][crowd.raised_row[e]]),
                now=min(1.0, adoptions / max(1.0, since)),
                adoptions=int(adoptions),
                since=int(since),
                since_ms=int(since_ms),
                score=score,
                bar=crowd.bar,
            )
        )
    return found
