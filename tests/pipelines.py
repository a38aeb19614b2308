"""A small pipeline, a stream of users with favourites, and a run over it. Used by several test files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from models.forecaster import Forecaster
from models.profile import EmissionSettings
from models.settings import NetworkSettings
from models.shift import ShiftSettings
from stream.engine import PartitionState, merge
from stream.events import EventDecoder, EventSettings
from stream.eviction import UNBOUNDED, Bounds
from stream.pipeline import Pipeline, PipelineSettings
from stream.state import Arena
from stream.transport import LogRecord, TopicPartition

START_MS = 1_700_000_000_000
TP = TopicPartition("events", 0)


def make(
    policy: str = "on-change",
    share: float = 1.0,
    late: str = "update",
    threshold: float = 5.0,
    dedupe: str = "",
    partitions: int = 1,
    bounds: Bounds = UNBOUNDED,
    control: str = "",
    false_alarm_events: float = 1_000.0,
    daily_budget: int = 0,
) -> Pipeline:
    settings = PipelineSettings(
        events=EventSettings(late=late, dedupe=dedupe),
        partitions=partitions,
        bounds=bounds,
        control=control,
        shift=ShiftSettings(threshold=threshold, age_min_events=10, false_alarm_events=false_alarm_events),
        daily_budget=daily_budget,
        emission=msgspec.convert({"policy": policy}, EmissionSettings),
        steps=3,
        top_k=4,
        purchase_events=5,
        quality_share=share,
        epoch_records=1_024,
        first_epoch_records=64,
    )
    return Pipeline(settings, EventDecoder(settings.events, b"k"), Forecaster.initial(NetworkSettings(), 7))


def stream(count: int, users: int = 30, seed: int = 1) -> list[LogRecord]:
    """Users with favourites; user u0 changes all of them halfway; sessions of a few minutes."""
    rng = random.Random(seed)
    now_ms = START_MS
    records = []
    for offset in range(count):
        number = rng.choice([0, 0, rng.randrange(users)])
        moved = number == 0 and offset > count // 2
        favourite = (
            (number * 3 + rng.randrange(3) + (500 if moved else 0)) if rng.random() < 0.9 else rng.randrange(100)
        )
        now_ms += rng.choice([1_000, 20_000, 4_000_000])
        event = {"user": f"u{number}", "interest": f"i{favourite}", "time": now_ms, "type": rng.choice(["view", "buy"])}
        if rng.random() < 0.5:
            event |= {"price": rng.uniform(1, 99), "dwell": rng.uniform(0, 60), "item": f"x{rng.randrange(50)}"}
        records.append(LogRecord("events", 0, offset, now_ms, f"u{number}".encode(), orjson.dumps(event)))
    return records


def run(
    pipeline: Pipeline, records: Sequence[LogRecord], batch: int, partition: int = 0, restored: bool = False
) -> tuple[PartitionState, list[tuple[str, Any]]]:
    """The state after the records of a partition, and the outputs; `restored`: the group table after every batch."""
    state = PartitionState(arena=Arena(pipeline.dtype), groups=pipeline.new_groups())
    outputs, done = [], 0
    while done < len(records):
        count = min(batch, pipeline.next_cut(state.seen) - state.seen)
        place = TopicPartition(TP.topic, partition)
        for step in pipeline.process({partition: state}, {place: records[done : done + count]}):
            merge(pipeline, state, step)
            outputs += [(o.stream, orjson.loads(o.value)) for o in step.outputs]
        if restored:
            state.groups = pipeline.groups_from_snapshot(state.groups.snapshot())
        done += count
    return state, outputs
