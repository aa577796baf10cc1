"""The scores that papers print for CounterFact, against a hand-computed example."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.metrics.summary import summarise
from analysis.reading.load import load_run
from tests.helpers.fake_run import event, question, record, write_run

RIGHT = {"choice_edit": [1, 1, 1, 0], "choice_generality": [1, 1, 0, 0], "choice_locality": [1, 0, 0, 0]}


def test_es_ps_ns_and_their_harmonic_mean_by_hand(tmp_path: Path) -> None:
    events, questions, rows = [event(i, i + 1) for i in range(4)], [], []
    for split, verdicts in RIGHT.items():
        for i, right in enumerate(verdicts):
            own = events[i]["edit_id"]
            questions.append(question(f"{split}{i}", own, split, choices=["new", "old"], answer="new", scoring="mean"))
            rows.append(record(question_id=f"{split}{i}", edit_id=own, split=split, probe_step=4, exact=bool(right)))
    got = summarise(load_run(write_run(tmp_path, events, questions, {"e": rows})), replicates=20)["editors"]["e"]
    assert got["efficacy_score"]["value"] == pytest.approx(3 / 4)
    assert got["paraphrase_score"]["value"] == pytest.approx(2 / 4)
    assert got["neighbourhood_score"]["value"] == pytest.approx(1 / 4)
    assert got["counterfact_score"]["value"] == pytest.approx(3 / (4 / 3 + 2 + 4))


def test_a_run_without_the_probe_has_none(tmp_path: Path) -> None:
    rows = [record(question_id="q", edit_id="e0", split="edit", probe_step=1, exact=True)]
    run = write_run(tmp_path, [event(0, 1)], [question("q", "e0", "edit")], {"e": rows})
    assert not set(summarise(load_run(run), replicates=20)["editors"]["e"]) & {"efficacy_score", "counterfact_score"}
