"""The long set of faults: real worker processes, a real broker, everything that can be done to them, and the oracle.

    python tests/faults.py                       all parts, then the soak (`make faults`)
    python tests/faults.py kills zombies         these parts only
    python tests/faults.py soak --minutes 60     the soak alone
    python tests/faults.py --list

Every part proves that its fault bit (I10) and gives a row: what was done how often, records in and out, lost, doubled,
reordered, and the longest time to progress after the last fault. --report writes the rows of the parts that ran to
docs/reliability.md and leaves the others. At the end one line a part says what ran and what failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from fault_site import PARTITIONS, Ended, Site
from kafka_broker import Broker, free_ports, start
from kafka_proxy import ADD_OFFSETS, END_TXN, PRODUCE, TXN_OFFSET_COMMIT, Proxy
from pipeline_site import PipelineSite, Process, bite, leave, wake

from stream.errors import DriftlineError
from stream.transport import TopicPartition

SESSION_S = 3.0
TRANSACTION_S = 4.0
STILL_MAX_S = 60.0  # of a soak, whose faults follow each other faster than sessions expire
SETTINGS = {"batch_events_max": 20}
POINTS = (*(f"step {n}" for n in range(1, 8)), "send", "committing", "restore", "rewrite", "delete")
HERE = Path(__file__).resolve().parent
REPORT = HERE.parent / "docs" / "reliability.md"


@dataclass(kw_only=True)
class Row:
    """What a part gave."""

    part: str
    faults: int
    bit: Counter[str] = field(default_factory=Counter)
    inputs: int = 0
    outputs: int = 0
    dead_letters: int = 0
    lost: int = 0
    doubled: int = 0
    reordered: int = 0
    progress_s: float = 0.0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def add(self, ended: Ended) -> None:
        """Take a verdict in; any problem ends the part."""
        self.inputs += ended.inputs
        self.outputs += ended.verdict.outputs
        self.dead_letters += ended.verdict.dead_letters
        self.bit.update(ended.bit)
        for problem in ended.problems:
            self.lost += problem.startswith("I1")
            self.doubled += problem.startswith("I2")
            self.reordered += problem.startswith("I3")
        assert ended.problems == [], ended.problems


def kill_and_recover(site: Site, points: list[str], rng: random.Random) -> None:
    """Kill one life after the other at the given points, load arriving all the while; the last life drains all."""
    for point in points:
        site.fill(rng, 300)
        fault = {"point": point, "countdown": rng.randrange(2, 6)}
        process = site.start(fault=fault, settings=SETTINGS)
        until_s = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until_s:
            if point in ("rewrite", "delete"):  # needs a long log
                site.fill(rng, 100)
            time.sleep(0.1)
        assert process.poll() == -signal.SIGKILL, f"the kill at {point} did not bite"
    site.fill(rng, 100)
    last = site.start(settings=SETTINGS)
    site.wait_drained(60)
    site.stop(last)


class Bench:
    """One broker for the parts, started when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._broker: Broker | None = None
        self._count = 0

    @property
    def broker(self) -> Broker:
        if self._broker is None:
            self._broker = self.fresh()
        return self._broker

    def fresh(self, extra: str = "") -> Broker:
        self._count += 1
        return start(self.folder / f"kafka-{self._count}", heap="-Xmx768m", extra=extra)

    def kafka(self, broker: Broker | None = None, trust_clocks: bool = True, **log: Any) -> Iterator[Site]:
        bootstrap = (broker or self.broker).bootstrap
        log = {"kafka": bootstrap, "session_s": SESSION_S, "transaction_s": TRANSACTION_S, **log}
        return closing(Site(log, trust_clocks=trust_clocks))

    def embedded(self, trust_clocks: bool = True) -> Iterator[Site]:
        self._count += 1
        log = {"embedded": str(self.folder / f"log-{self._count}.db"), "session_s": 1.0}
        return closing(Site(log, trust_clocks=trust_clocks))

    def close(self) -> None:
        if self._broker is not None:
            self._broker.stop()


