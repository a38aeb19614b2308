"""The page of `driftline evaluate-shifts --html`: delay curves, requested against measured rate, ten alerts' stories.

Beside the way of an event. Names that come from events are escaped: plotly reads text as markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from models.shift import ShiftSettings
from models.shift_suites import Row, Told, natural_alerts
from stream.report import page, section
from stream.shift_evaluation import Asked, EventFile, measured_settings, study_of

_OURS, _OTHERS, _TRUE, _DUMMY = "#2f7de1", "#97a1ad", "#1f9e78", "#c9403a"
_STORIES = 10
_AROUND = 20  # events shown before the onset and after the alert
_INTERESTS = 10  # rows in a story's plot; the rest is shown as one

_CURVES_TEXT = (
    "Share of made shifts (one user's history, then another's) found within so many events of the user, every detector "
    "set so that the real order of real users raises one alarm in {rate:,.0f} events. The dummy raises an alarm every "
    "so many events whatever happens."
)
_RATES_TEXT = (
    "Each bar: monitored events for each alarm that was measured on users whom the thresholds have not seen, with its "
    "95 % interval (Poisson). On the line the promise is kept."
)
_STORY_TEXT = "Ten natural alerts of reported users, drawn at random, not chosen. Nobody knows whether they are right."


def write_shift_report(
    path: Path, rows: Sequence[Row], file: EventFile, settings: ShiftSettings, wanted: Asked
) -> None:
    """Write the page."""
    sections = []
    for rate in wanted.arl0:
        found = [r for r in rows if r.suite == "S1" and r.requested_arl0 == rate and r.delays is not None]
        if found:
            text = _CURVES_TEXT.format(rate=rate)
            sections.append(section(f"Delay at one alarm in {rate:,.0f} events", text, _curves(found), 460))
    rates = [r for r in rows if r.suite == "S0" and r.measured_arl0 is not None]
    if rates:
        sections.append(section("Requested against measured rate", _RATES_TEXT, _rates(rates), 120 + 26 * len(rates)))
    sections.append(f"<section><h2>Stories</h2><p>{_STORY_TEXT}</p></section>")
    study = study_of(file, None, measured_settings(file, settings), wanted, wanted.arl0[0])
    for told in natural_alerts(study, _STORIES):
        sections.append(section(*_story(told, file)))
    if len(sections) and not sections[-1].count("plot"):
        sections.append("<section><p>There was no natural alert.</p></section>")
    subtitle = f"{len(file.histories):,} events of {file.histories.users:,} users, seed {wanted.seed}"
    path.write_text(page("Interest-shift alerts", subtitle, sections), encoding="utf-8")


def _curves(rows: Sequence[Row]) -> go.Figure:
    figure = go.Figure()
    for row in rows:
        assert row.delays is not None
        until = np.arange(0, (row.missed_window or 50) + 1)
        ours = row.detector.startswith("driftline")
        colour = _OURS if ours else _DUMMY if row.detector == "dummy" else _OTHERS
        figure.add_scatter(
            x=until,
            y=[float((row.delays <= n).mean()) for n in until],
            name=row.detector,
            mode="lines",
            line={
                "color": colour,
                "width": 3 if row.detector == "driftline" else 1.4,
                "dash": "dot" if ours and row.detector != "driftline" else "solid",
            },
        )
    figure.update_xaxes(title="events since the shift")
    figure.update_yaxes(range=[0, 1], tickformat=".0%")
    figure.update_layout(legend={"y": 1.04}, margin={"t": 130})
    return figure


def _rates(rows: Sequence[Row]) -> go.Figure:
    figure = go.Figure()
    names = [f"{r.detector}, {r.requested_arl0:,.0f}" for r in rows]
    ratio = [(r.measured_arl0 or 0.0) / r.requested_arl0 for r in rows]
    low = [r.ci95["measured_arl0"][0] / r.requested_arl0 for r in rows]
    high = [min(10.0, r.ci95["measured_arl0"][1] / r.requested_arl0) for r in rows]
    figure.add_scatter(
        x=ratio,
        y=names,
        mode="markers",
        marker={"color": [_OURS if n.startswith("driftline") else _OTHERS for n in names], "size": 9},
        error_x={
            "type": "data",
            "array": [h - x for h, x in zip(high, ratio, strict=True)],
            "arrayminus": [x - a for a, x in zip(low, ratio, strict=True)],
            "color": _OTHERS,
        },
        showlegend=False,
    )
    figure.add_vline(x=1.0, line={"color": _TRUE, "dash": "dot"})
    figure.update_xaxes(title="measured / requested events between alarms", type="log")
    figure.update_yaxes(autorange="reversed")
    return figure


def _story(told: Told, file: EventFile) -> tuple[str, str, go.Figure, int]:
    """Title, text, plot and its height."""
    before = told.begin + max(0, told.onset - told.begin - _AROUND)
    span = slice(before, min(told.end, told.place + 1 + _AROUND))
    interest = told.histories.interest[span].tolist()
    names = [file.interests.get(key, f"#{key:08x}") for key in interest]
    count: dict[str, int] = {}
    for name in names:
        count[name] = count.get(name, 0) + 1
    shown = sorted(count, key=lambda n: -count[n])[:_INTERESTS]
    y = [escape(n) if n in shown else "(others)" for n in names]
    x = list(range(before - told.begin + 1, before - told.begin + 1 + len(y)))
    onset, place = told.onset - told.begin + 1, told.place - told.begin + 1
    figure = go.Figure()
    for name, colour, chosen in (
        ("before the onset", _OTHERS, [n < onset for n in x]),
        ("since the onset", "#e07b29", [onset <= n <= place for n in x]),
        ("after the alert", _TRUE, [n > place for n in x]),
    ):
        figure.add_scatter(
            x=[n for n, c in zip(x, chosen, strict=True) if c],
            y=[n for n, c in zip(y, chosen, strict=True) if c],
            mode="markers",
            name=name,
            marker={"color": colour, "size": 8},
        )
    figure.add_vline(x=place + 0.5, line={"color": _DUMMY, "dash": "dot"})
    figure.update_xaxes(title="events of the user")
    gained = ", ".join(escape(file.interests.get(k, "(others)")) for k, _ in told.reason.gained[:3] if k)
    lost = ", ".join(escape(file.interests.get(k, "(others)")) for k, _ in told.reason.lost[:3] if k)
    at = datetime.fromtimestamp(int(told.histories.time_ms[told.place]) / 1_000, UTC).strftime("%d %b %Y %H:%M")
    ending = {True: "confirmed", False: "not confirmed", None: "too few events follow to say"}[told.confirmed]
    text = (
        f"{at}, event {place} of the user, onset estimated at event {onset}. Gained: {gained or 'nothing'}. "
        f"Lost: {lost or 'nothing'}. By the next 30 events: {ending}."
    )
    return f"User {file.users[told.user]}", text, figure, 130 + 24 * min(_INTERESTS + 1, len(set(y)))
