"""deep-river's GRU and river's classifiers beside `driftline evaluate` on the same events of a file, in one run.

    python benchmarks/online_peers.py FILE --map user=COL,interest=COL,time=COL[,...] [--limit 10000] [--json]

Each predicts every event's interest and then learns it; the second half counts, ranks are among all interests. The
peers run in an environment of their own, one after the other, on one thread, and are timed in predict and learn alone.
Driftline's is that of the whole pass: decoding, detector, ranking, the scores of shares, and learning; `engine`: of the
events decoded before, predicting (states, candidates, ranks) and learning alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from environments import python_of  # noqa: E402

from models.evaluate import figures, strata  # noqa: E402
from models.features import I64  # noqa: E402
from models.learner import Learner  # noqa: E402
from stream.assembly import make_decoder  # noqa: E402
from stream.config import Config, plain_events  # noqa: E402
from stream.evaluation import Stream, Wanted, evaluate, read_stream  # noqa: E402
from stream.evaluation_rows import rows_of  # noqa: E402
from stream.files import FileForm, open_events  # noqa: E402
from stream.mapping import Mapping  # noqa: E402

PEERS = ("deep_river_gru", "river_hoeffding_tree", "river_naive_bayes")
REPORT_FROM = 0.5


def ours(stream: Stream, models: str) -> list[dict[str, Any]]:
    """Rows of the models that the project has."""
    wanted = Wanted(models=models.split(","), report_from=REPORT_FROM, horizon=1)
    outcomes = evaluate(stream, plain_events(Config()), wanted, lambda name, done, count: None)
    found: dict[str, dict[str, Any]] = {}
    for row in rows_of(stream, outcomes, wanted):
        label = {"all": "all", "non_repeat": "moves"}.get(row["stratum"])
        if label:
            own = found.setdefault(row["model"], {"model": row["model"], "events": len(stream)})
            own |= {"events_per_s": row["events_per_s"], f"{label}_mrr": row["mrr"], f"{label}_hr@10": row["hr@10"]}
    return list(found.values())


class _Alone(Learner):
    """The engine without a pipeline around it: predict, then learn, in steps of 64 events."""

    def predict(self, count: int) -> I64:
        """Ranks of the newest `count` events' interests, from what was known before them."""
        history = self._history
        row_E = np.arange(history.end - count, history.end) % history.capacity
        target_E1 = history.interest[row_E][:, None]
        snapshot = history.snapshot(row_E)
        return self.forecaster().rank(history.hidden[row_E], snapshot, history.gap_s[row_E], target_E1)[:, 0]


def alone(stream: Stream) -> dict[str, Any]:
    """Rate and figures of the engine alone, decoded before: timed as the peers are."""
    config = Config()
    decoder, learner = make_decoder(config), _Alone(config.network, config.learning, seed=0, device="cpu")
    size = config.learning.step_events
    batches = [decoder.decode(stream.records[start : start + size]) for start in range(0, len(stream), size)]
    start_s, ranks = time.perf_counter(), []
    for batch in batches:
        learner.observe(batch.user_key_B, batch.columns, batch.interest_names, id_hash_B=batch.id_hash_B)
        ranks.append(learner.predict(len(batch)))
        learner.learn(1)
    spent_s = time.perf_counter() - start_s
    row: dict[str, Any] = {"model": "driftline, engine", "events": len(stream)}
    row["events_per_s"] = round(len(stream) / spent_s)
    counts_E = np.arange(len(stream)) >= Wanted(report_from=REPORT_FROM).first(len(stream))
    strata_E = strata(stream.user_E, stream.interest_E, stream.type_E)
    for label, stratum in (("all", "all"), ("moves", "non_repeat")):
        found = figures(np.concatenate(ranks)[counts_E & strata_E[stratum]])
        row |= {f"{label}_mrr": found.mrr, f"{label}_hr@10": found.hr[10]}
    return row


def peer(name: str, stream: Stream, seconds: float) -> dict[str, Any]:
    """What a peer gave."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.json"
        pairs = list(zip(stream.user_E.tolist(), stream.interest_E.tolist(), strict=True))
        first = Wanted(report_from=REPORT_FROM).first(len(stream))
        path.write_text(json.dumps({"events": pairs, "interests": stream.interests, "first": first}))
        command = [python_of("deep-river"), ROOT / "benchmarks/peers/next_interest.py", path, name, str(seconds)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=20 * seconds + 120)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--map", required=True)
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--models", default="driftline,recency_markov,markov")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--seconds", type=float, default=60.0, help="a peer gets so many, of predict and learn")
    parser.add_argument("--json", action="store_true", help="a row a line")
    given = parser.parse_args()
    with open_events(given.file, Mapping.parse(given.map), FileForm()) as source:
        stream = read_stream(islice(source, given.limit), plain_events(Config()))
    rows = [*ours(stream, given.models), alone(stream)]
    rows += [peer(name, stream, given.seconds) for name in given.peers.split(",")]
    if not given.json:
        print(f"{len(stream):,} events, {stream.interests:,} interests, {stream.users:,} users; MRR and HR@10")
    for row in rows:
        if given.json:
            print(json.dumps(row))
            continue
        figures = [row.get(f"{label}_{name}") for label in ("all", "moves") for name in ("mrr", "hr@10")]
        told = "  ".join("   -  " if figure is None else f"{figure:.4f}" for figure in figures)
        print(f"{row['model']:22} {told}  {row['events_per_s']:8,} events/s  {row['events']:,} events")


if __name__ == "__main__":
    main()
