"""Size and rank of the weight change, because an unbounded norm and a change in few directions precede collapse."""

from __future__ import annotations

import torch
from torch import Tensor

from testbed.core.registry import MONITORS
from testbed.monitors.base import Monitor, View


@MONITORS.register("weights")
class Weights(Monitor):
    """All edited parameters together, as one block-diagonal matrix W = W0 + D. All numbers are absent where none is edited.

    weight_norm: |W|_F. weight_relative: |D|_F / |W0|_F. spectral_norm: the largest singular value of D.
    stable_rank: |D|_F^2 / spectral_norm^2, in [1, rank]; absent while D is 0 or where D is not finite. All in
    float64; the singular value comes from the Gram matrix of the smaller side.
    """

    summary = "norm of the edited weights; norm, largest singular value and stable rank of their change"

    def measure(self, view: View) -> dict[str, float]:
        if not view.weights:
            return {}
        bases = [view.handle.parameter(name).detach().double() for name in view.weights]
        changes = [w.detach().to(b.device).double() - b for w, b in zip(view.weights.values(), bases)]
        moved, start = _norm(changes), _norm(bases)
        out = {"weight_norm": _norm([b + d for b, d in zip(bases, changes)]), "weight_relative": moved / start}
        if all(bool(d.isfinite().all()) for d in changes):
            out["spectral_norm"] = max(map(largest, changes))
            if out["spectral_norm"] > 0:
                out["stable_rank"] = (moved / out["spectral_norm"]) ** 2
        return out


def _norm(matrices: list[Tensor]) -> float:
    home = matrices[0].device  # a model may be split over several
    return float(torch.stack([m.square().sum().to(home) for m in matrices]).sum().sqrt())


def largest(matrix: Tensor) -> float:
    """The largest singular value of a finite float64 tensor (n, ...), read as a matrix with n rows."""
    m = matrix.reshape(len(matrix), -1)
    gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt())
