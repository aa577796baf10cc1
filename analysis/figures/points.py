"""Figures of values at the end: cost, trade-off, and the gap between scoring modes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from analysis.figures import style
from analysis.figures.context import FigureContext
from analysis.metrics import curves
from analysis.metrics.catalogue import GENERALITY, LOCALITY, human_bytes, wrapped
from analysis.metrics.comparison import competing
from analysis.reading.records import SHOWN_MODES

COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds_per_edit": ("seconds an edit", lambda v: f"{v:g}"),
    "state_bytes": ("editor state", human_bytes),
    "peak_bytes": ("peak memory", human_bytes),
}
LEVELS = (0.2, 0.4, 0.6, 0.8)
"""Harmonic means whose lines are drawn."""
_MARKERS = dict(zip((mode.suffix for mode in SHOWN_MODES), "osD"))
"""Marker of each scoring mode in the figure of the gap."""


def cost(context: FigureContext) -> Figure | None:
    """Success at the end, seconds per edit, the editor's state and peak memory, one row for each competing editor."""
    success = "edit_success" + context.mode.suffix
    entries = {n: context.summary["editors"][n] for n in context.compared}
    names = [n for n, m in entries.items() if success in m and set(COSTS) <= set(m)]
    if not names:
        return None
    figure, axes = style.panels(1, 1 + len(COSTS), 0.9 + 0.28 * len(names), context.width, sharey=True)
    for ax, kind in zip(axes, (success, *COSTS)):
        for row, name in enumerate(names):
            entry, own = entries[name][kind], context.styles[name]
            size: dict[str, Any] = {"markersize": 5, "capsize": 2, "elinewidth": 1}
            ax.errorbar([entry["value"]], [row], xerr=_error(entry), fmt=own.marker, color=own.colour, **size)
        if kind in COSTS:
            label, text = COSTS[kind]
            _log_from_zero(ax, [entries[n][kind]["value"] for n in names], text)
            ax.set_xlabel(label)
    axes[0].set_xlabel(f"right at the end\n({context.mode.title})")
    _share_axis(axes[0])
    _rows(axes[0], names, context)
    return style.finish(figure)


def trade_off(context: FigureContext) -> Figure | None:
    """Generality against locality with each editor's path, lines of equal harmonic mean, and the Pareto front of the ends."""
    sides = [context.curves(partial(curves.mean_by_year, splits=k, mode=context.mode)) for k in (LOCALITY, GENERALITY)]
    if not len(sides[0]) or not len(sides[1]):
        return None
    paths = sides[0].merge(sides[1], on=["editor", "x"], suffixes=("_loc", "_gen"))
    figure, (ax,) = style.panels(1, 1, 3.4, width=min(context.width, style.ONE_COLUMN + 0.9))
    _equal_means(ax)
    ends = paths.sort_values("x").groupby("editor", sort=False).tail(1)
    rivals = ends[ends["editor"].isin(competing(context.summary))]
    _front(ax, rivals["value_loc"].to_numpy(), rivals["value_gen"].to_numpy())
    for name, own in context.styles.items():
        _path(ax, paths[paths["editor"] == name].sort_values("x"), own)
    style.shares(ax, f"generality: rephrasings and other pictures right\n({context.mode.title})")
    _share_axis(ax)
    ax.set_xlabel("locality: answers left as they were (mean of kinds)")
    named = pd.DataFrame({"editor": ends["editor"], "x": ends["value_loc"], "value": ends["value_gen"]})
    style.label_lines(figure, [ax], [named], context.styles)
    return style.finish(figure)


def gap(context: FigureContext) -> Figure | None:
    """Success at the end in the three scoring modes, one row for each editor; the line is the teacher-forcing gap."""
    editors = [n for n, m in context.summary["editors"].items() if "edit_success" in m and "edit_success_gen" in m]
    if not editors:
        return None
    figure, (ax,) = style.panels(1, 1, 0.9 + 0.28 * len(editors), width=context.width)
    for row, name in enumerate(editors):
        _gap_row(ax, row, context.summary["editors"][name], context.styles[name])
    _rows(ax, editors, context)
    _share_axis(ax)
    ax.set_xlabel("live edits right at the end")
    handles = [ax.plot([], [], _MARKERS[m.suffix], color="#444444", markersize=4.5, label=m.title)[0] for m in SHOWN_MODES]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return style.finish(figure)


