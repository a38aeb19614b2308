"""Going on from trained weights: with a small rate, or with adapters alone; and several passes over one stream.

Beside the way of an event: `driftline pretrain` and `driftline evaluate --from`. A pass is the online learner's: each
event is learned once, seen with what had been counted before it. A second pass keeps the network and its optimiser and
counts anew from where the first began, so that no event meets counts that know it already. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy
import safetensors.torch
from torch import Tensor, nn

from models.adapters import AdapterOptimiser, adapt, merged, trained_share
from models.calibration import Calibration
from models.features import F32, I64, U32, U64, EventColumns
from models.forecaster import Forecaster
from models.gru import Network
from models.history import History, Users
from models.inputs import Normaliser
from models.learner import Learner, LearnerState
from models.optimiser import Optimiser
from models.profile import USER, Snapshot
from models.purchases import Purchases
from models.settings import LearningSettings, NetworkSettings
from models.snapshot import Weights
from models.successors import Successors
from models.vocabulary import Vocabulary

_HISTORY = ("previous", "digest", "interest", "item", "type", "number", "gap_s", "hidden", "learned", "follower",
            "extra", "base", "counted", "last_counted")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What became of events that were forecast and counted, but not learned.

    Attributes:
        events, known: all of them, and those whose interest could be forecast.
        log_p: sum of log p over the known ones.
        reciprocal: sum of 1 / rank; hits: of those within the first ten.
    """

    events: int = 0
    known: int = 0
    log_p: float = 0.0
    reciprocal: float = 0.0
    hits: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    @property
    def loss(self) -> float:
        """Mean -log p."""
        return -self.log_p / max(1, self.known)

    @property
    def mrr(self) -> float:
        return self.reciprocal / max(1, self.events)

    @property
    def hr_10(self) -> float:
        return self.hits / max(1, self.events)


class _Facts(msgspec.Struct, kw_only=True):
    """What `memory` keeps beside tensors."""

    version: int
    random: str
    end: int
    waiting: list[tuple[int, int]]
    shed: int


