"""BLUE (Boundary Layer UpdatE, arXiv 2502.03748): only the first and the last critical layer change.

Each gets a target of its own, found at its own output under the weights as they then are, and writes the whole
residual: `R = Z_l - h_l`, undivided. What lies between is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from streams.base import TrainPool
from testbed.core.registry import WRAPPERS
from testbed.editors.base import EditorConfig
from testbed.editors.locate.core import LocateEditor
from testbed.editors.locate.hyperparameters import Hyper
from testbed.editors.wrapper import Wrapper


@dataclass(frozen=True)
class BlueConfig(EditorConfig):
    """L2 and lambda are those of the table's BLUE columns unless the host's fields are set."""


@WRAPPERS.register("blue")
class Blue(Wrapper, LocateEditor):
    """Boundary layers only, a target each."""

    summary = "first and last critical layer only, each with its own target (BLUE)"
    hosts = LocateEditor
    Config = BlueConfig

    def _prepare(self, pool: TrainPool) -> None:
        super()._prepare(pool)
        if len(self._stages()) == 1:
            self.notes.append(f"one critical layer has no boundary layers, so it is edited as without BLUE; --set {self.name}.layers=0,1")

    def _tuned(self, hyper: Hyper) -> Hyper:
        own = {"l2": hyper.l2_blue, "lam": hyper.lam_blue}
        kept = {k: v for k, v in own.items() if getattr(self.config, k, None) is None}
        return super()._tuned(replace(hyper, **kept))

    def _stages(self) -> list[tuple[int, ...]]:
        layers = sorted({n for stage in super()._stages() for n in stage})
        return [(n,) for n in dict.fromkeys((layers[0], layers[-1]))]
