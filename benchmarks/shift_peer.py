"""Alibi Detect's online CVM detector beside ours and the dummy: made shifts of some users, one run.

    python benchmarks/shift_peer.py FILE --map user=user,interest=category,time=time --time-unit s [--users 60]

An online detector of Alibi Detect is configured on a reference of each user and takes part of a second for that; so a
sample of the reported users is measured, those with the longest enough histories, drawn at random. The reference is the
user's events 10 to 50, and every detector is silent before event 50. Two tables: every detector as it is asked for one
false alarm in `--arl0` events, and with its knob (Alibi's: the expected run time) set so that the real order of these
users raises no more than that. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.environments import python_of  # noqa: E402
from benchmarks.one_worker import opened  # noqa: E402
from models.shift import ShiftSettings  # noqa: E402
from models.shift_baselines import (  # noqa: E402
    Detector,
    DummyDetector,
    Outcome,
    ratio_stream,
    set_knob,
    surprisal_stream,
)
from models.shift_calibration import Histories, Splices, splice  # noqa: E402
from models.shift_suites import Study, delay_row, our_detectors, rate_row, replace_settings  # noqa: E402
from stream.shift_evaluation import asked, measured_settings, read_histories, study_of  # noqa: E402

BEGIN, SILENT = 10, 50  # the reference of a user: these events; before the second everybody is silent
WINDOWS = [10, 20]  # events
BOOTSTRAPS = 5_000
RUN_TIMES = (1, 2, 4, 8)  # times the requested run time, among which Alibi's knob is set; it bootstraps no more
STREAMS = {"alibi_cvm_z": ratio_stream, "alibi_cvm_surprisal": surprisal_stream}
PEER_TIMEOUT_S = 1_200


def sampled(study: Study, users: int) -> tuple[Study, Splices]:
    """The study of so many of its reported users, and their made shifts."""
    lengths = np.diff(study.reported.first)
    usable = np.flatnonzero(lengths >= SILENT + 20)
    drawn = np.random.default_rng(study.seed + 7).permutation(usable)[:users]
    chosen = np.zeros(study.reported.users, np.bool_)
    chosen[drawn] = True
    few = replace(study, reported=study.reported.some(chosen), reported_users=study.reported_users[chosen])
    made = splice(
        few.reported,
        few.settings,
        np.random.default_rng(study.seed + 1),
        per_user=5,
        window=study.window,
        after=SILENT + 5,
    )
    return few, made


def runs_of(name: str, histories: Histories, settings: ShiftSettings) -> list[list[float]]:
    """The numbers that a detector watches, user by user."""
    stream = STREAMS[name](histories, settings)
    return [part.tolist() for part in np.split(stream, histories.first[1:-1])]


class Heard:
    """A detector that ran elsewhere, as a detector: what it said of some histories, by expected run time."""

    def __init__(self, name: str, said: list[tuple[Histories, dict[int, Outcome]]]) -> None:
        self.name, self._said = name, said
        run_times = sorted(said[0][1])
        self.knobs, self.rounds = (float(run_times[0]), float(run_times[-1])), len(run_times)

    def outcome(self, histories: Histories, knob: float) -> Outcome:
        [found] = [by_run_time for known, by_run_time in self._said if known is histories]
        return found[round(knob)]

    def matched(self, histories: Histories, false_alarm_events: float) -> int:
        """The shortest expected run time at which real order keeps the requested rate; the longest if none does."""
        _, by_run_time = next(pair for pair in self._said if pair[0] is histories)
        for run_time, found in sorted(by_run_time.items()):
            if found.monitored >= int(found.alarm_B.sum()) * false_alarm_events:
                return run_time
        return max(by_run_time)


def hear(name: str, study: Study, made: Splices, folder: Path) -> tuple[Heard, dict[str, Any]]:
    """Run Alibi Detect's detector in its own environment."""
    settings = study.settings
    real, spliced = runs_of(name, study.reported, settings), runs_of(name, made.runs, settings)
    users = [{"reference": run[BEGIN:SILENT], "runs": [run[SILENT:]]} for run in real]
    for owner, run in zip(made.owner.tolist(), spliced, strict=True):
        users[owner]["runs"].append(run[SILENT:])
    question = folder / f"{name}.json"
    question.write_text(
        json.dumps(
            {
                "ert": [round(study.false_alarm_events * times) for times in RUN_TIMES],
                "window": WINDOWS,
                "bootstraps": BOOTSTRAPS,
                "refractory": settings.refractory_events,
                "users": users,
            }
        )
    )
    done = subprocess.run(
        [python_of("alibi"), ROOT / "benchmarks/peers/alibi_cvm.py", question],
        check=True, stdout=subprocess.PIPE, text=True, timeout=PEER_TIMEOUT_S,
    )  # fmt: skip
    said = json.loads(done.stdout.splitlines()[-1])
    of_real: dict[int, Outcome] = {}
    of_made: dict[int, Outcome] = {}
    for ert, by_user in said["alarms"].items():
        of_real[int(ert)] = outcome(study.reported, [runs[0] for runs in by_user], settings)
        later = [iter(runs[1:]) for runs in by_user]
        of_made[int(ert)] = outcome(made.runs, [next(later[owner]) for owner in made.owner.tolist()], settings)
    return Heard(name, [(study.reported, of_real), (made.runs, of_made)]), {
        k: said[k] for k in ("configure_s", "update_s")
    }


