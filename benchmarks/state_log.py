"""How long the state log gets against what is alive in it, and what keeping it short costs.

    python benchmarks/state_log.py --json                 on a real broker that it starts
    python benchmarks/state_log.py --log memory --json

The real worker, checkpoint, changelog and cleaner; in place of the network a digest in records of the real ones' width.
Three kinds of traffic: uniform over all users, heavy-tailed (Pareto), and hot (nine of ten events of one user, the rest
uniform). After each batch the bytes between head and end of the log are divided by the bytes of the users that are
alive; the worst of them is told, as are events a second with cleaning and without, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from digest_app import AtOnce, create_topics, make_worker, topic_names
from kafka_broker import running_broker

from stream import cleaning
from stream.kafka import KafkaLog
from stream.memory import MemoryLog
from stream.testing import DIGEST, DigestEngine, digest_event
from stream.transport import TopicPartition, Transport

WIDTH = 740
PARTITIONS = 2
BATCH = 4_096


class WideEngine(DigestEngine):
    """The digest engine with records of the real one's width."""

    dtype = np.dtype([*((name, DIGEST[name]) for name in DIGEST.names or ()), ("rest", "V", WIDTH - DIGEST.itemsize)])


class Length:
    """Bytes between head and end of the state log, counted by reading along."""

    def __init__(self, log: Transport, topic: str) -> None:
        self._reader = log.reader()
        self._tps = [TopicPartition(topic, p) for p in range(PARTITIONS)]
        self._sizes: dict[TopicPartition, deque[tuple[int, int]]] = {tp: deque() for tp in self._tps}
        self._next = dict.fromkeys(self._tps, 0)

    def now(self) -> int:
        total = 0
        for tp, sizes in self._sizes.items():
            while records := self._reader.read(tp, self._next[tp], 0.05, 500):
                sizes.extend((record.offset, len(record.value or b"")) for record in records)
                self._next[tp] = records[-1].offset + 1
            head, _ = self._reader.bounds(tp)
            while sizes and sizes[0][0] < head:
                sizes.popleft()
            total += sum(size for _, size in sizes)
        return total


def users_of(kind: str, rng: np.random.Generator, count: int, users: int) -> list[int]:
    """Whose events come."""
    if kind == "heavy-tailed":
        return (np.minimum((rng.pareto(0.8, count) * 50).astype(np.int64), users - 1)).tolist()
    drawn = rng.integers(0, users, count)
    if kind == "hot":
        drawn[rng.random(count) < 0.9] = 0
    return drawn.tolist()


def run(log: Transport, prefix: str, kind: str, users: int, events: int, factor: float) -> dict[str, float]:
    """One kind of traffic on topics of its own."""
    names = topic_names(prefix)
    create_topics(log, names, PARTITIONS)
    rng = np.random.default_rng(3)
    order = [*range(users), *users_of(kind, rng, events, users)]  # every user once, then the traffic
    batches: dict[int, list[Any]] = {p: [] for p in range(PARTITIONS)}
    for number, user in enumerate(order):
        batches[user % PARTITIONS].append(digest_event(f"u{user}", number))
    for partition, records in batches.items():
        log.append(names.events[0], partition, iter(records))
    worker = make_worker(
        log,
        names,
        partitions=PARTITIONS,
        settings={"batch_events_max": BATCH, "poll_timeout_s": 0.5, "batch_wait_s": 0.2},
        engine=WideEngine(epoch_records=65_536),
        executor=AtOnce(),
        app=f"{prefix}app",
        log_bytes_min=cleaning.LOG_BYTES_MIN,
        cleaning_factor=factor,
        block_bytes_max=900_000,
    )
    length = Length(log, names.state)
    worst, seen, started_s, started_cpu, start_seen = 0.0, 0, 0.0, 0.0, 0
    while seen < len(order):
        worker.turn()
        seen = sum(state.seen for state in worker.states.values())
        live = sum(len(state.arena) for state in worker.states.values()) * WIDTH
        if not started_s and seen > users + events // 3:
            started_s, started_cpu, start_seen = time.perf_counter(), time.process_time(), seen
        if factor < 100 and live:
            paused_s, paused_cpu = time.perf_counter(), time.process_time()
            if seen > users:
                worst = max(worst, length.now() / live)
            started_s += (time.perf_counter() - paused_s) if started_s else 0.0
            started_cpu += (time.process_time() - paused_cpu) if started_s else 0.0
    done = seen - start_seen
    result = {
        "events_per_s": done / (time.perf_counter() - started_s),
        "events_per_cpu_s": done / (time.process_time() - started_cpu),
        "worst_log_over_live": worst,
    }
    worker.close()
    return result


@contextlib.contextmanager
def opened(kind: str) -> Iterator[Transport]:
    """A log of the kind that was asked for."""
    if kind == "memory":
        yield MemoryLog()
        return
    with tempfile.TemporaryDirectory(prefix="driftline-log-") as folder, running_broker(Path(folder)) as bootstrap:
        log = KafkaLog({"bootstrap_servers": bootstrap})
        yield log
        log.close()


def main() -> int:
    """The command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--log", choices=("kafka", "memory"), default="kafka")
    parser.add_argument("--users", type=int, default=40_000)
    parser.add_argument("--events", type=int, default=600_000)
    parser.add_argument("--runs", type=int, default=1, help="of each kind, with cleaning and without, in turns")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    logging.disable(logging.ERROR)
    result: dict[str, Any] = {"log": given.log, "users": given.users, "events": given.events}
    with opened(given.log) as log:
        for kind in ("uniform", "heavy-tailed", "hot"):
            with_cleaning, without = [], []
            for n in range(given.runs):
                with_cleaning.append(run(log, f"{kind}-{n}-", kind, given.users, given.events, 3.0))
                without.append(run(log, f"{kind}-{n}-none-", kind, given.users, given.events, 1e9))

            def best(runs: list[dict[str, float]], name: str) -> float:
                return max(r[name] for r in runs)

            result[kind] = {
                "worst_log_over_live": round(best(with_cleaning, "worst_log_over_live"), 2),
                "events_per_s": round(best(with_cleaning, "events_per_s")),
                "against_none": round(best(with_cleaning, "events_per_s") / best(without, "events_per_s"), 2),
                "against_none_cpu": round(
                    best(with_cleaning, "events_per_cpu_s") / best(without, "events_per_cpu_s"), 2
                ),
            }
            if not given.json:
                print(kind, result[kind], flush=True)
    if given.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
