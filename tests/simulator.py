"""A broker-free simulator: the real worker on the in-memory log, with a manual clock and seeded faults.

    python tests/simulator.py --seed 42            replays one seed and prints what happened (`make sim SEED=42`)
    python tests/simulator.py --seeds 5000         as many seeds as that; prints what bit, and seeds a minute
    python tests/simulator.py --processes 1        in this process alone; otherwise in one a core

Seeds know nothing of one another: the result is the same whatever the number of processes.

A seed decides everything: how many partitions, workers and inputs there are, which faults come and how often, and whose
turn it is. Everything runs in one thread. Whenever a worker calls the log, or comes to a numbered step of its commit,
the simulator may kill it there, lose the call, hide its success, answer it with positions that are long past, or leave
it standing while OTHER workers, and its own restores, run on, for a moment (a slow commit) or until its session is over
(a zombie). Then the faults end, the workers drain the input, and the oracle judges:

    I1-I3  each input has one result, none twice, every user's chain is whole
    I4  arena == fold(changelog) == fold(inputs)
    I5  positions never go back
    I6  results visible == inputs committed, at every moment without an open transaction
    I8  progress within 2 x (session + transaction timeout) after the last fault
    I9  versions of weights exist and do not go back in a partition
    I10  counts of the faults that bit
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import msgspec
from digest_app import Counting, create_topics, make_worker, topic_names

from stream.errors import DriftlineError, Fenced, Retryable
from stream.memory import Fault, ManualClock, MemoryLog
from stream.testing import DigestEngine, DigestOutput, arena_content, digest_event, fold_inputs, judge, read_all
from stream.transport import Record, TopicPartition
from stream.worker import Worker

SESSION_S = 10.0
TRANSACTION_S = (8.0, 30.0)  # shorter and longer than a session: what a dead worker left open ends before or after it
ROUNDS = 60
CALM_ROUNDS_MAX = 3_000
DEPTH_MAX = 3
TELL_SEEDS = 500
SEEDS_AT_ONCE = 10
NAMES = topic_names()
GUILTY = "boom"  # a user whose events break the engine: each becomes a dead letter by itself
STEP_NAMES = {
    1: "begin", 2: "state blocks", 3: "outputs", 4: "flush", 5: "positions", 6: "commit", 7: "merge"
}  # fmt: skip


class Killed(BaseException):
    """A simulated kill -9: nothing may catch it but the simulator."""


class Deferred(Executor):
    """The helper thread of a worker: what is submitted waits until the simulator runs it."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: call(*arguments, **options)))
        return future

    def run_one(self) -> None:
        future, call = self.waiting.pop(0)
        try:
            future.set_result(call())
        except DriftlineError as error:
            future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.waiting.clear()


class FragileEngine(DigestEngine):
    """The digest, that breaks on the guilty user."""

    def process(self, states, inputs):  # type: ignore[no-untyped-def]
        for records in inputs.values():
            for record in records:
                if record.key == GUILTY.encode():
                    raise ZeroDivisionError(GUILTY)
        return super().process(states, inputs)


class Versions:
    """Weights that a worker sees late: it swaps to the newest published version now and then, or when it must."""

    def __init__(self, world: World, engine: DigestEngine) -> None:
        self._world = world
        self._engine = engine

    def swap(self, at_least: int = 0) -> None:
        if at_least > self._world.published:
            raise Retryable(f"version {at_least} does not exist")
        if at_least > self._engine.weights_version or self._world.rng.random() < 0.2:
            self._engine.weights_version = self._world.published

    def close(self) -> None: ...


@dataclass(eq=False)
class Actor:
    """One life of a worker process."""

    name: str
    slot: str
    engine: DigestEngine
    pool: Deferred
    worker: Worker | None = None
    dead: bool = False
    standing: set[str] = field(default_factory=set)  # turn, restore: what of it is on the simulator's stack


