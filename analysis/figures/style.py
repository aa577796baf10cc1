"""Styles shared by all figures: one colour, marker and dash per editor, page widths, line labels, shares in per cent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter
from scipy.optimize import isotonic_regression

from analysis.metrics.catalogue import wrapped

ONE_COLUMN, TWO_COLUMNS = 3.5, 7.2
"""Widths in inches of a journal's column and page."""
WIDTHS = {1: ONE_COLUMN, 2: TWO_COLUMNS}
DPI = 300
CAPTIONS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("captions.yaml").read_text("utf-8"))
"""By figure: its caption and, for some, the titles of its panels."""
TIME_LABELS = {"dated": "year", "scheduled": "years (scheduled)", "simulated": "years (simulated)"}
_COLOURS = ("#0173b2", "#d55e00", "#029e73", "#cc78bc", "#56595c", "#ca9161", "#56b4e9", "#de8f05")
"""Seaborn's colour-blind palette without its yellow, in an order whose neighbours differ in lightness."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_DASHES = ((), (4, 1.5), (1.2, 1.2), (5, 1.5, 1.2, 1.5), (7, 2), (3, 1, 1, 1, 1, 1), (2, 2), (6, 1, 1, 1))
MOST_NAMES = 9
"""More lines than this get a legend in place of labels at their ends."""
NAME_WIDTH = 24
"""Characters in a line of a label at a curve's end; names of variants may need several lines."""
_LINE = 9.5
"""Points from one line of a label to the next."""
_HANDLE, _CHARACTER = 0.65, 0.064
"""Inches of a legend's entry: its line with the gaps, and a character of its name at 8 points."""


@dataclass(frozen=True)
class EditorStyle:
    """How an editor's curves are drawn; dash is empty for a solid line."""

    colour: str
    marker: str
    dash: tuple[float, ...]


EditorStyles = Mapping[str, EditorStyle]


def editor_styles(names: Sequence[str]) -> dict[str, EditorStyle]:
    """The style of each editor by its position in the run, which makes it the same in every figure of the run."""
    size = len(_COLOURS)
    cycles = [(i, i // size) for i in range(len(names))]
    styles = [EditorStyle(_COLOURS[i % size], _MARKERS[(i + c) % size], _DASHES[(i + 3 * c) % size]) for i, c in cycles]
    return dict(zip(names, styles))


@contextmanager
def paper() -> Iterator[None]:
    """Fonts, lines and ticks of a printed page for figures made inside; global settings are restored afterwards."""
    own: dict[Any, Any] = dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize"), 8)
    own |= {"xtick.labelsize": 7, "ytick.labelsize": 7}
    own |= {"axes.titlelocation": "left", "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.linewidth": 0.7}
    own |= {"xtick.major.width": 0.7, "ytick.major.width": 0.7, "pdf.fonttype": 42, "axes.axisbelow": True, "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(), sns.plotting_context("paper"), sns.axes_style("ticks", rc={"axes.edgecolor": "#444444"}):
        matplotlib.rcParams.update(own)
        yield


def panels(rows: int, columns: int, height: float, width: float = TWO_COLUMNS, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure of rows x columns panels; height of one row and width of the figure in inches."""
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.flat)


def lines(ax: Axes, frame: pd.DataFrame, styles: EditorStyles) -> None:
    """One line for each editor with its interval as a band; frame: editor, x, value, low, high."""
    present = [n for n in styles if n in set(frame["editor"])]
    options: dict[str, Any] = {"palette": {n: styles[n].colour for n in present}, "markers": {n: styles[n].marker for n in present}}
    options |= {"dashes": {n: styles[n].dash for n in present}, "linewidth": 1.3, "markersize": 4, "markeredgewidth": 0.4}
    columns = {"x": "x", "y": "value", "hue": "editor", "style": "editor", "hue_order": present, "style_order": present}
    if not present:
        return
    sns.lineplot(frame, **columns, **options, errorbar=None, legend=False, ax=ax)
    for name in present:
        own = frame[frame["editor"] == name].sort_values("x")
        band = own["low"].astype(float), own["high"].astype(float)
        ax.fill_between(own["x"], *band, color=styles[name].colour, alpha=0.15, linewidth=0)


def shares(ax: Axes, label: str = "") -> None:
    """Vertical axis from 0 to 100 %."""
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_ylabel(label)


def lay_out(figure: Figure) -> Any:
    """Move the panels to where a drawing would have them, without drawing; the figure's layout engine, None where it has none."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    return engine


def label_lines(figure: Figure, axes: Sequence[Axes], frames: Sequence[pd.DataFrame], styles: EditorStyles) -> None:
    """Labels each curve of the given panels at its end with the editor's name, or adds a legend where there are many curves."""
    if len(styles) > MOST_NAMES:
        return legend(figure, styles)
    if (engine := lay_out(figure)) is not None:  # the layout measures names at the screen's resolution, at which they are a little narrower
        engine.set(rect=(0, 0, 0.98, 1))
    for ax, frame in zip(axes, frames):
        ends = frame.dropna(subset="value").sort_values("x").groupby("editor", sort=False).tail(1)
        wanted = ax.transAxes.inverted().transform(ax.transData.transform(ends[["x", "value"]].to_numpy(float)))[:, 1]
        names = ["\n".join(wrapped(n, NAME_WIDTH)) for n in ends["editor"]]
        line = _LINE / (ax.get_position().height * figure.get_figheight() * 72)
        positions = spread_labels(wanted, np.array([line * (1 + n.count("\n")) for n in names]))
        for end, name, position in zip(ends.itertuples(), names, positions):
            _label(ax, name, (float(str(end.x)), float(str(end.value))), position, styles[str(end.editor)].colour)


def spread_labels(wanted: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """The positions nearest to the wanted ones, in the same order, without overlap and, if so many fit, within [0, 1].

    wanted, heights: (labels,), in units of the axis; a position is the middle of a label. This is least squares under an
    order constraint: isotonic regression of the positions less the heights of the labels before, then clip.
    """
    order = np.argsort(wanted, kind="stable")
    own = heights[order]
    before = np.cumsum(own) - (own + own[:1]) / 2
    positions = np.empty(len(wanted))
    if len(wanted):
        positions[order] = np.clip(isotonic_regression(wanted[order] - before).x, 0, max(0.0, 1 - before[-1])) + before
    return positions


def _label(ax: Axes, name: str, end: tuple[float, float], position: float, colour: str) -> None:
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
    where: dict[str, Any] = {"xytext": (1.05, position), "textcoords": "axes fraction", "va": "center", "annotation_clip": False}
    text = ax.annotate(name, end, color=colour, fontsize=7.5, linespacing=0.95, arrowprops=line, **where)
    cell = ax.get_subplotspec()
    text.set_in_layout(cell is None or cell.is_last_col())  # a short row has an empty cell at its right for the label


def legend(figure: Figure, styles: EditorStyles) -> None:
    """One legend above the figure, with the colour, marker and dash of every editor, in as many columns as fit."""
    handles = [
        Line2D([], [], color=s.colour, marker=s.marker, markersize=4, linewidth=1.3, label=name, dashes=s.dash)
        for name, s in styles.items()
    ]
    widest = _HANDLE + _CHARACTER * max(map(len, styles))
    columns = max(1, min(len(handles), 5, int(figure.get_figwidth() / widest)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3.2)


def edits_axis(ax: Axes, label: str = "edits applied") -> None:
    ax.set_xlabel(label)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


def finish(figure: Figure) -> Figure:
    sns.despine(figure)
    return figure
