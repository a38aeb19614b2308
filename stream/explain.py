"""`driftline explain`: one alert with its reason, on a terminal or as a page; also the plots of `driftline user`.

Beside the way of an event: reads the alert, its verdict and the user's events around it from their topics; writes
nothing to them and joins no group. An alert's id says where its event was read, so nothing is searched beyond one
partition. What users wrote is made printable on a terminal and escaped on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import msgspec
import plotly.graph_objects as go

from models.confirmation import NEXT_EVENTS
from stream.config import Config, topic_names
from stream.errors import ConfigError
from stream.events import EventDecoder
from stream.records import Candidate, ShiftAlert, Verdict
from stream.report import page, section
from stream.tail import printable, read_range, time_text
from stream.transport import LogReader, Record, TopicPartition, Transport

AROUND_RECORDS_MAX = 100_000  # of the input partition, before the alert and after it, looked through for the user
SHOWN = 60  # events of the user on the plot
ROWS = 8  # interests on it
_BAR = 28
_NAME = 30
_OTHERS = "(others)"


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """An event of the user on the plot; `place`: 0 is the event of the alert, those before it are below 0."""

    interest: str
    time_ms: int
    place: int


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """An alert, what became of it, and the user's events around it as far as their topic still has them."""

    alert: ShiftAlert
    verdict: Verdict | None
    events: list[Moment]


def explanation(transport: Transport, config: Config, decoder: EventDecoder, alert_id: str) -> Explanation:
    """Everything about one alert.

    Raises:
        ConfigError: it is no alert's id, or there is no such alert (any more).
    """
    topic, partition, offset = _place(config, alert_id)
    names = topic_names(config)
    reader = transport.reader()
    try:
        tp = TopicPartition(names["alerts"], partition)
        alert = None
        for record in read_range(reader, tp, *reader.bounds(tp)):
            if alert_id.encode() in (record.value or b""):
                found = msgspec.json.decode(record.value or b"", type=ShiftAlert)
                alert = found if found.alert_id == alert_id else alert
        if alert is None:
            raise ConfigError(
                f"there is no alert {alert_id} in topic {tp.topic}; it may be gone (topics.retention_h), or never was: "
                "`driftline tail alerts --from start --json` lists the alert_ids that there are"
            )
        verdict = _verdict(reader, TopicPartition(names["verdicts"], partition), alert_id)
        events = _around(reader, decoder, TopicPartition(topic, partition), offset, alert) if alert.user else []
    finally:
        reader.close()
    return Explanation(alert=alert, verdict=verdict, events=events)


def _place(config: Config, alert_id: str) -> tuple[str, int, int]:
    """(topic, partition, offset) of the event at which an alert was raised."""
    words = alert_id.split("/")
    topic, *rest = words
    scope = rest[2:] in ([], ["all"], ["segment"])
    if len(rest) < 2 or not scope or not all(word.isdecimal() and len(word) < 19 for word in rest[:2]):
        raise ConfigError(f"{alert_id!r} is no alert_id; one looks like {config.topics.events[0]}/3/1381")
    if topic not in config.topics.events or int(rest[0]) >= config.topics.partitions:
        raise ConfigError(
            f"{alert_id!r} names partition {rest[0]} of topic {topic}, which is none of this application's: "
            f"{', '.join(config.topics.events)} with {config.topics.partitions} partitions"
        )
    return topic, int(rest[0]), int(rest[1])


def _verdict(reader: LogReader, tp: TopicPartition, alert_id: str) -> Verdict | None:
    found = None
    for record in read_range(reader, tp, *reader.bounds(tp)):
        if alert_id.encode() in (record.value or b""):
            verdict = msgspec.json.decode(record.value or b"", type=Verdict)
            found = verdict if verdict.alert_id == alert_id else found
    return found


def _around(
    reader: LogReader, decoder: EventDecoder, tp: TopicPartition, offset: int, alert: ShiftAlert
) -> list[Moment]:
    """The user's last events before the alert, and those after it."""
    first, end = reader.bounds(tp)
    key = alert.user.encode()
    span = read_range(reader, tp, max(first, offset - AROUND_RECORDS_MAX), min(end, offset + AROUND_RECORDS_MAX))
    mine: list[Record] = [record for record in span if record.key == key]
    decoded = decoder.decode(mine)
    at = sum(record.offset <= offset for record in decoded.records) - 1
    if at < 0:
        return []
    begin = max(0, at + 1 - SHOWN)
    rows = zip(decoded.columns.interest.tolist(), decoded.columns.time_ms.tolist(), strict=True)
    return [
        Moment(interest=decoded.interest_names.get(interest, f"#{interest:08x}"), time_ms=time_ms, place=i - at)
        for i, (interest, time_ms) in enumerate(rows)
        if begin <= i <= at + NEXT_EVENTS
    ]


