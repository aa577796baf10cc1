"""REVIVE (ACL 2026, arXiv 2601.11042): no edit may touch the leading singular directions of the unedited weight.

With W_0 = U S V^T and k the fewest directions whose squared singular values hold a share tau of their sum, a change D is written as

    D_safe = (I - U_k U_k^T) D (I - V_k V_k^T) ,        so that U_k^T D_safe = 0 = D_safe V_k .        (1)

D has few rows in factors, L^T R, and keeps them: D_safe = (L (I - U_k U_k^T))^T (R (I - V_k V_k^T)).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from testbed.core.ranges import Fraction
from testbed.core.registry import WRAPPERS
from testbed.editors.base import EditorConfig, Wrapper
from testbed.editors.locate.core import LocateEditor
from testbed.editors.locate.solver import Solution
from testbed.model.handle import ModelHandle


@dataclass(frozen=True)
class ReviveConfig(EditorConfig):
    tau: Fraction = 0.2
    """tau: share of the squared singular values whose directions no edit may touch (the paper's value is not known; 0 is the host)."""


@WRAPPERS.register("revive")
class Revive(Wrapper, LocateEditor):
    """Changes without the leading directions of the unedited weight."""

    summary = "changes outside the leading singular directions of the unedited weight (REVIVE)"
    hosts = LocateEditor
    Config = ReviveConfig

    def _keep(self, layer: int, step: int, solution: Solution, keys: Tensor | None) -> None:
        u, v = leading_directions(self.handle, self.deltas.names[layer], self.deltas.base(layer), self.config.tau)
        left, right = (rows - (rows @ kept) @ kept.T for rows, kept in ((solution.left, u), (solution.right, v)))
        super()._keep(layer, step, replace(solution, left=left, right=right), keys)


def leading_directions(handle: ModelHandle, name: str, base: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """U_k (d, k) and V_k (f, k), float64, of the unedited weight (d, f) of this name; decomposed once a model."""
    kept: dict[str, tuple[Tensor, Tensor, Tensor]] = handle.cache.setdefault("singular vectors", {})
    if name not in kept:
        kept[name] = torch.linalg.svd(base.double(), full_matrices=False)
    u, s, vt = kept[name]
    energy = s.square()
    k = 0 if tau == 0 else min(len(s), int((energy.cumsum(0) < tau * energy.sum()).sum()) + 1)
    return u[:, :k], vt[:k].T
