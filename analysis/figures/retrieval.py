"""The figure of editors that keep facts beside the model: what they find and let through, and what a question costs.

Drawn from the table of ledgers (`analysis.metrics.retrieval`), by the number of facts in the store.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.figures import style
from analysis.figures.context import Scene
from analysis.metrics.answers import LEAST_IN_BIN

PANELS = {
    "hit_rate": "Bearing fact found",
    "scope_recall": "Bearing fact given",
    "scope_precision": "Given facts that bear",
    "false_accept": "Given a fact for nothing",
    "tokens": "Tokens added a question",
    "seconds": "Milliseconds a question",
}
_COUNTED = ("tokens", "seconds")


def retrieved(s: Scene) -> Figure | None:
    """Shares of questions and costs of a question by the number of facts, mean of the orders; no intervals."""
    table = s.ledgers
    if not len(table):
        return None
    figure, axes, across = s.panels(len(PANELS), 1.9, sharex=True)
    for i, (ax, (column, title)) in enumerate(zip(axes, PANELS.items())):
        if len(curve := _curve(table, column)):
            style.lines(ax, curve, s.looks)
        ax.set_title(title)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        ax.set_xlabel("facts in the store" if i + across >= len(axes) else "")
        _upright(ax, column, first=i % across == 0)
    style.legend(figure, {name: look for name, look in s.looks.items() if name in set(table["editor"])})
    return style.finish(figure)


def _curve(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """One point an editor and doubling of the store, at the geometric middle of its numbers of facts.

    Of questions that no fact bears on there is none where too few were asked.
    """
    found = table.assign(value=table[column].astype(float) * (1e3 if column == "seconds" else 1))
    if column == "false_accept":
        found["value"] = found["value"].where(found["unrelated"] >= LEAST_IN_BIN)
    found["x"] = np.sqrt(found["facts_from"] * found["facts_to"])
    mean = found.dropna(subset="value").groupby(["editor", "x"], sort=False)["value"].mean().reset_index()
    return mean.assign(low=mean["value"], high=mean["value"])


def _upright(ax: Axes, column: str, first: bool) -> None:
    if column in _COUNTED:
        ax.set_ylim(bottom=0)
        ax.set_ylabel("")
    else:
        style.shares(ax, "share of questions" if first else "")
