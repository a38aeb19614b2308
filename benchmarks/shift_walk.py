"""Events a second of the compiled walk: detector, ring and profiles, on even traffic and with a user that owns 30 %.

Run: python benchmarks/shift_walk.py [--events 1000000] [--users 100000] [--json]

The table of shares and the rule in force come from an epoch of the same traffic; batches are of 4,096 events. The
network, the decoding and the log are left out: this is the cost of what is sequential in a user's events.
"""

from __future__ import annotations

import argparse
import json
import time

import msgspec
import numpy as np

from models.features import EventColumns
from models.profile import USER, EmissionSettings, advance
from models.shift import GroupTable, ShiftSettings
from models.shift_calibration import columns
from models.shift_rule import fixed_rule

BATCH = 4_096
INTERESTS = 1_000
SEED = 3


def traffic(events: int, users: int, hot_share: float) -> EventColumns:
    """Users with three favourite interests each; `hot_share` of the events belong to user 0."""
    rng = np.random.default_rng(SEED)
    user = rng.integers(0, users, events)
    user[rng.random(events) < hot_share] = 0
    favourite = (user * 7_919 + rng.integers(0, 3, events) * 104_729) % INTERESTS
    interest = np.where(rng.random(events) < 0.7, favourite, rng.integers(0, INTERESTS, events)) + 1
    time_ms = 1_600_000_000_000 + np.arange(events) * 2_000
    return columns(user.astype(np.int64), interest.astype(np.uint32), time_ms.astype(np.int64))


def rates(events: EventColumns, users: int, *, by_session: bool, learned: bool) -> float:
    """Events a second of processor time, one thread, after a warm-up of an eighth of the events."""
    settings = ShiftSettings(evidence="session" if by_session else "event")
    table = GroupTable(settings)
    records = np.zeros(users, USER)
    nobody = np.zeros(len(events), np.bool_)
    emission = EmissionSettings()
    warm = len(events) // 8
    first = events.take(slice(0, warm))
    table.apply_delta(table.delta(first, advance(records, first, table, settings, emission, nobody[:warm]), {}))
    table = table.cut()
    rule = fixed_rule(by_session=by_session, threshold=8.0, drift=settings.drift, short_share=0.0 if learned else 0.3)
    if learned:
        rule = msgspec.structs.replace(rule, coefficients=(0.75, 0.0, -0.4, 0.2, -1.7, -0.2, -0.2, -0.15, 1.2))
    table.rule = rule
    start_s = time.process_time()
    for begin in range(warm, len(events), BATCH):
        span = slice(begin, min(begin + BATCH, len(events)))
        advance(records, events.take(span), table, settings, emission, nobody[span])
    return (len(events) - warm) / (time.process_time() - start_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rates(traffic(20_000, 100, 0.3), 100, by_session=True, learned=True)  # compiles
    found = {}
    for name, hot_share in (("even", 0.0), ("hot_30", 0.3)):
        events = traffic(given.events, given.users, hot_share)
        for rule, by_session, learned in (("learned_session", True, True), ("fixed_event_short", False, False)):
            found[f"{name}_{rule}"] = round(rates(events, given.users, by_session=by_session, learned=learned))
            if not given.json:
                print(f"{name:8} {rule:18} {found[f'{name}_{rule}']:>12,} events/s")
    if given.json:
        print(json.dumps({"events": given.events, "users": given.users, "events_per_s": found}))


if __name__ == "__main__":
    main()
