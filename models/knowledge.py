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
from models.gru import NEVER, Moments
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

    def moments(self, snapshot: Snapshot, gap_s_E: F32 | None) -> tuple[U32, Moments]:
        """Keys of the candidates (E, C), 0 = no candidate, and what the network reads of the moments.

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
        row_EC = self.find(key_EC.reshape(-1)).reshape(key_EC.shape)
        follower_EM, lift_EM, lift_EC = self.successors.look_up(row_EC, self.popularity_V)
        log_popularity_EC = np.full(row_EC.shape, NEVER / 10.0, np.float32)
        if len(self.log_popularity_V):
            log_popularity_EC = np.where(row_EC >= 0, self.log_popularity_V[row_EC], NEVER / 3.0)
        number_ECF = np.concatenate(
            [number_ECF, lift_EC[:, :, None] / 4.0, log_popularity_EC[:, :, None].astype(np.float32) / 8.0 + 1.0],
            axis=2,
        )
        moments = Moments(
            embedding_EC=torch.from_numpy(self.embedding(key_EC, row_EC)),
            row_EC=torch.from_numpy(row_EC),
            used_EC=torch.from_numpy(key_EC != 0),
            number_ECF=torch.from_numpy(number_ECF),
            context_EG=torch.from_numpy(context_EG),
            follower_EM=torch.from_numpy(follower_EM.astype(np.int64)),
            lift_EM=torch.from_numpy(lift_EM),
        )
        return key_EC, moments


def _without_gaps(snapshot: Snapshot) -> Snapshot:
    """The same records as if every event had come at once, at the start of time."""
    return replace(
        snapshot,
        ring_gap_ER=np.zeros_like(snapshot.ring_gap_ER),
        last_time_ms_E=np.zeros_like(snapshot.last_time_ms_E),
    )
