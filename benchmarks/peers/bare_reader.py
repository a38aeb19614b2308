"""kafka-python alone: assigned to all partitions, poll and count. Prints one JSON line.

python bare_reader.py BOOTSTRAP TOPIC COUNT
"""

from __future__ import annotations

import json
import sys
import time

from kafka import KafkaConsumer, TopicPartition


def main() -> None:
    bootstrap, topic, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    consumer = KafkaConsumer(
        bootstrap_servers=bootstrap,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        max_poll_records=4_096,
        max_partition_fetch_bytes=4 << 20,
        fetch_max_bytes=32 << 20,
    )
    consumer.assign([TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic) or ())])
    done, first = 0, (0, 0.0)
    while done < count:
        done += sum(map(len, consumer.poll(timeout_ms=1_000, max_records=4_096).values()))
        if not first[0] and done >= count / 10:
            first = (done, time.perf_counter())
    rate = (done - first[0]) / (time.perf_counter() - first[1])
    consumer.close()
    print(json.dumps({"events_per_s": rate, "events": done}))


if __name__ == "__main__":
    main()
