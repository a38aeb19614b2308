"""The network in use: brings states up to date, says what comes next, and ranks what came.

On the way of an event: `encode` after the walk over the records; `rank` judges the forecasts that the events meet;
`forecast` where one is due. Numbers in and out are numpy; the result does not depend on how a stream is cut into
batches (states within 1e-5). Free of state: a newer version of the weights is a new Forecaster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit

from models.calibration import Calibration, map_of
from models.features import F32, I64, TYPE_COUNT, U32, EventColumns
from models.gru import Moments, Network, Step
from models.inputs import Normaliser
from models.knowledge import Candidates, Inputs, Knowledge
from models.profile import HIDDEN, Snapshot
from models.purchases import Purchases, pairs_of
from models.settings import NetworkSettings
from models.snapshot import Tensors, Weights
from models.successors import Successors
from models.vocabulary import I32, RowIndex

_CHUNK_NUMBERS = 4_000_000  # moments are ranked in chunks of about so many scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What comes next, for E moments.

    Attributes:
        interest_ENK: keys, the most probable first; 0 where there are fewer.
        probability_ENK: of each.
        type_probability_ET: of each type code, for the next event.
        purchase_probability_EK: of the interests of step 1, to be bought within the next n events, where n is the
            `horizon_steps` of the learning; 0 while no purchase was ever seen.
    """

    interest_ENK: U32
    probability_ENK: F32
    type_probability_ET: F32
    purchase_probability_EK: F32


