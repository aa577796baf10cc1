"""ROME (Meng et al. 2022, arXiv 2202.05262): one edit, one layer, a change of rank one that is met exactly.

`Delta = (v* - W k) u^T / (u^T k)`, `u = C^-1 k`. The released code takes u from the averaged key and the
denominator from the bare prompt's; where the two differ much, a single edit can wreck the model (Yang et al.
2024, arXiv 2406.11263). Here the same key stands everywhere; `compat` brings the released form back for studies of collapse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from testbed.core.events import EditEvent
from testbed.core.registry import EDITORS
from testbed.editors.locate.core import LocateConfig, LocateEditor
from testbed.editors.locate.hyperparameters import Hyper
from testbed.editors.locate.keys import Sweep
from testbed.editors.locate.solver import Moment, Prior, Solution
from testbed.editors.locate.targets import Task, parts_of


@dataclass(frozen=True)
class RomeConfig(LocateConfig):
    layer: int | None = None
    """The layer that is edited."""
    eta: float = 1e-4
    """Added to C's diagonal, as a share of its mean."""
    compat: bool = False
    """The released code's inconsistent keys (averaged for u, bare in the denominator)."""

    def problems(self) -> list[str]:
        return super().problems() + ([] if self.eta >= 0 else [f"eta must be 0 or more, got {self.eta}"])


@EDITORS.register("rome")
class Rome(LocateEditor):
    """Rank-one editing, one fact at a time."""

    summary = "one layer, one fact at a time, met exactly (ROME with consistent keys)"
    Config = RomeConfig

    def _tuned(self, hyper: Hyper) -> Hyper:
        """ROME's own step size and clamp, the latter on the norm of the MLP's output."""
        own: dict[str, Any] = {"layer": self.config.layers[-1] if self.config.layers is not None else hyper.layer}
        own |= {"lr": 0.5} if self.config.lr is None and not hyper.relative else {}
        own |= {"clamp": hyper.clamp_rome} if self.config.clamp is None else {}
        return replace(hyper, **own)

    @property
    def bare_share(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All prompts count alike in the averaged key."""
        return 1 / (1 + self.hyper.contexts)

    def _groups(self, events: list[EditEvent]) -> list[list[EditEvent]]:
        """One by one, whatever the batch: each is met exactly, so a later one may undo part of an earlier."""
        return [[e] for e in events]

    def _stages(self) -> list[tuple[int, ...]]:
        return [(self.hyper.layer,)]

    def _prior(self, layer: int, moment: Tensor) -> Prior:
        return Moment(moment, 1.0, self.config.eta)

    def _unit(self, task: Task, heights: Tensor) -> Tensor:
        """The norm of the MLP's own output: the target is a change of it."""
        return parts_of(task.handle, task.events, task.layer)[1].norm(dim=1)

    def _residual(self, sweep: Sweep, target: Tensor, keys: Tensor) -> Tensor:
        """v* - W k for the key that is solved for."""
        bare = target - sweep.ahead()
        if self.config.compat:
            return bare
        weight = self.changes.weight(self.hyper.layer)
        return bare + (sweep.bare_key - keys).to(weight.dtype) @ weight.T

    def _solve(self, layer: int, keys: Tensor, residual: Tensor, bare: Tensor) -> Solution:
        """The equality-constrained change; `compat` divides by the bare key's share instead of the averaged one's."""
        prior = self.priors[layer]
        u = prior.unwhiten(prior.whiten(keys.double().T)).T
        k = bare if self.config.compat else keys
        return Solution(residual.double(), u / (u * k.double()).sum(1, keepdim=True), 1.0, 1.0, 1.0)
