"""Who is forgotten by himself: users silent for longer than the time to live, and the longest silent above the budget.

On the way of an event: at the end of an epoch of a partition. There, and only there, the state is the same however the
stream was cut into batches, and time is the partition's newest event time, never a clock: so a replay forgets the same
users at the same places. Within an epoch a partition may exceed its budget by the users that the epoch brings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stream.state import Arena, Records

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What a partition may hold.

    Attributes:
        ttl_ms: event time after a user's last event until he is forgotten; 0 = never.
        users_max: records held at the end of an epoch; 0 = any number.
    """

    ttl_ms: int = 0
    users_max: int = 0


UNBOUNDED = Bounds()


def silent(arena: Arena, touched: Records, watermark_ms: int, bounds: Bounds) -> Keys:
    """Keys of the users to forget, ordered, given the records that a batch has touched and not merged yet."""
    if not bounds.ttl_ms and not bounds.users_max:
        return np.zeros(0, np.uint64)
    if not bounds.ttl_ms and len(arena) + len(touched) <= bounds.users_max:
        return np.zeros(0, np.uint64)
    key, last_ms = arena.keys_and_times(touched)
    gone = np.zeros(len(key), np.bool_)
    if bounds.ttl_ms:
        gone = last_ms < watermark_ms - bounds.ttl_ms
    excess = len(key) - int(gone.sum()) - bounds.users_max
    if bounds.users_max and excess > 0:
        left = np.flatnonzero(~gone)
        limit_ms = np.partition(last_ms[left], excess - 1)[excess - 1]
        near = left[last_ms[left] <= limit_ms]  # one moment may have many users: their keys decide
        gone[near[np.lexsort((key[near], last_ms[near]))[:excess]]] = True
    found: Keys = np.sort(key[gone])
    return found
