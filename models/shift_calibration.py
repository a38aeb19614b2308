"""How the detector's rule is made, without labels: from the histories of shadow users, replayed in their real order.

On the way of an event: at an epoch cut, in the partition's own group table; and in the evaluation, from the users of
the half that is tuned on. Three steps, all by replay through the very kernel that judges live events:

    fit     a logistic log-likelihood ratio of one unit of evidence: the user's own next session against a session of
            somebody else, both seen from the user's profile at that moment
    choose  among the fixed rules and the learned ones: the smallest mean delay (up to DELAY_MAX events) on splices made
            of two users' histories, thresholds matched to the same rate of alarms; users that were not fitted on,
            each half of them in turn. Synthetic users with a planted change decide where real ones hardly do
    match   thresholds by age so that the real order of real users raises one alarm in `false_alarm_events`

Real users are bursty: bounds that assume independent events ask for far too little evidence, so nothing here is
computed from a bound. What is measured live afterwards corrects the thresholds at later cuts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from models.features import I64, U32, EventColumns
from models.profile import Advanced, replay
from models.shift_rule import AGES, SPREADS_ENDLESS, UNIT_ENDLESS, Rule, fixed_rule
from models.walk import FEATURE_COUNT, user_dtype_of

if TYPE_CHECKING:
    from models.shift import ShiftSettings
    from models.shift_groups import GroupTable, Shadow, Tallies

F64 = npt.NDArray[np.float64]

DELAY_MAX = 60  # events; a splice found later counts as this
_NEVER = 1e9  # a threshold that nothing reaches
_SAMPLES = 6_000  # units of each kind that a fit looks at, about
_BLOCK = 8  # events, where the unit is one event: as many of somebody else's in a row
_UNIT_EVENTS_MAX = 60
FIT_USERS = 12  # fewer: nothing is fitted
_FIT_UNITS = 100  # of each kind; fewer: nothing is learned
_THREADS = 2  # that judge choices
_MATCH_ALARMS = 12.0  # a threshold is matched where this many alarms are expected, and extrapolated beyond
_POOL_ALARMS = 40.0  # alarms' worth of the common threshold in an age group's own
_RIDGE = 1e-3
_LONG_HISTORY = 1_000  # events: half of the users have more
_LONG_MEMORY = 15.0  # times the half-life, where histories are long
LONG_PROFILE = 128  # interests in a slow profile, there
_LONG_WINDOW = 5  # times DELAY_MAX, there
_SPLICES_MIN = 300  # to choose by; fewer users are spliced more often
_LONG_VISIT = 12.0  # events in a session on average, from which on blocks of _BLOCK events are tried as well
_TAIL_MIN, _TAIL_MAX = 0.03, 2.0
_AGE_TAIL_MIN = 0.2  # a flatter one makes ages with few alarms jump
_GROWTH_MIN, _GROWTH_MAX = 0.3, 0.9  # powers of the events between alarms with which thresholds grow
_FAR = 3.0  # times the events between alarms that were matched
_FEATURES = (0, 1, 2, 3, 4, 5, 7)
_UNUSUAL = 8
_SETTLED = 9
_SETTLED_SHARES = (1.0, 2.0)  # of the mean's coefficient
_RISE_SHARE = 0.25  # of the alarms, for the second statistic
_RISE_STEPS = 10
_RISE_SCALES = (0.01, 20.0)
_PLANTED_WEIGHT = 0.1  # of the mean delay on synthetic users: they decide where real ones hardly do
_PLANTED_USERS = 60
_PLANTED_INTERESTS = 12
_DRIFTS = (0.0, 0.15, 0.3)  # taken from a learned ratio, nats
_SHORT_SHARES = (0.0, 0.3)
_SHIFT_ROUNDS, _SHIFT_STEPS = 7, 4
_HOLD_STRICT = 1 / 3  # of the setting
_HOLD_SPREADS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Histories:
    """Events of some users, user by user, each in order. `share` is that of the interest among all users."""

    user: I64  # 0 .. users - 1
    interest: U32
    time_ms: I64
    share: F64

    def __len__(self) -> int:
        return len(self.user)

    @property
    def users(self) -> int:
        return int(self.user[-1]) + 1 if len(self.user) else 0

    @property
    def first(self) -> I64:
        """Where each user's events begin, and the end."""
        return np.searchsorted(self.user, np.arange(self.users + 1))

    def some(self, chosen_U: npt.NDArray[np.bool_]) -> Histories:
        """Only the users where `chosen_U` is true, numbered anew."""
        chosen = self.at(chosen_U[self.user])
        return replace(chosen, user=(np.cumsum(chosen_U) - 1)[chosen.user])

    def at(self, where: slice | npt.NDArray[np.bool_]) -> Histories:
        """Only some of the events; users keep their numbers."""
        return Histories(
            user=self.user[where], interest=self.interest[where], time_ms=self.time_ms[where], share=self.share[where]
        )

    @staticmethod
    def of(shadow: Shadow, table: GroupTable) -> Histories:
        """The shadow users' histories under the table's shares."""
        order = np.argsort(shadow.key, kind="stable")
        _, user = np.unique(shadow.key[order], return_inverse=True)
        interest = shadow.interest[order]
        share, _ = table.shares(interest, np.zeros(len(interest), np.uint8))
        return Histories(user=user.astype(np.int64), interest=interest, time_ms=shadow.time_ms[order], share=share)


