"""State blocks: how the arena of a partition lies in the `state` topic, and how it comes back.

A transaction writes the records it touched as a few packed blocks, each one record of the log:

    offset  size  field
         0     4  magic "DLB1"
         4     2  format version
         6     1  kind: 1 users, 2 tombstones, 3 groups (a whole table), 4 group delta, 5 barrier, 6 format,
                  7 erased: tombstones of users that were to be forgotten; older blocks are rewritten soon,
                  8 evidence of suspects, 9 a piece of a group table that goes on in the next block,
                  10 positions: how far the input was read, the last block of every transaction
         7     1  reserved, 0
         8     4  partition
        12     4  block number, ascending in a partition (0 for a barrier)
        16     4  records in the payload; of groups: the pieces before this last one
        20     4  length of the field list
        24     4  CRC32C of everything else
        28     -  the field list, JSON [[name, dtype, shape], ...]; empty for kinds without records
         -     -  the payload: records as they lie in memory, keys (u64), or the bytes of the group table

Folding the blocks of a partition in log order gives its state. Records are migrated by field name: a field that a
block lacks is zero, one that we no longer have is dropped.
"""

from __future__ import annotations

import enum
import functools
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import crc32c
import numpy as np

from stream.errors import Corrupt
from stream.state import Records

MAGIC = b"DLB1"
FORMAT_VERSION = 1
_HEADER = struct.Struct("<4sHBBIIII")
_CHECKSUM = struct.Struct("<I")
_HEAD_BYTES = _HEADER.size + _CHECKSUM.size


class Kind(enum.IntEnum):
    """What a block holds."""

    USERS = 1
    TOMBSTONES = 2
    GROUPS = 3
    GROUP_DELTA = 4
    BARRIER = 5
    FORMAT = 6
    ERASED = 7
    EVIDENCE = 8
    GROUPS_PIECE = 9
    POSITIONS = 10


_OF_RECORDS = (Kind.USERS, Kind.TOMBSTONES, Kind.ERASED, Kind.EVIDENCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One decoded block. `records` for USERS, EVIDENCE, TOMBSTONES and ERASED (these: `key` only), else `payload`.

    `pieces`: of GROUPS, how many GROUPS_PIECE blocks come right before it.
    """

    kind: Kind
    partition: int
    number: int
    records: Records | None
    payload: bytes
    pieces: int = 0


@functools.lru_cache(maxsize=64)
def field_list(dtype: np.dtype[Any]) -> bytes:
    """The names, types and shapes of a record's fields, as they stand in a block."""
    fields = []
    for name in dtype.names or ():
        part = dtype[name]
        fields.append([name, part.base.str, list(part.shape)])
    return json.dumps(fields, separators=(",", ":")).encode()


def encode(kind: Kind, partition: int, number: int, body: Records | bytes, pieces: int = 0) -> bytes:
    """One block."""
    fields, count = b"", pieces
    if isinstance(body, np.ndarray):
        fields, count, body = field_list(body.dtype), len(body), body.tobytes()
    head = _HEADER.pack(MAGIC, FORMAT_VERSION, kind, 0, partition, number, count, len(fields))
    checksum = crc32c.crc32c(body, crc32c.crc32c(fields, crc32c.crc32c(head)))
    return head + _CHECKSUM.pack(checksum) + fields + body


def records_in_block(dtype: np.dtype[Any], bytes_max: int) -> int:
    """How many records of a layout fit into one block."""
    return max(1, (bytes_max - _HEAD_BYTES - len(field_list(dtype))) // dtype.itemsize)


def blocks_needed(count: int, dtype: np.dtype[Any], bytes_max: int) -> int:
    """How many blocks `pack` makes of `count` records."""
    return -(-count // records_in_block(dtype, bytes_max))


def pack(kind: Kind, partition: int, number: int, records: Records, bytes_max: int) -> Iterator[bytes]:
    """Records as blocks of at most `bytes_max`, numbered from `number` on."""
    room = records_in_block(records.dtype, bytes_max)
    for i, start in enumerate(range(0, len(records), room)):
        yield encode(kind, partition, number + i, records[start : start + room])


def pack_groups(partition: int, number: int, payload: bytes, bytes_max: int) -> Iterator[bytes]:
    """A whole group table, in pieces where it is too large for one block."""
    room = bytes_max - _HEAD_BYTES
    *pieces, last = [payload[start : start + room] for start in range(0, len(payload), room)] or [b""]
    for i, piece in enumerate(pieces):
        yield encode(Kind.GROUPS_PIECE, partition, number + i, piece)
    yield encode(Kind.GROUPS, partition, number + len(pieces), last, len(pieces))


def decode(value: bytes, where: str) -> Block:
    """Read a block back.

    Args:
        where: topic, partition and offset, for the message.

    Raises:
        Corrupt: the bytes are not a block, fail their checksum, or come from a newer format.
    """
    if len(value) < _HEAD_BYTES or value[:4] != MAGIC:
        raise Corrupt(f"{where}: not a state block")
    _, version, kind, _, partition, number, count, fields_length = _HEADER.unpack_from(value)
    if version > FORMAT_VERSION:
        raise Corrupt(
            f"{where}: state format {version} is newer than this program's {FORMAT_VERSION}; upgrade driftline"
        )
    (checksum,) = _CHECKSUM.unpack_from(value, _HEADER.size)
    if crc32c.crc32c(value[_HEAD_BYTES:], crc32c.crc32c(value[: _HEADER.size])) != checksum:
        raise Corrupt(f"{where}: the state block fails its checksum; restore the topic or start with a new app.name")
    body = memoryview(value)[_HEAD_BYTES + fields_length :]
    if kind not in _OF_RECORDS:
        return Block(
            kind=Kind(kind), partition=partition, number=number, records=None, payload=bytes(body), pieces=count
        )
    dtype = _dtype(value[_HEAD_BYTES : _HEAD_BYTES + fields_length])
    if count * dtype.itemsize != len(body):
        raise Corrupt(f"{where}: the state block promises {count} records and holds {len(body)} bytes")
    records = np.frombuffer(body, dtype)
    return Block(kind=Kind(kind), partition=partition, number=number, records=records, payload=b"")


@functools.lru_cache(maxsize=64)
def _dtype(fields: bytes) -> np.dtype[Any]:
    return np.dtype([(n, t, tuple(shape)) if shape else (n, t) for n, t, shape in json.loads(fields)])


_PROFILE = ("slow_weight", "slow_interest")  # the first orders both


def migrate(records: Records, dtype: np.dtype[Any]) -> Records:
    """Records in today's layout, field by field. A field whose length changed starts empty: a ring is circular and a
    hidden state belongs to its width, so a part of either would be wrong rather than incomplete. Of a slow profile,
    which has no order, the heaviest interests stay."""
    if records.dtype == dtype:
        return records
    out = np.zeros(len(records), dtype)
    for name in dtype.names or ():
        if name in (records.dtype.names or ()) and records.dtype[name].shape == dtype[name].shape:
            out[name] = records[name]
    if {*_PROFILE} <= {*(dtype.names or ())} & {*(records.dtype.names or ())}:
        kept = min(records.dtype[_PROFILE[0]].shape[0], dtype[_PROFILE[0]].shape[0])
        heaviest = np.argsort(-records[_PROFILE[0]].astype(np.int64), axis=1, kind="stable")[:, :kept]
        for name in _PROFILE:
            if records.dtype[name].shape != dtype[name].shape:
                out[name][:, :kept] = np.take_along_axis(records[name], heaviest, axis=1)
    return out
