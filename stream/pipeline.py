"""The way of an event, top to bottom. No I/O, no clock, nothing that is not in the batch, the state or the weights.

    decode ──> [for each event of a user, in offset order]  detector ──> profile      one compiled walk, `advance`
           ──> GRU over the whole batch                                               one packed pass
           ──> score the forecasts made before the events (a share of users)
           ──> forecast where one is due
           ──> alerts with their reasons; what surges for everybody is told once          stream/alerts.py
           ──> verdicts on earlier alerts; which alerts people see                        stream/confirming.py
           ──> outputs, to be committed with the new records

Everything that judges an event is computed from the record BEFORE it. What crosses users is frozen between epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from models.confirmation import moments
from models.dedupe import first_sightings
from models.drifts import StreamChange
from models.features import EventColumns, type_name
from models.forecaster import Forecaster
from models.profile import Advanced, EmissionSettings, Snapshot, advance, emission_names, user_dtype_of
from models.ranking import allowance
from models.shift import GroupTable, ShiftSettings
from stream import records as out
from stream.alerts import SPEAKER, Batch, Places, Told, places, tell
from stream.confirming import Allowed
from stream.drifting import drifts_of
from stream.engine import Output, PartitionState, PartitionStep
from stream.errors import BadEvent
from stream.events import Decoded, EventDecoder, EventSettings, refuse
from stream.eviction import UNBOUNDED, Bounds, silent
from stream.orders import read_order
from stream.partition import misplaced
from stream.records import BatchMetrics
from stream.state import Records
from stream.transport import Record, TopicPartition

_HASH_SHARE = 1 << 20
_timestamp = attrgetter("timestamp")  # clicks and purchases of a batch are taken in the order of their records
_TYPES = 4  # event types named in a forecast
Floats = npt.NDArray[np.float32]
Ranks = npt.NDArray[np.int64]
# Told, in place of the live score, of the scored events: the batch, the records before them, the hidden states before
# them, and the seconds since each user's event before.
Judge = Callable[[Decoded, Snapshot, Floats, Floats], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSettings:
    """The parts of the configuration that the pipeline needs."""

    events: EventSettings
    shift: ShiftSettings
    emission: EmissionSettings
    steps: int
    top_k: int
    purchase_events: int  # within which the learner has learned to foretell a purchase
    quality_share: float
    epoch_records: int
    partitions: int = 1
    bounds: Bounds = UNBOUNDED
    control: str = ""  # the topic of orders, which come with the events
    topics: tuple[str, ...] = ("events",)
    daily_budget: int = 0  # alerts of a day for people, over all partitions; 0 = all
    first_epoch_records: int = 256


@dataclass(kw_only=True, slots=True)
class _Part:
    """One partition's share of a batch on its way through."""

    partition: int
    state: PartitionState
    positions: dict[TopicPartition, int]
    first_offset: int
    read: int
    decoded: Decoded
    names: dict[int, str]  # of the batch's interests, by key
    watermark_ms: int
    late: int
    duplicates: int
    new_users: list[str]
    records: Records
    advanced: Advanced
    to_erase: npt.NDArray[np.uint64]
    score_B: npt.NDArray[np.bool_]
    moment_B: npt.NDArray[np.bool_]  # random moments, at which nothing happened: alerts are compared with them
    where: Places
    drift_changes: list[StreamChange] = field(default_factory=list)
    first_event: int = 0  # where this part's events begin in the whole batch
    first_user: int = 0


