"""Membership of consumer groups in the embedded log: leases, generations and the hand-over of partitions.

Every function runs inside the caller's write transaction, or reads. A member's life in the tables:

    join ── generation + 1, targets computed anew ──> owner of a share is NULL or the target: take it
         ── owner is me, target is another          ──> give it up (owner = NULL), its target takes it at its next poll
    gone ── left, lease run out, or its process is dead ── generation + 1, its shares are free

The generation is what fences: a producer's commit checks it in the same transaction that stores the batch. A process
that was stopped and comes back finds another generation and stores nothing.

Leases are counted in the machine's monotonic time, which all its processes share; a lease that lies further ahead than
a lease can be was made before a reboot and has run out. A dead process is noticed at once where /proc tells; the member
row carries boot, pid namespace, pid and start time, so that a reused pid or another container is not taken for it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from stream.assignment import Membership, assign
from stream.errors import ConfigError


def host() -> str:
    """This boot and pid namespace; empty where /proc does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def started(pid: int) -> int:
    """The start time of a process in clock ticks since boot; 0 when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = stat[stat.rindex(")") + 2 :].split()  # the name may hold blanks and brackets
    return 0 if fields[0] in "ZX" else int(fields[19])


def join(db: sqlite3.Connection, group: str, topics: Sequence[str], lease_s: float) -> Membership:
    """A new member; its shares come by `sync`.

    Raises:
        ConfigError: a topic is missing, or living members of the group read other topics.
    """
    for topic in topics:
        if not db.execute("SELECT 1 FROM topics WHERE name = ?", (topic,)).fetchone():
            raise ConfigError(f"topic {topic!r} is missing; create it with `driftline topics create`")
    evict(db, group, lease_s)
    wanted = json.dumps(list(topics))
    row = db.execute("SELECT topics FROM groups WHERE name = ?", (group,)).fetchone()
    if row is None:
        db.execute("INSERT INTO groups VALUES (?, 0, 0, ?)", (group, wanted))
    elif row[0] != wanted:
        if db.execute("SELECT 1 FROM members WHERE group_name = ?", (group,)).fetchone():
            raise ConfigError(
                f"group {group!r} reads {row[0]}, this member asks for {wanted}; "
                "use another group name or the same topics"
            )
        db.execute("UPDATE groups SET topics = ? WHERE name = ?", (wanted, group))
        db.execute("DELETE FROM shares WHERE group_name = ?", (group,))
    marks = ", ".join("?" * len(topics))
    db.execute(
        f"INSERT OR IGNORE INTO shares SELECT DISTINCT ?, number, NULL, NULL FROM partitions WHERE topic IN ({marks})",
        (group, *topics),
    )
    member = uuid.uuid4().hex
    row = (group, member, time.monotonic() + lease_s, host(), os.getpid(), started(os.getpid()))
    db.execute("INSERT INTO members VALUES (?, ?, ?, ?, ?, ?)", row)
    return Membership(group, rebalance(db, group), member)


def leave(db: sqlite3.Connection, group: str, member: str) -> None:
    """The member is gone; nothing happens when it is gone already."""
    if db.execute("DELETE FROM members WHERE group_name = ? AND member = ?", (group, member)).rowcount:
        rebalance(db, group)


def rebalance(db: sqlite3.Connection, group: str) -> int:
    """Compute the targets anew after a change of the members; the new generation."""
    members = {row[0] for row in db.execute("SELECT member FROM members WHERE group_name = ?", (group,))}
    shares = db.execute("SELECT number, owner FROM shares WHERE group_name = ?", (group,)).fetchall()
    owners = {number: owner for number, owner in shares if owner in members}
    target = assign(members, [number for number, _ in shares], owners)
    db.executemany(
        "UPDATE shares SET owner = ?, target = ? WHERE group_name = ? AND number = ?",
        [(owners.get(number), target.get(number), group, number) for number, _ in shares],
    )
    db.execute("UPDATE groups SET generation = generation + 1, revision = revision + 1 WHERE name = ?", (group,))
    generation: int = db.execute("SELECT generation FROM groups WHERE name = ?", (group,)).fetchone()[0]
    return generation


def gone(db: sqlite3.Connection, group: str, lease_s: float) -> list[str]:
    """Members whose lease has run out or whose process is dead. Only reads."""
    now_s = time.monotonic()
    here = host()
    dead = []
    rows = db.execute("SELECT member, expires_s, host, pid, started FROM members WHERE group_name = ?", (group,))
    for member, expires_s, where, pid, start in rows:
        rebooted = expires_s > now_s + 2 * lease_s
        ended = bool(here) and where == here and started(pid) != start
        if expires_s < now_s or rebooted or ended:
            dead.append(member)
    return dead


def evict(db: sqlite3.Connection, group: str, lease_s: float, spare: str = "") -> None:
    """Remove the members that are gone, but `spare`."""
    dead = [member for member in gone(db, group, lease_s) if member != spare]
    if dead:
        db.executemany("DELETE FROM members WHERE group_name = ? AND member = ?", [(group, m) for m in dead])
        rebalance(db, group)


def renew(db: sqlite3.Connection, membership: Membership, lease_s: float) -> bool:
    """Lengthen the lease; False when the member is no longer one."""
    return (
        db.execute(
            "UPDATE members SET expires_s = ? WHERE group_name = ? AND member = ?",
            (time.monotonic() + lease_s, membership.group, membership.member),
        ).rowcount
        == 1
    )


def is_current(db: sqlite3.Connection, membership: Membership) -> bool:
    """Whether the proof still holds: the same generation, and a member of it."""
    query = "SELECT 1 FROM groups JOIN members ON name = group_name WHERE name = ? AND generation = ? AND member = ?"
    return db.execute(query, membership).fetchone() is not None


def hand_over(db: sqlite3.Connection, group: str, member: str) -> tuple[list[int], list[int]]:
    """Take what is free and meant for the member, give up what is meant for others; (taken, given up)."""
    free = "SELECT number FROM shares WHERE group_name = ? AND target = ? AND owner IS NULL ORDER BY number"
    over = "SELECT number FROM shares WHERE group_name = ? AND owner = ? AND target IS NOT owner ORDER BY number"
    taken = [row[0] for row in db.execute(free, (group, member))]
    given = [row[0] for row in db.execute(over, (group, member))]
    change = "UPDATE shares SET owner = ? WHERE group_name = ? AND number = ?"
    db.executemany(change, [(member, group, n) for n in taken] + [(None, group, n) for n in given])
    if taken or given:
        db.execute("UPDATE groups SET revision = revision + 1 WHERE name = ?", (group,))
    return taken, given
