"""The figures of a run. Each function takes a `Scene` and gives a Figure, or None where nothing was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from analysis import curves, style
from analysis.bootstrap import Resampler
from analysis.catalogue import LOCALITY, READING_TITLES, SUFFIXES, human_bytes
from analysis.load import READINGS, EditorRun, Run

GENERALITY = ("text_generality", "image_generality")
SMALL_MULTIPLES = {
    "text_generality": "Text generality",
    "image_generality": "Image generality",
    "locality_hard": "Locality: other picture",
    "locality_sibling": "Locality: other question",
    "locality_far": "Locality: unrelated",
    "locality_text": "Locality: text only",
}


@dataclass(frozen=True)
class Scene:
    """What a figure is drawn from: the run, its summary, the bootstrap, the looks and the reading of "right"."""

    run: Run
    summary: dict[str, Any]
    resampler: Resampler
    looks: style.Looks
    reading: str

    @property
    def suffix(self) -> str:
        return SUFFIXES[READINGS.index(self.reading)]

    @property
    def reading_title(self) -> str:
        return READING_TITLES[self.suffix]

    @property
    def time_label(self) -> str:
        return style.TIME_LABELS.get(self.run.time_axis, "years")

    def curves(self, curve: Callable[[EditorRun], pd.DataFrame]) -> pd.DataFrame:
        return curves.every(self.run, curve)


def scene(run: Run, summary: dict[str, Any], seed: int = 0, replicates: int = 1000) -> Scene:
    """Free generation is what the figures show, token accuracy where nothing was generated."""
    generated = any("edit_success_gen" in m or "edit_success_now_gen" in m for m in summary["editors"].values())
    resampler = Resampler(run.clusters, np.random.default_rng(seed), replicates)
    return Scene(run, summary, resampler, style.looks(list(run.editors)), "gen" if generated else "tf")


def retention(s: Scene) -> Figure | None:
    """Success on all live edits at each year's end, for the three readings."""

    def curve(reading: str) -> Callable[[EditorRun], pd.DataFrame]:
        return lambda e: curves.by_year(s.run, e.records, "edit", reading, s.resampler)

    return _by_reading(s, curve, lambda ax: _years(ax, s), "live edits right at year's end")


def age(s: Scene) -> Figure | None:
    """Success on live edits by the number of edits applied since, for the three readings."""

    def curve(reading: str) -> Callable[[EditorRun], pd.DataFrame]:
        return lambda e: curves.by_age(s.run, e.records, reading, s.resampler)

    return _by_reading(s, curve, lambda ax: _ages(ax, s), "live edits right")


