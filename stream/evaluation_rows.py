"""The rows of an evaluation: a figure of merit for each model, stratum, horizon and seed, and their means over seeds.

Beside the way of an event, behind stream/evaluation.py. The stratum of step j is that of the event it is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from models.evaluate import CUTS, STRATA, Reliability, figures, figures_of, next_events, reliability, strata
from stream.evaluation import Outcome, Stream, Wanted

CURVE_POINTS = 40
_NAMES = ("model", "stratum", "horizon", "seed", "n")


def rows_of(stream: Stream, outcomes: Sequence[Outcome], wanted: Wanted) -> list[dict[str, Any]]:
    """The rows of `--json`. Figures that a model cannot give are None."""
    members = strata(stream.user_E, stream.interest_E, stream.type_E)
    index_EN = next_events(stream.user_E, wanted.horizon)
    reported_E = np.arange(len(stream)) >= wanted.first(len(stream))
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        for step in range(wanted.horizon):
            about_E = np.maximum(index_EN[:, step], 0)
            for stratum in STRATA:
                found = figures_of(outcome.judged, reported_E & members[stratum][about_E], step, stream.interests)
                rows.append(
                    {
                        "model": outcome.model,
                        "stratum": stratum,
                        "horizon": step + 1,
                        "seed": outcome.seed,
                        "n": found.n,
                        "mrr": found.mrr,
                        **{f"hr@{cut}": found.hr[cut] for cut in CUTS},
                        "ndcg@10": found.ndcg_10,
                        "accuracy": found.accuracy,
                        "ece": found.ece,
                        "share_mae": found.share_mae,
                        "share_rmse": found.share_rmse,
                        "events_per_s": round(outcome.events_per_s),
                        "peak_mb": round(outcome.peak_mb),
                        "trained_share": outcome.trained_share,
                    }
                )
    return rows + _means(rows)


def _means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread (standard deviation) over seeds, where a model has more than one."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["stratum"], row["horizon"]), []).append(row)
    means = []
    for group in groups.values():
        if len(group) < 2:
            continue
        mean: dict[str, Any] = {**group[0], "seed": "mean"}
        spread: dict[str, float | None] = {}
        for key in group[0].keys() - set(_NAMES):
            values = [row[key] for row in group]
            if any(v is None for v in values):
                mean[key] = spread[key] = None
                continue
            mean[key] = round(float(np.mean(values)), 9)
            spread[key] = round(float(np.std(values, ddof=1)), 9)
        means.append({**mean, "sd": {key: spread[key] for key in group[0] if key in spread}})
    return means


def curve(stream: Stream, outcome: Outcome, stratum: str) -> tuple[list[int], list[float | None]]:
    """MRR of the next event in windows over the whole stream: number of the window's last event, and MRR."""
    member_E = strata(stream.user_E, stream.interest_E, stream.type_E)[stratum]
    rank_E = outcome.judged.rank_EN[:, 0]
    ends, values = [], list[float | None]()
    for window in np.array_split(np.arange(len(stream)), min(CURVE_POINTS, len(stream))):
        chosen = window[member_E[window] & (rank_E[window] >= 0)]
        ends.append(int(window[-1]) + 1)
        values.append(figures(rank_E[chosen]).mrr)
    return ends, values


def reliability_of(stream: Stream, outcome: Outcome, wanted: Wanted) -> Reliability | None:
    """Confidence against accuracy of the next event over the reported part; None without probabilities."""
    reported = slice(wanted.first(len(stream)), None)
    top_E = outcome.judged.top_EN[reported, 0]
    if not np.isfinite(top_E).all():
        return None
    return reliability(top_E, outcome.judged.rank_EN[reported, 0] == 1)
