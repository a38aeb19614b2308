"""From the configuration to parts that run: topics that would lose state are refused, weights and devices checked."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.forecaster import initial_weights
from stream import weights
from stream.assembly import (
    WeightsSwap,
    check_topics,
    make_decoder,
    make_learner,
    make_pipeline,
    make_worker,
    names_of,
    topic_problems,
    topic_specs,
)
from stream.config import Config
from stream.errors import ConfigError, Corrupt, Retryable
from stream.loading import load
from stream.memory import MemoryLog
from stream.transport import TopicSpec
from stream.workload import workload

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("network.item_rows=16", "network.interest_width=8")


class Silent:
    """Observes nothing, for worker and learner."""

    def turn(self, turn: object) -> None: ...
    def owned(self, partitions: object, users: int, restoring: int, lag_records: int) -> None: ...
    def learned(self, report: object, backlog_events: int) -> None: ...
    def published(self, version: int, bytes_sent: int, seconds: float) -> None: ...
    def event(self, name: str, **facts: object) -> None: ...


class SteppedClock:
    """A clock that moves a second with each look."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.fixture
def log() -> Iterator[MemoryLog]:
    """An empty log in memory."""
    made = MemoryLog()
    yield made
    made.close()


def settings(*sets: str) -> Config:
    """The defaults with `sets` over them."""
    return load(None, sets).config


def create(log: MemoryLog, config: Config, change: Callable[[TopicSpec], TopicSpec | None] = lambda spec: spec) -> None:
    """The application's topics, each as `change` makes it; None leaves it out."""
    admin = log.admin()
    admin.create([made for spec in topic_specs(config) if (made := change(spec)) is not None])
    admin.close()


def put(log: MemoryLog, kind: str, version: int, payload: bytes) -> None:
    """A committed snapshot in the weights topic."""
    producer = log.producer(transactional_id="test.learner")
    producer.begin()
    weights.send(producer, "weights", kind, version, payload)
    producer.commit()
    producer.close()


def weights_of(config: Config, version: int) -> bytes:
    """Weights as a learner would publish them."""
    return replace(initial_weights(config.network, config.app.seed), version=version).to_bytes()


# ---------------------------------------------------------------------------------------------------- topics


@pytest.mark.parametrize("sets", [(), ("topics.retention_h=-1",), ("topics.prefix=shop.", "topics.partitions=2")])
def test_topics_as_created_are_accepted(log: MemoryLog, sets: tuple[str, ...]) -> None:
    """What `topics create` makes passes the check at start, with outputs that are kept for ever too."""
    config = settings(*sets)
    create(log, config)
    assert topic_problems(log, config) == []
    check_topics(log, config)


def test_topics_that_hold_state_are_kept_for_ever(log: MemoryLog) -> None:
    """`state` and `weights` are never deleted by time or size and take a whole block; outputs follow retention_h."""
    specs = {s.name: s.settings for s in topic_specs(settings("topics.retention_h=2", "state.block_bytes_max=2000000"))}
    for name in ("state", "weights"):
        assert specs[name]["retention.ms"] == specs[name]["retention.bytes"] == "-1"
        assert specs[name]["cleanup.policy"] == "delete"
        assert int(specs[name]["max.message.bytes"]) > 2_000_000
    assert specs["events"]["retention.ms"] == specs["forecasts"]["retention.ms"] == "7200000"


def test_all_topics_have_roles_of_one_application() -> None:
    """Every stream that a commit writes has a topic that is made and checked."""
    config = settings("topics.prefix=shop.", 'topics.events=["clicks", "orders"]')
    names = names_of(config)
    made = {spec.name for spec in topic_specs(config)}
    assert {*names.events, names.state, names.weights, *names.outputs.values()} <= made
    assert names.events == ("clicks", "orders")
    assert names.outputs["dead_letters"] == "shop.dead-letters"


