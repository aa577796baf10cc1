"""When a model breaks down: perplexity of running text, and retention against what the edits once scored."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.metrics.bootstrap import Interval
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import AFTER, PANEL

LOG_PERPLEXITY = float(np.log(2))
"""A rise of the log-perplexity above this (nats a token) marks a checkpoint."""
RETAINED = 0.2
"""Retention under this share of the immediate success marks a checkpoint."""
TAKEN = 0.1
"""An editor whose edits have not raised token accuracy by this much right after has nothing to lose (`noop`)."""
LEAST_EDITS = 5
"""A checkpoint that asked fewer edits is not judged by its retention."""


def collapse(run: Run, editor: EditorRun) -> dict[str, Interval]:
    """{"collapse_step": ...} or nothing: the first step that starts two marked checkpoints in a row.

    Each signal is followed over the checkpoints at which it was measured. `low` is the checkpoint before
    (the breakdown lies between the two), `n` the number of checkpoints of that signal.
    """
    found = [_onset(*s) for s in (perplexity_marks(editor), retention_marks(editor))]
    onsets = [f for f in found if f is not None]
    return {"collapse_step": min(onsets, key=lambda f: (f["value"], f["low"]))} if onsets else {}


def log_perplexity_shift(editor: EditorRun) -> pd.Series:
    """Pooled NLL per token minus the unedited model's on the same texts, by step (nats a token)."""
    rows = editor.records[editor.records["split"] == "text"]
    base = editor.base.iloc[rows["question"]]
    sums = pd.DataFrame({
        "step": rows["step"].to_numpy(),
        "now": rows["logprob"].to_numpy(),
        "n": rows["n_tokens"].to_numpy(),
        "before": base["logprob"].to_numpy(),
        "n0": base["n_tokens"].to_numpy(),
    }).dropna()  # fmt: skip
    total = sums.groupby("step").sum()
    return total["before"] / total["n0"] - total["now"] / total["n"]


def perplexity_marks(editor: EditorRun) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and whether the log-perplexity has risen by more than ln 2."""
    shift = log_perplexity_shift(editor)
    return shift.index.to_numpy(), (shift > LOG_PERPLEXITY).to_numpy()


def retention_marks(editor: EditorRun) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and whether token accuracy on live edits is under 0.2 x the mean right-after accuracy so far.

    Only where that mean is at least 0.1 above the unedited model's on the same questions.
    """
    rows = editor.records
    rows = rows[(rows["split"] == "edit") & rows["live"] & rows["tf"].notna()]
    after, later = rows[rows["role"] == AFTER], rows[rows["role"] == PANEL]
    before = np.nan_to_num(editor.base["tf"].to_numpy()[after["question"]])
    first = pd.DataFrame({"step": after["step"], "tf": after["tf"], "gain": after["tf"] - before, "n": 1.0}).groupby("step").sum().cumsum()
    sums = pd.DataFrame({"step": later["step"], "top": later["tf"] * later["weight"], "bottom": later["weight"], "n": 1.0})
    kept = sums.groupby("step").sum()
    kept = kept[kept["n"] >= LEAST_EDITS]
    so_far = first.div(first["n"], axis=0).reindex(kept.index.union(first.index)).ffill().reindex(kept.index)
    lost = (kept["top"] / kept["bottom"] < RETAINED * so_far["tf"]) & (so_far["gain"] >= TAKEN)
    return kept.index.to_numpy(), lost.to_numpy()


def _onset(steps: np.ndarray, marked: np.ndarray) -> Interval | None:
    twice = np.flatnonzero(marked[:-1] & marked[1:])
    if not len(twice):
        return None
    at = int(twice[0])
    before = float(steps[at - 1]) if at else 0.0
    return {"value": float(steps[at]), "low": before, "high": float(steps[at]), "n": len(steps)}
