"""Throughput on a real Kafka: the bare reader, Quix Streams' stateful loop and the whole of Driftline, in one run.

    python benchmarks/throughput.py [--events 1500000] [--json] [--kafka HOST:PORT] [--rounds 1]

The broker, the workload and everybody run on this machine, one after the other on the same topic. What is timed is the
span from the middle of the events to the last one, so that nobody pays for starting up. Driftline runs as `driftline
worker` and `driftline learner`, as a user would start them; its progress is what a committed reader sees.
With --json the last line is the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from environments import python_of  # noqa: E402
from kafka_broker import running_broker  # noqa: E402

from stream.kafka import KafkaLog  # noqa: E402
from stream.partition import partition_of  # noqa: E402
from stream.transport import TopicPartition, TopicSpec  # noqa: E402
from stream.workload import EVENT_BYTES, workload  # noqa: E402

PARTITIONS = 4
WARM_SHARE = 0.5  # until then most users are new, and a new user always gets a forecast
PEER_TIMEOUT_S = 300
STOP_TIMEOUT_S = 30


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fill(log: KafkaLog, topic: str, count: int, users: int, interests: int) -> None:
    """The workload into the input topic."""
    work = workload(count, users=users, interests=interests)
    batches: list[list[tuple[bytes | None, bytes | None, int]]] = [[] for _ in range(PARTITIONS)]
    for key, value, time_ms in zip(work.keys(), work.values(), work.time_ms_E.tolist(), strict=True):
        batches[partition_of(key, PARTITIONS)].append((key, value, time_ms))
    for partition, batch in enumerate(batches):
        log.append(topic, partition, iter(batch))


def measure_reader(bootstrap: str, topic: str, count: int) -> float:
    """kafka-python alone: poll and count."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/peers/bare_reader.py"), bootstrap, topic, str(count)],
        capture_output=True,
        text=True,
        timeout=PEER_TIMEOUT_S,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1])["events_per_s"])


