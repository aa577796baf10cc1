"""Nearest texts: by the cosine of sentence vectors, or by BM25 over words. Rows are only ever added."""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from testbed.editors.retrieval.encoders import SentenceEncoder

EXACT = 100_000
"""Rows up to which a search is one matrix product; beyond, faiss serves where it is installed."""
_QUERIES = 256
"""Queries of one matrix product."""
_MARGIN = 4
"""Times as many rows as wanted that are taken from an approximate index, since some of them no longer count."""
Hits = list[tuple[int, float]]
"""Rows and similarities, the most similar first."""


class TextIndex(Protocol):
    """Texts in rows 0, 1, ...; searches see the rows that are marked in `alive`, a bool array over the first of them."""

    def add(self, texts: Sequence[str]) -> None: ...

    def similarity(self, queries: Sequence[str], n: int) -> np.ndarray:
        """(queries, n) float32: similarity of each query to the first n rows, 1 for the same text (about 1 by words)."""
        ...

    def nearest(self, queries: Sequence[str], alive: np.ndarray, k: int) -> list[Hits]:
        """The k most similar rows that are alive; of equally similar ones the newer first."""
        ...


def best(similarity: np.ndarray, alive: np.ndarray, k: int) -> Hits:
    """The k largest of (n,) similarities among the rows alive, rounded to six digits; of equal ones the newer row."""
    rows = np.flatnonzero(alive)
    values = np.round(similarity[rows], 6)
    if len(rows) > k:
        among = values >= np.partition(values, -k)[-k]
        rows, values = rows[among], values[among]
    order = np.lexsort((-rows, -values))[:k]
    return [(int(rows[i]), float(values[i])) for i in order]


class Rows:
    """Vectors of one size in a growing array; what was handed out is never written again."""

    def __init__(self, size: int, rows: np.ndarray | None = None) -> None:
        self._room = np.zeros((0, size), np.float32)
        self.n = 0
        if rows is not None:
            self.add(rows)

    def add(self, rows: np.ndarray) -> None:
        if self.n + len(rows) > len(self._room):
            wider = np.zeros((max(64, 2 * (self.n + len(rows))), self._room.shape[1]), np.float32)
            wider[: self.n] = self._room[: self.n]
            self._room = wider
        self._room[self.n : self.n + len(rows)] = rows
        self.n += len(rows)

    def first(self, n: int) -> np.ndarray:
        """(n, size) view of the first n rows."""
        return self._room[:n]


class VectorIndex(TextIndex):
    """Cosine of sentence vectors: one matrix product, or a graph of faiss beyond `EXACT` rows.

    Args:
        encoder: makes the vectors.
        rows: vectors that were made before (a stored state).
    """

    def __init__(self, encoder: SentenceEncoder, rows: np.ndarray | None = None) -> None:
        self.encoder, self.rows = encoder, Rows(encoder.size, rows)
        self._graph: Any = None

    def add(self, texts: Sequence[str]) -> None:
        self.rows.add(self.encoder.encode(texts))

    def similarity(self, queries: Sequence[str], n: int) -> np.ndarray:
        return self.encoder.encode(queries) @ self.rows.first(n).T

    def nearest(self, queries: Sequence[str], alive: np.ndarray, k: int) -> list[Hits]:
        if len(alive) > EXACT and find_spec("faiss"):
            return self._nearest_by_graph(queries, alive, k)
        parts = [queries[i : i + _QUERIES] for i in range(0, len(queries), _QUERIES)]
        return [best(row, alive, k) for part in parts for row in self.similarity(part, len(alive))]

    def _nearest_by_graph(self, queries: Sequence[str], alive: np.ndarray, k: int) -> list[Hits]:
        found = self._search(self.encoder.encode(queries), _MARGIN * k)
        out = []
        for rows, values in zip(*found):
            kept = [(r, v) for r, v in zip(rows.tolist(), values.tolist()) if 0 <= r < len(alive) and alive[r]]
            out.append([(r, round(v, 6)) for r, v in kept[:k]])
        return out

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(queries, k) rows and inner products. The graph is grown row by row on one thread, so it is the same after a restart."""
        import faiss

        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            if self._graph is None:
                self._graph = faiss.IndexHNSWFlat(self.rows.first(0).shape[1], 32, faiss.METRIC_INNER_PRODUCT)
                self._graph.hnsw.efConstruction = 80
            self._graph.hnsw.efSearch = max(64, 2 * k)
            self._graph.add(self.rows.first(self.rows.n)[self._graph.ntotal :])
            values, rows = self._graph.search(queries, k)
        finally:
            faiss.omp_set_num_threads(threads)
        return rows, values


class WordIndex(TextIndex):
    """BM25 (SQLite's FTS5: k1 = 1.2, b = 0.75) divided by the weight of the query's words.

    The inverse document frequency of a word that no text holds is the largest, so unknown words count against
    every text. A word in more than half of the texts weighs next to nothing, as FTS5 has it.
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
            for row, score in self._scores(query):
                if row < n:
                    out[i, row] = score
        return out

    def nearest(self, queries: Sequence[str], alive: np.ndarray, k: int) -> list[Hits]:
        return [best(self.similarity([q], len(alive))[0], alive, k) for q in queries]

    def _scores(self, query: str) -> list[tuple[int, float]]:
        """Rows that share a word of weight with the query, and their scores."""
        weight = self._weights(list(dict.fromkeys(words(query))))
        told = [w for w, v in weight.items() if v > _FLOOR] or list(weight)
        whole = sum(weight.values())
        if not told or whole == 0:
            return []
        match = " OR ".join(f'"{w}"' for w in told)
        found = self._texts.execute("SELECT rowid, -bm25(facts) FROM facts WHERE facts MATCH ?", (match,))
        return [(row, score / whole) for row, score in found]

    def _weights(self, query: list[str]) -> dict[str, float]:
        """Inverse document frequency of each word, as FTS5 computes it."""
        marks = ",".join("?" * len(query))
        seen = dict(self._texts.execute(f"SELECT term, doc FROM vocabulary WHERE term IN ({marks})", query))
        return {w: max(math.log((self.n - (d := seen.get(w, 0)) + 0.5) / (d + 0.5)), _FLOOR) for w in query}


_FLOOR = 1e-6
"""Least weight of a word in FTS5."""


def words(text: str) -> list[str]:
    """Letters and digits in runs, case folded."""
    return re.findall(r"[^\W_]+", text.casefold())
