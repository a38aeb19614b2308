"""Pretraining: killed and gone on with, what a checkpoint refuses, adapters, and a start from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_stream_evaluation import events, shop

from stream import saved_weights
from stream.assembly import initial_weights, make_pipeline
from stream.config import Config
from stream.errors import ConfigError
from stream.evaluation import Stream, Wanted, evaluate, read_stream
from stream.pretraining import Around, Plan, Pretraining
from stream.saved_weights import CHECKPOINT, CheckpointFacts, load_initial
from stream.tuning import USUAL, Tuning

CONFIG = Config()
PLAN = Plan(epochs=2, patience=2, hold_out=0.2)


class Ticks:
    """A clock that moves by a second each time it is asked."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Killed(Exception):
    """In place of a SIGKILL: nothing is written after it."""


def train(folder: Path, *, kill_at: int = 10**9, resume: bool = False, **given: Any) -> dict[str, bytes]:
    """Train on a small shop; the files of the checkpoint."""
    calls = 0

    def progress(label: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise Killed

    around = Around(folder=folder, clock=Ticks(), on_progress=progress, every_s=3.0)
    tuning, initial, config = given.get("tuning", USUAL), given.get("initial"), given.get("config", CONFIG)
    Pretraining(stream_of(), config, PLAN, tuning, around, "category", initial).run(resume=resume)
    return saved_weights.read(folder, CHECKPOINT, CheckpointFacts)[2]


def stream_of() -> Stream:
    return read_stream(events(shop(800)), CONFIG)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


@pytest.mark.parametrize("kill_at", [7, 11, 14, 25])
def test_a_killed_training_goes_on_to_the_same_bytes(whole: Path, tmp_path: Path, kill_at: int) -> None:
    """Cut off in the middle of an epoch, while it is judged, or in a later one: the checkpoint is the same."""
    with pytest.raises(Killed):
        train(tmp_path, kill_at=kill_at)
    assert not saved_weights.is_there(tmp_path, CHECKPOINT)
    assert train(tmp_path, resume=True) == saved_weights.read(whole, CHECKPOINT, CheckpointFacts)[2]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors", ".safetensors"]


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    """A training of other settings is refused by name, not mixed up."""
    with pytest.raises(Killed):
        train(tmp_path, kill_at=7)
    with pytest.raises(ConfigError, match="other settings"):
        train(tmp_path, resume=True, tuning=Tuning(rate=0.5))


def test_an_application_starts_from_the_checkpoint(whole: Path) -> None:
    """Version 0 of worker and learner are the checkpoint's weights; other sizes or interests are refused."""
    learner = msgspec.structs.replace(CONFIG.learner, initial_weights=str(whole))
    config = msgspec.structs.replace(CONFIG, learner=learner)
    pipeline = make_pipeline(config, initial_weights(config))
    assert pipeline.weights_version == 0
    assert len(pipeline.forecaster.keys_V) > 0
    fields = msgspec.structs.replace(config.events, fields={"interest": "product.brand"})
    with pytest.raises(ConfigError, match=r"'category'.*'brand'"):
        initial_weights(msgspec.structs.replace(config, events=fields))
    network = msgspec.structs.replace(config.network, copy_width=16)
    with pytest.raises(ConfigError, match=r"network\.copy_width = 32, here it is 16"):
        initial_weights(msgspec.structs.replace(config, network=network))


def test_what_is_no_checkpoint_is_refused(whole: Path, tmp_path: Path) -> None:
    """Nothing there, a broken JSON, a tensor file that was changed: one line each."""
    with pytest.raises(ConfigError, match="driftline pretrain"):
        load_initial(tmp_path, CONFIG.network, key="--from")
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = next(tmp_path.glob("checkpoint-weights-*"))
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match="checksum"):
        load_initial(tmp_path, CONFIG.network, key="--from")
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(ConfigError, match="no checkpoint of this program"):
        load_initial(tmp_path, CONFIG.network, key="--from")


def test_adapters_change_nothing_but_what_they_may(whole: Path, tmp_path: Path) -> None:
    """After a training by adapters the recurrent weights differ by a small rank, and all heads and known rows stay."""
    initial = load_initial(whole, CONFIG.network, key="--from")
    train(tmp_path, initial=initial, tuning=Tuning(how="adapters", rank=2))
    import safetensors.numpy

    old = safetensors.numpy.load(initial.files["weights"])
    new = safetensors.numpy.load(load_initial(tmp_path, CONFIG.network, key="--from").files["weights"])
    for name in ("gru.weight_ih_l0", "gru.weight_hh_l0"):
        change = new[f"network.{name}"] - old[f"network.{name}"]
        assert 0 < np.linalg.matrix_rank(change, tol=1e-4) <= 2
    rows = len(old["network.interest"])
    for name in (n for n in old if n.startswith("network.") and "weight_" not in n):
        assert np.array_equal(new[name][:rows], old[name][:rows]) if old[name].ndim else new[name] == old[name], name


def test_the_evaluation_goes_on_from_a_checkpoint(whole: Path) -> None:
    """Each model says what share it trains; without a checkpoint there is nothing to go on from."""
    initial = load_initial(whole, CONFIG.network, key="--from")
    names = ("driftline", "driftline_pretrained", "driftline_finetuned", "driftline_adapters")
    stream = read_stream(events(shop(300, seed=1)), CONFIG)
    outcomes = evaluate(stream, CONFIG, Wanted(models=names, horizon=1, initial=initial), lambda *_: None)
    shares = {outcome.model: outcome.trained_share or 0.0 for outcome in outcomes}
    assert shares["driftline"] == shares["driftline_finetuned"] == 1.0
    assert 0 < shares["driftline_adapters"] < 0.1
    with pytest.raises(ConfigError, match="--from"):
        evaluate(stream, CONFIG, Wanted(models=names[1:2]), lambda *_: None)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["online", "adapters"])
def test_a_training_on_a_gpu_is_gone_on_with(whole: Path, tmp_path: Path, cuda: str, how: Any) -> None:
    """Killed in its second epoch and gone on with there: epochs like those of the CPU."""
    initial = None if how == "online" else load_initial(whole, CONFIG.network, key="--from")
    config = msgspec.structs.replace(CONFIG, learner=msgspec.structs.replace(CONFIG.learner, device=cuda))
    given: dict[str, Any] = {"initial": initial, "tuning": Tuning(how=how)}
    with pytest.raises(Killed):
        train(tmp_path / "cuda", kill_at=14, config=config, **given)
    train(tmp_path / "cuda", resume=True, config=config, **given)
    train(tmp_path / "cpu", **given)
    losses = []
    for name in ("cuda", "cpu"):
        facts = saved_weights.read(tmp_path / name, CHECKPOINT, CheckpointFacts)[1]
        losses.append([epoch["held_loss"] for epoch in facts.training["epochs"]])
        load_initial(tmp_path / name, CONFIG.network, key="--from")
    assert len(losses[0]) == PLAN.epochs
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
