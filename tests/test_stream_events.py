"""Records to events: strict where it matters, open where it does not, and never a crash."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import orjson
import pytest

from models.features import interest_key, type_code, type_name
from stream.errors import ConfigError
from stream.events import Decoded, EventDecoder, EventSettings, refuse, user_hash
from stream.records import DEAD_LETTER_BYTES_MAX
from stream.transport import LogRecord

NOW_MS = 1_700_000_000_000
GOOD: dict[str, Any] = {"user": "ann", "interest": "shoes", "time": NOW_MS}


def record(value: object, key: bytes | None = b"ann", timestamp: int = NOW_MS) -> LogRecord:
    raw = value if isinstance(value, bytes) or value is None else orjson.dumps(value)
    return LogRecord("events", 0, 7, timestamp, key, raw)


def decode(value: object, key: bytes | None = b"ann", **settings: Any) -> Decoded:
    return EventDecoder(EventSettings(**settings), b"secret").decode([record(value, key)])


@pytest.mark.parametrize(
    ("value", "key", "reason"),
    [
        (None, b"ann", "null_value"),
        (b"", b"ann", "broken_json"),
        (b"{", b"ann", "broken_json"),
        (b"\xff\xfe", b"ann", "broken_json"),
        (b'{"x":' + b"[" * 100_000, b"ann", "broken_json"),
        (b'{"user": "ann", "interest": "x", "time": NaN}', b"ann", "broken_json"),
        ([1, 2], b"ann", "invalid_field"),
        ({"interest": "x", "time": 1}, b"ann", "invalid_field"),
        ({**GOOD, "user": None}, b"ann", "invalid_field"),
        ({**GOOD, "user": ""}, b"", "invalid_user"),
        ({**GOOD, "user": "u" * 600}, b"u" * 600, "invalid_user"),
        ({**GOOD, "interest": ""}, b"ann", "invalid_interest"),
        ({**GOOD, "interest": {"a": 1}}, b"ann", "invalid_field"),
        ({**GOOD, "price": "cheap"}, b"ann", "invalid_field"),
        ({**GOOD, "vector": [1, "x"]}, b"ann", "invalid_field"),
        ({**GOOD, "time": "yesterday"}, b"ann", "invalid_time"),
        ({**GOOD, "time": 1e300}, b"ann", "invalid_time"),
        ({**GOOD, "time": -5}, b"ann", "before_1970"),
        ({**GOOD, "time": NOW_MS + 2 * 86_400_000}, b"ann", "in_the_future"),
        (GOOD, b"bob", "key_mismatch"),
        (GOOD, None, "null_key"),
        (b" " * 1_000_001, b"ann", "too_large"),
        (b'{"user": "\\ud800", "interest": "x", "time": 1}', b"ann", "broken_json"),
    ],
)
def test_bad_records_are_refused_with_a_reason(value: object, key: bytes | None, reason: str) -> None:
    """Each kind of bad record has its own stable reason and disturbs nothing else."""
    decoder = EventDecoder(EventSettings(), b"secret")
    decoded = decoder.decode([record(GOOD), record(value, key), record(GOOD)])
    assert [error.reason for _, error in decoded.dead] == [reason]
    assert decoded.users == ["ann", "ann"]


def test_what_is_missing_is_marked_as_missing() -> None:
    """Only user, interest and time are needed; a missing number is NaN, a missing name is 0."""
    columns = decode(GOOD).columns
    assert math.isnan(columns.price[0]) and math.isnan(columns.dwell_s[0]) and math.isnan(columns.rating[0])
    assert (columns.item[0], columns.type[0], columns.segment[0]) == (0, 0, 0)


def test_all_fields_arrive() -> None:
    """Every field lands in its column."""
    event = {**GOOD, "item": "i9", "type": "BUY", "price": 12.5, "dwell": 3, "rating": 4, "sentiment": -0.5,
             "segment": "gold", "event_id": 17, "vector": [1, 2], "more": {"unknown": True}}  # fmt: skip
    decoded = decode(event, vector_length=2)
    columns = decoded.columns
    assert columns.interest[0] == interest_key("shoes") and columns.item[0] == interest_key("i9")
    assert type_name(int(columns.type[0])) == "purchase"
    assert (columns.price[0], columns.dwell_s[0], columns.rating[0], columns.sentiment[0]) == (12.5, 3, 4, -0.5)
    assert columns.segment[0] > 0 and decoded.event_ids == ["17"]
    assert columns.vector is not None and columns.vector.tolist() == [[1, 2]]
    assert decoded.interest_names == {interest_key("shoes"): "shoes"}


def test_fields_can_have_other_names_and_units() -> None:
    """A topic of somebody else's: names from the configuration, seconds, ISO times, numeric ids."""
    event = {"customer": 12, "category": 7, "ts": 1_700_000_000.5}
    settings = {"fields": {"user": "customer", "interest": "category", "time": "ts"}, "time_unit": "s"}
    decoded = decode(event, b"12", **settings)
    assert decoded.users == ["12"] and decoded.interests == ["7"]
    assert decoded.columns.time_ms[0] == 1_700_000_000_500
    iso = decode({**GOOD, "time": "2023-11-14T22:13:20Z"})
    assert iso.columns.time_ms[0] == NOW_MS
    with pytest.raises(ConfigError, match="no event field 'usr'"):
        decode(GOOD, fields={"usr": "u"})


