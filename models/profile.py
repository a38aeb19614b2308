"""What is remembered of one user, byte for byte, and how one event changes it.

On the way of an event: after decoding, before the GRU. `advance` walks the events of one partition in offset order, in
compiled code; everything that judges an event is computed from the record BEFORE the event. What lies in a record is
what goes to the `state` topic.

    record (USER dtype), see the comments there
      key            keyed hash of the user id, 0 = none
      hidden         GRU state after the user's last event (written by the network, not here)
      ring_*         the last RING events, circular: the newest is at (events - 1) % RING
      slow_*         the slow profile: up to PROFILE interests with exponentially decayed weights, as logarithms:
                     decay is a subtraction of integers, the same in a batch of any size
      detector       14 bytes
      averages, times, counters

Order within one event: session boundary -> evidence -> alarm -> ring -> slow profile (unless held) -> averages ->
is a forecast due?
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from models.features import F32, I64, U8, U32, EventColumns
from models.shift import GroupTable, ShiftSettings
from models.shift_groups import AGE_EDGES, F64, LEVELS, LEVELS_PER_NAT, Tallies

RING = 16  # a power of two
PROFILE = 32
HIDDEN = 64

# A ring entry's type byte: 5 bits of type, 3 flags.
TYPE_MASK = 31
SESSION_START = 32
COUNTED = 64  # its evidence entered the detector
HELD = 128  # it has not entered the slow profile

# Bits of `user_flags`.
_DWELL_KNOWN = 1
_PRICE_KNOWN = 2

GAP_SCALE = 2_048.0  # ring_gap = round(GAP_SCALE * log2(1 + seconds))
WEIGHT_SCALE = 2_048.0  # slow_weight = round(WEIGHT_SCALE * log2(weight)) + _WEIGHT_BASE, 0 = free; see `weight_of`
_WEIGHT_BASE = 32_768.0  # so weights reach from 2^-16 to 2^16

# Why a forecast is due.
EMIT_EVERY, EMIT_TOP_CHANGED, EMIT_ALERT, EMIT_STALE = 1, 2, 4, 8
_EMISSION_NAMES = {EMIT_EVERY: "every", EMIT_TOP_CHANGED: "top-changed", EMIT_ALERT: "alert", EMIT_STALE: "stale"}
_POLICIES = {"every": 0, "on-change": 1, "interval": 2}

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
        ("evidence", "<f4"),  # W, the CUSUM: up to the last event (baskets) or up to the session before (clicks)
        ("session_sum", "<f4"),  # evidence of the session under way
        ("mean_dwell_s", "<f4"),
        ("mean_log_price", "<f4"),
        ("events", "<u4"),
        ("emitted_interest", "<u4"),  # top interest by the cheap score when the last forecast was emitted
        ("emitted_event", "<u4"),  # `events` at that moment
        ("weights_version", "<u4"),  # of the network that wrote `hidden`
        ("block", "<u4"),  # number of the newest state block that holds this record
        ("dedupe", "<u4", (4,)),  # hashes of the last event ids, where deduplication is on
        ("ring_gap", "<u2", (ring,)),  # round(2048 * log2(1 + seconds since the user's event before)), clipped
        ("slow_weight", "<u2", (profile,)),  # logarithm of the decayed count, see `weight_of`; as of the last event
        ("onset_events", "<u2"),  # events since the evidence was last 0
        ("refractory", "<u2"),  # events until the next alarm may come
        ("alerts", "<u2"),
        ("purchases", "<u2"),
        ("ring_type", "u1", (ring,)),  # type and flags, see TYPE_MASK
        ("session_count", "u1"),  # distinct interests counted in the session under way
        ("peak", "u1"),  # highest level of evidence that this excursion has been tallied for
        ("user_flags", "u1"),
        ("segment", "u1"),
    ]
    size = np.dtype(layout).itemsize
    if size % 8:
        layout.append(("spare", "u1", (8 - size % 8,)))
    return np.dtype(layout)


USER = user_dtype()


class EmissionSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a forecast is published."""

    policy: Annotated[
        Literal["every", "on-change", "interval"],
        Meta(
            description="every event; on-change: when the user's top interest changed, an alert fired, or the last "
            "forecast is stale; interval: only when it is stale"
        ),
    ] = "on-change"
    max_events: Annotated[
        int, Meta(description="a forecast is stale after this many events of the user", ge=1, le=2**31)
    ] = 50
    max_age_s: Annotated[
        float,
        Meta(description="a forecast is stale after this much event time at the user's next event, seconds", gt=0),
    ] = 86_400.0
    change_margin: Annotated[
        float,
        Meta(
            description="on-change: how much more recent weight the new top interest needs than the one last "
            "published, in events",
            ge=0,
        ),
    ] = 1.5
    recent_decay: Annotated[
        float, Meta(description="on-change: weight of an event relative to the next newer one, 0..1", gt=0, le=1)
    ] = 0.9


