"""A short set of faults on real processes and a real broker; `make faults` runs the long one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import numpy as np
import pytest
from faults import Bench, Row, Trend
from kafka_broker import broker_or_skip, jars, java


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def kafka_bench(bench: Bench) -> Bench:
    """One that can start brokers; each part starts what it needs."""
    with broker_or_skip():
        java(), jars()
    return bench


def check(row: Row) -> None:
    """Nothing lost, doubled or reordered (the part itself would have failed), and the fault bit."""
    assert (row.lost, row.doubled, row.reordered) == (0, 0, 0)
    assert row.faults > 0 and row.bit.total() > 0 and row.inputs == row.outputs + row.dead_letters > 100


@pytest.mark.parametrize(
    "part", [lambda b: faults.zombies(b, 1), lambda b: faults.takeovers(b, 1)], ids=["zombie", "takeover"]
)
@pytest.mark.kafka
def test_one_of_each_on_kafka(kafka_bench: Bench, part: Callable[[Bench], Row]) -> None:
    """A zombie that wakes up after another worker took over; a kill inside of a transaction beside a living worker."""
    check(part(kafka_bench))


@pytest.mark.kafka
def test_an_end_of_transaction_that_nobody_answers(kafka_bench: Bench) -> None:
    """A proxy resets, drops and delays the ends of transactions: each is settled by the committed positions."""
    check(faults.network(kafka_bench, rounds=1))


@pytest.mark.kafka
def test_records_that_expire_on_their_way_are_not_committed(kafka_bench: Bench) -> None:
    """The broker hears all of a transaction but its records, until they expire: its positions are not committed."""
    check(faults.expired(kafka_bench, 1))


@pytest.mark.kafka
def test_positions_that_go_back_on_the_broker(kafka_bench: Bench) -> None:
    """What the group has forgotten stands in the state log: nothing comes twice."""
    check(faults.old_positions(kafka_bench, 2))


def test_clocks_that_jump_on_the_embedded_log(bench: Bench) -> None:
    """Days to and fro, each process by itself, and a takeover: leases, order and outputs stay what they are."""
    check(faults.clocks(bench, 1, "embedded"))


def test_a_zombie_on_the_embedded_log(bench: Bench) -> None:
    """The lease holder stands still inside of a transaction and wakes up after another process took over."""
    check(faults.zombies(bench, 1, "embedded"))


def test_a_full_disk_under_the_embedded_log(bench: Bench) -> None:
    """The file cannot grow for some seconds: the worker stands still, and goes on by itself."""
    check(faults.disk_full_embedded(bench))


def trends(growth: float, peaks: float = 0.0) -> list[Trend]:
    """Of 200 made figures that grow by this share over the time looked at; neighbours are alike (.9 by AR(1)).

    This share of the looks meets a peak of up to 50 times the level.
    """
    rng = np.random.default_rng(1)
    times_min = np.linspace(0.0, 9.0, 250)
    found = []
    for _ in range(200):
        noise = np.zeros(len(times_min))
        for i in range(1, len(noise)):
            noise[i] = 0.9 * noise[i - 1] + rng.normal()
        start = 100 - 30 * np.exp(-2 * times_min)  # warms up
        values = start * (1 + growth * times_min / 6) + noise
        if peaks:
            values += np.where(rng.random(len(values)) < peaks, rng.uniform(0, 5_000, len(values)), 0)
        found.append(Trend.of(times_min.tolist(), values.tolist()))
    return found


def test_a_leak_is_told_from_noise() -> None:
    """The soak's criterion: a flat one is called growing once in 40 at most (with peaks 20), a tenth nearly always."""
    assert sum(trend.grows for trend in trends(0.0)) <= 5
    assert sum(trend.grows for trend in trends(0.0, peaks=0.15)) <= 10
    assert sum(trend.grows for trend in trends(0.1)) >= 180
    assert sum(trend.grows for trend in trends(0.1, peaks=0.15)) >= 170


@pytest.mark.kafka
@pytest.mark.slow
def test_a_broker_that_is_killed_comes_back(kafka_bench: Bench) -> None:
    """kill -9 of the broker under load and a restart; minutes on a busy machine."""
    check(faults.broker_kills(kafka_bench, 1))
