"""Users are forgotten by event time and by budget: the same ones for any cut into batches, and for good."""

from __future__ import annotations

import random

import numpy as np
import pytest
from digest_app import AtOnce, Counting, create_topics, make_worker, topic_names
from pipelines import START_MS, TP, make, run

from models.profile import USER
from models.suspicion import EVIDENCE
from stream import changelog
from stream.changelog import Kind
from stream.checkpoint import STEPS
from stream.cleaning import Cleaner
from stream.engine import PartitionState, PartitionStep
from stream.errors import ConfigError
from stream.eviction import Bounds, silent
from stream.loading import load
from stream.memory import ManualClock, MemoryLog
from stream.state import Arena
from stream.transport import LogRecord
from stream.worker import Worker

NAMES = topic_names()
DAY_MS = 86_400_000


class Killed(BaseException):
    """A simulated kill -9."""


def quiet_users(count: int) -> list[LogRecord]:
    """Users that come for a while and then no more: every day others."""
    rng = random.Random(5)
    records = []
    for offset in range(count):
        user = f"d{offset // 60}-{rng.randrange(12)}" if rng.random() < 0.7 else f"u{rng.randrange(4)}"
        at_ms = START_MS + offset * DAY_MS // 60
        value = b'{"user":"%s","interest":"i%d","time":%d}' % (user.encode(), rng.randrange(9), at_ms)
        records.append(LogRecord("events", 0, offset, START_MS + 400 * DAY_MS, user.encode(), value))
    return records


@pytest.mark.parametrize(
    "bounds", [Bounds(ttl_ms=3 * DAY_MS), Bounds(users_max=20), Bounds(ttl_ms=5 * DAY_MS, users_max=30)]
)
def test_any_cut_into_batches_forgets_the_same_users(bounds: Bounds) -> None:
    """Time to live and budget act at the ends of epochs: batches of 5, 37 and 4,096 end with the same users."""
    records = quiet_users(1_100)
    whole, outputs = run(make(bounds=bounds), records, 4_096)
    evicted = sum(o["evicted"] for s, o in outputs if s == "metrics")
    assert evicted > 100
    left = whole.arena.all()
    newest = START_MS + 1_023 * DAY_MS // 60  # the last epoch ends with record 1,024
    if bounds.ttl_ms:
        assert (left["last_time_ms"] >= newest - bounds.ttl_ms).all()
    if bounds.users_max:
        assert len(left) <= bounds.users_max + len({r.key for r in records[1_024:]})
    for batch in (5, 37):
        state, others = run(make(bounds=bounds), records, batch)
        assert sum(o["evicted"] for s, o in others if s == "metrics") == evicted
        assert (state.arena.all()["key"] == left["key"]).all()
        assert (state.arena.all()["events"] == left["events"]).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_against_a_plain_one(seed: int) -> None:
    """The longest silent go first, ties by key; users of the batch count with their new time."""
    rng = np.random.default_rng(seed)
    arena, touched = Arena(USER), np.zeros(int(rng.integers(0, 30)), USER)
    held = np.zeros(60, USER)
    held["key"] = rng.permutation(np.arange(1, 200, dtype=np.uint64))[:60]
    held["last_time_ms"] = rng.integers(0, 12, 60)
    arena.merge(held)
    arena.remove(held["key"][:5].copy())
    touched["key"] = rng.permutation(np.arange(1, 200, dtype=np.uint64))[: len(touched)]
    touched["last_time_ms"] = rng.integers(0, 12, len(touched))
    bounds = Bounds(ttl_ms=int(rng.integers(0, 9)), users_max=int(rng.integers(0, 60)))
    users = {int(r["key"]): int(r["last_time_ms"]) for r in [*held[5:], *touched]}
    gone = {k for k, t in users.items() if bounds.ttl_ms and t < 12 - bounds.ttl_ms}
    left = sorted((t, k) for k, t in users.items() if k not in gone)
    if bounds.users_max:
        gone |= {k for _, k in left[: max(0, len(left) - bounds.users_max)]}
    assert set(silent(arena, touched, 12, bounds).tolist()) == gone


@pytest.mark.parametrize("step", [2, 4, 6, 7])
def test_a_successor_has_forgotten_them_too(step: int) -> None:
    """Killed before a step of a commit again and again: the state that comes back is that of a run without kills."""
    records = quiet_users(900)
    bounds = Bounds(ttl_ms=3 * DAY_MS, users_max=25)
    whole, _ = run(make(bounds=bounds), records, 4_096)
    assert step in STEPS
    log = MemoryLog(clock=ManualClock(), session_timeout_s=10, transaction_timeout_s=10)
    create_topics(log, NAMES, 1)
    log.append(TP.topic, 0, ((r.key, r.value, r.timestamp) for r in records))
    rng, kills, engine = random.Random(step), 0, make(bounds=bounds)
    for life in range(8):
        countdown = rng.randrange(2, 7)

        def kill(at: int, life: int = life) -> None:
            nonlocal countdown, kills
            countdown -= at == step
            if at == step and countdown == 0 and life < 7:
                kills += 1
                raise Killed

        worker = worker_on(log, engine, kill)
        try:
            while 0 not in worker.states or worker.states[0].seen < 900:
                worker.turn()
        except Killed:
            continue
    assert kills > 3, "the fault did not bite"
    worker.close()
    worker = worker_on(log, engine, lambda at: None)
    while 0 not in worker.states:
        worker.turn()
    mine, wanted = worker.states[0].arena.all(), whole.arena.all()
    assert (mine["key"] == wanted["key"]).all() and (mine["events"] == wanted["events"]).all()
    worker.close()


def worker_on(log: MemoryLog, engine: object, on_step: object) -> Worker:
    clock = log.now
    assert isinstance(clock, ManualClock)
    return make_worker(
        log,
        NAMES,
        partitions=1,
        clock=clock,
        engine=engine,
        on_step=on_step,
        observer=Counting(),
        log_bytes_min=50_000,
        executor=AtOnce(),
    )  # type: ignore[arg-type]


def test_a_time_to_live_that_one_wrong_clock_could_trigger_is_refused() -> None:
    """It must be longer than what an event may lie in the future."""
    with pytest.raises(ConfigError, match=r"state\.ttl_h must be longer than events\.future_max_s"):
        load(sets=["state.ttl_h=12"])
    assert load(sets=["state.ttl_h=720"]).config.state.ttl_h == 720


def test_cleaning_does_not_bring_evidence_back_of_whom_the_step_forgets() -> None:
    """A block with evidence of two users is cleaned by a step that forgets one of them: the other's is kept."""
    rows = np.zeros(2, EVIDENCE)
    rows["key"], rows["age"], rows["watch"] = [1, 2], 20, 1
    engine = make()
    state = PartitionState(arena=Arena(engine.dtype), groups=engine.new_groups())
    state.suspects.append(rows)
    log = MemoryLog(clock=ManualClock())
    create_topics(log, NAMES, 1)
    (block,) = changelog.pack(Kind.EVIDENCE, 0, 1, rows, 10_000)
    log.append(NAMES.state, 0, iter([(None, block, START_MS)]))
    step = PartitionStep(
        partition=0,
        positions={TP: 1},
        records=np.zeros(0, engine.dtype),
        seen=1,
        watermark_ms=0,
        gone=np.array([1], "u8"),
    )
    cleaner = Cleaner(
        engine=engine, reader=log.reader(), admin=log.admin(), topic=NAMES.state, factor=1.5, log_bytes_min=1
    )
    state.log_bytes = 10_000
    cleaner.extend(state, step)
    assert step.evidence["key"].tolist() == [2]
    cleaner.close()
