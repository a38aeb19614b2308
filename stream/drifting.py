"""Drifts of what all users do, and of the forecasts' errors: what a batch adds, and what river's detectors find.

On the way of an event: after the forecasts were scored, in the partition that speaks for all alone (users are spread
over the partitions by their hash, so each is a fair sample). What is found stands in the batch's record of `metrics`,
so it is told exactly once; the worker counts and logs it from there. The streams are described in models/drifts.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from models.drifts import ERRORS, Found, StreamChange
from models.features import I64
from models.shift_groups import GroupTable
from stream import records as out
from stream.events import Decoded

_ROUND = 4


def drifts_of(
    groups: GroupTable, decoded: Decoded, scored: tuple[I64, npt.NDArray[np.int64]]
) -> tuple[list[out.Drift], list[StreamChange]]:
    """What a batch of the speaking partition shows, in the order of its events; `groups` is only read.

    Args:
        scored: places of the scored events, and the ranks of their interests in the forecasts made before them.
    """
    columns = decoded.columns
    found: list[Found] = []
    changes = []
    segments = [0, *np.unique(columns.segment[columns.segment > 0]).tolist()]
    for segment in segments:
        event_E = np.flatnonzero(columns.segment == segment) if segment else np.arange(len(columns))
        if len(event_E) and groups.watched(segment):
            beyond_E = groups.beyond(columns.interest[event_E], segment)
            more, change = groups.drifts.see(segment, beyond_E, event_E, columns.time_ms[event_E])
            found += more
            changes.append(change)
    event_E, rank_E = scored
    if len(event_E):
        error_E = np.where(rank_E > 0, 1.0 - 1.0 / np.maximum(rank_E, 1), 1.0)
        more, change = groups.drifts.see(ERRORS, error_E, event_E, columns.time_ms[event_E])
        found += more
        changes.append(change)
    return [_record(one, decoded) for one in sorted(found, key=lambda one: one.event)], changes


def _record(one: Found, decoded: Decoded) -> out.Drift:
    of_segment = 0 < one.stream < ERRORS
    return out.Drift(
        figure="forecast_error" if one.stream == ERRORS else "interests",
        scope="segment" if of_segment else "all",
        segment=(decoded.segments[one.event] or "") if of_segment else "",
        detector=one.detector,
        source=decoded.source(one.event),
        detected_at_ms=int(decoded.columns.time_ms[one.event]),
        onset_ms=one.onset_ms,
        onset_events=one.events,
        before=round(one.before, _ROUND),
        after=round(one.after, _ROUND),
    )
