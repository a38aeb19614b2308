"""The commands as real processes on an embedded log: demo from end to end, run with its children, clean stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stream.config import plain_events
from stream.loading import load
from stream.process import clean_code, stop_on_signals, use_threads
from stream.warmup import warm_up

TIMEOUT_S = 180


def driftline(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "DRIFTLINE_CONFIG"}
    return subprocess.run(
        [sys.executable, "-m", "stream.cli", *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "nothing happened in time"
        time.sleep(0.2)


def run_until_weights(folder: Path, *options: str) -> str:
    """`driftline run` until its worker has weights of the learner and forecasts are there; SIGTERM ends it with exit
    code 0. What it logged."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stream.cli", "run", *options, "--set", "app.log_file=run.log", "--set",
         "learner.publish_interval_s=0.5"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    )  # fmt: skip
    try:
        journal = folder / "run.log"
        wait_for(lambda: journal.exists() and "event=weights_swapped version=1" in journal.read_text())
        tail = ("tail", "forecasts", "--from", "start", "--no-follow", "--json")
        wait_for(lambda: bool(driftline(folder, *tail).stdout))  # the learner may be sooner than the first batch
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
        process.wait()
    return journal.read_text()


def test_the_demo_runs_from_end_to_end(tmp_path: Path) -> None:
    """Worker and learner handle every record of a generated stream; it ends with the table and the report.

    The bad records that were planted come out as dead letters with their reasons, and no process is left behind.
    """
    done = driftline(tmp_path, "demo", "--users", "80", "--events", "4000", "--rate", "0", "--out", "out")
    assert done.returncode == 0, done.stderr + "".join(p.read_text() for p in (tmp_path / "out").glob("*.log"))
    assert "What the run was worth" in done.stdout
    assert "every bad record, each" in done.stdout
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000
    assert "event=stopping" in (tmp_path / "out" / "worker.log").read_text()
    assert not (tmp_path / "var").exists(), "everything lies in the folder that was named"


def test_run_starts_both_and_stops_them(tmp_path: Path) -> None:
    """`driftline run` forecasts and learns in processes of their own; SIGTERM ends all of them with exit code 0."""
    assert driftline(tmp_path, "simulate", "--users", "50", "--events", "2000").returncode == 0
    text = run_until_weights(tmp_path)
    assert text.count("event=stopping signal=SIGTERM") == 3
    shown = driftline(tmp_path, "tail", "forecasts", "--from", "1", "--no-follow")
    assert "next" in shown.stdout
    assert driftline(tmp_path, "user", "u000001").stdout.startswith("u000001: ")
    assert driftline(tmp_path, "doctor").returncode == 0


def test_a_process_that_collects_seldom_ends_in_silence() -> None:
    """Libraries of torch that look for leaks at exit have none to report."""
    code = (
        "from models.learner import Learner\n"
        "from models.settings import LearningSettings, NetworkSettings\n"
        "from stream.process import collect_seldom\n"
        "learner = Learner(NetworkSettings(), LearningSettings(), seed=0, device='cpu')\n"
        "collect_seldom()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    assert done.stderr == ""


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """A child whose `run` was killed does not go on alone."""
    code = (
        "import subprocess, sys, os\n"
        "child = subprocess.Popen([sys.executable, '-m', 'stream.cli', 'worker', '--parent', str(os.getpid()),"
        " '--set', 'app.log_file=worker.log'])\n"
        "open('pid', 'w').write(str(child.pid))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, timeout=TIMEOUT_S, check=True)
    journal = tmp_path / "worker.log"
    wait_for(lambda: journal.exists() and "why=parent_gone" in journal.read_text())
    pid = int((tmp_path / "pid").read_text())
    wait_for(
        lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]
    )


def test_signals_set_the_event() -> None:
    """SIGTERM and Ctrl-C ask for a clean stop; nothing is thrown into the loop."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = stop_on_signals()
        assert isinstance(stop, threading.Event)
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(5)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_threads_are_set_before_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too late is an error, not a silent no."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    use_threads(2)
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "2"
    monkeypatch.setitem(sys.modules, "torch", sys)
    with pytest.raises(RuntimeError, match="loaded already"):
        use_threads(1)


def test_a_stop_while_starting_is_clean() -> None:
    """A child that our own SIGTERM met before its handlers were there is no failure; one that died by itself is."""
    assert clean_code(-signal.SIGTERM, stopped=True) == clean_code(0, stopped=True) == 0
    assert clean_code(-signal.SIGTERM, stopped=False) == 1
    assert clean_code(-signal.SIGKILL, stopped=True) == 1
    assert clean_code(3, stopped=True) == 3


def test_warming_up_works_under_any_field_names() -> None:
    """What is compiled does not depend on how the input is named, and events of its own are readable."""
    config = load(None, ["events.fields.interest=category", "events.time_unit=s"]).config
    assert plain_events(config).events.fields == {}
    assert warm_up(config) > 0
