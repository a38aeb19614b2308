"""What a process of ours needs around its loop: signals, a parent to end with, logging, children.

Stands around the way of an event; only cli.py calls it, and nothing here happens on import.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from stream.options import Given
from stream.supervise import Child

if TYPE_CHECKING:
    from stream.config import AppSettings

FINAL_CODES = frozenset({2, 3, 4})  # exits that a restart cannot mend: configuration, fenced, stored data
PARENT_LOOK_S = 1.0
_OBJECTS_BETWEEN_COLLECTIONS = 200_000

log = logging.getLogger(__name__)


def child(given: Given, name: str, shown: str, *arguments: str) -> Child:
    """A command of ours as a process of its own, which ends when we do."""
    line = [sys.executable, "-m", "stream.cli", name, *given.arguments(), *arguments, "--parent", str(os.getpid())]
    return Child(name=shown, command=line, final_codes=FINAL_CODES, critical=name != "learner")


def quit_on_signals() -> None:
    """While a process starts there is nothing to finish: SIGTERM and Ctrl-C end it at once, with exit code 0."""

    def asked(number: int, _frame: object) -> None:
        log.info("event=stopping signal=%s why=while_starting", signal.Signals(number).name)
        sys.exit(0)

    signal.signal(signal.SIGTERM, asked)
    signal.signal(signal.SIGINT, asked)


def stop_on_signals(deadline_s: float | None = None, parent: int | None = None) -> threading.Event:
    """An event that SIGTERM, Ctrl-C or the end of the parent sets; after the deadline the process ends anyway."""
    stop = threading.Event()

    def asked(number: int, _frame: object) -> None:
        log.info("event=stopping signal=%s", signal.Signals(number).name)
        stop.set()

    signal.signal(signal.SIGTERM, asked)
    signal.signal(signal.SIGINT, asked)

    def watch() -> None:
        while not stop.wait(PARENT_LOOK_S):
            if parent is not None and os.getppid() != parent:
                log.warning("event=stopping why=parent_gone")
                stop.set()
        if deadline_s is not None:
            time.sleep(deadline_s)
            log.error("event=stopped_hard after_s=%.0f", deadline_s)
            os._exit(1)

    if deadline_s is not None or parent is not None:
        threading.Thread(target=watch, name="stop", daemon=True).start()
    return stop


def collect_seldom() -> None:
    """Garbage collection for a process that makes and drops a hundred thousand objects a second, hardly one in a cycle.

    By Python's defaults the collector walks over a batch's records again and again: taking record batches apart costs
    3.0 us a record with them and 0.9 without. What is there by now (modules, kernels) is not looked at any more.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # at exit all is looked at again: libraries that check for leaks would report it
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)


def clean_code(code: int, stopped: bool) -> int:
    """The exit code of `run`: a child that was still starting when we stopped it died of our SIGTERM, cleanly."""
    if stopped and code in (-signal.SIGTERM, -signal.SIGINT):
        return 0
    return code if code >= 0 else 1


def use_threads(count: int) -> None:
    """How many threads torch takes; it looks at the environment when it is loaded, so this comes first.

    Raises:
        RuntimeError: too late, torch is loaded and was told otherwise.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    if "torch" in sys.modules and any(os.environ.get(name) != str(count) for name in names):
        raise RuntimeError("torch is loaded already and has taken its threads")
    os.environ.update(dict.fromkeys(names, str(count)))


def log_to(app: AppSettings, role: str) -> None:
    """Logging: one line an event, key=value; to standard error, or to app.log_file."""
    handler: logging.Handler = logging.StreamHandler()
    if app.log_file:
        path = Path(app.log_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {role} %(name)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(app.log_level.upper())
    for noisy in ("kafka", "numba"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def logs_to_file() -> bool:
    """Whether errors would be missed by somebody who reads the log."""
    return any(isinstance(handler, logging.FileHandler) for handler in logging.getLogger().handlers)
