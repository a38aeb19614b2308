"""Backpressure: a worker held to a third of the input for a while, then let go: memory, lag, and what is said about it.

    python benchmarks/backpressure.py [--seconds 300] [--rate 3000] [--kafka HOST:PORT] [--json]

The worker is the one of `driftline worker` with a brake on its pipeline; the learner is `driftline learner` with a
tenth of the CPU, so that it cannot learn all it reads. Both are processes of their own on one log (embedded, or a
broker). While the input goes on at the same rate, the worker's memory and lag and the learner's lag and shed events are
looked at every second. With --json the last line is the result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kafka_broker import free_ports  # noqa: E402

from stream.assembly import make_worker, topic_specs  # noqa: E402
from stream.config import Config  # noqa: E402
from stream.engine import PartitionState, PartitionStep  # noqa: E402
from stream.loading import load  # noqa: E402
from stream.metrics import Exposition, Health, WorkerMetrics, new_registry  # noqa: E402
from stream.partition import partition_of  # noqa: E402
from stream.process import log_to, stop_on_signals, use_threads  # noqa: E402
from stream.transport import Record, TopicPartition, Transport  # noqa: E402
from stream.workload import workload  # noqa: E402

READY_S = 300.0
CATCH_UP_S_MAX = 1_200.0
LEARNER = ("learner.cpu_share=0.1", "learning.backlog_events=4096", "learner.steps_per_turn_max=4")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def opened(config: Config) -> Transport:
    if config.transport == "kafka":
        from stream.kafka import KafkaLog

        return KafkaLog(config.kafka)
    from stream.embedded import EmbeddedLog

    return EmbeddedLog(Path(config.embedded.path))


# ── the worker, with a brake ──────────────────────────────────────────────────────────────────────────────────────────


class Braked:
    """A pipeline that takes its time until it is let go. Everything else is the pipeline's."""

    def __init__(self, pipeline: Any, rate: float, released: threading.Event) -> None:
        self._pipeline, self._rate, self._released = pipeline, rate, released

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def process(
        self, states: Mapping[int, PartitionState], inputs: Mapping[TopicPartition, Sequence[Record]]
    ) -> list[PartitionStep]:
        start_s = time.monotonic()
        steps: list[PartitionStep] = self._pipeline.process(states, inputs)
        wanted_s = sum(map(len, inputs.values())) / self._rate
        self._released.wait(max(0.0, wanted_s - (time.monotonic() - start_s)))
        return steps


