"""Weights as bytes: they come back as they went, or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from models.forecaster import initial_weights
from models.settings import NetworkSettings
from models.snapshot import Weights


def test_weights_come_back_as_they_went() -> None:
    """Every tensor bit for bit, names and version; the same weights give the same bytes."""
    weights = initial_weights(NetworkSettings(interest_width=8), 3)
    named = Weights(version=12, settings=weights.settings, tensors=weights.tensors, names=["é", ""])
    back = Weights.from_bytes(named.to_bytes())
    assert (back.version, back.settings, back.names) == (12, named.settings, ["é", ""])
    assert back.tensors.keys() == named.tensors.keys()
    assert all(np.array_equal(back.tensors[n], t) for n, t in named.tensors.items())
    assert back.to_bytes() == named.to_bytes()


@pytest.mark.parametrize(("place", "message"), [(0, "not weights"), (20, "broken header|settings"), (-3, "checksum")])
def test_damage_is_noticed(place: int, message: str) -> None:
    """One wrong byte anywhere is an error that says what is wrong."""
    payload = bytearray(initial_weights(NetworkSettings(interest_width=8), 3).to_bytes())
    payload[place] ^= 0xFF
    with pytest.raises(ValueError, match=message):
        Weights.from_bytes(bytes(payload))


def test_the_seed_decides() -> None:
    """Version 0 is made from the seed alone, and leaves the global generator alone."""
    import torch

    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one = initial_weights(NetworkSettings(), 7).to_bytes()
    assert torch.equal(torch.rand(1), expected)
    assert one == initial_weights(NetworkSettings(), 7).to_bytes()
    assert one != initial_weights(NetworkSettings(), 8).to_bytes()