def reach(s: Scene) -> Figure | None:
    """Generality and locality over the years, one panel a kind of question."""
    frames = {k: s.curves(lambda e, k=k: curves.by_year(s.run, e.records, k, s.reading, s.resampler)) for k in SMALL_MULTIPLES}
    frames = {k: f for k, f in frames.items() if len(f)}
    if not frames:
        return None
    columns = min(3, len(frames))
    figure, axes = style.panels(-(-len(frames) // columns), columns, 1.9, sharey=True, sharex=True)
    for ax, (kind, frame) in zip(axes, frames.items()):
        style.lines(ax, frame, s.looks)
        ax.set_title(SMALL_MULTIPLES[kind])
        style.shares(ax)
        _years(ax, s)
    _trim(figure, axes, len(frames), columns)
    figure.supylabel(f"right, or as unedited ({s.reading_title})", fontsize=8)
    style.legend(figure, s.looks)
    return style.finish(figure)


def ability(s: Scene) -> Figure | None:
    """General ability by topic and perplexity of running text, by edits applied."""
    frames = {t: s.curves(lambda e, t=t: curves.ability(s.run, e, t, s.reading, s.resampler)) for t in curves.topics(s.run)}
    frames["perplexity"] = s.curves(lambda e: curves.perplexity(s.run, e, s.resampler))
    frames = {k: f for k, f in frames.items() if len(f)}
    if not frames:
        return None
    columns = min(3 if len(frames) != 4 else 2, len(frames))
    figure, axes = style.panels(-(-len(frames) // columns), columns, 2.0)
    for ax, (topic, frame) in zip(axes, frames.items()):
        style.lines(ax, frame, s.looks)
        style.edits_axis(ax)
        ax.set_title("Running text" if topic == "perplexity" else topic.replace("_", " ").capitalize())
        _perplexity_axis(ax, frame) if topic == "perplexity" else style.shares(ax, f"right ({s.reading_title})")
    _trim(figure, axes, len(frames), columns)
    style.legend(figure, s.looks)
    return style.finish(figure)


def cost(s: Scene) -> Figure | None:
    """Success at the end against seconds per edit and against the editor's state."""
    success = "edit_success" + s.suffix
    kinds = {"seconds_per_edit": "seconds per edit (log)", "state_bytes": "editor state at the end"}
    points = {n: m for n, m in s.summary["editors"].items() if success in m and set(kinds) <= set(m)}
    if not points:
        return None
    figure, axes = style.panels(1, 2, 2.5, sharey=True)
    for ax, (kind, label) in zip(axes, kinds.items()):
        for name, m in points.items():
            _point(ax, m[kind], m[success], s.looks[name])
        style.shares(ax)
        ax.set_xlabel(label)
    _log_from_zero(axes[0], [m["seconds_per_edit"]["value"] for m in points.values()], lambda v: f"{v:g}")
    _log_from_zero(axes[1], [m["state_bytes"]["value"] for m in points.values()], human_bytes)
    axes[0].set_ylabel(f"live edits right at the end\n({s.reading_title})")
    style.legend(figure, s.looks)
    return style.finish(figure)


def trade_off(s: Scene) -> Figure | None:
    """Generality against locality, with each editor's path through the stream; the large mark is its end."""
    sides = [s.curves(lambda e, k=k: curves.mean_by_year(s.run, e.records, k, s.reading, s.resampler)) for k in (LOCALITY, GENERALITY)]
    if not len(sides[0]) or not len(sides[1]):
        return None
    paths = sides[0].merge(sides[1], on=["editor", "x"], suffixes=("_loc", "_gen"))
    figure, (ax,) = style.panels(1, 1, 3.6, width=style.ONE_COLUMN + 0.7)
    for name, look in s.looks.items():
        _path(ax, paths[paths["editor"] == name].sort_values("x"), look)
    style.shares(ax, f"generality: rephrasings and other pictures right\n({s.reading_title})")
    ax.set_xlim(-0.03, 1.03)
    ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.set_xlabel("locality: answers left as they were (mean of kinds)")
    style.legend(figure, s.looks)
    return style.finish(figure)


FIGURES: dict[str, tuple[Callable[[Scene], Figure | None], str]] = {
    "retention": (retention, "Share of all live edits that are right at each year's end, under three readings of “right”."),
    "age": (age, "Share of live edits that are right, by the number of edits applied since; the first point is right after the edit."),
    "reach": (reach, "Generality (rephrasings, other pictures of the subject) and locality (answers unchanged) at each year's end."),
    "ability": (ability, "General ability by topic, and perplexity of running text relative to the unedited model, by edits applied."),
    "cost": (cost, "Success at the end against the cost of an edit and the size of what the editor keeps."),
    "trade_off": (trade_off, "Generality against locality; each path runs from the first year's end (small) to the last (large)."),
}


def draw_all(s: Scene) -> dict[str, Figure]:
    """All figures for which something was measured."""
    with style.paper():
        drawn = {name: make(s) for name, (make, _) in FIGURES.items()}
        return {name: _settled(figure) for name, figure in drawn.items() if figure is not None}


def _settled(figure: Figure) -> Figure:
    """The figure with its layout fixed, so that every file made of it looks alike."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the path's suffix, without a date, so that the same run gives the same file."""
    stamp = {"pdf": {"CreationDate": None}, "png": {"Software": None}, "svg": {"Date": None}}.get(path.suffix[1:])
    with style.paper():
        figure.savefig(path, dpi=style.DPI, metadata=stamp)


def _by_reading(
    s: Scene, curve: Callable[[str], Callable[[EditorRun], pd.DataFrame]], horizontal: Callable[[Axes], None], label: str
) -> Figure | None:
    frames = {t: s.curves(curve(r)) for r, t in zip(READINGS, READING_TITLES.values())}
    frames = {t: f for t, f in frames.items() if len(f)}
    if not frames:
        return None
    figure, axes = style.panels(1, len(frames), 2.5, sharey=True)
    for ax, (title, frame) in zip(axes, frames.items()):
        style.lines(ax, frame, s.looks)
        ax.set_title(title.capitalize())
        style.shares(ax)
        horizontal(ax)
    axes[0].set_ylabel(label)
    style.name_lines(figure, axes[-1], list(frames.values())[-1], s.looks)
    return style.finish(figure)


def _years(ax: Axes, s: Scene) -> None:
    ax.set_xlabel(s.time_label)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _ages(ax: Axes, s: Scene) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xlim(curves.RIGHT_AFTER_AGE * 0.8, max(2, len(s.run.events)) * 1.1)
    powers = [4**k for k in range(12) if 4**k <= len(s.run.events)]
    ax.xaxis.set_major_locator(FixedLocator([curves.RIGHT_AFTER_AGE, *powers]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: "0" if v < 1 else f"{v:,.0f}"))
    ax.set_xlabel("edits since (log)")


def _perplexity_axis(ax: Axes, frame: pd.DataFrame) -> None:
    ax.set_ylabel("perplexity ratio (log)")
    ax.set_yscale("log", base=2)
    low, high = min(0.9, frame["low"].min()), max(2.2, frame["high"].max() * 1.1)
    ax.set_ylim(low, min(high, 1e12))
    if high <= 64:
        ax.yaxis.set_major_locator(FixedLocator([2.0**k for k in range(-4, 7)]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
    ax.axhline(2, color="#888888", linewidth=0.7, linestyle=":")


def _point(ax: Axes, x: dict[str, Any], y: dict[str, Any], look: style.Look) -> None:
    up = [[max(0.0, y["value"] - y["low"])], [max(0.0, y["high"] - y["value"])]]
    ax.errorbar([x["value"]], [y["value"]], yerr=up, fmt=look.marker, color=look.colour, markersize=6, capsize=2, elinewidth=1)


def _log_from_zero(ax: Axes, values: list[float], text: Callable[[float], str]) -> None:
    """A logarithmic axis that still has a place for zero, at its left."""
    above = [v for v in values if v > 0]
    first = 10 ** np.floor(np.log10(min(above))) if above else 1.0
    last = 10 ** np.ceil(np.log10(max(above) * 1.5)) if above else 10.0
    ax.set_xscale("symlog", linthresh=first, linscale=0.5)
    ax.set_xlim(-0.25 * first if min(values) <= 0 else first * 0.6, last)
    decades = np.round(np.log10(last / first)).astype(int) + 1
    ticks = [first * 10.0**k for k in range(0, decades, max(1, decades // 4))]
    ax.xaxis.set_major_locator(FixedLocator([0.0, *ticks] if min(values) <= 0 else ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: text(v) if v else "0"))


def _path(ax: Axes, path: pd.DataFrame, look: style.Look) -> None:
    if path.empty:
        return
    x, y = path["value_loc"].to_numpy(), path["value_gen"].to_numpy()
    (line,) = ax.plot(x, y, color=look.colour, linewidth=1.1, marker=look.marker, markersize=2.5, alpha=0.9)
    if look.dash:
        line.set_dashes(look.dash)
    end = path.iloc[-1]
    across = [[max(0.0, x[-1] - end["low_loc"])], [max(0.0, end["high_loc"] - x[-1])]]
    up = [[max(0.0, y[-1] - end["low_gen"])], [max(0.0, end["high_gen"] - y[-1])]]
    ax.errorbar(x[-1:], y[-1:], xerr=across, yerr=up, fmt=look.marker, color=look.colour, markersize=7, elinewidth=1, capsize=2)


def _trim(figure: Figure, axes: list[Axes], used: int, columns: int) -> None:
    """Removes panels without data and axis titles between panels."""
    for ax in axes[used:]:
        figure.delaxes(ax)
    for i, ax in enumerate(axes[:used]):
        if i + columns < used:
            ax.set_xlabel("")
        elif ax.get_shared_x_axes().joined(ax, axes[0]):
            ax.tick_params(labelbottom=True)
