"""TLS, SASL/SCRAM and ACLs on a real broker: the documented rights suffice, and what is wrong is said in one line."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from digest_app import make_worker, topic_names
from kafka import KafkaAdminClient
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePattern,
    ResourceType,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from kafka_broker import BrokerUnavailable, broker_or_skip, free_ports, running_broker
from test_stream_learning import Silent, Tally

from stream.assembly import check_rights, check_topics, make_decoder, names_of, topic_specs
from stream.checkpoint import TopicNames
from stream.cli import main
from stream.errors import ConfigError
from stream.kafka import KafkaLog
from stream.learning import LearnerLoop, LearnerPace
from stream.loading import load
from stream.orders import Erasures
from stream.testing import digest_event
from stream.transport import TopicSpec

pytestmark = pytest.mark.kafka
ROOT = Path(__file__).resolve().parent.parent
PASSWORD = "correct-horse"
STORE_PASSWORD = "only-for-this-test"
PARTITIONS = 2
SRC, DST = "c-source", "c-rekeyed"
POSITIONS = f"{DST}-rekey-positions"
SETS = [
    "app.name=c", "topics.prefix=c-", 'topics.events=["c-events"]', f"topics.partitions={PARTITIONS}",
    "topics.retention_h=-1",
]  # fmt: skip
RESOURCES = {"topic": "TOPIC", "group": "GROUP", "transactional id": "TRANSACTIONAL_ID"}
Right = tuple[str, str, str, bool]  # resource, name, operation, prefixed


@dataclass(kw_only=True, slots=True)
class Secured:
    """A broker with an open listener for the test itself and a closed one for everybody else."""

    open_at: str
    closed_at: str
    certificate: Path
    other_certificate: Path
    names: TopicNames

    def settings(self, folder: Path, user: str = "worker", **more: Any) -> dict[str, Any]:
        secret = folder / "password"
        secret.write_text(PASSWORD + "\n")
        base: dict[str, Any] = {
            "bootstrap_servers": self.closed_at,
            "bootstrap_timeout_ms": 12_000,
            "security_protocol": "SASL_SSL",
            "ssl_cafile": str(self.certificate),
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_plain_username": user,
            "sasl_plain_password": f"file:{secret}",
        }
        return base | more


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A key store for the broker and the certificate that clients are to trust."""
    store, pem = folder / f"{name}.p12", folder / f"{name}.pem"
    tool = shutil.which("keytool")
    if tool is None:
        raise BrokerUnavailable("the JDK's keytool is missing")
    common = ["-alias", name, "-keystore", str(store), "-storepass", STORE_PASSWORD, "-storetype", "PKCS12"]
    made = ["-keyalg", "RSA", "-keysize", "2048", "-dname", "CN=localhost", "-validity", "2", "-ext", "bc:c=ca:true"]
    made += ["-ext", "san=ip:127.0.0.1,dns:localhost"]
    for line in ([tool, "-genkeypair", *common, *made], [tool, "-exportcert", "-rfc", *common, "-file", str(pem)]):
        subprocess.run(line, check=True, capture_output=True, timeout=60)
    return store, pem


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    with broker_or_skip():
        store, trusted = certificate(folder, "broker")
        _, other = certificate(folder, "other")
        (port,) = free_ports(1)
        extra = f"""
listeners=PLAINTEXT://127.0.0.1:@PORT@,CONTROLLER://127.0.0.1:@CONTROLLER_PORT@,CLOSED://127.0.0.1:{port}
advertised.listeners=PLAINTEXT://127.0.0.1:@PORT@,CLOSED://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,CLOSED:SASL_SSL
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.closed.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
ssl.keystore.location={store}
ssl.keystore.password={STORE_PASSWORD}
ssl.keystore.type=PKCS12
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
"""
        with running_broker(folder, "-Xmx512m", extra) as opened:
            names = topic_names("s-")
            client = KafkaAdminClient(bootstrap_servers=opened)
            users = ("worker", "nobody")
            client.alter_user_scram_credentials(
                [UserScramCredentialUpsertion(user, ScramMechanism.SCRAM_SHA_512, PASSWORD) for user in users]
            )
            client.close()
            log = KafkaLog({"bootstrap_servers": opened})
            admin = log.admin()
            every = [*names.events, names.state, names.weights, *names.outputs.values()]
            admin.create([TopicSpec(name=n, partitions=PARTITIONS, settings={"retention.ms": "-1"}) for n in every])
            admin.close()
            log.close()
            yield Secured(
                open_at=opened,
                closed_at=f"127.0.0.1:{port}",
                certificate=trusted,
                other_certificate=other,
                names=names,
            )


