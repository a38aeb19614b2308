"""The worker on the in-memory log: nothing lost, nothing doubled, whatever dies or fails."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest
from digest_app import (
    AtOnce,
    Counting,
    check_arena,
    create_topics,
    make_worker,
    put_right_when_asked,
    topic_names,
    verdict_of,
)

from stream.checkpoint import STEPS
from stream.errors import ConfigError, Corrupt, Fenced, Retryable
from stream.memory import Fault, ManualClock, MemoryLog
from stream.progress import Committed
from stream.testing import DigestEngine, digest_event
from stream.transport import Position, TopicPartition
from stream.worker import LOOKS_MAX, Worker

NAMES = topic_names()
PARTITIONS = 3


class Killed(BaseException):
    """A simulated kill -9: nothing may catch it."""


def fill(log: MemoryLog, rng: random.Random, count: int, poison: float = 0.02) -> int:
    for number in range(count):
        user = f"{rng.choice('abc')}{int(rng.paretovariate(0.6)) % 40}"
        key, value, timestamp_ms = digest_event(user, number, goodbye=rng.random() < 0.05)
        if rng.random() < poison:
            value = rng.choice([b"", b"{", b'{"user": 1}', None])
        log.append("events", sum(key) % PARTITIONS, iter([(key, value, timestamp_ms)]))
    return count


def drain(worker: Worker, turns: int = 400) -> None:
    idle = 0
    for _ in range(turns):
        idle = 0 if worker.turn() or len(worker.states) < PARTITIONS else idle + 1
        if idle >= 2:
            return
    raise AssertionError("the worker did not drain the input")


@pytest.fixture
def log() -> Iterator[MemoryLog]:
    log = MemoryLog(clock=ManualClock(), session_timeout_s=10, transaction_timeout_s=10)
    create_topics(log, NAMES, PARTITIONS)
    yield log


def worker_on(log: MemoryLog, **kwargs: object) -> Worker:
    clock = log.now
    assert isinstance(clock, ManualClock)
    given: dict[str, object] = {"executor": AtOnce(), **kwargs}
    return make_worker(log, NAMES, partitions=PARTITIONS, clock=clock, **given)  # type: ignore[arg-type]


def test_every_input_is_answered_once(log: MemoryLog) -> None:
    """A plain run: each record gives one output or dead letter, chains are whole, the arena is the inputs' fold."""
    fill(log, random.Random(1), 700)
    worker = worker_on(log)
    drain(worker)
    verdict, inputs = verdict_of(log, NAMES, PARTITIONS)
    assert verdict.problems == [] and verdict.dead_letters > 0
    assert verdict.outputs + verdict.dead_letters == len(inputs) == 700
    assert check_arena(worker, inputs) == []


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("seed", range(8))
def test_kill_before_every_step(log: MemoryLog, step: int, seed: int) -> None:
    """Killed before any numbered step of any commit, a successor goes on: nothing lost or doubled, state whole."""
    rng = random.Random(seed)
    fill(log, rng, 400)
    kills = 0
    for life in range(6):
        countdown = rng.randrange(1, 5)

        def kill(at: int, life: int = life) -> None:
            nonlocal countdown, kills
            countdown -= at == step
            if at == step and countdown == 0 and life < 5:
                kills += 1
                raise Killed

        worker = worker_on(log, on_step=kill)
        try:
            drain(worker)
        except Killed:
            continue  # no close: its member and its transaction stay behind
    verdict, inputs = verdict_of(log, NAMES, PARTITIONS)
    assert kills > 0, "the fault did not bite"
    assert verdict.problems == [] and verdict.inputs == 400
    assert check_arena(worker, inputs) == []


