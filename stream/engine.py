"""The seam between the loop and what it runs: the pipeline (stream/pipeline.py) and the digest of the tests.

An engine is pure: it has no I/O and no clock, works on copies, and leaves the partition's state as it is until `merge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from models.suspicion import EVIDENCE, Suspects
from stream.progress import Committed
from stream.records import BatchMetrics
from stream.state import Arena, Records
from stream.transport import Record, TopicPartition


class Groups(Protocol):
    """What a partition knows across its users. Changes only by whole deltas and at epoch cuts."""

    def snapshot(self) -> bytes: ...


@dataclass(kw_only=True, slots=True)
class PartitionState:
    """Everything a worker holds for one partition; equal on every worker that has read the same committed log.

    Attributes:
        seen: input records consumed so far, dead ones too. The partition's own clock: epochs are cut by it.
        watermark_ms: newest event time seen.
        next_block: number of the next state block.
        groups_block: number of the newest block that holds the whole group table; 0 = none does.
        log_bytes: length of the partition's state log, bytes of blocks.
        hidden_until, hidden_each: below this offset of the state log lie records of aborted transactions that nobody
            sees but the disk, and how long one of them is taken to be, bytes; `log_bytes` counts them.
        rewrite_below: blocks below this number may hold users that were to be forgotten; 0 = none do.
        suspects: the side table of evidence.
        committed: how far the input was read, as the newest block of the state log says; None before the first.
        parts: pieces of a group table that a restore has read so far.
        deltas: of the group table, that a restore has read since the newest whole one: where they lie, and their bytes.
    """

    arena: Arena
    groups: Any
    seen: int = 0
    watermark_ms: int = 0
    next_block: int = 1
    groups_block: int = 0
    log_bytes: int = 0
    rewrite_below: int = 0
    hidden_until: int = 0
    hidden_each: int = 0
    suspects: Suspects = field(default_factory=Suspects)
    committed: Committed | None = None
    parts: list[bytes] = field(default_factory=list)
    deltas: list[tuple[str, bytes]] = field(default_factory=list)

    def hidden_bytes(self, gap: int, offset: int) -> int:
        """What `gap` offsets without a record before `offset` of the state log hide; one is a transaction's mark."""
        return max(0, gap - 1) * self.hidden_each if offset <= self.hidden_until else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """A record for an output topic; `stream` is forecasts, alerts, verdicts, warnings, dead_letters or
    metrics.

    Its timestamp is the moment of sending: a log deletes by it, and an output with the event's own time would be gone
    at once when old events are replayed. Event times are in the values.
    """

    stream: str
    key: bytes | None
    value: bytes


@dataclass(kw_only=True, slots=True)
class PartitionStep:
    """What one batch does to one partition; void until it is committed and merged.

    Attributes:
        records: the touched users' new records.
        group_delta: what the batch adds to the groups; empty if nothing.
        groups_after: at an epoch cut, the whole new table instead of a delta.
        evidence: rows for the side table of evidence.
        gone: keys of users that are forgotten; none of them has a record in the step.
        erased: some of them by order: then older blocks are rewritten soon.
        next_block, groups_block, block_bytes, committed: said by the commit: the number after the step's blocks, that
            of its whole group table (0 = it has none), the length of all its blocks, and what their last one says.
    """

    partition: int
    positions: dict[TopicPartition, int]
    records: Records
    seen: int
    watermark_ms: int
    outputs: list[Output] = field(default_factory=list)
    group_delta: bytes = b""
    groups_after: Groups | None = None
    evidence: Records = field(default_factory=lambda: np.zeros(0, EVIDENCE))
    gone: np.ndarray[Any, Any] | None = None
    erased: bool = False
    metrics: BatchMetrics | None = None
    next_block: int = 0
    groups_block: int = 0
    block_bytes: int = 0
    committed: Committed | None = None


class Engine(Protocol):
    """Turns input records into new state and outputs."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The record of one user; has the fields `key` and `block`."""

    @property
    def weights_version(self) -> int: ...
    def next_cut(self, seen: int) -> int:
        """A batch must not cross this many records of a partition, given how many it has seen: there an epoch ends."""

    def new_groups(self) -> Any: ...
    def groups_from_snapshot(self, payload: bytes) -> Any: ...
    def groups_with(self, groups: Any, delta: bytes) -> Any:
        """A copy of the groups with a delta applied."""

    def apply_group_delta(self, groups: Any, payload: bytes) -> None: ...
    def process(
        self, states: Mapping[int, PartitionState], inputs: Mapping[TopicPartition, Sequence[Record]]
    ) -> list[PartitionStep]:
        """One batch, already cut at epochs. Raises only where the program is wrong: bad records become outputs."""


def merge(engine: Engine, state: PartitionState, step: PartitionStep) -> None:
    """Make a committed step the partition's state."""
    if step.gone is not None and len(step.gone):
        state.arena.remove(step.gone)
        state.suspects.forget(step.gone)
        state.rewrite_below = state.next_block if step.erased else state.rewrite_below
    if len(step.records):
        state.arena.merge(step.records)
    if len(step.evidence):
        state.suspects.append(step.evidence)
    if step.groups_after is not None:
        state.groups = step.groups_after
        state.suspects.trim()
    elif step.group_delta:
        engine.apply_group_delta(state.groups, step.group_delta)
    state.next_block = step.next_block or state.next_block
    state.committed = step.committed or state.committed
    state.groups_block = step.groups_block or state.groups_block
    state.log_bytes += step.block_bytes
    state.seen = step.seen
    state.watermark_ms = step.watermark_ms
