"""`driftline evaluate`: how good the forecasts are, in one pass over a file, by the code that runs in production.

For each small batch in the order of time: rank -> score -> update the state -> learn. The pipeline is the worker's, the
learner is the learner's; only the log between them is left out, and with a delay of the weights not even what it costs.
Every model ranks the same interests before the same events; the rules get the same, one event at a time. What the
figures are is said in models/evaluate.py; the rows and the page are made in evaluation_rows.py and evaluation_page.py.
"""

from __future__ import annotations

import copy
import importlib
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt

from models.baselines import Markov, Popularity, Ranker, Recency, RecencyMarkov, Seen, Trainable, target_ranks
from models.evaluate import Judged, next_events, share_errors
from models.features import interest_key, type_code
from models.forecaster import Forecaster
from models.judging import judge
from models.learner import Learner
from models.profile import EmissionSettings, Snapshot
from models.sequences import RECIPES, SequenceModel
from models.sessions import SessionKnn
from models.tuning import Trainee
from stream.assembly import make_decoder, pipeline_settings
from stream.config import Config
from stream.engine import PartitionState, merge
from stream.errors import ConfigError
from stream.events import Decoded
from stream.pipeline import Pipeline
from stream.saved_weights import Initial
from stream.state import Arena
from stream.transport import LogRecord, TopicPartition
from stream.tuning import USUAL, Tuning, make_trainee
from stream.warmup import warm_up

RULES: dict[str, Callable[[int, int], Ranker]] = {
    "recency": Recency,
    "recency_markov": RecencyMarkov,
    "popularity": Popularity,
    "markov": Markov,
    "vsknn": SessionKnn,
}
TRAINED = tuple(RECIPES)  # each gives a second row, <name>_retrained: trained again at the middle of the reported part
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "driftline": {},
    "driftline_frozen": {},
    "driftline_no_copy": {"network": {"copy_head": False}},
    "driftline_no_profile": {"network": {"slow_profile": False}},
    "driftline_no_gap": {"network": {"time_gaps": False}},
    "driftline_no_features": {"network": {"event_features": False}},
    "driftline_no_aux": {"learning": {"auxiliary_losses": False}},
    "driftline_no_replay": {"learning": {"replay_share": 0.0}},
}
TUNED: dict[str, Tuning] = {  # from the weights that --from names
    "driftline_pretrained": Tuning(how="online"),
    "driftline_finetuned": Tuning(how="fine"),
    "driftline_adapters": Tuning(how="adapters"),
}
MODELS = (*RULES, *TRAINED, *VARIANTS)
DEFAULT_MODELS = ("driftline", "recency", "recency_markov")
EVENTS_MIN = 2
OnProgress = Callable[[str, int, int], None]  # model, events done, events in all
Ranks = npt.NDArray[np.int64]
TP = TopicPartition("events", 0)
_READ_EVENTS = 4_096
_IDS_REMEMBERED = 4  # as a user's record does
_TOLD_EVERY = 2_000  # events between two words about the progress of a rule
# Forecasts are asked for by the evaluation itself: none is emitted on the way, which changes no state but the last one.
_SILENT = EmissionSettings(policy="interval", max_events=2**31, max_age_s=1e12)


