"""The evaluation: its protocol against a small reference of its own, its models, and bad input."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from models import sequences
from models.baselines import Scores, Seen
from models.evaluate import STRATA
from models.features import interest_key
from models.forecaster import Forecaster
from stream import evaluation
from stream.config import Config
from stream.errors import ConfigError
from stream.evaluation import MODELS, Delay, Outcome, Stream, Wanted, evaluate, read_stream
from stream.evaluation_page import write_evaluation
from stream.evaluation_purchases import purchase_rows
from stream.evaluation_rows import rows_of

CONFIG = Config()
Told = tuple[str, str, int]  # user, interest, seconds


def quiet(model: str, done: int, total: int) -> None:
    """No progress."""


def events(told: Sequence[Told], kind: str = "") -> list[dict[str, Any]]:
    more = {"type": kind} if kind else {}
    return [{"user": u, "interest": i, "time": 1_700_000_000_000 + 1_000 * s, **more} for u, i, s in told]


def shop(count: int = 600, users: int = 12, interests: int = 9, seed: int = 0) -> list[Told]:
    """Users with two tastes each, who mostly stay and often alternate."""
    random = np.random.Generator(np.random.PCG64(seed))
    last = random.integers(0, interests, users)
    told = []
    for number in range(count):
        user = int(random.integers(users))
        chance = random.random()
        last[user] = last[user] if chance < 0.4 else (user + (chance < 0.8)) % interests
        if chance > 0.95:
            last[user] = random.integers(interests)
        told.append((f"u{user}", f"i{last[user]}", 60 * number))
    return told


def run(told: Sequence[Told], *models: str, **wanted: Any) -> tuple[Stream, list[Outcome], list[dict[str, Any]]]:
    stream = read_stream(events(told), CONFIG)
    asked = Wanted(models=models, **wanted)
    outcomes = evaluate(stream, CONFIG, asked, quiet)
    return stream, outcomes, rows_of(stream, outcomes, asked)


def row(rows: Sequence[dict[str, Any]], model: str, stratum: str = "all", horizon: int = 1) -> dict[str, Any]:
    return next(r for r in rows if (r["model"], r["stratum"], r["horizon"]) == (model, stratum, horizon))


# ── the protocol ──────────────────────────────────────────────────────────────────────────────────────────────────────


def reference(told: Sequence[Told], first: int, horizon: int) -> dict[tuple[str, int], list[float]]:
    """MRR, HR@1, MAE and RMSE of shares of plain popularity, by stratum and step: lists and loops, nothing shared."""
    everything = sorted({i for _, i, _ in told})
    sums: dict[tuple[str, int], list[list[float]]] = {}
    for e, (user, _interest, _s) in enumerate(told):
        seen = told[:e]
        counts = Counter(i for _, i, _ in seen)
        later = [k for k in range(e, len(told)) if told[k][0] == user][:horizon]
        if e < first:
            continue
        share = {i: counts[i] / max(1, e) for i in everything}
        for step, k in enumerate(later):
            target = told[k][1]
            rank = sum(share[i] >= share[target] for i in everything) if counts[target] else 0
            came = Counter(told[j][1] for j in later[: step + 1])
            gaps = [share[i] - came[i] / (step + 1) for i in everything]
            figure = [1 / rank if rank else 0.0, float(rank == 1)]
            figure += [sum(map(abs, gaps)) / len(everything), sum(g * g for g in gaps) / len(everything)]
            before = [i for u, i, _ in told[:k] if u == user]
            target_is = {
                "all": True,
                "repeat": before[-1:] == [target],
                "non_repeat": bool(before) and before[-1] != target,
                "seen": bool(before) and before[-1] != target and target in before,
                "new_to_user": bool(before) and target not in before,
                "new_user": not before,
                "new_interest": target not in {i for _, i, _ in told[:k]},
            }
            for stratum, inside in target_is.items():
                if inside:
                    sums.setdefault((stratum, step + 1), []).append(figure)
    return {cell: [len(found), *np.mean(found, axis=0).tolist()] for cell, found in sums.items()}


class Counts:
    """Plain popularity, as the reference has it."""

    is_probability = True

    def __init__(self, users: int, interests: int) -> None:
        self._count = np.zeros(interests)

    def rank(self, user: int, time_ms: int) -> Scores:
        scores: Scores = self._count / max(1.0, self._count.sum())
        return scores

    def update(self, event: Seen) -> None:
        self._count[event.interest] += 1


def test_every_figure_equals_a_reference_of_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks with ties against the model, misses, strata, horizons and share errors, on a stream of 160 events."""
    told = shop(160, users=7, interests=30)
    monkeypatch.setitem(evaluation.RULES, "popularity", Counts)
    _stream, _outcomes, rows = run(told, "popularity", report_from=0.3, horizon=3)
    expected = reference(told, int(0.3 * 160), 3)
    assert len(expected) > 15
    for (stratum, step), (n, mrr, hit, mae, square) in expected.items():
        found = row(rows, "popularity", stratum, step)
        assert found["n"] == n
        assert found["mrr"] == pytest.approx(mrr, abs=2e-6) and found["hr@1"] == pytest.approx(hit, abs=2e-6)
        assert found["share_mae"] == pytest.approx(mae, abs=1e-6)
        assert found["share_rmse"] == pytest.approx(square**0.5, abs=1e-6)
    for stratum in STRATA:
        for step in (1, 2, 3):
            assert (stratum, step) in expected or row(rows, "popularity", stratum, step)["n"] == 0


