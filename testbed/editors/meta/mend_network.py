"""The network of MEND (equations 2 to 4 in `mend.py`): one a shape of weights, with a scale, an offset and a step size a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from testbed.editors.adapters.lowrank import TargetModule
from testbed.editors.locate.ultraedit import RunningStatistics
from testbed.editors.meta.examples import generator_of
from testbed.editors.meta.gradients import GradientFactors
from testbed.model.handle import ModelHandle

_BLOCKS = 2
_EPSILON = 1e-7
"""Added to deviations, as in the released code."""


@dataclass(frozen=True)
class MendNetwork:
    """tensors: what is trained, by name, float32, on the device of the model's inputs.

        V.SHAPE.k (r, n), U.SHAPE.k (n, r), b.SHAPE.k (n,): block k of the weights of a shape, n = f + d
        s.i.k (n,), o.i.k (n,), alpha.i (): of the i-th weight
    statistics: mean.i (n,) and dev.i (n,) of [u; delta] at the i-th weight over the train edits (equation 2).
    edits_at_once: rows of factors that make one change together. blocks: residual blocks, two as published.
    """

    tensors: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    shapes: tuple[str, ...]
    """Of each weight, "dxf"."""
    edits_at_once: int = 1
    blocks: int = _BLOCKS

    @classmethod
    def fresh(cls, handle: ModelHandle, targets: Sequence[TargetModule], h: Any) -> Self:
        """The identity, with statistics that change nothing. h: hyper-parameters with rank, alpha, train_seed and edits_at_once."""
        tensors, statistics, shapes = identity(targets, h, _BLOCKS)
        own = {name: t.to(handle.device).requires_grad_(True) for name, t in tensors.items()}
        return cls(own, {name: t.to(handle.device) for name, t in statistics.items()}, shapes, h.edits_at_once)

    def normalise_by(self, rows: Sequence[RunningStatistics]) -> None:
        """Put means and deviations of the rows [u; delta] at each weight into equation 2, before the training."""
        for i, of_weight in enumerate(rows):
            self.statistics[f"mean.{i}"].copy_(of_weight.mean)
            self.statistics[f"dev.{i}"].copy_((of_weight.squares / max(of_weight.n - 1, 1)).sqrt() + _EPSILON)

    def pseudo(self, i: int, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """(n, f) and (n, d) pseudo-activations and pseudo-deltas of the i-th weight, from (n, f) and (n, d), by equations 2 and 3."""
        z = (torch.cat([u, delta], -1) - self.statistics[f"mean.{i}"]) / self.statistics[f"dev.{i}"]
        shape, of = self.shapes[i], self.tensors
        for k in range(self.blocks):
            inner = z @ of[f"V.{shape}.{k}"].mT @ of[f"U.{shape}.{k}"].mT + of[f"b.{shape}.{k}"]
            z = z + self.residual(inner, of[f"s.{i}.{k}"], of[f"o.{i}.{k}"])
        return z[..., : u.shape[-1]], z[..., u.shape[-1] :]

    def residual(self, inner: Tensor, s: Tensor, o: Tensor) -> Tensor:
        """(n, f + d) what a block adds to its input, from U V z + b and the weight's own scale and offset."""
        return (s * inner + o).clamp(min=0)  # unlike relu's, its gradient at 0 is 1

    def changed(self, factors: Sequence[GradientFactors]) -> list[tuple[Tensor, Tensor]]:
        """Equation 4 by weight, in factors: left (G, K, f) holds u~, right (G, K, d) holds -alpha delta~, and the change of the
        weight (d, f) for group g is right[g]^T left[g].

        G groups of `edits_at_once` rows each (the last may be smaller). On the weight's device, differentiable by `tensors`.
        """
        return [self._of_weight(i, f) for i, f in enumerate(factors)]

    def _of_weight(self, i: int, factors: GradientFactors) -> tuple[Tensor, Tensor]:
        alpha = self.tensors[f"alpha.{i}"]
        u, delta = (x[factors.kept].to(alpha.device) for x in (factors.u, factors.delta))
        left, right = self.pseudo(i, u, delta)
        both = ((factors.u, left), (factors.delta, -alpha * right))
        return tuple(self._grouped(like, factors.kept, rows.to(like.device)) for like, rows in both)  # type: ignore[return-value]

    def _grouped(self, like: Tensor, kept: Tensor, rows: Tensor) -> Tensor:
        """Rows (n, x) back at their positions in zeros like (B, T, x), and the rows of a group behind one another: (G, k T, x)."""
        full = torch.zeros_like(like)
        full[kept] = rows
        short = -len(full) % self.edits_at_once
        if short:
            full = torch.cat([full, full.new_zeros(short, *full.shape[1:])])
        return full.reshape(-1, self.edits_at_once * full.shape[1], full.shape[2])

    def state(self) -> dict[str, Tensor]:
        """All tensors by name, as a state of the editor holds them."""
        return {f"net.{name}": t.detach() for name, t in {**self.tensors, **self.statistics}.items()}

    def loaded(self, state: Mapping[str, Tensor]) -> Self:
        """The network that `state` gave, for use and not for training."""
        tensors, statistics = ({n: state[f"net.{n}"] for n in of} for of in (self.tensors, self.statistics))
        return self.with_tensors(tensors, statistics)

    def with_tensors(self, tensors: Mapping[str, Tensor], statistics: Mapping[str, Tensor] | None = None) -> Self:
        """With other trained tensors and, where they are given, other statistics."""
        return replace(self, tensors=tensors, statistics=self.statistics if statistics is None else statistics)

    def copy(self) -> Self:
        """The same numbers in leaf tensors of their own, for training."""
        return self.with_tensors({n: t.detach().clone().requires_grad_(True) for n, t in self.tensors.items()})


def identity(targets: Sequence[TargetModule], h: Any, blocks: int) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[str, ...]]:
    """Tensors of a network that changes nothing, statistics that change nothing, and the shape of each weight.

    h: hyper-parameters with rank, alpha and train_seed.
    """
    generator, tensors, statistics = generator_of(h.train_seed, 0), dict[str, Tensor](), dict[str, Tensor]()
    shapes = tuple(f"{t.d}x{t.f}" for t in targets)
    for shape, n in {s: t.d + t.f for s, t in zip(shapes, targets)}.items():
        rank = min(h.rank, n)
        for k in range(blocks):
            tensors[f"V.{shape}.{k}"] = torch.randn(rank, n, generator=generator) / n**0.5
            tensors[f"U.{shape}.{k}"], tensors[f"b.{shape}.{k}"] = torch.zeros(n, rank), torch.zeros(n)
    for i, t in enumerate(targets):
        n = t.d + t.f
        for k in range(blocks):
            tensors[f"s.{i}.{k}"], tensors[f"o.{i}.{k}"] = torch.ones(n), torch.zeros(n)
        tensors[f"alpha.{i}"] = torch.tensor(float(h.alpha))
        statistics[f"mean.{i}"], statistics[f"dev.{i}"] = torch.zeros(n), torch.ones(n)
    return tensors, statistics, shapes
