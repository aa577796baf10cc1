"""BLUE (Boundary Layer UpdatE, arXiv 2502.03748): only the first and the last critical layer change.

Each gets a target of its own, found at its own output under the weights as they then are, and writes the whole
residual: `R = Z_l - h_l`, undivided. What lies between is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streams.base import TrainPool
from testbed.core.registry import WRAPPERS
from testbed.editors.base import EditorConfig, Wrapper
from testbed.editors.hyperparameters import GPT2_XL, GPT_J, LLAMA_3_8B, ModelKey, Values, filled, model_key
from testbed.editors.locate.alphaedit import AlphaEdit
from testbed.editors.locate.core import LocateEditor
from testbed.editors.locate.emmet import Emmet
from testbed.editors.locate.memit import Memit
from testbed.editors.locate.pmet import Pmet

PUBLISHED: dict[ModelKey, dict[type[LocateEditor], Values]] = {
    GPT2_XL: {AlphaEdit: {"l2": 80.0}, Memit: {"lam": 20_000.0}, Pmet: {"lam": 10_000.0}, Emmet: {}},
    GPT_J: {AlphaEdit: {"l2": 95.0}, Memit: {"lam": 15_000.0}, Pmet: {"lam": 1_000.0}, Emmet: {}},
    LLAMA_3_8B: {AlphaEdit: {"l2": 1.0}, Memit: {"lam": 15_000.0}, Pmet: {"lam": 15_000.0}, Emmet: {}},
}
"""What the files of BLUE's repository (hparams/*/*-blue.json) change in the host's own.

A host takes the row of the nearest class that it stands on; EMMET's lambda weighs C in another way, and BLUE gives none.
"""


@dataclass(frozen=True)
class BlueConfig(EditorConfig):
    """L2 and lambda are those of BLUE's own table unless the host's fields are set."""


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

    def _tuned(self, config: Any) -> Any:
        rows = PUBLISHED.get(model_key(self.handle), {})
        own = next((rows[host] for host in type(self).__mro__ if host in rows), {})
        return super()._tuned(filled(config, own))

    def _stages(self) -> list[tuple[int, ...]]:
        layers = sorted({n for stage in super()._stages() for n in stage})
        return [(n,) for n in dict.fromkeys((layers[0], layers[-1]))]
