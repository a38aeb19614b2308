"""What a person sees while a command works: progress on one line, the demo's table, what became of a file's rows.

Beside the way of an event; cli.py passes the console. Progress goes to a terminal only, or slowly to a plain stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from stream.demo_run import DemoProgress
from stream.files import EventSource, FileForm, open_events
from stream.mapping import Mapping as ColumnMapping
from stream.replay import ReplayProgress
from stream.summary import DemoScore, summary
from stream.tail import printable

PLAIN_LINE_S = 10.0
_EVALUATED = {
    "all": "All events",
    "repeat": "Events that repeat the user's last interest",
    "non_repeat": "Events that do not",
}


def say(console: Console, text: str) -> None:
    """One line as it is: no markup, no wrapping, no control characters."""
    console.print(printable(text), soft_wrap=True, markup=False, highlight=False)


def file_form(header: bool, separator: str | None, time_unit: str | None, sort: bool, encoding: str) -> FileForm:
    """How a file is written, from the command's options."""
    tab = {"\\t": "\t", "tab": "\t"}.get(separator or "", separator)
    return FileForm(header=header, separator=tab, time_unit=time_unit, sort=sort, encoding=encoding)


def open_source(console: Console, file: str, columns: str, form: FileForm) -> EventSource:
    """Open a file of events and say aloud what was found out about it."""
    source = open_events(file, ColumnMapping.parse(columns), form)
    for what in source.facts.guessed:
        say(console, f"{source.facts.name}: {what.replace('_', ' ')} {getattr(source.facts, what)!r}, found out")
    for column in source.facts.unseen:
        say(console, f"{source.facts.name}: no {column!r} in the first rows; it may come later")
    return source


def say_counts(console: Console, source: EventSource) -> None:
    """What became of the rows that were not taken as they are."""
    for what, counts in (("rows not used", source.counts.bad), ("values left out", source.counts.left_out)):
        for reason, count in counts.most_common():
            say(console, f"{source.facts.name}: {count:,} {what}: {reason}")
    for line, reason, text in source.counts.examples:
        say(console, f"  line {line:,}: {reason}: {text}")


@contextmanager
def send_progress(console: Console) -> Iterator[Callable[[ReplayProgress], None]]:
    """One line that is written over while a replay goes on; nothing where the console is no terminal."""

    def show(progress: ReplayProgress) -> None:
        if console.is_terminal:
            share = "" if progress.share is None else f" {progress.share:.0%}"
            left = "" if progress.left_s is None else f", {progress.left_s:.0f} s left"
            status.update(f"{progress.records:,} records{share}, {progress.rate_per_s:,.0f}/s{left}")

    with console.status("opening") as status:
        yield show


@contextmanager
def demo_progress(console: Console) -> Iterator[Callable[[DemoProgress], None]]:
    """The demo's live line; on a plain stream one line every ten seconds."""
    said_s = 0.0

    def show(p: DemoProgress) -> None:
        nonlocal said_s
        rate = p.handled / p.elapsed_s if p.elapsed_s > 0 else 0.0
        text = (
            f"{p.handled:,} of {p.total:,} events, {rate:,.0f}/s, weights {p.weights_version}, "
            f"MRR {p.mrr:.3f} (recency rule {p.recency_mrr:.3f}), {p.alerts} alerts, {p.dead_letters} dead letters"
        )
        if console.is_terminal:
            status.update(text)
        elif time.monotonic() - said_s >= PLAIN_LINE_S:
            said_s = time.monotonic()
            say(console, text)

    with console.status("starting worker and learner") as status:
        yield show


def print_summary(console: Console, judged: DemoScore) -> None:
    """The table at the end of a demo."""
    table = Table("", "driftline", "recency rule", "", title="What the run was worth")
    for row in summary(judged):
        table.add_row(row.name, row.ours, row.rule, row.note)
    console.print(table)


@contextmanager
def evaluation_progress(console: Console, what: str = "events") -> Iterator[Callable[[str, int, int], None]]:
    """Which model is at which event, or which detector's turn it is."""

    said_s = began_s = time.monotonic()
    begun = ("", 0)  # whose turn it is, and where it began

    def show(model: str, done: int, total: int) -> None:
        nonlocal said_s, began_s, begun
        now_s = time.monotonic()
        if model != begun[0] or done < begun[1]:
            begun, began_s = (model, done), now_s
        rate = (done - begun[1]) / (now_s - began_s) if now_s > began_s else 0.0
        left = f", {rate:,.0f}/s, {(total - done) / rate:,.0f} s left" if rate else ""
        text = f"{model}: {done:,} of {total:,} {what}{left}"
        if console.is_terminal:
            status.update(text)
        elif now_s - said_s >= PLAIN_LINE_S:
            said_s = now_s
            say(console, text)

    with console.status("reading") as status:
        yield show


def print_evaluation(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """MRR and HR@10 of each model by step, over all events, repeats and moves; means where there are several seeds."""
    means = {row["model"] for row in rows if row["seed"] == "mean"}
    for stratum, title in _EVALUATED.items():
        chosen = [r for r in rows if r["stratum"] == stratum and (r["model"] not in means or r["seed"] == "mean")]
        steps = sorted({row["horizon"] for row in chosen})
        table = Table("model", *(f"step {step}" for step in steps), title=f"{title}: MRR/HR@10")
        for model in dict.fromkeys(row["model"] for row in chosen):
            found = {row["horizon"]: row for row in chosen if row["model"] == model}
            table.add_row(model, *(_figures(found[step]) for step in steps))
        count = next((row["n"] for row in chosen), 0)
        table.caption = f"{count:,} events"
        console.print(table)
    table = Table(
        "model",
        "NDCG@10",
        "accuracy",
        "ECE",
        "share MAE",
        "share RMSE",
        "events/s",
        "MB",
        title="Next event, all events",
    )
    for row in rows:
        if (row["stratum"], row["horizon"]) == ("all", 1) and (row["model"] not in means or row["seed"] == "mean"):
            keys = ("ndcg@10", "accuracy", "ece", "share_mae", "share_rmse")
            shown = ("-" if row[key] is None else f"{row[key]:.4g}" for key in keys)
            table.add_row(row["model"], *shown, f"{row['events_per_s']:,.0f}", f"{row['peak_mb']:,.0f}")
    console.print(table)


def print_purchases(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """How good the forecasts of purchases are, beside counts alone; nothing where nothing was bought."""
    if not rows:
        return
    table = Table("model", "log loss", "AUC", "ECE", title=f"Bought within the next {rows[0]['events']} events")
    for row in rows:
        name = row["model"] if row["model"] == row["pairs_of"] else f"  {row['model']}"
        shown = ("-" if row[key] is None else f"{row[key]:.5f}" for key in ("log_loss", "auc", "ece"))
        table.add_row(name if not row["seed"] else f"{name}, seed {row['seed']}", *shown)
    table.caption = f"{rows[0]['n']:,} forecast interests, {rows[0]['bought']:,} of them bought"
    console.print(table)


def _figures(row: Mapping[str, Any]) -> str:
    """Both figures without their leading zeros, so that a table fits 80 columns."""
    return "-" if row["mrr"] is None else "/".join(f"{row[k]:.3f}".removeprefix("0") for k in ("mrr", "hr@10"))
