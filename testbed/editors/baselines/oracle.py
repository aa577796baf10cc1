"""The ceiling of every comparison: it gives the right answer of every fact and leaves all else to the unedited model.

Its predictor is the only one that is told the right answer to a question (`Traits.told_truth`). It is the upper
bound of every metric, and the reference that the metrics are tested with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streams.base import TrainPool
from testbed.core.events import Ask
from testbed.core.registry import EDITORS
from testbed.editors.base import Traits
from testbed.editors.baselines.noop import Noop
from testbed.model.encoding import answer_ids
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor, OverModel, Response, Score


class TruthPredictor(OverModel):
    """Answers with `Ask.truth` where it is given, else as the model does."""

    def __init__(self, handle: ModelHandle) -> None:
        self.handle, self.base = handle, ModelPredictor(handle)

    def respond(self, asks: Sequence[Ask], answers: Sequence[str | None], max_new_tokens: int = 16) -> list[Response]:
        without_truth = [i for i, a in enumerate(asks) if a.truth is None]
        out = [Response(a.truth or "", self._score(a, x) if x is not None else None) for a, x in zip(asks, answers)]
        own = self.base.respond([asks[i] for i in without_truth], [answers[i] for i in without_truth], max_new_tokens)
        for i, r in zip(without_truth, own):
            out[i] = r
        return out

    def _score(self, ask: Ask, answer: str) -> Score:
        """Probability 1 for the tokens of the truth: a token of the answer is a hit where the truth has the same one in its place."""
        scored = answer_ids(self.handle, ask, answer)
        truth = answer_ids(self.handle, ask, ask.truth) if ask.truth else []
        hits = np.array([i < len(truth) and truth[i] == token for i, token in enumerate(scored)])
        return Score(hits, np.where(hits, 0.0, -np.inf))


@EDITORS.register("oracle")
class Oracle(Noop):
    """It stores nothing, because its predictor is told every right answer, that of an undone edit included."""

    summary = "is told every right answer: the ceiling, and the reference that metrics are tested with"
    traits = Traits(told_truth=True, undo=True, learns="no")

    def _prepare(self, pool: TrainPool) -> None:
        self._predictor = TruthPredictor(self.handle)
