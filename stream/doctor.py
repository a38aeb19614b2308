"""`driftline doctor`: looks at everything that a run needs, and says what to do about what is wrong.

Before the way of an event. Every check is bounded, changes nothing, and ends in ok, warn (it works, but) or fail.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stream.assembly import topic_problems, topic_specs
from stream.config import Config, Secret, StateSettings
from stream.errors import ConfigError, DriftlineError
from stream.events import EventDecoder
from stream.partition import STRAY_SHARE, crc32_partition_of, partition_of
from stream.tail import newest_records
from stream.transport import Record, TopicPartition, Transport

PYTHON_MIN = (3, 11)
PACKAGES = ("kafka-python", "torch", "numba", "numpy", "river", "orjson", "msgspec", "safetensors", "crc32c")
CODECS = {"lz4": "lz4", "snappy": "python-snappy", "zstd": "zstandard"}
KAFKA_PYTHON = ("3.0.12", "3.1")
SQLITE_SAFE = (3, 51, 3)
DISK_FREE_MIN = 2 << 30
CLOCK_AHEAD_MAX_S = 60.0
SAMPLE_RECORDS = 500  # newest records of each input partition
COMMAND_TIMEOUT_S = 20.0
DEAD_SHARE_WARN = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One check: what was looked at, how it is, and what to do."""

    subject: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def examine(config: Config, connect: Callable[[], Transport], decoder: Callable[[], EventDecoder]) -> Iterator[Finding]:
    """All checks, the cheap ones first. What needs the log is left out when there is none."""
    yield _python()
    yield from _packages()
    yield from _codecs(config)
    yield _disk(config)
    yield _gpu(config)
    yield from _secrets(config)
    if config.transport == "embedded" and not Path(config.embedded.path).exists():
        yield Finding(subject="log", status="ok", found=f"{config.embedded.path} is not there yet; a run makes it")
        return
    try:
        transport = connect()
    except DriftlineError as error:
        yield Finding(subject="log", status="fail", found=str(error), advice=f"transport is {config.transport!r}")
        return
    try:
        yield _log(config)
        yield from _topics(transport, config)
        yield from _input(transport, config, decoder())
    except DriftlineError as error:
        yield Finding(subject="log", status="fail", found=str(error))
    finally:
        transport.close()


def _python() -> Finding:
    version = platform.python_version()
    cores = os.cpu_count() or 1
    if sys.version_info < PYTHON_MIN:
        return Finding(subject="python", status="fail", found=version, advice="driftline needs 3.11 or newer")
    return Finding(subject="python", status="ok", found=f"{version}, {cores} cores, {platform.platform()}")


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                subject=name, status="fail", found="not installed", advice="make setup, or pip install driftline"
            )
            continue
        if name == "kafka-python" and not KAFKA_PYTHON[0] <= version < KAFKA_PYTHON[1]:
            yield Finding(
                subject=name,
                status="fail",
                found=version,
                advice=f"use >= {KAFKA_PYTHON[0]}, < {KAFKA_PYTHON[1]}: others lose partitions after a rebalance",
            )
        else:
            yield Finding(subject=name, status="ok", found=version)


def _codecs(config: Config) -> Iterator[Finding]:
    missing = [name for name, package in CODECS.items() if not _installed(package)]
    if missing:
        packages = " ".join(CODECS[name] for name in missing)
        yield Finding(
            subject="codecs",
            status="warn" if config.transport == "kafka" else "ok",
            found=f"no {', '.join(missing)}",
            advice=f"topics compressed with them cannot be read: pip install {packages} (or driftline[compression])",
        )
    else:
        yield Finding(subject="codecs", status="ok", found="gzip, lz4, snappy, zstd")


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _disk(config: Config) -> Finding:
    folder = Path(config.embedded.path).resolve().parent if config.transport == "embedded" else Path.cwd()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Finding(subject="disk", status="fail", found=f"{folder} is not writable", advice="set embedded.path")
    text = f"{free / 2**30:.1f} GiB free at {folder}"
    if free < DISK_FREE_MIN:
        return Finding(
            subject="disk", status="warn", found=text, advice="a full disk stops the embedded log; make room"
        )
    return Finding(subject="disk", status="ok", found=text)


def _gpu(config: Config) -> Finding:
    """Asks the driver first and torch in a process of its own: loading it takes seconds."""
    wanted = config.learner.device
    if shutil.which("nvidia-smi") is None:
        if wanted.startswith("cuda"):
            return Finding(
                subject="gpu", status="fail", found="no NVIDIA driver", advice='set learner.device = "auto" or "cpu"'
            )
        return Finding(subject="gpu", status="ok", found="none; the learner runs on the CPU")
    names = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    usable = _output(sys.executable, "-c", "import torch; print(torch.cuda.is_available())")
    if usable == "True":
        return Finding(subject="gpu", status="ok", found=names.replace("\n", "; "))
    return Finding(
        subject="gpu",
        status="fail" if wanted.startswith("cuda") else "warn",
        found=f"{names or 'a driver'}, but torch cannot use it",
        advice="install the CUDA build of torch that fits the driver",
    )


