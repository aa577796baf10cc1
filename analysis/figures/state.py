"""Figures of a model's state: the success left of each year's edits, and internal signals.

Internal signals are values that monitors stored and values that editors reported with their steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from analysis.figures import style
from analysis.figures.context import FigureContext
from analysis.metrics import curves
from analysis.metrics.bootstrap import LEAST_QUESTIONS
from analysis.metrics.catalogue import METRICS, wrapped
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import read_table

TITLES: dict[str, str] = style.CAPTIONS["vitals"]["panels"]
"""Titles of known signals, in the order of display; others follow under their own names."""
STEP_NOTES = ("loss",)
"""Notes about a step's own optimisation, which are no signals of the model after it."""
MOST_POINTS = 200
"""A longer signal is downsampled to about so many points, each the median of a stretch."""
MOST_SIGNALS = 12
"""Signals after this many, in the order of `TITLES`, are not drawn."""
MOST_NUMBERED = 10
"""Matrices with more years than this are drawn without their numbers."""
TITLE_WIDTH = 22
"""Characters in a line of an editor's name above its matrix."""


def signals(run: Run, editor: EditorRun) -> pd.DataFrame:
    """Columns name, x (edits applied), value: finite numbers by signal, in the order of TITLES."""
    rows = curves.stacked([_monitors(editor), _reported(editor)])
    rows = rows[np.isfinite(rows["value"].to_numpy(float))].drop_duplicates(["name", "step"])
    rows["x"] = run.edits_at(rows["step"].to_numpy(int)).astype(float)
    order = {n: i for i, n in enumerate([*TITLES, *sorted(set(rows["name"]) - set(TITLES))])}
    rows = rows.assign(rank=rows["name"].map(order)).sort_values(["rank", "step"], kind="stable")
    return rows[["name", "x", "value"]].reset_index(drop=True)


def downsampled(signal: pd.DataFrame) -> pd.DataFrame:
    """A signal with at most about MOST_POINTS points: the last x and the median value of equal stretches."""
    if len(signal) <= MOST_POINTS:
        return signal
    stretch = np.arange(len(signal)) * MOST_POINTS // len(signal)
    groups = signal.groupby(stretch)
    return pd.DataFrame({"x": groups["x"].last(), "value": groups["value"].median()})


def _monitors(editor: EditorRun) -> pd.DataFrame:
    columns = ["step", "name", "value"]
    parts = [read_table(p, columns).to_pandas() for p in sorted((editor.folder / "monitors").glob("step-*.parquet"))]
    return pd.concat(parts or [pd.DataFrame(columns=columns)], ignore_index=True)


def _reported(editor: EditorRun) -> pd.DataFrame:
    """delta_norm and the numeric notes of edits.jsonl, one row for each step and name."""
    steps = editor.reports
    rows = [(s, "delta_norm", v) for s, v in zip(steps["step"], steps["delta_norm"].astype(float)) if not np.isnan(v)]
    for step, notes in zip(steps["step"], steps["notes"]):
        numbers = notes.items() if isinstance(notes, dict) else ()
        rows += [(step, k, float(v)) for k, v in numbers if isinstance(v, (int, float)) and k not in STEP_NOTES]
    return pd.DataFrame(rows, columns=["step", "name", "value"])


def forgetting(context: FigureContext) -> Figure | None:
    """Success by year of the edit (down) and of the question (across): one matrix for each editor; lighter is better."""
    frames = {n: found for n in context.compared if (found := _matrix(context, n)) is not None}
    if not frames:
        return None

    def draw(ax: Axes, name: str) -> None:
        _heatmap(ax, *frames[name], context.columns)
        ax.set_title(_title(context, name), color=context.styles[name].colour)
        ax.set(xlabel="", ylabel="edits made in year")

    figure, axes, _ = context.panels(frames, draw, 2.2 if context.columns > 1 else 1.9, most=4)
    figure.supxlabel(f"asked at the end of: {context.time_label}", fontsize=8)
    bar = figure.colorbar(axes[0].collections[0], ax=axes, shrink=0.7, aspect=30, pad=0.01)
    bar.set_label(f"right ({context.mode.title})")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def internal_signals(context: FigureContext) -> Figure | None:
    """One panel for each signal that varies, one line for each editor; a cross on the line marks the editor's collapse."""
    frame = curves.stacked(signals(context.run, e).assign(editor=n) for n, e in context.run.editors.items())
    varied = set(frame.groupby("name")["value"].nunique().loc[lambda n: n > 1].index) if len(frame) else set()
    names = [n for n in dict.fromkeys([*TITLES, *frame["name"]]) if n in varied][:MOST_SIGNALS]
    if not names:
        return None

    def draw(ax: Axes, name: str) -> None:
        own = frame[frame["name"] == name]
        for editor, signal in own.groupby("editor", sort=False):
            _signal(ax, context, str(editor), downsampled(signal))
        ax.set_title(TITLES.get(name, name.replace("_", " ").capitalize()))
        style.edits_axis(ax)
        if (own["value"] > 0).all() and own["value"].max() > 100 * own["value"].min():
            ax.set_yscale("log")

    figure, _, _ = context.panels(names, draw, 1.7)
    return context.legend(figure, frame["editor"])


