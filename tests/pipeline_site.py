"""The whole application under faults: `driftline worker` processes whose users move, beside one undisturbed worker.

Network, profiles, group tables, shadow users and alerts are the real ones. The undisturbed worker lives in the test's
process, reads the same input and writes to topics of its own. Weights are learned from the input by a learner that the
test turns by hand; a version is put on the weights topics of both only when all input so far is committed, and more
input comes only when every worker has it. So each event is handled under the same version on both sides, and what lies
in their topics can be compared, however batches were cut and whoever handled them.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from models.learner import Learner
from models.profile import USER
from stream import weights
from stream.assembly import OUTPUTS, make_decoder, make_pipeline, make_worker, names_of, topic_specs
from stream.checkpoint import TopicNames
from stream.config import Config
from stream.engine import PartitionState
from stream.kafka import KafkaLog
from stream.loading import load
from stream.partition import partition_of
from stream.restore import restore
from stream.rows import StreamRecord
from stream.simulate import ShopSettings, simulate
from stream.testing import Verdict, read_all
from stream.transport import LogReader, LogRecord, TopicPartition

PARTITIONS = 3
HERE = Path(__file__).parent
SESSION_S, TRANSACTION_S = 3.0, 4.0
PATIENCE_S = 120.0
HIDDEN_ERROR = 1e-5  # float32 sums may differ in the last digits between batch sizes
SHARE_ERROR = 2e-5  # of probabilities, which are told with five digits
TYPE_ERROR = 1.1e-4  # of those of types, which are told with four
LEARN_STEPS = 30
USERS = 20
USERS_MAX = 5  # of a partition: the longest silent ones are forgotten
SHOP_EVENTS, SHOP_WEEKS = 800, 8  # then all users shift: alerts come early
WEEK_MS = 7 * 86_400_000
START_MS = 1_000_000_000_000  # long ago: Kafka refuses what is dated after its own clock
RUNNING = "event=partition_running"
READ_WAIT_S = 0.5  # a read that brings nothing for so long is at the end


class Silent:
    """Observes a worker and keeps nothing."""

    def turn(self, turn: Any) -> None: ...
    def event(self, name: str, **facts: object) -> None: ...
    def owned(self, *facts: object) -> None: ...


class Committed:
    """Follows the `metrics` topic of one side: how many records of each partition are committed, under what weights."""

    def __init__(self, reader: LogReader, topic: str) -> None:
        self._reader, self._topic = reader, topic
        self._offsets = dict.fromkeys(range(PARTITIONS), 0)
        self.metrics: list[dict[str, Any]] = []

    def records(self) -> int:
        for p in self._offsets:
            for record in self._reader.read(TopicPartition(self._topic, p), self._offsets[p], 0.1, 5_000):
                self._offsets[p] = record.offset + 1
                self.metrics.append(json.loads(record.value or b""))
        return sum(m["records"] for m in self.metrics)

    def partitions(self, version: int) -> set[int]:
        """Where something was committed under these weights."""
        return {m["partition"] for m in self.metrics if m["weights_version"] == version}


@dataclass
class Process:
    """A worker process and what it writes on standard error."""

    slot: str
    popen: subprocess.Popen[bytes]
    log: Path

    def said(self, text: str) -> int:
        return self.log.read_text().count(text)


class PipelineSite:
    """One input, worker processes on it, and the undisturbed worker."""

    def __init__(self, bootstrap: str, folder: Path, *, seed: int) -> None:
        prefix = f"p{uuid.uuid4().hex[:8]}-"
        self._sets = [
            'transport="kafka"', f'kafka.bootstrap_servers="{bootstrap}"', "kafka.heartbeat_interval_ms=200",
            f"kafka.session_timeout_ms={1_000 * SESSION_S:.0f}", f"worker.transaction_timeout_s={TRANSACTION_S}",
            f'topics.events=["{prefix}events"]', f"topics.partitions={PARTITIONS}", "topics.retention_h=-1",
            "worker.epoch_events=512", "worker.quality_share=0.5",
            "worker.poll_timeout_s=0.05", "shift.false_alarm_events=300", "learner.device=cpu",
            f"state.bytes_max={USERS_MAX * USER.itemsize}",
        ]  # fmt: skip
        self._folder = folder
        self._sides = {
            side: [f'topics.prefix="{prefix}{side}-"', f'app.name="{prefix}{side}"', f"worker.batch_events_max={batch}"]
            for side, batch in (("moved", 40), ("quiet", 600))  # batches are cut differently
        }
        self.moved, self.quiet = (load(None, [*self._sets, *own]).config for own in self._sides.values())
        self.names: TopicNames = names_of(self.moved)
        self._log = KafkaLog(self.moved.kafka, transaction_timeout_s=TRANSACTION_S)
        admin = self._log.admin()
        admin.create([*topic_specs(self.moved), *topic_specs(self.quiet)])
        admin.close()
        self._events = shops(seed)
        self._decoder = make_decoder(self.moved)
        self._learner = Learner(self.moved.network, self.moved.learning, seed=seed, device="cpu")
        self._publisher = self._log.producer(transactional_id=f"{prefix}publisher")
        silent: Any = Silent()
        self._undisturbed = make_worker(self.quiet, self._log, silent)
        self._readers = [self._log.reader() for _ in range(3)]
        self.committed = Committed(self._readers[0], self.names.outputs["metrics"])
        self._followed = Committed(self._readers[1], names_of(self.quiet).outputs["metrics"])
        self._unlearned: list[LogRecord] = []
        self.sent = self.version = 0
        self.outputs: dict[str, int] = {}  # how many there were at the end, by stream
        self.processes: list[Process] = []

    # ------------------------------------------------------------------ what happens

    def fill(self, count: int) -> None:
        """The next records of the shop."""
        records = list(islice(self._events, count))
        topic = self.names.events[0]
        for p in range(PARTITIONS):
            mine = [r for r in records if (partition_of(r[0], PARTITIONS) if r[0] else 0) == p]
            if mine:
                self._log.append(topic, p, iter(mine))
        self._unlearned += [LogRecord(topic, 0, self.sent + n, ms, k, v) for n, (k, v, ms) in enumerate(records)]
        self.sent += count

    def publish(self) -> None:
        """Learn what was sent so far: a new version for both sides, until every worker that is awake has it."""
        decoded = self._decoder.decode(self._unlearned)
        if len(decoded):
            self._learner.observe(decoded.user_key_B, decoded.columns, decoded.interest_names)
            self._learner.learn(LEARN_STEPS)
        self._unlearned = []
        payload = self._learner.weights_bytes()
        self.version = self._learner.version
        self._publisher.begin()
        for config in (self.moved, self.quiet):
            weights.send(self._publisher, names_of(config).weights, "weights", self.version, payload)
        self._publisher.flush()
        self._publisher.commit()
        awake = [p for p in self.living() if not is_standing(p)]
        self.wait(lambda: all(p.said(f"event=weights_swapped version={self.version} ") for p in awake))

    def start(self, slot: str, **fault: Any) -> Process:
        log = self._folder / f"{self.names.state}{len(self.processes)}.log"
        options = [part for assignment in self._sets + self._sides["moved"] for part in ("--set", assignment)]
        with log.open("wb") as stderr:
            popen = subprocess.Popen(
                [sys.executable, str(HERE / "pipeline_worker.py"), json.dumps(fault), "--slot", slot, *options],
                cwd=HERE.parent,
                env={"PYTHONPATH": f"{HERE.parent}:{HERE}", "PATH": os.defpath, "OMP_NUM_THREADS": "1"},
                stderr=stderr,
            )
        self.processes.append(Process(slot, popen, log))
        return self.processes[-1]

    def living(self) -> list[Process]:
        return [p for p in self.processes if p.popen.poll() is None]

    def wait(self, done: Callable[[], bool], *, load: bool = False) -> None:
        """Until it is so; with load, events come all the while."""
        until_s = time.monotonic() + PATIENCE_S
        while not done():
            for process in self.processes:
                code = process.popen.poll()
                assert code in (None, 0, -signal.SIGKILL), f"exit {code}: {process.log.read_text()[-2_000:]}"
            assert time.monotonic() < until_s, f"not within {PATIENCE_S:.0f} s: {self.tails()}"
            if load:
                self.fill(20)
            time.sleep(0.1)

    def tails(self) -> str:
        return "\n".join(f"{p.slot}: {p.log.read_text()[-600:]}" for p in self.living())

    def wait_running(self, process: Process, *, more_than: int = 0) -> None:
        """Under load, until it has taken over a partition, with its state, for so many times and once more."""
        self.wait(lambda: process.said(RUNNING) > more_than, load=True)

    def drain(self) -> None:
        """Until all input is committed."""
        self.wait(lambda: self.committed.records() >= self.sent)

    @contextmanager
    def version_of_its_own(self) -> Iterator[None]:
        """A version, a commit under it in every partition, what is done in the block, and the same undisturbed."""
        self.publish()
        while self.committed.partitions(self.version) < set(range(PARTITIONS)):
            self.fill(30)
            self.drain()
        yield
        self.fill(500)
        self.drain()
        self._undisturbed._parts.weights.swap(at_least=self.version)
        until_s = time.monotonic() + PATIENCE_S
        while self._followed.records() < self.sent:
            assert time.monotonic() < until_s, "the undisturbed worker does not come to the end"
            for _ in range(10):
                self._undisturbed.turn()

    # ------------------------------------------------------------------ what came of it

    def ended(self) -> Verdict:
        """End all workers and compare."""
        for process in self.living():
            process.popen.send_signal(signal.SIGTERM)
            assert process.popen.wait(40) == 0, process.log.read_text()[-2_000:]
        verdict = Verdict(inputs=self.sent)
        self._compare_states(verdict)
        self._compare_outputs(verdict)
        self._check_metrics(verdict)
        return verdict

    def moves(self) -> int:
        """How often a partition came to a worker that did not have it."""
        return sum(p.said(RUNNING) for p in self.processes) - PARTITIONS

    def forgotten(self) -> int:
        """Users whose records had to go because a partition holds too many."""
        return sum(m["evicted"] for m in self.committed.metrics)

    def cleaned(self) -> int:
        """Records of the state topic that have been deleted from its head."""
        return sum(self._readers[2].bounds(TopicPartition(self.names.state, p))[0] for p in range(PARTITIONS))

    def saw(self, *names: str) -> Counter[str]:
        return Counter({f"saw {name}": sum(p.said(f"event={name}") for p in self.processes) for name in names})

    def _compare_states(self, verdict: Verdict) -> None:
        for p in range(PARTITIONS):
            moved, quiet = self._restored(self.moved, p), self._restored(self.quiet, p)
            living = self._undisturbed.states[p]
            for what, other in (("the moved state", moved), ("the undisturbed one as restored", quiet)):
                for difference in differences(living, other):
                    verdict.blame("I4", f"partition {p}: {what} differs in {difference}")

    def _restored(self, config: Config, partition: int) -> PartitionState:
        state = restore(
            self._log,
            engine=make_pipeline(config),
            topic=names_of(config).state,
            partition=partition,
            transactional_id=f"{config.app.name}.last",
            nonce=os.urandom(16),
            timeout_s=PATIENCE_S,
            clock=time.monotonic,
        )
        assert state is not None
        return state

    def _compare_outputs(self, verdict: Verdict) -> None:
        """Forecasts, alerts, verdicts and dead letters: each once, in order, the same ones under the same weights."""
        for stream in set(OUTPUTS) - {"metrics"}:
            moved, quiet = (self._outputs(config, stream) for config in (self.moved, self.quiet))
            ids = [record["id"] for record in moved]
            twice = [i for i, count in Counter(ids).items() if count > 1]
            if twice:
                verdict.blame("I2", f"{stream}: {len(twice)} came twice, {twice[0]} first")
            if ids != [record["id"] for record in quiet]:
                verdict.blame("I1", f"{stream}: {len(ids)}, undisturbed {len(quiet)}, or in another order")
            for ours, theirs in zip(moved, quiet, strict=False):
                for name in ours:
                    if not alike(ours[name], theirs.get(name)):
                        verdict.blame("I4", f"{stream} {ours['id']}, {name}: {ours[name]}, not {theirs.get(name)}")
            verdict.dead_letters += len(ids) if stream == "dead_letters" else 0
            self.outputs[stream] = len(ids)

    def _outputs(self, config: Config, stream: str) -> list[dict[str, Any]]:
        topic = names_of(config).outputs[stream]
        return [json.loads(r.value or b"") for r in read_all(self._readers[2], topic, PARTITIONS, READ_WAIT_S)]

    def _check_metrics(self, verdict: Verdict) -> None:
        """The commits tile each partition's input: no record without one, none with two; versions never go back."""
        at, version = Counter[int](), Counter[int]()
        for m in self._outputs(self.moved, "metrics"):
            p = m["partition"]
            if m["first_offset"] != at[p] or m["next_offset"] - m["first_offset"] != m["records"]:
                invariant = "I1" if m["first_offset"] > at[p] else "I2"
                verdict.blame(invariant, f"partition {p}: after {at[p]} came {m['first_offset']}-{m['next_offset']}")
            if m["weights_version"] < version[p]:
                verdict.blame("I9", f"partition {p}: version {m['weights_version']} after {version[p]}")
            at[p], version[p] = m["next_offset"], m["weights_version"]
            verdict.outputs += m["events"]
        if at.total() != self.sent:
            verdict.blame("I1", f"{at.total()} of {self.sent} inputs were committed")

    def close(self) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.popen.kill()
            process.popen.wait()
        self._undisturbed.close()
        self._publisher.close()
        for reader in self._readers:
            reader.close()
        self._log.close()


