"""`driftline worker` itself, as a process that can be told to die or to stand still at a named point.

    python pipeline_worker.py '{"point": "step 5", "countdown": 2, "how": "kill"}' --slot 0 --set KEY=VALUE ...

The points are those of digest_worker.py. The fault is armed by SIGUSR1, or at the start with "at_start": true.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from typing import Any

from digest_worker import arm

from stream import assembly
from stream.cli import main as driftline

LOG_BYTES_MIN = 60_000  # few users: their state logs are cleaned above this already


def main() -> None:
    fault = json.loads(sys.argv[1])
    on_step: list[Callable[[int], None]] = [lambda step: None]

    def armed(*_: Any) -> None:
        on_step[0] = arm(fault, kafka=True)

    def made(*arguments: Any, **options: Any) -> Any:
        worker = make_worker(*arguments, **options)
        worker._checkpoint._on_step = lambda step: on_step[0](step)
        worker._cleaner._log_bytes_min = LOG_BYTES_MIN
        return worker

    make_worker, assembly.make_worker = assembly.make_worker, made
    signal.signal(signal.SIGUSR1, armed)
    if fault.get("at_start"):
        armed()
    driftline(["worker", *sys.argv[2:]])


if __name__ == "__main__":
    main()