@dataclass(frozen=True, kw_only=True, slots=True)
class Delay:
    """How old weights may get: a version is made every so many events, or seconds of event time, and is in use from
    then until the next, as with a learner that publishes so often. Both 0: every step of the learner is in use at once.
    """

    events: int = 0
    seconds: float = 0.0

    @staticmethod
    def parse(text: str) -> Delay:
        """From "2000" (events) or "5s" (seconds). Raises ConfigError."""
        word = text.strip().lower()
        try:
            delay = Delay(seconds=float(word[:-1])) if word.endswith("s") else Delay(events=int(word))
        except ValueError:
            delay = Delay(events=-1)
        if delay.events < 0 or not 0 <= delay.seconds < 1e9:
            raise ConfigError(f"--weights-delay {text}: say a number of events, as 2000, or of seconds, as 5s")
        return delay

    def is_over(self, events: int, ms: int) -> bool:
        """Whether a version is due, so many events and milliseconds of event time after the last."""
        if self.seconds:
            return ms >= self.seconds * 1_000
        return events >= self.events


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is to be evaluated, and how.

    Attributes:
        models: of MODELS, or `module:Class` of a Ranker of somebody's own.
        report_from: figures count from this share of the events on.
        seeds, first_seed: passes of what has a seed: from `first_seed` on.
        horizon: steps ahead.
        initial: trained weights, for the models of TUNED.
        tuning: of these: rate, rank, and whether the interests are other ones.
    """

    models: Sequence[str] = DEFAULT_MODELS
    report_from: float = 0.5
    seeds: int = 1
    first_seed: int = 0
    horizon: int = 5
    delay: Delay = Delay()
    initial: Initial | None = None
    tuning: Tuning = USUAL

    def first(self, events: int) -> int:
        """Index of the first event that counts."""
        return min(events - 1, int(self.report_from * events))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The events of a file, in order, as records of a log and as numbers for the rules."""

    records: list[LogRecord]
    user_E: Ranks
    interest_E: Ranks
    key_E: npt.NDArray[np.uint32]
    time_ms_E: Ranks
    type_E: npt.NDArray[np.uint8]
    users: int
    interests: int
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.records)


@dataclass(kw_only=True, slots=True)
class Outcome:
    """One model's pass. `seed` is 0 for a model without one. Before `first` only the next event is judged."""

    model: str
    seed: int
    judged: Judged
    events_per_s: float
    peak_mb: float
    trained_share: float | None = None  # of the network's numbers
    purchases: Asked | None = None  # of a model that forecasts purchases


@dataclass(kw_only=True, slots=True)
class Asked:
    """Purchases that were forecast before E events: keys of the interests of the next step, and their probabilities.

    Attributes:
        events: the n events within which it is to be bought, the next one first.
        key_EK: 0 = none.
    """

    events: int
    key_EK: npt.NDArray[np.uint32]
    probability_EK: npt.NDArray[np.float32]

    @staticmethod
    def empty(count: int, top_k: int, events: int) -> Asked:
        """Nothing asked yet."""
        return Asked(
            events=events,
            key_EK=np.zeros((count, top_k), np.uint32),
            probability_EK=np.zeros((count, top_k), np.float32),
        )


def read_stream(events: Iterable[Mapping[str, Any]], config: Config) -> Stream:
    """Number the users and interests and make log records of what a worker would use.

    Events that it would refuse are counted and left out, and so are events with the id of an earlier one of their user
    where `events.dedupe` is on: no model is asked about them.

    Raises:
        ConfigError: there is nothing to evaluate.
    """
    encode = msgspec.json.Encoder().encode
    records = [
        LogRecord("events", 0, offset, int(event["time"]), str(event["user"]).encode(), encode(event))
        for offset, event in enumerate(events)
    ]
    records, left_out = _usable(records, config)
    if len(records) < EVENTS_MIN:
        why = "".join(f"; {count:,} left out: {reason}" for reason, count in left_out.items())
        raise ConfigError(f"the file has {len(records)} usable events; there is nothing to evaluate{why}")
    users: dict[str, int] = {}
    interests: dict[str, int] = {}
    rows: list[tuple[int, int, int, int]] = []
    for record in records:
        event = msgspec.json.decode(record.value or b"")
        kind = type_code(str(event["type"])) if event.get("type") else 0
        user, interest = str(event["user"]), str(event["interest"])
        numbers = users.setdefault(user, len(users)), interests.setdefault(interest, len(interests))
        rows.append((*numbers, record.timestamp, kind))
    table = np.array(rows, np.int64)
    names = [interest_key(name) for name in interests]
    return Stream(
        records=records,
        user_E=table[:, 0],
        interest_E=table[:, 1],
        key_E=np.array(names, np.uint32)[table[:, 1]],
        time_ms_E=table[:, 2],
        type_E=table[:, 3].astype(np.uint8),
        users=len(users),
        interests=len(interests),
        left_out=left_out,
    )


