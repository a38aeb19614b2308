"""Drifts of aggregates: told where the mean moves, silent where it stands, the same over any cut and restore."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.drifts import ERRORS, SLICE, Drifts, Found, StreamChange

SLICES = 120


def noise(seed: int, slices: int = SLICES, jump: float = 0.0) -> np.ndarray:
    """Values with a deviation of 1; the mean rises by `jump` in the middle."""
    values = np.random.default_rng(seed).normal(0.0, 1.0, slices * SLICE)
    values[len(values) // 2 :] += jump
    return values


def told(values: np.ndarray, batch: int, stream: int = 0, restore: bool = False) -> tuple[list[Found], Drifts]:
    """What is found, with events counted from the first one, and what is kept in the end."""
    drifts, found = Drifts(), []
    for begin in range(0, len(values), batch):
        where = np.arange(begin, min(begin + batch, len(values)))
        more, change = drifts.see(stream, values[where], where, 1_000 * where)
        found += more
        drifts.apply([change])
        if restore:
            saved = msgspec.msgpack.encode(drifts.dump())
            drifts = Drifts.load(msgspec.msgpack.decode(saved, type=list[StreamChange]))
    return found, drifts


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1_000),
    batch=st.sampled_from([7, 100, 256, 1_000, 4_096]),
    jump=st.sampled_from([0.0, 0.4, 2.0]),
)
def test_any_cut_finds_the_same_drifts(seed: int, batch: int, jump: float) -> None:
    """Batches of any size, with a restore after each, give the same drifts and leave the same bytes."""
    values = noise(seed, 40, jump)
    whole, parted = told(values, len(values)), told(values, batch, restore=True)
    assert whole[0] == parted[0]
    assert whole[1].dump() == parted[1].dump()


def test_the_older_half_goes_where_a_stream_is_long() -> None:
    """More slices than are kept: still the same over cuts, and bounded."""
    values = noise(3, 1_100)
    whole, parted = told(values, len(values)), told(values, 3_000, restore=True)
    assert whole[0] == parted[0] == []
    assert whole[1].dump() == parted[1].dump()
    assert 256 <= len(whole[1].dump()[0].sums) < 512


@pytest.mark.parametrize("seed", range(5))
def test_a_steady_stream_is_quiet(seed: int) -> None:
    """No mean moves, nothing is told: of interests, and of errors in 0..1."""
    assert told(noise(seed), 4_096)[0] == []
    errors = np.random.default_rng(seed).uniform(0.0, 1.0, SLICES * SLICE)
    assert told(errors, 4_096, ERRORS)[0] == []


@pytest.mark.parametrize("jump", [1.0, -1.0])
def test_a_mean_that_moves_is_told_with_its_onset(jump: float) -> None:
    """ADWIN sees a rise and a fall; the onset lies within some slices of the change; then the stream is calm again."""
    found = [f for f in told(noise(1, jump=jump), 4_096)[0] if f.detector == "adwin" or jump > 0]
    assert 1 <= len(found) <= 2
    first = found[0]
    assert first.event < (SLICES // 2 + 20) * SLICE
    assert abs(first.onset_ms / 1_000 - SLICES // 2 * SLICE) <= 8 * SLICE
    assert first.after - first.before == pytest.approx(jump, abs=0.3)


def test_an_error_that_rises_a_little_is_told() -> None:
    """Forecasts that get worse by .15 of a rank's reciprocal."""
    rng = np.random.default_rng(2)
    errors = np.clip(rng.normal(0.4, 0.2, SLICES * SLICE), 0, 1)
    errors[len(errors) // 2 :] = np.clip(rng.normal(0.55, 0.2, len(errors) // 2), 0, 1)
    found = told(errors, 4_096, ERRORS)[0]
    assert found and found[0].event >= SLICES // 2 * SLICE
    assert found[0].before == pytest.approx(0.4, abs=0.05)
