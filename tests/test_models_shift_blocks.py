"""Labelled blocks: a stranger's are told from the user's own, and what he did is not learned."""

from __future__ import annotations

import numpy as np

from models.shift import ShiftSettings
from models.shift_blocks import Labels, block_scores
from models.shift_suites import histories_of

_USERS, _BLOCK, _CLEAN, _BLOCKS = 12, 50, 20, 40


def _labels(seed: int) -> Labels:
    """Users with twenty commands of their own; blocks 25 to 27 of every other user are the next user's."""
    rng = np.random.default_rng(seed)
    own = [rng.choice(200, 20, replace=False) + 1 for _ in range(_USERS)]
    theirs = np.zeros((_USERS, _BLOCKS), np.bool_)
    theirs[::2, 25:28] = True
    drawn = [
        rng.choice(own[(u + theirs[u, b]) % _USERS], _BLOCK) for u in range(_USERS) for b in range(_BLOCKS)
    ]  # fmt: skip
    users = np.repeat(np.arange(_USERS), _BLOCKS * _BLOCK)
    time_ms = np.tile(np.arange(_BLOCKS * _BLOCK) * 1_000, _USERS)
    user_K, block_K = np.divmod(np.arange(_USERS * (_BLOCKS - _CLEAN)), _BLOCKS - _CLEAN)
    return Labels(
        users=histories_of(users, np.concatenate(drawn).astype(np.uint32), time_ms),
        user_K=user_K,
        first_K=(block_K + _CLEAN) * _BLOCK,
        masquerader_K=theirs[user_K, block_K + _CLEAN],
        block=_BLOCK,
    )


def test_strangers_blocks_are_told_from_own_ones() -> None:
    """Nearly every pair of a stranger's and an own block is in the right order, whatever the profile's length."""
    labels = _labels(1)
    for length in (0, 128):
        score_K = block_scores(labels, ShiftSettings(profile_interests=length))
        strange, own = score_K[labels.masquerader_K], score_K[~labels.masquerader_K]
        assert np.isfinite(score_K).all()
        assert np.mean(strange[:, None] > own[None, :]) > 0.97


def test_a_strangers_blocks_are_not_learned() -> None:
    """Of three blocks in a row by a stranger the last one says as much as the first; labels are not looked at."""
    labels = _labels(2)
    score_K = block_scores(labels, ShiftSettings())
    place = (labels.first_K // _BLOCK)[labels.masquerader_K]
    strange = score_K[labels.masquerader_K]
    assert strange[place == 27].mean() >= strange[place == 25].mean()
    swapped = Labels(
        users=labels.users,
        user_K=labels.user_K,
        first_K=labels.first_K,
        masquerader_K=~labels.masquerader_K,
        block=_BLOCK,
    )
    assert np.array_equal(score_K, block_scores(swapped, ShiftSettings()))
