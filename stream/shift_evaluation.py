"""`driftline evaluate-shifts`: what the shift detector is worth on a file, beside the detectors that others offer.

Beside the way of an event. The rules are fitted and calibrated by the code of the running worker, on one half of the
users; the other half is reported (models/shift_suites.py). Events carry who, what and when: nothing else is read.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from models.features import interest_key
from models.profile import PROFILE
from models.shift import ShiftSettings
from models.shift_baselines import DETECTORS
from models.shift_blocks import Labels
from models.shift_calibration import LONG_PROFILE, Histories, is_long, session_starts
from models.shift_suites import SUITES, Row, Study, histories_of, study_rows
from stream.errors import ConfigError

OnProgress = Callable[[str, int, int], None]
ARL0_MIN = 20.0
_LABEL_COLUMNS = ("user", "first_position", "masquerader")
_KEYS = (
    "suite", "detector", "requested_arl0", "measured_arl0", "expected_alarms", "median_delay", "within_20", "missed",
    "missed_window", "auc", "hits_at_1.3", "hits_at_6.7", "confirmed", "confirmed_random", "onset_error",
    "gained_hit@3", "lost_hit@3", "scope_accuracy", "ci95",
)  # fmt: skip
_FURTHER = ("splices", "alerts", "early_onsets", "alerted_share", "mean_delay", "f1", "ages")
_FIELDS = {"hits_at_1.3": "hits_at_1_3", "hits_at_6.7": "hits_at_6_7", "gained_hit@3": "gained_hit_3",
           "lost_hit@3": "lost_hit_3"}  # fmt: skip
_LONG_HISTORY = 2_000  # events: half of the users have more
_LONG_VISIT = 10.0  # events in a session, on average


@dataclass(frozen=True, kw_only=True, slots=True)
class EventFile:
    """The events of a file as histories, with the names that they had."""

    histories: Histories
    users: list[str]  # by number in `histories`
    interests: dict[int, str]

    @property
    def window(self) -> int:
        """Events after which a made shift counts as missed: more where histories or visits are long."""
        lengths = np.diff(self.histories.first)
        usable = lengths[lengths >= ShiftSettings().age_min_events + 10]
        if len(usable) and np.median(usable) >= _LONG_HISTORY:
            return 300
        visits = len(session_starts(self.histories, ShiftSettings()))
        return 100 if len(self.histories) > _LONG_VISIT * visits else 50


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFile:
    """Labelled blocks by the users' names."""

    user: list[str]
    first: list[int]
    masquerader: list[bool]

    @property
    def block(self) -> int:
        steps = np.diff(np.unique(self.first))
        return int(steps.min()) if len(steps) else 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the command was asked for; None: what the file allows."""

    suites: tuple[str, ...] | None
    detectors: tuple[str, ...] | None
    arl0: tuple[float, ...]
    test_users: float
    window: int | None
    seed: int


def read_histories(events: Iterable[Mapping[str, Any]]) -> EventFile:
    """Users and interests as numbers, user by user in the order of time."""
    users: dict[str, int] = {}
    keys: dict[str, int] = {}
    rows: list[tuple[int, int, int]] = []
    for event in events:
        user, interest = str(event["user"]), str(event["interest"])
        if interest not in keys:
            keys[interest] = interest_key(interest)
        rows.append((users.setdefault(user, len(users)), keys[interest], int(event["time"])))
    if not rows:
        raise ConfigError("the file has no usable events; there is nothing to evaluate")
    table = np.array(rows, np.int64)
    return EventFile(
        histories=histories_of(table[:, 0], table[:, 1].astype(np.uint32), table[:, 2]),
        users=list(users),
        interests={key: name for name, key in keys.items()},
    )


def read_labels(path: Path) -> LabelFile:
    """A table of labelled blocks: user, block, first_position (in the user's events, from 0), masquerader (0 or 1).

    Raises:
        ConfigError: the file is not there, or not of that form.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _LABEL_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(
                    f"--labels {path}: no column {missing[0]!r}; there must be {', '.join(_LABEL_COLUMNS)}"
                )
            rows = [(row["user"], int(row["first_position"]), int(row["masquerader"])) for row in reader]
    except OSError as error:
        raise ConfigError(f"--labels {path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--labels {path}: positions and masquerader must be whole numbers: {error}") from None
    if not rows or len({theirs > 0 for _, _, theirs in rows}) < 2:
        raise ConfigError(f"--labels {path}: blocks of both kinds are needed, masquerader 0 and 1")
    user, first, theirs = zip(*rows, strict=True)
    return LabelFile(user=list(user), first=list(first), masquerader=[t > 0 for t in theirs])


def asked(
    suites: str | None,
    detectors: str | None,
    arl0: str,
    test_users: float,
    window: int | None,
    seed: int,
    *,
    labels: bool,
) -> Asked:
    """The command's options, checked.

    Raises:
        ConfigError: a suite or a detector that there is not, a rate that is no number, S5 without labels.
    """
    chosen = None if suites is None else tuple(dict.fromkeys(part.strip().upper() for part in suites.split(",")))
    for name in chosen or ():
        if name not in SUITES:
            raise ConfigError(f"--suites {name}: there is no such suite; there are {', '.join(SUITES)}")
        if name == "S5" and not labels:
            raise ConfigError("--suites S5 needs --labels LABELS.csv with the columns " + ", ".join(_LABEL_COLUMNS))
    named = None if detectors is None else tuple(part.strip() for part in detectors.split(","))
    for name in named or ():
        if name not in DETECTORS:
            raise ConfigError(f"--detectors {name}: there is no such detector; there are {', '.join(DETECTORS)}")
    try:
        rates = tuple(float(part) for part in arl0.split(","))
    except ValueError:
        raise ConfigError(f"--arl0 {arl0}: write events between false alarms with commas, e.g. 200,500,1000") from None
    if not all(ARL0_MIN <= rate < 1e9 for rate in rates):
        raise ConfigError(f"--arl0 {arl0}: each must be {ARL0_MIN:.0f} events or more")
    return Asked(suites=chosen, detectors=named, arl0=rates, test_users=test_users, window=window, seed=seed)


def evaluate_shifts(
    file: EventFile,
    labels: LabelFile | None,
    settings: ShiftSettings,
    wanted: Asked,
    on_progress: OnProgress,
    processes: int = 1,
) -> list[Row]:
    """The rows of every requested rate; `processes`: how many detectors are measured at a time.

    Raises:
        ConfigError: too few users or events for it.
    """
    settings = measured_settings(file, settings)
    suites = wanted.suites or tuple(name for name in SUITES if name != "S5" or labels is not None)
    _, reported_U = _halves(file.histories.users, wanted.test_users, wanted.seed)
    blocks = None if labels is None else _blocks(file, labels, reported_U)
    rows: list[Row] = []
    for rate in wanted.arl0:
        try:
            rows += study_rows(
                study_of(file, labels, settings, wanted, rate),
                suites,
                wanted.detectors,
                blocks,
                on_progress,
                processes,
            )
        except ValueError as error:
            raise ConfigError(f"too little to evaluate on: {error}; take a longer file, or --test-users 1") from error
    return rows


def measured_settings(file: EventFile, settings: ShiftSettings) -> ShiftSettings:
    """The settings with the length of a slow profile decided: a longer one where histories are long."""
    if settings.profile_interests:
        return settings
    length = LONG_PROFILE if is_long(file.histories) else PROFILE
    return msgspec.structs.replace(settings, profile_interests=length)


def study_of(file: EventFile, labels: LabelFile | None, settings: ShiftSettings, wanted: Asked, rate: float) -> Study:
    """The two halves of the users, without labelled blocks and what comes after them."""
    clean = file.histories if labels is None else _unlabelled(file, labels)
    tuned_U, reported_U = _halves(file.histories.users, wanted.test_users, wanted.seed)
    return Study(
        tuned=clean.some(tuned_U),
        reported=clean.some(reported_U),
        reported_users=np.flatnonzero(reported_U),
        settings=settings,
        false_alarm_events=rate,
        window=wanted.window or file.window,
        seed=wanted.seed,
    )


def _halves(users: int, test_users: float, seed: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(tuned on, reported): the same users, all of them, where all are to be reported."""
    if test_users >= 1.0:
        everybody = np.ones(users, np.bool_)
        return everybody, everybody
    reported = np.random.default_rng(seed).permutation(users) < round(test_users * users)
    return ~reported, reported


def _unlabelled(file: EventFile, labels: LabelFile) -> Histories:
    """Each user's events before the first labelled block."""
    histories = file.histories
    end_U = np.diff(histories.first)
    number = {name: i for i, name in enumerate(file.users)}
    for user, first in zip(labels.user, labels.first, strict=True):
        if user in number:
            end_U[number[user]] = min(end_U[number[user]], first)
    kept = np.arange(len(histories)) - histories.first[histories.user] < end_U[histories.user]
    return histories.at(kept)


def _blocks(file: EventFile, labels: LabelFile, reported_U: npt.NDArray[np.bool_]) -> Labels:
    number = {name: i for i, name in enumerate(file.users)}
    place_U = np.cumsum(reported_U) - 1
    users = file.histories.some(reported_U)
    lengths = np.diff(users.first)
    chosen = [
        (int(place_U[number[user]]), first, theirs)
        for user, first, theirs in zip(labels.user, labels.first, labels.masquerader, strict=True)
        if user in number and reported_U[number[user]] and first < lengths[place_U[number[user]]]
    ]
    if len({theirs for _, _, theirs in chosen}) < 2:
        raise ConfigError("--labels: the reported users have no blocks of both kinds; check its user ids and positions")
    user_K, first_K, theirs_K = zip(*chosen, strict=True)
    return Labels(
        users=users,
        user_K=np.array(user_K),
        first_K=np.array(first_K),
        masquerader_K=np.array(theirs_K, np.bool_),
        block=labels.block,
    )


# ---------------------------------------------------------------------- as JSON


def json_row(row: Row) -> dict[str, Any]:
    """A row under the names of `--json`; a share or a median that there is not, and infinity, are null."""
    return {key: _plain(getattr(row, _FIELDS.get(key, key))) for key in _KEYS}


def further_row(row: Row) -> dict[str, Any]:
    """What else is known of a row, as it stands in the line before the last."""
    named = {key: getattr(row, key) for key in ("suite", "detector", "requested_arl0")}
    return named | {key: _plain(getattr(row, key)) for key in _FURTHER if getattr(row, key)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
