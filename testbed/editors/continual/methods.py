"""The strategies of Avalanche that are editors here, with their settings, and those that are refused, with the reason.

This module does not import Avalanche; `load_avalanche` does.

Strengths were chosen for the tiny model on 60 edits of the development stream (seed 7), among powers of ten.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

from testbed.core.ranges import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from testbed.editors.base import EditorConfig

TESTED = ("0.6.0",)
"""Versions of avalanche-lib that the tests ran with."""
INSTALL = "pip install 'lifelong-editing-testbed[avalanche]'"
SOLVER = "quadprog"
"""The quadratic-programming solver that Avalanche's GEM asks for by name."""


def missing() -> list[str]:
    """One sentence, with the line that installs the right version, where avalanche-lib is missing or untested; else nothing."""
    try:
        found = importlib.metadata.version("avalanche-lib")
    except importlib.metadata.PackageNotFoundError:
        return [f"needs Avalanche, which is not installed: {INSTALL}"]
    if found not in TESTED:
        return [f"avalanche-lib {found} is installed; the bridge is tested with {', '.join(TESTED)}: {INSTALL}"]
    return []


def load_avalanche() -> Any:
    """Import Avalanche and return the module of the strategy state adapters. Raises ImportError with the line that installs it.

    Warnings are silenced, because its solver library warns at import that no solver is installed.
    """
    if missing():
        raise ImportError("; ".join(missing()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("testbed.editors.continual._strategies")


@dataclass(frozen=True)
class AvalancheConfig(EditorConfig):
    """Settings of every strategy. They train the down-projection of the last decoder layer in float32."""

    lr: PositiveFloat = 2.5e-3
    """Adam's step size; each batch of edits starts with a new optimiser state."""
    steps: PositiveInt = 20
    """Optimiser steps on each batch of edits."""
    rows: PositiveInt = 64
    """Most edits in one optimiser step (Avalanche's train_mb_size)."""

    def problems(self) -> list[str]:
        return missing() + super().problems()


@dataclass(frozen=True)
class CumulativeConfig(AvalancheConfig):
    drop_revised: bool = True
    """Drop an edit from the buffer when a later one revises it, because its answer is no longer true."""


@dataclass(frozen=True)
class ReplayConfig(CumulativeConfig):
    memory: PositiveInt = 500
    """Edits in the replay buffer, a uniform sample of all edits so far (reservoir sampling)."""
    sample: PositiveInt = 64
    """Edits of the buffer in one optimiser step."""


@dataclass(frozen=True)
class JointConfig(CumulativeConfig):
    steps: PositiveInt = 200
    """Optimiser steps from the unedited model, taken again after every batch of edits."""


@dataclass(frozen=True)
class EwcConfig(AvalancheConfig):
    strength: NonNegativeFloat = 1e7
    """lambda, the weight of the penalty (Kirkpatrick et al. 2017)."""
    decay: Fraction = 0.9
    """gamma of online EWC (Schwarz et al. 2018): the older importance is multiplied by it after each batch; 1 keeps all."""


@dataclass(frozen=True)
class SiConfig(AvalancheConfig):
    strength: NonNegativeFloat = 1e3
    """c, the weight of the penalty (Zenke et al. 2017)."""
    damping: PositiveFloat = 1e-3
    """xi, added to the squared change of a weight, so that the quotient stays finite."""


@dataclass(frozen=True)
class MasConfig(AvalancheConfig):
    strength: NonNegativeFloat = 1e-3
    """lambda, the weight of the penalty (Aljundi et al. 2018)."""
    alpha: Fraction = 0.5
    """Weight of the older importance in the running mean."""


@dataclass(frozen=True)
class LwfConfig(AvalancheConfig):
    strength: NonNegativeFloat = 0.3
    """lambda, the weight of the distillation loss (Li and Hoiem 2016)."""
    temperature: PositiveFloat = 2.0
    """T, which divides the logits of teacher and model."""


@dataclass(frozen=True)
class GemConfig(CumulativeConfig):
    patterns: PositiveInt = 16
    """Edits of each batch that are kept for replay."""
    batches: PositiveInt = 50
    """The newest batches, of which edits are kept; each costs one more backward pass a step (the paper keeps all tasks)."""
    margin: float = 0.5
    """gamma, the memory strength (Lopez-Paz and Ranzato 2017)."""

    def problems(self) -> list[str]:
        out = super().problems()
        if importlib.util.find_spec(SOLVER) is None:
            out.append(f"GEM needs a solver of quadratic programs, which is not installed: pip install {SOLVER}")
        if self.patterns > self.rows:
            out.append(f"patterns must not exceed rows ({self.rows}), got {self.patterns}")
        return out


@dataclass(frozen=True)
class Method:
    """A strategy that is offered: its line in `--list`, and its settings."""

    summary: str
    config: type[AvalancheConfig]


METHODS = {
    "naive": Method("trains on each batch of edits alone", AvalancheConfig),
    "replay": Method("trains on each batch beside a sample of remembered edits", ReplayConfig),
    "cumulative": Method("trains on all edits so far, from where it is", CumulativeConfig),
    "joint": Method("trains on all edits so far, from the unedited model each time (an upper bound)", JointConfig),
    "ewc": Method("elastic weight consolidation, online", EwcConfig),
    "si": Method("synaptic intelligence", SiConfig),
    "mas": Method("memory aware synapses", MasConfig),
    "lwf": Method("learning without forgetting: distils from the model before the batch", LwfConfig),
    "gem": Method("gradient episodic memory: no step may raise the loss of a remembered batch", GemConfig),
    "agem": Method("averaged gradient episodic memory", ReplayConfig),
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
"""Strategies of Avalanche that cannot learn answers of several tokens, each with the reason."""
