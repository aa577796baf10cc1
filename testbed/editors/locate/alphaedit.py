"""AlphaEdit (Fang et al. 2024, arXiv 2410.02355): changes confined to directions that general text hardly uses.

P projects onto the eigenvectors of C with small eigenvalues. The paper's
`Delta = R K^T P (K_p K_p^T P + K K^T P + L2 I)^-1` and the released code's
`Delta^T = (P (K K^T + K_p K_p^T) + L2 I)^-1 P K R^T` are one matrix; here it is solved in the n x n form, with
the excluded directions V kept in the place of a dense P.

`shrink` is EvoEdit (arXiv 2510.13851): past keys are no constraint of the solve, and the space shrinks instead,
`P_t = P_{t-1} - Q Q^T` with Q an orthonormal basis of the batch's projected keys `P_{t-1} K_t`. What was written stays exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.ranges import PositiveFloat
from testbed.core.registry import EDITORS
from testbed.editors.base import BadEditor
from testbed.editors.hyperparameters import GPT2_XL, GPT_J, LLAMA_3_8B, QWEN_25_7B, SHALLOW, PublishedRow, Table, Values
from testbed.editors.locate.core import LocateConfig, LocateEditor, scale_of
from testbed.editors.locate.solver import IdentityPrior, NullSpacePrior, Prior, Ridge, ShrinkingRidge
from testbed.model.handle import ModelHandle

PUBLISHED: Table = {
    GPT2_XL: PublishedRow("AlphaEdit's repository, hparams/AlphaEdit/gpt2-xl.json", {"layers": (13, 14, 15, 16, 17), "steps": 20}),
    GPT_J: PublishedRow("AlphaEdit's repository, hparams/AlphaEdit/EleutherAI_gpt-j-6B.json", {"layers": (3, 4, 5, 6, 7, 8)}),
    LLAMA_3_8B: PublishedRow("AlphaEdit's repository, hparams/AlphaEdit/Llama3-8B.json", {"layers": (4, 5, 6, 7, 8), "lr": 0.1}),
    QWEN_25_7B: PublishedRow(
        "EasyEdit, hparams/AlphaEdit/qwen2.5-7b.yaml", {"layers": (4, 5, 6, 7, 8), "clamp": 4.0, "decay": 1e-3, "l2": 1.0}
    ),
}


@dataclass(frozen=True)
class AlphaEditConfig(LocateConfig):
    l2: PositiveFloat | None = None
    """L2: ridge on the allowed directions (the paper writes 1, the released code has 10)."""
    threshold: PositiveFloat | None = None
    """nullspace_threshold: directions of C with a larger eigenvalue are excluded."""
    projector: bool = True
    """Off: nothing is excluded (for ablations)."""
    history: bool = True
    """Off: past keys are not protected (for ablations)."""
    shrink: bool = False
    """Past keys leave the null space in the place of being weighed (EvoEdit); takes the projector and the history."""

    def problems(self) -> list[str]:
        lacks = self.shrink and not (self.projector and self.history)
        return super().problems() + (["shrink takes past keys out of the null space: leave projector and history on"] if lacks else [])


@EDITORS.register("alphaedit")
class AlphaEdit(LocateEditor):
    """Null-space constrained editing with past keys as constraints."""

    summary = "ridge in the null space of general text, past keys protected (AlphaEdit)"
    Config = AlphaEditConfig
    defaults = {**LocateEditor.defaults, "l2": 10.0, "threshold": 2e-2}
    published = PUBLISHED
    relative = {"l2": 0.1, "threshold": 1.0}
    pictures: ClassVar[Values] = {"steps": 200, "lr": 0.2}
    """What differs on a shallow model that is asked about pictures: a search of smaller and more steps finds shorter targets."""
    shows_pictures: bool | None = None
    """Whether the stream's questions show pictures; None as long as no stream is known, and then a model that reads them counts."""

    @property
    def history(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.config.history

    def prepare(self, handle: ModelHandle, pool: TrainPool) -> None:
        self.shows_pictures = any(q.image is not None for q in pool.questions)
        super().prepare(handle, pool)

    def _derived(self) -> Values:
        """Of a shallow model the first layer, which reads a name; halfway up where a picture stands for it, which is read later.

        Both were chosen on seed 7 of the committed model's streams (docs/results/tiny-pictures.yaml).
        """
        derived, depth = super()._derived(), self.handle.n_layers
        shown = self.handle.reads_pictures if self.shows_pictures is None else self.shows_pictures
        return {**derived, **self.pictures, "layers": ((depth - 1) // 2,)} if shown and depth < SHALLOW else derived

    def _prior(self, layer: int, second_moment: Tensor) -> Prior:
        _, squared, mean = scale_of(self.hyper, second_moment)
        rho = self.hyper.l2 * squared
        if not self.config.projector:
            return IdentityPrior(rho)
        basis = excluded_directions(second_moment, self.hyper.threshold * mean)
        if basis.shape[1] == len(second_moment):
            raise BadEditor(f"threshold {self.hyper.threshold} excludes all {len(second_moment)} directions of layer {layer}: raise it")
        return NullSpacePrior(basis, rho)

    def _new_ridge(self, layer: int) -> Ridge:
        prior = self.priors[layer]
        return ShrinkingRidge(prior) if self.config.shrink and isinstance(prior, NullSpacePrior) else super()._new_ridge(layer)


def excluded_directions(second_moment: Tensor, threshold: float) -> Tensor:
    """(f, r) eigenvectors of C (f, f) whose eigenvalue is at least the threshold."""
    values, vectors = torch.linalg.eigh(second_moment.double())
    return vectors[:, values >= threshold]
