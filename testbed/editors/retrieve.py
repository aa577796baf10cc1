"""Facts as text in the prompt: no weight changes, the model reads what was edited.

The facts so far that lie nearest to the question are put before it, nearest first, in the wording of
`testbed.prompts`. Text is compared by inverse-frequency-weighted word overlap (a lexical retriever, and the
run says so), pictures by the model's own vision features.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from streams.base import TrainPool
from testbed.editors.base import BadEditor, Editor, EditorConfig, Traits
from testbed.encode import Ask, collate, prompt_inputs
from testbed.events import EditBatch, Picture
from testbed.models import ModelHandle
from testbed.predictor import Inspection, ModelPredictor, Predictor, Response, Score, Tokens
from testbed.prompts import in_context, statement
from testbed.registry import EDITORS


@dataclass(frozen=True)
class RetrieveConfig(EditorConfig):
    k: int = 1
    """Most facts put into a prompt."""
    threshold: float = 0.6
    """Least similarity, in [0, 1], for a fact to be put there."""

    def problems(self) -> list[str]:
        return [] if self.k >= 1 else [f"k must be 1 or more, got {self.k}"]


@dataclass(frozen=True)
class Fact:
    """One live fact: the edit that stated it, its prompt and answer, its words, its picture's features."""

    event_id: str
    prompt: str
    target: str
    look: tuple[float, ...] | None = None


@EDITORS.register("retrieve")
class Retrieve(Editor):
    """One fact an edit; a revision takes the place of what it revises."""

    summary = "the nearest edited facts as text in the prompt (lexical and visual similarity)"
    traits = Traits(gated=True, undo=True)
    Config = RetrieveConfig

    def _prepare(self, pool: TrainPool) -> None:
        self.facts: dict[str, Fact] = {}
        self._hidden: dict[str, Fact] = {}
        self.notes = ["a lexical retriever (word overlap) stands in for a sentence encoder"]

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        facts, hidden = dict(self.facts), dict(self._hidden)
        for e in batch.events:
            old = facts.pop(e.revises, None) if e.revises else None
            if old is not None:
                hidden[e.id] = old
            facts[e.id] = Fact(e.id, e.prompt, e.target, look(self.handle, e.image))
        self.facts, self._hidden = facts, hidden
        return {"facts": float(len(facts))}

    def revert(self, event_ids: Iterable[str]) -> None:
        """Forget these facts, newest first; what they replaced comes back. Raises `BadEditor` for an unknown id."""
        facts, hidden = dict(self.facts), dict(self._hidden)
        for i in event_ids:
            if facts.pop(i, None) is None:
                raise BadEditor(f"cannot undo {i}: it is not a live fact")
            old = hidden.pop(i, None)
            if old is not None:
                facts[old.event_id] = old
        self.facts, self._hidden = facts, hidden

    def predictor(self) -> Predictor:
        return ContextPredictor(self.handle, tuple(self.facts.values()), self.config)

    def _state(self) -> dict[str, Any]:
        return {"facts": [_row(f) for f in self.facts.values()], "hidden": {k: _row(f) for k, f in self._hidden.items()}}

    def _load(self, state: dict[str, Any]) -> None:
        self.facts = {row[0]: _fact(row) for row in state["facts"]}
        self._hidden = {k: _fact(row) for k, row in state["hidden"].items()}

    def state_bytes(self) -> int:
        return sum(len(f.prompt) + len(f.target) + 8 * len(f.look or ()) for f in self.facts.values())


def _row(fact: Fact) -> list[Any]:
    return [fact.event_id, fact.prompt, fact.target, list(fact.look) if fact.look else None]


def _fact(row: Sequence[Any]) -> Fact:
    return Fact(row[0], row[1], row[2], tuple(row[3]) if row[3] else None)