@pytest.mark.parametrize("point", ["begin", "send", "flush", "send_offsets", "commit"])
@pytest.mark.parametrize("fault", [Fault.LOSE, Fault.HIDE])
def test_calls_that_fail_with_unknown_outcome(log: MemoryLog, point: str, fault: Fault) -> None:
    """A call that was lost, or that worked and reported failure, is settled by the committed positions."""
    rng = random.Random(f"{point}{fault}")
    fill(log, rng, 400)
    bitten = 0

    def faults(at: str, who: str) -> Fault | None:
        nonlocal bitten
        if at == point and who == "app.0" and rng.random() < (0.005 if point == "send" else 0.3):
            bitten += 1
            return fault
        return None

    log.faults = faults
    observer = Counting()
    worker = worker_on(log, observer=observer)
    drain(worker)
    verdict, inputs = verdict_of(log, NAMES, PARTITIONS)
    assert bitten > 0 and sum(observer.outcomes.values()) > 0, "the fault did not bite"
    if point == "commit":
        assert observer.outcomes["committed" if fault is Fault.HIDE else "read_back"] > 0
    else:
        assert observer.outcomes["void"] > 0 and not observer.outcomes["committed"]
    assert verdict.problems == []
    assert check_arena(worker, inputs) == []


def two_fills(log: MemoryLog) -> dict[TopicPartition, Position]:
    """Work off twice, leave; the positions between the two."""
    worker = worker_on(log)
    fill(log, random.Random(3), 200)
    drain(worker)
    between = dict(log.group("app").positions)
    fill(log, random.Random(4), 200)
    drain(worker)
    worker.close()
    return between


@pytest.mark.parametrize("lost", [False, True], ids=["old positions", "no positions"])
def test_positions_that_the_group_has_forgotten_stand_in_the_state(log: MemoryLog, lost: bool) -> None:
    """A broker that comes back may hand out old positions, a group unused for days has none: nothing comes twice."""
    old = two_fills(log)
    group = log.group("app")
    newest = dict(group.positions)
    group.positions = {} if lost else old
    observer = Counting()
    worker = worker_on(log, observer=observer)
    fill(log, random.Random(5), 100)
    drain(worker)
    verdict, inputs = verdict_of(log, NAMES, PARTITIONS)
    assert verdict.problems == [] and check_arena(worker, inputs) == []
    behind = sum(old.get(tp) != position for tp, position in newest.items())
    assert observer.events["position_behind"] == (len(newest) if lost else behind) > 0


def test_positions_that_stay_unstable_stand_in_the_state(log: MemoryLog) -> None:
    """A broker that has read its group log by halves may hold a dead worker's transaction for open: we go on."""
    two_fills(log)
    asked = 0

    def faults(at: str, who: str) -> Fault | None:
        nonlocal asked
        asked += at == "committed"
        return Fault.LOSE if at == "committed" else None

    log.faults = faults
    observer = Counting()
    worker = worker_on(log, observer=observer)
    fill(log, random.Random(5), 100)
    drain(worker)
    assert asked == observer.events["positions_unstable"] >= LOOKS_MAX + PARTITIONS - 1
    verdict, inputs = verdict_of(log, NAMES, PARTITIONS)
    assert verdict.problems == [] and check_arena(worker, inputs) == []


def test_a_position_that_an_operator_sets_is_heeded(log: MemoryLog) -> None:
    """Tools that reset a group's positions leave no metadata: that is a wish, and not an old answer."""
    two_fills(log)
    skipped = TopicPartition(NAMES.events[0], 0)
    fill(log, random.Random(5), 100)
    end = log.reader().bounds(skipped)[1]
    log.group("app").positions[skipped] = Position(end)
    worker = worker_on(log)
    drain(worker)
    problems = verdict_of(log, NAMES, PARTITIONS)[0].problems
    assert problems and not any("2 times" in problem for problem in problems), "skipped records have no result"


@pytest.mark.parametrize("lies", [2, 10**6])
def test_a_log_without_positions_asks_again_for_an_old_one(
    log: MemoryLog, monkeypatch: pytest.MonkeyPatch, lies: int
) -> None:
    """Of a state log that an older program wrote, only the group knows the positions; one that stays old stops."""
    monkeypatch.setattr(Committed, "load", lambda payload, where: None)
    old = two_fills(log)
    group, newest = log.group("app"), dict(log.group("app").positions)
    group.positions = dict(old)
    log.faults = put_right_when_asked(group, newest, lies)
    worker = worker_on(log)
    fill(log, random.Random(5), 100)
    if lies == 2:
        drain(worker)
        assert check_arena(worker, verdict_of(log, NAMES, PARTITIONS)[1]) == []
    else:
        with pytest.raises(Retryable, match="older than the state"):
            drain(worker)
    problems = verdict_of(log, NAMES, PARTITIONS)[0].problems
    assert problems == [] if lies == 2 else not any("2 times" in problem for problem in problems)


