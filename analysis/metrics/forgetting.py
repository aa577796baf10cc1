"""What becomes of edits: forgetting both ways, transfer, half-life, stability against plasticity, revised facts.

Formulas, units and directions in docs/semantics.md. Names: y is one answer's score, T the end of the stream.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.metrics.answers import (
    SIGNED,
    Metrics,
    age_bins,
    asked,
    at_end,
    immediate,
    means,
    plain_means,
    pooled,
    right_after,
    unedited,
    year_ends,
)
from analysis.metrics.bootstrap import Draws, Resampler, combine
from analysis.metrics.catalogue import SUFFIXES
from analysis.reading.load import READINGS, EditorRun, Run
from analysis.reading.records import AFTER, LADDER

REVISED = ("revise", "revert")
"""Kinds of events that give a fact another value than an earlier event did."""


def of_edits(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """All metrics of this file that can be computed."""
    rows = editor.records
    out = forgetting(run, rows, resampler) | forgetting_max(run, rows, resampler) | forward_transfer(editor, resampler)
    out |= half_life(run, rows, resampler) | anytime_success(rows, resampler) | stability_plasticity(run, rows, resampler)
    return out | revised(run, rows, resampler) | teacher_forcing_gap(rows, resampler)


def forgetting(run: Run, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """F = mean(y_right_after - y_end) over live edits made before the last step; backward transfer is -F.

    Lopez-Paz and Ranzato 2017 (backward transfer), first-minus-last as in Avalanche. In [-1, 1].
    """
    end = at_end(rows, "edit")
    end = end[end["made"] < end["step"]]
    lost = immediate(run, rows)[end["edit"]] - end[list(READINGS)].to_numpy()
    return means("forgetting", end, lost, resampler, SIGNED) | means("backward_transfer", end, -lost, resampler, SIGNED)


def forgetting_max(run: Run, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """Mean over year cohorts k of max_l A(k, l) - A(k, T), l the year ends before T (Chaudhry et al. 2018).

    A(k, l) - A(k, T) is taken over the edits of year k that are live at T and were asked at both. In [-1, 1].
    """
    end = at_end(rows, "edit")
    last = np.full((len(run.events), len(READINGS)), np.nan)
    last[end["edit"]] = end[list(READINGS)]
    before = year_ends(asked(rows, "edit"))
    before = before[before["step"] < end["step"].max()]
    if before.empty:
        return {}
    cohorts, row = np.unique(np.floor(run.events["time"].to_numpy()[before["edit"]]), return_inverse=True)
    steps, column = np.unique(before["step"].to_numpy(), return_inverse=True)
    out: Metrics = {}
    for j, suffix in enumerate(SUFFIXES):
        drop = before[READINGS[j]].to_numpy() - last[before["edit"], j]
        table = pooled(before, drop, row * len(steps) + column, len(cohorts) * len(steps), resampler)
        best = _mean_of_best(table, len(steps))
        if best is not None:
            out["forgetting_max" + suffix] = best
    return out


def forward_transfer(editor: EditorRun, resampler: Resampler) -> Metrics:
    """Mean over edits asked before they were made of y_before - y_unedited (the last such answer). In [-1, 1].

    Lopez-Paz and Ranzato 2017, against the unedited model where they take an untrained one.
    """
    rows = editor.records
    early = rows[(rows["split"] == "edit") & (rows["edit"] >= 0) & (rows["made"] > rows["step"]) & (rows["step"] > 0)]
    early = early.sort_values("step").drop_duplicates("edit", keep="last")
    gain = early[list(READINGS)].to_numpy() - unedited(editor, early)
    return means("forward_transfer", early, gain, resampler, SIGNED)


def half_life(run: Run, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """First age (edits applied since) at which success given success right after is under 1/2; in edits.

    Ages fall into bins [2^k, 2^(k+1)); the age of a bin is the weighted geometric mean of its ages.
    """
    known = aged(rows)
    known = known[known["age"] > 0]
    first = immediate(run, rows)[known["edit"]]
    out: Metrics = {}
    for j, suffix in enumerate(SUFFIXES):
        ages, bins = age_bins(known[first[:, j] == 1], READINGS[j], resampler)
        draws = _first_under(ages, bins, 0.5)
        if draws is not None:
            out["half_life" + suffix] = draws
    return out


def aged(rows: pd.DataFrame) -> pd.DataFrame:
    """Answers about live edits at known ages: those of panels and those of the ladder, each question and step once."""
    ladder = rows[(rows["role"] == LADDER) & (rows["split"] == "edit") & rows["live"]]
    panel = asked(rows, "edit")
    if ladder.empty:
        return panel
    both = pd.concat([panel, ladder]).sort_values("weight", kind="stable")
    return both.drop_duplicates(["question", "step"])


def anytime_success(rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """Mean over the year ends of the success on the edits that were live then. In [0, 1]."""
    ends = year_ends(asked(rows, "edit"))
    if ends.empty:
        return {}
    steps, cell = np.unique(ends["step"].to_numpy(), return_inverse=True)
    out: Metrics = {}
    for reading, suffix in zip(READINGS, SUFFIXES):
        cells = [d for d in pooled(ends, ends[reading].to_numpy(), cell, len(steps), resampler) if d is not None]
        if cells:
            out["anytime_success" + suffix] = combine(_average, *cells)
    return out


def stability_plasticity(run: Run, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """P: success right after, over the edits of the last year; S: success at the end, over live edits of earlier
    years that were right right after; and 2PS / (P + S). In [0, 1]."""
    made = np.floor(run.events["time"].to_numpy())
    end, first = at_end(rows, "edit"), right_after(rows)
    if end.empty or first.empty:
        return {}
    last_year = made[rows.loc[(rows["role"] == AFTER) & (rows["edit"] >= 0), "edit"]].max()
    out = plain_means("plasticity", first[made[first["edit"]] == last_year], resampler)
    old = end[made[end["edit"]] < last_year]
    kept = np.where(immediate(run, rows)[old["edit"]] == 1, old[list(READINGS)].to_numpy(), np.nan)
    out |= means("stability", old, kept, resampler)
    for s in SUFFIXES:
        if "plasticity" + s in out and "stability" + s in out:
            out["stability_plasticity" + s] = combine(_harmonic, out["plasticity" + s], out["stability" + s])
    return out


def revised(run: Run, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """Live edits that replaced an earlier value, at the end: right by the current value, and stale answers. In [0, 1]."""
    again = run.events["kind"].isin(REVISED).to_numpy()
    out: Metrics = {}
    for name, split in (("revised_success", "edit"), ("revised_stale", "stale")):
        end = at_end(rows, split)
        out |= plain_means(name, end[again[end["edit"]]], resampler)
    return out


def teacher_forcing_gap(rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """Mean over live edits at the end of token accuracy minus free generation, on the same answers. In [-1, 1]."""
    end = at_end(rows, "edit")
    gap = (end["tf"] - end["gen"]).to_numpy()[:, None]
    found = means("teacher_forcing_gap", end, gap, resampler, SIGNED)
    return {k: v for k, v in found.items() if np.isfinite(v.value)}


def _mean_of_best(cells: list[Draws | None], width: int) -> Draws | None:
    """Mean over rows of a table of drops of the largest drop of the row; rows without any are left out."""
    rows = [[d for d in cells[start : start + width] if d is not None] for start in range(0, len(cells), width)]
    rows = [r for r in rows if r]
    if not rows:
        return None
    mean = _average(*(np.fmax.reduce([d.values for d in r]) for r in rows))
    return Draws(mean, sum(max(d.n for d in r) for r in rows), sum(max(d.clusters for d in r) for r in rows), SIGNED)


def _first_under(ages: np.ndarray, bins: list[Draws], limit: float) -> Draws | None:
    """Where the curve first passes under the limit, between two bins by a straight line over log age."""
    if not bins:
        return None
    scores, logs = np.stack([d.values for d in bins]), np.log(ages)
    under = scores < limit
    at = under.argmax(0)
    back = np.maximum(at - 1, 0)
    here, there = np.take_along_axis(scores, at[None], 0)[0], np.take_along_axis(scores, back[None], 0)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(at > 0, (there - limit) / (there - here), 1.0)
    values = np.where(under.any(0), np.exp(logs[back] + share * (logs[at] - logs[back])), np.inf)
    return Draws(values, sum(d.n for d in bins), min(d.clusters for d in bins), None)


def _average(*parts: np.ndarray) -> np.ndarray:
    values = np.stack(parts)
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(0) / known.sum(0)


def _harmonic(*parts: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return len(parts) / np.sum([1 / p for p in parts], axis=0)
