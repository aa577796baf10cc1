"""What is shown of a sweep: `python -m analysis.reporting.sweep OUT` makes it again from sweep.json and the cells' run folders.

Cells that differ in editor and seed alone are compared with each other: editors side by side, seeds pooled as orders of
one stream. Each comparison is a report like that of a run; OUT/report.html is the page above them, with every cell.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis.reading.load import BadRun
from analysis.reporting.page import main_table
from analysis.reporting.report import COMPARISON, write, write_all
from analysis.reporting.tables import main_columns, main_reading

_AXES = ("stream", "model", "batch", "edits", "set")
"""Fields of a run that tell cells apart beside editor and seed, where they differ."""


@dataclass(frozen=True)
class Comparison:
    """One set of comparable cells: its report's folder relative to the sweep, its summary, and what was left out and why."""

    label: str
    folder: str
    summary: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def write_sweep(out: Path, formats: Sequence[str] = ("png", "pdf")) -> dict[str, dict[str, Any]]:
    """Writes a report for every comparison, cells.csv and report.html; returns the summaries by what sets a comparison apart.

    Cells that failed or are not there are named on the page and left out of the numbers. Raises `BadRun` for a folder
    without a readable sweep.json.
    """
    sweep = read_sweep(out)
    sets = sweep["comparisons"]
    names = [COMPARISON] if len(sets) == 1 else [f"{COMPARISON}-{n}" for n in range(1, len(sets) + 1)]
    found = [_compare(out, label, name, [sweep["cells"][i] for i in ids], formats) for name, (label, ids) in zip(names, sets.items())]
    cells = [_row(out, c) for c in sweep["cells"].values()]
    write(out / "cells.csv", _csv(cells))
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    shown = [{"about": c, "table": main_table(c.summary, main_reading(c.summary)) if c.summary else None} for c in found]
    page = environment.get_template("sweep.html.j2").render(title=out.name, cells=cells, comparisons=shown, axes=_varying(cells))
    write(out / "report.html", page)
    return {c.label: c.summary for c in found if c.summary}


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
    """The report of comparable cells: seeds with any finished editor, and of the editors those that are done in each of them."""
    done = [c for c in cells if c["state"] == "done"]
    seeds = {c["seed"] for c in done}
    whole = [e for e in dict.fromkeys(c["editor"] for c in cells) if {c["seed"] for c in done if c["editor"] == e} == seeds]
    kept = [c for c in done if c["editor"] in whole]
    left = [f"{c['editor']}, seed {c['seed']}: {c['state']}" for c in cells if c["state"] != "done"]
    left += [f"{c['editor']}, seed {c['seed']}: done, but this editor is not done in every seed" for c in done if c not in kept]
    if not kept:
        return Comparison(label, name, left_out=[*left, "no editor is done in every seed, so nothing can be compared"])
    try:
        return Comparison(label, name, write_all([out / c["folder"] for c in kept], formats, to=out / name), left)
    except BadRun as error:
        return Comparison(label, name, left_out=[*left, str(error)])


def _row(out: Path, cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell as the page and cells.csv show it; metrics of the main table, where it is done."""
    config = cell["config"]
    error = (cell["error"] or "").strip()
    about = {"editor": cell["editor"], "seed": cell["seed"], "state": cell["state"], "folder": cell["folder"]}
    axes = {a: " ".join(map(str, v)) if isinstance(v := config.get(a), list) else v for a in _AXES}
    return {**about, "axes": axes, "metrics": _metrics(out / cell["folder"]), "error": error, "reason": error.rpartition("\n")[2]}


def _metrics(folder: Path) -> dict[str, float]:
    """The main metrics of a run's summary; none where it has none."""
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    summary = json.loads(path.read_text("utf-8"))
    (values,) = summary["editors"].values()
    return {n: values[n]["value"] for n in main_columns(summary, main_reading(summary)) if n in values}


def _varying(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    return [a for a in _AXES if len({c["axes"][a] for c in cells}) > 1]


def _csv(cells: Sequence[Mapping[str, Any]]) -> str:
    """One line a cell: editor, seed, axes, state, metrics; empty where something was not measured."""
    metrics = list(dict.fromkeys(m for c in cells for m in c["metrics"]))
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["editor", "seed", *_AXES, "state", "folder", *metrics])
    for c in cells:
        numbers = [c["metrics"].get(m, "") for m in metrics]
        lines.writerow([c["editor"], c["seed"], *(c["axes"][a] for a in _AXES), c["state"], c["folder"], *numbers])
    return out.getvalue()


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
