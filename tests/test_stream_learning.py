"""Weights through the log, and a learner that learns each event once whatever kills it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from digest_app import create_topics, put_right_when_asked, topic_names

from stream import weights
from stream.errors import ConfigError, Corrupt, Fenced
from stream.events import EventDecoder, EventSettings
from stream.learning import LearnerLoop, LearnerPace
from stream.memory import Fault, ManualClock, MemoryLog
from stream.testing import digest_event
from stream.transport import TopicPartition

NAMES = topic_names()
PARTITIONS = 2
PACE = LearnerPace(
    publish_interval_s=0.0,
    steps_per_turn_max=10,
    cpu_share=1.0,
    rebuild_events=50,
    keep_versions=3,
    batch_events_max=20,
    poll_timeout_s=0.3,
    retries_max=10,
    backoff_s=0.01,
)


_nonces = itertools.count()


class Killed(BaseException):
    """A simulated kill -9."""


@dataclass
class Report:
    steps: int


class Tally:
    """A model that only counts how often it learned each event: the contract of LearnerModel without a network."""

    def __init__(self, version: int = 0, learned: Mapping[str, int] | None = None) -> None:
        self.version = version
        self.learned: dict[str, int] = dict(learned or {})
        self.rebuilt = 0
        self._queue: list[str] = []

    def observe(
        self, user_key_B: Any, events: Any, names: Mapping[int, str], *, learn: bool = True, id_hash_B: Any = None
    ) -> None:
        ids = [f"{k}/{t}" for k, t in zip(user_key_B.tolist(), events.time_ms.tolist(), strict=True)]
        if learn:
            self._queue += ids
        else:
            self.rebuilt += len(ids)

    def learn(self, max_steps: int) -> Report:
        for event in self._queue:
            self.learned[event] = self.learned.get(event, 0) + 1
        steps, self._queue = len(self._queue), []
        return Report(steps)

    def weights_bytes(self) -> bytes:
        self.version += 1
        return b"w%d" % self.version * 400_000

    def state_bytes(self) -> bytes:
        return msgspec.json.encode(self.learned)


class Silent:
    """An observer that keeps only what a test asks for."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.versions: list[int] = []

    def learned(self, report: Any, backlog_events: int) -> None: ...

    def published(self, version: int, bytes_sent: int, seconds: float) -> None:
        self.versions.append(version)

    def event(self, name: str, **facts: object) -> None:
        self.events.append(name)


def make_log(events: int = 0) -> MemoryLog:
    log = MemoryLog(clock=ManualClock(), session_timeout_s=10, transaction_timeout_s=10)
    create_topics(log, NAMES, PARTITIONS)
    for number in range(events):
        log.append("events", number % PARTITIONS, iter([digest_event(f"u{number % 13}", number)]))
    return log


def learner(
    log: MemoryLog, observer: Silent | None = None, on_step: Callable[[int], None] = lambda step: None
) -> LearnerLoop:
    clock = log.now
    assert isinstance(clock, ManualClock)
    return LearnerLoop(
        transport=log,
        topics=NAMES,
        app="app",
        pace=PACE,
        decoder=EventDecoder(EventSettings(), b"k"),
        fresh=Tally,
        restore=lambda payload, version: Tally(version, msgspec.json.decode(payload, type=dict[str, int])),
        observer=observer or Silent(),
        clock=clock,
        sleep=clock.advance,
        nonce=lambda: f"n{next(_nonces)}",
        on_step=on_step,
    )


def drain(loop: LearnerLoop) -> None:
    idle = 0
    for _ in range(500):
        idle = 0 if loop.turn() else idle + 1
        if idle > 60:  # longer than the session timeout of a predecessor that was killed
            return
    raise AssertionError("the learner did not drain")


def tally(loop: LearnerLoop) -> dict[str, int]:
    model = loop.model
    assert isinstance(model, Tally)
    return model.learned


def test_every_event_is_learned_once_and_versions_follow() -> None:
    """A plain run: each event once, versions 1, 2, 3..., at most three kept in the topic, each complete."""
    log, observer = make_log(300), Silent()
    loop = learner(log, observer)
    drain(loop)
    assert len(tally(loop)) == 300 and set(tally(loop).values()) == {1}
    assert observer.versions == list(range(1, observer.versions[-1] + 1)) and len(observer.versions) > 3
    feed = weights.WeightsFeed(log.reader(), "weights")
    found = [s for _ in range(20) for s in feed.poll(0.0)]
    assert [s.version for s in found] == observer.versions[-3:]
    assert found[-1].payload == b"w%d" % found[-1].version * 400_000


