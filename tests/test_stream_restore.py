"""Restores from logs that have seen things: aborted transactions, a head that goes away, damage, another format."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pipelines
import pytest
from digest_app import check_arena, create_topics, make_worker, topic_names, verdict_of

import models.shift_groups
from stream import changelog, restore
from stream.changelog import Kind
from stream.engine import PartitionState
from stream.errors import ConfigError, Corrupt
from stream.progress import Progress
from stream.state import Arena
from stream.testing import digest_event, read_all
from stream.transport import Record, TopicPartition, Transport
from stream.worker import Worker

PARTITIONS = 2
EVENTS = 200
DONE_WITHIN_S = 40.0


class App:
    """One application on a log, its workers one after the other."""

    def __init__(self, log: Transport) -> None:
        self.log = log
        self.tag = uuid.uuid4().hex[:8]
        self.names = topic_names(f"{self.tag}-")
        self.worker: Worker | None = None
        create_topics(log, self.names, PARTITIONS)

    def feed(self, first: int = 0) -> None:
        for p in range(PARTITIONS):
            events = (digest_event(f"u{p}-{n % 13}", n) for n in range(first, first + EVENTS))
            self.log.append(self.names.events[0], p, events)

    def start(self, **given: Any) -> Worker:
        self.worker = make_worker(self.log, self.names, partitions=PARTITIONS, app=self.tag, **given)
        return self.worker

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.close()
        self.worker = None

    def work(self, count: int, **given: Any) -> Worker:
        """A worker that has handled `count` events a partition."""
        worker = self.start(**given)
        until(worker, lambda: [s.seen for s in worker.states.values()] == [count] * PARTITIONS)
        return worker

    def state(self, partition: int = 0) -> list[Record]:
        reader = self.log.reader()
        try:
            found: list[Record] = []
            wait_s = 1.0 if self.log.name == "kafka" else 0.0
            tp = TopicPartition(self.names.state, partition)
            while records := reader.read(tp, found[-1].offset + 1 if found else 0, wait_s):
                found += records
            return found
        finally:
            reader.close()

    def check(self, worker: Worker, inputs: int) -> None:
        """The oracle's verdict, and the arena against the inputs (I1 to I4)."""
        verdict, records = verdict_of(self.log, self.names, PARTITIONS)
        assert verdict.problems == [] and verdict.outputs == inputs
        assert check_arena(worker, records) == []


def until(worker: Worker, done: Callable[[], bool]) -> None:
    until_s = time.monotonic() + DONE_WITHIN_S
    while not done():
        worker.turn()
        assert time.monotonic() < until_s, "it did not come to that"


@pytest.fixture
def app(transport: Transport) -> Iterator[App]:
    app = App(transport)
    yield app
    app.stop()


def false_block(state: Any, number: int) -> bytes:
    """A sound block that says something else of every user of the arena."""
    records = state.arena.all().copy()
    records["digest"] += np.uint64(1)
    records["seq"] += 1_000
    (block,) = changelog.pack(Kind.USERS, 0, number, records, 1_000_000)
    return block


def test_aborted_and_open_transactions_are_not_folded(app: App) -> None:
    """The log ends in aborted blocks of other ids, and in an open one of a dead worker of this slot: none counts."""
    app.feed()
    worker = app.work(EVENTS)
    blocks = {p: false_block(state, state.next_block) for p, state in worker.states.items()}
    app.stop()
    for n in range(4):
        producer = app.log.producer(transactional_id=f"{app.tag}.{n // 2}")
        producer.begin()
        for p, block in blocks.items():
            producer.send(app.names.state, p, None, block)
        producer.flush()
        if n < 3:
            producer.abort()
            producer.close()  # the last one dies
    app.feed(EVENTS)
    worker = app.work(2 * EVENTS, settings={"slot": "1"})
    producer.close()
    app.check(worker, 2 * PARTITIONS * EVENTS)