def measure_quix(bootstrap: str, topic: str, count: int, log: KafkaLog) -> float:
    """Quix Streams with one state of 64 floats a key and one output an event, exactly once."""
    sink = f"quix-{uuid.uuid4().hex[:8]}"
    log.admin().create([TopicSpec(name=sink, partitions=PARTITIONS)])
    with tempfile.TemporaryDirectory() as folder:
        command = [python_of("quix"), ROOT / "benchmarks/peers/quix_loop.py", bootstrap, topic, sink, count, folder]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=PEER_TIMEOUT_S, check=False
        )
    if done.returncode != 0:
        raise SystemExit(f"the Quix loop failed:\n{done.stderr[-2_000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["events_per_s"])


@contextlib.contextmanager
def driftline(bootstrap: str, prefix: str, topic: str, *roles: str, settings: list[str]) -> Iterator[list[Any]]:
    """Worker and learner as processes of their own, stopped at the end."""
    options = ["--transport", "kafka"]
    for setting in (
        f"kafka.bootstrap_servers={bootstrap}",
        f'topics.events=["{topic}"]',
        f"topics.prefix={prefix}",
        f"topics.partitions={PARTITIONS}",
        f"app.name={prefix}app",
        *settings,
    ):
        options += ["--set", setting]
    base = [sys.executable, "-m", "stream.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*base, "topics", "create", *options], check=True, cwd=ROOT, env=environment, timeout=60)
    processes = [subprocess.Popen([*base, role, *options], cwd=ROOT, env=environment) for role in roles]
    try:
        yield processes
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def measure_driftline(bootstrap: str, topic: str, count: int, log: KafkaLog, settings: list[str]) -> dict[str, Any]:
    """Events/s as a committed reader of the metrics topic sees them, and what came out."""
    prefix = f"b{uuid.uuid4().hex[:6]}-"
    with driftline(bootstrap, prefix, topic, "worker", "learner", settings=settings) as processes:
        reader = log.reader()
        offsets = [0] * PARTITIONS
        marks: list[tuple[float, int, int]] = []  # seconds, records, forecasts
        totals: dict[str, int] = {"records": 0, "forecasts": 0, "alerts": 0}
        version = 0
        deadline_s = time.monotonic() + PEER_TIMEOUT_S
        while totals["records"] < count:
            if time.monotonic() > deadline_s or any(p.poll() is not None for p in processes):
                raise SystemExit(f"driftline handled {totals['records']} of {count} events; see its log above")
            for partition in range(PARTITIONS):
                found = reader.read(TopicPartition(prefix + "metrics", partition), offsets[partition], 0.02, 1_000)
                for record in found:
                    offsets[partition] = record.offset + 1
                    metrics = json.loads(record.value or b"{}")
                    version = max(version, metrics["weights_version"])
                    for name in totals:
                        totals[name] += metrics[name]
            marks.append((time.perf_counter(), totals["records"], totals["forecasts"]))
        reader.close()
    first = next(mark for mark in marks if mark[1] >= WARM_SHARE * count)
    return {
        "events_per_s": (marks[-1][1] - first[1]) / (marks[-1][0] - first[0]),
        "emitting_share": (totals["forecasts"] - first[2]) / (count - first[1]),
        "alerts": totals["alerts"],
        "weights_version": version,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_500_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--interests", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=1, help="repeat and take the medians")
    parser.add_argument("--kafka", help="host:port of a running broker; one is started otherwise")
    parser.add_argument("--json", action="store_true", help="the last line is the result")
    parser.add_argument("--set", action="append", default=[], help="a setting of driftline, section.key=value")
    arguments = parser.parse_args()
    settings = ["learner.cpu_share=0.1", *arguments.set]
    with contextlib.ExitStack() as stack:
        bootstrap = arguments.kafka
        if not bootstrap:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            bootstrap = stack.enter_context(running_broker(folder))
        log = KafkaLog({"bootstrap_servers": bootstrap})
        topic = f"events-{uuid.uuid4().hex[:8]}"
        log.admin().create([TopicSpec(name=topic, partitions=PARTITIONS)])
        say(f"writing {arguments.events:,} events ...")
        fill(log, topic, arguments.events, arguments.users, arguments.interests)
        rounds = []
        for number in range(arguments.rounds):
            say(f"round {number + 1} of {arguments.rounds}: bare reader ...")
            reader = measure_reader(bootstrap, topic, arguments.events)
            say(f"  {reader:,.0f} events/s; Quix Streams ...")
            quix = measure_quix(bootstrap, topic, min(arguments.events, 150_000), log)
            say(f"  {quix:,.0f} events/s; driftline ...")
            ours = measure_driftline(bootstrap, topic, arguments.events, log, settings)
            say(f"  {ours['events_per_s']:,.0f} events/s, {ours['emitting_share']:.1%} of the events emit a forecast")
            rounds.append({"reader": reader, "quix": quix, "driftline": ours["events_per_s"], **ours})
        log.close()
    rounds.sort(key=lambda r: r["driftline"] / r["reader"])
    middle = rounds[len(rounds) // 2]
    from stages import stages_us

    result = {
        "workload": {
            "events": arguments.events,
            "event_bytes": EVENT_BYTES,
            "partitions": PARTITIONS,
            "users": arguments.users,
            "activity": "lognormal, sigma 1",
            "interests": arguments.interests,
            "emission": "on-change",
            "emitting_share": round(middle["emitting_share"], 4),
            "learner_cpu_share": 0.1,
            "weights_version_at_end": middle["weights_version"],
        },
        "reader": round(middle["reader"]),
        "quix": round(middle["quix"]),
        "driftline": round(middle["driftline"]),
        "ratio_reader": round(middle["driftline"] / middle["reader"], 3),
        "ratio_quix": round(middle["driftline"] / middle["quix"], 3),
        "stages_us": stages_us(),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "date": datetime.now(UTC).date().isoformat(),
        "rounds": [{k: round(r[k]) for k in ("reader", "quix", "driftline")} for r in rounds],
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:14} {value}")


if __name__ == "__main__":
    main()
