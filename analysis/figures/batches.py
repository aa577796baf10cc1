"""How what an editor keeps depends on the number of edits in a step: comparisons of a sweep that differ in their batch size."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from analysis.figures import style
from analysis.metrics.catalogue import METRICS
from analysis.metrics.comparison import Summary, main_mode

SHOWN = ("edit_success", "text_generality", "locality_hard")
"""Success, generality and specificity at the end."""


def by_batch(summaries: Mapping[int, Summary]) -> pd.DataFrame:
    """A row for each metric, editor and batch size: metric, editor, x (edits in a step), value, low, high.

    summaries: by batch size. An editor that was not measured at some size has no row there.
    """
    rows = []
    for size, summary in sorted(summaries.items()):
        suffix = main_mode(summary).suffix
        for editor, metrics in summary["editors"].items():
            found = {m: metrics[m + suffix] for m in SHOWN if m + suffix in metrics}
            rows += [{"metric": m, "editor": editor, "x": size, **{k: e[k] for k in ("value", "low", "high")}} for m, e in found.items()]
    return pd.DataFrame(rows, columns=["metric", "editor", "x", "value", "low", "high"])


def batches(summaries: Mapping[int, Summary], width: float = style.TWO_COLUMNS) -> Figure | None:
    """Success, text generality and hard locality at the end, by batch size; None for one size, or where nothing was measured."""
    points = by_batch(summaries)
    shown = [m for m in SHOWN if m in set(points["metric"])]
    if len(summaries) < 2 or not shown:
        return None
    styles = style.editor_styles(list(dict.fromkeys(points["editor"])))
    mode = main_mode(next(iter(summaries.values())))
    with style.paper():
        figure, axes = style.panels(1, len(shown), 2.4, width, sharey=True)
        frames = [points[points["metric"] == m] for m in shown]
        for ax, metric, frame in zip(axes, shown, frames):
            style.lines(ax, frame, styles)
            style.shares(ax)
            ax.set_title(METRICS[metric].short)
            _sizes(ax, sorted(summaries))
        axes[0].set_ylabel(f"share of questions\n({mode.title})")
        style.label_lines(figure, axes[-1:], frames[-1:], styles)
        return style.finish(figure)


def _sizes(ax: Axes, sizes: list[int]) -> None:
    """A logarithmic axis with a tick at each size that was run."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(sizes))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([f"{n:,}" for n in sizes])
    ax.set_xlabel("edits in a step")
