"""Writes everything that is shown of a run from its stored answers: summary.json, figures, tables, hard edits, report.html."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.figures import catalogue as plots
from analysis.figures.context import Scene, scene
from analysis.metrics import hard
from analysis.metrics.bootstrap import REPLICATES
from analysis.metrics.orders import gather
from analysis.metrics.summary import summarise
from analysis.reading.load import BadRun
from analysis.reporting import tables_more
from analysis.reporting.page import html
from analysis.reporting.tables import files
from testbed.core.schema import folder_name

TABLES = ("csv", "latex")
COMPARISON = "comparison"
"""Folder, in the first run, that holds what is made of several runs."""


def write_all(
    out_dirs: str | Path | Sequence[str | Path],
    formats: Sequence[str] = ("png", "pdf"),
    tables: Sequence[str] = TABLES,
    to: Path | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
    columns: int = 2,
) -> dict[str, Any]:
    """Writes summary.json, figures/, tables/, hard/ and report.html, and returns the summary.

    `to` is the folder written to: by default the run itself, or OUT/comparison in the first of several runs.
    `columns` is the width of figures in columns of a journal's page, 1 or 2. Raises `BadRun`.
    """
    for kind in formats:
        plots.require_format(kind)
    _require(tables, TABLES, "kind of table")
    folders = [Path(out_dirs)] if isinstance(out_dirs, (str, Path)) else [Path(p) for p in out_dirs]
    runs = gather(folders)
    target = to or (folders[0] if len(folders) == 1 else folders[0] / COMPARISON)
    summary = summarise(runs, seed, replicates)
    view = scene(runs, summary, seed, columns=columns)
    figures = plots.draw_all(view)
    write(target / "summary.json", json.dumps(summary, indent=1, allow_nan=False, default=str, ensure_ascii=False) + "\n")
    for name, content in (files(summary, tuple(tables)) | tables_more.files(view, tuple(tables))).items():
        write(target / "tables" / name, content)
    (target / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        for kind in formats:
            plots.save(figure, target / "figures" / f"{name}.{kind}")
    _write_hard(view, target / "hard")
    write(target / "report.html", html(view, figures))
    return summary


def write(path: Path, text: str) -> None:
    """Writes a file under a temporary name first, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    half.write_text(text, "utf-8")
    half.replace(path)


def _write_hard(view: Scene, folder: Path) -> None:
    """One file of hard edits an editor that has any (first order); a file of an earlier analysis that has none is removed."""
    for name, editor in view.run.editors.items():
        path, content = folder / f"{folder_name(name)}.jsonl", hard.stream_of(view.run, editor)
        write(path, content) if content else path.unlink(missing_ok=True)


def _require(given: Sequence[str], known: Sequence[str], what: str) -> None:
    wrong = [g for g in given if g not in known]
    if wrong:
        raise BadRun(f"unknown {what} {', '.join(map(repr, wrong))}; known are {', '.join(known)}")