class Forecaster:
    """One version of the weights, ready to use."""

    def __init__(
        self,
        network: Network,
        knowledge: Knowledge,
        purchases: Purchases,
        calibration: Calibration,
        keys_V: U32,
        names: list[str],
        version: int,
    ) -> None:
        self._network = network
        self._knowledge = knowledge
        self._purchases = purchases
        self._calibration = calibration
        self._keys_V = keys_V
        self._names = names
        self._log_popularity_V = torch.from_numpy(knowledge.log_popularity_V)
        self._crowd_VK = torch.from_numpy(knowledge.crowd_VK)
        self.version = version

    @staticmethod
    def initial(settings: NetworkSettings, seed: int) -> Forecaster:
        """Version 0: it knows no interest by name, and ranks the user's own like the recency rule."""
        return Forecaster.from_weights(initial_weights(settings, seed))

    @staticmethod
    def from_weights(weights: Weights) -> Forecaster:
        """A version as it came from the learner."""
        tensors = weights.tensors
        keys_V = tensors["vocabulary.keys"]
        network = Network.of(weights, copied=False).eval()
        knowledge = Knowledge.of(
            weights.settings,
            RowIndex(keys_V).find,
            tensors["vocabulary.popularity"],
            tensors["vocabulary.crowd"],
            Successors(*(tensors[f"successors.{name}"] for name in ("follower", "weight", "total", "stay"))),
            Normaliser(sums_3M=tensors["normaliser.sums"]),
        )
        purchases = Purchases(tensors["purchases.weight"], tensors["purchases.pairs"])
        calibration = Calibration.of(tensors)
        return Forecaster(network, knowledge, purchases, calibration, keys_V, weights.names, weights.version)

    @property
    def knows_purchases(self) -> bool:
        """Whether any purchase was learned from: else their forecasts say nothing."""
        return self._purchases.known

    def name(self, interest_key: int) -> str | None:
        """The name of an interest of the vocabulary; None where it is not known."""
        row = int(self._knowledge.find(np.array([interest_key], np.uint32))[0])
        return (self._names[row] or None) if 0 <= row < len(self._names) else None

    # ------------------------------------------------------------------ states

    def encode(
        self, events: EventColumns, gap_s_B: F32, aggregates_BA: F32, hidden_UH: F32, inputs: Inputs | None = None
    ) -> tuple[F32, F32, F32]:
        """States before and after each event, and the users' newest, in one pass of the GRU.

        Args:
            events: `user_row` is the row of each event's user in `hidden_UH`; a user's events are in order.
            gap_s_B, aggregates_BA: see models/profile.py `Advanced`.
            inputs: of these events, where they are at hand.

        Returns:
            (before_BH, after_BH, new_UH)
        """
        if not len(events):
            return np.zeros((0, HIDDEN), np.float32), np.zeros((0, HIDDEN), np.float32), hidden_UH.copy()
        packing = Packing.of(events.user_row, len(hidden_UH))
        inputs = inputs or self._knowledge.inputs(events, gap_s_B, aggregates_BA)
        order = torch.from_numpy(packing.event_P)
        with torch.inference_mode():
            input_BI = self._network.inputs(
                torch.from_numpy(inputs.embedding_B)[order],
                torch.from_numpy(inputs.item_B)[order],
                torch.from_numpy(inputs.type_B)[order],
                torch.from_numpy(inputs.number_BN)[order],
            )
            start_UH = torch.from_numpy(np.ascontiguousarray(hidden_UH[packing.user_S], np.float32))
            packed = self._network.encode_packed(input_BI, torch.from_numpy(packing.batch_sizes_T), start_UH).numpy()
        after_BH = np.empty_like(packed)
        after_BH[packing.event_P] = packed
        before_BH = hidden_UH[events.user_row].astype(np.float32)
        before_BH[packing.event_P[packing.batch_sizes_T[0] :]] = packed[packing.earlier_P]
        new_UH = hidden_UH.astype(np.float32, copy=True)
        new_UH[events.user_row] = after_BH  # in order: the last event of a user stays
        return before_BH, after_BH, new_UH

    # ------------------------------------------------------------------ forecasts

    def forecast(self, hidden_EH: F32, snapshot: Snapshot, gap_s_E: F32 | None, *, steps: int, top_k: int) -> Forecast:
        """The most probable interests of the next `steps` events, and the type of the next one.

        Args:
            hidden_EH: states after the events that the snapshot has seen.
            gap_s_E: seconds from there to the moment of the forecast; None or NaN where that is not known.
        """
        count = len(hidden_EH)
        interest_ENK = np.zeros((count, steps, top_k), np.uint32)
        probability_ENK = np.zeros((count, steps, top_k), np.float32)
        type_ET = np.zeros((count, TYPE_COUNT), np.float32)
        bought_EK = np.zeros((count, top_k), np.float32)
        kernel: Any = _top
        for span in self._spans(count):
            gap_s = None if gap_s_E is None else gap_s_E[span]
            candidates, moments = self._knowledge.moments(snapshot.take(span), gap_s)
            with torch.inference_mode():
                for n, parts in enumerate(self._steps(hidden_EH[span], candidates, moments, gap_s, steps)):
                    if n == 0:
                        logit_ET = self._network.type_logits(parts.step.state_EH, moments.context_EG)
                        type_ET[span] = torch.softmax(logit_ET, dim=-1).numpy()
                    kernel(
                        *parts.arrays(),
                        candidates.row_EC,
                        candidates.key_EC,
                        self._keys_V,
                        interest_ENK[span, n],
                        probability_ENK[span, n],
                    )
                    if n == 0 and self._purchases.known:
                        bought_EK[span] = self._bought(
                            parts.step.state_EH, snapshot.take(span), candidates, moments, interest_ENK[span, 0]
                        )
        return Forecast(
            interest_ENK=interest_ENK,
            probability_ENK=probability_ENK,
            type_probability_ET=type_ET,
            purchase_probability_EK=bought_EK,
        )

    def _bought(
        self, state_EH: torch.Tensor, snapshot: Snapshot, candidates: Candidates, moments: Moments, key_EK: U32
    ) -> F32:
        """Probability that each interest is bought within the horizon, 0 for key 0."""
        pairs = pairs_of(self._knowledge, self._purchases, snapshot, candidates, moments, key_EK)
        logit_P = self._network.purchase_logits(
            state_EH, moments.context_EG, pairs.buyer_EU, pairs.owner_P, pairs.number_PF, pairs.prior_P
        )
        bought_EK = np.zeros(key_EK.shape, np.float32)
        bought_EK[key_EK != 0] = torch.sigmoid(logit_P).numpy()
        return bought_EK

    def rank(self, hidden_EH: F32, snapshot: Snapshot, gap_s_E: F32 | None, target_EN: U32) -> I64:
        """Rank of the interest of each of the next N events among all: 1 = best, ties count against us.

        Returns:
            (E, N); 0 = a miss: the interest is neither in the vocabulary nor a candidate.
        """
        return self.rank_and_probability(hidden_EH, snapshot, gap_s_E, target_EN)[0]

    def rank_and_probability(
        self, hidden_EH: F32, snapshot: Snapshot, gap_s_E: F32 | None, target_EN: U32
    ) -> tuple[I64, F32]:
        """As `rank`, and the probability that each target was given; 0 for a miss."""
        count, steps = target_EN.shape
        rank_EN = np.zeros((count, steps), np.int64)
        probability_EN = np.zeros((count, steps), np.float32)
        kernel: Any = _rank
        for span in self._spans(count):
            gap_s = None if gap_s_E is None else gap_s_E[span]
            candidates, moments = self._knowledge.moments(snapshot.take(span), gap_s)
            target_row_EN = self._knowledge.find(target_EN[span].reshape(-1)).reshape(-1, steps)
            with torch.inference_mode():
                for n, parts in enumerate(self._steps(hidden_EH[span], candidates, moments, gap_s, steps)):
                    kernel(
                        *parts.arrays(),
                        candidates.row_EC,
                        candidates.key_EC,
                        self._keys_V,
                        np.ascontiguousarray(target_EN[span, n]),
                        np.ascontiguousarray(target_row_EN[:, n]),
                        rank_EN[span, n],
                        probability_EN[span, n],
                    )
        return rank_EN, probability_EN

    def distributions(
        self, hidden_EH: F32, snapshot: Snapshot, gap_s_E: F32 | None, steps: int
    ) -> Iterator[tuple[slice, int, Candidates, Parts]]:
        """What `rank` and `forecast` rest on: for some moments at a time, the distributions of steps 0, 1, ..."""
        for span in self._spans(len(hidden_EH)):
            gap_s = None if gap_s_E is None else gap_s_E[span]
            candidates, moments = self._knowledge.moments(snapshot.take(span), gap_s)
            with torch.inference_mode():
                for n, parts in enumerate(self._steps(hidden_EH[span], candidates, moments, gap_s, steps)):
                    yield span, n, candidates, parts

    @property
    def keys_V(self) -> U32:
        """Key of each row of the vocabulary, 0 = free."""
        return self._keys_V

    def rows(self, key_B: U32) -> I32:
        """Rows of interests in the vocabulary, -1 where they are not."""
        return self._knowledge.find(key_B)

    def _spans(self, count: int) -> list[slice]:
        size = max(1, _CHUNK_NUMBERS // max(1_000, len(self._keys_V)))
        return [slice(i, min(count, i + size)) for i in range(0, count, size)]

    def _steps(
        self, hidden_EH: F32, candidates: Candidates, moments: Moments, gap_s_E: F32 | None, steps: int
    ) -> Iterator[Parts]:
        """The distributions of steps 1..N, one after another."""
        state_EH = self._network.at_moment(torch.from_numpy(np.ascontiguousarray(hidden_EH, np.float32)), moments)
        view = self._network.view(moments)
        lift_EM = moments.lift(self._log_popularity_V)
        for number in range(1, steps + 1):
            step = self._network.step(state_EH, view)
            general_EV = self._network.general(step, moments, lift_EM, self._log_popularity_V, self._crowd_VK)
            parts = Parts.of(step, general_EV)
            if number == 1:
                map_E = map_of(gap_s_E, len(hidden_EH))
                self._calibration.apply(*parts.arrays(), candidates.row_EC, candidates.key_EC, map_E)
            yield parts
            if number < steps:
                state_EH = self._network.next_state(step, view, number + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """One step's distribution: the mixture is not built where it is not needed.

    Attributes:
        step: as the network gives it.
        general_EV, copied_EC, rest_E: probabilities of the vocabulary and of the candidates, and what all of the former
            weigh. The gate's share is in those of the candidates already.
    """

    step: Step
    general_EV: F32
    copied_EC: F32
    rest_E: F32

    @staticmethod
    def of(step: Step, general_EV: torch.Tensor) -> Parts:
        """As the network gives them."""
        return Parts(
            step=step,
            general_EV=general_EV.cpu().numpy(),
            copied_EC=torch.exp(step.copy_EC + step.log_gate_E.unsqueeze(1)).cpu().numpy(),
            rest_E=torch.exp(step.log_rest_E).cpu().numpy(),
        )

    def arrays(self) -> tuple[F32, F32, F32]:
        """The probabilities, as kernels take them."""
        return self.general_EV, self.copied_EC, self.rest_E


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How a batch's events lie in a packed sequence: users by falling number of events, time-major.

    Attributes:
        event_P: event at each place.
        batch_sizes_T: events at each time.
        user_S: rows of the users that have events, in packed order.
        earlier_P: for each place from the second time on, the place of the user's event before.
    """

    event_P: I64
    batch_sizes_T: I64
    user_S: I64
    earlier_P: I64

    @staticmethod
    def of(user_row_B: I64, users: int) -> Packing:
        count_U = np.bincount(user_row_B, minlength=users)
        by_count = np.argsort(-count_U, kind="stable")
        user_S = by_count[: int((count_U > 0).sum())]
        place_U = np.empty(users, np.int64)
        place_U[by_count] = np.arange(users)
        by_user = np.argsort(user_row_B, kind="stable")
        first_U = np.cumsum(count_U) - count_U
        time_B = np.empty(len(user_row_B), np.int64)
        time_B[by_user] = np.arange(len(user_row_B)) - first_U[user_row_B[by_user]]
        batch_sizes_T = np.bincount(time_B)
        start_T = np.cumsum(batch_sizes_T) - batch_sizes_T
        place_B = start_T[time_B] + place_U[user_row_B]
        event_P = np.empty(len(user_row_B), np.int64)
        event_P[place_B] = np.arange(len(user_row_B))
        later_P = event_P[batch_sizes_T[0] :]
        earlier_P = start_T[time_B[later_P] - 1] + place_U[user_row_B[later_P]]
        return Packing(
            event_P=event_P, batch_sizes_T=batch_sizes_T.astype(np.int64), user_S=user_S, earlier_P=earlier_P
        )


def initial_weights(settings: NetworkSettings, seed: int) -> Weights:
    """Version 0, made from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(settings, 0)
    tensors: Tensors = {f"network.{n}": t.detach().numpy() for n, t in network.state_dict().items()}
    successors, purchases = Successors.empty(settings.successors), Purchases.empty()
    tensors |= {
        "vocabulary.keys": np.zeros(0, np.uint32),
        "vocabulary.popularity": np.zeros(0, np.float32),
        "vocabulary.crowd": np.zeros((0, 2), np.float32),
        "successors.follower": successors.follower_VM,
        "successors.weight": successors.weight_VM,
        "successors.total": successors.total_V,
        "successors.stay": successors.stay_V,
        "purchases.weight": purchases.weight_V,
        "purchases.pairs": purchases.pairs_22,
        **Calibration.empty().tensors(),
        "normaliser.sums": Normaliser.initial().sums_3M,
    }
    return Weights(version=0, settings=settings, tensors=tensors)


# ---------------------------------------------------------------------- kernels: over the mixture, without building it


@njit(cache=True, nogil=True, error_model="numpy")
def _rank(
    general_EV: F32, copied_EC: F32, rest_E: F32, row_EC: I32, key_EC: U32, keys_V: U32,
    target_E: U32, target_row_E: I32, rank_E: I64, probability_E: F32,
) -> None:  # fmt: skip
    count, slots = key_EC.shape
    rows = len(keys_V)
    candidate = np.zeros(rows, np.bool_)
    mixed = np.zeros(slots)
    for e in range(count):
        found = -1
        target_row = target_row_E[e]
        for c in range(slots):
            mixed[c] = 0.0
            if key_EC[e, c] == 0:
                continue
            mixed[c] = copied_EC[e, c]
            row = row_EC[e, c]
            if row >= 0:
                mixed[c] += rest_E[e] * general_EV[e, row]
                candidate[row] = True
            if key_EC[e, c] == target_E[e]:
                found = c
        rank = 0
        if found >= 0:
            p = mixed[found]
            bound = p / rest_E[e]
        elif target_row >= 0:
            p = rest_E[e] * general_EV[e, target_row]
            bound = general_EV[e, target_row]
        else:
            p = 0.0
            bound = 0.0
        if p > 0.0 or target_row >= 0:
            rank = 1
            for c in range(slots):
                if key_EC[e, c] != 0 and c != found and mixed[c] >= p:
                    rank += 1
            for v in range(rows):
                if general_EV[e, v] >= bound and not candidate[v] and keys_V[v] != 0 and v != target_row:
                    rank += 1
        rank_E[e] = rank
        probability_E[e] = p
        for c in range(slots):
            if row_EC[e, c] >= 0:
                candidate[row_EC[e, c]] = False


@njit(cache=True, nogil=True, error_model="numpy")
def _top(
    general_EV: F32, copied_EC: F32, rest_E: F32, row_EC: I32, key_EC: U32, keys_V: U32,
    interest_EK: U32, probability_EK: F32,
) -> None:  # fmt: skip
    count, slots = key_EC.shape
    rows = len(keys_V)
    length = interest_EK.shape[1]
    candidate = np.zeros(rows, np.bool_)
    for e in range(count):
        used = 0
        for c in range(slots):
            if key_EC[e, c] == 0:
                continue
            p = copied_EC[e, c]
            row = row_EC[e, c]
            if row >= 0:
                p += rest_E[e] * general_EV[e, row]
                candidate[row] = True
            used = _insert(interest_EK[e], probability_EK[e], used, length, key_EC[e, c], p)
        bound = 0.0
        if used == length:
            bound = probability_EK[e, length - 1] / rest_E[e]
        for v in range(rows):
            if general_EV[e, v] > bound and not candidate[v] and keys_V[v] != 0:
                p = rest_E[e] * general_EV[e, v]
                used = _insert(interest_EK[e], probability_EK[e], used, length, keys_V[v], p)
                if used == length:
                    bound = probability_EK[e, length - 1] / rest_E[e]
        for c in range(slots):
            if row_EC[e, c] >= 0:
                candidate[row_EC[e, c]] = False


@njit(cache=True, nogil=True, error_model="numpy")
def _insert(interest_K: U32, probability_K: F32, used: int, length: int, key: int, p: float) -> int:
    """Put an interest where it belongs among the best so far; equal ones keep their order."""
    if used == length and p <= probability_K[length - 1]:
        return used
    at = used if used < length else length - 1
    while at > 0 and probability_K[at - 1] < p:
        interest_K[at] = interest_K[at - 1]
        probability_K[at] = probability_K[at - 1]
        at -= 1
    interest_K[at] = key
    probability_K[at] = p
    return min(used + 1, length)
