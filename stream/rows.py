"""One row of a file to one event, or a counted reason why not.

On the way of an event: before the log; files.py reads the rows, mapping.py says which column is which field. A row
without a usable user, interest or time is refused. An optional value that cannot be read is left out of its event.
Both are counted and the first few are kept to be shown, so that no nonsense number slips through in silence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NotRequired, TypedDict, cast

import orjson

from stream.mapping import ORDER_EPOCH_MS, Alternatives, TimeReader

EMPTY = frozenset({"", "NULL", "null", "\\N", "NaN", "nan", "<NA>"})  # what databases and data frames write for nothing
EXAMPLES_MAX = 5

StreamRecord = tuple[bytes | None, bytes | None, int]  # key, value and event time in ms of a record to be sent
Row = Any  # a list of strings (separated columns) or a dict (JSON lines)
Getter = Callable[[Row], str]


class Event(TypedDict):
    """An event as it goes over the wire (JSON), keyed by its user. Only user, interest and time are required."""

    user: str
    interest: str
    time: int  # ms since 1970
    item: NotRequired[str]
    type: NotRequired[str]
    price: NotRequired[float]
    dwell: NotRequired[float]  # seconds
    rating: NotRequired[float]
    text: NotRequired[str]
    vector: NotRequired[list[float]]
    segment: NotRequired[str]
    event_id: NotRequired[str]
    session: NotRequired[str]


@dataclass(kw_only=True, slots=True)
class ReadCounts:
    """What became of the rows so far; grows while the source is read.

    Attributes:
        rows, events: rows seen, events made of them.
        bad: rows that could not be used, by reason.
        left_out: optional values that could not be read, by field; their events were kept.
        examples: (line, reason, what stood there) of the first few of both.
    """

    rows: int = 0
    events: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[int, str, str]] = field(default_factory=list)

    def refuse(self, line: int, reason: str, shown: object) -> None:
        """Count a bad row."""
        self.bad[reason] += 1
        self._keep(line, reason, shown)

    def leave_out(self, line: int, field_name: str, shown: object) -> None:
        """Count an unreadable optional value."""
        self.left_out[field_name] += 1
        self._keep(line, f"{field_name} left out", shown)

    def _keep(self, line: int, reason: str, shown: object) -> None:
        if len(self.examples) < EXAMPLES_MAX:
            text = shown if isinstance(shown, str) else repr(shown)
            text = text.encode("utf-8", "backslashreplace").decode()
            self.examples.append((line, reason, text if len(text) <= 120 else text[:117] + "..."))


class RowReader:
    """Makes an event of a row, or counts why not.

    Args:
        columns: the columns of each field, from `Mapping.resolve`.
        names: the columns there are, in order.
        width: how many columns a row must have; 0 for JSON lines, whose rows are dicts.
        counts: where bad rows are counted.
    """

    def __init__(
        self, *, columns: dict[str, Alternatives], names: Sequence[str], width: int, counts: ReadCounts
    ) -> None:
        self.time_of: TimeReader | None = None  # None: the order of the rows is the time
        self.counts = counts
        self._width = width
        index = {name: i for i, name in enumerate(names)}

        def getter(name: str) -> Getter:
            if not width:
                json_value = _json_vector if name == "vector" else _json_text
                return _chosen([[_json_getter(c, json_value) for c in join] for join in columns[name]])
            return _chosen([[_cell_getter(index[c]) for c in join] for join in columns[name]])

        self._get = {name: getter(name) for name in columns}
        self._texts = self._present("item", "type", "text", "segment", "event_id", "session")
        self._numbers = self._present("price", "dwell", "dwell_ms", "rating")
        self._vector = self._get.get("vector")

    def samples(self, name: str, rows: Iterable[tuple[int, Row]]) -> list[str]:
        """The values of a field in some rows, where there are any."""
        values = []
        for _, row in rows:
            if self._width and len(row) != self._width:
                continue
            try:
                text = self._get[name](row)
            except _WrongTypeError:
                continue
            if text not in EMPTY:
                values.append(text)
        return values

    def read(self, line: int, row: Row) -> Event | None:
        """The event of one row; None when it is bad, which is counted."""
        counts = self.counts
        counts.rows += 1
        if self._width and len(row) != self._width:
            counts.refuse(line, f"{len(row)} columns, not {self._width}", row)
            return None
        get, time_text = self._get, ""
        try:
            user, interest = get["user"](row), get["interest"](row)
            if user in EMPTY or interest in EMPTY:
                counts.refuse(line, "no user" if user in EMPTY else "no interest", row)
                return None
            if not (user.isascii() and interest.isascii()):
                user.encode(), interest.encode()  # broken bytes came in as surrogates
            if self.time_of is None:
                time_ms = ORDER_EPOCH_MS + 1_000 * (counts.rows - 1)
            else:
                time_text = get["time"](row)
                if time_text in EMPTY:
                    counts.refuse(line, "no time", row)
                    return None
                time_ms = self.time_of(time_text)
        except _WrongTypeError as error:
            counts.refuse(line, f"{error} in place of text or a number", row)
            return None
        except UnicodeEncodeError:
            counts.refuse(line, "not text in this encoding", row)
            return None
        except ValueError:
            counts.refuse(line, "time is unreadable or not between 1970 and 2100", time_text)
            return None
        event: dict[str, Any] = {"user": user, "interest": interest, "time": time_ms}
        self._add_texts(line, row, event)
        self._add_numbers(line, row, event)
        if self._vector is not None:
            self._add_vector(line, row, event, self._vector)
        counts.events += 1
        return cast(Event, event)

    def _present(self, *names: str) -> list[tuple[str, Getter]]:
        return [(name, self._get[name]) for name in names if name in self._get]

    def _add_texts(self, line: int, row: Row, event: dict[str, Any]) -> None:
        for name, get in self._texts:
            try:
                text = get(row)
                if text in EMPTY:
                    continue
                if not text.isascii():
                    text.encode()
                event[name] = text
            except (_WrongTypeError, UnicodeEncodeError):
                self.counts.leave_out(line, name, row)

    def _add_numbers(self, line: int, row: Row, event: dict[str, Any]) -> None:
        for name, get in self._numbers:
            try:
                text = get(row)
                if text in EMPTY:
                    continue
                number = float(text)
            except (_WrongTypeError, ValueError):
                number = math.inf
            if not math.isfinite(number):
                self.counts.leave_out(line, name, row)
            elif name == "dwell_ms":
                event["dwell"] = number / 1_000
            else:
                event[name] = number

    def _add_vector(self, line: int, row: Row, event: dict[str, Any], get: Getter) -> None:
        try:
            text = get(row)
            if text not in EMPTY:
                event["vector"] = [float(n) for n in orjson.loads(text)]
        except (_WrongTypeError, TypeError, ValueError):
            self.counts.leave_out(line, "vector", row)


class _WrongTypeError(Exception):
    """A JSON value that is neither text nor a number."""


def _cell_getter(index: int) -> Getter:
    cell: Callable[[Row], str] = itemgetter(index)
    return lambda row: cell(row).strip()


def _json_getter(path: str, to_text: Callable[[object], str]) -> Getter:
    def get(row: Row) -> str:
        value = row.get(path)
        if value is None and "." in path:
            value = row
            for name in path.split("."):
                value = value.get(name) if isinstance(value, dict) else None
        return to_text(value)

    return get


def _json_text(value: object) -> str:
    if isinstance(value, str):
        return value.strip()
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _WrongTypeError(f"a JSON {type(value).__name__}")
    return str(value)


def _json_vector(value: object) -> str:
    return orjson.dumps(value).decode() if isinstance(value, list) else _json_text(value)


def _chosen(alternatives: list[list[Getter]]) -> Getter:
    """The first alternative that is not empty; an alternative of several columns needs them all."""
    joins = [getters[0] if len(getters) == 1 else _joined(getters) for getters in alternatives]
    if len(joins) == 1:
        return joins[0]

    def first(row: Row) -> str:
        for get in joins:
            if (text := get(row)) not in EMPTY:
                return text
        return ""

    return first


def _joined(getters: list[Getter]) -> Getter:
    def joined(row: Row) -> str:
        parts = [get(row) for get in getters]
        return "" if any(part in EMPTY for part in parts) else "/".join(parts)

    return joined
