"""Sequence networks of others, as baselines: trained on what came first, then asked event by event.

Beside the way of an event: only `driftline evaluate` runs them. Small versions of ours in torch, after their papers:

    lstm      the textbook's: embedding 64, LSTM 64, dropout .2, dense softmax; Adam 1e-3
    gru4rec   Hidasi and Karatzoglou 2018: GRU 100, input and output share the embedding, cross-entropy against 2,048
              extra negative samples drawn by popularity^.75 (corrected by logQ), Adagrad .05
    sasrec    Kang and McAuley 2018: self-attention over the last 50 events, 2 blocks, width 50, shared embedding,
              dropout .2, Adam 1e-3; with cross-entropy over all interests, which is stronger than the paper's loss

The number of epochs is chosen on the last tenth of the training part (in time), then all of it is trained on anew.
Their states follow every event; their weights stay as they are until `train` is called again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from models.baselines import Numbers, Scores, Seen

WINDOW = 50  # events of a user that are trained on as one sequence
EPOCHS_MAX = 20
PATIENCE = 2  # epochs without a better loss before it stops
HELD_OUT = 0.1
BATCH = 32  # sequences
STEPS_MIN = 8  # of an epoch: few events are gone over several times
EVENTS_MAX = 300_000  # trained on, the newest
SAMPLES = 2_048
ALL_MAX = 5_000  # interests; the loss of every model is sampled beyond
_NOWHERE = -100  # target of a padded place


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How one of them is built and trained. `tied`: input and output share the embedding."""

    kind: str
    width: int
    dropout: float
    rate: float
    adagrad: bool = False
    tied: bool = True
    sampled: bool = False


RECIPES = {
    "lstm": Recipe(kind="lstm", width=64, dropout=0.2, rate=1e-3, tied=False),
    "gru4rec": Recipe(kind="gru", width=100, dropout=0.0, rate=0.05, adagrad=True, sampled=True),
    "sasrec": Recipe(kind="attention", width=50, dropout=0.2, rate=1e-3),
}


class SequenceNetwork(nn.Module):
    """Interests in, states out; one row of the tables stands for padding."""

    def __init__(self, recipe: Recipe, interests: int) -> None:
        super().__init__()
        width = recipe.width
        self.recipe = recipe
        self.embedding = nn.Embedding(interests + 1, width, padding_idx=interests)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.output = self.embedding if recipe.tied else nn.Embedding(interests + 1, width)
        self.bias = nn.Parameter(torch.zeros(interests + 1))
        self.dropout = nn.Dropout(recipe.dropout)
        if recipe.kind == "attention":
            self.place = nn.Embedding(WINDOW, width)
            nn.init.normal_(self.place.weight, std=width**-0.5)
            self.blocks = nn.ModuleList(_Block(width, recipe.dropout) for _ in range(2))
            self.norm = nn.LayerNorm(width)
        else:
            self.cell: Any = (nn.LSTM if recipe.kind == "lstm" else nn.GRU)(width, width, batch_first=True)

    def states(self, interest_BT: Tensor) -> Tensor:
        """State after each event, (B, T, W)."""
        x_BTW = self.embedding(interest_BT)
        if self.recipe.kind != "attention":
            out_BTW: Tensor = self.dropout(self.cell(x_BTW)[0])
            return out_BTW
        steps = interest_BT.shape[1]
        x_BTW = self.dropout(x_BTW * self.recipe.width**0.5 + self.place.weight[:steps])
        hidden_TT = torch.triu(torch.ones(steps, steps, dtype=torch.bool), diagonal=1)
        for block in self.blocks:
            x_BTW = block(x_BTW, hidden_TT)
        normed: Tensor = self.norm(x_BTW)
        return normed


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1, dropout=dropout, batch_first=True)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.forward_part = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.Dropout(dropout)
        )

    def forward(self, x_BTW: Tensor, hidden_TT: Tensor) -> Tensor:
        query_BTW = self.first(x_BTW)
        x_BTW = x_BTW + self.attention(query_BTW, x_BTW, x_BTW, attn_mask=hidden_TT, need_weights=False)[0]
        out_BTW: Tensor = x_BTW + self.forward_part(self.second(x_BTW))
        return out_BTW


