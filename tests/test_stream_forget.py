"""Erasing a user: exactly once, by the owner of the partition, however far it lags, and from older blocks too."""

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
from digest_app import AtOnce, Counting, create_topics, make_worker, topic_names
from made_events import made
from pipelines import make

from models.learner import Learner
from models.settings import LearningSettings, NetworkSettings
from stream import changelog
from stream.changelog import Kind
from stream.checkpoint import STEPS, TopicNames
from stream.config import Config
from stream.events import EventDecoder, EventSettings, user_hash
from stream.loading import load
from stream.memory import ManualClock, MemoryLog
from stream.orders import Erasures, due, forget, read_order
from stream.partition import partition_of
from stream.records import DeadLetter
from stream.testing import read_all
from stream.transport import LogRecord, TopicPartition, TopicSpec, Transport
from stream.worker import Worker

PARTITIONS = 2
KEY = user_hash("u1", b"k")
HOME = partition_of(b"u1", PARTITIONS)


class Killed(BaseException):
    """A simulated kill -9."""


def prepared(log: Transport, tag: str) -> tuple[TopicNames, Config]:
    names = msgspec.structs.replace(topic_names(f"{tag}-"), control=f"{tag}-control")
    create_topics(log, names, PARTITIONS)
    admin = log.admin()
    admin.create([TopicSpec(name=names.control, partitions=PARTITIONS, settings={"retention.ms": "-1"})])
    admin.close()
    sets = [f"topics.prefix={tag}-", f'topics.events=["{names.events[0]}"]', f"topics.partitions={PARTITIONS}"]
    return names, load(sets=[*sets, "state.hash_key=k"]).config


def send(log: Transport, names: TopicNames, first: int, count: int, users: int = 20) -> None:
    rng, now_ms = random.Random(first), int(time.time() * 1_000)
    for number in range(first, first + count):
        user = f"u{number % users}"
        event = {"user": user, "interest": f"i{rng.randrange(9)}", "time": now_ms - 1_000_000 + number}
        place = partition_of(user.encode(), PARTITIONS)
        log.append(names.events[0], place, iter([(user.encode(), orjson.dumps(event), now_ms)]))


def worker_on(log: Transport, names: TopicNames, tag: str, **how: Any) -> Worker:
    how = {"engine": make(control=names.control), "log_bytes_min": 10_000_000, "observer": Counting()} | how
    if log.name == "memory" and isinstance(log.now, ManualClock):  # type: ignore[attr-defined]
        how |= {"clock": log.now, "executor": AtOnce()}  # type: ignore[attr-defined]
    return make_worker(log, names, partitions=PARTITIONS, app=tag, **how)


def until(worker: Worker, done: Callable[[], bool], turns: int = 3_000) -> None:
    for _ in range(turns):
        if done():
            return
        worker.turn()
    raise AssertionError("it did not come to that")


def consumed(worker: Worker, records: int) -> Callable[[], bool]:
    return lambda: len(worker.states) == PARTITIONS and sum(s.seen for s in worker.states.values()) >= records


def events_of(worker: Worker, key: int = KEY) -> int:
    return int(worker.states[HOME].arena.take(np.array([key], np.uint64))["events"][0])


def blocks_with(log: Transport, names: TopicNames, key: int = KEY) -> list[tuple[int, int]]:
    """(block, events) of every record of the user that the state log still holds."""
    reader, found = log.reader(), []
    for record in read_all(reader, names.state, PARTITIONS):
        block = changelog.decode(record.value or b"", "here")
        if block.kind is Kind.USERS and block.records is not None:
            found += [(block.number, int(r["events"])) for r in block.records if int(r["key"]) == key]
    reader.close()
    return found


