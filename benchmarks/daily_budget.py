"""The daily budget on real traffic: a file through the pipeline, a few alerts of each day for people.

    python benchmarks/daily_budget.py FILE --map user=user,interest=category,time=time --budget 1 [--set a.b=c ...]

Prints JSON: days with alerts, the most that were for people on one day, and the rank scores of those as a share of the
best that a look back would have chosen, beside that of the first alerts of each day; all days, and those with more
alerts than the budget.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402

from benchmarks.one_worker import records_of, steps_of  # noqa: E402
from models.ranking import DAY_MS  # noqa: E402
from stream.records import ALERT, ShiftAlert  # noqa: E402


def shares(days: list[list[ShiftAlert]], budget: int) -> dict[str, float | int | None]:
    """What was taken of the best."""
    best = sum(sum(sorted((a.rank_score for a in day), reverse=True)[:budget]) for day in days)
    taken = sum(a.rank_score for day in days for a in day if a.tier == ALERT)
    first = sum(a.rank_score for day in days for a in day[:budget])
    return {
        "days": len(days),
        "alerts": sum(map(len, days)),
        "for_people": sum(a.tier == ALERT for day in days for a in day),
        "score_of_best": round(taken / best, 3) if best else None,
        "score_of_best_first_come": round(first / best, 3) if best else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--map", dest="columns", required=True)
    parser.add_argument("--time-unit")
    parser.add_argument("--budget", type=int, default=1)
    parser.add_argument("--set", dest="sets", action="append", default=[])
    given = parser.parse_args()
    sets = (f"alerts.daily_budget={given.budget}", *given.sets)
    by_day: dict[int, list[ShiftAlert]] = defaultdict(list)
    for _, step in steps_of(records_of(given, sets), sets, 2_048):
        for output in step.outputs:
            if output.stream == "alerts":
                alert = msgspec.json.decode(output.value, type=ShiftAlert)
                if alert.scope == "user":
                    by_day[alert.detected_at_ms // DAY_MS].append(alert)
    days = list(by_day.values())
    print(
        json.dumps(
            {
                "budget": given.budget,
                "most_in_a_day": max((sum(a.tier == ALERT for a in day) for day in days), default=0),
                "all": shares(days, given.budget),
                "busy_days": shares([day for day in days if len(day) > given.budget], given.budget),
            }
        )
    )


if __name__ == "__main__":
    main()
