"""Real processes, killed by SIGKILL under load between the steps of a commit, on the embedded log and on real Kafka."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from digest_app import create_topics, topic_names, verdict_of
from digest_worker import open_log

from stream.checkpoint import STEPS, TopicNames
from stream.testing import digest_event
from stream.transport import TopicPartition, Transport

PARTITIONS = 3
HERE = Path(__file__).parent


class Site:
    """One log, its topics, and worker processes on them."""

    def __init__(self, log: dict[str, Any]) -> None:
        self.log = log
        self.prefix = f"t{uuid.uuid4().hex[:10]}-"
        self.names: TopicNames = topic_names(self.prefix)
        self.transport: Transport = open_log(log)
        create_topics(self.transport, self.names, PARTITIONS)
        self.processes: list[subprocess.Popen[str]] = []
        self.count = 0

    def fill(self, rng: random.Random, count: int) -> None:
        batches: dict[int, list[tuple[bytes | None, bytes | None, int]]] = {}
        for _ in range(count):
            key, value, timestamp_ms = digest_event(f"u{int(rng.paretovariate(0.7)) % 60}", self.count)
            self.count += 1
            batches.setdefault(sum(key) % PARTITIONS, []).append(
                (key, None if rng.random() < 0.01 else value, timestamp_ms)
            )
        for partition, records in batches.items():
            self.transport.append(self.names.events[0], partition, iter(records))

    def start(self, slot: str = "0", **task: Any) -> subprocess.Popen[str]:
        task = {"log": self.log, "prefix": self.prefix, "partitions": PARTITIONS, "slot": slot, "seconds": 90, **task}
        process = subprocess.Popen(
            [sys.executable, str(HERE / "digest_worker.py"), json.dumps(task)],
            cwd=HERE.parent,
            env={"PYTHONPATH": f"{HERE.parent}:{HERE}", "PATH": "/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    def answered(self) -> int:
        reader = self.transport.reader()
        total = 0
        with contextlib.closing(reader):
            for topic in (self.names.outputs["forecasts"], self.names.outputs["dead_letters"]):
                for partition in range(PARTITIONS):
                    offset = 0
                    while records := reader.read(TopicPartition(topic, partition), offset, 0.2, 5_000):
                        total += len(records)
                        offset = records[-1].offset + 1
        return total

    def wait_drained(self, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            if self.answered() >= self.count:
                return
            time.sleep(0.2)
        raise AssertionError(f"{self.answered()} of {self.count} inputs were answered within {seconds} s")

    def stop(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0, "SIGTERM under load must end with 0"
        return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        self.transport.close()


@pytest.fixture
def embedded_site(tmp_path: Path) -> Iterator[Site]:
    with contextlib.closing(Site({"embedded": str(tmp_path / "log.db"), "session_s": 1.0})) as site:
        yield site


@pytest.fixture
def kafka_site(kafka_bootstrap: str) -> Iterator[Site]:
    with contextlib.closing(Site({"kafka": kafka_bootstrap, "session_s": 6.0})) as site:
        yield site


def kill_and_recover(site: Site, steps: list[int], rng: random.Random, settings: dict[str, Any]) -> None:
    """Kill one life after the other before the given steps, load arriving all the while; the last life drains all."""
    for step in steps:
        site.fill(rng, 300)
        process = site.start(kill_step=step, kill_countdown=rng.randrange(2, 6), settings=settings)
        process.wait(timeout=60)
        assert process.returncode == -signal.SIGKILL, f"the kill before step {step} did not bite"
    site.fill(rng, 100)
    last = site.start(settings=settings)
    site.wait_drained(60)
    site.stop(last)
    verdict, inputs = verdict_of(site.transport, site.names, PARTITIONS)
    assert verdict.problems == []
    assert verdict.outputs + verdict.dead_letters == len(inputs) == site.count


def test_kill_before_every_step_embedded(embedded_site: Site) -> None:
    """kill -9 before each of the seven steps, one life each: every input answered once, every chain whole."""
    kill_and_recover(embedded_site, list(STEPS), random.Random(2), {"batch_events_max": 20})


@pytest.mark.kafka
def test_five_kills_under_load_kafka(kafka_site: Site) -> None:
    """The same on a real broker: the transaction that a dead worker left open is aborted by its successor."""
    kill_and_recover(kafka_site, [3, 5, 4, 6, 7], random.Random(3), {"batch_events_max": 20})


@pytest.mark.kafka
def test_two_workers_share_and_one_is_killed_kafka(kafka_site: Site) -> None:
    """A second worker joins under load, the first is killed: its partitions move with their state."""
    rng = random.Random(4)
    settings = {"batch_events_max": 20}
    kafka_site.fill(rng, 600)
    first = kafka_site.start("0", settings=settings)
    time.sleep(1.0)
    second = kafka_site.start("1", settings=settings)
    kafka_site.fill(rng, 600)
    time.sleep(2.0)
    first.kill()
    kafka_site.fill(rng, 300)
    kafka_site.wait_drained(60)
    report = kafka_site.stop(second)
    assert report["events"]["partition_running"] == PARTITIONS, "not all partitions moved"
    verdict, inputs = verdict_of(kafka_site.transport, kafka_site.names, PARTITIONS)
    assert verdict.problems == [] and verdict.outputs + verdict.dead_letters == len(inputs)


def test_two_workers_share_and_one_is_killed_embedded(embedded_site: Site) -> None:
    """The same on the embedded log, two processes on one file."""
    rng = random.Random(5)
    settings = {"batch_events_max": 20}
    embedded_site.fill(rng, 600)
    first = embedded_site.start("0", settings=settings)
    second = embedded_site.start("1", settings=settings)
    embedded_site.fill(rng, 600)
    time.sleep(1.5)
    first.kill()
    embedded_site.fill(rng, 300)
    embedded_site.wait_drained(60)
    embedded_site.stop(second)
    verdict, inputs = verdict_of(embedded_site.transport, embedded_site.names, PARTITIONS)
    assert verdict.problems == [] and verdict.outputs + verdict.dead_letters == len(inputs)
