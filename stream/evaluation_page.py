"""The page of `driftline evaluate --html`: the table, curves over the stream, horizons, and how calibrated it is.

Beside the way of an event. Names that come from outside are escaped: plotly reads text as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from stream.evaluation import Outcome, Stream, Wanted
from stream.evaluation_rows import curve, reliability_of
from stream.report import page, section

_COLOURS = (
    "#2f7de1",
    "#e07b29",
    "#1f9e78",
    "#8d5fd3",
    "#c9403a",
    "#97a1ad",
    "#b08a1e",
    "#d15a9b",
    "#4aa3a2",
    "#6b7a3a",
)
_SHOWN = (("mrr", "MRR"), ("hr@1", "HR@1"), ("hr@10", "HR@10"), ("ndcg@10", "NDCG@10"), ("ece", "ECE"))

_CURVES_TEXT = (
    "MRR of the next event in windows of equal length, before anything is learned from that event. Figures in the "
    "tables count from the line on."
)
_HORIZON_TEXT = "MRR of the user's n-th next event, asked before the first of them, over the reported part."
_RELIABILITY_TEXT = (
    "How often the most likely interest was right, by the probability that it was given. On the diagonal a probability "
    "means what it says. Models without probabilities are left out."
)


def write_evaluation(
    path: Path, title: str, stream: Stream, outcomes: Sequence[Outcome], rows: Sequence[Mapping[str, Any]],
    wanted: Wanted,
) -> None:  # fmt: skip
    """Write the page."""
    first = [o for o in outcomes if not o.seed]  # one curve a model
    colour = {o.model: _COLOURS[i % len(_COLOURS)] for i, o in enumerate(first)}
    count = len(stream) - wanted.first(len(stream))
    subtitle = (
        f"{len(stream):,} events of {stream.users:,} users, {stream.interests:,} interests; figures over the last "
        f"{count:,} events; every interest is ranked, ties count against the model, an unknown interest is a miss"
    )
    sections = [
        f"<section><h2>Next event</h2>{_table(rows, stratum)}</section>".replace("Next event", f"Next event: {said}")
        for stratum, said in (("all", "all events"), ("non_repeat", "moves (not the user's last interest again)"))
    ]
    sections += [
        section("Over the stream", _CURVES_TEXT, _curves(stream, first, wanted, colour), 420),
        section("Further ahead", _HORIZON_TEXT, _horizons(rows, colour), 340),
        section("Calibration", _RELIABILITY_TEXT, _reliability(stream, first, wanted, colour), 440),
    ]
    path.write_text(page(title, subtitle, sections), encoding="utf-8")


def _best(rows: Sequence[Mapping[str, Any]], **wanted: object) -> list[Mapping[str, Any]]:
    """Rows of a stratum or step, one for each model: the mean over seeds where there is one."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()) and row["seed"] in (0, "mean"):
            found[row["model"]] = row
    return list(found.values())


def _table(rows: Sequence[Mapping[str, Any]], stratum: str) -> str:
    head = "".join(f"<th class=num>{name}</th>" for _, name in _SHOWN)
    body = []
    for row in _best(rows, stratum=stratum, horizon=1):
        spread = row.get("sd") or {}
        cells = "".join(f"<td class='num rule'>{_shown(row[k], spread.get(k))}</td>" for k, _ in _SHOWN)
        body.append(
            f"<tr><th>{escape(row['model'])}</th>{cells}<td class='num rule'>{row['n']:,}</td>"
            f"<td class='num rule'>{row['events_per_s']:,.0f}</td></tr>"
        )
    return (
        f"<table><thead><tr><th></th>{head}<th class=num>events</th><th class=num>events/s</th></tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _shown(value: float | None, spread: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _curves(stream: Stream, outcomes: Sequence[Outcome], wanted: Wanted, colour: Mapping[str, str]) -> go.Figure:
    figure = make_subplots(rows=1, cols=2, subplot_titles=("all events", "moves"), horizontal_spacing=0.07)
    for number, stratum in enumerate(("all", "non_repeat"), 1):
        for outcome in outcomes:
            x, y = curve(stream, outcome, stratum)
            figure.add_scatter(
                x=x, y=y, name=escape(outcome.model), mode="lines", legendgroup=outcome.model,
                showlegend=number == 1, line={"color": colour[outcome.model], "width": 2}, row=1, col=number,
            )  # fmt: skip
        figure.add_vline(x=wanted.first(len(stream)), line={"width": 1, "dash": "dot"}, row=1, col=number)
    figure.update_xaxes(title_text="events")
    figure.update_yaxes(rangemode="tozero", title_text="MRR", row=1, col=1)
    figure.update_layout(margin={"t": 90}, legend={"y": 1.12})
    return figure


def _horizons(rows: Sequence[Mapping[str, Any]], colour: Mapping[str, str]) -> go.Figure:
    figure = go.Figure()
    steps = sorted({row["horizon"] for row in rows})
    for model, shade in colour.items():
        found = {step: next((r for r in _best(rows, stratum="all", horizon=step) if r["model"] == model), None)
                 for step in steps}  # fmt: skip
        y = [None if row is None else row["mrr"] for row in found.values()]
        figure.add_scatter(x=steps, y=y, name=escape(model), mode="lines+markers", line={"color": shade})
    figure.update_xaxes(title_text="step", dtick=1)
    figure.update_yaxes(rangemode="tozero", title_text="MRR")
    return figure


def _reliability(stream: Stream, outcomes: Sequence[Outcome], wanted: Wanted, colour: Mapping[str, str]) -> go.Figure:
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", showlegend=False, line={"width": 1, "dash": "dot", "color": "#97a1ad"}
    )
    for outcome in outcomes:
        found = reliability_of(stream, outcome, wanted)
        if found is None:
            continue
        figure.add_scatter(
            x=found.confidence, y=found.accuracy, name=escape(outcome.model), mode="lines+markers",
            text=[f"{count:,} events" for count in found.events], line={"color": colour[outcome.model]},
            hovertemplate="given %{x:.2f}, right %{y:.2f}<br>%{text}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="probability given", range=[0, 1])
    figure.update_yaxes(title_text="share right", range=[0, 1])
    return figure
