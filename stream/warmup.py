"""Compile before the first batch: a few made-up events through a pipeline that is thrown away.

Before the way of an event: a worker does this before it takes partitions. On a fresh machine compiling takes up to a
minute (later it comes from a cache on disk); a worker that compiled with partitions in hand would look dead to its
group and lose them.
"""

from __future__ import annotations

import logging
import time

import msgspec

from stream.assembly import make_pipeline
from stream.config import Config, plain_events
from stream.engine import PartitionState, merge
from stream.state import Arena
from stream.transport import LogRecord, TopicPartition

log = logging.getLogger(__name__)

USERS = 8
ROUNDS = 40  # so that users have more events than a ring holds, and forecasts fall due
SLOW_S = 5.0


def warm_up(config: Config) -> float:
    """Run every kernel once; the seconds that it took."""
    start_s = time.monotonic()
    pipeline = make_pipeline(plain_events(config))
    state = PartitionState(arena=Arena(pipeline.dtype), groups=pipeline.new_groups())
    partition = TopicPartition("warm-up", 0)
    records = [_record(offset) for offset in range(USERS * ROUNDS)]
    while records:
        room = pipeline.next_cut(state.seen) - state.seen
        batch, records = records[:room], records[room:]
        for step in pipeline.process({0: state}, {partition: batch}):
            merge(pipeline, state, step)
    took_s = time.monotonic() - start_s
    log.log(logging.WARNING if took_s > SLOW_S else logging.INFO, "event=warmed_up seconds=%.1f", took_s)
    return took_s


def _record(offset: int) -> LogRecord:
    user, turn = offset % USERS, offset // USERS
    time_ms = 1_700_000_000_000 + offset * 600_000
    event = {
        "user": f"u{user}",
        "interest": f"i{(user + turn // 3) % 12}",
        "time": time_ms,
        "type": "purchase" if turn % 7 == 0 else "browse",
        "item": f"x{turn % 5}",
        "price": 9.5 + turn,
        "dwell": 3.0,
        "segment": "all",
    }
    return LogRecord("warm-up", 0, offset, time_ms, event["user"].encode(), msgspec.json.encode(event))  # type: ignore[attr-defined]
