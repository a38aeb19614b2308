"""What is remembered of one user, byte for byte, and how one event changes it.

On the way of an event: after decoding, before the GRU. `advance` walks the events of one partition in offset order, in
compiled code; everything that judges an event is computed from the record BEFORE the event. What lies in a record is
what goes to the `state` topic.

    record (USER dtype)
      key            keyed hash of the user id, 0 = none
      hidden         GRU state after the user's last event (written by the network, not here)
      ring_*         the last RING events, circular: the newest is at (events - 1) % RING
      slow_*         the slow profile: up to PROFILE interests with exponentially decayed weights
      detector       see the fields: at most 16 bytes
      aggregates, times, counters
"""

from __future__ import annotations

import numpy as np

RING = 16
PROFILE = 32
HIDDEN = 64


def user_dtype(ring: int = RING, profile: int = PROFILE, hidden: int = HIDDEN) -> np.dtype:
    """The record of one user. Field names are the format: blocks carry the field list and are migrated by name."""
    return np.dtype(
        [
            ("key", "<u8"),
            ("hidden", "<f4", (hidden,)),
            ("ring_interest", "<u4", (ring,)),
            ("ring_gap", "<u2", (ring,)),  # round(2048 * log2(1 + seconds since the user's event before)), clipped
            ("ring_type", "u1", (ring,)),
            ("ring_flags", "u1", (ring,)),
            ("slow_interest", "<u4", (profile,)),  # 0 = free slot
            ("slow_weight", "<f4", (profile,)),  # as of the user's last event
            ("slow_total", "<f4"),  # decayed count of all events, also of interests that fell out of the profile
            # detector, 16 bytes
            ("evidence", "<f4"),  # W, the CUSUM's running log-likelihood ratio
            ("session_sum", "<f4"),  # evidence of the session under way
            ("session_count", "<u2"),  # distinct interests (clicks) or events (baskets) in it
            ("onset_events", "<u2"),  # events since W was last 0
            ("refractory", "<u2"),  # events until the next alert may fire
            ("detector_flags", "<u2"),
            # times and counters
            ("first_time_ms", "<i8"),
            ("last_time_ms", "<i8"),
            ("last_purchase_ms", "<i8"),
            ("events", "<u4"),
            ("alerts", "<u2"),
            ("purchases", "<u2"),
            ("mean_dwell_s", "<f4"),
            ("mean_log_price", "<f4"),
            ("emitted_interest", "<u4"),  # top interest by the cheap score when the last forecast was emitted
            ("emitted_event", "<u4"),  # `events` at that moment
            ("emitted_time_ms", "<i8"),
            ("weights_version", "<u4"),  # of the network that wrote `hidden`
            ("block", "<u4"),  # number of the newest state block that holds this record
            ("segment", "u1"),
            ("dedupe", "<u4", (4,)),  # hashes of the last event ids, where deduplication is on
        ]
    )


USER = user_dtype()