class SequenceModel:
    """A Ranker that has to be trained: see the module's docstring."""

    is_probability = True

    def __init__(self, users: int, interests: int, recipe: Recipe, seed: int) -> None:
        self._recipe, self._users, self._interests, self._seed = recipe, users, interests, seed
        self._events: list[tuple[int, int]] = []  # user, interest
        self._own: list[list[int]] = [[] for _ in range(users)]
        self._state: list[Any] = [None] * users  # of the recurrent ones
        self._network: SequenceNetwork | None = None
        self._known = np.zeros(interests, np.bool_)

    def update(self, event: Seen) -> None:
        """Follow the stream; nothing is learned."""
        self._events.append((event.user, event.interest))
        own = self._own[event.user]
        own.append(event.interest)
        if len(own) > 4 * WINDOW:
            del own[: 2 * WINDOW]
        if self._network is not None and self._recipe.kind != "attention":
            with torch.inference_mode():
                self._step(event.user, [event.interest])

    def rank(self, user: int, time_ms: int) -> Scores:
        """Probabilities; 0 for what was not there when the model was trained."""
        network = self._network
        if network is None:
            return np.zeros(self._interests)
        with torch.inference_mode():
            state_W = self._state_of(user)
            logit_I = (network.output.weight @ state_W + network.bias)[: self._interests]
            logit_I[~torch.from_numpy(self._known)] = -torch.inf
            scores: Scores = torch.softmax(logit_I, dim=0).numpy().astype(np.float64)
        return scores

    def train(self) -> None:
        """Learn from all events so far, from scratch, and bring the users' states up to date."""
        events = np.array(self._events[-EVENTS_MAX:], np.int64).reshape(-1, 2)
        self._known = np.bincount(events[:, 1], minlength=self._interests) > 0
        cut = int(len(events) * (1 - HELD_OUT))
        trainer = _Trainer(self._recipe, self._interests, self._seed, self._known)
        epochs = trainer.epochs(events, cut)
        self._network = trainer.train(sequences(events), epochs)
        self._network.eval()
        self._state = [None] * self._users
        if self._recipe.kind != "attention":
            with torch.inference_mode():
                for user, own in enumerate(self._own):
                    if own:
                        self._step(user, own)

    def copied(self) -> SequenceModel:
        """One more that stands where this one stands."""
        return copy.deepcopy(self)

    def _step(self, user: int, interests: list[int]) -> None:
        assert self._network is not None
        x_1TW = self._network.embedding(torch.tensor([interests]))
        out_1TW, hidden = self._network.cell(x_1TW, None if self._state[user] is None else self._state[user][1])
        self._state[user] = (out_1TW[0, -1], hidden)

    def _state_of(self, user: int) -> Tensor:
        assert self._network is not None
        if self._recipe.kind != "attention":
            state = self._state[user]
            return torch.zeros(self._recipe.width) if state is None else state[0]
        own = self._own[user][-WINDOW:]
        if not own:
            return torch.zeros(self._recipe.width)
        return self._network.states(torch.tensor([own]))[0, -1]


def sequences(events: Numbers, first_target: int = 0) -> list[tuple[list[int], list[int]]]:
    """(interests, targets) of at most WINDOW places, cut from each user's events from their end.

    Args:
        events: (E, 2) of user and interest, in order.
        first_target: earlier events are no targets.
    """
    of_user: dict[int, list[tuple[int, int]]] = {}
    for number, (user, interest) in enumerate(events.tolist()):
        of_user.setdefault(user, []).append((interest, number))
    found = []
    for own in of_user.values():
        for end in range(len(own), 1, -WINDOW):
            part = own[max(0, end - WINDOW - 1) : end]
            targets = [interest if number >= first_target else _NOWHERE for interest, number in part[1:]]
            if any(t != _NOWHERE for t in targets):
                found.append(([interest for interest, _ in part[:-1]], targets))
    return found


