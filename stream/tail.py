"""`driftline tail`: records of a topic as they come, in words or as they are.

At the end of the way of an event, beside it: reads committed records only and belongs to no group, so that nobody is
disturbed by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import msgspec

from stream import changelog
from stream.config import Config, topic_names
from stream.errors import ConfigError, Corrupt
from stream.records import BatchMetrics, DeadLetter, Forecast, ShiftAlert, Verdict
from stream.transport import LogReader, Record, TopicPartition, Transport

READ_RECORDS = 500
READ_TIMEOUT_S = 2.0
WAIT_S = 0.1  # for one partition; the others wait that long
TEXT_CHARS_MAX = 2_000
LAST_MAX = 1_000_000


def topic_of(config: Config, name: str) -> tuple[str, str]:
    """(role, full name) of a topic that is named by its role (`alerts`, `dead-letters`) or by its full name.

    Raises:
        ConfigError: the application has no such topic.
    """
    names = topic_names(config)
    role = name.replace("-", "_")
    if role in names:
        return role, names[role]
    for known, full in names.items():
        if full == name:
            return known, full
    if name in config.topics.events:
        return "events", name
    if name == "events":
        return "events", config.topics.events[0]
    raise ConfigError(f"no topic {name!r}; there are events, {', '.join(r.replace('_', '-') for r in names)}")


def follow(
    transport: Transport, topic: str, partitions: int, *, start: str, follow: bool, stopped: Callable[[], bool]
) -> Iterator[Record]:
    """Records of all partitions, each partition in order; without `follow` up to the present end.

    Args:
        start: `start`, `end`, or how many of each partition's newest records.
        stopped: asked between reads.
    """
    newest = _count(start)
    tps = [TopicPartition(topic, p) for p in range(partitions)]
    readers: dict[TopicPartition, LogReader] = {}
    try:
        offsets: dict[TopicPartition, int] = {}
        for tp in tps:
            readers[tp] = transport.reader()  # one each, so that a client keeps what it has fetched ahead
            first, end = readers[tp].bounds(tp)
            if newest is None and start == "end":
                offsets[tp] = end
                continue
            if newest is None:
                records = read_range(readers[tp], tp, first, end)
            else:
                records = iter(newest_records(readers[tp], tp, newest))
            yield from records
            offsets[tp] = end
        while follow and not stopped():
            for tp in tps:
                records_now = readers[tp].read(tp, offsets[tp], WAIT_S, READ_RECORDS)
                yield from records_now
                if records_now:
                    offsets[tp] = records_now[-1].offset + 1
    finally:
        for reader in readers.values():
            reader.close()


def read_range(reader: LogReader, tp: TopicPartition, offset: int, end: int) -> Iterator[Record]:
    """The records from `offset` up to `end`; what is left without a record are marks of transactions."""
    while offset < end:
        records = reader.read(tp, offset, READ_TIMEOUT_S, READ_RECORDS)
        if not records:
            return
        yield from (record for record in records if record.offset < end)
        offset = records[-1].offset + 1


def newest_records(reader: LogReader, tp: TopicPartition, count: int) -> list[Record]:
    """The newest records of a partition, oldest first. Marks of transactions take offsets too, so the window grows."""
    first, end = reader.bounds(tp)
    span = count
    while count:
        start = max(first, end - span)
        records = list(read_range(reader, tp, start, end))
        if len(records) >= count or start == first:  # ends: the span doubles until it reaches the head
            return records[-count:]
        span *= 2
    return []


def _count(start: str) -> int | None:
    """The number in `--from N`; None for start and end."""
    if start in ("start", "end"):
        return None
    if start.isdigit() and int(start) <= LAST_MAX:
        return int(start)
    raise ConfigError(f"--from {start}: say start, end, or how many of each partition's newest records, e.g. --from 10")


def in_words(role: str, record: Record) -> str:
    """One line for a person; what cannot be read as its role promises is shown as it is."""
    try:
        told = _TOLD[role](record) if role in _TOLD else _plain(record)
    except (msgspec.MsgspecError, Corrupt, IndexError) as error:
        told = f"{_place(record)} not a record of {role} ({error}): {_plain(record)}"
    return printable(told)


def as_json(record: Record) -> str:
    """The value as it is, whole, on one line; control characters as escapes. What is not JSON is described."""
    try:
        text = msgspec.json.format(record.value or b"null", indent=-1).decode()
        return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return printable(_plain(record))


def printable(text: str) -> str:
    """Without control characters: what users wrote must not steer a terminal. Long texts are cut."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:TEXT_CHARS_MAX])
    return shown + ("..." if len(text) > TEXT_CHARS_MAX else "")


