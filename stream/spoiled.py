"""Bad records of every kind, made of good ones: what a stream brings sooner or later.

On the way of an event: before the log, part of the generated stream. Each kind names the reason that its dead letter
should give, so that a run can be checked record by record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from stream.rows import StreamRecord

Spoil = Callable[[bytes, dict[str, Any]], tuple[bytes | None, bytes | None]]

FAR_FUTURE_MS = 7_258_118_400_000  # 2200-01-01
OVERSIZED_BYTES = 5_000_000


def _with(**changes: object) -> Spoil:
    return lambda key, event: (key, msgspec.json.encode({**event, **changes}))


def _without(field: str) -> Spoil:
    return lambda key, event: (key, msgspec.json.encode({k: v for k, v in event.items() if k != field}))


def _as_bytes(change: Callable[[bytes], bytes | None]) -> Spoil:
    return lambda key, event: (key, change(msgspec.json.encode(event)))


KINDS: tuple[tuple[str, Spoil], ...] = (  # (reason, how)
    ("broken_json", _as_bytes(lambda value: value[: len(value) // 2])),
    ("broken_json", _as_bytes(lambda value: b"")),
    ("broken_json", _as_bytes(lambda value: value.replace(b'"user":"', b'"user":"\xff\xfe'))),
    ("broken_json", _as_bytes(lambda value: value.replace(b'"interest":"', b'"price":NaN,"interest":"'))),
    ("invalid_field", _as_bytes(lambda value: b"[" + value + b"]")),
    ("invalid_field", _without("user")),
    ("invalid_field", _without("interest")),
    ("invalid_field", _without("time")),
    ("invalid_field", _with(user={"id": 7})),
    ("invalid_field", _with(interest=["tents", "tea"])),
    ("invalid_field", _with(price="cheap")),
    ("invalid_user", lambda key, event: (b"", msgspec.json.encode({**event, "user": ""}))),
    ("invalid_interest", _with(interest="")),
    ("invalid_time", _with(time="yesterday")),
    ("in_the_future", _with(time=FAR_FUTURE_MS)),
    ("before_1970", _with(time=-86_400_000)),
    ("key_mismatch", lambda key, event: (b"somebody-else", msgspec.json.encode(event))),
    ("null_key", lambda key, event: (None, msgspec.json.encode(event))),
    ("null_value", _as_bytes(lambda value: None)),
)


def spoil(kind: int, record: StreamRecord) -> tuple[str, StreamRecord]:
    """(reason, a bad record made of this good one). `kind` counts over KINDS."""
    key, value, time_ms = record
    assert key is not None and value is not None
    reason, how = KINDS[kind % len(KINDS)]
    bad_key, bad_value = how(key, msgspec.json.decode(value))
    return reason, (bad_key, bad_value, time_ms)


def oversize(record: StreamRecord) -> tuple[str, StreamRecord]:
    """The same event with a text of 5 MB."""
    key, value, time_ms = record
    assert key is not None and value is not None
    event = {**msgspec.json.decode(value), "text": "x" * OVERSIZED_BYTES}
    return "too_large", (key, msgspec.json.encode(event), time_ms)
