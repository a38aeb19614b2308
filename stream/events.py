"""Records to events: the first step on the way of an event. What cannot be used becomes a dead letter with a reason.

Decoding is strict about the few fields that matter (user, interest, time, and that the record's key IS the user id)
and open about the rest: unknown fields are ignored, missing ones are marked as missing, an unknown type is an event
like any other. Everything here depends on the record alone, never on the wall clock.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
import numpy as np

from models.features import EventColumns, interest_key, type_code
from stream import fields
from stream.errors import BadEvent, ConfigError
from stream.records import DeadLetter, Source, dead_letter
from stream.sentiment import TextSentiment
from stream.transport import Record

USER_BYTES_MAX = 512
INTEREST_CHARS_MAX = 256
CACHE_ENTRIES_MAX = 1 << 18

_FIELDS: dict[str, Any] = {
    # name: (type, default or NODEFAULT)
    "user": (str | int, msgspec.NODEFAULT),
    "interest": (str | int, msgspec.NODEFAULT),
    "time": (int | float | str, msgspec.NODEFAULT),
    "item": (str | int | None, None),
    "type": (str | int | None, None),
    "price": (float | None, None),
    "dwell": (float | None, None),
    "rating": (float | None, None),
    "sentiment": (float | None, None),
    "text": (str | None, None),
    "vector": (list[float] | None, None),
    "segment": (str | int | None, None),
    "event_id": (str | int | None, None),
}
FIELD_NAMES = tuple(_FIELDS)
TIME_UNIT_MS = {"ms": 1.0, "s": 1_000.0}


class EventSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How input records are read."""

    fields: Annotated[
        dict[str, str],
        msgspec.Meta(
            description="JSON field of each event field, where it is not the same name; dots go into nested objects, "
            'e.g. interest = "product.category.id"'
        ),
    ] = {}
    time_unit: Annotated[
        str, msgspec.Meta(description="unit of numeric times: ms or s; text times are ISO 8601", pattern="^(ms|s)$")
    ] = "ms"
    record_bytes_max: Annotated[int, msgspec.Meta(description="larger values become dead letters, bytes", gt=0)] = (
        1_000_000
    )
    future_max_s: Annotated[
        float,
        msgspec.Meta(
            description="event times later than the record's own timestamp by more than this are dead letters, seconds",
            ge=0,
        ),
    ] = 86_400.0
    late: Annotated[
        str,
        msgspec.Meta(
            description="what to do with late events: update (use them), drop or dead-letter",
            pattern="^(update|drop|dead-letter)$",
        ),
    ] = "update"
    late_after_s: Annotated[
        float,
        msgspec.Meta(
            description="an event is late when it lies this far behind its partition's newest event, seconds", ge=0
        ),
    ] = 3_600.0
    vector_length: Annotated[
        int, msgspec.Meta(description="length of the content vectors; 0 = none are used", ge=0, le=4_096)
    ] = 0
    text_sentiment: Annotated[
        str,
        msgspec.Meta(
            description="language of texts whose sentiment is made where none is given: en, zh, auto (Chinese where "
            'enough characters are); "" = none is made. Needs driftline[sentiment]',
            pattern="^(en|zh|auto)?$",
        ),
    ] = ""
    text_chars_max: Annotated[
        int, msgspec.Meta(description="characters of a text that are read for it", ge=1, le=100_000)
    ] = 500
    dedupe: Annotated[
        str,
        msgspec.Meta(
            description='"event_id": of two events of a user with one id the second is dropped and counted; looks back '
            'over the user\'s last 4 ids; "" = off',
            pattern="^(event_id)?$",
        ),
    ] = ""
    key_is_user: Annotated[
        bool,
        msgspec.Meta(
            description="refuse records whose key is not the user id (their partition would not own the user)"
        ),
    ] = True