def run_worker(sets: list[str], rate: float, parent: int) -> None:
    """SIGUSR1 lets go of the brake."""
    from stream.warmup import warm_up

    use_threads(1)
    config = load(sets=sets).config
    log_to(config.app, "worker")
    released = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: released.set())
    registry, health = new_registry(), Health()
    log = opened(config)
    warm_up(config)
    worker = make_worker(config, log, WorkerMetrics(registry, health))
    worker._parts.engine = Braked(worker._parts.engine, rate, released)  # type: ignore[assignment]
    server = Exposition(registry, health, "127.0.0.1", config.worker.metrics_port)
    worker.run(stop_on_signals(config.worker.shutdown_s, parent))
    server.close()
    log.close()


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def metrics_of(port: int) -> dict[str, float]:
    """Name -> value, without labels; empty while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except (OSError, urllib.error.URLError):
        return {}
    return {m[1]: float(m[2]) for m in re.finditer(r"^([a-z_0-9]+) (\S+)$", text, re.MULTILINE)}


class Feeder(threading.Thread):
    """The input at its rate, whatever the readers do."""

    def __init__(self, config: Config, rate: float, count: int) -> None:
        super().__init__(name="feeder", daemon=True)
        self._config, self._rate = config, rate
        work = workload(count, users=20_000, interests=500)
        self._keys, self._values = work.keys(), work.values()
        self.sent = 0
        self.ended = threading.Event()

    def run(self) -> None:
        log = opened(self._config)  # a log belongs to the thread that uses it
        topic, partitions = self._config.topics.events[0], self._config.topics.partitions
        start_s = time.monotonic()
        while not self.ended.is_set() and self.sent < len(self._keys):
            due = min(len(self._keys), int((time.monotonic() - start_s) * self._rate))
            batches: list[list[Any]] = [[] for _ in range(partitions)]
            now_ms = int(time.time() * 1_000)
            for n in range(self.sent, due):
                key = self._keys[n]
                batches[partition_of(key, partitions)].append((key, self._values[n], now_ms))
            for partition, batch in enumerate(batches):
                if batch:
                    log.append(topic, partition, iter(batch))
            self.sent = due
            self.ended.wait(0.2)
        log.close()


def measure(seconds: float, rate: float, bootstrap: str | None, folder: Path) -> dict[str, Any]:
    tag = uuid.uuid4().hex[:8]
    ports = free_ports(2)
    sets = [
        f"app.name=bp-{tag}", f"topics.prefix=bp-{tag}-", f'topics.events=["bp-{tag}-events"]', "topics.retention_h=-1",
        f"worker.metrics_port={ports[0]}", f"learner.metrics_port={ports[1]}", "worker.batch_events_max=2048",
        *LEARNER,
    ]  # fmt: skip
    if bootstrap:
        sets += ["transport=kafka", f"kafka.bootstrap_servers={bootstrap}"]
    else:
        sets += [f"embedded.path={folder / 'log.db'}"]
    config = load(sets=sets).config
    log = opened(config)
    admin = log.admin()
    admin.create(topic_specs(config))
    admin.close()
    log.close()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [part for each in sets for part in ("--set", each)]
    lines = {
        "worker": [sys.executable, __file__, "--worker", "--rate", str(rate / 3), *words],
        "learner": [sys.executable, "-m", "stream.cli", "learner", *words, "--parent", str(os.getpid())],
    }
    logs = {name: folder / f"{name}.log" for name in lines}
    running = {}
    for name, line in lines.items():
        with logs[name].open("wb") as out:
            running[name] = subprocess.Popen(line, stdout=out, stderr=out, env=environment)
    try:
        found = watch(config, running["worker"], ports, seconds, rate)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    said = {name: path.read_text() for name, path in logs.items()}
    found["said"] = {
        event: said[role].count(f"event={event} ")
        for role, event in (
            ("worker", "falling_behind"),
            ("worker", "catching_up"),
            ("worker", "caught_up"),
            ("learner", "gradients_shed"),
        )
    }
    found["caught_up_line"] = next((x for x in said["worker"].splitlines() if "event=caught_up" in x), "")[-80:]
    if not found["said"]["caught_up"]:
        say(said["worker"][-3_000:])
    return found


def watch(
    config: Config, worker: subprocess.Popen[bytes], ports: list[int], seconds: float, rate: float
) -> dict[str, Any]:
    """The braked span, the release, and the way back; one look a second."""
    wait_ready(worker, ports)
    feeder = Feeder(config, rate, int(rate * (seconds + CATCH_UP_S_MAX)))
    feeder.start()
    start_s = time.monotonic()
    looks: list[dict[str, float]] = []
    released_s = None
    told_eta_s = None
    while True:
        time.sleep(1.0)
        now_s = time.monotonic() - start_s
        mine, learner = metrics_of(ports[0]), metrics_of(ports[1])
        if worker.poll() is not None or now_s > seconds + CATCH_UP_S_MAX:
            raise RuntimeError("the worker ended, or never caught up; see its log")
        looks.append(
            {
                "s": now_s,
                "lag": mine.get("driftline_lag_records", 0.0),
                "eta_s": mine.get("driftline_catch_up_seconds", 0.0),
                "rss_mb": mine.get("process_resident_memory_bytes", 0.0) / 1e6,
                "learner_lag": learner.get("driftline_learner_lag_records", 0.0),
                "learner_rss_mb": learner.get("process_resident_memory_bytes", 0.0) / 1e6,
                "shed": learner.get("driftline_learner_shed_events_total", 0.0),
                "learned": learner.get("driftline_learner_events_total", 0.0),
            }
        )
        if len(looks) % 30 == 0:
            say(str({k: round(v) if v < 1e9 else v for k, v in looks[-1].items()}))
        if released_s is None and now_s >= seconds:
            released_s = now_s
            worker.send_signal(signal.SIGUSR1)
        if released_s is not None:
            eta_s = looks[-1]["eta_s"]
            if told_eta_s is None and now_s > released_s + 12 and 0 < eta_s < 1e6:
                told_eta_s = {"after_s": round(now_s - released_s, 1), "eta_s": round(eta_s, 1)}
            if now_s > released_s + 3 and looks[-1]["lag"] < 2 * rate and eta_s == 0.0:
                break
    feeder.ended.set()
    feeder.join()
    return summary(looks, released_s, told_eta_s, feeder.sent, rate, seconds)


def wait_ready(worker: subprocess.Popen[bytes], ports: list[int]) -> None:
    until_s = time.monotonic() + READY_S
    while metrics_of(ports[0]).get("driftline_partitions", 0) < 1 or not metrics_of(ports[1]):
        if time.monotonic() > until_s or worker.poll() is not None:
            raise RuntimeError("worker or learner did not come up")
        time.sleep(0.5)


def summary(
    looks: list[dict[str, float]], released_s: float, told: Any, sent: int, rate: float, seconds: float
) -> dict[str, Any]:
    braked = [x for x in looks if x["s"] <= released_s]
    settled = braked[len(braked) // 4 :]  # after the first quarter caches and tables have their size
    first, last = settled[: max(1, len(settled) // 10)], settled[-max(1, len(settled) // 10) :]

    def mean(part: list[dict[str, float]], name: str) -> float:
        return sum(x[name] for x in part) / len(part)

    return {
        "rate": rate,
        "braked_s": seconds,
        "events_sent": sent,
        "lag_max": round(max(x["lag"] for x in looks)),
        "lag_expected": round(seconds * rate * 2 / 3),
        "rss_mb_first": round(mean(first, "rss_mb"), 1),
        "rss_mb_last": round(mean(last, "rss_mb"), 1),
        "rss_mb_max": round(max(x["rss_mb"] for x in looks), 1),
        "learner_lag_max": round(max(x["learner_lag"] for x in looks)),
        "learner_rss_mb_last": round(mean(last, "learner_rss_mb"), 1),
        "learned": round(looks[-1]["learned"]),
        "shed": round(looks[-1]["shed"]),
        "eta_told": told,
        "caught_up_s": round(looks[-1]["s"] - released_s, 1),
        "cores": os.cpu_count(),
        "machine": platform.platform(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--rate", type=float, default=3_000.0, help="events a second; the worker is held to a third")
    parser.add_argument("--kafka", help="host:port of a broker; without it the embedded log")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        run_worker(given.set, given.rate, os.getppid())
        return
    with tempfile.TemporaryDirectory(prefix="driftline-backpressure-") as folder:
        found = measure(given.seconds, given.rate, given.kafka, Path(folder))
    found["log"] = "kafka" if given.kafka else "embedded"
    for name, value in found.items():
        say(f"{name}: {value}")
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
