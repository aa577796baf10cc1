"""A run beside the numbers of papers: where the settings match, and where they do not.

The numbers stand in published.yaml with their source; a run never counts as a reproduction by standing beside one.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from analysis.metrics.catalogue import METRICS, READING_TITLES, SUFFIXES, header, show, split_name
from analysis.reading.load import Run

MOST_SHOWN = 40
"""Rows of the report's table; tables/published.csv has all."""
_READINGS = {"token": "", "exact": "_exact", "gen": "_gen"}


@cache
def sources() -> tuple[dict[str, Any], ...]:
    """The entries of published.yaml."""
    return tuple(yaml.safe_load((Path(__file__).parent / "published.yaml").read_text("utf-8"))["sources"])


def rows(run: Run, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a published number of an editor of the run whose metric was measured here, the best matching first.

    `published`, `ours`, `low`, `high` are in the summary's units (shares as fractions); `differs` says what of the
    settings is not alike and is empty where everything that the paper states matches.
    """
    out = []
    for editor, measured in summary["editors"].items():
        name = re.sub(r"\[[^]]*\]", "", editor)
        for source in sources():
            for metric, number in zip(source["metrics"], source["rows"].get(name) or ()):
                if number is not None and metric in measured:
                    out.append(_row(run, summary, editor, source, metric, number))
    return sorted(out, key=lambda r: (list(summary["editors"]).index(r["editor"]), r["differs"].count(";") + bool(r["differs"])))


def beside(run: Run, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows as a reader sees them."""
    shown = []
    for r in rows(run, summary)[:MOST_SHOWN]:
        name = r["metric"]
        reading = f" ({READING_TITLES[split_name(name)[1]]})" if METRICS[split_name(name)[0]].readings else ""
        reach = f" [{show(name, r['low'])}, {show(name, r['high'])}]" if r["low"] is not None else ""
        texts = {"metric": header(name) + reading, "published": show(name, r["published"]), "ours": show(name, r["ours"]) + reach}
        shown.append(r | texts | {"secondary": bool(r["secondary"])})
    return shown


def differences(run: Run, summary: dict[str, Any], source: dict[str, Any]) -> list[str]:
    """What of a published setting is not this run's, in words; what the paper does not state is not compared."""
    about = summary["run"]
    stream, model = about.get("stream", {}), about.get("model", {})
    config = about.get("config") or {}
    simulated = "simulated world" in str(stream.get("origin", ""))
    here = f"{stream.get('name', '?')}{', simulated' if simulated else ''}"
    pairs = [
        ("model", source["model"], model.get("name", "?"), _plain(source["model"]) in _plain(str(model.get("name", "")))),
        ("data", source["data"], here, stream.get("name") in source["streams"] and not simulated),
        ("edits", source["edits"], len(run.events), source["edits"] in (None, len(run.events))),
        ("edits a step", source["batch"], config.get("batch", "?"), source["batch"] in (None, config.get("batch"))),
    ]
    out = [f"{what}: {there} there, {ours} here" for what, there, ours, same in pairs if not same]
    out += ["every edit on a fresh model there, in sequence here"] if source["order"] == "single" else []
    return out + ([] if source["reading"] in _READINGS else [f"answers judged there: {source['reading']}"])


def _row(run: Run, summary: dict[str, Any], editor: str, source: dict[str, Any], metric: str, number: float) -> dict[str, Any]:
    entry = summary["editors"][editor][metric]
    base, suffix = split_name(metric)
    if suffix not in SUFFIXES or METRICS[base].unit not in ("share", "difference"):
        raise ValueError(f"published.yaml: {metric!r} of {source['paper']} is no share; only shares are set beside a run")
    numbers = {"published": number / 100, "ours": entry["value"], "low": entry["low"], "high": entry["high"]}
    where = f"{source['paper']}, {source['where']}"
    setting = {"paper": where, "model": source["model"], "data": source["data"], "secondary": source.get("secondary", False)}
    return {"editor": editor, "metric": metric} | numbers | setting | {"differs": "; ".join(differences(run, summary, source))}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
