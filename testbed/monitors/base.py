"""The contract of a monitor: numbers about an edited model that are no answers to questions.

All monitors use one fixed set of prompts, which is drawn by hash and the same for every editor. They compare the edited
model with the unedited one on these prompts; the unedited side is computed once in a process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from testbed.core.events import Question
from testbed.core.registry import MONITORS
from testbed.core.schema import MonitorRow
from testbed.model.handle import ModelHandle
from testbed.model.predictor import Inspection, ModelPredictor, Predictor
from testbed.probes.base import Checkpoint, draw, smallest

PROMPTS = 24
TOP = 64
"""Number of likeliest next tokens of the unedited model that are compared one by one; all others are one remaining mass."""
LAST = (-1,)
"""The decoder layer whose output is compared: the last one."""


@dataclass(frozen=True)
class View:
    """An edited model as monitors see it.

    weights: changed parameters by name; empty where an editor changes none.
    now, base: for each prompt an inspection of the edited and of the unedited model, with log-probabilities of the
        same tokens (the unedited model's likeliest ones).
    """

    handle: ModelHandle
    weights: Mapping[str, torch.Tensor]
    now: Sequence[Inspection]
    base: Sequence[Inspection]


class Monitor(ABC):
    """One family of numbers; registered with `MONITORS.register(name)`, found by scan."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def measure(self, view: View) -> dict[str, float]:
        """Numbers by name. A number that has no value is left out, never filled in."""


class MonitorPanel:
    """The fixed prompts of a run, and all monitors on them.

    Args:
        questions: the schedule's questions; prompts are drawn from its general ones, else from all it has.
        seed: seed of the run.
    """

    def __init__(self, handle: ModelHandle, questions: Iterable[Question], seed: int) -> None:
        self.handle = handle
        pool = [q for q in questions if q.split != "text"]
        pool = [q for q in pool if q.split == "general"] or pool
        chosen = smallest(pool, PROMPTS, lambda q: draw(seed, "monitors", q.id))
        self.asks = [q.ask() for q in chosen]

    @cached_property
    def base(self) -> list[Inspection]:
        """The unedited model on the prompts."""
        top = min(TOP, self.handle.head.weight.shape[0])
        return ModelPredictor(self.handle).inspect(self.asks, LAST, top)

    def due(self, checkpoint: Checkpoint) -> bool:
        """At full checkpoints and after 1, 2, 4, 8, ... steps; always False where the run has no prompt."""
        return bool(self.asks) and (checkpoint.full or "power" in checkpoint.reasons)

    def rows(self, step: int, predictor: Predictor, weights: Mapping[str, torch.Tensor]) -> list[MonitorRow]:
        """The numbers of every monitor after a step, in the order of their names."""
        known = predictor.fingerprint == "base"
        now = self.base if known else predictor.inspect(self.asks, LAST, ids=[b.top_ids for b in self.base])
        view = View(self.handle, weights, now, self.base)
        found = [item for _, cls in MONITORS.items() for item in cls().measure(view).items()]
        return [MonitorRow(step, name, float(value)) for name, value in found]


def finite(view: View) -> tuple[list[Inspection], list[Inspection]]:
    """The edited model's inspections whose prediction and states are finite, and the unedited model's of the same prompts."""
    kept = [(a, b) for a, b in zip(view.now, view.base) if np.isfinite(a.entropy) and np.isfinite(a.hidden).all()]
    return [a for a, _ in kept], [b for _, b in kept]