def outcome(histories: Histories, places: list[list[int]], settings: ShiftSettings) -> Outcome:
    """Alarms of each user, counted from event SILENT on, and the events at which one could have come."""
    alarm_B = np.zeros(len(histories), np.bool_)
    monitored = 0
    for user, (begin, end) in enumerate(zip(histories.first[:-1].tolist(), histories.first[1:].tolist(), strict=True)):
        monitored += end - begin - SILENT
        for place in places[user]:
            alarm_B[begin + SILENT + place] = True
            monitored -= min(settings.refractory_events, end - begin - SILENT - place - 1)
    return Outcome(alarm_B=alarm_B, monitored=monitored)


def line(study: Study, detector: Detector, made: Splices, knob: float) -> dict[str, Any]:
    """Delay and rate of one detector at one setting."""
    rate = rate_row(study, detector, knob)
    delay = delay_row(study, detector, knob, made, "S1")
    intervals = {"measured_arl0": rate.ci95["measured_arl0"], **delay.ci95}
    return {
        "detector": detector.name,
        "knob": round(knob, 3),
        "measured_arl0": plain(rate.measured_arl0),
        "median": plain(delay.median_delay),
        "within_20": plain(delay.within_20),
        "missed": plain(delay.missed),
        "ci95": {name: [plain(end) for end in ends] for name, ends in intervals.items()},
        "shifts": delay.splices,
    }


def plain(value: float | None) -> float | None:
    """For JSON; infinity is null."""
    return None if value is None or not math.isfinite(value) else round(value, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--map", dest="columns", required=True)
    parser.add_argument("--time-unit")
    parser.add_argument("--users", type=int, default=60)
    parser.add_argument("--arl0", type=float, default=500.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with opened(given) as source:
        file = read_histories(source)
    wanted = asked(None, None, str(given.arl0), 0.5, None, given.seed, labels=False)
    settings = replace_settings(measured_settings(file, ShiftSettings()), age_min_events=SILENT)
    study, made = sampled(study_of(file, None, settings, wanted, given.arl0), given.users)
    requested, matched, seconds = [], [], {}
    own: list[tuple[Detector, float]] = [
        (our_detectors(study, ("driftline",))[0], 1.0),
        (DummyDetector(settings), given.arl0),
    ]
    for detector, knob in own:
        requested.append(line(study, detector, made, knob))
        matched.append(line(study, detector, made, set_knob(detector, study.reported, given.arl0)))
    with tempfile.TemporaryDirectory() as folder:
        for name in STREAMS:
            heard, seconds[name] = hear(name, study, made, Path(folder))
            requested.append(line(study, heard, made, given.arl0))
            matched.append(line(study, heard, made, heard.matched(study.reported, given.arl0)))
    print(
        json.dumps(
            {
                "users": study.reported.users,
                "requested_arl0": given.arl0,
                "window": study.window,
                "as_requested": requested,
                "matched": matched,
                "alibi_s": seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
