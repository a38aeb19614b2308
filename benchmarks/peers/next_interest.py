"""deep-river's and river's classifiers asked for the next interest, event by event: predict, then learn.

Runs in an environment of its own (deep-river 0.3 pins older releases of torch and river). Prints one JSON line.

    python next_interest.py EVENTS MODEL SECONDS

EVENTS is a JSON file: `events` [[user, interest], ...] in order of time, `interests` how many there are, `first` index
of the first one that counts. A model that needs more than SECONDS stops there: `events` says how far it came.
"""

import json
import sys
import time
from collections import deque
from pathlib import Path

import torch
from deep_river.classification import RollingClassifier
from river import naive_bayes, tree
from sortedcontainers import SortedSet

WINDOW_EVENTS = 16
WIDTH = 64
RATE = 3e-3


class Gru(torch.nn.Module):
    """Embedding, GRU, softmax over all interests; the row behind the last interest stands for no event yet."""

    def __init__(self, interests):
        super().__init__()
        self.embedding = torch.nn.Embedding(interests + 1, WIDTH)
        self.gru = torch.nn.GRU(WIDTH, WIDTH)
        self.out = torch.nn.Linear(WIDTH, interests)

    def forward(self, x_T1F):
        states, _ = self.gru(self.embedding(x_T1F[:, :, 0].long()))
        return self.out(states[-1])


class DeepRiverGru:
    """deep-river's window is of the whole stream: here each user gets one, and all interests are told before."""

    def __init__(self, interests):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._model = RollingClassifier(
            Gru(interests), loss_fn="cross_entropy", optimizer_fn="adam", lr=RATE, window_size=WINDOW_EVENTS, seed=0
        )
        self._model.observed_classes = SortedSet(range(interests))
        self._none = interests
        self._windows = {}

    def _at(self, user, last):
        window = self._windows.setdefault(user, deque(maxlen=WINDOW_EVENTS))
        self._model._x_window = window
        return {"last": self._none if last is None else last}

    def predict(self, user, recent):
        return self._model.predict_proba_one(self._at(user, recent[0] if recent else None))

    def learn(self, user, recent, interest):
        self._model.learn_one(self._at(user, recent[0] if recent else None), interest)


class River:
    """A classifier of river on the user's last two interests, as words."""

    def __init__(self, model, counts):
        self._model, self._counts = model, counts

    def _features(self, recent):
        last, before = (*recent, "none", "none")[:2]
        return (
            {f"last={last}": 1, f"before={before}": 1} if self._counts else {"last": str(last), "before": str(before)}
        )

    def predict(self, user, recent):
        return self._model.predict_proba_one(self._features(recent))

    def learn(self, user, recent, interest):
        self._model.learn_one(self._features(recent), interest)


MODELS = {
    "deep_river_gru": DeepRiverGru,
    "river_hoeffding_tree": lambda interests: River(
        tree.HoeffdingTreeClassifier(nominal_attributes=["last", "before"]), counts=False
    ),
    "river_naive_bayes": lambda interests: River(naive_bayes.MultinomialNB(), counts=True),
}


def rank_of(scores, interest):
    """1 = best, ties count against the model, 0 = it does not know the interest."""
    own = scores.get(interest, 0.0)
    return sum(score >= own for score in scores.values()) if own > 0.0 else 0


def main():
    path, name, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    given = json.loads(Path(path).read_text())
    model = MODELS[name](given["interests"])
    known, recent_of, rows = set(), {}, []
    spent_s, done = 0.0, 0
    for number, (user, interest) in enumerate(given["events"]):
        recent = recent_of.setdefault(user, deque(maxlen=2))
        start_s = time.perf_counter()
        scores = model.predict(user, list(recent))
        middle_s = time.perf_counter()
        rank = rank_of(scores, interest) if interest in known else 0
        ranked_s = time.perf_counter()
        model.learn(user, list(recent), interest)
        spent_s += middle_s - start_s + time.perf_counter() - ranked_s
        if number >= given["first"]:
            rows.append((rank, bool(recent) and recent[0] != interest))
        recent.appendleft(interest)
        known.add(interest)
        done += 1
        if spent_s > seconds:
            break
    result = {"model": name, "events": done, "events_per_s": round(done / spent_s), "n": len(rows)}
    for label, chosen in (("all", rows), ("moves", [row for row in rows if row[1]])):
        if chosen and done == len(given["events"]):
            result[f"{label}_mrr"] = round(sum(1 / rank for rank, _ in chosen if rank) / len(chosen), 4)
            result[f"{label}_hr@10"] = round(sum(0 < rank <= 10 for rank, _ in chosen) / len(chosen), 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
