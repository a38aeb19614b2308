"""How far a partition has come: said with every committed position, and again in the state log itself.

The consumer group's positions are the fence and what other tools look at. The state log holds them as well, in the same
transaction: a broker that was killed and came back has been seen to hand out positions that were long past, and groups
that nobody uses for some days lose theirs.
"""

from __future__ import annotations

import msgspec

from stream.errors import ConfigError, Corrupt


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Committed with every position, as its metadata string: what must be atomic with it.

    Attributes:
        weights: version of the weights that wrote the state.
        seen, watermark_ms, next_block: see PartitionState.
        partitions: number of partitions of the application's topics; users would move if it changed.
    """

    weights: int
    seen: int
    watermark_ms: int
    next_block: int
    partitions: int

    def dump(self) -> str:
        return msgspec.json.encode(self).decode()

    @staticmethod
    def load(metadata: str, where: str) -> Progress | None:
        """Progress from a position's metadata; None for an empty string (a position set by an operator)."""
        if not metadata:
            return None
        try:
            return msgspec.json.decode(metadata, type=Progress)
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"{where}: the consumer group's position was not committed by driftline ({error}); use another app.name"
            ) from None


class Committed(msgspec.Struct, frozen=True, kw_only=True):
    """What the newest step of a state log committed: the payload of its block of positions.

    Attributes:
        offsets: the next offset to read, by input topic, of this partition.
    """

    offsets: dict[str, int]
    progress: Progress

    def dump(self) -> bytes:
        return msgspec.json.encode(self)

    @staticmethod
    def load(payload: bytes, where: str) -> Committed:
        """Raises Corrupt, naming `where` the block lies."""
        try:
            return msgspec.json.decode(payload, type=Committed)
        except msgspec.DecodeError as error:
            raise Corrupt(f"{where}: positions cannot be read: {error}") from None
