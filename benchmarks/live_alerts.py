"""What a running worker's alerts come to: a file or a generated shop through the pipeline, batch by batch.

    python benchmarks/live_alerts.py --simulate 240000
    python benchmarks/live_alerts.py FILE --map user=user,interest=category,time=time --time-unit s [--set a.b=c ...]

Prints JSON: requested and measured monitored events between alarms with the Poisson interval, over all calibrated
events and over those of the second half of the file, and what else the metrics records add up to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402
import orjson  # noqa: E402

from benchmarks.one_worker import records_of, steps_of  # noqa: E402
from models.shift_rate import poisson_interval  # noqa: E402
from stream.records import BatchMetrics, ShiftAlert  # noqa: E402
from stream.simulate import ShopSettings, simulate  # noqa: E402
from stream.transport import LogRecord, Record  # noqa: E402


def sums(metrics: Iterable[BatchMetrics]) -> dict[str, Any]:
    """Requested and measured events between alarms."""
    metrics = list(metrics)
    monitored, alarms = sum(m.monitored for m in metrics), sum(m.alarms for m in metrics)
    expected = sum(m.expected_alarms for m in metrics)
    few, many = poisson_interval(alarms)
    return {
        "events": sum(m.events for m in metrics),
        "monitored": monitored,
        "alarms": alarms,
        "expected_alarms": round(expected, 1),
        "requested": round(monitored / expected, 1) if expected else None,
        "measured": round(monitored / alarms, 1) if alarms else None,
        "interval": [round(monitored / many, 1), round(monitored / few, 1) if few else None],
    }


def through(records: list[Record], sets: tuple[str, ...], batch: int) -> tuple[list[BatchMetrics], list[ShiftAlert]]:
    """All records through a worker's pipeline, one partition."""
    metrics: list[BatchMetrics] = []
    alerts: list[ShiftAlert] = []
    for _, step in steps_of(records, sets, batch):
        if step.metrics is not None:
            metrics.append(step.metrics)
        alerts += [msgspec.json.decode(o.value, type=ShiftAlert) for o in step.outputs if o.stream == "alerts"]
    return metrics, alerts


def report(metrics: list[BatchMetrics], alerts: list[ShiftAlert], events: int) -> dict[str, Any]:
    later = [m for m in metrics if m.first_offset >= events // 2]
    return {
        "calibrated": sums(metrics),
        "second_half": sums(later),
        "alerts": len(alerts),
        "scopes": Counter(a.scope for a in alerts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--map", dest="columns", default="")
    parser.add_argument("--time-unit", default="ms")
    parser.add_argument("--simulate", type=int, default=0, help="events of a generated shop instead of a file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2_048)
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--alerts", help="write the alerts here, one a line")
    given = parser.parse_args()
    records: list[Record]
    if given.simulate:
        shop = simulate(ShopSettings(users=given.simulate // 80, events=given.simulate, seed=given.seed))
        records = [
            LogRecord("events", 0, i, time_ms, key, value) for i, (key, value, time_ms) in enumerate(shop.records())
        ]
    else:
        records = records_of(given, tuple(given.sets))
    metrics, alerts = through(records, tuple(given.sets), given.batch)
    if given.alerts:
        Path(given.alerts).write_bytes(b"\n".join(orjson.dumps(msgspec.to_builtins(a)) for a in alerts) + b"\n")
    print(json.dumps(report(metrics, alerts, len(records))))


if __name__ == "__main__":
    main()
