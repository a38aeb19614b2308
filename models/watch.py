"""river's change detectors on the figures of a whole process: does the learner's loss drift?

Beside the way of an event: told by the loop, read by metrics; nothing flows back, nothing is kept over a restart. ADWIN
sees any change of the mean, Page-Hinkley a rise. Users' shifts are the business of models/walk.py.
"""

from __future__ import annotations

import math

from river.drift import ADWIN, PageHinkley

MEANS_MIN = 30  # figures before Page-Hinkley says anything
_DELTA = 0.002
_RISE_MIN = 0.005  # nats: smaller rises are forgotten
_RISE_SUM = 5.0  # nats above the mean, summed, that make an alarm


class LossWatch:
    """Names the detectors that fire at a figure.

    Example:
        >>> watch = LossWatch()
        >>> any(watch.see(3.0) for _ in range(200))
        False
        >>> sorted({name for _ in range(200) for name in watch.see(4.0)})
        ['adwin', 'page_hinkley']
    """

    def __init__(self) -> None:
        self._adwin = ADWIN(delta=_DELTA)  # type: ignore[no-untyped-call]
        self._rise = PageHinkley(min_instances=MEANS_MIN, delta=_RISE_MIN, threshold=_RISE_SUM)

    def see(self, loss: float) -> list[str]:
        """One more mean loss, nats; what is not finite is passed over."""
        if not math.isfinite(loss):
            return []
        fired = []
        for name, detector in (("adwin", self._adwin), ("page_hinkley", self._rise)):
            detector.update(loss)  # type: ignore[no-untyped-call]
            if detector.drift_detected:
                fired.append(name)
        return fired
