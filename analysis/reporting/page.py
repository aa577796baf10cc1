"""The report as one self-contained page."""

from __future__ import annotations

import base64
import io
import json
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from analysis.figures import style
from analysis.figures.context import FigureContext
from analysis.metrics.catalogue import header, metric_of, mode_title, show, shown, unit_of
from analysis.metrics.comparison import best, main_columns, main_mode, other_columns
from analysis.reading.load import Run
from analysis.reading.records import SCORING_MODES, ScoringMode
from analysis.reporting import explorer, published, verdict
from analysis.reporting.tables import counts, interval

_SHOWN_DPI = 170
MOST_PUBLISHED = 40
"""Published numbers on the page; tables/published.csv has all."""


def html(context: FigureContext, figures: dict[str, Figure]) -> str:
    """The page of a run."""
    return render("report.html.j2", **template_variables(context, figures))


def render(template: str, **variables: Any) -> str:
    """A template of this folder with its variables; every text of the run is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    environment.globals |= {f.__name__: f for f in (best, counts, header, interval, metric_of, mode_title, show, shown, unit_of)}
    return environment.get_template(template).render(variables)


def template_variables(context: FigureContext, figures: dict[str, Figure]) -> dict[str, Any]:
    """The variables of report.html.j2."""
    run, summary, mode, about = context.run, context.summary, main_mode(context.summary), context.summary["run"]
    return {
        "title": about.get("stream", {}).get("name", "run"),
        "about": about,
        "summary": summary,
        "run": run,
        "answers": sum(len(e.records) for r in context.runs for e in r.editors.values()),
        "verdicts": verdict.verdicts(context),
        "mode": mode.title,
        "references": about.get("references", ()),
        "headlines": {e: verdict.headline(m, mode) for e, m in summary["editors"].items()},
        "tables": {m.title: main_columns(summary, m) for m in _modes_first(summary, mode)},
        "others": other_columns(summary, mode),
        "published": published.rows(run, summary)[:MOST_PUBLISHED],
        "figures": [
            {
                "name": n,
                "caption": style.CAPTIONS[n]["caption"],
                "alt": alt_text(n, context),
                "data": data_uri(f),
                "narrow": f.get_figwidth() < 5,
            }
            for n, f in figures.items()
        ],
        "forgotten": {n: verdict.worst_forgotten(run, e, context.mode) for n, e in run.editors.items()},
        "forgotten_counts": {n: verdict.count_forgotten(e, context.mode) for n, e in run.editors.items()},
        "commands": commands(context),
        "config": json.dumps(about.get("config", {}), indent=2, default=str, ensure_ascii=False),
        "versions": about.get("versions", {}),
        "explorer": explorer.data_block(run, mode.column),
    }


def commands(context: FigureContext) -> list[str]:
    """Commands that repeat the runs and this analysis."""
    folders = [f for r in context.runs for f in r.folders]
    return [*map(command_of, context.runs), shlex.join(["python", "-m", "analysis", *(f.name for f in folders)])]


def alt_text(figure: str, context: FigureContext) -> str:
    """A figure in words: its caption, and for each editor the values, in the leading scoring mode, of the metrics that it draws."""
    caption, summary = style.CAPTIONS[figure]["caption"], context.summary
    suffix = main_mode(summary).suffix
    names = [n + suffix if metric_of(n).modes else n for n in style.CAPTIONS[figure].get("finds", ())]
    found = []
    for editor, metrics in summary["editors"].items():
        values = [f"{header(n)} {shown(n, metrics[n])}" for n in names if n in metrics]
        found += [f"{editor}: {', '.join(values)}."] if values else []
    return " ".join([caption, *found])


def data_uri(figure: Figure) -> str:
    """A figure as the data URI of a PNG."""
    out = io.BytesIO()
    with style.paper():
        figure.savefig(out, format="png", dpi=_SHOWN_DPI, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def command_of(run: Run) -> str:
    """The command of a run, quoted for a shell; where a run of an older version stored none, the fields that name it."""
    about = run.manifest
    named = {"stream": about.get("stream", {}).get("name", "?"), "editor": ",".join(run.editors), "edits": about.get("edits")}
    built = ["python", "-m", "testbed.run", *(w for k, v in named.items() if v is not None for w in (f"--{k}", str(v)))]
    words = about.get("command") or [*built, "--seed", str(about.get("seed", 0))]
    return shlex.join([*words, "--out", run.folders[0].name])


def _modes_first(summary: dict[str, Any], first: ScoringMode) -> list[ScoringMode]:
    """The scoring modes that were measured, the leading one first."""
    measured = [m for m in SCORING_MODES if any(metric_of(n).modes for n in main_columns(summary, m))]
    return sorted(measured, key=lambda m: m is not first)