@dataclass(frozen=True, kw_only=True, slots=True)
class Splices:
    """Made shifts: the beginning of one user's history, then a part of another's. `at` is the first foreign event."""

    runs: Histories
    at: I64
    owner: I64  # the user whose history was left, in the histories that the splices were made from
    window: int


def columns(user: I64, interest: U32, time_ms: I64) -> EventColumns:
    """Events that carry nothing but who, what and when."""
    count = len(user)
    missing = np.full(count, np.nan, np.float32)
    return EventColumns(
        user_row=user,
        interest=interest,
        item=np.zeros(count, np.uint32),
        type=np.ones(count, np.uint8),
        time_ms=time_ms,
        price=missing,
        dwell_s=missing,
        rating=missing,
        sentiment=missing,
        segment=np.zeros(count, np.uint8),
    )


def run(histories: Histories, rule: Rule, settings: ShiftSettings, *, features: bool = False) -> Advanced:
    """Replay whole histories from the users' first event on."""
    events = columns(histories.user, histories.interest, histories.time_ms)
    records = np.zeros(histories.users, user_dtype_of(settings.profile_interests))
    return replay(records, events, histories.share, rule, settings, features=features)


def session_starts(histories: Histories, settings: ShiftSettings) -> I64:
    """Indices of the first events of sessions."""
    new = np.ones(len(histories), np.bool_)
    same = histories.user[1:] == histories.user[:-1]
    new[1:] = ~same | (np.diff(histories.time_ms) > settings.session_gap_s * 1_000)
    return np.flatnonzero(new)


# ---------------------------------------------------------------------- made shifts


def splice(
    histories: Histories, settings: ShiftSettings, rng: np.random.Generator, *, per_user: int, window: int, after: int
) -> Splices:
    """Up to `per_user` made shifts a user, at session boundaries with at least `after` events of its own before."""
    first = histories.first
    starts = session_starts(histories, settings)
    at_of = [starts[(starts >= first[u] + after) & (starts < first[u + 1])] for u in range(histories.users)]
    room = first[histories.user[starts] + 1] - starts
    donors = starts[room >= window]
    if len(donors) and len(starts) < 2 * histories.users:  # no sessions to speak of: cut anywhere
        rest = first[histories.user + 1] - np.arange(len(histories))
        age = np.arange(len(histories)) - first[histories.user]
        donors = np.flatnonzero(rest >= window)
        at_of = [np.flatnonzero((histories.user == u) & (age >= after)) for u in range(histories.users)]
    parts: list[I64] = []
    times: list[I64] = []
    at: list[int] = []
    owner: list[int] = []
    for user in range(histories.users):
        cuts = np.append(at_of[user], first[user + 1]) if first[user + 1] - first[user] >= after else at_of[user]
        for _ in range(per_user if len(cuts) and len(donors) else 0):
            cut, donor = int(rng.choice(cuts)), int(rng.choice(donors))
            if histories.user[donor] == user:
                continue
            own, foreign = np.arange(first[user], cut), np.arange(donor, donor + window)
            before_ms = int(histories.time_ms[cut - 1])
            same = donor > first[histories.user[donor]]
            pause_ms = int(histories.time_ms[donor] - histories.time_ms[donor - 1]) if same else 86_400_000
            moved = histories.time_ms[foreign] - histories.time_ms[donor] + before_ms + max(0, pause_ms)
            parts.append(np.concatenate([own, foreign]))
            times.append(np.concatenate([histories.time_ms[own], moved]))
            at.append(len(own))
            owner.append(user)
    if not parts:
        return Splices(
            runs=histories.some(np.zeros(histories.users, np.bool_)),
            at=np.zeros(0, np.int64),
            owner=np.zeros(0, np.int64),
            window=window,
        )
    index = np.concatenate(parts)
    runs = Histories(
        user=np.repeat(np.arange(len(parts)), [len(p) for p in parts]),
        interest=histories.interest[index],
        time_ms=np.concatenate(times),
        share=histories.share[index],
    )
    return Splices(runs=runs, at=np.array(at, np.int64), owner=np.array(owner, np.int64), window=window)


