"""The lenient scoring modes from stored texts, and answers that an older grading judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.metrics.summary import summarise
from analysis.reading.load import Run, load_run
from testbed.core.grading import VERSION
from tests.helpers.fake_run import event, question, record, write_run

MODES = ["gen", "begins", "contains"]


def run_of(out: Path, gold: str, said: str | None, stored: bool | None, split: str = "edit", **manifest: object) -> Run:
    """One answer to one question about an edit from Rome to Paris."""
    asked = question("q", "e0", split, answer=gold)
    base = [{"question_id": "q", "generated": "the old tower", "exact": False, "token_hits": 0, "n_tokens": 1, "logprob": -1.0}]
    row = record(question_id="q", edit_id="e0", split=split, probe_step=1, generated=said, exact=stored, token_hits=0, n_tokens=1)
    return load_run(write_run(out, [event(0, 1, target="Paris", previous="Rome")], [asked], {"e": [row]}, base, **manifest))


def scores(run: Run) -> list[float]:
    return run.editors["e"].records[MODES].iloc[0].tolist()


@pytest.mark.parametrize(
    ("gold", "said", "stored", "expected"),
    [
        ("Russian", "Russian, Russian)", False, [0, 1, 1]),
        ("Paris", "It is Paris.", False, [0, 0, 1]),
        ("Paris", "It is Paris, not Rome.", False, [0, 0, 0]),
        ("Paris", "Paris", True, [1, 1, 1]),
        ("Paris", "Parisian", False, [0, 0, 0]),
        ("Paris", "Rome", False, [0, 0, 0]),
        ("Paris", "", False, [0, 0, 0]),
    ],
)
def test_lenient_modes_follow_from_the_stored_text(tmp_path: Path, gold: str, said: str, stored: bool, expected: list[float]) -> None:
    assert scores(run_of(tmp_path, gold, said, stored)) == expected


def test_agreement_with_the_unedited_model_is_judged_against_its_text(tmp_path: Path) -> None:
    assert scores(run_of(tmp_path / "a", "not asked for", "the old tower, said he", False, "locality_hard")) == [0, 1, 1]
    assert scores(run_of(tmp_path / "b", "not asked for", "I see the old tower", False, "locality_hard")) == [0, 0, 1]
    assert scores(run_of(tmp_path / "c", "not asked for", "the old tower of Paris", False, "locality_hard")) == [0, 1, 0]


def test_what_was_not_generated_or_is_a_choice_has_no_lenient_score(tmp_path: Path) -> None:
    assert np.isnan(scores(run_of(tmp_path / "a", "Paris", None, None))).all()
    asked = question("q", None, "general", answer="Paris", choices=["Paris", "Rome"], scoring="sum")
    row = record(question_id="q", split="general", probe_step=1, generated="Paris", exact=True, token_hits=1, n_tokens=1)
    run = load_run(write_run(tmp_path / "b", [event(0, 1)], [asked], {"e": [row]}))
    assert run.editors["e"].records["gen"].tolist() == [1.0]
    assert run.editors["e"].records[["begins", "contains"]].isna().all(axis=None)


@pytest.mark.parametrize(("gold", "said", "old", "new"), [("5", "-5", True, 0.0), ("1000", "1,000", False, 1.0), ("C", "C#", True, 0.0)])
def test_answers_of_an_older_grading_are_judged_again(tmp_path: Path, gold: str, said: str, old: bool, new: float) -> None:
    again = run_of(tmp_path / "a", gold, said, old, grading_version=VERSION - 1)
    assert scores(again)[0] == new
    assert any(f"judged otherwise by grading version {VERSION}" in n and n.startswith("e: 1 answers") for n in again.notes)
    for name, version in (("b", {"grading_version": VERSION}), ("c", {})):
        stands = run_of(tmp_path / name, gold, said, old, **version)
        assert scores(stands)[0] == float(old), "a verdict of this version, or of no known one, stands"
        assert not any("judged otherwise" in n for n in stands.notes)


def test_all_modes_are_in_the_summary(tmp_path: Path) -> None:
    entries = summarise(run_of(tmp_path, "Russian", "Russian, Russian)", False), replicates=20)["editors"]["e"]
    got = {s: entries["edit_success" + s]["value"] for s in ("", "_exact", "_gen", "_begins", "_contains")}
    assert got == {"": 0.0, "_exact": 0.0, "_gen": 0.0, "_begins": 1.0, "_contains": 1.0}
