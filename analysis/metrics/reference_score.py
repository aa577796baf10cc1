"""Reference score, which papers call consistency: is what a model writes about an edited subject like texts about its new value?

The cosine of two TF-IDF vectors: of the sampled texts of an edit, joined, and of the reference texts, joined. These are the starts
of Wikipedia articles about subjects that truly have the new value (Meng et al. 2022, ROME, section 3.4). The published files lie
under the data root: `attribute_snippets.json` has the texts, and `idf.npy` and `tfidf_vocab.json` beside it the weights.
Papers print the score times 100.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.metrics.answers import at_end
from analysis.metrics.generation_entropy import SPLIT, texts_by_edit
from analysis.metrics.plugin import AnswerMetric
from analysis.reading.load import EditorRun, Run
from testbed.core.registry import METRICS

SNIPPETS, IDF, VOCABULARY = "attribute_snippets.json", "idf.npy", "tfidf_vocab.json"
"""Names of the published files."""


@dataclass(frozen=True)
class References:
    """texts: reference texts by the ids of relation and value. vectorizer: a fitted TfidfVectorizer. source: for the user."""

    texts: dict[tuple[str, str], tuple[str, ...]]
    vectorizer: Any
    source: str


@METRICS.register("reference_score")
class ReferenceScore(AnswerMetric):
    """Mean over the edits with reference texts, at the end, in [0, 1].

    Absent without the questions of the probe `generation`, and without the published files under the run's data root or
    scikit-learn, which a note says.
    """

    summary = "Reference score (consistency): likeness of sampled texts to texts about the new value"
    short = "Consistency"
    unit = "share"
    better = 1

    def answers(self, run: Run, editor: EditorRun) -> pd.DataFrame:
        rows = at_end(editor.records, SPLIT).drop_duplicates("edit")
        found = _references_of(run) if len(rows) else None
        return rows.iloc[:0] if found is None else rows[[bool(own) for own in _own_texts(run, rows, found)]]

    def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
        found, texts = _references_of(run), texts_by_edit(run, editor)
        if found is None:  # then `answers` gave no rows
            return np.empty(0)
        own = _own_texts(run, rows, found)
        return np.array([likeness(" ".join(texts[e]), " ".join(r), found.vectorizer) for e, r in zip(rows["edit"], own)])


def likeness(text: str, reference: str, vectorizer: Any) -> float:
    """Cosine of the TF-IDF vectors of two texts, in [0, 1]; 0 where one holds no word of the vocabulary."""
    a, b = vectorizer.transform([text, reference]).toarray()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return min(1.0, float(a @ b / norm)) if norm else 0.0


def _own_texts(run: Run, rows: pd.DataFrame, found: References) -> list[tuple[str, ...]]:
    """The reference texts of each row's value; () where its question names no value with texts."""
    questions = run.questions.iloc[rows["question"]]
    named = [[(topic, name) for name in (() if names is None else names)] for topic, names in zip(questions["topic"], questions["aliases"])]
    return [next((found.texts[key] for key in keys if key in found.texts), ()) for keys in named]


def _references_of(run: Run) -> References | None:
    """The published files under the run's data root; None where they cannot be used, with a note in `run.notes`."""
    root = run.manifest.get("config", {}).get("data_root")
    paths = [p for p in (Path(root) / SNIPPETS, *sorted(Path(root).glob(f"*/{SNIPPETS}"))) if p.is_file()] if root else []
    if not paths:
        run.notes.append(f"reference_score is absent: no {SNIPPETS} lies under the data root ({root or 'none was given'})")
        return None
    try:
        found = _load(paths[0], paths[0].stat().st_mtime_ns)
    except ImportError:
        run.notes.append("reference_score is absent: it needs scikit-learn (pip install 'lifelong-editing-testbed[reference-score]')")
        return None
    run.notes.append(f"reference_score: {found.source}")
    return found


@lru_cache(1)
def _load(path: Path, changed: int) -> References:
    """Read the files. changed: time of the change, so that a new file is read anew. Raises ValueError for another layout."""
    try:
        texts = {(e["relation_id"], e["target_id"]): tuple(s["text"] for s in e["samples"]) for e in json.loads(path.read_text("utf-8"))}
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is no list of relation_id, target_id and samples with a text ({type(e).__name__}: {e})") from e
    published = [path.with_name(name) for name in (IDF, VOCABULARY)]
    if all(p.is_file() for p in published):
        weights, vocabulary = np.load(published[0], allow_pickle=False), json.loads(published[1].read_text("utf-8"))
        return References(texts, published_vectorizer(weights, vocabulary), f"TF-IDF weights of {IDF} and {VOCABULARY}")
    every = [text for own in texts.values() for text in own]
    return References(
        texts, fitted_vectorizer(every), f"no {IDF} and {VOCABULARY} beside {SNIPPETS}, so weights are of its {len(every):,} texts"
    )


def published_vectorizer(idf: np.ndarray, vocabulary: dict[str, int]) -> Any:
    """A TfidfVectorizer with given weights (vocabulary,). Raises ImportError without scikit-learn."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(vocabulary=vocabulary)
    vectorizer.idf_ = idf
    return vectorizer


def fitted_vectorizer(texts: Sequence[str]) -> Any:
    """A TfidfVectorizer fitted to these texts. Raises ImportError without scikit-learn."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer().fit(texts)