def _usable(records: list[LogRecord], config: Config) -> tuple[list[LogRecord], dict[str, int]]:
    """The records that a worker would use, numbered anew, and how many are left out, by reason."""
    decoder = make_decoder(config)
    used: list[LogRecord] = []
    left_out: Counter[str] = Counter()
    ids: dict[int, deque[int]] = {}
    for start in range(0, len(records), _READ_EVENTS):
        decoded = decoder.decode(records[start : start + _READ_EVENTS])
        left_out.update(error.reason for _, error in decoded.dead)
        keys = zip(decoded.records, decoded.user_key_B.tolist(), decoded.id_hash_B.tolist(), strict=True)
        for record, user, event_id in keys:
            seen = ids.setdefault(user, deque(maxlen=_IDS_REMEMBERED)) if event_id else deque[int]()
            if event_id in seen:
                left_out["the id of an earlier event"] += 1
                continue
            seen.append(event_id)
            used.append(cast(LogRecord, record))
    return [record._replace(offset=offset) for offset, record in enumerate(used)], dict(left_out)


def evaluate(stream: Stream, config: Config, wanted: Wanted, on_progress: OnProgress) -> list[Outcome]:
    """One pass for each model and seed.

    Raises:
        ConfigError: a model that is not there, or a file on which nothing can be said.
    """
    named = {name: _own_model(name) for name in wanted.models if ":" in name}
    for name in wanted.models:
        if name in TUNED and wanted.initial is None:
            raise ConfigError(f"--models {name}: goes on from trained weights; name them with --from")
        if name not in MODELS and name not in named and name not in TUNED:
            raise ConfigError(f"--models {name}: there is no such model; there are {', '.join([*MODELS, *TUNED])}")
    if stream.interests < 2:
        raise ConfigError("every event has the same interest: there is nothing to rank")
    outcomes = []
    for name in wanted.models:
        if name in named or name in RULES:
            outcomes.append(run_rule(name, named.get(name) or RULES[name], stream, wanted, on_progress))
            continue
        for seed in range(wanted.first_seed, wanted.first_seed + wanted.seeds):
            if name in TRAINED:
                outcomes += run_trained(name, stream, wanted, seed, on_progress)
            else:
                outcomes.append(run_driftline(name, stream, config, wanted, seed, on_progress))
    return outcomes


