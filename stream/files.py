"""Events from files: CSV, TSV and JSON lines, plain, gzipped or zipped, or from a pipe.

On the way of an event: before the log. `replay` appends what is read here to the `events` topic, `evaluate` reads the
same events as columns. Nothing is guessed in silence: what was found out about a file stands in `EventSource.facts`,
what became of its rows in `EventSource.counts`.

Memory stays constant, whatever the size of the file, unless `sort` is on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, cast

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from stream.errors import ConfigError
from stream.lines import (
    BYTE_ORDER_MARK,
    DAMAGE,
    OpenedFile,
    Rows,
    find_separator,
    json_names,
    json_rows,
    separated_rows,
)
from stream.mapping import Mapping, guess_time_unit, time_reader
from stream.rows import Event, ReadCounts, RowReader

SAMPLE_ROWS = 1_000


@dataclass(frozen=True, kw_only=True, slots=True)
class FileForm:
    """How a file is written. None: to be found out.

    Attributes:
        header: the first line names the columns; without, they are 0, 1, 2, ...
        separator: of the columns, one character or more.
        time_unit: s, ms, iso, a pattern for strptime, or order (the order of the rows is the time, a second each).
        sort: sort by time (stable), which holds the whole file in memory.
    """

    header: bool = True
    separator: str | None = None
    time_unit: str | None = None
    sort: bool = False
    encoding: str = "utf-8"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFacts:
    """What was found out about a source, to be said aloud.

    Attributes:
        separator: of the columns; None for JSON lines.
        columns: names in the header, or 0, 1, 2, ...
        time_unit: s, ms, iso, order or a pattern.
        guessed: which of `separator` and `time_unit` were found out rather than given.
        unseen: optional keys of JSON lines that no row has had so far; they may come later, or be a mistake.
    """

    name: str
    separator: str | None
    columns: tuple[str, ...]
    time_unit: str
    guessed: tuple[str, ...]
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EventTable:
    """Events as columns of equal length. Missing text is "", missing numbers are NaN."""

    user: npt.NDArray[np.object_]
    interest: npt.NDArray[np.object_]
    time_ms: npt.NDArray[np.int64]
    item: npt.NDArray[np.object_]
    type: npt.NDArray[np.object_]
    price: npt.NDArray[np.float64]
    dwell_s: npt.NDArray[np.float64]
    rating: npt.NDArray[np.float64]
    text: npt.NDArray[np.object_]
    segment: npt.NDArray[np.object_]
    event_id: npt.NDArray[np.object_]
    session: npt.NDArray[np.object_]
    vector: list[list[float] | None]

    def __len__(self) -> int:
        return len(self.time_ms)


def tabulate(events: list[Event]) -> EventTable:
    """The same events as columns."""

    def strings(name: str) -> npt.NDArray[np.object_]:
        column = np.empty(len(events), np.object_)
        column[:] = [event.get(name, "") for event in events]
        return column

    def floats(name: str) -> npt.NDArray[np.float64]:
        return np.array([event.get(name, np.nan) for event in events], np.float64)

    return EventTable(
        user=strings("user"),
        interest=strings("interest"),
        time_ms=np.array([event["time"] for event in events], np.int64),
        item=strings("item"),
        type=strings("type"),
        price=floats("price"),
        dwell_s=floats("dwell"),
        rating=floats("rating"),
        text=strings("text"),
        segment=strings("segment"),
        event_id=strings("event_id"),
        session=strings("session"),
        vector=[event.get("vector") for event in events],
    )


class EventSource:
    """An opened source: iterate it once for its events, in time order. Made by `open_events`.

    Attributes:
        facts: what was found out about the file.
        counts: rows, events and bad rows so far.
    """

    def __init__(self, opened: OpenedFile, facts: SourceFacts, rows: Rows, reader: RowReader, sort: bool) -> None:
        self.facts = facts
        self.counts = reader.counts
        self._opened = opened
        self._rows = rows
        self._reader = reader
        self._sort = sort

    def __enter__(self) -> EventSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._opened.close()

    def fraction(self) -> float | None:
        """Share of the file's bytes read so far; None where the size is not known (a pipe)."""
        return self._opened.fraction()

    def __iter__(self) -> Iterator[Event]:
        """The events; the file is closed at their end, or when the iteration is given up.

        Raises:
            ConfigError: times run backwards and `sort` is off, the file is damaged, or no row at all was usable.
        """
        name, counts = self.facts.name, self.counts
        try:
            yield from self._sorted() if self._sort else self._in_order()
        except DAMAGE as error:
            raise ConfigError(f"{name}: the compressed data is damaged after row {counts.rows:,}: {error}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}: {error}; say the right --encoding") from None
        finally:
            self.close()
        if not counts.events:
            why = "".join(f"; line {line}: {reason}: {text}" for line, reason, text in counts.examples[:1])
            raise ConfigError(f"{name}: none of its {counts.rows:,} rows is an event{why}")

    def table(self, limit: int | None = None) -> EventTable:
        """The events (at most `limit`) as columns."""
        return tabulate(list(islice(self, limit)))

    def _in_order(self) -> Iterator[Event]:
        last_ms, read = -1, self._reader.read
        for line, row in self._rows:
            event = read(line, row)
            if event is None:
                continue
            if event["time"] < last_ms:
                raise ConfigError(
                    f"{self.facts.name}, line {line:,}: its time is {(last_ms - event['time']) / 1_000:,.3f} s before "
                    f"that of an earlier line; events must come in the order of time: use --sort"
                )
            last_ms = event["time"]
            yield event

    def _sorted(self) -> Iterator[Event]:
        # As bytes until their turn: dicts take several times the memory, and so does what orjson writes (1 kB buffers).
        encode = msgspec.json.Encoder().encode
        kept: list[bytes] = []
        times: list[int] = []
        for line, row in self._rows:
            event = self._reader.read(line, row)
            if event is not None:
                kept.append(encode(event))
                times.append(event["time"])
        for index in np.argsort(np.array(times, np.int64), kind="stable").tolist():
            yield orjson.loads(kept[index])


