"""Locality as the public code of multimodal editing measures it: equal ids at equal ranks of the likeliest tokens.

The public code (EasyEdit's trainer for MMEdit) compares the ordered top-k ids before and after, position by
position over prompt and answer, k = 1 for text and 10 for pictures. Here it is one position, the one that
gives the answer's first token: positions inside the prompt, which an edit hardly moves, do not dilute it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute
import pyarrow.parquet as pq

from analysis.metrics.answers import Metrics, at_end, means
from analysis.metrics.bootstrap import Resampler
from analysis.reading.extras import answers_with, rows_with
from analysis.reading.load import EditorRun, Run

pc: Any = pyarrow.compute
"""Its functions are made at import, so no type checker knows them."""

KEY = "first_ids"
RANKS = {"locality_text": 1, "locality_far": 10}
"""Splits that have such a twin, and how many ranks are compared."""


def of_first_ids(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """`locality_text_top1` and `locality_far_top10` at the end, where answers hold `first_ids`. In [0, 1]; 1 is intact."""
    out: Metrics = {}
    for split, ranks in RANKS.items():
        end = at_end(editor.records, split)
        if end.empty:
            continue
        ids, step = run.questions["question_id"].to_numpy()[end["question"]], int(end["step"].iloc[0])
        before = _unedited(run.folders[0] / "base" / "answers.parquet", ids)
        after = _by_question(answers_with(editor.folder, KEY, ("question_id",), [step])) if before else {}
        out |= means(f"{split}_top{ranks}", end, _agreement(ids, before, after, ranks), resampler)
    return out


def equal_share(a: list[int], b: list[int], ranks: int) -> float:
    """Share of the first ranks at which two ordered lists hold the same id; nan where one is too short."""
    if min(len(a), len(b)) < ranks:
        return float("nan")
    return sum(x == y for x, y in zip(a[:ranks], b[:ranks])) / ranks


def _agreement(ids: np.ndarray, before: dict[str, list[int]], after: dict[str, list[int]], ranks: int) -> np.ndarray:
    """(n, 1) scores of the questions; nan where one of the two answers holds no ids."""
    return np.array([[equal_share(before.get(q, []), after.get(q, []), ranks)] for q in ids])


def _unedited(file: Path, ids: np.ndarray) -> dict[str, list[int]]:
    """The unedited model's ids on these questions; none from a run of schema version 1."""
    if "extras" not in pq.read_schema(file).names:
        return {}
    return _by_question(rows_with(file, KEY, ("question_id",), pc.field("question_id").isin(ids.tolist())))


def _by_question(rows: pd.DataFrame) -> dict[str, list[int]]:
    return {q: json.loads(x)[KEY] for q, x in zip(rows["question_id"], rows["extras"])}
