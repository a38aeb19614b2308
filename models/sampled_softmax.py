"""The softmax over a vocabulary that is too large to be gone through at every gradient step.

On the way of an event: in the learner's loss, in place of the whole output layer. The sum over all interests is

    exp(s of the target) + exp(s of each follower of the moment) + mean over draws k of exp(s_k) / q_k

where the last part stands for all the others: drawn by their popularity q, once for all moments of a step (logQ: each
drawn score is lowered by the log of how often it is expected to be drawn). Target and followers are taken as they are,
never corrected, and where they are drawn they do not count again. The sum is right on average for any q, and followers,
whose scores are far above what popularity says, do not make it noisy.

Source: Bengio and Senecal 2008, Adaptive importance sampling; Yi et al. 2019, Sampling-bias-corrected neural modeling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as f

from models.features import F32, I64
from models.gru import Network

_NONE = -1e9  # score of what does not count


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Rows of the vocabulary that were drawn, each once, in order, and log(times drawn / times expected)."""

    row_K: I64
    log_weight_K: F32

    @staticmethod
    def of(popularity_V: F32, count: int, random: np.random.Generator) -> Draw:
        """`count` draws by popularity; rows of none are never drawn."""
        sums_V = np.cumsum(popularity_V, dtype=np.float64)
        drawn = np.searchsorted(sums_V, random.random(count) * sums_V[-1], side="right")
        row_K, times_K = np.unique(np.minimum(drawn, len(sums_V) - 1), return_counts=True)
        expected_K = count * popularity_V[row_K].astype(np.float64) / sums_V[-1]
        return Draw(row_K=row_K, log_weight_K=np.log(times_K / expected_K).astype(np.float32))


def log_softmax_of(
    network: Network,
    state_EH: Tensor,
    follower_EM: Tensor,
    lift_EM: Tensor,
    live_E: Tensor,
    log_popularity_V: Tensor,
    crowd_VK: Tensor,
    target_E: Tensor,
    draw: Draw,
) -> Tensor:
    """log p of one interest for each moment, by the output layer, with a sum that is sampled.

    Args:
        follower_EM, lift_EM, live_E: as for `Network.logits`; a lift of 0 is no follower.
        target_E: its row in the vocabulary.
    """
    first = network.settings.hashed_rows
    device = state_EH.device
    row_K = torch.from_numpy(draw.row_K).to(device)
    query_ED, crowd_EK = network.query(state_EH), network.crowd(state_EH) * live_E.unsqueeze(-1)
    follows_EM = lift_EM > 0
    own_EX = torch.cat([target_E.unsqueeze(1), follower_EM], dim=1)
    count, slots = own_EX.shape
    # One look-up for all: its gradient is sparse, so nothing is as large as the table.
    embedding_D = f.embedding(torch.cat([own_EX.reshape(-1), row_K]) + first, network.interest, sparse=True)
    own_EXD, drawn_KD = embedding_D[: count * slots].view(count, slots, -1), embedding_D[count * slots :]
    offset = network.bias[first + own_EX] + network.popularity * log_popularity_V[own_EX]
    own_logit_EX = torch.bmm(own_EXD, query_ED.unsqueeze(2)).squeeze(2) + offset
    own_logit_EX = own_logit_EX + torch.bmm(crowd_VK[own_EX], crowd_EK.unsqueeze(2)).squeeze(2)
    is_target_EM = follower_EM == target_E.unsqueeze(1)
    target_lift_E = (lift_EM * is_target_EM).amax(dim=1)
    own_logit_EX = own_logit_EX + network.lift * torch.cat([target_lift_E.unsqueeze(1), lift_EM], dim=1)
    counts_EX = torch.cat([torch.ones_like(is_target_EM[:, :1]), follows_EM & ~is_target_EM], dim=1)
    offset_K = network.bias[first + row_K] + network.popularity * log_popularity_V[row_K]
    drawn_logit_EK = torch.addmm(offset_K, query_ED, drawn_KD.T) + crowd_EK @ crowd_VK[row_K].T
    weighed_EK = drawn_logit_EK + torch.from_numpy(draw.log_weight_K).to(device)
    place_EX = torch.searchsorted(row_K, own_EX).clamp(max=len(row_K) - 1)
    again_EX = (row_K[place_EX] == own_EX) & counts_EX
    taken_EK = torch.zeros(weighed_EK.shape, dtype=torch.bool, device=device)
    moment_E1 = torch.arange(count, device=device).unsqueeze(1)
    taken_EK.view(-1)[(moment_E1 * len(row_K) + place_EX)[again_EX]] = True
    parts = [own_logit_EX.masked_fill(~counts_EX, _NONE), weighed_EK.masked_fill(taken_EK, _NONE)]
    log_p_E: Tensor = own_logit_EX[:, 0] - torch.logsumexp(torch.cat(parts, dim=1), dim=1)
    return log_p_E
