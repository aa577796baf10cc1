"""Figures of editors that store edits beside the model: entries behind a gate, and facts in a store.

An editor has a gate when its reports count entries and its answers name the entry that gave them. An editor has a fact
store when its answers hold retrieval logs (`analysis.metrics.retrieval`).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.figures import style
from analysis.figures.context import FigureContext
from analysis.metrics import curves
from analysis.metrics.answers import LEAST_IN_BIN, panel_answers, pooled_by
from analysis.metrics.bootstrap import Resampler, combine, harmonic
from analysis.metrics.catalogue import GENERALITY, human_bytes
from analysis.metrics.from_extras import gate_decisions
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import ScoringMode

_SCORED = style.CAPTIONS["gated"]["panels"]
_FACT_STORE = style.CAPTIONS["retrieved"]["panels"]
"""Column of the retrieval table to the title of its panel."""


def gated(context: FigureContext) -> Figure | None:
    """Generality, hard locality, their harmonic mean, hit rates of entries, number of entries and bytes, by edits applied."""
    frames = {t: context.curves(partial(_score, split=k, mode=context.mode)) for k, t in _SCORED.items()}
    frames["Harmonic mean"] = context.curves(partial(harmonic_mean, mode=context.mode))
    frames["Hit rate: rephrased"] = context.curves(partial(hit_rate, locality=False))
    frames["Hit rate: locality"] = context.curves(partial(hit_rate, locality=True))
    frames["Entries"] = context.curves(entries)
    frames["State"] = context.curves(state_bytes)
    if not len(frames["Entries"]):
        return None
    figure, _, _ = context.panels(frames, partial(_draw, context, frames), most=4)
    style.legend(figure, context.styles)
    return style.finish(figure)


def _draw(context: FigureContext, frames: dict[str, pd.DataFrame], ax: Axes, title: str) -> None:
    """Fills a panel of a figure of this file; the title says which axis it has."""
    style.lines(ax, frames[title], context.styles)
    style.edits_axis(ax)
    if title in ("Entries", "State"):
        show = human_bytes if title == "State" else "{:,.0f}".format
        ax.set(ylim=(0, None), ylabel="")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: show(v)))
    else:
        style.shares(ax, "share of questions" if title.startswith("Hit rate") else f"right, or as unedited\n({context.mode.title})")


def _score(run: Run, editor: EditorRun, resampler: Resampler, split: str, mode: ScoringMode) -> pd.DataFrame:
    rows = panel_answers(editor.records, split)
    return curves.by_edits(run, rows, rows[mode.column].to_numpy(), resampler)


def harmonic_mean(run: Run, editor: EditorRun, resampler: Resampler, mode: ScoringMode) -> pd.DataFrame:
    """Harmonic mean of the panels' kinds that were measured, by edits applied, at checkpoints with answers to all of them."""
    splits = [panel_answers(editor.records, split) for split in _SCORED]
    measured = [rows for rows in splits if len(rows)]
    if not measured:
        return curves.table([], [])
    parts = [pooled_by(rows, rows[mode.column].to_numpy(), rows["step"].to_numpy(), resampler) for rows in measured]
    steps = sorted(set.intersection(*map(set, parts)))
    return curves.table(run.edits_at(np.array(steps, int)), [combine(harmonic, *(p[s] for p in parts)) for s in steps])


def hit_rate(run: Run, editor: EditorRun, resampler: Resampler, locality: bool) -> pd.DataFrame:
    """Share of panel questions that an entry answered, by edits applied: locality questions or rephrased ones."""
    rows = gate_decisions(editor)
    rows = rows[rows["split"].str.startswith("locality_") if locality else rows["split"].isin(GENERALITY)]
    sums = rows.assign(hit=rows["fired"] * rows["weight"]).groupby("step")[["hit", "weight"]].sum()
    return _exact(run, sums.index.to_numpy(), sums["hit"].to_numpy() / sums["weight"].to_numpy())


def entries(run: Run, editor: EditorRun, resampler: Resampler) -> pd.DataFrame:
    """Number of entries that the editor reports, by edits applied."""
    noted = [n.get("entries") if isinstance(n, dict) else None for n in editor.reports["notes"]]
    counts = pd.Series(noted, index=editor.reports["step"], dtype=float).dropna()
    return _exact(run, counts.index.to_numpy(), counts.to_numpy())


def state_bytes(run: Run, editor: EditorRun, resampler: Resampler) -> pd.DataFrame:
    """Bytes of the state of an editor that reports entries, by edits applied."""
    if not len(entries(run, editor, resampler)):
        return curves.table([], [])
    return _exact(run, editor.reports["step"].to_numpy(), editor.reports["state_bytes"].to_numpy(float))


def _exact(run: Run, steps: np.ndarray, values: np.ndarray) -> pd.DataFrame:
    """A curve of exact numbers with at most a hundred points; its band has no width."""
    keep = np.unique(np.linspace(0, len(steps) - 1, min(100, len(steps))).round().astype(int)) if len(steps) else np.zeros(0, int)
    x, y = run.edits_at(steps[keep].astype(int)), values[keep]
    return pd.DataFrame({"x": x, "value": y, "low": y, "high": y, "n": np.ones(len(y)), "questions": np.ones(len(y))}).astype(float)


def retrieved(context: FigureContext) -> Figure | None:
    """Shares of questions and costs of a question by the number of facts, averaged over orders, without intervals."""
    table = context.retrieval_table
    if not len(table):
        return None
    frames = {title: _curve(table, column) for column, title in _FACT_STORE.items()}

    def draw(ax: Axes, title: str) -> None:
        style.lines(ax, frames[title], context.styles)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        ax.set_xlabel("facts in the store")
        if title in (_FACT_STORE["tokens"], _FACT_STORE["seconds"]):
            ax.set(ylim=(0, None), ylabel="")
        else:
            style.shares(ax, "share of questions")

    figure, _, _ = context.panels(frames, draw, sharex=True)
    return context.legend(figure, table["editor"])


def _curve(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """One point for each editor and doubling of the store, at the geometric mean of its bounds.

    A share of unrelated questions has no point where there were fewer than LEAST_IN_BIN of them.
    """
    points = table.assign(value=table[column].astype(float) * (1e3 if column == "seconds" else 1))
    if column == "false_accept":
        points["value"] = points["value"].where(points["unrelated"] >= LEAST_IN_BIN)
    points["x"] = np.sqrt(points["facts_from"] * points["facts_to"])
    mean = points.dropna(subset="value").groupby(["editor", "x"], sort=False)["value"].mean().reset_index()
    return mean.assign(low=mean["value"], high=mean["value"])
