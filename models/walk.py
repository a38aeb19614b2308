"""The record of one user, byte for byte, and the compiled walk that changes it, event by event.

On the way of an event: `advance` (models/profile.py) hands a batch to `walk`. What lies in a record is what goes to the
`state` topic.

    record (USER dtype), see the comments there
      key            keyed hash of the user id, 0 = none
      hidden         GRU state after the user's last event (written by the network, not here)
      ring_*         the last RING events, circular: the newest is at (events - 1) % RING
      slow_*         the slow profile: up to PROFILE interests with exponentially decayed weights, as logarithms:
                     decay is a subtraction of integers, the same in a batch of any size
      tail           16-bit marks of what fell out of it lately: known, though not by how much
      detector       evidence, rise, session_*, level, spread, watch: 16 bytes
      averages, times, counters

Order within one event: end of the unit of evidence before (a session, or one event) -> what surges for everybody
enters what is usual -> evidence of the unit under way, from the record BEFORE the event -> alarm -> does an interest
surge? -> ring -> slow profile (unless held) -> averages -> is a forecast due?

Everything compiled is in this one file, constants included: the cache of the compiler sees no other.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from models.features import F32, I64, U8

F64 = npt.NDArray[np.float64]

AGE_EDGES = (40, 80, 160, 320, 640, 1_280)  # events; thresholds are kept by age of the user
RING = 16  # a power of two
PROFILE = 32
TAIL = 32
HIDDEN = 64

# A ring entry's type byte: 5 bits of type, 3 flags.
TYPE_MASK = 31
SESSION_START = 32
COUNTED = 64  # its evidence entered the detector: the first event of its interest in the unit
HELD = 128  # it has not entered the slow profile

# Bits of `user_flags`.
_DWELL_KNOWN = 1
_PRICE_KNOWN = 2

GAP_SCALE = 2_048.0  # ring_gap = round(GAP_SCALE * log2(1 + seconds))
WEIGHT_SCALE = 2_048.0  # slow_weight = round(WEIGHT_SCALE * log2(weight)) + _WEIGHT_BASE, 0 = free; see `weight_of`
_WEIGHT_BASE = 32_768.0  # so weights reach from 2^-16 to 2^16

# Why a forecast is due.
EMIT_EVERY, EMIT_TOP_CHANGED, EMIT_ALERT, EMIT_STALE = 1, 2, 4, 8

AGGREGATES = (
    "log_events",  # log(1 + events so far)
    "log_dwell",  # log(1 + mean dwell in seconds), recent events weigh more
    "log_price",  # mean log(1 + price), recent events weigh more
    "purchase_share",  # purchases / events
    "log_since_purchase",  # log(1 + seconds from the last purchase to the last event)
    "ring_browse",  # shares of the types among the events in the ring
    "ring_cart",
    "ring_purchase",
    "ring_other",
    "ring_same",  # share of the events in the ring that have the last one's interest
)
AGGREGATE_COUNT = len(AGGREGATES)
FEATURES = (  # of the unit of evidence under way: a session, or a single event
    "mean",  # sum / sqrt(distinct)
    "sum",  # log-likelihood ratios of its distinct interests, each less the drift
    "log_distinct",
    "known",  # share of its distinct interests that the slow profile knows
    "covered",  # sqrt of the share of the slow profile that they make up
    "log_learned",  # log(1 + decayed count of events in the slow profile)
    "usual",  # what the user's units usually come to
    "rarity",  # mean -log of its interests' shares among all users, in whole nats each
    "unusual",  # how far its mean lies above the user's level, in the user's spreads: what is beyond the first
    "settled",  # how far the user's level lies below that of most users: a usual visit says more of such a user
)
FEATURE_COUNT = len(FEATURES)


# What is known of one interest among all users, or in a segment, while it may surge: one row of `Crowd.rows`. Counted
# are adoptions: events by which a user comes to an interest that is new to it. A clock counts the adoptions of a scope.
SURGE = np.dtype(
    [
        ("usual", "<f8"),  # frozen: share of the scope's adoptions
        ("score", "<f8"),  # CUSUM of the log-likelihood ratio of SURGE_RATIO times the usual share, as of `at`
        ("recent", "<f8"),  # decayed count, as of `recent_at`
        ("lead", "<f8"),  # rows of all: how well the best segment alone explains the surge, nats
        ("at", "<i8"),  # the scope's clock
        ("recent_at", "<i8"),  # the clock of all
        ("since", "<i8"),  # the scope's clock when the score was last 0
        ("since_ms", "<i8"),  # event time of the first adoption since then
        ("count", "<u4"),  # adoptions since then
        ("alarm", "u1"),  # an alarm was raised, and the score has not been 0 since
        ("spare", "u1", (3,)),
    ]
)
# And of the scopes: 0 is all users, the others are the segments.
SCOPE = np.dtype([("recent", "<f8"), ("clock", "<i8"), ("recent_at", "<i8"), ("watched", "u1"), ("spare", "u1", (7,))])
SCOPES = 256


def user_dtype(ring: int = RING, profile: int = PROFILE, hidden: int = HIDDEN) -> np.dtype[Any]:
    """The record of one user. Field names are the format: blocks carry the field list and are migrated by name.

    Wide fields come first and the length is a multiple of 8, so that every field of every record is aligned.
    """
    layout: list[Any] = [
        ("key", "<u8"),
        ("first_time_ms", "<i8"),
        ("last_time_ms", "<i8"),  # of the newest event; a small step back in time does not turn it back
        ("last_purchase_ms", "<i8"),
        ("emitted_time_ms", "<i8"),  # event time of the last forecast
        ("hidden", "<f4", (hidden,)),
        ("ring_interest", "<u4", (ring,)),
        ("slow_interest", "<u4", (profile,)),  # 0 = free slot
        ("slow_total", "<f4"),  # decayed count of all events learned, also of interests that fell out of the profile
        ("evidence", "<f4"),  # W, the CUSUM over the units before the one under way
        ("mean_dwell_s", "<f4"),
        ("mean_log_price", "<f4"),
        ("events", "<u4"),
        ("emitted_interest", "<u4"),  # top interest by the cheap score when the last forecast was emitted
        ("emitted_event", "<u4"),  # `events` at that moment
        ("weights_version", "<u4"),  # of the network that wrote `hidden`
        ("block", "<u4"),  # number of the newest state block that holds this record
        ("dedupe", "<u4", (4,)),  # hashes of the last event ids, where deduplication is on
        ("rise", "<u2"),  # CUSUM of the events' ratios above the user's own mean, in 1/128 nats
        ("session_nats", "<i2"),  # ratios of the unit under way, summed over its distinct interests, in 1/64 nats
        ("ring_gap", "<u2", (ring,)),  # round(2048 * log2(1 + seconds since the user's event before)), clipped
        ("slow_weight", "<u2", (profile,)),  # logarithm of the decayed count, see `weight_of`; as of the last event
        ("tail", "<u2", (TAIL,)),  # marks of the interests that last fell out of the slow profile; 0 = none
        ("watch", "<i2"),  # n >= 0: events since the evidence was last 0; -n: events until evidence is gathered again
        ("alerts", "<u2"),
        ("purchases", "<u2"),
        ("ring_type", "u1", (ring,)),  # type and flags, see TYPE_MASK
        ("session_count", "u1"),  # distinct interests in the unit under way
        ("session_known", "u1"),  # those of them that the slow profile knows
        ("session_share", "u1"),  # share of the slow profile that the unit's interests make up, in 1/255
        ("session_rarity", "u1"),  # -log of the shares among all of the first 16 of them, summed in whole nats
        ("tail_next", "u1"),
        ("level", "i1"),  # what the user's units usually come to: running mean of FEATURES' mean, in 1/16 nats
        ("spread", "u1"),  # mean distance from it, in 1/16 nats, 0 = no unit yet; watching rises: the level's fraction
        ("user_flags", "u1"),
        ("segment", "u1"),
    ]
    size = np.dtype(layout).itemsize
    if size % 8:
        layout.append(("spare", "u1", (8 - size % 8,)))
    return np.dtype(layout)


USER = user_dtype()


@functools.cache
def user_dtype_of(profile: int) -> np.dtype[Any]:
    """The record with a slow profile of so many interests; 0 = PROFILE."""
    return user_dtype(profile=profile) if profile not in (0, PROFILE) else USER


# ---------------------------------------------------------------------- what the kernel takes and gives


class EventView(NamedTuple):
    """A batch as the kernel reads it."""

    user_row: Any
    interest: Any
    type: Any
    time_ms: Any
    price: Any
    dwell_s: Any
    segment: Any
    q_all: F64  # share of the event's interest among all users
    q_segment: F64  # and in the user's segment
    score: Any


class Out(NamedTuple):
    """What the kernel writes for each event."""

    ratio: F32
    evidence: F32
    alert: Any
    threshold: F32
    onset_events: I64
    emit: U8
    gap_s: F32
    aggregates: F32
    features: F32  # of length 0 where nobody wants them
    age: Any  # the user's events before this one
    from_segment: F32  # nats that what surges in the segment takes from the ratio
    from_all: F32  # and what surges for everybody
    surging: U8  # SURGING_* and ALARM_* bits of the event's interest, SUSPECT and CLEARED of the user


class Crowd(NamedTuple):
    """What all users do, and segments: rows of the batch's own interests; changed in place. Live events only.

    Attributes:
        live: False in a replay: nothing surges, thresholds stand.
        offset: of length 1: added to all thresholds; follows the alarms.
        step: nats by which one alarm moves it.
        share: of monitored events that are to raise an alarm; 0 = nothing is followed.
        bar: score that a surge's alarm takes.
        raised_event, raised_row: of length B: alarms of surges; `raised`: score, adoptions, adoptions of
            all interests since, event time of the first one.
        adopted: by row: adoptions in this batch.
    """

    live: bool
    row_all: Any
    row_segment: Any  # -1: no segment
    rows: Any  # SURGE
    scopes: Any  # SCOPE, of length SCOPES
    offset: F64
    step: float
    share: float
    bar: float
    raised_event: I64
    raised_row: I64
    raised: F64
    adopted: I64


class Room(NamedTuple):
    """Space for snapshots; the fields of Snapshot."""

    event_E: Any
    ring_interest_ER: Any
    ring_gap_ER: Any
    ring_type_ER: Any
    slow_interest_EP: Any
    slow_share_EP: Any
    slow_total_E: Any
    events_E: Any
    last_time_ms_E: Any
    aggregates_EA: Any
    held_E: Any


class Parameters(NamedTuple):
    """Settings and the rule in force, as plain numbers."""

    by_session: bool
    session_gap_ms: int
    unit_events: int
    decay_code: int
    decay: float
    kappa: float
    epsilon: float
    clip: float
    drift: float
    short_share: float
    age_min: int
    refractory: int
    hold_share: float
    hold_spreads: float
    kept_share: float
    usual_guarded: bool
    rise_scale: float
    policy: int
    max_events: int
    max_age_ms: int
    change_margin: float
    recent_decay: float
    coefficients_F: F64  # of FEATURES, then the constant


# ---------------------------------------------------------------------- the kernel

_AGE_EDGES = np.array(AGE_EDGES, np.int64)
_LAST = RING - 1
_SHARE_SCALE = 255.0
_RARITY_MAX = 15  # nats
_RARITY_COUNT = 16  # so that the sum fits a byte
_LEVEL_SCALE = 16.0
_LEVEL_RATE = 0.2
_SPREAD_RATE = 0.1
_SPREAD_FIRST = 24  # 1.5 nats: of a user without units
_SPREAD_MIN = 8  # half a nat: who always does the same has no spread at all
_UNUSUAL_FROM = 1.0  # spreads
_UNUSUAL_MAX = 4.0
_SETTLED_FROM = 3.5  # nats below 0
_NATS_SCALE = 64.0
_RISE_SCALE = 128.0
_RISE_DRIFT = 0.1  # nats an event
_MEAN_SCALE = 4_096.0  # level and spread together, where rises are watched
_MEAN_RATE = 0.02
_TAIL_WEIGHT = 0.25  # decayed count that a mark in the tail stands for
_KNOWN_WEIGHT = 0.5  # decayed count from which the slow profile knows an interest
_OFFSET_STEPS_MAX = 12.0  # alarms too many or too few that the thresholds answer for
_OFFSET_FADES_ALARMS = 20.0  # an alarm too many is forgotten after the events of so many
_THRESHOLD_MIN = 0.05
SURGING_ALL, SURGING_SEGMENT, ALARM_ALL, ALARM_SEGMENT = 1, 2, 4, 8
SUSPECT, CLEARED = 16, 32  # the user is under suspicion after the event; was so before it, and no longer after it
SURGE_RATIO = 4.0  # a surge makes an interest so many times likelier, or more: from 2.2 on the score rises
_SURGE_GAIN = math.log(SURGE_RATIO)
SURGE_GATE = 3.0  # score from which a surge enters what is usual, nats
SURGE_CAP = 5.0  # above the bar: a surge that is over is forgotten in time
RECENT_HALF_LIFE = 512.0  # adoptions of all
RECENT_TOTAL = RECENT_HALF_LIFE / math.log(2.0)  # what decayed counts add up to in the long run
_ADOPTED_WEIGHT = 1.0  # decayed count from which an interest is not new to a user
_SPAN_MIN = 8.0
_BACK_MS_MAX = 3_600_000  # a longer step back in time is a clock that was wrong before, and is followed


@numba.njit(cache=True, nogil=True, error_model="numpy")
def weight_of(code: int) -> float:
    """The decayed count that a slow_weight stands for; 0 for 0."""
    return math.exp2((code - _WEIGHT_BASE) / WEIGHT_SCALE) if code > 0 else 0.0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _code_of(weight: float) -> int:
    return int(min(65_535.0, max(1.0, round(WEIGHT_SCALE * math.log2(weight) + _WEIGHT_BASE))))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def gap_seconds(code: int) -> float:
    """Seconds that a ring_gap stands for."""
    return math.exp2(code / GAP_SCALE) - 1.0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _aggregate(user: Any, out_A: Any) -> None:
    events = int(user.events)
    out_A[0] = math.log1p(events)
    out_A[1] = math.log1p(user.mean_dwell_s) if user.user_flags & _DWELL_KNOWN else np.nan
    out_A[2] = user.mean_log_price if user.user_flags & _PRICE_KNOWN else np.nan
    out_A[3] = user.purchases / events if events else np.nan
    out_A[4] = np.nan
    if user.purchases > 0:
        out_A[4] = math.log1p(max(0, user.last_time_ms - user.last_purchase_ms) / 1000.0)
    n = min(events, RING)
    last = user.ring_interest[(events - 1) & _LAST]
    browse = cart = purchase = same = 0
    for i in range(n):
        kind = user.ring_type[i] & TYPE_MASK
        browse += kind == 1
        cart += kind == 2
        purchase += kind == 3
        same += user.ring_interest[i] == last
    if n:
        out_A[5] = browse / n
        out_A[6] = cart / n
        out_A[7] = purchase / n
        out_A[8] = (n - browse - cart - purchase) / n
        out_A[9] = same / n
    else:
        out_A[5:10] = np.nan


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _snapshot_bar(user: Any) -> int:
    """Weight code from which a slot enters a snapshot, which has room for PROFILE: 0 where all have room."""
    slots = len(user.slow_interest)
    return max(1, int(np.sort(user.slow_weight)[slots - PROFILE])) if slots > PROFILE else 0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _keep(user: Any, event: int, room: Any, e: int) -> None:
    """Write the record of user `u` as snapshot `e`."""
    events = int(user.events)
    held = 0
    room.event_E[e] = event
    for i in range(RING):
        if i < events:
            slot = (events - 1 - i) & _LAST
            held |= (1 << i) * (user.ring_type[slot] & HELD > 0)
            room.ring_interest_ER[e, i] = user.ring_interest[slot]
            room.ring_gap_ER[e, i] = user.ring_gap[slot]
            room.ring_type_ER[e, i] = user.ring_type[slot] & TYPE_MASK
        else:
            room.ring_interest_ER[e, i] = 0
            room.ring_gap_ER[e, i] = 0
            room.ring_type_ER[e, i] = 0
    total = max(user.slow_total, 1e-9)
    bar = _snapshot_bar(user)
    used = 0
    for p in range(len(user.slow_interest)):
        if user.slow_weight[p] >= bar and used < PROFILE:
            room.slow_interest_EP[e, used] = user.slow_interest[p]
            room.slow_share_EP[e, used] = min(1.0, weight_of(user.slow_weight[p]) / total)
            used += 1
    room.slow_interest_EP[e, used:] = 0
    room.slow_share_EP[e, used:] = 0.0
    room.slow_total_E[e] = user.slow_total
    room.events_E[e] = user.events
    room.last_time_ms_E[e] = user.last_time_ms
    room.held_E[e] = held
    _aggregate(user, room.aggregates_EA[e])


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _mark(interest: int) -> int:
    """A 16-bit mark of an interest, never 0; two interests share one in 65,535."""
    return max(1, ((int(interest) * 40_503) >> 8) & 65_535)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _slow_weight(user: Any, interest: int) -> float:
    """Decayed count of an interest, of one that fell out of the profile a constant."""
    for p in range(len(user.slow_interest)):
        if user.slow_interest[p] == interest:
            return float(weight_of(user.slow_weight[p]))
    mark = _mark(interest)
    for i in range(TAIL):
        if user.tail[i] == mark:
            return _TAIL_WEIGHT
    return 0.0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _learn_slow(user: Any, interest: int, weight: float) -> None:
    """Add `weight` to an interest of the slow profile; the lightest one makes room."""
    lightest = 0
    for p in range(len(user.slow_interest)):
        if user.slow_interest[p] == interest:
            user.slow_weight[p] = _code_of(weight_of(user.slow_weight[p]) + weight)
            user.slow_total += weight
            return
        if user.slow_weight[p] < user.slow_weight[lightest]:
            lightest = p
    user.slow_total += weight
    mark = _mark(interest)
    for i in range(TAIL):
        if user.tail[i] == mark:
            user.tail[i] = 0
            weight += _TAIL_WEIGHT
    if user.slow_interest[lightest] != 0:
        user.tail[user.tail_next] = _mark(user.slow_interest[lightest])
        user.tail_next = (int(user.tail_next) + 1) % TAIL
    user.slow_interest[lightest] = interest
    user.slow_weight[lightest] = _code_of(weight)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _decay_slow(user: Any, decay_code: int, decay: float) -> None:
    step = np.uint16(min(65_535, decay_code))
    gone = False
    for p in range(len(user.slow_interest)):
        code = user.slow_weight[p]
        left = np.uint16(code - min(code, step))
        gone |= (left == 0) & (code > 0)
        user.slow_weight[p] = left
    for p in range(len(user.slow_interest) if gone else 0):
        if user.slow_weight[p] == 0:
            user.slow_interest[p] = 0
    user.slow_total *= decay


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _counted_in_session(user: Any, interest: int) -> bool:
    """Whether the session under way has counted this interest, as far back as the ring reaches."""
    events = int(user.events)
    for i in range(min(events, RING)):
        slot = (events - 1 - i) & _LAST
        if user.ring_interest[slot] == interest:
            return True
        if user.ring_type[slot] & SESSION_START:
            return False
    return False


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _unit_is_full(user: Any, unit_events: int) -> bool:
    """Whether none of the last `unit_events` events began a unit, but for the oldest of them."""
    events = int(user.events)
    if unit_events > RING or events < unit_events:
        return False
    begun = 0
    for i in range(unit_events - 1):
        begun |= user.ring_type[(events - 1 - i) & _LAST] & SESSION_START
    return begun == 0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _short_share(user: Any, interest: int) -> float:
    n = min(int(user.events), RING)
    if n == 0:
        return 0.0
    hits = 0
    for i in range(n):
        hits += user.ring_interest[i] == interest
    return hits / n


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _ratio(
    user: Any, interest: int, weight: float, q_all: float, q_segment: float, p: Any, surge_all: float,
    surge_segment: float,
) -> tuple[float, float, float]:  # fmt: skip
    """log q1/q0 of an interest; q0 the slow profile shrunk to the segment, q1 the ring mixed with the population.

    Probability that surges add is in both. Also returned: what the segment's surge, and everybody's, take from the
    ratio; before clipping the three add up to the ratio of a user that knows of no surge.
    """
    n = user.slow_total
    q0 = (1.0 - p.epsilon) * (weight + p.kappa * q_segment) / (n + p.kappa) + p.epsilon * q_all
    q1 = q_all
    if p.short_share > 0.0:
        q1 = p.short_share * _short_share(user, interest) + (1.0 - p.short_share) * q_all
    from_all = from_segment = 0.0
    if surge_all > 0.0:
        q0_all = q0 + surge_all * (1.0 - q0)
        q1 += surge_all * (1.0 - q1)
        from_all = math.log(q0_all / q0)
        q0 = q0_all
    if surge_segment > 0.0:
        q0_segment = q0 + surge_segment * (1.0 - q0)
        q1 += surge_segment * (1.0 - q1)
        from_segment = math.log(q0_segment / q0)
        q0 = q0_segment
    return min(p.clip, max(-p.clip, math.log(q1 / q0))), from_segment, from_all


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _adopts(user: Any, interest: int, weight: float, gap_s: float, session_gap_s: float) -> bool:
    """Whether the user comes to an interest that is new to it. A visit longer than the ring counts no more: one user
    that does a thousand things an hour is not a crowd."""
    if weight >= _ADOPTED_WEIGHT:
        return False
    events = int(user.events)
    short = events < RING or gap_s > session_gap_s
    pause = GAP_SCALE * math.log2(1.0 + session_gap_s)
    for i in range(min(events, RING)):
        slot = (events - 1 - i) & _LAST
        if user.ring_interest[slot] == interest:
            return False
        short |= user.ring_gap[slot] > pause
    return short


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _surge_score(row: Any, clock: int) -> float:
    """The score as of now: it falls by itself while the interest does not come."""
    return float(row.score - (SURGE_RATIO - 1.0) * row.usual * (clock - row.at))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _recent(value: float, at: int, clock: int) -> float:
    return value * math.exp2(-(clock - at) / RECENT_HALF_LIFE)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _surge(row: Any, scope: Any, clock_all: int) -> float:
    """Probability that a surge adds to the interest in the scope; 0 while none is suspected."""
    if not scope.watched or _surge_score(row, scope.clock) < SURGE_GATE:
        return 0.0
    span = scope.clock - row.since
    if span < RECENT_TOTAL:
        rate = row.count / max(_SPAN_MIN, float(span))
    else:
        total = _recent(scope.recent, scope.recent_at, clock_all)
        rate = _recent(row.recent, row.recent_at, clock_all) / max(_SPAN_MIN, total)
    return float(min(0.9, max(0.0, rate - row.usual)))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _adopted(row: Any, scope: Any, clock_all: int, bar: float, time_ms: int) -> None:
    """One more adoption of the interest in the scope, whose clock has moved on."""
    score = _surge_score(row, scope.clock)
    if score <= 0.0:
        score = 0.0
        row.since = scope.clock - 1
        row.since_ms = time_ms
        row.count = 0
        row.alarm = 0
        row.lead = 0.0
    row.score = min(bar + SURGE_CAP, score + _SURGE_GAIN)
    row.at = scope.clock
    row.count += 1
    row.recent = _recent(row.recent, row.recent_at, clock_all) + 1.0
    row.recent_at = clock_all


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _tick(scope: Any, clock_all: int) -> None:
    scope.clock += 1
    scope.recent = _recent(scope.recent, scope.recent_at, clock_all) + 1.0
    scope.recent_at = clock_all


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _explained(count: float, expected: float) -> float:
    """Log-likelihood that a Poisson count gains by a rate of its own; 0 where there are not more than expected."""
    return count * math.log(count / expected) - (count - expected) if count > expected else 0.0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _learn_crowd(crowd: Any, b: int, segment: int, time_ms: int) -> int:
    """Count an adoption; the row of a surge whose alarm is raised by it, or -1.

    Where all and a segment are possible, the better explanation speaks: one rate for everybody, or the segment's alone.
    """
    everybody, row = crowd.scopes[0], crowd.rows[crowd.row_all[b]]
    crowd.adopted[crowd.row_all[b]] += 1
    _tick(everybody, everybody.clock + 1)
    clock = everybody.clock
    _adopted(row, everybody, clock, crowd.bar, time_ms)
    total = _recent(everybody.recent, everybody.recent_at, clock)
    of_all = _explained(row.recent, row.usual * total)
    of_segment = 0.0
    place = crowd.row_segment[b]
    if place >= 0:
        scope, own = crowd.scopes[segment], crowd.rows[place]
        crowd.adopted[place] += 1
        _tick(scope, clock)
        _adopted(own, scope, clock, crowd.bar, time_ms)
        if scope.watched:
            of_segment = _explained(own.recent, own.usual * _recent(scope.recent, scope.recent_at, clock))
            row.lead = max(row.lead, of_segment)
            if own.score > crowd.bar and of_segment > of_all and not own.alarm and not row.alarm:
                own.alarm = 1
                return int(place)
    if everybody.watched and row.score > crowd.bar and of_all >= row.lead and not row.alarm:
        row.alarm = 1
        return int(crowd.row_all[b])
    return -1


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _count(user: Any, ratio: float, weight: float, q_all: float) -> None:
    """A new distinct interest in the unit under way."""
    share = min(1.0, weight / max(user.slow_total, 1e-9))
    user.session_nats = int(min(32_767.0, max(-32_767.0, user.session_nats + round(ratio * _NATS_SCALE))))
    user.session_count += 1
    user.session_known += weight > _KNOWN_WEIGHT
    user.session_share = int(min(_SHARE_SCALE, int(user.session_share) + round(share * _SHARE_SCALE)))
    if user.session_count <= _RARITY_COUNT:
        user.session_rarity += min(_RARITY_MAX, round(-math.log(q_all)))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _session_sum(user: Any) -> float:
    """Ratios of the unit under way, nats."""
    return float(user.session_nats / _NATS_SCALE)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _mean_ratio(user: Any) -> float:
    """What the user's events usually come to, nats; kept where rises are watched."""
    return float((int(user.level) * 256 + int(user.spread)) / _MEAN_SCALE)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _learn_mean(user: Any, ratio: float) -> None:
    rate = max(_MEAN_RATE, 1.0 / (int(user.events) + 1.0))
    mean = _mean_ratio(user)
    code = round(min(32_767.0, max(-32_768.0, (mean + rate * (ratio - mean)) * _MEAN_SCALE)))
    user.level = code >> 8
    user.spread = code & 255


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _rise(user: Any, ratio: float) -> None:
    """The CUSUM of what the user's events come to, above the user's own mean."""
    risen = user.rise / _RISE_SCALE + ratio - _mean_ratio(user) - _RISE_DRIFT
    user.rise = round(min(65_535.0, max(0.0, risen * _RISE_SCALE)))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _spreads_above(user: Any) -> float:
    """How far the unit under way lies above what the user's units usually come to, in the user's own spreads."""
    count = max(1, int(user.session_count))
    spread = max(_SPREAD_MIN, int(user.spread)) if user.spread > 0 else _SPREAD_FIRST
    return float((_session_sum(user) / math.sqrt(count) * _LEVEL_SCALE - user.level) / spread)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _describe(user: Any, features_F: Any) -> None:
    """The features of the unit under way; see FEATURES."""
    count = max(1, int(user.session_count))
    features_F[0] = _session_sum(user) / math.sqrt(count)
    features_F[1] = _session_sum(user)
    features_F[2] = math.log(count)
    features_F[3] = user.session_known / count
    features_F[4] = math.sqrt(user.session_share / _SHARE_SCALE)
    features_F[5] = math.log1p(user.slow_total)
    features_F[6] = user.level / _LEVEL_SCALE
    features_F[7] = user.session_rarity / min(count, _RARITY_COUNT)
    features_F[8] = min(_UNUSUAL_MAX, max(0.0, _spreads_above(user) - _UNUSUAL_FROM))
    features_F[9] = max(0.0, -user.level / _LEVEL_SCALE - _SETTLED_FROM)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _value(user: Any, coefficients_F: Any, features_F: Any) -> float:
    """Evidence of the unit under way, by the rule in force; 0 while it is empty."""
    if user.session_count == 0:
        return 0.0
    _describe(user, features_F)
    value = coefficients_F[FEATURE_COUNT]
    for i in range(FEATURE_COUNT):
        value += coefficients_F[i] * features_F[i]
    return float(value)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _close(user: Any, typical: bool) -> None:
    """The unit under way is over: a typical one enters the user's level and spread. The next one is empty."""
    count = int(user.session_count)
    if count and typical:
        off = _session_sum(user) / math.sqrt(count) * _LEVEL_SCALE - user.level
        spread = int(user.spread) if user.spread > 0 else _SPREAD_FIRST
        user.spread = round(min(255.0, max(1.0, spread + _SPREAD_RATE * (min(255.0, abs(off)) - spread))))
        user.level = round(min(127.0, max(-127.0, user.level + _LEVEL_RATE * off)))
    user.session_nats = 0
    user.session_count = 0
    user.session_known = 0
    user.session_share = 0
    user.session_rarity = 0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _calm(user: Any, release: bool) -> None:
    """The evidence is 0: no suspicion; what was held back enters the slow profile after all."""
    events = int(user.events)
    for i in range(min(events, RING) if release else 0):
        slot = (events - 1 - i) & _LAST
        if user.ring_type[slot] & HELD:
            user.ring_type[slot] = user.ring_type[slot] & ~np.uint8(HELD)
            _learn_slow(user, user.ring_interest[slot], 1.0)
    user.watch = 0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _anchor_anew(user: Any, p: Any) -> None:
    """After an alarm the slow profile is what the user did since the onset, and a share of what it was before."""
    events = int(user.events)
    since = max(1, min(int(user.watch), min(events, RING)))
    if p.kept_share <= 0.0:
        user.tail[:] = 0
        for q in range(len(user.slow_interest)):
            user.slow_interest[q] = 0
            user.slow_weight[q] = 0
        user.slow_total = 0.0
    else:
        _decay_slow(user, round(-WEIGHT_SCALE * math.log2(p.kept_share)), p.kept_share)
    for i in range(min(events, RING)):
        slot = (events - 1 - i) & _LAST
        user.ring_type[slot] = user.ring_type[slot] & ~np.uint8(HELD)
        if i < since:
            _learn_slow(user, user.ring_interest[slot], 1.0)
    user.evidence = 0.0
    user.rise = 0
    _close(user, False)
    user.watch = -p.refractory
    user.alerts = min(65_535, int(user.alerts) + 1)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _push(user: Any, interest: int, kind: int, gap_s: float) -> None:
    slot = int(user.events) & _LAST
    user.ring_interest[slot] = interest
    user.ring_type[slot] = kind
    user.ring_gap[slot] = int(min(65_535.0, round(GAP_SCALE * math.log2(1.0 + gap_s))))
    user.events = min(4_294_967_295, int(user.events) + 1)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _average(user: Any, kind: int, time_ms: int, price: float, dwell_s: float) -> None:
    if math.isfinite(dwell_s):
        dwell = max(0.0, dwell_s)
        known = user.user_flags & _DWELL_KNOWN
        user.mean_dwell_s = 0.9 * user.mean_dwell_s + 0.1 * dwell if known else dwell
        user.user_flags |= _DWELL_KNOWN
    if math.isfinite(price):
        log_price = math.log1p(max(0.0, price))
        known = user.user_flags & _PRICE_KNOWN
        user.mean_log_price = 0.9 * user.mean_log_price + 0.1 * log_price if known else log_price
        user.user_flags |= _PRICE_KNOWN
    if kind == 3:
        user.purchases = min(65_535, int(user.purchases) + 1)
        user.last_purchase_ms = time_ms


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _overtakes(user: Any, interest: int, p: Any) -> bool:
    """Whether the newest interest is now clearly above the one last published, by recent weight.

    All weights decay alike and only the newest event's interest gains, so no other can overtake.
    """
    published = user.emitted_interest
    if interest == published:
        return False
    events = int(user.events)
    margin = -p.change_margin if published else 1.0
    weight = 1.0
    for i in range(min(events, RING)):
        seen = user.ring_interest[(events - 1 - i) & _LAST]
        if seen == interest:
            margin += weight
        elif seen == published:
            margin -= weight
        weight *= p.recent_decay
    return margin > 0.0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _due(user: Any, interest: int, time_ms: int, alert: bool, p: Any) -> int:
    if p.policy == 0:
        return EMIT_EVERY
    if p.policy == 3:
        return 0
    bits = 0
    events = int(user.events)
    if events - int(user.emitted_event) >= p.max_events or time_ms - user.emitted_time_ms >= p.max_age_ms:
        bits |= EMIT_STALE
    if p.policy == 1:
        if alert:
            bits |= EMIT_ALERT
        if _overtakes(user, interest, p):
            bits |= EMIT_TOP_CHANGED
            user.emitted_interest = interest
    if bits:
        user.emitted_event = events
        user.emitted_time_ms = time_ms
    return bits


