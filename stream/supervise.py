"""Several processes under one command: `driftline run` is a worker and a learner, each a process of its own.

    starting ──> running ──exit 0──> done
                   │  ▲
        crashed    ▼  │ after a pause that doubles, at most RESTARTS_MAX times in a row
                 waiting ──too often, or an exit that no restart can mend──> failed: the others are stopped too

A child that is not critical (the learner) never stops the others: it is started again for ever, at longer pauses.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

RESTARTS_MAX = 5
PAUSE_S = 1.0
PAUSE_MAX_S = 30.0
HEALTHY_S = 60.0  # a process that lived this long starts with a clean slate
CHECK_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """A process to keep alive. `final_codes` are exits that a restart cannot mend (a wrong config, a fence)."""

    name: str
    command: Sequence[str]
    critical: bool = True
    final_codes: frozenset[int] = frozenset({2, 3})


class _Running:
    """One child and its lives."""

    def __init__(self, child: Child, environment: Mapping[str, str] | None) -> None:
        self.child = child
        self._environment = environment
        self.restarts = 0
        self.due_s = 0.0
        self.done = False
        self.process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0

    def start(self) -> None:
        self._started_s = time.monotonic()
        self.process = subprocess.Popen(self.child.command, env=self._environment)
        log.info("event=child_started name=%s pid=%d", self.child.name, self.process.pid)

    def check(self) -> int | None:
        """Look after the process; the exit code when it has failed for good."""
        if self.done:
            return None
        if self.process is None:
            if time.monotonic() >= self.due_s:
                self.start()
            return None
        code = self.process.poll()
        if code is None:
            return None
        self.process = None
        if code == 0:
            self.done = True
            return None
        if time.monotonic() - self._started_s > HEALTHY_S:
            self.restarts = 0
        if self.child.critical and (code in self.child.final_codes or self.restarts >= RESTARTS_MAX):
            log.error("event=child_failed name=%s code=%d restarts=%d", self.child.name, code, self.restarts)
            return code
        pause_s = min(PAUSE_MAX_S, PAUSE_S * 2 ** min(self.restarts, 10))
        self.restarts += 1
        self.due_s = time.monotonic() + pause_s
        log.warning(
            "event=child_died name=%s code=%d restart=%d pause_s=%.0f", self.child.name, code, self.restarts, pause_s
        )
        return None

    def terminate(self) -> None:
        self.done = True
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def wait(self, deadline_s: float) -> int:
        """The exit code; past the deadline the process is killed."""
        if self.process is None:
            return 0
        try:
            return self.process.wait(max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("event=child_killed name=%s why=deadline", self.child.name)
            self.process.kill()
            return self.process.wait()


def supervise(
    children: Sequence[Child],
    stop: threading.Event,
    *,
    stop_s: float = 30.0,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Keep the children alive until `stop` is set or one has failed for good; then stop them all.

    Args:
        stop_s: how long the children may take to end after SIGTERM.
        environment: theirs; None = ours.

    Returns:
        0 after a clean stop, else the exit code of the child that failed (a negative one is the signal that ended it).
    """
    running = [_Running(child, environment) for child in children]
    failed = 0
    try:
        while not stop.is_set() and not failed and not all(r.done for r in running):
            for each in running:
                failed = failed or each.check() or 0
            stop.wait(CHECK_S)
    finally:
        for each in running:
            each.terminate()
        deadline_s = time.monotonic() + stop_s
        codes = [each.wait(deadline_s) for each in running]
    return failed or next((code for code in codes if code), 0)