def _own_model(name: str) -> Callable[[int, int], Ranker]:
    """The class that `module:Class` names; modules are also found in the working directory."""
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return cast(Callable[[int, int], Ranker], getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--models {name}: {error}; say module:Class of a class with rank and update") from None


# ---------------------------------------------------------------------- models that go event by event


class _Course:
    """Asks a Ranker before each event and tells it afterwards; keeps what became of its rankings."""

    def __init__(self, stream: Stream, wanted: Wanted) -> None:
        self._stream = stream
        self._index_EN = next_events(stream.user_E, wanted.horizon)
        self._first = wanted.first(len(stream))
        self._known = np.zeros(stream.interests, np.bool_)
        self.judged = Judged.empty(len(stream), wanted.horizon)

    def event(self, model: Ranker, e: int, *, ask: bool = True) -> None:
        """Judge the model's ranking before an event, then tell it the event."""
        stream, judged = self._stream, self.judged
        user, interest, time_ms = int(stream.user_E[e]), int(stream.interest_E[e]), int(stream.time_ms_E[e])
        if ask:
            later = self._index_EN[e][self._index_EN[e] >= 0] if e >= self._first else np.array([e])
            targets = stream.interest_E[later]
            scores = model.rank(user, time_ms)
            ranks = target_ranks(scores, targets)
            # An interest that nobody had is a miss, and so is one that the model cannot name.
            nameable = self._known[targets] & (scores[targets] > (0.0 if model.is_probability else -np.inf))
            judged.rank_EN[e, : len(later)] = np.where(nameable, ranks, 0)
            if model.is_probability:
                judged.top_EN[e, : len(later)] = scores.max()
                absolute_N, square_N = share_errors(scores, targets)
                judged.absolute_EN[e, : len(later)], judged.square_EN[e, : len(later)] = absolute_N, square_N
        model.update(Seen(user, interest, time_ms, int(stream.type_E[e])))
        self._known[interest] = True


def run_rule(
    name: str, make: Callable[[int, int], Ranker], stream: Stream, wanted: Wanted, on_progress: OnProgress
) -> Outcome:
    """A model that learns as it is told, one event at a time."""
    model, course = make(stream.users, stream.interests), _Course(stream, wanted)
    meter = _Meter()
    for e in range(len(stream)):
        course.event(model, e)
        if e % _TOLD_EVERY == 0:
            on_progress(name, e, len(stream))
    return meter.outcome(name, 0, course.judged, len(stream))


def run_trained(name: str, stream: Stream, wanted: Wanted, seed: int, on_progress: OnProgress) -> list[Outcome]:
    """A model trained on the part before the report, and the same one trained again at the middle of the report."""
    first = wanted.first(len(stream))
    middle = (first + len(stream)) // 2
    model: Trainable = SequenceModel(stream.users, stream.interests, RECIPES[name], seed)
    course = _Course(stream, wanted)
    meter = _Meter()
    again: Trainable = model
    for e in range(len(stream)):
        if e == first:
            on_progress(f"{name}: training", e, len(stream))
            model.train()
        if e == middle:
            again, again_course, so_far_s = model.copied(), _course_at(course), meter.seconds()
        course.event(model, e, ask=e >= first)
        if e % 200 == 0:
            on_progress(name, e, len(stream))
    outcomes = [meter.outcome(name, seed, course.judged, len(stream))]
    meter = _Meter(spent_s=so_far_s)
    on_progress(f"{name}: training again", middle, len(stream))
    again.train()
    for e in range(middle, len(stream)):
        again_course.event(again, e)
        if e % 200 == 0:
            on_progress(f"{name}_retrained", e, len(stream))
    return [*outcomes, meter.outcome(f"{name}_retrained", seed, again_course.judged, len(stream))]


def _course_at(course: _Course) -> _Course:
    """A copy that goes its own way from here."""
    other = copy.copy(course)
    other._known = course._known.copy()
    other.judged = Judged(**{name: getattr(course.judged, name).copy() for name in Judged.__slots__})
    return other


# ---------------------------------------------------------------------- ours


def run_driftline(
    name: str, stream: Stream, config: Config, wanted: Wanted, seed: int, on_progress: OnProgress
) -> Outcome:
    """The pipeline and the learner of `driftline run`, in this process."""
    changed = {section: msgspec.structs.replace(getattr(config, section), **values)
               for section, values in VARIANTS.get(name, {}).items()}  # fmt: skip
    silent = msgspec.structs.replace(config.forecast, emission=_SILENT)
    config = msgspec.structs.replace(config, **changed, forecast=silent)
    warm_up(config)
    learner = _learner(name, config, wanted, seed)
    judged = Judged.empty(len(stream), wanted.horizon)
    first = wanted.first(len(stream))
    frozen_from = first if name == "driftline_frozen" else len(stream)
    index_EN = next_events(stream.user_E, wanted.horizon)
    target_EN = np.where(index_EN >= 0, stream.key_E[index_EN], 0).astype(np.uint32)
    asked = Asked.empty(len(stream), config.forecast.top_k, config.learning.horizon_steps)

    def judge_batch(decoded: Decoded, snapshot: Snapshot, hidden_EH: Any, gap_s_E: Any) -> None:
        where_E = np.array([decoded.records[b].offset for b in snapshot.event_E.tolist()], np.int64)
        for part, steps in ((np.flatnonzero(where_E < first), 1), (np.flatnonzero(where_E >= first), wanted.horizon)):
            if len(part):
                at = where_E[part]
                found = judge(
                    pipeline.forecaster, hidden_EH[part], snapshot.take(part), gap_s_E[part],
                    target_EN[at, :steps], index_EN[at, :steps] >= 0,
                )  # fmt: skip
                judged.put(at, found)
        ask = np.flatnonzero(where_E >= first)
        if len(ask) and pipeline.forecaster.knows_purchases:
            # As they are published: it is not known when the next event comes.
            made = pipeline.forecaster.forecast(
                hidden_EH[ask], snapshot.take(ask), None, steps=1, top_k=config.forecast.top_k
            )
            asked.key_EK[where_E[ask]] = made.interest_ENK[:, 0]
            asked.probability_EK[where_E[ask]] = made.purchase_probability_EK

    settings = pipeline_settings(config, quality_share=1.0)
    # Not `learner.forecaster()`: that shares the learner's vocabulary, and these weights stay in use while it grows.
    pipeline = Pipeline(settings, make_decoder(config), Forecaster.from_weights(learner.weights()), judge=judge_batch)
    state = PartitionState(arena=Arena(pipeline.dtype), groups=pipeline.new_groups())
    decoder = make_decoder(config)  # each thread has its own
    done, made_at, made_ms = 0, 0, int(stream.time_ms_E[0])
    at_once = wanted.delay == Delay()

    def forecast_batch(batch: list[LogRecord]) -> None:
        for step in pipeline.process({0: state}, {TP: batch}):
            merge(pipeline, state, step)

    meter = _Meter()
    with ThreadPoolExecutor(1, "forecasts") as helper:
        while done < len(stream):
            count = min(config.learning.step_events, pipeline.next_cut(state.seen) - state.seen)
            batch = stream.records[done : done + count]
            # Gradients are computed beside the forecasts: both read the same weights, which change when both are done.
            forecast = helper.submit(forecast_batch, batch)
            learner.before_change = forecast.result
            done += len(batch)
            if done <= frozen_from:
                decoded = decoder.decode(batch)
                learner.observe(
                    decoded.user_key_B, decoded.columns, decoded.interest_names, id_hash_B=decoded.id_hash_B
                )
                while learner.learn(64).steps:
                    pass
            forecast.result()
            if done <= frozen_from:
                now_ms = int(stream.time_ms_E[done - 1])
                if at_once:
                    pipeline.forecaster = learner.forecaster()
                elif wanted.delay.is_over(done - made_at, now_ms - made_ms):
                    made_at, made_ms = done, now_ms
                    pipeline.forecaster = Forecaster.from_weights(learner.weights())
            on_progress(name, done, len(stream))
    outcome = meter.outcome(name, seed, judged, len(stream))
    outcome.trained_share = learner.trained_share() if isinstance(learner, Trainee) else 1.0
    outcome.purchases = asked if asked.key_EK.any() else None
    return outcome


def _learner(name: str, config: Config, wanted: Wanted, seed: int) -> Learner:
    """From the seed, or from trained weights."""
    if name not in TUNED:
        return Learner(config.network, config.learning, seed=seed, device=config.learner.device)
    asked, how = wanted.tuning, TUNED[name].how
    rate = None if how == "online" else asked.rate
    tuning = replace(asked, how=how, rate=rate)
    return make_trainee(config, tuning.learning(config.learning), wanted.initial, tuning, seed)


# ---------------------------------------------------------------------- what it costs


class _Meter:
    """Time and memory of a pass."""

    def __init__(self, spent_s: float = 0.0) -> None:
        with suppress(OSError):  # elsewhere than on Linux the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")
        self._start_s = time.perf_counter() - spent_s

    def seconds(self) -> float:
        return time.perf_counter() - self._start_s

    def outcome(self, name: str, seed: int, judged: Judged, events: int) -> Outcome:
        per_s = events / max(self.seconds(), 1e-9)
        return Outcome(model=name, seed=seed, judged=judged, events_per_s=per_s, peak_mb=_peak_mb())


def _peak_mb() -> float:
    """The process's peak of memory since the meter was started, where the system can say so."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1_024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_024