def delays(splices: Splices, alarm_B: npt.NDArray[np.bool_], refractory: int) -> tuple[F64, npt.NDArray[np.bool_]]:
    """Events from each made shift to the first alarm after it (inf: none in the window), and which count.

    A splice counts unless an alarm just before it had silenced the detector.
    """
    first = splices.runs.first
    delay = np.full(len(splices.at), np.inf)
    counts = np.ones(len(splices.at), np.bool_)
    place = np.flatnonzero(alarm_B)
    runs = splices.runs.user[place]
    since = place - first[runs] - splices.at[runs]
    counts[runs[(since < 0) & (since >= -refractory)]] = False
    found = since >= 0
    np.minimum.at(delay, runs[found], since[found] + 1.0)
    return delay, counts


# ---------------------------------------------------------------------- fit


def fit(own: F64, foreign: F64, chosen: Sequence[int], settled_share: float = 0.0) -> tuple[float, ...]:
    """Coefficients of the log-likelihood ratio of one unit, somebody else's against the user's own.

    Args:
        own, foreign: features of units, from `units`.
        chosen: which features to use.
        settled_share: how far the user's level lies below that of most users is added, times this share of the mean's
            coefficient. Not fitted: few real users are so settled.
    """
    x = np.concatenate([own, foreign])[:, list(chosen)]
    y = np.concatenate([np.zeros(len(own)), np.ones(len(foreign))])
    weight = np.concatenate([np.full(len(own), 0.5 / len(own)), np.full(len(foreign), 0.5 / len(foreign))])
    coefficients = np.zeros(FEATURE_COUNT + 1)
    fitted = _logistic(x, y, weight)
    coefficients[list(chosen)] = fitted[:-1]
    coefficients[-1] = fitted[-1]
    if settled_share:
        coefficients[_SETTLED] = settled_share * max(0.0, coefficients[0])
    return tuple(coefficients.tolist())


def units(histories: Histories, rule: Rule, settings: ShiftSettings, rng: np.random.Generator) -> tuple[F64, F64]:
    """Features of units of evidence: the users' own, and others' seen from the same records."""
    rule = _with(rule, _NEVER)
    starts, ends, ordinal = _blocks(histories, rule, settings)
    age = starts - histories.first[histories.user[starts]]
    wanted = (age >= settings.age_min_events) & (ends > starts)
    wanted &= rng.random(len(starts)) < _SAMPLES / max(1, int(wanted.sum()) * (1 if rule.by_session else _BLOCK))
    records = np.zeros(histories.users, user_dtype_of(settings.profile_interests))
    own: list[F64] = []
    foreign: list[F64] = []
    by_round = np.argsort(ordinal, kind="stable")
    edges = np.searchsorted(ordinal[by_round], np.arange(int(ordinal.max(initial=-1)) + 2))
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        mine = by_round[begin:end]
        sampled = mine[wanted[mine]]
        others = rng.integers(0, len(starts), len(sampled))
        others = np.where(histories.user[starts[others]] == histories.user[starts[sampled]], -1, others)
        sampled, others = sampled[others >= 0], others[others >= 0]
        both = np.concatenate([records, records[histories.user[starts[sampled]]]])
        index, row, time_ms, last = _round(histories, starts, ends, mine, sampled, others)
        events = columns(row, histories.interest[index], time_ms)
        done = replay(both, events, histories.share[index], rule, settings, features=bool(len(sampled)))
        records = both[: histories.users]
        if len(sampled):
            is_own = row < histories.users
            take = last if rule.by_session else np.ones(len(row), np.bool_)
            of_sampled = np.isin(row, histories.user[starts[sampled]]) & is_own
            own.append(done.features_BF[take & of_sampled].astype(np.float64))
            foreign.append(done.features_BF[take & ~is_own].astype(np.float64))
    empty = np.zeros((0, FEATURE_COUNT))
    return np.concatenate([empty, *own]), np.concatenate([empty, *foreign])


def _blocks(histories: Histories, rule: Rule, settings: ShiftSettings) -> tuple[I64, I64, I64]:
    """Where units begin and end, and the how-manieth of its user each is."""
    first = histories.first
    if rule.by_session:
        starts = _split(session_starts(histories, settings), len(histories), rule.unit_events)
    else:
        starts = np.flatnonzero((np.arange(len(histories)) - first[histories.user]) % _BLOCK == 0)
    ends = np.append(starts[1:], len(histories))
    owner = histories.user[starts]
    ordinal = np.arange(len(starts)) - np.searchsorted(owner, owner)
    return starts, ends, ordinal


def _split(starts: I64, events: int, unit_events: int) -> I64:
    """Starts of units: of sessions, and within long ones after every `unit_events` events."""
    begin = np.repeat(starts, np.diff(np.append(starts, events)))
    return np.flatnonzero((np.arange(events) - begin) % unit_events == 0)


