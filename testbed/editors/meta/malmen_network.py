"""The network of MALMEN (Tan et al., ICLR 2024, arXiv 2311.04661), and the normal equations by which it changes a weight.

As MEND's, it turns the two factors of a gradient into pseudo-factors, by blocks in which scale and offset stand behind the maximum:

    z <- z + s * max(0, U V z + b) + o                                                                 (1)

Of a position with input u, gradient delta and [u~ ; delta~] the last z, it asks for a change of the map's output, and the weight
takes the change that comes nearest to what all n positions of a batch ask for, in the sense of a ridge regression:

    v = -alpha <u, u~> delta~                                                                           (2)
    Delta W^T = (K^T K + e^lambda I)^-1 K^T V = K^T (K K^T + e^lambda I)^-1 V                           (3)

with the u as the rows of K (n, f) and the v as the rows of V (n, d). alpha and lambda belong to a weight and are trained.
The numbers of equations are this file's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from testbed.editors.adapters.lowrank import TargetModule
from testbed.editors.locate.ultraedit import RunningStatistics
from testbed.editors.meta.mend_network import MendNetwork, identity
from testbed.model.handle import ModelHandle


@dataclass(frozen=True)
class MalmenNetwork(MendNetwork):
    """tensors: as MEND's, and lambda.i () of the i-th weight, at first 0.

    statistics: as MEND's, and n.i (), the rows that mean and deviation stand on.
    """

    @classmethod
    def fresh(cls, handle: ModelHandle, targets: Sequence[TargetModule], h: Any) -> Self:
        """The identity, with statistics that change nothing. h: hyper-parameters with rank, alpha, blocks and train_seed.

        V is drawn with deviation 1, as in the released code, whatever the width: the published step size belongs to that.
        """
        tensors, statistics, shapes = identity(targets, h, h.blocks)
        own = {name: t * t.shape[1] ** 0.5 if name.startswith("V.") else t for name, t in tensors.items()}
        own |= {f"lambda.{i}": torch.tensor(0.0) for i in range(len(targets))}
        statistics |= {f"n.{i}": torch.tensor(2.0) for i in range(len(targets))}
        leaves = {name: t.to(handle.device).requires_grad_(True) for name, t in own.items()}
        return cls(leaves, {name: t.to(handle.device) for name, t in statistics.items()}, shapes, blocks=h.blocks)

    def residual(self, inner: Tensor, s: Tensor, o: Tensor) -> Tensor:
        return s * inner.clamp(min=0) + o  # unlike relu's, its gradient at 0 is 1

    def normalise_by(self, rows: Sequence[RunningStatistics]) -> None:
        super().normalise_by(rows)
        for i, of_weight in enumerate(rows):
            self.statistics[f"n.{i}"].fill_(of_weight.n)

    def counted(self) -> list[RunningStatistics]:
        """The statistics as they can be gone on with."""
        found = []
        for i in range(len(self.shapes)):
            mean, dev = (self.statistics[f"{name}.{i}"].double() for name in ("mean", "dev"))
            n = round(float(self.statistics[f"n.{i}"]))
            found.append(RunningStatistics(n, mean, dev.square() * (n - 1)))
        return found

    def normalised_by(self, rows: Sequence[RunningStatistics]) -> Self:
        """The same with other statistics."""
        fresh = self.with_tensors(self.tensors, {name: t.clone() for name, t in self.statistics.items()})
        fresh.normalise_by(rows)
        return fresh

    def changes_of(self, keys: Sequence[Tensor], deltas: Sequence[Tensor]) -> list[Tensor]:
        """(d, f) float64 by weight, equations 1 to 3, from u (n, f) and delta (n, d) by weight; differentiable by `tensors`."""
        return [self._change(i, u, delta) for i, (u, delta) in enumerate(zip(keys, deltas))]

    def _change(self, i: int, u: Tensor, delta: Tensor) -> Tensor:
        alpha, ridge = self.tensors[f"alpha.{i}"], self.tensors[f"lambda.{i}"].exp()
        u, delta = u.to(alpha.device), delta.to(alpha.device)
        pseudo_u, pseudo_delta = self.pseudo(i, u, delta)
        values = -alpha * (u * pseudo_u).sum(-1, keepdim=True) * pseudo_delta
        return ridge_change(u, values, ridge)


def ridge_change(keys: Tensor, values: Tensor, ridge: Tensor) -> Tensor:
    """(d, f) float64, equation 3 for keys (n, f) and values (n, d), by the smaller of its two systems."""
    k, v, ridge = keys.double(), values.double(), ridge.double()
    if len(k) <= k.shape[1]:
        return v.mT @ torch.linalg.solve(k @ k.mT + ridge * torch.eye(len(k), dtype=k.dtype, device=k.device), k)
    gram = k.mT @ k + ridge * torch.eye(k.shape[1], dtype=k.dtype, device=k.device)
    return torch.linalg.solve(gram, k.mT @ v).mT