def documented(role: str, names: TopicNames, app: str) -> list[Right]:
    """The rights of a role's table in docs/security.md, for these topics and this application."""
    text = (ROOT / "docs" / "security.md").read_text().partition(f"### {role}\n")[2].partition("\n###")[0]
    assert text, f"no table for {role}"
    roles = dict(names.outputs, events=names.events[0], state=names.state, weights=names.weights)
    given = {"SRC": SRC, "DST": DST, "DST-rekey-positions": POSITIONS}
    if names.control:
        roles["control"] = names.control
    every = list(roles.values())
    rights: list[Right] = []
    for row in text.strip().splitlines()[2:]:
        resource, name, operations, _ = (cell.strip() for cell in row.strip("|").split("|"))
        prefixed = "(prefixed)" in name
        name = name.replace("(prefixed)", "").strip().replace("APP", app)
        if resource == "topic":
            found = [given.get(n.strip()) or roles.get(n.strip().replace("-", "_")) for n in name.split(",")]
            places = every if name.startswith("every") else [n for n in found if n]
        else:
            places = [name.replace("DST", DST)]
        rights += [(resource, p, o.strip(), prefixed) for p in places for o in operations.split(",")]
    return rights


def acls(rights: list[Right], user: str) -> list[ACL]:
    return [
        ACL(
            principal=f"User:{user}",
            host="*",
            operation=ACLOperation[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).upper()],
            permission_type=ACLPermissionType.ALLOW,
            resource_pattern=ResourcePattern(
                ResourceType[RESOURCES[resource]],
                name,
                ACLResourcePatternType.PREFIXED if prefixed else ACLResourcePatternType.LITERAL,
            ),
        )
        for resource, name, operation, prefixed in rights
    ]


@pytest.fixture
def rights(secured: Secured) -> Iterator[Any]:
    """Grants rights to the user `worker`, and takes them back."""
    client = KafkaAdminClient(bootstrap_servers=secured.open_at)
    given: list[ACL] = []

    def grant(granted: list[Right]) -> None:
        fresh = acls(granted, "worker")
        given.extend(fresh)
        client.create_acls(fresh)
        time.sleep(0.5)  # the broker hears of it from its controller

    yield grant
    client.delete_acls(given)
    client.close()


def work(secured: Secured, folder: Path, app: str, count: int = 40) -> None:
    """A worker of the documented role handles events until they are done."""
    feed = KafkaLog({"bootstrap_servers": secured.open_at})
    for partition in range(PARTITIONS):
        feed.append(secured.names.events[0], partition, iter(digest_event("u", n) for n in range(count)))
    feed.close()
    log = KafkaLog(secured.settings(folder), transaction_timeout_s=10)
    try:
        check_rights(log, secured.names.state, [*secured.names.inputs, secured.names.weights, secured.names.state])
        worker = make_worker(log, secured.names, partitions=PARTITIONS, app=app, settings={"retries_max": 3})
        try:
            until_s = time.monotonic() + 60
            while sum(s.seen for s in worker.states.values()) < count * PARTITIONS:
                worker.turn()
                assert time.monotonic() < until_s
        finally:
            worker.close()
    finally:
        log.close()


def without(rights: list[Right], missing: tuple[str, str, str]) -> list[Right]:
    """All but one line of a table."""
    left = [right for right in rights if right[:3] != missing]
    assert len(left) == len(rights) - 1, "the table has this line"
    return left


def test_the_documented_rights_suffice(secured: Secured, rights: Any, tmp_path: Path) -> None:
    """With exactly the worker's table: checks at start, restore, transactions, outputs, state, DeleteRecords."""
    rights(documented("worker", secured.names, "app"))
    work(secured, tmp_path, "app")


