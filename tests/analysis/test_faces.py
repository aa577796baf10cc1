"""The faces of HalluEditBench as metrics, against a hand-computed example."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.metrics.summary import summarise
from analysis.reading.load import load_run
from tests.helpers.fake_run import event, question, record, write_run

RIGHT = {"generality_yes_no": [1, 1, 1, 0], "generality_choice": [1, 0, 0, 0], "robustness": [1, 1, 0, 0]}
SAID = {"generality_reversed": [1, 0, 0, 0], "portability_3hop": [1, 1, 1, 0], "portability_6hop": [0, 0, 0, 0]}


def test_each_face_is_a_metric_of_its_own_name(tmp_path: Path) -> None:
    events, questions, rows = [event(i, i + 1) for i in range(4)], [], []
    for split, verdicts in (RIGHT | SAID).items():
        for i, right in enumerate(verdicts):
            own = events[i]["edit_id"]
            chosen = {"choices": ["Yes", "No"], "answer": "Yes", "scoring": "sum"} if split in RIGHT else {}
            questions.append(question(f"{split}{i}", own, split, **chosen))
            rows.append(record(question_id=f"{split}{i}", edit_id=own, split=split, probe_step=4, exact=bool(right)))
    summary = summarise(load_run(write_run(tmp_path, events, questions, {"e": rows})), replicates=20)
    got = summary["editors"]["e"]
    assert {split: got[split]["value"] for split in RIGHT} == pytest.approx({split: sum(v) / 4 for split, v in RIGHT.items()})
    assert {split: got[f"{split}_gen"]["value"] for split in SAID} == pytest.approx({split: sum(v) / 4 for split, v in SAID.items()})
    assert "portability_4hop" not in got and "portability" not in got
    assert not any("hop" in note for note in summary["run"]["notes"])
