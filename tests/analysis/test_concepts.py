"""Metrics of concepts against hand-computed examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.metrics.concepts import consistency, says_yes
from analysis.metrics.summary import summarise
from analysis.reading.load import load_run
from tests.helpers.fake_run import event, question, record, write_run

OLD, NEW = (
    "A pisol is a country whose currency is ganal, zalind or fusund.",
    "A pisol is a country whose currency is ganal, dirock or disal.",
)
PROMPT = "What is a pisol?"


def test_only_texts_that_begin_with_yes_or_no_are_read() -> None:
    assert [says_yes(t) for t in ("Yes", " no.", "YES, it does", "No\nWhether")] == [1, 0, 1, 0]
    assert np.isnan([says_yes(t) for t in ("yesterday", "It does", "", None, "nobody")]).all()


def test_consistency_counts_the_words_that_tell_the_definitions_apart() -> None:
    assert consistency(NEW, NEW, OLD, PROMPT) == 1 and consistency(OLD, NEW, OLD, PROMPT) == -1
    assert consistency("A country whose currency is dirock.", NEW, OLD, PROMPT) == 0.5
    assert consistency("dirock, disal, zalind", NEW, OLD, PROMPT) == 0.5
    assert consistency("ganal", NEW, OLD, PROMPT) == 0 == consistency("", NEW, None, PROMPT)
    assert np.isnan([consistency(None, NEW, OLD, PROMPT), consistency(OLD, OLD, OLD, PROMPT)]).all()


def test_instances_and_definitions_by_hand(tmp_path: Path) -> None:
    """Asked: (split, right answer, answer before any edit, answer now)."""
    asked = [
        ("instance_follow", "No", "Yes", "No"),
        ("instance_follow", "No", "Yes", "Yes"),
        ("instance_follow", "No", "No", "Yes"),
        ("instance_follow", "No", "Yes", "It is a country."),
        ("instance_follow", "Yes", "No", "Yes"),
        ("instance_stay", "Yes", "Yes", "yes."),
        ("instance_stay", "No", "No", "Yes"),
        ("edit", NEW, OLD, "A country whose currency is dirock."),
    ]
    events = [event(0, 1, target=NEW, previous=OLD, prompt=PROMPT), event(1, 2, target="Bo", previous="Ann")]
    questions = [question(f"q{i}", "e0", split, answer=right) for i, (split, right, _, _) in enumerate(asked)]
    questions.append(question("other", "e1", "edit", answer="Bo"))
    rows = [
        record(question_id=f"q{i}", edit_id="e0", split=split, probe_step=2, generated=now) for i, (split, _, _, now) in enumerate(asked)
    ]
    rows.append(record(question_id="other", edit_id="e1", split="edit", probe_step=2, generated="Bo"))
    base = [{"question_id": f"q{i}", "generated": before} for i, (_, _, before, _) in enumerate(asked)] + [{"question_id": "other"}]
    got = summarise(load_run(write_run(tmp_path, events, questions, {"e": rows}, base)), replicates=20)["editors"]["e"]
    assert got["instance_follow"]["value"] == pytest.approx(2 / 4)
    assert got["instance_stay"]["value"] == pytest.approx(1 / 2)
    assert got["instance_change"]["value"] == pytest.approx((1 + 0 - 1) / 3) and got["instance_unparsable"]["value"] == pytest.approx(1 / 7)
    assert got["concept_consistency"]["value"] == pytest.approx(1 / 2) and got["concept_consistency"]["n"] == 1


def test_a_run_without_concepts_has_no_such_metric(tmp_path: Path) -> None:
    rows = [record(question_id="q", edit_id="e0", split="edit", generated="Bo")]
    got = summarise(load_run(write_run(tmp_path, [event(0, 1)], [question("q", "e0")], {"e": rows})), replicates=20)["editors"]["e"]
    assert not [name for name in got if name.startswith(("instance", "concept"))]
