"""From the configuration to parts that run: a worker, a learner, the topics. Only cli.py chooses the log.

The network is imported inside of the functions: a worker takes seconds to load it, `--help` must not.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from stream.checkpoint import TopicNames
from stream.config import Config, topic_names
from stream.errors import ConfigError, Corrupt, Retryable
from stream.events import EventDecoder
from stream.eviction import Bounds
from stream.saved_weights import Initial, check_kind, load_initial
from stream.start import EARLIEST, Start
from stream.transport import Admin, LogReader, TopicPartition, TopicSpec, Transport
from stream.weights import WeightsFeed
from stream.worker import Observer, Worker, WorkerParts

if TYPE_CHECKING:
    from models.settings import NetworkSettings
    from stream.learning import LearnerLoop, LearnerObserver
    from stream.pipeline import Pipeline, PipelineSettings

log = logging.getLogger(__name__)

WEIGHTS_CHECK_S = 0.5
WEIGHTS_WAIT_S = 5.0  # the worker does not poll meanwhile: stay well below a lease; it tries again, bounded
OUTPUTS = ("forecasts", "alerts", "verdicts", "warnings", "dead_letters", "metrics")
HASH_KEY_BYTES_MAX = 64  # of the keyed hash, blake2b
POSITIONS_KEPT_MS = 30 * 24 * 3_600_000  # of a rekey; later, those of its group will do
MESSAGE_BYTES_MIN = 1_048_588  # Kafka's default; a block or a chunk of weights must fit


def names_of(config: Config) -> TopicNames:
    """The application's topics by role."""
    names = topic_names(config)
    return TopicNames(
        events=tuple(config.topics.events),
        state=names["state"],
        weights=names["weights"],
        outputs={stream: names[stream] for stream in OUTPUTS},
        control=names["control"],
    )


def topic_specs(config: Config) -> list[TopicSpec]:
    """Every topic with the settings that it needs."""
    topics, names = config.topics, topic_names(config)
    retention_ms = "-1" if topics.retention_h < 0 else str(int(topics.retention_h * 3_600_000))
    kept = {"cleanup.policy": "delete", "retention.ms": retention_ms}
    block_bytes = max(MESSAGE_BYTES_MIN, config.state.block_bytes_max + 100_000)
    internal = {
        "cleanup.policy": "delete",
        "retention.ms": "-1",
        "retention.bytes": "-1",
        "max.message.bytes": str(block_bytes),
        "segment.bytes": str(topics.segment_bytes),
    }
    plain = [*topics.events, *(names[role] for role in (*OUTPUTS, "labels", "control"))]
    return [TopicSpec(name=name, partitions=topics.partitions, settings=kept) for name in plain] + [
        TopicSpec(name=names[role], partitions=topics.partitions, settings=internal) for role in ("state", "weights")
    ]


def check_topics(transport: Transport, config: Config) -> None:
    """Refuse to start on topics that would lose state or cannot be joined. Raises ConfigError for the first problem."""
    problems = topic_problems(transport, config)
    if problems:
        more = f" ({len(problems) - 1} more: `driftline topics list`)" if problems[1:] else ""
        raise ConfigError(problems[0] + more)


def topic_problems(transport: Transport, config: Config) -> list[str]:
    """Everything that is wrong with the topics as they are, each with what to do."""
    admin = transport.admin()
    try:
        found = admin.describe([spec.name for spec in topic_specs(config)])
    finally:
        admin.close()
    problems = []
    for wanted in topic_specs(config):
        there = found.get(wanted.name)
        if there is None:
            problems.append(f"topic {wanted.name} is missing; `driftline topics create` makes it")
            continue
        if there.partitions != wanted.partitions:
            problems.append(
                f"topic {wanted.name} has {there.partitions} partitions, topics.partitions is {wanted.partitions}; all "
                "topics of an application need the same number: set it to what the input topic has"
            )
        if "max.message.bytes" in wanted.settings:
            problems += _internal_problems(wanted, there)
    return problems


