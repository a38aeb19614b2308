"""Orders to the workers, through a topic of ours: erase what is known of a user.

Beside the way of an event. `driftline forget` writes an order to every partition of the `control` topic, because only
the log knows where a user's events lie. It names the user by the keyed hash, and how far the partition's input reached
when it was given: a worker carries it out once it has consumed that much, so everything from before the order is
erased however far the worker lags behind, with what it has consumed since; the next event begins a new record. The
order's position is committed in the transaction that erases: exactly once, by whoever owns the partition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from stream.config import Config, topic_names
from stream.errors import BadEvent
from stream.events import user_hash
from stream.tail import newest_records
from stream.transport import LogReader, Record, TopicPartition, Transport

KEYS_MAX = 1_000_000  # erasures that a learner remembers


class Forget(msgspec.Struct, frozen=True, kw_only=True):
    """Topic `control`: erase a user.

    Attributes:
        user_hash: the keyed hash of the user id, 16 hexadecimal digits; the id itself is not stored.
        until: by input topic, the offset in this partition before which the user's events count as erased.
    """

    schema: int = 1
    order: Literal["forget"] = "forget"
    user_hash: str
    until: dict[str, int]

    @property
    def key(self) -> int:
        return int(self.user_hash, 16)


def read_order(record: Record) -> Forget:
    """The order in a record of the `control` topic.

    Raises:
        BadEvent: it is none.
    """
    try:
        order = msgspec.json.decode(record.value or b"", type=Forget)
        if not 0 < order.key < 1 << 64:
            raise ValueError(f"no hash: {order.user_hash}")
    except (msgspec.MsgspecError, UnicodeError, ValueError) as error:
        raise BadEvent("bad_order", str(error)) from None
    return order


def due(records: Sequence[Record], at: Mapping[TopicPartition, int]) -> int:
    """How many of a partition's orders, from the first on, can be carried out now.

    Args:
        at: how far each input partition is consumed; a topic that is not read holds nothing back.
    """
    for count, record in enumerate(records):
        try:
            until = read_order(record).until
        except BadEvent:
            continue  # becomes a dead letter
        if any(at.get(TopicPartition(t, record.partition), offset) < offset for t, offset in until.items()):
            return count
    return len(records)


def forget(transport: Transport, config: Config, user: str, now_ms: int) -> int:
    """Order the erasure of a user; the number of partitions that were told. Repeating it does no harm."""
    hash_key = config.state.hash_key.reveal().encode()
    hashed = f"{user_hash(user, hash_key):016x}"
    topic, encode = topic_names(config)["control"], msgspec.json.Encoder().encode
    reader = transport.reader()
    try:
        for partition in range(config.topics.partitions):
            order = Forget(user_hash=hashed, until=_ends(reader, config.topics.events, partition))
            transport.append(topic, partition, iter([(hashed.encode(), encode(order), now_ms)]))
    finally:
        reader.close()
    return config.topics.partitions


def _ends(reader: LogReader, topics: Sequence[str], partition: int) -> dict[str, int]:
    """The offset after the newest record of each input; marks of transactions at the end do not count."""
    newest = {topic: newest_records(reader, TopicPartition(topic, partition), 1) for topic in topics}
    return {topic: records[-1].offset + 1 for topic, records in newest.items() if records}


class Erasures:
    """The erasures that a learner must keep to: it rebuilds its histories from events that are still in their topic."""

    def __init__(self, reader: LogReader, topic: str, partitions: int) -> None:
        self._reader = reader
        self._offsets = {TopicPartition(topic, p): 0 for p in range(partitions)}
        self._until: dict[int, dict[TopicPartition, int]] = {}

    def __len__(self) -> int:
        return len(self._until)

    def poll(self) -> set[int]:
        """Read what is new; keys of the users to erase now."""
        found: set[int] = set()
        for tp in self._offsets:
            for record in self._read(tp):
                try:
                    order = read_order(record)
                except BadEvent:
                    continue  # the worker says so
                found.add(order.key)
                places = self._until.setdefault(order.key, {})
                for topic, offset in order.until.items():
                    place = TopicPartition(topic, tp.partition)
                    places[place] = max(offset, places.get(place, 0))
        while len(self._until) > KEYS_MAX:
            self._until.pop(next(iter(self._until)))
        return found

    def _read(self, tp: TopicPartition) -> list[Record]:
        records: list[Record] = []
        first, end = self._reader.bounds(tp)
        self._offsets[tp] = max(first, self._offsets[tp])
        while self._offsets[tp] < end:
            found = self._reader.read(tp, self._offsets[tp], 0.1)
            self._offsets[tp] = found[-1].offset + 1 if found else end
            records += found
        return records

    def erased(self, key: int, record: Record) -> bool:
        """Whether an event of the user came before the order."""
        places = self._until.get(key)
        return places is not None and record.offset < places.get(TopicPartition(record.topic, record.partition), 0)

    def close(self) -> None:
        self._reader.close()
