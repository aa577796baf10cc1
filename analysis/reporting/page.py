"""The report as one self-contained page."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from analysis.figures import catalogue as plots
from analysis.figures import style
from analysis.figures.context import Scene
from analysis.metrics.catalogue import METRICS, READING_TITLES, SUFFIXES, show, split_name, unit_of
from analysis.reading.load import Run
from analysis.reporting import facts, published
from analysis.reporting.tables import best, interval, main_columns, main_reading, other_columns
from analysis.reporting.verdict import verdicts

_SHOWN_DPI = 170


def html(s: Scene, figures: dict[str, Figure]) -> str:
    """The page; every text of the run is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(context(s, figures))


def context(s: Scene, figures: dict[str, Figure]) -> dict[str, Any]:
    """What the template shows."""
    run, summary, suffix, about = s.run, s.summary, main_reading(s.summary), s.summary["run"]
    shown = {
        "title": about.get("stream", {}).get("name", "run"),
        "about": about,
        "overview": overview(s),
        "notes": about["notes"],
        "verdicts": verdicts(s),
        "reading": READING_TITLES[suffix],
        "references": about.get("references", ()),
        "headlines": {e: facts.headline(m, suffix) for e, m in summary["editors"].items()},
        "tables": {READING_TITLES[x]: main_table(summary, x) for x in _readings_first(summary, suffix)},
        "others": other_table(summary, suffix),
        "published": published.beside(run, summary),
        "figures": [
            {"name": n, "caption": plots.FIGURES[n][1], "data": picture(f), "narrow": f.get_figwidth() < 5} for n, f in figures.items()
        ],
    }
    shown |= {
        "precision": {METRICS[split_name(n)[0]].title: p for n, p in about["precision"].items()},
        "forgotten": {n: facts.worst_forgotten(run, e, s.reading) for n, e in run.editors.items()},
        "forgotten_counts": {n: facts.count_forgotten(e, s.reading) for n, e in run.editors.items()},
        "commands": commands(s),
        "config": json.dumps(about.get("config", {}), indent=2, default=str, ensure_ascii=False),
        "versions": about.get("versions", {}),
    }
    return shown


def overview(s: Scene) -> dict[str, str]:
    """Label to text: what the run was."""
    run, about = s.run, s.summary["run"]
    stream, model = about.get("stream", {}), about.get("model", {})
    return {
        "Stream": f"{stream.get('name', '?')}: {stream.get('origin', '?')}",
        "Time axis": str(stream.get("time_axis", "?")),
        "Model": f"{model.get('name', '?')} ({model.get('family', 'family unknown')})",
        "Edits": f"{len(run.events):,} in {int(run.events['step'].max()):,} steps",
        "Superseded": f"{int(run.events['superseded_step'].notna().sum()):,} edits were revised, reverted or retired later",
        "Answers": f"{sum(len(e.records) for r in s.runs for e in r.editors.values()):,}",
        "Orders": f"{len(s.runs)} (seeds {', '.join(map(str, about['seeds']))})",
        "Schedule": str(about.get("schedule_hash", "?")),
    }


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


def other_table(summary: dict[str, Any], suffix: str) -> dict[str, dict[str, Any]]:
    """Title and unit of every other metric to a cell an editor."""
    editors, names = summary["editors"].items(), other_columns(summary, suffix)
    titles = {n: METRICS[split_name(n)[0]].title + (f" ({unit_of(n)})" if unit_of(n) else "") for n in names}
    return {titles[n]: {e: _cell(m, n, False) for e, m in editors} for n in names}


def commands(s: Scene) -> list[str]:
    """How to make the runs and this page again."""
    folders = [f for r in s.runs for f in r.folders]
    return [*(_command(r) for r in s.runs), f"python -m analysis {' '.join(f.name for f in folders)}"]


def picture(figure: Figure) -> str:
    """A figure as a data URI."""
    out = io.BytesIO()
    with style.paper():
        figure.savefig(out, format="png", dpi=_SHOWN_DPI, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _command(run: Run) -> str:
    about = run.manifest
    given = about.get("command")
    edits = about.get("edits")
    built = ["python -m testbed.run", f"--stream {about.get('stream', {}).get('name', '?')}", f"--editor {','.join(run.editors)}"]
    built += [f"--edits {edits}"] if isinstance(edits, int) else []
    built += [f"--seed {about.get('seed', 0)}", f"--out {run.folders[0].name}"]
    return " ".join(given) if isinstance(given, list) else str(given or " ".join(built))


def _cell(metrics: dict[str, Any], name: str, wins: bool) -> dict[str, Any]:
    entry = metrics.get(name)
    if entry is None:
        return {"text": "–", "interval": "", "bar": None, "best": False, "bad": False, "sd": ""}
    metric = METRICS[split_name(name)[0]]
    bar = 100 * abs(entry["value"]) if metric.unit in ("share", "difference") else None
    bad = metric.better < 0 or (metric.unit == "difference" and entry["value"] < 0)
    sd = f"sd {show(name, entry['sd'])}" if "sd" in entry else ""
    return {"text": show(name, entry["value"]), "interval": interval(name, entry), "bar": bar, "best": wins, "bad": bad, "sd": sd}


def _readings_first(summary: dict[str, Any], first: str) -> list[str]:
    """Suffixes of the readings that were measured, the leading one first."""
    measured = [s for s in SUFFIXES if any(METRICS[split_name(n)[0]].readings for n in main_columns(summary, s))]
    return sorted(measured, key=lambda s: s != first)