def test_a_head_that_is_deleted_under_a_restore(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zombie's deletion comes late, in the middle of its heir's restore: what it deletes lies further on as well."""
    app.feed()
    worker = app.start(settings={"batch_events_max": 10})
    owed: dict[TopicPartition, int] = {}
    monkeypatch.setattr(worker._cleaner._admin, "delete_records", lambda tp, before: owed.update({tp: before}))
    until(worker, lambda: [s.seen for s in worker.states.values()] == [EVENTS] * PARTITIONS)
    app.stop()
    before = [len(app.state(p)) for p in range(PARTITIONS)]
    bitten: list[int] = []
    fold = restore.fold

    def bite(engine: Any, state: Any, block: Any, where: str) -> None:
        tp = TopicPartition(app.names.state, block.partition)
        if tp in owed:
            admin = app.log.admin()
            admin.delete_records(tp, owed.pop(tp))
            admin.close()
            bitten.append(block.partition)
        fold(engine, state, block, where)

    monkeypatch.setattr(restore, "_READ_RECORDS", 3)
    monkeypatch.setattr(restore, "fold", bite)
    heir = app.start()
    until(heir, lambda: len(heir.states) == PARTITIONS)
    assert sorted(bitten) == [*range(PARTITIONS)], "nothing was deleted under a restore"
    assert all(len(app.state(p)) < before[p] for p in range(PARTITIONS))
    app.check(heir, PARTITIONS * EVENTS)


def test_a_damaged_block_stops_the_restore(app: App) -> None:
    """One flipped byte: the block is named, the worker stops, and no output, position or state follows."""
    app.feed()
    app.work(EVENTS)
    app.stop()
    whole = next(r.value for r in app.state(1) if r.value is not None and len(r.value) > 60)
    app.log.append(app.names.state, 1, [(None, whole[:50] + bytes([whole[50] ^ 4]) + whole[51:], 1)])
    place = app.state(1)[-1].offset
    app.feed(EVENTS)
    worker = app.start()
    with pytest.raises(Corrupt, match=rf"{app.tag}-state-1@{place}: .*checksum") as caught:
        until(worker, lambda: 1 in worker.states)
    assert "\n" not in str(caught.value)
    app.stop()
    left = [changelog.decode(r.value or b"", "") for r in app.state(1) if r.offset > place]
    assert {block.kind for block in left} <= {Kind.BARRIER}
    reader = app.log.reader()
    answered = list(read_all(reader, app.names.outputs["forecasts"], PARTITIONS))
    reader.close()
    assert sum(r.partition == 1 for r in answered) == EVENTS


# ── other formats ─────────────────────────────────────────────────────────────────────────────────────────────────────


def group_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[changelog.Block]:
    """A table of a later format, and a delta that is none."""
    with monkeypatch.context() as later:
        later.setattr(models.shift_groups, "_FORMAT", 99)
        snapshot = pipelines.make().new_groups().snapshot()
    yield changelog.decode(changelog.encode(Kind.GROUPS, 0, 1, snapshot), "here")
    yield changelog.decode(changelog.encode(Kind.GROUP_DELTA, 0, 1, b"\x81\xa1x\x01"), "here")


def test_group_tables_of_another_format_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the format or what is missing, and what to do; not a traceback."""
    pipeline = pipelines.make()
    for block in group_blocks(monkeypatch):
        state = PartitionState(arena=Arena(pipeline.dtype), groups=pipeline.new_groups())
        with pytest.raises(Corrupt, match=r"state-0@7: .*(format 99|expected|Expected).*app\.name") as caught:
            restore.fold(pipeline, state, block, "state-0@7")
            restore.apply_deltas(pipeline, state)
        assert "\n" not in str(caught.value)


def test_positions_of_another_program_are_refused(app: App) -> None:
    """Metadata that is not ours: another consumer uses the group. A field more, of a later version, does no harm."""
    app.feed()
    worker = app.work(EVENTS)
    metadata = worker._checkpoint.positions([worker._idle_step(0)]).popitem()[1].metadata
    assert Progress.load(metadata[:-1] + ', "later": 1}', "here") == Progress.load(metadata, "here")
    with pytest.raises(ConfigError, match=r"events-0: .*not committed by driftline.*app\.name"):
        Progress.load('{"offset": 7}', "events-0")
