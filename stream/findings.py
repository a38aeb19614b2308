"""What a run's report shows, as plain data.

At the end of the way of an event: demo.py gathers it, report.py and figures.py show it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryRow:
    """A line of the table. `rule` is the recency rule's value, where there is one."""

    name: str
    ours: str
    rule: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityPoint:
    """Forecast quality over one part of the stream that ends at `time_ms`; `_moves` over the non-repeats in it."""

    time_ms: int
    events: int
    mrr: float
    recency_mrr: float
    mrr_moves: float
    recency_mrr_moves: float
    hits_10: float
    recency_hits_10: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ShiftMark:
    """A planted shift; `delay_events` is None where it was missed."""

    user: str
    time_ms: int
    kind: str
    delay_events: int | None
    sentence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AlertMark:
    """An alert as it was sent."""

    user: str
    time_ms: int
    kind: str
    sentence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenEvent:
    """One event of the story's user."""

    time_ms: int
    interest: str
    type: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """A published forecast: shares of the next event's interests, and the likeliest one of each step."""

    time_ms: int
    shares: dict[str, float]
    path: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """An interest and what it added to the alert."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """One user from the first event to the last.

    Attributes:
        before, after: planted interests.
        shift_ms: starts of all planted shifts of the user.
        told_ms, sentence, gained, lost: of the alert that found the shift.
    """

    user: str
    kind: str
    delay_events: int
    events: list[SeenEvent]
    before: list[str]
    after: list[str]
    shift_ms: list[int]
    alerts: list[AlertMark]
    told_ms: int
    sentence: str
    gained: list[Bar]
    lost: list[Bar]
    outlooks: list[Outlook]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything on the page. `seasons` are (interest, from ms, until ms)."""

    title: str
    subtitle: str
    summary: list[SummaryRow]
    curve: list[QualityPoint]
    shifts: list[ShiftMark]
    false: list[AlertMark]
    seasons: list[tuple[str, int, int]]
    found_within_events: int
    story: Story | None