@numba.njit(cache=True, nogil=True, error_model="numpy")
def walk(
    records: Any, events: Any, p: Any, thresholds_G: Any, out: Any, before: Any, after: Any, alarmed: Any,
    crowd: Any, monitored_G: Any, alarms_G: Any,
) -> tuple[int, int, int, int]:  # fmt: skip
    befores = afters = alarms = surges = 0
    features_F = np.zeros(FEATURE_COUNT)
    for b in range(len(events.interest)):
        user = records[events.user_row[b]]
        interest = events.interest[b]
        kind = int(events.type[b]) & TYPE_MASK
        age = int(user.events)
        watch = int(user.watch)
        if out.aggregates.shape[0] > 0:
            _aggregate(user, out.aggregates[b])
        if events.score[b]:
            _keep(user, b, before, befores)
            befores += 1

        # time: a small step back is lateness, a long one a clock that was wrong before
        time_ms = events.time_ms[b]
        gap_ms = time_ms - user.last_time_ms
        if age == 0:
            user.first_time_ms = time_ms
            gap_ms = 0
        else:
            out.gap_s[b] = max(0, gap_ms) / 1000.0
        if age == 0 or gap_ms > 0 or gap_ms < -_BACK_MS_MAX:
            user.last_time_ms = time_ms
        gap_s = max(0, gap_ms) / 1000.0
        starts = age == 0 or gap_ms > p.session_gap_ms or (p.by_session and _unit_is_full(user, p.unit_events))
        if events.segment[b]:
            user.segment = events.segment[b]

        # the unit before is over: its evidence stands
        if starts:
            kind |= SESSION_START
        monitored = age >= p.age_min and user.watch >= 0
        if starts or not p.by_session:
            if monitored:
                user.evidence = max(user.evidence, 0.0) + _value(user, p.coefficients_F, features_F)
                if p.rise_scale == 0.0:
                    user.rise = 0
                if user.evidence <= 0.0 and user.rise == 0:
                    _calm(user, p.hold_share >= 0.0 and _spreads_above(user) <= p.hold_spreads)
            group = np.searchsorted(_AGE_EDGES, age, side="right")
            threshold = max(_THRESHOLD_MIN, thresholds_G[group] + crowd.offset[0])
            usual = not p.usual_guarded or user.evidence <= p.hold_share * threshold
            _close(user, usual and p.rise_scale == 0.0)

        # what surges for everybody, or in the segment, enters what is usual
        surge_all = surge_segment = 0.0
        if crowd.live:
            clock = crowd.scopes[0].clock
            surge_all = _surge(crowd.rows[crowd.row_all[b]], crowd.scopes[0], clock)
            surging = (SURGING_ALL + ALARM_ALL * crowd.rows[crowd.row_all[b]].alarm) * (surge_all > 0.0)
            if crowd.row_segment[b] >= 0:
                own = crowd.rows[crowd.row_segment[b]]
                surge_segment = max(0.0, _surge(own, crowd.scopes[events.segment[b]], clock) - surge_all)
                surging += (SURGING_SEGMENT + ALARM_SEGMENT * own.alarm) * (surge_segment > 0.0)
            out.surging[b] = surging

        # evidence of the unit under way, from the record before this event
        weight = _slow_weight(user, interest)
        ratio, from_segment, from_all = _ratio(
            user, interest, weight, events.q_all[b], events.q_segment[b], p, surge_all, surge_segment
        )
        out.ratio[b] = ratio
        out.from_segment[b] = from_segment
        out.from_all[b] = from_all
        out.age[b] = age
        if user.session_count == 0 or (user.session_count < 255 and not _counted_in_session(user, interest)):
            kind |= COUNTED
            _count(user, ratio - p.drift, weight, events.q_all[b])
        evidence = 0.0
        if monitored:
            evidence = max(user.evidence, 0.0) + _value(user, p.coefficients_F, features_F)
            if p.rise_scale > 0.0:
                _rise(user, ratio)
                evidence = max(evidence, p.rise_scale * user.rise / _RISE_SCALE)
            if evidence > 0.0 or user.evidence > 0.0:
                user.watch = min(32_767, int(user.watch) + 1)
        elif user.watch < 0:
            user.watch += 1
            user.evidence = 0.0
            user.rise = 0
        if out.features.shape[0] > 0:
            _describe(user, out.features[b])
        out.evidence[b] = evidence
        out.onset_events[b] = max(0, int(user.watch))

        # alarm
        group = np.searchsorted(_AGE_EDGES, age, side="right")
        threshold = max(_THRESHOLD_MIN, thresholds_G[group] + crowd.offset[0])
        out.threshold[b] = threshold
        alert = monitored and evidence > threshold
        if monitored:
            monitored_G[group] += 1
            moved = crowd.offset[0] * (1.0 - crowd.share / _OFFSET_FADES_ALARMS)
            moved += crowd.step * ((1.0 if alert else 0.0) - crowd.share)
            most = _OFFSET_STEPS_MAX * crowd.step
            crowd.offset[0] = min(most, max(-most, moved))
        held = monitored and (evidence > p.hold_share * threshold or _spreads_above(user) > p.hold_spreads)
        if crowd.live and _adopts(user, interest, weight, gap_s, p.session_gap_ms / 1000.0):
            raised = _learn_crowd(crowd, b, events.segment[b], time_ms)
            if raised >= 0:
                crowd.raised_event[surges] = b
                crowd.raised_row[surges] = raised
                row = crowd.rows[raised]
                scope = crowd.scopes[0 if raised == crowd.row_all[b] else events.segment[b]]
                crowd.raised[surges, 0] = row.score
                crowd.raised[surges, 1] = row.count
                crowd.raised[surges, 2] = scope.clock - row.since
                crowd.raised[surges, 3] = row.since_ms
                surges += 1
        _push(user, interest, kind | HELD if held else kind, gap_s)
        if alert:
            out.alert[b] = True
            alarms_G[group] += 1
            _keep(user, b, alarmed, alarms)
            alarms += 1
            _anchor_anew(user, p)
        elif not held:
            if p.rise_scale > 0.0:
                _learn_mean(user, ratio)
            _decay_slow(user, p.decay_code, p.decay)
            _learn_slow(user, interest, 1.0)
        out.surging[b] |= SUSPECT * (out.onset_events[b] > 0) + CLEARED * (
            (watch > 0 or out.onset_events[b] > 0) and user.watch <= 0
        )
        _average(user, kind & TYPE_MASK, time_ms, events.price[b], events.dwell_s[b])

        bits = _due(user, interest, time_ms, alert, p)
        out.emit[b] = bits
        if bits:
            _keep(user, b, after, afters)
            afters += 1
    return befores, afters, alarms, surges
