"""Fine-tuning of one down-projection, edit after edit: the baseline that every editing paper includes.

`finetune` is plain Adam on the answer's cross-entropy. `finetune-l` adds the constraint of Zhu et al. 2020
(arXiv 2012.00363): no entry of a step's change may exceed epsilon, enforced after each optimiser step
(FT-L in the editing literature).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from streams.base import TrainPool
from testbed.core.events import EditBatch
from testbed.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.base import EditorConfig, WeightEditor, minimise, need
from testbed.editors.hyperparameters import (
    GPT2_XL,
    GPT_J,
    LLAMA_2_7B,
    LLAMA_3_8B,
    LLAMA_32_3B,
    MISTRAL_7B,
    QWEN_25_7B,
    SHALLOW,
    PublishedRow,
    Table,
    Values,
)
from testbed.model.handle import project
from testbed.model.packed_linear import packed_layers
from testbed.model.suffix import DownProjectionSuffix, suffix_from_down_projection

_FT: Values = {"lr": 5e-4, "steps": 25}
"""What all published files agree on."""

PUBLISHED: Table = {
    GPT2_XL: PublishedRow("ROME's repository, hparams/FT/gpt2-xl_unconstr.json", {"layer": 1, **_FT}),
    GPT_J: PublishedRow("ROME's repository, hparams/FT/EleutherAI_gpt-j-6B_unconstr.json", {"layer": 21, **_FT}),
    LLAMA_2_7B: PublishedRow("EasyEdit, hparams/FT/llama-7b.yaml", {"layer": 21, **_FT}),
    LLAMA_3_8B: PublishedRow("AlphaEdit's repository, hparams/FT/Llama3-8B.json", {"layer": 21, **_FT}),
    LLAMA_32_3B: PublishedRow("EasyEdit, hparams/FT/llama3.2-3b.yaml", {"layer": 21, **_FT}),
    MISTRAL_7B: PublishedRow("EasyEdit, hparams/FT/mistral-7b.yaml", {"layer": 21, **_FT}),
    QWEN_25_7B: PublishedRow("EasyEdit, hparams/FT/qwen2.5-7b.yaml", {"layer": 27, **_FT}),
}
PUBLISHED_CONSTRAINED: Table = {
    GPT2_XL: PublishedRow("ROME's repository, hparams/FT/gpt2-xl_constr.json", {"layer": 0, "epsilon": 5e-4, **_FT}),
    GPT_J: PublishedRow("ROME's repository, hparams/FT/EleutherAI_gpt-j-6B_constr.json", {"layer": 0, "epsilon": 5e-5, **_FT}),
}


@dataclass(frozen=True)
class FinetuneConfig(EditorConfig):
    layer: int | None = None
    """Decoder layer whose down-projection is trained; negative counts from the last."""
    lr: PositiveFloat | None = None
    """Adam's step size."""
    steps: PositiveInt | None = None
    """Optimiser steps a batch; the optimiser starts afresh for each."""
    epsilon: NonNegativeFloat | None = None
    """Largest change of any weight in one batch (Zhu et al. 2020, L-infinity); 0 is no limit."""
    order: Literal["joint", "depth"] = "joint"
    """Train the edits of a batch together, or one after the other to the end, as papers do whose fine-tuning collapses."""


@EDITORS.register("finetune")
class Finetune(WeightEditor):
    """One layer's down-projection, trained on each batch from where the last one left it."""

    summary = "fine-tunes one down-projection with Adam, edit after edit"
    Config = FinetuneConfig
    published, defaults = PUBLISHED, {"layer": -1, "lr": 2.5e-3, "steps": 20, "epsilon": 0.0}

    def _derived(self) -> Values:
        """The published layer, at two thirds of the depth, and the published step, larger where weights are (narrow models)."""
        depth, lr = self.handle.n_layers, _FT["lr"] * (4096 / self.handle.width) ** 0.5
        return {} if depth < SHALLOW else {**_FT, "layer": round(depth * 21 / 32), "lr": float(f"{lr:.1g}")}

    def _prepare(self, pool: TrainPool) -> None:
        self.weight_name = self.handle.down_weight(self.hyper.layer)
        self.weight = self.handle.parameter(self.weight_name).detach().float().clone()

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        loss = torch.nan
        for events in [batch.events] if self.config.order == "joint" else [(e,) for e in batch.events]:
            asks, targets = [e.ask() for e in events], [e.target for e in events]
            self.weight, loss = self._train(suffix_from_down_projection(self.handle, asks, targets, self.hyper.layer))
        return {"loss": loss}

    @timed("train")
    def _train(self, suffix: DownProjectionSuffix) -> tuple[torch.Tensor, float]:
        """The new weight and the last loss (nats a token). Raises `EditFailed` when the loss is not finite."""
        start, module, epsilon = self.weight, self.handle.down(self.hyper.layer), self.hyper.epsilon
        weight = start.clone().requires_grad_(True)
        with packed_layers(self.handle, suffix.upper.first):
            loss = minimise(
                [weight],
                lambda: suffix.losses(lambda act: project(module, act, weight)).mean(),
                self.hyper.lr,
                self.hyper.steps,
                after_step=(lambda: weight.clamp_(start - epsilon, start + epsilon)) if epsilon else None,
            )
        return weight.detach(), float(loss)

    def edited_weights(self) -> dict[str, torch.Tensor]:
        return {self.weight_name: self.weight}

    def _state(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def _load(self, state: dict[str, Any]) -> None:
        base = self.handle.parameter(self.weight_name)
        self.weight = need(state, "weight", tuple(base.shape)).to(base.device)


@EDITORS.register("finetune-l")
class ConstrainedFinetune(Finetune):
    """Fine-tuning under a bound on how far any weight may move in one batch."""

    summary = "finetune with a bound on each weight's change (Zhu et al. 2020, FT-L)"
    published, defaults = PUBLISHED_CONSTRAINED, {**Finetune.defaults, "epsilon": 2e-3}

    def _derived(self) -> Values:
        """A bound and a step with which SmolLM2 learns some edits: under the published bounds it learns none."""
        found = super()._derived()
        return {**found, "lr": 2e-3, "epsilon": 1e-2} if found else found
