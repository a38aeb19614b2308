"""Made shifts for the evaluation: softened splices of real users, and synthetic users with a planted change of taste.

Beside the way of an event: models/shift_suites.py measures detectors on these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from models.features import I64
from models.shift_calibration import Histories, Splices, session_starts

if TYPE_CHECKING:
    from models.shift import ShiftSettings


def softened(made: Splices, settings: ShiftSettings, seed: int) -> Splices:
    """S2: after the shift the user's own sessions go on between the foreign ones: half and half, or more
    and more foreign.

    Every other splice is partial (each later session is foreign with probability 1/2), the rest gradual (0.2, 0.4, ...,
    1). The user's own sessions are drawn from the last ones before the shift.
    """
    rng = np.random.default_rng(seed)
    runs = made.runs
    starts = session_starts(runs, settings)
    first = runs.first
    index: list[I64] = []
    times: list[I64] = []
    for r in range(runs.users):
        begin, cut, end = int(first[r]), int(first[r] + made.at[r]), int(first[r + 1])
        mine = starts[(starts >= begin) & (starts < cut)]
        edges = np.append(starts[(starts > cut) & (starts < end)], end)
        foreign = list(zip(np.append(cut, edges[:-1]).tolist(), edges.tolist(), strict=True))
        own_ends = np.append(mine[1:], cut)
        picked = [np.arange(begin, cut)]
        lengths, now = 0, 0
        while lengths < made.window and foreign and now < 4 * made.window:
            share = 0.5 if r % 2 else min(1.0, 0.2 * (now + 1))
            now += 1
            if rng.random() < share or not len(mine):
                a, b = foreign[now % len(foreign)] if now > len(foreign) else foreign[now - 1]
            else:
                j = int(rng.integers(max(0, len(mine) - 10), len(mine)))
                a, b = int(mine[j]), int(own_ends[j])
            picked.append(np.arange(a, b))
            lengths += b - a
        chosen = np.concatenate(picked)[: made.at[r] + made.window]
        gaps_ms = np.diff(runs.time_ms[chosen], prepend=runs.time_ms[chosen[0]])
        jump = np.diff(chosen, prepend=chosen[0]) != 1
        jump[0] = False
        gaps_ms[jump] = 8 * 3_600_000
        index.append(chosen)
        times.append(runs.time_ms[begin] + np.cumsum(np.maximum(gaps_ms, 0)))
    if not index:
        return made
    joined = np.concatenate(index)
    soft = Histories(
        user=np.repeat(np.arange(len(index)), [len(i) for i in index]),
        interest=runs.interest[joined],
        time_ms=np.concatenate(times),
        share=runs.share[joined],
    )
    return replace(made, runs=soft)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """Synthetic users: who was given which taste when."""

    made: Splices
    before: list[frozenset[int]]
    after: list[frozenset[int]]


def planted(histories: Histories, seed: int, users: int = 240) -> Planted:
    """S3: users with a taste of their own that changes abruptly, gradually, or away and back."""
    rng = np.random.default_rng(seed)
    interest, place = np.unique(histories.interest, return_index=True)
    share = histories.share[place]
    popularity = share / share.sum()
    tastes = np.sqrt(popularity) / np.sqrt(popularity).sum()
    rows: list[I64] = []
    times: list[I64] = []
    at, before, after = [], [], []
    for user in range(users):
        two = rng.choice(len(interest), min(12, len(interest)), replace=False, p=tastes)
        old, new = two[: len(two) // 2], two[len(two) // 2 :]
        weights = [rng.dirichlet(np.full(len(t), 0.8)) for t in (old, new)]
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
                    drawn.append(int(rng.choice(len(interest), p=popularity)))
                else:
                    drawn.append(int(rng.choice((old, new)[source], p=weights[source])))
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
