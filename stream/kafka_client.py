"""What all Kafka clients of the adapter share: connection settings, secrets, bounded connecting, errors.

`[kafka]` is passed through by kafka-python's own names. What decides about exactly-once is set here and cannot be
overridden. Secrets are revealed when a client is made, never kept, and never shown: the client library writes its
settings to its debug log, so a secret goes in as a string whose repr hides it.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka import errors as kafka_errors
from kafka.codec import has_lz4, has_snappy, has_zstd
from kafka.net.compat import KafkaNetClient

from stream.config import Secret, is_reference
from stream.errors import ConfigError, Corrupt, DriftlineError, Fenced, Rebalanced, Retryable

CONNECT_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_MS = 6_000  # below the transaction timeout, so that one lost request does not lose the transaction
_KNOCK_TIMEOUT_S = 2.0
_KNOCK_PAUSE_S = 0.2
_REASON_CHARS_MAX = 240

_OURS = {
    "allow_auto_create_topics": False,
    "enable_auto_commit": False,
    "enable_idempotence": True,
    "isolation_level": "read_committed",
    "key_deserializer": None,
    "key_serializer": None,
    "value_deserializer": None,
    "value_serializer": None,
}
_SET_PER_CLIENT = {
    "acks", "auto_offset_reset", "consumer_timeout_ms", "default_offset_commit_callback", "group_id",
    "group_instance_id", "kafka_client", "partition_assignment_strategy", "partitioner", "retries",
    "transaction_timeout_ms", "transactional_id",
}  # fmt: skip
_CODECS: dict[str, tuple[Callable[[], bool], str]] = {
    "lz4": (has_lz4, "lz4"),
    "snappy": (has_snappy, "python-snappy"),
    "zstd": (has_zstd, "zstandard"),
}
_Client = TypeVar("_Client")


class _Hidden(str):
    """A string that works as one, but does not show itself in a printed or logged collection."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'(hidden)'"


