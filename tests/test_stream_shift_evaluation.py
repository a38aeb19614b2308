"""`driftline evaluate-shifts` end to end on a small made shop, and its errors."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.shift import ShiftSettings
from stream.errors import ConfigError
from stream.shift_evaluation import asked, evaluate_shifts, further_row, json_row, read_histories, read_labels

ROOT = Path(__file__).resolve().parent.parent
KEYS = {
    "suite", "detector", "requested_arl0", "measured_arl0", "expected_alarms", "median_delay", "within_20", "missed",
    "missed_window", "auc", "hits_at_1.3", "hits_at_6.7", "confirmed", "confirmed_random", "onset_error",
    "gained_hit@3", "lost_hit@3", "scope_accuracy", "ci95",
}  # fmt: skip


FEW = "driftline,driftline_event,frozen,dummy,river_adwin_z,river_hddm_w_session,river_kswin_session"


def shop(path: Path, users: int = 50, events: int = 100) -> Path:
    """Users with three favourite aisles each, a tenth of the events anywhere; visits of five events."""
    rng = np.random.default_rng(5)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["who", "what", "when"])
        for user in range(users):
            mine = rng.choice(40, 3, replace=False)
            for event in range(events):
                aisle = int(rng.choice(mine)) if rng.random() < 0.9 else int(rng.integers(40))
                table.writerow([f"u{user}", f"aisle {aisle}", 1_600_000_000 + event // 5 * 40_000 + event % 5 * 60])
    return path


def labels(path: Path, users: int = 50) -> Path:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["user", "block", "first_position", "masquerader"])
        for user in range(users):
            for block, first in enumerate((70, 80, 90)):
                table.writerow([f"u{user}", block, first, int((user + block) % 5 == 0)])
    return path


def test_one_command_gives_every_suite_and_detector(tmp_path: Path) -> None:
    """The last line of --json has one row with all keys for each suite, detector and rate; the page is written."""
    file, blocks = shop(tmp_path / "events.csv"), labels(tmp_path / "labels.csv")
    done = subprocess.run(
        [sys.executable, "-m", "stream.cli", "evaluate-shifts", str(file), "--map", "user=who,interest=what,time=when",
         "--arl0", "100", "--labels", str(blocks), "--html", "page.html", "--detectors", FEW, "--json"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert all(set(row) == KEYS for row in rows)
    detectors = {row["detector"] for row in rows if row["suite"] == "S1"}
    assert detectors == set(FEW.split(","))
    places = [(row["suite"], row["detector"], row["requested_arl0"]) for row in rows]
    assert len(places) == len(set(places))
    assert {suite for suite, _, _ in places} >= {"S0", "S1", "S2", "S3", "S5", "S6", "S7"}
    [ours] = [row for row in rows if row["suite"] == "S1" and row["detector"] == "driftline"]
    [dummy] = [row for row in rows if row["suite"] == "S1" and row["detector"] == "dummy"]
    assert ours["missed"] < dummy["missed"] and ours["missed_window"] == 50
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("suites", "arl0", "says"),
    [("S9", "500", "no such suite"), ("S5", "500", "--labels"), ("S1", "many", "commas"), ("S1", "2", "or more")],
)
def test_wrong_options_are_named(suites: str, arl0: str, says: str) -> None:
    """A suite that there is not, S5 without labels, rates that are none: an error that says what to write."""
    with pytest.raises(ConfigError, match="no such detector"):
        asked(None, "oracle", "500", 0.5, None, 0, labels=False)
    with pytest.raises(ConfigError, match=says):
        asked(suites, None, arl0, 0.5, None, 0, labels=False)


def test_wrong_labels_are_named(tmp_path: Path) -> None:
    """A file that is not there, lacks a column or has one kind of block only."""
    with pytest.raises(ConfigError, match="No such file"):
        read_labels(tmp_path / "none.csv")
    path = tmp_path / "labels.csv"
    path.write_text("user,first\nu1,3\n")
    with pytest.raises(ConfigError, match="first_position"):
        read_labels(path)
    path.write_text("user,first_position,masquerader\nu1,3,0\n")
    with pytest.raises(ConfigError, match="both kinds"):
        read_labels(path)


def test_too_few_users_are_an_error_that_says_so() -> None:
    """A shop that opens today cannot be evaluated on, and the command says what to do."""
    events = [{"user": f"u{i % 3}", "interest": "tea", "time": 10**12 + i} for i in range(60)]
    with pytest.raises(ConfigError, match="users with a history"):
        evaluate_shifts(
            read_histories(events),
            None,
            ShiftSettings(),
            asked(None, None, "500", 0.5, None, 0, labels=False),
            lambda *_: None,
        )


def test_detectors_measured_in_processes_give_the_same_rows(tmp_path: Path) -> None:
    """How many detectors are measured at a time changes neither the rows nor their order."""
    with shop(tmp_path / "events.csv").open(newline="") as file:
        events = read_histories(
            {"user": row["who"], "interest": row["what"], "time": int(row["when"]) * 1_000}
            for row in csv.DictReader(file)
        )
    names = "driftline_event,dummy,river_pagehinkley_session,river_hddm_w_z"
    wanted = asked("S0,S1,S6,S7", names, "100", 0.5, None, 0, labels=False)
    one, two = (
        [further_row(row) | json_row(row) for row in evaluate_shifts(events, None, ShiftSettings(), wanted, quiet, n)]
        for n in (1, 2)
    )
    assert one == two and len(one) == 16


def quiet(*_: object) -> None:
    """No progress is shown."""
