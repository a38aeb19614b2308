"""The partition of a key, as Kafka's own clients choose it.

On the way of an event: before the log. Every producer of ours asks here, and any other producer that keeps Kafka's
default partitioner agrees, so that all events of a user lie in one partition, in order.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from functools import lru_cache

_MULTIPLIER = 0x5BD1E995
_SEED = 0x9747B28C
_MASK = 0xFFFFFFFF
STRAY_SHARE = 0.02  # up to so many keys in a foreign partition, nobody mixes partitioners


def murmur2(data: bytes) -> int:
    """The 32-bit murmur2 hash of `data` with the seed of Kafka's Java client, as an unsigned number.

    Source: MurmurHash2 by Austin Appleby (public domain); seed and use as in Apache Kafka's `Utils.murmur2`.

    Example:
        >>> murmur2(b"foobar")
        3504634814
    """
    h = _SEED ^ len(data)
    words = len(data) // 4
    for k in struct.unpack_from(f"<{words}I", data):
        k = k * _MULTIPLIER & _MASK
        k = (k ^ k >> 24) * _MULTIPLIER & _MASK
        h = h * _MULTIPLIER & _MASK ^ k
    tail = data[words * 4 :]
    if tail:
        h = (h ^ int.from_bytes(tail, "little")) * _MULTIPLIER & _MASK
    h = (h ^ h >> 13) * _MULTIPLIER & _MASK
    return h ^ h >> 15


@lru_cache(maxsize=1 << 16)
def _positive_hash(key: bytes) -> int:
    return murmur2(key) & 0x7FFFFFFF


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of `key` among `partitions`; the same on every machine and for every Kafka client.

    Raises:
        ValueError: there are no partitions to choose from.

    Example:
        >>> [partition_of(user.encode(), 4) for user in ("ada", "ben", "cleo")]
        [1, 1, 3]
    """
    if partitions < 1:
        raise ValueError(f"a topic has at least one partition, not {partitions}")
    return _positive_hash(key) % partitions


def crc32_partition_of(key: bytes, partitions: int) -> int:
    """Where librdkafka's default partitioner puts `key`: another place than Kafka's own clients, mostly.

    Source: the partitioner `consistent_random` of librdkafka, CRC-32 of the key.

    Example:
        >>> [crc32_partition_of(user.encode(), 4) for user in ("ada", "ben", "cleo")]
        [0, 1, 2]
    """
    return zlib.crc32(key) % partitions


def misplaced(users: Iterable[str], partition: int, partitions: int) -> dict[str, int]:
    """How many of the users of a partition lie elsewhere by each of the two rules that producers have in use.

    One rule in use: its count stays 0. Both counts grow: producers of both kinds write to one topic, and a user's
    events lie in two partitions.
    """
    counts = {"not_murmur2": 0, "not_crc32": 0}
    if partitions > 1:
        for user in users:
            key = user.encode()
            counts["not_murmur2"] += partition_of(key, partitions) != partition
            counts["not_crc32"] += crc32_partition_of(key, partitions) != partition
    return counts