def test_a_log_that_is_shorter_than_thought_is_not_cleaned_for_ever(log: MemoryLog) -> None:
    """A restore may have read a head that was deleted already, and that a killed broker had brought back."""
    fill(log, random.Random(6), 400)
    worker = worker_on(log)
    drain(worker)
    for partition, state in worker.states.items():
        state.log_bytes += 10**6
        worker._overlong.add(partition)
    for _ in range(40):
        worker.turn()
    assert not worker._overlong
    reader = log.reader()
    for partition, state in worker.states.items():
        tp = TopicPartition(NAMES.state, partition)
        there = sum(len(record.value or b"") for record in reader.read(tp, 0, 0.0, 10_000))
        assert there <= state.log_bytes <= there + 1_000


def test_a_log_that_cannot_be_as_short_as_it_should_is_let_be(log: MemoryLog) -> None:
    """What the cleaning itself writes may be longer than all that lives: a worker without input comes to rest."""
    fill(log, random.Random(6), 400)
    first = worker_on(log)
    drain(first)
    first.close()
    observer = Counting()
    worker = worker_on(log, observer=observer, log_bytes_min=10, cleaning_factor=0.5)
    for _ in range(200):
        worker.turn()
    assert observer.turns > 0, "nothing was too long: the fault did not bite"
    before = observer.turns
    for _ in range(40):
        worker.turn()
    assert observer.turns == before


@pytest.mark.parametrize("seed", range(30))
def test_two_workers_come_and_go(log: MemoryLog, seed: int) -> None:
    """Workers join, leave, are killed or stall (a zombie wakes up later): still exactly once, per-user order kept."""
    rng = random.Random(seed)
    fill(log, rng, 300)
    observer = Counting()
    workers: dict[int, Worker] = {}
    fenced = 0
    for round_ in range(60):
        if round_ == 20:
            fill(log, rng, 200)
        slot = rng.randrange(3)
        action = rng.random()
        if slot not in workers:
            workers[slot] = worker_on(log, observer=observer, settings={"slot": str(slot), "batch_events_max": 7})
        elif action < 0.08:
            workers.pop(slot).close()
        elif action < 0.14:
            workers.pop(slot)  # killed: it never says goodbye
        elif action < 0.2:
            log.expire(workers[slot]._consumer)  # type: ignore[arg-type]
        if rng.random() < 0.05:
            log.expire_transactions()
        for slot in rng.sample(sorted(workers), len(workers)):
            try:
                workers[slot].turn()
            except Fenced:
                fenced += 1
                del workers[slot]
    for worker in workers.values():
        worker.close()
    last = worker_on(log)
    drain(last)
    verdict, inputs = verdict_of(log, NAMES, PARTITIONS)
    assert observer.events["partition_dropped"] > 0, "no rebalance was seen"
    assert verdict.problems == [] and len(inputs) == 500
    assert check_arena(last, inputs) == []


def test_a_fenced_worker_stops(log: MemoryLog) -> None:
    """The older one of two workers of one slot stops with Fenced and has committed nothing since."""
    fill(log, random.Random(3), 50)
    older = worker_on(log)
    older.turn()
    worker_on(log)
    with pytest.raises(Fenced):
        drain(older)


def test_a_record_that_breaks_the_engine_is_a_dead_letter(log: MemoryLog) -> None:
    """A batch on which the engine fails is halved until the one guilty record is left; the others are untouched."""

    class Fragile(DigestEngine):
        def process(self, states, inputs):  # type: ignore[no-untyped-def]
            for records in inputs.values():
                for record in records:
                    if record.value and b"boom" in record.value:
                        raise ZeroDivisionError("boom")
            return super().process(states, inputs)

    fill(log, random.Random(4), 120, poison=0.0)
    log.append("events", 0, iter([(b"boom", b'{"user": "boom", "interest": "x", "time": 1}', 1)]))
    fill(log, random.Random(5), 120, poison=0.0)
    worker = worker_on(log, engine=Fragile())
    drain(worker)
    verdict, _ = verdict_of(log, NAMES, PARTITIONS)
    assert (verdict.dead_letters, verdict.outputs, verdict.problems) == (1, 240, [])


