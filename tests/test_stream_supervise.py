"""Several processes under one command: what dies is started again, within limits, and all end together."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from stream import supervise as module
from stream.supervise import Child, supervise


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    monkeypatch.setattr(module, "CHECK_S", 0.02)


def child(name: str, code: str) -> Child:
    return Child(name=name, command=[sys.executable, "-c", code])


def test_a_child_that_crashes_is_started_again(tmp_path: Path) -> None:
    """Two crashes, then a good end: the command ends with 0."""
    code = (
        f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'lives')!r});"
        "n = len(p.read_text()) if p.exists() else 0; p.write_text('x' * (n + 1)); sys.exit(0 if n == 2 else 1)"
    )
    assert supervise([child("flaky", code)], threading.Event()) == 0
    assert (tmp_path / "lives").read_text() == "xxx"


def test_a_child_that_never_recovers_takes_the_others_down() -> None:
    """Restarts have a limit; then the healthy one is stopped and the failure's code is ours."""
    children = [child("sick", "import sys; sys.exit(7)"), child("well", "import time; time.sleep(60)")]
    assert supervise(children, threading.Event(), stop_s=10) == 7


def test_a_wrong_configuration_is_not_tried_again(tmp_path: Path) -> None:
    """Exit 2 cannot be mended by a restart."""
    mark = tmp_path / "lives"
    code = f"import pathlib, sys; p = pathlib.Path({str(mark)!r}); p.open('a').write('x'); sys.exit(2)"
    assert supervise([child("wrong", code)], threading.Event()) == 2
    assert mark.read_text() == "x"


def test_a_stop_reaches_every_child(tmp_path: Path) -> None:
    """SIGTERM to all; one that does not listen is killed at the deadline."""
    good = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0));"
        f"open({str(tmp_path / 'up')!r}, 'w').close(); time.sleep(60)"
    )
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    stop = threading.Event()

    def stop_when_up() -> None:
        for _ in range(500):
            if (tmp_path / "up").exists():
                break
            time.sleep(0.02)
        time.sleep(0.3)
        stop.set()

    threading.Thread(target=stop_when_up, daemon=True).start()
    assert supervise([child("good", good)], stop, stop_s=10) == 0
    stop.clear()
    threading.Thread(target=stop_when_up, daemon=True).start()
    assert supervise([child("deaf", deaf)], stop, stop_s=0.5) < 0


def test_a_learner_that_never_recovers_stops_nobody(tmp_path: Path) -> None:
    """A child that is not critical is started again and again while the others work on."""
    mark = tmp_path / "lives"
    code = f"import pathlib, sys; pathlib.Path({str(mark)!r}).open('a').write('x'); sys.exit(2)"
    sick = Child(name="learner", command=[sys.executable, "-c", code], critical=False)
    stop = threading.Event()
    threading.Thread(target=lambda: (time.sleep(2.0), stop.set()), daemon=True).start()
    good = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(60)"
    assert supervise([child("worker", good), sick], stop, stop_s=10) == 0
    assert len(mark.read_text()) > 2