def _round(
    histories: Histories, starts: I64, ends: I64, mine: I64, sampled: I64, others: I64
) -> tuple[I64, I64, I64, npt.NDArray[np.bool_]]:
    """One unit of every user, and for the sampled ones somebody else's on a copy of the record."""
    parts = [np.arange(starts[m], ends[m]) for m in mine.tolist()]
    rows = [histories.user[starts[m]] for m in mine.tolist()]
    shifts = [0] * len(parts)
    for i, (m, o) in enumerate(zip(sampled.tolist(), others.tolist(), strict=True)):
        parts.append(np.arange(starts[o], min(ends[o], starts[o] + _UNIT_EVENTS_MAX)))
        rows.append(histories.users + i)
        shifts.append(int(histories.time_ms[starts[m]] - histories.time_ms[starts[o]]))
    lengths = [len(p) for p in parts]
    index = np.concatenate(parts)
    last = np.zeros(len(index), np.bool_)
    last[np.cumsum(lengths) - 1] = True
    time_ms = histories.time_ms[index] + np.repeat(np.array(shifts, np.int64), lengths)
    return index, np.repeat(np.array(rows, np.int64), lengths), time_ms, last


def _logistic(x: F64, y: F64, weight: F64) -> F64:
    """Ridge logistic regression by Newton's method; coefficients on the given scale, the constant last."""
    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread[spread < 1e-9] = 1.0
    z = np.column_stack([(x - mean) / spread, np.ones(len(x))])
    ridge = _RIDGE * np.eye(z.shape[1])
    ridge[-1, -1] = 1e-9
    b = np.zeros(z.shape[1])
    for _ in range(30):
        p = 1.0 / (1.0 + np.exp(-np.clip(z @ b, -30, 30)))
        step = np.linalg.solve(
            (z * (weight * p * (1 - p))[:, None]).T @ z + ridge, z.T @ (weight * (p - y)) + ridge @ b
        )
        b -= step
        if np.abs(step).max() < 1e-6:
            break
    scaled = b[:-1] / spread
    return np.append(scaled, b[-1] - scaled @ mean)


# ---------------------------------------------------------------------- match


def _with(rule: Rule, threshold: float | Sequence[float]) -> Rule:
    flat = (threshold,) * AGES if isinstance(threshold, float) else tuple(threshold)
    return msgspec.structs.replace(rule, thresholds=flat)


def alarm_rate(histories: Histories, rule: Rule, settings: ShiftSettings) -> tuple[float, float]:
    """(monitored events, alarms) of a replay in real order."""
    tallies = run(histories, rule, settings).tallies
    return float(tallies.monitored_G.sum()), float(tallies.alarms_G.sum())


Fold = tuple[Histories, Rule]  # users, and the rule that was fitted without them


def fold_tallies(
    folds: Sequence[Fold], thresholds: float | Sequence[float], settings: ShiftSettings
) -> tuple[F64, F64]:
    """(monitored events, alarms) by age, of all folds under the same thresholds."""
    done = [run(histories, _with(rule, thresholds), settings).tallies for histories, rule in folds]
    return (
        np.sum([t.monitored_G for t in done], axis=0).astype(np.float64),
        np.sum([t.alarms_G for t in done], axis=0).astype(np.float64),
    )


def match(folds: Sequence[Fold], rule: Rule, settings: ShiftSettings, false_alarm_events: float) -> Rule:
    """The rule with one threshold for all ages at which real order raises one alarm in `false_alarm_events`.

    Each user is judged by a rule that was fitted without him: on the users that it was fitted on, a learned rule raises
    fewer alarms than on others. Where too few alarms are expected for the requested rate, a higher one is matched and
    the threshold extrapolated by the power of the events between alarms with which it grew so far: users differ, so the
    tail gets flatter and flatter, and a straight line asks for far too little. Far beyond what was seen a threshold is
    not below the setting that stands where nothing is calibrated.
    """
    monitored, _ = fold_tallies(folds, _NEVER, settings)
    reachable = max(20.0, float(monitored.sum()) / _MATCH_ALARMS)
    target = min(false_alarm_events, reachable)
    threshold = _bisect(folds, settings, target)
    lower = _bisect(folds, settings, max(10.0, target / 3.0), top=threshold)
    growth = math.log(max(threshold, 0.05) / max(lower, 0.01)) / math.log(target / max(10.0, target / 3.0))
    growth = min(_GROWTH_MAX, max(_GROWTH_MIN, growth))
    threshold *= (false_alarm_events / target) ** growth
    if false_alarm_events > _FAR * target:
        threshold = max(threshold, settings.threshold)
    tail = math.log(3.0) / (threshold * (1.0 - 3.0**-growth))  # to a rate three times as high
    tail = min(_TAIL_MAX, max(_TAIL_MIN, tail))
    return msgspec.structs.replace(_with(rule, threshold), tail=tail, false_alarm_events=false_alarm_events)


