"""What `driftline pretrain` is asked for, checked and put together; cli.py prints.

Beside the way of an event: a training is told its file, its folder and its curves here, and nothing else chooses them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from models.tracking import TensorBoard, Tracker, WeightsAndBiases, is_installed
from stream import saved_weights
from stream.config import Config
from stream.errors import ConfigError
from stream.evaluation import Stream
from stream.mapping import Mapping as ColumnMapping
from stream.pretraining import PROGRESS, Around, OnProgress, Plan, Pretraining, Progress
from stream.saved_weights import Initial, kind_of, load_initial
from stream.tuning import Tuning


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The options of the command.

    Attributes:
        resume: go on with what the folder holds (True), begin anew (False), or refuse where it holds something (None).
    """

    columns: str
    out: Path
    plan: Plan
    tuning: Tuning
    origin: Path | None
    kind: str | None
    resume: bool | None
    every_s: float
    tensorboard: bool
    wandb: str | None


def check_folder(asked: Asked) -> None:
    """Before the file is read: whether the folder may be used.

    Raises:
        ConfigError: it holds an unfinished training and nothing was said about it, or none to resume.
    """
    unfinished = saved_weights.is_there(asked.out, PROGRESS)
    if asked.resume and not unfinished:
        raise ConfigError(f"--resume: {asked.out} holds no unfinished training; leave --resume away")
    if asked.resume is None and unfinished:
        raise ConfigError(
            f"{asked.out} holds an unfinished training; go on with --resume, or begin anew with --restart"
        )
    if asked.tensorboard and not is_installed("tensorboard"):
        raise ConfigError("TensorBoard is not installed; install driftline[pretrain], or give --no-tensorboard")
    if asked.wandb is not None and not is_installed("wandb"):
        raise ConfigError(
            f"--wandb {asked.wandb}: the package wandb is not installed; install it, or leave --wandb away"
        )


def origin(asked: Asked, config: Config) -> Initial | None:
    """The weights to start from, checked.

    Raises:
        ConfigError: they do not fit the settings, or know other interests.
    """
    if asked.origin is None:
        if asked.tuning.how == "adapters" or asked.tuning.new_interests:
            raise ConfigError("--adapters and --new-interests go on from trained weights; name them with --from")
        return None
    initial = load_initial(asked.origin, config.network, key="--from")
    kind = interests_of(asked)
    if kind != initial.kind and not asked.tuning.new_interests:
        raise ConfigError(
            f"--from {asked.origin}: its interests are {initial.kind!r}, those of the file {kind!r}; give "
            f"--new-interests to forget the old ones, or --kind {initial.kind} if they are the same"
        )
    return initial


def interests_of(asked: Asked) -> str:
    """What the interests of the file are."""
    return asked.kind or kind_of(ColumnMapping.parse(asked.columns).columns["interest"])


def make(
    asked: Asked, config: Config, stream: Stream, initial: Initial | None, on_progress: OnProgress,
    stopped: Callable[[], bool],
) -> tuple[Pretraining, list[Tracker]]:  # fmt: skip
    """The training and its curves; close those afterwards."""
    first_step = 0
    if asked.resume:
        first_step = saved_weights.read(asked.out, PROGRESS, Progress)[1].steps
    trackers: list[Tracker] = []
    training = Pretraining(
        stream,
        config,
        asked.plan,
        asked.tuning,
        Around(
            folder=asked.out,
            clock=time.monotonic,
            on_progress=on_progress,
            trackers=trackers,
            stopped=stopped,
            every_s=asked.every_s,
        ),
        interests_of(asked),
        initial,
    )
    if asked.tensorboard:
        trackers.append(TensorBoard(asked.out / "tensorboard", first_step))
    if asked.wandb is not None:
        settings: Mapping[str, Any] = msgspec.to_builtins(asked.plan)
        trackers.append(WeightsAndBiases(asked.wandb, asked.out.name, settings))
    return training, trackers
