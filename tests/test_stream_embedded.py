"""The embedded log under faults: kills at any moment, other processes, stopped processes, full disks, damaged files."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from stream import embedded_producer, embedded_records
from stream.embedded import EmbeddedLog
from stream.embedded_consumer import EmbeddedConsumer
from stream.errors import ConfigError, Corrupt, Fenced, Rebalanced, Retryable
from stream.transport import Polled, Position, TopicPartition, TopicSpec

ROOT = Path(__file__).resolve().parent.parent
POLLS_MAX = 600
PLACES = [TopicPartition("events", n) for n in range(4)]

# A worker in a process of its own: copies `events` to `out`, each batch one transaction, and says what it did.
WORKER = """
import sys
from pathlib import Path
from stream.embedded import EmbeddedLog
from stream.errors import Fenced, Rebalanced, Retryable
from stream.transport import Position

log = EmbeddedLog(Path(sys.argv[1]), lease_s=float(sys.argv[3]))
consumer = log.consumer(group="group", topics=["events"])
producer = log.producer(transactional_id=sys.argv[2])
print("ready", flush=True)
for _ in range(100_000):
    polled = consumer.poll(0.05, 20)
    for partition, position in consumer.committed(polled.assigned).items():
        consumer.seek(partition, position.offset if position else 0)
    consumer.resume(polled.assigned)
    if not polled.records:
        continue
    try:
        producer.begin()
        for partition, records in polled.records.items():
            for record in records:
                producer.send("out", partition.partition, record.key, record.value)
        producer.send_offsets({p: Position(r[-1].offset + 1) for p, r in polled.records.items()}, polled.group)
        producer.commit()
        print("commit", flush=True)
    except Rebalanced:
        producer.abort()
        for partition, records in polled.records.items():
            consumer.seek(partition, records[0].offset)
        print("rebalanced", flush=True)
    except Fenced:
        print("fenced", flush=True)
        sys.exit(3)
"""


@contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `code`; ended with the block."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate(timeout=30)


def worker(path: Path, slot: str, lease_s: float = 30.0) -> object:
    return process(WORKER, path, slot, lease_s)


def wait_for(child: subprocess.Popen[str], line: str, count: int = 1) -> None:
    assert child.stdout is not None
    for said in child.stdout:
        count -= said.strip() == line
        if count == 0:
            return
    raise AssertionError(f"the process ended without saying {line!r}")


def stop_between_writes(child: subprocess.Popen[str], path: Path) -> None:
    """SIGSTOP it, but not while it holds the file's lock: nobody could write until it wakes up (a test of its own)."""
    with Path(f"{path}.lock").open() as lock:
        for _ in range(POLLS_MAX):
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                child.send_signal(signal.SIGCONT)
                time.sleep(0.003)
    raise AssertionError("it always held the lock")


def topics(log: EmbeddedLog, **settings: str) -> None:
    with closing(log.admin()) as admin:
        admin.create([TopicSpec(name=name, partitions=4, settings=settings) for name in ("events", "out")])