class ConnectionSettings:
    """The `[kafka]` settings, checked; each client gets those that it knows."""

    def __init__(self, settings: Mapping[str, object]) -> None:
        """Check the names.

        Raises:
            ConfigError: an unknown setting, one that the adapter sets itself, or a missing extra package.
        """
        known = {*KafkaConsumer.DEFAULT_CONFIG, *KafkaProducer.DEFAULT_CONFIG, *KafkaAdminClient.DEFAULT_CONFIG}
        for key in settings:
            if key in _OURS or key in _SET_PER_CLIENT:
                raise ConfigError(f"kafka.{key} is set by driftline itself, exactly-once rests on it; remove it")
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]}?" if close else "see kafka-python's client settings"
                raise ConfigError(f"kafka.{key} is not a setting of kafka-python; {hint}")
        if importlib.util.find_spec("crc32c") is None:
            raise ConfigError(
                "the crc32c package is missing (checksums would cap reading at 5 MB/s); pip install crc32c"
            )
        self._settings = dict(settings)
        self._was_connected = False  # then a broker that does not answer is a fault that may pass, not a wrong setting
        check_codec(str(settings.get("compression_type") or "none"), "kafka.compression_type")

    def __repr__(self) -> str:
        return f"ConnectionSettings({self.servers}, {', '.join(sorted(self._settings))})"

    @property
    def servers(self) -> str:
        """The bootstrap servers, for messages."""
        value = self._settings.get("bootstrap_servers", "127.0.0.1:9092")
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    def get(self, name: str, default: Any) -> Any:
        return self._settings.get(name, default)

    def connect(self, client: Callable[..., _Client], **ours: object) -> _Client:
        """A client with the settings that it knows, connected within a bounded time.

        Raises:
            ConfigError: no broker answers, or it refuses us; says which and why.
            Retryable: no broker answers, but one did before.
        """
        known = client.DEFAULT_CONFIG  # type: ignore[attr-defined]
        defaults = {
            "bootstrap_timeout_ms": int(CONNECT_TIMEOUT_S * 1000),
            "request_timeout_ms": REQUEST_TIMEOUT_MS,
            "retry_backoff_ms": 10,  # the default of 100 makes back-to-back transactions take 114 ms instead of 21
            "reconnect_backoff_max_ms": 1_000,
            "metrics_enabled": False,
        }
        given = {key: _plain(key, value) for key, value in self._settings.items()}
        merged = {**defaults, **given, **_OURS, **ours}
        merged["bootstrap_servers"] = self.servers.split(",")
        networks: list[Any] = []

        def network(*arguments: Any, **options: Any) -> KafkaNetClient:
            networks.append(KafkaNetClient(*arguments, **options))
            return networks[-1]

        merged["kafka_client"] = network
        self._knock()
        with _last_words(quiet=not self._was_connected) as heard:
            try:
                made = client(**{key: value for key, value in merged.items() if key in known})
                self._was_connected = True
                return made
            except (kafka_errors.KafkaTimeoutError, OSError) as error:
                _end(networks)
                raise self._refused(heard() or _short(error)) from None
            except (kafka_errors.KafkaError, ValueError, TypeError, AssertionError, RuntimeError) as error:
                _end(networks)
                raise ConfigError(f"[kafka] cannot be used: {_short(error)}") from None

    def _knock(self) -> None:
        """Wait for a broker to take a plain connection: says at once what is wrong, where the client only times out."""
        if self._settings.get("proxy_url") or self._settings.get("socks5_proxy"):
            return
        patience_s = float(self.get("bootstrap_timeout_ms", CONNECT_TIMEOUT_S * 1000)) / 1000
        until_s = time.monotonic() + patience_s
        while True:
            problem: Exception = ValueError("no server is named")
            for server in self.servers.split(","):
                host, _, port = server.strip().rpartition(":")
                try:
                    socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_TIMEOUT_S).close()
                    return
                except ValueError:
                    raise ConfigError(f"kafka.bootstrap_servers: {server!r} is not host:port") from None
                except OSError as error:
                    problem = error
            if time.monotonic() >= until_s:
                raise self._absent(f"no Kafka broker answers at {self.servers} within {patience_s:g} s ({problem})")
            time.sleep(min(_KNOCK_PAUSE_S, patience_s))

    def _absent(self, message: str) -> DriftlineError:
        if self._was_connected:
            return Retryable(message)
        return ConfigError(f"{message}; check kafka.bootstrap_servers and that the broker runs")

    def _refused(self, reason: str) -> DriftlineError:
        why = f" ({reason})" if reason else ""
        if self._was_connected:
            return Retryable(f"the Kafka broker at {self.servers} does not answer any more{why}")
        return ConfigError(
            f"the Kafka broker at {self.servers} is there but does not let us in{why}; "
            "check security_protocol and the ssl_* and sasl_* settings in [kafka]"
        )


def _end(networks: Iterable[KafkaNetClient]) -> None:
    """End the threads and connections that a client leaves behind when it cannot be made."""
    for network in networks:
        network.close()


def _plain(key: str, value: object) -> object:
    """The value as the client wants it; a text that may be secret hides itself."""
    if isinstance(value, Secret):
        return _Hidden(value.reveal())
    if is_reference(value):
        return _Hidden(Secret(str(value)).reveal())
    if isinstance(value, str) and any(word in key for word in ("password", "secret", "token", "proxy")):
        return _Hidden(value)
    return value


def check_codec(name: str, where: str) -> None:
    """Refuse a compression whose package is missing.

    Raises:
        ConfigError: names the package.
    """
    available, package = _CODECS.get(name, (lambda: True, ""))
    if not available():
        raise ConfigError(f"{where} is {name}, but the package for it is missing; pip install {package}")


@contextmanager
def _last_words(*, quiet: bool) -> Iterator[Callable[[], str]]:
    """Hear the client library's warnings of this thread's time: they alone tell why a connection failed.

    Args:
        quiet: keep them from the log, which is to say the reason once and not at every try.
    """
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear = Ear(logging.WARNING)
    logger = logging.getLogger("kafka")
    logger.addHandler(ear)
    try:
        with hushed() if quiet else nullcontext():
            yield lambda: _short(_cause(said))
    finally:
        logger.removeHandler(ear)


