"""IKE, in-context knowledge editing (Zheng et al., EMNLP 2023, arXiv 2305.12740): demonstrations before the question.

The fact nearest to the question is put before it, and before that demonstrations of how a fact is to be used: *copy*
(asked in its own words, the fact is repeated), *update* (asked in other words, too), *retain* (asked for something
else, the old answer stands). They are made of other facts of the store, of their train paraphrases, and of un-edited
questions of the train pool; the nearest to the question stand last. There is no gate: a question is asked bare only
while the store has no fact for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, Question
from testbed.core.registry import EDITORS
from testbed.editors.base import Traits
from testbed.editors.retrieval import prompts
from testbed.editors.retrieval.fact_editor import ContextPredictor, MemoryConfig, MemoryEditor, Reading, ledger
from testbed.editors.retrieval.fact_store import Version
from testbed.editors.retrieval.retriever import Found, Retriever
from testbed.editors.retrieval.text_index import TextIndex
from testbed.model.predictor import Predictor

COPY, UPDATE, RETAIN = "copy", "update", "retain"
PATTERN = (RETAIN, UPDATE, RETAIN, COPY, RETAIN, UPDATE, RETAIN, UPDATE)
"""Kinds of demonstrations from the nearest on, round and round: 4 copy, 12 update, 16 retain of 32 (paper: 1 : 3 : 4)."""
_POOL = 1000
"""Un-edited questions that retain demonstrations are taken from."""


@dataclass(frozen=True)
class IkeConfig(MemoryConfig):
    demonstrations: int = 32
    """Demonstrations before the question (paper: 32)."""

    def problems(self) -> list[str]:
        out = super().problems()
        if self.demonstrations < 0:
            out.append(f"demonstrations must be 0 or more, got {self.demonstrations}")
        return out


@EDITORS.register("ike")
class Ike(MemoryEditor):
    """Facts beside the model, put before every question with demonstrations.

    State: as `MemoryEditor`, and the train paraphrases of each event.
    """

    summary = "puts the nearest fact before each question, with copy, update and retain demonstrations (IKE)"
    traits = Traits(undo=True, uses=frozenset({"paraphrase", "train_pool"}))
    Config = IkeConfig
    config: IkeConfig

    def _prepare(self, pool: TrainPool) -> None:
        super()._prepare(pool)
        self.rephrased: dict[str, tuple[str, ...]] = {}
        self._kept: dict[bool, Unedited] = {}
        for seen in (False, True):
            questions = [q for q in pool.questions if q.answer and (q.image is not None) == seen][:_POOL]
            index = self._index(None)
            index.add([q.prompt for q in questions])
            self._kept[seen] = Unedited(questions, index)
        if not pool.questions:
            self.notes.append("the stream has no train pool, so there are no retain demonstrations")

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        notes = super()._edit(batch)
        self.rephrased = {**self.rephrased, **{k: tuple(v) for k, v in batch.paraphrases.items() if v}}
        return notes

    def predictor(self) -> Predictor:
        return IkePredictor(self.retriever(), self.config, self.rephrased, self._kept)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "rephrased": {k: list(v) for k, v in self.rephrased.items()}}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.rephrased = {k: tuple(v) for k, v in state["rephrased"].items()}


@dataclass(frozen=True)
class Unedited:
    """Un-edited questions with their answers, and an index of their prompts."""

    questions: Sequence[Question]
    index: TextIndex

    def nearest(self, prompt: str, k: int) -> list[Question]:
        alive = np.ones(len(self.questions), bool)
        return [self.questions[row] for row, _ in self.index.nearest([prompt], alive, k)[0]] if k and len(alive) else []


class IkePredictor(ContextPredictor):
    """The nearest fact and demonstrations before each question."""

    config: IkeConfig

    def __init__(self, retriever: Retriever, config: IkeConfig, rephrased: dict[str, tuple[str, ...]], kept: dict[bool, Unedited]) -> None:
        super().__init__(retriever, config)
        self._rephrased, self._kept = rephrased, kept

    def read(self, asks: Sequence[Ask], room: int) -> list[Reading]:
        found = self.retriever.nearest(asks, 1 + self.config.demonstrations)
        return [self._reading(a, f, room) if f else Reading(a, {**ledger(f), "used": [], "added_tokens": 0}) for a, f in zip(asks, found)]

    def _reading(self, ask: Ask, found: list[Found], room: int) -> Reading:
        fact = found[0].fact
        last = self._with(fact, ask.prompt)
        shown = self.demonstrations(ask, [f.fact for f in found[1:]])
        whole: Callable[[int], str] = lambda n: " ".join([*reversed(shown[: n - 1]), last])  # noqa: E731
        now, dropped = self.fit(ask, room, 1 + len(shown), whole)
        used = [fact.event_id] if now is not ask else []
        notes = {"used": used, "demonstrations": max(0, len(shown) - dropped), "dropped": dropped}
        return Reading(now, {**ledger(found[:1]), **notes, "added_tokens": self.tokens(now) - self.tokens(ask)})

    def demonstrations(self, ask: Ask, facts: Sequence[Version]) -> list[str]:
        """One a fact, the nearest first; a kind that a fact has no material for is left out."""
        kinds = [PATTERN[i % len(PATTERN)] for i in range(len(facts))]
        kept = iter(self._kept[ask.image is not None].nearest(ask.prompt, kinds.count(RETAIN)))
        out = []
        for kind, fact in zip(kinds, facts):
            if kind == RETAIN:
                pair = next(((q.prompt, q.answer or "") for q in kept), None)
            else:
                own = (fact.prompt,) if kind == COPY else self._rephrased.get(fact.event_id, ())
                pair = (own[0], fact.target) if own else None
            if pair:
                out.append(prompts.statement(self._with(fact, pair[0]), pair[1]))
        return out

    def _with(self, fact: Version, prompt: str) -> str:
        return prompts.in_context([prompts.statement(fact.prompt, fact.target)], prompt, self.wording)
