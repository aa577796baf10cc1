"""Write the analysis of a run from its stored answers: summary.json, figures, tables, hard edits and report.html."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.figures import catalogue
from analysis.figures.context import figure_context
from analysis.metrics.bootstrap import REPLICATES
from analysis.metrics.collapse import hard_edits_as_jsonl
from analysis.metrics.orders import load_orders
from analysis.metrics.summary import summarise
from analysis.reading.records import BadRun
from analysis.reporting.page import html
from analysis.reporting.tables import files
from testbed.core.schema import folder_name

TABLES = ("csv", "latex")
COMPARISON = "comparison"
"""Folder, in the first run, for the analysis of several runs."""


def write_all(
    out_dirs: str | Path | Sequence[str | Path],
    formats: Sequence[str] = ("png", "pdf"),
    tables: Sequence[str] = TABLES,
    to: Path | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
    columns: int = 2,
) -> dict[str, Any]:
    """Writes summary.json, figures/, tables/, hard/ (hard edits, in the first order) and report.html, and returns the summary.

    `to` is the folder written to: by default the run itself, or OUT/comparison in the first of several runs.
    `columns` is the width of figures in columns of a journal's page, 1 or 2. Raises `BadRun`.
    """
    for kind in formats:
        catalogue.require_format(kind)
    if wrong := [t for t in tables if t not in TABLES]:
        raise BadRun(f"unknown kind of table {', '.join(map(repr, wrong))}; known are {', '.join(TABLES)}")
    folders = [Path(out_dirs)] if isinstance(out_dirs, (str, Path)) else [Path(p) for p in out_dirs]
    runs = load_orders(folders)
    target = to or (folders[0] if len(folders) == 1 else folders[0] / COMPARISON)
    summary = summarise(runs, seed, replicates)
    context = figure_context(runs, summary, seed, columns=columns)
    figures = catalogue.draw_all(context)
    write(target / "summary.json", json.dumps(summary, indent=1, allow_nan=False, default=str, ensure_ascii=False) + "\n")
    for name, content in files(context, tuple(tables)).items():
        write(target / "tables" / name, content)
    (target / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        for kind in formats:
            catalogue.save(figure, target / "figures" / f"{name}.{kind}")
    for name, editor in context.run.editors.items():
        path, content = target / "hard" / f"{folder_name(name)}.jsonl", hard_edits_as_jsonl(context.run, editor)
        write(path, content) if content else path.unlink(missing_ok=True)
    write(target / "report.html", html(context, figures))
    return summary


def write(path: Path, text: str) -> None:
    """Writes a file under a temporary name first, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    half.write_text(text, "utf-8")
    half.replace(path)
