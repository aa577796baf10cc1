"""Entry weights: the weights under which an entry of a codebook runs one layer, a full copy or a low-rank addition.

The weights of an entry are one tensor. Those of a batch of edits are trained together, each on the rows of its own
edit, on activations that are computed once; none of them depends on another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from testbed.core.timing import timed
from testbed.editors.base import minimise
from testbed.editors.codebook.gate import Hits
from testbed.model.handle import as_matrix, project
from testbed.model.suffix import DownProjectionSuffix


class FullCopyWeights:
    """A copy of the whole matrix of a layer for each entry, as published. weight: the layer's own, float32."""

    def __init__(self, module: nn.Module, weight: Tensor) -> None:
        self.module, self.weight = module, weight
        self.shape = tuple(weight.shape)
        """Shape of the weights of one entry."""

    def fresh(self, generator: torch.Generator) -> Tensor:
        """Weights that change nothing yet."""
        return self.weight

    def outputs(self, suffix: DownProjectionSuffix, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """The layer as a function of the suffix's activations, with each row of the batch under its own weights (B, *shape)."""
        if len(weights) == 1:
            return lambda act: project(self.module, act, weights[0])
        return lambda act: torch.stack([project(self.module, a, w) for a, w in zip(act, weights)])

    def answer(self, hits: Hits, weights: Sequence[Tensor]) -> Tensor:
        """(h, T, d) the layer's output for rows that hit, each under its entry's weights."""
        return torch.stack([project(self.module, x, w.to(x.device)) for x, w in zip(hits.act, weights)])


class LowRankWeights:
    """Two thin matrices U (r, f) and V (r, d) side by side, whose product V^T U x is added to the layer's output."""

    def __init__(self, module: nn.Module, weight: Tensor, rank: int) -> None:
        self.module, self.weight = module, weight
        d, self.f = as_matrix(module, weight).shape
        self.shape = rank, self.f + d

    def fresh(self, generator: torch.Generator) -> Tensor:
        """U from a normal distribution of variance 1/f, V zero: weights that change nothing yet."""
        rank, width = self.shape
        u = torch.randn(rank, self.f, generator=generator) / self.f**0.5
        return torch.cat([u, torch.zeros(rank, width - self.f)], 1).to(self.weight.device)

    def outputs(self, suffix: DownProjectionSuffix, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """As for full copies; all rows in two products."""
        with torch.no_grad():
            own = project(self.module, suffix.act, self.weight)
        return lambda act: own + self._add(act.float(), weights).to(own.dtype)

    def _add(self, x: Tensor, weights: Tensor) -> Tensor:
        return x @ weights[..., : self.f].mT @ weights[..., self.f :]

    def answer(self, hits: Hits, weights: Sequence[Tensor]) -> Tensor:
        """As for full copies."""
        return hits.out + self._add(hits.act.float(), torch.stack(list(weights)).to(hits.act.device)).to(hits.out.dtype)


EntryWeights = FullCopyWeights | LowRankWeights


@timed("train")
def train(form: EntryWeights, suffix: DownProjectionSuffix, starts: Sequence[Tensor], lr: float, steps: int) -> tuple[Tensor, list[float]]:
    """Entry weights (B, *shape) of a batch, trained with Adam, and the last loss of each edit, nats a token.

    Raises `EditFailed` on a loss that is not finite.
    """
    weights = torch.stack(list(starts)).to(suffix.act.device, torch.float32).clone().requires_grad_(True)
    layer = form.outputs(suffix, weights)
    losses = minimise([weights], lambda: suffix.losses(layer), lr, steps, fused=True)
    return weights.detach(), losses.tolist()
