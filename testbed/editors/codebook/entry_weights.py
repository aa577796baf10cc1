"""What an entry of a codebook does to one layer: a full copy of its weights, or a low-rank addition to them.

A value is one tensor. Values of a batch are trained together, each on its own rows, on activations that were
kept once; none of them sees another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from testbed.core.timing import timed
from testbed.editors.base import EditFailed
from testbed.editors.codebook.gate import Hits
from testbed.model.handle import as_matrix, project
from testbed.model.suffix import DownProjectionSuffix


class Values(ABC):
    """A family of values for one layer; `weight` is the layer's own, in float32."""

    def __init__(self, module: nn.Module, weight: Tensor) -> None:
        self.module, self.weight = module, weight

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one value."""

    @abstractmethod
    def fresh(self, generator: torch.Generator) -> Tensor:
        """A value that changes nothing yet."""

    @abstractmethod
    def outputs(self, suffix: DownProjectionSuffix, values: Tensor) -> Callable[[Tensor], Tensor]:
        """The layer as a function of the suffix's activations, with each row of the batch under its own value (B, *shape)."""

    @abstractmethod
    def answer(self, hits: Hits, values: Sequence[Tensor]) -> Tensor:
        """(h, T, d) the layer's output for rows that hit, each under its value."""


class FullCopies(Values):
    """The whole matrix, once an entry, as published."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def fresh(self, generator: torch.Generator) -> Tensor:
        return self.weight

    def outputs(self, suffix: DownProjectionSuffix, values: Tensor) -> Callable[[Tensor], Tensor]:
        if len(values) == 1:
            return lambda act: project(self.module, act, values[0])
        return lambda act: torch.stack([project(self.module, a, w) for a, w in zip(act, values)])

    def answer(self, hits: Hits, values: Sequence[Tensor]) -> Tensor:
        return torch.stack([project(self.module, x, w.to(x.device)) for x, w in zip(hits.act, values)])


class LowRank(Values):
    """Two thin matrices U (r, f) and V (r, d) side by side, added to the layer: V^T U x. All rows in two products."""

    def __init__(self, module: nn.Module, weight: Tensor, rank: int) -> None:
        super().__init__(module, weight)
        self.rank = rank
        self.d, self.f = as_matrix(module, weight).shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rank, self.f + self.d

    def fresh(self, generator: torch.Generator) -> Tensor:
        u = torch.randn(self.rank, self.f, generator=generator) / self.f**0.5
        return torch.cat([u, torch.zeros(self.rank, self.d)], 1).to(self.weight.device)

    def outputs(self, suffix: DownProjectionSuffix, values: Tensor) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            own = project(self.module, suffix.act, self.weight)
        return lambda act: own + self._add(act.float(), values).to(own.dtype)

    def _add(self, x: Tensor, values: Tensor) -> Tensor:
        return x @ values[..., : self.f].mT @ values[..., self.f :]

    def answer(self, hits: Hits, values: Sequence[Tensor]) -> Tensor:
        return hits.out + self._add(hits.act.float(), torch.stack(list(values)).to(hits.act.device)).to(hits.out.dtype)


@dataclass(frozen=True)
class Trained:
    """Tuned values (B, *shape) and the last loss of each row, nats a token."""

    values: Tensor
    losses: list[float]


@timed("train")
def train(family: Values, suffix: DownProjectionSuffix, starts: Sequence[Tensor], lr: float, steps: int) -> Trained:
    """Tune the values of a batch with Adam. Raises `EditFailed` on a loss that is not finite."""
    values = torch.stack(list(starts)).to(suffix.act.device, torch.float32).clone().requires_grad_(True)
    adam = torch.optim.Adam([values], lr=lr, fused=True)
    layer = family.outputs(suffix, values)
    losses = torch.zeros(len(starts))
    for _ in range(steps):
        adam.zero_grad()
        losses = suffix.losses(layer)
        if not torch.isfinite(losses).all():
            raise EditFailed(f"the loss became {losses.tolist()} at lr {lr}; try a smaller one")
        losses.sum().backward()
        adam.step()
    return Trained(values.detach(), losses.tolist())
