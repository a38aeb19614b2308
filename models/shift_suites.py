"""What a detector of interest shifts is worth: suites on real histories, made shifts, synthetic ones and labels.

Beside the way of an event: `driftline evaluate-shifts` (stream/shift_evaluation.py) runs these. Rules are fitted,
chosen and calibrated on one half of the users and everything here is measured on the other. For S0 the thresholds are
those of the first half; for the other suites every detector's knob is set so that the real order of the reported users
raises the same rate of alarms, or delays could not be compared.

    S0  real order: requested against measured rate          S4  one interest surges for everybody
    S1  splices: one user's history, then another's          S5  labelled blocks of masqueraders
    S2  partial and gradual splices                          S6  splices by age of the user at the shift
    S3  synthetic users with planted shifts                  S7  do natural alarms foretell the next 30 events?
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from models.features import I64, U32
from models.shift import GroupTable, Reason, ShiftSettings, reasons
from models.shift_baselines import (
    Detector,
    DummyDetector,
    Outcome,
    RuleDetector,
    frozen_detector,
    river_detectors,
    set_knob,
)
from models.shift_blocks import Labels, block_scores
from models.shift_calibration import Histories, Splices, calibrate, columns, delays, memory_of, run, splice
from models.shift_planted import Planted, planted, softened
from models.shift_rule import fixed_rule
from models.surge_trial import surge_trials

F64 = npt.NDArray[np.float64]
BOOL = npt.NDArray[np.bool_]

WITHIN = 20  # events
NEXT = 30  # events that a natural alarm is judged by
OURS = ("driftline", "driftline_event", "driftline_session", "driftline_learned")
_RESAMPLES = 200
SLOW_EVENTS_MAX = 50_000  # of the reported users; on more, detectors that take minutes are left out
_AGES = (60, 120, 240, 480)  # events; strata of S6
_STRATUM_SPLICES = 20  # a stratum with fewer made shifts is left out
_ONSET_EVENTS = 10  # events since the onset for detectors that estimate none
_UNLEARNED_EVENTS = 25  # an onset before it is an unlearned profile, not a shift
_RANDOM_MOMENTS = 5  # beside each natural alarm
_ALIKE = 4.0 / 3.0  # ages of users that are compared: apart by this factor at most
_SPLICES_MAX = 3_000
_FEW_USERS = 40  # with fewer, each is spliced more often


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the result: a suite, a detector, a requested rate. Shares are 0..1; None: no such figure.

    Attributes:
        measured_arl0: monitored events for each alarm in real order.
        within_20: share of made shifts found within 20 events.
        missed: share not found within `missed_window` events.
        alerts: how many alarms a figure is about.
        early_onsets: share of natural alarms whose onset lies before the user's event 25.
        mean_delay, f1: of the made shifts that were found; a shift is a hit if found within the window, an alarm
            before it a false one.
        ages: the figures of made shifts by age of the user.
        delays: events to the alarm for each made shift, inf where there was none.
    """

    suite: str
    detector: str
    requested_arl0: float
    measured_arl0: float | None = None
    expected_alarms: float | None = None
    median_delay: float | None = None
    within_20: float | None = None
    missed: float | None = None
    missed_window: int | None = None
    auc: float | None = None
    hits_at_1_3: float | None = None
    hits_at_6_7: float | None = None
    confirmed: float | None = None
    confirmed_random: float | None = None
    onset_error: float | None = None
    gained_hit_3: float | None = None
    lost_hit_3: float | None = None
    scope_accuracy: float | None = None
    ci95: dict[str, tuple[float, float]] = field(default_factory=dict)
    splices: int | None = None
    alerts: int | None = None
    early_onsets: float | None = None
    alerted_share: float | None = None
    mean_delay: float | None = None
    f1: float | None = None
    ages: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    delays: F64 | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is studied.

    Attributes:
        tuned, reported: the two halves of the users; the same where all users are reported.
        reported_users: the reported users' numbers among all.
        window: events after which a made shift counts as missed.
    """

    tuned: Histories
    reported: Histories
    reported_users: I64
    settings: ShiftSettings
    false_alarm_events: float
    window: int
    seed: int


def histories_of(user: I64, interest: U32, time_ms: I64) -> Histories:
    """User by user, each in order; an interest's share is taken over all OTHER users."""
    order = np.lexsort((np.arange(len(user)), time_ms, user))
    user, interest, time_ms = user[order], interest[order], time_ms[order]
    _, row, count = np.unique(interest, return_inverse=True, return_counts=True)
    _, user = np.unique(user, return_inverse=True)
    pair = user.astype(np.int64) * len(count) + row
    _, pair_row, pair_count = np.unique(pair, return_inverse=True, return_counts=True)
    own = np.bincount(user)[user]
    others = count[row] - pair_count[pair_row]
    share = (others + 0.5) / (len(user) - own + 0.5 * (len(count) + 1_000))
    return Histories(user=user.astype(np.int64), interest=interest, time_ms=time_ms, share=share)


