"""Events as columns: the one form in which kernels, the network and the learner see events.

Shape legend, used in names everywhere in `models/`:
    B  events of a batch, in offset order within a partition     U  distinct users of the batch
    E  events a forecast is made for (a subset of B)             N  steps of a forecast
    R  length of the ring        P  length of the slow profile   H  width of the hidden state
    V  interests in the vocabulary                               K  interests named per step
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

# Event types: a closed set of codes for what shops, banks and schools commonly send; any other word is hashed into
# the codes 16..31, so that an unknown type is an event like any other.
TYPE_CODES: dict[str, int] = {
    name: code
    for code, name in enumerate(
        ("", "browse", "cart", "purchase", "review", "favourite", "search", "login", "payment", "answer", "remove")
    )
}
_ALIASES = {
    "browse": ("view", "pv", "click", "page_view"),
    "cart": ("add_to_cart",),
    "purchase": ("buy", "order", "transaction"),
    "favourite": ("fav", "like", "wishlist"),
    "review": ("rating", "comment"),
    "remove": ("remove_from_cart",),
    "payment": ("transfer",),
}
TYPE_ALIASES: dict[str, str] = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
TYPE_COUNT = 32
_TYPE_NAMES = {code: name or "none" for name, code in TYPE_CODES.items()}


def type_code(name: str) -> int:
    """Code 0..31 of an event type name; stable over runs and machines."""
    name = name.strip().lower()
    name = TYPE_ALIASES.get(name, name)
    code = TYPE_CODES.get(name)
    if code is None:
        code = 16 + hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % 16
    return code


def type_name(code: int) -> str:
    """The canonical name of a type code; codes of unknown words are named by number."""
    return _TYPE_NAMES.get(code, f"type-{code}")


def interest_key(name: str) -> int:
    """Stable 32-bit key of an interest or item name; never 0, which is missing. The vocabulary detects collisions."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") or 1


@dataclass(kw_only=True, slots=True)
class EventColumns:
    """Valid events of ONE batch as parallel arrays of length B. Missing numbers are NaN, missing keys are 0."""

    user_row: I64  # row of the user's record in the batch's own record array
    interest: U32
    item: U32
    type: U8
    time_ms: I64
    price: F32
    dwell_s: F32
    rating: F32
    sentiment: F32  # -1..1, from the text or given
    segment: U8  # 0 = none
    vector: F32 | None = None  # (B, D) content vectors, NaN rows where missing

    def __len__(self) -> int:
        return len(self.interest)

    def take(self, index: npt.NDArray[np.intp] | slice) -> EventColumns:
        """The same columns for a subset (or a new order) of the events."""
        taken: dict[str, Any] = {
            f.name: None if (c := getattr(self, f.name)) is None else c[index] for f in fields(self)
        }
        return EventColumns(**taken)

    @staticmethod
    def join(parts: Sequence[EventColumns], first_rows: Sequence[int]) -> EventColumns:
        """Several batches behind each other; `first_rows` is where each one's users begin in the joint record array."""
        joined: dict[str, Any] = {}
        for field in fields(EventColumns):
            columns = [getattr(part, field.name) for part in parts]
            joined[field.name] = None if columns[0] is None else np.concatenate(columns)
        joined["user_row"] = np.concatenate([p.user_row + first for p, first in zip(parts, first_rows, strict=True)])
        return EventColumns(**joined)
