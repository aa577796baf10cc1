"""MEMIT (Meng et al. 2023, arXiv 2210.07229): several layers, a ridge weighted by the second moment of general keys.

`Delta = R K^T (lambda C + H + K K^T)^-1`, `R = (Z - Z_cur) / (layers left)`. `memit` is the published form, in
which nothing protects earlier batches (H = 0); `memit-seq` counts past keys too (H = sum K_p K_p^T).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from testbed.core.registry import EDITORS
from testbed.editors.locate.core import LocateConfig, LocateEditor, scale_of
from testbed.editors.locate.solver import Moment, Prior


@dataclass(frozen=True)
class MemitConfig(LocateConfig):
    lam: float | None = None
    """lambda: weight of general keys (mom2_update_weight)."""
    eta: float = 1e-4
    """Added to C's diagonal, as a share of its mean, so that a C of deficient rank can be solved."""
    history: bool = False
    """Past keys are constraints too."""

    def problems(self) -> list[str]:
        out = super().problems()
        if self.lam is not None and not self.lam > 0:
            out.append(f"lam must be positive, got {self.lam}")
        return out + ([] if self.eta >= 0 else [f"eta must be 0 or more, got {self.eta}"])


@dataclass(frozen=True)
class MemitSeqConfig(MemitConfig):
    history: bool = True
    """Past keys are constraints too."""


@EDITORS.register("memit")
class Memit(LocateEditor):
    """Mass editing of a transformer's memory, batch after batch."""

    summary = "several layers, ridge weighted by general text, earlier batches unprotected (MEMIT)"
    Config = MemitConfig

    @property
    def history(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.config.history

    def _lam(self) -> float:
        return self.hyper.lam

    def _prior(self, layer: int, moment: Tensor) -> Prior:
        return Moment(moment, self._lam() * scale_of(self.hyper, moment)[0], self.config.eta)


@EDITORS.register("memit-seq")
class MemitSeq(Memit):
    """MEMIT that keeps what it wrote."""

    summary = "MEMIT with past keys as constraints (MEMIT-seq)"
    Config = MemitSeqConfig