def test_poison_over_the_limit_stops_before_the_commit(log: MemoryLog) -> None:
    """A topic of the wrong format stops the worker; the batch that crosses the limit is not drained."""
    for number in range(400):
        log.append("events", number % PARTITIONS, iter([(b"k", b"not json", 1)]))
    worker = worker_on(log, settings={"poison_window": 200, "poison_share_max": 0.5})
    with pytest.raises(Corrupt, match="dead letters"):
        drain(worker)
    verdict, _ = verdict_of(log, NAMES, PARTITIONS)
    assert verdict.dead_letters <= 100


def test_a_changed_partition_count_is_refused() -> None:
    """State of four partitions is not read as if it were of three: users would have moved."""
    log = MemoryLog(clock=ManualClock())
    create_topics(log, NAMES, PARTITIONS)
    fill(log, random.Random(6), 30)
    first = worker_on(log)
    drain(first)
    first.close()
    second = make_worker(log, NAMES, partitions=PARTITIONS + 1, clock=log.now, executor=AtOnce())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="partitions"):
        for _ in range(5):
            second.turn()


def test_retries_have_a_limit(log: MemoryLog) -> None:
    """A log that fails for ever ends the worker instead of turning for ever."""
    fill(log, random.Random(7), 30)
    worker = worker_on(log, settings={"retries_max": 5})
    log.faults = lambda point, who: Fault.LOSE if point == "poll" else None
    with pytest.raises(Retryable):
        for _ in range(10):
            worker.turn()


def test_a_foreign_record_in_the_state_log_stops_the_restore(log: MemoryLog) -> None:
    """What is not a block of ours is never folded."""
    log.append("state", 1, iter([(None, b"junk", 1)]))
    worker = worker_on(log)
    with pytest.raises(Corrupt, match="not a state block"):
        for _ in range(5):
            worker.turn()


def test_oracle_finds_a_lost_and_a_doubled_output(log: MemoryLog) -> None:
    """The judge itself: take an output away or repeat one, and it says so."""
    from stream.testing import judge

    fill(log, random.Random(8), 60, poison=0.0)
    drain(worker_on(log))
    reader = log.reader()
    inputs = [r for p in range(PARTITIONS) for r in reader.read(TopicPartition("events", p), 0, 0)]
    outputs = [r for p in range(PARTITIONS) for r in reader.read(TopicPartition("forecasts", p), 0, 0)]
    assert judge(inputs, outputs, []).problems == []
    assert any(p.startswith("I1") for p in judge(inputs, outputs[:-1], []).problems)
    assert any(p.startswith("I2") for p in judge(inputs, [*outputs, outputs[-1]], []).problems)


def state_log_bytes(log: MemoryLog) -> int:
    reader = log.reader()
    return sum(
        len(r.value or b"") for p in range(PARTITIONS) for r in reader.read(TopicPartition("state", p), 0, 0, 10**6)
    )