@pytest.mark.parametrize(
    ("resource", "place", "operation", "said"),
    [
        ("topic", "s-events", "Read", "no right to read topic 's-events'"),
        ("topic", "s-weights", "Read", "no right to read topic 's-weights'"),
        ("topic", "s-state", "Delete", "s-state cannot be kept short"),
        ("topic", "s-forecasts", "Write", "s-forecasts|TopicAuthorization"),
        ("group", "app", "Read", "Group"),
        ("transactional id", "app.", "Write", "TransactionalId"),
    ],
)
def test_a_missing_right_is_said(
    secured: Secured, rights: Any, tmp_path: Path, resource: str, place: str, operation: str, said: str
) -> None:
    """Without any one of them the worker stops with a ConfigError (exit code 2) that names what it may not do."""
    rights(without(documented("worker", secured.names, "app"), (resource, place, operation)))
    with pytest.raises(ConfigError, match=said) as caught:
        work(secured, tmp_path, "app")
    assert "\n" not in str(caught.value)


# ── learner and commands, under a real configuration ──────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def topics(secured: Secured) -> TopicNames:
    """The topics of a real configuration, and those of a `rekey`."""
    config = load(None, SETS).config
    log = KafkaLog({"bootstrap_servers": secured.open_at})
    admin = log.admin()
    admin.create([*topic_specs(config), *(TopicSpec(name=n, partitions=PARTITIONS) for n in (SRC, DST, POSITIONS))])
    admin.close()
    log.append(SRC, 0, [(b"k", b'{"user": "u1", "interest": "a", "time": 1764037335000}', 1_764_037_335_000)])
    log.close()
    labels = config.topics.prefix + "labels"
    names = names_of(config)
    return msgspec.structs.replace(names, outputs={**names.outputs, "labels": labels})


def learn(secured: Secured, folder: Path) -> None:
    """A learner that publishes two versions and deletes the first one, with a model that only counts."""
    config = load(None, SETS).config
    log = KafkaLog(secured.settings(folder), transaction_timeout_s=10)
    names = names_of(config)
    try:
        check_topics(log, config)
        check_rights(log, names.weights, [*names.inputs, names.weights])
        loop = LearnerLoop(
            transport=log, topics=names, app="c", decoder=make_decoder(config), fresh=Tally, observer=Silent(),
            restore=lambda payload, version: Tally(version), clock=time.monotonic, sleep=time.sleep,
            nonce=lambda: os.urandom(8).hex(), erasures=Erasures(log.reader(), names.control, PARTITIONS),
            pace=LearnerPace(
                publish_interval_s=0.01, steps_per_turn_max=100, cpu_share=1.0, rebuild_events=10, keep_versions=1,
                batch_events_max=10, poll_timeout_s=0.2, retries_max=3, backoff_s=0.05,
            ),
        )  # fmt: skip
        feed = KafkaLog({"bootstrap_servers": secured.open_at})
        try:
            until_s = time.monotonic() + 40
            first = loop.model.version
            while loop.model.version < first + 2:
                feed.append(names.events[0], 0, [digest_event("u", 1)])
                loop.turn()
                assert time.monotonic() < until_s
        finally:
            feed.close()
            loop.close()
    finally:
        log.close()


def test_the_learners_rights_suffice(secured: Secured, topics: TopicNames, rights: Any, tmp_path: Path) -> None:
    """With exactly the learner's table: checks at start, orders, versions, positions, older versions deleted."""
    rights(documented("learner", topics, "c"))
    learn(secured, tmp_path)


@pytest.mark.parametrize(
    ("resource", "place", "operation", "said"),
    [
        ("topic", "c-control", "Read", "no right to read topic 'c-control'"),  # it is empty
        ("topic", "c-weights", "Write", "c-weights|TopicAuthorization"),
        ("topic", "c-weights", "Delete", "c-weights cannot be kept short"),
        ("group", "c.learner", "Read", "Group"),
        ("transactional id", "c.learner", "Write", "TransactionalId"),
    ],
)
def test_a_right_that_the_learner_lacks_is_said(
    secured: Secured, topics: TopicNames, rights: Any, tmp_path: Path,
    resource: str, place: str, operation: str, said: str,
) -> None:  # fmt: skip
    """Without any one of them the learner stops with a ConfigError in one line."""
    rights(without(documented("learner", topics, "c"), (resource, place, operation)))
    with pytest.raises(ConfigError, match=said) as caught:
        learn(secured, tmp_path)
    assert "\n" not in str(caught.value)