def our_detectors(study: Study, names: Sequence[str] = OURS) -> list[RuleDetector]:
    """Our rules of these names, each made from the tuned half alone and calibrated on it."""
    settings = replace_settings(study.settings, false_alarm_events=study.false_alarm_events)
    forms: tuple[tuple[str, dict[str, Any]], ...] = (
        ("driftline", {}),
        ("driftline_event", {"evidence": "event", "statistic": "fixed"}),
        ("driftline_session", {"evidence": "session", "statistic": "fixed"}),
        ("driftline_learned", {"statistic": "learned"}),
    )
    found = []
    for name, form in forms:
        if name not in names:
            continue
        own = replace_settings(settings, **form)
        rule = calibrate(study.tuned, own, np.random.default_rng(study.seed))
        found.append(RuleDetector(name, rule, own))
    return found


def replace_settings(settings: ShiftSettings, **changes: Any) -> ShiftSettings:
    """The same settings with some changed."""
    return msgspec.structs.replace(settings, **changes)


def detectors(study: Study, names: Sequence[str] | None) -> list[Detector]:
    """Ours and the baselines, all or those of these names."""
    ours = our_detectors(study, OURS if names is None else names)
    unit = ours[0].rule.by_session if ours else False
    settings = study.settings
    plain = fixed_rule(
        by_session=unit,
        threshold=7.0,
        drift=settings.drift,
        kappa=settings.kappa,
        half_life_events=memory_of(study.tuned, settings),
    )
    found: list[Detector] = [
        *ours,
        frozen_detector(plain, settings),
        DummyDetector(settings),
        *river_detectors(settings, slow=len(study.reported) <= SLOW_EVENTS_MAX),
    ]
    return [one for one in found if names is None or one.name in names]


# ---------------------------------------------------------------------- S0


def rate_row(study: Study, detector: Detector, knob: float, suite: str = "S0", found: Outcome | None = None) -> Row:
    """The rate in real order, with a Poisson interval, and one by bootstrap over users, who differ more than by chance.

    `found`: what the detector said there, where that is known.
    """
    found = found or detector.outcome(study.reported, knob)
    alarms = int(found.alarm_B.sum())
    low, high = _poisson_interval(alarms)
    users = study.reported
    old_U = np.maximum(np.diff(users.first) - study.settings.age_min_events, 0)
    monitored_U = found.monitored * old_U / max(1, int(old_U.sum()))
    alarms_U = np.bincount(users.user[found.alarm_B], minlength=users.users)
    drawn = [
        float(monitored_U[chosen].sum()) / max(0.5, float(alarms_U[chosen].sum()))
        for chosen in _resampled(np.arange(users.users), study.seed)
    ]
    return Row(
        suite=suite,
        detector=detector.name,
        requested_arl0=study.false_alarm_events,
        measured_arl0=found.monitored / alarms if alarms else None,
        expected_alarms=found.monitored / study.false_alarm_events,
        alerts=alarms,
        ci95={
            "measured_arl0": (found.monitored / high, found.monitored / low if low else math.inf),
            "measured_arl0_by_users": (float(np.percentile(drawn, 2.5)), float(np.percentile(drawn, 97.5))),
        },
    )


def _poisson_interval(count: int) -> tuple[float, float]:
    """95 % interval of a Poisson mean by the Wilson-Hilferty approximation of the chi-square quantiles."""

    def quantile(k: float, z: float) -> float:
        return k * (1.0 - 1.0 / (9.0 * k) + z / (3.0 * math.sqrt(k))) ** 3 if k > 0 else 0.0

    return quantile(count, -1.96), quantile(count + 1.0, 1.96)