def time_text(time_ms: int) -> str:
    """Event time in UTC, to the second."""
    try:
        return datetime.fromtimestamp(time_ms / 1_000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{time_ms} ms"


def _place(record: Record) -> str:
    return f"{record.topic}-{record.partition}@{record.offset}"


def _plain(record: Record) -> str:
    key = (record.key or b"").decode(errors="replace")
    value = b"(no value)" if record.value is None else record.value[: TEXT_CHARS_MAX * 4]
    return f"{key}  {value.decode(errors='replace')}"


def _forecast(record: Record) -> str:
    f = msgspec.json.decode(record.value or b"", type=Forecast)
    first, *later = f.steps
    now = ", ".join(f"{c.interest} {c.probability:.0%}" for c in first.interests[:3])
    then = " > ".join(step.interests[0].interest for step in later if step.interests)
    behaviour = max(f.next_types.items(), key=lambda item: item[1], default=None)
    does = f" ({behaviour[0]} {behaviour[1]:.0%})" if behaviour and behaviour[1] >= 0.5 else ""
    return f"{time_text(f.time_ms)}  {f.user}  next{does}: {now}" + (f"; then {then}" if then else "")


def _alert(record: Record) -> str:
    a = msgspec.json.decode(record.value or b"", type=ShiftAlert)
    return f"{time_text(a.detected_at_ms)}  {a.user}  {a.tier}, {a.kind} shift, severity {a.severity:.2f}: {a.sentence}"


def _verdict(record: Record) -> str:
    v = msgspec.json.decode(record.value or b"", type=Verdict)
    held = "held" if v.confirmed else "did not hold"
    return f"{time_text(v.judged_at_ms)}  {v.user}  alert {v.alert_id} {held} ({v.gain:+.1f} nats)"


def _dead_letter(record: Record) -> str:
    d = msgspec.json.decode(record.value or b"", type=DeadLetter)
    source = f"{d.source.topic}-{d.source.partition}@{d.source.offset}"
    return f"{time_text(d.timestamp_ms)}  {source}  {d.reason}, {d.bytes} bytes: {d.message}"


def _metrics(record: Record) -> str:
    m = msgspec.json.decode(record.value or b"", type=BatchMetrics)
    quality = f", MRR {m.reciprocal_ranks / m.scored:.3f} (recency {m.recency_reciprocal_ranks / m.scored:.3f})"
    return (
        f"{time_text(m.time_ms)}  partition {m.partition} up to {m.next_offset}: {m.events} events, "
        f"{m.forecasts} forecasts, {m.alerts} alerts, {m.dead_letters} dead letters"
        + (quality if m.scored else "")
        + "".join(f", drift of {d.figure} ({d.segment or d.scope}, {d.detector})" for d in m.drifts)
    )


def _state(record: Record) -> str:
    block = changelog.decode(record.value or b"", _place(record))
    count = "" if block.records is None else f", {len(block.records)} records"
    return f"{_place(record)}  {block.kind.name.lower()} block {block.number}{count}, {len(record.value or b'')} bytes"


def _weights(record: Record) -> str:
    return f"{_place(record)}  {(record.key or b'').decode(errors='replace')}  {len(record.value or b'')} bytes"


_TOLD: dict[str, Callable[[Record], str]] = {
    "forecasts": _forecast,
    "alerts": _alert,
    "verdicts": _verdict,
    "dead_letters": _dead_letter,
    "metrics": _metrics,
    "state": _state,
    "weights": _weights,
}
