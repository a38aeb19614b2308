"""Where an application that has committed nothing yet begins to read: `--from` of run, worker and learner.

Before the way of an event. Times are those of the records in the log (when they arrived), not of the events in them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from stream.errors import ConfigError
from stream.transport import LogReader, TopicPartition

AGE_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_AGE = re.compile(r"(\d{1,9})([smhdw])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """The oldest record, the end, or the first record that arrived at a time or later."""

    edge: Literal["earliest", "latest", "time"] = "earliest"
    time_ms: int = 0

    def offset(self, reader: LogReader, partition: TopicPartition) -> int:
        """Where to begin in a partition."""
        if self.edge == "time":
            return reader.offset_at(partition, self.time_ms)
        first, end = reader.bounds(partition)
        return end if self.edge == "latest" else first

    def __str__(self) -> str:
        """As `parse_start` reads it: a time is fixed, so that several processes begin at one place."""
        if self.edge == "time":
            return datetime.fromtimestamp(self.time_ms / 1_000, UTC).isoformat(timespec="milliseconds")
        return self.edge


EARLIEST = Start()


def parse_start(text: str, now_ms: int) -> Start:
    """`earliest`, `latest`, an age (`90s`, `30m`, `2h`, `7d`, `1w`) or an ISO 8601 time (UTC without a zone).

    Example:
        >>> parse_start("2h", 10_000_000).time_ms, str(parse_start("2026-11-01T00:00:00Z", 0))
        (2800000, '2026-11-01T00:00:00.000+00:00')

    Raises:
        ConfigError: it is none of these, or lies before 1970.
    """
    if text == "earliest":
        return Start()
    if text == "latest":
        return Start(edge="latest")
    age = _AGE.fullmatch(text)
    if age is not None:
        return Start(edge="time", time_ms=max(0, now_ms - int(age[1]) * AGE_S[age[2]] * 1_000))
    try:
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        time_ms = int(moment.timestamp() * 1_000)
    except (ValueError, OverflowError):
        time_ms = -1
    if time_ms < 0:
        raise ConfigError(
            f"--from {text}: say earliest, latest, an age such as 90s, 30m, 2h or 7d, or a time such as "
            "2026-11-01T00:00:00Z"
        )
    return Start(edge="time", time_ms=time_ms)