class ContextPredictor(Predictor):
    """Puts the nearest facts before each question, then asks the unedited model."""

    def __init__(self, handle: ModelHandle, facts: tuple[Fact, ...], config: RetrieveConfig) -> None:
        self.base, self.handle, self.facts, self.config = ModelPredictor(handle), handle, facts, config
        self._index = TextIndex([f.prompt for f in facts])
        width = next((len(f.look) for f in facts if f.look), 0)
        self._looks = np.array([f.look or (0.0,) * width for f in facts]).reshape(len(facts), width)

    def rewrite(self, asks: Sequence[Ask]) -> tuple[list[Ask], list[list[Fact]]]:
        """The asks with their facts before them; an ask without a near fact stays the very same."""
        found = [self.nearest(a) for a in asks]
        facts = [[statement(f.prompt, f.target) for f in near] for near in found]
        return [replace(a, prompt=in_context(s, a.prompt)) if s else a for a, s in zip(asks, facts)], found

    def nearest(self, ask: Ask) -> list[Fact]:
        """The k nearest facts above the threshold, nearest first; of two alike the newer."""
        if not self.facts:
            return []
        sim = self._index.similarity(ask.prompt)
        own = look(self.handle, ask.image)
        pictured = np.array([f.look is not None for f in self.facts])
        if own is not None and self._looks.shape[1] == len(own):
            sim = np.where(pictured, np.sqrt(np.clip(sim * (self._looks @ np.array(own)), 0, None)), 0.0)
        else:
            sim = np.where(pictured, 0.0, sim)
        order = sorted(range(len(sim)), key=lambda i: (-round(float(sim[i]), 9), -i))[: self.config.k]
        return [self.facts[i] for i in order if sim[i] >= self.config.threshold]

    def respond(self, asks: Sequence[Ask], answers: Sequence[str | None], max_new_tokens: int = 16) -> list[Response]:
        rewritten, found = self.rewrite(asks)
        out = self.base.respond(rewritten, answers, max_new_tokens)
        return [replace(r, extras={"facts": [f.event_id for f in near]}) for r, near in zip(out, found)]

    def score(self, asks: Sequence[Ask], answers: Sequence[str]) -> list[Score]:
        return self.base.score(self.rewrite(asks)[0], answers)

    def text_logprobs(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.base.text_logprobs(texts)

    def inspect(self, asks: Sequence[Ask], layers: Sequence[int] = (), top_k: int = 10, ids: Tokens = None) -> list[Inspection]:
        return self.base.inspect(self.rewrite(asks)[0], layers, top_k, ids)


class TextIndex:
    """Cosine of word counts weighted by inverse document frequency, over a fixed list of texts."""

    def __init__(self, texts: list[str]) -> None:
        bags = [Counter(words(t)) for t in texts]
        seen = Counter(w for bag in bags for w in bag)
        self._idf = {w: math.log(1 + len(texts) / n) for w, n in seen.items()}
        self._new = math.log(1 + len(texts)) + 1
        self._column = {w: i for i, w in enumerate(sorted(seen))}
        self._matrix = np.zeros((len(texts), len(self._column)), dtype=np.float32)
        for i, bag in enumerate(bags):
            for w, n in bag.items():
                self._matrix[i, self._column[w]] = n * self._idf[w]
        self._matrix /= np.maximum(np.linalg.norm(self._matrix, axis=1, keepdims=True), 1e-12)

    def similarity(self, text: str) -> np.ndarray:
        """(n,) cosines in [0, 1]; a word that no text holds counts against all of them."""
        bag = Counter(words(text))
        weight = {w: n * self._idf.get(w, self._new) for w, n in bag.items()}
        norm = math.sqrt(sum(v * v for v in weight.values())) or 1.0
        query = np.zeros(self._matrix.shape[1], dtype=np.float32)
        for w, v in weight.items():
            if w in self._column:
                query[self._column[w]] = v / norm
        return self._matrix @ query


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


@torch.no_grad()
def look(handle: ModelHandle, picture: Picture | None) -> tuple[float, ...] | None:
    """The picture as the model's vision side sees it: input embeddings at picture positions, mean, unit length."""
    if picture is None:
        return None
    cache = handle.cache.setdefault("looks", {})
    if picture.key not in cache:
        ask = Ask("x", picture)
        prompt_inputs(handle, ask)
        batch = collate(handle, [ask])
        kept: list[torch.Tensor] = []
        with handle.hooked(handle.layers[0], lambda m, args: kept.append(args[0]), pre=True):
            handle.model(**batch.inputs, use_cache=False)
        mean = kept[0][0][batch.picture[0]].float().mean(0).cpu()
        cache[picture.key] = tuple((mean / mean.norm().clamp_min(1e-12)).tolist())
    return cache[picture.key]