def shops(seed: int) -> Iterator[StreamRecord]:
    """One shop after the other, without an end, of the same users with other interests."""
    for n in itertools.count():
        shop = ShopSettings(
            users=USERS,
            events=SHOP_EVENTS,
            weeks=SHOP_WEEKS,
            seed=seed + n,
            shift_share=0.4,
            start_ms=START_MS + n * SHOP_WEEKS * WEEK_MS,
        )
        yield from simulate(shop).records()


def differences(one: PartitionState, other: PartitionState) -> Iterator[str]:
    """What two states of a partition differ in: bit for bit, but for hidden states and where blocks lie."""
    ours, theirs = (np.sort(state.arena.all(), order="key") for state in (one, other))
    if not np.array_equal(ours["key"], theirs["key"]):
        yield f"its users, {len(ours)} and {len(theirs)}"
        return
    for name in ours.dtype.names or ():
        a, b = ours[name], theirs[name]
        if name == "hidden":
            error = float(np.max(np.abs(a.astype(np.float64) - b), initial=0.0))
            if not error <= HIDDEN_ERROR:
                yield f"hidden states by {error:.1e}"
        elif name != "block" and a.tobytes() != b.tobytes():
            yield f"{name} of {int((a != b).reshape(len(a), -1).any(axis=1).sum())} of {len(a)} users"
    if one.groups.cut().snapshot() != other.groups.cut().snapshot():
        yield "the group table"
    if one.suspects.normal().tobytes() != other.suspects.normal().tobytes():
        yield "the evidence of suspects"