def _output(*command: str) -> str:
    """A command's output; empty when it fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _secrets(config: Config) -> Iterator[Finding]:
    for name, value in [
        *((f"kafka.{k}", v) for k, v in config.kafka.items()),
        ("state.hash_key", config.state.hash_key),
    ]:
        if isinstance(value, Secret):
            try:
                value.reveal()
            except ConfigError as error:
                yield Finding(
                    subject=name, status="fail", found=str(error), advice="secrets come from env:NAME or file:PATH"
                )
    if config.state.hash_key == StateSettings().hash_key:
        yield Finding(
            subject="state.hash_key",
            status="warn" if config.transport == "kafka" else "ok",
            found="the default, which everybody knows",
            advice='set it before the first run, e.g. "env:DRIFTLINE_HASH_KEY"; it cannot be changed later',
        )


def _log(config: Config) -> Finding:
    if config.transport == "kafka":
        return Finding(subject="log", status="ok", found=f"Kafka at {config.kafka['bootstrap_servers']}")
    safe = sqlite3.sqlite_version_info >= SQLITE_SAFE
    note = "" if safe else " (older than 3.51.3: writes of several processes go through a file lock)"
    return Finding(subject="log", status="ok", found=f"{config.embedded.path}, SQLite {sqlite3.sqlite_version}{note}")


def _topics(transport: Transport, config: Config) -> Iterator[Finding]:
    problems = topic_problems(transport, config)
    for problem in problems:
        found, _, advice = problem.partition("; ")
        yield Finding(subject="topics", status="fail", found=found, advice=advice)
    if not problems:
        count = len(topic_specs(config))
        yield Finding(subject="topics", status="ok", found=f"{count} with {config.topics.partitions} partitions each")


def _input(transport: Transport, config: Config, decoder: EventDecoder) -> Iterator[Finding]:
    """The newest input records: can they be used, are they where they belong, and is their clock ours?"""
    admin = transport.admin()
    try:
        there = admin.describe(config.topics.events)
    finally:
        admin.close()
    reader = transport.reader()
    try:
        for topic, spec in there.items():
            if spec is not None:
                sample = {
                    p: newest_records(reader, TopicPartition(topic, p), SAMPLE_RECORDS) for p in range(spec.partitions)
                }
                yield from _judge(topic, sample, decoder)
    finally:
        reader.close()


def _judge(topic: str, sample: dict[int, list[Record]], decoder: EventDecoder) -> Iterator[Finding]:
    count = sum(map(len, sample.values()))
    subject = f"topic {topic}"
    if not count:
        yield Finding(subject=subject, status="ok", found="empty")
        return
    reasons: Counter[str] = Counter()
    for records in sample.values():
        reasons.update(error.reason for _, error in decoder.decode(records).dead)
    dead = sum(reasons.values())
    if dead > DEAD_SHARE_WARN * count:
        worst, times = reasons.most_common(1)[0]
        yield Finding(
            subject=subject,
            status="fail" if dead == count else "warn",
            found=f"{dead} of the newest {count} records cannot be used, most often {worst} ({times})",
            advice="compare a record (driftline tail events --from 1) with [events.fields]; keys must be user ids",
        )
    else:
        yield Finding(subject=subject, status="ok", found=f"{count - dead} of the newest {count} records can be used")
    yield from _partitioner(subject, sample)
    ahead_s = max(r.timestamp for records in sample.values() for r in records) / 1_000 - time.time()
    if ahead_s > CLOCK_AHEAD_MAX_S:
        yield Finding(
            subject="clock",
            status="warn",
            found=f"the newest record's timestamp is {ahead_s:.0f} s ahead of this machine",
            advice="synchronise the clocks (NTP); event times are judged against record timestamps",
        )
    else:
        yield Finding(subject="clock", status="ok", found=f"the newest record is {-ahead_s:.0f} s old")


def _partitioner(subject: str, sample: dict[int, list[Record]]) -> Iterator[Finding]:
    """All of a user's events must lie in one partition: one partitioner for all producers."""
    keyed = [(p, r.key) for p, records in sample.items() for r in records if r.key is not None]
    homes: dict[bytes, set[int]] = {}
    for p, key in keyed:
        homes.setdefault(key, set()).add(p)
    split = sum(len(where) > 1 for where in homes.values())
    limit = STRAY_SHARE * len(keyed)
    murmur2 = sum(partition_of(key, len(sample)) == p for p, key in keyed)
    crc32 = sum(crc32_partition_of(key, len(sample)) == p for p, key in keyed)
    found = (
        f"of {len(keyed)} sampled keys {murmur2} lie where murmur2 (Kafka's own clients) puts them and {crc32} where "
    )
    found += "CRC32 (librdkafka's default) does"
    if split:
        yield Finding(
            subject=subject,
            status="fail",
            found=f"{split} of {len(homes)} sampled users have events in several partitions; {found}",
            advice="give all producers one partitioner: librdkafka clients need partitioner=murmur2_random; "
            "`driftline rekey` puts what is there already into one place",
        )
    elif len(keyed) - murmur2 > limit and len(keyed) - crc32 > limit:
        yield Finding(
            subject=subject,
            status="warn",
            found=f"mixed partitioners, or one of your own: {found}",
            advice="all events of a user must lie in one partition: let all producers use the same partitioner",
        )
    elif len(keyed) - murmur2 > limit:
        yield Finding(
            subject=subject,
            status="warn",
            found=f"keys are partitioned by CRC32 (librdkafka's default): {found}",
            advice="that works while all producers do so; `driftline replay` and `driftline user` use murmur2, and one "
            "Java client would split its users. librdkafka clients can be given partitioner=murmur2_random",
        )
