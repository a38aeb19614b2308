"""Do alerts hold, and does ranking find those that do? A file through the pipeline; one half of the users, by a hash.

    python benchmarks/confirmation.py FILE --map user=user,interest=category,time=time --time-unit s --half reported

Prints JSON: the share of alerts that the user's next 30 events confirm, beside random moments (all, and weighted by the
ages of the alerts), and the share among the third of the alerts with the largest severity, confidence, promise, value
and rank score. The promise of an alert is learned from the verdicts of earlier ones alone. `--dump` writes trials.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.one_worker import records_of, steps_of  # noqa: E402
from models.followup import FollowUp  # noqa: E402
from stream.records import BatchMetrics, ShiftAlert, Verdict  # noqa: E402
from stream.transport import Record  # noqa: E402

HALVES = {"tuned": 0, "reported": 1}
TOP = 1 / 3


def of_half(records: list[Record], half: str) -> list[Record]:
    """The events of one half of the users, with offsets of their own."""
    if half == "all":
        return records
    kept = [r for r in records if hashlib.blake2b(r.key or b"").digest()[0] % 2 == HALVES[half]]
    return [r._replace(offset=i) for i, r in enumerate(kept)]


class Outcome(NamedTuple):
    """What came out, verdicts by alert, and what the partition remembers in the end."""

    alerts: list[ShiftAlert]
    verdicts: dict[str, Verdict]
    metrics: list[BatchMetrics]
    followup: FollowUp


def through(records: list[Record], sets: tuple[str, ...], batch: int) -> Outcome:
    """All records through a worker's pipeline, one partition."""
    metrics: list[BatchMetrics] = []
    alerts: list[ShiftAlert] = []
    verdicts: dict[str, Verdict] = {}
    followup = FollowUp()
    for state, step in steps_of(records, sets, batch):
        followup = state.groups.followup
        if step.metrics is not None:
            metrics.append(step.metrics)
        for output in step.outputs:
            if output.stream == "alerts":
                alerts.append(msgspec.json.decode(output.value, type=ShiftAlert))
            elif output.stream == "verdicts":
                verdict = msgspec.json.decode(output.value, type=Verdict)
                verdicts[verdict.alert_id] = verdict
    return Outcome(alerts, verdicts, metrics, followup)


def with_interval(confirmed: int, judged: int) -> dict[str, Any]:
    """A share with its interval of 95 % (Wilson)."""
    if not judged:
        return {"judged": 0, "share": None}
    p, z = confirmed / judged, 1.96
    middle, half = (p + z * z / (2 * judged)), z * math.sqrt(p * (1 - p) / judged + z * z / (4 * judged * judged))
    low, high = ((middle + s * half) / (1 + z * z / judged) for s in (-1, 1))
    return {"judged": judged, "share": round(p, 3), "low": round(low, 3), "high": round(high, 3)}


def report(alerts: list[ShiftAlert], verdicts: dict[str, Verdict], metrics: list[BatchMetrics]) -> dict[str, Any]:
    by_age: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for group in (g for m in metrics for g in m.judged):
        for i, n in enumerate((group.alerts, group.alerts_confirmed, group.moments, group.moments_confirmed)):
            by_age[group.age][i] += n
    total = [sum(counts[i] for counts in by_age.values()) for i in range(4)]
    judged = [a for a in alerts if a.alert_id in verdicts]
    alike = [(a, m_confirmed / m) for a, _, m, m_confirmed in by_age.values() if m]
    weighted = sum(a * share for a, share in alike) / max(1, sum(a for a, _ in alike))
    top = {}
    later = judged[len(judged) // 3 :]  # the promise has been learned from the first third
    for name in ("severity", "confidence", "promise", "worth", "value", "rank_score", "onset_events"):
        best = sorted(later, key=lambda a: (-getattr(a, name), a.alert_id))[: round(TOP * len(later))]
        top[name] = with_interval(sum(verdicts[a.alert_id].confirmed for a in best), len(best))
    return {
        "events": sum(m.events for m in metrics),
        "alerts": len(alerts),
        "alerts_judged": with_interval(total[1], total[0]),
        "moments": with_interval(total[3], total[2]),
        "moments_at_the_ages_of_alerts": round(weighted, 3),
        "later_alerts": with_interval(sum(verdicts[a.alert_id].confirmed for a in later), len(later)),
        "top_third_of_later": top,
        "by_age": dict(sorted(by_age.items(), key=lambda item: int(item[0].split("-")[0].strip("+")))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--map", dest="columns", required=True)
    parser.add_argument("--time-unit", default="ms")
    parser.add_argument("--half", choices=["all", *HALVES], default="tuned")
    parser.add_argument("--batch", type=int, default=2_048)
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--dump", help="write the verdicts with their features here (.npy)")
    given = parser.parse_args()
    records = records_of(given, tuple(given.sets))
    outcome = through(of_half(records, given.half), tuple(given.sets), given.batch)
    if given.dump:
        np.save(given.dump, outcome.followup.verdicts)
    print(json.dumps(report(outcome.alerts, outcome.verdicts, outcome.metrics), indent=1))


if __name__ == "__main__":
    main()
