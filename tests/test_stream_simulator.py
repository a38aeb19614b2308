"""The simulator finds nothing in the worker, and finds every mistake that is put in on purpose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from simulator import NAMES, results, simulate

from stream import restore as restoring
from stream import worker as working
from stream.assignment import Membership
from stream.changelog import Kind
from stream.changelog import encode as encode_block
from stream.checkpoint import Checkpoint
from stream.cleaning import Cleaner
from stream.engine import PartitionState
from stream.memory_clients import MemoryProducer
from stream.state import Arena
from stream.transport import TopicPartition
from stream.worker import Worker

SEEDS = 300
MUTANT_SEEDS_MAX = 2_000

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_seeds_of_faults_change_nothing() -> None:
    """Hundreds of seeds: kills at every call and step, losses, unknown outcomes, zombies: exactly once in each."""
    bit: Counter[str] = Counter()
    for seed in range(SEEDS):
        result = simulate(seed)
        assert result.problems == [], f"make sim SEED={seed}"
        bit.update(result.bit)
    for fault in ("kill", "lost", "hidden", "slow", "zombie", "same slot", "fenced"):
        assert bit[fault] > SEEDS / 20, f"{fault} did not bite"
    for point in ("step 6, commit", "step 7, merge", "commit", "send_offsets", "read", "delete", "poll"):
        assert bit[f"kill at {point}"] + bit[f"zombie at {point}"] > 0, f"nothing happened at {point}"
    for seen in ("committed", "void", "rebalanced", "partition_dropped", "positions_unstable", "restore_failed"):
        assert bit[f"saw {seen}"] > 0, f"{seen} was never seen"


def test_a_seed_is_the_same_every_time() -> None:
    """A replay tells the very same story."""
    first, second = simulate(11, keep_trace=True), simulate(11, keep_trace=True)
    assert first.trace == second.trace and len(first.trace) > 20


def test_processes_change_nothing() -> None:
    """Seeds played in two processes: the same results, in the same order."""
    alone, shared = (list(results(range(15), processes)) for processes in (1, 2))
    assert alone == shared and [result.seed for result in shared] == list(range(15))


# ── mistakes put in on purpose ────────────────────────────────────────────────────────────────────────────────────────


def merge_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    commit, merge = Checkpoint.commit, Checkpoint.merge

    def hasty(self, producer, states, steps, group):  # type: ignore[no-untyped-def]
        merge(self, states, steps)
        commit(self, producer, states, steps, group)

    patch.setattr(Checkpoint, "commit", hasty)
    patch.setattr(Checkpoint, "merge", lambda self, states, steps: None)


def barrier_with_positions(patch: pytest.MonkeyPatch) -> None:
    def write(transport, *, transactional_id, topic, partition, nonce):  # type: ignore[no-untyped-def]
        tp, group = TopicPartition(NAMES.events[0], partition), transport.group("app")
        producer = transport.producer(transactional_id=transactional_id)
        producer.begin()
        producer.send(topic, partition, None, encode_block(Kind.BARRIER, partition, 0, nonce))
        if tp in group.positions:
            proof = Membership("app", group.generation, next(iter(group.members)))
            producer.send_offsets({tp: group.positions[tp]}, proof)
        producer.commit()

    patch.setattr(restoring, "write_barrier", write)


def positions_of_one_partition_only(patch: pytest.MonkeyPatch) -> None:
    positions = Checkpoint.positions
    patch.setattr(Checkpoint, "positions", lambda self, steps: dict(list(positions(self, steps).items())[:1]))


def no_way_back_after_an_abort(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Worker, "_put_back", lambda self: self._pending.clear())


def a_later_proof_of_membership(patch: pytest.MonkeyPatch) -> None:
    send = MemoryProducer.send_offsets

    def late(self, positions, proof):  # type: ignore[no-untyped-def]
        group = self._log.group(proof.group)
        member = proof.member if proof.member in group.members else next(iter(group.members), proof.member)
        send(self, positions, Membership(proof.group, group.generation, member))

    patch.setattr(MemoryProducer, "send_offsets", late)


def restore_to_the_end_without_a_barrier(patch: pytest.MonkeyPatch) -> None:
    def restore(transport, *, engine, topic, partition, **_: object):  # type: ignore[no-untyped-def]
        state = PartitionState(arena=Arena(engine.dtype), groups=engine.new_groups())
        for record in transport.reader().read(TopicPartition(topic, partition), 0, 0.0, 10_000):
            restoring.fold(engine, state, restoring.changelog.decode(record.value, topic), topic)
            state.log_bytes += len(record.value)
        restoring.apply_deltas(engine, state)
        return state

    patch.setattr(working, "restore", restore)


def deletion_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    extend = Cleaner.extend

    def hasty(self, state, step):  # type: ignore[no-untyped-def]
        extend(self, state, step)
        head = self._heads[step.partition]
        if head.before:
            self._admin.delete_records(TopicPartition(self._topic, step.partition), head.before)

    patch.setattr(Cleaner, "extend", hasty)


def every_failure_is_void(patch: pytest.MonkeyPatch) -> None:
    settle = Worker._settle

    def careless(self, steps, error):  # type: ignore[no-untyped-def]
        settle(self, steps, error)
        return False

    patch.setattr(Worker, "_settle", careless)


def trust_in_the_positions_of_the_group(patch: pytest.MonkeyPatch) -> None:
    take_over = Worker._take_over

    def trusting(self, partition, state):  # type: ignore[no-untyped-def]
        state.committed, state.next_block = None, 0
        take_over(self, partition, state)

    patch.setattr(Worker, "_take_over", trusting)


def other_positions_mean_void(patch: pytest.MonkeyPatch) -> None:
    settle = Worker._settle

    def careless(self, steps, error):  # type: ignore[no-untyped-def]
        states = dict(self.states)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Worker, "_drop", lambda self, partition: None)
            counts = settle(self, steps, error)
        assert states.keys() == self.states.keys()
        return counts

    patch.setattr(Worker, "_settle", careless)


def deltas_of_a_table_that_is_gone(patch: pytest.MonkeyPatch) -> None:
    fold = restoring.fold

    def hasty(engine, state, block, where):  # type: ignore[no-untyped-def]
        fold(engine, state, block, where)
        restoring.apply_deltas(engine, state)

    patch.setattr(restoring, "fold", hasty)


MUTATIONS = [
    merge_before_the_commit,
    barrier_with_positions,
    positions_of_one_partition_only,
    no_way_back_after_an_abort,
    a_later_proof_of_membership,
    restore_to_the_end_without_a_barrier,
    deletion_before_the_commit,
    every_failure_is_void,
    trust_in_the_positions_of_the_group,
    other_positions_mean_void,
    deltas_of_a_table_that_is_gone,
]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_is_found(mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these would lose, double or mix up events; some seed shows it."""
    mutation(monkeypatch)
    for seed in range(MUTANT_SEEDS_MAX):
        if simulate(seed).problems:
            return
    raise AssertionError(f"{mutation.__name__} was not found in {MUTANT_SEEDS_MAX} seeds")
