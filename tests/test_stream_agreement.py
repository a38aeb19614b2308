"""Offline and online agree: what `driftline evaluate` says of a file is what a run on a real log scores live."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest

from stream.assembly import check_topics, make_decoder, make_learner, make_worker, names_of, topic_specs
from stream.config import Config
from stream.evaluation import Delay, Wanted, evaluate, read_stream
from stream.loading import load
from stream.partition import partition_of
from stream.simulate import ShopSettings, simulate
from stream.transport import LogRecord, TopicPartition, Transport, close_all

EVENTS, ROUND = 3_000, 128
PARTITIONS = 2
DONE_WITHIN_S = 120.0


class Silent:
    """Observes worker and learner and keeps nothing."""

    def turn(self, turn: Any) -> None: ...
    def event(self, name: str, **facts: object) -> None: ...
    def owned(self, *facts: object) -> None: ...
    def learned(self, *facts: object) -> None: ...
    def published(self, *facts: object) -> None: ...


def until(count: Callable[[], int], end: int, turn: Callable[[], object]) -> None:
    """Turn until so much is done, within bounds; a turn may be over at once, as while a group is still forming."""
    give_up = time.monotonic() + DONE_WITHIN_S
    while (done := count()) != end:
        assert time.monotonic() < give_up, f"{done} of {end} were done"
        turn()


def settings(partitions: int) -> Config:
    prefix = f"a{uuid.uuid4().hex[:8]}-"
    return load(
        None,
        [
            f"topics.prefix={prefix}",
            f'topics.events=["{prefix}events"]',
            f"topics.partitions={partitions}",
            "topics.retention_h=-1",  # generated events are old: Kafka would delete them before the learner comes
            f"app.name={prefix}app",
            "app.seed=0",
            "worker.quality_share=1.0",
            "learner.publish_interval_s=0.001",
            "learner.steps_per_turn_max=1000",
            "learner.device=cpu",
        ],
    ).config


def test_a_replay_scores_what_the_evaluation_says(transport: Transport) -> None:
    """MRR and HR@10 of worker and learner on a log, weights through the topic every 128 events: as evaluated so.

    The learner meets the partitions' events in another order, so the weights are not the same ones; the figures are,
    within .015 for about 2,850 scored events (standard error of either MRR about .008).
    """
    config = settings(PARTITIONS)
    made = islice(simulate(ShopSettings(users=150, events=EVENTS, seed=3)).records(), EVENTS)
    decoder = make_decoder(config)  # a generated stream holds spoiled records too
    sent = [LogRecord("events", 0, n, ms, key, value) for n, (key, value, ms) in enumerate(made)]
    records = [(r.key, r.value, r.timestamp) for r in decoder.decode(sent).records]
    admin = transport.admin()
    admin.create(topic_specs(config))
    admin.close()
    check_topics(transport, config)
    live = replayed(transport, config, records)
    told = [{**json.loads(v or b""), "user": (k or b"").decode(), "time": ms} for k, v, ms in records]
    stream = read_stream(told, config)
    wanted = Wanted(models=("driftline",), report_from=0.0, horizon=1, delay=Delay(events=ROUND))
    ours = evaluate(stream, config, wanted, lambda *_: None)[0].judged.rank_EN[:, 0]
    seen, known_E = set[int](), np.zeros(len(stream), np.bool_)
    for e, user in enumerate(stream.user_E.tolist()):
        known_E[e] = user in seen
        seen.add(user)
    ours = ours[known_E]
    mrr, hits = float((1 / ours[ours > 0]).sum() / len(ours)), float(((ours > 0) & (ours <= 10)).mean())
    assert live["scored"] == len(ours)
    assert live["mrr"] == pytest.approx(mrr, abs=0.015)
    assert live["hits"] == pytest.approx(hits, abs=0.015)
    assert live["versions"] > 3 and mrr > 0.1


def replayed(transport: Transport, config: Config, records: list[Any]) -> dict[str, float]:
    """A run over the records, in rounds: the worker handles one, then the learner learns it and sends its weights."""
    names = names_of(config)
    silent: Any = Silent()
    worker = make_worker(config, transport, silent)
    learner = make_learner(config, transport, silent, threading.Event())
    readers = [transport.reader() for _ in range(PARTITIONS)]  # each keeps its place, and its fetches
    clockwork = worker._parts.weights
    sums, offsets = {"records": 0, "scored": 0, "reciprocal_ranks": 0.0, "hits_10": 0}, [0] * PARTITIONS

    def handled() -> int:
        for p in range(PARTITIONS):
            for record in readers[p].read(TopicPartition(names.outputs["metrics"], p), offsets[p], 0.0):
                offsets[p] = record.offset + 1
                found = json.loads(record.value or b"{}")
                for key in sums:
                    sums[key] += found[key]
        return int(sums["records"])

    def learned() -> int:
        return sum(learner._positions.values())

    try:
        for start in range(0, len(records), ROUND):
            part = records[start : start + ROUND]
            end = start + len(part)
            for p in range(PARTITIONS):
                mine = [r for r in part if partition_of(r[0], PARTITIONS) == p]
                transport.append(names.events[0], p, mine)
            until(handled, end, worker.turn)
            until(learned, end, learner.turn)
            learner.turn()
            clockwork.swap(at_least=learner.model.version)
        version = learner.model.version
    finally:
        close_all(*readers, worker, learner)
    return {
        "scored": sums["scored"],
        "mrr": sums["reciprocal_ranks"] / sums["scored"],
        "hits": sums["hits_10"] / sums["scored"],
        "versions": version,
    }
