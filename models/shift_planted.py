"""Made shifts for the evaluation: softened splices of real users, and synthetic users with a planted change of taste.

Beside the way of an event: models/shift_suites.py measures detectors on these.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from models.features import I64
from models.shift_calibration import F64, Histories, Splices, session_starts

if TYPE_CHECKING:
    from models.shift import ShiftSettings

_PAUSE_MS = 8 * 3_600_000  # between sessions that did not follow one another


def softened(made: Splices, histories: Histories, settings: ShiftSettings, seed: int) -> Splices:
    """S2: after the shift the user's own sessions go on between the foreign ones: half and half, or more
    and more foreign.

    The first session after the shift is foreign. Every other splice is partial (each later session is foreign with
    probability 1/2), the rest gradual (0.4, 0.6, 0.8, 1). The user's own sessions are those that followed in truth, in
    their order: repeated ones would be a change by themselves, which a two-sided detector finds without any foreign
    session. Splices with less than half a window of the user's own events left are dropped.

    Args:
        histories: what `made` was spliced from.
    """
    rng = np.random.default_rng(seed)
    runs, first, own_first = made.runs, made.runs.first, histories.first
    foreign_starts, own_starts = session_starts(runs, settings), session_starts(histories, settings)
    kept: list[int] = []
    parts: list[Histories] = []
    for r in range(runs.users):
        cut, end = int(first[r] + made.at[r]), int(first[r + 1])
        own_cut, own_end = int(own_first[made.owner[r]] + made.at[r]), int(own_first[made.owner[r] + 1])
        if own_end - own_cut < made.window // 2:
            continue
        foreign = _pieces(runs, foreign_starts, cut, end)
        own = _pieces(histories, own_starts, own_cut, own_end)
        after: list[Histories] = []
        length = 0
        while length < made.window and foreign:
            share = 0.5 if r % 2 else min(1.0, 0.2 * (len(after) + 1))
            theirs = not after or not own or rng.random() < share
            after.append((foreign if theirs else own).pop(0))
            length += len(after[-1])
        parts.append(_in_a_row([runs.at(slice(int(first[r]), cut)), *after], len(kept), int(made.at[r]) + made.window))
        kept.append(r)
    if not kept:
        return made
    soft = Histories(
        user=np.concatenate([part.user for part in parts]),
        interest=np.concatenate([part.interest for part in parts]),
        time_ms=np.concatenate([part.time_ms for part in parts]),
        share=np.concatenate([part.share for part in parts]),
    )
    return replace(made, runs=soft, at=made.at[kept], owner=made.owner[kept])


def _pieces(histories: Histories, starts: I64, begin: int, end: int) -> list[Histories]:
    """The sessions between two places."""
    edges = [begin, *starts[(starts > begin) & (starts < end)].tolist(), end]
    return [histories.at(slice(a, b)) for a, b in itertools.pairwise(edges)]


def _in_a_row(pieces: list[Histories], user: int, events_max: int) -> Histories:
    """The first events of the pieces as one user's history: within a piece the times pass as they did."""
    gaps_ms = [np.append(_PAUSE_MS, np.diff(piece.time_ms)) for piece in pieces]
    gaps_ms[0][0] = 0
    joined = Histories(
        user=np.full(sum(map(len, pieces)), user),
        interest=np.concatenate([piece.interest for piece in pieces]),
        time_ms=pieces[0].time_ms[0] + np.cumsum(np.maximum(np.concatenate(gaps_ms), 0)),
        share=np.concatenate([piece.share for piece in pieces]),
    )
    return joined.at(slice(events_max))


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """Synthetic users: who was given which taste when."""

    made: Splices
    before: list[frozenset[int]]
    after: list[frozenset[int]]


def _cumulated(weights: F64) -> F64:
    """Sums of shares, for drawing by them over and over: a uniform number falls between two of these."""
    sums: F64 = weights.cumsum()
    sums /= sums[-1]
    return sums


def planted(histories: Histories, seed: int, users: int = 240) -> Planted:
    """S3: users with a taste of their own that changes abruptly, gradually, or away and back."""
    rng = np.random.default_rng(seed)
    interest, place = np.unique(histories.interest, return_index=True)
    share = histories.share[place]
    popularity = share / share.sum()
    tastes = np.sqrt(popularity) / np.sqrt(popularity).sum()
    everybodys = _cumulated(popularity)
    rows: list[I64] = []
    times: list[I64] = []
    at, before, after = [], [], []
    for user in range(users):
        two = rng.choice(len(interest), min(12, len(interest)), replace=False, p=tastes)
        old, new = two[: len(two) // 2], two[len(two) // 2 :]
        weights = [rng.dirichlet(np.full(len(t), 0.8)) for t in (old, new)]
        own = [_cumulated(w) for w in weights]
        shift = int(rng.integers(50, 120))
        kind = user % 3
        drawn: list[int] = []
        stamps: list[int] = []
        now_ms, shifted_at = 1_600_000_000_000, -1
        sessions_after = 0
        while len(drawn) < shift + 60:
            now_ms += int(rng.lognormal(2.5, 0.8) * 3_600_000)
            moved = len(drawn) >= shift
            if moved and shifted_at < 0:
                shifted_at = len(drawn)
            share_new = 0.0
            if moved:
                sessions_after += 1
                share_new = min(1.0, 0.25 * sessions_after) if kind == 1 else 1.0
                if kind == 2 and len(drawn) >= shift + 40:
                    share_new = 0.0
            for _ in range(1 + rng.poisson(4)):
                source = int(rng.random() < share_new)
                if rng.random() < 0.15:
                    drawn.append(int(everybodys.searchsorted(rng.random(), side="right")))
                else:
                    drawn.append(int((old, new)[source][own[source].searchsorted(rng.random(), side="right")]))
                now_ms += int(rng.exponential(60_000)) + 1_000
                stamps.append(now_ms)
        rows.append(np.array(drawn))
        times.append(np.array(stamps))
        at.append(shifted_at)
        before.append(frozenset(interest[old[np.argsort(-weights[0])[:3]]].tolist()))
        after.append(frozenset(interest[new[np.argsort(-weights[1])[:3]]].tolist()))
    joined = np.concatenate(rows)
    runs = Histories(
        user=np.repeat(np.arange(users), [len(r) for r in rows]),
        interest=interest[joined],
        time_ms=np.concatenate(times),
        share=popularity[joined],
    )
    made = Splices(runs=runs, at=np.array(at), owner=np.arange(users), window=60)
    return Planted(made=made, before=before, after=after)