class Trainee(Learner):
    """A Learner that may have adapters, may start passes anew, and can be kept whole, histories included."""

    _first_row: int | None = None  # with adapters: rows of the vocabulary before this one stay as they are
    _origin: tuple[bytes, Successors, Purchases, Calibration, Normaliser] | None = None

    # ------------------------------------------------------------------ from trained weights

    def adapt(self, rank: int, seed: int) -> None:
        """From now on only adapters and interests that are new from here on are trained."""
        self._first_row = len(self._vocabulary)
        self._optimiser.restart()
        adapt(self._network, rank, seed)
        self._optimiser = AdapterOptimiser(self._network, self._learning, self._first_row)

    def warm_up(self) -> None:
        """The rates rise from 0 again, and AdamW's moments start anew; the sums of the rows stay."""
        self._optimiser.restart()

    def seed(self, seed: int) -> None:
        """Replay and dropout of another seed than those of the training before."""
        self._random = np.random.Generator(np.random.PCG64(seed))

    def drop_interests(self) -> None:
        """Keep what was learned of users' ways, and forget the interests: for a stream with other ones."""
        network = Network(self._settings, 0)
        hashed = self._settings.hashed_rows
        state = {
            name: value[:hashed] if name in ("interest", "bias") else value
            for name, value in self._optimiser.average.state_dict().items()
        }
        network.load_state_dict(state)
        self._network = network.to(self._device)
        self._copy = None
        self._optimiser = Optimiser(self._network, self._learning)
        self._vocabulary = Vocabulary(self._learning)
        self._successors = Successors.empty(self._settings.successors)
        self._purchases = Purchases.empty()
        self._calibration = Calibration.empty()
        self._normaliser = Normaliser.initial()
        self._know()

    def trained_share(self) -> float:
        """Of the network's numbers, how many are trained, 0..1."""
        return trained_share(self._network, len(self._vocabulary), self._first_row)

    def _parameters(self) -> Mapping[str, Tensor]:
        return merged(self._optimiser.average)

    def forecaster(self) -> Forecaster:
        if self._first_row is None:
            return super().forecaster()
        # With the adapters merged in once, not at each use.
        return Forecaster(
            self._copied(), self._knowledge, self._purchases.copied(), self._calibration.copied(),
            self._vocabulary.keys, self._vocabulary.names, self.version,
        )  # fmt: skip

    # ------------------------------------------------------------------ passes

    def begin_pass(self) -> None:
        """Back to the start of the stream: users, histories and counts as they were at the first call."""
        if self._origin is None:
            counts = _copied(self._successors), self._purchases.copied(), self._calibration.copied(), self._normaliser
            self._origin = (self._vocabulary.to_bytes(), *counts)
        vocabulary, successors, purchases, calibration, self._normaliser = self._origin
        self._purchases, self._calibration = purchases.copied(), calibration.copied()
        self._vocabulary = Vocabulary.from_bytes(vocabulary, self._learning)
        self._successors = _copied(successors)
        self._forget_all()
        self._know()

    def _calibrate(self, number_B: I64) -> None:
        """With passes, see `hold`."""
        if self._origin is None:
            super()._calibrate(number_B)

    def _forget_all(self) -> None:
        self._users = Users(self._learning.users_max)
        old = self._history
        self._history = History(old.capacity, numbers=old.number.shape[1], followers=old.follower.shape[1])
        self._waiting.ranges.clear()
        self._unlearned = np.zeros(0, np.uint64)

    def settle(self) -> None:
        """Count the few events that wait for a whole step, unlearned: the end of a part."""
        self._count(self._waiting.take(len(self._waiting)))

    def hold(self, user_key_B: U64, events: EventColumns, names: Mapping[int, str], id_hash_B: U32 | None) -> Held:
        """Forecast each event from the record before it, then count it; no gradients.

        Maps of probabilities are learned here alone when there are passes: what a pass meets again was learned from.
        """
        self.observe(user_key_B, events, names, id_hash_B=id_hash_B)
        number_E = self._waiting.take(len(self._waiting))
        if not len(number_E):
            return Held()
        row_E = number_E % self._history.capacity
        hidden_EH: F32 = self._history.hidden[row_E]
        rank_EN, p_EN = self.forecaster().rank_and_probability(
            hidden_EH, self._history.snapshot(row_E), self._history.gap_s[row_E], self._history.interest[row_E][:, None]
        )
        for start in range(0, len(number_E), self._learning.step_events):
            super()._calibrate(number_E[start : start + self._learning.step_events])
        self._count(number_E)
        rank_E: I64 = rank_EN[:, 0]
        known = rank_E > 0
        return Held(
            events=len(rank_E),
            known=int(known.sum()),
            log_p=float(np.log(np.maximum(p_EN[known, 0].astype(np.float64), 1e-12)).sum()),
            reciprocal=float((1.0 / rank_E[known]).sum()),
            hits=int((rank_E[known] <= 10).sum()),
        )

    # ------------------------------------------------------------------ kept whole

    def memory(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Everything that `remember` needs to go on as if nothing had happened: what JSON can hold, and safetensors."""
        history, users, used = self._history, self._users, len(self._users)
        filled = min(history.end, history.capacity)
        arrays: dict[str, npt.NDArray[Any]] = {f"history.{n}": getattr(history, n)[:filled] for n in _HISTORY}
        arrays |= {f"snapshot.{n}": getattr(history.snapshot(np.arange(filled)), n) for n in Snapshot.__slots__}
        arrays["users.records"] = np.ascontiguousarray(users.records[:used]).view(np.uint8).reshape(used, USER.itemsize)
        arrays["users.last_event"] = users.last_event[:used]
        lists = {n: getattr(self._successors, n) for n in ("follower_VM", "weight_VM", "total_V", "stay_V")}
        arrays |= {f"successors.{n}": values for n, values in lists.items()}
        arrays["purchases.weight"], arrays["purchases.pairs"] = self._purchases.weight_V, self._purchases.pairs_22
        arrays |= self._calibration.tensors()
        arrays["normaliser.sums"] = self._normaliser.sums_3M
        network = {n: t.detach().cpu().contiguous() for n, t in self._optimiser.average.state_dict().items()}
        facts = _Facts(
            version=self.version,
            random=msgspec.json.encode(self._random.bit_generator.state).decode(),
            end=history.end,
            waiting=list(self._waiting.ranges),
            shed=self._shed,
        )
        return (
            {"facts": facts, "vocabulary": msgspec.Raw(self._vocabulary.to_json())},
            {
                "memory": safetensors.numpy.save({n: np.ascontiguousarray(a) for n, a in arrays.items()}),
                "network": safetensors.torch.save(network),
                "optimiser": self._optimiser.to_bytes(),
            },
        )

    def remember(self, facts: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Go on where `memory` stood. Called on a trainee that was made in the same way."""
        told = msgspec.convert(facts["facts"], _Facts)
        network = safetensors.torch.load(files["network"])
        self._network.interest = nn.Parameter(network["interest"].to(self._device))
        self._network.bias = nn.Parameter(network["bias"].to(self._device))
        self._network.load_state_dict(network)
        self._copy = None
        adapted = self._first_row is not None
        self._optimiser = (
            AdapterOptimiser(self._network, self._learning, self._first_row or 0)
            if adapted
            else Optimiser(self._network, self._learning)
        )
        self._optimiser.load(files["optimiser"])
        arrays = safetensors.numpy.load(files["memory"])
        self._forget_all()
        history = self._history
        history.end = told.end
        filled = min(history.end, history.capacity)
        for name in _HISTORY:
            getattr(history, name)[:filled] = arrays[f"history.{name}"]
        history.put_snapshot(filled, {n: arrays[f"snapshot.{n}"] for n in Snapshot.__slots__})
        records = arrays["users.records"].reshape(-1).view(USER)
        self._users.fill(records, arrays["users.last_event"])
        self._vocabulary = Vocabulary.from_json(msgspec.json.encode(facts["vocabulary"]), self._learning)
        lists = (arrays[f"successors.{n}"].copy() for n in ("follower_VM", "weight_VM", "total_V", "stay_V"))
        self._successors = Successors(*lists)
        self._purchases = Purchases(arrays["purchases.weight"].copy(), arrays["purchases.pairs"].copy())
        self._calibration = Calibration.of(arrays)
        self._normaliser = Normaliser(sums_3M=arrays["normaliser.sums"])
        self._random.bit_generator.state = msgspec.json.decode(told.random)
        self._waiting.ranges = deque(told.waiting)
        self._shed, self.version = told.shed, told.version
        self._know()


def _copied(successors: Successors) -> Successors:
    return Successors(
        successors.follower_VM.copy(), successors.weight_VM.copy(), successors.total_V.copy(), successors.stay_V.copy()
    )


# ---------------------------------------------------------------------- a learner as files


class SavedFacts(msgspec.Struct, kw_only=True):
    """Of a learner, what JSON can hold."""

    version: int
    settings: NetworkSettings
    names: list[str]
    vocabulary: Any
    random: str


def to_files(learner: Learner) -> tuple[SavedFacts, dict[str, bytes]]:
    """A learner between two streams, as JSON and safetensors: weights, vocabulary with its counts, optimiser."""
    weights = learner.weights()
    state = msgspec.msgpack.decode(learner.state_bytes(), type=LearnerState)
    adapted = isinstance(learner, Trainee) and learner.trained_share() < 1.0
    optimiser = _fresh_optimiser(weights) if adapted else state.optimiser
    facts = SavedFacts(
        version=weights.version,
        settings=weights.settings,
        names=weights.names,
        vocabulary=msgspec.json.decode(Vocabulary.from_bytes(state.vocabulary, LearningSettings()).to_json()),
        random=state.random,
    )
    return facts, {
        "weights": safetensors.numpy.save({n: np.ascontiguousarray(t) for n, t in sorted(weights.tensors.items())}),
        "optimiser": optimiser,
    }


def _fresh_optimiser(weights: Weights) -> bytes:
    """Of a plain network that was trained by adapters: theirs fits nothing in it."""
    return Optimiser(Network.of(weights, copied=True), LearningSettings()).to_bytes()


def to_weights(facts: SavedFacts, files: Mapping[str, bytes]) -> Weights:
    """The weights alone, as version 0 of a new application."""
    return Weights(
        version=0, settings=facts.settings, tensors=safetensors.numpy.load(files["weights"]), names=facts.names
    )


def to_state(facts: SavedFacts, files: Mapping[str, bytes]) -> bytes:
    """What `Learner.restore` takes: the learner that was saved, at version 0, with nothing waiting."""
    vocabulary = Vocabulary.from_json(msgspec.json.encode(facts.vocabulary), LearningSettings())
    return msgspec.msgpack.encode(
        LearnerState(
            weights=to_weights(facts, files).to_bytes(),
            vocabulary=vocabulary.to_bytes(),
            optimiser=files["optimiser"],
            random=facts.random,
            losses=[],
            waiting=b"",
            boost_steps=0,
            shed=0,
        )
    )
