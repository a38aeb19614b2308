"""A real data set replayed through a real Kafka into `driftline run`, accounted for and judged beside the rules.

    DRIFTLINE_DATA=../shared/data python benchmarks/real_input.py [taobao|wikipedia] [--rate 1500] [--json]

Every event gets a forecast (policy `every`), so every input record must have exactly one forecast or dead letter. What
is judged are the published forecasts of a committed reader: step j of the forecast made right after a user's event
against the user's j-th next event. Both rules are asked at the same moments. Ranks behind the published candidates
count 0, for everybody. Metrics count for forecasts in the second half of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from kafka_broker import running_broker  # noqa: E402

from models.baselines import Recency, RecencyMarkov, Seen  # noqa: E402
from stream.files import FileForm, open_events  # noqa: E402
from stream.kafka import KafkaLog  # noqa: E402
from stream.mapping import Mapping  # noqa: E402
from stream.transport import TopicPartition  # noqa: E402

DATA = Path(os.environ.get("DRIFTLINE_DATA", ROOT.parent / "shared" / "data"))
SETS = {
    "taobao": (DATA / "taobao/events.csv.gz", "user=user,interest=category,item=item,type=type,time=time"),
    "wikipedia": (DATA / "wikipedia/wikipedia_first90.csv.gz", "user=u,interest=i,time=ts"),
}
PARTITIONS, STEPS, TOP = 4, 5, 50
TIMEOUT_S = 900


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(name: str, rate: float, bootstrap: str) -> tuple[str, KafkaLog, int]:
    """Start worker and learner, replay the file, wait until everything is answered, stop; the topics' prefix."""
    path, mapping = SETS[name]
    prefix = f"r{uuid.uuid4().hex[:6]}-"
    options = ["--transport", "kafka"]
    for setting in (
        f"kafka.bootstrap_servers={bootstrap}",
        f'topics.events=["{prefix}events"]',
        f"topics.prefix={prefix}",
        f"topics.partitions={PARTITIONS}",
        "topics.retention_h=-1",
        f"app.name={prefix}app",
        "forecast.emission.policy=every",
        f"forecast.steps={STEPS}",
        f"forecast.top_k={TOP}",
    ):
        options += ["--set", setting]
    command = [sys.executable, "-m", "stream.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "topics", "create", *options], cwd=ROOT, env=environment, check=True, timeout=60)
    process = subprocess.Popen([*command, "run", *options], cwd=ROOT, env=environment)
    log = KafkaLog({"bootstrap_servers": bootstrap})
    try:
        replay = [*command, "replay", str(path), "--map", mapping, "--time-unit", "s", "--rate", str(rate), *options]
        subprocess.run(replay, cwd=ROOT, env=environment, check=True, timeout=TIMEOUT_S)
        reader = log.reader()
        sent = sum(reader.bounds(TopicPartition(prefix + "events", p))[1] for p in range(PARTITIONS))
        deadline_s = time.monotonic() + TIMEOUT_S
        offsets, handled = [0] * PARTITIONS, 0
        while handled < sent:
            if time.monotonic() > deadline_s or process.poll() is not None:
                raise SystemExit(f"driftline handled {handled} of {sent} records")
            for p in range(PARTITIONS):
                for record in reader.read(TopicPartition(prefix + "metrics", p), offsets[p], 0.1):
                    offsets[p] = record.offset + 1
                    handled += json.loads(record.value or b"{}")["records"]
        reader.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    return prefix, log, sent


def collect(log: KafkaLog, prefix: str) -> tuple[dict[tuple[int, int], list[list[str]]], Counter[tuple[int, int]]]:
    """Forecast candidates by source (partition, offset), and how often each source was answered."""
    reader = log.reader()
    forecasts: dict[tuple[int, int], list[list[str]]] = {}
    answered: Counter[tuple[int, int]] = Counter()
    for topic in ("forecasts", "dead-letters"):
        for p in range(PARTITIONS):
            offset = 0
            while records := reader.read(TopicPartition(prefix + topic, p), offset, 1.0, 2_000):
                offset = records[-1].offset + 1
                for record in records:
                    value = json.loads(record.value or b"")
                    source = (value["source"]["partition"], value["source"]["offset"])
                    answered[source] += 1
                    if topic == "forecasts":
                        forecasts[source] = [[c["interest"] for c in s["interests"]] for s in value["steps"]]
    reader.close()
    return forecasts, answered


def judge(
    name: str, log: KafkaLog, prefix: str, forecasts: dict[tuple[int, int], list[list[str]]]
) -> list[dict[str, Any]]:
    """MRR and HR@10 by horizon and stratum, ours and the rules', over forecasts made in the second half."""
    path, mapping = SETS[name]
    reader = log.reader()
    placed: dict[tuple[str, int, str], list[tuple[int, int]]] = defaultdict(list)
    for p in range(PARTITIONS):
        offset = 0
        while records := reader.read(TopicPartition(prefix + "events", p), offset, 1.0, 5_000):
            offset = records[-1].offset + 1
            for record in records:
                event = json.loads(record.value or b"")
                placed[event["user"], event["time"], event["interest"]].append((p, record.offset))
    for sources in placed.values():
        sources.reverse()  # pop from the end gives log order
    reader.close()
    with open_events(str(path), Mapping.parse(mapping), FileForm(time_unit="s")) as source:
        events = [(str(e["user"]), str(e["interest"]), int(e["time"])) for e in source]
    users = {u: i for i, u in enumerate(dict.fromkeys(u for u, _, _ in events))}
    interests = {i: n for n, i in enumerate(dict.fromkeys(i for _, i, _ in events))}
    following: dict[str, list[int]] = defaultdict(list)
    for index, (user, _, _) in enumerate(events):
        following[user].append(index)
    place = {index: n for indexes in following.values() for n, index in enumerate(indexes)}
    rules = {
        "recency": Recency(len(users), len(interests)),
        "recency_markov": RecencyMarkov(len(users), len(interests)),
    }
    sums: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0, 0.0, 0])
    for index, (user, interest, time_ms) in enumerate(events):
        for rule in rules.values():
            rule.update(Seen(users[user], interests[interest], time_ms))
        origin = placed[user, time_ms, interest].pop()
        if index < len(events) // 2:
            continue
        nexts = following[user][place[index] + 1 : place[index] + 1 + STEPS]
        ranked = {model: rule.rank(users[user], time_ms) for model, rule in rules.items()}
        for step, later in enumerate(nexts):
            target = events[later][1]
            steps = forecasts[origin]
            ranks = {"driftline": steps[step].index(target) + 1 if target in steps[step] else 0}
            for model, scores in ranked.items():
                rank = int((scores >= scores[interests[target]]).sum())
                ranks[model] = rank if rank <= TOP else 0
            stratum = "repeat" if target == events[following[user][place[later] - 1]][1] else "non_repeat"
            for model, rank in ranks.items():
                for cell in (sums[model, "all", step + 1], sums[model, stratum, step + 1]):
                    cell[0] += 1
                    cell[1] += 1 / rank if rank else 0.0
                    cell[2] += 0 < rank <= 10
    return [
        {
            "model": model,
            "stratum": stratum,
            "horizon": step,
            "n": int(n),
            "mrr": round(mrr / n, 4),
            "hr@10": round(hits / n, 4),
        }
        for (model, stratum, step), (n, mrr, hits) in sorted(sums.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", default="taobao", choices=sorted(SETS))
    parser.add_argument("--rate", type=float, default=1_500.0, help="events a second of the replay")
    parser.add_argument("--json", action="store_true", help="the last line is the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running_broker(Path(folder)) as bootstrap:
        prefix, log, sent = run(arguments.set, arguments.rate, bootstrap)
        forecasts, answered = collect(log, prefix)
        once = sum(count == 1 for count in answered.values())
        rows = judge(arguments.set, log, prefix, forecasts)
        log.close()
    result = {
        "set": arguments.set,
        "events": sent,
        "answered_once": once,
        "answered_more": len(answered) - once,
        "rows": rows,
        "date": datetime.now(UTC).date().isoformat(),
    }
    say(f"{sent:,} records in; {once:,} answered once, {len(answered) - once} more often, {sent - len(answered)} never")
    for stratum in ("all", "repeat", "non_repeat"):
        for step in range(1, STEPS + 1):
            cells = {r["model"]: r for r in rows if r["stratum"] == stratum and r["horizon"] == step}
            line = "  ".join(f"{m} {c['mrr']:.4f} / {c['hr@10']:.4f}" for m, c in sorted(cells.items()))
            say(f"{stratum:10} step {step}  {line}")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
