"""`driftline evaluate`: how good the forecasts are, in one pass over a file, by the code that runs in production.

For each small batch in the order of time: rank -> score -> update the state -> learn. The pipeline is the worker's, the
learner is the learner's; only the log between them is left out, and with `weights_delay_events` not even its delay is.
Every model ranks the same interests before the same events; the rules get the same, one event at a time.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from models.baselines import Markov, Popularity, Ranker, Recency, RecencyMarkov, Seen, target_ranks
from models.evaluate import CUTS, STRATA, figures, next_events, strata
from models.features import interest_key, type_code
from models.forecaster import Forecaster
from models.learner import Learner
from models.profile import Snapshot
from stream.assembly import make_decoder, pipeline_settings
from stream.config import Config
from stream.engine import PartitionState, merge
from stream.errors import ConfigError
from stream.events import Decoded
from stream.pipeline import Pipeline
from stream.state import Arena
from stream.transport import LogRecord, TopicPartition

RULES: dict[str, Callable[[int, int], Ranker]] = {
    "recency": Recency,
    "recency_markov": RecencyMarkov,
    "popularity": Popularity,
    "markov": Markov,
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "driftline": {},
    "driftline_frozen": {},
    "driftline_no_copy": {"network": {"copy_head": False}},
    "driftline_no_profile": {"network": {"slow_profile": False}},
    "driftline_no_gap": {"network": {"time_gaps": False}},
    "driftline_no_features": {"network": {"event_features": False}},
    "driftline_no_replay": {"learning": {"replay_share": 0.0}},
}
MODELS = (*RULES, *VARIANTS)
DEFAULT_MODELS = ("driftline", "recency", "recency_markov")
EVENTS_MIN = 2
OnProgress = Callable[[str, int, int], None]  # model, events done, events in all
Ranks = npt.NDArray[np.int64]
TP = TopicPartition("events", 0)


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

    def __len__(self) -> int:
        return len(self.records)


@dataclass(kw_only=True, slots=True)
class Outcome:
    """One model's pass: the rank of the true interest of every event, for each step; -1 where there is none."""

    model: str
    seed: int
    rank_EN: Ranks
    events_per_s: float
    peak_mb: float
    probability_EN: npt.NDArray[np.float32] | None = None


def read_stream(events: Iterable[Mapping[str, Any]]) -> Stream:
    """Number the users and interests and make log records. Raises ConfigError where there is nothing to evaluate."""
    users: dict[str, int] = {}
    interests: dict[str, int] = {}
    records: list[LogRecord] = []
    rows: list[tuple[int, int, int, int]] = []
    encode = msgspec.json.Encoder().encode
    for offset, event in enumerate(events):
        user, interest = str(event["user"]), str(event["interest"])
        time_ms = int(event["time"])
        kind = type_code(str(event["type"])) if event.get("type") else 0
        rows.append((users.setdefault(user, len(users)), interests.setdefault(interest, len(interests)), time_ms, kind))
        records.append(LogRecord("events", 0, offset, time_ms, user.encode(), encode(event)))
    if len(records) < EVENTS_MIN:
        raise ConfigError(f"the file has {len(records)} usable events; there is nothing to evaluate")
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
    )


def run_rule(name: str, stream: Stream, horizon: int, on_progress: OnProgress) -> Outcome:
    """A model without a network, one event at a time."""
    rule = RULES[name](stream.users, stream.interests)
    index_EN = next_events(stream.user_E, horizon)
    rank_EN = np.full(index_EN.shape, -1, np.int64)
    known = np.zeros(stream.interests, np.bool_)
    start_s = time.perf_counter()
    for e in range(len(stream)):
        user, interest, time_ms = int(stream.user_E[e]), int(stream.interest_E[e]), int(stream.time_ms_E[e])
        later = index_EN[e][index_EN[e] >= 0]
        targets = stream.interest_E[later]
        ranks = target_ranks(rule.rank(user, time_ms), targets)
        rank_EN[e, : len(later)] = np.where(known[targets], ranks, 0)  # an interest that nobody had is a miss
        rule.update(Seen(user, interest, time_ms, int(stream.type_E[e])))
        known[interest] = True
        if e % 2_000 == 0:
            on_progress(name, e, len(stream))
    per_s, peak_mb = _cost(start_s, len(stream))
    return Outcome(model=name, seed=0, rank_EN=rank_EN, events_per_s=per_s, peak_mb=peak_mb)