def _bisect(
    folds: Sequence[Fold], settings: ShiftSettings, target: float, top: float = 0.0, precision: float = 0.005
) -> float:
    """The smallest flat threshold with at most one alarm in `target` monitored events, to about a hundredth."""

    def few(threshold: float) -> bool:
        monitored_G, alarms_G = fold_tallies(folds, threshold, settings)
        return bool(monitored_G.sum() >= alarms_G.sum() * target)

    low, high = 0.0, top or 8.0
    for _ in range(0 if top else 6):
        if few(high):
            break
        low, high = high, 2.0 * high
    for _ in range(20):
        if high - low < precision * (high + 1.0):
            break
        middle = (low + high) / 2.0
        low, high = (low, middle) if few(middle) else (middle, high)
    return high


def match_ages(folds: Sequence[Fold], rule: Rule, settings: ShiftSettings) -> Rule:
    """Thresholds by age from a rule that is matched for all ages together; ages with few alarms stay near the rest."""
    target = rule.false_alarm_events
    base = rule.thresholds[0]
    tail = max(rule.tail, _AGE_TAIL_MIN)
    offsets = np.zeros(AGES)
    for _ in range(3):
        monitored_G, alarms_G = fold_tallies(folds, (base + offsets).tolist(), settings)
        step = np.log((alarms_G + _POOL_ALARMS) / (monitored_G / target + _POOL_ALARMS)) / tail
        offsets = np.clip(offsets + step, -0.5 * base, 0.5 * base)
    return _with(rule, np.maximum(base + offsets + _shift(folds, base + offsets, rule, settings), 0.05).tolist())


def _shift(folds: Sequence[Fold], thresholds_G: F64, rule: Rule, settings: ShiftSettings) -> float:
    """What all thresholds by age must be moved by so that the whole still keeps the rate, which may jump with them.

    Where few alarms are expected the base was extrapolated, and what few there are moves it little.
    """
    target, base, tail = rule.false_alarm_events, rule.thresholds[0], max(rule.tail, _AGE_TAIL_MIN)

    def tallies(shift: float) -> tuple[float, float]:
        monitored_G, alarms_G = fold_tallies(folds, (thresholds_G + shift).tolist(), settings)
        return float(monitored_G.sum()) / target, float(alarms_G.sum())

    expected, _ = tallies(0.0)
    if expected < _MATCH_ALARMS:
        shift = 0.0
        for _ in range(_SHIFT_STEPS):
            expected, alarms = tallies(shift)
            shift += 0.7 * math.log((alarms + 3.0) / (expected + 3.0)) / tail
        return shift
    low, high = -0.5 * base, 0.5 * base
    for _ in range(_SHIFT_ROUNDS):
        shift = (low + high) / 2.0
        expected, alarms = tallies(shift)
        low, high = (low, shift) if expected >= alarms else (shift, high)
    return high


# ---------------------------------------------------------------------- choose


def calibrate(histories: Histories, settings: ShiftSettings, rng: np.random.Generator, *, per_user: int = 3) -> Rule:
    """Fit, choose and match; see the module's docstring.

    Raises:
        ValueError: too few users with a history to learn from.
    """
    if histories.users < FIT_USERS:
        raise ValueError(f"{histories.users} users with a history; {FIT_USERS} are needed")
    half = rng.permutation(histories.users) % 2 == 0
    trial = _Trial((histories.some(half), histories.some(~half)), settings, rng, per_user)
    found = []
    for kind in ("fixed", "learned"):
        if settings.statistic in ("auto", kind):
            best = trial.best(_first_choices(histories, settings, learned=kind == "learned"))
            finer = _finer_features(best[1]) if kind == "learned" else _finer_drifts(best[1], settings)
            found.append(trial.best(finer, best))
    best = min(found, key=lambda judged: judged[0])
    for finer in (_finer_memories(best[1]), _finer_guards(best[1], settings)):
        best = trial.best(finer, best)
    folds, rule = trial.folds(best[1] if math.isfinite(best[0]) else replace(best[1], features=()))
    matched = match(folds, rule, settings, settings.false_alarm_events)
    whole: list[Fold] = [(users, rule) for users, _ in folds]
    if _more_alarms(whole, matched, settings):
        folds, matched = whole, match(whole, rule, settings, settings.false_alarm_events)
    return match_ages(folds, matched, settings)


