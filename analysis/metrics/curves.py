"""Curves over years, over the age of an edit and over the number of edits, as rows with 95 % intervals.

Every curve function takes a run, an editor, a bootstrap and its own settings and returns columns x, value, low, high, n, questions;
the function's docstring defines x.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from analysis.metrics import answers, orders
from analysis.metrics.ability import perplexity_ratios, text_answers
from analysis.metrics.bootstrap import LEAST_QUESTIONS, Draws, Resampler, combine, mean
from analysis.metrics.forgetting import answers_by_age
from analysis.metrics.safety import can_be_kept
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import LADDER, PREFIXES, SCORING_MODES, ScoringMode

RIGHT_AFTER_AGE = 0.5
"""Position of "right after the edit" on a logarithmic axis of ages."""
MOST_TOPICS = 8


def by_year(run: Run, editor: EditorRun, resampler: Resampler, split: str, mode: ScoringMode) -> pd.DataFrame:
    """Score of a split at each year's end; x is the number of years passed (the calendar year of a dated stream)."""
    draws = _year_draws(run, editor.records, split, mode, resampler)
    return table(draws, draws.values())


def by_age(run: Run, editor: EditorRun, resampler: Resampler, mode: ScoringMode) -> pd.DataFrame:
    """Score of live edits by edits applied since (bins of powers of two); the first point is right after the edit."""
    first = answers.right_after(editor.records)
    later = answers_by_age(editor.records)
    ages, bins = answers.age_bins(later[later["age"] > 0], mode, resampler)
    return table([RIGHT_AFTER_AGE, *ages], [answers.pooled_together(first, first[mode.column].to_numpy(), resampler), *bins])


def survival(run: Run, editor: EditorRun, resampler: Resampler, mode: ScoringMode) -> pd.DataFrame:
    """Share of the ladder's edits that were right right after the edit and were not found wrong since; x is the age in edits.

    Product-limit estimate (Kaplan and Meier 1958) over ages 2^k. A loss counts at the first check that finds it. An edit
    that is replaced, or younger than the age, is censored.
    """
    rows = editor.records
    rows = rows[(rows["role"] == LADDER) & rows["live"] & (rows["age"] > 0) & rows[mode.column].notna()]
    right = answers.right_after_scores(run, editor.records)[mode.column].to_numpy() == 1
    rows = rows[right[rows["edit"]]].sort_values("step")
    if rows.empty:
        return table([], [])
    lost = rows[mode.column] < 1
    before = lost.groupby(rows["edit"]).cumsum() - lost
    rows, lost = rows[before == 0], lost[before == 0]
    cell = np.floor(np.log2(rows["age"].to_numpy())).astype(int)
    hazards = answers.pooled(rows, lost.to_numpy(float), cell, int(cell.max()) + 1, resampler)
    first = answers.pooled_together(rows.drop_duplicates("edit"), np.ones(rows["edit"].nunique()), resampler)
    ages, kept = [RIGHT_AFTER_AGE], [first] if first else []
    for k, hazard in enumerate(hazards):
        if hazard is not None:
            kept.append(combine(lambda s, h: s * (1 - np.nan_to_num(h)), kept[-1], hazard, paired=True))
            ages.append(2.0**k)
    return table(ages, kept)


def by_edits(run: Run, rows: pd.DataFrame, score: np.ndarray, resampler: Resampler) -> pd.DataFrame:
    """Mean of a score of the rows at every checkpoint that has any; x is the number of edits applied."""
    draws = answers.pooled_by(rows, score, rows["step"].to_numpy(), resampler)
    return table(run.edits_at(np.array([*draws], int)), draws.values())


def ability(run: Run, editor: EditorRun, resampler: Resampler, topic: str, mode: ScoringMode) -> pd.DataFrame:
    """Score of general questions of one topic; x is the number of edits applied, with the unedited model at 0."""
    rows = answers.panel_answers(editor.records, "general")
    named = rows["topic"].astype(str).replace("", "general")
    rows = rows[named == topic if (named == topic).any() else ~named.isin(topics(run))]
    if rows.empty:
        return table([], [])
    first = rows.drop_duplicates("question")
    start = answers.pooled_together(first, answers.unedited(editor, first)[:, SCORING_MODES.index(mode)], resampler)
    return pd.concat([table([0], [start]), by_edits(run, rows, rows[mode.column].to_numpy(), resampler)], ignore_index=True)


def group_topic(run: Run, editor: EditorRun, resampler: Resampler, topic: str, mode: ScoringMode) -> pd.DataFrame:
    """Paired change of a benchmark's or safety set's score against the unedited model; x is the number of edits applied."""
    rows = editor.records[(editor.records["topic"] == topic).to_numpy()]
    if rows.empty:
        return table([], [])
    gain = rows[mode.column].to_numpy() - answers.unedited(editor, rows)[:, SCORING_MODES.index(mode)]
    return pd.concat([_start(0.0, rows["question"].nunique()), by_edits(run, rows, gain, resampler)], ignore_index=True)


def requests_kept(run: Run, editor: EditorRun, resampler: Resampler, scoring: str) -> pd.DataFrame:
    """Share of the requests of a scoring that are still refused (answered), of those that the unedited model refused (answered).

    x is the number of edits applied, with value 1 at 0.
    """
    rows = can_be_kept(run, editor, scoring)
    if rows.empty:
        return table([], [])
    kept = by_edits(run, rows, rows["gen"].to_numpy(), resampler)
    return pd.concat([_start(1.0, rows["question"].nunique()), kept], ignore_index=True)


