"""`driftline user`: what is known of one user, put together from the topics.

Beside the way of an event: reads the state log of the user's partition and the newest records about the user; writes
nothing and joins no group. Interests lie in a record as hashed keys; their names are those seen in the newest events.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from models.features import type_name
from models.profile import PROFILE, RING, TYPE_MASK, USER, gap_seconds, weight_of
from stream import changelog
from stream.changelog import Kind
from stream.config import Config, topic_names
from stream.errors import ConfigError
from stream.events import EventDecoder, user_hash
from stream.explain import bars
from stream.partition import partition_of
from stream.records import Forecast, ShiftAlert
from stream.tail import read_range, time_text
from stream.transport import LogReader, Record, TopicPartition, Transport

_NAME, _BAR = 30, 40
NEWEST_RECORDS_MAX = 200_000  # of a topic's partition, looked through for the user


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One event in the ring, newest first."""

    interest: str
    type: str
    seconds_after_previous: float


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """An interest of the slow profile with its share."""

    interest: str
    share: float


class Portrait(msgspec.Struct, frozen=True, kw_only=True):
    """A user's record in readable form, with the newest forecast and alerts.

    `watch`: events over which the evidence of a shift has grown; below zero, events until it is gathered again.
    """

    user: str
    partition: int
    events: int
    purchases: int
    first_time_ms: int
    last_time_ms: int
    weights_version: int
    evidence: float
    watch: int
    alerts_so_far: int
    ring: list[Seen]
    profile: list[Share]
    forecast: Forecast | None
    alerts: list[ShiftAlert]


def portrait(transport: Transport, config: Config, decoder: EventDecoder, user: str) -> Portrait:
    """Everything about one user.

    Raises:
        ConfigError: no record of the user.
    """
    names = topic_names(config)
    partition = partition_of(user.encode(), config.topics.partitions)
    key = user_hash(user, config.state.hash_key.reveal().encode()[:64])
    reader = transport.reader()
    try:
        record = _state_of(reader, TopicPartition(names["state"], partition), key)
        if record is None:
            raise ConfigError(
                f"nothing is known of user {user!r}: no record in partition {partition} of topic {names['state']}"
            )
        interests = _interest_names(reader, config, decoder, partition, user)
        forecasts = _newest(reader, TopicPartition(names["forecasts"], partition), user)
        alerts = _newest(reader, TopicPartition(names["alerts"], partition), user)
    finally:
        reader.close()
    return Portrait(
        user=user,
        partition=partition,
        events=int(record["events"]),
        purchases=int(record["purchases"]),
        first_time_ms=int(record["first_time_ms"]),
        last_time_ms=int(record["last_time_ms"]),
        weights_version=int(record["weights_version"]),
        evidence=float(record["evidence"]),
        watch=int(record["watch"]),
        alerts_so_far=int(record["alerts"]),
        ring=_ring(record, interests),
        profile=_profile(record, interests),
        forecast=msgspec.json.decode(forecasts[-1].value or b"", type=Forecast) if forecasts else None,
        alerts=[msgspec.json.decode(r.value or b"", type=ShiftAlert) for r in alerts],
    )


def in_lines(p: Portrait) -> list[str]:
    """The portrait for a person."""
    over = f"over {p.watch} events" if p.watch >= 0 else f"(not gathered for the next {-p.watch} events)"
    lines = [
        f"{p.user}: {p.events} events ({p.purchases} purchases) from {time_text(p.first_time_ms)} to "
        f"{time_text(p.last_time_ms)}; partition {p.partition}, weights {p.weights_version}",
        "lately: " + ", ".join(f"{s.interest}{f' ({s.type})' if s.type else ''}" for s in p.ring),
        "usually:",
        *(
            f"  {s.interest[:_NAME]:{_NAME}} {'█' * max(1, round(_BAR * s.share))} {s.share:.0%}"
            for s in p.profile[:10]
        ),
        f"evidence of a shift: {p.evidence:.2f} nats {over}; {p.alerts_so_far} alerts so far",
    ]
    for a in p.alerts:
        lines.append(f"alert {time_text(a.detected_at_ms)} {a.alert_id} ({a.tier}): {a.sentence}")
        lines += bars(a)
    if p.forecast is not None and p.forecast.steps:
        lines.append(f"forecast of {time_text(p.forecast.time_ms)}:")
        for step in p.forecast.steps:
            lines.append(
                f"  step {step.step}: " + ", ".join(f"{c.interest} {c.probability:.0%}" for c in step.interests[:5])
            )
    return lines


def _state_of(reader: LogReader, tp: TopicPartition, key: int) -> Any:
    """The newest record under this key in the state log; None for none."""
    found = None
    for record in read_range(reader, tp, *reader.bounds(tp)):
        block = changelog.decode(record.value or b"", f"{tp.topic}-{tp.partition}@{record.offset}")
        if block.records is None:
            continue
        here = np.flatnonzero(block.records["key"] == key)
        if len(here):
            gone = block.kind in (Kind.TOMBSTONES, Kind.ERASED)
            found = None if gone else changelog.migrate(block.records[here[-1:]], USER)[0]
    return found


def _newest(reader: LogReader, tp: TopicPartition, user: str) -> list[Record]:
    """The user's records among the newest of a partition."""
    first, end = reader.bounds(tp)
    key = user.encode()
    records = read_range(reader, tp, max(first, end - NEWEST_RECORDS_MAX), end)
    return [record for record in records if record.key == key]


def _interest_names(
    reader: LogReader, config: Config, decoder: EventDecoder, partition: int, user: str
) -> dict[int, str]:
    names: dict[int, str] = {}
    for topic in config.topics.events:
        names |= decoder.decode(_newest(reader, TopicPartition(topic, partition), user)).interest_names
    return names


def _name(interests: dict[int, str], key: int) -> str:
    return interests.get(key, f"#{key:08x}")


def _ring(record: Any, interests: dict[int, str]) -> list[Seen]:
    count = int(record["events"])
    places = [(count - 1 - back) % RING for back in range(min(count, RING))]
    return [
        Seen(
            interest=_name(interests, int(record["ring_interest"][i])),
            type=type_name(int(record["ring_type"][i]) & TYPE_MASK),
            seconds_after_previous=round(float(gap_seconds(int(record["ring_gap"][i]))), 1),
        )
        for i in places
    ]


def _profile(record: Any, interests: dict[int, str]) -> list[Share]:
    total = float(record["slow_total"])
    shares = [
        Share(
            interest=_name(interests, int(record["slow_interest"][i])),
            share=float(weight_of(int(record["slow_weight"][i]))) / total,
        )
        for i in range(PROFILE)
        if record["slow_interest"][i] and total > 0
    ]
    return sorted(shares, key=lambda s: -s.share)
