"""IKE, in-context knowledge editing (Zheng et al., EMNLP 2023, arXiv 2305.12740): demonstrations before the question.

The answer to a question x is argmax_y P(y | D_1, ..., D_k, f, x): k demonstrations, then the fact f that is nearest to
x, then x itself. The demonstrations are of the paper's three kinds ("demonstration formatting"): *copy* repeats a fact
for its own prompt, *update* gives its target for a paraphrase, *retain* keeps the old answer to another question. They
are made of other facts of the store, of their train paraphrases, and of unedited questions of the train pool; those
nearest to x stand last ("demonstration organization"). There is no gate: x is asked alone only where the store has no
fact for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, Question
from testbed.core.ranges import NonNegativeInt
from testbed.core.registry import EDITORS
from testbed.editors.base import Traits
from testbed.editors.retrieval import prompts
from testbed.editors.retrieval.fact_editor import ContextPredictor, FactEditor, FactEditorConfig, PromptedAsk, retrieval_log
from testbed.editors.retrieval.fact_store import Version
from testbed.editors.retrieval.retriever import Retrieved, Retriever, TextIndex
from testbed.model.predictor import Predictor

COPY, UPDATE, RETAIN = "copy", "update", "retain"
PATTERN = (RETAIN, UPDATE, RETAIN, COPY, RETAIN, UPDATE, RETAIN, UPDATE)
"""Kinds of demonstrations from the nearest on, repeated: of 32 they are 4 copy, 12 update, 16 retain (paper: 1 : 3 : 4)."""
_POOL = 1000
"""Unedited questions that retain demonstrations are chosen from."""
Unedited = dict[bool, tuple[list[Question], TextIndex]]
"""Unedited questions with answers and an index of their prompts, for questions without and with a picture."""


@dataclass(frozen=True)
class IkeConfig(FactEditorConfig):
    demonstrations: NonNegativeInt = 32
    """k, the demonstrations before the question (paper: 32)."""


@EDITORS.register("ike")
class Ike(FactEditor):
    """Keeps facts beside the model and puts the nearest one, with demonstrations, before every question.

    State: as `FactEditor`, and the train paraphrases of each event.
    """

    summary = "puts the nearest fact before each question, with copy, update and retain demonstrations (IKE)"
    traits = Traits(undo=True, uses=frozenset({"paraphrase", "train_pool"}), learns="context")
    Config = IkeConfig
    config: IkeConfig

    def _prepare(self, pool: TrainPool) -> None:
        super()._prepare(pool)
        self.rephrased: dict[str, tuple[str, ...]] = {}
        self._unedited: Unedited = {}
        for pictured in (False, True):
            questions = [q for q in pool.questions if q.answer and (q.image is not None) == pictured][:_POOL]
            index = self._new_index(None)
            index.add([q.prompt for q in questions])
            self._unedited[pictured] = (questions, index)
        if not pool.questions:
            self.notes.append("the stream has no train pool, so there are no retain demonstrations")

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        notes = super()._edit(batch)
        self.rephrased = {**self.rephrased, **{k: tuple(v) for k, v in batch.paraphrases.items() if v}}
        return notes

    def predictor(self) -> Predictor:
        return IkePredictor(self.retriever(), self.config, self.rephrased, self._unedited)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "rephrased": {k: list(v) for k, v in self.rephrased.items()}}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.rephrased = {k: tuple(v) for k, v in state["rephrased"].items()}


class IkePredictor(ContextPredictor):
    """Asks each question after its nearest fact and the demonstrations."""

    config: IkeConfig

    def __init__(self, retriever: Retriever, config: IkeConfig, rephrased: dict[str, tuple[str, ...]], unedited: Unedited) -> None:
        super().__init__(retriever, config)
        self._rephrased, self._unedited = rephrased, unedited

    def add_facts(self, asks: Sequence[Ask], answer_tokens: int) -> list[PromptedAsk]:
        retrieved = self.retriever.nearest(asks, 1 + self.config.demonstrations)
        return [self._prompted(a, facts, answer_tokens) for a, facts in zip(asks, retrieved)]

    def _prompted(self, ask: Ask, retrieved: list[Retrieved], answer_tokens: int) -> PromptedAsk:
        log = retrieval_log(retrieved[:1])
        if not retrieved:
            return PromptedAsk(ask, {**log, "used": [], "added_tokens": 0})
        fact = retrieved[0].fact
        last = prompts.in_context([fact.statement], ask.prompt, self.template)
        shown = self.demonstrations(ask, [r.fact for r in retrieved[1:]])
        prompted, dropped = self.fit(ask, answer_tokens, 1 + len(shown), lambda n: " ".join([*reversed(shown[: n - 1]), last]))
        used = [fact.event_id] if prompted is not ask else []
        notes = {"used": used, "demonstrations": max(0, len(shown) - dropped), "dropped": dropped}
        return PromptedAsk(prompted, {**log, **notes, "added_tokens": self.tokens(prompted) - self.tokens(ask)})

    def demonstrations(self, ask: Ask, facts: Sequence[Version]) -> list[str]:
        """One demonstration for each fact, the nearest first; a fact without the material for its kind has none."""
        kinds = [PATTERN[i % len(PATTERN)] for i in range(len(facts))]
        retained = iter(self._retained(ask, kinds.count(RETAIN)))
        out = []
        for kind, fact in zip(kinds, facts):
            if kind == RETAIN:
                pair = next(retained, None)
            else:
                own = (fact.prompt,) if kind == COPY else self._rephrased.get(fact.event_id, ())
                pair = (own[0], fact.target) if own else None
            if pair:
                out.append(prompts.statement(prompts.in_context([fact.statement], pair[0], self.template), pair[1]))
        return out

    def _retained(self, ask: Ask, k: int) -> list[tuple[str, str]]:
        """Prompts and answers of the k unedited questions that are nearest to a question."""
        questions, index = self._unedited[ask.image is not None]
        hits = index.nearest([ask.prompt], np.ones(len(questions), bool), k)[0] if k and questions else []
        return [(questions[row].prompt, questions[row].answer or "") for row, _ in hits]
