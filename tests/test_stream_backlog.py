"""Backpressure: lag is told, memory stays, a worker that is let go catches up; the learner sheds gradients first."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest

from stream.backlog import Backlog

ROOT = Path(__file__).resolve().parent.parent


def test_a_reader_falls_behind_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    """Falling behind, catching up with the seconds that are left, caught up with the worst lag: each said, bounded."""
    caplog.set_level(logging.INFO, "stream.backlog")
    backlog, lag, read, etas = Backlog(), 0.0, 0.0, []
    for second in range(260):
        pace = 1_000 if second < 100 else 5_000
        come = min(lag + 3_000, pace)
        lag, read = lag + 3_000 - come, read + come
        backlog.look(float(second), int(lag), int(read))
        etas.append(backlog.eta_s)
    said = [r.getMessage() for r in caplog.records]
    falling = [m for m in said if m.startswith("event=falling_behind")]
    catching = [m for m in said if m.startswith("event=catching_up")]
    assert 8 <= len(falling) <= 14 and "growth=2000" in falling[-2]
    assert 8 <= len(catching) <= 14
    assert [m for m in said if "caught_up" in m] == [said[-1]] and "worst_lag=200000" in said[-1]
    assert etas[90] == math.inf and etas[150] == pytest.approx(50, abs=2) and etas[-1] == 0.0


@pytest.mark.parametrize(("before", "after"), [(200, 2_400), (200, 900), (2_400, 1_000)])
def test_the_time_left_follows_a_change_of_pace(before: int, after: int) -> None:
    """Six seconds after the pace has changed nothing of the one before is in it: 600 a second come in all the while."""
    backlog, lag, read = Backlog(), 100_000.0, 0.0
    for second in range(40):
        lag, read = lag + 600 - before, read + before
        backlog.look(float(second), int(lag), int(read))
    for second in range(40, 47):
        lag, read = lag + 600 - after, read + after
        backlog.look(float(second), int(lag), int(read))
    assert backlog.eta_s == pytest.approx(lag / (after - 600), rel=0.02)


def test_slow_batches_are_no_change_of_pace() -> None:
    """A batch of ten seconds, then the next one: the lag grows all the while, and never looks like shrinking."""
    backlog, etas = Backlog(), []
    for second in range(200):
        read = second // 10 * 2_000
        backlog.look(float(second), lag=600 * second - read, read=read)
        etas.append(backlog.eta_s)
    assert set(etas[40:]) == {math.inf}


def test_a_reader_that_keeps_up_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    """Up to a few seconds of its own pace is no lag."""
    caplog.set_level(logging.INFO, "stream.backlog")
    backlog = Backlog()
    for second in range(60):
        backlog.look(float(second), lag=2_500 * (second % 2), read=1_000 * second)
    assert not caplog.records and not backlog.is_behind


@pytest.mark.slow
def test_a_braked_worker_and_its_way_back() -> None:
    """The benchmark in short: the worker held to a third, lag told and grown as it must, then gone; gradients shed."""
    line = [sys.executable, str(ROOT / "benchmarks" / "backpressure.py"), "--seconds", "30", "--rate", "600", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["lag_max"] > 0.5 * found["lag_expected"]
    assert found["rss_mb_max"] - found["rss_mb_first"] < 200
    assert found["said"]["falling_behind"] and found["said"]["caught_up"]
    assert found["shed"] > found["learned"] > 0 and found["learner_lag_max"] < found["lag_max"]