def _matrix(context: FigureContext, name: str) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Mean over orders of the matrices of an editor, and the answers behind each.

    Years of the edits are rows, years of the questions columns.
    """
    tables = [curves.matrix(r, r.editors[name], b, context.mode) for r, b in zip(context.runs, context.resamplers)]
    tables = [t for t in tables if len(t)]
    if not tables:
        return None
    sides = []
    for values in ("value", "n"):
        wide = [t.pivot(index="made", columns="x", values=values) for t in tables]
        shared = [w.reindex(index=wide[0].index, columns=wide[0].columns).to_numpy() for w in wide]
        pooled = np.mean(shared, axis=0) if values == "value" else np.sum(shared, axis=0)
        sides.append(pd.DataFrame(pooled, wide[0].index.astype(int), wide[0].columns.astype(int)))
    return sides[0], sides[1]


def _heatmap(ax: Axes, frame: pd.DataFrame, answers: pd.DataFrame, columns: int) -> None:
    """A matrix of shares with a number in each cell; cells with few answers are pale."""
    numbered = max(frame.shape) <= MOST_NUMBERED
    size = 7 if max(frame.shape) <= 6 else 5.5 if max(frame.shape) <= 8 else 4.4
    options: dict[str, Any] = {"annot": numbered and 100 * frame, "fmt": ".0f", "annot_kws": {"fontsize": size}}
    sns.heatmap(frame, ax=ax, vmin=0, vmax=1, cmap="cividis", cbar=False, square=True, linewidths=0.4, mask=frame.isna(), **options)
    few = (answers < LEAST_QUESTIONS).to_numpy()
    for row, column in zip(*np.nonzero(few)):
        ax.add_patch(Rectangle((column, row), 1, 1, facecolor="white", alpha=0.65, linewidth=0))
    for number in ax.texts:  # seaborn chose their colours for full ones
        column, row = (int(x) for x in number.get_position())
        number.set_color("#333333" if few[row, column] else number.get_color())
    ax.grid(False)
    ax.tick_params(length=0, rotation=0)
    every = max(1, -(-max(frame.shape) // (8 if columns > 1 else 5)))
    for axis, names in ((ax.xaxis, frame.columns), (ax.yaxis, frame.index)):
        axis.set_ticks(np.arange(0, len(names), every) + 0.5, [str(n) for n in names[::every]])


def _title(context: FigureContext, name: str) -> str:
    """The editor's name and, below it, its forgetting."""
    lines = wrapped(name, TITLE_WIDTH)
    entry = context.summary["editors"][name].get("forgetting" + context.mode.suffix)
    if entry is not None:
        lines.append(f"{METRICS['forgetting'].short.lower()} {100 * entry['value']:.0f} points".replace("-", "−"))
    return "\n".join(lines)


def _signal(ax: Axes, context: FigureContext, editor: str, signal: pd.DataFrame) -> None:
    own = context.styles[editor]
    marker = own.marker if len(signal) <= 40 else None
    ax.plot(signal["x"], signal["value"], color=own.colour, linewidth=1.2, marker=marker, markersize=3.5, dashes=own.dash)
    point = context.summary["editors"][editor].get("collapse_step")
    if point is not None and point["value"] is not None and len(signal):
        at = float(context.run.edits_at(np.array([point["value"]]))[0])
        ax.plot([at], [np.interp(at, signal["x"], signal["value"])], "x", color="black", markersize=6, markeredgewidth=1.4, zorder=5)
