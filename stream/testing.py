"""For tests and the simulator: an engine that is a digest, and the oracle that reads what it wrote.

The digest engine replaces the network: state' = H(state, event id). It is as sensitive to a lost, doubled, reordered or
stale event as anything can be, and imports no torch, so that hundreds of kills are cheap. Under it everything else is
the real thing: worker, commit, changelog, restore, transports. A user who says goodbye is forgotten: the next event of
that name begins a new chain.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from stream import records as out
from stream.engine import Output, PartitionState, PartitionStep
from stream.errors import BadEvent
from stream.events import user_hash
from stream.transport import LogReader, Record, TopicPartition

_GOODBYE = b'"goodbye":true'
DIGEST = np.dtype([("key", "<u8"), ("block", "<u4"), ("seq", "<u4"), ("digest", "<u8")])


class DigestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What the digest engine publishes for each event, to the `forecasts` topic."""

    partition: int
    offset: int
    user: str
    seq: int
    previous: int
    digest: int
    weights: int


class CountingDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a batch adds to a table that counts `before` events."""

    before: int
    counts: dict[str, int]


class CountingGroups:
    """Events of the partition by first letter of the user: enough to see a lost or doubled group delta.

    A delta fits its own table only, as those of the real group table do.
    """

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        self.counts: Counter[str] = Counter(counts or {})

    def snapshot(self) -> bytes:
        return msgspec.json.encode(dict(sorted(self.counts.items())))

    def delta(self, counts: Mapping[str, int]) -> bytes:
        return msgspec.json.encode(CountingDelta(before=self.counts.total(), counts=dict(counts)))

    def apply(self, payload: bytes) -> None:
        delta = msgspec.json.decode(payload, type=CountingDelta)
        if delta.before != self.counts.total():
            raise ValueError(f"the delta of a table of {delta.before} events meets one of {self.counts.total()}")
        self.counts.update(delta.counts)


class DigestEngine:
    """See the module's docstring; the Engine protocol."""

    dtype = DIGEST
    weights_version = 0

    def __init__(self, epoch_records: int = 1_000) -> None:
        self._epoch_records = epoch_records

    def next_cut(self, seen: int) -> int:
        return (seen // self._epoch_records + 1) * self._epoch_records

    def new_groups(self) -> CountingGroups:
        return CountingGroups()

    def groups_from_snapshot(self, payload: bytes) -> CountingGroups:
        return CountingGroups(msgspec.json.decode(payload, type=dict[str, int]))

    def groups_with(self, groups: CountingGroups, delta: bytes) -> CountingGroups:
        copy = CountingGroups(groups.counts)
        if delta:
            self.apply_group_delta(copy, delta)
        return copy

    def apply_group_delta(self, groups: CountingGroups, payload: bytes) -> None:
        groups.apply(payload)

    def process(
        self, states: Mapping[int, PartitionState], inputs: Mapping[TopicPartition, Sequence[Record]]
    ) -> list[PartitionStep]:
        return [self._step(states[tp.partition], tp, records) for tp, records in inputs.items()]

    def _step(self, state: PartitionState, tp: TopicPartition, records: Sequence[Record]) -> PartitionStep:
        outputs: list[Output] = []
        counts: Counter[str] = Counter()
        read: list[tuple[Record, str]] = []
        for record in records:
            try:
                read.append((record, _user(record)))
            except BadEvent as error:
                letter = out.dead_letter(
                    reason=error.reason,
                    message=str(error),
                    source=out.Source(topic=tp.topic, partition=tp.partition, offset=record.offset),
                    timestamp_ms=record.timestamp,
                    key=record.key,
                    value=record.value,
                )
                outputs.append(Output(stream="dead_letters", key=record.key, value=out.encode(letter)))
        keys = {user: user_hash(user, b"test") for _, user in read}
        rows = {user: i for i, user in enumerate(keys)}
        users = state.arena.take(np.array(list(keys.values()), np.uint64))
        left = np.zeros(len(users), np.bool_)
        for record, user in read:
            row = users[rows[user]]
            previous = int(row["digest"])
            row["seq"] += 1
            row["digest"] = _digest(previous, tp.partition, record.offset, record.value or b"")
            counts[user[:1]] += 1
            output = DigestOutput(
                partition=tp.partition,
                offset=record.offset,
                user=user,
                seq=int(row["seq"]),
                previous=previous,
                digest=int(row["digest"]),
                weights=self.weights_version,
            )
            outputs.append(Output(stream="forecasts", key=record.key, value=msgspec.json.encode(output)))
            left[rows[user]] = leaves = _leaves(record)
            if leaves:
                row["seq"], row["digest"] = 0, 0
        seen = state.seen + len(records)
        after = None
        if seen == self.next_cut(state.seen):
            after = CountingGroups(state.groups.counts)
            after.counts.update(counts)
        return PartitionStep(
            partition=tp.partition,
            positions={tp: records[-1].offset + 1},
            records=users[~left],
            gone=users["key"][left] if left.any() else None,
            seen=seen,
            watermark_ms=max([state.watermark_ms, *(r.timestamp for r in records)]),
            outputs=outputs,
            group_delta=state.groups.delta(counts) if after is None and counts else b"",
            groups_after=after,
        )


def _user(record: Record) -> str:
    if record.value is None or record.key is None:
        raise BadEvent("null_value", "no key or no value")
    try:
        user = msgspec.json.decode(record.value)["user"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise BadEvent("broken_json", str(error)) from None
    if not isinstance(user, str) or user.encode() != record.key:
        raise BadEvent("key_mismatch", "the key is not the user")
    return user


def _leaves(record: Record) -> bool:
    """Whether the event is a goodbye."""
    return _GOODBYE in (record.value or b"")


def _digest(previous: int, partition: int, offset: int, value: bytes) -> int:
    hashed = hashlib.blake2b(b"%d/%d/%d/" % (previous, partition, offset) + value, digest_size=8)
    return int.from_bytes(hashed.digest(), "little")


@dataclass(kw_only=True, slots=True)
class Verdict:
    """What the oracle found. `problems` must be empty."""

    inputs: int = 0
    outputs: int = 0
    dead_letters: int = 0
    problems: list[str] = field(default_factory=list)

    def blame(self, invariant: str, message: str) -> None:
        if len(self.problems) < 50:
            self.problems.append(f"{invariant}: {message}")


def read_all(reader: LogReader, topic: str, partitions: int, wait_s: float = 1.0) -> Iterator[Record]:
    """All committed records of a topic, partition by partition; done when a read brings nothing for `wait_s`."""
    for partition in range(partitions):
        offset = 0
        while records := reader.read(TopicPartition(topic, partition), offset, wait_s, 5_000):
            yield from records
            offset = records[-1].offset + 1


def judge(inputs: Iterable[Record], outputs: Iterable[Record], dead_letters: Iterable[Record]) -> Verdict:
    """Check I1 to I3 of a drained run: one result for each input, none twice, each user's chain unbroken and in order.

    I1  every input offset has exactly one output or dead letter
    I2  no (partition, offset) twice
    I3  per user seq = 1, 2, 3, ...; the previous digest is the one before; every digest is right for its input; after a
        goodbye it begins again
    """
    verdict = Verdict()
    values, leaving = {}, set()
    for record in inputs:
        values[record.partition, record.offset] = record.value or b""
        if _leaves(record):
            leaving.add((record.partition, record.offset))
    verdict.inputs = len(values)
    answered: Counter[tuple[int, int]] = Counter()
    chains: dict[str, tuple[int, int]] = {}
    for record in outputs:
        verdict.outputs += 1
        output = msgspec.json.decode(record.value or b"", type=DigestOutput)
        where = (output.partition, output.offset)
        answered[where] += 1
        if record.partition != output.partition:
            verdict.blame("I1", f"the output of {where} lies in partition {record.partition}")
        seq, digest = chains.get(output.user, (0, 0))
        if (output.seq, output.previous) != (seq + 1, digest):
            had, has = f"{seq}/{digest:x}", f"{output.seq}/{output.previous:x}"
            verdict.blame("I3", f"{output.user} at {where}: {has} does not follow {had}")
        if output.digest != _digest(output.previous, *where, values.get(where, b"")):
            verdict.blame("I3", f"{output.user} at {where}: the digest is not that of its input")
        chains[output.user] = (0, 0) if where in leaving else (output.seq, output.digest)
    for record in dead_letters:
        verdict.dead_letters += 1
        source = msgspec.json.decode(record.value or b"", type=out.DeadLetter).source
        answered[(source.partition, source.offset)] += 1
    for where, count in answered.items():
        if count > 1:
            verdict.blame("I2", f"{where} was answered {count} times")
        if where not in values:
            verdict.blame("I1", f"{where} was answered but is no input")
    missing = [where for where in values if where not in answered]
    if missing:
        verdict.blame("I1", f"{len(missing)} inputs were never answered, the first is {min(missing)}")
    return verdict


def fold_inputs(inputs: Iterable[Record]) -> dict[int, dict[int, tuple[int, int]]]:
    """I4: what the arena must hold at the end, by partition and user key: (seq, digest), from the inputs alone."""
    folded: dict[int, dict[int, tuple[int, int]]] = {}
    for record in sorted(inputs, key=lambda r: (r.partition, r.offset)):
        try:
            user = _user(record)
        except BadEvent:
            continue
        users = folded.setdefault(record.partition, {})
        key = user_hash(user, b"test")
        seq, digest = users.get(key, (0, 0))
        users[key] = (seq + 1, _digest(digest, record.partition, record.offset, record.value or b""))
        if _leaves(record):
            del users[key]
    return folded


def arena_content(state: PartitionState) -> dict[int, tuple[int, int]]:
    """The arena of a digest worker as `fold_inputs` gives it."""
    return {int(r["key"]): (int(r["seq"]), int(r["digest"])) for r in state.arena.all()}


def digest_event(
    user: str, number: int, timestamp_ms: int = 1_700_000_000_000, *, goodbye: bool = False
) -> tuple[bytes, bytes, int]:
    """(key, value, timestamp) of an input record for the digest engine."""
    event = {"user": user, "interest": f"i{number % 7}", "time": timestamp_ms + number}
    value = msgspec.json.encode({**event, "goodbye": True} if goodbye else event)
    return user.encode(), value, timestamp_ms + number