@pytest.mark.parametrize("traffic", ["even", "heavy-tailed", "hot"])
def test_the_state_log_stays_short(log: MemoryLog, traffic: str) -> None:
    """Whatever the traffic, the log stays within the factor of its live bytes, and a restore from it is whole."""
    rng = random.Random(traffic)
    worker = worker_on(log)
    live_bytes = 0
    for round_ in range(40):
        for number in range(200):
            users = {"even": rng.randrange(300), "heavy-tailed": int(rng.paretovariate(0.7)) % 300, "hot": 0}
            user = f"u{users[traffic] if rng.random() < 0.9 else rng.randrange(300)}"
            key, value, timestamp_ms = digest_event(user, round_ * 200 + number)
            log.append("events", sum(key) % PARTITIONS, iter([(key, value, timestamp_ms)]))
        drain(worker)
        live_bytes = sum(len(s.arena) * s.arena.dtype.itemsize for s in worker.states.values())
    # The factor, plus what is below the minimum of a partition and one round of blocks not cleaned yet.
    assert state_log_bytes(log) < 3 * live_bytes + PARTITIONS * 3_000 + 4 * 50 * 24 * PARTITIONS
    heads = [log.reader().bounds(TopicPartition("state", p))[0] for p in range(PARTITIONS)]
    assert min(heads) > 0, "nothing was deleted"
    worker.close()
    successor = worker_on(log)
    drain(successor)
    verdict, inputs = verdict_of(log, NAMES, PARTITIONS)
    assert verdict.problems == [] and check_arena(successor, inputs) == []
    counts = {p: s.groups.counts for p, s in successor.states.items()}
    assert sum(c.total() for c in counts.values()) == len(inputs)
    for partition, state in successor.states.items():
        reader = log.reader()
        kept = reader.read(TopicPartition("state", partition), 0, 0, 10**6)
        assert state.log_bytes <= sum(len(r.value or b"") for r in kept)


@pytest.mark.parametrize("point", ["poll", "committed", "bounds", "read", "delete"])
def test_a_look_up_that_fails_loses_nothing(log: MemoryLog, point: str) -> None:
    """What was polled before a later poll, a look-up or a deletion failed comes again: nothing is passed over."""
    rng = random.Random(point)
    fill(log, rng, 200)
    bitten = 0

    def faults(at: str, who: str) -> Fault | None:
        nonlocal bitten
        if at == point and rng.random() < 0.2:
            bitten += 1
            return rng.choice([Fault.LOSE, Fault.HIDE])
        return None

    log.faults = faults
    for life in range(4):
        fill(log, rng, 150)
        worker = worker_on(log, settings={"batch_wait_s": 0.01, "batch_events_max": 12, "retries_max": 100})
        drain(worker)
        if life < 3:
            worker.close()
    log.faults = None
    verdict, inputs = verdict_of(log, NAMES, PARTITIONS)
    assert bitten > 1, "the fault did not bite"
    assert verdict.problems == [] and len(inputs) == 800
    assert check_arena(worker, inputs) == []


def test_a_dead_letter_of_a_broken_record_that_is_void_comes_again(log: MemoryLog) -> None:
    """A record that breaks the engine, whose own commit fails: what follows it must not be committed before it."""

    class Fragile(DigestEngine):
        def process(self, states, inputs):  # type: ignore[no-untyped-def]
            if any(record.key == b"boom" for records in inputs.values() for record in records):
                raise ZeroDivisionError("boom")
            return super().process(states, inputs)

    rng = random.Random(9)
    for number in range(120):
        key, value, timestamp_ms = digest_event("boom" if number % 10 == 5 else f"a{number % 7}", number)
        log.append("events", 0, iter([(key, value, timestamp_ms)]))
    bitten = 0

    def faults(at: str, who: str) -> Fault | None:
        nonlocal bitten
        if at == "commit" and who == "app.0" and rng.random() < 0.4:
            bitten += 1
            return Fault.LOSE
        return None

    log.faults = faults
    drain(worker_on(log, engine=Fragile(epoch_records=70)))
    verdict, _ = verdict_of(log, NAMES, PARTITIONS)
    assert bitten > 0 and (verdict.dead_letters, verdict.outputs, verdict.problems) == (12, 108, [])


def test_an_outcome_that_stays_open_is_waited_for(log: MemoryLog) -> None:
    """A commit that happened, and a log that does not say so at once: the batch is merged, not forgotten."""
    fill(log, random.Random(10), 200)
    failing = 0

    def faults(at: str, who: str) -> Fault | None:
        nonlocal failing
        if at == "commit" and who == "app.0" and not failing:
            failing = 4
            return Fault.HIDE
        if at == "committed" and failing > 1:
            failing -= 1
            return Fault.LOSE
        return None

    observer = Counting()
    worker = worker_on(log, observer=observer)
    for _ in range(5):
        worker.turn()
    log.faults = faults
    fill(log, random.Random(11), 100)
    drain(worker)
    log.faults = None
    verdict, inputs = verdict_of(log, NAMES, PARTITIONS)
    assert observer.events["outcome_open"] == 3 and observer.outcomes["committed"] == 1
    assert verdict.problems == [] and check_arena(worker, inputs) == []


