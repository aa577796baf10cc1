"""Deferral of editors that gate: which questions they leave to the unedited model, against those that they should.

An edit bears on its own question and the rephrased ones, those the editor is to answer; locality and general questions
it is to leave. Portability, stale answers, running text and edits still to come are neither and do not count.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from analysis.metrics.bootstrap import Interval
from analysis.reading.extras import answers_with
from analysis.reading.load import RIGHT_AFTER, EditorRun

ANSWERED = ("edit", "text_generality", "image_generality")
"""Splits that an edit bears on."""


def decisions(editor: EditorRun, steps: Collection[int] | None = None) -> pd.DataFrame:
    """One row a panel answer for which the editor noted its decision: step, split, fired, weight (1 / inclusion probability).

    steps: only what was asked after one of these.
    """
    rows = answers_with(editor.folder, "entry", ("probe_step", "edit_step", "probe", "split", "incl_prob"), steps)
    coming = rows["edit_step"].astype(float) > rows["probe_step"].astype(float)
    rows = rows[(rows["probe"] != RIGHT_AFTER) & ~coming]
    fired = ~rows["extras"].astype(str).str.contains(r'"entry":\s*null')
    weight = 1 / rows["incl_prob"].astype(float)
    return pd.DataFrame({"step": rows["probe_step"], "split": rows["split"], "fired": fired, "weight": weight})


def deferral(rows: pd.DataFrame) -> dict[str, Interval]:
    """deferral_precision: of the questions left to the unedited model, the share that no edit bears on. deferral_recall: of the
    questions that no edit bears on, the share left to it. From the decisions at the last step; absent where undefined.
    """
    rows = rows[rows["step"] == rows["step"].max()]
    bears = rows["split"].isin(ANSWERED).to_numpy()
    spared = (rows["split"].str.startswith("locality_") | (rows["split"] == "general")).to_numpy(bool)
    left, weight = ~rows["fired"].to_numpy(bool), rows["weight"].to_numpy(float)
    of = {"deferral_precision": left & (bears | spared), "deferral_recall": spared}
    return {name: _share(left & spared, among, weight) for name, among in of.items() if among.any()}


def _share(hit: np.ndarray, among: np.ndarray, weight: np.ndarray) -> Interval:
    value = float(weight[hit & among].sum() / weight[among].sum())
    return {"value": value, "low": None, "high": None, "n": int(among.sum())}
