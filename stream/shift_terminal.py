"""The tables of `driftline evaluate-shifts` on a terminal: a table for each suite and requested rate.

Beside the way of an event; the figures come from models/shift_suites.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from models.shift_suites import SLOW_EVENTS_MAX, Row

_TITLES = {
    "S0": "S0 real order: requested against measured rate; thresholds come from the tuned users",
    "S1": "S1 splices: a user's history, then another's",
    "S2": "S2 partial and gradual splices",
    "S3": "S3 synthetic users with planted shifts",
    "S4": "S4 one interest surges for everybody",
    "S5": "S5 labelled blocks",
    "S6": "S6 splices, every age of the user counts the same",
    "S7": "S7 natural alarms: do the events since the onset foretell the next 30?",
}


def print_shifts(console: Console, rows: Sequence[Row], *, same_users: bool) -> None:
    """All tables; says so where the rules were calibrated on the very users that are reported."""
    if same_users:
        console.print("All users are reported, and the rules were fitted and calibrated on the same users.")
    has_river = any(row.detector.startswith("river_adwin") for row in rows)
    if has_river and not any(row.detector.startswith("river_kswin") for row in rows):
        console.print(f"HDDM_W and KSWIN are left out (they take minutes with over {SLOW_EVENTS_MAX:,} events).")
    for suite in _TITLES:
        for rate in dict.fromkeys(row.requested_arl0 for row in rows):
            chosen = [row for row in rows if row.suite == suite and row.requested_arl0 == rate]
            if chosen:
                console.print(_table(suite, rate, chosen))


def _table(suite: str, rate: float, rows: Sequence[Row]) -> Table:
    columns = _columns(suite, rows[0].missed_window)
    table = Table(title=f"{_TITLES[suite]}; requested: one alarm in {rate:,.0f} events")
    table.add_column("detector", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.detector, *(text(row) for text in columns.values()))
    return table


def _columns(suite: str, window: int | None) -> dict[str, Callable[[Row], str]]:
    if suite == "S0":
        return {
            "measured": lambda r: _number(r.measured_arl0),
            "95 %": lambda r: _interval(r, "measured_arl0", 0),
            "by users": lambda r: _interval(r, "measured_arl0_by_users", 0),
            "measured/requested": lambda r: _number(r.measured_arl0 and r.measured_arl0 / r.requested_arl0, 2),
            "expected alarms": lambda r: _number(r.expected_alarms),
        }
    if suite == "S5":
        return {
            "AUC": lambda r: _number(r.auc, 3),
            "95 %": lambda r: _interval(r, "auc", 3),
            "hits at 1.3 %": lambda r: _number(r.hits_at_1_3, 3),
            "hits at 6.7 %": lambda r: _number(r.hits_at_6_7, 3),
            "blocks": lambda r: _number(r.splices),
        }
    if suite == "S7":
        return {
            "confirmed": lambda r: _number(r.confirmed, 3),
            "random moments": lambda r: _number(r.confirmed_random, 3),
            "difference, 95 %": lambda r: _interval(r, "confirmed_minus_random", 3),
            "alarms": lambda r: _number(r.alerts),
            "onset before event 25": lambda r: _number(r.early_onsets, 3),
        }
    if suite == "S4":
        return {
            "users alerted": lambda r: _number(r.alerted_share, 3),
            "scope right": lambda r: _number(r.scope_accuracy, 3),
        }
    delays: dict[str, Callable[[Row], str]] = {
        "median": lambda r: _number(r.median_delay),
        "95 %": lambda r: _interval(r, "median_delay", 0),
        "in 20": lambda r: _number(r.within_20, 3),
        "MTFA": lambda r: _number(r.measured_arl0),
        "MTD": lambda r: _number(r.mean_delay, 1),
        f"MDR ({window})": lambda r: _number(r.missed, 3),
        "F1": lambda r: _number(r.f1, 3),
    }
    if suite == "S3":
        delays |= {
            "onset": lambda r: _number(r.onset_error, 1),
            "gained@3": lambda r: _number(r.gained_hit_3, 3),
            "lost@3": lambda r: _number(r.lost_hit_3, 3),
        }
    return delays


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _interval(row: Row, name: str, digits: int) -> str:
    if name not in row.ci95:
        return "-"
    low, high = row.ci95[name]
    return f"{low:,.{digits}f}..{high:,.{digits}f}"