def test_failures_of_an_idle_worker_do_not_add_up(log: MemoryLog) -> None:
    """A poll that fails now and then, with no commit between, is not a row of failures."""
    worker = worker_on(log, settings={"retries_max": 3})
    drain(worker)
    polls = 0

    def faults(at: str, who: str) -> Fault | None:
        nonlocal polls
        polls += at == "poll"
        return Fault.LOSE if at == "poll" and polls % 2 else None

    log.faults = faults
    for _ in range(40):
        worker.turn()
    assert polls > 30


def test_records_of_an_older_generation_are_not_committed_under_a_newer_proof(log: MemoryLog) -> None:
    """The group moves on between two polls of one batch: the batch is put back, not committed with the later proof."""
    fill(log, random.Random(11), 300, poison=0.0)
    worker = worker_on(log, settings={"batch_wait_s": 5.0, "batch_events_max": 200})
    for _ in range(5):
        worker.turn()
        if len(worker.states) == PARTITIONS:
            break
    joined = []

    def faults(at: str, who: str) -> Fault | None:
        if at == "poll" and worker._pending and not joined:
            joined.append(log.consumer(group="app", topics=NAMES.events))
        return None

    log.faults = faults
    fill(log, random.Random(12), 100, poison=0.0)
    for _ in range(20):
        worker.turn()
        if joined:
            break
    assert joined and worker._pending == {}
    log.faults = None
    joined[0].close()
    drain(worker)
    verdict, inputs = verdict_of(log, NAMES, PARTITIONS)
    assert verdict.problems == [] and len(inputs) == 400


def test_a_restore_tells_how_far_it_is(log: MemoryLog) -> None:
    """Share and time left, at most once a second, never above 1."""
    from stream.restore import RestoreProgress, restore

    fill(log, random.Random(13), 3_000, poison=0.0)
    drain(worker_on(log, settings={"batch_events_max": 5}, log_bytes_min=10**9), turns=3_000)
    told: list[RestoreProgress] = []
    ticks = iter(range(10**6))
    state = restore(
        log,
        engine=DigestEngine(),
        topic=NAMES.state,
        partition=0,
        transactional_id="other",
        nonce=b"n",
        timeout_s=1e9,
        clock=lambda: float(next(ticks)),
        on_progress=told.append,
    )
    assert state is not None and len(told) > 2
    shares = [at.share for at in told]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] <= 1
    assert told[-1].eta_s < told[0].eta_s and told[0].bytes < told[-1].bytes <= state.log_bytes


@pytest.mark.parametrize("step", [4, 6])
def test_a_crash_loop_does_not_let_the_log_grow(log: MemoryLog, step: int) -> None:
    """Sixty lives that all end in their first commit: what they leave behind, aborted blocks too, is cleaned away."""
    fill(log, random.Random(4), 600)
    drain(worker_on(log, log_bytes_min=3_000))
    place = TopicPartition(NAMES.state, 0)
    fill(log, random.Random(5), 300)
    spans = []
    clock = log.now
    assert isinstance(clock, ManualClock)
    for _ in range(60):

        def kill(at: int) -> None:
            touched = worker.states.keys() and any(worker._pending.values())  # noqa: B023
            if at == step and touched:
                raise Killed

        worker = worker_on(log, on_step=kill, log_bytes_min=3_000)
        with contextlib.suppress(Killed):
            drain(worker)
        clock.advance(20)
        first, end = log.reader().bounds(place)
        spans.append(end - first)
    assert max(spans[30:]) <= max(spans[:30]) + 8, f"it grows: {spans[::6]}"
    worker = worker_on(log, log_bytes_min=3_000)
    drain(worker)
    verdict, inputs = verdict_of(log, NAMES, PARTITIONS)
    assert verdict.problems == [] and check_arena(worker, inputs) == []
