"""A digest worker as a process of its own, that can be told to die by SIGKILL before a numbered commit step.

    python digest_worker.py '{"log": {"embedded": "path"} | {"kafka": "host:port"}, "prefix": "x-", "partitions": 3,
                              "slot": "0", "kill_step": 5, "kill_countdown": 2, "seconds": 60, "settings": {}}'

Ends with 0 on SIGTERM, with 3 when fenced, with 4 after `seconds`. Prints what it saw as one JSON line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from digest_app import Counting, make_worker, topic_names

from stream.embedded import EmbeddedLog
from stream.errors import Fenced
from stream.transport import Transport


def open_log(log: dict[str, Any]) -> Transport:
    if "embedded" in log:
        return EmbeddedLog(Path(log["embedded"]), lease_s=log.get("session_s", 2.0))
    from stream.kafka import KafkaLog

    session_ms = int(1_000 * log.get("session_s", 6.0))
    settings = {"bootstrap_servers": log["kafka"], "session_timeout_ms": session_ms, "heartbeat_interval_ms": 200}
    return KafkaLog(settings, transaction_timeout_s=log.get("transaction_s", 10.0))


def main() -> int:
    task = json.loads(sys.argv[1])
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    countdown = task.get("kill_countdown", 0)

    def on_step(step: int) -> None:
        nonlocal countdown
        if step == task.get("kill_step"):
            countdown -= 1
            if countdown == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    deadline_s = time.monotonic() + task["seconds"]
    threading.Thread(target=lambda: (time.sleep(task["seconds"]), stop.set()), daemon=True).start()
    observer = Counting()
    transport = open_log(task["log"])
    worker = make_worker(
        transport,
        topic_names(task["prefix"]),
        partitions=task["partitions"],
        on_step=on_step,
        observer=observer,
        settings={"slot": task["slot"], **task.get("settings", {})},
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
