"""Numbers of papers beside a run, with the differences between their settings.

published.yaml holds the numbers with their sources. A number beside a run is no claim of a reproduction.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from analysis.metrics.catalogue import metric_of
from analysis.reading.load import Run

_OUR_MODES = ("token", "exact", "gen", "choice")
"""Values of `scoring` in published.yaml that are ours too: scoring modes, and the comparison of two answers."""


@cache
def sources() -> tuple[dict[str, Any], ...]:
    """The entries of published.yaml."""
    return tuple(yaml.safe_load((Path(__file__).parent / "published.yaml").read_text("utf-8"))["sources"])


def rows(run: Run, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each published number of an editor of the run whose metric the run measured, by editor, best match first.

    `published`, `ours`, `low`, `high` are in the summary's units (shares as fractions). `differs` lists the settings that
    differ and is empty where everything that the paper states matches.
    """
    out: list[dict[str, Any]] = []
    for editor, measured in summary["editors"].items():
        name = re.sub(r"\[[^]]*\]", "", editor)
        numbers = [(s, m, x) for s in sources() for m, x in zip(s["metrics"], s["rows"].get(name) or ()) if x is not None and m in measured]
        own = [_row(run, summary, editor, *n) for n in numbers]
        out += sorted(own, key=lambda r: r["differs"].count(";") + bool(r["differs"]))
    return out


def differences(run: Run, summary: dict[str, Any], source: dict[str, Any]) -> list[str]:
    """Differences between a published setting and this run's, in words; settings that the paper does not state are skipped."""
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
    return out + ([] if source["scoring"] in _OUR_MODES else [f"answers judged there: {source['scoring']}"])


def _row(run: Run, summary: dict[str, Any], editor: str, source: dict[str, Any], metric: str, number: float) -> dict[str, Any]:
    entry = summary["editors"][editor][metric]
    if metric_of(metric).unit not in ("share", "difference"):
        raise ValueError(f"published.yaml: {metric!r} of {source['paper']} is no share; only shares are set beside a run")
    numbers = {"published": number / 100, "ours": entry["value"], "low": entry["low"], "high": entry["high"]}
    where = f"{source['paper']}, {source['where']}"
    setting = {"paper": where, "model": source["model"], "data": source["data"], "secondary": source.get("secondary", False)}
    return {"editor": editor, "metric": metric} | numbers | setting | {"differs": "; ".join(differences(run, summary, source))}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
