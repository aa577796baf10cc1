"""Curves over years, over the age of an edit and over the number of edits: tidy rows with 95 % intervals.

Every function takes a run, an editor and a bootstrap (and what it is asked for) and gives columns x, value, low,
high, n; x says what it is in the function's own words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from analysis.metrics import orders
from analysis.metrics.ability import log_perplexities
from analysis.metrics.answers import age_bins, asked, immediate, pooled, right_after, unedited, year_ends
from analysis.metrics.bootstrap import Draws, Resampler, combine
from analysis.metrics.forgetting import aged
from analysis.reading.load import READINGS, EditorRun, Run
from analysis.reading.records import LADDER, PREFIXES

RIGHT_AFTER_AGE = 0.5
"""Where "right after" stands on a logarithmic axis of ages."""
MOST_TOPICS = 8


def by_year(run: Run, editor: EditorRun, resampler: Resampler, split: str, reading: str) -> pd.DataFrame:
    """Score of a split at each year's end; x is the number of years passed (the calendar year of a dated stream)."""
    draws = _year_draws(run, editor.records, split, reading, resampler)
    return table(draws, draws.values())


def by_age(run: Run, editor: EditorRun, resampler: Resampler, reading: str) -> pd.DataFrame:
    """Score of live edits by edits applied since (bins of powers of two); the first point is right after."""
    first = right_after(editor.records)
    now = pooled(first, first[reading].to_numpy(), np.zeros(len(first), int), 1, resampler)
    later = aged(editor.records)
    ages, bins = age_bins(later[later["age"] > 0], reading, resampler)
    return table([RIGHT_AFTER_AGE, *ages], [*now, *bins])


def survival(run: Run, editor: EditorRun, resampler: Resampler, reading: str) -> pd.DataFrame:
    """Share of the ladder's edits, right right after, that have never been found wrong since; x is the age in edits.

    Product-limit estimate (Kaplan and Meier 1958) over ages 2^k: a loss counts at the first look that finds it; an edit
    that is replaced, or younger than the age, leaves the count unlost.
    """
    rows = editor.records
    rows = rows[(rows["role"] == LADDER) & rows["live"] & (rows["age"] > 0) & rows[reading].notna()]
    rows = rows[immediate(run, editor.records)[rows["edit"], READINGS.index(reading)] == 1].sort_values("step")
    if rows.empty:
        return table([], [])
    lost = rows[reading] < 1
    before = lost.groupby(rows["edit"]).cumsum() - lost
    rows, lost = rows[before == 0], lost[before == 0]
    cell = np.floor(np.log2(rows["age"].to_numpy())).astype(int)
    hazards = pooled(rows, lost.to_numpy(float), cell, int(cell.max()) + 1, resampler)
    ages, kept = [RIGHT_AFTER_AGE], [_certain(resampler, int(rows["edit"].nunique()))]
    for k, hazard in enumerate(hazards):
        if hazard is not None:
            kept.append(combine(lambda s, h: s * (1 - np.nan_to_num(h)), kept[-1], hazard))
            ages.append(2.0**k)
    return table(ages, kept)


def ability(run: Run, editor: EditorRun, resampler: Resampler, topic: str, reading: str) -> pd.DataFrame:
    """Score of general questions of one topic by edits applied; the unedited model stands at 0."""
    rows = asked(editor.records, "general")
    rows = rows[_of_topic(run, rows["topic"], topic)]
    return _from_unedited(run, editor, rows, reading, resampler)


def group_topic(run: Run, editor: EditorRun, resampler: Resampler, topic: str, reading: str) -> pd.DataFrame:
    """Change of a benchmark's or safety set's score against the unedited model, paired, by edits applied; 0 at 0."""
    rows = editor.records[(editor.records["topic"] == topic).to_numpy()]
    if rows.empty:
        return table([], [])
    steps, cell = np.unique(rows["step"].to_numpy(), return_inverse=True)
    gain = rows[reading].to_numpy() - unedited(editor, rows)[:, READINGS.index(reading)]
    curve = table(run.edits_at(steps), pooled(rows, gain, cell, len(steps), resampler))
    return pd.concat([_start(0.0, rows["question"].nunique()), curve], ignore_index=True)


def perplexity(run: Run, editor: EditorRun, resampler: Resampler) -> pd.DataFrame:
    """exp(NLL per token minus the unedited model's) by edits applied; 1 at 0 edits."""
    rows, base = log_perplexities(editor)
    if rows.empty:
        return table([], [])
    steps, cell = np.unique(rows["step"].to_numpy(), return_inverse=True)
    cluster = rows["cluster"].to_numpy()
    sides = [resampler.cells(cluster, -f["logprob"].to_numpy(), f["n_tokens"].to_numpy(), cell, len(steps)) for f in (rows, base)]
    ratios = [combine(_ratio, a, b, bounds=None) for a, b in zip(*sides) if a is not None and b is not None]
    return pd.concat([_start(1.0, rows["question"].nunique()), table(run.edits_at(steps), ratios)], ignore_index=True)


