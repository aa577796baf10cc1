"""Restraints inside the recursion of past keys (OTE-SE, arXiv 2605.26670): what a restraint takes away is made up for.

A restraint R_p of a change (RECT's, PRUNE's) leaves an error that later solves of the naive form never see. Here past keys
count, and the error goes into the next solve, so that the sum of all changes stays near the one ridge solve over all edits:

    C_t = C_{t-1} + K_t K_t^T                          (C_0 = A0)
    Delta_t = (R_t K_t^T - E_{t-1}) C_t^-1             R_p(Delta_t) is added to the weights
    E_t = (R_p(Delta_t) - Delta_t) C_t                 (E_0 = 0)

With R_p = id nothing is left over, and the host is as it stands. E_t is kept in the prior's basis, where C_t is
`rho I + G G^T`: with C_t = M (rho I + G G^T) M^T it is E_t M^-T. Of a restrained change in directions that the prior excludes
(AlphaEdit's) no error is counted, because no later change can make up for it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.editors.base import Editor, EditorConfig, Wrapper, need
from testbed.editors.locate.core import LocateEditor
from testbed.editors.locate.solver import Solution
from testbed.editors.work import Work
from testbed.model.handle import ModelHandle


@dataclass(frozen=True)
class AlignedConfig(EditorConfig):
    feedback: bool = True
    """E_{t-1} goes into the next solve; off: past keys alone (for ablations)."""

    def problems(self) -> list[str]:
        off = not getattr(self, "history", True)
        remedy = "history must be on, for past edits to be aligned with: set history=true, take memit-seq, or take the -naive form"
        return super().problems() + ([remedy] if off else [])


class Aligned(Wrapper, LocateEditor):
    """A host whose changes are restrained, with the error fed back. Subclasses give the restraint."""

    hosts = LocateEditor

    @classmethod
    def over(cls, host: type[Editor], name: str) -> type[Editor]:
        if issubclass(host, LocateEditor) and host._solve is not LocateEditor._solve:  # pyright: ignore[reportPrivateUsage]
            raise TypeError(f"it goes into a ridge solve with past keys, and {host.name} solves otherwise: take the -naive form")
        return super().over(host, name)

    @abstractmethod
    def _restrained(self, layer: int, change: Tensor) -> Tensor:
        """R_p: the change (d, f) of a layer's weight that is made, for the one that was solved for; the very tensor where it is whole."""

    def _prepare(self, pool: TrainPool) -> None:
        super()._prepare(pool)
        self.errors: dict[int, Tensor] = {}

    def work(self, batch: int) -> Work:
        found = super().work(batch)
        return replace(found, state=2 * found.state)

    def _keep(self, layer: int, step: int, solution: Solution, keys: Tensor | None) -> None:
        ridge, change = self._ridge(layer), solution.left.T @ solution.right
        if layer in self.errors:
            change = change - ridge.prior.unwhiten(ridge.divided(self.errors[layer].double()).T).T
        made = self._restrained(layer, change)
        if self.config.feedback:
            left_over = ridge.multiplied(ridge.prior.rewhiten((made - change).T).T)
            self.errors = {**self.errors, layer: left_over.float()}
        self.deltas.add_dense(layer, step, made.to(self.deltas.base(layer).dtype), keys, len(solution.left))

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), **{f"error.{n}": e for n, e in self.errors.items()}}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        names = {n: f"error.{n}" for n in self.deltas.layers if f"error.{n}" in state}
        self.errors = {n: need(state, name, tuple(self.deltas.base(n).shape)).to(self.deltas.base(n).device) for n, name in names.items()}


def largest_singular_value(handle: ModelHandle, name: str, base: Tensor) -> float:
    """Of the unedited weight of this name, computed once a model."""
    tops: dict[str, float] = handle.cache.setdefault("largest singular values", {})
    if name not in tops:
        tops[name] = float(torch.linalg.matrix_norm(base.double(), 2))
    return tops[name]
