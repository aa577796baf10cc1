"""EMMET (Gupta et al. 2024, arXiv 2403.14236): ROME for a batch; MEMIT on a single layer with another lambda.

`Delta = R (K^T C'^-1 K + lambda_e I)^-1 K^T C'^-1`, `C' = w C + eta I`, which is the ridge with prior `lambda_e C'`.
"""

from __future__ import annotations

from dataclasses import dataclass

from testbed.core.registry import EDITORS
from testbed.editors.locate.memit import Memit, MemitConfig


@dataclass(frozen=True)
class EmmetConfig(MemitConfig):
    layer: int | None = None
    """The layer that is edited."""


@EDITORS.register("emmet")
class Emmet(Memit):
    """One layer, one solve, the whole residual."""

    summary = "a single layer, the whole residual at once (EMMET)"
    Config = EmmetConfig

    def _stages(self) -> list[tuple[int, ...]]:
        return [(self.hyper.layer,)] if self.config.layers is None else [(n,) for n in self.config.layers]

    def _lam(self) -> float:
        return self.hyper.lam_emmet if self.config.lam is None else self.config.lam
