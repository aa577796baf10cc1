"""Looks shared by all figures: one colour, marker and dash per editor, page widths, line names, shares in per cent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter

from analysis.metrics.catalogue import folded

ONE_COLUMN, TWO_COLUMNS = 3.5, 7.2
"""Widths in inches of a journal's column and page."""
WIDTHS = {1: ONE_COLUMN, 2: TWO_COLUMNS}
DPI = 300
TIME_LABELS = {"dated": "year", "scheduled": "years (scheduled)", "simulated": "years (simulated)"}
_COLOURS = ("#0173b2", "#d55e00", "#029e73", "#cc78bc", "#56595c", "#ca9161", "#56b4e9", "#de8f05")
"""Seaborn's colour-blind palette in an order whose neighbours differ in lightness, its yellow left out."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_DASHES = ((), (4, 1.5), (1.2, 1.2), (5, 1.5, 1.2, 1.5), (7, 2), (3, 1, 1, 1, 1, 1), (2, 2), (6, 1, 1, 1))
MOST_NAMES = 9
"""More lines than this are told apart by a legend."""
NAME_WIDTH = 24
"""Characters in a line of a name at a line's end; names of variants may need several lines."""
_LINE = 9.5
"""Points from one name at a line's end to the next."""
_HANDLE, _CHARACTER = 0.65, 0.064
"""Inches of a legend's entry: its line with the gaps, and a character of its name at 8 points."""


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str
    dash: tuple[float, ...]


Looks = Mapping[str, Look]


def looks(names: Sequence[str]) -> dict[str, Look]:
    """The look of each editor, by its place in the run: the same in every figure of the run."""
    size = len(_COLOURS)
    return {
        n: Look(_COLOURS[i % size], _MARKERS[(i + i // size) % size], _DASHES[(i + 3 * (i // size)) % size]) for i, n in enumerate(names)
    }


@contextmanager
def paper() -> Iterator[None]:
    """Fonts, lines and ticks of a printed page, for the figures made inside; nothing is left changed."""
    own: dict[Any, Any] = {
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "legend.fontsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
    }
    own |= {"axes.titlelocation": "left", "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.linewidth": 0.7}
    own |= {"xtick.major.width": 0.7, "ytick.major.width": 0.7, "pdf.fonttype": 42, "axes.axisbelow": True, "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(), sns.plotting_context("paper"), sns.axes_style("ticks", rc={"axes.edgecolor": "#444444"}):
        matplotlib.rcParams.update(own)
        yield


def panels(rows: int, columns: int, height: float, width: float = TWO_COLUMNS, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure of rows x columns panels; height in inches of one row."""
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.flat)


def lines(ax: Axes, frame: pd.DataFrame, of: Looks) -> None:
    """One line an editor with its interval as a band; frame: editor, x, value, low, high."""
    present = [n for n in of if n in set(frame["editor"])]
    styles = {"palette": {n: of[n].colour for n in present}, "dashes": {n: of[n].dash for n in present}}
    marks = {n: of[n].marker for n in present}
    common = {"x": "x", "y": "value", "hue": "editor", "style": "editor", "hue_order": present, "style_order": present}
    sns.lineplot(
        frame, **common, **styles, markers=marks, errorbar=None, legend=False, ax=ax, linewidth=1.3, markersize=4, markeredgewidth=0.4
    )
    for name in present:
        own = frame[frame["editor"] == name].sort_values("x")
        ax.fill_between(own["x"], own["low"].astype(float), own["high"].astype(float), color=of[name].colour, alpha=0.15, linewidth=0)


def shares(ax: Axes, label: str = "") -> None:
    """Vertical axis from 0 to 100 %."""
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_ylabel(label)


def name_lines(figure: Figure, axes: Sequence[Axes], frames: Sequence[pd.DataFrame], of: Looks) -> None:
    """Names at the line ends of the given panels, long ones in several lines, moved apart where they would touch; a legend
    for many lines."""
    if len(of) > MOST_NAMES:
        return legend(figure, of)
    _keep_clear(figure)
    for ax, frame in zip(axes, frames):
        ends = frame.dropna(subset="value").sort_values("x").groupby("editor", sort=False).tail(1)
        places = ax.transAxes.inverted().transform(ax.transData.transform(ends[["x", "value"]].to_numpy(float)))[:, 1]
        names = ["\n".join(folded(n, NAME_WIDTH)) for n in ends["editor"]]
        line = _LINE / (ax.get_position().height * figure.get_figheight() * 72)
        heights = spread(places, np.array([line * (1 + n.count("\n")) for n in names]))
        for end, name, height in zip(ends.itertuples(), names, heights):
            _name(ax, name, (float(str(end.x)), float(str(end.value))), height, of[str(end.editor)])


def _keep_clear(figure: Figure) -> None:
    """A margin at the right: the layout measures names at the screen's resolution, at which they are a little narrower."""
    engine: Any = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0, 0, 0.98, 1))


def spread(places: np.ndarray, room: np.ndarray) -> np.ndarray:
    """The places nearest to the given ones, in their order, that do not overlap and, if so many fit, lie within [0, 1].

    room: what each takes up, its place in the middle. Least squares under an order: pool adjacent violators of places less
    the room of those before, then clip.
    """
    order = np.argsort(places, kind="stable")
    own = room[order]
    before = np.cumsum(own) - (own + own[:1]) / 2
    blocks: list[list[float]] = []
    for wish in places[order] - before:
        blocks.append([float(wish)])
        while len(blocks) > 1 and np.mean(blocks[-2]) >= np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    found = np.array([np.mean(b) for b in blocks for _ in b])
    out = np.empty(len(places))
    out[order] = np.clip(found, 0, max(0.0, 1 - before[-1])) + before if len(places) else found
    return out


def _name(ax: Axes, name: str, end: tuple[float, float], height: float, look: Look) -> None:
    line = {"arrowstyle": "-", "color": look.colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
    where: dict[str, Any] = {"xytext": (1.05, height), "textcoords": "axes fraction", "va": "center", "annotation_clip": False}
    text = ax.annotate(name, end, color=look.colour, fontsize=7.5, linespacing=0.95, arrowprops=line, **where)
    place = ax.get_subplotspec()
    text.set_in_layout(place is None or place.is_last_col())  # the empty place beside a short row is room enough


def legend(figure: Figure, of: Looks) -> None:
    """One legend above the figure, with the colour, marker and dash of every editor, in as many columns as have room."""
    handles = [_handle(n, look) for n, look in of.items()]
    widest = _HANDLE + _CHARACTER * max(map(len, of))
    columns = max(1, min(len(handles), 5, int(figure.get_figwidth() / widest)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3.2)


def edits_axis(ax: Axes, label: str = "edits applied") -> None:
    ax.set_xlabel(label)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


def finish(figure: Figure) -> Figure:
    sns.despine(figure)
    return figure


def _handle(name: str, look: Look) -> Line2D:
    line = Line2D([], [], color=look.colour, marker=look.marker, markersize=4, linewidth=1.3, label=name)
    if look.dash:
        line.set_dashes(look.dash)
    return line
