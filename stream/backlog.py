"""How far a reader is behind, whether that grows, and when it will have caught up: told in log and metrics.

Beside the way of an event: the observers (metrics.py) look at the lag about once a second.

    keeping up ──lag over BEHIND_S of its pace──> falling behind <──> catching up ──lag under half of that──> keeping up
"""

from __future__ import annotations

import logging
import math
from collections import deque
from itertools import islice

log = logging.getLogger(__name__)

WINDOW_S = 15.0  # over which pace and growth are measured, at most
RECENT_S = 5.0  # at least; so short where it holds STEPS batches: what was before says little about the time left
STEPS = 4
LOOK_S = 1.0
TELL_S = 10.0
BEHIND_S = 5.0  # behind: more than so many seconds of the reader's own pace
LAG_MIN = 2_000


class Backlog:
    """One reader's lag over time.

    Example:
        >>> backlog = Backlog()
        >>> for second in range(40):
        ...     backlog.look(float(second), lag=second * 1_000, read=second * 500)
        >>> backlog.is_behind, backlog.eta_s
        (True, inf)
        >>> for second in range(40, 60):
        ...     backlog.look(float(second), lag=40_000 - (second - 40) * 1_000, read=20_000 + second * 2_000)
        >>> round(backlog.eta_s)
        21
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()  # (second, lag, records read so far)
        self._since_s = self._told_s = -math.inf
        self._worst = 0
        self.is_behind = False
        self.eta_s = 0.0  # seconds until it has caught up: 0 = it has, inf = the lag does not shrink

    def look(self, now_s: float, lag: int, read: int) -> None:
        """Take note, and say what changed. `read`: records read since the start."""
        if self._seen and now_s < self._seen[-1][0] + LOOK_S:
            return
        self._seen.append((now_s, lag, read))
        while self._seen[0][0] < now_s - WINDOW_S or self._tells_enough_without_the_oldest():
            self._seen.popleft()
        then_s, then_lag, then_read = self._seen[0]
        if now_s == then_s:
            return
        pace = (read - then_read) / (now_s - then_s)
        growth = (lag - then_lag) / (now_s - then_s)
        limit = max(LAG_MIN, BEHIND_S * pace)
        self.eta_s = 0.0 if not self.is_behind else lag / -growth if growth < 0 else math.inf
        if not self.is_behind and lag > limit:
            self.is_behind, self._since_s, self._worst, self._told_s = True, now_s, lag, -math.inf
        elif self.is_behind and lag < limit / 2:
            self.is_behind, self.eta_s = False, 0.0
            log.info("event=caught_up after_s=%.0f worst_lag=%d", now_s - self._since_s, self._worst)
        if not self.is_behind:
            return
        self._worst = max(self._worst, lag)
        if now_s >= self._told_s + TELL_S:
            self._told_s = now_s
            if growth < 0:
                log.warning("event=catching_up lag=%d pace=%.0f eta_s=%.0f", lag, pace, self.eta_s)
            else:
                log.warning("event=falling_behind lag=%d pace=%.0f growth=%.0f", lag, pace, growth)

    def _tells_enough_without_the_oldest(self) -> bool:
        now_s = self._seen[-1][0]
        if len(self._seen) < 2 or self._seen[1][0] > now_s - RECENT_S:
            return False
        return len({read for _, _, read in islice(self._seen, 1, None)}) > STEPS
