"""`driftline pretrain`: several passes of the learner over a file, kept as weights that a new application starts from.

    for each epoch: back to the start of the file; learn its first part in time, event by event as the learner of
                    `driftline run` does; forecast the last part without learning it
    the best epoch by -log p of the last part; that one then learns the last part once as well

Stops when `patience` epochs in a row were no better. Everything is written down every few minutes, histories and the
state of all random numbers included: what a killed run left is gone on with, to the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from models.tracking import Tracker
from models.tuning import Held, Trainee, to_files
from stream import saved_weights
from stream.assembly import make_decoder
from stream.config import Config, fingerprint
from stream.errors import ConfigError
from stream.evaluation import Stream
from stream.saved_weights import CHECKPOINT, Initial
from stream.tuning import Tuning, make_trainee

PROGRESS = "progress"
BEST = "best"
_TOLD_STEPS = 50  # gradient steps between two points of the curves
OnProgress = Callable[[str, int, int], None]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How to train.

    Attributes:
        epochs: passes, at most.
        patience: epochs in a row that may be no better than the best.
        hold_out: share of the events, the last in time, by which the epochs are judged.
    """

    epochs: int = 8
    patience: int = 2
    hold_out: float = 0.1
    seed: int = 0


class Epoch(msgspec.Struct, kw_only=True):
    """One pass: mean -log p while it learned, and of the last part; MRR and HR@10 of that."""

    epoch: int
    train_loss: float
    held_loss: float
    held_mrr: float
    held_hr_10: float


