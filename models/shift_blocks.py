"""Labelled blocks of events: is this block the user's own, or somebody else's?

Beside the way of an event: S5 of models/shift_suites.py. A block is one unit of evidence, as a visit is, seen from the
record as it was before it:

    score   mean log-likelihood ratio of its events, population against the user's slow profile; the record stands still
    carry   odds that somebody else is at it: what the block says, and what the blocks before it leave. A stranger comes
            in one block of a hundred and stays for five on average
    guard   a block that the population explains better than the user (a mean above 0) is not learned

Up to the first labelled block everything is the user's own and is learned. Nothing here is fitted to labels.
Source: naive Bayes with updating, Maxion and Townsend 2002 (masquerade detection using truncated command lines).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from models.features import I64, EventColumns
from models.profile import replay, user_dtype_of
from models.shift_calibration import Histories, columns
from models.shift_rule import fixed_rule

if TYPE_CHECKING:
    from models.shift import ShiftSettings

F64 = npt.NDArray[np.float64]

_NEVER = 1e9
_CLIP = 8.0  # nats that one event may say: a whole block is looked at, and one event cannot carry it
_PRIOR, _UNSEEN = 0.5, 1_000  # count that every interest has from the start; interests that were never seen
_COMES, _GOES = 0.01, 0.2  # chances that a stranger comes, and goes, from one block to the next
_WORTH = 5.0  # independent events' worth of a block: a hundred events of a burst are far from a hundred witnesses
_MEMORY_BLOCKS = 30.0  # a block counts half in the slow profile after so many newer ones


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """Blocks of users' events that are known to be their own or somebody else's.

    Attributes:
        users: whole histories of the users that are reported on, labelled parts included.
        user_K, first_K: each block's user in `users` and where it begins in that user's history.
        masquerader_K: whether it is somebody else's.
        block: events in a block.
    """

    users: Histories
    user_K: I64
    first_K: I64
    masquerader_K: npt.NDArray[np.bool_]
    block: int


def block_scores(labels: Labels, settings: ShiftSettings) -> F64:
    """Log odds that each labelled block is somebody else's. What lies between labelled blocks is not looked at."""
    settings = msgspec.structs.replace(settings, ratio_clip=_CLIP)
    block, before_B = labels.block, _unlabelled(labels)
    users = replace(labels.users, share=_shares(labels.users, before_B))
    learning = fixed_rule(
        by_session=False,
        threshold=_NEVER,
        drift=0.0,
        kappa=settings.kappa,
        half_life_events=_MEMORY_BLOCKS * block,
        hold_share=1.0,
    )
    still = msgspec.structs.replace(learning, hold_share=-1.0)
    records = np.zeros(users.users, user_dtype_of(settings.profile_interests))
    before = np.flatnonzero(before_B)
    replay(records, _events(users, before, users.user[before]), users.share[before], learning, settings)
    stranger_U = np.full(users.users, _COMES)
    score_K = np.zeros(len(labels.user_K))
    for chosen_K in _rounds(labels):
        user = labels.user_K[chosen_K]
        begin = users.first[user] + labels.first_K[chosen_K]
        length = np.minimum(begin + block, users.first[user + 1]) - begin
        index = np.concatenate([np.arange(b, b + n) for b, n in zip(begin.tolist(), length.tolist(), strict=True)])
        row = np.repeat(np.arange(len(user)), length)
        said = replay(records[user], _events(users, index, row), users.share[index], still, settings).ratio_B
        mean = np.bincount(row, weights=said, minlength=len(user)) / length
        prior = stranger_U[user] * (1.0 - _GOES) + (1.0 - stranger_U[user]) * _COMES
        odds = _WORTH * mean + np.log(prior / (1.0 - prior))
        stranger_U[user] = 1.0 / (1.0 + np.exp(-np.clip(odds, -30.0, 30.0)))
        score_K[chosen_K] = odds
        own = mean[row] < 0.0
        learned = index[own]
        replay(records, _events(users, learned, user[row[own]]), users.share[learned], learning, settings)
    return score_K


def _unlabelled(labels: Labels) -> npt.NDArray[np.bool_]:
    """The events before their user's first labelled block."""
    users = labels.users
    end_U = users.first[1:].copy()
    np.minimum.at(end_U, labels.user_K, users.first[labels.user_K] + labels.first_K)
    return np.arange(len(users)) < end_U[users.user]


def _shares(users: Histories, before_B: npt.NDArray[np.bool_]) -> F64:
    """Share of each event's interest among the other users, before the first labelled blocks: strangers' are not in."""
    interests, row = np.unique(users.interest, return_inverse=True)
    count_UI = np.zeros((users.users, len(interests)))
    np.add.at(count_UI, (users.user[before_B], row[before_B]), 1.0)
    others = count_UI.sum(axis=0)[row] - count_UI[users.user, row]
    events = count_UI.sum() - count_UI.sum(axis=1)[users.user]
    share: F64 = (others + _PRIOR) / (events + _PRIOR * (len(interests) + _UNSEEN))
    return share


def _events(users: Histories, index: I64, row: I64) -> EventColumns:
    return columns(row, users.interest[index], users.time_ms[index])


def _rounds(labels: Labels) -> Iterator[I64]:
    """The users' first labelled blocks, then their second ones, and so on."""
    order = np.lexsort((labels.first_K, labels.user_K))
    user = labels.user_K[order]
    nth = np.arange(len(order)) - np.searchsorted(user, user)
    for n in range(int(nth.max(initial=-1)) + 1):
        yield order[nth == n]
