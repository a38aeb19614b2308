"""Alerts end to end, through real workers on a log: those of the evaluation's kernel, and surges told once."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest

from models.features import interest_key
from models.shift import GroupTable
from models.shift_calibration import Histories, run
from stream.assembly import make_worker, names_of, topic_specs
from stream.config import Config
from stream.loading import load
from stream.partition import partition_of
from stream.transport import LogReader, TopicPartition, Transport, close_all
from stream.worker import Worker

START_MS = 1_700_000_000_000
DONE_WITHIN_S = 120.0
UNSEEN = 0.001  # share of any interest before the first epoch cut

Sent = tuple[bytes, bytes, int]


class Silent:
    """Observes a worker and keeps nothing."""

    def turn(self, turn: Any) -> None: ...
    def event(self, name: str, **facts: object) -> None: ...
    def owned(self, *facts: object) -> None: ...


def config_of(partitions: int, *sets: str) -> Config:
    unique = f"t{uuid.uuid4().hex[:8]}"
    return load(
        None,
        [
            f"topics.prefix={unique}-",
            f'topics.events=["{unique}-events"]',
            f"topics.partitions={partitions}",
            "topics.retention_h=-1",
            f"app.name={unique}-app",
            *sets,
        ],
    ).config


class Trial:
    """Workers on a log whose topics are there, and what they have written so far."""

    def __init__(self, transport: Transport, config: Config) -> None:
        self._transport, self._config, self._names = transport, config, names_of(config)
        self.partitions = config.topics.partitions
        self._sent = [0] * self.partitions
        admin = transport.admin()
        admin.create(topic_specs(config))
        admin.close()
        self._reader: LogReader = transport.reader()

    def worker(self, slot: str = "0") -> Worker:
        silent: Any = Silent()
        of_slot = msgspec.structs.replace(self._config.worker, slot=slot)
        return make_worker(msgspec.structs.replace(self._config, worker=of_slot), self._transport, silent)

    def through(self, sent: list[Sent], *workers: Worker) -> None:
        """Append the records and let the workers turn until all are handled."""
        for p in range(self.partitions):
            mine = [one for one in sent if partition_of(one[0], self.partitions) == p]
            self._sent[p] += len(mine)
            self._transport.append(self._names.events[0], p, mine)
        until(lambda: self.handled() == sum(self._sent), *workers)

    def handled(self) -> int:
        return sum(record["records"] for record in self.records("metrics"))

    def records(self, stream: str) -> list[dict[str, Any]]:
        """All records of an output topic, partition by partition."""
        return [
            found for p in range(self.partitions) for found in self._of(TopicPartition(self._names.outputs[stream], p))
        ]

    def _of(self, partition: TopicPartition) -> list[dict[str, Any]]:
        offset, end = self._reader.bounds(partition)
        found: list[dict[str, Any]] = []
        while offset < end and (batch := self._reader.read(partition, offset, 0.5)):
            found += [orjson.loads(record.value or b"{}") for record in batch]
            offset = batch[-1].offset + 1
        return found

    def close(self) -> None:
        self._reader.close()


def until(done: Callable[[], bool], *workers: Worker) -> None:
    """Turn the workers until it is so, within bounds."""
    give_up = time.monotonic() + DONE_WITHIN_S
    while not done():
        assert time.monotonic() < give_up, "not done in time"
        for worker in workers:
            worker.turn()


def spliced(users: list[str], events: int) -> list[Sent]:
    """Users with three favourites each, visits of four events; every other one turns to other ones halfway."""
    rng = random.Random(3)
    sent = []
    for n in range(events):
        for u, user in enumerate(users):
            moved = 100 if u % 2 == 0 and n >= events // 2 else 0
            interest = f"i{u * 5 + moved + rng.randrange(3) if rng.random() < 0.9 else 900 + rng.randrange(50)}"
            now_ms = START_MS + (n // 4 * 40_000 + n % 4 * 60) * 1_000 + u
            event = {"user": user, "interest": interest, "time": now_ms}
            sent.append((user.encode(), orjson.dumps(event), now_ms))
    return sent


@pytest.mark.parametrize("interests", [0, 128])
def test_alerts_in_the_topic_are_those_of_the_kernel(transport: Transport, interests: int) -> None:
    """Same users, same events, same evidence as a replay of the histories; a worker takes over halfway.

    Within the first epoch nothing crosses users, so the kernel of `evaluate-shifts` can be given the same shares.
    """
    config = config_of(
        2, "shift.evidence=session", "shift.statistic=fixed", "shift.threshold=3.0",
        "shift.age_min_events=10", f"shift.profile_interests={interests}",
    )  # fmt: skip
    names = [[n for n in map("u{}".format, range(50)) if partition_of(n.encode(), 2) == p][:4] for p in range(2)]
    users = [name for pair in zip(*names, strict=True) for name in pair]
    sent = spliced(users, events=56)  # 224 in a partition: before the first cut
    trial = Trial(transport, config)
    first = trial.worker()
    half = len(sent) * 5 // 8
    trial.through(sent[:half], first)
    first.close()
    second = trial.worker()
    trial.through(sent[half:], second)
    told = {(a["user"], a["detected_at_ms"]): a for a in trial.records("alerts")}
    close_all(trial, second)

    events = [orjson.loads(value) for _, value, _ in sent]
    events.sort(key=lambda e: (e["user"], e["time"]))
    turned, users = users[::2], sorted(users)
    histories = Histories(
        user=np.array([users.index(e["user"]) for e in events]),
        interest=np.array([interest_key(e["interest"]) for e in events], np.uint32),
        time_ms=np.array([e["time"] for e in events]),
        share=np.full(len(events), UNSEEN),
    )
    shift = config.shift
    rule = GroupTable(shift).rule  # of a partition that has seen no epoch cut
    assert rule.by_session
    done = run(histories, rule, shift)
    wanted = {(events[e]["user"], events[e]["time"]): e for e in np.flatnonzero(done.alert_B).tolist()}
    assert set(told) == set(wanted)
    assert {user for user, _ in told} >= set(turned)
    for place, event in wanted.items():
        assert told[place]["evidence_sum"] == pytest.approx(float(done.evidence_B[event]), abs=2e-3)
        assert told[place]["onset_events"] == max(1, int(done.onset_events_B[event]))


def surging(calm: int, surge: int) -> tuple[list[Sent], list[Sent]]:
    """A shop of four hundred users with favourites, then the same with a quarter of the events on one new thing."""
    rng = random.Random(6)
    favourites = [[rng.randrange(200) for _ in range(4)] for _ in range(400)]
    sent = []
    for n in range(calm + surge):
        user = rng.randrange(400)
        chosen = rng.choice(favourites[user]) if rng.random() < 0.8 else rng.randrange(200)
        interest = "sudden" if n >= calm and rng.random() < 0.25 else f"i{chosen}"
        now_ms = START_MS + n * 40_000
        event = {"user": f"u{user}", "interest": interest, "time": now_ms}
        sent.append((f"u{user}".encode(), orjson.dumps(event), now_ms))
    return sent[:calm], sent[calm:]


def test_a_surge_is_told_once_over_restores_and_moves(transport: Transport) -> None:
    """Workers change in the middle of the evidence, after the alert by a restart, and by a move to one that waits."""
    config = config_of(1, "shift.surge_false_alarm_events=1000")
    calm, surge = surging(6_000, 900)
    trial = Trial(transport, config)

    def told() -> list[dict[str, Any]]:
        return [a for a in trial.records("alerts") if a["scope"] == "all"]

    first = trial.worker()
    trial.through(calm, first)
    before = len(told())
    trial.through(surge[:8], first)
    assert len(told()) == before  # evidence gathers
    first.close()
    second = trial.worker()
    trial.through(surge[8:300], second)
    [alert] = told()[before:]
    assert alert["gained"][0]["interest"] == "sudden" and alert["onset_ms"] >= START_MS + 6_000 * 40_000
    second.close()  # a restart after the alert
    third, waiting = trial.worker(), trial.worker("1")
    trial.through(surge[300:600], third, waiting)
    third.close()  # whoever owned the partition: now the other does, or goes on
    trial.through(surge[600:], waiting)
    assert told()[before:] == [alert]
    close_all(trial, waiting)