def test_what_came_before_the_order_is_erased_and_nothing_else(transport: Transport) -> None:
    """However far the worker lags: older events of the user leave nothing, newer ones begin a new record; once.

    Newer events that are consumed before the order is carried out may go with it, older ones never stay.
    """
    tag = uuid.uuid4().hex[:8]
    names, config = prepared(transport, tag)
    send(transport, names, 0, 200)
    assert forget(transport, config, "u1", int(time.time() * 1_000)) == PARTITIONS
    send(transport, names, 200, 60)
    worker = worker_on(transport, names, tag)
    until(worker, consumed(worker, 260 + PARTITIONS))
    others = user_hash("u1", b"other key")
    left = events_of(worker)
    assert left <= 3 and events_of(worker, others) == 0
    send(transport, names, 260, 20)
    until(worker, consumed(worker, 280 + PARTITIONS))
    assert events_of(worker) == left + 1, "the order is carried out once"
    neighbours = [u for u in range(20) if u != 1 and partition_of(b"u%d" % u, PARTITIONS) == HOME]
    assert all(events_of(worker, user_hash(f"u{u}", b"k")) == 14 for u in neighbours)
    shadow = worker.states[HOME].groups.shadow
    assert int((shadow.key == np.uint64(KEY)).sum()) == left + 1 and len(shadow) > 50
    until(worker, lambda: not worker.states[HOME].rewrite_below)
    assert all(events <= left + 1 for _, events in blocks_with(transport, names)), "an older block still holds the user"
    worker.close()
    worker = worker_on(transport, names, tag)
    until(worker, consumed(worker, 280))
    assert events_of(worker) == left + 1
    worker.close()


def test_a_quiet_partition_is_rewritten_too() -> None:
    """Without any input after the order, the older blocks go all the same."""
    log = MemoryLog(clock=ManualClock())
    names, config = prepared(log, "t")
    send(log, names, 0, 200)
    worker = worker_on(log, names, "t")
    until(worker, consumed(worker, 200))
    assert blocks_with(log, names)
    forget(log, config, "u1", 0)
    until(worker, lambda: consumed(worker, 202)() and not any(s.rewrite_below for s in worker.states.values()))
    assert events_of(worker) == 0 and blocks_with(log, names) == []
    turns = worker._parts.observer.turns  # type: ignore[attr-defined]
    for _ in range(20):
        worker.turn()
    assert worker._parts.observer.turns == turns, "nothing is committed any more"  # type: ignore[attr-defined]


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step(step: int) -> None:
    """Before, while and after the order is carried out: the user is erased, all others are whole."""
    rng = random.Random(step)
    log = MemoryLog(clock=ManualClock(), session_timeout_s=10, transaction_timeout_s=10)
    names, config = prepared(log, "t")
    send(log, names, 0, 200)
    forget(log, config, "u1", 0)
    send(log, names, 200, 60)
    kills, engine = 0, make(control=names.control)
    for life in range(7):
        countdown = rng.randrange(1, 4)

        def kill(at: int, life: int = life) -> None:
            nonlocal countdown, kills
            countdown -= at == step
            if at == step and countdown == 0 and life < 6:
                kills += 1
                raise Killed

        worker = worker_on(log, names, "t", engine=engine, on_step=kill, settings={"batch_events_max": 30})
        try:
            until(worker, consumed(worker, 260 + PARTITIONS))
            until(worker, lambda: not worker.states[HOME].rewrite_below)  # noqa: B023
        except Killed:
            continue
        break
    assert kills > 2, "the fault did not bite"
    left = events_of(worker)
    assert left <= 3 and all(events <= 3 for _, events in blocks_with(log, names))
    total = sum(int(s.arena.all()["events"].sum()) for s in worker.states.values())
    assert total == 260 - 13 + left, "all others are whole"


def test_what_is_no_order_is_a_dead_letter() -> None:
    """Somebody else's record in the control topic: said, passed over, nothing erased."""
    log = MemoryLog(clock=ManualClock())
    names, _ = prepared(log, "t")
    send(log, names, 0, 40)
    for value in (b"{", b'{"order":"dance","user_hash":"1","until":{}}', b'{"user_hash":"xyz","until":{}}', None):
        log.append(names.control, HOME, iter([(None, value, 0)]))
    worker = worker_on(log, names, "t")
    until(worker, consumed(worker, 44))
    letters = [
        msgspec.json.decode(r.value or b"", type=DeadLetter)
        for r in read_all(log.reader(), names.outputs["dead_letters"], PARTITIONS, 0.0)
    ]
    assert [x.reason for x in letters] == ["bad_order"] * 4 and {x.source.topic for x in letters} == {names.control}
    assert sum(len(s.arena) for s in worker.states.values()) == 20


