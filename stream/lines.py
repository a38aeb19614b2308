"""A file's bytes to lines, and lines to rows: compression, separators, JSON lines.

On the way of an event: the very first step of `replay` and `evaluate`, below files.py. Compression is told by the
first bytes, never by the name. Damaged lines are counted; a damaged file raises one of DAMAGE.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, AnyStr, cast

import orjson

from stream.errors import ConfigError
from stream.rows import ReadCounts, Row

HEAD_BYTES = 1 << 16
LINE_MAX = 16_000_000
SEPARATORS = ("\t", ",", ";", "|", " ")  # those found out, the likelier first
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile)

Rows = Iterator[tuple[int, Row]]


class OpenedFile:
    """A file's bytes, uncompressed (`stream`), with a look at their start (`head`) and at the progress."""

    def __init__(self, path: str, stdin: IO[bytes] | None) -> None:
        self.name = "standard input" if path == "-" else path
        self._size = 0
        self._member: IO[bytes] | None = None
        self._text: io.TextIOWrapper | None = None
        if path == "-":
            self._raw: Any = io.BufferedReader(cast(io.RawIOBase, stdin or sys.stdin.buffer), HEAD_BYTES)
        else:
            try:
                self._raw = Path(path).open("rb", HEAD_BYTES)  # noqa: SIM115
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read: {error.strerror}; check the path") from None
            self._size = os.fstat(self._raw.fileno()).st_size
        try:
            self.stream = io.BufferedReader(cast(io.RawIOBase, self._uncompressed(path)), HEAD_BYTES)
            self.head = self.stream.peek(HEAD_BYTES)
        except DAMAGE as error:
            self.close()
            raise ConfigError(f"{self.name}: the compressed data is damaged: {error}") from None
        except BaseException:
            self.close()
            raise
        if not self.head:
            self.close()
            raise ConfigError(f"{self.name}: the file is empty")
        if b"\0" in self.head[:1_000] and not self.head.startswith((b"\xff\xfe", b"\xfe\xff")):
            self.close()
            raise ConfigError(f"{self.name}: not a text file; CSV, TSV and JSON lines are read, also .gz and .zip")

    def fraction(self) -> float | None:
        """Share of the file's bytes read so far; None for a pipe."""
        if not self._size:
            return None
        return 1.0 if self._raw.closed else min(1.0, self._raw.tell() / self._size)

    def text(self, encoding: str) -> IO[str]:
        """The bytes as text; bytes that are none in this encoding become surrogates, to be found row by row."""
        self._text = io.TextIOWrapper(cast(IO[bytes], self.stream), encoding, errors="surrogateescape", newline="")
        return self._text

    def close(self) -> None:
        """Close all of it. Idempotent."""
        if self._text is not None:
            self._text.close()
        if self._member is not None:
            self._member.close()
        self._raw.close()

    def _uncompressed(self, path: str) -> IO[bytes]:
        magic = self._raw.peek(4)[:4]
        if magic[:2] == b"\x1f\x8b":
            self._member = cast(IO[bytes], gzip.GzipFile(fileobj=self._raw))
        elif magic == b"PK\x03\x04":
            if path == "-":
                raise ConfigError("a zip file cannot be read from a pipe; give its path, or unpack it into the pipe")
            archive = zipfile.ZipFile(self._raw)
            names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
            if len(names) != 1:
                raise ConfigError(
                    f"{path}: holds {len(names)} files ({', '.join(names[:3])}); one is wanted: unpack it"
                )
            self._member = archive.open(names[0])
        return self._member or self._raw


def find_separator(opened: OpenedFile, encoding: str) -> str:
    """The separator of the columns, from the file's name and first line; ConfigError when there is none."""
    line = opened.head.decode(encoding, "replace").partition("\n")[0]
    counts = {separator: line.count(separator) for separator in SEPARATORS}
    by_name = "\t" if ".tsv" in opened.name or ".tab" in opened.name else "," if ".csv" in opened.name else ""
    if by_name and counts[by_name]:
        return by_name
    if "::" in line:
        return "::"
    best = max(SEPARATORS[:-1], key=lambda separator: counts[separator])
    best = best if counts[best] else " "
    if not counts[best]:
        raise ConfigError(f"{opened.name}: no separator found in its first line {line[:80]!r}; say --sep")
    return best


def separated_rows(text: IO[str], separator: str, name: str, counts: ReadCounts) -> Rows:
    """(line, cells) of each row. Tab-separated text knows no quotes; a cell that is quoted all the same is unquoted."""
    lines = _lines(text, name)
    if len(separator) != 1:
        for number, line in enumerate(lines, 1):
            if line := line.rstrip("\r\n"):
                yield number, line.split(separator)
        return
    if separator == "\t":
        reader = csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, delimiter=separator, skipinitialspace=separator == " ")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # such as a quote that never ends
            counts.rows += 1
            counts.refuse(reader.line_num, f"broken row: {error}", "")
            continue
        if not row:
            continue
        if separator == "\t":
            row = [c[1:-1].replace('""', '"') if c[:1] == '"' == c[-1:] and len(c) > 1 else c for c in row]
        yield reader.line_num, row


def json_rows(stream: IO[bytes], name: str, counts: ReadCounts) -> Rows:
    """(line, object) of each line; what is no JSON object is counted."""
    for number, line in enumerate(_lines(stream, name), 1):
        line = line.removeprefix(BYTE_ORDER_MARK).strip()
        if not line:
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            counts.rows += 1
            counts.refuse(number, f"broken JSON: {error.msg}", line[:200].decode("utf-8", "backslashreplace"))
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            counts.rows += 1
            counts.refuse(number, "not a JSON object", row)


def json_names(sample: list[tuple[int, Row]]) -> tuple[str, ...]:
    """Keys of the first objects, those of nested objects with a dot."""
    names: dict[str, None] = {}
    for _, row in sample:
        for name, value in row.items():
            names[name] = None
            if isinstance(value, dict):
                names.update((f"{name}.{inner}", None) for inner in value)
    return tuple(names)


def _lines(stream: IO[AnyStr], name: str) -> Iterator[AnyStr]:
    """Lines with their ends; a file without line ends must not fill the memory."""
    for line in iter(lambda: stream.readline(LINE_MAX), stream.read(0)):
        if len(line) >= LINE_MAX:
            raise ConfigError(f"{name}: a line of {LINE_MAX:,} characters and more; is it text, one event a line?")
        yield line
