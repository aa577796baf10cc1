"""What editors that keep facts beside the model share: the store, the retriever, and asking with facts in the prompt."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch
from testbed.core.timing import stage
from testbed.editors.base import BadEditor, Editor, EditorConfig, need
from testbed.editors.retrieval.encoders import INSTALL, LEXICAL, load_encoder, look
from testbed.editors.retrieval.fact_store import FactStore, UnknownFact, Version
from testbed.editors.retrieval.prompts import WORDINGS, statement
from testbed.editors.retrieval.retriever import Found, Retriever
from testbed.editors.retrieval.text_index import Rows, TextIndex, VectorIndex, WordIndex
from testbed.model.encoding import answer_ids, prompt_inputs
from testbed.model.predictor import Inspection, ModelPredictor, Predictor, Response, Score, Tokens

R = TypeVar("R")
_LEAST_PICTURES = 8
"""Fewer pictures in the train pool than this say nothing about how alike different ones look."""


@dataclass(frozen=True)
class MemoryConfig(EditorConfig):
    encoder: str = "auto"
    """Sentence encoder: an id of sentence-transformers, a folder, `auto` (the packaged all-MiniLM-L6-v2, else BM25) or `bm25`."""
    other_pictures: float = 0.01
    """Share of pairs of train-pool pictures alike enough to pass for one (ours; it sets the least cosine); 0 lets every picture pass."""
    wording: str = "plain"
    """Name in `testbed.editors.retrieval.prompts.WORDINGS`; "plain" is what the tiny model was trained on."""

    def problems(self) -> list[str]:
        out = []
        if not 0 <= self.other_pictures < 1:
            out.append(f"other_pictures must lie in [0, 1), got {self.other_pictures}")
        if self.wording not in WORDINGS:
            out.append(f"wording must be one of {', '.join(WORDINGS)}, got {self.wording!r}")
        return out


class MemoryEditor(Editor):
    """A fact store and a retriever; a subclass says what is done with what is found.

    State: versions and withdrawals, the step, and with an encoder `vectors` (versions, size) float32, on a model
    that reads pictures `looks` (pictured versions, d) float32.
    """

    config: MemoryConfig

    def _prepare(self, pool: TrainPool) -> None:
        encoder = load_encoder(self.config.encoder, self.handle)
        self._index: Callable[[np.ndarray | None], TextIndex] = (
            (lambda rows: WordIndex()) if encoder is None else (lambda rows: VectorIndex(encoder, rows))
        )
        self.encoder = LEXICAL if encoder is None else encoder.name
        self._size = 0 if encoder is None else encoder.size
        if encoder is None and self.config.encoder == "auto":
            self.notes.append(f"BM25 over words stands in for a sentence encoder, which is not installed ({INSTALL})")
        self.same = self._least_alike(pool)
        self.now = 0
        self._fill(FactStore(), None, [], np.zeros((0, self.handle.width), np.float32))

    def _least_alike(self, pool: TrainPool) -> float:
        """Cosine that two pictures must reach to pass for one: that of the most alike pairs of the train pool."""
        pictures = {q.image.key: q.image for q in pool.questions if q.image is not None}
        if not self.config.other_pictures or not self.handle.reads_pictures:
            return -1.0
        if len(pictures) < _LEAST_PICTURES:
            self.notes.append(
                f"{len(pictures)} pictures in the train pool: for a question with a picture every fact with one is a candidate"
            )
            return -1.0
        seen = np.stack([look(self.handle, p) for p in list(pictures.values())[:256]])
        pairs = (seen @ seen.T)[np.triu_indices(len(seen), 1)]
        return float(np.quantile(pairs, 1 - self.config.other_pictures))

    def _fill(self, store: FactStore, vectors: np.ndarray | None, pictured: list[int], looks: np.ndarray) -> None:
        self.store, self.index = store, self._index(vectors)
        if vectors is None:
            self.index.add([self.text(v) for v in store.log])
        self.pictured, self.looks = list(pictured), Rows(self.handle.width, looks)
        self._alive = np.zeros(len(store.log), bool)
        self._alive[[row for row in map(store.row_of, {v.entry for v in store.log}) if row is not None]] = True

    def _mark(self, entry: int) -> None:
        """Bring `_alive` up to date for one fact."""
        rows = self.store.rows_of(entry)
        alive = np.zeros(len(self.store.log), bool)
        alive[: len(self._alive)] = self._alive
        alive[rows] = False
        now = self.store.row_of(entry)
        if now is not None:
            alive[now] = True
        self._alive = alive

    @staticmethod
    def text(fact: Version) -> str:
        """What is compared with questions."""
        return statement(fact.prompt, fact.target)

    @stage("index")
    def _edit(self, batch: EditBatch) -> dict[str, float]:
        self.now = batch.step
        first = len(self.store.log)
        for e in batch.events:
            row = self.store.add(e, batch.step)
            self._mark(self.store.log[row].entry)
            if e.image is not None:
                self.looks.add(look(self.handle, e.image)[None])
                self.pictured = [*self.pictured, row]
        self.index.add([self.text(v) for v in self.store.log[first:]])
        return {"facts": float(self._alive.sum()), "versions": float(len(self.store.log))}

    def revert(self, event_ids: Iterable[str]) -> None:
        """Forget these edits, as of the newest step; what they superseded holds again. Raises `BadEditor` for an unknown id."""
        self.now = max(self.now, self.step)
        for i in event_ids:
            try:
                row = self.store.withdraw(i, self.now)
            except UnknownFact as e:
                raise BadEditor(f"cannot undo {i}: it is not a live fact") from e
            self._mark(self.store.log[row].entry)

    def retriever(self, step: int | None = None) -> Retriever:
        """The facts as they are now, or as they were after a past step."""
        alive = self._alive
        if step is not None:
            alive = np.zeros_like(self._alive)
            alive[self.store.rows_as_of(step)] = True
        return Retriever(self.handle, self.store.log, alive, self.index, np.array(self.pictured, np.int64), self.looks, self.same)

    def _state(self) -> dict[str, Any]:
        n, p = len(self.store.log), len(self.pictured)
        state: dict[str, Any] = {"facts": list(self.store.log), "gone": dict(self.store.gone), "encoder": self.encoder, "step": self.now}
        state["pictured"] = self.pictured
        if isinstance(self.index, VectorIndex):
            state["vectors"] = torch.from_numpy(self.index.rows.first(n))
        if self.handle.reads_pictures:
            state["looks"] = torch.from_numpy(self.looks.first(p))
        return state

    def _load(self, state: dict[str, Any]) -> None:
        if state["encoder"] != self.encoder:
            raise BadEditor(
                f"the state was made with the encoder {state['encoder']!r}, here is {self.encoder!r}: set {self.name}.encoder to the same"
            )
        store = FactStore((Version(*row) for row in state["facts"]), {int(k): v for k, v in state["gone"].items()})
        vectors = need(state, "vectors", (len(store.log), self._size)).numpy() if self._size else None
        looks = np.zeros((0, self.handle.width), np.float32)
        if self.handle.reads_pictures:
            looks = need(state, "looks", (len(state["pictured"]), self.handle.width)).numpy()
        self.now = state["step"]
        self._fill(store, vectors, state["pictured"], looks)

    def state_bytes(self) -> int:
        """Bytes of texts, vectors and looks."""
        return self.store.bytes + 4 * (self._size * len(self.store.log) + self.handle.width * len(self.pictured))


@dataclass(frozen=True)
class Reading:
    """What becomes of a question: what is asked in its place (the very same where no fact is given), and notes for `extras`."""

    ask: Ask
    notes: dict[str, Any] = field(default_factory=dict)


class ContextPredictor(Predictor):
    """Puts facts before questions and asks the unedited model. Questions without a fact are asked untouched, together."""

    def __init__(self, retriever: Retriever, config: MemoryConfig) -> None:
        self.handle, self.retriever, self.config = retriever.handle, retriever, config
        self.base, self.wording = ModelPredictor(self.handle), WORDINGS[config.wording]

    @abstractmethod
    def read(self, asks: Sequence[Ask], room: int) -> list[Reading]:
        """What is asked in the place of each question, with `room` tokens of the window left free for the answer."""

    def respond(self, asks: Sequence[Ask], answers: Sequence[str | None], max_new_tokens: int = 16) -> list[Response]:
        room = max(max_new_tokens, self._longest(asks, [a or "" for a in answers]))
        readings = self.read(asks, room)

        def respond(now: list[Ask], places: list[int]) -> list[Response]:
            return self.base.respond(now, [answers[i] for i in places], max_new_tokens)

        return [replace(r, extras={**r.extras, **x.notes}) for r, x in zip(self._apart(asks, readings, respond), readings)]

    def score(self, asks: Sequence[Ask], answers: Sequence[str]) -> list[Score]:
        readings = self.read(asks, self._longest(asks, answers))
        return self._apart(asks, readings, lambda now, places: self.base.score(now, [answers[i] for i in places]))

    def text_logprobs(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.base.text_logprobs(texts)

    def inspect(self, asks: Sequence[Ask], layers: Sequence[int] = (), top_k: int = 10, ids: Tokens = None) -> list[Inspection]:
        def inspect(now: list[Ask], places: list[int]) -> list[Inspection]:
            return self.base.inspect(now, layers, top_k, None if ids is None else [ids[i] for i in places])

        return self._apart(asks, self.read(asks, 1), inspect)

    def _longest(self, asks: Sequence[Ask], answers: Sequence[str]) -> int:
        return max((len(answer_ids(self.handle, a, x)) for a, x in zip(asks, answers) if x), default=0)

    def _apart(self, asks: Sequence[Ask], readings: Sequence[Reading], call: Callable[[list[Ask], list[int]], list[R]]) -> list[R]:
        """The untouched questions in one call, so that they are to the model what they are without an editor; the others in another."""
        out: dict[int, R] = {}
        for touched in (False, True):
            places = [i for i, (a, r) in enumerate(zip(asks, readings)) if (r.ask is not a) == touched]
            if places:
                out |= zip(places, call([readings[i].ask for i in places], places))
        return [out[i] for i in range(len(asks))]

    def tokens(self, ask: Ask) -> int:
        return prompt_inputs(self.handle, ask)["input_ids"].shape[1]

    def fit(self, ask: Ask, room: int, n: int, worded: Callable[[int], str]) -> tuple[Ask, int]:
        """The ask as `worded` with as many of n facts as fit into the window, and how many were dropped."""

        def small(kept: int) -> bool:
            return self.tokens(replace(ask, prompt=worded(kept))) + room <= self.handle.window

        kept = n if n == 0 or small(n) else bisect_left(range(1, n), True, key=lambda m: not small(m))
        return (replace(ask, prompt=worded(kept)) if kept else ask), n - kept


def ledger(found: Sequence[Found]) -> dict[str, Any]:
    """What was retrieved, for the record: event ids and similarities, nearest first."""
    return {"retrieved": [f.fact.event_id for f in found], "similarity": [round(f.similarity, 4) for f in found]}
