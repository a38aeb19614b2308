"""A digest worker as a process of its own, that can be told to die or to stop itself at a named point.

    python digest_worker.py '{"log": {"embedded": "path"} | {"kafka": "host:port"}, "prefix": "x-", "partitions": 3,
                              "slot": "0", "fault": {"point": "step 5", "countdown": 2, "how": "kill"},
                              "seconds": 60, "settings": {}, "clock": [0, 86400]}'

Points: "step 1" to "step 7" of a commit; "send" a record; "committing" (the end of the transaction is on its way);
"restore" a block; "rewrite" a block while cleaning; "delete" the head of the log. How: kill or stop (SIGSTOP).

With "clock" the wall clock stands off by each of these seconds in turn, for CLOCK_S each.

Ends with 0 on SIGTERM, with 3 when fenced, with 4 after `seconds`. Prints what it saw as one JSON line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from digest_app import Counting, make_worker, topic_names

from stream import restore
from stream.cleaning import Cleaner
from stream.embedded import EmbeddedLog
from stream.embedded_producer import EmbeddedProducer
from stream.errors import Fenced
from stream.transport import Transport

CLOCK_S = 0.7


def open_log(log: dict[str, Any]) -> Transport:
    if "embedded" in log:
        return EmbeddedLog(Path(log["embedded"]), lease_s=log.get("session_s", 2.0), clock=lambda: time.time())
    from stream.kafka import KafkaLog

    session_s, transaction_s = log.get("session_s", 6.0), log.get("transaction_s", 10.0)
    settings = {
        "bootstrap_servers": log["kafka"], "session_timeout_ms": int(1_000 * session_s), "heartbeat_interval_ms": 200,
        "max_poll_interval_ms": int(1_000 * (session_s + transaction_s)), **log.get("settings", {}),
    }  # fmt: skip
    return KafkaLog(settings, transaction_timeout_s=transaction_s)


def wrap(owner: Any, name: str, before: Callable[[], None]) -> None:
    """Call `before` ahead of every call of owner.name."""
    real = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        before()
        return real(*arguments, **options)

    setattr(owner, name, wrapped)


def jump(offsets_s: list[float]) -> None:
    """Let the wall clock of this process jump to and fro."""
    real, start_s = time.time, time.monotonic()
    time.time = lambda: real() + offsets_s[int((time.monotonic() - start_s) / CLOCK_S) % len(offsets_s)]
    time.time_ns = lambda: int(time.time() * 1e9)


def arm(fault: dict[str, Any], kafka: bool) -> Callable[[int], None]:
    """Set the fault; returns what is to be called before each numbered step."""
    left = fault.get("countdown", 1)
    point = fault.get("point", "")

    def bite() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGSTOP if fault.get("how") == "stop" else signal.SIGKILL)

    producer: Any = EmbeddedProducer
    if kafka:
        from stream.kafka_producer import KafkaProducer as producer
    if point == "send":
        wrap(producer, "send", bite)
    elif point == "committing":
        if kafka:
            real = producer._wait
            producer._wait = lambda self, result, doing: (doing == "commit" and bite(), real(self, result, doing))[1]
        else:
            wrap(producer, "_retain", bite)  # inside of the SQLite transaction
    elif point == "restore":
        wrap(restore, "fold", bite)
    elif point == "rewrite":
        wrap(Cleaner, "_rewrite", bite)
    elif point == "delete":
        real_committed = Cleaner.committed

        def committed(self: Cleaner, state: Any, step: Any) -> None:
            if self._heads[step.partition].before:
                bite()
            real_committed(self, state, step)

        Cleaner.committed = committed  # type: ignore[method-assign]
    return lambda step: bite() if point == f"step {step}" else None


class Noting(Counting):
    """Counts, and writes each event to a file at once: what a worker saw is known although it is killed."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def event(self, name: str, **facts: object) -> None:
        super().event(name, **facts)
        for word in (name, *([str(facts["outcome"])] if "outcome" in facts else [])):
            with contextlib.suppress(OSError):  # a limit on file sizes may be the fault of the hour
                os.write(self._fd, f"{word}\n".encode())


def main() -> int:
    task = json.loads(sys.argv[1])
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    logging.basicConfig(
        level=os.environ.get("DIGEST_LOG", "CRITICAL"), format=f"%(asctime)s {task['slot']} %(message)s"
    )
    if task.get("clock"):
        jump(task["clock"])
    on_step = arm(task.get("fault", {}), "kafka" in task["log"])
    deadline_s = time.monotonic() + task["seconds"]
    threading.Thread(target=lambda: (time.sleep(task["seconds"]), stop.set()), daemon=True).start()
    observer = Noting(task.get("notes", os.devnull))
    transport = open_log(task["log"])
    worker = make_worker(
        transport,
        topic_names(task["prefix"]),
        partitions=task["partitions"],
        on_step=on_step,
        observer=observer,
        settings={"slot": task["slot"], "retries_max": 60, "backoff_max_s": 1.0, **task.get("settings", {})},
        app=task["prefix"] + "app",
    )
    print("ready", flush=True)
    code = 0
    try:
        worker.run(stop)
    except Fenced:
        code = 3
    transport.close()
    print(json.dumps({"events": observer.events, "outcomes": observer.outcomes, "turns": observer.turns}), flush=True)
    return code or (4 if time.monotonic() >= deadline_s else 0)


if __name__ == "__main__":
    sys.exit(main())