class _Trainer:
    def __init__(self, recipe: Recipe, interests: int, seed: int, known_I: npt.NDArray[np.bool_]) -> None:
        self._recipe, self._interests, self._seed = recipe, interests, seed
        self._known = torch.from_numpy(known_I)
        self._sampled = recipe.sampled or interests > ALL_MAX

    def epochs(self, events: Numbers, cut: int) -> int:
        """How many epochs over the first events make the loss on the later ones the smallest."""
        held_out = sequences(events, first_target=cut)
        if not held_out or cut < 2:
            return EPOCHS_MAX // 2
        best, best_loss = 1, np.inf
        for epoch, network in enumerate(self._passes(sequences(events[:cut]), EPOCHS_MAX), 1):
            network.eval()
            with torch.inference_mode():
                parts = [self._loss(network, x, y, None) for x, y in self._batches(held_out, None)]
            network.train()
            loss = float(torch.stack([p * n for p, n in parts]).sum()) / max(1, sum(n for _, n in parts))
            if loss < best_loss - 1e-4:
                best, best_loss = epoch, loss
            elif epoch - best >= PATIENCE:
                break
        return best

    def train(self, data: list[tuple[list[int], list[int]]], epochs: int) -> SequenceNetwork:
        passes = list(self._passes(data, epochs))  # each yields the same network, further on
        return passes[-1] if passes else self._fresh()

    def _fresh(self) -> SequenceNetwork:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            return SequenceNetwork(self._recipe, self._interests)

    def _passes(self, data: list[tuple[list[int], list[int]]], epochs: int) -> Iterator[SequenceNetwork]:
        network, random = self._fresh(), np.random.Generator(np.random.PCG64(self._seed))
        if not data:
            return
        optimiser: Any = (
            torch.optim.Adagrad(network.parameters(), lr=self._recipe.rate)
            if self._recipe.adagrad
            else torch.optim.Adam(network.parameters(), lr=self._recipe.rate)
        )
        weight = np.bincount([t for _, targets in data for t in targets if t >= 0], minlength=self._interests) ** 0.75
        share_I = weight / weight.sum()
        rounds = -(-STEPS_MIN * BATCH // len(data)) if len(data) < STEPS_MIN * BATCH else 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            for _ in range(epochs):
                for interest_BT, target_BT in chain(*(self._batches(data, random) for _ in range(rounds))):
                    sample = None
                    if self._sampled:
                        chosen = random.choice(self._interests, SAMPLES, p=share_I)
                        sample = (torch.from_numpy(chosen), torch.from_numpy(np.log(share_I[chosen] * SAMPLES)).float())
                    optimiser.zero_grad(set_to_none=True)
                    loss, _count = self._loss(network, interest_BT, target_BT, sample)
                    loss.backward()  # type: ignore[no-untyped-call]
                    nn.utils.clip_grad_norm_(network.parameters(), 5.0)
                    optimiser.step()
                yield network

    def _batches(
        self, data: list[tuple[list[int], list[int]]], random: np.random.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.arange(len(data)) if random is None else random.permutation(len(data))
        for start in range(0, len(order), BATCH):
            chosen = [data[i] for i in order[start : start + BATCH].tolist()]
            steps = max(len(x) for x, _ in chosen)
            interest_BT = np.full((len(chosen), steps), self._interests, np.int64)
            target_BT = np.full((len(chosen), steps), _NOWHERE, np.int64)
            for b, (x, y) in enumerate(chosen):
                interest_BT[b, : len(x)], target_BT[b, : len(y)] = x, y  # behind the padding nothing looks back
            yield torch.from_numpy(interest_BT), torch.from_numpy(target_BT)

    def _loss(
        self, network: SequenceNetwork, interest_BT: Tensor, target_BT: Tensor, sample: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, int]:
        there_BT = target_BT != _NOWHERE
        state_PW = network.states(interest_BT)[there_BT]
        target_P = target_BT[there_BT]
        if sample is None:
            logit_PI = state_PW @ network.output.weight[: self._interests].T + network.bias[: self._interests]
            logit_PI = logit_PI.masked_fill(~self._known, -1e9)
            return f.cross_entropy(logit_PI, target_P), len(target_P)
        negative_S, log_q_S = sample
        table, bias = network.output.weight, network.bias
        positive_P = (state_PW * table[target_P]).sum(1) + bias[target_P]
        logit_PS = state_PW @ table[negative_S].T + bias[negative_S] - log_q_S
        logit_PS = logit_PS.masked_fill(negative_S == target_P[:, None], -1e9)
        logit_P1S = torch.cat([positive_P[:, None], logit_PS], dim=1)
        return f.cross_entropy(logit_P1S, torch.zeros(len(target_P), dtype=torch.int64)), len(target_P)
