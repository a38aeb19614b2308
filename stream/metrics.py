"""What a process tells the outside world: Prometheus metrics, health and readiness, and its log of what happened.

Beside the way of an event: worker and learner report here after each turn; nothing flows back. A registry is made by
`new_registry` and passed on; importing this file registers nothing.

    /metrics   Prometheus text; every name is in the tables below
    /healthz   200 while the loop shows signs of life, 503 once it has been silent for SILENT_MAX_S
    /readyz    200 once the process does its work: a worker owns partitions and restores none, a learner has read

All names start with `driftline_`, but for the process's own figures.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from stream.errors import ConfigError
from stream.records import BatchMetrics
from stream.worker import Turn

log = logging.getLogger(__name__)

SILENT_MAX_S = 60.0
PROGRESS_LOG_S = 10.0
REQUEST_TIMEOUT_S = 5.0
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_RECORDS = (1, 4, 16, 64, 256, 1_024, 4_096, 16_384, 65_536)
_COUNTS = {
    "records": "Input records consumed, bad ones included",
    "events": "Events used",
    "dead_letters": "Records written to the dead letters",
    "late": "Late events, whatever was done with them",
    "forecasts": "Forecasts published",
    "alerts": "Interest-shift alerts published",
    "new_users": "Users seen for the first time",
}
_QUIET = frozenset({"restoring"})  # events that tell of progress, not of a change


def new_registry() -> CollectorRegistry:
    """An empty registry with the process's own figures (memory, CPU time, open files)."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


class Health:
    """Whether the loop is alive and does its work; written by the loop's thread, read by the server's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen_s = clock()
        self._not_ready = "starting"

    def beat(self, not_ready: str = "") -> None:
        """A sign of life; `not_ready` says why the work is not being done yet."""
        self._seen_s = self._clock()
        self._not_ready = not_ready

    def live(self) -> tuple[bool, str]:
        silent_s = self._clock() - self._seen_s
        return silent_s < SILENT_MAX_S, f"last sign of life {silent_s:.1f} s ago"

    def ready(self) -> tuple[bool, str]:
        live, why = self.live()
        return (live and not self._not_ready), (why if not live else self._not_ready or "ready")


class _Progress:
    """A line in the log every PROGRESS_LOG_S while something happens."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since_s = clock()
        self._count = 0

    def add(self, count: int, **facts: object) -> None:
        self._count += count
        passed_s = self._clock() - self._since_s
        if passed_s >= PROGRESS_LOG_S and self._count:
            log.info(
                "event=progress %s", _pairs({"events": self._count, "rate": round(self._count / passed_s), **facts})
            )
            self._count, self._since_s = 0, self._clock()