# ---------------------------------------------------------------------- on a terminal


def in_lines(told: Explanation) -> list[str]:
    """The explanation for a person."""
    a = told.alert
    who = f"user {a.user}" if a.user else f"segment {a.segment}" if a.segment else "all users"
    lines = [
        f"alert {a.alert_id}: {who}, {time_text(a.detected_at_ms)} ({a.tier})",
        "",
        *(f"  {line}" for line in (a.sentence, what_became(told))),
        "",
        *bars(a),
        "",
        f"severity {a.severity:.3f}: the parts above add up to it" + ("" if _adds_up(a) else " (not here)"),
        f"confidence {a.confidence:.2f}: without a shift, such an alarm comes once in {10**a.confidence:,.0f} events",
        f"value {a.value:.2f} = worth of the user {a.worth:.2f} x chance to hold {a.promise:.2f}; "
        f"rank score {a.rank_score:.2f} = severity x confidence x value",
        _rate(a),
        "evidence: " + (", ".join(_piece(e.interest, e.ratio, e.events_ago) for e in a.evidence) or "not kept"),
        "whose: " + ", ".join(f"{name} {share:.0%}" for name, share in a.shares.items()),
    ]
    for name, candidates in (("before", a.before), ("since", a.after), ("next", a.forecast)):
        if candidates:
            lines.append(f"{name}: {_top(candidates)}")
    if a.suppressed_count:
        lines.append(f"told once for {a.suppressed_count + 1} alarms of users")
    return [*lines, *timeline(told)]


def what_became(told: Explanation) -> str:
    """The verdict in words."""
    if not told.alert.user:
        return "Alerts on segments and on all users are not put to a test."
    if told.verdict is None:
        return f"Whether it holds is not known: the user has not had {NEXT_EVENTS} more events."
    if told.verdict.confirmed:
        return (
            f"It held: what the user did since then foretold the next {NEXT_EVENTS} events better than the time before."
        )
    return f"It did not hold: the user's next {NEXT_EVENTS} events were more like those before."


def bars(a: ShiftAlert) -> list[str]:
    """What was gained and lost, as bars whose lengths are the contributions."""
    parts = [("+", c) for c in a.gained] + [("-", c) for c in a.lost]
    longest = max((c.contribution for _, c in parts), default=0.0) or 1.0
    return [
        f"  {_short(c.interest):{_NAME}} {sign}{c.contribution:.3f} "
        + ("█" if sign == "+" else "░") * max(1, round(_BAR * c.contribution / longest))
        for sign, c in parts
    ]


def timeline(told: Explanation) -> list[str]:
    """The user's events as marks, a row an interest; a stroke stands before the onset and after the alert."""
    if not told.events:
        return []
    onset = 1 - told.alert.onset_events
    rows = rows_of(told)
    lines = ["", f"the user's events around it ({time_text(told.events[0].time_ms)} to "
             f"{time_text(told.events[-1].time_ms)}): │ onset, ┃ alert"]  # fmt: skip
    for name in rows:
        marks = ""
        for event in told.events:
            marks += "│" * (event.place == onset) + "·●"[_row(event.interest, rows) == name] + "┃" * (event.place == 0)
        lines.append(f"  {_short(name):{_NAME}} {marks}")
    return lines


def rows_of(told: Explanation) -> list[str]:
    """The interests on the plot: those gained, then those lost, then the most frequent; the rest is one row."""
    count: dict[str, int] = {}
    for event in told.events:
        count[event.interest] = count.get(event.interest, 0) + 1
    named = [c.interest for c in [*told.alert.gained, *told.alert.lost] if c.interest in count]
    ordered = dict.fromkeys(named + sorted(count, key=lambda n: (-count[n], n)))
    shown = [name for name in ordered if name != _OTHERS][:ROWS]
    return shown + [_OTHERS] * (len(shown) < len(count))


