"""Locality by the ordered ids of the likeliest first tokens, and a source's own names beside ours."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.metrics.bootstrap import Resampler
from analysis.metrics.from_extras import equal_share, first_token_agreement
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import PANEL
from analysis.reporting.tables import AS_PUBLISHED, as_published

IDS = st.lists(st.integers(0, 3), max_size=12)


@given(IDS, IDS, st.integers(1, 10))
def test_equal_ids_at_equal_ranks(a: list[int], b: list[int], ranks: int) -> None:
    result = equal_share(a, b, ranks)
    if min(len(a), len(b)) < ranks:
        assert math.isnan(result)
        return
    assert result == np.mean(np.array(a[:ranks]) == np.array(b[:ranks])) == equal_share(b, a, ranks)
    assert equal_share(a, a, ranks) == 1


def write(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def a_run(folder: Path, edited: dict[str, list[int]], unedited: dict[str, list[int]], splits: list[str]) -> tuple[Run, EditorRun]:
    """Questions of these splits at steps 1 and 3; what is written at step 1 must not count."""
    ids = list(edited)
    write(folder / "base" / "answers.parquet", question_id=ids, extras=[json.dumps({"first_ids": unedited[q]}) for q in ids])
    for step in (1, 3):
        shown = [json.dumps({"first_ids": edited[q] if step == 3 else [0] * 10, "entry": 1}) for q in ids]
        write(folder / "e" / "records" / f"step-{step}.parquet", question_id=ids, probe_step=[step] * len(ids), extras=shown)
    n = 2 * len(ids)
    places = {
        "question": [*range(len(ids))] * 2,
        "step": [1] * len(ids) + [3] * len(ids),
        "cluster": range(n),
        "asked": range(n),
        "weight": [1.0, 3.0] * len(ids),
    }
    records = pd.DataFrame(places | {"split": splits * 2, "role": PANEL, "live": True})
    questions = pd.DataFrame({"question_id": ids})
    editor = EditorRun("e", folder / "e", records, pd.DataFrame(), pd.DataFrame())
    return Run((folder,), {}, pd.DataFrame(), questions, {"e": editor}, 3, n), editor


def test_only_the_end_counts_and_answers_are_weighted(tmp_path: Path) -> None:
    ten = [*range(10)]
    edited = {"t0": [7, *range(1, 10)], "t1": ten, "f0": [0, 2, 1, *range(3, 10)], "f1": ten}
    run, editor = a_run(tmp_path, edited, dict.fromkeys(edited, ten), ["locality_text"] * 2 + ["locality_far"] * 2)
    result = first_token_agreement(run, editor, Resampler(8, np.random.default_rng(0), 50))
    assert {k: d.value for k, d in result.items()} == pytest.approx({"locality_text_top1": 0.75, "locality_far_top10": (0.8 + 3) / 4})


def test_answers_without_first_ids_give_no_metric(tmp_path: Path) -> None:
    run, editor = a_run(tmp_path, {"t0": [], "t1": []}, {"t0": [1], "t1": [1]}, ["locality_text"] * 2)
    assert first_token_agreement(run, editor, Resampler(4, np.random.default_rng(0), 50)) == {}
    write(tmp_path / "base" / "answers.parquet", question_id=["t0", "t1"])
    assert first_token_agreement(run, editor, Resampler(4, np.random.default_rng(0), 50)) == {}


def test_published_names_stand_beside_ours() -> None:
    entry = {"value": 0.5, "low": None, "high": 0.75, "n": 4}
    names = {"text_generality": ["T-Generality", "rephrased"], "portability": ["Portability", "hop"]}
    summary = {"run": {"stream": {"published_names": names}}, "editors": {"e": {"text_generality_gen": entry, "locality_far": entry}}}
    (row,) = csv.DictReader(io.StringIO(as_published(summary).to_csv(index=False)))
    assert tuple(row) == AS_PUBLISHED
    assert (row["published name"], row["ours"], row["scoring mode"], row["value"], row["when"]) == (
        "T-Generality", "text_generality_gen", "free generation", "0.5", "at the end of the stream",
    )  # fmt: skip
    assert as_published({"run": {}, "editors": summary["editors"]}).empty
