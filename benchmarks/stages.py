"""What one event costs, stage by stage, without a log: the pipeline on the benchmarks' workload, in this process.

    python benchmarks/stages.py [--events 700000]

Prints microseconds an event. `read` and `commit` of a log are not in it; throughput.py has the whole.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.forecaster import Forecaster  # noqa: E402
from stream import changelog, pipeline  # noqa: E402
from stream.assembly import make_pipeline  # noqa: E402
from stream.changelog import Kind  # noqa: E402
from stream.engine import PartitionState, merge  # noqa: E402
from stream.events import EventDecoder  # noqa: E402
from stream.loading import load  # noqa: E402
from stream.state import Arena  # noqa: E402
from stream.transport import LogRecord, TopicPartition  # noqa: E402
from stream.workload import workload  # noqa: E402


def timed(spent: dict[str, float], stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its time added to a stage."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[stage] += time.perf_counter() - start

    return wrapped


def stages_us(events: int = 700_000, users: int = 100_000, warm: int = 500_000) -> dict[str, float]:
    """Microseconds an event by stage, after `warm` events, in batches of 4,096 of one partition.

    Warm: until then most users are new, and a new user always gets a forecast.
    """
    if events <= warm:
        raise SystemExit(f"--events {events}: {warm} events are for warming up; take more")
    torch.set_num_threads(1)
    work = workload(events, users=users)
    records = [
        LogRecord("events", 0, i, time_ms, key, value)
        for i, (key, value, time_ms) in enumerate(zip(work.keys(), work.values(), work.time_ms_E.tolist(), strict=True))
    ]
    engine = make_pipeline(load().config)
    states = {0: PartitionState(arena=Arena(engine.dtype), groups=engine.new_groups())}
    spent: dict[str, float] = defaultdict(float)
    patched: list[tuple[Any, str, Any]] = []
    for owner, name, stage in (
        (EventDecoder, "decode", "decode"),
        (pipeline, "advance", "walk"),
        (Forecaster, "encode", "gru"),
        (Forecaster, "forecast", "forecast"),
        (Forecaster, "rank", "score"),
    ):
        patched.append((owner, name, getattr(owner, name)))
        setattr(owner, name, timed(spent, stage, getattr(owner, name)))
    try:
        done, total = 0, 0.0
        while done < events:
            batch = records[done : done + min(4_096, engine.next_cut(states[0].seen) - states[0].seen)]
            if done <= warm < done + len(batch):
                spent.clear()
                first, total = done, 0.0
            start = time.perf_counter()
            steps = engine.process(states, {TopicPartition("events", 0): batch})
            processed = time.perf_counter()
            for step in steps:
                list(changelog.pack(Kind.USERS, 0, 1, step.records, 900_000))
                merge(engine, states[0], step)
            spent["state"] += time.perf_counter() - processed
            total += time.perf_counter() - start
            done += len(batch)
    finally:
        for owner, name, function in patched:
            setattr(owner, name, function)
    spent["rest"] = total - sum(spent.values())
    return {stage: round(seconds / (events - first) * 1e6, 2) for stage, seconds in sorted(spent.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=700_000)
    print(json.dumps(stages_us(parser.parse_args().events)))


if __name__ == "__main__":
    main()
