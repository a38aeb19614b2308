"""Do alerts hold? Each is put to the test on its user's next 30 events, and so are random moments, without labels.

On the way of an event: beside the alerts. A trial remembers what a user did before an onset and since it; each of the
user's next events says which of the two foretold it better, and after NEXT_EVENTS of them the sum is the verdict. A
trial at a random moment has an onset that is made up, as long ago as those of the last alerts, so both are judged by as
much evidence. What an alert is worth is the difference of the two shares, within a group of users of one age.

    trial (TRIAL)    one pending test: 340 bytes; lies in the partition's group table, not in the user's record
    bounds           TRIALS_MAX pending ones stay at an epoch cut, the newest; STARTS_MAX begin in an epoch
    sums             in whole units of 2^-20 nats: any cut into batches adds up to the same
    moments          events chosen by a hash of where they were read: the same for any batches, workers and restarts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.features import I64, U8, U32, U64
from models.walk import AGE_EDGES, GAP_SCALE, RING, WEIGHT_SCALE

if TYPE_CHECKING:
    from models.profile import Snapshot

F64 = npt.NDArray[np.float64]
Rows = npt.NDArray[Any]

ALERT, MOMENT = 0, 1
KINDS = 2
NEXT_EVENTS = 30
TRIALS_MAX = 2_048
STARTS_MAX = 1_024  # of trials in an epoch
MOMENTS_PER_ALARM = 2.0  # random moments for each alarm that is asked for
SINCE_MIN = 3  # events since an onset; fewer foretell nothing
BEFORE_MIN = 5.0  # decayed events before it
GROUPS = len(AGE_EDGES) + 1
_BEFORE = 24  # interests of before that are kept, the largest
_PRIOR = 5.0  # events' worth of everybody's shares in either side
_UNIT = 1 << 20
_LENGTH_FIRST = 8  # events since a made-up onset while there was no alert

FEATURES = ("foretold", "turned", "log_since", "log_visits", "recurring", "known", "evidence", "is_alert")
FEATURE_COUNT = len(FEATURES)

TRIAL = np.dtype(
    [
        ("key", "<u8"),
        ("place", "<i8"),  # offset of the input record at which it began
        ("gain", "<i8"),  # log-likelihood that the events so far gave to since against before, in 2^-20 nats
        ("before_interest", "<u4", (_BEFORE,)),
        ("before_weight", "<f4", (_BEFORE,)),  # decayed counts
        ("since_interest", "<u4", (RING,)),
        ("since_count", "u1", (RING,)),
        ("before_total", "<f4"),
        ("features", "<f4", (FEATURE_COUNT,)),
        ("since_total", "u1"),
        ("left", "u1"),  # events until the verdict
        ("topic", "u1"),  # which input topic
        ("group", "u1"),  # age of the user
        ("kind", "u1"),  # ALERT, MOMENT
        ("spare", "u1", (3,)),
    ]
)
# A verdict: what was known when it began, and what came of it.
VERDICT = np.dtype([("features", "<f4", (FEATURE_COUNT,)), ("group", "u1"), ("kind", "u1"), ("confirmed", "u1")])


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A trial that a batch has ended: its row, the event that ended it, and the gain in nats."""

    trial: Any
    event: int
    confirmed: bool
    gain: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where a trial begins.

    Attributes:
        event: index in the batch; the first of the next events is the one after it (at a moment, itself).
        row: of the snapshot: of an alert at the alarm, of a moment before the event.
        since: events since the onset, real or made up.
        evidence: nats above the threshold; 0 at a moment.
    """

    event: int
    kind: int
    row: int
    since: int
    evidence: float = 0.0


def moments(place_B: I64, topic_B: U8, requested: float) -> npt.NDArray[np.bool_]:
    """Which events are random moments, given that one alarm in `requested` events is asked for."""
    one_in = max(1, round(requested / MOMENTS_PER_ALARM))
    chosen: npt.NDArray[np.bool_] = _mixed(place_B, topic_B) % np.uint64(one_in) == 0
    return chosen


def since_of_moment(place: int, topic: int, lengths: list[int]) -> int:
    """How long ago the made-up onset of a moment lies: as one of the last alerts."""
    drawn = int(_mixed(np.array([place]), np.array([topic], np.uint8))[0]) >> 32
    return lengths[drawn % len(lengths)] if lengths else _LENGTH_FIRST


def _mixed(place: I64, topic: U8) -> U64:
    """A well mixed number of each place (the finaliser of splitmix64)."""
    x = place.astype(np.uint64) * np.uint64(256) + topic.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: U64 = x ^ (x >> np.uint64(31))
    return mixed


# ---------------------------------------------------------------------- a trial begins


def trial_of(
    snapshot: Snapshot, start: Start, *, key: int, place: int, topic: int, decay_code: int, gap_s: float, share_R: F64
) -> Rows | None:
    """The trial that begins at a snapshot; None where there is too little before the onset.

    Args:
        decay_code: by how much the slow profile decays at each event; what it learned since the onset is taken out.
        gap_s: a pause longer than this ends a visit.
        share_R: shares of the ring's interests among all users.
    """
    e, events = start.row, int(snapshot.events_E[start.row])
    since = min(RING, max(SINCE_MIN, start.since), events)
    ring = snapshot.ring_interest_ER[e, :since]
    before, total = _before(snapshot, e, since, decay_code)
    if total < BEFORE_MIN:
        return None
    keys, counts = np.unique(ring, return_counts=True)
    rows = np.zeros(1, TRIAL)
    row = rows[0]
    row["key"], row["place"], row["topic"] = key, place, topic
    largest = sorted(before.items(), key=lambda item: (-item[1], item[0]))[:_BEFORE]
    for i, (interest, weight) in enumerate(largest):
        row["before_interest"][i], row["before_weight"][i] = interest, weight
    row["before_total"] = total
    row["since_interest"][: len(keys)], row["since_count"][: len(keys)] = keys, counts
    row["since_total"], row["left"], row["kind"] = since, NEXT_EVENTS, start.kind
    row["group"] = np.searchsorted(AGE_EDGES, events, side="right")
    row["features"] = _features(rows, ring, snapshot.ring_gap_ER[e, :since], gap_s, share_R[:since], start)
    return rows


def _before(snapshot: Snapshot, e: int, since: int, decay_code: int) -> tuple[dict[int, float], float]:
    """Decayed counts of before the onset: the slow profile less what it has learned since."""
    n = float(snapshot.slow_total_E[e])
    before = {
        interest: share * n
        for interest, share in zip(
            snapshot.slow_interest_EP[e].tolist(), snapshot.slow_share_EP[e].tolist(), strict=True
        )
        if interest
    }
    held, weight, total = int(snapshot.held_E[e]), 1.0, n
    for i, interest in enumerate(snapshot.ring_interest_ER[e, :since].tolist()):
        if held >> i & 1:
            continue
        total -= weight
        if interest in before:
            before[interest] -= weight
        weight *= 2.0 ** (-decay_code / WEIGHT_SCALE)
    return {interest: w for interest, w in before.items() if w > 1e-3}, total


def _features(rows: Rows, ring: U32, gap_code: Any, gap_s: float, share: F64, start: Start) -> list[float]:
    """What may tell an alert that holds from one that does not; see FEATURES.

    `foretold`: nats by which the events since the onset foretell one another better than those before do, each left
    out in turn. `turned`: share of the events that are other ones than before. `recurring`: share of the events since
    whose interest came in more than one visit.
    """
    row = rows[0]
    n = len(ring)
    of_before = _weights(row["before_interest"], row["before_weight"], ring)
    of_since = _weights(row["since_interest"], row["since_count"], ring)
    total = float(row["before_total"])
    alone = np.log((of_since - 1.0 + _PRIOR * share) / (n - 1.0 + _PRIOR))
    against = np.log((of_before + _PRIOR * share) / (total + _PRIOR))
    starts = np.exp2(gap_code.astype(np.float64) / GAP_SCALE) - 1.0 > gap_s
    visit = np.cumsum(starts) - starts  # newest first: a visit ends, going back, at the event that began it
    visits_of = {interest: len(set(visit[ring == interest].tolist())) for interest in set(ring.tolist())}
    recurring = np.mean([visits_of[interest] > 1 for interest in ring.tolist()])
    shares: dict[int, tuple[float, float]] = {}
    for interest, p, q in zip(ring.tolist(), (of_before / total).tolist(), (of_since / n).tolist(), strict=True):
        shares[interest] = (p, q)
    common = sum(min(p, q) for p, q in shares.values())
    return [
        float(np.clip(np.mean(alone - against), -4.0, 4.0)),
        1.0 - common,
        float(np.log(n)),
        float(np.log1p(int(visit.max(initial=0)))),
        float(recurring),
        float(np.mean(of_before > 0.5)),
        min(4.0, start.evidence),
        float(start.kind == ALERT),
    ]


# ---------------------------------------------------------------------- and is judged


def judge(
    trials: Rows, began: I64, key_B: U64, interest_B: U32, share_of: Any
) -> tuple[npt.NDArray[np.bool_], list[Judged]]:
    """Put a batch's events to the trials of their users, which are changed in place.

    Args:
        trials: TRIAL rows, the batch's own copy.
        began: for each, the event of the batch after which its next events come; -1: before the batch.
        share_of: gives the shares among all users of the interests of some events.

    Returns:
        Which trials changed, and those that are over, in the order of the events that ended them.
    """
    changed = np.zeros(len(trials), np.bool_)
    if not len(trials):
        return changed, []
    event_E = np.flatnonzero(np.isin(key_B, trials["key"]))
    key_E, interest_E = key_B[event_E], interest_B[event_E]
    share_E = share_of(event_E)
    judged = []
    for t in np.flatnonzero(np.isin(trials["key"], key_E)).tolist():
        mine = np.flatnonzero((key_E == trials["key"][t]) & (event_E > began[t]))[: int(trials["left"][t])]
        if not len(mine):
            continue
        changed[t] = True
        trials["gain"][t] += _gain(trials[t], interest_E[mine], share_E[mine])
        trials["left"][t] -= len(mine)
        if not trials["left"][t]:
            gain = float(trials["gain"][t]) / _UNIT
            judged.append(Judged(trial=trials[t], event=int(event_E[mine[-1]]), confirmed=gain > 0.0, gain=gain))
    return changed, sorted(judged, key=lambda j: (j.event, int(j.trial["kind"]), int(j.trial["place"])))


def verdicts_of(judged: list[Judged]) -> Rows:
    """What is remembered of trials that are over."""
    rows = np.zeros(len(judged), VERDICT)
    for i, one in enumerate(judged):
        for name in ("features", "group", "kind"):
            rows[name][i] = one.trial[name]
        rows["confirmed"][i] = one.confirmed
    return rows


def _gain(trial: Any, interest_E: U32, share_E: F64) -> int:
    since = _weights(trial["since_interest"], trial["since_count"], interest_E) + _PRIOR * share_E
    before = _weights(trial["before_interest"], trial["before_weight"], interest_E) + _PRIOR * share_E
    gain_E = np.log(since / (float(trial["since_total"]) + _PRIOR)) - np.log(
        before / (float(trial["before_total"]) + _PRIOR)
    )
    return int(np.rint(gain_E * _UNIT).astype(np.int64).sum())


def _weights(interest_P: U32, weight_P: Any, interest_E: U32) -> F64:
    """The weight of each event's interest in a profile; 0 where it is not there."""
    found: F64 = np.where(interest_P[None, :] == interest_E[:, None], weight_P.astype(np.float64)[None, :], 0.0).sum(1)
    return found
