"""The ceiling: remembers every fact exactly and leaves all else to the unedited model.

Its predictor alone is told, by a Trait, what the right answer to a question is. It serves as the upper
bound of every metric and as the reference that the metrics are tested with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch
from testbed.core.registry import EDITORS
from testbed.editors.base import Editor, EditorConfig, Traits
from testbed.model.encoding import answer_ids
from testbed.model.handle import ModelHandle
from testbed.model.predictor import Inspection, ModelPredictor, Predictor, Response, Score, Tokens


class TruthPredictor(Predictor):
    """Answers with `Ask.truth` where it is given, else as the model does."""

    def __init__(self, handle: ModelHandle) -> None:
        self.handle, self.base = handle, ModelPredictor(handle)

    def respond(self, asks: Sequence[Ask], answers: Sequence[str | None], max_new_tokens: int = 16) -> list[Response]:
        untold = [i for i, a in enumerate(asks) if a.truth is None]
        out = [Response(a.truth or "", self._score(a, x) if x is not None else None) for a, x in zip(asks, answers)]
        own = self.base.respond([asks[i] for i in untold], [answers[i] for i in untold], max_new_tokens)
        for i, r in zip(untold, own):
            out[i] = r
        return out

    def score(self, asks: Sequence[Ask], answers: Sequence[str]) -> list[Score]:
        return [r.score or self._score(a, x) for r, a, x in zip(self.respond(asks, answers), asks, answers)]

    def text_logprobs(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.base.text_logprobs(texts)

    def inspect(self, asks: Sequence[Ask], layers: Sequence[int] = (), top_k: int = 10, ids: Tokens = None) -> list[Inspection]:
        return self.base.inspect(asks, layers, top_k, ids)

    def _score(self, ask: Ask, answer: str) -> Score:
        """Certain of the truth's tokens: a token of the answer is a hit where the truth has the same one."""
        want = answer_ids(self.handle, ask, answer)
        told = answer_ids(self.handle, ask, ask.truth) if ask.truth else []
        hits = np.array([i < len(told) and told[i] == w for i, w in enumerate(want)])
        return Score(hits, np.where(hits, 0.0, -np.inf))


@EDITORS.register("oracle")
class Oracle(Editor):
    """Knows every answer it is asked for."""

    summary = "is told every right answer: the ceiling, and the reference that metrics are tested with"
    traits = Traits(told_truth=True, undo=True)
    Config = EditorConfig

    def _prepare(self, pool: TrainPool) -> None:
        self._predictor = TruthPredictor(self.handle)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        return {}

    def predictor(self) -> Predictor:
        return self._predictor

    def revert(self, event_ids: Iterable[str]) -> None:
        """Undoing is in the truth that it is told."""

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: dict[str, Any]) -> None:
        """There is nothing to load."""