def _row(interest: str, rows: Sequence[str]) -> str:
    return interest if interest in rows else _OTHERS


def _adds_up(a: ShiftAlert) -> bool:
    return abs(sum(c.contribution for c in [*a.gained, *a.lost]) - a.severity) < 1e-3


def _rate(a: ShiftAlert) -> str:
    asked = f"threshold {a.threshold:.2f} nats, evidence {a.evidence_sum:.2f}"
    if a.false_alarm_events is None or not a.calibrated:
        return f"{asked}; the threshold was not calibrated"
    measured = "none came yet" if a.measured_false_alarm_events is None else f"{a.measured_false_alarm_events:,.0f}"
    ends = [] if a.measured_interval is None else ["?" if end is None else f"{end:,.0f}" for end in a.measured_interval]
    between = f" (95 %: {' to '.join(ends)})" if ends else ""
    return f"{asked}; events between alarms: asked {a.false_alarm_events:,.0f}, measured {measured}{between}"


def _piece(interest: str, ratio: float, events_ago: int) -> str:
    return f"{interest} {ratio:+.2f} nats" + (f" {events_ago} events before" if events_ago else "")


def _top(candidates: Sequence[Candidate]) -> str:
    return ", ".join(f"{c.interest} {c.probability:.0%}" for c in candidates[:5])


def _short(name: str) -> str:
    shown = printable(name)
    return shown if len(shown) <= _NAME else shown[: _NAME - 1] + "…"


# ---------------------------------------------------------------------- as a page


def write_page(path: Path, told: Sequence[Explanation], title: str) -> None:
    """One self-contained page with the alerts, newest last.

    Raises:
        ConfigError: the file cannot be written.
    """
    sections = []
    for one in told:
        a = one.alert
        facts = "".join(f"<li>{escape(line)}</li>" for line in in_lines(one) if line.partition(" ")[0] in _FACTS)
        sections.append(
            f"<section><h2>{escape(a.alert_id)}</h2><blockquote>{escape(a.sentence)}</blockquote>"
            f"<p>{escape(what_became(one))}</p><ul>{facts}</ul></section>"
        )
        text = "What came and what went; the parts add up to the severity."
        sections.append(section("Reasons", text, _bars_figure(a), 90 + 26 * (len(a.gained) + len(a.lost))))
        if one.events:
            text = "Each mark is an event of the user."
            sections.append(section("Events", text, _events_figure(one), 130 + 24 * len(rows_of(one))))
    if not told:
        sections.append("<section><p>There was no alert.</p></section>")
    try:
        path.write_text(page(title, f"{len(told)} alert{'s' * (len(told) != 1)}", sections), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: {error.strerror}; choose another file") from None


_FACTS = frozenset(
    {"severity", "confidence", "value", "threshold", "evidence:", "whose:", "before:", "since:", "next:"}
)


def _bars_figure(a: ShiftAlert) -> go.Figure:
    parts = [(c.interest, c.contribution, "#e07b29") for c in a.gained]
    parts += [(c.interest, -c.contribution, "#97a1ad") for c in a.lost]
    figure = go.Figure()
    figure.add_bar(
        x=[value for _, value, _ in parts],
        y=[f"{escape(name)} {'+' if value > 0 else '-'}" for name, value, _ in parts],
        orientation="h",
        marker={"color": [colour for _, _, colour in parts]},
        showlegend=False,
    )
    figure.update_xaxes(title="contribution to the severity: gained to the right, lost to the left")
    figure.update_yaxes(autorange="reversed")
    return figure


def _events_figure(told: Explanation) -> go.Figure:
    rows, onset = rows_of(told), 1 - told.alert.onset_events
    figure = go.Figure()
    for name, colour, low, high in (
        ("before the onset", "#97a1ad", -(10**9), onset - 1),
        ("since the onset", "#e07b29", onset, 0),
        ("after the alert", "#1f9e78", 1, 10**9),
    ):
        part = [event for event in told.events if low <= event.place <= high]
        figure.add_scatter(
            x=[event.place for event in part],
            y=[escape(_row(event.interest, rows)) for event in part],
            mode="markers",
            name=name,
            marker={"color": colour, "size": 8},
        )
    figure.update_xaxes(title="events of the user; 0: the alert")
    figure.update_yaxes(categoryorder="array", categoryarray=[escape(name) for name in reversed(rows)])
    return figure