def _more_alarms(whole: Sequence[Fold], matched: Rule, settings: ShiftSettings) -> bool:
    """Whether the rule raises clearly more alarms than requested on the users that it was fitted on, who raise too few.

    It then differs from those of the halves, by which it was matched: a guard that holds on to evidence amplifies that.
    """
    monitored_G, alarms_G = fold_tallies(whole, matched.thresholds, settings)
    expected = float(monitored_G.sum()) / settings.false_alarm_events
    return float(alarms_G.sum()) > expected + 2.0 * math.sqrt(max(expected, _MATCH_ALARMS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One form of the rule; no features: fixed.

    Attributes:
        plain_drift: taken from each interest's ratio, nats.
        drift: taken from a learned ratio of a unit, nats.
        settled_share: see `fit`.
        rise_share: of the alarms, for the second statistic, by which `Rule.rise_scale` is found.
    """

    by_session: bool
    short_share: float = 0.0
    kappa: float
    usual_guarded: bool = True
    features: tuple[int, ...] = ()
    settled_share: float = 0.0
    rise_share: float = 0.0
    plain_drift: float
    drift: float = 0.0
    unit_events: int = UNIT_ENDLESS
    half_life_events: float
    hold_share: float
    hold_spreads: float = SPREADS_ENDLESS


def memory_of(histories: Histories, settings: ShiftSettings) -> float:
    """The half-life to start from, in events: longer where histories are long."""
    return settings.slow_half_life_events * (_LONG_MEMORY if is_long(histories) else 1.0)


def is_long(histories: Histories) -> bool:
    """Whether half of the users have long histories."""
    ages = np.diff(histories.first)
    return len(ages) > 0 and float(np.median(ages)) > _LONG_HISTORY


def _first_choices(histories: Histories, settings: ShiftSettings, *, learned: bool) -> Iterator[Choice]:
    """The unit of evidence; for a fixed rule also the alternative and how far the profile is shrunk."""
    half_life_events = memory_of(histories, settings)
    visit_events = len(histories) / max(1, len(session_starts(histories, settings)))
    for by_session in (True, False):
        if settings.evidence not in ("auto", "session" if by_session else "event"):
            continue
        for unit_events in (UNIT_ENDLESS, _BLOCK) if by_session and visit_events > _LONG_VISIT else (UNIT_ENDLESS,):
            plain = Choice(
                by_session=by_session,
                kappa=settings.kappa,
                plain_drift=settings.drift,
                unit_events=unit_events,
                half_life_events=half_life_events,
                hold_share=settings.hold_share,
            )
            if learned:
                strict = replace(plain, hold_share=_HOLD_STRICT * settings.hold_share)
                for short_share in _SHORT_SHARES:
                    if by_session:
                        yield replace(strict, features=_FEATURES, short_share=short_share, hold_spreads=_HOLD_SPREADS)
                    else:  # a single event says little of what is usual
                        yield replace(strict, features=(*_FEATURES, _UNUSUAL), short_share=short_share)
                continue
            for short_share in _SHORT_SHARES:
                for kappa in (settings.kappa, 2.5 * settings.kappa):
                    yield replace(plain, short_share=short_share, kappa=kappa)
                    if short_share and not by_session and not is_long(histories):
                        yield replace(plain, short_share=short_share, kappa=kappa, rise_share=_RISE_SHARE)


def _finer_features(best: Choice) -> Iterator[Choice]:
    for drift in _DRIFTS:
        yield replace(best, drift=drift)
        for settled_share in _SETTLED_SHARES:
            yield replace(best, settled_share=settled_share, drift=drift)


def _finer_drifts(best: Choice, settings: ShiftSettings) -> Iterator[Choice]:
    """More drift where users come in bursts: evidence dies down sooner, and the threshold is lower."""
    for factor in () if best.rise_share else (2.5, 5.0):
        for short_share in _SHORT_SHARES:
            yield replace(best, plain_drift=factor * settings.drift, short_share=short_share)


def _finer_memories(best: Choice) -> Iterator[Choice]:
    """How long the slow profile remembers."""
    for factor in () if best.rise_share else (0.5, 4.0):
        yield replace(best, half_life_events=best.half_life_events * factor)


def _finer_guards(best: Choice, settings: ShiftSettings) -> Iterator[Choice]:
    """From which evidence on the slow profile is held, and how unusual a unit must be for it."""
    for factor in (1.0, 2.0):
        yield replace(best, hold_share=factor * settings.hold_share, hold_spreads=SPREADS_ENDLESS)
    if best.rise_share:  # no spread is known where rises are watched
        return
    for spreads in (0.5 * _HOLD_SPREADS, _HOLD_SPREADS, SPREADS_ENDLESS):
        yield replace(best, hold_share=_HOLD_STRICT * settings.hold_share, hold_spreads=spreads)


def _plain(choice: Choice, settings: ShiftSettings) -> Rule:
    rule = fixed_rule(
        by_session=choice.by_session,
        threshold=settings.threshold,
        drift=choice.plain_drift,
        kappa=choice.kappa,
        short_share=choice.short_share,
        unit_events=choice.unit_events,
        half_life_events=choice.half_life_events,
        hold_share=choice.hold_share,
    )
    return msgspec.structs.replace(rule, usual_guarded=choice.usual_guarded, hold_spreads=choice.hold_spreads)


def _rule(choice: Choice, settings: ShiftSettings, own_and_foreign: tuple[F64, F64]) -> Rule:
    rule = _plain(choice, settings)
    if not choice.features or not all(map(len, own_and_foreign)):  # nothing to learn from, e.g. users of one visit each
        return rule
    coefficients = fit(*own_and_foreign, choice.features, choice.settled_share)
    return msgspec.structs.replace(
        rule, name="learned-" + rule.name, coefficients=(*coefficients[:-1], coefficients[-1] - choice.drift)
    )


class _Trial:
    """Rules fitted on one half of the users and judged on the other, both ways, all at the same rate of alarms."""

    def __init__(
        self, halves: tuple[Histories, Histories], settings: ShiftSettings, rng: np.random.Generator, per_user: int
    ) -> None:
        self._halves, self._settings = halves, settings
        after = settings.age_min_events + 5
        users = sum(half.users for half in halves)
        window = DELAY_MAX * (_LONG_WINDOW if any(map(is_long, halves)) else 1)
        per_user = max(per_user, _SPLICES_MIN // max(1, users))
        self._splices = [splice(half, settings, rng, per_user=per_user, window=window, after=after) for half in halves]
        self._window = window
        joined = _joined(halves)
        self._planted: Splices | None = None
        if not any(map(is_long, halves)) and len(np.unique(joined.interest)) >= _PLANTED_INTERESTS:
            from models.shift_planted import planted  # here, because it builds on this module

            self._planted = planted(joined, 0, _PLANTED_USERS).made
        never = fixed_rule(by_session=True, threshold=_NEVER, drift=settings.drift)
        monitored = sum(alarm_rate(half, never, settings)[0] for half in halves)
        self._false_alarm_events = min(settings.false_alarm_events, max(50.0, monitored / (2 * _MATCH_ALARMS)))
        self._units: dict[Choice, list[tuple[F64, F64]]] = {}
        self._scales: dict[Rule, float] = {}

    def best(self, choices: Iterable[Choice], *known: tuple[float, Choice]) -> tuple[float, Choice]:
        """The choice with the smallest mean delay, and that delay; one that cannot be learned here is inf.

        Judged beside each other: most of it is the compiled walk, which lets other threads run.

        Args:
            known: judged already, and kept unless one of the choices is better.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            return min([*known, *pool.map(self.judge, choices)], key=lambda judged: judged[0])

    def judge(self, choice: Choice) -> tuple[float, Choice]:
        """Mean delay on made shifts, a missed one counted as the window, and a little of that on synthetic users."""
        if choice.features and min(len(part) for half in self.units(choice) for part in half) < _FIT_UNITS:
            return math.inf, choice  # nothing to learn from, e.g. a file without pauses has no sessions
        folds, everybodys = self.folds(choice)
        threshold = _bisect(folds, self._settings, self._false_alarm_events, precision=0.02)
        delay: list[F64] = []
        for made, (_, rule) in zip(self._splices, folds, strict=True):
            said = run(made.runs, _with(rule, threshold), self._settings).alert_B
            all_of_them, counts = delays(made, said, self._settings.refractory_events)
            delay.append(all_of_them[counts])
        found = np.minimum(np.concatenate(delay), self._window)
        mean = float(found.mean()) if len(found) else float(self._window)
        if self._planted is not None:
            mean += _PLANTED_WEIGHT * mean_delay(self._planted, _with(everybodys, threshold), self._settings)
        return mean, choice

    def units(self, choice: Choice) -> list[tuple[F64, F64]]:
        """Features of own and of foreign units, of each half."""
        key = replace(choice, features=(), drift=0.0, hold_share=0.0, settled_share=0.0)
        if key not in self._units:
            plain = _plain(choice, self._settings)
            self._units[key] = [units(half, plain, self._settings, np.random.default_rng(0)) for half in self._halves]
        return self._units[key]

    def folds(self, choice: Choice) -> tuple[list[Fold], Rule]:
        """For each half of the users the rule of the other half, and the rule of everybody."""
        if not choice.features:
            rule = self._with_rise(_plain(choice, self._settings), choice.rise_share)
            return [(half, rule) for half in self._halves], rule
        one, other = self.units(choice)
        both = (np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]]))
        rules = [_rule(choice, self._settings, part) for part in (other, one)]
        return list(zip(self._halves, rules, strict=True)), _rule(choice, self._settings, both)

    def _with_rise(self, rule: Rule, rise_share: float) -> Rule:
        """The rule with a second statistic to which that share of the alarms is left."""
        if not rise_share:
            return rule
        if rule not in self._scales:
            alone = [(half, rule) for half in self._halves]
            threshold = _bisect(alone, self._settings, self._false_alarm_events / (1.0 - rise_share))
            low, high = _RISE_SCALES
            for _ in range(_RISE_STEPS):
                scale = math.sqrt(low * high)
                both = [(half, msgspec.structs.replace(rule, rise_scale=scale)) for half in self._halves]
                monitored_G, alarms_G = fold_tallies(both, threshold, self._settings)
                few = monitored_G.sum() >= alarms_G.sum() * self._false_alarm_events
                low, high = (scale, high) if few else (low, scale)
            self._scales[rule] = low
        return msgspec.structs.replace(rule, rise_scale=self._scales[rule])