MAP = "user=user,interest=interest,time=time"
EVENT = '{"user": "u1", "interest": "a", "time": 1764037335000}\n'
SIMULATE = ["simulate", "--users", "5", "--events", "20"]
COMMANDS = [
    ("topics create", ["topics", "create"], ("c-alerts", "Describe"), "c-alerts"),
    ("topics list", ["topics", "list"], ("c-alerts", "Describe"), "no right to describe topic"),
    ("doctor", ["doctor"], ("c-events", "Read"), "1 of these would stop a run"),
    ("tail", ["tail", "alerts", "--no-follow"], ("c-alerts", "Read"), "c-alerts"),
    ("user and explain", ["user", "u1"], ("c-state", "Read"), "c-state"),
    ("user and explain", ["explain", "c-events/0/0"], ("c-alerts", "Read"), "c-alerts"),
    ("replay and simulate", ["replay", "EVENTS", "--map", MAP], ("c-events", "Write"), "AuthorizationFailed"),
    ("replay and simulate", SIMULATE, ("c-events", "Write"), "AuthorizationFailed"),
    ("forget", ["forget", "u1"], ("c-control", "Write"), "no right to describe topic 'c-control'"),
    ("rekey", ["rekey", "SRC", "DST", "--until-end"], ("c.rekey.c-rekeyed", "Read"), "Group"),
    ("rekey", ["rekey", "SRC", "DST", "--until-end"], (POSITIONS, "Read"), POSITIONS),
]  # fmt: skip


@pytest.mark.parametrize(("table", "words", "missing", "said"), COMMANDS, ids=[" ".join(c[1][:2]) for c in COMMANDS])
def test_the_commands_rights_suffice_and_are_needed(
    secured: Secured, topics: TopicNames, rights: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    table: str, words: list[str], missing: tuple[str, str], said: str,
) -> None:  # fmt: skip
    """With exactly its table a command works; without one line of it it ends with one clear line and exit code 2."""
    (tmp_path / "events.jsonl").write_text(EVENT)
    places = {"EVENTS": str(tmp_path / "events.jsonl"), "SRC": SRC, "DST": DST}
    sets = [part for key, value in secured.settings(tmp_path).items() for part in ("--set", f"kafka.{key}={value}")]
    line = [places.get(word, word) for word in words] + sets + [part for s in SETS for part in ("--set", s)]
    every = documented(table, topics, "c")
    taken = next(right for right in every if right[1:3] == missing)
    rights(without(every, taken[:3]))
    code, told = run(line, capsys)
    assert code == 2 and said in told.strip() and len(told.strip().splitlines()) == 1, told
    rights([taken])
    code, told = run(line, capsys)
    if table != "user and explain":
        assert code == 0, told
    else:  # there is no such user and no such alert: it could look
        assert code == 2 and re.search("nothing is known of user 'u1'|no alert", told), told


def run(line: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """`driftline LINE` in this process: its exit code and what it said to standard error."""
    root = logging.getLogger()
    handlers, levels = list(root.handlers), {n: logging.getLogger(n).level for n in (None, "kafka", "numba")}
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as ended:
            main([*line, "--set", "transport=kafka"])
    finally:
        root.handlers[:] = handlers
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for number, handler in before.items():
            signal.signal(number, handler)
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("driftline:")]
    return int(ended.value.code or 0), "\n".join(said)


def command(settings: dict[str, Any], *words: str) -> subprocess.CompletedProcess[str]:
    sets = [part for key, value in settings.items() for part in ("--set", f"kafka.{key}={value}")]
    line = [sys.executable, "-m", "stream.cli", *words, "--transport", "kafka", *sets, "--set", "topics.prefix=s-"]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and PASSWORD not in done.stderr + done.stdout, done.stderr
    return lines[0]


def test_what_is_wrong_with_the_connection_is_one_line(secured: Secured, tmp_path: Path) -> None:
    """A certificate nobody trusts, a wrong password, an account without rights: one line each, exit code 2."""
    strange = command(secured.settings(tmp_path, ssl_cafile=str(secured.other_certificate)), "topics", "list")
    assert re.search(r"certificate|CERTIFICATE", one_line(strange))
    refused = command(secured.settings(tmp_path, sasl_plain_password="wrong"), "topics", "list")
    said = one_line(refused)  # the library does not always hear why before the time is up: then where to look
    assert "does not let us in" in said and "sasl_* settings" in said
    nobody = command(secured.settings(tmp_path, user="nobody"), "topics", "list")
    assert "no right to describe topic" in one_line(nobody) and "docs/security.md" in one_line(nobody)
