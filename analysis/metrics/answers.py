"""Which answers a metric is made of, and how they are pooled."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.metrics.bootstrap import Draws, Resampler
from analysis.metrics.catalogue import SUFFIXES
from analysis.reading.load import READINGS, EditorRun, Run
from analysis.reading.records import AFTER, PANEL, keys

LEAST_IN_BIN = 5
"""Fewer edits than this in an age bin say nothing about a half-life."""
SHARE, SIGNED = (0.0, 1.0), (-1.0, 1.0)
"""Ranges of a share and of a difference of shares."""

Metrics = dict[str, Draws]
"""Metrics of summary.json that are functions of answers, with their replicates."""


def asked(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """Answers of a split that a panel of live edits gave at any checkpoint; of general questions, the stream's own.

    Not those asked right after, at set ages, or about nothing that was edited: they are no sample of the live
    edits. Locality is about facts that no edit changes, so there superseded edits count too.
    """
    keep = (rows["split"] == split) & (rows["role"] == PANEL)
    return rows[keep] if split.startswith("locality_") else rows[keep & rows["live"]]


def at_end(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """The answers of `asked` at the last step that has any."""
    kept = asked(rows, split)
    return kept[kept["step"] == kept["step"].max()]


def right_after(rows: pd.DataFrame) -> pd.DataFrame:
    """Answers about edits, asked right after the step that made them."""
    return rows[(rows["split"] == "edit") & (rows["role"] == AFTER) & rows["live"]]


def immediate(run: Run, rows: pd.DataFrame) -> np.ndarray:
    """Right-after scores by row of `run.events`, one column a reading; nan where not asked."""
    first = right_after(rows)
    out = np.full((len(run.events), len(READINGS)), np.nan)
    out[first["edit"]] = first[list(READINGS)]
    return out


def year_ends(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last checkpoint of each year."""
    year = np.floor(rows["time"])
    return rows[rows["step"] == rows.groupby(year)["step"].transform("max")]


def in_common(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both frames cut to the answers that both have; the very same frames where nothing is cut."""
    ours, theirs = keys(a), keys(b)
    columns = [*READINGS, "logprob"]
    if np.array_equal(ours, theirs) and all(np.array_equal(a[c].isna(), b[c].isna()) for c in columns):
        return a, b
    _, i, j = np.intersect1d(ours, theirs, return_indices=True)
    a, b = a.iloc[i].reset_index(drop=True), b.iloc[j].reset_index(drop=True)
    for c in columns:
        absent = a[c].isna() | b[c].isna()
        a[c], b[c] = a[c].mask(absent), b[c].mask(absent)
    return a, b


def age_bins(rows: pd.DataFrame, reading: str, resampler: Resampler) -> tuple[np.ndarray, list[Draws]]:
    """Success by age in edits: the mean age and the mean score of each bin with enough edits."""
    rows = rows[rows[reading].notna()]
    if rows.empty:
        return np.empty(0), []
    age, weight = rows["age"].to_numpy(), rows["weight"].to_numpy()
    cell = np.floor(np.log2(age)).astype(int)
    cells = pooled(rows, rows[reading].to_numpy(), cell, int(cell.max()) + 1, resampler)
    edit = rows["edit"].to_numpy()
    kept, ages = [], []
    for k, draws in enumerate(cells):
        inside = cell == k
        if draws is not None and len(np.unique(edit[inside])) >= LEAST_IN_BIN:
            kept.append(draws)
            ages.append(np.exp(np.average(np.log(age[inside]), weights=weight[inside])))
    return np.array(ages), kept


def pooled(rows: pd.DataFrame, score: np.ndarray, cell: np.ndarray, count: int, resampler: Resampler) -> list[Draws | None]:
    """Hajek mean of a score (nan: not measured) within each of `count` cells; None for an empty cell."""
    bottom = np.where(np.isnan(score), 0.0, rows["weight"].to_numpy())
    return resampler.cells(rows["cluster"].to_numpy(), np.nan_to_num(score) * bottom, bottom, cell, count)


def unedited(editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
    """The unedited model's scores for the questions of the rows, one column a reading."""
    return editor.base[list(READINGS)].to_numpy()[rows["question"]]


def means(name: str, rows: pd.DataFrame, scores: np.ndarray, resampler: Resampler, bounds: tuple[float, float] = SHARE) -> Metrics:
    """Hajek means of the columns of `scores` (one a reading, nan: not measured) under the name with the readings' suffixes."""
    if rows.empty:
        return {}
    draws = resampler.means(rows["cluster"].to_numpy(), rows["weight"].to_numpy(), scores)
    return {name + s: Draws(d.values, d.n, d.clusters, bounds) for s, d in zip(SUFFIXES, draws) if d is not None}


def plain_means(name: str, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """Mean score of the rows, for the three readings."""
    return means(name, rows, rows[list(READINGS)].to_numpy(), resampler)
