"""SGD-EDIT (authors, venue year, arXiv number): plain gradient descent on one down-projection, edit after edit.

Replace this text by one sentence on the method, then by its equation with its number in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import EditBatch
from testbed.core.ranges import PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.base import EditorConfig, WeightEditor, need, require_finite_loss
from testbed.model.handle import project
from testbed.model.suffix import suffix_from_down_projection


@dataclass(frozen=True)
class SgdEditConfig(EditorConfig):
    layer: int = -1
    """Decoder layer whose down-projection is trained; negative counts from the last."""
    lr: PositiveFloat = 0.2
    """eta: step size (paper: give its value and the model)."""
    steps: PositiveInt = 40
    """T: steps a batch of edits (paper: give its value)."""


@EDITORS.register("sgd-edit")
class SgdEdit(WeightEditor):
    """One weight matrix, moved down the gradient of the answers' loss."""

    summary = "plain gradient descent on one down-projection (template)"
    Config = SgdEditConfig

    def _prepare(self, pool: TrainPool) -> None:
        """Make the state before the first edit. The model's own weights are never written."""
        self.weight_name = self.handle.down_weight(self.config.layer)
        self.weight = self.handle.parameter(self.weight_name).detach().float().clone()

    @timed("train")
    def _edit(self, batch: EditBatch) -> dict[str, float]:
        """Make the edits of one step, all together. What is returned stands in the report of the step."""
        asks, targets = [e.ask() for e in batch.events], [e.target for e in batch.events]
        suffix = suffix_from_down_projection(self.handle, asks, targets, self.config.layer)
        module, weight, loss = self.handle.down(self.config.layer), self.weight, torch.zeros(())
        for _ in range(self.config.steps):
            weight = weight.detach().requires_grad_(True)
            loss = suffix.losses(lambda act, w=weight: project(module, act, w)).mean()
            require_finite_loss(loss, self.config.lr)
            (gradient,) = torch.autograd.grad(loss, weight)
            weight = weight - self.config.lr * gradient
        self.weight = weight.detach()
        return {"loss": float(loss.detach())}

    def edited_weights(self) -> dict[str, Tensor]:
        return {self.weight_name: self.weight}

    def _state(self) -> dict[str, Any]:
        """Tensors and JSON values that make the editor again. A tensor is replaced, never changed in place."""
        return {"weight": self.weight}

    def _load(self, state: dict[str, Any]) -> None:
        base = self.handle.parameter(self.weight_name)
        self.weight = need(state, "weight", tuple(base.shape)).to(base.device)
