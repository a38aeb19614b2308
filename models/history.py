"""What the learner remembers: the users' records, and the newest events with all that learning from them takes.

On the way of an event: the learner's own counterpart of the worker's arena. An event's row holds the record BEFORE it,
so that it can be learned later, and again, as if it came now.

    sequence number of an event = events observed before it; its row = number % capacity; rows are overwritten in turn
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from models.features import I64, U64, EventColumns
from models.gru import COUNTED_COUNT, LAST_COUNT
from models.index import KeyIndex
from models.profile import AGGREGATE_COUNT, HIDDEN, PROFILE, RING, USER, Snapshot

_NONE = -1


class Users:
    """Records of up to `users_max` users; the longest unseen half gives way when there are more."""

    def __init__(self, users_max: int) -> None:
        self._users_max = users_max
        self.records: npt.NDArray[Any] = np.zeros(64, USER)
        self.last_event: I64 = np.full(64, _NONE, np.int64)  # sequence number of each user's newest event
        self._used = 0
        self._index = KeyIndex()

    def __len__(self) -> int:
        return self._used

    def rows(self, keys: U64) -> I64:
        """Rows of distinct users; those not there yet get one."""
        rows = self._index.find(keys)
        fresh = np.flatnonzero(rows < 0)
        if not len(fresh):
            return rows.astype(np.int64)
        if self._used + len(fresh) > self._users_max:
            self._forget(keys)
            rows = self._index.find(keys)
            fresh = np.flatnonzero(rows < 0)
        new_rows = np.arange(self._used, self._used + len(fresh), dtype=np.int32)
        self._used += len(fresh)
        if self._used > len(self.records):
            more = max(self._used, 2 * len(self.records)) - len(self.records)
            self.records = np.concatenate([self.records, np.zeros(more, USER)])
            self.last_event = np.concatenate([self.last_event, np.full(more, _NONE, np.int64)])
        self._index.insert(keys[fresh], new_rows)
        self.records["key"][new_rows] = keys[fresh]
        rows[fresh] = new_rows
        return rows.astype(np.int64)

    def fill(self, records: npt.NDArray[Any], last_event: I64) -> None:
        """Take these users, all at once; called when there are none."""
        self._used = len(records)
        if not self._used:
            return
        self.records, self.last_event = records.copy(), last_event.copy()
        self._index = KeyIndex(self._used)
        self._index.insert(self.records["key"], np.arange(self._used, dtype=np.int32))

    def erase(self, key: int) -> int:
        """Remove a user; the sequence number of his newest event, or -1 if he is not here."""
        wanted = np.array([key], np.uint64)
        row = int(self._index.find(wanted)[0])
        if row < 0:
            return _NONE
        newest = int(self.last_event[row])
        self._used -= 1
        moved = self.records["key"][[self._used]]  # the last row takes the place of the one that goes
        self._index.remove(wanted)
        if row != self._used:
            self._index.remove(moved)
            self._index.insert(moved, np.array([row], np.int32))
            self.records[row], self.last_event[row] = self.records[self._used], self.last_event[self._used]
        self.records[self._used] = np.zeros((), USER)
        self.last_event[self._used] = _NONE
        return newest

    def _forget(self, wanted: U64) -> None:
        """Keep the users that were seen last, and those that are wanted now."""
        last = np.where(np.isin(self.records["key"][: self._used], wanted), np.iinfo(np.int64).max, 0)
        last = np.maximum(last, self.last_event[: self._used])
        kept = np.sort(np.argsort(-last, kind="stable")[: self._users_max // 2])
        records, last_event = self.records[kept], self.last_event[kept]
        self._used = len(kept)
        self.records = np.concatenate([records, np.zeros(max(64, len(records)), USER)])
        self.last_event = np.concatenate([last_event, np.full(max(64, len(records)), _NONE, np.int64)])
        self._index = KeyIndex(self._used)
        self._index.insert(records["key"], np.arange(self._used, dtype=np.int32))


class History:
    """The newest `capacity` events; see the module's docstring."""

    def __init__(self, capacity: int, *, numbers: int, followers: int) -> None:
        slots = RING + PROFILE
        self.capacity = capacity
        self.end = 0  # sequence number of the next event
        self.previous = np.full(capacity, _NONE, np.int64)  # sequence number of the user's event before
        self.digest = np.zeros(capacity, np.uint64)  # says which event it is, after a restart too
        self.interest = np.zeros(capacity, np.uint32)
        self.item = np.zeros(capacity, np.int64)
        self.type = np.zeros(capacity, np.int64)
        self.number = np.zeros((capacity, numbers), np.float32)
        self.gap_s = np.zeros(capacity, np.float32)
        self.hidden = np.zeros((capacity, HIDDEN), np.float32)  # state before the event
        self.learned = np.zeros(capacity, np.bool_)  # what follows is as it was when the event was learned
        self.follower = np.full((capacity, followers), _NONE, np.int32)
        self.extra = np.zeros((capacity, followers), np.float16)
        self.base = np.ones(capacity, np.float32)
        self.counted = np.zeros((capacity, slots, COUNTED_COUNT), np.float16)  # of each candidate
        self.last_counted = np.zeros((capacity, LAST_COUNT), np.float32)
        self._snapshot = Snapshot(
            event_E=np.zeros(capacity, np.int64),
            ring_interest_ER=np.zeros((capacity, RING), np.uint32),
            ring_gap_ER=np.zeros((capacity, RING), np.uint16),
            ring_type_ER=np.zeros((capacity, RING), np.uint8),
            slow_interest_EP=np.zeros((capacity, PROFILE), np.uint32),
            slow_share_EP=np.zeros((capacity, PROFILE), np.float32),
            slow_total_E=np.zeros(capacity, np.float32),
            events_E=np.zeros(capacity, np.uint32),
            last_time_ms_E=np.zeros(capacity, np.int64),
            aggregates_EA=np.zeros((capacity, AGGREGATE_COUNT), np.float32),
            held_E=np.zeros(capacity, np.uint16),
        )

    @property
    def first(self) -> int:
        """Sequence number of the oldest event that is still there."""
        return max(0, self.end - self.capacity)

    def append(
        self,
        events: EventColumns,
        before: Snapshot,
        previous_B: I64,
        digest_B: U64,
        columns: dict[str, npt.NDArray[Any]],
    ) -> I64:
        """Take a batch (no longer than the capacity); its sequence numbers. `columns` by the names of the arrays."""
        number_B = np.arange(self.end, self.end + len(events))
        row_B = number_B % self.capacity
        self.previous[row_B] = previous_B
        self.digest[row_B] = digest_B
        self.interest[row_B] = events.interest
        self.learned[row_B] = False
        for name, column in columns.items():
            getattr(self, name)[row_B] = column
        for name in Snapshot.__slots__:
            getattr(self._snapshot, name)[row_B] = getattr(before, name)
        self.end += len(events)
        return number_B

    def erase(self, newest: int) -> I64:
        """Blank a user's events, from his newest one back; their sequence numbers."""
        gone: list[int] = []
        while newest >= self.first and len(gone) < self.capacity:
            gone.append(newest)
            newest = int(self.previous[newest % self.capacity])
        number_E = np.array(gone, np.int64)
        row_E = number_E % self.capacity
        for name in ("digest", "interest", "item", "type", "number", "gap_s", "hidden", "learned", "extra"):
            getattr(self, name)[row_E] = 0
        self.counted[row_E] = self.last_counted[row_E] = 0
        self.base[row_E] = 1.0
        self.follower[row_E] = self.previous[row_E] = _NONE
        for name in Snapshot.__slots__:
            getattr(self._snapshot, name)[row_E] = 0
        return number_E

    def snapshot(self, row_E: I64) -> Snapshot:
        """The users' records before these events."""
        return self._snapshot.take(row_E)

    def put_snapshot(self, rows: int, columns: dict[str, npt.NDArray[Any]]) -> None:
        """The records before the events of the first rows, as `snapshot` gave them."""
        for name, column in columns.items():
            getattr(self._snapshot, name)[:rows] = column

    def before(self, number_E: I64, steps: int) -> tuple[I64, I64]:
        """Rows of the up to `steps` events of the same users before these, and how many there are.

        Returns:
            (E, steps) the newest first, padded with the last one that is there; (E,) how many.
        """
        row_EK = np.zeros((len(number_E), steps), np.int64)
        count_E = np.zeros(len(number_E), np.int64)
        at = number_E
        for k in range(steps):
            earlier = self.previous[at % self.capacity]
            there = (earlier >= self.first) & (count_E == k)
            at = np.where(there, earlier, at)
            count_E += there
            row_EK[:, k] = at % self.capacity
        return row_EK, count_E


def digests(user_key_B: U64, events: EventColumns) -> U64:
    """A number that stands for each event, the same after a restart."""
    mixed = user_key_B ^ (events.time_ms.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    digest_B: U64 = mixed ^ (events.interest.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F))
    return digest_B


def previous_events(user_row_B: I64, last_event_U: I64, first: int) -> tuple[I64, I64]:
    """Sequence number of each event's predecessor of the same user, and the users' newest ones afterwards."""
    order = np.argsort(user_row_B, kind="stable")
    sorted_user = user_row_B[order]
    previous_B = np.empty(len(user_row_B), np.int64)
    starts = np.ones(len(order), np.bool_)
    starts[1:] = sorted_user[1:] != sorted_user[:-1]
    earlier = np.empty(len(order), np.int64)
    earlier[1:] = order[:-1] + first
    earlier[starts] = last_event_U[sorted_user[starts]]
    previous_B[order] = earlier
    newest_U = last_event_U.copy()
    newest_U[user_row_B] = np.arange(first, first + len(user_row_B))
    return previous_B, newest_U
