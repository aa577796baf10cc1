"""The data and settings that a figure is drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import style
from analysis.metrics import curves, retrieval
from analysis.metrics.bootstrap import Resampler
from analysis.metrics.comparison import competing, main_mode
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import ScoringMode

Curve = Callable[[Run, EditorRun, Resampler], pd.DataFrame]
"""An editor's curve in one order: columns x, value, low, high, n, questions."""


@dataclass(frozen=True)
class FigureContext:
    """What every figure of a report shares.

    runs: one for each order. summary: the content of summary.json. resamplers: a bootstrap for each order. styles: by
    editor. mode: the scoring mode of figures that show one. columns: width in columns of a journal's page, 1 or 2.
    """

    runs: tuple[Run, ...]
    summary: dict[str, Any]
    resamplers: tuple[Resampler, ...]
    styles: style.EditorStyles
    mode: ScoringMode
    columns: int = 2

    @property
    def run(self) -> Run:
        """The first order."""
        return self.runs[0]

    @property
    def time_label(self) -> str:
        return style.TIME_LABELS.get(self.run.time_axis, "years")

    @cached_property
    def retrieval_table(self) -> pd.DataFrame:
        """The table of `analysis.metrics.retrieval`, computed once for the figure and the file."""
        return retrieval.table(self.runs)

    @property
    def compared(self) -> list[str]:
        """The editors that compete (`analysis.metrics.comparison`), which leaves out bounds and what learned nothing; else all."""
        return competing(self.summary) or list(self.run.editors)

    @property
    def width(self) -> float:
        """Inches of the column or the page."""
        return style.WIDTHS[self.columns]

    def curves(self, curve: Curve, editors: Iterable[str] | None = None) -> pd.DataFrame:
        """The curve of every editor (or of these), averaged over orders, in one frame with a column editor."""
        by_editor = []
        for name in self.run.editors if editors is None else editors:
            orders = [curve(r, r.editors[name], s) for r, s in zip(self.runs, self.resamplers)]
            by_editor.append(curves.average(orders).assign(editor=name))
        return curves.stacked(by_editor)

    def panels(
        self, titles: Iterable[str], draw: Callable[[Axes, str], None], height: float = 1.9, most: int = 3, **kwargs: Any
    ) -> tuple[Figure, list[Axes], int]:
        """A figure with a panel for each title, the panels, and their number in a row; inner panels lose a label that the next repeats.

        draw: fills the panel of a title. height: inches of a row. most: panels in a row of a page; a column has at most 2,
        and 1 for three panels or fewer.
        """
        titles = list(titles)
        count = len(titles)
        across = min(most, count) if self.columns > 1 else (2 if count > 3 else 1)
        across = 2 if count == 4 and across == 3 else across
        rows = -(-count // across)
        figure, axes = style.panels(rows, across, height, self.width, **kwargs)
        for ax in axes[count:]:
            figure.delaxes(ax)
        for ax, title in zip(axes, titles):
            ax.set_title(title)
            draw(ax, title)
        for i, ax in enumerate(axes[: count - across]):
            if ax.get_xlabel() == axes[i + across].get_xlabel():
                ax.set_xlabel("")
        for i in range(count - 1, 0, -1):
            if i % across and axes[i].get_ylabel() == axes[i - 1].get_ylabel():
                axes[i].set_ylabel("")
        return figure, axes[:count], across

    def legend(self, figure: Figure, editors: pd.Series) -> Figure:
        """The finished figure with a legend of the editors that occur in a column."""
        style.legend(figure, {name: s for name, s in self.styles.items() if name in set(editors)})
        return style.finish(figure)


def figure_context(
    runs: Run | Sequence[Run], summary: dict[str, Any], seed: int = 0, replicates: int = 1000, columns: int = 2
) -> FigureContext:
    """The context of a run's figures."""
    runs = (runs,) if isinstance(runs, Run) else tuple(runs)
    resamplers = tuple(Resampler(r.clusters, np.random.default_rng((seed, i)), replicates) for i, r in enumerate(runs))
    return FigureContext(runs, summary, resamplers, style.editor_styles(list(runs[0].editors)), main_mode(summary), columns)
