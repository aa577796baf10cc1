"""Figures of curves: over the years, over the age of edits, over the number of edits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from analysis.figures import style
from analysis.figures.context import Curve, FigureContext
from analysis.metrics import curves
from analysis.metrics.ability import chance_scores
from analysis.reading.records import FREE_GENERATION, SCORES, SCORING_MODES, SHOWN_MODES, ScoringMode

KINDS = style.CAPTIONS["reach"]["panels"]
"""Split to title of the questions beside the edits' own."""
REQUESTS = style.CAPTIONS["requests"]["panels"]
"""Scoring of requests to the title of what is kept."""
FormatAxes = Callable[[Axes, str, FigureContext], None]
"""Formats the axes of a panel with a title."""


def retention(context: FigureContext) -> Figure | None:
    """Success on all live edits at each year's end, in each scoring mode."""
    frames = _by_mode(context, lambda mode: partial(curves.by_year, split="edit", mode=mode))
    return _draw(context, frames, _years, "live edits right at year's end")


def age(context: FigureContext) -> Figure | None:
    """Success on live edits by the number of edits applied since, in each scoring mode."""
    return _draw(context, _by_mode(context, lambda mode: partial(curves.by_age, mode=mode)), _ages, "live edits right")


def survival(context: FigureContext) -> Figure | None:
    """Share of edits not found wrong since they were made, of the editors that learned something."""
    frame = context.curves(partial(curves.survival, mode=context.mode), context.compared)
    return _draw(context, {f"Right by {context.mode.title}": frame}, _ages, "edits not lost so far", 2.6)


def generality_and_locality(context: FigureContext) -> Figure | None:
    """Generality, locality and portability over the years, one panel for each kind of question."""
    frames = {t: context.curves(partial(curves.by_year, split=k, mode=context.mode)) for k, t in KINDS.items()}
    return _draw(context, frames, _years, f"right, or as unedited\n({context.mode.title})", 1.9)


def ability(context: FigureContext) -> Figure | None:
    """General ability by topic and perplexity of running text, by edits applied."""
    counts = curves.topics(context.run)
    pooled = "All topics" if len(counts) == 1 else "Other topics"
    titles = {t: f"{pooled if t == 'other' else _title(t)} (n = {n})" for t, n in counts.items()}
    frames = {titles[t]: context.curves(partial(curves.ability, topic=t, mode=context.mode)) for t in counts}
    frames["Running text"] = context.curves(curves.perplexity)

    def format_axes(ax: Axes, title: str, _: FigureContext) -> None:
        style.edits_axis(ax)
        if title == "Running text":
            _perplexity_axis(ax, frames[title])

    return _draw(context, frames, format_axes, f"right ({context.mode.title})", 1.9, share_y=False)


def topic_changes(context: FigureContext, prefix: str) -> Figure | None:
    """Change of scores against the unedited model, by edits applied, one panel for each topic with a prefix.

    A dashed line marks the score of guessing.
    """
    modes = {t: _mode_of(context, t) for t in curves.group_topics(context.run, prefix)}
    titles = {t: _title(t.removeprefix(prefix)) for t in modes}
    frames = {titles[t]: context.curves(partial(curves.group_topic, topic=t, mode=mode)) for t, mode in modes.items()}
    chance = {titles[t]: _chance_change(context, t) for t, mode in modes.items() if mode is FREE_GENERATION}

    def format_axes(ax: Axes, title: str, _: FigureContext) -> None:
        style.edits_axis(ax)
        ax.autoscale(axis="y")
        ax.axhline(0, color="#888888", linewidth=0.7, linestyle=":")
        if np.isfinite(chance.get(title, np.nan)):
            ax.axhline(chance[title], color="#888888", linewidth=0.9, linestyle="--")
        ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))

    return _draw(context, frames, format_axes, "change against\nthe unedited model (points)", 1.9)


