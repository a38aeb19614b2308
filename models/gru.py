"""The whole network in one file: encoder, copy head, output layer, decoder, loss.

On the way of an event: `encode` brings the users' hidden states up to date; `decode` and `Step` say what comes next.
The probability of an interest at a step is a mixture:

    p(i) = gate * copy(i) + (1 - gate) * (trust * counted(i) + (1 - trust) * trained(i))
    copy(i)      softmax over the user's candidates (ring and slow profile), scored by a small network on what is known
                 of each candidate (models/candidates.py), the state, and the match of the state with its embedding
    counted(i)   what followed the user's last interests, in shares, and popularity (models/successors.py)
    trained(i)   softmax over the vocabulary: state . embedding + bias + log popularity + log lift of what followed

`counted` is a part of its own beside the lift: a softmax spreads what the counts have right where few interests follow.

Whether a user stays with his last interest depends on how the run of it, the pauses and what came before go together: a
hidden layer looks at the moment and the two newest candidates at once, and adds to the score of the last interest, to
the gate and to the trust.

It starts as the recency rule: the copy score is -log(slot) plus terms that start at 0, the gate lets no interest of the
vocabulary pass before a candidate, and all else starts as popularity and what followed. Learning can only add.

Tensors carry their shape; the legend is in models/features.py. Here also:
    C  slots of candidates   S  those in use   F  numbers of one   G  numbers of the moment   M  followers   D  width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as f

from models.candidates import CONTEXT_COUNT, FEATURE_COUNT, FEATURES
from models.features import TYPE_COUNT
from models.inputs import NUMBER_COUNT
from models.profile import HIDDEN
from models.settings import NetworkSettings
from models.snapshot import Weights
from models.successors import SOURCES

TYPE_WIDTH = 8
CROWD_COUNT = 3  # what everybody does with an interest: popular just now, seen lately, share of stays
COUNTED_COUNT = 2 + SOURCES + CROWD_COUNT  # of a candidate: lift, log popularity, lift by each source, the crowd's
CANDIDATE_NUMBERS = FEATURE_COUNT + COUNTED_COUNT
# Of a moment: share of stays at the last interest, of its followers among the candidates, its popularity; what the
# lists of followers leave to all else, and the share of the likeliest follower.
LAST_COUNT = 5
MOMENT_NUMBERS = CONTEXT_COUNT + LAST_COUNT
PAIR_NUMBERS = CANDIDATE_NUMBERS + 2  # of a moment and an interest: not the user's own, share of purchases
BUYER_COUNT = 5  # of a user: what is known of his purchases, see models/purchases.py
STEP_CODES = 8  # steps of the decoder that are told apart
GATE_START = 0.997  # with the copy score -log(slot): no general interest passes the last of 48 candidates
_NEWEST = 2  # candidates that the hidden layer of a moment looks at
_IS_LAST = FEATURES.index("is_last")
NEVER = -30.0  # logarithm of a probability that is none


@dataclass(kw_only=True, slots=True)
class Moments:
    """What is known, beside the state, at E moments of forecast. Candidates are flat: S slots in use, by moment.

    Attributes:
        place_S: where each slot lies in (E, C), flattened: moment * C + slot.
        owner_S: the moment of each slot.
        embedding_S: row of its interest in the embedding table.
        number_SF, context_EG: see models/candidates.py, and behind those what is counted, by models/knowledge.py.
        copies_E: whether there is any candidate.
        follower_EM, extra_EM, base_E: see models/successors.py.
        live_E: 1 where what is counted of the vocabulary is as of that moment, 0 where it is newer.
        slots: C.
    """

    place_S: Tensor
    owner_S: Tensor
    embedding_S: Tensor
    number_SF: Tensor
    context_EG: Tensor
    copies_E: Tensor
    follower_EM: Tensor
    extra_EM: Tensor
    base_E: Tensor
    live_E: Tensor
    slots: int

    def lift(self, log_popularity_V: Tensor) -> Tensor:
        """How much likelier each follower is than what all else leaves it: a logarithm, (E, M)."""
        if not len(log_popularity_V):
            return torch.zeros_like(self.extra_EM)
        usual_EM = torch.exp(log_popularity_V)[self.follower_EM] * self.base_E.unsqueeze(1)
        return torch.log1p(self.extra_EM / usual_EM)

    def newest(self) -> Tensor:
        """What is known of the newest candidates, 0 where there are fewer: (E, _NEWEST * F)."""
        slot_S = self.place_S - self.owner_S * self.slots
        near_S = slot_S < _NEWEST
        count, numbers = len(self.copies_E), self.number_SF.shape[1]
        found = torch.zeros(count * _NEWEST, numbers, dtype=self.number_SF.dtype, device=self.number_SF.device)
        at = (self.owner_S * _NEWEST + slot_S)[near_S]
        return found.index_copy_(0, at, self.number_SF[near_S]).view(count, -1)

    def log_counted(self, at_E: Tensor, row_E: Tensor, log_popularity_V: Tensor) -> Tensor:
        """log p of one interest by what is counted alone.

        Args:
            at_E: the moments that are asked for, one for each interest.
            row_E: rows of the interests in the vocabulary, which is not empty.
        """
        extra_EM = self.extra_EM[at_E] * (self.follower_EM[at_E] == row_E.unsqueeze(1))
        return torch.log(extra_EM.sum(dim=1) + self.base_E[at_E] * torch.exp(log_popularity_V[row_E]))

    def to(self, device: torch.device) -> Moments:
        """The same on a device."""
        moved = {name: getattr(self, name).to(device) for name in self.__slots__ if name != "slots"}
        return Moments(**moved, slots=self.slots)


@dataclass(kw_only=True, slots=True)
class View:
    """What the steps of a forecast share: computed once for all of them, see `Network.view`."""

    moments: Moments
    embedding_SD: Tensor
    inner_SW: Tensor
    rank_S: Tensor
    moment_EW: Tensor
    seen_WX: Tensor  # weights of all layers that look at the state and the moment: one product for all of them

    def after(self, count: int) -> View:
        """Of the moments behind the first ones."""
        moments = self.moments
        slots, whole = slice(int((moments.owner_S < count).sum()), None), slice(count, None)
        return View(
            moments=Moments(
                place_S=moments.place_S[slots] - count * moments.slots,
                owner_S=moments.owner_S[slots] - count,
                embedding_S=moments.embedding_S[slots],
                number_SF=moments.number_SF[slots],
                context_EG=moments.context_EG[whole],
                copies_E=moments.copies_E[whole],
                follower_EM=moments.follower_EM[whole],
                extra_EM=moments.extra_EM[whole],
                base_E=moments.base_E[whole],
                live_E=moments.live_E[whole],
                slots=moments.slots,
            ),
            embedding_SD=self.embedding_SD[slots],
            inner_SW=self.inner_SW[slots],
            rank_S=self.rank_S[slots],
            moment_EW=self.moment_EW[whole],
            seen_WX=self.seen_WX,
        )


@dataclass(kw_only=True, slots=True)
class Step:
    """One step's distribution, but for the output layer. `copy_EC` are log probabilities.

    Attributes:
        log_gate_E, log_rest_E: shares of the copy head and of all else.
        log_counted_E, log_trained_E: of all else, what is counted alone and the output layer.
    """

    state_EH: Tensor
    copy_EC: Tensor
    log_gate_E: Tensor
    log_rest_E: Tensor
    log_counted_E: Tensor
    log_trained_E: Tensor

    def split(self, counts: Sequence[int]) -> list[Step]:
        """So many moments each, one part behind another."""
        parts = [getattr(self, name).split(list(counts)) for name in self.__slots__]
        return [Step(**dict(zip(self.__slots__, part, strict=True))) for part in zip(*parts, strict=True)]

    @staticmethod
    def joined(steps: Sequence[Step]) -> Step:
        """Moments one behind another."""
        return Step(**{name: torch.cat([getattr(step, name) for step in steps]) for name in Step.__slots__})


class Network(nn.Module):
    """See the module's docstring. The tables of interests may grow (models/optimiser.py)."""

    def __init__(self, settings: NetworkSettings, capacity: int) -> None:
        super().__init__()
        self.settings = settings
        width, copy = settings.interest_width, settings.copy_width
        inputs = width + settings.item_width + TYPE_WIDTH + NUMBER_COUNT + settings.vector_length
        self.interest = nn.Parameter(torch.randn(settings.hashed_rows + capacity, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(settings.hashed_rows + capacity))
        self.item = nn.Parameter(torch.randn(settings.item_rows, settings.item_width) * settings.item_width**-0.5)
        self.kind = nn.Parameter(torch.randn(TYPE_COUNT, TYPE_WIDTH) * TYPE_WIDTH**-0.5)
        self.gru = nn.GRU(inputs, HIDDEN)
        self.project = nn.Linear(MOMENT_NUMBERS, 2 * HIDDEN)
        self.copy_number = nn.Linear(CANDIDATE_NUMBERS, copy)
        self.copy_state = nn.Linear(HIDDEN + MOMENT_NUMBERS, copy, bias=False)
        self.copy_score = nn.Linear(copy, 1, bias=False)
        self.copy_rank = nn.Parameter(torch.ones(()))
        self.copy_match = nn.Linear(HIDDEN, width)
        self.gate = nn.Linear(HIDDEN + MOMENT_NUMBERS, 1)
        self.trust = nn.Linear(HIDDEN + MOMENT_NUMBERS, 1)
        self.query = nn.Linear(HIDDEN, width)
        self.crowd = nn.Linear(HIDDEN, CROWD_COUNT)
        self.popularity = nn.Parameter(torch.ones(()))
        self.lift = nn.Parameter(torch.ones(()))
        self.next_type = nn.Linear(HIDDEN + MOMENT_NUMBERS, TYPE_COUNT)
        self.decoder = nn.GRUCell(width + STEP_CODES, HIDDEN)
        self.buy_number = nn.Linear(PAIR_NUMBERS, copy)
        self.buy_state = nn.Linear(HIDDEN + MOMENT_NUMBERS + BUYER_COUNT, copy, bias=False)
        self.buy_score = nn.Linear(copy, 1)
        self.moment_number = nn.Linear(_NEWEST * CANDIDATE_NUMBERS, copy)
        self.moment_state = nn.Linear(HIDDEN + MOMENT_NUMBERS, copy, bias=False)
        self.moment_score = nn.Linear(copy, 3)  # the last interest, the gate, the trust
        with torch.no_grad():
            starts = (
                self.project, self.copy_score, self.moment_score, self.copy_match, self.gate, self.trust, self.query,
                self.crowd, self.next_type, self.buy_score,
            )  # fmt: skip
            for layer in starts:
                layer.weight.zero_()
                if layer.bias is not None:
                    layer.bias.zero_()
            self.gate.bias.fill_(float(torch.logit(torch.tensor(GATE_START))))

    @property
    def capacity(self) -> int:
        """Rows of the embedding that interests of the vocabulary can have."""
        return len(self.bias) - self.settings.hashed_rows

    # ------------------------------------------------------------------ events -> states

    @staticmethod
    def of(weights: Weights, *, copied: bool) -> Network:
        """The network of these weights; where it is not copied it lives in their memory, and must not be trained."""
        network = Network(weights.settings, len(weights.tensors["vocabulary.keys"]))
        found = {n.removeprefix("network."): t for n, t in weights.tensors.items() if n.startswith("network.")}
        state = {n: torch.from_numpy(t.copy() if copied else t) for n, t in found.items()}
        network.load_state_dict(state, assign=not copied)
        return network

    def inputs(self, embedding_B: Tensor, item_B: Tensor, type_B: Tensor, number_BN: Tensor) -> Tensor:
        """What the GRU reads of each event; `number_BN` ends with the content vector, where there is one."""
        return self.inputs_of(f.embedding(embedding_B, self.interest), item_B, type_B, number_BN)

    def inputs_of(self, row_BD: Tensor, item_B: Tensor, type_B: Tensor, number_BN: Tensor) -> Tensor:
        """The same from rows of the table of interests."""
        return torch.cat([row_BD, f.embedding(item_B, self.item), f.embedding(type_B, self.kind), number_BN], dim=-1)

    def encode_packed(self, input_BI: Tensor, batch_sizes_T: Tensor, hidden_UH: Tensor) -> Tensor:
        """States after each event, in packed order (users by falling count, time-major)."""
        packed = torch.nn.utils.rnn.PackedSequence(input_BI, batch_sizes_T)
        out, _last = self.gru(packed, hidden_UH.unsqueeze(0))
        data: Tensor = out.data
        return data

    def encode_last(self, input_BI: Tensor, batch_sizes_T: Tensor, hidden_UH: Tensor) -> Tensor:
        """As `encode_packed`, but the states after the users' last events alone."""
        packed = torch.nn.utils.rnn.PackedSequence(input_BI, batch_sizes_T)
        _out, last = self.gru(packed, hidden_UH.unsqueeze(0))
        after_UH: Tensor = last.squeeze(0)
        return after_UH

    # ------------------------------------------------------------------ states -> what comes next

    def view(self, moments: Moments, embedding_SD: Tensor | None = None) -> View:
        """What all steps have in common; `embedding_SD` where the rows of the table are at hand."""
        return View(
            moments=moments,
            embedding_SD=f.embedding(moments.embedding_S, self.interest) if embedding_SD is None else embedding_SD,
            inner_SW=self.copy_number(moments.number_SF),
            rank_S=self.copy_rank * moments.number_SF[:, 0],
            moment_EW=self.moment_number(moments.newest()),
            seen_WX=torch.cat([layer.weight for layer in (self.copy_state, self.moment_state, self.gate, self.trust)]),
        )

    def at_moment(self, hidden_EH: Tensor, moments: Moments) -> Tensor:
        """The state carried to the moment of the forecast: scaled and shifted by the time gap and its like."""
        scale_EH, shift_EH = self.project(moments.context_EG).chunk(2, dim=-1)
        state_EH: Tensor = hidden_EH * (1.0 + scale_EH) + shift_EH
        return state_EH

    def step(self, state_EH: Tensor, view: View) -> Step:
        """Copy head and gate."""
        moments = view.moments
        owner_S = moments.owner_S
        seen_EG = torch.cat([state_EH, moments.context_EG], dim=-1)
        width = self.settings.copy_width
        copy_EW, moment_EW, gate_E, trust_E = torch.split(f.linear(seen_EG, view.seen_WX), [width, width, 1, 1], dim=-1)
        inner_SW = view.inner_SW + copy_EW.index_select(0, owner_S)
        score_S = self.copy_score(f.silu(inner_SW)).squeeze(-1) - view.rank_S
        score_S = score_S + (view.embedding_SD * self.copy_match(state_EH).index_select(0, owner_S)).sum(dim=-1)
        last_E, opens_E, trusts_E = self.moment_score(f.silu(view.moment_EW + moment_EW)).unbind(dim=-1)
        score_S = score_S + last_E.index_select(0, owner_S) * moments.number_SF[:, _IS_LAST]
        score_EC = torch.full((len(state_EH) * moments.slots,), NEVER, dtype=score_S.dtype, device=score_S.device)
        score_EC = score_EC.index_copy(0, moments.place_S, score_S).view(-1, moments.slots)
        gate_E = gate_E.squeeze(-1) + self.gate.bias + opens_E
        gate_E = torch.where(moments.copies_E, gate_E, torch.full_like(gate_E, NEVER))
        trust_E = trust_E.squeeze(-1) + self.trust.bias + trusts_E
        return Step(
            state_EH=state_EH,
            copy_EC=f.log_softmax(score_EC, dim=-1),
            log_gate_E=f.logsigmoid(gate_E),
            log_rest_E=f.logsigmoid(-gate_E),
            log_counted_E=f.logsigmoid(trust_E),
            log_trained_E=f.logsigmoid(-trust_E),
        )

    def logits(
        self,
        state_EH: Tensor,
        follower_EM: Tensor,
        lift_EM: Tensor,
        live_E: Tensor,
        log_popularity_V: Tensor,
        crowd_VK: Tensor,
    ) -> Tensor:
        """Scores of every interest of the vocabulary by the output layer, (E, V)."""
        first, last = self.settings.hashed_rows, self.settings.hashed_rows + len(log_popularity_V)
        offset_V = self.bias[first:last] + self.popularity * log_popularity_V
        logit_EV = torch.addmm(offset_V, self.query(state_EH), self.interest[first:last].T)
        logit_EV.addmm_(self.crowd(state_EH) * live_E.unsqueeze(-1), crowd_VK.T)  # in place: no copy of (E, V)
        if not len(log_popularity_V):
            return logit_EV
        return logit_EV.scatter_add_(1, follower_EM, self.lift * lift_EM)

    def general(
        self, step: Step, moments: Moments, lift_EM: Tensor, log_popularity_V: Tensor, crowd_VK: Tensor
    ) -> Tensor:
        """Probabilities of every interest of the vocabulary, but for the copy head, (E, V); without gradients.

        Args:
            lift_EM: `moments.lift`, the same at all steps.
        """
        follower_EM = moments.follower_EM
        logit_EV = self.logits(step.state_EH, follower_EM, lift_EM, moments.live_E, log_popularity_V, crowd_VK)
        if not len(log_popularity_V):
            return logit_EV
        p_EV = torch.softmax(logit_EV, dim=-1).mul_(torch.exp(step.log_trained_E).unsqueeze(1))
        counted_E = torch.exp(step.log_counted_E)
        p_EV.addcmul_((counted_E * moments.base_E).unsqueeze(1), torch.exp(log_popularity_V).unsqueeze(0))
        return p_EV.scatter_add_(1, follower_EM, counted_E.unsqueeze(1) * moments.extra_EM)

    def type_logits(self, state_EH: Tensor, context_EG: Tensor) -> Tensor:
        logit_ET: Tensor = self.next_type(torch.cat([state_EH, context_EG], dim=-1))
        return logit_ET

    def purchase_logits(
        self,
        state_EH: Tensor,
        context_EG: Tensor,
        buyer_EU: Tensor,
        owner_P: Tensor,
        number_PF: Tensor,
        prior_P: Tensor,
    ) -> Tensor:
        """Log odds that a user buys an interest within the next events, for pairs of models/purchases.py."""
        seen_EG = self.buy_state(torch.cat([state_EH, context_EG, buyer_EU], dim=-1))
        inner_PW = self.buy_number(number_PF) + seen_EG[owner_P]
        logit_P: Tensor = self.buy_score(f.silu(inner_PW)).squeeze(-1) + prior_P
        return logit_P

    def next_state(self, step: Step, view: View, number: int) -> Tensor:
        """The decoder's state for step `number` (2, 3, ...), from the step before: free running on the expected
        embedding of the copy head, so that no interest has to be chosen."""
        share_EC = torch.exp(step.copy_EC + step.log_gate_E.unsqueeze(-1))
        share_S = share_EC.reshape(-1)[view.moments.place_S]
        expected_ED = torch.zeros(len(share_EC), view.embedding_SD.shape[1], device=share_EC.device)
        expected_ED = expected_ED.index_add(0, view.moments.owner_S, view.embedding_SD * share_S.unsqueeze(-1))
        code = torch.zeros(len(expected_ED), STEP_CODES, device=expected_ED.device)
        code[:, min(number, STEP_CODES) - 1] = 1.0
        state_EH: Tensor = self.decoder(torch.cat([expected_ED, code], dim=-1), step.state_EH)
        return state_EH


def log_general(step: Step, trained_E: Tensor, counted_E: Tensor) -> Tensor:
    """log p of one interest for each moment, but for the copy head, from those of the two parts."""
    return torch.logaddexp(step.log_trained_E + trained_E, step.log_counted_E + counted_E)


def log_probability(step: Step, general_E: Tensor, slot_E: Tensor) -> Tensor:
    """log p of one interest for each moment.

    Args:
        general_E: its log probability but for the copy head (`log_general`), NEVER where it is not in the vocabulary.
        slot_E: its slot among the candidates, -1 where it is none.
    """
    copy_E = step.copy_EC.gather(1, slot_E.clamp(min=0).unsqueeze(1)).squeeze(1)
    copy_E = torch.where(slot_E >= 0, copy_E, torch.full_like(copy_E, NEVER))
    return torch.logaddexp(step.log_gate_E + copy_E, step.log_rest_E + general_E)