def test_the_network_is_judged_like_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks, confidence and share errors are those of its full distribution, built here interest by interest."""
    checked = []
    genuine = evaluation.judge

    def careful(
        forecaster: Forecaster, hidden_EH: Any, snapshot: Any, gap_s_E: Any, target_EN: Any, there_EN: Any
    ) -> Any:
        judged = genuine(forecaster, hidden_EH, snapshot, gap_s_E, target_EN, there_EN)
        if target_EN.shape[1] < 3:
            return judged
        total: list[dict[int, float]] = [Counter() for _ in range(len(target_EN))]
        parts = forecaster.distributions(hidden_EH, snapshot, gap_s_E, 3)
        for span, n, candidates, step in parts:
            general_EV, copied_EC, rest_E = step.arrays()
            for k, e in enumerate(range(len(target_EN))[span]):
                p: Counter[int] = Counter()
                for v, key in enumerate(forecaster.keys_V.tolist()):
                    if key:
                        p[key] += float(rest_E[k] * general_EV[k, v])
                for c, key in enumerate(candidates.key_EC[k].tolist()):
                    if key:
                        p[key] += float(copied_EC[k, c])
                total[e].update(p)
                if not there_EN[e, n]:
                    assert judged.rank_EN[e, n] == -1 and np.isnan(judged.top_EN[e, n])
                    continue
                target = int(target_EN[e, n])
                rank = sum(q >= p[target] * (1 - 1e-6) for q in p.values()) if target in p else 0
                assert abs(int(judged.rank_EN[e, n]) - rank) <= 1  # floats of two kinds may order equals differently
                assert judged.top_EN[e, n] == pytest.approx(max(p.values()), rel=1e-4)
                came = Counter(target_EN[e, : n + 1].tolist())
                gaps = [total[e].get(i, 0.0) / (n + 1) - came[i] / (n + 1) for i in {*total[e], *came}]
                assert judged.absolute_EN[e, n] == pytest.approx(sum(map(abs, gaps)), abs=1e-3)
                assert judged.square_EN[e, n] == pytest.approx(sum(g * g for g in gaps), abs=1e-3)
                checked.append(e)
        return judged

    monkeypatch.setattr(evaluation, "judge", careful)
    run(shop(500), "driftline", horizon=3)
    assert len(checked) > 500


def test_a_model_of_ones_own_joins_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """module:Class from the working directory; one that thinks all equal is last, since ties count against it."""
    (tmp_path / "own_models.py").write_text(
        "import numpy as np\n\nclass Constant:\n    is_probability = False\n\n"
        "    def __init__(self, users, interests):\n        self.scores = np.zeros(interests)\n\n"
        "    def rank(self, user, time_ms):\n        return self.scores\n\n    def update(self, event):\n        pass\n"
    )
    monkeypatch.chdir(tmp_path)
    stream, _outcomes, rows = run(shop(100), "own_models:Constant", "recency")
    found = row(rows, "own_models:Constant")
    assert found["mrr"] == pytest.approx(1 / stream.interests), "all tie, and every tie counts against the model"
    assert found["ece"] is None and found["share_mae"] is None
    with pytest.raises(ConfigError, match="module:Class"):
        run(shop(100), "own_models:Absent")


@pytest.mark.parametrize("model", [m for m in MODELS if m != "driftline"])
def test_every_model_gives_sound_figures(model: str) -> None:
    """Shares within 0..1, hit rates that rise with the cut, calibration where there are probabilities."""
    _stream, _outcomes, rows = run(shop(400), model, horizon=2)
    for found in rows:
        if found["n"] and found["mrr"] is not None:
            hits = [found[f"hr@{cut}"] for cut in (1, 5, 10, 20)]
            assert 0 <= hits[0] <= hits[1] <= hits[2] <= hits[3] <= 1
            assert hits[0] <= found["mrr"] <= 1 and found["accuracy"] == hits[0]
            assert found["ece"] is None or 0 <= found["ece"] <= 1
    probabilities = row(rows, model)["ece"] is not None
    assert probabilities == (model not in ("recency", "recency_markov", "vsknn"))


def test_what_is_trained_learns_an_order_and_learns_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cycle of interests is known after the training part; one that began later only in the retrained row."""
    monkeypatch.setattr(sequences, "SAMPLES", 32)
    told = [(f"u{n % 5}", f"i{(n // 5) % 8 + (8 if n > 460 else 0)}", n) for n in range(800)]
    _stream, outcomes, _rows = run(told, "gru4rec", horizon=1)
    assert [o.model for o in outcomes] == ["gru4rec", "gru4rec_retrained"]
    once, again = (o.judged.rank_EN[:, 0] == 1 for o in outcomes)
    assert once[410:450].mean() > 0.9 and once[700:].mean() < 0.1 and again[700:].mean() > 0.9