@dataclass(kw_only=True, slots=True)
class Decoded:
    """The usable events of one partition of a batch, in offset order, and what was refused.

    Attributes:
        columns: the events; `user_row` is filled by the pipeline.
        user_key_B: 64-bit keyed hash of the user id.
        records: the input record of each event.
        users, interests, segments, event_ids: per event; names as sent.
        id_hash_B: hash of each event's id; 0 where it has none, or where `events.dedupe` is off.
        dead: refused records.
    """

    columns: EventColumns
    user_key_B: np.ndarray[Any, Any]
    records: list[Record]
    users: list[str]
    interests: list[str]
    segments: list[str | None]
    event_ids: list[str | None]
    id_hash_B: np.ndarray[Any, Any]
    dead: list[tuple[Record, BadEvent]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def interest_names(self) -> dict[int, str]:
        """Names of the batch's interests by key."""
        return dict(zip(self.columns.interest.tolist(), self.interests, strict=True))

    def source(self, event: int) -> Source:
        """Where an event was read."""
        record = self.records[event]
        return Source(topic=record.topic, partition=record.partition, offset=record.offset)

    def keep(self, kept_B: np.ndarray[Any, Any]) -> Decoded:
        """Only the events where `kept_B` is true."""
        index = np.flatnonzero(kept_B)
        rows = index.tolist()
        return Decoded(
            columns=self.columns.take(index),
            user_key_B=self.user_key_B[index],
            records=[self.records[i] for i in rows],
            users=[self.users[i] for i in rows],
            interests=[self.interests[i] for i in rows],
            segments=[self.segments[i] for i in rows],
            event_ids=[self.event_ids[i] for i in rows],
            id_hash_B=self.id_hash_B[index],
            dead=self.dead,
        )


def user_hash(user: str, key: bytes) -> int:
    """64-bit keyed hash of a user id; never 0. Unkeyed, an attacker could find two ids that share a state."""
    return int.from_bytes(hashlib.blake2b(user.encode(), digest_size=8, key=key).digest(), "little") or 1


class EventDecoder:
    """Turns the records of a partition into columns. One object for each thread (it keeps caches, bounded)."""

    def __init__(self, settings: EventSettings, hash_key: bytes) -> None:
        unknown = set(settings.fields) - set(FIELD_NAMES)
        if unknown:
            raise ConfigError(
                f"events.fields: no event field {sorted(unknown)[0]!r}; there are {', '.join(FIELD_NAMES)}"
            )
        if settings.time_unit not in TIME_UNIT_MS:
            raise ConfigError(f"events.time_unit is {settings.time_unit!r}; use ms or s")
        self._sentiment = None
        if settings.text_sentiment:
            self._sentiment = TextSentiment(settings.text_sentiment, settings.text_chars_max)
        self._decode: Callable[[bytes], Any] = fields.decoder(_FIELDS, settings.fields)
        self._settings = settings
        self._hash_key = hash_key
        self._user_keys: dict[str, int] = {}
        self._user_of_key: dict[bytes, str] = {}  # record keys that were found to be a valid user's id
        self._interest_keys: dict[str, int] = {}
        self._item_keys: dict[str, int] = {}
        self._type_codes: dict[str, int] = {}
        self._segment_codes: dict[str, int] = {}

    def decode(self, records: Sequence[Record]) -> Decoded:
        """Decode records of ONE partition. Never raises for what a record contains."""
        good: list[Any] = []
        kept: list[Record] = []
        times_ms: list[int] = []
        dead: list[tuple[Record, BadEvent]] = []
        decode, users, interests = self._decode, self._user_of_key, self._interest_keys
        bytes_max, future_ms = self._settings.record_bytes_max, self._settings.future_max_s * 1_000
        usual_time = self._settings.time_unit == "ms"
        for record in records:
            # The usual event in few steps: a user and an interest that were checked before. All else goes the long way,
            # which alone decides what is refused and says why.
            value, key, event = record.value, record.key, None
            if usual_time and value is not None and key is not None and len(value) <= bytes_max:
                try:
                    event = decode(value)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    event = None
            if (
                event is not None
                and event.user == users.get(key or b"")
                and type(event.interest) is str
                and event.interest in interests
                and type(event.time) is int
                and 0 <= event.time <= record.timestamp + future_ms
                and event.vector is None
            ):
                time_ms = event.time
            else:
                try:
                    event, time_ms = self._read(record)
                except BadEvent as error:
                    dead.append((record, error))
                    continue
            good.append(event)
            kept.append(record)
            times_ms.append(time_ms)
        return self._columns(good, kept, times_ms, dead)

    def _read(self, record: Record) -> tuple[Any, int]:
        """The raw event with user and interest as strings, and its time in ms; BadEvent with the reason."""
        value, key, settings = record.value, record.key, self._settings
        if value is None:
            raise BadEvent("null_value", "the record has no value")
        if len(value) > settings.record_bytes_max:
            raise BadEvent("too_large", f"{len(value)} bytes; events.record_bytes_max is {settings.record_bytes_max}")
        try:
            event = self._decode(value)
        except msgspec.ValidationError as error:
            raise BadEvent("invalid_field", str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadEvent("broken_json", str(error)) from None
        user = event.user = event.user if type(event.user) is str else str(event.user)
        interest = event.interest = event.interest if type(event.interest) is str else str(event.interest)
        try:
            user_bytes = user.encode()
            interest.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, written as an escape, is valid JSON
            raise BadEvent("invalid_field", f"not valid text: {error.reason}") from None
        if not user or len(user_bytes) > USER_BYTES_MAX:
            raise BadEvent(
                "invalid_user", f"the user id has {len(user_bytes)} bytes; 1 to {USER_BYTES_MAX} are allowed"
            )
        if not interest or len(interest) > INTEREST_CHARS_MAX:
            raise BadEvent(
                "invalid_interest", f"the interest has {len(interest)} characters, not 1 to {INTEREST_CHARS_MAX}"
            )
        if settings.key_is_user and key != user_bytes:
            raise BadEvent("null_key" if key is None else "key_mismatch", "the record's key is not the user id")
        time_ms = self._time_ms(event.time)
        if time_ms < 0:
            raise BadEvent("before_1970", f"event time {event.time!r} lies before 1970")
        if time_ms > record.timestamp + settings.future_max_s * 1_000:
            raise BadEvent(
                "in_the_future", f"event time {event.time!r} is over events.future_max_s after {record.timestamp}"
            )
        if event.vector is not None and settings.vector_length and len(event.vector) != settings.vector_length:
            raise BadEvent("invalid_field", f"the vector has {len(event.vector)} numbers, not events.vector_length")
        if settings.key_is_user:
            if len(self._user_of_key) >= CACHE_ENTRIES_MAX:
                self._user_of_key.clear()
            self._user_of_key[user_bytes] = user
        return event, time_ms

    def _time_ms(self, time: float | str) -> int:
        if isinstance(time, str):
            try:
                moment = datetime.fromisoformat(time)
            except ValueError as error:
                raise BadEvent("invalid_time", str(error)) from None
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=UTC)
            return int(moment.timestamp() * 1_000)
        time_ms = time * TIME_UNIT_MS[self._settings.time_unit]
        if not -(2**62) < time_ms < 2**62:
            raise BadEvent("invalid_time", f"event time {time!r} is out of range")
        return int(time_ms)

    def _columns(
        self, good: list[Any], kept: list[Record], times_ms: list[int], dead: list[tuple[Record, BadEvent]]
    ) -> Decoded:
        count = len(good)
        users = [e.user for e in good]
        interests = [e.interest for e in good]
        interest_B = np.array(self._cached(interests, self._interest_keys, interest_key), np.uint32)
        items = [i if type(i := e.item) is str or i is None else str(i) for e in good]
        segments = [s if type(s := e.segment) is str or s is None else str(s) for e in good]
        types = [t if type(t := e.type) is str or t is None else str(t) for e in good]
        vector = None
        if self._settings.vector_length:
            missing = [float("nan")] * self._settings.vector_length
            vector = np.array([missing if e.vector is None else e.vector for e in good], np.float32)
            vector = vector.reshape(count, self._settings.vector_length)
        columns = EventColumns(
            user_row=np.zeros(count, np.int64),
            interest=interest_B,
            item=np.array(self._cached(items, self._item_keys, interest_key), np.uint32),
            type=np.array(self._cached(types, self._type_codes, type_code), np.uint8),
            time_ms=np.array(times_ms, np.int64),
            price=_numbers([e.price for e in good]),
            dwell_s=_numbers([e.dwell for e in good]),
            rating=_numbers([e.rating for e in good]),
            sentiment=_numbers(self._sentiments(good)),
            segment=np.array(self._cached(segments, self._segment_codes, segment_code), np.uint8),
            vector=vector,
        )
        hash_key = self._hash_key
        event_ids = [None if e.event_id is None else str(e.event_id) for e in good]
        id_hash_B = np.zeros(count, np.uint32)
        if self._settings.dedupe:
            id_hash_B[:] = [0 if i is None else zlib.crc32(i.encode(errors="replace")) or 1 for i in event_ids]
        return Decoded(
            columns=columns,
            user_key_B=np.array(self._cached(users, self._user_keys, lambda u: user_hash(u, hash_key)), np.uint64),
            records=kept,
            users=users,
            interests=interests,
            segments=segments,
            event_ids=event_ids,
            id_hash_B=id_hash_B,
            dead=dead,
        )

    def _sentiments(self, good: list[Any]) -> list[float | None]:
        """As given; else of the text, where that is asked for."""
        of = self._sentiment
        if of is None:
            return [e.sentiment for e in good]
        return [e.sentiment if e.sentiment is not None else of.of(e.text) for e in good]

    def _cached(self, names: Sequence[str | None], cache: dict[str, int], compute: Callable[[str], int]) -> list[int]:
        """Keys of names, 0 for a missing one."""
        get = cache.get
        return [0 if n is None else k if (k := get(n)) is not None else self._one(n, cache, compute) for n in names]

    @staticmethod
    def _one(name: str, cache: dict[str, int], compute: Callable[[str], int]) -> int:
        key = cache.get(name)
        if key is None:
            if len(cache) >= CACHE_ENTRIES_MAX:
                cache.clear()
            key = cache[name] = compute(name)
        return key


def segment_code(name: str) -> int:
    """Code 1..255 of a segment name; 0 is none. Stable over runs and machines."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=2).digest(), "little") % 255 + 1


def _numbers(values: list[float | None]) -> np.ndarray[Any, Any]:
    """float32 column; missing as NaN, and what float32 cannot hold (over 3.4e38) counts as missing."""
    if values.count(None) == len(values):  # most fields of most streams
        return np.full(len(values), np.nan, np.float32)
    column = np.array([np.nan if v is None else v for v in values], np.float64)
    column[np.abs(column) > np.finfo(np.float32).max] = np.nan
    return column.astype(np.float32)


def refuse(record: Record, error: BadEvent) -> DeadLetter:
    """The dead letter of a record."""
    return dead_letter(
        reason=error.reason,
        message=str(error),
        source=Source(topic=record.topic, partition=record.partition, offset=record.offset),
        timestamp_ms=record.timestamp,
        key=record.key,
        value=record.value,
    )
