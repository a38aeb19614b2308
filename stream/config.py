"""The settings: one frozen tree of everything that can be set, each key with its meaning and unit in its type.

Stands before the way of an event: the command line loads the tree once (loading.py) and hands its parts to what it
assembles. config.toml and docs/configuration.md are generated from here (reference.py).

Secrets: any setting of `[kafka]` and `state.hash_key` may be written as `env:NAME` or `file:PATH`. What comes from
there, and any key that looks like a password, is held as a `Secret`, whose text is never its value.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from models.profile import EmissionSettings
from models.ranking import AlertSettings
from models.settings import LearningSettings, NetworkSettings
from models.shift import ShiftSettings
from stream.errors import ConfigError
from stream.events import EventSettings

HIDDEN = "(hidden)"
SECRET_NAME = re.compile(r"password|passwd|passphrase|secret|token|credential|hash_key|jaas", re.IGNORECASE)
SECRET_BYTES_MAX = 65_536
NAME_PATTERN = r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,99}$"


class Secret:
    """A value that is used but never shown: written out, or as `env:NAME` or `file:PATH`."""

    __slots__ = ("_written",)

    def __init__(self, written: str) -> None:
        self._written = written

    def reveal(self) -> str:
        """The value itself.

        Raises:
            ConfigError: the variable or file that it names is not there.
        """
        kind, _, name = self._written.partition(":")
        if kind == "env":
            value = os.environ.get(name)
            if not value:
                raise ConfigError(f"a setting asks for the environment variable {name}, which is not set; set it")
            return value
        if kind == "file":
            try:
                with Path(name).open("rb") as stream:
                    return stream.read(SECRET_BYTES_MAX).decode().rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"a setting asks for the file {name}, which cannot be read: {error}") from None
        return self._written

    def __repr__(self) -> str:
        return self._written if is_reference(self._written) else HIDDEN

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._written == self._written

    def __hash__(self) -> int:
        return hash(self._written)


def is_reference(value: object) -> bool:
    """Whether a setting names a secret's place rather than a value."""
    return isinstance(value, str) and value.startswith(("env:", "file:"))


class AppSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The application as a whole."""

    name: Annotated[str, Meta(description="prefix of consumer groups and transactional ids", pattern=NAME_PATTERN)] = (
        "driftline"
    )
    seed: Annotated[
        int, Meta(description="seed of everything random: version 0 of the weights, samples, replay", ge=0)
    ] = 7
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="debug, info, warning or error")
    ] = "info"
    log_file: Annotated[str, Meta(description='file that the log is appended to; "" = standard error')] = ""


class EmbeddedSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The embedded log: one SQLite file. Used with transport = "embedded"."""

    path: Annotated[str, Meta(description="the file; relative to the working directory", min_length=1)] = (
        "var/driftline.db"
    )
    lease_s: Annotated[
        float, Meta(description="a process that is silent for longer loses its partitions, seconds", ge=1, le=3_600)
    ] = 30.0
    lock_timeout_s: Annotated[
        float, Meta(description="longest wait for another process to finish its write, seconds", ge=0.1, le=300)
    ] = 10.0


class TopicSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names and settings of the topics. All topics of one application have the same number of partitions."""

    events: Annotated[
        list[Annotated[str, Meta(pattern=NAME_PATTERN)]],
        Meta(description="input topics, keyed by user, co-partitioned", min_length=1),
    ] = msgspec.field(default_factory=lambda: ["events"])
    forecasts: Annotated[str, Meta(description="forecasts of the next interests", pattern=NAME_PATTERN)] = "forecasts"
    alerts: Annotated[str, Meta(description="interest-shift alerts", pattern=NAME_PATTERN)] = "alerts"
    verdicts: Annotated[
        str, Meta(description="whether users' next events confirm the alerts on them", pattern=NAME_PATTERN)
    ] = "verdicts"
    warnings: Annotated[str, Meta(description="risk warnings", pattern=NAME_PATTERN)] = "warnings"
    dead_letters: Annotated[str, Meta(description="records that cannot be used", pattern=NAME_PATTERN)] = "dead-letters"
    metrics: Annotated[str, Meta(description="counts and quality of each transaction", pattern=NAME_PATTERN)] = (
        "metrics"
    )
    control: Annotated[str, Meta(description="orders to the workers: erasures of users", pattern=NAME_PATTERN)] = (
        "control"
    )
    labels: Annotated[str, Meta(description="verdicts on warnings and alerts", pattern=NAME_PATTERN)] = "labels"
    state: Annotated[str, Meta(description="users' states in packed blocks; internal", pattern=NAME_PATTERN)] = "state"
    weights: Annotated[str, Meta(description="versions of the network's weights; internal", pattern=NAME_PATTERN)] = (
        "weights"
    )
    prefix: Annotated[
        str, Meta(description="put before every topic name but those of `events`", pattern=r"^[a-zA-Z0-9._-]{0,60}$")
    ] = ""
    partitions: Annotated[int, Meta(description="partitions of every topic", ge=1, le=10_000)] = 4
    retention_h: Annotated[
        float, Meta(description="how long records of the input and output topics are kept, hours; -1 = for ever", ge=-1)
    ] = 168.0
    segment_bytes: Annotated[
        int, Meta(description="segment size of `state` and `weights`, bytes", ge=1_048_576, le=2_147_483_647)
    ] = 134_217_728


class WorkerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The loop that reads events and publishes."""

    slot: Annotated[
        str,
        Meta(
            description="this worker's own name; a second worker of the same slot fences the first",
            pattern=NAME_PATTERN,
        ),
    ] = "0"
    batch_events_max: Annotated[int, Meta(description="events in one transaction, at most", ge=1, le=1_000_000)] = (
        16_384
    )
    batch_bytes_max: Annotated[
        int, Meta(description="bytes of input records held in memory, at most", ge=1_048_576)
    ] = 67_108_864
    batch_wait_s: Annotated[float, Meta(description="longest wait for a batch to fill, seconds", ge=0, le=5)] = 0.02
    poll_timeout_s: Annotated[
        float, Meta(description="longest wait of one poll without records, seconds", gt=0, le=5)
    ] = 0.25
    transaction_timeout_s: Annotated[
        float, Meta(description="the broker aborts a transaction that is open for longer, seconds", ge=2, le=900)
    ] = 12.0
    epoch_events: Annotated[
        int,
        Meta(
            description="what crosses users is frozen for this many offsets of a partition; batches are cut there", ge=1
        ),
    ] = 65_536
    quality_share: Annotated[
        float, Meta(description="share of users whose forecasts are scored live, 0..1", ge=0, le=1)
    ] = 0.05
    poison_share_max: Annotated[
        float,
        Meta(
            description="stop when more than this share of the last `poison_window` records are dead letters, 0..1",
            gt=0,
            le=1,
        ),
    ] = 0.5
    poison_window: Annotated[int, Meta(description="records over which the poison share is judged", ge=10)] = 10_000
    retries_max: Annotated[
        int, Meta(description="failed attempts in a row before the worker stops", ge=0, le=1_000)
    ] = 20
    backoff_s: Annotated[
        float, Meta(description="wait after the first failed attempt, doubled each time, seconds", gt=0)
    ] = 0.2
    backoff_max_s: Annotated[float, Meta(description="longest wait between attempts, seconds", gt=0, le=300)] = 10.0
    restore_timeout_s: Annotated[
        float, Meta(description="a restore of a partition that takes longer is an error, seconds", gt=0)
    ] = 600.0
    lost_positions: Annotated[
        Literal["stop", "earliest", "latest"],
        Meta(
            description="when retention deleted records before they were read: stop, or go on with the oldest that "
            "is left (earliest) or the newest (latest), counted and logged"
        ),
    ] = "stop"
    shutdown_s: Annotated[float, Meta(description="deadline for a clean stop, seconds", gt=0, le=600)] = 20.0
    metrics_host: Annotated[str, Meta(description="address of /metrics, /healthz and /readyz", min_length=1)] = (
        "127.0.0.1"
    )
    metrics_port: Annotated[int, Meta(description="its port; 0 = off", ge=0, le=65_535)] = 0


class StateSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Users' states: their key, their bounds and their changelog."""

    hash_key: Annotated[
        Secret,
        Meta(
            description="key of the hash that turns user ids into record keys; the same for ever and on every worker; "
            "env:NAME and file:PATH work"
        ),
    ] = Secret("driftline")
    block_bytes_max: Annotated[
        int, Meta(description="size of one record of the `state` topic, bytes", ge=10_000, le=100_000_000)
    ] = 900_000
    ttl_h: Annotated[
        float,
        Meta(
            description="a user is forgotten at the end of an epoch when his partition's newest event is this much "
            "later than his own, hours of event time; 0 = never",
            ge=0,
        ),
    ] = 0.0
    bytes_max: Annotated[
        int,
        Meta(
            description="users' records of one partition, bytes: above it the longest silent users are forgotten at "
            "the end of an epoch; 0 = no limit",
            ge=0,
        ),
    ] = 0
    cleaning_factor: Annotated[
        float, Meta(description="a partition's state log is cleaned above this many times its live bytes", ge=1.5)
    ] = 3.0


class ForecastSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a forecast holds."""

    steps: Annotated[int, Meta(description="how many next events are forecast", ge=1, le=50)] = 5
    top_k: Annotated[int, Meta(description="interests named for each step", ge=1, le=1_000)] = 10
    emission: EmissionSettings = EmissionSettings()


class LearnerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The learner's process."""

    device: Annotated[
        str, Meta(description="auto (a GPU where there is one), cpu or cuda[:N]", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    ] = "auto"
    initial_weights: Annotated[
        str,
        Meta(
            description="folder of a checkpoint of `driftline pretrain` that worker and learner start from while the "
            '`weights` topic is empty; "" = from the seed'
        ),
    ] = ""
    threads: Annotated[
        int, Meta(description="threads of one step on a CPU; a worker always has one, two are slower", ge=1, le=256)
    ] = 1
    publish_interval_s: Annotated[float, Meta(description="seconds between two versions of the weights", gt=0)] = 5.0
    keep_versions: Annotated[int, Meta(description="complete versions kept in the `weights` topic", ge=1, le=1_000)] = 3
    batch_events_max: Annotated[int, Meta(description="events read in one turn, at most", ge=1, le=1_000_000)] = 8_192
    steps_per_turn_max: Annotated[
        int, Meta(description="gradient steps in one turn, at most; what is left over waits for the next", ge=1)
    ] = 16
    rebuild_events: Annotated[
        int, Meta(description="events before the committed position that a restart reads again, per partition", ge=0)
    ] = 100_000
    cpu_share: Annotated[
        float,
        Meta(
            description="share of the time spent on learning, 0..1; the rest is left to the workers",
            gt=0,
            le=1,
        ),
    ] = 1.0
    metrics_host: Annotated[
        str, Meta(description="address of the learner's /metrics, /healthz and /readyz", min_length=1)
    ] = "127.0.0.1"
    metrics_port: Annotated[int, Meta(description="its port; 0 = off", ge=0, le=65_535)] = 0


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the log is."""

    transport: Annotated[
        Literal["embedded", "kafka"], Meta(description='"embedded" (one file, this machine) or "kafka"')
    ] = "embedded"
    app: AppSettings = AppSettings()
    embedded: EmbeddedSettings = EmbeddedSettings()
    kafka: Annotated[
        dict[str, Any],
        Meta(
            description="connection settings by kafka-python's names, passed on as they are (TLS, SASL, client_id, "
            'timeouts); used with transport = "kafka"'
        ),
    ] = {}
    topics: TopicSettings = TopicSettings()
    events: EventSettings = EventSettings()
    worker: WorkerSettings = WorkerSettings()
    state: StateSettings = StateSettings()
    forecast: ForecastSettings = ForecastSettings()
    shift: ShiftSettings = ShiftSettings()
    alerts: AlertSettings = AlertSettings()
    network: NetworkSettings = NetworkSettings()
    learning: LearningSettings = LearningSettings()
    learner: LearnerSettings = LearnerSettings()


def topic_names(config: Config) -> dict[str, str]:
    """Full names of the topics that are not input, by role."""
    topics = config.topics
    return {
        role: topics.prefix + getattr(topics, role)
        for role in (
            "forecasts",
            "alerts",
            "verdicts",
            "warnings",
            "dead_letters",
            "metrics",
            "labels",
            "control",
            "state",
            "weights",
        )
    }


def plain_events(config: Config) -> Config:
    """The same settings for records that we write ourselves: fields by their own names, times in ms."""
    return msgspec.structs.replace(config, events=msgspec.structs.replace(config.events, fields={}, time_unit="ms"))


def fingerprint(*parts: Struct) -> str:
    """Short hash of settings, secrets excluded: equal settings, equal fingerprint."""
    encoded = b"\n".join(msgspec.json.encode(part, enc_hook=lambda _secret: HIDDEN, order="sorted") for part in parts)
    return hashlib.sha256(encoded).hexdigest()[:16]


def values(config: Struct, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every (dotted key, value) of the tree in order; free tables by their entries."""
    for name in config.__struct_fields__:
        value = getattr(config, name)
        if isinstance(value, Struct):
            yield from values(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            yield from ((f"{prefix}{name}.{key}", item) for key, item in value.items())
        else:
            yield f"{prefix}{name}", value
