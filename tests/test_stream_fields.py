"""Fields by name and by path: what data engineers bring is read as it is."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson
import pytest

from stream.errors import ConfigError
from stream.events import EventDecoder, EventSettings
from stream.replay import to_records
from stream.transport import LogRecord

NOW_MS = 1_700_000_000_000
NESTED = {
    "user": "who.id",
    "interest": "product.category.id",
    "item": "product.sku",
    "price": "product.price.value",
    "time": "meta.at",
    "event_id": "meta\\.id",
}


def decode(value: object, fields: dict[str, str], key: bytes = b"ann") -> Any:
    record = LogRecord("events", 0, 0, NOW_MS, key, orjson.dumps(value))
    return EventDecoder(EventSettings(fields=fields), b"k").decode([record])


def test_nested_objects_are_read_by_path() -> None:
    """Paths of any depth, missing optional objects as missing fields, a dot in a name by a backslash."""
    event = {
        "who": {"id": "ann", "other": 1},
        "product": {"category": {"id": "shoes"}, "sku": 7, "price": {"value": 9.5}},
        "meta": {"at": NOW_MS},
        "meta.id": "e1",
        "type": "purchase",
    }
    found = decode(event, NESTED)
    assert (found.users, found.interests, found.event_ids) == (["ann"], ["shoes"], ["e1"])
    assert found.columns.price[0] == 9.5 and found.columns.type[0] == 3 and found.columns.time_ms[0] == NOW_MS
    event["product"] = {"category": {"id": 12}, "price": None}
    found = decode(event, NESTED)
    assert found.interests == ["12"] and found.columns.item[0] == 0 and found.columns.price[0] != found.columns.price[0]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"product": {}}, "category"),
        ({"product": None}, "product"),
        ({"product": "shoes"}, "product"),
        ({"product": {"category": {"id": ["shoes"]}}}, "product.category.id"),
    ],
)
def test_what_does_not_fit_a_path_is_a_dead_letter_that_names_it(change: dict[str, Any], path: str) -> None:
    """A required object that is missing, null or something else: refused with the place."""
    event = {"who": {"id": "ann"}, "product": {"category": {"id": "x"}}, "meta": {"at": NOW_MS}} | change
    ((_, error),) = decode(event, NESTED).dead
    assert error.reason == "invalid_field" and path in str(error)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interest": "product..id"}, "is no path"),
        ({"interest": ""}, "is no path"),
        ({"interest": "user"}, "taken by"),
        ({"interest": "thing", "item": "thing"}, "taken by"),
        ({"item": "product", "interest": "product.id"}, "goes through product"),
        ({"colour": "c"}, "no event field 'colour'"),
    ],
)
def test_paths_that_cannot_work_are_refused_at_the_start(fields: dict[str, str], message: str) -> None:
    """Said before anything runs, with the key."""
    with pytest.raises(ConfigError, match=message):
        EventDecoder(EventSettings(fields=fields), b"k")


@pytest.mark.parametrize("path", ["item", "item.group"])
def test_the_name_of_a_field_may_be_given_to_another(path: str) -> None:
    """interest = "item": the item is the interest, and events have no other item."""
    found = decode(
        {"user": "ann", "time": NOW_MS, "item": "x1" if path == "item" else {"group": "x1"}}, {"interest": path}
    )
    assert found.interests == ["x1"] and found.columns.item[0] == 0


def test_a_replay_writes_what_the_decoder_reads() -> None:
    """Events of a file go out at the configured paths, in the configured unit, keyed by the user."""
    settings = EventSettings(fields=NESTED, time_unit="s")
    event: Any = {"user": "ann", "interest": "shoes", "time": NOW_MS, "price": 2.5, "item": "x", "event_id": "e9"}
    ((key, value, time_ms),) = to_records([event], settings)
    assert (key, time_ms) == (b"ann", NOW_MS)
    assert orjson.loads(value)["product"] == {"category": {"id": "shoes"}, "price": {"value": 2.5}, "sku": "x"}
    found = EventDecoder(settings, b"k").decode([LogRecord("events", 0, 0, NOW_MS, key, value)])
    assert (found.users, found.interests, found.event_ids) == (["ann"], ["shoes"], ["e9"])
    assert int(found.columns.time_ms[0]) == NOW_MS and found.columns.price[0] == 2.5
    assert msgspec.json.decode(next(iter(to_records([event])))[1]) == event
