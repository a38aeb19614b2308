"""A member of a Kafka consumer group; see transport.GroupConsumer.

Rebalances are cooperative. The library's I/O thread calls our listener, which only notes what came and went (and pauses
what came); `poll` hands the notes out. Records count only if the group was stable with one generation from before the
library's poll until after it, and our listener has heard what that generation took away; else they are put back, so
that a proof of membership never belongs to another generation than its records. Newly assigned partitions are paused;
where the owner resumes without a seek, the next poll places them by the committed position or the reset rule.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from kafka import KafkaConsumer as Client
from kafka import errors as kafka_errors
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.abstract import AbstractPartitionAssignor, RebalanceProtocol
from kafka.coordinator.consumer import ConsumerCoordinator
from kafka.protocol.consumer.metadata import ConsumerProtocolAssignment, ConsumerProtocolSubscription
from kafka.structs import TopicPartition as ClientPartition

from stream.assignment import assign, reset_position
from stream.errors import ConfigError, LostPosition
from stream.kafka_batches import WholeBatches
from stream.kafka_client import ConnectionSettings, Topics, hushed, translating
from stream.transport import Polled, Position, Record, TopicPartition

POLL_SLICE_S = 0.1  # the library does not return when only the assignment changed
# How long a rebalance waits for members that do not come. A broker that was killed may forget to expire dead members
# when it is back; the library's 300 s then stopped the whole group. [kafka] max_poll_interval_ms overrides it.
REJOIN_TIMEOUT_MS = 60_000
COMMITTED_TIMEOUT_S = 5.0
_LIST_TIMEOUT_MS = 5_000
_CLOSE_TIMEOUT_MS = 3_000
FETCH = {
    "fetch_max_wait_ms": 100,
    "max_partition_fetch_bytes": 4 << 20,
    "fetch_max_bytes": 16 << 20,
    "receive_buffer_bytes": 1 << 20,
}


class SharedByNumber(AbstractPartitionAssignor):  # type: ignore[misc]
    """Our rule of assignment.py as a cooperative protocol: what moves is given up in one round and taken in the next.

    The library's own cooperative-sticky spreads partition 3 of two topics over two members; a user's clicks and
    purchases must stay together.
    """

    name = "driftline-by-number"
    _VERSION = 2  # of the subscription: the first with the generation, that tells a stale claim

    def __init__(self, owned: Callable[[], Iterable[TopicPartition]]) -> None:
        self._owned = owned
        self._generation = -1

    def supported_protocols(self) -> list[RebalanceProtocol]:
        return [RebalanceProtocol.COOPERATIVE]

    def metadata(self, topics: set[str]) -> ConsumerProtocolSubscription:
        by_topic: dict[str, list[int]] = defaultdict(list)
        for topic, number in sorted(self._owned()):
            by_topic[topic].append(number)
        claim = ConsumerProtocolSubscription.TopicPartition
        return ConsumerProtocolSubscription(
            version=self._VERSION,
            topics=sorted(topics),
            user_data=b"",
            owned_partitions=[claim(topic=topic, partitions=numbers) for topic, numbers in by_topic.items()],
            generation_id=self._generation,
        )

    def on_assignment(self, assignment: ConsumerProtocolAssignment, generation: int) -> None:
        self._generation = generation

    def assign(self, cluster: Any, members: Sequence[Any]) -> dict[str, ConsumerProtocolAssignment]:
        topics = sorted({topic for member in members for topic in member.metadata.topics})
        counts = {topic: len(cluster.partitions_for_topic(topic) or ()) for topic in topics}
        claims: dict[tuple[str, int], tuple[int, str]] = {}
        for member in members:
            for claim in member.metadata.owned_partitions or ():
                for number in claim.partitions:
                    entry = (member.metadata.generation_id, member.member_id)
                    claims[claim.topic, number] = max(entry, claims.get((claim.topic, number), entry))
        owners = {number: owner for (_, number), (_, owner) in sorted(claims.items())}
        numbers = range(max(counts.values(), default=0))
        target = assign([member.member_id for member in members], numbers, owners)
        shares: dict[str, dict[str, list[int]]] = {member.member_id: defaultdict(list) for member in members}
        for topic, count in counts.items():
            for number in range(count):
                holder = claims.get((topic, number), (0, target[number]))[1]
                if holder == target[number]:  # else its holder gives it up in this round
                    shares[holder][topic].append(number)
        return {member: ConsumerProtocolAssignment(1, sorted(share.items()), b"") for member, share in shares.items()}


class _Notes(ConsumerRebalanceListener):  # type: ignore[misc]
    """What the I/O thread tells about the assignment, until `poll` takes it."""

    def __init__(self) -> None:
        self.client: Client | None = None
        self._lock = threading.Lock()
        self._owned: set[TopicPartition] = set()
        self._assigned: list[TopicPartition] = []
        self._revoked: list[TopicPartition] = []

    def owned(self) -> set[TopicPartition]:
        with self._lock:
            return set(self._owned)

    def on_partitions_assigned(self, assigned: Iterable[ClientPartition]) -> None:
        for partition in assigned:
            # Neither blocks. The position is a placeholder that stops the library from fetching or resetting one.
            self.client.pause(partition)  # type: ignore[union-attr]
            self.client.seek(partition, 0)  # type: ignore[union-attr]
        with self._lock:
            partitions = sorted(TopicPartition(*p) for p in assigned)
            self._owned.update(partitions)
            self._assigned += partitions

    def on_partitions_revoked(self, revoked: Iterable[ClientPartition]) -> None:
        with self._lock:
            partitions = sorted(TopicPartition(*p) for p in revoked)
            self._owned.difference_update(partitions)
            # What came and went between two polls was never the owner's business.
            self._revoked += [p for p in partitions if p not in self._assigned]
            self._assigned = [p for p in self._assigned if p not in partitions]

    def on_partitions_lost(self, lost: Iterable[ClientPartition]) -> None:
        self.on_partitions_revoked(lost)

    def take(self) -> tuple[tuple[TopicPartition, ...], tuple[TopicPartition, ...]]:
        """(assigned, revoked) since the last call."""
        with self._lock:
            notes = tuple(self._assigned), tuple(self._revoked)
            self._assigned, self._revoked = [], []
        return notes


class _Join:
    """A join of the group, that counts as running until its result has been taken."""

    def __init__(self, future: Any) -> None:
        self._future = future

    @property
    def is_done(self) -> bool:
        return bool(self._future.failed())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._future, name)

    def __await__(self) -> Any:
        return self._future.__await__()


class _PatientCoordinator(ConsumerCoordinator):  # type: ignore[misc]
    """Takes the result of a join that ended between two polls.

    kafka-python 3.0.12 forgets it and joins again, and when the leader does so the whole group rebalances once more.
    Worse, a leader that joined because it saw new partitions does not even ask again: it sends no heartbeats any more
    and its share lies idle until the broker throws it out.
    """

    taken_generation = -1  # the newest one whose assignment our listener has heard in full

    async def _on_join_complete_async(self, generation: int, *arguments: Any) -> None:
        await super()._on_join_complete_async(generation, *arguments)
        self.taken_generation = generation

    def need_rejoin(self) -> bool:
        return bool(self.rejoining or super().need_rejoin())

    @property
    def _join_task(self) -> _Join | None:
        return self.__dict__.get("_join")

    @_join_task.setter
    def _join_task(self, future: Any) -> None:
        self.__dict__["_join"] = None if future is None else _Join(future)


class KafkaConsumer:
    """Reads its share of the topics' partitions; see the top of the file."""

    def __init__(
        self, settings: ConnectionSettings, topics_known: Topics, group: str, topics: tuple[str, ...], reset: str
    ) -> None:
        if reset not in ("earliest", "latest", "none"):
            raise ConfigError(f"reset is earliest, latest or none, not {reset!r}")
        for topic in topics:
            topics_known.check(topic)
        self._group = group
        self._reset = reset
        self._owned: set[TopicPartition] = set()  # as handed out by poll
        self._unplaced: set[TopicPartition] = set()  # no seek yet
        self._held: set[TopicPartition] = set()  # paused by the owner's wish, or since assigned
        self._notes = _Notes()
        session_ms = int(settings.get("session_timeout_ms", Client.DEFAULT_CONFIG["session_timeout_ms"]))
        self._client = settings.connect(
            Client,
            group_id=group,
            auto_offset_reset=reset,
            max_poll_interval_ms=settings.get("max_poll_interval_ms", max(REJOIN_TIMEOUT_MS, session_ms)),
            partition_assignment_strategy=[SharedByNumber(self._notes.owned)],
            **{name: settings.get(name, value) for name, value in FETCH.items()},
        )
        self._client._coordinator.__class__ = _PatientCoordinator
        self._client._fetcher.PartitionRecords = WholeBatches
        self._connect_side = partial(settings.connect, Client, group_id=group)
        self._side: Client | None = None  # asks for positions: our own connection may wait in a rebalance for others
        self._notes.client = self._client
        self._client.subscribe(topics=list(topics), listener=self._notes)
        self._closed = False

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        if self._closed:
            raise ValueError("the consumer is closed")
        until_s = time.monotonic() + timeout_s
        while True:
            with translating(f"poll of group {self._group!r}"):
                self._place_resumed()
                left_s = max(0.0, until_s - time.monotonic())
                polled = self._poll_once(min(left_s, POLL_SLICE_S), max_records)
            if polled.records or polled.assigned or polled.revoked or time.monotonic() >= until_s:
                return polled

    def _poll_once(self, timeout_s: float, max_records: int) -> Polled:
        before = self._client.group_metadata()
        try:
            records = self._client.poll(timeout_ms=timeout_s * 1000, max_records=max_records)
        except kafka_errors.OffsetOutOfRangeError as error:
            raise LostPosition(
                f"a position of group {self._group!r} is not in the log any more ({error.args[-1]}); "
                "set reset to earliest or latest to go on from there"
            ) from error
        group = self._client.group_metadata()
        assigned, revoked = self._notes.take()
        self._owned.difference_update(revoked)
        self._owned.update(assigned)
        self._held = (self._held & self._owned).union(assigned)
        self._unplaced = (self._unplaced & self._owned).union(assigned)
        coordinator = self._client._coordinator
        # The library has the new generation some time before our listener hears what was given up.
        stable = (
            group.member_id
            and before == group
            and coordinator.taken_generation == group.generation_id
            and not coordinator.rebalance_in_progress()
        )
        if assigned or revoked or not stable:
            for partition, found in records.items():
                if partition in self._owned and found:
                    self._client.seek(partition, found[0].offset)
            return Polled(group=group, assigned=assigned, revoked=revoked)
        mine: dict[TopicPartition, Sequence[Record]] = {
            TopicPartition(*p): found for p, found in records.items() if p in self._owned
        }
        return Polled(group=group, records=mine)

    def _place_resumed(self) -> None:
        """Give partitions that were resumed without a seek their position."""
        ready = [p for p in self._unplaced if p not in self._held]
        if not ready:
            return
        committed = self.committed(ready)
        clients = [ClientPartition(*p) for p in ready]
        heads = self._client.beginning_offsets(clients, timeout_ms=_LIST_TIMEOUT_MS)
        ends = self._client.end_offsets(clients, timeout_ms=_LIST_TIMEOUT_MS)
        for partition, client in zip(ready, clients, strict=True):
            stored = committed[partition]
            position = stored.offset if stored else -1
            if not heads[client] <= position <= ends[client]:
                position = reset_position(self._reset, partition, position, heads[client], ends[client])
            self.seek(partition, position)
            self._resume_client(client)

    def pause(self, partitions: Sequence[TopicPartition]) -> None:
        self._held.update(self._checked(partitions))
        self._client.pause(*(p for p in (ClientPartition(*p) for p in partitions) if self._has(p)))

    def resume(self, partitions: Sequence[TopicPartition]) -> None:
        self._held.difference_update(self._checked(partitions))
        for client in (ClientPartition(*p) for p in partitions if p not in self._unplaced):
            if self._has(client):
                self._resume_client(client)

    def _resume_client(self, partition: ClientPartition) -> None:
        """Resume at the library, and drop what it has parked for the partition; it is fetched again.

        kafka-python 3.0.12 puts parked records back only while no other partition's last fetch lies in its slot, even a
        used-up one, and does not fetch the partition meanwhile: it would stall until another partition has news.
        """
        fetcher = self._client._fetcher
        fetcher._paused_partition_records.pop(partition, None)
        fetcher._paused_completed_fetches.pop(partition, None)
        self._client.resume(partition)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._checked([partition])
        client = ClientPartition(*partition)
        if self._has(client):
            self._client.seek(client, offset)
        self._unplaced.discard(partition)

    def _checked(self, partitions: Sequence[TopicPartition]) -> Sequence[TopicPartition]:
        for partition in partitions:
            if partition not in self._owned:
                raise ValueError(f"{partition.topic}-{partition.partition} is not assigned to this consumer")
        return partitions

    def _has(self, partition: ClientPartition) -> bool:
        """Whether the library still has it: it may have been revoked since the last poll."""
        return partition in self._client.assignment()

    def committed(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Position | None]:
        found: dict[TopicPartition, Position | None] = {}
        if not partitions:
            return found
        if self._side is None:
            self._side = self._connect_side()
        with translating(f"committed positions of group {self._group!r}"):
            for partition in partitions:
                stored = self._side.committed(
                    ClientPartition(*partition), metadata=True, timeout_ms=COMMITTED_TIMEOUT_S * 1000
                )
                found[partition] = Position(stored.offset, stored.metadata or "") if stored else None
        return found

    def lag(self) -> dict[TopicPartition, int]:
        placed = [p for p in self._owned - self._unplaced if self._has(ClientPartition(*p))]
        with translating(f"lag of group {self._group!r}"):
            ends = self._client.end_offsets([ClientPartition(*p) for p in placed], timeout_ms=_LIST_TIMEOUT_MS)
            return {p: max(0, ends[p] - (self._client.position(ClientPartition(*p), 0) or 0)) for p in placed}

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._side is not None:
                with hushed():
                    self._side.close(autocommit=False, timeout_ms=_CLOSE_TIMEOUT_MS)
            with hushed(), translating(f"leaving group {self._group!r}"):
                self._client.close(autocommit=False, timeout_ms=_CLOSE_TIMEOUT_MS)
