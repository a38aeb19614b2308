"""Events that come twice: the ids that a user's record remembers drop the second.

On the way of an event: after decoding, before the walk. A record holds the hashes of the user's last few event ids,
newest first; an event whose id is among them is the same event, sent again by a producer that did not hear that the
first one had arrived. Sequential per user, so the same for any cut into batches.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt


def first_sightings(
    remembered_UD: npt.NDArray[Any], user_row_B: npt.NDArray[np.int64], hash_B: npt.NDArray[np.uint32]
) -> npt.NDArray[np.bool_]:
    """Which events have not been seen before; their ids are remembered from now on.

    Args:
        remembered_UD: the field `dedupe` of the users' records, changed in place; 0 = free.
        user_row_B: the user of each event, a row of `remembered_UD`; in offset order.
        hash_B: hash of each event's id; 0 = it has none and counts as new.

    Example:
        >>> seen = np.zeros((1, 4), np.uint32)
        >>> first_sightings(seen, np.zeros(3, np.int64), np.array([7, 8, 7], np.uint32)).tolist()
        [True, True, False]
    """
    fresh_B = np.ones(len(hash_B), np.bool_)
    _look(remembered_UD, user_row_B, hash_B, fresh_B)
    return fresh_B


@numba.njit(cache=True, nogil=True)
def _look(remembered_UD: Any, user_row_B: Any, hash_B: Any, fresh_B: Any) -> None:
    depth = remembered_UD.shape[1]
    for b in range(len(hash_B)):
        if hash_B[b] == 0:
            continue
        row = user_row_B[b]
        known = False
        for d in range(depth):
            known = known or remembered_UD[row, d] == hash_B[b]
        if known:
            fresh_B[b] = False
            continue
        for d in range(depth - 1, 0, -1):
            remembered_UD[row, d] = remembered_UD[row, d - 1]
        remembered_UD[row, 0] = hash_B[b]