@pytest.mark.parametrize("step", range(1, 8))
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_step_it_goes_on_where_its_last_commit_stands(step: int, seed: int) -> None:
    """No event is learned twice or lost in the model that counts, wherever the learner dies."""
    rng = random.Random(seed)
    log = make_log(200)
    kills = rebuilt = 0
    for life in range(4):
        countdown = rng.randrange(1, 3)

        def kill(at: int, life: int = life) -> None:
            nonlocal countdown, kills
            countdown -= at == step
            if at == step and countdown == 0 and life < 3:
                kills += 1
                raise Killed

        loop = learner(log, on_step=kill)
        try:
            drain(loop)
        except Killed:
            continue
        assert isinstance(loop.model, Tally)
        rebuilt = loop.model.rebuilt
    assert kills > 0
    assert len(tally(loop)) == 200 and set(tally(loop).values()) == {1}
    assert step < 7 or rebuilt > 0


@pytest.mark.parametrize("fault", [Fault.LOSE, Fault.HIDE])
def test_a_failed_publication_is_taken_back_as_a_whole(fault: Fault) -> None:
    """Weights, learner state and positions become visible together or not at all, also when the outcome is unknown."""
    log = make_log(200)
    rng = random.Random(1)
    bitten = 0

    def faults(point: str, who: str) -> Fault | None:
        nonlocal bitten
        if point in ("commit", "send_offsets", "flush") and rng.random() < 0.15:
            bitten += 1
            return fault
        return None

    log.faults = faults
    observer = Silent()
    loop = learner(log, observer)
    drain(loop)
    assert bitten > 0 and "learner_retry" in observer.events
    assert len(tally(loop)) == 200 and set(tally(loop).values()) == {1}


@pytest.mark.parametrize("lies", [2, 10**6])
def test_an_old_position_is_asked_for_again(lies: int) -> None:
    """A broker that comes back may hand out old positions; one that stays is another learner's, and is taken."""
    log, observer = make_log(100), Silent()
    loop = learner(log)
    drain(loop)
    group = next(g for name, g in log._groups.items() if "learner" in name)
    old = dict(group.positions)
    for number in range(100, 200):
        log.append("events", number % PARTITIONS, iter([digest_event(f"u{number % 13}", number)]))
    drain(loop)
    loop.close()
    newest, group.positions = group.positions, old
    log.faults = put_right_when_asked(group, newest, lies)
    loop = learner(log, observer)
    drain(loop)
    twice = sum(count == 2 for count in tally(loop).values())
    assert "learner_retry" in observer.events and len(tally(loop)) == 200
    assert twice == (0 if lies == 2 else 100)


def test_a_second_learner_fences_the_first() -> None:
    """Two learners of one application never both publish."""
    log = make_log(100)
    first = learner(log)
    first.turn()
    learner(log)
    with pytest.raises(Fenced):
        drain(first)


def test_a_lost_weights_topic_is_not_papered_over() -> None:
    """Positions that name a learner state that is gone stop the learner instead of starting from nothing."""
    log = make_log(100)
    loop = learner(log)
    drain(loop)
    loop.close()
    admin = log.admin()
    from stream.transport import TopicPartition

    admin.delete_records(TopicPartition("weights", 0), 10**9)
    with pytest.raises(ConfigError, match="learner state"):
        drain(learner(log))


def test_weights_that_fail_their_checksum_are_refused() -> None:
    """A damaged snapshot never reaches a network."""
    log = make_log()
    records = list(weights.chunks("weights", 4, b"x" * 2_000_000))
    assert len(records) == 3
    records[1] = (records[1][0], b"y" * len(records[1][1]))
    log.append("weights", 0, iter([(k, v, 1) for k, v in records]))
    feed = weights.WeightsFeed(log.reader(), "weights")
    with pytest.raises(Corrupt, match="checksum"):
        feed.poll(0.0)


def test_a_snapshot_whose_head_was_deleted_is_passed_over() -> None:
    """A reader that comes while old versions are being deleted takes the next whole one."""
    log = make_log()
    for version in (1, 2):
        records = weights.chunks("weights", version, bytes([version]) * 2_000_000)
        log.append("weights", 0, iter([(k, v, 1) for k, v in records]))
    from stream.transport import TopicPartition

    log.admin().delete_records(TopicPartition("weights", 0), 1)
    feed = weights.WeightsFeed(log.reader(), "weights")
    assert [s.version for s in feed.poll(0.0)] == [2]


@pytest.mark.parametrize("running", [True, False])
def test_records_deleted_unread_are_passed_over_and_counted(running: bool) -> None:
    """Retention overtakes the learner, at work or between two runs: it goes on with what is left."""
    log = make_log(90)
    loop = learner(log)
    drain(loop)
    loop.publish()
    if not running:
        loop.close()
    for number in range(90, 390):
        log.append("events", number % PARTITIONS, iter([digest_event(f"u{number % 13}", number)]))
    end = log.reader().bounds(TopicPartition("events", 0))[1]
    log.admin().delete_records(TopicPartition("events", 0), end - 10)
    observer = loop._observer if running else Silent()
    assert isinstance(observer, Silent)
    if not running:
        loop = learner(log, observer)
    drain(loop)
    tally = loop.model
    assert isinstance(tally, Tally)
    assert sum(tally.learned.values()) == 390 - (end - 10 - 90 // PARTITIONS)
    assert observer.events.count("records_passed_over") == 1