def mean_delay(splices: Splices, rule: Rule, settings: ShiftSettings) -> float:
    """Mean events to an alarm after a made shift, at most the window each."""
    delay, counts = delays(splices, run(splices.runs, rule, settings).alert_B, settings.refractory_events)
    window = float(splices.window)
    return float(np.minimum(delay[counts], window).mean()) if counts.any() else window


def _joined(halves: Sequence[Histories]) -> Histories:
    """Two sets of users as one."""
    return Histories(
        user=np.concatenate([halves[0].user, halves[1].user + halves[0].users]),
        interest=np.concatenate([half.interest for half in halves]),
        time_ms=np.concatenate([half.time_ms for half in halves]),
        share=np.concatenate([half.share for half in halves]),
    )


# ---------------------------------------------------------------------- at an epoch cut

_FIRST_MONITORED = 1_000  # monitored events of shadow users before the first rule is made
_REFIT_GROWTH = 1.9  # times the events of the last fit: epochs double, less the records that could not be used
_TRACK_ALARMS = 8.0
_TRACK_STEP_MAX = 0.7  # nats at one cut


def next_rule(table: GroupTable, gathered: Tallies, settings: ShiftSettings) -> None:
    """Give a table at its cut the rule of the next epoch: fitted anew when the events have doubled, else tracked.

    Args:
        gathered: tallies of the epoch that ends.
    """
    wanted = table.wanted()
    settings = msgspec.structs.replace(settings, false_alarm_events=wanted)
    shadow = Histories.of(table.shadow, table)
    ages = np.diff(shadow.first)
    usable = ages >= settings.age_min_events + 10
    monitored = int(np.maximum(ages - settings.age_min_events, 0)[usable].sum())
    due = table.rule_epoch == 0 or table.events >= _REFIT_GROWTH * table.rule_epoch
    if due and monitored >= _FIRST_MONITORED and int(usable.sum()) >= FIT_USERS:
        tail = table.rule.tail
        table.rule = calibrate(shadow.some(usable), settings, np.random.default_rng(table.epoch))
        table.rule_epoch = table.events
        table.tallies = type(gathered).zeros()
        table.surges.offset *= tail / table.rule.tail  # as far wrong as the rule before, until it shows
    elif table.rule.false_alarm_events:
        table.rule = aimed(track(table.rule, gathered.monitored_G, gathered.alarms_G), wanted)


