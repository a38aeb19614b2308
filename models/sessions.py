"""Session kNN (VSKNN): sessions that share interests with a user's newest events vote for what they held.

Beside the way of an event: a baseline of `driftline evaluate`. A session is what a user did without a pause of half an
hour; it counts as a neighbour from its first event on, but for the user's own present one.

    similarity   sum over the shared interests of their weight: the newest of the last 10 weighs 1, the next .9 ...
    vote         similarity / place of the newest shared interest, for each interest of the 100 nearest sessions

Source: Ludewig and Jannach 2018, Evaluation of session-based recommendation algorithms (V-SKNN with the weights "div").
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from models.baselines import Popularity, Scores, Seen

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

PAUSE_MS = 1_800_000
NEIGHBOURS = 100
CONTEXT = 10  # interests of the user that neighbours are looked for with
SESSION_INTERESTS = 20  # of a session, the newest
SESSIONS = 65_536  # kept, the newest
RECENT = 100  # newest sessions that are remembered for each interest
_POPULARITY_ORDER = 1e-9  # orders what no neighbour votes for


class SessionKnn:
    """See the module's docstring."""

    is_probability = False

    def __init__(self, users: int, interests: int) -> None:
        self._popularity = Popularity(users, interests)
        self._context_UL = np.full((users, CONTEXT), -1, np.int32)  # newest first, each interest once
        self._session_U = np.full(users, -1, np.int64)
        self._last_ms_U = np.full(users, -1, np.int64)
        self._sessions = 0
        self._held_SL = np.full((SESSIONS, SESSION_INTERESTS), -1, np.int32)
        self._count_S = np.zeros(SESSIONS, np.int32)
        self._number_S = np.full(SESSIONS, -1, np.int64)
        self._row_I = np.full(interests, -1, np.int64)  # rows are given to interests as they come
        self._recent_RL = np.full((64, RECENT), -1, np.int64)
        self._recent_count_R = np.zeros(64, np.int64)
        self._rows = 0
        self._similarity_S = np.zeros(SESSIONS)
        self._decay_S = np.zeros(SESSIONS)

    def rank(self, user: int, time_ms: int) -> Scores:
        scores: Scores = self._popularity.shares() * _POPULARITY_ORDER
        kernel: Any = _vote
        kernel(
            self._context_UL[user], self._present(user, time_ms), self._row_I, self._recent_RL, self._recent_count_R,
            self._number_S, self._held_SL, self._count_S, self._similarity_S, self._decay_S, scores,
        )  # fmt: skip
        return scores

    def update(self, event: Seen) -> None:
        session = self._present(event.user, event.time_ms)
        if session < 0:
            session = self._sessions
            self._sessions += 1
            self._number_S[session % SESSIONS] = session
            self._count_S[session % SESSIONS] = 0
        self._session_U[event.user], self._last_ms_U[event.user] = session, event.time_ms
        row = self._row(event.interest)
        if _hold(self._held_SL[session % SESSIONS], self._count_S, session % SESSIONS, event.interest):
            self._recent_RL[row, self._recent_count_R[row] % RECENT] = session
            self._recent_count_R[row] += 1
        context = self._context_UL[event.user]
        place = np.flatnonzero(context == event.interest)
        until = int(place[0]) if len(place) else CONTEXT - 1
        context[1 : until + 1] = context[:until].copy()
        context[0] = event.interest
        self._popularity.update(event)

    def _present(self, user: int, time_ms: int) -> int:
        """The user's session that goes on at this time; -1 = a new one begins."""
        session = int(self._session_U[user])
        goes_on = session >= 0 and time_ms - self._last_ms_U[user] <= PAUSE_MS
        return session if goes_on and self._number_S[session % SESSIONS] == session else -1

    def _row(self, interest: int) -> int:
        row = int(self._row_I[interest])
        if row < 0:
            row = self._rows
            self._rows += 1
            if row == len(self._recent_RL):
                self._recent_RL = np.concatenate([self._recent_RL, np.full_like(self._recent_RL, -1)])
                self._recent_count_R = np.concatenate([self._recent_count_R, np.zeros_like(self._recent_count_R)])
            self._row_I[interest] = row
        return row


def _hold(held_L: Int32, count_S: Int32, slot: int, interest: int) -> bool:
    """Put an interest into a session; False when it is there already."""
    if interest in held_L[: min(int(count_S[slot]), SESSION_INTERESTS)].tolist():
        return False
    held_L[count_S[slot] % SESSION_INTERESTS] = interest
    count_S[slot] += 1
    return True


@njit(cache=True, nogil=True)
def _vote(
    context_L: Int32, present: int, row_I: Int64, recent_RL: Int64, recent_count_R: Int64, number_S: Int64,
    held_SL: Int32, count_S: Int32, similarity_S: Scores, decay_S: Scores, scores: Scores,
) -> None:  # fmt: skip
    length = 0
    while length < len(context_L) and context_L[length] >= 0:
        length += 1
    touched = np.empty(length * recent_RL.shape[1], np.int64)
    count = 0
    sessions = len(number_S)
    for i in range(length):
        row = row_I[context_L[i]]
        if row < 0:
            continue
        for r in range(min(recent_count_R[row], recent_RL.shape[1])):
            session = recent_RL[row, r]
            slot = session % sessions
            if session == present or number_S[slot] != session:
                continue
            if similarity_S[slot] == 0.0:
                touched[count] = slot
                count += 1
                decay_S[slot] = 1.0 / (i + 1)
            similarity_S[slot] += 1.0 - i / len(context_L)
    touched = touched[:count]
    nearest = touched
    if count > NEIGHBOURS:
        nearest = touched[np.argsort(-similarity_S[touched])[:NEIGHBOURS]]
    for slot in nearest:
        vote = similarity_S[slot] * decay_S[slot]
        for k in range(min(count_S[slot], held_SL.shape[1])):
            scores[held_SL[slot, k]] += vote
    for slot in touched:
        similarity_S[slot] = 0.0