def alike(ours: Any, theirs: Any) -> bool:
    """Equal, but for the last digits of probabilities."""
    if isinstance(ours, dict) and set(ours) == {"interest", "probability"}:
        return alike([ours], [theirs])
    if isinstance(ours, list) and ours and isinstance(ours[0], dict) and "probability" in ours[0]:
        return _close(
            {c["interest"]: c["probability"] for c in ours}, {c["interest"]: c["probability"] for c in theirs}
        )
    if isinstance(ours, list) and ours and isinstance(ours[0], dict) and "interests" in ours[0]:
        steps = zip(ours, theirs, strict=False)
        return len(ours) == len(theirs) and all(alike(a["interests"], b["interests"]) for a, b in steps)
    if isinstance(ours, dict) and ours and all(isinstance(v, float) for v in ours.values()):
        return _close(ours, theirs, TYPE_ERROR)
    return bool(ours == theirs)


def _close(ours: dict[str, float], theirs: dict[str, float], error: float = SHARE_ERROR) -> bool:
    """Two lists of the likeliest: where one lacks a name it is as good as the other's least likely one."""
    if len(ours) != len(theirs):
        return False
    least = min(min(ours.values(), default=0.0), min(theirs.values(), default=0.0))
    names = ours.keys() | theirs.keys()
    return all(abs(ours.get(name, least) - theirs.get(name, least)) <= error for name in names)


