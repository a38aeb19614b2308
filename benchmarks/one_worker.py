"""Events of a file through a worker's pipeline in this process, batch by batch: what benchmarks of alerts share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from stream.assembly import make_pipeline  # noqa: E402
from stream.config import plain_events  # noqa: E402
from stream.engine import PartitionState, PartitionStep, merge  # noqa: E402
from stream.evaluation import read_stream  # noqa: E402
from stream.files import EventSource, FileForm, open_events  # noqa: E402
from stream.loading import load  # noqa: E402
from stream.mapping import Mapping  # noqa: E402
from stream.state import Arena  # noqa: E402
from stream.transport import Record, TopicPartition  # noqa: E402

TP = TopicPartition("events", 0)


def opened(given: argparse.Namespace) -> EventSource:
    """The events of the options FILE, --map and --time-unit, in the order of time."""
    return open_events(given.file, Mapping.parse(given.columns), FileForm(time_unit=given.time_unit, sort=True))


def records_of(given: argparse.Namespace, sets: tuple[str, ...]) -> list[Record]:
    """The same as records of an input topic."""
    with opened(given) as source:
        return list(read_stream(source, plain_events(load(None, sets).config)).records)


def steps_of(
    records: list[Record], sets: tuple[str, ...], batch: int
) -> Iterator[tuple[PartitionState, PartitionStep]]:
    """All records through one partition: each step, merged, with the state after it."""
    engine = make_pipeline(plain_events(load(None, ("topics.partitions=1", *sets)).config))
    state = PartitionState(arena=Arena(engine.dtype), groups=engine.new_groups())
    done = 0
    while done < len(records):
        end = done + min(batch, engine.next_cut(state.seen) - state.seen)
        for step in engine.process({0: state}, {TP: records[done:end]}):
            merge(engine, state, step)
            yield state, step
        done = end
