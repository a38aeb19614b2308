"""Which column of a file is which field of an event, and how its times are written.

On the way of an event: before the log, between a file's rows and the events made of them (files.py). Nothing here
opens a file.

A mapping is written `user=COL,interest=COL,time=COL[,item=COL,...]`. COL is a column name of the header, a (dotted) key
of JSON lines, or 0, 1, 2, ... where a file has no header. `A|B` takes the first of the two that is not empty, `A+B`
joins both with a slash and is empty when either is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from stream.errors import ConfigError

FIELDS = (
    "user",
    "interest",
    "time",
    "item",
    "type",
    "price",
    "dwell",
    "dwell_ms",
    "rating",
    "text",
    "vector",
    "segment",
    "event_id",
    "session",
)
TIME_MS_MAX = 4_102_444_800_000  # 2100-01-01
ORDER_EPOCH_MS = 946_684_800_000  # 2000-01-01: where the order of rows starts as a time, one second a row
TIME_UNITS = "s, ms, iso, a pattern such as %d/%m/%Y %H:%M, or order"
GUESS_NUMERIC_SHARE = 0.9
TYPO_LIKENESS = 0.75

Alternatives = tuple[tuple[str, ...], ...]  # the first that is not empty; each a join of columns
TimeReader = Callable[[str], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapping:
    """Field of an event -> expression over columns, as the user wrote it."""

    columns: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Mapping:
        """Read `user=COL,interest=COL,...`. A comma belongs to a column's name unless `word=` follows it.

        Raises:
            ConfigError: not of that form, an unknown field (with the nearest), a field twice, user or interest missing.

        Example:
            >>> Mapping.parse("user=0,interest=department+category,time=2").columns
            {'user': '0', 'interest': 'department+category', 'time': '2'}
        """
        columns: dict[str, str] = {}
        for part in re.split(r",(?=\s*\w+\s*=)", text):
            name, equals, column = (piece.strip() for piece in part.partition("="))
            if not equals or not column:
                raise ConfigError(f"--map: {part!r} is not FIELD=COLUMN; write user=COL,interest=COL,time=COL")
            if name not in FIELDS:
                raise ConfigError(f"--map: no event field {name!r}{nearest(name, FIELDS)}")
            if name in columns:
                raise ConfigError(f"--map: {name} is given twice; join columns with {name}=A+B or choose with A|B")
            columns[name] = column
        for name in ("user", "interest"):
            if name not in columns:
                raise ConfigError(f"--map: no column for {name}; write user=COL,interest=COL,time=COL")
        if "dwell" in columns and "dwell_ms" in columns:
            raise ConfigError("--map: dwell (seconds) and dwell_ms are the same field; keep one")
        return cls(columns=columns)

    def unseen(self, names: Sequence[str]) -> tuple[str, ...]:
        """Optional columns that are not among `names` and no typo of one: keys that may turn up in later JSON lines."""
        optional = [expression for name, expression in self.columns.items() if name not in ("user", "interest", "time")]
        return tuple(
            column
            for column in optional
            if column.isidentifier()
            and column not in names
            and not difflib.get_close_matches(column, names, n=1, cutoff=TYPO_LIKENESS)
        )

    def resolve(self, names: Sequence[str], where: str, hint: str = "") -> dict[str, Alternatives]:
        """The columns of each field, checked against the columns that there are.

        Raises:
            ConfigError: a column is missing (with the nearest) or ambiguous.
        """
        known = set(names)
        resolved: dict[str, Alternatives] = {}
        for field, expression in self.columns.items():
            if expression in known:
                resolved[field] = ((expression,),)
            else:
                resolved[field] = tuple(
                    tuple(part.strip() for part in choice.split("+"))
                    if choice.strip() not in known
                    else (choice.strip(),)
                    for choice in expression.split("|")
                )
            for column in (c for join in resolved[field] for c in join):
                if column not in known:
                    raise ConfigError(f"--map {field}={expression}: {where} has no column {column!r}"
                                      f"{nearest(column, names)}{hint}")  # fmt: skip
                if list(names).count(column) > 1:
                    raise ConfigError(f"--map {field}={expression}: {where} has more than one column {column!r}")
        return resolved


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of an error message: the word that was probably meant, or the words that there are."""
    choices = [w for w in dict.fromkeys(words) if w]
    folded = {w.casefold(): w for w in choices}
    close = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {folded[close[0]]!r}?"
    shown = ", ".join(choices[:20]) + (", ..." if len(choices) > 20 else "")
    return f"; there are: {shown}" if choices else ""