def test_sessions_vote_for_what_they_held() -> None:
    """After a, sessions say b: the nearest are those that share the newest interest."""
    from models.sessions import SessionKnn

    model = SessionKnn(3, 6)
    for minute, (user, interest) in enumerate([(0, 0), (0, 1), (1, 2), (1, 3), (0, 4)]):
        model.update(Seen(user, interest, 60_000 * minute))
    model.update(Seen(2, 2, 7_200_000))
    scores = model.rank(2, 7_200_001)
    assert scores.argmax() in (2, 3) and scores[3] > scores[1] > scores[5] == 0


def test_the_frozen_copy_learns_nothing_of_the_reported_part() -> None:
    """Until the middle it is the learning one, event by event; afterwards an order that begins there passes it by."""
    told = [(f"u{n % 5}", f"i{(n // 5) % 8 if n < 400 else (3 * (n // 5)) % 8}", n) for n in range(1_200)]
    _stream, outcomes, _rows = run(told, "driftline", "driftline_frozen", horizon=1, report_from=0.4)
    learning, frozen = (o.judged.rank_EN[:, 0] for o in outcomes)
    assert np.array_equal(learning[:448], frozen[:448])
    assert (1 / np.maximum(learning[900:], 1)).mean() > (1 / np.maximum(frozen[900:], 1)).mean()