def closing(site: Site) -> Any:
    return contextlib.closing(site)


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def kills(bench: Bench, count: int = 54, log: str = "kafka") -> Row:
    """F1, F14: one life after the other is killed at a named point, all points in turn."""
    row = Row(part=f"kill -9 of a worker at a named point, {log}", faults=0)
    for seed in range(-(-count // len(POINTS))):
        with bench.kafka() if log == "kafka" else bench.embedded() as site:
            rng = random.Random(seed)
            points = rng.sample(POINTS, len(POINTS))[: count - row.faults]
            kill_and_recover(site, points, rng)
            row.faults += len(points)
            row.bit.update([f"killed at {point}" for point in points])
            judge(site, row)
    return row


def kills_embedded(bench: Bench) -> Row:
    """F14: the same on the embedded log."""
    return kills(bench, 24, "embedded")


def takeovers(bench: Bench, count: int = 10, log: str = "kafka") -> Row:
    """F1, I8: one of two workers is killed inside of a transaction; the other one takes over."""
    row = Row(part=f"kill -9 of one of two workers, takeover, {log}", faults=0)
    with bench.kafka() if log == "kafka" else bench.embedded() as site:
        rng = random.Random(5)
        site.fill(rng, 300)
        living = site.start("0", settings=SETTINGS)
        for n in range(count):
            site.fill(rng, 300)
            other = site.start(str(1 + n), settings=SETTINGS)
            point = rng.choice(["step 4", "step 6", "committing", "send"])
            settle(site, rng, 1.5)
            victim = site.start("victim", settings=SETTINGS, fault={"point": point, "countdown": rng.randrange(3, 9)})
            until_s = time.monotonic() + 30
            while victim.poll() is None and time.monotonic() < until_s:
                site.fill(rng, 40)
                time.sleep(0.1)
            killed_s = time.time()
            assert victim.poll() == -signal.SIGKILL, f"the kill at {point} did not bite"
            site.fill(rng, 300)
            patience_s = 2 * (SESSION_S + TRANSACTION_S)
            row.progress_s = max(row.progress_s, site.watch.wait_for_more(range(PARTITIONS), killed_s, patience_s))
            row.faults += 1
            row.bit["takeover"] += 1
            site.stop(living)
            living = other
        finish(site, row, [living])
    return row


def takeovers_embedded(bench: Bench) -> Row:
    """The same on the embedded log."""
    return takeovers(bench, 5, "embedded")


def zombies(bench: Bench, count: int = 10, log: str = "kafka") -> Row:
    """F3: a worker stands still inside of a transaction beyond its session; another takes over; it wakes up."""
    row = Row(part=f"zombie: SIGSTOP inside a transaction, takeover, SIGCONT, {log}", faults=0)
    for n in range(count):
        with bench.kafka() if log == "kafka" else bench.embedded() as site:
            rng = random.Random(100 + n)
            site.fill(rng, 400)
            point = ("step 6", "committing", "send", "step 5", "step 7")[n % 5]
            if log == "embedded" and not point.startswith("step"):
                point = "step 6"  # one that stands inside a write holds the file's lock: nobody can go on, by design
            zombie = site.start("0", settings=SETTINGS, fault={"point": point, "countdown": 3, "how": "stop"})
            wait_for_state(zombie, "T", 30)
            site.fill(rng, 200)
            heir = site.start("1", settings=SETTINGS)
            site.watch.wait_for_more(range(PARTITIONS), time.time(), 2 * (SESSION_S + TRANSACTION_S))
            os.kill(zombie.pid, signal.SIGCONT)
            woken_s = time.time()
            site.fill(rng, 300)
            row.progress_s = max(
                row.progress_s, site.watch.wait_for_more(range(PARTITIONS), woken_s, 2 * (SESSION_S + TRANSACTION_S))
            )
            row.faults += 1
            row.bit[f"stopped at {point}"] += 1
            finish(site, row, [heir, zombie])
    return row


def zombies_embedded(bench: Bench) -> Row:
    """F14: SIGSTOP of the lease holder."""
    return zombies(bench, 5, "embedded")


def same_slot(bench: Bench, count: int = 5) -> Row:
    """F4: two workers of one slot; the older one stops with its own exit code, the newer one goes on."""
    row = Row(part="two workers of one slot: the older is fenced and exits 3, Kafka", faults=0)
    with bench.kafka() as site:
        rng = random.Random(6)
        site.fill(rng, 200)
        older = site.start("0", settings=SETTINGS)
        settle(site, rng, 1.0)
        for _ in range(count):
            newer = site.start("0", settings=SETTINGS)
            until_s = time.monotonic() + 40
            while older.poll() is None and time.monotonic() < until_s:
                site.fill(rng, 30)
                time.sleep(0.1)
            assert older.returncode == 3, f"the older one ended with {older.returncode}"
            row.faults += 1
            row.bit["fenced"] += 1
            older = newer
            settle(site, rng, 1.0)
        finish(site, row, [older])
    return row


def storm(bench: Bench, rounds: int = 3, log: str = "kafka") -> Row:
    """F5: 1 -> 4 -> 2 -> 1 workers every 5 s under load, again and again."""
    row = Row(part=f"rebalance storm 1 -> 4 -> 2 -> 1 every 5 s, {log}", faults=0)
    with bench.kafka() if log == "kafka" else bench.embedded() as site:
        rng = random.Random(7)
        site.fill(rng, 200)
        workers = [site.start("0", settings=SETTINGS)]
        for _ in range(rounds):
            for size in (4, 2, 1):
                while len(workers) < size:
                    workers.append(site.start(f"{len(workers)}-{row.faults}", settings=SETTINGS))
                    row.faults += 1
                while len(workers) > size:
                    leaver = workers.pop(rng.randrange(len(workers)))
                    row.faults += 1
                    if rng.random() < 0.5:
                        leaver.kill()
                    else:
                        site.stop(leaver)
                settle(site, rng, 5.0)
        since_s = time.time()
        site.fill(rng, 200)
        row.progress_s = site.watch.wait_for_more(range(PARTITIONS), since_s, 2 * (SESSION_S + TRANSACTION_S))
        finish(site, row, workers)
        assert row.bit["saw partition_dropped"] > 0, "no partition moved: there was no rebalance"
    return row


def storm_embedded(bench: Bench) -> Row:
    """The same on the embedded log."""
    return storm(bench, 1, "embedded")


def broker_kills(bench: Bench, count: int = 10) -> Row:
    """F2: kill -9 of the broker under load, and a restart."""
    rng = random.Random(18)

    def away(broker: Broker) -> None:
        time.sleep(rng.random() * 0.3)
        broker.kill()
        broker.restart()

    row = Row(part="kill -9 and restart of the broker under load", faults=0)
    return broker_goes(bench, row, [away] * count)


def broker_pauses(bench: Bench) -> Row:
    """F2: SIGSTOP of the broker for 5, 20 and 40 s."""

    def away(broker: Broker, pause_s: float) -> None:
        os.kill(broker.pid, signal.SIGSTOP)
        time.sleep(pause_s)
        os.kill(broker.pid, signal.SIGCONT)

    row = Row(part="SIGSTOP of the broker for 5, 20, 40 s", faults=0)
    return broker_goes(bench, row, [partial(away, pause_s=s) for s in (5.0, 20.0, 40.0)])


def broker_goes(bench: Bench, row: Row, ways: list[Callable[[Broker], None]]) -> Row:
    """A broker that goes away and comes back, in each of the ways, under two workers and load."""
    with own_broker(bench) as (broker, site):
        rng = random.Random(8)
        site.fill(rng, 400)
        workers = [site.start(str(n), settings=SETTINGS) for n in range(2)]
        for away in ways:
            settle(site, rng, 2.0)
            site.fill(rng, 300)
            away(broker)
            back(site, row, rng, 60)
        finish(site, row, workers)
        row.bit["the watch lost the broker"] = site.watch.retries
        noticed = row.bit["the watch lost the broker"] + row.bit["saw retry"] + row.bit["saw commit_failed"]
        assert noticed + row.bit["saw rebalanced"] > 0, "nobody noticed that the broker was away"
    return row


def network(bench: Bench, rounds: int = 6) -> Row:
    """F6: a proxy that drops, delays and resets; the end of transactions above all."""
    row = Row(part="a proxy drops, delays, resets requests (EndTxn above all)", faults=0)
    with proxied(bench, {"request_timeout_ms": 3_100, "fetch_max_wait_ms": 100}) as (proxy, site):
        rng = random.Random(10)
        site.fill(rng, 300)
        worker = site.start(settings=SETTINGS)
        settle(site, rng, 1.0)
        for n in range(rounds * 4):
            what = ("reset after", "drop", "reset", "delay")[n % 4]
            key = rng.choice([END_TXN, END_TXN, END_TXN, TXN_OFFSET_COMMIT, ADD_OFFSETS, PRODUCE])
            left = rng.randrange(1, 3)

            def rule(asked: int, what: str = what, key: int = key) -> str:
                nonlocal left
                if asked == key and left > 0:
                    left -= 1
                    return what
                return "pass"

            proxy.rule = rule
            site.fill(rng, 200)
            site.wait_drained(60)
            proxy.rule = lambda asked: "pass"
            row.faults += 1
        since_s = time.time()
        site.fill(rng, 200)
        row.progress_s = site.watch.wait_for_more(range(PARTITIONS), since_s, 2 * (SESSION_S + TRANSACTION_S))
        finish(site, row, [worker])
        row.bit.update({f"proxy: {what}": count for what, count in proxy.bit.items()})
        assert sum(proxy.bit.values()) >= rounds and row.bit["saw commit_settled"] > 0
    return row


def expired(bench: Bench, count: int = 4) -> Row:
    """F11: records of a transaction expire on their way to the broker, all else passes: nothing of it is committed."""
    row = Row(part="records of a transaction expire on their way (all else passes): no commit", faults=0)
    settings = {"request_timeout_ms": 800, "delivery_timeout_ms": 1_500, "fetch_max_wait_ms": 100}
    with proxied(bench, settings) as (proxy, site):
        rng = random.Random(19)
        site.fill(rng, 200)
        worker = site.start(settings=SETTINGS)
        for _ in range(count):
            site.wait_drained(60)
            proxy.rule = lambda asked: "drop" if asked == PRODUCE else "pass"
            time.sleep(0.5)  # what was on its way has come
            before, sent = site.watch.results, site.inputs()
            site.fill(rng, 200)
            time.sleep(4.0)
            assert site.watch.results == before < sent + 200, "something was committed without its records"
            proxy.rule = lambda asked: "pass"
            back(site, row, rng, 2 * (SESSION_S + TRANSACTION_S))
        finish(site, row, [worker])
        row.bit["proxy: drop"] = proxy.bit["drop"]
        assert row.bit["saw commit_failed"] >= count <= row.bit["saw void"] and row.bit["saw committed"] == 0
    return row


def old_positions(bench: Bench, count: int = 5) -> Row:
    """The group's positions go back to what they once were, as after a broker's race in loading them: nothing twice."""
    row = Row(part="the group's positions go back between two lives", faults=0)
    with bench.kafka() as site:
        rng = random.Random(23)
        life = site.start(settings=SETTINGS)
        for _ in range(count):
            site.fill(rng, 300)
            site.wait_drained(60)
            old = site.positions()
            site.fill(rng, 300)
            site.wait_drained(60)
            site.stop(life)
            site.set_positions(old)
            assert site.positions() == old, "the positions are not back"
            life = site.start(settings=SETTINGS)
            back(site, row, rng, 2 * (SESSION_S + TRANSACTION_S))
        finish(site, row, [life])
        row.bit["partitions set back"] = count * PARTITIONS
        assert row.bit["saw position_behind"] >= count * PARTITIONS, "no worker noticed"
    return row


def clocks(bench: Bench, count: int = 4, log: str = "kafka") -> Row:
    """F12: the workers' wall clocks jump by days, each for itself, while they take over from one another.

    On Kafka not far ahead: the broker refuses what is dated more than an hour ahead (message.timestamp.after.max.ms).
    """
    row = Row(part=f"wall clocks that jump by up to a year, takeovers, {log}", faults=0)
    day_s = 86_400.0
    ahead_s = 1_800.0 if log == "kafka" else 365 * day_s
    with bench.kafka(trust_clocks=False) if log == "kafka" else bench.embedded(trust_clocks=False) as site:
        rng = random.Random(20)
        site.fill(rng, 300)
        living = site.start("0", settings=SETTINGS, clock=[0.0, ahead_s, -365 * day_s])
        for n in range(count):
            settle(site, rng, 1.5)
            heir = site.start(str(1 + n), settings=SETTINGS, clock=[-300 * day_s, ahead_s, 0.0])
            settle(site, rng, 1.5)
            living.kill()
            back(site, row, rng, 2 * (SESSION_S + TRANSACTION_S))
            row.bit["takeover"] += 1
            living = heir
        finish(site, row, [living])
        row.bit["days that a result's time is off, at most"] = days = int(site.watch.off_ms / 1_000 / day_s)
        assert days >= 300, "no clock jumped"
    return row


def clocks_embedded(bench: Bench) -> Row:
    """The same on the embedded log."""
    return clocks(bench, 4, "embedded")


def poison(bench: Bench) -> Row:
    """F8: random bytes, broken JSON, 5 MB records, null keys and values, a thousand in a row."""
    row = Row(part="poison: random bytes, broken JSON, 5 MB, nulls, 1,000 in a row", faults=0)
    broker = bench.fresh("message.max.bytes=7000000\nreplica.fetch.max.bytes=7000000")
    try:
        with bench.kafka(broker, settings={"max_request_size": 7_000_000}) as site:
            rng = random.Random(11)
            settings = {"batch_events_max": 200, "poison_share_max": 1.0}
            worker = site.start(settings=settings)
            bad: list[tuple[bytes | None, bytes | None]] = [
                (b"k", rng.randbytes(100)), (b"k", b'{"user": "k", "inter'), (None, b"{}"), (b"k", None),
                (b"k", b'{"user": 5}'), (b"k", b'{"user": NaN}'), (b"other", b'{"user": "k"}'), (b"k", b""),
                (b"k", rng.randbytes(5_000_000)), (b"k", b"\xff\xfe" * 40_000),
            ]  # fmt: skip
            for key, value in [*bad, *(rng.choice(bad[:8]) for _ in range(1_000)), *bad]:
                site.append(rng.randrange(PARTITIONS), [(key, value, 1)])
                row.faults += 1
                if row.faults % 20 == 0:
                    site.fill(rng, 10)
            finish(site, row, [worker])
            assert row.dead_letters >= row.faults
    finally:
        broker.stop()
    return row


def disk_full(bench: Bench) -> Row:
    """F7: the broker's disk is full (a limit on the size of its files); it stops; with room it starts again."""
    row = Row(part="disk full at the broker (file-size limit), with room again it is started", faults=0)
    with own_broker(bench) as (broker, site):
        rng = random.Random(12)
        site.fill(rng, 400)
        worker = site.start(settings=SETTINGS)
        settle(site, rng, 2.0)
        resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
        until_s = time.monotonic() + 60
        while broker.process.poll() is None and time.monotonic() < until_s:
            with contextlib.suppress(DriftlineError):
                site.transport.append(site.names.outputs["alerts"], 0, iter([(b"k", bytes(30_000), 1)] * 3))
            time.sleep(0.2)
        row.bit["the broker stopped"] += broker.process.poll() is not None
        broker.kill()
        broker.restart()
        back(site, row, rng, 90)
        finish(site, row, [worker])
        assert row.bit["the broker stopped"] == 1, "the limit did not bite"
    return row


def disk_full_embedded(bench: Bench) -> Row:
    """F7, F14: the embedded log cannot grow any more; the worker waits, and goes on by itself once it can."""
    row = Row(part="disk full at the embedded log (file-size limit), healed by itself", faults=0)
    with bench.embedded() as site:
        rng = random.Random(13)
        site.fill(rng, 400)
        worker = site.start(settings=SETTINGS)
        settle(site, rng, 1.5)
        for _ in range(3):
            site.wait_drained(30)  # else what is still to come would look like progress in spite of the limit
            _, hard = resource.prlimit(worker.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (8_192, hard))
            before = site.watch.results
            site.fill(rng, 300)
            time.sleep(2.0)
            stuck = site.watch.results
            row.bit["stood still"] += stuck < before + 300
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (hard, hard))
            healed_s = time.time()
            row.faults += 1
            site.fill(rng, 50)
            row.progress_s = max(row.progress_s, site.watch.wait_for_more(range(PARTITIONS), healed_s, 30))
        finish(site, row, [worker])
        assert row.bit["stood still"] == 3 and row.bit["saw commit_failed"] > 0, f"the limit did not bite: {row.bit}"
    return row


def terms(bench: Bench, count: int = 10) -> Row:
    """F13: SIGTERM under load: exit 0, and the next life has nothing to take back."""
    row = Row(part="SIGTERM under load: exit 0, nothing to settle", faults=0)
    with bench.kafka() as site:
        rng = random.Random(14)
        for _ in range(count):
            site.fill(rng, 300)
            worker = site.start(settings=SETTINGS)
            site.watch.wait_for_more([0], time.time(), 20)
            site.fill(rng, 300)
            site.stop(worker)
            row.faults += 1
            row.bit["ended with 0"] += 1
        finish(site, row, [site.start(settings=SETTINGS)])
    return row


def moves(bench: Bench, count: int = 12) -> Row:
    """F1, F3, F5, I9: the whole application; users move between two workers, beside one that nobody disturbs."""
    row = Row(part="users move between workers of the whole application, beside an undisturbed one, kafka", faults=0)
    with closing(PipelineSite(bench.broker.bootstrap, bench.folder, seed=21)) as site:
        rng = random.Random(21)
        living = site.start("0")
        for n in range(count):
            with site.version_of_its_own():
                kind = ("killed", "zombie", "left", "killed restoring")[n % 4]
                point = rng.choice(["step 2", "send", "step 5", "step 6", "committing", "step 7", "rewrite", "delete"])
                slot = "1" if living.slot == "0" else "0"  # a slot comes back, as a supervisor would have it
                living = move(site, kind, point if kind == "killed" else "step 6", living, slot, rng)
            row.faults += 1
            row.bit[f"{kind} at {point}" if kind == "killed" else kind] += 1
        verdict = site.ended()
        row.bit.update(site.saw("commit_settled", "partition_dropped", "partition_running", "rebalanced"))
        row.bit.update({f"told: {name}": number for name, number in site.outputs.items()})
        row.bit["versions of weights"] = site.version
        row.bit["records cleaned away"] = site.cleaned()
        row.bit["users forgotten"] = site.forgotten()
        row.add(Ended(verdict=verdict, problems=verdict.problems, inputs=verdict.inputs))
        assert site.moves() >= count, "users did not move"
    return row


def move(site: PipelineSite, kind: str, point: str, living: Process, slot: str, rng: random.Random) -> Process:
    """A second worker comes under load, and users move to and fro; the one that is left."""
    if kind == "killed restoring":
        had = living.said("event=partition_running")
        other = site.start(slot, point="restore", countdown=3, at_start=True)
        site.wait(lambda: other.popen.poll() is not None, load=True)
        site.wait_running(living, more_than=had)
        return living
    how = "stop" if kind == "zombie" else "kill"
    other = site.start(slot, point=point, countdown=rng.randrange(2, 6), how=how)
    site.wait_running(other)
    if kind == "left":
        leave(site, living, other)
        return other
    bite(site, other, living)
    if kind == "zombie":
        wake(site, other)
        leave(site, living, other)
        return other
    return living


NAMED = {
    "F9": "tests/test_stream_restore.py",
    "F10": "tests/test_stream_start.py -k deleted",
    "F12": "tests/test_stream_clocks.py",
    "F14": "tests/test_stream_embedded.py -k truncated_wal",
    "F15": "tests/test_stream_state.py tests/test_stream_restore.py tests/test_stream_embedded.py "
    "tests/test_stream_assembly.py -k 'format or layout or cannot_be_loaded'",
}


def named(bench: Bench) -> Row:
    """F9, F10, F12, F14, F15: what is a test of its own, run here; `faults` are the tests that passed."""
    row = Row(part="tests: spoiled state logs, deleted positions, clocks, a torn WAL, other formats", faults=0)
    for fault, tests in NAMED.items():
        line = f"-m pytest -q -p no:cacheprovider --no-header -rs {tests}"
        done = subprocess.run(
            [sys.executable, *shlex.split(line)],
            cwd=HERE.parent,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        passed = re.search(r"(\d+) passed", done.stdout)
        assert done.returncode == 0 and passed and "skipped" not in done.stdout, f"{tests}: {done.stdout[-2_000:]}"
        row.bit[f"{fault}: passed"] = int(passed[1])
        row.faults += int(passed[1])
    return row


def soak(bench: Bench, minutes: float) -> Row:
    """F16: all of it, in any order, for as long as asked; memory, open files and the log's length stay flat."""
    row = Row(part=f"soak of random faults on Kafka, {minutes:g} minutes", faults=0)
    with own_broker(bench, "log.segment.bytes=1048576\nfile.delete.delay.ms=1000") as (broker, site):
        site.wait_s = 5.0
        rng = random.Random(16)
        site.fill(rng, 300)
        steady = site.start("steady", settings=SETTINGS)
        workers: dict[str, subprocess.Popen[str]] = {}
        figures = Figures(site, steady.pid)
        while figures.minutes < minutes:
            settle(site, rng, rng.uniform(1.0, 4.0))
            figures.look(row.faults)
            away = row.bit["broker killed"]
            row.faults += disturb(site, broker, workers, rng, row)
            if row.bit["broker killed"] > away:
                figures.broker_is_back()
        back(site, row, rng, 2 * (SESSION_S + TRANSACTION_S))
        row.faults -= 1  # that was none
        figures.look(row.faults)
        grows = figures.judge(row)
        row.notes.append(
            f"no transaction with results ended for at most {figures.still_s:.0f} s while the broker was up"
        )
        finish(site, row, [steady, *(w for w in workers.values() if w.poll() is None)])
        figures.close()
    assert not grows, f"{'; '.join(grows)}; of {row.notes}"
    assert figures.still_s < STILL_MAX_S, f"the workers stood still: {row.notes}"
    return row


def disturb(site: Site, broker: Broker, workers: dict[str, subprocess.Popen[str]], rng: random.Random, row: Row) -> int:
    """Now and then a fault; how many there were."""
    slot, dice = rng.choice("ab"), rng.random()
    if slot not in workers or workers[slot].poll() is not None:
        point = rng.choice([*POINTS, "none", "none"])
        fault = {"point": point, "countdown": rng.randrange(5, 60), "how": "kill"}
        workers[slot] = site.start(slot, settings=SETTINGS, fault=fault)
        row.bit["started"] += 1
    elif dice < 0.25:
        workers.pop(slot).kill()
        row.bit["killed"] += 1
    elif dice < 0.4:
        leaver = workers.pop(slot)
        leaver.send_signal(signal.SIGTERM)
        leaver.wait(40)  # 0, or killed at its point on the way
        assert leaver.returncode in (0, -signal.SIGKILL), f"SIGTERM ended with {leaver.returncode}"
        row.bit["ended with SIGTERM"] += 1
    elif dice < 0.5:
        os.kill(workers[slot].pid, signal.SIGSTOP)
        settle(site, rng, rng.uniform(1.0, 2 * SESSION_S))
        with contextlib.suppress(ProcessLookupError):
            os.kill(workers[slot].pid, signal.SIGCONT)
        row.bit["zombie"] += 1
    elif dice < 0.54:
        broker.kill()
        broker.restart()
        row.bit["broker killed"] += 1
    else:
        return 0
    return 1


class Figures:
    """What must stay flat: memory and open files of a worker that lives through it all, the state log's length."""

    NAMES = ("MB of memory", "open files", "records in the state log")

    def __init__(self, site: Site, pid: int) -> None:
        self._site, self._pid = site, pid
        self._reader = site.transport.reader()
        self._start_s = self._told_s = self._moved_s = time.monotonic()
        self._results = -1
        self.still_s = 0.0  # longest time without the end of a transaction with results, while the broker was up
        self.times_min: list[float] = []
        self.seen: list[tuple[float, int, int]] = []

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self._start_s) / 60

    def look(self, faults: int) -> None:
        """Take the figures of now; tell them once a minute. A broker that is away is asked another time."""
        try:
            bounds = self._bounds(self._site.names.state)
            results = sum(end for _, end in self._bounds(self._site.names.outputs["forecasts"]))
        except DriftlineError:
            self.broker_is_back()
        else:
            now_s = time.monotonic()
            if results != self._results:
                self._results, self._moved_s = results, now_s
            self.still_s = max(self.still_s, now_s - self._moved_s)
            self.seen.append((*figures_of(self._pid), sum(end - head for head, end in bounds)))
            self.times_min.append(self.minutes)
            if time.monotonic() >= self._told_s:
                self._told_s += 60
                print(f"soak, {self.minutes:.1f} minutes, {faults} faults: {self.seen[-1]}", flush=True)

    def broker_is_back(self) -> None:
        """What stood still until now does not count."""
        self._moved_s = time.monotonic()

    def _bounds(self, topic: str) -> list[tuple[int, int]]:
        return [self._reader.bounds(TopicPartition(topic, p)) for p in range(PARTITIONS)]

    def judge(self, row: Row) -> list[str]:
        """Note level and growth of each figure; the names of those that grow."""
        grows = []
        for name, values in zip(self.NAMES, zip(*self.seen, strict=True), strict=True):
            trend = Trend.of(self.times_min, values)
            row.notes.append(f"{name} {trend}")
            grows += [name] * trend.grows
        return grows

    def close(self) -> None:
        self._reader.close()


@dataclass(frozen=True, kw_only=True)
class Trend:
    """A straight line through a figure, after the first third of the time (the warm-up).

    Neighbouring looks are alike, so the line goes through BLOCKS spans of equal length, and its slope's error comes
    from how those scatter (method of batch means). Of a span it takes the median: a broker that was killed with kill -9
    brings the deleted head of a log back for some seconds (it notes heads once a minute), which is no growth. A figure
    grows if the lower limit of the growth, at 95 % one-sided, is over GROWTH_MAX of its level: a leak that matters, and
    not by chance.
    """

    level: float
    growth: float  # of the level, over the time looked at
    error: float  # half of the two-sided interval of 90 %, that is the one-sided one of 95 %
    minutes: float

    BLOCKS: ClassVar[int] = 10
    T_95: ClassVar[float] = 1.860  # Student's t, 8 degrees of freedom, .95
    GROWTH_MAX: ClassVar[float] = 0.02

    @classmethod
    def of(cls, times_min: Sequence[float], values: Sequence[float]) -> Trend:
        t, v = np.array(times_min), np.array(values, float)
        begin = t[-1] / 3
        block = np.minimum(((t - begin) / (t[-1] - begin) * cls.BLOCKS).astype(int), cls.BLOCKS - 1)
        middles = np.array([np.median(v[(t >= begin) & (block == n)]) for n in range(cls.BLOCKS)])
        x = np.arange(cls.BLOCKS) - (cls.BLOCKS - 1) / 2
        slope = (x * middles).sum() / (x**2).sum()
        rest = middles - middles.mean() - slope * x
        error = cls.T_95 * np.sqrt((rest**2).sum() / (cls.BLOCKS - 2) / (x**2).sum())
        level = middles.mean()
        return cls(
            level=level, growth=cls.BLOCKS * slope / level, error=cls.BLOCKS * error / level, minutes=t[-1] - begin
        )

    @property
    def grows(self) -> bool:
        return bool(self.growth - self.error > self.GROWTH_MAX)

    def __str__(self) -> str:
        return (
            f"{self.level:.0f}, growth {100 * self.growth:+.1f} % ({100 * (self.growth - self.error):+.1f} to "
            f"{100 * (self.growth + self.error):+.1f}) in {self.minutes:.0f} minutes"
        )


# ── what parts share ──────────────────────────────────────────────────────────────────────────────────────────────────


def settle(site: Site, rng: random.Random, seconds: float) -> None:
    """Load for some time."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        site.fill(rng, 20)
        time.sleep(0.1)


def finish(site: Site, row: Row, workers: list[subprocess.Popen[str]]) -> None:
    """Drain, end the workers, judge."""
    site.wait_drained(120)
    for worker in workers:
        if worker.poll() is None:
            site.stop(worker)
    judge(site, row)


def judge(site: Site, row: Row) -> None:
    """What the workers saw, and the oracle's verdict."""
    row.bit.update({f"saw {name}": count for name, count in site.saw().items()})
    row.add(site.ended())


def back(site: Site, row: Row, rng: random.Random, patience_s: float) -> None:
    """A fault is over: load, and the time until every partition has a new result (I8)."""
    since_s = time.time()
    row.faults += 1
    site.fill(rng, 200)
    row.progress_s = max(row.progress_s, site.watch.wait_for_more(range(PARTITIONS), since_s, patience_s))


@contextlib.contextmanager
def own_broker(bench: Bench, extra: str = "", **log: Any) -> Iterator[tuple[Broker, Site]]:
    """A broker for one part alone, and a site on it."""
    broker = bench.fresh(extra)
    try:
        with bench.kafka(broker, **log) as site:
            yield broker, site
    finally:
        broker.stop()


@contextlib.contextmanager
def proxied(bench: Bench, settings: dict[str, int]) -> Iterator[tuple[Proxy, Site]]:
    """A broker of its own whose workers, with these settings of their clients, reach it through a proxy."""
    proxied, inner = free_ports(2)
    extra = (
        f"listeners=PLAINTEXT://127.0.0.1:@PORT@,CONTROLLER://127.0.0.1:@CONTROLLER_PORT@,PROXIED://127.0.0.1:{inner}\n"
        f"advertised.listeners=PLAINTEXT://127.0.0.1:@PORT@,PROXIED://127.0.0.1:{proxied}\n"
        "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PROXIED:PLAINTEXT\n"
    )
    broker = bench.fresh(extra)
    proxy = Proxy(proxied, inner)
    log = {"kafka": broker.bootstrap, "session_s": SESSION_S, "transaction_s": TRANSACTION_S}
    through = {**log, "kafka": f"127.0.0.1:{proxied}", "settings": settings}
    try:
        with closing(Site(log, through=through)) as site:
            yield proxy, site
    finally:
        proxy.close()
        broker.stop()


def wait_for_state(process: subprocess.Popen[str], state: str, seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        text = Path(f"/proc/{process.pid}/stat").read_text()
        if text[text.rindex(")") + 2] == state:
            return
        time.sleep(0.02)
    raise AssertionError(f"the process did not come to state {state}: the fault did not bite")


def figures_of(pid: int) -> tuple[float, int]:
    """Resident memory in MB and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list(Path(f"/proc/{pid}/fd").iterdir()))


PARTS: dict[str, Callable[[Bench], Row]] = {
    part.__name__: part
    for part in (
        kills, kills_embedded, takeovers, takeovers_embedded, zombies, zombies_embedded, same_slot, storm,
        storm_embedded, broker_kills, broker_pauses, network, expired, poison, disk_full, disk_full_embedded, terms,
        old_positions, clocks, clocks_embedded, moves, named,
    )
}  # fmt: skip


def line(r: dict[str, Any]) -> str:
    """The row of the table in docs/reliability.md."""
    return (
        f"| {r['part']} | {r['faults']} | {r['inputs']} | {r['outputs']} | {r['dead_letters']} | "
        f"{r['lost']} / {r['doubled']} / {r['reordered']} | {round(r['progress_s'], 1) or '-'} | {r['seconds']:.0f} |"
    )


def write_report(rows: list[dict[str, Any]]) -> None:
    """Put the rows between the marks of docs/reliability.md; parts that did not run now keep the rows they have."""
    text = REPORT.read_text()
    begin, end = "<!-- faults: begin -->", "<!-- faults: end -->"
    head, _, rest = text.partition(begin)
    old, _, tail = rest.partition(end)
    lines = {text.split(" | ")[0].removeprefix("| "): text for text in old.splitlines() if text.startswith("| ")}
    titles = lines.pop("what was done")
    noted = [text for text in old.splitlines() if text.startswith("- ")]
    bites = {part: text for part in lines for text in noted if text.startswith(f"- {part}: ")}
    for r in rows:
        bit = ", ".join(f"{name} {count}" for name, count in sorted(r["bit"].items()) if count)
        for older in [part for part in lines if part.startswith("soak") and r["part"].startswith("soak")]:
            del lines[older], bites[older]
        lines[r["part"]] = line(r)
        bites[r["part"]] = f"- {r['part']}: {'; '.join([bit.replace('proxy: ', 'proxy '), *r['notes']])}"
    table = "\n".join([titles, "|---|---|---|---|---|---|---|---|", *lines.values()])
    bitten = "\n".join(bites.values())
    REPORT.write_text(f"{head}{begin}\n{table}\n\nWhat bit, and what the workers saw:\n\n{bitten}\n{end}{tail}")


def main() -> int:
    """The command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", help="all but the soak where none is named; `soak` is one as well")
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the soak")
    parser.add_argument("--rows", type=Path, help="a file of JSON lines that rows are added to and the report uses")
    parser.add_argument("--report", action="store_true", help="write docs/reliability.md")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if given.list:
        for name, part in PARTS.items():
            print(f"{name:20s} {(part.__doc__ or '').strip()}")
        return 0
    names = given.parts or ([] if given.rows is not None and given.report else [*PARTS, "soak"])
    failed: list[str] = []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="driftline-faults-") as folder:
        bench = Bench(Path(folder))
        try:
            for name in names:
                start_s = time.monotonic()
                try:
                    row = soak(bench, given.minutes) if name == "soak" else PARTS[name](bench)
                except Exception as error:  # the other parts are to run all the same
                    failed.append(name)
                    print(f"FAILED {name}: {error}", flush=True)
                    traceback.print_exc(file=sys.stdout)
                    continue
                row.seconds = time.monotonic() - start_s
                rows.append({**vars(row), "name": name, "date": datetime.date.today().isoformat()})
                print(json.dumps(rows[-1]), flush=True)
                if given.rows is not None:
                    with given.rows.open("a") as lines:
                        lines.write(json.dumps(rows[-1]) + "\n")
        finally:
            bench.close()
    for name in names:
        ran = next((r for r in rows if r["name"] == name), None)
        print(f"{name:20s} {'FAILED' if ran is None else line(ran)}")
    if given.report:
        kept = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows else rows
        write_report(list({row["name"]: row for row in kept}.values()))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
