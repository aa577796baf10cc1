"""Metrics of edits over time: forgetting both ways, transfer, half-life, stability and plasticity, revised facts.

Formulas, units and directions are in docs/semantics.md. In formulas, y is one answer's score and T the end of the stream.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.metrics import answers
from analysis.metrics.answers import SIGNED, Metrics
from analysis.metrics.bootstrap import Draws, Resampler, combine, harmonic
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import AFTER, LADDER, SCORES, SCORING_MODES, ScoringMode

REVISED = ("revise", "revert")
"""Kinds of events that give a fact another value than an earlier event did."""


def edit_metrics(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """All metrics of this file that can be computed."""
    rows = editor.records
    metrics = forgetting(run, rows, resampler) | forgetting_max(run, rows, resampler) | forward_transfer(editor, resampler)
    metrics |= half_life(run, rows, resampler) | anytime_success(rows, resampler) | stability_plasticity(run, rows, resampler)
    return metrics | revised(run, rows, resampler) | teacher_forcing_gap(rows, resampler)


def forgetting(run: Run, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """F = mean(y_right_after - y_T) over live edits made before the last step, in [-1, 1]; backward transfer is -F.

    Sources: Lopez-Paz and Ranzato 2017 (backward transfer); first minus last, as in Avalanche.
    """
    end = answers.at_end(rows, "edit")
    end = end[end["made"] < end["step"]]
    lost = answers.right_after_scores(run, rows).to_numpy()[end["edit"]] - end[SCORES].to_numpy()
    return answers.means("forgetting", end, lost, resampler, SIGNED) | answers.means("backward_transfer", end, -lost, resampler, SIGNED)


def forgetting_max(run: Run, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """Mean over year cohorts k of max_l A(k, l) - A(k, T), l the year ends before T (Chaudhry et al. 2018). In [-1, 1].

    A(k, l) - A(k, T) is taken over the edits of year k that are live at T and have an answer at both.
    """
    end = answers.at_end(rows, "edit")
    last = answers.by_edit(run, end)
    before = answers.year_ends(answers.panel_answers(rows, "edit"))
    before = before[before["step"] < end["step"].max()]
    if before.empty:
        return {}
    cohorts, row = np.unique(np.floor(run.events["time"].to_numpy()[before["edit"]]), return_inverse=True)
    steps, column = np.unique(before["step"].to_numpy(), return_inverse=True)

    def largest(mode: ScoringMode) -> Draws | None:
        drop = before[mode.column].to_numpy() - last[mode.column].to_numpy()[before["edit"]]
        return _mean_of_largest(answers.pooled(before, drop, row * len(steps) + column, len(cohorts) * len(steps), resampler), len(steps))

    return answers.by_mode("forgetting_max", largest)


def forward_transfer(editor: EditorRun, resampler: Resampler) -> Metrics:
    """Mean of y_before - y_unedited over edits with an answer before they were made (the last such answer). In [-1, 1].

    Source: Lopez-Paz and Ranzato 2017, with the unedited model in place of an untrained one.
    """
    rows = editor.records
    early = rows[(rows["split"] == "edit") & (rows["edit"] >= 0) & (rows["made"] > rows["step"]) & (rows["step"] > 0)]
    early = early.sort_values("step").drop_duplicates("edit", keep="last")
    gain = early[SCORES].to_numpy() - answers.unedited(editor, early)
    return answers.means("forward_transfer", early, gain, resampler, SIGNED)


def half_life(run: Run, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """First age at which success, given success right after the edit, is under 1/2; in edits applied since.

    Ages fall into bins [2^k, 2^(k+1)); the age of a bin is the weighted geometric mean of its ages.
    """
    later = answers_by_age(rows)
    later = later[later["age"] > 0]
    first = answers.right_after_scores(run, rows)
    right = {m: first[m.column].to_numpy()[later["edit"]] == 1 for m in SCORING_MODES}
    return answers.by_mode("half_life", lambda mode: _first_under(*answers.age_bins(later[right[mode]], mode, resampler), 0.5))


def answers_by_age(rows: pd.DataFrame) -> pd.DataFrame:
    """Answers about live edits from panels and from the ladder, each question and step once."""
    ladder = rows[(rows["role"] == LADDER) & (rows["split"] == "edit") & rows["live"]]
    panel = answers.panel_answers(rows, "edit")
    if ladder.empty:
        return panel
    both = pd.concat([panel, ladder]).sort_values("weight", kind="stable")
    return both.drop_duplicates(["question", "step"])


def anytime_success(rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """Mean over the year ends of the success on the edits that were live then. In [0, 1]."""
    ends = answers.year_ends(answers.panel_answers(rows, "edit"))

    def average(mode: ScoringMode) -> Draws | None:
        draws = answers.pooled_by(ends, ends[mode.column].to_numpy(), ends["step"].to_numpy(), resampler)
        return combine(_mean_of_known, *draws.values()) if draws else None

    return answers.by_mode("anytime_success", average)


def stability_plasticity(run: Run, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """Plasticity P, stability S and their harmonic mean 2PS / (P + S), each in [0, 1].

    P is the success right after the edit over the edits of the last year. S is the success at the end over live edits of
    earlier years that were right right after the edit.
    """
    made = np.floor(run.events["time"].to_numpy())
    end, first = answers.at_end(rows, "edit"), answers.right_after(rows)
    if end.empty or first.empty:
        return {}
    last_year = made[rows.loc[(rows["role"] == AFTER) & (rows["edit"] >= 0), "edit"]].max()
    out = answers.mean_scores("plasticity", first[made[first["edit"]] == last_year], resampler)
    old = end[made[end["edit"]] < last_year]
    kept = np.where(answers.right_after_scores(run, rows).to_numpy()[old["edit"]] == 1, old[SCORES].to_numpy(), np.nan)
    out |= answers.means("stability", old, kept, resampler)
    return out | answers.combined("stability_plasticity", harmonic, ("plasticity", "stability"), out)


def revised(run: Run, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """Share of right answers and of stale answers at the end, over live edits that replaced an earlier value. In [0, 1]."""
    again = run.events["kind"].isin(REVISED).to_numpy()
    out: Metrics = {}
    for name, split in (("revised_success", "edit"), ("revised_stale", "stale")):
        end = answers.at_end(rows, split)
        out |= answers.mean_scores(name, end[again[end["edit"]]], resampler)
    return out


def teacher_forcing_gap(rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """Mean over live edits at the end of token accuracy minus free generation, on the same answers. In [-1, 1]."""
    end = answers.at_end(rows, "edit")
    gap = (end["tf"] - end["gen"]).to_numpy()[:, None]
    return answers.means("teacher_forcing_gap", end, gap, resampler, SIGNED)


def _mean_of_largest(cells: list[Draws | None], width: int) -> Draws | None:
    """Mean over the rows of a table (rows x width, flattened) of the largest entry of the row; empty rows are left out."""
    rows = [[d for d in cells[start : start + width] if d is not None] for start in range(0, len(cells), width)]
    rows = [r for r in rows if r]
    if not rows:
        return None
    mean = _mean_of_known(*(np.fmax.reduce([d.values for d in r]) for r in rows))
    asked = np.unique(np.concatenate([d.asked for r in rows for d in r]))
    return Draws(mean, sum(max(d.n for d in r) for r in rows), asked, sum(max(d.clusters for d in r) for r in rows), SIGNED)


def _first_under(ages: np.ndarray, bins: list[Draws], limit: float) -> Draws | None:
    """The age at which the curve first falls under the limit, interpolated linearly in log age between two bins."""
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
    return combine(lambda *_: values, *bins, bounds=None)


def _mean_of_known(*parts: np.ndarray) -> np.ndarray:
    """Mean of the parts that are not nan; unlike `np.nanmean`, without a warning where all are."""
    values = np.stack(parts)
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(0) / known.sum(0)
