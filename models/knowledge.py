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

from models.candidates import CONTEXT_COUNT, FEATURE_COUNT, FEATURES, candidates
from models.features import F32, U32, EventColumns
from models.gru import CANDIDATE_NUMBERS, CROWD_COUNT, MOMENT_NUMBERS, NEVER, Moments
from models.inputs import Normaliser, event_numbers
from models.profile import Snapshot
from models.settings import NetworkSettings
from models.successors import Successors
from models.vocabulary import I32

_IN_RING = FEATURES.index("in_ring")
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
        crowd_VK: how much more popular an interest is just now, how lately it was seen, how often users stay with it;
            scaled to about -1..1.
    """

    settings: NetworkSettings
    find: Callable[[U32], I32]
    popularity_V: F32
    log_popularity_V: F32
    crowd_VK: F32
    successors: Successors
    normaliser: Normaliser

    @staticmethod
    def of(
        settings: NetworkSettings,
        find: Callable[[U32], I32],
        popularity_V: F32,
        crowd_V2: F32,
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
            crowd_VK=_crowd(share_V, crowd_V2, successors.stay_V),
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
        followers = self.successors.look_up(row_EC, self.popularity_V)
        number_SF = np.zeros((len(place_S), CANDIDATE_NUMBERS), np.float32)
        number_SF[:, :FEATURE_COUNT] = number_ECF.reshape(-1, FEATURE_COUNT)[place_S]
        counted_SF = number_SF[:, FEATURE_COUNT:]
        counted_SF[:, 0] = followers.lift_EC.reshape(-1)[place_S] / 4.0
        counted_SF[:, 1] = -3.0
        counted_SF[:, 2:-CROWD_COUNT] = followers.lift_ECS.reshape(len(row_EC) * slots, -1)[place_S] / 4.0
        known = row_S >= 0
        counted_SF[known, 1] = self.log_popularity_V[row_S[known]] / 8.0 + 1.0
        counted_SF[known, -CROWD_COUNT:] = self.crowd_VK[row_S[known]]
        moment_EG = np.zeros((len(row_EC), MOMENT_NUMBERS), np.float32)
        moment_EG[:, :CONTEXT_COUNT] = context_EG
        last_E = row_EC[:, 0]
        known = last_E >= 0
        moment_EG[known, CONTEXT_COUNT] = self.crowd_VK[last_E[known], 2]
        moment_EG[:, CONTEXT_COUNT + 1] = followers.covered_E
        moment_EG[known, CONTEXT_COUNT + 2] = self.log_popularity_V[last_E[known]] / 8.0 + 1.0
        moment_EG[:, CONTEXT_COUNT + 3] = 1.0 + np.log(followers.base_E) / 4.0
        moment_EG[:, CONTEXT_COUNT + 4] = followers.extra_EM.max(axis=1)
        moments = Moments(
            place_S=torch.from_numpy(place_S),
            owner_S=torch.from_numpy(place_S // slots),
            embedding_S=torch.from_numpy(self.embedding(key_S, row_S)),
            number_SF=torch.from_numpy(number_SF),
            context_EG=torch.from_numpy(moment_EG),
            copies_E=torch.from_numpy((key_EC != 0).any(axis=1)),
            follower_EM=torch.from_numpy(np.maximum(followers.row_EM, 0).astype(np.int64)),
            extra_EM=torch.from_numpy(followers.extra_EM),
            base_E=torch.from_numpy(followers.base_E),
            live_E=torch.ones(len(row_EC)),
            slots=slots,
        )
        return Candidates(key_EC=key_EC, row_EC=row_EC), moments


def _crowd(share_V: F32, crowd_V2: F32, stay_V: F32) -> F32:
    """(V, CROWD_COUNT), see `Knowledge`."""
    fast_V, since_V = crowd_V2[:, 0], crowd_V2[:, 1]
    now_V = (fast_V + share_V) / (fast_V.sum() + 1.0)
    stay_V = stay_V[: len(share_V)]
    numbers = [np.clip(np.log(now_V / share_V) / 2.0, -2.0, 2.0), 1.0 - np.log1p(since_V) / 5.0, 2.0 * stay_V - 1.0]
    return np.stack(numbers, axis=1).astype(np.float32)


def _without_gaps(snapshot: Snapshot) -> Snapshot:
    """The same records as if every event had come at once, at the start of time."""
    return replace(
        snapshot,
        ring_gap_ER=np.zeros_like(snapshot.ring_gap_ER),
        last_time_ms_E=np.zeros_like(snapshot.last_time_ms_E),
    )
