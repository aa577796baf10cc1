"""Curves over years, over the age of an edit and over the number of edits: tidy rows with 95 % intervals.

Every function gives columns x, value, low, high, n; x says what it is in the function's own words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from analysis.answers import age_bins, asked, pooled, right_after, unedited, year_ends
from analysis.bootstrap import Draws, Resampler, combine
from analysis.load import READINGS, EditorRun, Run

RIGHT_AFTER_AGE = 0.5
"""Where "right after" stands on a logarithmic axis of ages."""
MOST_TOPICS = 5


def by_year(run: Run, rows: pd.DataFrame, split: str, reading: str, resampler: Resampler) -> pd.DataFrame:
    """Score of a split at each year's end; x is the number of years passed (the calendar year of a dated stream)."""
    rows = year_ends(asked(rows, split))
    if rows.empty:
        return table([], [])
    years, cell = np.unique(np.floor(rows["time"].to_numpy()), return_inverse=True)
    return table(years_passed(run, years), pooled(rows, rows[reading].to_numpy(), cell, len(years), resampler))


def by_age(run: Run, rows: pd.DataFrame, reading: str, resampler: Resampler) -> pd.DataFrame:
    """Score of live edits by edits applied since (bins of powers of two); the first point is right after."""
    first = right_after(rows)
    now = pooled(first, first[reading].to_numpy(), np.zeros(len(first), int), 1, resampler)
    later = asked(rows, "edit")
    ages, bins = age_bins(later[later["age"] > 0], reading, resampler)
    return table([RIGHT_AFTER_AGE, *ages], [*now, *bins])


def ability(run: Run, editor: EditorRun, topic: str | None, reading: str, resampler: Resampler) -> pd.DataFrame:
    """Score of general questions (of one topic) by edits applied; the unedited model stands at 0."""
    rows = asked(editor.records, "general")
    rows = rows if topic is None else rows[_of_topic(run, rows["topic"], topic)]
    if rows.empty:
        return table([], [])
    steps, cell = np.unique(rows["step"].to_numpy(), return_inverse=True)
    first = rows.drop_duplicates("question")
    before = unedited(editor, first)[:, READINGS.index(reading)]
    start = pooled(first, before, np.zeros(len(first), int), 1, resampler)
    return table([0, *run.edits_at(steps)], [*start, *pooled(rows, rows[reading].to_numpy(), cell, len(steps), resampler)])


def perplexity(run: Run, editor: EditorRun, resampler: Resampler) -> pd.DataFrame:
    """exp(NLL per token minus the unedited model's) by edits applied; 1 at 0 edits."""
    rows = editor.records[editor.records["split"] == "text"]
    base = editor.base.iloc[rows["question"]]
    known = np.isfinite(rows["logprob"].to_numpy()) & np.isfinite(base["logprob"].to_numpy())
    rows, base = rows[known], base[known]
    if rows.empty:
        return table([], [])
    steps, cell = np.unique(rows["step"].to_numpy(), return_inverse=True)
    cluster = rows["cluster"].to_numpy()
    sides = [resampler.cells(cluster, -f["logprob"].to_numpy(), f["n_tokens"].to_numpy(), cell, len(steps)) for f in (rows, base)]
    ratios = [combine(_ratio, a, b, bounds=None) for a, b in zip(*sides) if a is not None and b is not None]
    curve = table(run.edits_at(steps), ratios)
    start = pd.DataFrame({"x": [0.0], "value": [1.0], "low": [1.0], "high": [1.0], "n": [int(rows["question"].nunique())]})
    return pd.concat([start, curve], ignore_index=True)


def mean_by_year(run: Run, rows: pd.DataFrame, splits: Iterable[str], reading: str, resampler: Resampler) -> pd.DataFrame:
    """Mean over the splits that were asked of their scores at each year's end, splits counting alike."""
    parts = [_year_draws(run, rows, s, reading, resampler) for s in splits]
    parts = [p for p in parts if p]
    if not parts:
        return table([], [])
    years = sorted(set.intersection(*(set(p) for p in parts)))
    return table(years, [combine(_mean, *(p[y] for p in parts)) for y in years])


def topics(run: Run) -> list[str]:
    """Topics of general questions, most asked first; what is left over is "other"."""
    rows = run.questions[run.questions["split"] == "general"]
    counts = rows["topic"].replace("", "general").value_counts(sort=False).sort_index().sort_values(ascending=False, kind="stable")
    return list(counts.index) if len(counts) <= MOST_TOPICS else [*counts.index[: MOST_TOPICS - 1], "other"]


def years_passed(run: Run, years: np.ndarray) -> np.ndarray:
    """Floor of the time to a place on the axis: the calendar year where dated, else years since the start."""
    first = np.floor(run.events["time"].min())
    return years if run.time_axis == "dated" else years - first + 1


def table(x: Iterable[float], draws: Iterable[Draws | None]) -> pd.DataFrame:
    """Rows x, value, low, high, n of the points that were measured."""
    rows = [{"x": float(place), **d.interval()} for place, d in zip(x, draws) if d is not None]
    return pd.DataFrame(rows, columns=["x", "value", "low", "high", "n"]).astype(float)


def every(run: Run, curve: Callable[[EditorRun], pd.DataFrame]) -> pd.DataFrame:
    """A curve of all editors in one frame, with a column editor."""
    parts = [curve(e).assign(editor=name) for name, e in run.editors.items()]
    return pd.concat([p for p in parts if len(p)] or parts[:1], ignore_index=True)


def _year_draws(run: Run, rows: pd.DataFrame, split: str, reading: str, resampler: Resampler) -> dict[float, Draws]:
    rows = year_ends(asked(rows, split))
    if rows.empty:
        return {}
    years, cell = np.unique(np.floor(rows["time"].to_numpy()), return_inverse=True)
    draws = pooled(rows, rows[reading].to_numpy(), cell, len(years), resampler)
    return {float(x): d for x, d in zip(years_passed(run, years), draws) if d is not None}


def _of_topic(run: Run, column: pd.Series, topic: str) -> np.ndarray:
    named = column.astype(str).replace("", "general")
    known = topics(run)
    return (named == topic).to_numpy() if (named == topic).any() else (~named.isin(known)).to_numpy()


def _ratio(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    return np.exp(now - before)


def _mean(*parts: np.ndarray) -> np.ndarray:
    return np.mean(parts, axis=0)
