"""Which interests the network knows: key <-> row, name, popularity, and who waits for admission.

Beside the way of an event: the learner counts events here, once each; what the counts say travels with the weights.
An interest enters at once while there are few, and after some sightings later, so that noise does not fill the table;
it leaves when it is not seen for long. Rows are reused: whoever holds numbers by row must clear those that `count`
reports as retired.

    waiting --admit_sightings, or admit_at_once--> row --interest_ttl_events without a sighting--> free row --> reused
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from models.features import F32, I64, U32
from models.index import KeyIndex
from models.settings import LearningSettings

F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]

WAITING_MAX = 65_536  # interests that wait for admission
_UNIT_MAX = 1e12  # weight of one event at which all weights are scaled down
_CROWDED_SHARE = 0.05  # of a full vocabulary: the longest unseen, which give way
_FAST_HALF_LIFE_EVENTS = 500.0  # of what is popular just now
_EXPIRE_EVERY = 4_096  # events between two looks for interests that were not seen for too long


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """Rows that stand for a new interest from now on, and rows that stand for nothing any more."""

    admitted: I64
    retired: I64


class _Saved(msgspec.Struct, array_like=True):
    keys: bytes
    names: list[str]
    weight: bytes
    seen: bytes
    free: list[int]
    waiting: dict[int, int]
    waiting_names: dict[int, str]
    unit: float
    events: int
    expired: int
    collisions: int
    fast: bytes


class RowIndex:
    """Rows of interests by key. Key 0 is no interest and stands for a free row."""

    def __init__(self, keys_V: U32) -> None:
        self._index = KeyIndex(max(64, len(keys_V)))
        live = np.flatnonzero(keys_V != 0).astype(np.int32)
        self._index.insert(keys_V[live].astype(np.uint64), live)

    def find(self, key_B: U32) -> I32:
        """Rows of the keys, -1 where there is none."""
        row_B = self._index.find(key_B.astype(np.uint64))
        row_B[key_B == 0] = -1
        return row_B

    def insert(self, key: int, row: int) -> None:
        """Add a key that is not there yet."""
        self._index.insert(np.array([key], np.uint64), np.array([row], np.int32))

    def remove(self, key_B: U32) -> None:
        """Remove keys that are there."""
        self._index.remove(key_B.astype(np.uint64))


class Vocabulary:
    """Rows 0..len-1; a free row has key 0. Deterministic: the same events give the same rows.

    Example:
        >>> vocabulary = Vocabulary(LearningSettings(admit_sightings=2, admit_at_once=0))
        >>> vocabulary.count(np.array([5, 9, 5], np.uint32)).admitted.tolist()
        [0]
        >>> vocabulary.find(np.array([5, 9], np.uint32)).tolist()
        [0, -1]
    """

    def __init__(self, settings: LearningSettings) -> None:
        self._settings = settings
        self._key_room: U32 = np.zeros(64, np.uint32)  # doubles when full, like the two below
        self.names: list[str] = []
        self.events = 0  # counted so far
        self.collisions = 0  # sightings of a second name for a key
        self._weight_room: F64 = np.zeros(64, np.float64)  # popularity, as of when `_unit` was 1
        self._fast_room: F64 = np.zeros(64, np.float64)  # popularity of a short half-life, decayed at each `count`
        self._unit = 1.0  # weight of an event counted now: older ones decay by its growth
        self._seen_room: I64 = np.zeros(64, np.int64)  # `events` at the last sighting
        self._free: list[int] = []
        self._waiting: dict[int, int] = {}  # key -> sightings
        self._names: dict[int, str] = {}  # names of those that have no row
        self._expired = 0  # `events` at the last look for expired ones
        self._index = RowIndex(self.keys)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def keys(self) -> U32:
        """Key of each row, 0 = free."""
        return self._key_room[: len(self.names)]

    @property
    def _weight(self) -> F64:
        return self._weight_room[: len(self.names)]

    @property
    def _seen(self) -> I64:
        return self._seen_room[: len(self.names)]

    def find(self, key_B: U32) -> I32:
        """Rows of the keys, -1 where there is none."""
        return self._index.find(key_B)

    def note(self, names: Mapping[int, str]) -> None:
        """Remember the names of interests; a second name for a key is a collision, counted, and the first one stays."""
        if not names:
            return
        rows = self.find(np.fromiter(names, np.uint32, len(names))).tolist()
        for (key, name), row in zip(names.items(), rows, strict=True):
            known = self.names[row] if row >= 0 else self._names.get(key, "")
            if known:
                self.collisions += known != name
            elif row >= 0:
                self.names[row] = name
            else:
                self._names[key] = name
        while len(self._names) > 2 * WAITING_MAX:
            del self._names[next(iter(self._names))]

    # ------------------------------------------------------------------ counting

    def count(self, interest_B: U32) -> Counted:
        """Count events in order; admits what was seen often enough, retires what was not seen for too long.

        Rows are retired before the events are counted, so no row stands for two interests within one call.
        """
        retired = self._retire()
        count = len(interest_B)
        rows = self.find(interest_B)
        fresh: dict[int, int] = {}
        for b in np.flatnonzero(rows < 0).tolist():
            rows[b] = self._sight(int(interest_B[b]), fresh)
        known = np.flatnonzero(rows >= 0)
        unit_B = self._unit * np.exp2(np.arange(1, count + 1) / self._settings.popularity_half_life_events)
        np.add.at(self._weight, rows[known], unit_B[known])
        self._seen[rows[known]] = self.events + 1 + known  # in order: the last one of a row stays
        self._fast_room *= 0.5 ** (count / _FAST_HALF_LIFE_EVENTS)
        np.add.at(self._fast_room, rows[known], 1.0)
        self.events += count
        if count:
            self._unit = float(unit_B[-1])
        if self._unit > _UNIT_MAX:
            self._weight_room /= self._unit
            self._unit = 1.0
        return Counted(admitted=np.fromiter(fresh.values(), np.int64), retired=retired)

    def _sight(self, key: int, fresh: dict[int, int]) -> int:
        """One more sighting of an interest that had no row when the batch began: its row, or -1."""
        if key in fresh:
            return fresh[key]
        sightings = self._waiting.pop(key, 0) + 1
        needed = 1 if len(self) < self._settings.admit_at_once else self._settings.admit_sightings
        if sightings >= needed and (self._free or len(self) < self._settings.interests_max):
            row = fresh[key] = self._admit(key)
            return row
        self._waiting[key] = sightings
        if len(self._waiting) > WAITING_MAX:
            del self._waiting[next(iter(self._waiting))]  # the one whose last sighting is the oldest
        return -1

    def _admit(self, key: int) -> int:
        name = self._names.pop(key, "")
        if self._free:
            row = self._free.pop()
            self.keys[row], self.names[row], self._weight[row] = key, name, 0.0
        else:
            row = len(self)
            if row == len(self._key_room):
                self._key_room = np.concatenate([self._key_room, np.zeros_like(self._key_room)])
                self._weight_room = np.concatenate([self._weight_room, np.zeros_like(self._weight_room)])
                self._seen_room = np.concatenate([self._seen_room, np.zeros_like(self._seen_room)])
                self._fast_room = np.concatenate([self._fast_room, np.zeros_like(self._fast_room)])
            self.names.append(name)
            self.keys[row], self._weight[row] = key, 0.0
        self._fast_room[row] = 0.0
        self._index.insert(key, row)
        return row

    def _retire(self) -> I64:
        """Free the rows of interests that were not seen for too long, or the longest unseen of a full vocabulary."""
        if self.events - self._expired < _EXPIRE_EVERY:
            return np.zeros(0, np.int64)
        self._expired = self.events
        live = self.keys != 0
        gone = live & (self._seen <= self.events - self._settings.interest_ttl_events)
        crowd = int(live.sum()) - int(gone.sum()) - int((1 - _CROWDED_SHARE) * self._settings.interests_max)
        if crowd > int(_CROWDED_SHARE * self._settings.interests_max * 0.9):
            by_age = np.argsort(np.where(live & ~gone, self._seen, np.iinfo(np.int64).max), kind="stable")
            gone[by_age[:crowd]] = True
        rows = np.flatnonzero(gone)
        if len(rows):
            self._index.remove(self.keys[rows])
            self.keys[rows] = 0
            for row in rows.tolist():
                self.names[row] = ""
            self._weight[rows] = 0.0
            self._free += rows[::-1].tolist()
        return rows.astype(np.int64)

    # ------------------------------------------------------------------ what is read

    def popularity(self) -> F32:
        """Decayed count of each row's interest, in events; 0 for a free row."""
        return (self._weight / self._unit).astype(np.float32)

    def crowd(self) -> F32:
        """(V, 2): decayed count of each row's interest over a short time, and events since its last one."""
        rows = len(self.names)
        return np.stack([self._fast_room[:rows], self.events - self._seen], axis=1).astype(np.float32)

    # ------------------------------------------------------------------ bytes

    def to_bytes(self) -> bytes:
        """Everything, as `from_bytes` reads it."""
        return msgspec.msgpack.encode(self._saved())

    def to_json(self) -> bytes:
        """The same as JSON, arrays in base64, as `from_json` reads it."""
        return msgspec.json.encode(self._saved())

    def _saved(self) -> _Saved:
        return _Saved(
            keys=self.keys.astype("<u4").tobytes(),
            names=self.names,
            weight=self._weight.astype("<f8").tobytes(),
            seen=self._seen.astype("<i8").tobytes(),
            free=self._free,
            waiting=self._waiting,
            waiting_names=self._names,
            unit=self._unit,
            events=self.events,
            expired=self._expired,
            collisions=self.collisions,
            fast=self._fast_room[: len(self.names)].astype("<f8").tobytes(),
        )

    @staticmethod
    def from_bytes(payload: bytes, settings: LearningSettings) -> Vocabulary:
        """The vocabulary that `to_bytes` wrote.

        Raises:
            ValueError: the bytes are broken.
        """
        try:
            saved = msgspec.msgpack.decode(payload, type=_Saved)
        except msgspec.MsgspecError as error:
            raise ValueError(f"not a vocabulary: {error}") from None
        return Vocabulary._of(saved, settings)

    @staticmethod
    def from_json(payload: bytes, settings: LearningSettings) -> Vocabulary:
        """The vocabulary that `to_json` wrote. Raises ValueError as `from_bytes` does."""
        try:
            return Vocabulary._of(msgspec.json.decode(payload, type=_Saved), settings)
        except msgspec.MsgspecError as error:
            raise ValueError(f"not a vocabulary: {error}") from None

    @staticmethod
    def _of(saved: _Saved, settings: LearningSettings) -> Vocabulary:
        vocabulary = Vocabulary(settings)
        room = max(64, len(saved.names))
        vocabulary.names = saved.names
        vocabulary._key_room = np.resize(np.frombuffer(saved.keys, "<u4").astype(np.uint32), room)
        vocabulary._weight_room = np.resize(np.frombuffer(saved.weight, "<f8").astype(np.float64), room)
        vocabulary._seen_room = np.resize(np.frombuffer(saved.seen, "<i8").astype(np.int64), room)
        vocabulary._fast_room = np.resize(np.frombuffer(saved.fast, "<f8").astype(np.float64), room)
        vocabulary._free = saved.free
        vocabulary._waiting = saved.waiting
        vocabulary._names = saved.waiting_names
        vocabulary._unit = saved.unit
        vocabulary.events = saved.events
        vocabulary._expired = saved.expired
        vocabulary.collisions = saved.collisions
        vocabulary._index = RowIndex(vocabulary.keys)
        return vocabulary