@dataclass
class Faults:
    """How often what happens, drawn once a seed."""

    kill: float
    lose: float
    hide: float
    pause: float
    zombie: float
    old: float

    @staticmethod
    def drawn(rng: random.Random) -> Faults:
        def rate(often: float) -> float:
            return rng.choice([0.0, often / 4, often])

        return Faults(
            kill=rate(0.008), lose=rate(0.015), hide=rate(0.015), pause=rate(0.02), zombie=rate(0.008), old=rate(0.3)
        )


@dataclass
class Result:
    """What came of a seed."""

    seed: int
    problems: list[str]
    bit: Counter[str]
    inputs: int
    trace: list[str]


class World:
    """One seed."""

    def __init__(self, seed: int, keep_trace: bool = False) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.clock = ManualClock()
        self.partitions = self.rng.choice([1, 2, 2, 3])
        self.slots = [str(n) for n in range(self.rng.choice([1, 2, 2, 3]))]
        self.rates = Faults.drawn(self.rng)
        self.batch = self.rng.choice([3, 8, 20])
        self.epoch = self.rng.choice([5, 17, 40])
        self.names = self.rng.choice([5, 5, 100])  # users of a letter: the same ones again, or nearly always new ones
        self.leaving = self.rng.choice([0.0, 0.05, 0.3])  # share of events after which a user is forgotten
        transaction_s = self.rng.choice(TRANSACTION_S)
        self.progress_s = 2 * (SESSION_S + transaction_s)
        self.log = MemoryLog(clock=self.clock, session_timeout_s=SESSION_S, transaction_timeout_s=transaction_s)
        create_topics(self.log, NAMES, self.partitions)
        self.log.faults = self._call
        self.actors: list[Actor] = []
        self.stack: list[Actor] = []
        self.published = 0
        self.lives = self.sent = self.nonces = 0
        self.calm = False
        self.budget = 12  # faults a seed, so that it gets somewhere
        self.bit: Counter[str] = Counter()
        self.problems: list[str] = []
        self.highest: dict[TopicPartition, int] = {}
        self.observer = Counting()
        self.trace: list[str] | None = [] if keep_trace else None

    # ------------------------------------------------------------------ what is told

    def say(self, text: str, *arguments: object) -> None:
        if self.trace is not None:
            inside = "  " * max(0, len(self.stack) - 1)
            self.trace.append(f"{self.clock.now_s:8.2f}  {inside}{text % arguments}")

    def blame(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)
            self.say("PROBLEM %s", text)

    # ------------------------------------------------------------------ faults

    def _call(self, point: str, who: str) -> Fault | None:
        may_bite = self.stack and not self.calm and self.budget > 0
        if point == "committed" and may_bite and self.rng.random() < self.rates.old:
            self._bite("old", self.stack[-1], point)
            return Fault.OLD
        return self._maybe(f"{point} {who}".rstrip(), point not in ("poll", "committed", "read", "bounds"))

    def _maybe(self, where: str, changes: bool) -> Fault | None:
        """Before a call or a step: nothing, a kill, a loss, or a pause in which others go on."""
        if not self.stack or self.calm:
            return None
        actor = self.stack[-1]
        if self.budget > 0:
            dice, rates = self.rng.random(), self.rates
            if dice < (edge := rates.kill):
                self._bite("kill", actor, where)
                actor.dead = True
            elif dice < (edge := edge + rates.pause):
                self._bite("slow", actor, where)
                self._others(self.rng.randrange(1, 4))
            elif dice < (edge := edge + rates.zombie):
                self._bite("zombie", actor, where)
                for _ in range(6):
                    self._others(4)
                    self.clock.advance(SESSION_S / 4)
                self.say("%s wakes up before %s", actor.name, where)
            elif dice < (edge := edge + rates.lose) and not where.startswith("step"):
                self._bite("lost", actor, where)
                return Fault.LOSE
            elif dice < edge + rates.hide and changes and not where.startswith("step"):
                self._bite("hidden", actor, where)
                return Fault.HIDE
        if actor.dead:
            raise Killed
        return None

    def _bite(self, what: str, actor: Actor, where: str) -> None:
        self.budget -= 1
        self.bit[what] += 1
        self.bit[f"{what} at {where.split()[0] if not where.startswith('step') else where}"] += 1
        self.say("%s: %s before %s", actor.name, what, where)

    def _others(self, steps: int) -> None:
        if len(self.stack) < DEPTH_MAX:
            for _ in range(steps):
                self.step()

    # ------------------------------------------------------------------ actors

    def start(self, slot: str) -> Actor:
        self.lives += 1
        engine = FragileEngine(epoch_records=self.epoch)
        actor = Actor(name=f"w{slot}#{self.lives}", slot=slot, engine=engine, pool=Deferred())
        self.actors.append(actor)
        self.say("%s starts", actor.name)
        self._as(actor, "turn", lambda: self._make(actor))
        return actor

    def _make(self, actor: Actor) -> None:
        settings = {
            "slot": actor.slot, "batch_events_max": self.batch, "backoff_s": 0.05, "backoff_max_s": 0.4,
            "restore_timeout_s": 60.0, "poll_timeout_s": 0.25,
        }  # fmt: skip
        actor.worker = make_worker(
            self.log,
            NAMES,
            partitions=self.partitions,
            on_step=lambda step: self._step_of_commit(step),
            observer=self.observer,
            settings=settings,
            clock=self.clock,
            executor=actor.pool,
            engine=actor.engine,
            weights=Versions(self, actor.engine),
            log_bytes_min=400,
            nonce=self._nonce,
        )

    def _nonce(self) -> bytes:
        self.nonces += 1
        return b"%d" % self.nonces

    def _step_of_commit(self, step: int) -> None:
        if self.trace is not None and step == 1:
            self.say("%s commits", self.stack[-1].name)
        self._maybe(f"step {step}, {STEP_NAMES[step]}", True)

    def _as(self, actor: Actor, what: str, act: Callable[[], object]) -> None:
        """Run something of an actor, and see how it ends."""
        actor.standing.add(what)
        self.stack.append(actor)
        try:
            act()
        except Killed:
            self._gone(actor, "is dead")
        except Fenced as error:
            self.bit["fenced"] += 1
            self._gone(actor, f"stops: {error}")
            self._close(actor)
        except Retryable as error:
            self.bit["gave up"] += 1
            self._gone(actor, f"gives up: {error}")
            self._close(actor)
        except Exception as error:
            self.blame(f"{actor.name}: {type(error).__name__}: {error}")
            self._gone(actor, "broke")
            if self.trace is not None:
                raise
        finally:
            self.stack.pop()
            actor.standing.discard(what)

    def _gone(self, actor: Actor, how: str) -> None:
        self.say("%s %s", actor.name, how)
        actor.dead = True
        if actor in self.actors:
            self.actors.remove(actor)

    def _close(self, actor: Actor) -> None:
        """A process that ends by itself says goodbye, if it can."""
        if actor.worker is not None and not (actor.standing - {"turn"}):
            try:
                actor.worker.close()
            except (DriftlineError, Killed):
                self.say("%s could not say goodbye", actor.name)

    def step(self) -> None:
        """One thing happens: somebody's turn, a restore, new input, or a change of the members."""
        rng, dice = self.rng, self.rng.random()
        slot = rng.choice(self.slots)
        mine = [a for a in self.actors if a.slot == slot and not a.dead]
        if not mine or (not self.calm and self.budget > 0 and dice < 0.01):
            if mine:
                self.bit["same slot"] += 1
                self.budget -= 1
            self.start(slot)
            return
        actor = mine[0]
        if not self.calm and dice < 0.03 and not actor.standing:
            self._as(actor, "turn", lambda: actor.worker.close() if actor.worker else None)
            self._gone(actor, "left")
        elif not self.calm and dice < 0.05 and self.budget > 0:
            self._bite("kill", actor, "its turn")
            self._gone(actor, "is dead")
        elif dice < 0.09 and not self.calm:
            self.clock.advance(rng.choice([0.1, 1.0, 5.0]))
        elif dice < 0.2 and self.sent < 90 and not self.calm:
            self.send(rng.randrange(1, 12))
        elif dice < 0.24 and not self.calm:
            self.published += 1
        elif actor.pool.waiting and "restore" not in actor.standing and rng.random() < 0.6:
            self._as(actor, "restore", actor.pool.run_one)
        elif "turn" not in actor.standing and actor.worker is not None:
            worker = actor.worker
            self._as(actor, "turn", worker.turn)
        if not self.stack:
            self.check()

    def send(self, count: int) -> None:
        """New inputs; some cannot be decoded, some break the engine."""
        for _ in range(count):
            user = GUILTY if self.rng.random() < 0.01 else f"{self.rng.choice('abc')}{self.rng.randrange(self.names)}"
            key, value, timestamp_ms = digest_event(user, self.sent, goodbye=self.rng.random() < self.leaving)
            if self.rng.random() < 0.02:
                value = b"{"
            self.log.append("events", sum(key) % self.partitions, [(key, value, timestamp_ms)])
            self.sent += 1

    # ------------------------------------------------------------------ invariants

    def check(self) -> None:
        """I5 and I6, at a moment when nobody is inside a call."""
        group = self.log._groups.get("app")
        if group is None:
            return
        for tp, position in group.positions.items():
            if position.offset < self.highest.get(tp, 0):
                self.blame(f"I5: {tp} went back from {self.highest[tp]} to {position.offset}")
            self.highest[tp] = position.offset
            visible = sum(
                len(self.log._logs[TopicPartition(NAMES.outputs[stream], tp.partition)].visible)
                for stream in ("forecasts", "dead_letters")
            )
            if visible > position.offset or (visible < position.offset and not self.log._open):
                self.blame(f"I6: {tp} stands at {position.offset}, {visible} results are visible")

    def run(self) -> Result:
        """The whole life of a seed."""
        self.send(20)
        for _ in range(ROUNDS):
            self.step()
            if self.problems:
                break
        if not self.problems:
            self.settle()
        if not self.problems:
            self.judge()
        for name, count in (*self.observer.events.items(), *self.observer.outcomes.items()):
            self.bit[f"saw {name}"] += count
        return Result(self.seed, self.problems, self.bit, self.sent, self.trace or [])

    def settle(self) -> None:
        """The faults end: progress must come soon (I8), and the input must be drained."""
        self.calm = True
        self.say("calm: no more faults")
        self.send(10)
        start_s, begin = self.clock.now_s, sum(self.highest.values())
        progressed = False
        for _ in range(CALM_ROUNDS_MAX):
            self.step()
            done = sum(self.highest.values())
            if done > begin and not progressed:
                progressed = True
                if self.clock.now_s - start_s > self.progress_s:
                    self.blame(f"I8: the first progress came {self.clock.now_s - start_s:.1f} s after the last fault")
            if done == self.sent and not self.log._open:
                return
            if self.problems:
                return
        self.blame(f"I8: {sum(self.highest.values())} of {self.sent} inputs were committed")

    def judge(self) -> None:
        """I1 to I4 and I9 at the end, with a last worker that has read the changelog."""
        for actor in list(self.actors):  # a zombie that has not polled since it lost its share hears of it now
            if actor.worker is not None and not actor.dead:
                self._as(actor, "turn", actor.worker.turn)
        living = {a.name: a.worker for a in self.actors if a.worker is not None and not a.dead}
        reader = self.log.reader()
        inputs: list[Record] = list(read_all(reader, "events", self.partitions, 0.0))
        outputs = list(read_all(reader, "forecasts", self.partitions, 0.0))
        for problem in judge(inputs, outputs, read_all(reader, "dead_letters", self.partitions, 0.0)).problems:
            self.blame(problem)
        versions: dict[int, int] = {}
        for record in outputs:
            output = msgspec.json.decode(record.value or b"", type=DigestOutput)
            if not versions.get(record.partition, 0) <= output.weights <= self.published:
                self.blame(f"I9: version {output.weights} after {versions.get(record.partition)}")
            versions[record.partition] = output.weights
        good = [record for record in inputs if record.key != GUILTY.encode()]
        expected = fold_inputs(good)
        self._compare("fold(inputs) and", living, expected)
        self.slots = ["last"]
        for worker in living.values():
            worker.close()
        self.actors.clear()
        last = self.start("last")
        for _ in range(CALM_ROUNDS_MAX):
            if last.worker is None or len(last.worker.states) == self.partitions:
                break
            self.step()
        if last.worker is not None:
            if len(last.worker.states) < self.partitions:
                self.blame("I4: the last worker does not come up")
            self._compare("fold(changelog) and", {last.name: last.worker}, expected)
            letters = sum(state.groups.counts.total() for state in last.worker.states.values())
            if letters != len(outputs):
                self.blame(f"I4: the group tables count {letters} events, there were {len(outputs)}")

    def _compare(self, what: str, workers: dict[str, Worker], expected: dict[int, Any]) -> None:
        for name, worker in workers.items():
            for partition, state in worker.states.items():
                if arena_content(state) != expected.get(partition, {}):
                    self.blame(f"I4: {what} the arena of {name} differ in partition {partition}")


