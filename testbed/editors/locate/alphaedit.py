"""AlphaEdit (Fang et al. 2024, arXiv 2410.02355): changes confined to directions that general text hardly uses.

P projects onto the eigenvectors of C with small eigenvalues. The paper's
`Delta = R K^T P (K_p K_p^T P + K K^T P + L2 I)^-1` and the released code's
`Delta^T = (P (K K^T + K_p K_p^T) + L2 I)^-1 P K R^T` are one matrix; here it is solved in the n x n form, with
the excluded directions V kept in the place of a dense P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from testbed.core.registry import EDITORS
from testbed.editors.base import BadEditor
from testbed.editors.locate.core import LocateConfig, LocateEditor, scale_of
from testbed.editors.locate.solver import Identity, NullSpace, Prior


@dataclass(frozen=True)
class AlphaEditConfig(LocateConfig):
    l2: float | None = None
    """L2: ridge on the allowed directions (the paper writes 1, the code has 10)."""
    threshold: float | None = None
    """nullspace_threshold: directions with a larger eigenvalue of C are excluded."""
    projector: bool = True
    """Off: nothing is excluded (for ablations)."""
    history: bool = True
    """Off: past keys are not protected (for ablations)."""

    def problems(self) -> list[str]:
        named = {"l2": self.l2, "threshold": self.threshold}
        return super().problems() + [f"{k} must be positive, got {v}" for k, v in named.items() if v is not None and not v > 0]


@EDITORS.register("alphaedit")
class AlphaEdit(LocateEditor):
    """Null-space constrained editing with past keys as constraints."""

    summary = "ridge in the null space of general text, past keys protected (AlphaEdit)"
    Config = AlphaEditConfig

    @property
    def history(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.config.history

    def _prior(self, layer: int, moment: Tensor) -> Prior:
        _, squared, mean = scale_of(self.hyper, moment)
        rho = self.hyper.l2 * squared
        if not self.config.projector:
            return Identity(rho)
        basis = excluded(moment, self.hyper.threshold * mean)
        if basis.shape[1] == len(moment):
            raise BadEditor(f"threshold {self.hyper.threshold} excludes all {len(moment)} directions of layer {layer}: raise it")
        return NullSpace(basis, rho)


def excluded(moment: Tensor, threshold: float) -> Tensor:
    """(f, r) eigenvectors of C (f, f) whose eigenvalue is at least the threshold."""
    values, vectors = torch.linalg.eigh(moment.double())
    return vectors[:, values >= threshold]
