"""Generation entropy and reference score against hand-computed examples, and laws that hold for every text."""

from __future__ import annotations

import json
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.metrics.generation_entropy import entropy, ngram_entropy, words_of
from analysis.metrics.reference_score import fitted_vectorizer, likeness, published_vectorizer
from analysis.metrics.summary import summarise
from analysis.reading.load import load_run
from tests.helpers.fake_run import event, question, record, write_run

TEXTS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=30)


def test_entropy_by_hand() -> None:
    """a b a b c: the 2-grams ab, ba, ab, bc have shares 1/2, 1/4, 1/4 (1.5 bits), and three 3-grams are different (log 3)."""
    assert words_of("A b-c, d.") == ["A", "b", "-", "c", ",", "d", "."]
    assert entropy(list("aabc")) == pytest.approx(1.5)
    assert ngram_entropy("a b a b c") == pytest.approx((2 / 3 * 1.5 + 4 / 3 * log2(3)) / 2)


def test_one_repeated_word_and_texts_without_an_ngram_have_no_entropy() -> None:
    assert ngram_entropy("word " * 50) == ngram_entropy("") == ngram_entropy("one") == 0


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_entropy_does_not_depend_on_which_words_they_are_nor_on_the_direction(words: list[str]) -> None:
    text = ngram_entropy(" ".join(words))
    assert ngram_entropy(" ".join(words).translate(str.maketrans("abcd", "dbca"))) == pytest.approx(text)
    assert ngram_entropy(" ".join(reversed(words))) == pytest.approx(text)
    assert 0 <= text <= log2(max(2, len(words)))


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.randoms())
def test_likeness_does_not_depend_on_the_order_of_words_and_is_1_for_a_text_itself(words: list[str], random: Any) -> None:
    vectorizer = fitted_vectorizer(["aa bb", "bb cc dd"])
    text = " ".join(w * 2 for w in words)
    shuffled = random.sample(words, len(words))
    assert likeness(text, " ".join(w * 2 for w in shuffled), vectorizer) == pytest.approx(1.0 if words else 0.0)


def test_likeness_by_hand() -> None:
    """Weights 1, 2 and 2: (1, 2, 0) against (1, 0, 2) has the cosine 1/5, and against (2, 4, 0) the cosine 1."""
    vectorizer = published_vectorizer(np.array([1.0, 2.0, 2.0]), {"piano": 0, "music": 1, "house": 2})
    assert likeness("piano music", "Piano house", vectorizer) == pytest.approx(1 / 5)
    assert likeness("piano music", "music piano, music piano", vectorizer) == pytest.approx(1)
    assert likeness("piano", "nothing of it", vectorizer) == 0


def sampled_run(out: Path, root: Path | None = None) -> dict[str, Any]:
    """The metrics of a run with the texts of two edits, of which the first has reference texts; and the notes."""
    events, said = [event(i, i + 1) for i in range(2)], {"e0": ["plays piano music", "piano house"], "e1": ["x x x"]}
    questions, rows = [], []
    for own, texts in said.items():
        for i, text in enumerate(texts):
            names = {"prompt": "Ann", "topic": "P1", "aliases": ["Q5" if own == "e0" else "Q6"], "scoring": "sample"}
            questions.append(question(f"{own}{i}", own, "generation", **names))
            rows.append(record(question_id=f"{own}{i}", edit_id=own, split="generation", probe_step=2, generated=text))
    config = {"config": {"data_root": str(root)}} if root else {}
    found = summarise(load_run(write_run(out, events, questions, {"e": rows}, **config)), replicates=20)
    return found["editors"]["e"] | {"notes": found["run"]["notes"]}


def published_files(root: Path, weights: bool = True) -> Path:
    (root / "dsets").mkdir(parents=True)
    samples = [{"name": "Bob", "text": "Piano music"}, {"name": "Eve", "text": "Bob"}]
    snippets = [{"relation_id": "P1", "target_id": "Q5", "samples": samples}]
    (root / "dsets" / "attribute_snippets.json").write_text(json.dumps(snippets))
    if weights:
        np.save(root / "dsets" / "idf.npy", np.array([1.0, 2.0, 2.0]))
        (root / "dsets" / "tfidf_vocab.json").write_text(json.dumps({"piano": 0, "music": 1, "house": 2}))
    return root


def test_both_scores_of_a_run_by_hand(tmp_path: Path) -> None:
    """Texts with their prompt: "Ann plays piano music" (3 and 2 n-grams), "Ann piano house" (2 and 1), "Ann x x x" (3 and 2).

    Piano twice, music and house once weigh (2, 2, 2), the references (1, 2, 0): the cosine is 6 / sqrt(12 * 5).
    """
    got = sampled_run(tmp_path / "run", published_files(tmp_path / "data"))
    first = ((2 / 3 * log2(3) + 4 / 3 * 1) / 2 + (2 / 3 * 1) / 2) / 2
    second = (2 / 3 * (log2(3) - 2 / 3) + 4 / 3 * 1) / 2
    assert got["generation_entropy"]["value"] == pytest.approx((first + second) / 2)
    assert got["generation_entropy"]["n"] == 2
    assert got["reference_score"]["value"] == pytest.approx(6 / 60**0.5)
    assert got["reference_score"]["n"] == 1
    assert "reference_score: TF-IDF weights of idf.npy and tfidf_vocab.json" in got["notes"]


def test_weights_are_fitted_where_the_published_ones_are_absent(tmp_path: Path) -> None:
    got = sampled_run(tmp_path / "run", published_files(tmp_path / "data", weights=False))
    assert 0 < got["reference_score"]["value"] < 1
    assert any("no idf.npy and tfidf_vocab.json beside attribute_snippets.json" in n for n in got["notes"])


def test_without_reference_texts_one_line_says_so(tmp_path: Path) -> None:
    got = sampled_run(tmp_path / "run", tmp_path)
    assert "reference_score" not in got and "generation_entropy" in got
    assert [n for n in got["notes"] if "reference_score" in n] == [
        f"reference_score is absent: no attribute_snippets.json lies under the data root ({tmp_path})"
    ]


def test_a_file_of_another_layout_is_named(tmp_path: Path) -> None:
    (tmp_path / "attribute_snippets.json").write_text('{"P1": {}}')
    got = sampled_run(tmp_path / "run", tmp_path)
    assert any("the metric reference_score failed" in n and "is no list of relation_id" in n for n in got["notes"])


def test_a_run_without_sampled_texts_has_neither(tmp_path: Path) -> None:
    rows = [record(question_id="q", edit_id="e0", split="edit", probe_step=1, exact=True)]
    found = summarise(load_run(write_run(tmp_path, [event(0, 1)], [question("q", "e0")], {"e": rows})), replicates=20)
    assert not {"generation_entropy", "reference_score"} & set(found["editors"]["e"])
    assert not any("reference_score" in n for n in found["run"]["notes"])
