"""Self-assessment and relapse, against hand-computed examples."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from analysis.metrics.summary import summarise
from analysis.reading.load import load_run
from tests.helpers.fake_run import event, question, record, write_run

LETTERS = ["A", "B", "C"]
P = {  # probabilities of the letters: (options, right letter) by edit
    0: {(2, "A"): [0.2, 0.2], (2, "B"): [0.1, 0.3], (3, "A"): [0.2, 0.1, 0.1], (3, "B"): [0.1, 0.2, 0.2]},
    1: {(2, "A"): [0.6, 0.2], (2, "B"): [0.0, 0.3], (3, "A"): [0.3, 0.1, 0.1], (3, "B"): [0.0, 0.1, 0.3]},
}


def test_the_probability_of_the_new_answer_is_the_mean_over_both_orders(tmp_path: Path) -> None:
    events, questions, rows = [event(i, i + 1) for i in range(2)], [], []
    for i, asked in P.items():
        own = events[i]["edit_id"]
        for (n, right), shares in asked.items():
            name = f"{i}{n}{right}"
            extras = json.dumps({"chosen": 0, "choices": [math.log(p) if p else None for p in shares]})
            questions.append(question(name, own, "self_assessment", choices=LETTERS[:n], answer=right, scoring="sum"))
            rows.append(record(question_id=name, edit_id=own, split="self_assessment", probe_step=2, extras=extras))
    got = summarise(load_run(write_run(tmp_path, events, questions, {"e": rows})), replicates=20)["editors"]["e"]
    assert got["self_assessment"]["value"] == pytest.approx((1 / 2 + 3 / 4 + 3 / 4 + 1) / 4)
    assert got["self_assessment_three"]["value"] == pytest.approx((2 / 4 + 2 / 5 + 3 / 5 + 1 / 4) / 4)
    assert got["self_assessment_uncertain"]["value"] == pytest.approx((1 / 4 + 2 / 5 + 1 / 5 + 3 / 4) / 4)


def test_relapse_is_the_share_of_old_answers(tmp_path: Path) -> None:
    events = [event(i, i + 1) for i in range(2)]
    names = {f"q{i}{j}": events[i]["edit_id"] for i in range(2) for j in range(5)}
    questions = [question(name, own, "persistence") for name, own in names.items()]
    back = ("q00", "q01", "q13")
    rows = [record(question_id=n, edit_id=own, split="persistence", probe_step=2, exact=n in back) for n, own in names.items()]
    got = summarise(load_run(write_run(tmp_path, events, questions, {"e": rows})), replicates=20)["editors"]["e"]
    assert got["relapse_rate_gen"]["value"] == pytest.approx(3 / 10)
    assert not {"self_assessment", "self_assessment_three"} & set(got)
