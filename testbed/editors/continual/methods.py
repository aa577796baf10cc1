"""Which of Avalanche's strategies run here and with what settings, and which do not and why. Imports no Avalanche until `load` is called.

Strengths were chosen for the tiny model on 60 edits of the development stream (seed 7), among powers of ten.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from testbed.editors.base import EditorConfig

TESTED = ("0.6.0",)
"""Versions of avalanche-lib that the tests have run with."""
INSTALL = "pip install 'lifelong-editing-testbed[avalanche]'"
SOLVER = "quadprog"
"""The quadratic-programming solver that Avalanche's GEM asks for by name."""


def missing() -> list[str]:
    """What keeps the bridge from working, as sentences with the line that mends it; empty when it can."""
    try:
        found = importlib.metadata.version("avalanche-lib")
    except importlib.metadata.PackageNotFoundError:
        return [f"needs Avalanche, which is not installed: {INSTALL}"]
    if found not in TESTED:
        return [f"avalanche-lib {found} is installed; the bridge is tested with {', '.join(TESTED)}: {INSTALL}"]
    return []


def load() -> Any:
    """The strategies' module, which imports Avalanche; its solver library's complaint of having no solver is not passed on.

    Raises ImportError with the line that installs what is missing.
    """
    if missing():
        raise ImportError("; ".join(missing()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("testbed.editors.continual._carriers")


@dataclass(frozen=True)
class AvalancheConfig(EditorConfig):
    """What all of them share. Trained is the down-projection of the last decoder layer, in float32."""

    lr: float = 2.5e-3
    """Adam's step size; the optimiser starts afresh for each batch of edits."""
    steps: int = 20
    """Optimiser steps a batch of edits."""
    rows: int = 64
    """Edits in one optimiser step, at most (Avalanche's train_mb_size)."""

    def problems(self) -> list[str]:
        out = missing()
        out += [f"{name} must be positive, got {getattr(self, name)}" for name in self.positive if getattr(self, name) <= 0]
        out += [f"{name} must be 1 or more, got {getattr(self, name)}" for name in self.counts if getattr(self, name) < 1]
        out += [f"{name} must lie in [0, 1], got {getattr(self, name)}" for name in self.shares if not 0 <= getattr(self, name) <= 1]
        if getattr(self, "strength", 0) < 0:
            out.append(f"strength must be 0 or more, got {getattr(self, 'strength', 0)}")
        return out

    positive: ClassVar[tuple[str, ...]] = ("lr",)
    counts: ClassVar[tuple[str, ...]] = ("steps", "rows")
    shares: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class MemoryConfig(AvalancheConfig):
    memory: int = 500
    """Edits remembered, a uniform sample of all (reservoir)."""
    sample: int = 64
    """Remembered edits in one optimiser step."""
    drop_revised: bool = True
    """An edit that a later one revises leaves the memory: its answer is no longer true."""

    counts = ("steps", "rows", "memory", "sample")


@dataclass(frozen=True)
class AllConfig(AvalancheConfig):
    drop_revised: bool = True
    """An edit that a later one revises leaves the memory: its answer is no longer true."""


@dataclass(frozen=True)
class JointConfig(AllConfig):
    steps: int = 200
    """Optimiser steps from the unedited model, after every batch of edits anew."""


@dataclass(frozen=True)
class EwcConfig(AvalancheConfig):
    strength: float = 1e7
    """lambda: weight of the penalty."""
    decay: float = 0.9
    """What is left of the older importance after each batch (online EWC; 1 keeps all)."""
    shares = ("decay",)


@dataclass(frozen=True)
class SiConfig(AvalancheConfig):
    strength: float = 1e3
    """c: weight of the penalty."""
    damping: float = 1e-3
    """xi: added to the squared change of a weight."""
    positive = ("lr", "damping")


@dataclass(frozen=True)
class MasConfig(AvalancheConfig):
    strength: float = 1e-3
    """lambda: weight of the penalty."""
    alpha: float = 0.5
    """Share of the older importance in the running one."""
    shares = ("alpha",)


@dataclass(frozen=True)
class LwfConfig(AvalancheConfig):
    strength: float = 0.3
    """lambda: weight of the distillation."""
    temperature: float = 2.0
    """T: softens both distributions."""
    positive = ("lr", "temperature")


@dataclass(frozen=True)
class GemConfig(AvalancheConfig):
    patterns: int = 16
    """Edits remembered of each batch."""
    batches: int = 50
    """Batches remembered, the newest; each costs one more backward pass a step (the paper keeps all tasks)."""
    margin: float = 0.5
    """gamma: memory strength."""
    drop_revised: bool = True
    """An edit that a later one revises leaves the memory: its answer is no longer true."""

    def problems(self) -> list[str]:
        out = super().problems()
        if importlib.util.find_spec(SOLVER) is None:
            out.append(f"GEM needs a solver of quadratic programs, which is not installed: pip install {SOLVER}")
        if self.patterns > self.rows:
            out.append(f"patterns must not exceed rows ({self.rows}), got {self.patterns}")
        return out

    counts = ("steps", "rows", "patterns", "batches")


@dataclass(frozen=True)
class Method:
    summary: str
    """One line for --list."""
    config: type[AvalancheConfig]


METHODS = {
    "naive": Method("trains on each batch of edits alone", AvalancheConfig),
    "replay": Method("trains on each batch beside a sample of remembered edits", MemoryConfig),
    "cumulative": Method("trains on all edits so far, from where it is", AllConfig),
    "joint": Method("trains on all edits so far, from the unedited model each time (an upper bound)", JointConfig),
    "ewc": Method("elastic weight consolidation, online", EwcConfig),
    "si": Method("synaptic intelligence", SiConfig),
    "mas": Method("memory aware synapses", MasConfig),
    "lwf": Method("learning without forgetting: distils from the model before the batch", LwfConfig),
    "gem": Method("gradient episodic memory: no step may raise the loss of a remembered batch", GemConfig),
    "agem": Method("averaged gradient episodic memory", MemoryConfig),
}

REFUSED = {
    "der": "its memory is balanced by class and holds one vector of logits a sample, an answer has no class and one for each token",
    "er-ace": "it splits its loss by the classes of a batch, an answer has no class",
    "er-aml": "it draws positives and negatives by class, an answer has no class",
    "gdumb": "its memory is balanced by class, an answer has no class",
    "gss": "its memory holds one label a sample, an answer has one for each token",
    "mir": "its memory is balanced by class, an answer has no class",
    "icarl": "it answers with the nearest class mean, an answer has no class",
    "cope": "it answers with class prototypes, an answer has no class",
    "slda": "it fits one Gaussian a class, an answer has no class",
    "cwr": "it keeps one output weight a class, an answer has no class",
}
"""Strategies of Avalanche that cannot learn answers of several tokens, with the reason."""
