"""PRUNE (Ma et al. 2024, arXiv 2405.16821): no singular value of the accumulated change may outgrow the model's own.

With `Delta_N = W_N - W_0 = U diag(s) V^T` and `s0` the largest singular value of W_0, values over s0 become
`log_alpha(s) - log_alpha(s0) + s0`, and the model answers with `W_0 + U diag(s') V^T`. The restraint is a view: it is
taken of the whole change each time anew and never fed back, so it cannot be applied twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.ranges import Range
from testbed.core.registry import WRAPPERS
from testbed.editors.base import EditorConfig, WeightEditor, Wrapper


@dataclass(frozen=True)
class PruneConfig(EditorConfig):
    alpha: Annotated[float, Range(above=1)] = math.e
    """Base of the logarithm; smaller ones restrain less."""


@WRAPPERS.register("prune")
class Prune(Wrapper, WeightEditor):
    """Restrains the spectrum of what any weight editor has changed so far."""

    summary = "large singular values of the whole change restrained (PRUNE)"
    hosts = WeightEditor
    Config = PruneConfig

    def _prepare(self, pool: TrainPool) -> None:
        super()._prepare(pool)
        self._views: dict[str, tuple[Tensor, Tensor]] = {}

    def edited_weights(self) -> dict[str, Tensor]:
        return {name: self._restrained(name, w) for name, w in super().edited_weights().items()}

    def _restrained(self, name: str, weight: Tensor) -> Tensor:
        """The base plus the restrained change; the result for a change is kept until the next one."""
        base = self.handle.parameter(name).detach().to(weight.dtype)
        seen, view = self._views.get(name, (None, weight))
        if seen is None or not torch.equal(seen, weight):
            change = weight - base
            low = restrained(change, self._top(name, base), self.config.alpha)
            view = weight if low is change else base + low
            self._views[name] = (weight, view)
        return view

    def _top(self, name: str, base: Tensor) -> float:
        """Largest singular value of the base weight, computed once a model."""
        tops: dict[str, Any] = self.handle.cache.setdefault("largest singular values", {})
        if name not in tops:
            tops[name] = float(torch.linalg.matrix_norm(base.double(), 2))
        return tops[name]


def restrained(change: Tensor, top: float, alpha: float) -> Tensor:
    """`change` with its singular values over `top` on a logarithmic scale; the very tensor where there is none."""
    if float(change.double().norm()) <= top:
        return change
    u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    if float(s[0]) <= top:
        return change
    lower = torch.where(s > top, (s / top).clamp(min=1).log() / math.log(alpha) + top, s)
    return ((u * lower) @ v).to(change.dtype)