def emission_names(bits: int) -> list[str]:
    """Why a forecast was due, in words."""
    return [name for bit, name in _EMISSION_NAMES.items() if bits & bit]


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What a forecast or a reason needs of the users' records, for E events of a batch.

    Attributes:
        event_E: index of the event in the batch.
        ring_interest_ER, ring_gap_ER, ring_type_ER: the last events, NEWEST FIRST, 0 padded; min(events, RING) are
            used. The gap is the code of the record (`gap_seconds`), the type is without flags.
        slow_interest_EP, slow_share_EP: the slow profile in no order, 0 padded; weight / total weight.
        slow_total_E: decayed count of all events learned.
    """

    event_E: I64
    ring_interest_ER: U32
    ring_gap_ER: npt.NDArray[np.uint16]
    ring_type_ER: U8
    slow_interest_EP: U32
    slow_share_EP: F32
    slow_total_E: F32
    events_E: U32
    last_time_ms_E: I64
    aggregates_EA: F32

    def __len__(self) -> int:
        return len(self.event_E)

    def take(self, index: npt.NDArray[Any] | slice) -> Snapshot:
        """A subset of the events."""
        return Snapshot(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Advanced:
    """What the walk over a batch found out.

    Attributes:
        ratio_B: log-likelihood ratio of each event, shifted user against usual user, clipped; nats.
        evidence_B: the detector's evidence after the event; nats.
        alert_B: whether an alarm fired.
        threshold_B: the evidence that an alarm would have taken.
        onset_events_B: the user's events since the estimated onset, this one included; 0 = no suspicion.
        emit_B: why a forecast is due, EMIT_* bits; 0 = none is.
        gap_s_B: seconds since the user's event before, 0 for a step back in time, NaN for the first.
        aggregates_BA: see AGGREGATES; of the record before the event, NaN where unknown.
        before: records BEFORE the events with score_B.
        after: records AFTER the events with emit_B.
        alarmed: records at the events with alert_B: the ring holds the event, the slow profile is the old one.
        tallies: what calibration counts; see GroupTable.delta.
    """

    ratio_B: F32
    evidence_B: F32
    alert_B: npt.NDArray[np.bool_]
    threshold_B: F32
    onset_events_B: I64
    emit_B: U8
    gap_s_B: F32
    aggregates_BA: F32
    before: Snapshot
    after: Snapshot
    alarmed: Snapshot
    tallies: Tallies


def advance(
    records: npt.NDArray[Any],
    events: EventColumns,
    groups: GroupTable,
    settings: ShiftSettings,
    emission: EmissionSettings,
    score_B: npt.NDArray[np.bool_],
) -> Advanced:
    """Walk the events of ONE partition in offset order; `records` is changed in place, `groups` is only read.

    Args:
        records: USER records of the batch's users, the batch's own copy; `events.user_row` points into it.
        score_B: the events for which a snapshot of the record before them is wanted.
    """
    count = len(events)
    all_B, segment_B = groups.shares(events.interest, events.segment)
    columns = _Events(
        **{name: getattr(events, name) for name in _EVENT_FIELDS},
        q_all=all_B,
        q_segment=segment_B,
        score=np.ascontiguousarray(score_B, np.bool_),
    )
    out = _Out(
        ratio=np.zeros(count, np.float32),
        evidence=np.zeros(count, np.float32),
        alert=np.zeros(count, np.bool_),
        threshold=np.zeros(count, np.float32),
        onset_events=np.zeros(count, np.int64),
        emit=np.zeros(count, np.uint8),
        gap_s=np.full(count, np.nan, np.float32),
        aggregates=np.empty((count, AGGREGATE_COUNT), np.float32),
    )
    tallies = Tallies.zeros()
    snapshots = [_room(count if score_B.any() else 0), _room(count), _room(count)]
    walk: Any = _walk  # a compiled function has no signature that mypy could read
    used = walk(
        records,
        columns,
        _parameters(settings, emission, groups),
        groups.thresholds(),
        out,
        *snapshots,
        tallies.reached_GL,
        tallies.monitored_G,
        tallies.alarms_G,
        tallies.pairs,
    )
    before, after, alarmed = (
        Snapshot(**{name: value[:n] for name, value in zip(_SNAPSHOT_FIELDS, room, strict=True)})
        for room, n in zip(snapshots, used, strict=True)
    )
    return Advanced(
        ratio_B=out.ratio,
        evidence_B=out.evidence,
        alert_B=out.alert,
        threshold_B=out.threshold,
        onset_events_B=out.onset_events,
        emit_B=out.emit,
        gap_s_B=out.gap_s,
        aggregates_BA=out.aggregates,
        before=before,
        after=after,
        alarmed=alarmed,
        tallies=tallies,
    )


# ---------------------------------------------------------------------- what the kernel takes

_EVENT_FIELDS = ("user_row", "interest", "type", "time_ms", "price", "dwell_s", "segment")
_SNAPSHOT_FIELDS = tuple(f.name for f in fields(Snapshot))


class _Events(NamedTuple):
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


class _Out(NamedTuple):
    ratio: F32
    evidence: F32
    alert: Any
    threshold: F32
    onset_events: I64
    emit: U8
    gap_s: F32
    aggregates: F32


class _Room(NamedTuple):
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


class _Parameters(NamedTuple):
    by_session: bool
    session_gap_ms: int
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
    policy: int
    max_events: int
    max_age_ms: int
    change_margin: float
    recent_decay: float


def _room(count: int) -> _Room:
    """Space for up to `count` snapshots; untouched memory costs nothing."""
    return _Room(
        event_E=np.empty(count, np.int64),
        ring_interest_ER=np.empty((count, RING), np.uint32),
        ring_gap_ER=np.empty((count, RING), np.uint16),
        ring_type_ER=np.empty((count, RING), np.uint8),
        slow_interest_EP=np.empty((count, PROFILE), np.uint32),
        slow_share_EP=np.empty((count, PROFILE), np.float32),
        slow_total_E=np.empty(count, np.float32),
        events_E=np.empty(count, np.uint32),
        last_time_ms_E=np.empty(count, np.int64),
        aggregates_EA=np.empty((count, AGGREGATE_COUNT), np.float32),
    )


def _parameters(settings: ShiftSettings, emission: EmissionSettings, groups: GroupTable) -> _Parameters:
    decay_code = max(1, round(WEIGHT_SCALE / settings.slow_half_life_events))
    return _Parameters(
        by_session=groups.by_session(),
        session_gap_ms=int(settings.session_gap_s * 1_000),
        decay_code=decay_code,
        decay=2.0 ** (-decay_code / WEIGHT_SCALE),
        kappa=settings.kappa,
        epsilon=settings.epsilon,
        clip=settings.ratio_clip,
        drift=settings.drift,
        short_share=settings.short_share,
        age_min=settings.age_min_events,
        refractory=settings.refractory_events,
        hold_share=settings.hold_share,
        policy=_POLICIES[emission.policy],
        max_events=emission.max_events,
        max_age_ms=int(emission.max_age_s * 1_000),
        change_margin=emission.change_margin,
        recent_decay=emission.recent_decay,
    )


# ---------------------------------------------------------------------- the kernel (one file: its cache knows no other)

_AGE_EDGES = np.array(AGE_EDGES, np.int64)
_LAST = RING - 1
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
def _keep(user: Any, event: int, room: Any, e: int) -> None:
    """Write the record of user `u` as snapshot `e`."""
    events = int(user.events)
    room.event_E[e] = event
    for i in range(RING):
        if i < events:
            slot = (events - 1 - i) & _LAST
            room.ring_interest_ER[e, i] = user.ring_interest[slot]
            room.ring_gap_ER[e, i] = user.ring_gap[slot]
            room.ring_type_ER[e, i] = user.ring_type[slot] & TYPE_MASK
        else:
            room.ring_interest_ER[e, i] = 0
            room.ring_gap_ER[e, i] = 0
            room.ring_type_ER[e, i] = 0
    total = max(user.slow_total, 1e-9)
    for p in range(PROFILE):
        room.slow_interest_EP[e, p] = user.slow_interest[p]
        room.slow_share_EP[e, p] = min(1.0, weight_of(user.slow_weight[p]) / total)
    room.slow_total_E[e] = user.slow_total
    room.events_E[e] = user.events
    room.last_time_ms_E[e] = user.last_time_ms
    _aggregate(user, room.aggregates_EA[e])


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _slow_weight(user: Any, interest: int) -> float:
    for p in range(PROFILE):
        if user.slow_interest[p] == interest:
            return float(weight_of(user.slow_weight[p]))
    return 0.0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _learn_slow(user: Any, interest: int, weight: float) -> None:
    """Add `weight` to an interest of the slow profile; the lightest one makes room."""
    lightest = 0
    for p in range(PROFILE):
        if user.slow_interest[p] == interest:
            user.slow_weight[p] = _code_of(weight_of(user.slow_weight[p]) + weight)
            user.slow_total += weight
            return
        if user.slow_weight[p] < user.slow_weight[lightest]:
            lightest = p
    user.slow_interest[lightest] = interest
    user.slow_weight[lightest] = _code_of(weight)
    user.slow_total += weight


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _decay_slow(user: Any, decay_code: int, decay: float) -> None:
    for p in range(PROFILE):
        code = int(user.slow_weight[p])
        if code > decay_code:
            user.slow_weight[p] = code - decay_code
        elif code > 0:
            user.slow_weight[p] = 0
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
def _short_share(user: Any, interest: int) -> float:
    n = min(int(user.events), RING)
    if n == 0:
        return 0.0
    hits = 0
    for i in range(n):
        hits += user.ring_interest[i] == interest
    return hits / n


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _ratio(user: Any, interest: int, q_all: float, q_segment: float, p: Any) -> float:
    """log q1/q0 of an interest; q0 the slow profile shrunk to the segment, q1 the ring mixed with the population."""
    n = user.slow_total
    weight = _slow_weight(user, interest)
    q0 = (1.0 - p.epsilon) * (weight + p.kappa * q_segment) / (n + p.kappa) + p.epsilon * q_all
    q1 = q_all
    if p.short_share > 0.0:
        q1 = p.short_share * _short_share(user, interest) + (1.0 - p.short_share) * q_all
    return float(min(p.clip, max(-p.clip, math.log(q1 / q0))))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _session_value(user: Any) -> float:
    count = int(user.session_count)
    return float(user.session_sum) / math.sqrt(count) if count else 0.0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _calm(user: Any) -> None:
    """The evidence is 0: no suspicion; what was held back enters the slow profile after all."""
    events = int(user.events)
    for i in range(min(events, RING)):
        slot = (events - 1 - i) & _LAST
        if user.ring_type[slot] & HELD:
            user.ring_type[slot] = user.ring_type[slot] & ~np.uint8(HELD)
            _learn_slow(user, user.ring_interest[slot], 1.0)
    user.onset_events = 0
    user.peak = 0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _anchor_anew(user: Any, refractory: int) -> None:
    """After an alarm the slow profile is what the user did since the onset; the detector starts afresh."""
    events = int(user.events)
    since = max(1, min(int(user.onset_events), min(events, RING)))
    for q in range(PROFILE):
        user.slow_interest[q] = 0
        user.slow_weight[q] = 0
    user.slow_total = 0.0
    for i in range(min(events, RING)):
        slot = (events - 1 - i) & _LAST
        user.ring_type[slot] = user.ring_type[slot] & ~np.uint8(HELD)
        if i < since:
            _learn_slow(user, user.ring_interest[slot], 1.0)
    user.evidence = 0.0
    user.session_sum = 0.0
    user.session_count = 0
    user.onset_events = 0
    user.peak = 0
    user.refractory = refractory
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
def _walk(
    records: Any, events: Any, p: Any, thresholds_G: Any, out: Any, before: Any, after: Any, alarmed: Any,
    reached_GL: Any, monitored_G: Any, alarms_G: Any, pairs: Any,
) -> tuple[int, int, int]:  # fmt: skip
    befores = afters = alarms = 0
    for b in range(len(events.interest)):
        user = records[events.user_row[b]]
        interest = events.interest[b]
        kind = int(events.type[b]) & TYPE_MASK
        age = int(user.events)
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
        starts = age == 0 or gap_ms > p.session_gap_ms
        if not starts:
            pairs[0] += 1
            pairs[1] += user.ring_interest[(age - 1) & _LAST] == interest
        if events.segment[b]:
            user.segment = events.segment[b]

        # the session before is over: its evidence stands
        if starts:
            kind |= SESSION_START
            if p.by_session:
                user.evidence = max(user.evidence, 0.0) + _session_value(user)
                if user.evidence <= 0.0:
                    _calm(user)
            user.session_sum = 0.0
            user.session_count = 0

        # evidence of this event, from the record before it
        ratio = _ratio(user, interest, events.q_all[b], events.q_segment[b], p)
        out.ratio[b] = ratio
        monitored = age >= p.age_min and user.refractory == 0
        evidence = 0.0
        if monitored:
            if p.by_session:
                if user.session_count < 255 and not _counted_in_session(user, interest):
                    kind |= COUNTED
                    user.session_sum += ratio - p.drift
                    user.session_count += 1
                evidence = max(user.evidence, 0.0) + _session_value(user)
            else:
                kind |= COUNTED
                evidence = max(user.evidence, 0.0) + ratio - p.drift
                user.evidence = evidence
                if evidence <= 0.0:
                    _calm(user)
            if evidence > 0.0 or user.evidence > 0.0:
                user.onset_events = min(65_535, int(user.onset_events) + 1)
        elif user.refractory > 0:
            user.refractory -= 1
        out.evidence[b] = evidence
        out.onset_events[b] = user.onset_events

        # alarm
        group = np.searchsorted(_AGE_EDGES, age, side="right")
        threshold = thresholds_G[group]
        out.threshold[b] = threshold
        alert = False
        if monitored:
            monitored_G[group] += 1
            level = int(min(LEVELS - 1.0, max(0.0, evidence * LEVELS_PER_NAT)))
            for reached in range(int(user.peak) + 1, level + 1):
                reached_GL[group, reached] += 1
            if level > user.peak:
                user.peak = level
            alert = evidence > threshold

        held = monitored and evidence > p.hold_share * threshold
        _push(user, interest, kind | HELD if held else kind, gap_s)
        if alert:
            out.alert[b] = True
            alarms_G[group] += 1
            _keep(user, b, alarmed, alarms)
            alarms += 1
            _anchor_anew(user, p.refractory)
        elif not held:
            _decay_slow(user, p.decay_code, p.decay)
            _learn_slow(user, interest, 1.0)
        _average(user, kind & TYPE_MASK, time_ms, events.price[b], events.dwell_s[b])

        bits = _due(user, interest, time_ms, alert, p)
        out.emit[b] = bits
        if bits:
            _keep(user, b, after, afters)
            afters += 1
    return befores, afters, alarms