class Progress(msgspec.Struct, kw_only=True):
    """Where a training is: events of the pass `len(epochs) + 1` that are learned, and what it has found out so far."""

    run: str
    position: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    epochs: list[Epoch] = msgspec.field(default_factory=list)
    trainee: Any = None

    @property
    def best(self) -> Epoch | None:
        return min(self.epochs, key=lambda e: e.held_loss, default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """What a training needs beside numbers.

    Attributes:
        folder: where checkpoints go; every is how often, seconds.
        stopped: asked after every step; then the training writes where it is and ends.
    """

    folder: Path
    clock: Callable[[], float]
    on_progress: OnProgress
    trackers: Sequence[Tracker] = ()
    stopped: Callable[[], bool] = lambda: False
    every_s: float = 120.0


class Pretraining:
    """One training; see the module's docstring.

    Args:
        kind: what the interests are.
        initial: weights to start from; None = from the seed.

    Raises:
        ConfigError: there are too few events.
    """

    def __init__(
        self, stream: Stream, config: Config, plan: Plan, tuning: Tuning, around: Around, kind: str,
        initial: Initial | None = None,
    ) -> None:  # fmt: skip
        self._stream, self._config, self._plan, self._tuning = stream, config, plan, tuning
        self._around, self._kind, self._initial = around, kind, initial
        # A file does not come as a surprise: rates are not raised where its loss rises.
        self._learning = msgspec.structs.replace(tuning.learning(config.learning), drift_boost=1.0)
        self._split = len(stream) - int(plan.hold_out * len(stream))
        self._held = len(stream) - self._split
        if self._split < self._learning.step_events or self._split == len(stream):
            raise ConfigError(
                f"the file has {len(stream):,} usable events: too few for steps of {self._learning.step_events} and a "
                "last part to judge by; give more, or lower learning.step_events"
            )
        self._decoder = make_decoder(config)
        self._trainee: Trainee = make_trainee(config, self._learning, initial, tuning, plan.seed)
        self._progress = Progress(run=self._run_id())
        self._next_save_s = around.clock() + around.every_s

    def _run_id(self) -> str:
        """Short hash of what decides the result: a run goes on only where it is the same."""
        digest = hashlib.sha256(fingerprint(self._config.network, self._learning, self._plan).encode())
        digest.update(repr(self._tuning).encode() + self._kind.encode())
        for record in self._stream.records:
            digest.update(record.value or b"")
        if self._initial is not None:
            digest.update(self._initial.files["weights"])
        return digest.hexdigest()[:16]

    # ------------------------------------------------------------------ the training

    def run(self, *, resume: bool = False) -> list[Epoch] | None:
        """Train and leave the checkpoint in the folder; None where it was stopped before its end.

        Raises:
            ConfigError: what there is to go on with belongs to another run.
        """
        if resume:
            self._load_progress()
        progress = self._progress
        while not self._is_over():
            if progress.position == 0:
                self._trainee.begin_pass()
            if not self._train(self._split, f"epoch {len(progress.epochs) + 1} of at most {self._plan.epochs}"):
                self._save(PROGRESS)
                return None
            self._trainee.settle()
            self._judge_epoch()
        _, best, files = saved_weights.read(self._around.folder, BEST, Progress)
        self._trainee.begin_pass()
        self._trainee.remember(best.trainee, files)
        progress.position = self._split
        if not self._train(len(self._stream), "the last part"):
            return None
        self._trainee.settle()
        self._finish()
        return progress.epochs

    def _is_over(self) -> bool:
        epochs = self._progress.epochs
        best = self._progress.best
        waited = 0 if best is None else epochs[-1].epoch - best.epoch
        return len(epochs) >= self._plan.epochs or waited >= self._plan.patience

    def _train(self, end: int, label: str) -> bool:
        """Learn the pass up to an event; False where it was stopped."""
        progress, around = self._progress, self._around
        while progress.position < end:
            batch = slice(progress.position, min(end, progress.position + self._learning.step_events))
            self._observe(batch)
            report = self._trainee.learn(64)
            progress.position = batch.stop
            if report.steps and report.loss == report.loss:
                progress.steps += report.steps
                progress.loss_sum += report.loss
                progress.loss_steps += 1
                if progress.steps % _TOLD_STEPS == 0:
                    self._tell({"train/loss": report.loss})
            around.on_progress(label, self._done(), self._plan.epochs * self._split + self._held)
            if around.stopped():
                return False
            if around.clock() >= self._next_save_s:
                if end == self._split:
                    self._save(PROGRESS)
                self._next_save_s = around.clock() + around.every_s
        return True

    def _done(self) -> int:
        position = self._progress.position
        passes = len(self._progress.epochs) if position < self._split or not self._is_over() else self._plan.epochs - 1
        return passes * self._split + position

    def _observe(self, span: slice) -> None:
        decoded = self._decoder.decode(self._stream.records[span])
        self._trainee.observe(decoded.user_key_B, decoded.columns, decoded.interest_names, id_hash_B=decoded.id_hash_B)

    def _judge_epoch(self) -> None:
        """Forecast the last part; keep the epoch where it is the best so far."""
        progress = self._progress
        progress.trainee, files = self._trainee.memory()
        held = Held()
        for start in range(self._split, len(self._stream), self._learning.step_events):
            records = self._stream.records[start : start + self._learning.step_events]
            decoded = self._decoder.decode(records)
            held += self._trainee.hold(decoded.user_key_B, decoded.columns, decoded.interest_names, decoded.id_hash_B)
            self._around.on_progress("judging the epoch", start - self._split, len(self._stream) - self._split)
        row = Epoch(
            epoch=len(progress.epochs) + 1,
            train_loss=progress.loss_sum / max(1, progress.loss_steps),
            held_loss=held.loss,
            held_mrr=held.mrr,
            held_hr_10=held.hr_10,
        )
        progress.epochs.append(row)
        if progress.best is row:
            self._write(BEST, progress, files)
        self._tell({"held/loss": row.held_loss, "held/mrr": row.held_mrr, "held/hr@10": row.held_hr_10,
                    "train/loss_of_epoch": row.train_loss, "rate": self._learning.rate})  # fmt: skip
        progress.position, progress.loss_sum, progress.loss_steps = 0, 0.0, 0
        self._save(PROGRESS)

    def _tell(self, values: dict[str, float]) -> None:
        for tracker in self._around.trackers:
            tracker.scalars(self._progress.steps, values)

    # ------------------------------------------------------------------ files

    def _save(self, name: str) -> None:
        self._progress.trainee, files = self._trainee.memory()
        self._write(name, self._progress, files)

    def _write(self, name: str, facts: object, files: dict[str, bytes]) -> None:
        network = fingerprint(self._config.network)
        saved_weights.write(self._around.folder, name, kind=self._kind, fingerprint=network, facts=facts, files=files)

    def _load_progress(self) -> None:
        folder = self._around.folder
        _, progress, files = saved_weights.read(folder, PROGRESS, Progress)
        if progress.run != self._progress.run:
            raise ConfigError(
                f"{folder}: the training there is of another file or other settings; give the same, another --out, or "
                "--restart"
            )
        self._trainee.begin_pass()  # what a pass starts from is as it was made
        self._trainee.remember(progress.trainee, files)
        self._progress = progress

    @property
    def steps(self) -> int:
        """Gradient steps so far."""
        return self._progress.steps

    def _finish(self) -> None:
        """The checkpoint; what was kept to go on with is not needed any more."""
        learner, files = to_files(self._trainee)
        best = self._progress.best
        assert best is not None
        training = {
            "events": len(self._stream),
            "users": self._stream.users,
            "interests": self._stream.interests,
            "plan": self._plan,
            "how": self._tuning.how if self._initial is not None else "from scratch",
            "from": None if self._initial is None else str(self._initial.path),
            "rate": self._learning.rate,
            "embedding_rate": self._learning.embedding_rate,
            "trained_share": self._trainee.trained_share(),
            "best_epoch": best.epoch,
            "epochs": self._progress.epochs,
        }
        self._write(CHECKPOINT, {"learner": learner, "training": training}, files)
        saved_weights.remove(self._around.folder, PROGRESS)
        saved_weights.remove(self._around.folder, BEST)

    @property
    def trained_share(self) -> float:
        """Of the network's numbers, how many are trained, 0..1."""
        return self._trainee.trained_share()