def test_weights_that_come_late_are_used_late() -> None:
    """With a delay the first events are judged by version 0; a delay as long as the stream never learns."""
    told = shop(500)
    _stream, outcomes, _rows = run(told, "driftline", delay=Delay(events=10_000))
    never = outcomes[0].judged.rank_EN[:, 0]
    _stream, outcomes, _rows = run(told, "driftline", delay=Delay(seconds=60 * 256))
    late = outcomes[0].judged.rank_EN[:, 0]
    assert np.array_equal(never[:256], late[:256]) and not np.array_equal(never[256:], late[256:])
    assert Delay.parse("2000") == Delay(events=2_000) and Delay.parse("2.5s") == Delay(seconds=2.5)
    for wrong in ("soon", "-1", "5m"):
        with pytest.raises(ConfigError, match="--weights-delay"):
            Delay.parse(wrong)


def test_purchases_are_judged_beside_counts_on_the_same_pairs() -> None:
    """Pairs, what became of them and the constant's figures equal plain loops; without purchases none."""
    told = events(shop(700))
    for n, event in enumerate(told):
        event["type"] = "buy" if n % 5 == 0 else "view"
    stream, wanted = read_stream(told, CONFIG), Wanted(models=("driftline", "recency"), horizon=1)
    outcomes = evaluate(stream, CONFIG, wanted, quiet)
    asked = outcomes[0].purchases
    assert asked is not None and asked.events == CONFIG.learning.horizon_steps and outcomes[1].purchases is None
    rows = purchase_rows(stream, outcomes, wanted)
    assert [r["model"] for r in rows] == ["driftline", "constant", "shares"] and {r["pairs_of"] for r in rows} == {
        "driftline"
    }
    pairs, hits, losses = 0, 0, list[float]()
    known: list[tuple[int, bool]] = []  # event at which a pair's answer is known, and the answer
    for e in range(350, 700):
        later = [k for k in range(e, 700) if told[k]["user"] == told[e]["user"]][: asked.events]
        if len(later) < asked.events:
            continue
        for key in asked.key_EK[e][asked.key_EK[e] != 0].tolist():
            bought = any(told[k]["type"] == "buy" and interest_key(told[k]["interest"]) == key for k in later)
            past = [answer for at, answer in known if at < e]
            share = (sum(past) + 1) / (len(past) + 100)
            losses.append(-np.log(share if bought else 1 - share))
            known.append((later[-1], bought))
            pairs, hits = pairs + 1, hits + bought
    for found in rows:
        assert (found["n"], found["bought"]) == (pairs, hits) and 0 < found["log_loss"] < 2 and 0 <= found["auc"] <= 1
    assert rows[1]["log_loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    stream = read_stream(events(shop(300), kind="view"), CONFIG)
    assert purchase_rows(stream, evaluate(stream, CONFIG, wanted, quiet), wanted) == []


def test_seeds_give_a_row_each_and_a_mean(tmp_path: Path) -> None:
    """One row a seed and one "mean" with the spread; a rule has one; the page holds every model."""
    stream, outcomes, rows = run(shop(300), "driftline", "markov", seeds=2, horizon=2)
    ours = [r for r in rows if (r["model"], r["stratum"], r["horizon"]) == ("driftline", "all", 1)]
    assert [r["seed"] for r in ours] == [0, 1, "mean"]
    assert ours[2]["mrr"] == pytest.approx((ours[0]["mrr"] + ours[1]["mrr"]) / 2, abs=1e-6)
    assert ours[2]["sd"]["mrr"] == pytest.approx(abs(ours[0]["mrr"] - ours[1]["mrr"]) / 2**0.5, abs=1e-6)
    assert [r["seed"] for r in rows if (r["model"], r["stratum"], r["horizon"]) == ("markov", "all", 1)] == [0]
    alone = run(shop(300), "driftline", seeds=1, first_seed=1, horizon=2)[2]
    timeless = [{key: r[key] for key in r.keys() - {"events_per_s", "peak_mb", "sd"}} for r in (alone[0], ours[1])]
    assert timeless[0] == timeless[1]
    write_evaluation(tmp_path / "e.html", "a <title>", stream, outcomes, rows, Wanted(horizon=2))
    text = (tmp_path / "e.html").read_text()
    assert "a &lt;title&gt;" in text and text.count("<section>") == 5 and "driftline" in text and "±" in text
    assert json.loads(msgspec.json.encode({"rows": rows}))["rows"] == rows


# ── input that is not as it should be ─────────────────────────────────────────────────────────────────────────────────


def test_one_user_alone() -> None:
    """Works: nobody else is needed."""
    told = [("only", f"i{n % 3}", n) for n in range(200)]
    _stream, _outcomes, rows = run(told, "driftline", "markov", horizon=2)
    assert row(rows, "driftline")["n"] == 100 and row(rows, "markov")["mrr"] > 0.9
    assert row(rows, "driftline", "new_user")["n"] == 0 and row(rows, "driftline", "new_user")["mrr"] is None


def test_one_interest_alone_is_refused() -> None:
    """A perfect score would mean nothing: it says why not."""
    with pytest.raises(ConfigError, match="nothing to rank"):
        run([(f"u{n % 3}", "same", n) for n in range(50)], "driftline")


def test_events_sent_twice_are_judged_once() -> None:
    """With ids and events.dedupe, a duplicate is counted, left out, and asked of no model; else it is an event."""
    once = [{**e, "event_id": f"e{n}"} for n, e in enumerate(events(shop(100)))]
    twice = [e for event in once for e in (event, event)]
    config = msgspec.structs.replace(CONFIG, events=msgspec.structs.replace(CONFIG.events, dedupe=True))
    stream = read_stream(twice, config)
    assert len(stream) == 100 and stream.left_out == {"the id of an earlier event": 100}
    assert len(read_stream(twice, CONFIG)) == 200
    outcomes = evaluate(stream, config, Wanted(models=("driftline", "recency")), quiet)
    assert (outcomes[0].judged.rank_EN[:, 0] >= 0).all()


def test_what_a_worker_would_refuse_is_left_out_for_every_model() -> None:
    """Fields that are too long: counted by reason, and no model is asked about them."""
    told = events(shop(100))
    told[7]["interest"] = "x" * 100_000
    stream = read_stream(told, CONFIG)
    assert len(stream) == 99 and sum(stream.left_out.values()) == 1
    with pytest.raises(ConfigError, match="nothing to evaluate; 1 left out"):
        read_stream(told[7:8], CONFIG)


def test_two_hundred_thousand_interests() -> None:
    """Nearly every event is a new interest: all are ranked, most are misses, and it says so."""
    told = [(f"u{n % 50}", f"i{n}" if n % 50 else f"i{n % 40}", n) for n in range(205_000)]
    stream = read_stream(events(told), CONFIG)
    assert stream.interests > 200_000 and len({interest_key(i) for _, i, _ in told[:20_000]}) > 15_000
    few = Stream(
        records=stream.records[:1_500], user_E=stream.user_E[:1_500], interest_E=stream.interest_E[:1_500],
        key_E=stream.key_E[:1_500], time_ms_E=stream.time_ms_E[:1_500], type_E=stream.type_E[:1_500],
        users=stream.users, interests=stream.interests, left_out={},
    )  # fmt: skip
    wanted = Wanted(models=("driftline", "recency", "vsknn"), horizon=2)
    rows = rows_of(few, evaluate(few, CONFIG, wanted, quiet), wanted)
    for model in wanted.models:
        found = row(rows, model, "new_interest")
        assert found["n"] > 500 and found["mrr"] == 0
        assert 0 < row(rows, model)["mrr"] < 0.3