def fill(log: EmbeddedLog, count: int, first: int = 0) -> None:
    for place in PLACES:
        log.append(*place, ((b"key", b"%d" % n, n) for n in range(first, first + count)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def log(path: Path) -> Iterator[EmbeddedLog]:
    log = EmbeddedLog(path)
    topics(log)
    yield log
    log.close()


def copied(path: Path) -> list[list[int]]:
    """The values of `out` by partition, read by a fresh look at the file, that also checks the file."""
    with closing(EmbeddedLog(path)) as log, closing(log.reader()) as reader:
        return [
            [int(record.value or b"") for record in reader.read(TopicPartition("out", n), 0, 0, 1_000_000)]
            for n in range(4)
        ]


def drain(path: Path, per_partition: int, lease_s: float = 30.0) -> None:
    """Let a fresh worker finish the rest; the copy is then whole, in order, and without doubles."""
    with worker(path, "last", lease_s):
        for _ in range(POLLS_MAX):
            found = copied(path)
            if sum(map(len, found)) >= 4 * per_partition:
                break
            time.sleep(0.05)
    assert copied(path) == [list(range(per_partition))] * 4


def take(consumer: EmbeddedConsumer, count: int) -> list[TopicPartition]:
    assigned: list[TopicPartition] = []
    for _ in range(POLLS_MAX):
        assigned += consumer.poll(0.02, 100).assigned
        if len(assigned) == count:
            consumer.resume(assigned)
            return sorted(assigned)
    raise AssertionError(f"only {assigned} came")


def next_batch(consumer: EmbeddedConsumer) -> Polled:
    for _ in range(POLLS_MAX):
        polled = consumer.poll(0.02, 100)
        if polled.records:
            return polled
    raise AssertionError("no records came")


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("commits", [1, 4, 9])
def test_a_killed_worker_loses_and_doubles_nothing(path: Path, log: EmbeddedLog, commits: int) -> None:
    """kill -9 somewhere between two commits; the next worker notices the death at once and goes on."""
    fill(log, 300)
    with worker(path, "slot", 3_600) as child:
        wait_for(child, "commit", commits)
        child.kill()
        child.wait(30)
    drain(path, 300, lease_s=3_600)


def test_a_kill_inside_the_write_leaves_no_half(path: Path, log: EmbeddedLog) -> None:
    """Killed with rows written but not committed, while it holds the lock: the rows are gone and the lock is free."""
    code = """
        import os, signal, sys
        from pathlib import Path
        from stream.embedded import EmbeddedLog
        from stream.embedded_producer import EmbeddedProducer
        log = EmbeddedLog(Path(sys.argv[1]))
        real = EmbeddedProducer._retain
        def stop_here(self, db):
            assert db.execute("SELECT count(*) FROM records").fetchone()[0] == 50_000
            os.kill(os.getpid(), signal.SIGKILL)
        EmbeddedProducer._retain = stop_here
        producer = log.producer(transactional_id="slot")
        producer.begin()
        for n in range(50_000):
            producer.send("out", 0, b"k", b"x" * 300)
        producer.commit()
    """
    with process(code, path) as child:
        assert child.wait(60) == -signal.SIGKILL
    assert copied(path) == [[], [], [], []]
    fill(log, 10)
    drain(path, 10)


def test_two_processes_share_the_work(path: Path, log: EmbeddedLog) -> None:
    """Both commit, each event is copied once and in order, while a third process appends."""
    with worker(path, "one") as one, worker(path, "two") as two:
        wait_for(one, "ready")
        wait_for(two, "ready")
        for first in range(0, 400, 100):
            fill(log, 100, first)
        wait_for(one, "commit")
        wait_for(two, "commit")
        for _ in range(POLLS_MAX):
            if sum(map(len, copied(path))) == 1_600:
                break
            time.sleep(0.05)
    assert copied(path) == [list(range(400))] * 4


def test_a_stopped_process_is_replaced_and_fenced(path: Path, log: EmbeddedLog) -> None:
    """SIGSTOP beyond the lease: another worker takes over; the stopped one wakes up and its batch is void."""
    fill(log, 2_000)
    with worker(path, "one", 0.5) as one:
        wait_for(one, "commit", 2)
        stop_between_writes(one, path)
        with worker(path, "two", 0.5) as two:
            wait_for(two, "commit", 3)  # it owns all now
            one.send_signal(signal.SIGCONT)
            for _ in range(POLLS_MAX):
                if sum(map(len, copied(path))) == 8_000:
                    break
                time.sleep(0.05)
    assert copied(path) == [list(range(2_000))] * 4


def test_a_batch_that_was_polled_before_the_lease_ran_out_is_void(path: Path, log: EmbeddedLog) -> None:
    """The check is inside the commit: also when the takeover comes after `send_offsets`."""
    fill(log, 5)
    short = EmbeddedLog(path, lease_s=0.2)
    sleeper, heir = short.consumer(group="g", topics=["events"]), None
    take(sleeper, 4)
    polled = next_batch(sleeper)
    producer = short.producer(transactional_id="slot")
    producer.begin()
    producer.send("out", 0, b"k", b"0")
    producer.send_offsets({p: Position(5) for p in polled.records}, polled.group)
    time.sleep(0.4)
    heir = short.consumer(group="g", topics=["events"])
    take(heir, 4)
    with pytest.raises(Rebalanced):
        producer.commit()
    producer.abort()
    assert heir.committed(PLACES) == dict.fromkeys(PLACES)
    back = sleeper.poll(0, 10)
    assert sorted(back.revoked) == PLACES and not back.records
    for each in (sleeper, heir, producer, short):
        each.close()
    assert copied(path) == [[], [], [], []]


def test_partitions_of_others_are_not_committed(path: Path, log: EmbeddedLog) -> None:
    """The right generation is not enough: a member commits positions of partitions that it owns."""
    fill(log, 5)
    first = log.consumer(group="g", topics=["events"])
    take(first, 4)
    second = log.consumer(group="g", topics=["events"])
    gained: list[TopicPartition] = []
    for _ in range(POLLS_MAX):
        polled = first.poll(0, 100)
        gained += second.poll(0, 100).assigned
        if len(gained) == 2:
            break
    producer = log.producer(transactional_id="slot")
    producer.begin()
    with pytest.raises(Rebalanced, match="not owned"):
        producer.send_offsets({gained[0]: Position(5)}, polled.group)
    for each in (first, second, producer):
        each.close()


def test_a_slot_that_was_taken_over_stops(path: Path, log: EmbeddedLog) -> None:
    """A newer process with the same transactional id fences the older one, which exits."""
    with worker(path, "slot") as older:
        wait_for(older, "ready")
        with closing(log.producer(transactional_id="slot")):
            fill(log, 10)
            wait_for(older, "fenced")
            assert older.wait(30) == 3
    first, second = (log.producer(transactional_id="slot") for _ in range(2))
    with pytest.raises(Fenced):
        first.begin()
    first.close()
    second.close()


def test_a_hanging_writer_is_named(path: Path, log: EmbeddedLog) -> None:
    """While another process holds the lock, a write gives up in time and says what to look at."""
    code = """
        import fcntl, sys, time
        lock = open(sys.argv[1] + ".lock")
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("locked", flush=True)
        time.sleep(60)
    """
    impatient = EmbeddedLog(path, lock_timeout_s=0.2)
    producer = impatient.producer(transactional_id="slot")
    producer.begin()
    producer.send("out", 0, b"k", b"1")
    with process(code, path) as child:
        wait_for(child, "locked")
        with pytest.raises(Retryable, match=r"log\.db\.lock"):
            producer.commit()
    producer.commit()
    producer.close()
    impatient.close()
    assert copied(path)[0] == [1]


# ── damage and full disks ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_truncated_wal_loses_only_its_end(path: Path, tmp_path: Path) -> None:
    """After a crash that tore the write-ahead log, the log opens with whole transactions up to some point."""
    code = """
        import os, signal, sys
        from pathlib import Path
        from stream.embedded import EmbeddedLog
        from stream.transport import TopicSpec
        log = EmbeddedLog(Path(sys.argv[1]))
        log.admin().create([TopicSpec(name=n, partitions=4) for n in ("events", "out")])
        producer = log.producer(transactional_id="slot")
        for n in range(20):
            producer.begin()
            for partition in range(4):
                for m in range(10):
                    producer.send("out", partition, b"k", b"%d" % (10 * n + m))
            producer.commit()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with process(code, path) as child:
        child.wait(60)
    wal = path.with_name("log.db-wal").read_bytes()
    main = path.read_bytes()
    seen = set()
    for share in (0.35, 0.6, 0.8, 0.95, 1.0):
        torn = tmp_path / f"torn-{share}" / "log.db"
        torn.parent.mkdir()
        torn.write_bytes(main)
        torn.with_name("log.db-wal").write_bytes(wal[: int(len(wal) * share)])
        found = copied(torn)
        assert found == [list(range(len(found[0])))] * 4 and len(found[0]) % 10 == 0
        seen.add(len(found[0]))
    assert max(seen) == 200 and len(seen) >= 3


def test_a_full_disk_rolls_back_and_heals(path: Path) -> None:
    """At a file-size limit the commit fails clean with a message; once there is room the same process goes on."""
    code = """
        import resource, sys
        from pathlib import Path
        from stream.embedded import EmbeddedLog
        from stream.errors import Retryable
        from stream.transport import TopicSpec
        log = EmbeddedLog(Path(sys.argv[1]))
        log.admin().create([TopicSpec(name=n, partitions=4) for n in ("events", "out")])
        producer = log.producer(transactional_id="slot")
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, hard))
        stored = 0
        for n in range(40):
            try:
                producer.begin()
                producer.send("out", 0, b"x" * 200_000, b"%d" % stored)
                producer.commit()
                stored += 1
            except Retryable as error:
                assert "file-size limit" in str(error) and sys.argv[1] in str(error), error
                break
        assert 0 < stored < 40, stored
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        producer.close()
        producer = log.producer(transactional_id="slot")
        for n in range(stored, stored + 20):
            producer.begin()
            producer.send("out", 0, b"x" * 200_000, b"%d" % n)
            producer.commit()
        print("stored", stored + 20, flush=True)
    """
    with process(code, path) as child:
        said, _ = child.communicate(timeout=60)
        assert child.returncode == 0
    assert copied(path)[0] == list(range(int(said.split()[1])))


def test_damage_is_found_and_the_file_is_left_alone(path: Path, log: EmbeddedLog) -> None:
    """A damaged page: Corrupt on opening, again at once on the next opening, and nothing is written any more."""
    log.append("events", 0, ((b"k", b"x" * 1_000, n) for n in range(3_000)))
    log.close()
    with path.open("r+b") as file:
        for page in range(20, 60):
            file.seek(page * 16_384)
            file.write(os.urandom(200))
    damaged = path.read_bytes()
    with pytest.raises(Corrupt, match="damaged"):
        EmbeddedLog(path)
    with pytest.raises(Corrupt, match=r"in quarantine.*\.recover.*move it away"):
        EmbeddedLog(path)
    assert path.read_bytes() == damaged


def test_a_running_process_stops_writing_when_another_one_found_damage(path: Path, log: EmbeddedLog) -> None:
    """The quarantine holds for processes that have the file open already."""
    with closing(log.producer(transactional_id="slot")) as producer:
        producer.begin()
        producer.send("out", 0, b"k", b"1")
        path.with_name("log.db.quarantine").write_text("found by somebody else\n")
        with pytest.raises(Corrupt, match="found by somebody else"):
            producer.commit()
        path.with_name("log.db.quarantine").unlink()
    assert copied(path)[0] == []


def test_missing_records_are_damage(path: Path, log: EmbeddedLog) -> None:
    """A partition whose records do not match its bounds is found also in files too large for the full check."""
    fill(log, 10)
    log._file.db.execute("DELETE FROM records WHERE timestamp = 9")
    with pytest.raises(Corrupt, match=r"events-0 do not match its bounds 0\.\.10"):
        EmbeddedLog(path, check_bytes_max=0)


def test_other_files_are_refused_unharmed(tmp_path: Path) -> None:
    """A file that is not a log is a wrong path: ConfigError, and not one byte of it changes."""
    text = tmp_path / "notes.txt"
    text.write_text("precious " * 1_000)
    with pytest.raises(ConfigError, match="not a log"):
        EmbeddedLog(text)
    assert text.read_text() == "precious " * 1_000
    other = tmp_path / "other.db"
    subprocess.run(
        [sys.executable, "-c", f"import sqlite3; sqlite3.connect({str(other)!r}).execute('CREATE TABLE t (x)')"],
        check=True,
    )
    with pytest.raises(ConfigError, match="something else"):
        EmbeddedLog(other)
    with pytest.raises(ConfigError, match="folder"):
        EmbeddedLog(text / "log.db")


def test_a_file_of_another_format_is_refused(path: Path, log: EmbeddedLog) -> None:
    """A later format names both numbers and what to do."""
    log._file.db.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match=r"format 99.*reads 1"):
        EmbeddedLog(path)


# ── growth ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_retention_bounds_the_log(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By time since the append (not by event time), and by bytes; the head moves, offsets go on."""
    monkeypatch.setattr(embedded_producer, "RETENTION_PAUSE_S", 0.0)
    now_s = [1_000_000.0]
    log = EmbeddedLog(path, clock=lambda: now_s[0])
    with closing(log.admin()) as admin, closing(log.reader()) as reader:
        admin.create([TopicSpec(name="timed", partitions=1, settings={"retention.ms": "60000"})])
        admin.create([TopicSpec(name="sized", partitions=1, settings={"retention.bytes": "5000"})])
        for _ in range(10):
            log.append("timed", 0, ((None, b"old event", 0) for _ in range(10)))
            log.append("sized", 0, ((None, b"x" * 100, 0) for _ in range(10)))
            now_s[0] += 20
        head, end = reader.bounds(TopicPartition("timed", 0))
        assert end == 100 and 50 <= head <= 80
        head, end = reader.bounds(TopicPartition("sized", 0))
        assert end == 100 and head == 50
        assert [r.offset for r in reader.read(TopicPartition("sized", 0), 0, 0)] == list(range(50, 100))
    log.close()


def test_deleted_space_is_used_again_and_given_back(path: Path, log: EmbeddedLog) -> None:
    """A log whose head is deleted as it grows stays small, and a large deletion shrinks the file."""
    place = TopicPartition("out", 0)
    with closing(log.admin()) as admin:
        for n in range(1, 31):
            log.append(*place, ((None, b"x" * 500_000, 0) for _ in range(4)))
            admin.delete_records(place, 4 * n - 8)
        admin.delete_records(place, 1_000)
        for _ in range(5):
            admin.delete_records(place, 1_000)
    log.close()
    assert path.stat().st_size < 15 << 20  # 60 MB went through
    assert copied(path)[0] == []


def test_a_read_is_bounded_in_bytes(path: Path, log: EmbeddedLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand large blocks do not come as one answer."""
    monkeypatch.setattr(embedded_records, "READ_BYTES_MAX", 1 << 20)
    log.append("out", 0, ((None, b"x" * 300_000, n) for n in range(20)))
    with closing(log.reader()) as reader:
        offset = 0
        while records := reader.read(TopicPartition("out", 0), offset, 0):
            assert len(records) <= 4
            offset = records[-1].offset + 1
    assert offset == 20
