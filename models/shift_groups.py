"""What a partition knows across its users: how common each interest is, the rule in force, and shadow users' histories.

On the way of an event: `advance` reads the frozen part; what a batch adds travels as a delta beside the users' records
and is applied after the commit. The frozen part changes at epoch cuts only, by `cut`, so a batch of 4,096 events equals
4,096 batches of one. Everything gathered within an epoch is an exact integer: deltas add up in any grouping.

    snapshot  zlib of msgpack: every array, names, the rule
    delta     msgpack of (keys, counts, new names, tally places and counts, events of shadow users, first and newest
              event time, surges, what became of alerts, drifts), little endian
    shadow    users whose keyed hash lies under a limit that halves when their histories outgrow the budget; their
              events are kept (interest, time) so that a cut can replay them: see models/shift_calibration.py
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from models.drifts import WATCHED_MIN, Drifts, StreamChange
from models.features import U8, U32, U64
from models.followup import FollowUp, FollowUpSnapshot
from models.index import KeyIndex
from models.shift_rate import AlarmRate, Traffic
from models.shift_rule import AGES, Rule, fixed_rule
from models.surges import Surges, SurgesDelta, SurgesSnapshot
from models.walk import Crowd

if TYPE_CHECKING:
    from models.features import EventColumns
    from models.profile import Advanced
    from models.shift import ShiftSettings

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

TALLIES = 2 * AGES
SHADOW_BITS = 20
_SHADOW_ALL = np.uint64(1 << SHADOW_BITS)
_UNSEEN = 0.5  # pseudo-count of an interest never seen
_UNSEEN_INTERESTS = 1_000  # how many of them there may be
_SEGMENT_PRIOR = 200.0  # events' worth of everybody's shares in a segment's shares
_FORMAT = 6
_ONE_INTEREST = np.uint64(1 << 32)  # keys below are of all users, above of a segment


class Tallies:
    """Views on one flat array of exact counts; what is gathered for calibration."""

    def __init__(self, flat: I64) -> None:
        self.flat = flat
        self.monitored_G = flat[:AGES]  # events at which an alarm could have come, by age of the user
        self.alarms_G = flat[AGES:]

    @staticmethod
    def zeros() -> Tallies:
        return Tallies(np.zeros(TALLIES, np.int64))


class Shadow:
    """Events of the shadow users in the order of their partition: parallel arrays of key, interest and time."""

    def __init__(self, key: U64, interest: U32, time_ms: I64) -> None:
        self.key, self.interest, self.time_ms = key, interest, time_ms

    def __len__(self) -> int:
        return len(self.key)

    @staticmethod
    def empty() -> Shadow:
        return Shadow(np.zeros(0, np.uint64), np.zeros(0, np.uint32), np.zeros(0, np.int64))

    @staticmethod
    def load(parts: tuple[bytes, bytes, bytes]) -> Shadow:
        key, interest, time_ms = (np.frombuffer(p, k) for p, k in zip(parts, ("<u8", "<u4", "<i8"), strict=True))
        return Shadow(key.astype(np.uint64), interest.astype(np.uint32), time_ms.astype(np.int64))

    def dump(self) -> tuple[bytes, bytes, bytes]:
        return (
            self.key.astype("<u8").tobytes(),
            self.interest.astype("<u4").tobytes(),
            self.time_ms.astype("<i8").tobytes(),
        )

    def join(self, later: Shadow) -> Shadow:
        return Shadow(
            np.concatenate([self.key, later.key]),
            np.concatenate([self.interest, later.interest]),
            np.concatenate([self.time_ms, later.time_ms]),
        )

    def keep(self, kept: npt.NDArray[Any]) -> Shadow:
        return Shadow(self.key[kept], self.interest[kept], self.time_ms[kept])

    def newest(self, each: int) -> Shadow:
        """At most the newest `each` events of every user."""
        order = np.argsort(self.key, kind="stable")
        sorted_key = self.key[order]
        last = np.searchsorted(sorted_key, sorted_key, side="right")
        kept = np.zeros(len(self), np.bool_)
        kept[order] = last - np.arange(len(self)) <= each
        return self if kept.all() else self.keep(kept)


class _Delta(msgspec.Struct, array_like=True):
    keys: bytes
    counts: bytes
    names: dict[int, str]
    places: bytes
    place_counts: bytes
    shadow: tuple[bytes, bytes, bytes]
    first_ms: int
    newest_ms: int
    surges: SurgesDelta | None
    suppressed: int
    followup: bytes
    drifts: list[StreamChange] = []


class _Snapshot(msgspec.Struct, array_like=True):
    format: int
    epoch: int
    events: int
    keys: bytes
    weights: bytes
    added: bytes
    names: dict[int, str]
    tallies: bytes
    gathered: bytes
    rule: Rule
    rule_epoch: int
    shadow_limit: int
    shadow: tuple[bytes, bytes, bytes]
    traffic: Traffic
    first_ms: int
    newest_ms: int
    surges: SurgesSnapshot
    suppressed: int
    followup: FollowUpSnapshot
    drifts: list[StreamChange] = []


class GroupTable:
    """Counts by interest, for all and by segment, the rule in force, tallies and shadow users; see the module's text.

    Example:
        >>> from models.shift import ShiftSettings
        >>> table = GroupTable(ShiftSettings())
        >>> bool(np.all(table.shares(np.array([5, 6], np.uint32), np.zeros(2, np.uint8))[0] == 0.001))
        True
    """

    def __init__(self, settings: ShiftSettings) -> None:
        self._settings = settings
        self.epoch = 0
        self.events = 0  # up to the last cut
        self.names: dict[int, str] = {}
        self._keys = np.zeros(0, np.uint64)  # segment << 32 | interest; segment 0 = all
        self._weight = np.zeros(0, np.float64)  # frozen: decayed counts as of the last cut
        self._added = np.zeros(0, np.int64)  # since the last cut
        self._index = KeyIndex()
        self._total_S = np.zeros(256, np.float64)  # frozen: sum of weights by segment
        self._interests = 0  # frozen: interests known at the last cut
        self.rule = fixed_rule(
            by_session=settings.evidence != "event",
            threshold=settings.threshold,
            drift=settings.drift,
            kappa=settings.kappa,
            half_life_events=settings.slow_half_life_events,
            hold_share=settings.hold_share,
        )
        self.rule_epoch = 0  # the cut at which the rule was last fitted
        self.tallies = Tallies.zeros()  # frozen: since the rule was fitted, up to the last cut
        self.gathered = Tallies.zeros()  # since the last cut
        self.shadow = Shadow.empty()
        self.shadow_limit = _SHADOW_ALL
        self.surges = Surges()
        self.suppressed = 0  # users' alarms since the last surge was told
        self.followup = FollowUp()
        self.drifts = Drifts()
        self._entropy: dict[int, float] = {}  # nats, by segment; of the frozen shares
        self.traffic = Traffic()  # frozen: up to the last cut
        self._first_ms = 0  # of the partition's first event
        self._newest_ms = 0

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

    def beyond(self, interest_B: U32, segment: int) -> F64:
        """-log share of each event's interest in a segment (0 = all), less what it is on average; nats, finite."""
        if segment not in self._entropy:
            known = self._keys[(self._keys < _ONE_INTEREST) & (self._weight > 0)].astype(np.uint32)
            share = self._shares_in(known, segment)
            unseen = 1.0 / max(1, _UNSEEN_INTERESTS) * max(0.0, 1.0 - float(share.sum()))
            rest = -_UNSEEN_INTERESTS * unseen * float(np.log(unseen)) if unseen > 0.0 else 0.0
            self._entropy[segment] = float(-(share * np.log(share)).sum()) + rest
        return -np.log(self._shares_in(interest_B, segment)) - self._entropy[segment]

    def _shares_in(self, interest_B: U32, segment: int) -> F64:
        return self.shares(interest_B, np.full(len(interest_B), segment, np.uint8))[1]

    def watched(self, segment: int) -> bool:
        """Whether enough events are known of a segment (0 = all) to say what its long run is. Frozen in an epoch."""
        return bool(self._total_S[segment] >= WATCHED_MIN)

    def _weights_of(self, key_B: U64) -> F64:
        row = self._index.find(key_B)
        if not len(self._weight):
            return np.zeros(len(key_B))
        return np.where(row >= 0, self._weight[row], 0.0)

    def crowd(self, interest_B: U32, segment_B: U8) -> tuple[U64, Crowd]:
        """Keys of a batch's interests and the batch's own copy of what surges."""
        key_B = interest_B.astype(np.uint64)
        own_B = (segment_B.astype(np.uint64) << np.uint64(32)) | key_B
        keys_K, place = np.unique(np.concatenate([key_B, own_B]), return_inverse=True)
        all_B, own_place_B = place[: len(key_B)], place[len(key_B) :]
        share = 1.0 / self.rule.false_alarm_events if self.rule.false_alarm_events else 0.0
        crowd = self.surges.crowd(
            keys_K,
            self._index.find(keys_K),
            self._index.find(keys_K & np.uint64(0xFFFFFFFF)),
            (all_B, np.where(segment_B > 0, own_place_B, -1)),
            (share, self.rule.tail, self._settings.surge_false_alarm_events),
        )
        return keys_K, crowd

    def wanted(self) -> float:
        """Events between alarms that the settings ask for, at the traffic as it was up to the last cut."""
        return self.traffic.wanted(self._settings.alerts_per_day, self._settings.false_alarm_events)

    def rate(self) -> AlarmRate:
        """What was asked for and what calibration really gives."""
        return AlarmRate(
            requested=self.rule.false_alarm_events or self.wanted(),
            calibrated=self.rule.false_alarm_events > 0,
            monitored=int(self.tallies.monitored_G.sum()),
            alarms=int(self.tallies.alarms_G.sum()),
        )

    # ------------------------------------------------------------------ what a batch adds

    def delta(
        self,
        events: EventColumns,
        advanced: Advanced,
        names: Mapping[int, str],
        suppressed: int | None = None,
        followup: bytes = b"",
        drifts: Sequence[StreamChange] = (),
    ) -> bytes:
        """What a batch adds to this table; the table itself stays as it is. Empty if there were no events.

        Args:
            suppressed: alarms suppressed since the last surge was told, as of now; None: as before.
            followup: what the batch adds to what became of alerts (models/followup.py).
            drifts: what it adds to the streams that are watched for drifts (models/drifts.py).
        """
        if not len(events):
            return b""
        key_B = events.interest.astype(np.uint64)
        own = events.segment > 0
        if own.any():
            of_segment = (events.segment[own].astype(np.uint64) << np.uint64(32)) | key_B[own]
            key_B = np.concatenate([key_B, of_segment])
        keys, counts = np.unique(key_B, return_counts=True)
        here = keys[keys < _ONE_INTEREST].tolist()
        places = np.flatnonzero(advanced.tallies.flat)
        shadow = Shadow(advanced.shadow_key_E, events.interest[advanced.shadow_E], events.time_ms[advanced.shadow_E])
        return msgspec.msgpack.encode(
            _Delta(
                keys.astype("<u8").tobytes(),
                counts.astype("<i8").tobytes(),
                {key: names[key] for key in here if key in names and key not in self.names},
                places.astype("<i8").tobytes(),
                advanced.tallies.flat[places].astype("<i8").tobytes(),
                shadow.dump(),
                int(events.time_ms[0]),
                int(events.time_ms.max()),
                None if advanced.crowd is None else self.surges.delta(advanced.crowd_keys_K, advanced.crowd),
                self.suppressed if suppressed is None else suppressed,
                followup,
                list(drifts),
            )
        )

    def apply_delta(self, payload: bytes) -> None:
        """Add what a committed batch gathered."""
        if not payload:
            return
        delta = msgspec.msgpack.decode(payload, type=_Delta)
        keys = np.frombuffer(delta.keys, "<u8").astype(np.uint64)
        row = self._index.find(keys)
        fresh = row < 0
        if fresh.any():
            first = len(self._keys)
            self._append(keys[fresh])
            row[fresh] = np.arange(first, len(self._keys), dtype=np.int32)
        self._added[row] += np.frombuffer(delta.counts, "<i8")
        self.names.update(delta.names)
        self.gathered.flat[np.frombuffer(delta.places, "<i8")] += np.frombuffer(delta.place_counts, "<i8")
        self.shadow = self.shadow.join(Shadow.load(delta.shadow))
        self._first_ms = self._first_ms or delta.first_ms
        self._newest_ms = max(self._newest_ms, delta.newest_ms)
        self.suppressed = delta.suppressed
        if delta.followup:
            self.followup.apply(delta.followup)
        self.drifts.apply(delta.drifts)
        if delta.surges is not None:
            changed = np.frombuffer(delta.surges.keys, "<u8").astype(np.uint64)
            self.surges.apply(delta.surges, self._index.find(changed))

    def _append(self, keys: U64) -> None:
        first = len(self._keys)
        self._keys = np.concatenate([self._keys, keys])
        self._weight = np.concatenate([self._weight, np.zeros(len(keys))])
        self._added = np.concatenate([self._added, np.zeros(len(keys), np.int64)])
        self.surges.append(len(keys))
        self._index.insert(keys, np.arange(first, first + len(keys), dtype=np.int32))

    def knows(self, user_keys: U64) -> bool:
        """Whether a history of one of these users may be kept here, for calibration or to judge an alert."""
        return self.followup.knows(user_keys) or bool(
            np.any((user_keys >> np.uint64(64 - SHADOW_BITS)) < self.shadow_limit)
        )

    def erase(self, user_keys: U64) -> None:
        """Drop the histories of these users."""
        self.shadow = self.shadow.keep(~np.isin(self.shadow.key, user_keys))
        self.followup.forget(user_keys)

    # ------------------------------------------------------------------ epochs

    def cut(self) -> GroupTable:
        """The table of the next epoch: old counts decayed, new ones added, the rarest gone, the rule fitted or tracked.

        This one stays as it is.
        """
        from models.shift_calibration import next_rule  # here, because it runs the kernel, which reads this table

        settings = self._settings
        table = GroupTable(settings)
        table.epoch = self.epoch + 1
        fresh = int(self._added[self._keys < _ONE_INTEREST].sum())
        table.events = self.events + fresh
        weight = self._weight * 0.5 ** (fresh / settings.population_half_life_events) + self._added
        kept = np.arange(len(self._keys))
        if len(kept) > settings.group_interests_max:
            kept = np.lexsort((self._keys, -weight))[: settings.group_interests_max]
        kept = kept[np.argsort(self._keys[kept])]  # the same table whatever the order in which interests came
        table._append(self._keys[kept])
        table._weight = weight[kept]
        table.suppressed, table.followup = self.suppressed, self.followup.cut()
        table.drifts = Drifts.load(self.drifts.dump())
        table.surges = self.surges.cut(kept, table._keys, settings.population_half_life_events)
        table._recount()
        interests = set(table._keys[table._keys < _ONE_INTEREST].tolist())
        table.names = {k: n for k, n in sorted(self.names.items()) if k in interests}
        table.shadow_limit, table.shadow = self._shadow_in_budget()
        table.rule, table.rule_epoch = self.rule, self.rule_epoch
        table.tallies = Tallies(self.tallies.flat + self.gathered.flat)
        table._first_ms, table._newest_ms = self._first_ms, self._newest_ms
        monitored = int(self.gathered.monitored_G.sum())
        table.traffic = self.traffic.after(self._first_ms, self._newest_ms, monitored)
        next_rule(table, self.gathered, settings)
        return table

    def _shadow_in_budget(self) -> tuple[np.uint64, Shadow]:
        """Fewer users when their histories outgrow the budget, and of each only the newest events."""
        shadow, limit = self.shadow.newest(self._settings.shadow_user_events_max), self.shadow_limit
        while len(shadow) > self._settings.shadow_events_max and limit > 1:
            limit = limit >> np.uint64(1)
            shadow = shadow.keep((shadow.key >> np.uint64(64 - SHADOW_BITS)) < limit)
        return limit, shadow

    def _recount(self) -> None:
        segment = (self._keys >> np.uint64(32)).astype(np.int64)
        self._total_S = np.bincount(segment, weights=self._weight, minlength=256).astype(np.float64)
        self._interests = int(((segment == 0) & (self._weight > 0)).sum())  # without those that came since the cut

    # ------------------------------------------------------------------ bytes

    def snapshot(self) -> bytes:
        """The whole table."""
        return zlib.compress(
            msgspec.msgpack.encode(
                _Snapshot(
                    _FORMAT,
                    self.epoch,
                    self.events,
                    self._keys.astype("<u8").tobytes(),
                    self._weight.astype("<f8").tobytes(),
                    self._added.astype("<i8").tobytes(),
                    self.names,
                    self.tallies.flat.astype("<i8").tobytes(),
                    self.gathered.flat.astype("<i8").tobytes(),
                    self.rule,
                    self.rule_epoch,
                    int(self.shadow_limit),
                    self.shadow.dump(),
                    self.traffic,
                    self._first_ms,
                    self._newest_ms,
                    self.surges.dump(),
                    self.suppressed,
                    self.followup.dump(),
                    self.drifts.dump(),
                )
            ),
            1,
        )

    @staticmethod
    def from_snapshot(payload: bytes, settings: ShiftSettings) -> GroupTable:
        """The table that `snapshot` wrote.

        Raises:
            ValueError: the bytes are of another format, or broken.
        """
        try:
            saved = msgspec.msgpack.decode(zlib.decompress(payload), type=_Snapshot)
        except (msgspec.MsgspecError, zlib.error) as error:
            raise ValueError(f"not a group table of format {_FORMAT}: {error}") from None
        if saved.format != _FORMAT:
            raise ValueError(f"group table of format {saved.format}; this program reads format {_FORMAT}")
        table = GroupTable(settings)
        table.epoch, table.events, table.names = saved.epoch, saved.events, saved.names
        table._append(np.frombuffer(saved.keys, "<u8").astype(np.uint64))
        table._weight = np.frombuffer(saved.weights, "<f8").astype(np.float64)
        table._added = np.frombuffer(saved.added, "<i8").astype(np.int64)
        table.tallies = Tallies(np.frombuffer(saved.tallies, "<i8").astype(np.int64))
        table.gathered = Tallies(np.frombuffer(saved.gathered, "<i8").astype(np.int64))
        table.rule, table.rule_epoch = saved.rule, saved.rule_epoch
        table.shadow_limit, table.shadow = np.uint64(saved.shadow_limit), Shadow.load(saved.shadow)
        table.traffic, table._first_ms, table._newest_ms = saved.traffic, saved.first_ms, saved.newest_ms
        table.surges, table.suppressed = Surges.load(saved.surges, table._keys), saved.suppressed
        table.followup, table.drifts = FollowUp.load(saved.followup), Drifts.load(saved.drifts)
        table._recount()
        return table
