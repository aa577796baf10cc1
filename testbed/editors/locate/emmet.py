"""EMMET (Gupta et al. 2024, arXiv 2403.14236): ROME for a batch; MEMIT on a single layer with another lambda.

`Delta = R (K^T C'^-1 K + lambda_e I)^-1 K^T C'^-1`, `C' = w C + eta I`, which is the ridge with prior `lambda_e C'`.
"""

from __future__ import annotations

from dataclasses import dataclass

from testbed.core.registry import EDITORS
from testbed.editors.hyperparameters import GPT2_XL, GPT_J, LLAMA_2_7B, LLAMA_32_3B, PublishedRow, Table, Values
from testbed.editors.locate.core import middle
from testbed.editors.locate.memit import Memit, MemitConfig

PUBLISHED: Table = {
    GPT2_XL: PublishedRow("EMMET's repository, hparams/EMMET/gpt2-xl.json", {"layer": 17, "steps": 20, "lam": 100.0}),
    GPT_J: PublishedRow("EMMET's repository, hparams/EMMET/EleutherAI_gpt-j-6B.json", {"layer": 5, "lam": 1_000.0}),
    LLAMA_2_7B: PublishedRow("EMMET's repository, hparams/EMMET/llama2-7b.json", {"layer": 5, "clamp": 4.0, "decay": 1e-3}),
    LLAMA_32_3B: PublishedRow("EasyEdit, hparams/EMMET/llama3.2-3b.yaml", {"layer": 5, "clamp": 4.0, "decay": 1e-3, "lam": 10_000.0}),
}
"""lam is emmet_lambda times mom2_update_weight of these files."""


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
    relative = {}
    """lam is small beside C in EMMET (nearly met exactly), so that the published 0.1 stands for every model."""

    def _derived(self) -> Values:
        derived = super()._derived()
        return {**derived, "layer": middle(derived["layers"])}

    def _stages(self) -> list[tuple[int, ...]]:
        return [(self.hyper.layer,)] if self.config.layers is None else [(n,) for n in self.config.layers]