def test_an_order_waits_for_the_input_that_it_speaks_of() -> None:
    """Orders are due in their order, once every topic they name is consumed that far."""
    until = {"events": 7}
    records = [
        LogRecord("control", 1, n, 0, None, orjson.dumps({"order": "forget", "user_hash": "ab", "until": u}))
        for n, u in enumerate([{}, until, {}])
    ]
    place = TopicPartition("events", 1)
    assert [due(records, {place: at}) for at in (6, 7, 8)] == [1, 3, 3]
    assert due(records, {}) == 3, "a topic that is not read holds nothing back"
    assert read_order(records[1]).key == 0xAB


def test_the_id_itself_is_stored_nowhere() -> None:
    """An order names the keyed hash."""
    log = MemoryLog()
    names, config = prepared(log, "t")
    forget(log, config, "u1", 0)
    for record in read_all(log.reader(), names.control, PARTITIONS, 0.0):
        assert b"u1" not in (record.value or b"") + (record.key or b"") and read_order(record).key == KEY


# ── the learner ───────────────────────────────────────────────────────────────────────────────────────────────────────

NETWORK = NetworkSettings(interest_width=16, item_rows=64, item_width=4, copy_width=8)
LEARNING = LearningSettings(warmup_steps=5, step_events=32, history_events=2_048, backlog_events=1_024)


def observe(learner: Learner, users: Any, interests: Any) -> None:
    learner.observe(np.asarray(users, np.uint64), made(np.zeros(len(users), np.int64), interests), {})


def test_a_learner_drops_record_histories_and_what_waits() -> None:
    """Nothing of the user is left in its memory, all others are whole, and it goes on learning."""
    rng = np.random.default_rng(1)
    learner = Learner(NETWORK, LEARNING, seed=1, device="cpu")
    users = rng.integers(1, 8, 500)
    observe(learner, users, rng.integers(1, 30, 500))
    learner.learn(3)
    waiting = len(learner._waiting)
    mine = int((users[96:] == 3).sum())  # three steps took 96 events
    assert learner.forget(np.array([3, 99], np.uint64)) == 1
    assert len(learner._waiting) == waiting - mine
    assert 3 not in learner._users.records["key"] and len(learner._users) == 6
    rows = np.flatnonzero(users == 3)
    for name in ("digest", "interest", "hidden", "learned", "item", "gap_s"):
        assert not getattr(learner._history, name)[rows].any(), name
    others = np.flatnonzero(users != 3)
    assert learner._history.interest[others].all()
    observe(learner, users, rng.integers(1, 30, 500))
    assert learner._users.records["events"][learner._users.rows(np.array([3], np.uint64))][0] == (users == 3).sum()
    assert np.isfinite(learner.learn(5).loss)


def test_erasures_hold_for_events_that_are_still_in_their_topic() -> None:
    """A learner that rebuilds its histories passes over the user's events from before the order only."""
    log = MemoryLog()
    names, config = prepared(log, "t")
    send(log, names, 0, 100)
    erasures = Erasures(log.reader(), names.control, PARTITIONS)
    assert erasures.poll() == set() and len(erasures) == 0
    forget(log, config, "u1", 0)
    send(log, names, 100, 40)
    assert erasures.poll() == {KEY} and erasures.poll() == set()
    decoder = EventDecoder(EventSettings(), b"k")
    records = list(read_all(log.reader(), names.events[0], PARTITIONS, 0.0))
    decoded = decoder.decode(records)
    erased = [erasures.erased(*e) for e in zip(decoded.user_key_B.tolist(), decoded.records, strict=True)]
    assert sum(erased) == 5 and all(u == "u1" for u, gone in zip(decoded.users, erased, strict=True) if gone)
