"""Some of the users of a file: so that what is trained or chosen on some is reported on others.

Beside the way of an event: `driftline pretrain` and `driftline evaluate` take `--users`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stream.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class UserShare:
    """Users by a hash of their id, which spreads them evenly over 0..1: those from `low` to below `high`."""

    low: float
    high: float

    @staticmethod
    def parse(text: str) -> UserShare:
        """From "0-0.5".

        Example:
            >>> half = UserShare.parse("0-0.5")
            >>> sum(half.has(f"u{i}") for i in range(1_000))
            490

        Raises:
            ConfigError: not two numbers of 0..1, the second the larger.
        """
        low, _, high = text.partition("-")
        try:
            share = UserShare(low=float(low), high=float(high))
        except ValueError:
            share = UserShare(low=1.0, high=0.0)
        if not 0 <= share.low < share.high <= 1:
            raise ConfigError(f"--users {text}: say from which share to which, as 0-0.5 and 0.5-1 for two halves")
        return share

    def has(self, user: str) -> bool:
        """Whether a user is one of them."""
        digest = hashlib.blake2b(user.encode(), digest_size=8).digest()
        return self.low <= int.from_bytes(digest, "little") / 2**64 < self.high

    def of(self, events: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The events of these users."""
        return (event for event in events if self.has(str(event["user"])))