def guess_time_unit(samples: Sequence[str], column: str) -> str:
    """s, ms or iso, where the values leave no doubt.

    Raises:
        ConfigError: they do leave a doubt, and a wrong guess would be off by a factor of 1,000.

    Example:
        >>> guess_time_unit(["1511539217", "1511539222"], "time")
        's'
    """
    numbers = [n for text in samples if (n := _number(text)) is not None]
    shown = ", ".join(repr(s) for s in samples[:3])
    ask = f"say --time-unit {TIME_UNITS}"
    if not samples:
        raise ConfigError(f"the time column {column} is empty in the first rows; check --map, or {ask}")
    if len(numbers) >= GUESS_NUMERIC_SHARE * len(samples):
        middle = sorted(numbers)[len(numbers) // 2]
        if 1e8 <= middle < 5e9:  # 1973 to 2128 in seconds; 2 to 58 days after 1970 in milliseconds
            return "s"
        if 1e11 <= middle < 5e12:
            return "ms"
        raise ConfigError(f"the unit of the time column {column} is not clear from {shown}; {ask}")
    readable = sum(_is_readable(text) for text in samples)
    if readable >= GUESS_NUMERIC_SHARE * len(samples):
        return "iso"
    raise ConfigError(f"the time column {column} holds {shown}: neither numbers nor ISO 8601; check --map, or {ask}")


def time_reader(unit: str) -> TimeReader:
    """A function from a time's text to milliseconds since 1970. It raises ValueError for what it cannot read.

    Times without a zone are UTC. A value outside 1970 to 2100 is refused: it is a wrong unit or a broken clock.
    """
    if unit == "s":
        return _bounded(lambda text: round(float(text) * 1_000))
    if unit == "ms":
        return _bounded(lambda text: int(text) if text.isdigit() else round(float(text)))
    if unit == "iso":
        return _bounded(_remember_last(_iso_ms))
    if "%" in unit:
        return _bounded(_remember_last(lambda text: _to_ms(datetime.strptime(text, unit))))
    raise ConfigError(f"--time-unit {unit!r}: there are {TIME_UNITS}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_readable(text: str) -> bool:
    try:
        _iso_ms(text)
    except (ValueError, OverflowError):
        return False
    return True


def _iso_ms(text: str) -> int:
    # "2019-10-01 00:00:00 UTC" is how several warehouses print a timestamp; ISO 8601 knows only the Z.
    return _to_ms(datetime.fromisoformat(text.removesuffix(" UTC").removesuffix(" GMT")))


def _to_ms(moment: datetime) -> int:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1_000)


def _remember_last(read: TimeReader) -> TimeReader:
    """The lines of one basket share a time, so the last answer often serves again."""
    last_text, last_ms = "", 0

    def remembered(text: str) -> int:
        nonlocal last_text, last_ms
        if text != last_text:
            last_ms = read(text)
            last_text = text
        return last_ms

    return remembered


def _bounded(read: TimeReader) -> TimeReader:
    def bounded(text: str) -> int:
        try:
            time_ms = read(text)
        except OverflowError:
            raise ValueError("not a finite time") from None
        if not 0 <= time_ms < TIME_MS_MAX:
            raise ValueError("not between 1970 and 2100")
        return time_ms

    return bounded