def _rows(ax: Axes, names: list[str], context: FigureContext) -> None:
    """A row for each editor, with its name in its colour."""
    ax.set_yticks(range(len(names)), ["\n".join(wrapped(n, style.NAME_WIDTH)) for n in names])
    for tick, name in zip(ax.get_yticklabels(), names):
        tick.set_color(context.styles[name].colour)
    ax.set_ylim(len(names) - 0.4, -0.6)


def _share_axis(ax: Axes) -> None:
    """Horizontal axis from 0 to 100 %."""
    ax.set_xlim(-0.03, 1.03)
    ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def pareto(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """True for points that no other point dominates, where larger is better in both coordinates. x, y and result: (points,)."""
    at_least = (x[None, :] >= x[:, None]) & (y[None, :] >= y[:, None])
    better = (x[None, :] > x[:, None]) | (y[None, :] > y[:, None])
    return np.logical_not(np.any(at_least & better, axis=1))


def _front(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    on = pareto(x, y)
    order = np.argsort(x[on])
    if on.sum() > 1:
        ax.step(x[on][order], y[on][order], where="pre", color="#888888", linewidth=1.0, zorder=1, label="_front")


def _equal_means(ax: Axes) -> None:
    """Lines of equal harmonic mean h: y = h x / (2 x - h)."""
    for level in LEVELS:
        x = np.linspace(level / 2 + 1e-3, 1.03, 200)
        y = level * x / (2 * x - level)
        inside = y <= 1.03
        ax.plot(x[inside], y[inside], color="#bbbbbb", linewidth=0.6, linestyle=(0, (1, 2)), zorder=0)
        where: dict[str, Any] = {"xy": (1.0, level / (2 - level)), "xytext": (0, 2), "textcoords": "offset points"}
        ax.annotate(f"{100 * level:.0f}", **where, color="#888888", fontsize=6, ha="center")


def _gap_row(ax: Axes, row: int, metrics: dict[str, Any], own: style.EditorStyle) -> None:
    known = {s: metrics["edit_success" + s] for s in _MARKERS if "edit_success" + s in metrics}
    values = [m["value"] for m in known.values()]
    ax.plot([min(values), max(values)], [row, row], color=own.colour, linewidth=2.2, alpha=0.35, solid_capstyle="butt")
    size: dict[str, Any] = {"markersize": 4.5, "capsize": 1.5, "elinewidth": 0.8}
    for i, (suffix, m) in enumerate(known.items()):
        ax.errorbar([m["value"]], [row + 0.16 * (i - 1)], xerr=_error(m), fmt=_MARKERS[suffix], color=own.colour, **size)


def _error(entry: Any, end: str = "") -> list[list[float]]:
    """Lengths of the error bar of an entry (value, low, high, each with an ending) below and above its value; 0 without an interval."""
    value = entry["value" + end]
    low, high = (value if pd.isna(v) else v for v in (entry["low" + end], entry["high" + end]))
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _log_from_zero(ax: Axes, values: list[float], text: Callable[[float], str]) -> None:
    """A logarithmic axis that shows zero at its left where a value is zero."""
    above = [v for v in values if v > 0]
    first = 10 ** np.floor(np.log10(min(above))) if above else 1.0
    last = 10 ** np.ceil(np.log10(max(above) * 1.5)) if above else 10.0
    decades = np.round(np.log10(last / first)).astype(int) + 1
    ax.set_xscale("symlog", linthresh=first, linscale=max(0.5, decades / 4))
    ax.set_xlim(-0.25 * first if min(values) <= 0 else first * 0.6, last)
    ticks = [first * 10.0**k for k in range(0, decades, max(1, -(-decades // 3)))]
    ax.xaxis.set_major_locator(FixedLocator([0.0, *ticks] if min(values) <= 0 else ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: text(v) if v else "0"))


def _path(ax: Axes, path: pd.DataFrame, own: style.EditorStyle) -> None:
    if path.empty:
        return
    x, y = path["value_loc"].to_numpy(), path["value_gen"].to_numpy()
    ax.plot(x, y, color=own.colour, linewidth=1.1, marker=own.marker, markersize=2.5, alpha=0.9, dashes=own.dash)
    end = path.iloc[-1]
    ax.errorbar(
        x[-1:],
        y[-1:],
        xerr=_error(end, "_loc"),
        yerr=_error(end, "_gen"),
        fmt=own.marker,
        color=own.colour,
        markersize=7,
        elinewidth=1,
        capsize=2,
    )
