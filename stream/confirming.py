"""Trials of a batch: where they begin, what its events say to those that are pending, and which alerts people see.

On the way of an event: called by stream/alerts.py, alert by alert and moment by moment in the order of the partition.
What a trial is stands in models/confirmation.py, what an alert is worth in models/ranking.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from models.confirmation import ALERT, MOMENT, Start, judge, since_of_moment, trial_of
from models.features import I64, U64
from models.followup import Followed, hurried, sums, with_length
from models.profile import Advanced, Snapshot
from models.ranking import promise_of, worth_of
from models.shift import ShiftSettings
from models.shift_groups import GroupTable
from models.walk import AGE_EDGES, AGGREGATES, WEIGHT_SCALE
from stream import records as out
from stream.engine import Output
from stream.events import Decoded

Allowed = Callable[[int], int]  # how many alerts of a day people may see
_PRICE, _PURCHASES = AGGREGATES.index("log_price"), AGGREGATES.index("purchase_share")
_ROUND = 4


class Following:
    """What happens in one batch of a partition; reads the group table, changes nothing in it."""

    def __init__(
        self,
        groups: GroupTable,
        decoded: Decoded,
        advanced: Advanced,
        settings: ShiftSettings,
        where: tuple[I64, npt.NDArray[np.uint8]],
    ) -> None:
        """`where`: offset of each event's record, and the number of its topic."""
        self._groups, self._decoded, self._advanced, self._settings = groups, decoded, advanced, settings
        self._place_B, self._topic_B = where
        self._followup = groups.followup
        self._lengths, self._budget = self._followup.lengths, self._followup.budget
        self._started: list[Any] = []
        self._began: list[int] = []
        self._told: list[tuple[int, int]] = []
        self._row = {int(event): row for row, event in enumerate(advanced.alarmed.event_E.tolist())}

    def moment(self, event: int, row: int) -> None:
        """A random moment before an event; `row` of the snapshots before events."""
        if int(self._advanced.before.events_E[row]) < self._settings.age_min_events:
            return
        since = since_of_moment(int(self._place_B[event]), int(self._topic_B[event]), list(self._lengths))
        trial = self._trial(self._advanced.before, Start(event=event, kind=MOMENT, row=row, since=since))
        if trial is not None:
            self._begin(trial, event - 1)

    def hurried(self, event: int) -> bool:
        """Whether the user has had so many alerts lately that one more is not told."""
        told = [*self._followup.told, *self._told]
        return hurried(told, int(self._decoded.user_key_B[event]), int(self._decoded.columns.time_ms[event]))

    def alert(self, event: int, severity: float, confidence: float, allowed: Allowed | None) -> dict[str, Any]:
        """An alert on a user: its trial begins; the fields of the record that say what it is worth."""
        advanced, row = self._advanced, self._row[event]
        since = int(advanced.onset_events_B[event])
        above = float(advanced.evidence_B[event]) - float(advanced.threshold_B[event])
        trial = self._trial(advanced.alarmed, Start(event=event, kind=ALERT, row=row, since=since, evidence=above))
        promise = 0.5
        if trial is not None:
            promise = promise_of(self._followup.coefficients, trial["features"][0].tolist())
            self._begin(trial, event)
            self._lengths = with_length(self._lengths, since)
        self._told.append((int(self._decoded.user_key_B[event]), int(self._decoded.columns.time_ms[event])))
        known = advanced.alarmed.aggregates_EA[row]
        purchases = float(known[_PURCHASES]) * float(advanced.alarmed.events_E[row])
        worth = worth_of(purchases, float(known[_PRICE]))
        score = severity * confidence * worth * promise
        told = True
        if allowed is not None:
            time_ms = int(self._decoded.columns.time_ms[event])
            told, self._budget = self._budget.offered(score, time_ms, allowed)
        return {
            "promise": round(promise, _ROUND),
            "worth": round(worth, _ROUND),
            "value": round(worth * promise, _ROUND),
            "rank_score": round(score, _ROUND),
            "tier": out.ALERT if told else out.NOTICE,
        }

    def done(self) -> Followed:
        """After the last alert: the batch's events are put to all trials."""
        pending = self._followup.trials
        trials = np.concatenate([pending, *self._started]) if self._started else pending.copy()
        began = np.concatenate([np.full(len(pending), -1, np.int64), np.array(self._began, np.int64)])
        columns = self._decoded.columns
        changed, judged = judge(trials, began, self._decoded.user_key_B, columns.interest, self._shares)
        return Followed(
            trials=trials, changed=changed, judged=judged, lengths=self._lengths, budget=self._budget, told=self._told
        )

    def started_keys(self) -> U64:
        """The users of whom something new is kept."""
        return np.array([int(rows["key"][0]) for rows in self._started] + [key for key, _ in self._told], np.uint64)

    def _shares(self, event_E: I64) -> npt.NDArray[np.float64]:
        interest = self._decoded.columns.interest[event_E]
        return self._groups.shares(interest, np.zeros(len(interest), np.uint8))[0]

    def _begin(self, trial: Any, after: int) -> None:
        if len(self._started) < self._followup.room():
            self._started.append(trial)
            self._began.append(after)

    def _trial(self, snapshot: Snapshot, start: Start) -> Any:
        ring = np.ascontiguousarray(snapshot.ring_interest_ER[start.row])
        return trial_of(
            snapshot,
            start,
            key=int(self._decoded.user_key_B[start.event]),
            place=int(self._place_B[start.event]),
            topic=int(self._topic_B[start.event]),
            decay_code=max(1, round(WEIGHT_SCALE / self._groups.rule.half_life_events)),
            gap_s=self._settings.session_gap_s,
            share_R=self._groups.shares(ring, np.zeros(len(ring), np.uint8))[0],
        )


def verdict_outputs(done: Followed, decoded: Decoded, partition: int, topics: tuple[str, ...]) -> list[Output]:
    """A record for each alert that is judged now."""
    outputs = []
    for one in done.judged:
        if int(one.trial["kind"]) != ALERT:
            continue
        user, source = decoded.users[one.event], decoded.source(one.event)
        alert_id = f"{topics[int(one.trial['topic'])]}/{partition}/{int(one.trial['place'])}"
        verdict = out.Verdict(
            id=f"{alert_id}/verdict",
            alert_id=alert_id,
            user=user,
            source=source,
            judged_at_ms=int(decoded.columns.time_ms[one.event]),
            confirmed=one.confirmed,
            gain=round(one.gain, _ROUND),
        )
        outputs.append(Output(stream="verdicts", key=user.encode(), value=out.encode(verdict)))
    return outputs


def judged_by_age(done: Followed) -> list[out.JudgedGroup]:
    """Sums for BatchMetrics."""
    return [
        out.JudgedGroup(
            age=age_name(group),
            alerts=counts[0],
            alerts_confirmed=counts[1],
            moments=counts[2],
            moments_confirmed=counts[3],
        )
        for group, counts in sums(done.judged).items()
    ]


def age_name(group: int) -> str:
    """Events of the users of a group, as `80-159`."""
    first = AGE_EDGES[group - 1] if group else 0
    return f"{first}-{AGE_EDGES[group] - 1}" if group < len(AGE_EDGES) else f"{first}+"
