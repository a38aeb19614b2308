"""One log, its topics, worker processes on them, and a watch that reads along: what the fault tests are made of."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from digest_app import create_topics, topic_names
from digest_worker import open_log

from stream import changelog
from stream.checkpoint import TopicNames
from stream.errors import DriftlineError
from stream.progress import Committed
from stream.testing import Verdict, digest_event, judge, read_all
from stream.transport import Record, TopicPartition, Transport

PARTITIONS = 3
HERE = Path(__file__).parent
SECONDS = 7_200
PATIENCE_S = 60.0


class Watch:
    """A committed reader that runs DURING the faults: it must see what a last reader sees, and nothing else (I2).

    It also notes when results came (I8) and that positions never go back (I5): those that the transactions say, in the
    state log. The broker is asked for the group's positions as well, and how often it answers with older ones than
    before is counted: one that comes back after a kill -9 has been seen to. When results came is what the record says;
    where the workers' clocks cannot be trusted, when it was read here (later by .7 s at most).
    """

    def __init__(self, log: dict[str, Any], names: TopicNames, group: str, *, trust_clocks: bool) -> None:
        self._log, self._names, self._group, self._trust_clocks = log, names, group, trust_clocks
        self.off_ms = 0  # how far a record's time was from ours, at most
        self.seen: dict[TopicPartition, list[tuple[int, bytes | None]]] = {}
        self.sent_ms: dict[int, list[int]] = {}  # when the results of a partition were sent, wall time
        self.problems: list[str] = []
        self.retries = 0
        self.old_answers = 0  # how often the broker named a position older than one that it had named before
        self._told: dict[TopicPartition, int] = {}  # by the broker
        self._said: dict[int, int] = {}  # by the newest transaction of a partition
        self._state_at: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def results(self) -> int:
        return sum(len(records) for records in self.seen.values())

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow()
            except DriftlineError:
                self.retries += 1
                self._stop.wait(0.3)

    def _follow(self) -> None:
        transport = open_log(self._log)
        reader = transport.reader()
        positions = _Positions(self._log, self._group, self._names.events[0])
        topics = (self._names.outputs["forecasts"], self._names.outputs["dead_letters"])
        try:
            while not self._stop.is_set():
                for tp in [TopicPartition(topic, p) for topic in topics for p in range(PARTITIONS)]:
                    seen = self.seen.setdefault(tp, [])
                    found = reader.read(tp, seen[-1][0] + 1 if seen else 0, 0.12, 5_000)
                    if found:
                        now_ms = int(time.time() * 1_000)
                        times_ms = [record.timestamp if self._trust_clocks else now_ms for record in found]
                        self.sent_ms.setdefault(tp.partition, []).extend(times_ms)
                        self.off_ms = max(self.off_ms, *(abs(record.timestamp - now_ms) for record in found))
                        seen += [(record.offset, record.value) for record in found]
                for partition in range(PARTITIONS):
                    self._follow_positions(reader, partition)
                for tp, offset in positions.ask().items():
                    self.old_answers += offset < self._told.get(tp, 0)
                    self._told[tp] = offset
        finally:
            positions.close()
            reader.close()
            transport.close()

    def _follow_positions(self, reader: Any, partition: int) -> None:
        where = f"{self._names.state}-{partition}"
        tp = TopicPartition(self._names.state, partition)
        for record in reader.read(tp, self._state_at.get(partition, 0), 0.12, 5_000):
            self._state_at[partition] = record.offset + 1
            block = changelog.decode(record.value, where)
            if block.kind is changelog.Kind.POSITIONS:
                (offset,) = Committed.load(block.payload, where).offsets.values()
                if offset < self._said.get(partition, 0):
                    self.problems.append(f"I5: {where} went back from {self._said[partition]} to {offset}")
                self._said[partition] = offset

    def close(self, reader: Any, wait_s: float) -> list[str]:
        """End it; what it saw must be what lies there now. A read that brings nothing for `wait_s` is at the end."""
        there = {tp: _all(reader, tp, wait_s) for tp in self.seen}
        for _ in range(100):  # it reads on until it has all
            if all(len(seen) >= len(there[tp]) for tp, seen in self.seen.items()):
                break
            time.sleep(0.1)
        self._stop.set()
        self._thread.join(60)
        for tp, seen in self.seen.items():
            if seen != there[tp]:
                self.problems.append(f"I2: a reader during the faults saw another {tp.topic}-{tp.partition}")
        return self.problems

    def wait_for_more(self, partitions: Sequence[int], since_s: float, patience_s: float) -> float:
        """Seconds from `since_s` (wall time) until every one of the partitions has had a new result (I8)."""
        until_s = time.monotonic() + patience_s
        while time.monotonic() < until_s:
            later = [[ms for ms in self.sent_ms.get(p, []) if ms / 1_000 > since_s] for p in partitions]
            if all(later):
                return max(min(times) for times in later) / 1_000 - since_s
            time.sleep(0.05)
        raise AssertionError(f"I8: no progress in partitions {partitions} within {patience_s} s")


def _all(reader: Any, tp: TopicPartition, wait_s: float) -> list[tuple[int, bytes | None]]:
    found: list[tuple[int, bytes | None]] = []
    offset = 0
    while records := reader.read(tp, offset, wait_s, 5_000):
        found += [(record.offset, record.value) for record in records]
        offset = records[-1].offset + 1
    return found


def _group_client(log: dict[str, Any], group: str, **settings: Any) -> Any:
    """A client of a group that never joins it."""
    from kafka import KafkaConsumer

    return KafkaConsumer(
        bootstrap_servers=[log["kafka"]], group_id=group, enable_auto_commit=False, isolation_level="read_committed",
        **settings,
    )  # fmt: skip


class _Positions:
    """The committed positions of a group, asked from outside of it."""

    def __init__(self, log: dict[str, Any], group: str, topic: str) -> None:
        self._log, self._group = log, group
        self._tps = [TopicPartition(topic, p) for p in range(PARTITIONS)]
        self._client: Any = None
        self._next_s = 0.0

    def ask(self) -> dict[TopicPartition, int]:
        if "kafka" not in self._log or time.monotonic() < self._next_s:
            return {}
        from kafka import errors
        from kafka.structs import TopicPartition as ClientPartition

        self._next_s = time.monotonic() + 0.5
        try:
            if self._client is None:
                self._client = _group_client(self._log, self._group, request_timeout_ms=5_000)
            found = {tp: self._client.committed(ClientPartition(*tp), timeout_ms=1_000) for tp in self._tps}
        except errors.KafkaError:
            return {}
        return {tp: offset for tp, offset in found.items() if offset is not None}

    def close(self) -> None:
        if self._client is not None:
            self._client.close(autocommit=False)


@dataclass
class Ended:
    """How a run ended."""

    verdict: Verdict
    problems: list[str]
    inputs: int
    bit: dict[str, int] = field(default_factory=dict)


class Site:
    """One log, its topics, and worker processes on them."""

    def __init__(
        self, log: dict[str, Any], *, through: dict[str, Any] | None = None, trust_clocks: bool = True
    ) -> None:
        """Make the topics. Workers use `through` (a proxy, say) where it is given, everything else uses `log`."""
        self.log = log
        self.through = through or log
        self.prefix = f"t{uuid.uuid4().hex[:10]}-"
        self.names: TopicNames = topic_names(self.prefix)
        self.transport: Transport = open_log(log)
        create_topics(self.transport, self.names, PARTITIONS)
        self.processes: list[subprocess.Popen[str]] = []
        self.sent = self.acked = 0
        self.reports: list[dict[str, Any]] = []
        self._notes = tempfile.TemporaryDirectory(prefix="driftline-notes-")
        self.watch = Watch(log, self.names, self.prefix + "app", trust_clocks=trust_clocks)
        self.wait_s = 0.5 if self.transport.name == "kafka" else 0.0  # nothing for so long: the end of a partition

    def fill(self, rng: random.Random, count: int) -> None:
        batches: dict[int, list[tuple[bytes | None, bytes | None, int]]] = {}
        for _ in range(count):
            user = f"u{int(rng.paretovariate(0.7)) % 60}"
            key, value, timestamp_ms = digest_event(user, self.sent, goodbye=rng.random() < 0.03)
            self.sent += 1
            batches.setdefault(sum(key) % PARTITIONS, []).append(
                (key, None if rng.random() < 0.01 else value, timestamp_ms)
            )
        for partition, records in batches.items():
            self.append(partition, records)

    def append(self, partition: int, records: list[tuple[bytes | None, bytes | None, int]]) -> None:
        """Input records; `acked` counts those that the log has confirmed. A log that is away is tried for a minute.

        A try that failed may have stored some: then there are more inputs than acknowledged ones, as with any producer.
        """
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.acked += self.transport.append(self.names.events[0], partition, iter(records))
                return
            except DriftlineError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.3)

    def inputs(self) -> int:
        """How many records the input topic holds."""
        reader = self.transport.reader()
        try:
            return sum(reader.bounds(TopicPartition(self.names.events[0], p))[1] for p in range(PARTITIONS))
        finally:
            reader.close()

    def start(self, slot: str = "0", *, wait: bool = True, **task: Any) -> subprocess.Popen[str]:
        given = {
            "log": self.through, "prefix": self.prefix, "partitions": PARTITIONS, "slot": slot, "seconds": SECONDS,
            "notes": f"{self._notes.name}/{len(self.processes)}", **task,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, str(HERE / "digest_worker.py"), json.dumps(given)],
            cwd=HERE.parent,
            env={
                "PYTHONPATH": f"{HERE.parent}:{HERE}",
                "PATH": os.defpath,
                "DIGEST_LOG": os.environ.get("DIGEST_LOG", "CRITICAL"),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        if wait:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    def saw(self) -> Counter[str]:
        """What all workers so far have seen, the killed ones included."""
        return Counter(word for file in Path(self._notes.name).iterdir() for word in file.read_text().split())

    def wait_drained(self, seconds: float) -> None:
        """Until every input is answered. Fails when no answer comes for so long, not because a machine is slow."""
        wanted, results = self.inputs(), -1
        while (now := self.watch.results) < wanted:
            if now > results:
                results, deadline_s = now, time.monotonic() + seconds
            if time.monotonic() > deadline_s:
                raise AssertionError(f"{now} of {wanted} inputs were answered, and none for {seconds} s")
            time.sleep(0.05)

    def stop(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=40)
        assert process.returncode == 0, f"SIGTERM under load must end with 0, not {process.returncode}"
        self.reports.append(json.loads(out.splitlines()[-1]))
        return self.reports[-1]

    def positions(self) -> dict[Any, Any]:
        """The group's positions on the broker with their metadata, as the client's own types."""
        with self._client() as client:
            return {tp: client.committed(tp, metadata=True, timeout_ms=10_000) for tp in self._inputs()}

    def set_positions(self, positions: dict[Any, Any]) -> None:
        """Commit positions from outside; the broker takes them once the group is empty."""
        with self._client() as client:
            client.commit(positions, timeout_ms=10_000)

    def _inputs(self) -> list[Any]:
        from kafka.structs import TopicPartition as ClientPartition

        return [ClientPartition(self.names.events[0], p) for p in range(PARTITIONS)]

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        client = _group_client(self.log, self.prefix + "app")
        try:
            client.assign(self._inputs())
            yield client
        finally:
            client.close(autocommit=False)

    def ended(self) -> Ended:
        """The oracle's verdict on what lies in the log now, beside what the watch saw."""
        reader = self.transport.reader()
        wait_s = self.wait_s
        inputs: list[Record] = list(read_all(reader, self.names.events[0], PARTITIONS, wait_s))
        outputs = list(read_all(reader, self.names.outputs["forecasts"], PARTITIONS, wait_s))
        dead = list(read_all(reader, self.names.outputs["dead_letters"], PARTITIONS, wait_s))
        verdict = judge(inputs, outputs, dead)
        problems = verdict.problems + self.watch.close(reader, wait_s)
        reader.close()
        if not self.watch._said:
            problems.append("I5: no position was ever seen in the state log")
        if verdict.outputs + verdict.dead_letters != len(inputs) or len(inputs) < self.acked:
            problems.append(f"I1: {self.acked} acked, {len(inputs)} in, {verdict.outputs}+{verdict.dead_letters} out")
        bit = {"broker answered with old positions": self.watch.old_answers}
        return Ended(verdict=verdict, problems=problems, inputs=len(inputs), bit=bit)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        self.watch._stop.set()
        self.watch._thread.join(30)
        self.transport.close()
        self._notes.cleanup()
