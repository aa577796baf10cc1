"""Deferral precision and recall: hand-computed, weighted, at the last step, and from stored answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.metrics.from_extras import deferral, gate_decisions
from analysis.reading.load import EditorRun

ROWS = [
    (1, "edit", False, 1.0),  # an earlier step does not count
    (2, "edit", True, 1.0),
    (2, "text_generality", False, 2.0),
    (2, "image_generality", True, 1.0),
    (2, "locality_hard", True, 3.0),
    (2, "locality_far", False, 1.0),
    (2, "general", False, 4.0),
    (2, "portability", False, 50.0),  # neither to be answered nor to be left
    (2, "stale", True, 50.0),
]


def frame(rows: list[tuple[int, str, bool, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["step", "split", "fired", "weight"])


def test_precision_and_recall_by_hand() -> None:
    result = deferral(frame(ROWS))
    assert result["deferral_precision"] == {"value": pytest.approx((1 + 4) / (2 + 1 + 4)), "low": None, "high": None, "n": 3}
    assert result["deferral_recall"] == {"value": pytest.approx((1 + 4) / (3 + 1 + 4)), "low": None, "high": None, "n": 3}


def test_an_undefined_metric_is_absent() -> None:
    assert deferral(frame([])) == {}
    assert deferral(frame([(1, "edit", True, 1.0)])) == {}
    assert set(deferral(frame([(1, "general", True, 1.0)]))) == {"deferral_recall"}


def test_an_editor_that_defers_exactly_what_it_should_scores_one() -> None:
    rows = frame([(1, "edit", True, 1.0), (1, "locality_far", False, 1.0), (1, "general", False, 2.0)])
    assert {k: v["value"] for k, v in deferral(rows).items()} == {"deferral_precision": 1.0, "deferral_recall": 1.0}


def test_decisions_are_read_from_extras_but_for_those_right_after_an_edit_or_before_it(tmp_path: Path) -> None:
    extras: list[dict[str, Any]] = [{"entry": None, "distance": 4}, {"entry": "abc"}, {}, {"entry": "abc"}, {"entry": None}]
    table = {
        "probe_step": [3, 3, 3, 3, 3],
        "edit_step": [1, 3, None, 3, 4],
        "probe": ["locality", "retention", "general", "right_after", "coming"],
        "split": ["locality_far", "edit", "general", "edit", "edit"],
        "incl_prob": [0.5, 1.0, 1.0, 1.0, 1.0],
        "extras": [json.dumps(x) for x in extras],
    }
    (tmp_path / "records").mkdir()
    pq.write_table(pa.table(table), tmp_path / "records" / "step-000003.parquet")
    empty = pd.DataFrame()
    rows = gate_decisions(EditorRun("some", tmp_path, empty, empty, empty))
    assert rows.to_dict("list") == {"step": [3, 3], "split": ["locality_far", "edit"], "fired": [False, True], "weight": [2.0, 1.0]}
