"""BLUE (Boundary Layer UpdatE, arXiv 2502.03748): only the first and the last critical layer change.

Each gets a target of its own, found at its own output under the weights as they then are, and writes the whole
residual: `R = Z_l - h_l`, undivided. What lies between is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from streams.base import TrainPool
from testbed.core.registry import WRAPPERS
from testbed.editors.base import EditorConfig, Wrapper
from testbed.editors.hyperparameters import ModelKey, model_key
from testbed.editors.locate.alphaedit import AlphaEditHyperparameters
from testbed.editors.locate.core import LocateEditor, LocateHyperparameters
from testbed.editors.locate.memit import MemitHyperparameters

PUBLISHED: dict[ModelKey, dict[type[LocateHyperparameters], dict[str, float]]] = {
    ("gpt2", 48): {AlphaEditHyperparameters: {"l2": 80.0}, MemitHyperparameters: {"lam": 20_000.0}},  # GPT2-XL
    ("gptj", 28): {AlphaEditHyperparameters: {"l2": 95.0}, MemitHyperparameters: {"lam": 15_000.0}},  # GPT-J-6B
    ("llama", 32): {AlphaEditHyperparameters: {"l2": 1.0}, MemitHyperparameters: {"lam": 15_000.0}},  # Llama-3-8B
    ("qwen2", 28): {AlphaEditHyperparameters: {"l2": 1.0}, MemitHyperparameters: {"lam": 15_000.0}},  # Qwen2.5-7B
}
"""What BLUE's released configurations change in the host's own, by type and number of layers of the language model."""


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

    def _tuned(self, hyper: Any) -> Any:
        own = PUBLISHED.get(model_key(self.handle), {}).get(type(hyper), {})
        return super()._tuned(replace(hyper, **own))

    def _stages(self) -> list[tuple[int, ...]]:
        layers = sorted({n for stage in super()._stages() for n in stage})
        return [(n,) for n in dict.fromkeys((layers[0], layers[-1]))]