class Pipeline:
    """The Engine of a real worker: see the module's docstring."""

    def __init__(
        self, settings: PipelineSettings, decoder: EventDecoder, forecaster: Forecaster, judge: Judge | None = None
    ) -> None:
        self.dtype = user_dtype_of(settings.shift.profile_interests)
        self._settings = settings
        self._decoder = decoder
        self._judge = judge
        self.forecaster = forecaster

    @property
    def weights_version(self) -> int:
        return self.forecaster.version

    def next_cut(self, seen: int) -> int:
        """Epochs double from a short first one, so that a new shop learns what is common early."""
        cut = self._settings.first_epoch_records
        while cut <= seen and cut < self._settings.epoch_records:
            cut *= 2
        every = self._settings.epoch_records
        return cut if cut > seen else (seen // every + 1) * every

    def new_groups(self) -> GroupTable:
        return GroupTable(self._settings.shift)

    def groups_from_snapshot(self, payload: bytes) -> GroupTable:
        return GroupTable.from_snapshot(payload, self._settings.shift)

    def groups_with(self, groups: GroupTable, delta: bytes) -> GroupTable:
        table = self.groups_from_snapshot(groups.snapshot())
        table.apply_delta(delta)
        return table

    def apply_group_delta(self, groups: GroupTable, payload: bytes) -> None:
        groups.apply_delta(payload)

    # ------------------------------------------------------------------ the story

    def process(
        self, states: Mapping[int, PartitionState], inputs: Mapping[TopicPartition, Sequence[Record]]
    ) -> list[PartitionStep]:
        """One batch; the states are read, never written."""
        parts = [self._walk(states[p], p, inputs) for p in sorted({tp.partition for tp in inputs})]
        hidden_before_BH, hidden_after_BH = self._encode(parts)
        steps = []
        for part in parts:
            span = slice(part.first_event, part.first_event + len(part.decoded))
            forecasts = self._forecasts(part, hidden_after_BH[span])
            told = self._alerts(part, forecasts)
            outputs = [_output("forecasts", f) for f in forecasts] + told.outputs + self._dead_letters(part)
            metrics = self._score(part, hidden_before_BH[span], told)
            steps.append(self._step(part, outputs, metrics, told))
        return steps

    def _walk(self, state: PartitionState, partition: int, inputs: Mapping[TopicPartition, Sequence[Record]]) -> _Part:
        """Decode one partition's records and walk its events: detector, profile, ring, what is due."""
        settings = self._settings
        here = [(tp, records) for tp, records in inputs.items() if tp.partition == partition]
        mine = dict(sorted(here, key=lambda part: part[0].topic == settings.control))  # orders behind the events
        events = [records for tp, records in mine.items() if tp.topic != settings.control]
        decoded = self._decoder.decode(list(merge(*events, key=_timestamp)))
        to_erase = self._orders(mine.get(TopicPartition(settings.control, partition), ()), decoded)
        decoded, watermark_ms, late = self._late(decoded, state.watermark_ms)
        keys_U, first_U, user_row = np.unique(decoded.user_key_B, return_index=True, return_inverse=True)
        decoded.columns.user_row = user_row.astype(np.int64)
        records = state.arena.take(keys_U)
        new_users = [decoded.users[b] for b in first_U[records["events"] == 0].tolist()]
        fresh_B = first_sightings(records["dedupe"], decoded.columns.user_row, decoded.id_hash_B)
        duplicates = len(decoded) - int(fresh_B.sum())
        if duplicates:
            decoded = decoded.keep(fresh_B)
        score_B = (decoded.user_key_B % np.uint64(_HASH_SHARE)) < np.uint64(settings.quality_share * _HASH_SHARE)
        where = places(decoded, settings.topics)
        moment_B = moments(where[0], where[1], state.groups.rate().requested)
        wanted_B = score_B | moment_B
        advanced = advance(records, decoded.columns, state.groups, settings.shift, settings.emission, wanted_B)
        return _Part(
            partition=partition,
            state=state,
            positions={tp: batch[-1].offset + 1 for tp, batch in mine.items()},
            first_offset=next(iter(mine.values()))[0].offset,
            read=sum(map(len, mine.values())),
            decoded=decoded,
            names=decoded.interest_names,
            watermark_ms=watermark_ms,
            late=late,
            duplicates=duplicates,
            new_users=new_users,
            records=records,
            advanced=advanced,
            to_erase=to_erase,
            score_B=score_B,
            moment_B=moment_B,
            where=where,
        )

    def _orders(self, records: Sequence[Record], decoded: Decoded) -> npt.NDArray[np.uint64]:
        """Keys of the users that a batch's orders tell us to erase; what is no order becomes a dead letter."""
        keys = set()
        for record in records:
            try:
                keys.add(read_order(record).key)
            except BadEvent as error:
                decoded.dead.append((record, error))
        return np.array(sorted(keys), np.uint64)

    def _late(self, decoded: Decoded, watermark_ms: int) -> tuple[Decoded, int, int]:
        """Apply the late policy; the events to use, the new watermark, and how many events were late.

        An event is judged by the newest event time before it in its partition, never by a clock.
        """
        if not len(decoded):
            return decoded, watermark_ms, 0
        settings = self._settings.events
        newest = np.maximum.accumulate(np.concatenate(([watermark_ms], decoded.columns.time_ms)))
        late_B = decoded.columns.time_ms < newest[:-1] - int(settings.late_after_s * 1_000)
        late = int(late_B.sum())
        if late and settings.late != "update":
            kept = decoded.keep(~late_B)
            if settings.late == "dead-letter":
                error = BadEvent("late", "over events.late_after_s behind the newest event of its partition")
                kept.dead += [(decoded.records[b], error) for b in np.flatnonzero(late_B).tolist()]
            decoded = kept
        return decoded, int(newest[-1]), late

    def _encode(self, parts: Sequence[_Part]) -> tuple[Floats, Floats]:
        """The GRU over all partitions' events at once; writes the users' new hidden states into their records."""
        users = events = 0
        for part in parts:
            part.first_user, part.first_event = users, events
            users += len(part.records)
            events += len(part.decoded)
        joined = EventColumns.join([p.decoded.columns for p in parts], [p.first_user for p in parts])
        before_BH, after_BH, new_UH = self.forecaster.encode(
            joined,
            np.concatenate([p.advanced.gap_s_B for p in parts]),
            np.concatenate([p.advanced.aggregates_BA for p in parts]),
            np.concatenate([p.records["hidden"] for p in parts]),
        )
        for part in parts:
            part.records["hidden"] = new_UH[part.first_user : part.first_user + len(part.records)]
            part.records["weights_version"] = self.forecaster.version
        return before_BH, after_BH

    def _score(self, part: _Part, before_BH: Floats, told: Told) -> BatchMetrics:
        """How good the forecasts were that these events meet, beside the recency rule's, for a share of users."""
        snapshot, columns = part.advanced.before, part.decoded.columns
        snapshot = snapshot.take(part.score_B[snapshot.event_E])
        if self._judge is not None and len(snapshot):
            event_E = snapshot.event_E
            self._judge(part.decoded, snapshot, before_BH[event_E], part.advanced.gap_s_B[event_E])
            snapshot = snapshot.take(slice(0, 0))
        known_E = snapshot.events_E > 0  # nothing can be forecast for a user never seen
        event_E = snapshot.event_E[known_E]
        ours: Ranks = np.zeros(0, np.int64)
        rule: Ranks = np.zeros(0, np.int64)
        moves = np.zeros(0, np.bool_)
        if len(event_E):
            seen = snapshot.take(np.flatnonzero(known_E))
            target_E1 = columns.interest[event_E].reshape(-1, 1)
            ours = self.forecaster.rank(before_BH[event_E], seen, part.advanced.gap_s_B[event_E], target_E1)[:, 0]
            rule = _recency_rank(seen, target_E1[:, 0])
            moves = seen.ring_interest_ER[:, 0] != target_E1[:, 0]
        drifts: list[out.Drift] = []
        if part.partition == SPEAKER:
            drifts, part.drift_changes = drifts_of(part.state.groups, part.decoded, (event_E, ours))
        return BatchMetrics(
            partition=part.partition,
            first_offset=part.first_offset,
            next_offset=next(iter(part.positions.values())),
            time_ms=part.watermark_ms,
            weights_version=self.forecaster.version,
            records=part.read,
            events=len(part.decoded),
            dead_letters=len(part.decoded.dead),
            late=part.late,
            duplicates=part.duplicates,
            forecasts=len(part.advanced.after),
            alerts=told.alerts,
            suppressed=told.suppressed,
            notices=told.notices,
            judged=told.judged,
            drifts=drifts,
            new_users=len(part.new_users),
            **misplaced(part.new_users, part.partition, self._settings.partitions),
            **_rates(part),
            **_quality(ours, rule, moves),
        )

    def _forecasts(self, part: _Part, after_BH: Floats) -> list[out.Forecast]:
        """The next n interests, for the events after which a forecast is due."""
        snapshot, settings = part.advanced.after, self._settings
        if not len(snapshot):
            return []
        forecast = self.forecaster.forecast(
            after_BH[snapshot.event_E], snapshot, None, steps=settings.steps, top_k=settings.top_k
        )
        # One pass in C over all candidates: most of what a forecast costs. Unused places (0) are the last ones.
        used_EN = np.count_nonzero(forecast.interest_ENK, axis=2).tolist()
        shares = np.round(forecast.probability_ENK.astype(np.float64), 5).ravel().tolist()
        every = list(map(out.Candidate, map(self._namer(part), forecast.interest_ENK.ravel().tolist()), shares))
        type_EK = np.argsort(-forecast.type_probability_ET, axis=1)[:, :_TYPES]
        type_share_EK = np.take_along_axis(forecast.type_probability_ET, type_EK, axis=1).astype(np.float64)
        bought_EK: list[list[float]] = [[]] * len(snapshot)
        if self.forecaster.knows_purchases:
            bought_EK = np.round(forecast.purchase_probability_EK.astype(np.float64), 5).tolist()
        rows = zip(
            snapshot.event_E.tolist(),
            used_EN,
            type_EK.tolist(),
            np.round(type_share_EK, 4).tolist(),
            strict=True,
        )
        forecasts = []
        for e, (b, used_N, types_K, type_shares_K) in enumerate(rows):
            first = e * settings.steps * settings.top_k
            record = out.Forecast(
                id=_id(part, b),
                user=part.decoded.users[b],
                source=part.decoded.source(b),
                time_ms=int(part.decoded.columns.time_ms[b]),
                weights_version=self.forecaster.version,
                reasons=emission_names(int(part.advanced.emit_B[b])),
                steps=[
                    out.ForecastStep(n, every[(at := first + (n - 1) * settings.top_k) : at + used])
                    for n, used in enumerate(used_N, 1)
                ],
                next_types={type_name(t): p for t, p in zip(types_K, type_shares_K, strict=True)},
                purchases=_bought(every[first : first + used_N[0]], bought_EK[e]),
                purchase_events=settings.purchase_events if bought_EK[e] else 0,
            )
            forecasts.append(record)
        return forecasts

    def _alerts(self, part: _Part, forecasts: list[out.Forecast]) -> Told:
        """Alarms, each with its reason: stream/alerts.py."""
        first = {f.source: f.steps[0].interests for f in forecasts if f.steps} if len(part.advanced.alarmed) else {}
        alarmed = part.advanced.alarmed.event_E.tolist()
        return tell(
            Batch(
                partition=part.partition,
                decoded=part.decoded,
                advanced=part.advanced,
                groups=part.state.groups,
                suspects=part.state.suspects,
                settings=self._settings.shift,
                weights_version=self.forecaster.version,
                name=self._namer(part),
                forecast={b: first[source] for b in alarmed if (source := part.decoded.source(b)) in first},
                topics=self._settings.topics,
                moment_B=part.moment_B,
                where=part.where,
                allowed=self._allowed(part.partition),
            )
        )

    def _allowed(self, partition: int) -> Allowed | None:
        """The partition's share of the daily budget of alerts, by day."""
        settings = self._settings
        if not settings.daily_budget:
            return None
        return lambda day: allowance(day, partition, settings.partitions, settings.daily_budget)

    def _dead_letters(self, part: _Part) -> list[Output]:
        return [
            Output(
                stream="dead_letters",
                key=record.key,
                value=out.encode(refuse(record, error)),
            )
            for record, error in part.decoded.dead
        ]

    def _step(self, part: _Part, outputs: list[Output], metrics: BatchMetrics, told: Told) -> PartitionStep:
        """Everything the batch does to the partition, and its sums as a record of their own."""
        state = part.state
        seen = state.seen + part.read
        delta = state.groups.delta(
            part.decoded.columns, part.advanced, part.names, told.pending, told.followup, part.drift_changes
        )
        after = None
        touched = part.records["key"]
        erased = part.to_erase[(state.arena.block_of(part.to_erase) >= 0) | np.isin(part.to_erase, touched)]
        if len(erased) and (state.groups.knows(erased) or np.isin(told.started_keys, erased).any()):
            after = self.groups_with(state.groups, delta)
            after.erase(erased)
        gone = erased
        if seen == self.next_cut(state.seen):
            after = (after or self.groups_with(state.groups, delta)).cut()
            gone = np.union1d(erased, silent(state.arena, part.records, part.watermark_ms, self._settings.bounds))
            after.followup.forget(gone)
        evicted = len(gone) - len(erased)
        metrics = msgspec.structs.replace(metrics, erased=len(erased), evicted=evicted)
        outputs.append(Output(stream="metrics", key=None, value=out.encode(metrics)))
        return PartitionStep(
            partition=part.partition,
            positions=part.positions,
            records=part.records[~np.isin(touched, gone)] if len(gone) else part.records,
            evidence=told.evidence[~np.isin(told.evidence["key"], gone)] if len(gone) else told.evidence,
            gone=gone,
            erased=len(erased) > 0,
            seen=seen,
            watermark_ms=part.watermark_ms,
            outputs=outputs,
            group_delta=b"" if after is not None else delta,
            groups_after=after,
            metrics=metrics,
        )

    def _namer(self, part: _Part) -> Callable[[int], str]:
        """Names of interests: what the batch, the partition or the vocabulary knows; else the key in hexadecimal."""
        here, partition, vocabulary = part.names, part.state.groups.names, self.forecaster.name

        class Names(dict[int, str]):
            """Each is looked up once a batch."""

            def __missing__(self, key: int) -> str:
                self[key] = here.get(key) or partition.get(key) or vocabulary(key) or f"#{key:08x}"
                return self[key]

        return Names({0: "(others)"}).__getitem__


def _bought(named: Sequence[out.Candidate], probability_K: Sequence[float]) -> list[out.Candidate]:
    """The interests of a step by the probability that they are bought; none where that is not known."""
    pairs = sorted(zip(named, probability_K, strict=False), key=lambda pair: -pair[1])
    return [out.Candidate(candidate.interest, p) for candidate, p in pairs]


def _rates(part: _Part) -> dict[str, Any]:
    """Sums for BatchMetrics: alarms that came and that were asked for, while the thresholds are calibrated."""
    rate = part.state.groups.rate()
    if not rate.calibrated:
        return {}
    monitored = int(part.advanced.tallies.monitored_G.sum())
    return {
        "monitored": monitored,
        "alarms": int(part.advanced.tallies.alarms_G.sum()),
        "expected_alarms": round(monitored / rate.requested, 6),
    }


def _id(part: _Part, event: int) -> str:
    """Deterministic id of an output: where its input record lies."""
    record = part.decoded.records[event]
    return f"{record.topic}/{record.partition}/{record.offset}"


def _output(stream: str, record: out.Forecast) -> Output:
    """A record keyed by its user."""
    return Output(stream=stream, key=record.user.encode(), value=out.encode(record))


def _recency_rank(snapshot: Snapshot, target_E: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """Rank of each target by the recency rule over the ring, then the slow profile by weight; 0 = not among them."""
    rank_E = np.zeros(len(target_E), np.int64)
    order_EP = np.argsort(-snapshot.slow_share_EP, axis=1, kind="stable")
    slow_EP = np.take_along_axis(snapshot.slow_interest_EP, order_EP, axis=1)
    for e, target in enumerate(target_E.tolist()):
        own = dict.fromkeys(i for i in snapshot.ring_interest_ER[e].tolist() + slow_EP[e].tolist() if i)
        if target in own:
            rank_E[e] = list(own).index(target) + 1
    return rank_E


def _quality(ours: Ranks, rule: Ranks, moves: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Sums for BatchMetrics: ours and the rule's, over all scored events and over those that move on."""

    def sums(ranks: Ranks) -> tuple[float, int]:
        hit = ranks[ranks > 0]
        return round(float((1.0 / hit).sum()), 6), int((hit <= 10).sum())

    mrr, hits = sums(ours)
    rule_mrr, rule_hits = sums(rule)
    moves_mrr, moves_hits = sums(ours[moves])
    rule_moves_mrr, rule_moves_hits = sums(rule[moves])
    return {
        "scored": len(ours),
        "reciprocal_ranks": mrr,
        "hits_10": hits,
        "recency_reciprocal_ranks": rule_mrr,
        "recency_hits_10": rule_hits,
        "scored_moves": int(moves.sum()),
        "reciprocal_ranks_moves": moves_mrr,
        "hits_10_moves": moves_hits,
        "recency_reciprocal_ranks_moves": rule_moves_mrr,
        "recency_hits_10_moves": rule_moves_hits,
    }