class WorkerMetrics:
    """A worker's observer (worker.Observer): counts, times, quality, faults."""

    def __init__(
        self, registry: CollectorRegistry, health: Health, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._health = health
        self._progress = _Progress(clock)
        self._counts = {n: Counter(f"driftline_{n}", text, registry=registry) for n, text in _COUNTS.items()}
        self._batches = Histogram("driftline_batch_records", "Records of a batch", buckets=_RECORDS, registry=registry)
        self._stages = Histogram(
            "driftline_batch_seconds", "Time of a batch by stage", ["stage"], buckets=_SECONDS, registry=registry
        )
        self._scored = Counter(
            "driftline_scored", "Events whose earlier forecast was scored (all, or moves: not the last interest again)",
            ["events"], registry=registry,
        )  # fmt: skip
        self._ranks = Counter(
            "driftline_reciprocal_ranks", "Sum of 1/rank of what came, by ranking (driftline or recency)",
            ["ranking", "events"], registry=registry,
        )  # fmt: skip
        self._hits = Counter(
            "driftline_hits_10", "Scored events whose interest was among the first ten", ["ranking", "events"],
            registry=registry,
        )  # fmt: skip
        self._partitions = Gauge("driftline_partitions", "Partitions that run here", registry=registry)
        self._restoring = Gauge("driftline_partitions_restoring", "Partitions on their way in", registry=registry)
        self._users = Gauge("driftline_users", "Users held in memory", registry=registry)
        self._lag = Gauge("driftline_lag_records", "Input records not read yet, an estimate", registry=registry)
        self._version = Gauge("driftline_weights_version", "Version of the weights in use", registry=registry)
        self._event_time = Gauge("driftline_event_time_seconds", "Newest event time, since 1970", registry=registry)
        self._happened = Counter("driftline_happenings", "What the loop met, by name", ["name"], registry=registry)

    def turn(self, turn: Turn) -> None:
        """A committed batch."""
        counted: list[BatchMetrics] = [s.metrics for s in turn.steps if s.metrics is not None]
        for name, counter in self._counts.items():
            counter.inc(sum(getattr(m, name) for m in counted))
        failed = sum(len(s.outputs) for s in turn.steps if s.metrics is None)  # each is one dead letter
        self._counts["records"].inc(failed)
        self._counts["dead_letters"].inc(failed)
        self._batches.observe(sum(m.records for m in counted) + failed)
        self._stages.labels("process").observe(turn.process_s)
        self._stages.labels("commit").observe(turn.commit_s)
        for m in counted:
            self._quality(m)
        if counted:
            self._version.set(max(m.weights_version for m in counted))
            self._event_time.set(max(m.time_ms for m in counted) / 1_000)
            self._progress.add(
                sum(m.events for m in counted),
                weights=max(m.weights_version for m in counted),
                dead_letters=sum(m.dead_letters for m in counted),
            )

    def _quality(self, m: BatchMetrics) -> None:
        for events, suffix in (("all", ""), ("moves", "_moves")):
            self._scored.labels(events).inc(getattr(m, f"scored{suffix}"))
            for ranking, prefix in (("driftline", ""), ("recency", "recency_")):
                self._ranks.labels(ranking, events).inc(getattr(m, f"{prefix}reciprocal_ranks{suffix}"))
                self._hits.labels(ranking, events).inc(getattr(m, f"{prefix}hits_10{suffix}"))

    def event(self, name: str, **facts: object) -> None:
        self._happened.labels(name).inc()
        level = logging.DEBUG if name in _QUIET else logging.WARNING if "error" in facts else logging.INFO
        log.log(level, "event=%s %s", name, _pairs(facts))

    def owned(self, partitions: Sequence[int], users: int, restoring: int, lag_records: int) -> None:
        self._partitions.set(len(partitions))
        self._restoring.set(restoring)
        self._users.set(users)
        self._lag.set(lag_records)
        self._health.beat("" if partitions and not restoring else f"restoring {restoring}, running {len(partitions)}")


class LearnerMetrics:
    """A learner's observer (learning.LearnerObserver)."""

    def __init__(
        self, registry: CollectorRegistry, health: Health, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._health = health
        self._progress = _Progress(clock)
        self._steps = Counter("driftline_learner_steps", "Gradient steps", registry=registry)
        self._events = Counter("driftline_learner_events", "Events learned", registry=registry)
        self._skipped = Counter(
            "driftline_learner_skipped_steps", "Steps whose loss or gradient was not finite", registry=registry
        )
        self._shed = Counter("driftline_learner_shed_events", "Events not learned, for lag", registry=registry)
        self._loss = Gauge("driftline_learner_loss", "Loss of the last step, nats", registry=registry)
        self._backlog = Gauge("driftline_learner_lag_records", "Records not read yet, an estimate", registry=registry)
        self._version = Gauge("driftline_learner_version", "Last version published", registry=registry)
        self._published = Counter("driftline_learner_published_bytes", "Bytes of versions published", registry=registry)
        self._publish_s = Histogram(
            "driftline_learner_publish_seconds", "Time to publish a version", buckets=_SECONDS, registry=registry
        )
        self._happened = Counter("driftline_learner_happenings", "What it met, by name", ["name"], registry=registry)

    def learned(self, report: Any, backlog_events: int) -> None:
        """One turn. The report is models.learner's."""
        self._health.beat()
        self._backlog.set(backlog_events)
        self._steps.inc(report.steps)
        self._events.inc(report.events)
        self._skipped.inc(report.skipped)
        self._shed.inc(report.shed)
        if report.steps:
            self._loss.set(report.loss)
            self._progress.add(report.events, steps=report.steps, loss=round(report.loss, 4), lag=backlog_events)

    def published(self, version: int, bytes_sent: int, seconds: float) -> None:
        self._version.set(version)
        self._published.inc(bytes_sent)
        self._publish_s.observe(seconds)
        log.info("event=published version=%d bytes=%d seconds=%.3f", version, bytes_sent, seconds)

    def event(self, name: str, **facts: object) -> None:
        self._happened.labels(name).inc()
        log.log(logging.WARNING if "error" in facts else logging.INFO, "event=%s %s", name, _pairs(facts))


class Exposition:
    """The server of /metrics, /healthz and /readyz, on threads of its own."""

    def __init__(self, registry: CollectorRegistry, health: Health, host: str, port: int) -> None:
        """Listen. Port 0 takes a free one; see `port`.

        Raises:
            ConfigError: the address cannot be used.
        """
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(registry, health))
        except OSError as error:
            raise ConfigError(
                f"metrics_port: cannot listen on {host}:{port}: {error.strerror}; choose another port, or 0 for none"
            ) from None
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(registry: CollectorRegistry, health: Health) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer(200, generate_latest(registry), CONTENT_TYPE_LATEST)
            elif path in ("/healthz", "/readyz"):
                good, why = health.live() if path == "/healthz" else health.ready()
                self._answer(200 if good else 503, f"{why}\n".encode(), "text/plain; charset=utf-8")
            else:
                self._answer(404, b"there are /metrics, /healthz and /readyz\n", "text/plain; charset=utf-8")

        def _answer(self, code: int, body: bytes, kind: str) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            log.debug("event=http_request %s", format % args)

    return Handler


def _pairs(facts: dict[str, Any]) -> str:
    """key=value, quoted where there are spaces."""
    return " ".join(f"{k}={str(v)!r}" if " " in str(v) or "\n" in str(v) else f"{k}={v}" for k, v in facts.items())
