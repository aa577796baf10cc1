"""SCR, selective contextual reasoning (He, Song and Sun 2025, arXiv 2503.05212): no weight changes, facts in the prompt.

Retrieve the facts nearest to the question; let the model itself say which of them bears on it; where one does, ask
with that fact before the question, else ask the question untouched. The gate is a setting, so that what retrieval,
confirmation and reading each contribute can be told apart: `oracle-context` (the right fact), `topk` (no gate),
`threshold` (a calibrated similarity stands in for the confirmation), `model` (as published), `index` (one forward).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch
from testbed.core.registry import EDITORS
from testbed.editors.base import BadEditor, Traits
from testbed.editors.retrieval import prompts
from testbed.editors.retrieval.fact_editor import ContextPredictor, MemoryConfig, MemoryEditor, Reading, ledger
from testbed.editors.retrieval.fact_store import FactStore, Version
from testbed.editors.retrieval.retriever import Retriever
from testbed.editors.retrieval.scope import GATES
from testbed.model.predictor import Predictor

_POOL = 256
"""Un-edited questions of each kind that a threshold is calibrated on."""


@dataclass(frozen=True)
class ScrConfig(MemoryConfig):
    k: int = 0
    """Facts retrieved; 0: as many as the wording is for, 5 as published, but 4 in the wording of the tiny model."""
    gate: str = "model"
    """Who decides that a fact bears on the question: oracle-context, topk, threshold, model (published) or index."""
    threshold: float = 0.0
    """Least similarity for gate=threshold; 0: calibrated on un-edited questions of the train pool."""
    false_accept: float = 0.05
    """Share of the un-edited questions that the calibrated threshold lets through."""

    def problems(self) -> list[str]:
        out = super().problems()
        if self.k < 0:
            out.append(f"k must be 0 (the wording's own) or more, got {self.k}")
        if self.gate not in GATES:
            out.append(f"gate must be one of {', '.join(GATES)}, got {self.gate!r}")
        if not 0 < self.false_accept < 1:
            out.append(f"false_accept must lie in (0, 1), got {self.false_accept}")
        return out


@EDITORS.register("scr")
class Scr(MemoryEditor):
    """Facts beside the model; a question that one bears on is asked with it.

    State: as `MemoryEditor`, and the thresholds for text and for pictures with the number of facts they were set at.
    """

    summary = "retrieves facts, lets the model confirm which bears, and puts it into the prompt (SCR)"
    traits = Traits(gated=True, undo=True, uses=frozenset({"train_pool"}))
    Config = ScrConfig
    config: ScrConfig

    def __init__(self, config: Any = None, seed: int = 0) -> None:
        super().__init__(config, seed)
        if self.config.gate == "oracle-context":
            self.traits = replace(self.traits, told_truth=True)  # pyright: ignore[reportAttributeAccessIssue]

    def _prepare(self, pool: TrainPool) -> None:
        if self.traits.told_truth:
            self.notes.append("gate=oracle-context is told which edit a question is about: a bound, no rival")
        super()._prepare(pool)
        pooled = [q.ask() for q in pool.questions]
        self._unedited = [[a for a in pooled if (a.image is not None) == seen][:_POOL] for seen in (False, True)]
        self.threshold = [self.config.threshold] * 2
        self.calibrated = 0
        if self.config.gate == "threshold":
            self.notes.append("a similarity threshold stands in for the model's confirmation (gate=threshold)")
            if not self.config.threshold and not any(self._unedited):
                raise BadEditor("the stream has no train pool to calibrate gate=threshold on: give --set scr.threshold=0.6 or the like")
        wording = prompts.WORDINGS[self.config.wording]
        k = self.config.k or wording.most
        self.notes.append(f"{k} facts retrieved; wording {self.config.wording!r}: {wording.select!r}, {wording.context!r}")

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        notes = super()._edit(batch)
        live = int(notes["facts"])
        if self.config.gate == "threshold" and not self.config.threshold and live >= 2 * self.calibrated:
            self.threshold, self.calibrated = [self._highest(asks) for asks in self._unedited], live
        return notes

    def _highest(self, asks: list[Ask]) -> float:
        """The similarity that the share `false_accept` of these questions reaches with its nearest fact; 1 where there are none."""
        near = [found[0].similarity if found else 0.0 for found in self.retriever().nearest(asks, 1)]
        return float(np.quantile(near, 1 - self.config.false_accept, method="higher")) + 1e-6 if near else 1.0

    def predictor(self) -> Predictor:
        return ScrPredictor(self.retriever(), self.config, self.store, self.threshold)

    def as_of(self, step: int) -> Predictor:
        """The edited model as it was after a past step (thresholds as they are now)."""
        return ScrPredictor(self.retriever(step), self.config, self.store, self.threshold)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "threshold": self.threshold, "calibrated": self.calibrated}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.threshold, self.calibrated = list(state["threshold"]), state["calibrated"]


class ScrPredictor(ContextPredictor):
    """Retrieve, confirm, ask."""

    config: ScrConfig

    def __init__(self, retriever: Retriever, config: ScrConfig, store: FactStore, threshold: Sequence[float]) -> None:
        super().__init__(retriever, config)
        self._store, self.threshold = store, threshold

    def newest(self, event_id: str) -> Version | None:
        """What holds, at the moment of this view, of the fact that an event once stated."""
        alive = self.retriever.alive
        rows = [row for row in self._store.rows_with(event_id) if row < len(alive) and alive[row]]
        return self.retriever.log[rows[-1]] if rows else None

    def read(self, asks: Sequence[Ask], room: int) -> list[Reading]:
        found = self.retriever.nearest(asks, self.config.k or self.wording.most)
        decided = GATES[self.config.gate](self, asks, found)
        return [self._reading(a, room, d.facts, {**ledger(f), **d.notes}) for a, f, d in zip(asks, found, decided)]

    def _reading(self, ask: Ask, room: int, facts: list[Version], notes: dict[str, Any]) -> Reading:
        stated = [prompts.statement(f.prompt, f.target) for f in facts]
        now, dropped = self.fit(ask, room, len(facts), lambda n: prompts.in_context(stated[:n], ask.prompt, self.wording))
        used = facts[: len(facts) - dropped]
        added = self.tokens(now) - self.tokens(ask) if used else 0
        own = {"gate": self.config.gate, "used": [f.event_id for f in used], "added_tokens": added}
        return Reading(now, {"gate_tokens": 0, **notes, **own, "dropped": notes.get("dropped", 0) + dropped})
