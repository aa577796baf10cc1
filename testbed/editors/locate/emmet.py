"""EMMET (Gupta et al. 2024, arXiv 2403.14236): ROME for a batch; MEMIT on a single layer with another lambda.

`Delta = R (K^T C'^-1 K + lambda_e I)^-1 K^T C'^-1`, `C' = w C + eta I`, which is the ridge with prior `lambda_e C'`.
"""

from __future__ import annotations

from dataclasses import dataclass

from testbed.core.registry import EDITORS
from testbed.editors.hyperparameters import ModelKey, Values
from testbed.editors.locate.memit import Memit, MemitConfig

PUBLISHED: dict[ModelKey, Values] = {
    ("gpt2", 48): {"layer": 17, "steps": 20, "lam": 100.0},  # GPT2-XL: EMMET's released configuration
    ("gptj", 28): {"layer": 5},  # GPT-J-6B: EMMET's released configuration
    ("llama", 32): {"layer": 5, "lr": 0.1},  # Llama-2-7B: EMMET's released configuration
    ("qwen2", 28): {"layer": 5, "clamp": 4.0, "decay": 1e-3},  # Qwen2.5-7B: EasyEdit's configuration
}
"""By type and number of layers of the language model."""


@dataclass(frozen=True)
class EmmetConfig(MemitConfig):
    layer: int | None = None
    """The layer that is edited."""


@EDITORS.register("emmet")
class Emmet(Memit):
    """One layer, one solve, the whole residual."""

    summary = "a single layer, the whole residual at once (EMMET)"
    Config = EmmetConfig
    defaults = {**Memit.defaults, "lam": 0.1}
    published = PUBLISHED
    derived = {"lam": 2.0, "layer": lambda layers: layers[len(layers) // 2]}

    def _stages(self) -> list[tuple[int, ...]]:
        return [(self.hyper.layer,)] if self.config.layers is None else [(n,) for n in self.config.layers]
