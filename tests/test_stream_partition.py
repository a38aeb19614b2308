"""The partition of a key: ours must be Kafka's, or a user's events would lie in two partitions."""

import random
import warnings

import pytest

from stream.partition import murmur2, partition_of

KNOWN = {  # from the tests of Apache Kafka's Java client, as signed numbers
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


@pytest.mark.parametrize("key", KNOWN)
def test_the_hash_is_that_of_the_java_client(key: bytes) -> None:
    """Known values of the Java client come out, bit for bit."""
    assert murmur2(key) == KNOWN[key] % 2**32


def test_the_hash_is_that_of_kafka_python_for_any_bytes() -> None:
    """Random keys of every length from 0 to 40 hash as in kafka-python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of importlib, by the client's own import
        from kafka.partitioner import murmur2 as client_murmur2
    rng = random.Random(0)
    for length in range(41):
        for _ in range(20):
            key = rng.randbytes(length)
            assert murmur2(key) == client_murmur2(key) % 2**32, key


def test_partitions_are_in_range_and_even() -> None:
    """Every partition gets its share of many users: 4 standard deviations around the mean."""
    counts = [0] * 8
    for number in range(8_000):
        counts[partition_of(f"u{number}".encode(), 8)] += 1
    assert all(abs(count - 1_000) < 4 * (8_000 * 1 / 8 * 7 / 8) ** 0.5 for count in counts), counts


def test_no_partitions_is_an_error() -> None:
    """Nobody divides by zero partitions."""
    with pytest.raises(ValueError, match="at least one partition"):
        partition_of(b"ada", 0)
