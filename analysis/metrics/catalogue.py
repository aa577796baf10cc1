"""Titles, units and directions of the metrics of summary.json. See docs/semantics.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from analysis.reading.records import SCORING_MODES, TOKEN_ACCURACY, ScoringMode
from testbed.core import registry

Unit = Literal["share", "difference", "ratio", "bits", "count", "edits", "seconds", "bytes"]


@dataclass(frozen=True)
class Metric:
    """A metric's long and short title, unit and direction.

    better: 1 where larger values are better, -1 where smaller ones are, 0 where neither is. modes: true for a metric with
    a variant for each scoring mode.
    """

    title: str
    short: str
    unit: Unit
    better: int
    modes: bool = False


_TABLES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
KINDS: dict[str, str] = _TABLES["kinds"]
"""Split to words of each kind of generality and locality."""
MAIN = tuple(_TABLES["main"])
"""Metrics of the main table, in order of display."""
METRICS = {name: Metric(**fields) for table in ("main", "others") for name, fields in _TABLES[table].items()}
"""The metrics of the testbed itself, in order of display."""
for _name in METRICS:
    registry.METRICS.refuse(_name, "the testbed has a metric of this name; rename yours")
GENERALITY = tuple(k for k in KINDS if k.endswith("generality"))
LOCALITY = tuple(k for k in KINDS if k.startswith("locality"))


def every_metric() -> dict[str, Metric]:
    """The metrics of the testbed, and behind them those that plug-ins registered (`analysis.metrics.plugin`), by name."""
    return METRICS | {name: Metric(c.summary, c.short, c.unit, c.better, c.modes) for name, c in registry.METRICS.items()}


def main_metrics() -> tuple[str, ...]:
    """Names of the metrics of the main table; those of plug-ins are the last."""
    return MAIN + tuple(name for name, cls in registry.METRICS.items() if cls.main)


def split_name(name: str) -> tuple[str, ScoringMode]:
    """A name of summary.json as the metric's name and its scoring mode (token accuracy where the metric has no modes)."""
    known = every_metric()
    for mode in SCORING_MODES:
        if mode.suffix and name not in known and name.endswith(mode.suffix) and name.removesuffix(mode.suffix) in known:
            return name.removesuffix(mode.suffix), mode
    return name, TOKEN_ACCURACY


def metric_of(name: str) -> Metric:
    """The metric behind a name of summary.json, whatever its scoring mode."""
    return every_metric()[split_name(name)[0]]


def mode_title(name: str) -> str:
    """The scoring mode in the name of a metric; empty where the metric has no modes."""
    return split_name(name)[1].title if metric_of(name).modes else ""


def show(name: str, value: float) -> str:
    """A value for a reader: shares and differences in per cent, bytes and counts in plain units."""
    unit = metric_of(name).unit
    if unit == "share":
        return f"{100 * value:.1f}"
    if unit == "difference":
        return f"{100 * value:.1f}".replace("-", "−").replace("−0.0", "0.0")
    return _plain(value, unit)


def shown(name: str, entry: Mapping[str, Any] | None) -> str:
    """An entry's value for a reader: a dash where it was not measured, else the value, "never", or what it is in place of a number."""
    if entry is None:
        return "–"
    return show(name, entry["value"]) if entry["value"] is not None else entry.get("kind", "never")


def show_briefly(name: str, value: float) -> str:
    """An end of an interval in few digits, for a terminal."""
    unit = metric_of(name).unit
    if unit in ("share", "difference"):
        return f"{100 * value:.0f}".replace("-", "−").replace("−0", "0")
    return f"{value:.2g}" if unit in ("ratio", "bits") else show(name, value)


def _plain(value: float, unit: Unit) -> str:
    if unit == "bytes":
        return human_bytes(value)
    if unit == "seconds":
        return f"{value:.3g} s" if value >= 0.1 or value == 0 else f"{1000 * value:.3g} ms"
    return f"{value:.3f}" if unit in ("ratio", "bits") and value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.2g}"


def human_bytes(value: float) -> str:
    """Bytes in decimal units with three significant digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def unit_of(name: str) -> str:
    """The unit for a metric's title; empty where the values carry their unit or have none."""
    return {"share": "%", "difference": "points", "ratio": "×", "bits": "bits", "edits": "edits"}.get(metric_of(name).unit, "")


def header(name: str) -> str:
    """Short title with unit."""
    title, unit = metric_of(name).short, unit_of(name)
    return f"{title} ({unit})" if unit else title


def wrapped(name: str, width: int) -> list[str]:
    """An editor's name in lines of at most `width` characters, broken at its bracket and commas, and where that is not enough
    at plus, colon and equals signs."""
    if len(name) <= width:
        return [name]
    parts = [[p] if len(p) <= width else re.split(r"(?==)|(?<=[+:])", p) for p in re.split(r"(?=\[)|(?<=,)", name)]
    first, *rest = (piece for part in parts for piece in part)
    lines = [first]
    for piece in rest:
        fits = len(lines[-1] + piece) <= width and not piece.startswith("[")
        lines = [*lines[:-1], lines[-1] + piece] if fits else [*lines, piece]
    return lines