def check_rights(transport: Transport, topic: str, reads: Sequence[str]) -> None:
    """Whether we may delete records of one of our own topics, and read these: some of them may be empty for long.

    Asks to delete what is deleted already.

    Raises:
        ConfigError: we may not; without the former the topic would grow without bound.
    """
    admin, reader = transport.admin(), transport.reader()
    try:
        hidden = [name for name, spec in admin.describe(reads).items() if spec is not None and not spec.readable]
        if hidden:
            raise ConfigError(f"no right to read topic {hidden[0]!r}; grant Read on it (docs/security.md)")
        _check_deletes(admin, reader, TopicPartition(topic, 0))
    finally:
        reader.close()
        admin.close()


def _check_deletes(admin: Admin, reader: LogReader, place: TopicPartition) -> None:
    first, _ = reader.bounds(place)
    try:
        admin.delete_records(place, first)
    except ConfigError as error:
        raise ConfigError(
            f"topic {place.topic} cannot be kept short: {error}; grant Delete on it (DeleteRecords)"
        ) from error


def prepare_rekey(transport: Transport, config: Config, source: str, target: str) -> str:
    """Check what `driftline rekey` writes to; on the embedded log missing topics are made.

    Returns:
        The topic that says how far the source was moved; it is made where it is missing.

    Raises:
        ConfigError: the target is an input topic of the application and has another number of partitions; no right to
            make a topic.
    """
    positions = f"{target}-rekey-positions"
    admin = transport.admin()
    try:
        if config.transport == "embedded":
            settings = topic_specs(config)[0].settings
            specs = [
                TopicSpec(name=n, partitions=config.topics.partitions, settings=settings) for n in (source, target)
            ]
            admin.create([*topic_specs(config), *specs])
        there = admin.describe([source, target, positions])
        if (moved := there[source]) is not None and there[positions] is None:  # Rekey says which topics are missing
            kept = {"cleanup.policy": "delete", "retention.ms": str(POSITIONS_KEPT_MS)}
            admin.create([TopicSpec(name=positions, partitions=moved.partitions, settings=kept)])
    finally:
        admin.close()
    found = there[target]
    if found is not None and target in config.topics.events and found.partitions != config.topics.partitions:
        raise ConfigError(
            f"topic {target} has {found.partitions} partitions, topics.partitions is {config.topics.partitions}; all "
            "topics of an application need the same number"
        )
    return positions


def _internal_problems(wanted: TopicSpec, there: TopicSpec) -> list[str]:
    """What is wrong with a topic that holds state."""
    problems = []
    for key in ("cleanup.policy", "retention.ms", "retention.bytes"):
        value = there.settings.get(key, wanted.settings[key])
        if value != wanted.settings[key]:
            problems.append(
                f"topic {wanted.name} has {key}={value} and would lose state; set {key}={wanted.settings[key]}"
            )
    room = int(there.settings.get("max.message.bytes", wanted.settings["max.message.bytes"]))
    if room < int(wanted.settings["max.message.bytes"]):
        problems.append(
            f"topic {wanted.name} takes messages of {room} bytes at most; set max.message.bytes="
            f"{wanted.settings['max.message.bytes']}, or lower state.block_bytes_max"
        )
    segment = int(there.settings.get("segment.bytes", wanted.settings["segment.bytes"]))
    if segment > int(wanted.settings["segment.bytes"]):
        problems.append(
            f"topic {wanted.name} has segment.bytes={segment}: what is deleted from its head stays on disk until so "
            f"much lies behind it; set segment.bytes={wanted.settings['segment.bytes']}, or raise topics.segment_bytes"
        )
    return problems


def make_decoder(config: Config) -> EventDecoder:
    """The decoder of worker and learner: both must see the same events and the same user keys."""
    hash_key = config.state.hash_key.reveal().encode()
    if len(hash_key) > HASH_KEY_BYTES_MAX:
        raise ConfigError(
            f"state.hash_key has {len(hash_key)} bytes, the hash takes {HASH_KEY_BYTES_MAX} at most; shorten it"
        )
    return EventDecoder(config.events, hash_key)


