"""Where the records of a Kafka record batch lie: the compiled pass of stream/kafka_batches.py.

Layout: Kafka's documentation, "Message Format", record batch v2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, types

OFFSET, TIME, KEY, KEY_END, VALUE, VALUE_END = range(6)
FIELDS = 6
_BYTES = types.Array(types.uint8, 1, "C", readonly=True)


@njit(cache=True, nogil=True)
def _varint(data: npt.NDArray[np.uint8], at: int) -> Any:
    """A zigzag number of at most 10 bytes, and where it ends; -1 where it does not."""
    bits, shift = np.uint64(0), 0
    while 0 <= at < len(data) and shift < 70:
        byte = np.uint64(data[at])
        at += 1
        bits |= (byte & np.uint64(0x7F)) << np.uint64(shift)
        if byte < 0x80:
            return np.int64(bits >> np.uint64(1)) ^ -np.int64(bits & np.uint64(1)), at
        shift += 7
    return 0, -1


@njit(types.boolean(_BYTES, types.int64[:, ::1]), cache=True, nogil=True)
def locate(data: npt.NDArray[np.uint8], at_RF: npt.NDArray[np.int64]) -> bool:
    """Find the records of a batch; whether all of them, and nothing else, lie in `data`.

    Args:
        data: the uncompressed records.
        at_RF: filled by record with its offset and its time over the batch's, and where key and value begin and end
            in `data`; a missing one ends at -1.
    """
    size = len(data)
    at = 0
    for r in range(len(at_RF)):
        length, at = _varint(data, at)
        end = at + length
        if at < 0 or length < 1 or end > size:
            return False
        at_RF[r, TIME], at = _varint(data, at + 1)  # behind the attributes
        at_RF[r, OFFSET], at = _varint(data, at)
        for field in (KEY, VALUE):
            length, at = _varint(data, at)
            if at < 0 or length > end - at:
                return False
            at_RF[r, field] = at
            at_RF[r, field + 1] = at + length if length >= 0 else -1
            at += max(0, length)
        headers, at = _varint(data, at)
        if at < 0 or headers < 0 or headers > end - at:
            return False
        for part in range(2 * headers):
            length, at = _varint(data, at)
            if at < 0 or length > end - at or (length < 0 and part % 2 == 0):
                return False
            at += max(0, length)
        if at != end:
            return False
    return at == size
