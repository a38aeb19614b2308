"""Detectors to be measured against: one knob each, all on the same events in the same order.

Beside the way of an event: only the evaluation runs these. Every detector is silent before a user has
`age_min_events` and for `refractory_events` after an alarm, like ours, and its knob is set so that the real order of
real users raises the same rate of alarms.

The streams they watch come from a slow profile that goes on learning (no guard): the log-likelihood ratio of each event
(z), its surprisal under the profile, or the sum of a session's ratios over the square root of its distinct interests.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from river.drift import ADWIN, KSWIN, PageHinkley
from river.drift.binary import HDDMW
from scipy.stats import ks_2samp

from models.shift_calibration import Histories, memory_of, run, session_starts
from models.shift_rule import Rule, fixed_rule

if TYPE_CHECKING:
    from models.shift import ShiftSettings

    Stream = Callable[[Histories, ShiftSettings], npt.NDArray[np.float64]]

F64 = npt.NDArray[np.float64]
BOOL = npt.NDArray[np.bool_]

_NEVER = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a detector said at each event.

    Attributes:
        onset_events_B: the user's events since the onset that the detector estimates; 0 = it estimates none.
    """

    alarm_B: BOOL
    monitored: int
    onset_events_B: npt.NDArray[np.int64] | None = None


class Detector(Protocol):
    """Alarms on histories at a setting of the knob; a larger knob means fewer alarms."""

    name: str
    knobs: tuple[float, float]  # where to look for the setting, on a logarithmic scale
    rounds: int  # of bisection; fewer where a pass is slow

    def outcome(self, histories: Histories, knob: float) -> Outcome: ...


class RuleDetector:
    """One of our own rules; the knob multiplies its thresholds."""

    def __init__(self, name: str, rule: Rule, settings: ShiftSettings) -> None:
        self.name, self.rule, self.settings = name, rule, settings
        self.knobs, self.rounds = (0.02, 50.0), 12

    def at(self, knob: float) -> Rule:
        return msgspec.structs.replace(self.rule, thresholds=tuple(knob * t for t in self.rule.thresholds))

    def outcome(self, histories: Histories, knob: float) -> Outcome:
        done = run(histories, self.at(knob), self.settings)
        return Outcome(
            alarm_B=done.alert_B, monitored=int(done.tallies.monitored_G.sum()), onset_events_B=done.onset_events_B
        )


class DummyDetector:
    """An alarm every so many events, whatever happens: what any number here has to be compared with."""

    def __init__(self, settings: ShiftSettings) -> None:
        self.name, self.settings, self.knobs, self.rounds = "dummy", settings, (5.0, 1e6), 16

    def outcome(self, histories: Histories, knob: float) -> Outcome:
        monitored_B = _old_enough(histories, self.settings)
        every = max(1, round(knob))
        clock = np.cumsum(monitored_B) + 7_919 * histories.user  # users start at different places of the period
        alarm_B = monitored_B & (clock % every == 0)
        return Outcome(alarm_B=alarm_B, monitored=int(monitored_B.sum()))


class StreamDetector:
    """A detector of river on one number an event or a session.

    Args:
        stream: what it watches: NaN where there is nothing to see.
        make: a fresh detector for a setting of the knob.
    """

    def __init__(
        self,
        name: str,
        settings: ShiftSettings,
        stream: Stream,
        make: Callable[[float], Any],
        knobs: tuple[float, float],
        rounds: int = 12,
    ) -> None:
        self.name, self.settings, self.knobs = name, settings, knobs
        self._stream, self._make, self.rounds = stream, make, rounds
        self._cached: tuple[Histories, F64] | None = None

    def outcome(self, histories: Histories, knob: float) -> Outcome:
        if self._cached is None or self._cached[0] is not histories:
            self._cached = (histories, self._stream(histories, self.settings))
        stream_B = self._cached[1]
        alarm_B = np.zeros(len(histories), np.bool_)
        monitored = 0
        first = histories.first.tolist()
        refractory = self.settings.refractory_events
        for begin, end in itertools.pairwise(first):
            detector = self._make(knob)
            silent_until = begin + self.settings.age_min_events
            for place, value in enumerate(stream_B[begin:end].tolist(), begin):
                if place < silent_until:
                    continue
                monitored += 1
                if value != value:  # NaN
                    continue
                detector.update(value)
                if detector.drift_detected:
                    alarm_B[place] = True
                    detector = self._make(knob)
                    silent_until = place + 1 + refractory
        return Outcome(alarm_B=alarm_B, monitored=monitored)


def _old_enough(histories: Histories, settings: ShiftSettings) -> BOOL:
    return np.arange(len(histories)) - histories.first[histories.user] >= settings.age_min_events


def _watched(histories: Histories, settings: ShiftSettings, *, by_session: bool) -> Rule:
    """The rule whose numbers the detectors of others watch: no alarms, no guard, the memory that ours starts from."""
    memory = memory_of(histories, settings)
    return fixed_rule(by_session=by_session, threshold=_NEVER, drift=0.0, kappa=settings.kappa, half_life_events=memory)


def ratio_stream(histories: Histories, settings: ShiftSettings) -> F64:
    """Log-likelihood ratio of each event, population against the user's slow profile."""
    rule = _watched(histories, settings, by_session=False)
    return run(histories, rule, settings).ratio_B.astype(np.float64)


def surprisal_stream(histories: Histories, settings: ShiftSettings) -> F64:
    """-log of the probability of each event under the user's slow profile."""
    return ratio_stream(histories, settings) - np.log(histories.share)


