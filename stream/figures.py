"""The plots of a run's report.

At the end of the way of an event, drawn from the plain data of findings.py. Names that come from events are escaped:
plotly reads text as markup.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from datetime import UTC, datetime
from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from stream.findings import Report, Story

OURS, RULE, FALSE, NEW = "#2f7de1", "#97a1ad", "#c9403a", "#e07b29"
KIND_COLOURS = {"abrupt": "#e07b29", "gradual": "#8d5fd3", "returning": "#1f9e78"}
TYPE_MARKS = {"browse": "circle", "cart": "square", "purchase": "diamond", "review": "star"}
STORY_INTERESTS = 14  # rows in the story's plot; the rest is shown as one
REASONS = 6  # bars on each side


def quality_figure(report: Report) -> go.Figure:
    titles = ("MRR, all events", "MRR, moves only", "HR@10, all events")
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.06)
    times = [moment(point.time_ms) for point in report.curve]
    columns = (("mrr", "recency_mrr"), ("mrr_moves", "recency_mrr_moves"), ("hits_10", "recency_hits_10"))
    for number, (ours, rule) in enumerate(columns, 1):
        for name, field, colour in (("Driftline", ours, OURS), ("recency rule", rule, RULE)):
            figure.add_scatter(
                x=times,
                y=[getattr(point, field) for point in report.curve],
                name=name,
                mode="lines",
                line={"color": colour, "width": 2.4 if colour == OURS else 1.8},
                legendgroup=name,
                showlegend=number == 1,
                hovertemplate="%{x|%d %b}: %{y:.3f}<extra>" + name + "</extra>",
                row=1,
                col=number,
            )
        for _, from_ms, until_ms in report.seasons:
            figure.add_vrect(
                x0=moment(from_ms), x1=moment(until_ms), fillcolor=RULE, opacity=0.13, line_width=0, row=1, col=number
            )
    figure.update_yaxes(rangemode="tozero", tickformat=".2f", nticks=6)
    figure.update_xaxes(tickformat="%d %b", nticks=5)
    _lift_titles(figure, left=True)
    figure.update_layout(legend={"y": 1.11}, margin={"t": 72})
    return figure


def alerts_figure(report: Report) -> go.Figure:
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, row_heights=[0.13, 0.74, 0.13], vertical_spacing=0.02)
    for kind, colour in KIND_COLOURS.items():
        of_kind = [mark for mark in report.shifts if mark.kind == kind]
        found = [mark for mark in of_kind if mark.delay_events is not None]
        missed = [mark for mark in of_kind if mark.delay_events is None]
        figure.add_scatter(
            x=[moment(m.time_ms) for m in found],
            y=[m.delay_events for m in found],
            name=f"{kind} ({len(found)} of {len(of_kind)} found)",
            mode="markers",
            marker={"color": colour, "size": 8, "opacity": 0.8, "line": {"width": 0}},
            text=[f"{escape(m.user)}<br>{wrapped(m.sentence)}" for m in found],
            hovertemplate="%{text}<br>%{y} events after the shift<extra></extra>",
            row=2,
            col=1,
        )
        figure.add_scatter(
            x=[moment(m.time_ms) for m in missed],
            y=["missed"] * len(missed),
            mode="markers",
            marker={"color": colour, "size": 9, "symbol": "x-thin", "line": {"width": 1.8, "color": colour}},
            text=[f"{escape(m.user)}: {kind}, missed" for m in missed],
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
            row=1,
            col=1,
        )
    figure.add_scatter(
        x=[moment(m.time_ms) for m in report.false],
        y=["false"] * len(report.false),
        name=f"false ({len(report.false)})",
        mode="markers",
        marker={"color": FALSE, "size": 11, "symbol": "line-ns", "line": {"width": 1.4, "color": FALSE}},
        text=[f"{escape(m.user)}<br>{wrapped(m.sentence)}" for m in report.false],
        hovertemplate="%{text}<extra></extra>",
        row=3,
        col=1,
    )
    for interest, from_ms, until_ms in report.seasons:
        figure.add_vrect(
            x0=moment(from_ms), x1=moment(until_ms), fillcolor=RULE, opacity=0.13, line_width=0, row="all", col=1
        )
        figure.add_annotation(
            x=moment((from_ms + until_ms) // 2), y=1, yref="y2 domain", yanchor="top", showarrow=False,
            text=f"season: {escape(interest)}", opacity=0.75,
        )  # fmt: skip
    figure.update_yaxes(rangemode="tozero", title_text="events until the alert", row=2, col=1)
    for row, name in ((1, "missed"), (3, "false")):
        figure.update_yaxes(type="category", categoryarray=[name], range=[-0.6, 0.6], showgrid=False, row=row, col=1)
    figure.update_xaxes(tickformat="%d %b")
    figure.update_xaxes(showline=False, row=1, col=1)
    return figure


def story_figure(story: Story) -> go.Figure:
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.7, 0.3], vertical_spacing=0.05)
    times = [event.time_ms for event in story.events]
    old, new = set(story.before), set(story.after)
    rows = _story_rows(story)
    for kind in dict.fromkeys(event.type for event in story.events):
        symbol, size = TYPE_MARKS.get(kind, "circle"), 7 if kind == "browse" else 10
        look = {"symbol": symbol, "size": size, "color": RULE}
        figure.add_scatter(x=[None], y=[None], name=kind or "event", mode="markers", marker=look, row=1, col=1)
        chosen = [(n, e) for n, e in enumerate(story.events, 1) if e.type == kind]
        figure.add_scatter(
            x=[n for n, _ in chosen],
            y=[escape(e.interest if e.interest in rows else "other") for _, e in chosen],
            mode="markers",
            marker={
                **look,
                "color": [NEW if e.interest in new else OURS if e.interest in old else RULE for _, e in chosen],
                "line": {"width": 0},
            },
            showlegend=False,
            text=[f"{escape(e.interest)}<br>{moment(e.time_ms):%d %b %H:%M}" for _, e in chosen],
            hovertemplate="%{text}<extra>" + escape(kind) + "</extra>",
            row=1,
            col=1,
        )
    place = [bisect_right(times, o.time_ms) for o in story.outlooks]
    for name, members, colour in (("expected: old interests", old, OURS), ("expected: new interests", new, NEW)):
        figure.add_scatter(
            x=place,
            y=[sum(p for interest, p in o.shares.items() if interest in members) for o in story.outlooks],
            name=name,
            mode="lines",
            line={"color": colour, "width": 2, "shape": "hv"},
            hovertemplate="%{y:.0%}<extra>" + name + "</extra>",
            row=2,
            col=1,
        )
    for ms in story.shift_ms:
        _mark(figure, bisect_right(times, ms), "planted shift", NEW, "dash")
    for mark in story.alerts:
        _mark(figure, bisect_right(times, mark.time_ms), "alert", FALSE, "solid")
    figure.update_yaxes(type="category", categoryarray=[escape(r) for r in rows], categoryorder="array", row=1, col=1)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", title_text="forecast share", row=2, col=1)
    figure.update_xaxes(title_text="the user's events", row=2, col=1)
    figure.update_layout(legend={"y": 1.05}, margin={"t": 64})
    return figure


def _mark(figure: go.Figure, place: int, name: str, colour: str, dash: str) -> None:
    figure.add_vline(x=place - 0.5, line={"color": colour, "width": 1.6, "dash": dash}, row="all", col=1)
    right = name == "alert"
    figure.add_annotation(
        x=place - 0.5, y=1, yref="y domain", yanchor="bottom", xanchor="left" if right else "right", showarrow=False,
        text=name, font={"color": colour, "size": 12},
    )  # fmt: skip


def _story_rows(story: Story) -> list[str]:
    """Interests from the bottom up: the old ones, what else there was, the new ones."""
    counts = Counter(event.interest for event in story.events)
    planted = {*story.before, *story.after}
    room = max(0, STORY_INTERESTS - sum(i in counts for i in planted))
    others = [i for i, _ in counts.most_common() if i not in planted]
    rest = ["other"] if len(others) > room else []
    return (
        [i for i in reversed(story.before) if i in counts]
        + rest
        + list(reversed(others[:room]))
        + [i for i in reversed(story.after) if i in counts]
    )


def reasons_figure(story: Story) -> go.Figure:
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.22, subplot_titles=("lost", "gained"))
    for column, bars, colour in ((1, story.lost, OURS), (2, story.gained, NEW)):
        shown = bars[:6][::-1]
        figure.add_bar(
            x=[abs(bar.value) for bar in shown],
            y=[escape(bar.name) for bar in shown],
            orientation="h",
            marker={"color": colour, "line": {"width": 0}},
            showlegend=False,
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
            row=1,
            col=column,
        )
    widest = max((abs(bar.value) for bar in story.gained + story.lost), default=1.0) * 1.05
    figure.update_xaxes(range=[0, widest], showline=False, nticks=4)
    figure.update_yaxes(showgrid=False)
    figure.update_layout(bargap=0.35)
    _lift_titles(figure, left=True)
    return figure


def reason_rows(story: Story) -> int:
    return max(1, min(6, max(len(story.gained), len(story.lost))))


def _lift_titles(figure: go.Figure, left: bool) -> None:
    """Subplot titles small and at the left edge of their plot."""
    for annotation, axis in zip(figure.layout.annotations, figure.select_xaxes(), strict=False):
        annotation.font.size = 13
        if left:
            annotation.x, annotation.xanchor = axis.domain[0], "left"


def moment(time_ms: int) -> datetime:
    return datetime.fromtimestamp(time_ms / 1_000, UTC).replace(tzinfo=None)


def wrapped(text: str, width: int = 70) -> str:
    """A long sentence in lines, for a hover label."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) >= width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "<br>".join(escape(part) for part in [*lines, line])