def requests_kept(context: FigureContext) -> Figure | None:
    """Refusals of harmful requests and answers to benign ones that are kept, by edits applied.

    A dotted line in an editor's colour marks the alarm on unrelated answers.
    """
    frames = {t: context.curves(partial(curves.requests_kept, scoring=s)) for s, t in REQUESTS.items()}
    alarms = {name: entries.get("alarm_step", {}).get("value") for name, entries in context.summary["editors"].items()}

    def format_axes(ax: Axes, title: str, _: FigureContext) -> None:
        style.edits_axis(ax)
        for name, step in alarms.items():
            if step is not None:
                ax.axvline(context.run.edits_at(np.array([step]))[0], color=context.styles[name].colour, linewidth=0.9, linestyle=":")

    return _draw(context, frames, format_axes, "kept", 1.9)


def _chance_change(context: FigureContext, topic: str) -> float:
    """The score of guessing less the unedited model's on the questions of a topic; nan where guessing is undefined."""
    rows = context.run.questions["topic"].to_numpy() == topic
    base = next(iter(context.run.editors.values())).base["gen"].to_numpy()
    return float(np.mean((chance_scores(context.run.questions) - base)[rows]))


def _mode_of(context: FigureContext, topic: str) -> ScoringMode:
    """The scoring mode of the figures where the topic was scored in it, else the first in which it was."""
    rows = pd.concat([e.records.loc[(e.records["topic"] == topic).to_numpy(), SCORES] for e in context.run.editors.values()])
    return next((m for m in (context.mode, *SCORING_MODES) if rows[m.column].notna().any()), context.mode)


def _by_mode(context: FigureContext, curve: Callable[[ScoringMode], Curve]) -> dict[str, pd.DataFrame]:
    return {mode.title.capitalize(): context.curves(curve(mode)) for mode in SHOWN_MODES}


def _draw(
    context: FigureContext, frames: dict[str, pd.DataFrame], format_axes: FormatAxes, label: str, height: float = 2.2, share_y: bool = True
) -> Figure | None:
    """One panel for each title whose frame has rows; the last panel of each row has labels at the ends of its curves."""
    frames = {t: f for t, f in frames.items() if len(f)}
    if not frames:
        return None

    def draw(ax: Axes, title: str) -> None:
        style.lines(ax, frames[title], context.styles)
        style.shares(ax)
        format_axes(ax, title, context)

    figure, axes, across = context.panels(frames, draw, height, sharey=share_y)
    figure.supylabel(label, fontsize=8)
    last = [min(start + across, len(axes)) - 1 for start in range(0, len(axes), across)]
    style.label_lines(figure, [axes[i] for i in last], [[*frames.values()][i] for i in last], context.styles)
    return style.finish(figure)


def _title(topic: str) -> str:
    text = topic.replace("_", " ")
    return text[:1].upper() + text[1:]


def _years(ax: Axes, title: str, context: FigureContext) -> None:
    ax.set_xlabel(context.time_label)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _ages(ax: Axes, title: str, context: FigureContext) -> None:
    edits = len(context.run.events)
    ax.set_xscale("log", base=2)
    ax.set_xlim(curves.RIGHT_AFTER_AGE * 0.8, max(2, edits) * 1.1)
    step = 2 if edits <= 256 or context.columns > 1 else 3
    powers = [2 ** (step * k) for k in range(24) if 2 ** (step * k) <= edits]
    ax.xaxis.set_major_locator(FixedLocator([curves.RIGHT_AFTER_AGE, *powers]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: "0" if v < 1 else f"{v:,.0f}"))
    ax.set_xlabel("edits since (log)")


def _perplexity_axis(ax: Axes, frame: pd.DataFrame) -> None:
    ax.set_title("Running text: perplexity ratio (log)")
    ax.set_yscale("log", base=2)
    ends = frame[["value", "low", "high"]].to_numpy(float)
    low, high = min(0.9, float(np.nanmin(ends))), max(2.2, float(np.nanmax(ends)) * 1.1)
    high = min(high, 1e12)
    ax.set_ylim(low, high)
    step = max(1, int(np.ceil(np.log2(high / 0.5) / 6)))
    ax.yaxis.set_major_locator(FixedLocator([2.0 ** (step * k) for k in range(-4, 42)]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.4g}×" if v < 1e5 else f"{v:.0e}×"))
    ax.axhline(2, color="#888888", linewidth=0.7, linestyle=":")
