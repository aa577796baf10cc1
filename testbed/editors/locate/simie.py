"""SimIE (Simulating Ideal Editor, ICML 2025): a sequence of edits ends where one solve over all of them would.

Of the change D that the host solves for, only what it does at the edits' keys K is taken, and written by recursive least squares:

    P_t = P_{t-1} + K K^T ,     P_0 = lambda I ,        W <- W + (D K) K^T P_t^-1                      (1)

Where the host meets its edits exactly (D K = R), as ROME does, the sum of all changes is the one ridge solution over all edits,
R_1..t K_1..t^T (K_1..t K_1..t^T + lambda I)^-1, with R against the unedited weights. As for every method with past keys, the key of a
fact that changes again leaves P, because as a constraint it would keep half of the old answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from streams.base import TrainPool
from testbed.core.ranges import PositiveFloat
from testbed.core.registry import WRAPPERS
from testbed.editors.base import EditorConfig, Wrapper
from testbed.editors.locate.core import LocateEditor
from testbed.editors.locate.solver import IdentityPrior, Ridge, Solution


@dataclass(frozen=True)
class SimIEConfig(EditorConfig):
    spread: PositiveFloat = 0.1
    """lambda, as a share of the mean squared norm of the first edits' keys (ours: a number of its own suits one model alone)."""


@WRAPPERS.register("simie")
class SimIE(Wrapper, LocateEditor):
    """What a host writes at its keys, solved for together with all earlier keys."""

    summary = "written by recursive least squares over all edits so far (SimIE)"
    hosts = LocateEditor
    Config = SimIEConfig

    @property
    def history(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Keys are remembered for P, whether the host counts them or not."""
        return True

    def _prepare(self, pool: TrainPool) -> None:
        super()._prepare(pool)
        self.lam: dict[str, float] = {}
        """lambda by layer, from the first edits."""
        self._recursions: dict[int, Ridge] = {}

    def _new_ridge(self, layer: int) -> Ridge:
        ridge = super()._new_ridge(layer)
        ridge.history = super().history
        return ridge

    def _solve(self, layer: int, keys: Tensor, residual: Tensor, bare: Tensor) -> Solution:
        """Equation 1 for what the host's change does at the keys."""
        change = super()._solve(layer, keys, residual, bare)
        if str(layer) not in self.lam:
            self.lam = {**self.lam, str(layer): self.config.spread * float(keys.double().square().sum(1).mean())}
        recursion = self._recursion(layer, self.deltas.past(layer))
        found = recursion.solve(keys, (keys.double() @ change.right.T.to(keys.device)) @ change.left)
        recursion.append(keys)
        return found

    def _recursion(self, layer: int, past: Sequence[Tensor]) -> Ridge:
        """P_{t-1} of a layer."""
        if layer not in self._recursions:
            self._recursions[layer] = Ridge(IdentityPrior(self.lam[str(layer)]), history=True)
            for keys in past:
                self._recursions[layer].append(keys)
        return self._recursions[layer]

    def _forget_changed(self, layer: int, facts: Sequence[str]) -> None:
        super()._forget_changed(layer, facts)
        if self.deltas.knows(layer, facts):
            self._recursions.pop(layer, None)
            self._recursion(layer, self.deltas.past(layer, facts))

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "simie": dict(self.lam)}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.lam, self._recursions = dict(state["simie"]), {}
