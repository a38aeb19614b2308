"""What a partition knows across its users: how common each interest is, and how often evidence reaches which height.

On the way of an event: `advance` reads the frozen part; what a batch adds travels as a delta beside the users' records
and is applied after the commit. The frozen part changes at epoch cuts only, by `cut`, so a batch of 4,096 events equals
4,096 batches of one. Everything gathered within an epoch is an exact integer: deltas add up in any grouping.

    snapshot  msgpack of every array, names and tallies
    delta     msgpack of (keys, counts, new names, tally places, tally counts), little endian
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from models.features import U8, U32, U64
from models.index import KeyIndex

if TYPE_CHECKING:
    from models.features import EventColumns
    from models.profile import Advanced
    from models.shift import ShiftSettings

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

AGE_EDGES = (40, 80, 160, 320, 640, 1_280)  # events; thresholds are kept by age of the user
AGES = len(AGE_EDGES) + 1
LEVELS = 256  # heights of evidence that are tallied
LEVELS_PER_NAT = 8
TALLIES = AGES * (LEVELS + 2) + 2  # reached (AGES x LEVELS), monitored (AGES), alarms (AGES), pairs, repeats
_UNSEEN = 0.5  # pseudo-count of an interest never seen
_UNSEEN_INTERESTS = 1_000  # how many of them there may be
_SEGMENT_PRIOR = 200.0  # events' worth of everybody's shares in a segment's shares
_FORMAT = 1


class Tallies:
    """Views on one flat array of exact counts; what is gathered for calibration and for the choice of the unit."""

    def __init__(self, flat: I64) -> None:
        self.flat = flat
        self.reached_GL = flat[: AGES * LEVELS].reshape(AGES, LEVELS)
        self.monitored_G = flat[AGES * LEVELS : AGES * (LEVELS + 1)]
        self.alarms_G = flat[AGES * (LEVELS + 1) : AGES * (LEVELS + 2)]
        self.pairs = flat[AGES * (LEVELS + 2) :]  # events that follow another in their session; those that repeat it

    @staticmethod
    def zeros() -> Tallies:
        return Tallies(np.zeros(TALLIES, np.int64))


class _Delta(msgspec.Struct, array_like=True):
    keys: bytes
    counts: bytes
    names: dict[int, str]
    places: bytes
    place_counts: bytes


class _Snapshot(msgspec.Struct, array_like=True):
    format: int
    epoch: int
    keys: bytes
    weights: bytes
    added: bytes
    names: dict[int, str]
    tallies: bytes
    gathered: bytes


def _packed(keys: U64, counts: I64) -> tuple[bytes, bytes]:
    return keys.astype("<u8").tobytes(), counts.astype("<i8").tobytes()


class GroupTable:
    """Counts by interest, for all and by segment, and tallies of evidence; see the module's docstring.

    Example:
        >>> from models.shift import ShiftSettings
        >>> table = GroupTable(ShiftSettings())
        >>> bool(np.all(table.shares(np.array([5, 6], np.uint32), np.zeros(2, np.uint8))[0] == 0.001))
        True
    """

    def __init__(self, settings: ShiftSettings) -> None:
        self._settings = settings
        self.epoch = 0
        self.names: dict[int, str] = {}
        self._keys = np.zeros(0, np.uint64)  # segment << 32 | interest; segment 0 = all
        self._weight = np.zeros(0, np.float64)  # frozen: decayed counts as of the last cut
        self._added = np.zeros(0, np.int64)  # since the last cut
        self._index = KeyIndex()
        self._total_S = np.zeros(256, np.float64)  # frozen: sum of weights by segment
        self._interests = 0  # frozen: interests known at the last cut
        self.tallies = Tallies.zeros()  # of the epochs before, forgotten slowly
        self.gathered = Tallies.zeros()  # since the last cut

    def __len__(self) -> int:
        return len(self._keys)

    # ------------------------------------------------------------------ what the kernel reads

    def shares(self, interest_B: U32, segment_B: U8) -> tuple[F64, F64]:
        """Share of each event's interest among all users, and in its segment (shrunk to all). Frozen in an epoch."""
        total = self._total_S[0] + _UNSEEN * (self._interests + _UNSEEN_INTERESTS)
        all_B = (self._weights_of(interest_B.astype(np.uint64)) + _UNSEEN) / total
        if not segment_B.any():
            return all_B, all_B
        key_B = (segment_B.astype(np.uint64) << np.uint64(32)) | interest_B.astype(np.uint64)
        of_segment_B = (self._weights_of(key_B) + _SEGMENT_PRIOR * all_B) / (self._total_S[segment_B] + _SEGMENT_PRIOR)
        return all_B, np.where(segment_B > 0, of_segment_B, all_B)

    def _weights_of(self, key_B: U64) -> F64:
        row = self._index.find(key_B)
        if not len(self._weight):
            return np.zeros(len(key_B))
        return np.where(row >= 0, self._weight[row], 0.0)

    def thresholds(self) -> F64:
        """Evidence that an alarm takes, by age of the user."""
        return np.full(AGES, self._settings.threshold)

    def by_session(self) -> bool:
        """Whether evidence is gathered by session (clicks) or by event (baskets).

        On click streams an event within a session mostly repeats the interest before it; the lines of a basket do not.
        """
        if self._settings.evidence != "auto":
            return self._settings.evidence == "session"
        pairs, repeats = self.tallies.pairs.tolist()
        return bool(pairs < 200 or repeats > 0.2 * pairs)

    # ------------------------------------------------------------------ what a batch adds

    def delta(self, events: EventColumns, advanced: Advanced, names: Mapping[int, str]) -> bytes:
        """What a batch adds to this table; the table itself stays as it is. Empty if there were no events."""
        if not len(events):
            return b""
        key_B = events.interest.astype(np.uint64)
        own = events.segment > 0
        if own.any():
            of_segment = (events.segment[own].astype(np.uint64) << np.uint64(32)) | key_B[own]
            key_B = np.concatenate([key_B, of_segment])
        keys, counts = np.unique(key_B, return_counts=True)
        new = {
            int(k): names[int(k)] for k in np.unique(events.interest) if int(k) in names and int(k) not in self.names
        }
        flat = advanced.tallies.flat
        places = np.flatnonzero(flat)
        return msgspec.msgpack.encode(
            _Delta(*_packed(keys, counts), new, *_packed(places.astype(np.uint64), flat[places]))
        )

    def apply_delta(self, payload: bytes) -> None:
        """Add what a committed batch gathered."""
        if not payload:
            return
        delta = msgspec.msgpack.decode(payload, type=_Delta)
        keys = np.frombuffer(delta.keys, "<u8").astype(np.uint64)
        counts = np.frombuffer(delta.counts, "<i8")
        row = self._index.find(keys)
        fresh = row < 0
        if fresh.any():
            first = len(self._keys)
            self._append(keys[fresh])
            row[fresh] = np.arange(first, len(self._keys), dtype=np.int32)
        self._added[row] += counts
        self.names.update(delta.names)
        self.gathered.flat[np.frombuffer(delta.places, "<u8").astype(np.int64)] += np.frombuffer(
            delta.place_counts, "<i8"
        )

    def _append(self, keys: U64) -> None:
        first = len(self._keys)
        self._keys = np.concatenate([self._keys, keys])
        self._weight = np.concatenate([self._weight, np.zeros(len(keys))])
        self._added = np.concatenate([self._added, np.zeros(len(keys), np.int64)])
        self._index.insert(keys, np.arange(first, first + len(keys), dtype=np.int32))

    # ------------------------------------------------------------------ epochs

    def cut(self) -> GroupTable:
        """The table of the next epoch: old counts decayed, new ones added, the rarest gone. This one stays as it is."""
        settings = self._settings
        table = GroupTable(settings)
        table.epoch = self.epoch + 1
        fresh = int(self._added[self._keys < np.uint64(1 << 32)].sum())
        weight = self._weight * 0.5 ** (fresh / settings.population_half_life_events) + self._added
        keys = self._keys
        if len(keys) > settings.group_interests_max:
            kept = np.sort(np.lexsort((keys, -weight))[: settings.group_interests_max])
            keys, weight = keys[kept], weight[kept]
        order = np.argsort(keys)  # the same table whatever the order in which interests came
        table._append(keys[order])
        table._weight = weight[order]
        table._recount()
        interests = set(table._keys[table._keys < np.uint64(1 << 32)].tolist())
        table.names = {k: n for k, n in sorted(self.names.items()) if k in interests}
        table.tallies = Tallies(self.tallies.flat - (self.tallies.flat >> 6) + self.gathered.flat)
        return table

    def _recount(self) -> None:
        segment = (self._keys >> np.uint64(32)).astype(np.int64)
        self._total_S = np.bincount(segment, weights=self._weight, minlength=256).astype(np.float64)
        self._interests = int((segment == 0).sum())

    # ------------------------------------------------------------------ bytes

    def snapshot(self) -> bytes:
        """The whole table."""
        return msgspec.msgpack.encode(
            _Snapshot(
                _FORMAT,
                self.epoch,
                self._keys.astype("<u8").tobytes(),
                self._weight.astype("<f8").tobytes(),
                self._added.astype("<i8").tobytes(),
                self.names,
                self.tallies.flat.astype("<i8").tobytes(),
                self.gathered.flat.astype("<i8").tobytes(),
            )
        )

    @staticmethod
    def from_snapshot(payload: bytes, settings: ShiftSettings) -> GroupTable:
        """The table that `snapshot` wrote.

        Raises:
            ValueError: the bytes are of another format, or broken.
        """
        try:
            saved = msgspec.msgpack.decode(payload, type=_Snapshot)
        except msgspec.MsgspecError as error:
            raise ValueError(f"not a group table: {error}") from None
        if saved.format != _FORMAT:
            raise ValueError(f"group table of format {saved.format}; this program reads format {_FORMAT}")
        table = GroupTable(settings)
        table.epoch = saved.epoch
        table._append(np.frombuffer(saved.keys, "<u8").astype(np.uint64))
        table._weight = _array(saved.weights, "<f8").astype(np.float64)
        table._added = _array(saved.added, "<i8").astype(np.int64)
        table.names = saved.names
        table.tallies = Tallies(_array(saved.tallies, "<i8").astype(np.int64))
        table.gathered = Tallies(_array(saved.gathered, "<i8").astype(np.int64))
        table._recount()
        return table


def _array(payload: bytes, kind: str) -> npt.NDArray[Any]:
    return np.frombuffer(payload, kind).copy()