@pytest.mark.parametrize(
    ("topic", "change", "words"),
    [
        ("alerts", None, ("topic alerts is missing", "topics create")),
        ("events", {"partitions": 3}, ("topic events has 3 partitions", "topics.partitions is 4")),
        ("state", {"retention.ms": "604800000"}, ("topic state has retention.ms=604800000", "retention.ms=-1")),
        ("weights", {"retention.bytes": "1000000"}, ("topic weights has retention.bytes=1000000", "lose state")),
        ("state", {"cleanup.policy": "compact"}, ("cleanup.policy=compact", "set cleanup.policy=delete")),
        ("state", {"max.message.bytes": "10000"}, ("10000 bytes", "state.block_bytes_max")),
        ("weights", {"segment.bytes": "1073741824"}, ("segment.bytes=1073741824", "topics.segment_bytes")),
    ],
)
@pytest.mark.parametrize("retention", ["topics.retention_h=168", "topics.retention_h=-1"])
def test_a_topic_that_would_lose_state_is_refused(
    log: MemoryLog, topic: str, change: Mapping[str, Any] | None, words: tuple[str, ...], retention: str
) -> None:
    """One line names the topic, what is wrong and what to do; nothing else is complained of."""
    config = settings(retention)

    def changed(spec: TopicSpec) -> TopicSpec | None:
        if spec.name != topic:
            return spec
        if change is None:
            return None
        if "partitions" in change:
            return replace(spec, partitions=change["partitions"])
        return replace(spec, settings={**spec.settings, **change})

    create(log, config, changed)
    (problem,) = topic_problems(log, config)
    assert all(word in problem for word in words), problem
    with pytest.raises(ConfigError) as refused:
        check_topics(log, config)
    assert str(refused.value) == problem


def test_the_first_of_several_problems_says_how_many_more(log: MemoryLog) -> None:
    """One line at the start, and the command that lists the rest."""
    create(log, settings("topics.partitions=2"))
    config = settings()
    problems = topic_problems(log, config)
    assert len(problems) == len(topic_specs(config))
    with pytest.raises(ConfigError) as refused:
        check_topics(log, config)
    assert str(refused.value) == f"{problems[0]} ({len(problems) - 1} more: `driftline topics list`)"


# ---------------------------------------------------------------------------------------------------- weights


def test_newer_weights_are_taken_and_older_ones_are_not(log: MemoryLog) -> None:
    """The newest version in the topic is swapped in; a version below ours never is."""
    config = settings(*SMALL)
    create(log, config)
    pipeline = make_pipeline(config)
    swap = WeightsSwap(log, "weights", pipeline, config.network, SteppedClock())
    swap.swap()
    assert pipeline.weights_version == 0
    put(log, "weights", 4, weights_of(config, 4))
    put(log, "weights", 6, weights_of(config, 6))
    swap.swap(at_least=5)
    assert pipeline.weights_version == 6
    put(log, "weights", 3, weights_of(config, 3))
    swap.swap()
    assert pipeline.weights_version == 6
    swap.close()


def test_the_wait_for_a_version_ends(log: MemoryLog) -> None:
    """A version that never comes is worth another try later, not a wait without end; the message names both."""
    config = settings(*SMALL)
    create(log, config)
    clock = SteppedClock()
    swap = WeightsSwap(log, "weights", make_pipeline(config), config.network, clock)
    with pytest.raises(Retryable, match=r"weights version 2 .* newest is 0"):
        swap.swap(at_least=2)
    assert clock.now_s < config.embedded.lease_s, "a member that waits longer loses its partitions"
    swap.close()


def test_weights_that_cannot_be_loaded_stop_the_worker(log: MemoryLog) -> None:
    """Other bytes, and tensors that do not fit: Corrupt with topic and version; the old weights stay in use."""
    config = settings(*SMALL)
    create(log, config)
    whole = replace(initial_weights(config.network, 1), version=7)
    tensors = dict(whole.tensors)
    missing = replace(whole, tensors={n: t for n, t in tensors.items() if n != "vocabulary.popularity"})
    name = next(n for n, t in tensors.items() if n.startswith("network.") and t.ndim == 2)
    bent = replace(whole, tensors={**tensors, name: tensors[name][:, 1:]})
    for number, payload in enumerate([b"something else", missing.to_bytes(), bent.to_bytes()], start=1):
        pipeline = make_pipeline(config)
        swap = WeightsSwap(log, "weights", pipeline, config.network, SteppedClock())
        put(log, "weights", number, payload)
        with pytest.raises(Corrupt, match=f"weights version {number} in topic weights cannot be loaded"):
            swap.swap()
        assert pipeline.weights_version == 0
        swap.close()


def test_weights_of_another_network_are_said_aloud(log: MemoryLog, caplog: pytest.LogCaptureFixture) -> None:
    """A learner of other [network] settings never stops inference, but the log names it."""
    config = settings(*SMALL)
    create(log, config)
    pipeline = make_pipeline(config)
    swap = WeightsSwap(log, "weights", pipeline, config.network, SteppedClock())
    put(log, "weights", 1, weights_of(config, 1))
    with caplog.at_level(logging.WARNING):
        swap.swap()
    assert not caplog.records
    put(log, "weights", 2, weights_of(settings(*SMALL, "network.copy_width=16"), 2))
    with caplog.at_level(logging.WARNING):
        swap.swap()
    assert pipeline.weights_version == 2
    assert "weights_of_another_network version=2" in caplog.text
    swap.close()


