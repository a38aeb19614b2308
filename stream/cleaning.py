"""FIFO cleaning: keeps a partition's state log short by rewriting what is still alive in its oldest blocks.

A batch that makes the log longer than `factor` times its live bytes takes the oldest blocks along: their records that
no newer block holds are written again in the same transaction, and once that is committed the head of the log is
deleted. Nothing is deleted that a committed transaction has not rewritten, so a restore that runs at the same time, or
a crash at any point, loses nothing; a crash before the deletion leaves a longer log that the next batches shorten.

    oldest ┌─────┬─────┬─────┬─────┬─────┬ ─ ─ newest
           │  7  │  8  │  9  │ ... │ 41  │ 42: touched records of the batch + the live ones of block 7
           └─────┴─────┴─────┴─────┴─────┴ ─ ─
              ▲ deleted after the commit of 42

A record is alive in a block if the arena's record of that key carries the block's number, a row of evidence if the side
table still needs it.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stream import changelog
from stream.changelog import Block, Kind
from stream.engine import Engine, PartitionState, PartitionStep
from stream.errors import Retryable
from stream.state import Records
from stream.transport import Admin, LogReader, TopicPartition, close_all

log = logging.getLogger(__name__)

LOG_BYTES_MIN = 4_000_000  # shorter logs are left alone: there is nothing to gain
BLOCKS_PER_BATCH_MAX = 8
ERASED_BLOCKS_PER_BATCH = 1  # of a log that is short enough, but may hold users that were to be forgotten
_READ_BLOCKS = 8
READ_TIMEOUT_S = 0.2  # there is something to read: a log that is fetched over a network needs a moment to bring it


@dataclass(kw_only=True, slots=True)
class _Head:
    """The oldest end of one partition's log."""

    offset: int = 0  # where to read on
    newest: int = 0  # number of the newest block that was read
    ahead: deque[tuple[int, int, Block]] = field(default_factory=deque)  # (offset, bytes, block) read, not yet used
    before: int = 0  # all below is rewritten, once the batch under way is committed
    freed: int = 0  # bytes of that
    owed_before: int = 0  # all below has been rewritten by committed batches and is still to be deleted
    owed: int = 0  # bytes of that

    def rewind(self) -> None:
        """The attempt under way is void: read again from the head of the log."""
        self.offset, self.newest, self.before, self.freed = 0, 0, 0, 0
        self.ahead.clear()


