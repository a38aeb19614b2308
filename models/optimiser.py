"""The optimiser: row-wise Adagrad with a decaying sum for embeddings, AdamW for all else, and tables that grow.

Gradients are taken at weights that jump about their best place; forecasts are made with their running average, which
lies nearer to it (Polyak and Juditsky 1992), and gradients may be computed beside them. Tables are not averaged: few of
their rows move in a step.

A plain sum of squares drives a row's rate to 0 on an endless stream; here it decays. A table that grows keeps the sums
of its rows; a row that will stand for something else starts anew, weights and sums.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from models.features import I64
from models.gru import Network
from models.settings import LearningSettings

_TABLES = ("interest", "bias", "item")  # rows of the first two stand for interests
_AVERAGE_START = 9.0  # step n moves the average by 9 / (n + 9) of the way at least
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_SUM_START = 1e-5  # sum of squares that every row starts with: rows that see next to no gradient stay where they are


class Optimiser:
    """Owns the training of a Network; `grow` replaces its tables.

    Attributes:
        average: a network of the same tables whose other weights are the running average.
    """

    def __init__(self, network: Network, learning: LearningSettings) -> None:
        self._network = network
        self._learning = learning
        self._sums = {name: _sums_for(getattr(network, name)) for name in _TABLES}
        self._dense: list[nn.Parameter] = [p for n, p in network.named_parameters() if n not in _TABLES]
        tables: dict[int, Any] = {id(table): table for table in (getattr(network, name) for name in _TABLES)}
        self.average: Network = copy.deepcopy(network, tables)
        self._means = [p.data for n, p in self.average.named_parameters() if n not in _TABLES]
        self._moments: dict[Tensor, dict[str, Tensor]] = {}  # AdamW's, of those that ever had a gradient
        self.steps = 0

    def restart(self) -> None:
        """Warm up again from the average, with AdamW's moments as at the start; the sums of the rows stay."""
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self._dense], self._means)
        self._moments.clear()
        self.steps = 0

    def zero(self) -> None:
        """Forget the gradients."""
        for parameter in (*self._dense, *(getattr(self._network, name) for name in _TABLES)):
            parameter.grad = None

    def step(self, boost: float) -> bool:
        """Apply the gradients; False, and nothing is changed, where they are not finite."""
        tables = {n: _whole(g) for n in _TABLES if (g := getattr(self._network, n).grad) is not None}
        square_V = {n: _row_squares(g) for n, g in tables.items()}  # read once, for the norm and for the sums
        gradients = [p.grad for p in self._dense if p.grad is not None]
        norms = [square.sum().sqrt() for square in square_V.values()]
        norm = torch.linalg.vector_norm(torch.stack([*norms, *(torch._foreach_norm(gradients) if gradients else ())]))
        if not torch.isfinite(norm):
            return False
        clip = min(1.0, self._learning.clip / (float(norm) + 1e-6))
        self.steps += 1
        factor = boost * min(1.0, self.steps / max(1, self._learning.warmup_steps))
        if clip < 1.0:
            torch._foreach_mul_(gradients, clip)
        with torch.no_grad():
            self._step_dense(gradients, self._learning.rate * factor)
            for name, gradient in tables.items():
                self._step_rows(name, gradient, square_V[name], clip, factor)
            rate = max(1.0 - self._learning.average_decay, _AVERAGE_START / (self.steps + _AVERAGE_START))
            torch._foreach_lerp_(self._means, [p.data for p in self._dense], rate)
        return True

    def _step_dense(self, gradients: list[Tensor], rate: float) -> None:
        """AdamW, as one operation over all that have a gradient: torch.optim.AdamW takes twice as long around it."""
        parameters: list[Tensor] = [p for p in self._dense if p.grad is not None]
        for p in parameters:
            if p not in self._moments:
                self._moments[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        counts, means, squares = ([self._moments[p][name] for p in parameters] for name in _MOMENTS)
        adamw(
            parameters, gradients, means, squares, [], counts, fused=True, amsgrad=False, maximize=False, lr=rate,
            beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=self._learning.weight_decay,
        )  # fmt: skip

    def _step_rows(self, name: str, gradient: Tensor, square_V: Tensor, clip: float, factor: float) -> None:
        """Row-wise Adagrad. The gradient is still to be scaled by `clip`; `square_V` are its rows' sums of squares."""
        table, sums_V = getattr(self._network, name), self._sums[name]
        width = gradient.numel() // len(gradient)
        if gradient.is_sparse:
            # Rows without a gradient stay where they are, as below; only their sums decay.
            row_R, value_R = gradient.indices()[0], gradient.values()
            sums_V.mul_(self._learning.accumulator_decay)
            sums_V.index_add_(0, row_R, square_V, alpha=clip * clip / width)
            scale_R = self._learning.embedding_rate * factor * clip / (sums_V[row_R] + _SUM_START).sqrt()
            table.index_add_(0, row_R, value_R * scale_R.unsqueeze(1), alpha=-1.0)
            return
        sums_V.mul_(self._learning.accumulator_decay).add_(square_V, alpha=clip * clip / width)
        scale_V = self._learning.embedding_rate * factor * clip / (sums_V + _SUM_START).sqrt()
        table.addcmul_(gradient, scale_V if table.dim() == 1 else scale_V.unsqueeze(1), value=-1.0)

    # ------------------------------------------------------------------ rows of the vocabulary

    def grow(self, rows: int, random: np.random.Generator) -> None:
        """Have room for at least `rows` interests: twice as many as now, or more. Old rows and their sums stay."""
        network = self._network
        capacity = max(64, 2 * network.capacity, rows)
        more = capacity - network.capacity
        fresh = _fresh_rows(more, network.interest, random)
        for name, addition in (("interest", fresh), ("bias", torch.zeros_like(fresh[:, 0]))):
            old = getattr(network, name)
            table = nn.Parameter(torch.cat([old.detach(), addition]))
            sums = _sums_for(table)
            sums[: len(old)] = self._sums[name]
            setattr(network, name, table)
            setattr(self.average, name, table)
            self._sums[name] = sums

    def reset_rows(self, row_R: I64, random: np.random.Generator) -> None:
        """These rows of the vocabulary stand for nothing any more: weights and sums start anew."""
        at = torch.from_numpy(row_R + self._network.settings.hashed_rows).to(self._network.interest.device)
        with torch.no_grad():
            self._network.interest[at] = _fresh_rows(len(row_R), self._network.interest, random)
            self._network.bias[at] = 0.0
        self._sums["interest"][at] = 0.0
        self._sums["bias"][at] = 0.0

    # ------------------------------------------------------------------ bytes

    def to_bytes(self) -> bytes:
        """Sums, moments, steps and the weights that gradients are taken at, as `load` reads them."""
        tensors = {f"sums.{name}": sums.cpu().contiguous() for name, sums in self._sums.items()}
        for i, parameter in enumerate(self._dense):
            tensors[f"dense.{i}"] = parameter.detach().cpu().contiguous()
            for name, value in self._moments.get(parameter, {}).items():
                tensors[f"adam.{i}.{name}"] = value.detach().cpu().contiguous()
        tensors["steps"] = torch.tensor([self.steps])
        return safetensors.torch.save(tensors)

    def load(self, payload: bytes) -> None:
        """Go on where `to_bytes` stood; the network holds the average of then, with at least as many rows."""
        tensors = safetensors.torch.load(payload)
        device = self._network.interest.device
        for name in _TABLES:
            saved = tensors[f"sums.{name}"].to(device)
            rows = min(len(saved), len(self._sums[name]))
            self._sums[name][:rows] = saved[:rows]
        for i, parameter in enumerate(self._dense):
            state: dict[str, Any] = {
                name: tensors[key].to(device)  # the fused AdamW counts its steps on the device too
                for name in _MOMENTS
                if (key := f"adam.{i}.{name}") in tensors
            }
            parameter.data.copy_(tensors[f"dense.{i}"])
            if state:
                self._moments[parameter] = state
        self.steps = int(tensors["steps"][0])


def _whole(gradient: Tensor) -> Tensor:
    """A sparse gradient with each row once."""
    return gradient.coalesce() if gradient.is_sparse else gradient


def _row_squares(gradient: Tensor) -> Tensor:
    """Sum of the squares of each row; of the rows that are there."""
    if gradient.is_sparse:
        gradient = gradient.values()
    return gradient.square() if gradient.dim() == 1 else torch.linalg.vecdot(gradient, gradient)


def _sums_for(table: Tensor) -> Tensor:
    return torch.zeros(len(table), device=table.device)


def _fresh_rows(count: int, like: Tensor, random: np.random.Generator) -> Tensor:
    width = like.shape[1]
    rows: npt.NDArray[np.float32] = random.standard_normal((count, width), np.float32) * np.float32(width**-0.5)
    return torch.from_numpy(rows).to(like.device)
