"""Evidence since the onset, event by event, of the users whose evidence is above 0: what an alarm's reasons rest on.

On the way of an event: the walk says for each event whether its user is under suspicion after it; the pipeline keeps a
row for each such event in a side table of the partition, which goes to the `state` topic as blocks of its own, with the
users' records. A row is dead once its user's evidence has been 0 or an alarm has been raised since. The table is
bounded: beyond `rows_max` the oldest rows go at an epoch cut, and an alarm then knows what the ring knows.

    row (EVIDENCE)   who, which event (age: the user's events before it; place: offset in its topic), what it said
    normal form      of one user: from the last row that begins a suspicion on; nothing after a row that ends it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.features import I64, U64, EventColumns
from models.walk import CLEARED, SURGING_ALL, SURGING_SEGMENT, SUSPECT

if TYPE_CHECKING:
    from models.profile import Advanced

Rows = npt.NDArray[Any]

EVIDENCE = np.dtype(
    [
        ("key", "<u8"),
        ("place", "<i8"),
        ("time_ms", "<i8"),
        ("age", "<u4"),
        ("interest", "<u4"),
        ("ratio", "<f4"),  # nats, of the user's own
        ("from_segment", "<f4"),  # nats that surges took from it
        ("from_all", "<f4"),
        ("watch", "<u2"),  # 1: the suspicion begins here
        ("topic", "u1"),  # which input topic
        ("flags", "u1"),  # CLEARED, SURGING_*, ALARM_*
    ]
)
ROWS_MAX = 65_536
USER_ROWS_MAX = 64  # of one user, the newest
_CAPACITY_FIRST = 1_024
_SLACK = 8_192  # dead rows that are carried along before the table is put in order


def rows_of(advanced: Advanced, events: EventColumns, key_B: U64, place_B: I64, topic_B: I64) -> Rows:
    """What a batch adds to the table, in the order of its events."""
    said = np.flatnonzero(advanced.surging_B & (SUSPECT | CLEARED))
    rows = np.zeros(len(said), EVIDENCE)
    rows["key"], rows["place"], rows["topic"] = key_B[said], place_B[said], topic_B[said]
    rows["time_ms"], rows["interest"] = events.time_ms[said], events.interest[said]
    rows["age"], rows["ratio"] = advanced.age_B[said], advanced.ratio_B[said]
    rows["from_segment"], rows["from_all"] = advanced.from_segment_B[said], advanced.from_all_B[said]
    rows["watch"] = np.minimum(advanced.onset_events_B[said], 65_535)
    rows["flags"] = advanced.surging_B[said]
    return rows


class Suspects:
    """The side table of one partition.

    Example:
        >>> table = Suspects()
        >>> row = np.zeros(2, EVIDENCE)
        >>> row["key"], row["age"], row["watch"] = 7, [20, 21], [1, 2]
        >>> table.append(row)
        >>> len(table.since_onset(7)), len(table.since_onset(8))
        (2, 0)
    """

    def __init__(self, rows_max: int = ROWS_MAX) -> None:
        self._rows_max = rows_max
        self._rows = np.zeros(_CAPACITY_FIRST, EVIDENCE)
        self._used = 0
        self._live = 0  # when last put in order

    def __len__(self) -> int:
        return self._used

    @property
    def nbytes(self) -> int:
        return self._used * EVIDENCE.itemsize

    def append(self, rows: Rows) -> None:
        """Take committed rows over; ones that are there already do no harm."""
        if self._used + len(rows) > len(self._rows):
            grown = np.zeros(max(2 * len(self._rows), self._used + len(rows)), EVIDENCE)
            grown[: self._used] = self._rows[: self._used]
            self._rows = grown
        self._rows[self._used : self._used + len(rows)] = rows
        self._used += len(rows)
        if self._used > 2 * self._live + _SLACK:
            self._keep(self.normal())

    def since_onset(self, key: int, more: Rows | None = None) -> Rows:
        """A user's rows since its onset, oldest first; `more` are rows of a batch that come after the table's.

        A row that ends the suspicion ends it for later rows only: an alarm sees the rows that led to it.
        """
        rows = self._rows[: self._used]
        rows = rows[rows["key"] == key]
        if more is not None:
            rows = np.concatenate([rows, more])
        rows = rows[np.unique(rows["age"], return_index=True)[1]]
        ended = np.flatnonzero((rows["watch"][1:] <= 1) | (rows["flags"][:-1] & CLEARED > 0))
        rows = rows[ended[-1] + 1 :] if len(ended) else rows
        since: Rows = rows[rows["watch"] > 0][-USER_ROWS_MAX:]
        return since

    def normal(self) -> Rows:
        """The live rows by user and age: the same whatever the batches were."""
        rows = self._rows[: self._used]
        rows = rows[np.lexsort((rows["age"], rows["key"]))]
        if not len(rows):
            return rows
        key, age = rows["key"], rows["age"]
        rows = rows[np.concatenate(([True], (key[1:] != key[:-1]) | (age[1:] != age[:-1])))]
        key = rows["key"]
        number = np.arange(len(rows))
        last = np.searchsorted(key, key, side="right") - 1
        begins = np.concatenate(([True], (key[1:] != key[:-1]) | (rows["flags"][:-1] & CLEARED > 0)))
        begins |= rows["watch"] <= 1
        begin = np.maximum.accumulate(np.where(begins, number, 0))
        live = begin == begin[last]  # of the last suspicion of its user
        live &= rows["flags"][last] & CLEARED == 0
        live &= (rows["watch"] > 0) & (last - number < USER_ROWS_MAX)
        alive: Rows = rows[live]
        return alive

    def trim(self) -> None:
        """At an epoch cut: at most `rows_max` live rows stay, the newest."""
        rows = self.normal()
        if len(rows) > self._rows_max:
            newest = np.lexsort((rows["key"], -rows["place"]))[: self._rows_max]
            rows = rows[np.sort(newest)]
        self._keep(rows)

    def forget(self, keys: U64) -> None:
        """Nothing of these users stays."""
        rows = self._rows[: self._used]
        mine = np.isin(rows["key"], keys)
        if mine.any():
            self._keep(rows[~mine])

    def alive(self, rows: Rows) -> Rows:
        """Those of some rows that are live here. A user who was forgotten and came back has other events at an age."""
        kinds = [("key", "<u8"), ("place", "<i8"), ("topic", "u1")]

        def named(of: Rows) -> Rows:
            names = np.zeros(len(of), kinds)
            names["key"], names["place"], names["topic"] = of["key"], of["place"], of["topic"]
            return names

        found: Rows = rows[np.isin(named(rows), named(self.normal()))]
        return found

    def _keep(self, rows: Rows) -> None:
        self._rows = np.zeros(max(_CAPACITY_FIRST, len(rows)), EVIDENCE)
        self._rows[: len(rows)] = rows
        self._used = self._live = len(rows)


def shares_of(rows: Rows) -> tuple[dict[str, float], bool]:
    """Whose evidence it is: the user's own, its segment's and everybody's, adding up to 1; and whether a surge had
    part in it.

    What surges took from the ratio is theirs, and what is left of the ratio of an interest that surges is theirs too.
    """
    own_rest = np.maximum(rows["ratio"].astype(np.float64), 0.0)
    of_all = rows["flags"] & SURGING_ALL > 0
    of_segment = (rows["flags"] & SURGING_SEGMENT > 0) & ~of_all
    total_all = float(np.maximum(rows["from_all"], 0.0).sum() + own_rest[of_all].sum())
    total_segment = float(np.maximum(rows["from_segment"], 0.0).sum() + own_rest[of_segment].sum())
    own = float(own_rest[~of_all & ~of_segment].sum())
    total = own + total_segment + total_all
    if total <= 0.0:
        return {"user": 1.0, "segment": 0.0, "all": 0.0}, False
    segment, everybody = round(total_segment / total, 4), round(total_all / total, 4)
    own_share = round(1.0 - segment - everybody, 4)
    return {"user": own_share, "segment": segment, "all": everybody}, bool((of_all | of_segment).any())
