"""The arena: one fixed-size record a user, in memory, for one partition.

A batch never works on the arena itself. `take` copies the records of the batch's users, the pipeline changes the
copies, and `merge` writes them back after the commit: nothing uncommitted ever reaches the arena. The dtype is the
engine's own (models/profile.py for the real one); it must have the fields `key` (u8) and `block` (u4).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from models.index import KeyIndex

Records = npt.NDArray[Any]  # structured, one row a user

_CAPACITY_FIRST = 1_024
_GROWTH = 1.5


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
        self._rows: Records = np.zeros(_CAPACITY_FIRST, dtype)
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
        row = self._index.find(keys)
        fresh = np.flatnonzero(row < 0)
        if len(fresh):
            row[fresh] = self._new_rows(len(fresh))
            self._index.insert(keys[fresh], row[fresh])
        self._rows[row] = records

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
            grown = np.zeros(max(int(len(self._rows) * _GROWTH), self._used + fresh), self._rows.dtype)
            grown[: self._used] = self._rows[: self._used]
            self._rows = grown
        rows = np.array(reused + list(range(self._used, self._used + fresh)), np.int32)
        self._used += fresh
        return rows
