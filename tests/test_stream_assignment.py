"""Who owns which partition: fair, complete and sticky for any group."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stream.assignment import assign

MEMBERS = st.sets(st.sampled_from("abcdefgh"), max_size=8)


@given(
    members=MEMBERS,
    partitions=st.integers(0, 40),
    owners=st.dictionaries(st.integers(0, 45), st.sampled_from("abcdxyz")),
)
def test_shares_are_fair_complete_and_move_the_least(
    members: set[str], partitions: int, owners: dict[int, str]
) -> None:
    """Every number has one living owner, shares differ by at most one, and nobody loses a number within its share."""
    target = assign(members, range(partitions), owners)
    if not members:
        assert target == {}
        return
    assert sorted(target) == list(range(partitions))
    shares = {member: [n for n, owner in target.items() if owner == member] for member in members}
    sizes = [len(share) for share in shares.values()]
    assert max(sizes) - min(sizes) <= 1
    small, larger = divmod(partitions, len(members))
    held = {m: [n for n in range(partitions) if owners.get(n) == m] for m in members}
    least_moves = sum(max(0, len(mine) - small) for mine in held.values())
    least_moves -= min(larger, sum(len(mine) > small for mine in held.values()))
    moved = sum(owners.get(n) in members and target[n] != owners[n] for n in range(partitions))
    assert moved == least_moves
    assert assign(members, range(partitions), target) == target