class Cleaner:
    """Cleans the partitions of one worker."""

    def __init__(
        self,
        *,
        engine: Engine,
        reader: LogReader,
        admin: Admin,
        topic: str,
        factor: float,
        log_bytes_min: int = LOG_BYTES_MIN,
    ) -> None:
        self._engine = engine
        self._reader = reader
        self._admin = admin
        self._topic = topic
        self._factor = factor
        self._log_bytes_min = log_bytes_min
        self._heads: dict[int, _Head] = {}

    def extend(self, state: PartitionState, step: PartitionStep) -> None:
        """Before the commit: add the live records of the oldest blocks to the step where the log is too long."""
        live_bytes = len(state.arena) * state.arena.dtype.itemsize + state.suspects.nbytes
        head = self._heads.setdefault(step.partition, _Head())
        # The batch itself lies in the log as well by the time that the head is deleted.
        log_bytes = state.log_bytes - head.owed + step.records.nbytes
        written: npt.NDArray[np.uint64] | None = None  # what the step writes anyway
        rewritten = []
        for cleaned in range(BLOCKS_PER_BATCH_MAX):
            too_long = log_bytes > max(self._log_bytes_min, self._factor * live_bytes)
            if not too_long and (not state.rewrite_below or cleaned >= ERASED_BLOCKS_PER_BATCH):
                break
            try:
                found = self._next(state, step.partition, head)
            except Retryable as error:  # what the step has taken along by now does no harm
                log.warning("event=cleaning_failed partition=%d error=%r", step.partition, str(error))
                head.rewind()
                break
            if found is None:
                if head.newest >= state.next_block - 1:
                    # All of the log has been read: what it is taken to be longer than that is not there. A broker that
                    # was killed brings a deleted head back for a moment, and a restore that came then has counted it.
                    state.log_bytes = head.owed + head.freed
                break
            offset, size, block = found
            if not too_long and block.number >= state.rewrite_below:
                head.ahead.appendleft(found)
                state.rewrite_below = 0  # the oldest block is newer than the erasure
                break
            if written is None:
                written = np.sort(step.records["key"])
            alive = self._rewrite(state, step, block, written)
            if len(alive):
                rewritten.append(alive)
            head.before = offset + 1
            head.freed += size
            log_bytes -= size
        if rewritten:
            step.records = np.concatenate([step.records, *rewritten])

    def committed(self, state: PartitionState, step: PartitionStep) -> None:
        """After the commit and the merge: delete what the step has rewritten, or leave it for the next one."""
        head = self._heads[step.partition]
        if head.before:
            head.owed_before, head.owed = head.before, head.owed + head.freed
            head.before = head.freed = 0
        if not head.owed_before:
            return
        try:
            self._admin.delete_records(TopicPartition(self._topic, step.partition), head.owed_before)
        except Retryable as error:
            log.warning("event=cleaning_failed partition=%d error=%r", step.partition, str(error))
            return
        state.log_bytes = max(0, state.log_bytes - head.owed)
        head.owed_before = head.owed = 0

    def is_too_long(self, state: PartitionState) -> bool:
        """Whether the log would be cleaned by the next step; so it is after a crash loop that never committed one."""
        live_bytes = len(state.arena) * state.arena.dtype.itemsize + state.suspects.nbytes
        return state.log_bytes > max(self._log_bytes_min, self._factor * live_bytes)

    def void(self, partition: int) -> None:
        """The attempt was void: nothing of it was rewritten."""
        if partition in self._heads:
            self._heads[partition].rewind()

    def forget(self, partition: int) -> None:
        """The partition is ours no longer."""
        self._heads.pop(partition, None)

    def close(self) -> None:
        close_all(self._reader, self._admin)

    def _next(self, state: PartitionState, partition: int, head: _Head) -> tuple[int, int, Block] | None:
        """The oldest block not looked at yet."""
        if not head.ahead:
            tp = TopicPartition(self._topic, partition)
            for record in self._reader.read(tp, head.offset, READ_TIMEOUT_S, _READ_BLOCKS):
                value = record.value or b""
                block = changelog.decode(value, f"{self._topic}-{partition}@{record.offset}")
                gap = record.offset - head.offset if head.offset else 0
                size = len(value) + state.hidden_bytes(gap, record.offset)
                head.ahead.append((record.offset, size, block))
                head.newest = max(head.newest, block.number)
                head.offset = record.offset + 1
        return head.ahead.popleft() if head.ahead else None

    def _rewrite(
        self, state: PartitionState, step: PartitionStep, block: Block, written: npt.NDArray[np.uint64]
    ) -> Records:
        """The records that are alive in a block and not written by the step anyway; what else is goes into the step."""
        none: Records = np.zeros(0, state.arena.dtype)
        if block.kind in (Kind.GROUPS, Kind.GROUPS_PIECE, Kind.GROUP_DELTA) and block.number >= state.groups_block:
            if step.groups_after is None:
                step.groups_after = self._engine.groups_with(state.groups, step.group_delta)
                step.group_delta = b""
        elif block.kind is Kind.EVIDENCE and block.records is not None:
            alive = state.suspects.alive(block.records)
            if step.gone is not None:  # forgotten by this very step
                alive = alive[~np.isin(alive["key"], step.gone)]
            if len(alive):
                step.evidence = np.concatenate([step.evidence, alive])
        elif block.kind is Kind.USERS and block.records is not None:
            keys = block.records["key"].astype(np.uint64)
            keys = keys[state.arena.block_of(keys) == block.number]
            keys = keys[~_among(keys, written)]
            if step.gone is not None:
                keys = keys[~np.isin(keys, step.gone)]
            if len(keys):
                return state.arena.take(keys)
        return none


def _among(keys: npt.NDArray[np.uint64], ascending: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which keys are in a sorted array; np.isin sorts both at every call."""
    if not len(ascending):
        return np.zeros(len(keys), np.bool_)
    at = np.minimum(np.searchsorted(ascending, keys), len(ascending) - 1)
    found: npt.NDArray[np.bool_] = ascending[at] == keys
    return found
