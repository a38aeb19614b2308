"""The atomic commit of a batch, in numbered steps: die between any two of them and nothing is lost or doubled.

    1  begin the transaction
    2  send the state blocks, the last of them with the positions
    3  send the outputs
    4  flush: every record is stored, or the attempt is void
    5  send the consumed positions, with the proof of membership
    6  commit
    7  merge into memory (the only step that changes the arena)

Died before 6: the log drops the transaction, the successor reads the batch again. Died after 6: the log has everything,
the successor restores it. After an exception before 6 the attempt is void; one at 6 leaves the outcome open, and it is
settled by the committed positions or, where these do not show it, by reading the state log again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from stream import changelog
from stream.changelog import Kind
from stream.engine import Engine, PartitionState, PartitionStep, merge
from stream.progress import Committed, Progress
from stream.transport import Position, Producer, TopicPartition

STEPS = (1, 2, 3, 4, 5, 6, 7)
OnStep = Callable[[int], None]


class TopicNames(msgspec.Struct, frozen=True, kw_only=True):
    """The real names of an application's topics. `outputs` maps a stream to its topic; `control` may be none."""

    events: tuple[str, ...]
    state: str
    weights: str
    outputs: Mapping[str, str]
    control: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a worker consumes: events, and the orders to it."""
        return (*self.events, self.control) if self.control else self.events


class Checkpoint:
    """Commits steps for one worker."""

    def __init__(
        self, *, engine: Engine, topics: TopicNames, partitions: int, block_bytes_max: int, on_step: OnStep
    ) -> None:
        self._engine = engine
        self._topics = topics
        self._partitions = partitions
        self._block_bytes_max = block_bytes_max
        self._on_step = on_step
        self.sealing = False  # whether the last commit came to the call that ends the transaction

    def commit(
        self, producer: Producer, states: Mapping[int, PartitionState], steps: Sequence[PartitionStep], group: object
    ) -> None:
        """Steps 1 to 6. Raises Retryable, Rebalanced or Fenced; the outcome is open only where `sealing` is set."""
        at = self._on_step
        self.sealing = False
        at(1)
        producer.begin()
        at(2)
        for step in steps:
            self._send_state(producer, states[step.partition], step)
        at(3)
        for step in steps:
            for output in step.outputs:
                topic = self._topics.outputs[output.stream]
                producer.send(topic, step.partition, output.key, output.value)
        at(4)
        producer.flush()
        at(5)
        producer.send_offsets(self.positions(steps), group)
        at(6)
        self.sealing = True
        producer.commit()

    def merge(self, states: Mapping[int, PartitionState], steps: Sequence[PartitionStep]) -> None:
        """Step 7."""
        self._on_step(7)
        for step in steps:
            merge(self._engine, states[step.partition], step)

    def positions(self, steps: Sequence[PartitionStep]) -> dict[TopicPartition, Position]:
        """The positions that a commit of these steps sets; their blocks have been sent."""
        return {
            tp: Position(offset, self._progress(step).dump()) for step in steps for tp, offset in step.positions.items()
        }

    def _progress(self, step: PartitionStep) -> Progress:
        return Progress(
            weights=self._engine.weights_version,
            seen=step.seen,
            watermark_ms=step.watermark_ms,
            next_block=step.next_block,
            partitions=self._partitions,
        )

    def _send_state(self, producer: Producer, state: PartitionState, step: PartitionStep) -> None:
        """Send the blocks of one partition; says in the step what they are."""
        first, partition = state.next_block, step.partition
        room = changelog.records_in_block(step.records.dtype, self._block_bytes_max)
        step.records["block"] = first + np.arange(len(step.records)) // room
        values = list(changelog.pack(Kind.USERS, partition, first, step.records, self._block_bytes_max))
        if len(step.evidence):
            values += changelog.pack(
                Kind.EVIDENCE, partition, first + len(values), step.evidence, self._block_bytes_max
            )
        if step.gone is not None and len(step.gone):
            keys = np.array(step.gone, np.uint64).view([("key", "<u8")])
            kind = Kind.ERASED if step.erased else Kind.TOMBSTONES
            values += changelog.pack(kind, partition, first + len(values), keys, self._block_bytes_max)
        if step.groups_after is not None:
            step.groups_block = first + len(values)
            whole = step.groups_after.snapshot()
            values += changelog.pack_groups(partition, step.groups_block, whole, self._block_bytes_max)
        elif step.group_delta:
            values.append(changelog.encode(Kind.GROUP_DELTA, partition, first + len(values), step.group_delta))
        step.next_block = first + len(values) + 1
        before = state.committed.offsets if state.committed is not None else {}
        step.committed = Committed(
            offsets={**before, **{tp.topic: offset for tp, offset in step.positions.items()}},
            progress=self._progress(step),
        )
        values.append(changelog.encode(Kind.POSITIONS, partition, step.next_block - 1, step.committed.dump()))
        for value in values:
            producer.send(self._topics.state, partition, None, value)
        step.block_bytes = sum(map(len, values))
