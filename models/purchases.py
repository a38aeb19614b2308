"""Will the user buy it? P(purchase of an interest within the user's next n events), for interests that are forecast.

On the way of an event: beside the copy head, from the same numbers; where a forecast is due it is asked for the
interests of the next step, and the learner trains it when the n events behind a moment are known. A pair is a moment
and an interest: one of the user's own (a candidate, see models/candidates.py) or another one.

    logit P = logit(share of such pairs that were bought) + log(r of the interest / r) + log(r of the user / r)
              + a small network on the pair, the state and the moment, which starts at 0

r is the share of events that are purchases, counted here. So it starts as counts alone, and learning can only add.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.candidates import FEATURE_COUNT
from models.features import F32, I64, TYPE_CODES, U32
from models.gru import BUYER_COUNT, CANDIDATE_NUMBERS, CROWD_COUNT, PAIR_NUMBERS, Moments
from models.knowledge import Candidates, Knowledge
from models.profile import AGGREGATES, Snapshot
from models.vocabulary import I32

F64 = npt.NDArray[np.float64]

PURCHASE = TYPE_CODES["purchase"]
_PRIOR = 20.0  # events of the usual share that every interest and every user has had
_PAIRS_PRIOR = 1_000.0  # pairs of the usual share, before any were counted
_RATIO_MAX = 3.0  # nats by which one share moves the logit
_SHARE, _SINCE, _CART, _BOUGHT = (
    AGGREGATES.index(name) for name in ("purchase_share", "log_since_purchase", "ring_cart", "ring_purchase")
)


class Purchases:
    """Decayed counts.

    Attributes:
        weight_V: purchases of each interest of the vocabulary.
        pairs_22: of the users' own interests, and of others: pairs that were asked about, and those bought.
    """

    def __init__(self, weight_V: F32, pairs_22: F64) -> None:
        self.weight_V, self.pairs_22 = weight_V, pairs_22

    @staticmethod
    def empty() -> Purchases:
        return Purchases(np.zeros(0, np.float32), np.zeros((2, 2)))

    def copied(self) -> Purchases:
        """One more that stands where this one stands."""
        return Purchases(self.weight_V.copy(), self.pairs_22.copy())

    @property
    def known(self) -> bool:
        """Whether anything was bought yet."""
        return bool(self.weight_V.any())

    def grow(self, rows: int) -> None:
        """Have counts for at least `rows` rows."""
        have = len(self.weight_V)
        if rows > have:
            self.weight_V = np.concatenate([self.weight_V, np.zeros(max(rows, 2 * have) - have, np.float32)])

    def clear(self, rows: I64) -> None:
        """These rows stand for nothing any more."""
        self.weight_V[rows] = 0.0

    def count(self, row_B: I32, type_B: npt.NDArray[np.int64], half_life_events: float) -> None:
        """Count the purchases among events; what was counted before weighs less."""
        decay = 0.5 ** (len(row_B) / half_life_events)
        self.weight_V *= np.float32(decay)
        self.pairs_22 *= decay
        np.add.at(self.weight_V, row_B[(row_B >= 0) & (type_B == PURCHASE)], 1.0)

    def count_pairs(self, own_P: npt.NDArray[np.bool_], bought_P: npt.NDArray[np.bool_]) -> None:
        """Count pairs whose n events are known."""
        for kind, of_kind in enumerate((own_P, ~own_P)):
            self.pairs_22[kind] += int(of_kind.sum()), int((of_kind & bought_P).sum())

    def share(self, popularity_V: F32) -> float:
        """Share of all events that are purchases."""
        return float((self.weight_V.sum() + 1e-3) / (popularity_V.sum() + 1.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """P pairs as the network reads them: `owner_P` is the moment of each, `buyer_EU` what its user buys."""

    owner_P: Tensor
    number_PF: Tensor
    prior_P: Tensor
    buyer_EU: Tensor

    def to(self, device: torch.device) -> Pairs:
        """The same on a device."""
        return Pairs(**{name: getattr(self, name).to(device) for name in self.__slots__})


def pairs_of(
    knowledge: Knowledge, purchases: Purchases, snapshot: Snapshot, candidates: Candidates, moments: Moments,
    key_EK: U32, *, seen_EK: npt.NDArray[np.int64] | None = None, bought_EK: npt.NDArray[np.int64] | None = None,
) -> Pairs:  # fmt: skip
    """Pairs of each moment with some interests; key 0 is none, and none has a pair.

    Args:
        snapshot, candidates, moments: of the same moments; the tensors lie on the CPU.
        seen_EK, bought_EK: events and purchases of the interest that are counted though they came after the moment:
            they are taken out again, or a gradient would meet what it is to foretell.
    """
    asked_EK = key_EK != 0
    owner_P, place_P = np.nonzero(asked_EK)
    key_P = key_EK[owner_P, place_P]
    at_EKC = key_EK[:, :, None] == candidates.key_EC[:, None, :]
    own_P = at_EKC.any(axis=2)[asked_EK]
    slot_P = at_EKC.argmax(axis=2)[asked_EK]
    row_P = knowledge.find(key_P)
    known_P = row_P >= 0
    number_PF = np.zeros((len(key_P), PAIR_NUMBERS), np.float32)
    flat_S = np.full(candidates.key_EC.size, -1, np.int64)
    flat_S[moments.place_S.numpy()] = np.arange(len(moments.place_S))
    slots = flat_S[owner_P * moments.slots + slot_P]
    number_PF[own_P, :CANDIDATE_NUMBERS] = moments.number_SF.numpy()[slots[own_P]]
    other_P = ~own_P
    follows_PM = moments.follower_EM.numpy()[owner_P] == row_P[:, None]
    lift_EM = moments.lift(torch.from_numpy(knowledge.log_popularity_V)).numpy()
    lift_PM = np.where(follows_PM & known_P[:, None], lift_EM[owner_P], 0.0)
    number_PF[other_P, FEATURE_COUNT] = lift_PM.max(axis=1, initial=0.0)[other_P] / 4.0
    number_PF[other_P, FEATURE_COUNT + 1] = -3.0
    new = other_P & known_P
    number_PF[new, FEATURE_COUNT + 1] = knowledge.log_popularity_V[row_P[new]] / 8.0 + 1.0
    number_PF[new, CANDIDATE_NUMBERS - CROWD_COUNT : CANDIDATE_NUMBERS] = knowledge.crowd_VK[row_P[new]]
    number_PF[other_P, CANDIDATE_NUMBERS] = 1.0
    usual = purchases.share(knowledge.popularity_V)
    bought_P, seen_P = np.zeros(len(key_P)), np.zeros(len(key_P))
    bought_P[known_P] = purchases.weight_V[row_P[known_P]]
    seen_P[known_P] = knowledge.popularity_V[row_P[known_P]]
    if seen_EK is not None and bought_EK is not None:
        bought_P = np.maximum(bought_P - bought_EK[asked_EK], 0.0)
        seen_P = np.maximum(seen_P - seen_EK[asked_EK], 0.0)
    interest_P = _log_ratio(bought_P, seen_P, usual)
    number_PF[:, CANDIDATE_NUMBERS + 1] = interest_P
    buyer_EU = _buyers(snapshot, usual)
    rate_2 = (purchases.pairs_22[:, 1] + usual * _PAIRS_PRIOR) / (purchases.pairs_22[:, 0] + _PAIRS_PRIOR)
    rate_P = rate_2[other_P.astype(np.int64)]
    prior_P = np.log(rate_P / (1.0 - rate_P)) + interest_P + buyer_EU[owner_P, 0]
    return Pairs(
        owner_P=torch.from_numpy(owner_P),
        number_PF=torch.from_numpy(number_PF),
        prior_P=torch.from_numpy(prior_P.astype(np.float32)),
        buyer_EU=torch.from_numpy(buyer_EU),
    )


def _log_ratio(bought: F64, seen: F64, usual: float) -> F64:
    """log of a share of purchases against the usual one, shrunk to it and bounded."""
    ratio: F64 = np.log((bought + usual * _PRIOR) / (seen + _PRIOR) / usual)
    return np.clip(ratio, -_RATIO_MAX, _RATIO_MAX)


def _buyers(snapshot: Snapshot, usual: float) -> F32:
    """(E, BUYER_COUNT): log ratio of the user's share of purchases, then what of it lies how far back."""
    aggregates_EA, events_E = snapshot.aggregates_EA, snapshot.events_E.astype(np.float64)
    share_E = np.nan_to_num(aggregates_EA[:, _SHARE]).astype(np.float64)
    buyer_EU = np.zeros((len(snapshot), BUYER_COUNT), np.float32)
    buyer_EU[:, 0] = _log_ratio(share_E * events_E, events_E, usual)
    since_E = aggregates_EA[:, _SINCE]
    buyer_EU[:, 1] = np.isfinite(since_E)
    buyer_EU[:, 2] = np.nan_to_num(since_E) / 8.0
    buyer_EU[:, 3] = np.nan_to_num(aggregates_EA[:, _CART])
    buyer_EU[:, 4] = np.nan_to_num(aggregates_EA[:, _BOUGHT])
    return buyer_EU


def came(key_EK: U32, interest_EN: U32, chosen_EN: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """(E, K): how many of the chosen ones of N events are of each interest; 0 for key 0."""
    found: npt.NDArray[np.int64] = (
        (key_EK[:, :, None] == interest_EN[:, None, :]) & chosen_EN[:, None, :] & (key_EK[:, :, None] != 0)
    ).sum(axis=2)
    return found