def open_events(
    path: str | Path, mapping: Mapping, form: FileForm | None = None, stdin: IO[bytes] | None = None
) -> EventSource:
    """Open a file of events, find out its form and check the mapping against its first rows.

    Args:
        path: a file, or - for standard input (gzipped or not).
        stdin: what to read for -; the process's standard input when None.

    Raises:
        ConfigError: no such file, not text, a missing column, an unclear separator or time unit.
    """
    form = form or FileForm()
    opened = OpenedFile(str(path), stdin)
    try:
        return _prepare(opened, mapping, form)
    except DAMAGE as error:
        opened.close()
        raise ConfigError(f"{opened.name}: the compressed data is damaged: {error}") from None
    except (UnicodeError, LookupError) as error:
        opened.close()
        raise ConfigError(f"{opened.name}: {error}; say the right --encoding") from None
    except BaseException:
        opened.close()
        raise


def _prepare(opened: OpenedFile, mapping: Mapping, form: FileForm) -> EventSource:
    if "time" not in mapping.columns and form.time_unit != "order":
        raise ConfigError("--map: no column for time; add time=COL, or --time-unit order to take the order of the rows")
    counts = ReadCounts()
    separator, guessed, hint, unseen = form.separator, [], "", tuple[str, ...]()
    start = opened.head.removeprefix(BYTE_ORDER_MARK).lstrip()[:2] if separator is None else b""
    if start in (b"[{", b"[\n", b"[\r"):
        raise ConfigError(f"{opened.name}: a JSON array; JSON lines are read: one object on each line")
    is_json = start[:1] == b"{"
    if is_json:
        rows = json_rows(cast(IO[bytes], opened.stream), opened.name, counts)
        sample = list(islice(rows, SAMPLE_ROWS))
        names = json_names(sample)
        unseen = mapping.unseen(names)
        names += unseen
    else:
        encoding = "utf-8-sig" if form.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else form.encoding
        if separator is None:
            separator = find_separator(opened, encoding)
            guessed.append("separator")
        rows = separated_rows(opened.text(encoding), separator, opened.name, counts)
        sample = list(islice(rows, SAMPLE_ROWS))
        if sample and form.header:
            names = tuple(name.strip() for name in sample.pop(0)[1])
            if any(column.isdigit() for column in mapping.columns.values()):
                hint = " (columns go by number only in a file without a header: --no-header)"
        elif sample:
            names = tuple(str(i) for i in range(Counter(len(row) for _, row in sample).most_common(1)[0][0]))
    if not sample:
        raise ConfigError(f"{opened.name}: there are no rows")
    columns = mapping.resolve(names, opened.name, hint)
    reader = RowReader(columns=columns, names=names, width=0 if is_json else len(names), counts=counts)
    unit = form.time_unit
    if unit is None:
        unit = guess_time_unit(reader.samples("time", sample), mapping.columns["time"])
        guessed.append("time_unit")
    reader.time_of = None if unit == "order" else time_reader(unit)
    facts = SourceFacts(
        name=opened.name, separator=separator, columns=names, time_unit=unit, guessed=tuple(guessed), unseen=unseen
    )
    return EventSource(opened, facts, chain(sample, rows), reader, form.sort)