def session_stream(histories: Histories, settings: ShiftSettings) -> F64:
    """At the last event of each session: its summed ratios over the square root of its distinct interests."""
    rule = _watched(histories, settings, by_session=True)
    values = run(histories, rule, settings, features=True).features_BF[:, 0].astype(np.float64)
    last = np.append(session_starts(histories, settings)[1:], len(histories)) - 1
    stream = np.full(len(histories), np.nan)
    stream[last] = values[last]
    return stream


def _squashed(stream: Stream, histories: Histories, settings: ShiftSettings) -> F64:
    """Into 0..1, for detectors that ask for it."""
    squashed: F64 = 1.0 / (1.0 + np.exp(-stream(histories, settings)))
    return squashed


class _Binary:
    """HDDM_W takes numbers in 0..1 and is made with a confidence; a larger knob is a smaller confidence."""

    def __init__(self, knob: float) -> None:
        confident: Any = HDDMW  # its signature has no types
        self._detector: Any = confident(drift_confidence=math.exp(-knob), warning_confidence=math.exp(-knob / 2))

    def update(self, value: float) -> None:
        self._detector.update(value)

    @property
    def drift_detected(self) -> bool:
        return bool(self._detector.drift_detected)


_STREAMS = ("z", "surprisal", "session")
_RIVER = ("adwin", "pagehinkley", "hddm_w", "kswin")
DETECTORS = (
    *("driftline", "driftline_event", "driftline_session", "driftline_learned", "frozen", "dummy"),
    *(f"river_{kind}_{stream}" for kind in _RIVER for stream in _STREAMS),
)


def _adwin(knob: float) -> Any:
    adaptive: Any = ADWIN  # its signature has no types
    return adaptive(delta=min(1.0, math.exp(-knob)), grace_period=5, clock=1, min_window_length=3)


def _page_hinkley(knob: float) -> Any:
    return PageHinkley(min_instances=5, delta=0.1, threshold=knob, alpha=1 - 1e-4, mode="up")


class LookedUpKSWIN(KSWIN):
    """river's detector with its p-values looked up: scipy takes a millisecond for each, and there are few."""

    def update(self, x: float) -> None:
        if self.drift_detected:
            self._reset()  # type: ignore[no-untyped-call]
        self.n += 1
        self.window.append(x)
        self._drift_detected = False
        if len(self.window) < self.window_size:
            return
        older = [self.window[r] for r in self._rng.sample(range(self.window_size - self.stat_size), self.stat_size)]
        newest = list(self.window)[-self.stat_size :]
        steps = _ks_steps(older, newest)
        chance = _ks_p_value(steps, self.stat_size)
        self.p_value = chance  # type: ignore[assignment]
        if chance <= self.alpha and steps / self.stat_size > 0.1:
            self._drift_detected = True
            self.window = deque(newest, maxlen=self.window_size)


def _ks_steps(one: list[float], other: list[float]) -> int:
    """The two-sample Kolmogorov-Smirnov statistic of samples of one size, times that size."""
    joined = sorted([(value, 1) for value in one] + [(value, -1) for value in other])
    above = largest = 0
    for place, (value, step) in enumerate(joined):
        above += step
        if place + 1 == len(joined) or joined[place + 1][0] != value:
            largest = max(largest, abs(above))
    return largest


@lru_cache
def _ks_p_value(steps: int, size: int) -> float:
    """scipy's p-value, of samples that are so far apart."""
    one = [float(i) for i in range(size)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # far apart it goes over to the asymptotic value
        return float(ks_2samp(one, [value + steps - 0.5 for value in one]).pvalue)


def _kswin(knob: float) -> Any:
    return LookedUpKSWIN(alpha=min(0.99, math.exp(-knob)), window_size=40, stat_size=15, seed=7)


def river_detectors(settings: ShiftSettings, *, slow: bool = True) -> list[Detector]:
    """The detectors of river on the three streams; HDDM_W and KSWIN, which take their time, only if `slow`."""
    streams = (("z", ratio_stream), ("surprisal", surprisal_stream), ("session", session_stream))
    found: list[Detector] = []
    for name, stream in streams:
        found.append(StreamDetector(f"river_adwin_{name}", settings, stream, _adwin, (0.02, 60.0)))
        found.append(StreamDetector(f"river_pagehinkley_{name}", settings, stream, _page_hinkley, (0.1, 3_000.0)))
    for name, stream in streams if slow else ():
        found.append(
            StreamDetector(f"river_hddm_w_{name}", settings, partial(_squashed, stream), _Binary, (0.05, 200.0), 8)
        )
        found.append(StreamDetector(f"river_kswin_{name}", settings, stream, _kswin, (0.3, 60.0), 7))
    return found


def frozen_detector(rule: Rule, settings: ShiftSettings) -> RuleDetector:
    """Our fixed rule on a slow profile that stops learning once evidence is gathered."""
    return RuleDetector("frozen", msgspec.structs.replace(rule, hold_share=-1e9), settings)


def set_knob(detector: Detector, histories: Histories, false_alarm_events: float) -> float:
    """The setting at which the histories' own order raises at most one alarm in `false_alarm_events`."""
    low, high = (math.log(k) for k in detector.knobs)
    for _ in range(detector.rounds):
        middle = (low + high) / 2.0
        found = detector.outcome(histories, math.exp(middle))
        few = found.monitored >= int(found.alarm_B.sum()) * false_alarm_events
        low, high = (low, middle) if few else (middle, high)
    return math.exp(high)
