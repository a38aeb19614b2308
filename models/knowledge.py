"""What is counted rather than trained, and travels with the weights: rows, popularity, followers, scales.

On the way of an event: turns keys and records into the tensors of models/gru.py, the same way where forecasts are made
and where the learner learns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from models.candidates import FEATURES, candidates
from models.features import F32, U32, EventColumns
from models.gru import CANDIDATE_NUMBERS, NEVER, Moments
from models.inputs import Normaliser, event_numbers
from models.profile import Snapshot
from models.settings import NetworkSettings
from models.successors import Successors
from models.vocabulary import I32

_IN_RING = FEATURES.index("in_ring")
LIFT = CANDIDATE_NUMBERS - 2  # where the lift of a candidate stands among its numbers
_PRIOR = 0.5  # sightings that every interest has had, for the logarithm of popularity


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The events of a batch as the GRU reads them; `number_BN` ends with the content vector, where there is one."""

    embedding_B: npt.NDArray[np.int64]
    item_B: npt.NDArray[np.int64]
    type_B: npt.NDArray[np.int64]
    number_BN: F32


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Keys of the candidates, 0 = none in the slot, and their rows in the vocabulary, -1 = not there."""

    key_EC: U32
    row_EC: I32


@dataclass(frozen=True, kw_only=True, slots=True)
class Knowledge:
    """See the module's docstring.

    Attributes:
        find: rows of interests by key, -1 where there is none.
        popularity_V: decayed counts; 0 for a free row.
        log_popularity_V: logarithm of the share of all, NEVER for a free row.
    """

    settings: NetworkSettings
    find: Callable[[U32], I32]
    popularity_V: F32
    log_popularity_V: F32
    successors: Successors
    normaliser: Normaliser

    @staticmethod
    def of(
        settings: NetworkSettings,
        find: Callable[[U32], I32],
        popularity_V: F32,
        successors: Successors,
        normaliser: Normaliser,
    ) -> Knowledge:
        share_V = (popularity_V + _PRIOR) / (popularity_V.sum() + _PRIOR * max(1, len(popularity_V)))
        log_V = np.where(popularity_V > 0, np.log(share_V), NEVER).astype(np.float32)
        return Knowledge(
            settings=settings,
            find=find,
            popularity_V=popularity_V,
            log_popularity_V=log_V,
            successors=successors,
            normaliser=normaliser,
        )

    def inputs(self, events: EventColumns, gap_s_B: F32, aggregates_BA: F32) -> Inputs:
        """What the GRU reads of a batch."""
        settings = self.settings
        if not settings.time_gaps:
            gap_s_B = np.full_like(gap_s_B, np.nan)
        number_BN = event_numbers(events, gap_s_B, aggregates_BA, self.normaliser)
        item_B = (events.item % np.uint32(settings.item_rows - 1) + 1) * (events.item != 0)
        type_B = events.type.astype(np.int64)
        if settings.vector_length:
            vector_BD = np.zeros((len(events), settings.vector_length), np.float32)
            if events.vector is not None:
                vector_BD = np.nan_to_num(events.vector)
            number_BN = np.concatenate([number_BN, vector_BD], axis=1)
        if not settings.event_features:
            number_BN[:, 2:] = 0.0
            item_B, type_B = np.zeros_like(item_B), np.zeros_like(type_B)
        return Inputs(
            embedding_B=self.embedding(events.interest, self.find(events.interest)),
            item_B=item_B.astype(np.int64),
            type_B=type_B,
            number_BN=number_BN,
        )

    def embedding(self, key: U32, row: I32) -> npt.NDArray[np.int64]:
        """Rows of the embedding table: those of the vocabulary come behind the hashed ones."""
        hashed = self.settings.hashed_rows
        return np.where(row >= 0, row.astype(np.int64) + hashed, key.astype(np.int64) % hashed)

    def moments(self, snapshot: Snapshot, gap_s_E: F32 | None) -> tuple[Candidates, Moments]:
        """The candidates, and what the network reads of the moments.

        Args:
            gap_s_E: seconds from the user's last event to the forecast, NaN or None where not known.
        """
        settings = self.settings
        if gap_s_E is None or not settings.time_gaps:
            gap_s_E = np.full(len(snapshot), np.nan, np.float32)
        if not settings.time_gaps:
            snapshot = _without_gaps(snapshot)
        key_EC, number_ECF, context_EG = candidates(snapshot, gap_s_E.astype(np.float32))
        if not settings.slow_profile:
            key_EC = np.where(number_ECF[:, :, _IN_RING] > 0, key_EC, 0).astype(np.uint32)
        if not settings.copy_head:
            key_EC = np.zeros_like(key_EC)
        slots = key_EC.shape[1]
        place_S = np.flatnonzero(key_EC)
        key_S = key_EC.reshape(-1)[place_S]
        row_S = self.find(key_S)
        row_EC = np.full(key_EC.shape, -1, np.int32)
        row_EC.reshape(-1)[place_S] = row_S
        follower_EM, lift_EM, lift_EC = self.successors.look_up(row_EC, self.popularity_V)
        number_SF = np.empty((len(place_S), CANDIDATE_NUMBERS), np.float32)
        number_SF[:, :-2] = number_ECF.reshape(-1, number_ECF.shape[2])[place_S]
        number_SF[:, LIFT] = lift_EC.reshape(-1)[place_S] / 4.0
        number_SF[:, LIFT + 1] = -3.0
        known = row_S >= 0
        number_SF[known, LIFT + 1] = self.log_popularity_V[row_S[known]] / 8.0 + 1.0
        moments = Moments(
            place_S=torch.from_numpy(place_S),
            owner_S=torch.from_numpy(place_S // slots),
            embedding_S=torch.from_numpy(self.embedding(key_S, row_S)),
            number_SF=torch.from_numpy(number_SF),
            context_EG=torch.from_numpy(context_EG),
            copies_E=torch.from_numpy((key_EC != 0).any(axis=1)),
            follower_EM=torch.from_numpy(np.maximum(follower_EM, 0).astype(np.int64)),
            lift_EM=torch.from_numpy(lift_EM),
            slots=slots,
        )
        return Candidates(key_EC=key_EC, row_EC=row_EC), moments


def _without_gaps(snapshot: Snapshot) -> Snapshot:
    """The same records as if every event had come at once, at the start of time."""
    return replace(
        snapshot,
        ring_gap_ER=np.zeros_like(snapshot.ring_gap_ER),
        last_time_ms_E=np.zeros_like(snapshot.last_time_ms_E),
    )
