"""Alibi Detect's online Cramer-von-Mises detector on one number an event. Prints one JSON line.

Runs in an environment of its own (alibi-detect pins an older numpy).

    python alibi_cvm.py STREAMS.json

STREAMS.json: {"ert": [events between false alarms], "window": [events], "bootstraps": n, "refractory": events,
"users": [{"reference": [numbers], "runs": [[numbers], ...]}, ...]}. Each user's detector is configured on the
reference and then sees each run from its beginning; after an alarm it is silent for `refractory` events and starts
anew. Printed: {"alarms": {ert: [for each user [for each run [places of the alarms]]]}, "configure_s", "update_s"}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from alibi_detect.cd import CVMDriftOnline


def alarms_of(detector: Any, run: list[float], refractory: int) -> list[int]:
    """Places of the alarms of one run."""
    detector.reset_state()
    found: list[int] = []
    silent_until = 0
    for place, value in enumerate(run):
        if place < silent_until:
            continue
        if detector.predict(np.array([value]))["data"]["is_drift"]:
            found.append(place)
            silent_until = place + 1 + refractory
            detector.reset_state()
    return found


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    configure_s = update_s = 0.0
    alarms: dict[str, list[list[list[int]]]] = {}
    for ert in asked["ert"]:
        alarms[str(ert)] = []
        for number, user in enumerate(asked["users"]):
            np.random.seed(number)  # its bootstrap draws from the global generator
            began = time.perf_counter()
            detector = CVMDriftOnline(
                np.array(user["reference"]),
                ert=ert,
                window_sizes=asked["window"],
                n_bootstraps=asked["bootstraps"],
                verbose=False,
            )
            configured = time.perf_counter()
            alarms[str(ert)].append([alarms_of(detector, run, asked["refractory"]) for run in user["runs"]])
            configure_s += configured - began
            update_s += time.perf_counter() - configured
    print(json.dumps({"alarms": alarms, "configure_s": round(configure_s, 1), "update_s": round(update_s, 1)}))


if __name__ == "__main__":
    main()