def aimed(rule: Rule, false_alarm_events: float) -> Rule:
    """The rule with its thresholds moved along the tail to another rate of alarms."""
    if false_alarm_events == rule.false_alarm_events:
        return rule
    step = math.log(false_alarm_events / rule.false_alarm_events) / rule.tail
    moved = _with(rule, np.maximum(rule.thresholds_G() + step, 0.05).tolist())
    return msgspec.structs.replace(moved, false_alarm_events=false_alarm_events)


def track(rule: Rule, monitored_G: I64, alarms_G: I64) -> Rule:
    """Thresholds moved against each other, so that all ages come nearer to one rate.

    What is wrong with all of them together is followed within the epoch, alarm by alarm: `Crowd.offset`.
    """
    expected_G = monitored_G / rule.false_alarm_events
    of_age = np.log((alarms_G + _TRACK_ALARMS) / (expected_G + _TRACK_ALARMS))
    of_all = math.log((float(alarms_G.sum()) + _TRACK_ALARMS) / (float(expected_G.sum()) + _TRACK_ALARMS))
    step = np.clip((of_age - of_all) / 2.0 / rule.tail, -_TRACK_STEP_MAX, _TRACK_STEP_MAX)
    return _with(rule, np.maximum(rule.thresholds_G() + step, 0.05).tolist())
