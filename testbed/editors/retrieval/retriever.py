"""The facts nearest to a question: text by text, pictures by the model's own vision side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from testbed.core.events import Ask
from testbed.editors.retrieval.encoders import look
from testbed.editors.retrieval.fact_store import Version
from testbed.editors.retrieval.text_index import Rows, TextIndex, best
from testbed.model.handle import ModelHandle


class Found(NamedTuple):
    """A fact and its similarity to the question."""

    fact: Version
    similarity: float


@dataclass(frozen=True)
class Retriever:
    """A view of the store at one moment; later edits do not show in it.

    A question with a picture meets facts with pictures, a question without one facts without: the wording of a
    fact about a picture does not say what is in it.
    """

    handle: ModelHandle
    log: Sequence[Version]
    alive: np.ndarray
    """(n,) bool: rows of the log that hold now."""
    index: TextIndex
    pictured: np.ndarray
    """(p,) int64: rows of the log that have a picture."""
    looks: Rows
    """(p, d): how those pictures look to the model."""
    same: float
    """Least cosine of two pictures that may show the same; -1 is no limit."""

    def nearest(self, asks: Sequence[Ask], k: int) -> list[list[Found]]:
        """The k nearest facts of each question (fewer where there are fewer), nearest first."""
        out: list[list[Found]] = [[] for _ in asks]
        plain = self.alive.copy()
        plain[self.pictured] = False
        texts = [i for i, a in enumerate(asks) if a.image is None]
        if texts and plain.any():
            for i, hits in zip(texts, self.index.nearest([asks[i].prompt for i in texts], plain, k)):
                out[i] = [Found(self.log[row], s) for row, s in hits]
        seen = [i for i, a in enumerate(asks) if a.image is not None]
        if seen and len(self.pictured):
            for i in seen:
                out[i] = self._nearest_pictured(asks[i], k)
        return out

    def _nearest_pictured(self, ask: Ask, k: int) -> list[Found]:
        """Cosine of text plus cosine of pictures, halved; facts whose picture shows something else are left out."""
        if ask.image is None:
            return []
        alike = self.looks.first(len(self.pictured)) @ look(self.handle, ask.image)
        words = self.index.similarity([ask.prompt], len(self.alive))[0][self.pictured]
        alive = self.alive[self.pictured] & (alike >= self.same)
        return [Found(self.log[self.pictured[i]], s) for i, s in best((words + alike) / 2, alive, k)]
