"""The arena, its index and the state blocks: what is merged comes back, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from models.index import KeyIndex
from stream import changelog
from stream.changelog import Kind
from stream.errors import Corrupt
from stream.state import Arena

SMALL = np.dtype([("key", "<u8"), ("block", "<u4"), ("count", "<u4"), ("ring", "<f4", (3,))])
KEYS = st.lists(st.integers(1, 60), unique=True, max_size=30)


@given(st.lists(st.tuples(st.booleans(), KEYS), max_size=30))
def test_index_is_a_dictionary(steps: list[tuple[bool, list[int]]]) -> None:
    """Any sequence of inserts and removals leaves the index equal to a dict."""
    index, model, row = KeyIndex(1), dict[int, int](), 0
    for insert, keys in steps:
        chosen = [k for k in keys if (k in model) != insert]
        array = np.array(chosen, np.uint64)
        if insert:
            rows = np.arange(row, row + len(chosen), dtype=np.int32)
            row += len(chosen)
            index.insert(array, rows)
            model.update(zip(chosen, rows.tolist(), strict=True))
        else:
            index.remove(array)
            for key in chosen:
                del model[key]
        wanted = np.arange(1, 61, dtype=np.uint64)
        assert index.find(wanted).tolist() == [model.get(k, -1) for k in range(1, 61)]
        assert len(index) == len(model)


@given(st.lists(st.tuples(st.booleans(), KEYS), max_size=20))
@example([(True, [2, 4, 13, 3]), (False, [4, 13]), (True, [1, 4, 5])])  # freed rows and new ones, end to end by chance
def test_arena_is_a_dictionary_of_records(steps: list[tuple[bool, list[int]]]) -> None:
    """Merged records are taken back as they were, removed users start again from zero, nobody else is touched."""
    arena, model = Arena(SMALL), dict[int, int]()
    for merge, keys in steps:
        array = np.array(keys, np.uint64)
        if merge:
            records = arena.take(array)
            assert records["count"].tolist() == [model.get(k, 0) for k in keys]
            records["count"] += 1
            arena.merge(records)
            model.update({k: model.get(k, 0) + 1 for k in keys})
        else:
            assert arena.remove(array) == len([k for k in keys if k in model])
            for key in keys:
                model.pop(key, None)
    assert {int(r["key"]): int(r["count"]) for r in arena.all()} == model
    assert len(arena) == len(model)


def test_taken_records_are_copies() -> None:
    """Nothing uncommitted reaches the arena."""
    arena = Arena(SMALL)
    arena.merge(arena.take(np.array([5], np.uint64)))
    arena.take(np.array([5], np.uint64))["count"] = 9
    assert arena.take(np.array([5], np.uint64))["count"][0] == 0


def records(count: int) -> np.ndarray:
    out = np.zeros(count, SMALL)
    out["key"] = np.arange(1, count + 1)
    out["ring"] = np.random.default_rng(1).normal(size=(count, 3))
    return out


def test_blocks_carry_records_in_pieces() -> None:
    """Packed into blocks of a bounded size and read back, records are the same bytes."""
    original = records(1_000)
    blocks = list(changelog.pack(Kind.USERS, 2, 17, original, 5_000))
    assert len(blocks) == changelog.blocks_needed(1_000, SMALL, 5_000) and max(map(len, blocks)) <= 5_000
    decoded = [changelog.decode(b, "here") for b in blocks]
    assert [b.number for b in decoded] == list(range(17, 17 + len(blocks)))
    assert {b.partition for b in decoded} == {2}
    assert np.concatenate([b.records for b in decoded]).tobytes() == original.tobytes()


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_is_noticed(position: int, change: int) -> None:
    """No block with a flipped byte is ever folded as if it were whole."""
    block = bytearray(changelog.encode(Kind.USERS, 1, 1, records(8)))
    position %= len(block)
    block[position] ^= change
    with pytest.raises(Corrupt):
        changelog.decode(bytes(block), "here")


def test_records_of_an_older_layout_are_migrated_by_name() -> None:
    """A field that is new is zero, one that is gone is dropped, one whose length changed starts empty."""
    newer = np.dtype([("key", "<u8"), ("ring", "<f4", (4,)), ("count", "<u4"), ("block", "<u4"), ("extra", "u1")])
    old = records(3)
    old["count"] = 7
    migrated = changelog.migrate(changelog.decode(changelog.encode(Kind.USERS, 0, 1, old), "here").records, newer)
    assert migrated["key"].tolist() == [1, 2, 3] and migrated["count"].tolist() == [7, 7, 7]
    assert not migrated["ring"].any() and not migrated["extra"].any()


def test_a_newer_format_is_refused() -> None:
    """A block of a later release is not guessed at."""
    block = bytearray(changelog.encode(Kind.GROUPS, 0, 1, b"abc"))
    block[4] = 99
    with pytest.raises(Corrupt, match="upgrade"):
        changelog.decode(bytes(block), "here")
