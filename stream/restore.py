"""Restore a partition's state from its changelog, up to a barrier.

The new owner of a partition writes a nonce block to the partition's `state` log in a committed transaction of its own
and folds the log until it meets that nonce. Whatever an older owner managed to commit lies before the barrier, because
state blocks are stored before the positions that would prove its membership; whatever is still open there resolves
first, because committed readers see nothing behind an open transaction. The barrier carries no positions: with them it
could rewind the group. Never "until position == end": the end may be a marker that no reader ever sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from models.suspicion import EVIDENCE
from stream import changelog
from stream.changelog import Kind
from stream.engine import Engine, PartitionState
from stream.errors import Corrupt, Retryable
from stream.progress import Committed
from stream.state import Arena
from stream.transport import Scope, TopicPartition, Transport

OnProgress = Callable[["RestoreProgress"], None]
PROGRESS_INTERVAL_S = 1.0
_READ_RECORDS = 64
_READ_TIMEOUT_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreProgress:
    """How far a restore has come. `share` is by offsets, 0..1; `eta_s` goes by the pace so far."""

    partition: int
    share: float
    bytes: int
    eta_s: float


def write_barrier(
    transport: Transport,
    *,
    transactional_id: str,
    topic: str,
    partition: int,
    nonce: bytes,
    scope: Scope | None = None,
    attempts: int = 5,
) -> None:
    """Commit the nonce to the partition's state log. Raises Retryable after bounded attempts."""
    for attempt in range(attempts):
        producer = transport.producer(transactional_id=transactional_id, scope=scope)
        try:
            producer.begin()
            producer.send(topic, partition, None, changelog.encode(Kind.BARRIER, partition, 0, nonce))
            producer.flush()
            producer.commit()
            return
        except Retryable:
            # An ambiguous barrier does no harm: the next one has the same nonce, and either will do.
            if attempt == attempts - 1:
                raise
        finally:
            producer.close()


def restore(
    transport: Transport,
    *,
    engine: Engine,
    topic: str,
    partition: int,
    transactional_id: str,
    nonce: bytes,
    timeout_s: float,
    clock: Callable[[], float],
    scope: Scope | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    on_progress: OnProgress | None = None,
) -> PartitionState | None:
    """The partition's state as of the barrier; None when cancelled.

    Args:
        scope: where barriers of this id are written.
        timeout_s: limit for the time without any progress, not for the whole restore.
        clock: monotonic seconds.

    Raises:
        Retryable: the barrier did not become visible in time.
        Corrupt: a block cannot be trusted.
    """
    write_barrier(
        transport, transactional_id=transactional_id, topic=topic, partition=partition, nonce=nonce, scope=scope
    )
    state = PartitionState(arena=Arena(engine.dtype), groups=engine.new_groups())
    tp = TopicPartition(topic, partition)
    gaps = blocks = 0
    reader = transport.reader()
    try:
        head, end = reader.bounds(tp)
        offset = head
        start_s = last_progress_s = told_s = clock()
        while not cancelled():
            records = reader.read(tp, offset, _READ_TIMEOUT_S, _READ_RECORDS)
            for record in records:
                gaps += max(0, record.offset - offset - 1)
                offset = record.offset + 1
                if record.value is None:
                    raise Corrupt(
                        f"{topic}-{partition}@{record.offset}: a null record in the state log; it is not ours"
                    )
                where = f"{topic}-{partition}@{record.offset}"
                block = changelog.decode(record.value, where)
                if block.kind is Kind.BARRIER and block.payload == nonce:
                    # A crash loop leaves aborted transactions behind: they make the log longer as well.
                    state.hidden_until, state.hidden_each = record.offset, state.log_bytes // max(1, blocks)
                    state.log_bytes += gaps * state.hidden_each
                    apply_deltas(engine, state)
                    return state
                fold(engine, state, block, where)
                state.log_bytes += len(record.value)
                blocks += 1
            if records:
                last_progress_s = clock()
                if on_progress is not None and last_progress_s >= told_s + PROGRESS_INTERVAL_S:
                    told_s = last_progress_s
                    share = min(1.0, (offset - head) / max(1, end - head))
                    eta_s = (told_s - start_s) * (1 - share) / max(share, 1e-9)
                    on_progress(RestoreProgress(partition=partition, share=share, bytes=state.log_bytes, eta_s=eta_s))
            elif clock() - last_progress_s > timeout_s:
                raise Retryable(
                    f"{topic}-{partition}: the barrier did not become visible within {timeout_s:.0f} s; "
                    "an older worker's transaction may still be open"
                )
        return None
    finally:
        reader.close()


def fold(engine: Engine, state: PartitionState, block: changelog.Block, where: str) -> None:
    """Apply one block in log order.

    Raises:
        Corrupt: its checksum holds, but what lies in it is not of this program's format; names `where` it lies.
    """
    with _readable(block.kind, where):
        _fold(engine, state, block, where)


@contextmanager
def _readable(kind: Kind, where: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, msgspec.MsgspecError) as error:
        raise Corrupt(
            f"{where}: {kind.name.lower()} cannot be read: {error}; run the version of driftline that wrote it, "
            "or start with a new app.name and new topics"
        ) from error


def apply_deltas(engine: Engine, state: PartitionState) -> None:
    """What the group table became since its newest whole one; without one the log still has them all.

    Not at once: deltas at the head of a cleaned log belong to a table that is gone, and a newer whole one follows.
    """
    for where, payload in state.deltas:
        with _readable(Kind.GROUP_DELTA, where):
            engine.apply_group_delta(state.groups, payload)
    state.deltas.clear()


def _fold(engine: Engine, state: PartitionState, block: changelog.Block, where: str) -> None:
    if block.kind is Kind.USERS and block.records is not None:
        state.arena.merge(changelog.migrate(block.records, engine.dtype))
    elif block.kind in (Kind.TOMBSTONES, Kind.ERASED) and block.records is not None:
        state.arena.remove(block.records["key"].copy())
        state.suspects.forget(block.records["key"].copy())
        state.rewrite_below = block.number if block.kind is Kind.ERASED else state.rewrite_below
    elif block.kind is Kind.EVIDENCE and block.records is not None:
        state.suspects.append(changelog.migrate(block.records, EVIDENCE))
    elif block.kind is Kind.GROUPS_PIECE:
        state.parts.append(block.payload)
    elif block.kind is Kind.GROUPS:
        pieces, state.parts = state.parts[-block.pieces :] if block.pieces else [], []
        if len(pieces) == block.pieces:  # else the log begins in the middle of a table, and a newer one follows
            state.groups = engine.groups_from_snapshot(b"".join([*pieces, block.payload]))
            state.groups_block = block.number - block.pieces
            state.deltas.clear()
            state.suspects.trim()
    elif block.kind is Kind.GROUP_DELTA:
        state.deltas.append((where, block.payload))
    elif block.kind is Kind.POSITIONS:
        state.committed = Committed.load(block.payload, where)
    if block.kind is not Kind.BARRIER:
        state.next_block = max(state.next_block, block.number + 1)