def test_unknown_types_are_events_like_any_other() -> None:
    """A type that nobody thought of has a stable code of its own range."""
    code = type_code("teleport")
    assert 16 <= code < 32 and code == type_code(" Teleport ")
    assert decode({**GOOD, "type": "teleport"}).columns.type[0] == code


def test_the_hash_of_a_user_depends_on_the_key() -> None:
    """Without the secret nobody can find two users that share a state; 0 stays reserved."""
    assert user_hash("ann", b"a") != user_hash("ann", b"b")
    assert user_hash("ann", b"a") == user_hash("ann", b"a") > 0


def test_numbers_that_float32_cannot_hold_are_missing() -> None:
    """1e300 is valid JSON; it must not become infinity in a feature."""
    assert math.isnan(decode({**GOOD, "price": 1e300}).columns.price[0])


def test_large_records_leave_a_short_dead_letter() -> None:
    """A 5 MB record is kept as its head, with its length and hash, so that the letter itself fits."""
    big = b"x" * 5_000_000
    decoded = decode(big)
    letter = refuse(*decoded.dead[0])
    assert letter.truncated and letter.bytes == 5_000_000 and letter.sha256
    assert letter.value_base64 and len(letter.value_base64) < DEAD_LETTER_BYTES_MAX * 1.4


def test_a_hundred_thousand_mutated_events() -> None:
    """Bytes flipped, cut, doubled and swapped: each record is an event or a dead letter, columns are finite or NaN."""
    rng = random.Random(11)
    decoder = EventDecoder(EventSettings(), b"secret")
    base = orjson.dumps(
        {**GOOD, "item": "i", "type": "view", "price": 1.5, "dwell": 2, "text": "nice", "event_id": "e"}
    )
    records = []
    for _ in range(100_000):
        value = bytearray(base)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(value))
            action = rng.randrange(4)
            if action == 0:
                value[at] = rng.randrange(256)
            elif action == 1:
                del value[at:]
            elif action == 2:
                value[at:at] = value[at : at + rng.randrange(8)]
            else:
                value[at:at] = rng.choice([b"null", b"-", b"1e999", b'"', b"}", b"\\u0000", b"[["])
            if not value:
                value = bytearray(b"x")
        records.append(record(bytes(value)))
    decoded = decoder.decode(records)
    assert len(decoded) + len(decoded.dead) == 100_000
    assert len(decoded) > 5_000 and len(decoded.dead) > 50_000
    for column in (decoded.columns.price, decoded.columns.dwell_s):
        assert not np.isinf(column).any()
    assert (decoded.columns.time_ms >= 0).all() and (decoded.columns.interest > 0).all()
