"""Adapters: a trained network for other users or another shop by few numbers; all else stays as it was.

Beside the way of an event: `driftline pretrain --adapters` and `driftline evaluate --from` train them. What is trained:

    encoder, decoder   W + up . down, of small rank, for the input and the hidden weights of the GRU and of the decoder
    new interests      embedding and bias of every row of the vocabulary that the network did not have yet

`up` starts at 0, so the adapted network starts as the one that it adapts. `merged` gives back a plain Network's
parameters: whoever uses the weights does not see that they were adapted.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from models.gru import Network
from models.optimiser import Optimiser
from models.settings import LearningSettings

_PARTS = ("gru", "decoder")
_NAMES = {"gru": ("weight_ih_l0", "weight_hh_l0"), "decoder": ("weight_ih", "weight_hh")}
_ROWS = ("interest", "bias")


class _LowRank(nn.Module):
    """A frozen recurrent layer with corrections of its two weights."""

    down_input: nn.Parameter
    down_hidden: nn.Parameter
    up_input: nn.Parameter
    up_hidden: nn.Parameter

    def __init__(self, frozen: nn.Module, names: tuple[str, str], rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self._of = names
        for place, name in zip(("input", "hidden"), names, strict=True):
            out, inner = getattr(frozen, name).shape
            self.register_parameter(f"down_{place}", nn.Parameter(torch.randn(rank, inner) * inner**-0.5))
            self.register_parameter(f"up_{place}", nn.Parameter(torch.zeros(out, rank)))

    def weights(self) -> tuple[Tensor, Tensor]:
        """Input and hidden weights, corrected."""
        of_input, of_hidden = (getattr(self.frozen, name) for name in self._of)
        return of_input + self.up_input @ self.down_input, of_hidden + self.up_hidden @ self.down_hidden


class LowRankCell(_LowRank):
    """In place of an nn.GRUCell."""

    def forward(self, x_EI: Tensor, hidden_EH: Tensor) -> Tensor:
        cell = cast(nn.GRUCell, self.frozen)
        return torch.gru_cell(x_EI, hidden_EH, *self.weights(), cell.bias_ih, cell.bias_hh)


class LowRankGru(_LowRank):
    """In place of a one-layer nn.GRU: a packed sequence, or one step as (1, E, I)."""

    def forward(self, x: Any, hidden_1UH: Tensor) -> tuple[Any, Tensor]:
        bias_ih, bias_hh = self.frozen.bias_ih_l0, self.frozen.bias_hh_l0
        if not isinstance(x, PackedSequence):
            after = torch.gru_cell(x[0], hidden_1UH[0], *self.weights(), bias_ih, bias_hh).unsqueeze(0)  # type: ignore[arg-type]
            return after, after
        parameters = [*self.weights(), bias_ih, bias_hh]
        run = cast(Any, torch.gru)
        data, last = run(x.data, x.batch_sizes, hidden_1UH, parameters, True, 1, 0.0, False, False)
        return PackedSequence(data, x.batch_sizes), last


def adapt(network: Network, rank: int, seed: int) -> None:
    """Freeze a network but for adapters of this rank, and for new rows (see `AdapterOptimiser`)."""
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.gru = cast(nn.GRU, LowRankGru(network.gru, ("weight_ih_l0", "weight_hh_l0"), rank))
        network.decoder = cast(nn.GRUCell, LowRankCell(network.decoder, ("weight_ih", "weight_hh"), rank))
    network.to(network.bias.device)
    for name in _ROWS:
        getattr(network, name).requires_grad_(True)


def merged(network: Network) -> dict[str, Tensor]:
    """The parameters of a plain Network that computes the same."""
    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        part, _, rest = name.partition(".")
        if not isinstance(getattr(network, part), _LowRank):
            state[name] = value
        elif rest.startswith("frozen."):
            state[f"{part}.{rest.removeprefix('frozen.')}"] = value
    for part in _PARTS:
        layer = getattr(network, part)
        if isinstance(layer, _LowRank):
            state |= {f"{part}.{n}": w.detach() for n, w in zip(_NAMES[part], layer.weights(), strict=True)}
    return state


class AdapterOptimiser(Optimiser):
    """Trains the adapters, and of the tables of interests only the rows from `first_row` on."""

    def __init__(self, network: Network, learning: LearningSettings, first_row: int) -> None:
        super().__init__(network, learning)
        self._first_row = network.settings.hashed_rows + first_row

    def step(self, boost: float) -> bool:
        for name in _ROWS:
            gradient = getattr(self._network, name).grad
            if gradient is not None and gradient.is_sparse:
                gradient = getattr(self._network, name).grad = gradient.coalesce()
                gradient.values()[gradient.indices()[0] < self._first_row] = 0.0
            elif gradient is not None:
                gradient[: self._first_row] = 0.0
        return super().step(boost)


def trained_share(network: Network, rows: int, first_row: int | None) -> float:
    """Of the numbers in use, how many are trained.

    Args:
        rows: of the vocabulary, in use.
        first_row: as in `AdapterOptimiser`; None: all are.
    """
    width = network.settings.interest_width + 1
    unused = (network.capacity - rows) * width
    plain = sum(t.numel() for t in merged(network).values()) - unused
    if first_row is None:
        return 1.0
    corrections = sum(p.numel() for n, p in network.named_parameters() if p.requires_grad and n not in _ROWS)
    return (corrections + max(0, rows - first_row) * width) / plain
