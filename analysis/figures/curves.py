"""Figures of curves: over the years, over the age of edits, over the number of edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from analysis.figures import style
from analysis.figures.context import Curve, Scene
from analysis.metrics import curves
from analysis.metrics.ability import guessing
from analysis.metrics.catalogue import READING_TITLES
from analysis.reading.load import READINGS

SMALL_MULTIPLES = {
    "text_generality": "Text generality",
    "image_generality": "Image generality",
    "locality_hard": "Locality: other picture",
    "locality_sibling": "Locality: other question",
    "locality_far": "Locality: unrelated",
    "locality_text": "Locality: text only",
    "portability": "Portability",
}
Frames = Mapping[str, pd.DataFrame]


def retention(s: Scene) -> Figure | None:
    """Success on all live edits at each year's end, for the three readings."""
    frames = _by_reading(s, lambda r: partial(curves.by_year, split="edit", reading=r))
    return _draw(s, frames, lambda ax, _: _years(ax, s), "live edits right at year's end")


def age(s: Scene) -> Figure | None:
    """Success on live edits by the number of edits applied since, for the three readings."""
    frames = _by_reading(s, lambda r: partial(curves.by_age, reading=r))
    return _draw(s, frames, lambda ax, _: _ages(ax, s), "live edits right")


def survival(s: Scene) -> Figure | None:
    """Edits never found wrong since they were made, for the three readings."""
    frames = _by_reading(s, lambda r: partial(curves.survival, reading=r))
    return _draw(s, frames, lambda ax, _: _ages(ax, s), "edits not lost so far")


def reach(s: Scene) -> Figure | None:
    """Generality and locality over the years, one panel a kind of question."""
    frames = {t: s.curves(partial(curves.by_year, split=k, reading=s.reading)) for k, t in SMALL_MULTIPLES.items()}
    return _draw(s, frames, lambda ax, _: _years(ax, s), f"right, or as unedited\n({s.reading_title})", 1.9)


def ability(s: Scene) -> Figure | None:
    """General ability by topic and perplexity of running text, by edits applied."""
    frames = {_title(t): s.curves(partial(curves.ability, topic=t, reading=s.reading)) for t in curves.topics(s.run)}
    frames["Running text"] = s.curves(curves.perplexity)

    def dress(ax: Axes, title: str) -> None:
        style.edits_axis(ax)
        if title == "Running text":
            _perplexity_axis(ax, frames[title])

    return _draw(s, frames, dress, f"right ({s.reading_title})", 1.9, share_y=False)


def benchmarks(s: Scene) -> Figure | None:
    """Benchmark scores against the unedited model's, by edits applied."""
    return _group(s, "bench:")


def safety(s: Scene) -> Figure | None:
    """Safety scores against the unedited model's, by edits applied."""
    return _group(s, "safety:")


def _group(s: Scene, prefix: str) -> Figure | None:
    names = curves.group_topics(s.run, prefix)
    readings = {t: _reading_of(s, t) for t in names}
    frames = {_title(t.removeprefix(prefix)): s.curves(partial(curves.group_topic, topic=t, reading=readings[t])) for t in names}

    guess = {_title(t.removeprefix(prefix)): _guess(s, t) for t in names if readings[t] == "gen"}

    def dress(ax: Axes, title: str) -> None:
        style.edits_axis(ax)
        ax.autoscale(axis="y")
        ax.axhline(0, color="#888888", linewidth=0.7, linestyle=":")
        if np.isfinite(guess.get(title, np.nan)):
            ax.axhline(guess[title], color="#888888", linewidth=0.9, linestyle="--")
        ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))

    return _draw(s, frames, dress, "change against\nthe unedited model (points)", 1.9)


def _guess(s: Scene, topic: str) -> float:
    """Where guessing stands against the unedited model, on the questions of a topic; nan where there is nothing to guess."""
    rows = s.run.questions["topic"].to_numpy() == topic
    base = next(iter(s.run.editors.values())).base["gen"].to_numpy()
    return float(np.mean((guessing(s.run.questions) - base)[rows]))


def _reading_of(s: Scene, topic: str) -> str:
    """The reading that leads where the topic has it, else the first that it has."""
    rows = pd.concat([e.records.loc[(e.records["topic"] == topic).to_numpy(), list(READINGS)] for e in s.run.editors.values()])
    return next((r for r in (s.reading, *READINGS) if rows[r].notna().any()), s.reading)


def _by_reading(s: Scene, curve: Callable[[str], Curve]) -> dict[str, pd.DataFrame]:
    return {t.capitalize(): s.curves(curve(r)) for r, t in zip(READINGS, READING_TITLES.values())}


def _draw(
    s: Scene, frames: Frames, dress: Callable[[Axes, str], None], label: str, height: float = 2.2, share_y: bool = True
) -> Figure | None:
    """One panel a frame that has rows; names at the line ends of the last panel of each row."""
    frames = {t: f for t, f in frames.items() if len(f)}
    if not frames:
        return None
    figure, axes, across = s.panels(len(frames), height, sharey=share_y)
    for i, (ax, (title, frame)) in enumerate(zip(axes, frames.items())):
        style.lines(ax, frame, s.looks)
        ax.set_title(title)
        style.shares(ax)
        dress(ax, title)
        if i + across < len(axes):
            ax.set_xlabel("")
    figure.supylabel(label, fontsize=8)
    _name_rows(figure, s, axes, list(frames.values()), across)
    return style.finish(figure)


def _name_rows(figure: Figure, s: Scene, axes: Sequence[Axes], frames: Sequence[pd.DataFrame], across: int) -> None:
    last = [min(start + across, len(axes)) - 1 for start in range(0, len(axes), across)]
    figure.draw_without_rendering()
    style.name_lines(figure, [axes[i] for i in last], [frames[i] for i in last], s.looks)


def _title(topic: str) -> str:
    text = topic.replace("_", " ")
    return text[:1].upper() + text[1:]


def _years(ax: Axes, s: Scene) -> None:
    ax.set_xlabel(s.time_label)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _ages(ax: Axes, s: Scene) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xlim(curves.RIGHT_AFTER_AGE * 0.8, max(2, len(s.run.events)) * 1.1)
    step = 2 if len(s.run.events) <= 256 or s.columns > 1 else 3
    powers = [2 ** (step * k) for k in range(24) if 2 ** (step * k) <= len(s.run.events)]
    ax.xaxis.set_major_locator(FixedLocator([curves.RIGHT_AFTER_AGE, *powers]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: "0" if v < 1 else f"{v:,.0f}"))
    ax.set_xlabel("edits since (log)")


def _perplexity_axis(ax: Axes, frame: pd.DataFrame) -> None:
    ax.set_title("Running text: perplexity ratio (log)")
    ax.set_yscale("log", base=2)
    low, high = min(0.9, float(frame["low"].min())), max(2.2, float(frame["high"].max()) * 1.1)
    high = min(high, 1e12)
    ax.set_ylim(low, high)
    step = max(1, int(np.ceil(np.log2(high / 0.5) / 6)))
    ax.yaxis.set_major_locator(FixedLocator([2.0 ** (step * k) for k in range(-4, 42)]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.4g}×" if v < 1e5 else f"{v:.0e}×"))
    ax.axhline(2, color="#888888", linewidth=0.7, linestyle=":")