def pipeline_settings(config: Config, quality_share: float | None = None) -> PipelineSettings:
    """The pipeline's part of the configuration; `quality_share` in place of the configured one."""
    from models.profile import user_dtype_of
    from stream.pipeline import PipelineSettings

    shift = config.shift
    return PipelineSettings(
        events=config.events,
        shift=msgspec.structs.replace(shift, alerts_per_day=shift.alerts_per_day / config.topics.partitions),
        emission=config.forecast.emission,
        steps=config.forecast.steps,
        top_k=config.forecast.top_k,
        purchase_events=config.learning.horizon_steps,
        quality_share=config.worker.quality_share if quality_share is None else quality_share,
        epoch_records=config.worker.epoch_events,
        topics=tuple(config.topics.events),
        daily_budget=config.alerts.daily_budget,
        partitions=config.topics.partitions,
        bounds=Bounds(
            ttl_ms=int(config.state.ttl_h * 3_600_000),
            users_max=-(-config.state.bytes_max // user_dtype_of(shift.profile_interests).itemsize),
        ),
        control=topic_names(config)["control"],
    )


def make_pipeline(config: Config, initial: Initial | None = None) -> Pipeline:
    """The pipeline with version 0 of the weights: made from the seed, or pretrained."""
    from models.forecaster import Forecaster
    from stream.pipeline import Pipeline

    if initial is None:
        forecaster = Forecaster.initial(config.network, config.app.seed)
    else:
        from models.tuning import to_weights

        with _fitting(initial):
            forecaster = Forecaster.from_weights(to_weights(initial.learner, initial.files))
    return Pipeline(pipeline_settings(config), make_decoder(config), forecaster)


def initial_weights(config: Config) -> Initial | None:
    """The pretrained weights that learner.initial_weights names, checked.

    Raises:
        ConfigError: they are not there, or of another network or other interests.
    """
    if not config.learner.initial_weights:
        return None
    initial = load_initial(Path(config.learner.initial_weights), config.network, key="learner.initial_weights")
    check_kind(initial, config, key="learner.initial_weights")
    return initial


@contextmanager
def _fitting(initial: Initial) -> Iterator[None]:
    """Parts of a checkpoint that do not fit together are a mistake in the settings, not a crash."""
    try:
        yield
    except (ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"learner.initial_weights {initial.path}: its parts do not fit together: {_first_line(error)}"
        ) from error


class WeightsSwap:
    """Puts newer weights into the pipeline as they appear in the topic. See WeightsSource."""

    def __init__(
        self,
        transport: Transport,
        topic: str,
        pipeline: Pipeline,
        network: NetworkSettings,
        clock: Callable[[], float],
    ) -> None:
        self._feed = WeightsFeed(transport.reader(), topic)
        self._network = network
        self._topic = topic
        self._pipeline = pipeline
        self._clock = clock
        self._next_check_s = clock()

    def swap(self, at_least: int = 0) -> None:
        """Between transactions only. Waits, bounded, while the log has not brought version `at_least` yet.

        Raises:
            Retryable: it did not come in time.
            Corrupt: what the topic holds cannot be loaded.
        """
        if at_least <= self._pipeline.weights_version and self._clock() < self._next_check_s:
            return
        self._next_check_s = self._clock() + WEIGHTS_CHECK_S
        self._load(0.0)
        deadline_s = self._clock() + WEIGHTS_WAIT_S
        while self._pipeline.weights_version < at_least:
            if self._clock() > deadline_s:
                raise Retryable(
                    f"weights version {at_least} wrote this partition's state and is not in topic {self._topic}, "
                    f"whose newest is {self._pipeline.weights_version}"
                )
            self._load(0.2)

    def _load(self, timeout_s: float) -> None:
        from models.forecaster import Forecaster
        from models.snapshot import Weights

        newest = self._feed.latest(timeout_s).get("weights")
        if newest is None or newest.version <= self._pipeline.weights_version:
            return
        try:
            weights = Weights.from_bytes(newest.payload)
            forecaster = Forecaster.from_weights(weights)
        except (ValueError, KeyError, RuntimeError) as error:  # their checksum held: written by another program version
            raise Corrupt(
                f"weights version {newest.version} in topic {self._topic} cannot be loaded: {_first_line(error)}; run "
                "worker and learner of one program version, or start under a new app.name and new topics"
            ) from error
        if weights.settings != self._network:  # they work: weights carry their own shape
            log.warning("event=weights_of_another_network version=%d advice=give_all_one_[network]", newest.version)
        self._pipeline.forecaster = forecaster
        log.info("event=weights_swapped version=%d bytes=%d", newest.version, len(newest.payload))

    def close(self) -> None:
        self._feed.close()


def make_worker(config: Config, transport: Transport, observer: Observer, *, start: Start = EARLIEST) -> Worker:
    """A worker on an open log; its topics have been checked.

    Raises:
        ConfigError: the pretrained weights that it shall start from do not fit.
    """
    pipeline = make_pipeline(config, initial_weights(config))
    names = names_of(config)
    return Worker(
        WorkerParts(
            transport=transport,
            engine=pipeline,
            weights=WeightsSwap(transport, names.weights, pipeline, config.network, time.monotonic),
            observer=observer,
            topics=names,
            app=config.app.name,
            partitions=config.topics.partitions,
            settings=config.worker,
            block_bytes_max=config.state.block_bytes_max,
            cleaning_factor=config.state.cleaning_factor,
            clock=time.monotonic,
            sleep=time.sleep,
            nonce=lambda: os.urandom(16),
            start=start,
        )
    )


def make_learner(
    config: Config, transport: Transport, observer: LearnerObserver, stop: threading.Event, *, start: Start = EARLIEST
) -> LearnerLoop:
    """A learner on an open log; its topics have been checked.

    Raises:
        ConfigError: the device is not there, the learner's state in the topic was made with other settings, or the
            pretrained weights that it shall start from do not fit.
    """
    from models.learner import Learner
    from stream.learning import LearnerLoop, LearnerPace
    from stream.orders import Erasures

    process, names = config.learner, names_of(config)
    initial = initial_weights(config)

    def fresh() -> Any:
        with _device_asked(process.device):
            if initial is not None:
                from models.tuning import to_state

                state = to_state(initial.learner, initial.files)
                with _fitting(initial):
                    return Learner.restore(state, config.network, config.learning, device=process.device)
            return Learner(config.network, config.learning, seed=config.app.seed, device=process.device)

    def restored(payload: bytes, version: int) -> Any:
        with _device_asked(process.device):
            try:
                return Learner.restore(payload, config.network, config.learning, device=process.device)
            except ValueError as error:  # the snapshot's checksum held
                raise ConfigError(f"topic {names.weights}, learner version {version}: {error}") from error

    return LearnerLoop(
        transport=transport,
        topics=names,
        app=config.app.name,
        pace=LearnerPace(
            publish_interval_s=process.publish_interval_s,
            steps_per_turn_max=process.steps_per_turn_max,
            cpu_share=process.cpu_share,
            rebuild_events=process.rebuild_events,
            keep_versions=process.keep_versions,
            batch_events_max=process.batch_events_max,
            poll_timeout_s=config.worker.poll_timeout_s,
            retries_max=config.worker.retries_max,
            backoff_s=config.worker.backoff_s,
        ),
        decoder=make_decoder(config),
        fresh=fresh,
        restore=restored,
        observer=observer,
        clock=time.monotonic,
        sleep=stop.wait,
        nonce=lambda: os.urandom(16).hex(),
        start=start,
        erasures=Erasures(transport.reader(), names.control, config.topics.partitions),
        publish_fresh=initial is not None,
    )


@contextmanager
def _device_asked(device: str) -> Iterator[None]:
    """A GPU that was asked for by name and cannot be used is a mistake in the settings, not a crash."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # the latter from a build of torch without CUDA
        if not device.startswith("cuda"):
            raise
        raise ConfigError(
            f"learner.device is {device!r}, which cannot be used: {_first_line(error)}; set auto or cpu"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
