"""What a partition remembers of its alerts: pending trials, verdicts, the chance that an alert holds, the day's budget.

On the way of an event: a part of the partition's group table, as bytes in its deltas and snapshots. What is learned
from verdicts is frozen within an epoch; what moves inside one (trials, the budget) moves in the order of the partition.

    delta      what a batch changed: trials that went on (by their place in the table), those that began, verdicts, the
               lengths of the last alerts, the budget
    snapshot   everything
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from models.confirmation import STARTS_MAX, TRIAL, TRIALS_MAX, VERDICT, Judged, verdicts_of
from models.features import U64
from models.ranking import Budget, learned, nothing_learned

Rows = npt.NDArray[Any]

TOLD_MAX = 1_024  # alerts by which a hurried user is known
HURRIED_ALERTS = 3
HURRIED_MS = 3_600_000
VERDICTS_MAX = 2_048  # that the chance is learned from, the newest
_LENGTHS_MAX = 32


class FollowUpDelta(msgspec.Struct, array_like=True):
    """See the module's text; rows and places as bytes."""

    places: bytes
    gains: bytes
    left: bytes
    started: bytes
    starts: int
    verdicts: bytes
    lengths: tuple[int, ...]
    budget: Budget
    told: list[tuple[int, int]]


class FollowUpSnapshot(msgspec.Struct, array_like=True):
    """Everything."""

    trials: bytes
    starts: int
    verdicts: bytes
    fresh: int
    lengths: tuple[int, ...]
    coefficients: tuple[float, ...]
    budget: Budget
    told: list[tuple[int, int]]


@dataclass(kw_only=True, slots=True)
class Followed:
    """What a batch did: the trials after it, those that are over, and what else moved.

    Attributes:
        trials: all that were pending and those that began, in order; over ones are among them.
        changed: which of the pending ones went on.
    """

    trials: Rows
    changed: npt.NDArray[np.bool_]
    judged: list[Judged] = field(default_factory=list)
    lengths: tuple[int, ...] = ()
    budget: Budget = field(default_factory=Budget)
    told: list[tuple[int, int]] = field(default_factory=list)


class FollowUp:
    """One partition's."""

    def __init__(self) -> None:
        self.trials = np.zeros(0, TRIAL)
        self.starts = 0  # trials that began in this epoch
        self.verdicts = np.zeros(0, VERDICT)
        self.fresh = 0  # verdicts since the last cut
        self.lengths: tuple[int, ...] = ()  # events since the onsets of the last alerts
        self.coefficients = nothing_learned()  # frozen
        self.budget = Budget()
        self.told: list[tuple[int, int]] = []  # user and event time of the last alerts

    def room(self) -> int:
        """How many trials may still begin in this epoch."""
        return max(0, STARTS_MAX - self.starts)

    def delta(self, done: Followed) -> bytes:
        """What a batch changed; empty for nothing."""
        pending = len(self.trials)
        changed = np.flatnonzero(done.changed[:pending])
        started = done.trials[pending:]
        if (
            not len(changed)
            and not len(started)
            and not done.told
            and done.budget == self.budget
            and done.lengths == self.lengths
        ):
            return b""
        return msgspec.msgpack.encode(
            FollowUpDelta(
                changed.astype("<i4").tobytes(),
                done.trials["gain"][changed].astype("<i8").tobytes(),
                done.trials["left"][changed].tobytes(),
                started.tobytes(),
                self.starts + len(started),
                verdicts_of(done.judged).tobytes(),
                done.lengths,
                done.budget,
                done.told,
            )
        )

    def apply(self, payload: bytes) -> None:
        """Take a committed delta over."""
        delta = msgspec.msgpack.decode(payload, type=FollowUpDelta)
        places = np.frombuffer(delta.places, "<i4")
        self.trials["gain"][places] = np.frombuffer(delta.gains, "<i8")
        self.trials["left"][places] = np.frombuffer(delta.left, "u1")
        trials = np.concatenate([self.trials, np.frombuffer(delta.started, TRIAL)])
        self.trials = trials[trials["left"] > 0]
        self.starts = delta.starts
        verdicts = np.frombuffer(delta.verdicts, VERDICT)
        self.fresh += len(verdicts)
        self.verdicts = np.concatenate([self.verdicts, verdicts])
        self.lengths, self.budget = delta.lengths, delta.budget
        self.told = [*self.told, *delta.told][-TOLD_MAX:]

    def cut(self) -> FollowUp:
        """The next epoch's: what was learned anew from the verdicts, and no more than the bounds allow."""
        after = FollowUp()
        after.trials = self.trials[-TRIALS_MAX:].copy()
        after.verdicts = self.verdicts[-VERDICTS_MAX:].copy()
        after.lengths, after.budget, after.told = self.lengths, self.budget, list(self.told)
        after.coefficients = learned(after.verdicts) if self.fresh else self.coefficients
        return after

    def knows(self, user_keys: U64) -> bool:
        """Whether something of one of these users is kept."""
        told = np.array([key for key, _ in self.told], np.uint64)
        return bool(np.isin(self.trials["key"], user_keys).any() or np.isin(told, user_keys).any())

    def forget(self, user_keys: U64) -> None:
        """Drop the trials of these users."""
        self.trials = self.trials[~np.isin(self.trials["key"], user_keys)]
        gone = set(user_keys.tolist())
        self.told = [one for one in self.told if one[0] not in gone]

    def dump(self) -> FollowUpSnapshot:
        return FollowUpSnapshot(
            self.trials.tobytes(),
            self.starts,
            self.verdicts.tobytes(),
            self.fresh,
            self.lengths,
            self.coefficients,
            self.budget,
            self.told,
        )

    @staticmethod
    def load(saved: FollowUpSnapshot) -> FollowUp:
        followup = FollowUp()
        followup.trials = np.frombuffer(saved.trials, TRIAL).copy()
        followup.starts, followup.fresh = saved.starts, saved.fresh
        followup.verdicts = np.frombuffer(saved.verdicts, VERDICT).copy()
        followup.lengths, followup.coefficients, followup.budget = saved.lengths, saved.coefficients, saved.budget
        followup.told = saved.told
        return followup


def hurried(told: list[tuple[int, int]], key: int, time_ms: int) -> bool:
    """Whether a user, a bot most likely, has had its alerts of an hour of event time."""
    mine = [ms for user, ms in told[-TOLD_MAX:] if user == key and abs(time_ms - ms) < HURRIED_MS]
    return len(mine) >= HURRIED_ALERTS


def with_length(lengths: tuple[int, ...], since: int) -> tuple[int, ...]:
    """The lengths of the last alerts, with one more."""
    return (*lengths, since)[-_LENGTHS_MAX:]


def sums(judged: list[Judged]) -> Mapping[int, list[int]]:
    """By group: alerts judged, confirmed, moments judged, confirmed."""
    counts: dict[int, list[int]] = {}
    for one in judged:
        mine = counts.setdefault(int(one.trial["group"]), [0, 0, 0, 0])
        mine[2 * int(one.trial["kind"])] += 1
        mine[2 * int(one.trial["kind"]) + 1] += one.confirmed
    return dict(sorted(counts.items()))