# ---------------------------------------------------------------------- S1, S2, S6


def delay_row(
    study: Study,
    detector: Detector,
    knob: float,
    made: Splices,
    suite: str,
    *,
    ages: bool = False,
    found: Outcome | None = None,
) -> Row:
    """Delays on made shifts, with intervals by bootstrap over users; with `ages` every age counts the same."""
    found = found or detector.outcome(made.runs, knob)
    delay, counts = delays(made, found.alarm_B, study.settings.refractory_events)
    before = np.arange(len(made.runs)) - made.runs.first[made.runs.user] < made.at[made.runs.user]
    false_alarms = int((found.alarm_B & before).sum())
    delay, owner, at = delay[counts], made.owner[counts], made.at[counts]
    if not len(delay):
        return Row(suite=suite, detector=detector.name, requested_arl0=study.false_alarm_events, splices=0)
    stratum = np.searchsorted(_AGES, at, side="right")
    weight = np.ones(len(delay))
    if ages:
        kept = np.bincount(stratum, minlength=len(_AGES) + 1)
        weight = np.where(kept[stratum] >= _STRATUM_SPLICES, 1.0 / kept[stratum], 0.0)
    figures = _delay_figures(delay, weight, study.window)
    hits = int((delay <= study.window).sum())
    return Row(
        suite=suite,
        detector=detector.name,
        requested_arl0=study.false_alarm_events,
        median_delay=figures[0] if math.isfinite(figures[0]) else None,
        within_20=figures[1],
        missed=figures[2],
        missed_window=study.window,
        splices=len(delay),
        ci95=_bootstrap(delay, weight, owner, study),
        mean_delay=float(delay[delay <= study.window].mean()) if hits else None,
        f1=2.0 * hits / (hits + false_alarms + len(delay)),
        ages={
            _age_name(s): _delay_figures(delay[stratum == s], weight[stratum == s], study.window)
            for s in np.unique(stratum[weight > 0]).tolist()
        }
        if ages
        else {},
        delays=delay,
    )


def _age_name(stratum: int) -> str:
    low = _AGES[stratum - 1] if stratum else 0
    return f"{low}-{_AGES[stratum]}" if stratum < len(_AGES) else f"{low} and more"


def _delay_figures(delay: F64, weight: F64, window: int) -> tuple[float, float, float]:
    """(weighted median, inf where beyond the window; share within 20; share missed)."""
    total = float(weight.sum())
    if not total:
        return math.inf, 0.0, 1.0
    order = np.argsort(delay, kind="stable")
    middle = order[min(len(order) - 1, int(np.searchsorted(np.cumsum(weight[order]), 0.5 * total)))]
    median = float(delay[middle]) if delay[middle] <= window else math.inf
    within, missed = float(weight @ (delay <= WITHIN)) / total, float(weight @ (delay > window)) / total
    return median, within, missed


def _bootstrap(delay: F64, weight: F64, owner: I64, study: Study) -> dict[str, tuple[float, float]]:
    drawn = [_delay_figures(delay[chosen], weight[chosen], study.window) for chosen in _resampled(owner, study.seed)]
    low, high = np.percentile(np.array(drawn), [2.5, 97.5], axis=0, method="nearest")
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(("median_delay", "within_20", "missed"))}


def _resampled(owner: I64, seed: int) -> Iterator[I64]:
    """Places of all that belongs to users drawn with replacement."""
    rng = np.random.default_rng(seed)
    _, row = np.unique(owner, return_inverse=True)
    order = np.argsort(row, kind="stable")
    places = np.split(order, np.cumsum(np.bincount(row))[:-1]) if len(row) else []
    for _ in range(_RESAMPLES if places else 0):
        yield np.concatenate([places[i] for i in rng.integers(0, len(places), len(places))])


