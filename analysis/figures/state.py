"""Figures of a model's state: what is left of each year's edits, and the signals of its inside."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from analysis.figures import style
from analysis.figures.context import Scene
from analysis.metrics import curves
from analysis.metrics.catalogue import METRICS, folded
from analysis.metrics.signals import TITLES, signals, thinned

MOST_WRITTEN = 10
"""Matrices with more years than this are drawn without their numbers."""
TITLE_WIDTH = 22
"""Characters in a line of an editor's name over its matrix."""
MOST_SIGNALS = 12
"""Signals after this many, in the order of `TITLES`, are not drawn."""


def forgetting(s: Scene) -> Figure | None:
    """Year of the edits by year of asking: one matrix an editor, lighter is better; grey levels keep the order."""
    frames = {n: _matrix(s, n) for n in s.run.editors}
    frames = {n: f for n, f in frames.items() if f is not None}
    if not frames:
        return None
    figure, axes, across = s.panels(len(frames), 2.2 if s.columns > 1 else 1.9, most=4)
    for i, (ax, (name, frame)) in enumerate(zip(axes, frames.items())):
        _heat(ax, frame, s)
        ax.set_title(_headed(s, name), color=s.looks[name].colour)
        ax.set_xlabel("")
        ax.set_ylabel("edits made in year" if i % across == 0 else "")
    figure.supxlabel(f"asked at the end of: {s.time_label}", fontsize=8)
    colours = axes[0].collections[0]
    bar = figure.colorbar(colours, ax=axes, shrink=0.7, aspect=30, pad=0.01)
    bar.set_label(f"right ({s.reading_title})")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def vitals(s: Scene) -> Figure | None:
    """One panel a signal that varies at all, one line an editor; the collapse of an editor is a cross on its line."""
    found = [signals(s.run, e).assign(editor=n) for n, e in s.run.editors.items()]
    frame = pd.concat([f for f in found if len(f)] or found[:1], ignore_index=True)
    varied = set(frame.groupby("name")["value"].nunique().loc[lambda n: n > 1].index) if len(frame) else set()
    names = [n for n in dict.fromkeys([*TITLES, *frame["name"]]) if n in varied][:MOST_SIGNALS]
    if not names:
        return None
    figure, axes, across = s.panels(len(names), 1.7)
    for i, (ax, name) in enumerate(zip(axes, names)):
        own = frame[frame["name"] == name]
        for editor in dict.fromkeys(own["editor"]):
            _signal(ax, s, editor, thinned(own[own["editor"] == editor]))
        ax.set_title(TITLES.get(name, name.replace("_", " ")))
        style.edits_axis(ax, "edits applied" if i + across >= len(names) else "")
        _wide(ax, own["value"].to_numpy(float))
    style.legend(figure, {n: look for n, look in s.looks.items() if n in set(frame["editor"])})
    return style.finish(figure)


def _matrix(s: Scene, name: str) -> pd.DataFrame | None:
    """Mean over orders of the matrices of an editor: years made by years asked."""
    tables = [partial(curves.matrix, reading=s.reading)(r, r.editors[name], b) for r, b in zip(s.runs, s.resamplers)]
    wide = [t.pivot(index="made", columns="x", values="value") for t in tables if len(t)]
    if not wide:
        return None
    shared = [w.reindex(index=wide[0].index, columns=wide[0].columns) for w in wide]
    mean = pd.DataFrame(np.mean([w.to_numpy() for w in shared], axis=0), wide[0].index, wide[0].columns)
    mean.index, mean.columns = mean.index.astype(int), mean.columns.astype(int)
    return mean


def _heat(ax: Axes, frame: pd.DataFrame, s: Scene) -> None:
    written = max(frame.shape) <= MOST_WRITTEN
    size = 7 if max(frame.shape) <= 6 else 5.5
    options: dict[str, Any] = {"annot": written and 100 * frame, "fmt": ".0f", "annot_kws": {"fontsize": size}}
    sns.heatmap(frame, ax=ax, vmin=0, vmax=1, cmap="cividis", cbar=False, square=True, linewidths=0.4, mask=frame.isna(), **options)
    ax.grid(False)
    ax.tick_params(length=0, rotation=0)
    every = max(1, -(-max(frame.shape) // (8 if s.columns > 1 else 5)))
    for axis, names in ((ax.xaxis, frame.columns), (ax.yaxis, frame.index)):
        axis.set_ticks(np.arange(0, len(names), every) + 0.5, [str(n) for n in names[::every]])


def _headed(s: Scene, name: str) -> str:
    """The editor's name and, under it, how much it forgets."""
    lines = folded(name, TITLE_WIDTH)
    entry = s.summary["editors"][name].get("forgetting" + s.suffix)
    if entry is not None:
        lines.append(f"{METRICS['forgetting'].short.lower()} {100 * entry['value']:.0f} points".replace("-", "−"))
    return "\n".join(lines)


def _signal(ax: Axes, s: Scene, editor: str, signal: pd.DataFrame) -> None:
    look = s.looks[editor]
    marker = look.marker if len(signal) <= 40 else None
    (line,) = ax.plot(signal["x"], signal["value"], color=look.colour, linewidth=1.2, marker=marker, markersize=3.5)
    if look.dash:
        line.set_dashes(look.dash)
    point = s.summary["editors"][editor].get("collapse_step")
    if point is not None and len(signal):
        at = float(s.run.edits_at(np.array([point["value"]]))[0])
        ax.plot([at], [np.interp(at, signal["x"], signal["value"])], "x", color="black", markersize=6, markeredgewidth=1.4, zorder=5)


def _wide(ax: Axes, values: np.ndarray) -> None:
    """A logarithmic axis where positive values span more than two decades."""
    if (values > 0).all() and values.max() > 100 * values.min():
        ax.set_yscale("log")
