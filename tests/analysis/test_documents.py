"""Metrics of documents against hand-computed examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.metrics.documents import LONG, entities, recall, rouge_l
from analysis.metrics.summary import summarise
from analysis.reading.load import load_run
from tests.helpers.fake_run import event, question, record, write_run

DOCUMENT = " ".join(f"w{i}" for i in range(LONG))


def test_rouge_l_by_hand() -> None:
    """The longest common subsequence of "a b c d" and "b x d" has two words: precision 2/3, recall 1/2."""
    pytest.importorskip("rouge_score")
    got = rouge_l(["a b c d", "a b", "a b"], ["B x D.", "", None])
    assert got[0] == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2)) and got[1] == 0 and np.isnan(got[2])


def test_documents_are_compared_and_short_answers_are_not(tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    events = [event(i, i + 1) for i in range(3)]
    half = " ".join(DOCUMENT.split()[: LONG // 2])
    asked = [("edit", DOCUMENT, half), ("edit", DOCUMENT, DOCUMENT), ("edit", "short", "short"), ("sub_question", "a b", "a c")]
    questions, rows = [], []
    for i, (split, answer, said) in enumerate(asked):
        own = events[min(i, 2)]["edit_id"]
        questions.append(question(f"q{i}", own, split, answer=answer))
        rows.append(record(question_id=f"q{i}", edit_id=own, split=split, probe_step=3, exact=said == answer, generated=said))
    got = summarise(load_run(write_run(tmp_path, events, questions, {"e": rows})), replicates=20)["editors"]["e"]
    assert got["rouge_l"]["value"] == pytest.approx((2 / 3 + 1) / 2) and got["rouge_l"]["n"] == 2
    assert got["rouge_l_sub_question"]["value"] == pytest.approx(1 / 2)
    assert got["sub_question_success_gen"]["value"] == 0 and "rouge_l_rephrased" not in got


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ModuleNotFoundError, match="install the extra `documents`"):
        rouge_l(["a"], ["a"])


def test_what_an_edit_puts_in_takes_out_and_leaves_is_found_from_both_documents() -> None:
    before = "Ely is a club. The coach of Ely is Ann Lee. The mascot of Ely is crow. The sponsor of Ely is Mukor."
    after = before.replace("Ann Lee", "Bo").replace("crow", "red fox")
    assert entities(after, before, "What is known about Ely?") == (("Bo", "red fox"), ("Ann Lee", "crow"), ("Mukor",))
    alone = entities("Ann was born in New Ely in 1985. Her father is Bob.", None, "Who is Ann?")
    assert alone == (("New Ely", "1985", "Bob"), (), ())


def test_an_old_entity_that_stands_elsewhere_in_the_new_document_is_not_old() -> None:
    assert entities("Its coach is Bo. Its friend is Ann.", "Its coach is Ann. Its friend is Ann.", "Who?").old == ()


def test_entities_are_counted_as_whole_words() -> None:
    assert recall("the coach is bo.", ["Bo", "Ann"]) == 0.5 and recall("bob", ["Bo"]) == 0.0
    assert np.isnan(recall(None, ["Bo"])) and np.isnan(recall("x", []))


def test_entities_of_a_generated_document_by_hand(tmp_path: Path) -> None:
    before = DOCUMENT + ". The coach is Ann. The friend is Cy."
    target, said = before.replace("Ann", "Bo"), ["The coach is Bo. The friend is Cy.", "The coach is Ann.", "Bo or Ann"]
    events = [event(i, i + 1) | {"target": target, "previous": before, "prompt": "Tell me."} for i in range(3)]
    ids = [e["edit_id"] for e in events]
    questions = [question(f"q{i}", own, "edit", answer=target) for i, own in enumerate(ids)]
    rows = [record(question_id=f"q{i}", edit_id=ids[i], split="edit", probe_step=3, generated=text) for i, text in enumerate(said)]
    got = summarise(load_run(write_run(tmp_path, events, questions, {"e": rows})), replicates=20)["editors"]["e"]
    assert got["entities_edited"]["value"] == pytest.approx(2 / 3)
    assert got["entities_old_absent"]["value"] == pytest.approx(1 / 3)
    assert got["entities_untouched"]["value"] == pytest.approx(1 / 3)
