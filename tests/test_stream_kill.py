"""Real processes, killed by SIGKILL under load at named points, on the embedded log and on real Kafka."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_site import PARTITIONS, Site
from faults import kill_and_recover

from stream.checkpoint import STEPS


@pytest.fixture
def embedded_site(tmp_path: Path) -> Iterator[Site]:
    with contextlib.closing(Site({"embedded": str(tmp_path / "log.db"), "session_s": 1.0})) as site:
        yield site


@pytest.fixture
def kafka_site(kafka_bootstrap: str) -> Iterator[Site]:
    with contextlib.closing(Site({"kafka": kafka_bootstrap, "session_s": 6.0})) as site:
        yield site


def test_kill_before_every_step_embedded(embedded_site: Site) -> None:
    """kill -9 before each of the seven steps, one life each: every input answered once, every chain whole."""
    kill_and_recover(embedded_site, [f"step {step}" for step in STEPS] + ["committing"], random.Random(2))
    assert embedded_site.ended().problems == []


@pytest.mark.kafka
def test_five_kills_under_load_kafka(kafka_site: Site) -> None:
    """The same on a real broker: the transaction that a dead worker left open is aborted by its successor."""
    points = ["step 3", "send", "committing", "restore", "step 7"]
    kill_and_recover(kafka_site, points, random.Random(3))
    assert kafka_site.ended().problems == []


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
    assert kafka_site.ended().problems == []


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
    assert embedded_site.ended().problems == []
