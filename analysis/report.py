"""Makes everything that is shown of a run from its stored answers: summary.json, figures, tables, report.html."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from analysis import facts, plots
from analysis.bootstrap import REPLICATES
from analysis.catalogue import METRICS, READING_TITLES, SUFFIXES, show, split_name, unit_of
from analysis.load import READINGS, BadRun, Run, load_runs
from analysis.metrics import summarise
from analysis.tables import best, files, interval, main_columns, main_reading

FORMATS = ("png", "pdf", "svg")
TABLES = ("csv", "latex")
COMPARISON = "comparison"
"""Folder, in the first run, that holds what is made of several runs."""
_SHOWN_DPI = 170


def write_all(
    out_dirs: str | Path | Sequence[str | Path],
    formats: Sequence[str] = ("png", "pdf"),
    tables: Sequence[str] = TABLES,
    to: Path | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> dict[str, Any]:
    """Writes summary.json, figures/, tables/ and report.html, and returns the summary.

    `to` is the folder written to: by default the run itself, or OUT/comparison in the first of several runs.
    """
    _require(formats, FORMATS, "figure format")
    _require(tables, TABLES, "kind of table")
    folders = [Path(out_dirs)] if isinstance(out_dirs, (str, Path)) else [Path(p) for p in out_dirs]
    run = load_runs(folders)
    target = to or (folders[0] if len(folders) == 1 else folders[0] / COMPARISON)
    summary = summarise(run, seed, replicates)
    figures = plots.draw_all(plots.scene(run, summary, seed))
    write(target / "summary.json", json.dumps(summary, indent=1, allow_nan=False, default=str, ensure_ascii=False) + "\n")
    for name, content in files(summary, tuple(tables)).items():
        write(target / "tables" / name, content)
    (target / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        for kind in formats:
            plots.save(figure, target / "figures" / f"{name}.{kind}")
    write(target / "report.html", html(run, summary, figures))
    return summary


def html(run: Run, summary: dict[str, Any], figures: dict[str, Figure]) -> str:
    """The report as one self-contained page; every text of the run is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(context(run, summary, figures))


def context(run: Run, summary: dict[str, Any], figures: dict[str, Figure]) -> dict[str, Any]:
    """What the template shows."""
    suffix = main_reading(summary)
    reading = READINGS[SUFFIXES.index(suffix)]
    about = summary["run"]
    return {
        "title": about.get("stream", {}).get("name", "run"),
        "about": about,
        "overview": overview(run, summary),
        "notes": about["notes"],
        "headlines": {e: facts.headline(m, suffix) for e, m in summary["editors"].items()},
        "tables": {READING_TITLES[s]: main_table(summary, s) for s in _readings_first(summary, suffix)},
        "figures": [{"name": n, "caption": plots.FIGURES[n][1], "data": picture(f)} for n, f in figures.items()],
        "forgotten": {n: facts.worst_forgotten(run, e, reading) for n, e in run.editors.items()},
        "forgotten_counts": {n: facts.count_forgotten(e, reading) for n, e in run.editors.items()},
        "commands": commands(run),
        "config": json.dumps(about.get("config", {}), indent=2, default=str, ensure_ascii=False),
        "versions": about.get("versions", {}),
    }


def overview(run: Run, summary: dict[str, Any]) -> dict[str, str]:
    """Label to text: what the run was, for the top of the page."""
    about = summary["run"]
    stream, model = about.get("stream", {}), about.get("model", {})
    made = int(run.events["step"].size)
    shown = {
        "Stream": f"{stream.get('name', '?')}: {stream.get('origin', '?')}",
        "Time axis": str(stream.get("time_axis", "?")),
        "Model": f"{model.get('name', '?')} ({model.get('family', 'family unknown')})",
        "Edits": f"{made:,} in {int(run.events['step'].max()):,} steps",
        "Superseded": f"{int(run.events['superseded_step'].notna().sum()):,} edits were revised, reverted or retired later",
        "Answers": f"{sum(len(e.records) for e in run.editors.values()):,}",
        "Seed": str(about.get("seed", "?")),
        "Schedule": str(about.get("schedule_hash", "?")),
    }
    return shown


def main_table(summary: dict[str, Any], suffix: str) -> dict[str, Any]:
    """Columns and, per editor, cells with text, interval, length of the bar and whether it is the best."""
    names = main_columns(summary, suffix)
    winners = {n: best(summary, n) for n in names}
    rows = {e: [_cell(m, n, winners[n] == e) for n in names] for e, m in summary["editors"].items()}
    return {
        "columns": [
            {"name": n, "title": METRICS[split_name(n)[0]].short, "long": METRICS[split_name(n)[0]].title, "unit": unit_of(n)}
            for n in names
        ],
        "rows": rows,
    }


def commands(run: Run) -> list[str]:
    """How to make the run and this page again."""
    about = run.manifest
    given = about.get("command")
    edits = about.get("edits")
    built = ["python -m testbed.run", f"--stream {about.get('stream', {}).get('name', '?')}", f"--editor {','.join(run.editors)}"]
    built += [f"--edits {edits}"] if isinstance(edits, int) else []
    built += [f"--seed {about.get('seed', 0)}", f"--out {run.folders[0].name}"]
    first = " ".join(given) if isinstance(given, list) else given or " ".join(built)
    return [str(first), f"python -m analysis {' '.join(f.name for f in run.folders)}"]


def picture(figure: Figure) -> str:
    """A figure as a data URI."""
    out = io.BytesIO()
    with plots.style.paper():
        figure.savefig(out, format="png", dpi=_SHOWN_DPI, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def write(path: Path, text: str) -> None:
    """Writes a file under a temporary name first, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    half.write_text(text, "utf-8")
    half.replace(path)


def _cell(metrics: dict[str, Any], name: str, wins: bool) -> dict[str, Any]:
    entry = metrics.get(name)
    if entry is None:
        return {"text": "–", "interval": "", "bar": None, "best": False, "bad": False}
    metric = METRICS[split_name(name)[0]]
    bar = 100 * abs(entry["value"]) if metric.unit in ("share", "difference") else None
    bad = metric.better < 0 or (metric.unit == "difference" and entry["value"] < 0)
    return {"text": show(name, entry["value"]), "interval": interval(name, entry), "bar": bar, "best": wins, "bad": bad}


def _readings_first(summary: dict[str, Any], first: str) -> list[str]:
    """Suffixes of the readings that were measured, the leading one first."""
    measured = [s for s in SUFFIXES if any(METRICS[split_name(n)[0]].readings for n in main_columns(summary, s))]
    return sorted(measured, key=lambda s: s != first)


def _require(given: Sequence[str], known: Sequence[str], what: str) -> None:
    wrong = [g for g in given if g not in known]
    if wrong:
        raise BadRun(f"unknown {what} {', '.join(map(repr, wrong))}; known are {', '.join(known)}")