def mean_by_year(run: Run, editor: EditorRun, resampler: Resampler, splits: Iterable[str], reading: str) -> pd.DataFrame:
    """Mean over the splits that were asked of their scores at each year's end, splits counting alike."""
    parts = [_year_draws(run, editor.records, s, reading, resampler) for s in splits]
    parts = [p for p in parts if p]
    if not parts:
        return table([], [])
    years = sorted(set.intersection(*(set(p) for p in parts)))
    return table(years, [combine(_mean, *(p[y] for p in parts)) for y in years])


def matrix(run: Run, editor: EditorRun, resampler: Resampler, reading: str) -> pd.DataFrame:
    """Success at the end of year `x` on the live edits of year `made`: x, made, value, low, high, n."""
    rows = year_ends(asked(editor.records, "edit"))
    if rows.empty:
        return table([], []).assign(made=[])
    years = [run.events["time"].to_numpy()[rows["edit"]], rows["time"].to_numpy()]
    (made, row), (asked_in, column) = (np.unique(np.floor(y), return_inverse=True) for y in years)
    draws = pooled(rows, rows[reading].to_numpy(), row * len(asked_in) + column, len(made) * len(asked_in), resampler)
    known = [i for i, d in enumerate(draws) if d is not None]
    row, column = np.divmod(known, len(asked_in))
    return table(years_passed(run, asked_in[column]), [draws[i] for i in known]).assign(made=years_passed(run, made[row]))


def group_topics(run: Run, prefix: str) -> list[str]:
    """Topics of a group (benchmarks, safety sets) by name."""
    named = run.questions["topic"].dropna().astype(str)
    return sorted(set(named[named.str.startswith(prefix)]))


def topics(run: Run) -> list[str]:
    """Topics of general questions, most asked first; what is left over is "other"."""
    rows = run.questions[(run.questions["split"] == "general") & ~run.questions["topic"].str.startswith(tuple(PREFIXES))]
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


def average(curves: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The mean of the curves of several orders where all are known, read off between points by straight lines.

    Half the band is the larger of the mean's own half-interval and, from three orders on, Student's t times the standard
    deviation between orders over the root of their number (`analysis.metrics.orders.spread`).
    """
    if len(curves) == 1:
        return curves[0]
    if any(c.empty for c in curves):
        return table([], [])
    x = curves[0]["x"].to_numpy()
    x = x[(x >= max(c["x"].min() for c in curves)) & (x <= min(c["x"].max() for c in curves))]
    read = {k: np.stack([np.interp(x, c["x"], c[k]) for c in curves]) for k in ("value", "low", "high", "n")}
    many, value = len(curves), read["value"].mean(0)
    half = np.sqrt((((read["high"] - read["low"]) / 2) ** 2).sum(0)) / many
    if many >= orders.LEAST_ORDERS:
        half = np.maximum(half, orders.student(many - 1) * read["value"].std(0, ddof=1) / np.sqrt(many))
    return pd.DataFrame({"x": x, "value": value, "low": value - half, "high": value + half, "n": read["n"].sum(0)})


def _year_draws(run: Run, rows: pd.DataFrame, split: str, reading: str, resampler: Resampler) -> dict[float, Draws]:
    rows = year_ends(asked(rows, split))
    if rows.empty:
        return {}
    years, cell = np.unique(np.floor(rows["time"].to_numpy()), return_inverse=True)
    draws = pooled(rows, rows[reading].to_numpy(), cell, len(years), resampler)
    return {float(x): d for x, d in zip(years_passed(run, years), draws) if d is not None}


def _from_unedited(run: Run, editor: EditorRun, rows: pd.DataFrame, reading: str, resampler: Resampler) -> pd.DataFrame:
    if rows.empty:
        return table([], [])
    steps, cell = np.unique(rows["step"].to_numpy(), return_inverse=True)
    first = rows.drop_duplicates("question")
    before = unedited(editor, first)[:, READINGS.index(reading)]
    start = pooled(first, before, np.zeros(len(first), int), 1, resampler)
    return table([0, *run.edits_at(steps)], [*start, *pooled(rows, rows[reading].to_numpy(), cell, len(steps), resampler)])


def _start(value: float, n: int) -> pd.DataFrame:
    """The unedited model's point of a curve that is relative to it."""
    return pd.DataFrame({"x": [0.0], "value": [value], "low": [value], "high": [value], "n": [float(n)]})


def _certain(resampler: Resampler, n: int) -> Draws:
    return Draws(np.ones(resampler.replicates + 1), n, float(n))


def _of_topic(run: Run, column: pd.Series, topic: str) -> np.ndarray:
    named = column.astype(str).replace("", "general")
    known = topics(run)
    return (named == topic).to_numpy() if (named == topic).any() else (~named.isin(known)).to_numpy()


def _ratio(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    return np.exp(now - before)


def _mean(*parts: np.ndarray) -> np.ndarray:
    return np.mean(parts, axis=0)
