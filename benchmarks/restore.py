"""How long the state of so many users takes to come back from a broker: fetch, decode and merge, with the real records.

    python benchmarks/restore.py --users 1000000 --json

Starts a broker, writes the state of all users in blocks as a worker does, and restores every partition as the new owner
of all of them would: a barrier, then the log up to it, on one helper thread. Nothing is in the arena before.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from kafka_broker import running_broker

from models.profile import USER
from stream import changelog
from stream.changelog import Kind
from stream.kafka import KafkaLog
from stream.restore import restore
from stream.testing import DigestEngine
from stream.transport import TopicSpec

BLOCK_BYTES = 900_000


class WideEngine(DigestEngine):
    """The digest engine with the records of the real one; a restore asks no more of it."""

    dtype = USER


def write(log: KafkaLog, users: int, partitions: int, batch: int) -> int:
    """The state of all users, each written once, `batch` of them a transaction; bytes written."""
    producer = log.producer(transactional_id="writer")
    rng = np.random.default_rng(1)
    total = 0
    for partition in range(partitions):
        count, number = users // partitions, 1
        keys = rng.choice(np.arange(1, 20 * users, dtype=np.uint64), count, replace=False) * np.uint64(
            0x9E3779B97F4A7C15
        )
        for start in range(0, count, batch):
            records = np.zeros(len(keys[start : start + batch]), USER)
            records["key"] = keys[start : start + batch]
            records["hidden"] = rng.standard_normal((len(records), records["hidden"].shape[1]), np.float32)
            records["block"] = number
            producer.begin()
            for block in changelog.pack(Kind.USERS, partition, number, records, BLOCK_BYTES):
                producer.send("state", partition, None, block)
                total += len(block)
                number += 1
            producer.commit()
    producer.close()
    return total


def main() -> int:
    """The command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4_096, help="users a transaction")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="driftline-restore-") as folder, running_broker(Path(folder)) as bootstrap:
        log = KafkaLog({"bootstrap_servers": bootstrap})
        admin = log.admin()
        admin.create([TopicSpec(name="state", partitions=given.partitions, settings={"retention.ms": "-1"})])
        admin.close()
        size = write(log, given.users, given.partitions, given.batch)
        engine = WideEngine()
        times, cpu = [], []
        for run in range(given.runs):
            profile = cProfile.Profile()
            if given.profile:
                profile.enable()
            start_s, start_cpu = time.perf_counter(), time.process_time()
            found = 0
            for partition in range(given.partitions):
                state = restore(
                    log,
                    engine=engine,
                    topic="state",
                    partition=partition,
                    transactional_id="app.0.barrier",
                    nonce=f"{run}/{partition}".encode(),
                    timeout_s=60,
                    clock=time.monotonic,
                )
                assert state is not None
                found += len(state.arena)
            times.append(time.perf_counter() - start_s)
            cpu.append(time.process_time() - start_cpu)
            profile.disable()
            if given.profile:
                pstats.Stats(profile).sort_stats("tottime").print_stats(18)
            assert found == given.users // given.partitions * given.partitions
        log.close()
    result = {
        "users": found,
        "bytes": size,
        "partitions": given.partitions,
        "seconds": [round(s, 2) for s in times],
        "cpu_s": [round(s, 2) for s in cpu],
        "best_s": round(min(times), 2),
        "mb_per_s": round(size / min(times) / 1e6),
    }
    print(json.dumps(result) if given.json else result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
