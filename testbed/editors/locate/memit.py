"""MEMIT (Meng et al. 2023, arXiv 2210.07229): several layers, a ridge weighted by the second moment of general keys.

`Delta = R K^T (lambda C + H + K K^T)^-1`, `R = (Z - Z_cur) / (layers left)`. `memit` is the published form, in
which nothing protects earlier batches (H = 0); `memit-seq` counts past keys too (H = sum K_p K_p^T).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from testbed.core.ranges import NonNegativeFloat, PositiveFloat
from testbed.core.registry import EDITORS
from testbed.editors.hyperparameters import ModelKey, Values
from testbed.editors.locate.core import LocateConfig, LocateEditor, scale_of
from testbed.editors.locate.solver import Prior, SecondMomentPrior

PUBLISHED: dict[ModelKey, Values] = {
    ("gpt2", 48): {"layers": (13, 14, 15, 16, 17), "steps": 20, "lam": 20_000.0},  # GPT2-XL: MEMIT's released configuration
    ("gptj", 28): {"layers": (3, 4, 5, 6, 7, 8)},  # GPT-J-6B: MEMIT's released configuration
    ("llama", 32): {"layers": (4, 5, 6, 7, 8), "lr": 0.1},  # Llama-3-8B: AlphaEdit's released configuration
    ("qwen2", 28): {"layers": (4, 5, 6, 7, 8), "clamp": 4.0, "decay": 1e-3},  # Qwen2.5-7B: EasyEdit's released configuration
}
"""By type and number of layers of the language model."""


@dataclass(frozen=True)
class MemitConfig(LocateConfig):
    lam: PositiveFloat | None = None
    """lambda (mom2_update_weight): weight of the second moment C of general keys."""
    eta: NonNegativeFloat = 1e-4
    """Added to C's diagonal, as a share of its mean, so that a C of deficient rank can be solved."""
    history: bool = False
    """Past keys are constraints too."""


@dataclass(frozen=True)
class MemitSeqConfig(MemitConfig):
    history: bool = True
    """Past keys are constraints too."""


@EDITORS.register("memit")
class Memit(LocateEditor):
    """Mass editing of a transformer's memory, batch after batch."""

    summary = "several layers, ridge weighted by general text, earlier batches unprotected (MEMIT)"
    Config = MemitConfig
    defaults = {**LocateEditor.defaults, "lam": 15_000.0}
    published = PUBLISHED
    derived = {"lam": 2.0}

    @property
    def history(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.config.history

    def _prior(self, layer: int, second_moment: Tensor) -> Prior:
        """A0 = lambda C."""
        return SecondMomentPrior(second_moment, self.hyper.lam * scale_of(self.hyper, second_moment)[0], self.config.eta)


@EDITORS.register("memit-seq")
class MemitSeq(Memit):
    """MEMIT that keeps what it wrote."""

    summary = "MEMIT with past keys as constraints (MEMIT-seq)"
    Config = MemitSeqConfig