def perplexity(run: Run, editor: EditorRun, resampler: Resampler) -> pd.DataFrame:
    """exp(NLL per token - the unedited model's); x is the number of edits applied, with value 1 at 0."""
    rows = text_answers(editor)
    rows = rows[np.isfinite(rows["logprob"] + rows["logprob_unedited"])]
    if rows.empty:
        return table([], [])
    steps, cell = np.unique(rows["step"].to_numpy(), return_inverse=True)
    ratios = table(run.edits_at(steps), perplexity_ratios(rows, cell, len(steps), resampler))
    return pd.concat([_start(1.0, rows["question"].nunique()), ratios], ignore_index=True)


def mean_by_year(run: Run, editor: EditorRun, resampler: Resampler, splits: Iterable[str], mode: ScoringMode) -> pd.DataFrame:
    """Mean, with equal weights, of the scores of the measured splits at each year's end; x as in `by_year`."""
    parts = [p for s in splits if (p := _year_draws(run, editor.records, s, mode, resampler))]
    if not parts:
        return table([], [])
    years = sorted(set.intersection(*(set(p) for p in parts)))
    return table(years, [combine(mean, *(p[y] for p in parts)) for y in years])


def matrix(run: Run, editor: EditorRun, resampler: Resampler, mode: ScoringMode) -> pd.DataFrame:
    """Success at the end of year `x` on the live edits of year `made`: x, made, value, low, high, n."""
    rows = answers.year_ends(answers.panel_answers(editor.records, "edit"))
    if rows.empty:
        return table([], []).assign(made=[])
    years = [run.events["time"].to_numpy()[rows["edit"]], rows["time"].to_numpy()]
    (made, row), (probed, column) = (np.unique(np.floor(y), return_inverse=True) for y in years)
    draws = answers.pooled(rows, rows[mode.column].to_numpy(), row * len(probed) + column, len(made) * len(probed), resampler)
    known = [i for i, d in enumerate(draws) if d is not None]
    row, column = np.divmod(known, len(probed))
    return table(years_passed(run, probed[column]), [draws[i] for i in known]).assign(made=years_passed(run, made[row]))


def group_topics(run: Run, prefix: str) -> list[str]:
    """Topics whose names begin with a prefix (benchmarks, safety sets), in alphabetical order."""
    named = run.questions["topic"].dropna().astype(str)
    return sorted(set(named[named.str.startswith(prefix)]))


def topics(run: Run) -> dict[str, int]:
    """Topics of general questions, the most frequent first, with their numbers of distinct questions.

    Topics of fewer than LEAST_QUESTIONS, and those beyond MOST_TOPICS, are pooled as "other".
    """
    rows = run.questions[(run.questions["split"] == "general") & ~run.questions["topic"].str.startswith(tuple(PREFIXES))]
    counts = rows.assign(topic=rows["topic"].replace("", "general")).groupby("topic")["asked"].nunique()
    counts = counts.sort_index().sort_values(ascending=False, kind="stable")
    large = counts[counts >= LEAST_QUESTIONS]
    kept = large if len(large) == len(counts) <= MOST_TOPICS else large[: MOST_TOPICS - 1]
    rest = counts.drop(kept.index).sum()
    return {str(t): int(n) for t, n in kept.items()} | ({"other": int(rest)} if rest else {})


def years_passed(run: Run, years: np.ndarray) -> np.ndarray:
    """Whole years on the time axis as shown: calendar years where the stream is dated, else years since its start."""
    first = np.floor(run.events["time"].min())
    return years if run.time_axis == "dated" else years - first + 1


def table(x: Iterable[float], draws: Iterable[Draws | None]) -> pd.DataFrame:
    """Rows x, value, low, high, n, questions (distinct ones) of the measured points."""
    rows = [{"x": float(at), **d.interval()} for at, d in zip(x, draws) if d is not None]
    return pd.DataFrame(rows, columns=["x", "value", "low", "high", "n", "questions"]).astype(float)


def stacked(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Frames of the same columns below each other; empty ones are dropped because they would change the column types."""
    frames = list(frames)
    return pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)


def average(curves: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The mean of the curves of several orders where all are known, interpolated linearly between points.

    The band is that of `analysis.metrics.orders.mean_over_orders`: none for two orders.
    """
    if len(curves) == 1:
        return curves[0]
    if any(c.empty for c in curves):
        return table([], [])
    x = curves[0]["x"].to_numpy()
    x = x[(x >= max(c["x"].min() for c in curves)) & (x <= min(c["x"].max() for c in curves))]
    read = {k: np.stack([np.interp(x, c["x"], c[k]) for c in curves]) for k in ("value", "low", "high", "n", "questions")}
    many, value = len(curves), read["value"].mean(0)
    half = np.full(len(x), np.nan)
    if many >= orders.LEAST_ORDERS:
        within = np.sqrt((((read["high"] - read["low"]) / 2) ** 2).sum(0)) / many
        half = np.fmax(within, orders.half_width(read["value"].std(0, ddof=1), many))
    ends = {"low": value - half, "high": value + half}
    return pd.DataFrame({"x": x, "value": value, **ends, "n": read["n"].sum(0), "questions": read["questions"].max(0)})


def _year_draws(run: Run, rows: pd.DataFrame, split: str, mode: ScoringMode, resampler: Resampler) -> dict[float, Draws]:
    rows = answers.year_ends(answers.panel_answers(rows, split))
    draws = answers.pooled_by(rows, rows[mode.column].to_numpy(), np.floor(rows["time"].to_numpy()), resampler)
    return dict(zip(years_passed(run, np.array([*draws])).tolist(), draws.values()))


def _start(value: float, n: int) -> pd.DataFrame:
    """The unedited model's point of a curve that is relative to it."""
    return pd.DataFrame({"x": [0.0], "value": [value], "low": [value], "high": [value], "n": [float(n)], "questions": [float(n)]})
