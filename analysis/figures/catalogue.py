"""The figures of a run by name. Each function takes a `Scene` and gives a Figure, or None where nothing was measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from analysis.figures import style
from analysis.figures.context import Scene, scene
from analysis.figures.curves import ability, age, benchmarks, reach, retention, safety, survival
from analysis.figures.gated import gated
from analysis.figures.points import cost, gap, trade_off
from analysis.figures.retrieval import retrieved
from analysis.figures.state import forgetting, vitals
from analysis.reading.records import BadRun

__all__ = ["FIGURES", "FORMATS", "Scene", "draw_all", "require_format", "save", "scene"]

FORMATS = ("png", "pdf", "pgf", "svg")
TEX = ("xelatex", "lualatex", "pdflatex")
"""Programs that can measure text for PGF, the best first."""
FIGURES: dict[str, tuple[Callable[[Scene], Figure | None], str]] = {
    "retention": (retention, "Share of all live edits that are right at each year's end, under three readings of “right”."),
    "forgetting": (forgetting, "Success (%) at the end of each year (across) on the live edits of each year (down), by editor."),
    "age": (age, "Share of live edits that are right, by the number of edits applied since; the first point is right after the edit."),
    "survival": (survival, "Share of edits that were right right after and have not been found wrong since, by edits applied since."),
    "reach": (reach, "Generality (rephrasings, other pictures), locality (answers unchanged) and portability at each year's end."),
    "ability": (ability, "General ability by topic, and perplexity of running text relative to the unedited model, by edits applied."),
    "benchmarks": (
        benchmarks,
        "Change of benchmark scores against the unedited model, same questions, by edits applied; dashed: guessing.",
    ),
    "safety": (safety, "Change of safety scores against the unedited model, on the same questions, by edits applied."),
    "vitals": (vitals, "What the monitors and the editors themselves report of the model's inside, by edits applied."),
    "gated": (gated, "Editors that gate: what is reached and spared, how often an entry answers, entries and bytes, by edits applied."),
    "retrieved": (
        retrieved,
        "Editors that keep facts beside the model: facts found, given rightly, for nothing; what a question costs, by facts in the store.",
    ),
    "gap": (gap, "One set of answers, three readings: token accuracy under teacher forcing, all tokens, free generation."),
    "cost": (cost, "Success at the end against the cost of an edit, its memory and the size of what the editor keeps."),
    "trade_off": (
        trade_off,
        "Generality against locality; each path runs from the first year's end (small) to the last (large). Grey: equal harmonic "
        "mean; the step line joins editors that no other beats on both.",
    ),
}


def draw_all(s: Scene) -> dict[str, Figure]:
    """All figures for which something was measured."""
    with style.paper():
        drawn = {name: make(s) for name, (make, _) in FIGURES.items()}
        return {name: _settled(figure) for name, figure in drawn.items() if figure is not None}


def require_format(name: str) -> None:
    """Raises `BadRun` where a figure cannot be written in this format, with what to do."""
    if name not in FORMATS:
        raise BadRun(f"unknown figure format {name!r}; known are {', '.join(FORMATS)}")
    if name == "pgf" and not any(map(shutil.which, TEX)):
        raise BadRun(f"figures as PGF are measured by TeX: install one of {', '.join(TEX)}, or leave pgf out of --format")


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the path's suffix, without a date, so that the same run gives the same file."""
    stamp = {"pdf": {"CreationDate": None}, "png": {"Software": None}, "svg": {"Date": None}}.get(path.suffix[1:])
    with style.paper():
        if path.suffix == ".pgf":
            return _save_pgf(figure, path)
        figure.savefig(path, dpi=style.DPI, metadata=stamp)


def _save_pgf(figure: Figure, path: Path) -> None:
    import matplotlib

    tex = next(t for t in TEX if shutil.which(t))
    with matplotlib.rc_context({"pgf.texsystem": tex, "pgf.rcfonts": False, "font.family": "serif", "axes.unicode_minus": False}):
        figure.savefig(path)


def _settled(figure: Figure) -> Figure:
    """The figure with its layout fixed, so that every file made of it looks alike."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure
