"""How fast the learner learns, by device, size of the vocabulary and events in a step.

    python benchmarks/learner_step.py [--devices cpu,cuda] [--interests 1000,5000] [--step-events 64] [--exact] [--json]

The learner alone, in this process: `observe` and `learn` as its loop calls them, on a generated stream of 20,000 users
that is decoded before. Each case first learns every interest twice, so that all are in the vocabulary, then the stream
for `--seconds`. `steps_per_s` is of the time in `learn` (gradients and what is counted), `events_per_s` of both calls:
the rate that a learner can follow. Same seed and same events on every device. Run it on a machine that does nothing
else; on a GPU one core is still busy with what is not on the GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.learner import Learner  # noqa: E402
from models.settings import LearningSettings, NetworkSettings  # noqa: E402
from stream.assembly import make_decoder  # noqa: E402
from stream.config import Config  # noqa: E402
from stream.events import Decoded  # noqa: E402
from stream.transport import LogRecord  # noqa: E402
from stream.warmup import warm_up  # noqa: E402
from stream.workload import workload  # noqa: E402

TURN_EVENTS = 1_024  # of one call of `observe`
FASTEST_EVENTS_PER_S = 40_000


def turns(interests: int, seconds: float) -> tuple[list[Decoded], int]:
    """Batches, and how many of them come first to make all interests known."""
    decoder = make_decoder(Config())
    count = int(seconds * FASTEST_EVENTS_PER_S)
    work = workload(count, users=20_000, interests=interests, zipf=0.7)
    names = [n % interests for n in range(2 * interests)]
    first_ms = int(work.time_ms_E[0])
    known = [(b"u%d" % n, b'{"user":"u%d","interest":"c%06d","time":%d}' % (n, n, first_ms), first_ms) for n in names]
    told = [*known, *zip(work.keys(), work.values(), work.time_ms_E.tolist(), strict=True)]
    records = [LogRecord("events", 0, i, time_ms, key, value) for i, (key, value, time_ms) in enumerate(told)]
    decoded = [decoder.decode(records[start : start + TURN_EVENTS]) for start in range(0, len(records), TURN_EVENTS)]
    return decoded, -(-len(known) // TURN_EVENTS)


def measure(
    device: str, batches: list[Decoded], warm: int, learning: LearningSettings, seconds: float
) -> dict[str, Any]:
    """One case, after `warm` batches. The clock stops when the device has done what it was given."""
    learner = Learner(NetworkSettings(), learning, seed=0, device=device)
    waited = _waits(device)
    observe_s = learn_s = 0.0
    steps = events = 0
    loss = float("nan")
    for number, batch in enumerate(batches):
        if number == warm:
            observe_s = learn_s = 0.0
            steps = events = 0
        if number > warm and observe_s + learn_s >= seconds:
            break
        start_s = time.perf_counter()
        learner.observe(batch.user_key_B, batch.columns, batch.interest_names, id_hash_B=batch.id_hash_B)
        waited()
        middle_s = time.perf_counter()
        report = learner.learn(TURN_EVENTS)
        waited()
        observe_s += middle_s - start_s
        learn_s += time.perf_counter() - middle_s
        steps, events, loss = steps + report.steps, events + report.events, report.loss
    return {
        "device": device_name(device),
        "interests": len(learner.weights().names),
        "step_events": learning.step_events,
        "steps": steps,
        "steps_per_s": round(steps / learn_s, 1),
        "ms_per_step": round(learn_s / steps * 1e3, 2),
        "events_per_s": round(events / (observe_s + learn_s)),
        "observe_share": round(observe_s / (observe_s + learn_s), 3),
        "last_loss": round(loss, 4),
    }


def _waits(device: str) -> Any:
    """A call that returns when the device is idle."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def device_name(device: str) -> str:
    """What it is, for the reader of a row."""
    if device.startswith("cuda"):
        return f"{device}: {torch.cuda.get_device_name(torch.device(device))}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{device}: {torch.get_num_threads()} threads of {names[0] if names else platform.processor()}"


def rows(
    devices: list[str], interests: list[int], step_events: list[int], seconds: float, exact: bool
) -> Iterator[dict[str, Any]]:
    """Every case, the devices in turn for each."""
    learning = LearningSettings()
    if exact:
        learning = msgspec.structs.replace(learning, softmax_interests_max=2**24)
    warm_up(Config())
    for size in interests:
        batches, warm = turns(size, seconds)
        for count in step_events:
            for device in devices:
                yield measure(device, batches, warm, msgspec.structs.replace(learning, step_events=count), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="cpu,cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--interests", default="1000,3000,5000")
    parser.add_argument("--step-events", default="64,256,1024")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured, of each case")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--exact", action="store_true", help="never sample the softmax, however many interests")
    parser.add_argument("--json", action="store_true", help="a row a line")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    numbers = [[int(n) for n in text.split(",")] for text in (given.interests, given.step_events)]
    if not given.json:
        print("interests  events/step  steps/s  ms/step  events/s  loss   device")
    for row in rows(given.devices.split(","), numbers[0], numbers[1], given.seconds, given.exact):
        if given.json:
            print(json.dumps(row), flush=True)
        else:
            print(
                "{interests:9}  {step_events:11}  {steps_per_s:7}  {ms_per_step:7}  {events_per_s:8}  {last_loss:.3f}  "
                "{device}".format(**row),
                flush=True,
            )


if __name__ == "__main__":
    main()