def made_shifts(study: Study, *, per_user: int = 3) -> Splices:
    """Splices of the reported users."""
    per_user = max(1, min(per_user, _SPLICES_MAX // max(1, study.reported.users) + 1))
    if study.reported.users < _FEW_USERS:
        per_user = 20
    after = study.settings.age_min_events + 5
    return splice(
        study.reported,
        study.settings,
        np.random.default_rng(study.seed + 1),
        per_user=per_user,
        window=study.window,
        after=after,
    )


# ---------------------------------------------------------------------- S3


def planted_row(study: Study, detector: Detector, knob: float, truth: Planted) -> Row:
    """S3: delay, error of the onset, and whether the named interests are those of the planted change."""
    made = truth.made
    row = delay_row(replace(study, window=made.window), detector, knob, made, "S3")
    if not isinstance(detector, RuleDetector):
        return row
    done = run(made.runs, detector.at(knob), detector.settings)
    events = columns(made.runs.user, made.runs.interest, made.runs.time_ms)
    said = {r.event: r for r in reasons(done, events, GroupTable(detector.settings), detector.settings)}
    first = made.runs.first
    errors, gained, lost = [], [], []
    seen: set[int] = set()
    for place in done.alarmed.event_E.tolist():
        user = int(made.runs.user[place])
        since = place - int(first[user]) - int(made.at[user])
        if since < 0 or since >= made.window or user in seen:
            continue
        seen.add(user)
        errors.append(abs(since + 1 - int(done.onset_events_B[place])))
        gained.append(bool(truth.after[user] & {key for key, _ in said[place].gained[:3]}))
        lost.append(bool(truth.before[user] & {key for key, _ in said[place].lost[:3]}))
    if not errors:
        return row
    return replace(
        row,
        onset_error=float(np.median(errors)),
        gained_hit_3=float(np.mean(gained)),
        lost_hit_3=float(np.mean(lost)),
        alerts=len(errors),
    )


# ---------------------------------------------------------------------- S5


def _largest_rise(evidence_B: npt.NDArray[np.float32]) -> float:
    """The largest evidence of a block on its own: what blocks before it left behind does not count."""
    return float((evidence_B - np.minimum.accumulate(evidence_B)).max())


def labelled_row(study: Study, detector: RuleDetector, labels: Labels) -> Row:
    """S5: how well a score of each block tells somebody else's blocks from the user's own.

    Of our detector the odds of models/shift_blocks.py, of others the largest rise of their evidence within the block.
    """
    if detector.name == OURS[0]:
        return _labelled(study, detector, labels, block_scores(labels, detector.settings))
    low = min(detector.rule.thresholds)
    never = 1e9 / low  # no alarm: the evidence goes on; the profile is held as if the thresholds were in force
    rule = msgspec.structs.replace(detector.at(never), hold_share=detector.rule.hold_share / never)
    done = run(labels.users, rule, detector.settings)
    place_K = labels.users.first[labels.user_K] + labels.first_K
    score_K = np.array([_largest_rise(done.evidence_B[p : p + labels.block]) for p in place_K.tolist()])
    return _labelled(study, detector, labels, score_K)


def _labelled(study: Study, detector: Detector, labels: Labels, score_K: F64) -> Row:
    positive, negative = score_K[labels.masquerader_K], score_K[~labels.masquerader_K]

    def figures(positive: F64, negative: F64) -> tuple[float, float, float]:
        calm = np.sort(negative)
        below = (np.searchsorted(calm, positive, "left") + np.searchsorted(calm, positive, "right")) / 2.0
        at = [calm[min(len(calm) - 1, int(len(calm) * (1.0 - share)))] for share in (0.013, 0.067)]
        return float(below.mean() / len(calm)), float(np.mean(positive > at[0])), float(np.mean(positive > at[1]))

    auc, at_1_3, at_6_7 = figures(positive, negative)
    drawn = []
    for chosen in _resampled(labels.user_K, study.seed):
        theirs = labels.masquerader_K[chosen]
        if theirs.any() and not theirs.all():
            drawn.append(figures(score_K[chosen][theirs], score_K[chosen][~theirs]))
    low_3, high_3 = np.percentile(np.array(drawn), [2.5, 97.5], axis=0)
    names = ("auc", "hits_at_1.3", "hits_at_6.7")
    return Row(
        suite="S5",
        detector=detector.name,
        requested_arl0=study.false_alarm_events,
        auc=auc,
        hits_at_1_3=at_1_3,
        hits_at_6_7=at_6_7,
        splices=len(positive),
        ci95={name: (float(low_3[i]), float(high_3[i])) for i, name in enumerate(names)},
    )


# ---------------------------------------------------------------------- S7


def meaning_row(study: Study, detector: Detector, knob: float, found: Outcome | None = None) -> Row:
    """S7: do the events since an alarm's onset foretell the next ones better than those before it?

    Beside it the same at random moments of users of the same age, with as many events since a made-up onset, as live
    (models/confirmation.py). Moments of the alarm's own user are no measure: histories are short, so most of them
    overlap what the alarm is judged by.
    """
    users = study.reported
    found = found or detector.outcome(users, knob)
    first, rng = users.first, np.random.default_rng(study.seed + 3)
    age_B = np.arange(len(users)) - first[users.user]
    order = np.argsort(age_B, kind="stable")
    sorted_age = age_B[order]
    real, random, owner, early = [], [], [], []
    for place in np.flatnonzero(found.alarm_B).tolist():
        begin, end = int(first[users.user[place]]), int(first[users.user[place] + 1])
        since = int(found.onset_events_B[place]) if found.onset_events_B is not None else _ONSET_EVENTS
        early.append(place + 1 - since - begin < _UNLEARNED_EVENTS)
        since = max(3, since)
        said = foretells(users, begin, place + 1 - since, place + 1, end)
        age = int(age_B[place])
        low, high = np.searchsorted(sorted_age, [max(study.settings.age_min_events, age / _ALIKE), age * _ALIKE])
        beside = [
            other
            for moment in order[rng.integers(low, max(high, low + 1), _RANDOM_MOMENTS) % len(order)].tolist()
            if (other := foretells(users, int(first[users.user[moment]]), moment + 1 - since, moment + 1,
                                   int(first[users.user[moment] + 1]))) is not None
        ]  # fmt: skip
        if said is not None and beside:
            real.append(float(said))
            random.append(float(np.mean(beside)))
            owner.append(int(users.user[place]))
    row = Row(
        suite="S7",
        detector=detector.name,
        requested_arl0=study.false_alarm_events,
        alerts=len(real),
        early_onsets=float(np.mean(early)) if early else None,
    )
    if not real:
        return row
    real_A, random_A = np.array(real), np.array(random)
    gains = [float((real_A - random_A)[chosen].mean()) for chosen in _resampled(np.array(owner), study.seed)]
    return replace(
        row,
        confirmed=float(real_A.mean()),
        confirmed_random=float(random_A.mean()),
        ci95={"confirmed_minus_random": (float(np.percentile(gains, 2.5)), float(np.percentile(gains, 97.5)))},
    )


def foretells(users: Histories, begin: int, onset: int, now: int, end: int) -> bool | None:
    """Whether events onset..now give the next NEXT ones more probability than events begin..onset; None: too few."""
    following = slice(now, min(end, now + NEXT))
    if onset - begin < 5 or following.stop - following.start < 10:
        return None
    gain = 0.0
    for interest, share in zip(users.interest[following].tolist(), users.share[following].tolist(), strict=True):
        logs = []
        for part in (users.interest[begin:onset], users.interest[onset:now]):
            logs.append(math.log((float((part == interest).sum()) + 5.0 * share) / (len(part) + 5.0)))
        gain += logs[1] - logs[0]
    return gain > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """A natural alarm with what came before and after it; places are indices of events in `histories`."""

    histories: Histories
    user: int  # among all users of the study's file
    begin: int
    onset: int
    place: int
    end: int
    reason: Reason
    confirmed: bool | None


def natural_alerts(study: Study, count: int) -> list[Told]:
    """Alarms of our detector on the reported users' real order, drawn at random."""
    detector = our_detectors(study, OURS[:1])[0]
    users = study.reported
    done = run(users, detector.rule, detector.settings)
    events = columns(users.user, users.interest, users.time_ms)
    said = reasons(done, events, GroupTable(detector.settings), detector.settings)
    drawn = np.random.default_rng(study.seed + 5).permutation(len(said))[:count]
    first = users.first
    told = []
    for reason in (said[i] for i in sorted(drawn.tolist())):
        place = reason.event
        begin, end = int(first[users.user[place]]), int(first[users.user[place] + 1])
        onset = place + 1 - max(1, reason.onset_events)
        told.append(
            Told(
                histories=users,
                user=int(study.reported_users[users.user[place]]),
                begin=begin,
                onset=onset,
                place=place,
                end=end,
                reason=reason,
                confirmed=foretells(users, begin, min(onset, place - 2), place + 1, end),
            )
        )
    return told


# ---------------------------------------------------------------------- all


SUITES = ("S0", "S1", "S2", "S3", "S4", "S5", "S6", "S7")


def study_rows(
    study: Study,
    suites: Sequence[str],
    names: Sequence[str] | None,
    labels: Labels | None,
    on_progress: Callable[[str, int, int], None],
    processes: int = 1,
) -> Iterator[Row]:
    """All rows of the suites, one detector after the other; `names`: of which detectors, None = all.

    Args:
        processes: how many detectors are measured at a time, each in a process; the rows are the same.

    Raises:
        ValueError: too few users with a history.
    """
    on_progress("fitting and calibrating our own rules", 0, 1)
    found = detectors(study, names)
    made = made_shifts(study)
    trial = _Trial(
        study=study,
        suites=tuple(suites),
        made=made,
        soft=softened(made, study.reported, study.settings, study.seed + 4) if "S2" in suites else made,
        truth=planted(study.reported, study.seed + 2) if "S3" in suites else None,
        labels=labels,
    )
    for done, (detector, rows) in enumerate(_each(trial, found, processes)):
        on_progress(detector.name, done, len(found))
        yield from rows
    if "S4" in suites:
        on_progress("surges", len(found), len(found))
        made_surges = surge_trials(study.seed + 5, settings=study.settings, trials=6)
        yield Row(
            suite="S4",
            detector="driftline",
            requested_arl0=study.false_alarm_events,
            scope_accuracy=made_surges.scope_accuracy,
            alerted_share=made_surges.users_alerted,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trial:
    """What every detector is measured on."""

    study: Study
    suites: tuple[str, ...]
    made: Splices
    soft: Splices
    truth: Planted | None
    labels: Labels | None

    def rows(self, detector: Detector) -> list[Row]:
        """All rows of one detector."""
        return list(self._rows(detector))

    def _rows(self, detector: Detector) -> Iterator[Row]:
        study, suites, labels = self.study, self.suites, self.labels
        if "S0" in suites:
            ours = isinstance(detector, RuleDetector) and detector.name != "frozen"
            yield rate_row(study, detector, 1.0 if ours else set_knob(detector, study.tuned, study.false_alarm_events))
        if {"S1", "S2", "S3", "S6", "S7"} & set(suites):
            knob = set_knob(detector, study.reported, study.false_alarm_events)
            said = detector.outcome(study.reported, knob)
            measured = rate_row(study, detector, knob, found=said)
            for row in self._matched(detector, knob, said):
                yield replace(row, measured_arl0=measured.measured_arl0, expected_alarms=measured.expected_alarms)
        if labels is not None and "S5" in suites and isinstance(detector, RuleDetector):
            yield labelled_row(study, detector, labels)

    def _matched(self, detector: Detector, knob: float, said: Outcome) -> Iterator[Row]:
        """The suites in which every detector's knob is set to the same rate; `said` is of the real order."""
        study, suites, made = self.study, self.suites, self.made
        found = detector.outcome(made.runs, knob) if {"S1", "S6"} & set(suites) else None
        if "S1" in suites:
            yield delay_row(study, detector, knob, made, "S1", found=found)
        if "S2" in suites:
            yield delay_row(study, detector, knob, self.soft, "S2")
        if self.truth is not None:
            yield planted_row(study, detector, knob, self.truth)
        if "S6" in suites:
            yield delay_row(study, detector, knob, made, "S6", ages=True, found=found)
        if "S7" in suites:
            yield meaning_row(study, detector, knob, found=said)


_trial_here: _Trial  # in a process that measures


def _take(trial: _Trial) -> None:
    global _trial_here
    _trial_here = trial


def _rows_here(detector: Detector) -> list[Row]:
    return _trial_here.rows(detector)


def _each(trial: _Trial, found: Sequence[Detector], processes: int) -> Iterator[tuple[Detector, list[Row]]]:
    """Every detector with its rows, in order."""
    if processes <= 1 or len(found) <= 1:
        for detector in found:
            yield detector, trial.rows(detector)
        return
    with ProcessPoolExecutor(
        min(processes, len(found)), multiprocessing.get_context("spawn"), initializer=_take, initargs=(trial,)
    ) as pool:
        # the slow ones stand at the end: begun first, they do not keep one process busy alone
        waiting = {detector.name: pool.submit(_rows_here, detector) for detector in reversed(found)}
        for detector in found:
            yield detector, waiting[detector.name].result()
