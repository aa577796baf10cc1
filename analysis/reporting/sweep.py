"""The report of a sweep, from sweep.json and the cells' run folders: `python -m analysis.reporting.sweep OUT`.

Cells that differ only in editor and seed are compared with each other, with seeds pooled as orders of one stream. Each
comparison has a report like that of a run; OUT/report.html links to them and lists every cell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.figures import catalogue
from analysis.figures.batches import SHOWN, batches
from analysis.metrics.catalogue import METRICS, show
from analysis.metrics.comparison import Summary, main_columns, main_mode
from analysis.reading.records import BadRun
from analysis.reporting.page import render
from analysis.reporting.report import COMPARISON, write, write_all

_AXES = ("stream", "model", "batch", "edits", "set")
"""Fields of a run, beside editor and seed, in which cells may differ."""


@dataclass(frozen=True)
class Comparison:
    """One set of comparable cells: its report's folder in the sweep, its batch size and summary, the omitted cells with reasons."""

    label: str
    folder: str
    batch: int
    summary: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def write_sweep(out: Path, formats: Sequence[str] = ("png", "pdf")) -> dict[str, dict[str, Any]]:
    """Writes a report for every comparison, cells.csv and report.html; returns the summaries by label of the comparison.

    Comparisons that differ in their batch size alone have a figure together, batch.png (batch-2.png, ...).
    Cells that failed or are missing are named on the page and left out of the numbers. Raises `BadRun` for a folder
    without a readable sweep.json.
    """
    sweep = read_sweep(out)
    sets = sweep["comparisons"]
    names = [COMPARISON] if len(sets) == 1 else [f"{COMPARISON}-{n}" for n in range(1, len(sets) + 1)]
    compared = [_compare(out, label, name, [sweep["cells"][i] for i in ids], formats) for name, (label, ids) in zip(names, sets.items())]
    cells = [_row(out, c) for c in sweep["cells"].values()]
    write(out / "cells.csv", _csv(cells))
    shown = [{"about": c, "columns": main_columns(c.summary, main_mode(c.summary)) if c.summary else ()} for c in compared]
    axes = [a for a in _AXES if len({c["axes"][a] for c in cells}) > 1]
    sizes = _by_batch(out, compared, formats)
    write(out / "report.html", render("sweep.html.j2", title=out.name, cells=cells, comparisons=shown, axes=axes, sizes=sizes))
    return {c.label: c.summary for c in compared if c.summary}


def read_sweep(out: Path) -> dict[str, Any]:
    """sweep.json: comparisons (label to ids of cells) and cells by id. Raises `BadRun`."""
    path = out / "sweep.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise BadRun(f"{path} is missing: {out} is not the folder of a sweep (python -m testbed.sweep FILE --out ...)") from error
    except ValueError as error:
        raise BadRun(f"{path} is not JSON ({error}); start the sweep again, finished cells are kept") from error


def _compare(out: Path, label: str, name: str, cells: Sequence[Mapping[str, Any]], formats: Sequence[str]) -> Comparison:
    """Writes the report of comparable cells: the seeds with a finished editor, and the editors that are done in each of them."""
    done = [c for c in cells if c["state"] == "done"]
    seeds = {c["seed"] for c in done}
    whole = [e for e in dict.fromkeys(c["editor"] for c in cells) if {c["seed"] for c in done if c["editor"] == e} == seeds]
    kept = [c for c in done if c["editor"] in whole]
    left = [f"{c['editor']}, seed {c['seed']}: {c['state']}" for c in cells if c["state"] != "done"]
    left += [f"{c['editor']}, seed {c['seed']}: done, but this editor is not done in every seed" for c in done if c not in kept]
    batch = cells[0]["config"]["batch"]
    if not kept:
        return Comparison(label, name, batch, left_out=[*left, "no editor is done in every seed, so nothing can be compared"])
    try:
        return Comparison(label, name, batch, write_all([out / c["folder"] for c in kept], formats, to=out / name), left)
    except BadRun as error:
        return Comparison(label, name, batch, left_out=[*left, str(error)])


def _by_batch(out: Path, compared: Sequence[Comparison], formats: Sequence[str]) -> list[dict[str, str]]:
    """Writes the figures of the comparisons that differ in their batch size alone: title, file and text of each."""
    groups: dict[str, dict[int, Summary]] = {}
    for c in compared:
        label = ", ".join(part for part in c.label.split(", ") if not part.startswith("batch="))
        groups.setdefault(label, {}).update({c.batch: c.summary} if c.summary else {})
    written: list[dict[str, str]] = []
    for label, summaries in groups.items():
        figure = batches(summaries)
        if figure is not None:
            name = f"batch-{len(written) + 1}" if written else "batch"
            for kind in formats:
                catalogue.save(figure, out / f"{name}.{kind}")
            written.append({"title": label or "Batch size", "file": f"{name}.{formats[0]}", "text": _in_words(summaries)})
    return written


def _in_words(summaries: Mapping[int, Summary]) -> str:
    """The numbers of the figure, for readers who do not see it."""
    lines: list[str] = []
    for size, summary in sorted(summaries.items()):
        names = [m + main_mode(summary).suffix for m in SHOWN]
        for editor, found in summary["editors"].items():
            values = [f"{METRICS[m].short} {show(n, found[n]['value'])}" for m, n in zip(SHOWN, names) if n in found]
            lines.append(f"{editor}, {size} edits in a step: {', '.join(values)}")
    return "; ".join(lines)


def _row(out: Path, cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell for the page and cells.csv, with the metrics of the main table where the cell is done."""
    config = cell["config"]
    error = (cell["error"] or "").strip()
    about = {"editor": cell["editor"], "seed": cell["seed"], "state": cell["state"], "folder": cell["folder"]}
    axes = {a: " ".join(map(str, v)) if isinstance(v := config.get(a), list) else v for a in _AXES}
    return {**about, "axes": axes, "metrics": _metrics(out / cell["folder"]), "error": error, "reason": error.rpartition("\n")[2]}


def _metrics(folder: Path) -> dict[str, float]:
    """The main metrics of a run's summary.json; empty where the file is missing."""
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    summary = json.loads(path.read_text("utf-8"))
    (values,) = summary["editors"].values()
    return {n: values[n]["value"] for n in main_columns(summary, main_mode(summary)) if n in values}


def _csv(cells: Sequence[dict[str, Any]]) -> str:
    """One line for each cell: editor, seed, axes, state, folder, metrics; empty where a metric was not measured."""
    metrics = list(dict.fromkeys(m for c in cells for m in c["metrics"]))
    columns = ["editor", "seed", *_AXES, "state", "folder", *metrics]
    rows = [c | c["axes"] | c["metrics"] for c in cells]
    return pd.DataFrame(rows, columns=columns, dtype=object).to_csv(index=False, lineterminator="\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when everything was written, 2 when there is no sweep to show."""
    given = list(sys.argv[1:] if argv is None else argv)
    if len(given) != 1:
        print("usage: python -m analysis.reporting.sweep OUT", file=sys.stderr)
        return 2
    try:
        write_sweep(Path(given[0]))
    except BadRun as error:
        print(error, file=sys.stderr)
        return 2
    print(f"report: {Path(given[0]) / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