@contextmanager
def hushed() -> Iterator[None]:
    """Keep the client library's complaints from the log, while it tries to connect or takes its leave over TLS."""

    def not_the_library(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or not record.name.startswith("kafka.")

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(not_the_library)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(not_the_library)


def _cause(said: list[str]) -> str:
    """The newest line that names a cause; what the library says when it gives up names none."""
    failures = [line for line in reversed(said) if "rror" in line or "ailed" in line]
    named = [line for line in failures if re.search(r"certificate|CERTIFICATE|[Aa]uthenticat|[Aa]uthoriz", line)]
    return next(iter(named + failures), "")


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _REASON_CHARS_MAX else text[:_REASON_CHARS_MAX] + "..."


_BY_CLASS: list[tuple[tuple[type[Exception], ...], Callable[[str], DriftlineError]]] = [
    ((kafka_errors.ProducerFencedError, kafka_errors.InvalidProducerEpochError), Fenced),
    (
        (
            kafka_errors.CommitFailedError,
            kafka_errors.IllegalGenerationError,
            kafka_errors.UnknownMemberIdError,
            kafka_errors.RebalanceInProgressError,
        ),
        Rebalanced,
    ),
    (
        (
            kafka_errors.AuthorizationError,
            kafka_errors.SaslAuthenticationFailedError,
            kafka_errors.UnknownTopicOrPartitionError,
            kafka_errors.InvalidTopicError,
            kafka_errors.KafkaConfigurationError,
            kafka_errors.UnsupportedCodecError,
            kafka_errors.UnsupportedVersionError,
            kafka_errors.MessageSizeTooLargeError,
            kafka_errors.RecordListTooLargeError,
            kafka_errors.OffsetOutOfRangeError,
            kafka_errors.NoOffsetForPartitionError,
            kafka_errors.InvalidSessionTimeoutError,
            kafka_errors.InvalidTransactionTimeoutError,
            kafka_errors.InconsistentGroupProtocolError,
            kafka_errors.PolicyViolationError,
            kafka_errors.InvalidReplicationFactorError,
            kafka_errors.InvalidConfigurationError,
        ),
        ConfigError,
    ),
    ((kafka_errors.CorruptRecordError,), Corrupt),
]


def translated(error: Exception, doing: str) -> DriftlineError:
    """The client library's error as one of ours; what is not known to be final is Retryable."""
    for classes, ours in _BY_CLASS:
        if isinstance(error, classes):
            return ours(f"{doing}: {type(error).__name__}: {_short(error)}")
    if "ClusterAuthorizationFailed" in str(error):  # no right to write to any topic; the library has no class for it
        return ConfigError(f"{doing}: {_short(error)}; grant what docs/security.md lists")
    return Retryable(f"{doing}: {type(error).__name__}: {_short(error)}")


@contextmanager
def translating(doing: str) -> Iterator[None]:
    """Raise our errors in place of the client library's."""
    try:
        yield
    except kafka_errors.KafkaError as error:
        raise translated(error, doing) from error


class Topics:
    """Partition counts by topic, asked of the broker once; safe for several threads."""

    def __init__(self, ask: Callable[[str], int | None]) -> None:
        self._ask = ask
        self._known: dict[str, int] = {}
        self._lock = threading.Lock()

    def check(self, topic: str, partition: int = 0) -> int:
        """The number of partitions.

        Raises:
            ConfigError: the topic or the partition is missing.
        """
        count = self._known.get(topic)
        if count is None or partition >= count:
            with self._lock:
                count = self._ask(topic)
            if count is not None:
                self._known[topic] = count
        if count is None or not 0 <= partition < count:
            problem = "is missing" if count is None else f"has {count} partitions, there is no number {partition}"
            raise ConfigError(f"topic {topic!r} {problem}; create it with `driftline topics create`")
        return count