# ---------------------------------------------------------------------------------------------------- parts


def test_assembly_does_not_load_the_network_on_import() -> None:
    """Commands that only look at topics import this module too."""
    code = "import stream.assembly, sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0


def test_worker_and_learner_join_the_log(log: MemoryLog) -> None:
    """Parts made from one configuration start on its topics, and run nothing before they are told to."""
    config = settings(*SMALL)
    create(log, config)
    worker = make_worker(config, log, Silent())
    learner = make_learner(config, log, Silent(), threading.Event())
    assert learner.model.version == 0
    worker.close()
    learner.close()


@pytest.mark.parametrize("kept", [False, True])
def test_a_gpu_that_is_not_there_is_a_mistake_in_the_settings(log: MemoryLog, kept: bool) -> None:
    """Asked for by name: exit 2 with the key, for a fresh learner and for one that is restored."""
    config = settings(*SMALL)
    create(log, config)
    if kept:
        learner = make_learner(config, log, Silent(), threading.Event())
        put(log, "learner", 1, learner.model.state_bytes())
        learner.close()
    with pytest.raises(ConfigError, match=r"learner\.device is 'cuda:63'.*set auto or cpu"):
        make_learner(settings(*SMALL, "learner.device=cuda:63"), log, Silent(), threading.Event())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the learner learns; "cuda" only where there is one."""
    name: str = request.param
    return name if name == "cpu" else request.getfixturevalue("cuda")


def test_weights_reach_a_worker_and_the_next_learner(log: MemoryLog, device: str) -> None:
    """What a learner publishes is taken by a pipeline on the CPU; a learner after it goes on from there."""
    by_hand = "learner.publish_interval_s=3600"  # however slow the machine is
    config = settings(*SMALL, f"learner.device={device}", "topics.partitions=1", by_hand)
    create(log, config)
    work = workload(2_000, users=50, interests=40)
    producer = log.producer(transactional_id="test.events")
    pipeline = make_pipeline(config)
    swap = WeightsSwap(log, "weights", pipeline, config.network, SteppedClock())
    steps = []
    for half in (slice(0, 1_000), slice(1_000, 2_000)):
        producer.begin()
        for key, value, ms in zip(work.keys()[half], work.values()[half], work.time_ms_E[half].tolist(), strict=True):
            producer.send("events", 0, key, value, ms)  # else they would be dated by this machine's clock: too late
        producer.flush()
        producer.commit()
        learner = make_learner(config, log, Silent(), threading.Event())
        before = learner.model.version
        while not learner.turn():  # the first turns may only be given the partition
            pass
        while learner.turn():
            pass
        learner.publish()
        swap.swap()
        assert pipeline.weights_version == learner.model.version == before + 1
        assert len(pipeline.forecaster.keys_V) > 10
        steps.append(learner.model._optimiser.steps)  # type: ignore[attr-defined]
        learner.close()
    assert steps == [1_000 // 64, 2_000 // 64]
    producer.close()
    swap.close()


def test_a_learner_does_not_go_on_with_other_settings(log: MemoryLog) -> None:
    """A state of another [network] is refused by topic and version, and so is one that is something else."""
    config = settings(*SMALL)
    create(log, config)
    learner = make_learner(config, log, Silent(), threading.Event())
    put(log, "learner", 3, learner.model.state_bytes())
    learner.close()
    again = make_learner(config, log, Silent(), threading.Event())
    again.close()
    with pytest.raises(ConfigError, match=r"topic weights, learner version 3: .*\[network\]"):
        make_learner(settings(*SMALL, "network.copy_width=16"), log, Silent(), threading.Event())
    put(log, "learner", 4, b"something else")
    with pytest.raises(ConfigError, match="learner version 4"):
        make_learner(config, log, Silent(), threading.Event())


def test_a_hash_key_is_used_whole_or_not_at_all() -> None:
    """Keys that differ only behind what the hash takes would give the same users: refused, without showing the key."""
    make_decoder(settings("state.hash_key=" + "k" * 64))
    with pytest.raises(ConfigError, match=r"state\.hash_key has 65 bytes") as refused:
        make_decoder(settings("state.hash_key=" + "k" * 65))
    assert "kkk" not in str(refused.value)
