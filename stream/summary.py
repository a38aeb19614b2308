"""A finished run in numbers, and the table that says them.

At the end of the way of an event: demo.py fills a DemoScore; the terminal and the report show the same rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stream.findings import QualityPoint, Story, SummaryRow
from stream.scoring import FOUND_WITHIN_EVENTS, AlertScore, median_delay
from stream.truth import Truth


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Forecasts of the next interest beside the recency rule, over some events.

    Attributes:
        moves: the same over those events only that do not repeat the user's last interest.
    """

    scored: int
    mrr: float
    hits_10: float
    recency_mrr: float
    recency_hits_10: float
    moves: Quality | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoScore:
    """All that a finished run is judged by.

    Attributes:
        elapsed_s: wall time in which the workers handled the events, as given.
        quality, second_half: over all events, and over the later half of them (by the order of event time).
        curve: the same in POINTS parts of equally many events.
        dead_letters: by reason; `planted_bad` is what the truth says.
        weights_version: the last one in use.
    """

    events: int
    forecasts: int
    elapsed_s: float
    quality: Quality
    second_half: Quality
    curve: list[QualityPoint]
    alerts: AlertScore
    dead_letters: dict[str, int]
    planted_bad: dict[str, int]
    weights_version: int
    truth: Truth
    story: Story | None = None

    @property
    def events_per_s(self) -> float:
        return self.events / self.elapsed_s if self.elapsed_s > 0 else math.nan


def summary(score: DemoScore) -> list[SummaryRow]:
    """The table at the end of a run: what, ours, the recency rule's, and how to read it."""
    found, outcomes = score.alerts.found, score.alerts.outcomes
    rows = [
        SummaryRow(
            name="Events handled",
            ours=f"{score.events:,}",
            note=f"{score.events_per_s:,.0f} a second; {score.forecasts:,} forecasts published; weights version "
            f"{score.weights_version}",
        ),
        *_quality_rows("all events", score.quality),
        *_quality_rows("second half", score.second_half),
        SummaryRow(
            name="Shifts found",
            ours=f"{len(found)} of {len(outcomes)}",
            note=f"missed {len(score.alerts.missed)}; within {FOUND_WITHIN_EVENTS} events of the user; as many alerts "
            f"at random would find {score.alerts.by_chance:.0%}",
        ),
    ]
    for kind in ("abrupt", "gradual", "returning"):
        if of_kind := score.alerts.of_kind(kind):
            hits = sum(o.alert is not None for o in of_kind)
            rows.append(
                SummaryRow(
                    name=f"  {kind}",
                    ours=f"{hits} of {len(of_kind)}",
                    note=f"median delay {_events(median_delay(of_kind))}, missed ones counted as never",
                )
            )
    if found:
        named = sum(o.gained_hits > 0 for o in found)
        rows.append(
            SummaryRow(
                name="  cause named",
                ours=f"{named} of {len(found)}",
                note="a planted new interest is among the first three gained",
            )
        )
    false = len(score.alerts.false)
    extra = f"; {len(score.alerts.repeated)} repeated" + (
        f"; {len(score.alerts.wider)} about a segment or all" if score.alerts.wider else ""
    )
    rows.append(
        SummaryRow(
            name="False alerts",
            ours=f"{false:,}",
            note=(f"one in {score.alerts.events_per_false:,.0f} events" if false else "none") + extra,
        )
    )
    planted = sum(score.planted_bad.values())
    exact = score.dead_letters == {reason: n for reason, n in score.planted_bad.items() if n}
    rows.append(
        SummaryRow(
            name="Dead letters",
            ours=f"{sum(score.dead_letters.values()):,} of {planted:,}",
            note="every bad record, each with its reason" if exact else _difference(score),
        )
    )
    return rows


def _quality_rows(part: str, quality: Quality) -> list[SummaryRow]:
    rows = []
    for name, q in ((part, quality), (f"{part}, moves", quality.moves)):
        if q is not None and q.scored:
            note = f"{q.scored:,} forecasts judged"
            if name == "all events, moves":
                note += "; a move does not repeat the user's last interest"
            rows += [
                SummaryRow(name=f"MRR, {name}", ours=f"{q.mrr:.3f}", rule=f"{q.recency_mrr:.3f}", note=note),
                SummaryRow(name=f"HR@10, {name}", ours=f"{q.hits_10:.3f}", rule=f"{q.recency_hits_10:.3f}"),
            ]
    return rows


def _events(count: float) -> str:
    return f"{count:.0f} events" if math.isfinite(count) else "never"


def _difference(score: DemoScore) -> str:
    reasons = sorted(score.dead_letters.keys() | score.planted_bad.keys())
    pairs = [(r, score.dead_letters.get(r, 0), score.planted_bad.get(r, 0)) for r in reasons]
    return "not as planted: " + ", ".join(f"{r} {have} of {want}" for r, have, want in pairs if have != want)
