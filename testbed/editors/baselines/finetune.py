"""Fine-tuning of one down-projection, edit after edit: the baseline that every editing paper includes.

`finetune` is plain Adam on the answer's cross-entropy. `finetune-l` adds the constraint of Zhu et al. 2020
(arXiv 2012.00363): no entry of a step's change may exceed epsilon, enforced after each optimiser step
(FT-L in the editing literature).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from streams.base import TrainPool
from testbed.core.events import EditBatch
from testbed.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.base import EditorConfig, WeightEditor, minimise, need
from testbed.model.handle import project
from testbed.model.suffix import DownProjectionSuffix, suffix_from_down_projection


@dataclass(frozen=True)
class FinetuneConfig(EditorConfig):
    layer: int = -1
    """Decoder layer whose down-projection is trained; negative counts from the last."""
    lr: PositiveFloat = 2.5e-3
    """Adam's step size."""
    steps: PositiveInt = 20
    """Optimiser steps a batch; the optimiser starts afresh for each."""
    epsilon: NonNegativeFloat = 0.0
    """Largest change of any weight in one batch (Zhu et al. 2020, L-infinity); 0 is no limit."""


@dataclass(frozen=True)
class ConstrainedConfig(FinetuneConfig):
    epsilon: NonNegativeFloat = 2e-3
    """Largest change of any weight in one batch (Zhu et al. 2020, L-infinity)."""


@EDITORS.register("finetune")
class Finetune(WeightEditor):
    """One layer's down-projection, trained on each batch from where the last one left it."""

    summary = "fine-tunes one down-projection with Adam, edit after edit"
    Config = FinetuneConfig

    def _prepare(self, pool: TrainPool) -> None:
        self.weight_name = self.handle.down_weight(self.config.layer)
        self.weight = self.handle.parameter(self.weight_name).detach().float().clone()

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        asks = [e.ask() for e in batch.events]
        suffix = suffix_from_down_projection(self.handle, asks, [e.target for e in batch.events], self.config.layer)
        self.weight, loss = self._train(suffix)
        return {"loss": loss}

    @timed("train")
    def _train(self, suffix: DownProjectionSuffix) -> tuple[torch.Tensor, float]:
        """The new weight and the last loss (nats a token). Raises `EditFailed` when the loss is not finite."""
        start, module, epsilon = self.weight, self.handle.down(self.config.layer), self.config.epsilon
        weight = start.clone().requires_grad_(True)
        loss = minimise(
            [weight],
            lambda: suffix.losses(lambda act: project(module, act, weight)).mean(),
            self.config.lr,
            self.config.steps,
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
    Config = ConstrainedConfig
