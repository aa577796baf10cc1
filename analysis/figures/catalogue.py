"""The figures of a run by name, and how they are written.

Each figure function takes a `FigureContext` and returns a Figure, or None where the run lacks its measurements.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from analysis.figures import style
from analysis.figures.context import FigureContext
from analysis.figures.curves import ability, age, generality_and_locality, requests_kept, retention, survival, topic_changes
from analysis.figures.points import cost, gap, trade_off
from analysis.figures.state import forgetting, internal_signals
from analysis.figures.stored_edits import gated, retrieved
from analysis.reading.records import BadRun

FORMATS = ("png", "pdf", "pgf", "svg")
TEX = ("xelatex", "lualatex", "pdflatex")
"""Programs that can measure text for PGF, in order of preference."""
FIGURES: dict[str, Callable[[FigureContext], Figure | None]] = {
    "retention": retention,
    "forgetting": forgetting,
    "age": age,
    "survival": survival,
    "reach": generality_and_locality,
    "ability": ability,
    "benchmarks": partial(topic_changes, prefix="bench:"),
    "safety": partial(topic_changes, prefix="safety:"),
    "requests": requests_kept,
    "vitals": internal_signals,
    "gated": gated,
    "retrieved": retrieved,
    "gap": gap,
    "cost": cost,
    "trade_off": trade_off,
}
"""File name of each figure to its function; reporting/captions.yaml has the captions."""


def draw_all(context: FigureContext) -> dict[str, Figure]:
    """All figures whose measurements the run has, with fixed layouts, so that every file made of a figure looks alike."""
    with style.paper():
        figures = {name: figure for name, draw in FIGURES.items() if (figure := draw(context)) is not None}
        for figure in figures.values():
            style.lay_out(figure)
            figure.set_layout_engine(None)  # and not "none", whose placeholder makes every file be drawn twice
    return figures


def require_format(name: str) -> None:
    """Raises `BadRun`, which says what to do, where a figure cannot be written in this format."""
    if name not in FORMATS:
        raise BadRun(f"unknown figure format {name!r}; known are {', '.join(FORMATS)}")
    if name == "pgf" and not any(map(shutil.which, TEX)):
        raise BadRun(f"figures as PGF are measured by TeX: install one of {', '.join(TEX)}, or leave pgf out of --format")


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the path's suffix, without a date, so that the same run gives the same file."""
    metadata: Any = {"pdf": {"CreationDate": None}, "png": {"Software": None}, "svg": {"Date": None}}.get(path.suffix[1:])
    with style.paper():
        if path.suffix == ".pgf":
            tex = next(t for t in TEX if shutil.which(t))
            options: Any = {"pgf.texsystem": tex, "pgf.rcfonts": False, "font.family": "serif", "axes.unicode_minus": False}
            with matplotlib.rc_context(options):
                return figure.savefig(path)
        figure.savefig(path, dpi=style.DPI, metadata=metadata)
