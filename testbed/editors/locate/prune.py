"""PRUNE (Ma et al. 2024, arXiv 2405.16821): no singular value of a change may outgrow the model's own.

With `Delta = U diag(s) V^T` and `s0` the largest singular value of W_0, values over s0 become
`log_alpha(s) - log_alpha(s0) + s0`. `+prune-naive` restrains the accumulated change `W_N - W_0`, as the paper has it: the
restraint is a view, taken of the whole change each time anew and never fed back, so it cannot be applied twice.
`+prune` restrains the change of each batch and feeds the error into the next solve (`aligned.py`), as OTE-SE does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.ranges import Range
from testbed.core.registry import WRAPPERS
from testbed.editors.base import EditorConfig, WeightEditor, Wrapper
from testbed.editors.locate.aligned import Aligned, AlignedConfig, largest_singular_value


@dataclass(frozen=True)
class PruneConfig(EditorConfig):
    alpha: Annotated[float, Range(above=1)] = math.e
    """Base of the logarithm; smaller ones restrain less."""


@WRAPPERS.register("prune-naive")
class PruneNaive(Wrapper, WeightEditor):
    """Restrains the spectrum of what any weight editor has changed so far."""

    summary = "large singular values of the whole change restrained (PRUNE, naive)"
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
            low = restrained(change, largest_singular_value(self.handle, name, base), self.config.alpha)
            view = weight if low is change else base + low
            self._views[name] = (weight, view)
        return view


@dataclass(frozen=True)
class AlignedPruneConfig(AlignedConfig, PruneConfig):
    """The base of the logarithm, and whether the error is fed back."""


@WRAPPERS.register("prune")
class Prune(Aligned):
    """Restrains the spectrum of each batch's change; what is taken away goes into the next solve."""

    summary = "large singular values of each change restrained and made up for (PRUNE, aligned)"
    Config = AlignedPruneConfig
    former = "prune-naive"

    def _restrained(self, layer: int, change: Tensor) -> Tensor:
        top = largest_singular_value(self.handle, self.deltas.names[layer], self.deltas.base(layer))
        return restrained(change, top, self.config.alpha)


def restrained(change: Tensor, top: float, alpha: float) -> Tensor:
    """`change` with its singular values over `top` on a logarithmic scale; the very tensor where there is none."""
    if float(change.double().norm()) <= top:
        return change
    u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    if float(s[0]) <= top:
        return change
    lower = torch.where(s > top, (s / top).clamp(min=1).log() / math.log(alpha) + top, s)
    return ((u * lower) @ v).to(change.dtype)
