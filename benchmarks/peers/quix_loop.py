"""Quix Streams' bare stateful loop: exactly once, a state of 64 floats a key, one output an event; nothing is learned.

Runs in an environment of its own (quixstreams 3 pins an older confluent-kafka). Prints one JSON line.

    python quix_loop.py BOOTSTRAP INPUT OUTPUT COUNT STATE_DIR
"""

import json
import sys
import time

from quixstreams import Application


def main() -> None:
    bootstrap, source, sink, count, state_dir = sys.argv[1:6]
    app = Application(
        broker_address=bootstrap,
        consumer_group=f"{sink}-group",
        auto_offset_reset="earliest",
        processing_guarantee="exactly-once",
        state_dir=state_dir,
        commit_interval=1.0,
        commit_every=4_096,
        loglevel="ERROR",
    )
    marks: list[float] = []
    done = 0

    def step(value: dict, state: object) -> dict:
        nonlocal done
        hidden = state.get("hidden") or [0.0] * 64
        hidden[done % 64] += 1.0
        state.set("hidden", hidden)
        done += 1
        if done % 1_000 == 1:
            marks.append(time.perf_counter())
        return {"user": value["user"], "top": value["interest"]}

    frame = app.dataframe(app.topic(source, value_deserializer="json"))
    frame = frame.apply(step, stateful=True)
    frame.to_topic(app.topic(sink, value_serializer="json"))
    app.run(count=int(count), timeout=30.0)
    # The first tenth warms up; what follows is timed.
    first = len(marks) // 10
    rate = (len(marks) - 1 - first) * 1_000 / (marks[-1] - marks[first])
    print(json.dumps({"events_per_s": rate, "events": done}))


if __name__ == "__main__":
    main()
