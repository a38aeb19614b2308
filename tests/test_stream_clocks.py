"""A wall clock that jumps changes no output: what is judged goes by the records' own times (see events.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from stream.assembly import check_topics, make_worker, names_of, topic_specs
from stream.config import Config
from stream.embedded import EmbeddedLog
from stream.loading import load
from stream.partition import partition_of
from stream.simulate import ShopSettings, simulate
from stream.testing import read_all

EVENTS = 1_500
PARTITIONS = 2
DAY_S = 86_400.0
STREAMS = ("forecasts", "alerts", "dead_letters", "verdicts")  # metrics are sums by transaction, cut by the real time


class Silent:
    """Observes worker and keeps nothing."""

    def turn(self, turn: Any) -> None: ...
    def event(self, name: str, **facts: object) -> None: ...
    def owned(self, *facts: object) -> None: ...


@pytest.fixture(scope="module")
def config() -> Config:
    return load(
        None,
        [f"topics.partitions={PARTITIONS}", "topics.retention_h=-1", "app.seed=0", "worker.batch_events_max=100"],
    ).config


def run(config: Config, path: Path, clock: Callable[[], float]) -> dict[str, list[tuple[int, Any, Any]]]:
    """The outputs of a worker on an embedded log, under this wall clock: (partition, key, value) by stream."""
    log = EmbeddedLog(path, clock=clock)
    names = names_of(config)
    admin = log.admin()
    admin.create(topic_specs(config))
    admin.close()
    check_topics(log, config)
    records = list(islice(simulate(ShopSettings(users=40, events=EVENTS, seed=5)).records(), EVENTS))
    for p in range(PARTITIONS):
        log.append(names.events[0], p, [r for r in records if partition_of(r[0], PARTITIONS) == p])
    silent: Any = Silent()
    worker = make_worker(config, log, silent)
    until_s = time.monotonic() + 120
    while sum(state.seen for state in worker.states.values()) < len(records):
        worker.turn()
        assert time.monotonic() < until_s
    worker.close()
    reader = log.reader()
    found = {
        stream: [(r.partition, r.key, r.value) for r in read_all(reader, names.outputs[stream], PARTITIONS, 0.0)]
        for stream in STREAMS
    }
    reader.close()
    log.close()
    return found


def jumping(real: Callable[[], float]) -> Iterator[float]:
    """A clock that is set to another day, or year, at each look."""
    for off_days in cycle([0.0, 400.0, -400.0, 0.04, -3.0]):
        yield real() + off_days * DAY_S


def test_a_clock_that_jumps_changes_no_output(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forecasts, alerts, verdicts and dead letters are the same bytes in the same order, whatever the clock says."""
    steady = run(config, tmp_path / "steady.db", time.time)
    looks = 0
    times = jumping(time.time)

    def clock() -> float:
        nonlocal looks
        looks += 1
        return next(times)

    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr(time, "time_ns", lambda: int(clock() * 1e9))
    jumped = run(config, tmp_path / "jumped.db", clock)
    assert looks > 100 and len(steady["forecasts"]) > 200 and steady["dead_letters"]
    assert jumped == steady
