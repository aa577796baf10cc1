"""Numbers about the inside of an edited model: what monitors stored, and what editors say of their own steps."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.reading.load import EditorRun, Run
from analysis.reading.records import read_table

TITLES = {
    "delta_norm": "Change of weights, |W − W₀|",
    "weight_norm": "Norm of edited weights",
    "weight_relative": "Change of weights, relative",
    "spectral_norm": "Largest singular value of the change",
    "stable_rank": "Stable rank of the change",
    "hidden_cosine": "Hidden states: cosine to unedited",
    "hidden_shift": "Hidden states: shift of the mean",
    "activation_scale": "Activation norm, relative",
    "entropy": "Entropy of the next token (nats)",
    "kl_base": "KL from the unedited model (nats)",
    "repetition": "Repetition in generations",
    "empty_rate": "Empty generations",
    "condition": "Condition number reported",
}
"""Titles of known signals, in the order in which they are shown; others follow under their own names."""
WITHIN = ("loss",)
"""Notes that speak of a step's own search, not of the model after it."""
MOST_POINTS = 200
"""A signal reported at every step is thinned to about so many points, the median of each stretch."""


def signals(run: Run, editor: EditorRun) -> pd.DataFrame:
    """Columns name, x (edits applied), value: finite numbers by signal, in the order of TITLES."""
    parts = [_monitors(editor), _reported(editor)]
    found = pd.concat([p for p in parts if len(p)] or parts[:1], ignore_index=True)
    found = found[np.isfinite(found["value"].to_numpy(float))].drop_duplicates(["name", "step"])
    found["x"] = run.edits_at(found["step"].to_numpy(int)).astype(float)
    known = [n for n in TITLES if (found["name"] == n).any()]
    order = {n: i for i, n in enumerate([*known, *sorted(set(found["name"]) - set(known))])}
    found = found.assign(rank=found["name"].map(order)).sort_values(["rank", "step"], kind="stable")
    return found[["name", "x", "value"]].reset_index(drop=True)


def thinned(signal: pd.DataFrame) -> pd.DataFrame:
    """A signal with at most about MOST_POINTS points: the last x and the median value of equal stretches."""
    if len(signal) <= MOST_POINTS:
        return signal
    stretch = np.arange(len(signal)) * MOST_POINTS // len(signal)
    groups = signal.groupby(stretch)
    return pd.DataFrame({"x": groups["x"].last(), "value": groups["value"].median()})


def _monitors(editor: EditorRun) -> pd.DataFrame:
    parts = sorted((editor.folder / "monitors").glob("step-*.parquet"))
    frames = [read_table(p, ("step", "name", "value")).to_pandas() for p in parts]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["step", "name", "value"])


def _reported(editor: EditorRun) -> pd.DataFrame:
    """delta_norm and the numeric notes of edits.jsonl, one row a step and name."""
    steps = editor.reports
    rows = [(s, "delta_norm", v) for s, v in zip(steps["step"], steps["delta_norm"].astype(float)) if not np.isnan(v)]
    for step, notes in zip(steps["step"], steps["notes"]):
        given = notes.items() if isinstance(notes, dict) else ()
        rows += [(step, k, float(v)) for k, v in given if isinstance(v, (int, float)) and k not in WITHIN]
    return pd.DataFrame(rows, columns=["step", "name", "value"])
