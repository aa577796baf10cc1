"""RECT (Gu et al. 2024, arXiv 2401.04700): of each change only the entries that are large relative to the weight are kept.

The share `keep` of entries with the largest `|Delta_ij / W_ij|` stays, the rest is dropped, layer by layer and
batch by batch. What is left has no low rank, so the state holds sums, and earlier steps cannot be rebuilt from it.
`+rect` makes up for what was dropped (`aligned.py`); `+rect-naive` drops it for good, as the comparisons of papers do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from testbed.core.ranges import PositiveFraction
from testbed.core.registry import WRAPPERS
from testbed.editors.base import EditorConfig, Wrapper
from testbed.editors.locate.aligned import Aligned, AlignedConfig
from testbed.editors.locate.core import LocateEditor
from testbed.editors.locate.solver import Solution


@dataclass(frozen=True)
class RectConfig(EditorConfig):
    keep: PositiveFraction = 0.4
    """Share of entries that stay (0.2 in the authors' code, 0.4 in AlphaEdit's comparison)."""


@WRAPPERS.register("rect-naive")
class RectNaive(Wrapper, LocateEditor):
    """Sparse changes, by relative size; what is dropped is lost."""

    summary = "only entries that change most relative to the weight, the rest lost (RECT, naive)"
    hosts = LocateEditor
    Config = RectConfig

    def _keep(self, layer: int, step: int, solution: Solution, keys: Tensor | None) -> None:
        change = (solution.left.T @ solution.right).to(self.deltas.base(layer).dtype)
        self.deltas.add_dense(layer, step, sparse(change, self.deltas.weight(layer), self.config.keep), keys, len(solution.left))


@dataclass(frozen=True)
class AlignedRectConfig(AlignedConfig, RectConfig):
    """The share, and whether the error is fed back."""


@WRAPPERS.register("rect")
class Rect(Aligned):
    """Sparse changes, by relative size; what is dropped goes into the next solve."""

    summary = "only entries that change most relative to the weight, the rest made up for (RECT, aligned)"
    Config = AlignedRectConfig
    former = "rect-naive"

    def _restrained(self, layer: int, change: Tensor) -> Tensor:
        return sparse(change, self.deltas.weight(layer), self.config.keep)


def sparse(change: Tensor, weight: Tensor, keep: float) -> Tensor:
    """`change` with all but the `keep` share of entries largest in |change / weight| set to 0; ties stay.

    A weight of exactly 0 counts as infinitely sensitive: its entry stays.
    """
    if keep >= 1:
        return change
    size = change.abs() / weight.abs()
    size = torch.where(change == 0, torch.zeros_like(size), size).flatten()
    count = max(1, round(keep * size.numel()))
    least = size.kthvalue(size.numel() - count + 1).values
    return torch.where(size.reshape(change.shape) >= least, change, torch.zeros_like(change))
