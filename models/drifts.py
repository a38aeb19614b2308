"""river's change detectors on what all users do: do interests drift, and do the forecasts get worse?

On the way of an event: a part of the group table of the partition that speaks for all (stream/drifting.py). Watched are
means over slices of SLICE events in the order of the partition; ADWIN sees any change of the mean, Page-Hinkley a rise.
Where one fires, the stream begins anew.

    interests   -log share of each event's interest, less what it is on average: nats beyond the long run, whose shares
                are frozen in an epoch; 0 while nothing changes, also for a shop that is still learned
    errors      1 - 1 / rank of each scored event's interest in the forecast made before it

Kept are the means of the slices, not the detectors: those are made again by telling them the same means, so that a
restored table goes on as the one that lived. Sums are of integers: any cut into batches gives the same.
Source: ADWIN, Bifet and Gavalda 2007; Page-Hinkley, Page 1954.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from models.features import I64

SLICE = 256  # events
WATCHED_MIN = 2_000.0  # decayed events of a group before its long run is one
ERRORS = 256  # the stream of the forecasts' errors; 0 is all users, 1..255 the segments
SCALE = float(1 << 20)
_SLICES_MAX = 512  # kept of a stream; then the older half goes
_SLICES_MIN = 8  # before a detector says anything
_DELTA = 0.002
_RISES = {False: (0.1, 10.0), True: (0.01, 0.5)}  # Page-Hinkley, of interests and of errors: rise forgotten, its sum

F64 = npt.NDArray[np.float64]


class StreamChange(msgspec.Struct, array_like=True):
    """One stream after a batch: `dropped` of its slices went, others came."""

    stream: int
    total: int
    count: int
    began_ms: int
    dropped: int
    sums: list[int]
    began: list[int]


@dataclass(kw_only=True, slots=True)
class _Stream:
    """Sums of finished slices, when each began, and the slice under way."""

    total: int = 0
    count: int = 0
    began_ms: int = 0
    sums: list[int] = field(default_factory=list)
    began: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A drift.

    Attributes:
        event: index in the batch of the event at which it was seen.
        detector: adwin or page_hinkley.
        onset_ms: event time at which the first slice since the estimated change began.
        events: of the stream since then.
        before, after: means of the stream.
    """

    stream: int
    event: int
    detector: str
    onset_ms: int
    events: int
    before: float
    after: float


class Drifts:
    """The streams of one partition.

    Example:
        >>> drifts, calm, risen = Drifts(), np.zeros(64 * 256), np.full(64 * 256, 0.5)
        >>> where = np.arange(64 * 256)
        >>> found, change = drifts.see(0, calm, where, where)
        >>> drifts.apply([change])
        >>> found, change = drifts.see(0, risen, where, where)
        >>> found[0].detector, found[0].before, found[0].after, found[0].onset_ms
        ('adwin', 0.0, 0.5, 0)
    """

    def __init__(self) -> None:
        self._streams: dict[int, _Stream] = {}

    def see(self, stream: int, value_E: F64, event_E: I64, time_ms_E: I64) -> tuple[list[Found], StreamChange]:
        """What a batch adds to a stream; this object stays as it is.

        Args:
            value_E: one finite number for each event, in the order of the partition.
            event_E: its place in the batch; `time_ms_E` its event time.
        """
        was = self._streams.get(stream, _Stream())
        now = _Stream(total=was.total, count=was.count, began_ms=was.began_ms, sums=list(was.sums))
        now.began = list(was.began)
        whole_E = np.rint(value_E * SCALE).astype(np.int64)
        detectors: Mapping[str, Any] | None = None
        found: list[Found] = []
        fresh, dropped, begin = len(was.sums), 0, 0
        while begin < len(whole_E):
            end = min(len(whole_E), begin + SLICE - now.count)
            if not now.count:
                now.began_ms = int(time_ms_E[begin])
            now.total += int(whole_E[begin:end].sum())
            now.count += end - begin
            begin = end
            if now.count < SLICE:
                break
            detectors = detectors or _detectors(stream, now.sums)
            now.sums.append(now.total)
            now.began.append(now.began_ms)
            now.total = now.count = 0
            fired = _tell(detectors, now.sums[-1])
            found += [_found(stream, int(event_E[end - 1]), name, now) for name in fired]
            gone = len(now.sums) if fired else _SLICES_MAX // 2 if len(now.sums) == _SLICES_MAX else 0
            if gone:
                del now.sums[:gone], now.began[:gone]
                dropped, fresh = dropped + min(gone, fresh), max(0, fresh - gone)
                detectors = None
        change = StreamChange(stream, now.total, now.count, now.began_ms, dropped, now.sums[fresh:], now.began[fresh:])
        return found, change

    def apply(self, changes: Sequence[StreamChange]) -> None:
        """Take committed changes over."""
        for change in changes:
            mine = self._streams.setdefault(change.stream, _Stream())
            mine.total, mine.count, mine.began_ms = change.total, change.count, change.began_ms
            mine.sums = mine.sums[change.dropped :] + change.sums
            mine.began = mine.began[change.dropped :] + change.began

    def dump(self) -> list[StreamChange]:
        """Everything."""
        return [
            StreamChange(number, s.total, s.count, s.began_ms, 0, s.sums, s.began)
            for number, s in sorted(self._streams.items())
        ]

    @staticmethod
    def load(saved: Sequence[StreamChange]) -> Drifts:
        """What `dump` wrote."""
        drifts = Drifts()
        drifts.apply(saved)
        return drifts


def _detectors(stream: int, sums: Sequence[int]) -> Mapping[str, Any]:
    """Fresh detectors that were told these sums."""
    from river.drift import ADWIN, PageHinkley  # here: only who speaks for all needs river, and it takes a second

    adaptive: Any = ADWIN  # its signature has no types
    rise, most = _RISES[stream == ERRORS]
    made = {
        "adwin": adaptive(delta=_DELTA, grace_period=_SLICES_MIN, clock=1, min_window_length=_SLICES_MIN // 2),
        "page_hinkley": PageHinkley(min_instances=_SLICES_MIN, delta=rise, threshold=most, mode="up"),
    }
    for total in sums:
        _tell(made, total)
    return made


def _tell(detectors: Mapping[str, Any], total: int) -> list[str]:
    """Names of those that fire at a slice."""
    for detector in detectors.values():
        detector.update(total / (SLICE * SCALE))
    return [name for name, detector in detectors.items() if detector.drift_detected]


def _found(stream: int, event: int, name: str, now: _Stream) -> Found:
    """The onset is where two means explain the slices best: detectors say that there is a change, not where."""
    mean = np.array(now.sums) / (SLICE * SCALE)
    before = np.arange(1, len(mean))
    so_far = np.cumsum(mean)[:-1]
    apart = so_far / before - (mean.sum() - so_far) / (len(mean) - before)
    split = 1 + int(np.argmax(before * (len(mean) - before) * apart**2))
    return Found(
        stream=stream,
        event=event,
        detector=name,
        onset_ms=now.began[split],
        events=(len(mean) - split) * SLICE,
        before=float(mean[:split].mean()),
        after=float(mean[split:].mean()),
    )
