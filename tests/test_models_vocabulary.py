"""The vocabulary: who gets a row, who loses it, and that nothing of the one before is left in it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from models.settings import LearningSettings
from models.successors import Successors
from models.vocabulary import WAITING_MAX, RowIndex, Vocabulary


def keys(*values: int) -> Any:
    return np.array(values, np.uint32)


def test_an_interest_enters_at_its_second_sighting() -> None:
    """One sighting gives no row; the second one does, and counts; a key has one row for ever."""
    vocabulary = Vocabulary(LearningSettings(admit_sightings=2, admit_at_once=0))
    assert vocabulary.count(keys(5, 9)).admitted.tolist() == []
    assert vocabulary.count(keys(9, 9, 5)).admitted.tolist() == [0, 1]
    assert vocabulary.find(keys(9, 5, 7, 0)).tolist() == [0, 1, -1, -1]
    assert vocabulary.popularity().tolist() == pytest.approx([2.0, 1.0], rel=1e-3)


def test_the_cut_into_batches_does_not_matter() -> None:
    """The same events give the same rows and counts, one by one or all at once."""
    random = np.random.default_rng(1)
    stream = random.zipf(1.4, 2_000).clip(1, 300).astype(np.uint32)
    whole, parts = Vocabulary(LearningSettings()), Vocabulary(LearningSettings())
    whole.count(stream)
    for i in range(0, len(stream), 7):
        parts.count(stream[i : i + 7])
    assert whole.keys.tolist() == parts.keys.tolist()
    assert whole.popularity() == pytest.approx(parts.popularity(), rel=1e-5)


def test_popularity_forgets_by_half() -> None:
    """An event weighs half after half_life newer ones, also over a scaling down of all weights."""
    vocabulary = Vocabulary(LearningSettings(admit_sightings=1, popularity_half_life_events=100))
    vocabulary.count(keys(1))
    vocabulary.count(np.full(100, 2, np.uint32))
    assert vocabulary.popularity()[0] == pytest.approx(0.5, rel=1e-3)
    for _ in range(50):
        vocabulary.count(np.full(100, 2, np.uint32))
    assert vocabulary.popularity()[1] == pytest.approx(1 / (1 - 0.5**0.01), rel=1e-3)
    assert vocabulary.popularity()[0] == pytest.approx(0.0, abs=1e-6)


def test_what_is_not_seen_for_long_leaves_and_its_row_is_reused() -> None:
    """After the time to live a row is reported as retired, is free, and may stand for another interest."""
    vocabulary = Vocabulary(LearningSettings(admit_sightings=1, interest_ttl_events=1_000))
    vocabulary.note({5: "five", 6: "six"})
    vocabulary.count(keys(5))
    vocabulary.count(np.full(5_000, 6, np.uint32))
    counted = vocabulary.count(keys(6))
    assert counted.retired.tolist() == [0]
    assert vocabulary.find(keys(5)).tolist() == [-1]
    assert vocabulary.popularity()[0] == 0.0
    assert vocabulary.count(keys(77)).admitted.tolist() == [0]
    assert vocabulary.names == ["", "six"]


def test_a_full_vocabulary_gives_up_the_longest_unseen() -> None:
    """More interests than fit: the size stays bounded and those of today get rows."""
    settings = LearningSettings(admit_sightings=1, interests_max=100)
    vocabulary = Vocabulary(settings)
    for first in range(0, 40_000, 100):
        vocabulary.count(np.repeat(np.arange(first + 1, first + 101, dtype=np.uint32), 1))
    assert len(vocabulary) <= 100
    newest = vocabulary.find(np.arange(36_001, 40_001, dtype=np.uint32))
    assert (newest >= 0).any()


def test_those_that_wait_are_bounded() -> None:
    """A flood of interests that are seen once does not fill the memory."""
    vocabulary = Vocabulary(LearningSettings(admit_at_once=100))
    vocabulary.count(np.arange(1, WAITING_MAX + 5_000, dtype=np.uint32))
    assert len(vocabulary) == 100
    assert len(vocabulary._waiting) == WAITING_MAX


def test_a_second_name_for_a_key_is_counted() -> None:
    """Hash collisions are noticed: the first name stays, before and after the admission."""
    vocabulary = Vocabulary(LearningSettings(admit_sightings=1))
    vocabulary.note({5: "shoes"})
    vocabulary.note({5: "boats"})
    vocabulary.count(keys(5))
    vocabulary.note({5: "boats"})
    vocabulary.note({5: "shoes"})
    assert (vocabulary.names, vocabulary.collisions) == (["shoes"], 2)


def test_a_restored_vocabulary_goes_on_alike() -> None:
    """Bytes carry rows, counts, waiting ones and free rows."""
    settings = LearningSettings(interest_ttl_events=1_000)
    random = np.random.default_rng(2)
    stream = random.zipf(1.3, 9_000).clip(1, 2_000).astype(np.uint32)
    one = Vocabulary(settings)
    one.note({1: "one"})
    one.count(stream[:6_000])
    two = Vocabulary.from_bytes(one.to_bytes(), settings)
    for vocabulary in (one, two):
        vocabulary.count(stream[6_000:])
    assert one.to_bytes() == two.to_bytes()
    with pytest.raises(ValueError, match="not a vocabulary"):
        Vocabulary.from_bytes(b"\x00", settings)


def test_key_zero_is_nothing() -> None:
    """Key 0 is a free row or an empty slot: it is never found."""
    index = RowIndex(keys(0, 4, 0))
    assert index.find(keys(0, 4)).tolist() == [-1, 1]


def test_followers_are_those_that_came_after() -> None:
    """Moves are counted, repeats are not; the lightest gives way; cleared rows leave every list."""
    successors = Successors.empty(2)
    successors.grow(5)
    moves = [(0, 1), (0, 1), (0, 2), (0, 3), (1, 1), (-1, 2), (2, 4)]
    sources = np.array([[m[0], -1] for m in moves], np.int32)
    successors.count(sources, np.array([m[1] for m in moves], np.int32), 0.99)
    assert sorted(successors.follower_VM[0].tolist()) == [1, 3]
    assert successors.follower_VM[1].tolist() == [0, -1]  # the other way round, and lighter
    assert successors.weight_VM[1, 0] < successors.weight_VM[0].max()
    popularity = np.ones(5, np.float32)
    found = successors.look_up(np.array([[0, 1, -1, 4]], np.int32), popularity)
    extra = dict(zip(found.row_EM[0].tolist(), found.extra_EM[0].tolist(), strict=True))
    assert extra[1] > extra[3] > 0
    assert found.base_E[0] + sum(extra.values()) == pytest.approx(1.0)
    lift = math.log1p(extra[1] / found.base_E[0] * 5 / 1.5)
    assert found.lift_EC[0].tolist() == pytest.approx([0.0, lift, 0.0, 0.0])
    assert found.lift_ECS[0, 1].tolist() == pytest.approx([lift, 0.0, 0.0])
    assert 0 < found.covered_E[0] < 1
    assert successors.stay_V[1] > successors.stay_V[2] > successors.stay_V[0]
    successors.clear(np.array([1], np.int64))
    assert 1 not in successors.follower_VM
