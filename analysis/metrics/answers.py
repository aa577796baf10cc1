"""Which answers a metric is made of, and how they are pooled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.metrics.bootstrap import Draws, Resampler, combine
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import AFTER, PANEL, SCORES, SCORING_MODES, ScoringMode, keys

LEAST_IN_BIN = 5
"""Fewest edits in a bin of ages for which the bin counts."""
SHARE, SIGNED = (0.0, 1.0), (-1.0, 1.0)
"""Ranges of a share and of a difference of shares."""

Metrics = dict[str, Draws]
"""Metrics of summary.json that are functions of answers, with their replicates."""


def panel_answers(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """Answers to questions of a split from a panel of live edits at any checkpoint; of general questions, the stream's own.

    Answers right after an edit, at fixed ages and about nothing edited are left out: they are no sample of the live
    edits. Locality concerns facts that no edit changes, so there superseded edits count too.
    """
    keep = (rows["split"] == split) & (rows["role"] == PANEL)
    return rows[keep] if split.startswith("locality_") else rows[keep & rows["live"]]


def at_last_step(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last step that has any."""
    return rows[rows["step"] == rows["step"].max()]


def at_end(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """The answers of `panel_answers` at the last step that has any."""
    return at_last_step(panel_answers(rows, split))


def right_after(rows: pd.DataFrame) -> pd.DataFrame:
    """Answers about edits right after the step that made them."""
    return rows[(rows["split"] == "edit") & (rows["role"] == AFTER) & rows["live"]]


def right_after_scores(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """Scores right after the edit, one row for each event and one column for each scoring mode; nan where not asked."""
    return by_edit(run, right_after(rows))


def by_edit(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """The scores of rows about different edits, one row for each event; nan for an edit without a row."""
    return rows.set_index("edit")[SCORES].reindex(range(len(run.events)))


def year_ends(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last checkpoint of each year."""
    year = np.floor(rows["time"])
    return rows[rows["step"] == rows.groupby(year)["step"].transform("max")]


def in_common(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both frames cut to the answers that both have, under their own index; the same objects where nothing is cut."""
    ours, theirs = keys(a), keys(b)
    columns = [*SCORES, "logprob"]
    if np.array_equal(ours, theirs) and all(np.array_equal(a[c].isna(), b[c].isna()) for c in columns):
        return a, b
    _, i, j = np.intersect1d(ours, theirs, return_indices=True)
    a, b = a.iloc[i].copy(), b.iloc[j].copy()
    for c in columns:
        absent = a[c].isna().to_numpy() | b[c].isna().to_numpy()
        a[c], b[c] = a[c].mask(absent), b[c].mask(absent)
    return a, b


def age_bins(rows: pd.DataFrame, mode: ScoringMode, resampler: Resampler) -> tuple[np.ndarray, list[Draws]]:
    """Success by age in edits, in bins [2^k, 2^(k+1)): geometric mean age and mean score of each bin with enough edits."""
    rows = rows[rows[mode.column].notna()]
    if rows.empty:
        return np.empty(0), []
    age, weight = rows["age"].to_numpy(), rows["weight"].to_numpy()
    cell = np.floor(np.log2(age)).astype(int)
    cells = pooled(rows, rows[mode.column].to_numpy(), cell, int(cell.max()) + 1, resampler)
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
    return resampler.cells(rows, np.nan_to_num(score) * bottom, bottom, cell, count)


def pooled_together(rows: pd.DataFrame, score: np.ndarray, resampler: Resampler) -> Draws | None:
    """Hajek mean of a score over all rows; None where nothing was measured."""
    return pooled(rows, score, np.zeros(len(rows), int), 1, resampler)[0]


def pooled_by(rows: pd.DataFrame, score: np.ndarray, group: np.ndarray, resampler: Resampler) -> dict[Any, Draws]:
    """Hajek mean of a score by group (a step or a year), in ascending order; a group without a measured answer is absent."""
    if rows.empty:
        return {}
    groups, cell = np.unique(group, return_inverse=True)
    return {g: d for g, d in zip(groups.tolist(), pooled(rows, score, cell, len(groups), resampler)) if d is not None}


def unedited(editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
    """The unedited model's scores on the questions of the rows, (rows, scoring modes)."""
    return editor.base[SCORES].to_numpy()[rows["question"]]


def means(name: str, rows: pd.DataFrame, scores: np.ndarray, resampler: Resampler, bounds: tuple[float, float] = SHARE) -> Metrics:
    """Hajek means of the columns of `scores` (rows, scoring modes; nan: not measured), named with the modes' suffixes."""
    if rows.empty:
        return {}
    draws = resampler.means(rows, rows["weight"].to_numpy(), scores)
    return {name + m.suffix: replace(d, bounds=bounds) for m, d in zip(SCORING_MODES, draws) if d is not None}


def by_mode(name: str, metric: Callable[[ScoringMode], Draws | None]) -> Metrics:
    """A metric in each scoring mode in which it has a value, under its name with the mode's suffix."""
    return {name + mode.suffix: draws for mode in SCORING_MODES if (draws := metric(mode)) is not None}


def combined(name: str, function: Callable[..., np.ndarray], parts: Sequence[str], known: Metrics) -> Metrics:
    """A function of metrics in each scoring mode that has them all."""

    def of_all(mode: ScoringMode) -> Draws | None:
        own = [known.get(part + mode.suffix) for part in parts]
        return None if None in own else combine(function, *filter(None, own))

    return by_mode(name, of_all)


def mean_scores(name: str, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """Mean score of the rows in each scoring mode."""
    return means(name, rows, rows[SCORES].to_numpy(), resampler)
