"""`driftline evaluate` on files that are not as they should be: it works, or says in one line why not.

200,000 interests, too slow for a whole pass here: tests/test_stream_evaluation.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_stream_evaluation import shop

from stream.cli import main

HEAD = "user,interest,time,type\n"
Row = tuple[object, ...]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test in an empty folder; logging is put back after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DRIFTLINE_CONFIG", raising=False)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # torch is loaded already, and one thread is asked for
        monkeypatch.setenv(name, "1")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield tmp_path
    root.handlers[:] = handlers
    root.setLevel(level)


def rows(count: int = 200) -> list[Row]:
    return [(user, interest, 1_700_000_000 + s, "view") for user, interest, s in shop(count)]


def evaluate(told: Sequence[Row], *more: str, head: str = HEAD, columns: str | None = None) -> int:
    """The exit code of the command on a file of these rows; the quick rule is the model, and ours where asked."""
    Path("events.csv").write_text(head + "".join(",".join(map(str, row)) + "\n" for row in told))
    columns = columns or "user=user,interest=interest,time=time,type=type"
    chosen = () if "--models" in more else ("--models", "recency")
    try:
        main(["evaluate", "events.csv", "--map", columns, "--horizon", "2", "--json", *chosen, *more])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def all_events(text: str, model: str = "recency") -> dict[str, Any]:
    """The row of the next event of a model, from what the command printed."""
    found = json.loads(text.strip().splitlines()[-1])["rows"]
    row: dict[str, Any] = next(r for r in found if (r["model"], r["stratum"], r["horizon"]) == (model, "all", 1))
    return row


def test_times_out_of_order(capsys: pytest.CaptureFixture[str]) -> None:
    """Refused with the line and the way out; with --sort it is the file in order."""
    told = rows()
    shuffled = [*told[100:], *told[:100]]
    assert evaluate(shuffled) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("driftline: ") and "--sort" in said and "line 102" in said
    assert evaluate(shuffled, "--sort") == 0
    mended = all_events(capsys.readouterr().out)
    assert evaluate(told) == 0
    assert mended["mrr"] == all_events(capsys.readouterr().out)["mrr"] and mended["n"] == 100


def test_events_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """Without ids a duplicate is an event; with them, and events.dedupe, it is left out and counted."""
    once = [(*row, f"e{n}") for n, row in enumerate(rows(100))]
    twice = [row for event in once for row in (event, event)]
    head, columns = "user,interest,time,type,id\n", "user=user,interest=interest,time=time,type=type,event_id=id"
    assert evaluate(twice, head=head) == 0
    assert all_events(capsys.readouterr().out)["n"] == 100
    Path("driftline.toml").write_text('[events]\ndedupe = "event_id"\n')
    with pytest.raises(SystemExit) as ended:
        main(
            ["--config", "driftline.toml", "evaluate", "events.csv", "--map", columns, "--models", "recency", "--json"]
        )
    assert ended.value.code in (None, 0)
    told = capsys.readouterr()
    assert all_events(told.out)["n"] == 50
    assert "100 events left out: the id of an earlier event" in told.err


def test_one_user_only(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody else is needed."""
    told = [("only", f"i{n % 3}", 1_700_000_000 + n, "view") for n in range(160)]
    assert evaluate(told, "--models", "driftline,recency_markov") == 0
    text = capsys.readouterr().out
    assert all_events(text, "driftline")["n"] == 80 and all_events(text, "recency_markov")["mrr"] > 0.9


def test_one_interest_only(capsys: pytest.CaptureFixture[str]) -> None:
    """A perfect score would mean nothing."""
    assert evaluate([(f"u{n % 3}", "same", 1_700_000_000 + n, "view") for n in range(50)]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .splitlines()[-1]
        .endswith("every event has the same interest: there is nothing to rank")
    )


def test_empty_fields(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows without user, interest or time are left out and counted; an empty type is an event without one."""
    told = rows(120)
    told[3], told[40], told[41] = ("", *told[3][1:]), (told[40][0], "", *told[40][2:]), (*told[41][:2], "", "view")
    told[50] = (*told[50][:3], "")
    assert evaluate(told) == 0
    said = capsys.readouterr()
    assert all_events(said.out)["n"] == 59
    assert sum(" rows not used: " in line for line in said.err.splitlines()) >= 1
    assert evaluate([("", "", "", "")] * 5) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("driftline: ")


def test_no_timestamps(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a column for time it says what to give; with the order of the rows as time it works."""
    told = [(user, interest) for user, interest, _s, _type in rows()]
    given: dict[str, str] = {"head": "user,interest\n", "columns": "user=user,interest=interest"}
    assert evaluate(told, **given) == 2
    assert "--time-unit order" in capsys.readouterr().err.strip().splitlines()[-1]
    assert evaluate(told, "--time-unit", "order", **given) == 0
    assert all_events(capsys.readouterr().out)["n"] == 100
