"""MEMIT (Meng et al. 2023, arXiv 2210.07229): several layers, a ridge weighted by the second moment of general keys.

`Delta = R K^T (lambda C + H + K K^T)^-1`, `R = (Z - Z_cur) / (layers left)`. `memit` is the published form, in
which nothing protects earlier batches (H = 0); `memit-seq` counts past keys too (H = sum K_p K_p^T).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from testbed.core.ranges import NonNegativeFloat, PositiveFloat
from testbed.core.registry import EDITORS
from testbed.editors.hyperparameters import (
    GPT2_XL,
    GPT_J,
    LLAMA_2_7B,
    LLAMA_3_8B,
    LLAMA_32_3B,
    MISTRAL_7B,
    QWEN_25_7B,
    PublishedRow,
    Table,
    Values,
)
from testbed.editors.locate.core import LocateConfig, LocateEditor, scale_of
from testbed.editors.locate.solver import Prior, SecondMomentPrior

_EASY: Values = {"layers": (4, 5, 6, 7, 8), "clamp": 4.0, "decay": 1e-3}
"""What EasyEdit's files for MEMIT agree on."""

PUBLISHED: Table = {
    GPT2_XL: PublishedRow("MEMIT's repository, hparams/MEMIT/gpt2-xl.json", {"layers": (13, 14, 15, 16, 17), "steps": 20, "lam": 20_000.0}),
    GPT_J: PublishedRow("MEMIT's repository, hparams/MEMIT/EleutherAI_gpt-j-6B.json", {"layers": (3, 4, 5, 6, 7, 8)}),
    LLAMA_2_7B: PublishedRow("EasyEdit, hparams/MEMIT/llama-7b.yaml", _EASY),
    LLAMA_3_8B: PublishedRow("AlphaEdit's repository, hparams/MEMIT/Llama3-8B.json", {"layers": (4, 5, 6, 7, 8), "lr": 0.1}),
    LLAMA_32_3B: PublishedRow("EasyEdit, hparams/MEMIT/llama3.2-3b.yaml", _EASY),
    MISTRAL_7B: PublishedRow("EasyEdit, hparams/MEMIT/mistral-7b.yaml", _EASY),
    QWEN_25_7B: PublishedRow("EasyEdit, hparams/MEMIT/qwen2.5-7b.yaml", _EASY),
}


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
    relative = {"lam": 2.0}

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
