"""The arena: one fixed-size record a user, in memory, for one partition.

A batch never works on the arena itself. `take` copies the records of the batch's users, the pipeline changes the
copies, and `merge` writes them back after the commit: nothing uncommitted ever reaches the arena. The dtype is the
engine's own (models/profile.py for the real one); it must have the fields `key` (u8) and `block` (u4).
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from models.index import KeyIndex, store_rows

Records = npt.NDArray[Any]  # structured, one row a user

_CAPACITY_FIRST = 1_024
_GROWTH = 1.5


class _Memory:
    """Zeroed memory that grows without a copy where the system can move its pages, and takes real pages when written.

    Restoring a million users, an array that was copied to a larger one each time took a fifth of the time.
    """

    def __init__(self, size: int) -> None:
        self._map = self._new(size)

    def _new(self, size: int) -> mmap.mmap:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def rows(self, dtype: np.dtype[Any]) -> Records:
        rows: Records = np.frombuffer(self._map, dtype, len(self._map) // dtype.itemsize)
        return rows

    def grow(self, size: int) -> None:
        try:
            self._map.resize(size)
        except (SystemError, BufferError, OSError):  # no mremap here, or somebody still looks at the old rows
            grown = self._new(size)
            grown[: len(self._map)] = self._map[:]
            self._map = grown


class Arena:
    """Records by user key.

    Example:
        >>> arena = Arena(np.dtype([("key", "u8"), ("block", "u4"), ("clicks", "u4")]))
        >>> records = arena.take(np.array([5], np.uint64))  # a user never seen: a zeroed record with the key set
        >>> records["clicks"] += 1
        >>> arena.merge(records)
        >>> int(arena.take(np.array([5], np.uint64))["clicks"][0]), len(arena)
        (1, 1)
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._memory = _Memory(dtype.itemsize * _CAPACITY_FIRST)
        self._rows: Records = self._memory.rows(dtype)
        self._index = KeyIndex(_CAPACITY_FIRST)
        self._used = 0  # rows ever used; the free ones among them are listed
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._index)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._rows.dtype

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes + self._index.nbytes

    def take(self, keys: npt.NDArray[np.uint64]) -> Records:
        """Copies of the records of distinct keys; zeroed ones with the key set for users never seen."""
        row = self._index.find(keys)
        known = row >= 0
        records = np.zeros(len(keys), self._rows.dtype)
        if known.all():
            np.take(self._rows, row, out=records)
        else:
            records[known] = self._rows[row[known]]
            records["key"] = keys
        return records

    def block_of(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Number of the newest state block that holds each key's record; -1 for users that are not here."""
        row = self._index.find(keys)
        return np.where(row >= 0, self._rows["block"][row].astype(np.int64), -1)

    def merge(self, records: Records) -> None:
        """Store records (distinct keys) over the old ones."""
        keys = np.ascontiguousarray(records["key"])
        row, used_before = self._index.find(keys), self._used
        fresh = np.flatnonzero(row < 0)
        if len(fresh):
            row[fresh] = self._new_rows(len(fresh))
            self._index.insert(keys[fresh], row[fresh])
        if not len(row):
            return
        if len(fresh) == len(row) and int(row[0]) >= used_before:  # rows that were freed before come first
            self._rows[row[0] : row[-1] + 1] = records
        else:
            store_rows(self._rows, row, records)

    def remove(self, keys: npt.NDArray[np.uint64]) -> int:
        """Forget users; returns how many of them were there."""
        row = self._index.find(keys)
        gone = row >= 0
        self._index.remove(keys[gone])
        self._rows[row[gone]] = np.zeros((), self._rows.dtype)
        self._free.extend(row[gone].tolist())
        return int(gone.sum())

    def keys_and_times(self, newer: Records) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        """Key and last event time of every user, with `newer` records (distinct keys) in place of those here."""
        key = self._rows["key"][: self._used].copy()
        last_ms = self._rows["last_time_ms"][: self._used].copy()
        row = self._index.find(np.ascontiguousarray(newer["key"]))
        last_ms[row[row >= 0]] = newer["last_time_ms"][row >= 0]
        here = key != 0
        fresh = newer[row < 0]
        return np.concatenate([key[here], fresh["key"]]), np.concatenate([last_ms[here], fresh["last_time_ms"]])

    def all(self) -> Records:
        """A copy of all records, ordered by key."""
        live = self._rows[: self._used]
        live = live[live["key"] != 0]
        ordered: Records = live[np.argsort(live["key"])]
        return ordered

    def _new_rows(self, count: int) -> npt.NDArray[np.int32]:
        reused = [self._free.pop() for _ in range(min(count, len(self._free)))]
        fresh = count - len(reused)
        if self._used + fresh > len(self._rows):
            dtype, capacity = self._rows.dtype, max(int(len(self._rows) * _GROWTH), self._used + fresh)
            del self._rows  # the memory cannot move while it is looked at
            self._memory.grow(capacity * dtype.itemsize)
            self._rows = self._memory.rows(dtype)
        rows = np.concatenate([np.array(reused, np.int32), np.arange(self._used, self._used + fresh, dtype=np.int32)])
        self._used += fresh
        return rows