def run_driftline(
    name: str,
    stream: Stream,
    config: Config,
    *,
    seed: int,
    horizon: int,
    freeze_at: int | None,
    weights_delay_events: int,
    on_progress: OnProgress,
) -> Outcome:
    """The pipeline and the learner of `driftline run`, in this process.

    Args:
        freeze_at: index of the event from which on nothing more is learned; None = never.
        weights_delay_events: weights are handed over every so many events, as late; 0 = at once.
    """
    changed = {section: msgspec.structs.replace(getattr(config, section), **values)
               for section, values in VARIANTS[name].items()}  # fmt: skip
    config = msgspec.structs.replace(config, **changed)
    decoder = make_decoder(config)
    settings = pipeline_settings(config, quality_share=1.0)
    learner = Learner(config.network, config.learning, seed=seed, device=config.learner.device)
    index_EN = next_events(stream.user_E, horizon)
    target_EN = np.where(index_EN >= 0, stream.key_E[index_EN], 0).astype(np.uint32)
    rank_EN = np.full(index_EN.shape, -1, np.int64)
    probability_EN = np.zeros(index_EN.shape, np.float32)

    def judge(decoded: Decoded, snapshot: Snapshot, hidden_EH: Any, gap_s_E: Any) -> None:
        where_E = np.array([decoded.records[b].offset for b in snapshot.event_E.tolist()], np.int64)
        ranks, shares = pipeline.forecaster.rank_and_probability(hidden_EH, snapshot, gap_s_E, target_EN[where_E])
        rank_EN[where_E] = np.where(index_EN[where_E] >= 0, ranks, -1)
        probability_EN[where_E] = shares

    pipeline = Pipeline(settings, decoder, Forecaster.initial(config.network, seed), judge=judge)
    state = PartitionState(arena=Arena(pipeline.dtype), groups=pipeline.new_groups())
    batch_events = config.learning.step_events
    done, handed_over = 0, 0
    waiting: Forecaster | None = None
    start_s = time.perf_counter()
    while done < len(stream):
        count = min(batch_events, pipeline.next_cut(state.seen) - state.seen)
        batch = stream.records[done : done + count]
        for step in pipeline.process({0: state}, {TP: batch}):
            merge(pipeline, state, step)
        done += len(batch)
        if freeze_at is None or done <= freeze_at:
            decoded = decoder.decode(batch)
            learner.observe(decoded.user_key_B, decoded.columns, decoded.interest_names)
            while learner.learn(64).steps:
                pass
            if not weights_delay_events:
                pipeline.forecaster = learner.forecaster()
            elif done - handed_over >= weights_delay_events:
                handed_over = done
                if waiting is not None:
                    pipeline.forecaster = waiting
                waiting = Forecaster.from_weights(learner.weights())
        on_progress(name, done, len(stream))
    per_s, peak_mb = _cost(start_s, len(stream))
    return Outcome(
        model=name,
        seed=seed,
        rank_EN=rank_EN,
        probability_EN=probability_EN,
        events_per_s=per_s,
        peak_mb=peak_mb,
    )


def evaluate(
    stream: Stream,
    config: Config,
    *,
    models: Sequence[str],
    report_from: float,
    seeds: int,
    horizon: int,
    weights_delay_events: int,
    on_progress: OnProgress,
) -> list[Outcome]:
    """One pass for each model and seed (the rules have no seed)."""
    unknown = [m for m in models if m not in MODELS]
    if unknown:
        raise ConfigError(f"--models {unknown[0]}: there is no such model; there are {', '.join(MODELS)} and all")
    outcomes = []
    for model in models:
        if model in RULES:
            outcomes.append(run_rule(model, stream, horizon, on_progress))
            continue
        for seed in range(seeds):
            outcomes.append(
                run_driftline(
                    model,
                    stream,
                    config,
                    seed=seed,
                    horizon=horizon,
                    freeze_at=int(report_from * len(stream)) if model == "driftline_frozen" else None,
                    weights_delay_events=weights_delay_events,
                    on_progress=on_progress,
                )
            )
    return outcomes


def rows_of(stream: Stream, outcomes: Sequence[Outcome], report_from: float) -> list[dict[str, Any]]:
    """The rows of `--json`: one for each model, stratum, horizon and seed; the mean where there are several seeds.

    The stratum of step j is that of the event it is about.
    """
    first = int(report_from * len(stream))
    members = strata(stream.user_E, stream.interest_E, stream.type_E)
    horizon = outcomes[0].rank_EN.shape[1]
    index_EN = next_events(stream.user_E, horizon)
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        for step in range(horizon):
            about_E = index_EN[:, step]
            counts_E = (np.arange(len(stream)) >= first) & (outcome.rank_EN[:, step] >= 0)
            for stratum in STRATA:
                inside_E = counts_E & members[stratum][np.maximum(about_E, 0)]
                found = figures(outcome.rank_EN[inside_E, step])
                rows.append(
                    {
                        "model": outcome.model,
                        "stratum": stratum,
                        "horizon": step + 1,
                        "seed": outcome.seed,
                        "n": found.n,
                        "mrr": found.mrr,
                        **{f"hr@{cut}": found.hr[cut] for cut in CUTS},
                        "ndcg@10": found.ndcg_10,
                        "accuracy": found.accuracy,
                        "events_per_s": round(outcome.events_per_s),
                        "peak_mb": round(outcome.peak_mb),
                    }
                )
    return rows + _means(rows)


def _means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, where a model has more than one."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["stratum"], row["horizon"]), []).append(row)
    means = []
    for group in groups.values():
        if len(group) < 2:
            continue
        mean: dict[str, Any] = {**group[0], "seed": "mean"}
        spread: dict[str, float] = {}
        for key, value in group[0].items():
            values = [row[key] for row in group]
            if key in ("model", "stratum", "horizon", "seed", "n") or any(v is None for v in values):
                continue
            mean[key] = round(float(np.mean(values)), 6)
            spread[key] = round(float(np.std(values, ddof=1)), 6) if isinstance(value, float) else 0.0
        means.append({**mean, "sd": spread})
    return means


def _cost(start_s: float, events: int) -> tuple[float, float]:
    """Events a second, and the process's peak memory in MB."""
    seconds = time.perf_counter() - start_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_024
    return (events / seconds if seconds > 0 else 0.0), peak_mb
