"""A hash index from 64-bit keys to row numbers, looked up for a whole batch at once.

Open addressing with linear probing; key 0 is reserved and marks a free slot. Deletion shifts the cluster back, so there
are no tombstones and the index never decays.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

_LOAD_MAX = 0.6


@numba.njit(cache=True, nogil=True)
def _slot(key: Any, mask: Any) -> Any:
    """Home slot: keys are hashes already, but their low bits may have been used to choose a partition."""
    return ((key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)) & mask


@numba.njit(cache=True, nogil=True)
def _find(keys: Any, rows: Any, wanted: Any, found: Any) -> None:
    mask = np.uint64(len(keys) - 1)
    for i in range(len(wanted)):
        key = wanted[i]
        slot = _slot(key, mask)
        while keys[slot] != 0 and keys[slot] != key:
            slot = (slot + np.uint64(1)) & mask
        found[i] = rows[slot] if keys[slot] == key else -1


@numba.njit(cache=True, nogil=True)
def _insert(keys: Any, rows: Any, new: Any, new_rows: Any) -> None:
    mask = np.uint64(len(keys) - 1)
    for i in range(len(new)):
        key = new[i]
        slot = _slot(key, mask)
        while keys[slot] != 0 and keys[slot] != key:
            slot = (slot + np.uint64(1)) & mask
        keys[slot] = key
        rows[slot] = new_rows[i]


@numba.njit(cache=True, nogil=True)
def _remove(keys: Any, rows: Any, gone: Any) -> None:
    mask = np.uint64(len(keys) - 1)
    one = np.uint64(1)
    for i in range(len(gone)):
        hole = _slot(gone[i], mask)
        while keys[hole] != 0 and keys[hole] != gone[i]:
            hole = (hole + one) & mask
        if keys[hole] == 0:
            continue
        slot = hole
        while True:  # shift back what would no longer be reached over the hole
            slot = (slot + one) & mask
            if keys[slot] == 0:
                break
            home = _slot(keys[slot], mask)
            if ((slot - home) & mask) >= ((slot - hole) & mask):
                keys[hole] = keys[slot]
                rows[hole] = rows[slot]
                hole = slot
        keys[hole] = 0


@numba.njit(cache=True, nogil=True)
def _store(rows: Any, row: Any, records: Any) -> None:
    for i in range(len(row)):
        rows[row[i], :] = records[i, :]


def store_rows(rows: npt.NDArray[Any], row: npt.NDArray[np.int32], records: npt.NDArray[Any]) -> None:
    """rows[row] = records, for whole records of one layout; other threads run meanwhile."""
    size = rows.dtype.itemsize
    wide = np.uint64 if size % 8 == 0 else np.uint8
    records = np.ascontiguousarray(records)
    _store(rows.view(wide).reshape(len(rows), -1), row, records.view(wide).reshape(len(records), -1))


class KeyIndex:
    """Maps distinct non-zero uint64 keys to int32 rows.

    Example:
        >>> index = KeyIndex()
        >>> index.insert(np.array([7, 9], np.uint64), np.array([0, 1], np.int32))
        >>> index.find(np.array([9, 8], np.uint64)).tolist()
        [1, -1]
    """

    def __init__(self, capacity: int = 64) -> None:
        size = 1 << max(6, int(capacity / _LOAD_MAX).bit_length())
        self._keys = np.zeros(size, np.uint64)
        self._rows = np.zeros(size, np.int32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._rows.nbytes

    def find(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """Rows of the keys, -1 where there is none."""
        found = np.empty(len(keys), np.int32)
        _find(self._keys, self._rows, keys, found)
        return found

    def insert(self, keys: npt.NDArray[np.uint64], rows: npt.NDArray[np.int32]) -> None:
        """Add keys that are not there yet (the caller has looked)."""
        if (self._count + len(keys)) > _LOAD_MAX * len(self._keys):
            self._grow(self._count + len(keys))
        _insert(self._keys, self._rows, keys, rows)
        self._count += len(keys)

    def remove(self, keys: npt.NDArray[np.uint64]) -> None:
        """Remove keys that are there (the caller has looked)."""
        _remove(self._keys, self._rows, keys)
        self._count -= len(keys)

    def _grow(self, count: int) -> None:
        old_keys, old_rows = self._keys, self._rows
        size = 1 << int(2 * count / _LOAD_MAX).bit_length()
        self._keys = np.zeros(size, np.uint64)
        self._rows = np.zeros(size, np.int32)
        live = old_keys != 0
        _insert(self._keys, self._rows, old_keys[live], old_rows[live])