# ── moves ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def bite(site: PipelineSite, victim: Process, heir: Process) -> None:
    """The victim's fault is armed and bites under load; the other one takes its users over."""
    had = heir.said(RUNNING)
    os.kill(victim.popen.pid, signal.SIGUSR1)
    site.wait(lambda: victim.popen.poll() is not None or is_standing(victim), load=True)
    site.wait_running(heir, more_than=had)


def wake(site: PipelineSite, zombie: Process) -> None:
    """One that stood still beyond its session goes on: it has lost its users, and gets some of them again."""
    had = zombie.said(RUNNING)
    os.kill(zombie.popen.pid, signal.SIGCONT)
    site.wait_running(zombie, more_than=had)
    assert zombie.said("event=partition_dropped") > 0, "nothing was taken from it"


def leave(site: PipelineSite, process: Process, heir: Process) -> None:
    """SIGTERM under load: its users move to the other one."""
    had = heir.said(RUNNING)
    process.popen.send_signal(signal.SIGTERM)
    site.wait(lambda: process.popen.poll() is not None, load=True)
    site.wait_running(heir, more_than=had)


def is_standing(process: Process) -> bool:
    text = Path(f"/proc/{process.popen.pid}/stat").read_text()
    return text[text.rindex(")") + 2] == "T"