def simulate(seed: int, keep_trace: bool = False) -> Result:
    """Play one seed."""
    return World(seed, keep_trace).run()


def results(seeds: range, processes: int) -> Iterator[Result]:
    """What came of each seed, in their order."""
    if processes == 1:
        yield from map(simulate, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(processes, logging.disable) as pool:
        yield from pool.imap(simulate, seeds, chunksize=SEEDS_AT_ONCE)
        pool.close()
        pool.join()  # their processor time is known once they have ended


def processor_s() -> float:
    """Processor time of this process and of those that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main() -> int:
    """The command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, help="replay this one, with its trace")
    parser.add_argument("--seeds", type=int, default=1_000, help="how many to play")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="in so many; default: one a core")
    given = parser.parse_args()
    logging.disable()
    if given.processes < 1:
        parser.error("--processes: at least one")
    if given.seed is not None:
        world = World(given.seed, keep_trace=True)
        try:
            world.run()
        finally:
            print("\n".join(world.trace or []))
            print(f"seed {given.seed}: {world.problems or 'no problem'}; bit: {dict(world.bit)}")
        return bool(world.problems)
    start_s = time.monotonic()
    bit: Counter[str] = Counter()
    failed = inputs = 0
    for done, result in enumerate(results(range(given.first, given.first + given.seeds), given.processes), 1):
        bit.update(result.bit)
        inputs += result.inputs
        if result.problems:
            failed += 1
            print(f"seed {result.seed}: {result.problems[0]}   (make sim SEED={result.seed})", flush=True)
        if done % TELL_SEEDS == 0 and done < given.seeds:
            print(f"{done} of {given.seeds} seeds, {failed} with a problem", file=sys.stderr, flush=True)
    seconds, spent_s = time.monotonic() - start_s, processor_s()
    for name, count in sorted(bit.items()):
        print(f"{count:8d}  {name}")
    print(
        f"{given.seeds} seeds, {inputs} inputs, {failed} with a problem; {seconds:.1f} s, "
        f"{60 * given.seeds / seconds:.0f} seeds a minute in {given.processes} processes, "
        f"{60 * given.seeds / spent_s:.0f} in a minute of processor time"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
