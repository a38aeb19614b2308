"""`driftline pretrain` and a run that starts from it, as processes: killed and gone on with, curves, no folder."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_stream_evaluation import shop
from test_stream_processes import TIMEOUT_S, driftline, run_until_weights, wait_for

from stream.saved_weights import CHECKPOINT, CheckpointFacts, is_there, read

MAP = ("--map", "user=user,interest=category,time=time", "--time-unit", "s")


def written(folder: Path) -> Path:
    """A shop's events as a file."""
    path = folder / "events.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "category", "time"])
        rows.writerows([user, interest, 1_700_000_000 + s] for user, interest, s in shop(1_500))
    return path


def pretrain(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return driftline(folder, "pretrain", "events.csv", *MAP, "--epochs", "2", *more)


def epochs(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read(folder, CHECKPOINT, CheckpointFacts)[1].training["epochs"]
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file, and in `whole` what an undisturbed training leaves."""
    folder = tmp_path_factory.mktemp("site")
    written(folder)
    done = pretrain(folder, "--out", "whole")
    assert done.returncode == 0, done.stderr
    return folder


def test_a_training_that_was_killed_goes_on_to_the_same_epochs(site: Path) -> None:
    """SIGKILL as soon as there is a mark to go on from: --resume gives the same losses, to the digit."""
    arguments = ("pretrain", "events.csv", *MAP, "--epochs", "2", "--out", "killed", "--checkpoint-every", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "stream.cli", *arguments],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: is_there(site / "killed", "progress") or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    assert not is_there(site / "killed", CHECKPOINT)
    refused = pretrain(site, "--out", "killed")
    assert refused.returncode == 2 and "--resume" in refused.stderr
    done = pretrain(site, "--out", "killed", "--resume")
    assert done.returncode == 0, done.stderr
    assert epochs(site / "killed") == epochs(site / "whole") and len(epochs(site / "whole")) == 2


def test_tensorboard_can_read_its_files(site: Path) -> None:
    """The curve of the last part has a point an epoch, with the numbers that the checkpoint tells."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read_back = event_accumulator.EventAccumulator(str(site / "whole" / "tensorboard"))
    read_back.Reload()
    assert {"held/loss", "held/mrr", "held/hr@10", "train/loss_of_epoch"} <= set(read_back.Tags()["scalars"])
    for tag, name in (("held/loss", "held_loss"), ("held/mrr", "held_mrr")):
        shown = [point.value for point in read_back.Scalars(tag)]
        assert shown == pytest.approx([epoch[name] for epoch in epochs(site / "whole")], rel=1e-5)


def test_a_run_starts_from_a_checkpoint_and_publishes(site: Path, tmp_path: Path) -> None:
    """On an embedded log: forecasts come from the trained vocabulary at once, and the learner publishes versions."""
    told = [{"user": u, "interest": i, "time": 1_700_000_000_000 + 1_000 * s} for u, i, s in shop(800, seed=1)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told))
    plain = ("--map", "user=user,interest=interest,time=time", "--time-unit", "ms")
    assert driftline(tmp_path, "topics", "create").returncode == 0
    sent = driftline(tmp_path, "replay", "more.jsonl", *plain)
    assert sent.returncode == 0, sent.stderr
    run_until_weights(tmp_path, "--initial-weights", str(site / "whole"))
    shown = driftline(tmp_path, "tail", "forecasts", "--from", "start", "--no-follow", "--json")
    forecasts = [json.loads(line) for line in shown.stdout.splitlines()]
    assert forecasts
    first = forecasts[0].get("value", forecasts[0])
    named = {candidate["interest"] for candidate in first["steps"][0]["interests"]}
    assert len(named) > 1, "of a first event a network from the seed knows one interest alone"


def test_a_missing_folder_is_found_before_anything_starts(site: Path, tmp_path: Path) -> None:
    """One line, exit code 2, and no process, topic or log was begun."""
    for folder, why in (("nowhere", "driftline pretrain"), (str(tmp_path / "empty"), "driftline pretrain")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        done = driftline(tmp_path, "run", "--initial-weights", folder)
        assert done.returncode == 2
        assert why in done.stderr and "initial_weights" in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "var").exists()
