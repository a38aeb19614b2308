"""Who owns which partition of a consumer group: one rule for all three logs.

Not on the way of an event; asked whenever a member joins or leaves. The unit is the partition NUMBER: partition 3 of
all topics of the group goes to the same member, because a user's clicks and purchases lie at the same number of
different topics. Sticky: an owner keeps what it has up to its fair share, so that a rebalance moves the least.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from stream.errors import LostPosition
from stream.transport import TopicPartition


class Membership(NamedTuple):
    """The proof of membership that goes with a polled batch on the logs that are our own."""

    group: str
    generation: int
    member: str


def reset_position(reset: str, partition: TopicPartition, position: int, head: int, end: int) -> int:
    """Where to read when there is no position (-1), or it was deleted or never existed.

    Raises:
        LostPosition: the rule is `none`: somebody must decide.
    """
    if reset == "earliest":
        return head
    if reset == "latest":
        return end
    where = f"{partition.topic}-{partition.partition}"
    what = f"position {position} of {where} is not there any more" if position >= 0 else f"no position for {where}"
    raise LostPosition(f"{what} (the log holds {head} to {end}); set reset to earliest or latest to go on from there")


def assign(members: Iterable[str], numbers: Sequence[int], owners: Mapping[int, str]) -> dict[int, str]:
    """The owner of each partition number: shares differ by at most one and as few numbers as possible change hands.

    Args:
        members: ids of the living members; none gives an empty answer.
        numbers: the partition numbers to share out.
        owners: who owns which number now; members that are gone may be named.

    Example:
        >>> assign(["a", "b"], range(4), {0: "a", 1: "a", 2: "a", 3: "a"})
        {0: 'a', 1: 'a', 2: 'b', 3: 'b'}
    """
    living = sorted(members)
    if not living:
        return {}
    held: dict[str, list[int]] = {member: [] for member in living}
    for number in sorted(numbers):
        owner = owners.get(number)
        if owner in held:
            held[owner].append(number)
    small, larger = divmod(len(numbers), len(living))
    # The members that hold the most keep the larger shares: that moves the least.
    by_holding = sorted(living, key=lambda member: (-len(held[member]), member))
    quota = {member: small + (rank < larger) for rank, member in enumerate(by_holding)}
    target = {number: member for member in living for number in held[member][: quota[member]]}
    free = [number for number in sorted(numbers) if number not in target]
    room = {member: quota[member] - min(len(held[member]), quota[member]) for member in by_holding}
    for member in by_holding:
        for _ in range(room[member]):
            target[free.pop(0)] = member
    return dict(sorted(target.items()))
