"""TLS, SASL/SCRAM and ACLs on a real broker: the documented rights suffice, and what is wrong is said in one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from kafka_broker import BrokerUnavailable, free_ports, running_broker

from stream.assembly import check_rights
from stream.checkpoint import TopicNames
from stream.errors import ConfigError
from stream.kafka import KafkaLog
from stream.testing import digest_event
from stream.transport import TopicSpec

pytestmark = pytest.mark.kafka
ROOT = Path(__file__).resolve().parent.parent
PASSWORD = "correct-horse"
STORE_PASSWORD = "only-for-this-test"
PARTITIONS = 2
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
    try:
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
    except BrokerUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs a real Kafka broker: {error}", pytrace=False)
        pytest.skip(f"no Kafka broker: {error}")


def documented(role: str, names: TopicNames, app: str) -> list[Right]:
    """The rights of a role's table in docs/security.md, for these topics and this application."""
    text = (ROOT / "docs" / "security.md").read_text().partition(f"### {role}\n")[2].partition("\n###")[0]
    every = [*names.events, names.state, names.weights, *names.outputs.values()]
    roles = dict(names.outputs, events=names.events[0], state=names.state, weights=names.weights)
    rights: list[Right] = []
    for row in text.splitlines()[3:]:
        resource, name, operations, _ = (cell.strip() for cell in row.strip("|").split("|"))
        prefixed = "(prefixed)" in name
        name = name.replace("(prefixed)", "").strip().replace("APP", app)
        if resource == "topic":
            found = [roles.get(n.strip().replace("-", "_"), "") for n in name.split(",")]
            places = every if name.startswith("every") else [n for n in found if n]
        else:
            places = [name]
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
        given.extend(acls(granted, "worker"))
        client.create_acls(given)
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
        check_rights(log, secured.names.state)
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


def test_the_documented_rights_suffice(secured: Secured, rights: Any, tmp_path: Path) -> None:
    """With exactly the worker's table: checks at start, restore, transactions, outputs, state, DeleteRecords."""
    rights(documented("worker", secured.names, "app"))
    work(secured, tmp_path, "app")


@pytest.mark.parametrize(
    ("resource", "place", "operation", "said"),
    [
        ("topic", "s-events", "Read", "s-events"),
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
    every = documented("worker", secured.names, "app")
    left = [right for right in every if right[:3] != (resource, place, operation)]
    assert len(left) == len(every) - 1, "the table has this line"
    rights(left)
    with pytest.raises(ConfigError, match=said) as caught:
        work(secured, tmp_path, "app")
    assert "\n" not in str(caught.value)


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
