"""Apache Kafka for tests and benchmarks: one broker in KRaft mode from Maven's jars, without a container engine.

    python tests/kafka_broker.py run            until Ctrl-C; prints host:port
    python tests/kafka_broker.py start          in the background; prints host:port
    python tests/kafka_broker.py stop           ends the one that `start` began

Needs Java 17 or newer and, the first time, Maven; the jars stay in `.kafka/lib` of the repository. Each broker has free
ports, a fresh data folder and limits on every wait, and is ended by its process id.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".kafka"
SOURCES = Path(__file__).resolve().parent / "kafka"
MAVEN_TIMEOUT_S = 420
FORMAT_TIMEOUT_S = 60
READY_TIMEOUT_S = 60
STOP_TIMEOUT_S = 20
START_ATTEMPTS = 3
PORTS = range(15_000, 32_000)


class BrokerUnavailable(Exception):
    """No broker can be had on this machine; the message says what is missing."""


@contextlib.contextmanager
def broker_or_skip(*, elsewhere: bool = False) -> Iterator[None]:
    """Where no broker can be had a test is skipped, but fails in the CI.

    Args:
        elsewhere: nor does the CI need this one where it was given a broker to use (DRIFTLINE_KAFKA).
    """
    import pytest  # this file is a command as well, for environments without it

    try:
        yield
    except BrokerUnavailable as error:
        if os.environ.get("CI") == "true" and not (elsewhere and os.environ.get("DRIFTLINE_KAFKA")):
            pytest.fail(f"CI needs a real Kafka broker: {error}", pytrace=False)
        pytest.skip(f"no Kafka broker: {error}")


@dataclass(kw_only=True, slots=True)
class Broker:
    """A broker that was started here."""

    bootstrap: str
    process: subprocess.Popen[bytes]
    folder: Path
    command: list[str]

    def kill(self) -> None:
        """kill -9: no goodbye, no flush."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)

    def restart(self) -> None:
        """Start it again after `stop` or `kill`, on the same port, with the same data."""
        self.process = _launch(self.command, self.folder, self.bootstrap)

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        """End it, gently first."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_TIMEOUT_S)


def jars() -> Path:
    """The folder with Kafka's jars; fetched by Maven the first time."""
    lib = CACHE / "lib"
    stamp = CACHE / "complete"
    pom = SOURCES / "pom.xml"
    if stamp.exists() and stamp.read_bytes() == pom.read_bytes():
        return lib
    if shutil.which("mvn") is None:
        raise BrokerUnavailable("Maven is missing and the jars are not in .kafka/lib yet; install maven")
    CACHE.mkdir(exist_ok=True)
    fresh = CACHE / f"lib-{os.getpid()}"
    command = ["mvn", "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", f"-DoutputDirectory={fresh}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MAVEN_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BrokerUnavailable(f"Maven did not fetch the jars within {MAVEN_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise BrokerUnavailable(f"Maven could not fetch the jars: {(done.stdout + done.stderr)[-800:]}")
    shutil.rmtree(lib, ignore_errors=True)
    fresh.rename(lib)
    stamp.write_bytes(pom.read_bytes())
    return lib


def java() -> str:
    """The java command, 17 or newer."""
    command = shutil.which("java")
    if command is None:
        raise BrokerUnavailable("Java is missing; install Java 17")
    done = subprocess.run([command, "-version"], capture_output=True, text=True, timeout=30, check=False)
    version = done.stderr.partition('"')[2].partition('"')[0]
    if not version.partition(".")[0].isdigit() or int(version.partition(".")[0]) < 17:
        raise BrokerUnavailable(f"Kafka 4 needs Java 17 or newer, this is {version or 'unknown'}")
    return command


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment.

    Not of the range that outgoing connections are given: a client that tries a killed broker again and again would at
    some time be given the broker's own port, be connected to itself, and keep the broker from coming back.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = PORTS.start + secrets.randbelow(len(PORTS))
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            ports += [port] if port not in ports else []
    return ports


def start(folder: Path, heap: str = "-Xmx1g", extra: str = "") -> Broker:
    """Start a broker with its data and log under `folder`; `extra` are more lines for its properties, which win."""
    command, lib = java(), jars()
    problem = ""
    for attempt in range(START_ATTEMPTS):  # another process may take a port between the look and the start
        home = folder / f"broker-{attempt}"
        home.mkdir(parents=True)
        try:
            return _start_once(command, lib, home, heap, extra)
        except _DidNotStart as error:
            problem = str(error)
    raise BrokerUnavailable(f"Kafka did not start in {START_ATTEMPTS} attempts: {problem}")


class _DidNotStart(Exception):
    pass


def _start_once(command: str, lib: Path, home: Path, heap: str, extra: str) -> Broker:
    port, controller_port = free_ports(2)
    text = f"{(SOURCES / 'server.properties').read_text()}\n{extra}\n"
    for name, value in (("PORT", port), ("CONTROLLER_PORT", controller_port), ("DATA", home / "data")):
        text = text.replace(f"@{name}@", str(value))
    properties = home / "server.properties"
    properties.write_text(text)
    classpath = str(lib / "*")
    cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[:22]
    prepare = [command, "-Xmx256m", "-cp", classpath, "kafka.tools.StorageTool", "format", "-t", cluster]
    done = subprocess.run(
        [*prepare, "-c", str(properties)], capture_output=True, text=True, timeout=FORMAT_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise _DidNotStart((done.stdout + done.stderr)[-800:])
    quiet = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
    serve = [command, heap, "-XX:+UseG1GC", quiet, "-cp", classpath, "kafka.Kafka", str(properties)]
    bootstrap = f"127.0.0.1:{port}"
    process = _launch(serve, home, bootstrap)
    return Broker(bootstrap=bootstrap, process=process, folder=home, command=serve)


def _launch(command: list[str], home: Path, bootstrap: str) -> subprocess.Popen[bytes]:
    """Start the process and wait until it takes connections."""
    host, _, port = bootstrap.partition(":")
    with (home / "broker.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=home, start_new_session=True
        )
    until_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise _DidNotStart((home / "broker.log").read_text(errors="replace")[-800:])
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return process
        time.sleep(0.1)
    process.kill()
    process.wait(STOP_TIMEOUT_S)
    raise _DidNotStart(f"not ready within {READY_TIMEOUT_S} s")


def stop(pid: int) -> None:
    """End the broker of another run by its process id, gently first."""
    for kind, patience_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, 5)):
        try:
            os.kill(pid, kind)
        except ProcessLookupError:
            return
        until_s = time.monotonic() + patience_s
        while time.monotonic() < until_s:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


@contextlib.contextmanager
def running_broker(folder: Path, heap: str = "-Xmx1g", extra: str = "") -> Iterator[str]:
    """host:port of a broker that lives as long as the block."""
    broker = start(folder, heap, extra)
    try:
        yield broker.bootstrap
    finally:
        broker.stop()


def _is_broker(pid: int) -> bool:
    """Whether the process is a broker of ours: a stale file must not end somebody else's process."""
    with contextlib.suppress(OSError):
        return b"kafka.Kafka" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def main() -> int:
    """The command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("action", choices=["start", "stop", "run"])
    parser.add_argument("--heap", default="-Xmx1g", help="JVM heap option (default -Xmx1g)")
    arguments = parser.parse_args()
    note = CACHE / "running"
    try:
        if arguments.action == "stop":
            if not note.exists():
                sys.stderr.write("no broker was started\n")
                return 1
            pid, _, folder = note.read_text().split(maxsplit=2)
            if _is_broker(int(pid)):
                stop(int(pid))
            shutil.rmtree(folder.strip(), ignore_errors=True)
            note.unlink()
            return 0
        if arguments.action == "start" and note.exists() and _is_broker(int(note.read_text().split()[0])):
            sys.stdout.write(note.read_text().split()[1] + "\n")
            return 0
        folder = tempfile.mkdtemp(prefix="driftline-kafka-")
        if arguments.action == "start":
            broker = start(Path(folder), arguments.heap)
            note.write_text(f"{broker.pid} {broker.bootstrap} {folder}\n")
            sys.stdout.write(broker.bootstrap + "\n")
            return 0
        try:
            with running_broker(Path(folder), arguments.heap) as bootstrap:
                sys.stdout.write(bootstrap + "\n")
                sys.stdout.flush()
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
                with contextlib.suppress(KeyboardInterrupt):
                    signal.pause()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return 0
    except BrokerUnavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
