"""What the retrieval editors share: the fact store, the retriever, and questions with facts put before them."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch
from testbed.core.timing import timed
from testbed.editors.base import BadEditor, Editor, EditorConfig, need, require_same
from testbed.editors.retrieval.fact_store import FactStore, Version
from testbed.editors.retrieval.prompts import TEMPLATES
from testbed.editors.retrieval.retriever import (
    INSTALL,
    LEXICAL,
    GrowingArray,
    Retrieved,
    Retriever,
    TextIndex,
    VectorIndex,
    WordIndex,
    image_embedding,
    load_encoder,
)
from testbed.model.encoding import answer_ids, prompt_inputs
from testbed.model.predictor import Inspection, ModelPredictor, OverModel, Predictor, Response, Score, Tokens

R = TypeVar("R")
_MIN_POOL_PICTURES = 8
"""Fewer pictures than this in the train pool say nothing about how similar different pictures are."""
_MAX_POOL_PICTURES = 256


@dataclass(frozen=True)
class FactEditorConfig(EditorConfig):
    encoder: str = "auto"
    """Sentence encoder: an id of sentence-transformers, a folder, `auto` (the packaged all-MiniLM-L6-v2, else BM25) or `bm25`."""
    other_pictures: float = 0.005
    """Share of the pairs of different train-pool pictures that the least cosine lets pass as the same (ours); 0 lets every pair pass."""
    wording: str = "plain"
    """Prompt template, by its name in `testbed.editors.retrieval.prompts.TEMPLATES`; "plain" is what the tiny model was trained on."""

    def problems(self) -> list[str]:
        out = super().problems()
        if not 0 <= self.other_pictures < 1:
            out.append(f"other_pictures must be 0 or more and less than 1, got {self.other_pictures}")
        if self.wording not in TEMPLATES:
            out.append(f"wording must be one of {', '.join(TEMPLATES)}, got {self.wording!r}")
        return out


class FactEditor(Editor):
    """A fact store and a retriever; a subclass says how a question is answered with the facts that are retrieved.

    State: the versions (`facts`), the withdrawn ones (`gone`), the step, the rows with a picture (`pictured`); with an
    encoder `vectors` (versions, size) float32; on a model that reads pictures `looks` (pictures, d) float32.
    """

    config: FactEditorConfig

    def _prepare(self, pool: TrainPool) -> None:
        encoder = load_encoder(self.config.encoder, self.handle)
        self._new_index: Callable[[np.ndarray | None], TextIndex] = (
            (lambda rows: WordIndex()) if encoder is None else (lambda rows: VectorIndex(encoder, rows))
        )
        self.encoder = LEXICAL if encoder is None else encoder.name
        self._vector_size = 0 if encoder is None else encoder.size
        if encoder is None and self.config.encoder == "auto":
            self.notes.append(f"BM25 over words stands in for a sentence encoder, which is not installed ({INSTALL})")
        self.min_image_similarity = self._calibrated_image_similarity(pool)
        self.newest_step = 0
        self._fill(FactStore(), None, [], np.zeros((0, self.handle.width), np.float32))

    def _calibrated_image_similarity(self, pool: TrainPool) -> float:
        """The cosine that only the share `other_pictures` of the pairs of different train-pool pictures exceeds; -1 for no limit."""
        pictures = {q.image.key: q.image for q in pool.questions if q.image is not None}
        if not self.config.other_pictures or not self.handle.reads_pictures:
            return -1.0
        if len(pictures) < _MIN_POOL_PICTURES:
            few = f"{len(pictures)} pictures in the train pool"
            self.notes.append(f"{few}: for a question with a picture every fact with one is a candidate")
            return -1.0
        embeddings = np.stack([image_embedding(self.handle, p) for p in list(pictures.values())[:_MAX_POOL_PICTURES]])
        pairs = (embeddings @ embeddings.T)[np.triu_indices(len(embeddings), 1)]
        return float(np.quantile(pairs, 1 - self.config.other_pictures))

    def _fill(self, store: FactStore, vectors: np.ndarray | None, image_rows: list[int], images: np.ndarray) -> None:
        self.store, self.index = store, self._new_index(vectors)
        if vectors is None:
            self.index.add([v.statement for v in store.log])
        self.image_rows, self.image_embeddings = list(image_rows), GrowingArray(images)

    @timed("index")
    def _edit(self, batch: EditBatch) -> dict[str, float]:
        self.newest_step = batch.step
        first = len(self.store.log)
        for e in batch.events:
            row = self.store.add(e, batch.step)
            if e.image is not None:
                self.image_embeddings.add(image_embedding(self.handle, e.image)[None])
                self.image_rows = [*self.image_rows, row]
        self.index.add([v.statement for v in self.store.log[first:]])
        return {"facts": float(self.store.alive().sum()), "versions": float(len(self.store.log))}

    def revert(self, event_ids: Iterable[str]) -> None:
        """Forget these edits as of the newest step, so that what they superseded holds again. Raises `BadEditor` for an unknown id."""
        self.newest_step = max(self.newest_step, self.step)
        for i in event_ids:
            try:
                self.store.withdraw(i, self.newest_step)
            except KeyError as e:
                raise BadEditor(f"cannot undo {i}: it is not a live fact") from e

    def retriever(self, step: int | None = None) -> Retriever:
        """Retrieval among the facts as they are now, or as they were after a past step."""
        images = (np.array(self.image_rows, np.int64), self.image_embeddings, self.min_image_similarity)
        return Retriever(self.handle, self.store.log, self.store.alive(step), self.index, *images)

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"facts": list(self.store.log), "gone": dict(self.store.gone)}
        state |= {"encoder": self.encoder, "step": self.newest_step, "pictured": self.image_rows}
        if isinstance(self.index, VectorIndex):
            state["vectors"] = torch.from_numpy(self.index.rows.first(len(self.store.log)))
        if self.handle.reads_pictures:
            state["looks"] = torch.from_numpy(self.image_embeddings.first(len(self.image_rows)))
        return state

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, {"encoder": self.encoder})
        store = FactStore((Version(*row) for row in state["facts"]), {int(k): v for k, v in state["gone"].items()})
        vectors = need(state, "vectors", (len(store.log), self._vector_size)).numpy() if self._vector_size else None
        images = np.zeros((0, self.handle.width), np.float32)
        if self.handle.reads_pictures:
            images = need(state, "looks", (len(state["pictured"]), self.handle.width)).numpy()
        self.newest_step = state["step"]
        self._fill(store, vectors, state["pictured"], images)

    def state_bytes(self) -> int:
        """Bytes of the texts, of their vectors and of the image embeddings."""
        return self.store.bytes + 4 * (self._vector_size * len(self.store.log) + self.handle.width * len(self.image_rows))


@dataclass(frozen=True)
class PromptedAsk:
    """A question as the model is asked it: the given `Ask` object itself where no fact is put before it. `notes` go into `extras`."""

    ask: Ask
    notes: dict[str, Any]


class ContextPredictor(OverModel):
    """Puts facts before questions and asks the unedited model. Questions without a fact are asked unchanged, in a call of their own."""

    def __init__(self, retriever: Retriever, config: FactEditorConfig) -> None:
        self.handle, self.retriever, self.config = retriever.handle, retriever, config
        self.base, self.template = ModelPredictor(self.handle), TEMPLATES[config.wording]
        self.reader = self.base
        """What answers the questions that have a fact before them."""

    @abstractmethod
    def add_facts(self, asks: Sequence[Ask], answer_tokens: int) -> list[PromptedAsk]:
        """Each question with facts before it; every prompt leaves `answer_tokens` tokens of the model's window to the answer."""

    def respond(self, asks: Sequence[Ask], answers: Sequence[str | None], max_new_tokens: int = 16) -> list[Response]:
        prompted = self.add_facts(asks, max(max_new_tokens, self._longest(asks, [a or "" for a in answers])))
        responses = self._in_two_calls(
            asks, prompted, lambda model, part, at: model.respond(part, [answers[i] for i in at], max_new_tokens)
        )
        return [replace(r, extras={**r.extras, **p.notes}) for r, p in zip(responses, prompted)]

    def score(self, asks: Sequence[Ask], answers: Sequence[str]) -> list[Score]:
        prompted = self.add_facts(asks, self._longest(asks, answers))
        return self._in_two_calls(asks, prompted, lambda model, part, at: model.score(part, [answers[i] for i in at]))

    def inspect(self, asks: Sequence[Ask], layers: Sequence[int] = (), top_k: int = 10, ids: Tokens = None) -> list[Inspection]:
        def inspect(model: Predictor, part: list[Ask], at: list[int]) -> list[Inspection]:
            return model.inspect(part, layers, top_k, None if ids is None else [ids[i] for i in at])

        return self._in_two_calls(asks, self.add_facts(asks, 1), inspect)

    def _longest(self, asks: Sequence[Ask], answers: Sequence[str]) -> int:
        return max((len(answer_ids(self.handle, a, x)) for a, x in zip(asks, answers) if x), default=0)

    def _in_two_calls(
        self, asks: Sequence[Ask], prompted: list[PromptedAsk], call: Callable[[Predictor, list[Ask], list[int]], list[R]]
    ) -> list[R]:
        """Answers in the order of `asks`, which `call` gets from a model for a part of the questions and their indices.

        Unchanged questions are one part, so that they share batches with each other alone, as without an editor.
        """
        out: dict[int, R] = {}
        for changed in (False, True):
            indices = [i for i, (a, p) in enumerate(zip(asks, prompted)) if (p.ask is not a) == changed]
            if indices:
                out |= zip(indices, call(self.reader if changed else self.base, [prompted[i].ask for i in indices], indices))
        return [out[i] for i in range(len(asks))]

    def tokens(self, ask: Ask) -> int:
        """Length of the prompt in tokens."""
        return prompt_inputs(self.handle, ask)["input_ids"].shape[1]

    def fit(self, ask: Ask, answer_tokens: int, n: int, prompt: Callable[[int], str]) -> tuple[Ask, int]:
        """The question with as many of n facts as fit into the window beside the answer, and how many were dropped.

        `prompt(m)` is the prompt with the first m facts; where not even one fits, the given question is returned itself.
        """

        def fits(m: int) -> bool:
            return self.tokens(replace(ask, prompt=prompt(m))) + answer_tokens <= self.handle.window

        kept = n if n == 0 or fits(n) else bisect_left(range(1, n), True, key=lambda m: not fits(m))
        return (replace(ask, prompt=prompt(kept)) if kept else ask), n - kept


def retrieval_log(retrieved: Sequence[Retrieved]) -> dict[str, Any]:
    """The retrieved event ids and their similarities, the most similar first, as `extras` store them."""
    return {"retrieved": [f.fact.event_id for f in retrieved], "similarity": [round(f.similarity, 4) for f in retrieved]}
