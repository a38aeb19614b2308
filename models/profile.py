"""A user's profile: what a batch of events does to the records of its users.

On the way of an event: after decoding, before the GRU. `advance` walks the events of one partition in offset order, in
compiled code (models/walk.py, which also holds the layout of a record); everything that judges an event is computed
from the record BEFORE the event.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from models.features import F32, I64, U8, U32, U64, EventColumns
from models.shift import GroupTable, ShiftSettings
from models.shift_groups import SHADOW_BITS, Tallies
from models.shift_rule import Rule
from models.surges import Surge, raised, still
from models.walk import (
    AGGREGATE_COUNT,
    AGGREGATES,
    EMIT_ALERT,
    EMIT_EVERY,
    EMIT_STALE,
    EMIT_TOP_CHANGED,
    F64,
    FEATURE_COUNT,
    HIDDEN,
    PROFILE,
    RING,
    TYPE_MASK,
    USER,
    WEIGHT_SCALE,
    Crowd,
    EventView,
    Out,
    Parameters,
    Room,
    gap_seconds,
    user_dtype,
    user_dtype_of,
    walk,
    weight_of,
)

__all__ = [
    "AGGREGATES", "AGGREGATE_COUNT", "EMIT_ALERT", "EMIT_EVERY", "EMIT_STALE", "EMIT_TOP_CHANGED", "HIDDEN", "PROFILE",
    "RING", "TYPE_MASK", "USER", "Advanced", "EmissionSettings", "Snapshot", "advance", "emission_names", "gap_seconds",
    "replay", "user_dtype", "user_dtype_of", "weight_of",
]  # fmt: skip

_EMISSION_NAMES = {EMIT_EVERY: "every", EMIT_TOP_CHANGED: "top-changed", EMIT_ALERT: "alert", EMIT_STALE: "stale"}
_POLICIES = {"every": 0, "on-change": 1, "interval": 2}
_NEVER = 3  # a replay publishes nothing


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
        held_E: bit i is set where the i-th newest event has not entered the slow profile.
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
    held_E: npt.NDArray[np.uint16]

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
        aggregates_BA: see AGGREGATES; of the record before the event, NaN where unknown; none in a replay.
        before: records BEFORE the events with score_B.
        after: records AFTER the events with emit_B.
        alarmed: records at the events with alert_B: the ring holds the event, the slow profile is the old one.
        tallies: what calibration counts; see GroupTable.delta.
        shadow_E, shadow_key_E: events of the users whose histories calibration keeps, and those users' keys.
        features_BF: of the unit of evidence under way, where asked for; else of length 0.
        age_B: the user's events before this one.
        from_segment_B, from_all_B: nats of the ratio that surges of the segment, and of all, account for.
        surging_B: SURGING_* and ALARM_* bits of models/walk.py, of the event's interest.
        surges: alarms of surges.
        crowd_keys_K, crowd: what the batch does to the table's surges; None in a replay.
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
    shadow_E: I64
    shadow_key_E: U64
    features_BF: F32
    age_B: I64
    from_segment_B: F32
    from_all_B: F32
    surging_B: U8
    surges: list[Surge]
    crowd_keys_K: U64
    crowd: Crowd | None


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
    all_B, segment_B = groups.shares(events.interest, events.segment)
    key_B = records["key"][events.user_row]
    crowd = groups.crowd(events.interest, events.segment)
    shadow_E = np.flatnonzero((key_B >> np.uint64(64 - SHADOW_BITS)) < groups.shadow_limit)
    return _walk(
        records,
        events,
        all_B,
        segment_B,
        score_B,
        _parameters(settings, groups.rule, emission),
        groups.rule,
        (shadow_E, key_B[shadow_E]),
        crowd=crowd,
    )


def replay(
    records: npt.NDArray[Any],
    events: EventColumns,
    all_B: F64,
    rule: Rule,
    settings: ShiftSettings,
    *,
    features: bool = False,
) -> Advanced:
    """The walk without forecasts, under any rule: for calibration and evaluation. `records` is changed in place.

    Args:
        all_B: share of each event's interest among all users.
    """
    none = (np.zeros(0, np.int64), np.zeros(0, np.uint64))
    score_B = np.zeros(len(events), np.bool_)
    return _walk(
        records, events, all_B, all_B, score_B, _parameters(settings, rule, None), rule, none, features=features
    )


def _walk(
    records: npt.NDArray[Any],
    events: EventColumns,
    all_B: F64,
    segment_B: F64,
    score_B: npt.NDArray[np.bool_],
    parameters: Parameters,
    rule: Rule,
    shadow: tuple[I64, U64],
    *,
    features: bool = False,
    crowd: tuple[U64, Crowd] | None = None,
) -> Advanced:
    count = len(events)
    crowd_keys_K, moving = crowd or (np.zeros(0, np.uint64), still())
    view = EventView(
        **{name: getattr(events, name) for name in _EVENT_FIELDS},
        q_all=all_B,
        q_segment=segment_B,
        score=np.ascontiguousarray(score_B, np.bool_),
    )
    out = Out(
        ratio=np.zeros(count, np.float32),
        evidence=np.zeros(count, np.float32),
        alert=np.zeros(count, np.bool_),
        threshold=np.zeros(count, np.float32),
        onset_events=np.zeros(count, np.int64),
        emit=np.zeros(count, np.uint8),
        gap_s=np.full(count, np.nan, np.float32),
        aggregates=np.empty((count if parameters.policy != _NEVER else 0, AGGREGATE_COUNT), np.float32),
        features=np.empty((count if features else 0, FEATURE_COUNT), np.float32),
        age=np.zeros(count, np.int64),
        from_segment=np.zeros(count, np.float32),
        from_all=np.zeros(count, np.float32),
        surging=np.zeros(count, np.uint8),
    )
    tallies = Tallies.zeros()
    snapshots = [_room(count if score_B.any() else 0), _room(count), _room(count)]
    compiled: Any = walk  # a compiled function has no signature that mypy could read
    used = compiled(
        records,
        view,
        parameters,
        rule.thresholds_G(),
        out,
        *snapshots,
        moving,
        tallies.monitored_G,
        tallies.alarms_G,
    )
    before, after, alarmed = (
        Snapshot(**{name: value[:n] for name, value in zip(_SNAPSHOT_FIELDS, room, strict=True)})
        for room, n in zip(snapshots, used[:3], strict=True)
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
        shadow_E=shadow[0],
        shadow_key_E=shadow[1],
        features_BF=out.features,
        age_B=out.age,
        from_segment_B=out.from_segment,
        from_all_B=out.from_all,
        surging_B=out.surging,
        surges=raised(moving, used[3], crowd_keys_K),
        crowd_keys_K=crowd_keys_K,
        crowd=moving if crowd else None,
    )


_EVENT_FIELDS = ("user_row", "interest", "type", "time_ms", "price", "dwell_s", "segment")
_SNAPSHOT_FIELDS = tuple(f.name for f in fields(Snapshot))


def _room(count: int) -> Room:
    """Space for up to `count` snapshots; untouched memory costs nothing."""
    return Room(
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
        held_E=np.empty(count, np.uint16),
    )


def _parameters(settings: ShiftSettings, rule: Rule, emission: EmissionSettings | None) -> Parameters:
    decay_code = max(1, round(WEIGHT_SCALE / rule.half_life_events))
    due = emission or EmissionSettings()
    return Parameters(
        by_session=rule.by_session,
        session_gap_ms=int(settings.session_gap_s * 1_000),
        unit_events=rule.unit_events,
        decay_code=decay_code,
        decay=2.0 ** (-decay_code / WEIGHT_SCALE),
        kappa=rule.kappa,
        epsilon=settings.epsilon,
        clip=settings.ratio_clip,
        drift=rule.drift,
        short_share=rule.short_share,
        age_min=settings.age_min_events,
        refractory=settings.refractory_events,
        hold_share=rule.hold_share,
        hold_spreads=rule.hold_spreads,
        kept_share=rule.kept_share,
        usual_guarded=rule.usual_guarded,
        rise_scale=rule.rise_scale,
        policy=_POLICIES[due.policy] if emission else _NEVER,
        max_events=due.max_events,
        max_age_ms=int(due.max_age_s * 1_000),
        change_margin=due.change_margin,
        recent_decay=due.recent_decay,
        coefficients_F=rule.coefficients_F(),
    )
