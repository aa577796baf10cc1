"""A source's own names and definitions beside ours, so that a run can be set against the published table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from analysis.metrics.catalogue import METRICS, READING_TITLES, SUFFIXES, split_name

COLUMNS = ("editor", "published name", "published definition", "ours", "our definition", "when", "reading", "value", "low", "high", "n")


def as_published(summary: dict[str, Any]) -> dict[str, str]:
    """File name to content: `as_published.csv`, where the stream says what its source calls things."""
    rows = list(_rows(summary))
    if not rows:
        return {}
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([COLUMNS, *rows])
    return {"as_published.csv": out.getvalue()}


def _rows(summary: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    names = summary["run"].get("stream", {}).get("published_names", {})
    for editor, metrics in summary["editors"].items():
        for ours, (name, definition) in names.items():
            for suffix in SUFFIXES:
                entry = metrics.get(ours + suffix)
                if entry is not None:
                    base, _ = split_name(ours + suffix)
                    reading = READING_TITLES[suffix] if METRICS[base].readings else ""
                    numbers = ("" if entry[k] is None else entry[k] for k in ("value", "low", "high", "n"))
                    when = "right after each edit" if base.endswith("_now") else "at the end of the stream"
                    yield (editor, name, definition, ours + suffix, METRICS[base].title, when, reading, *numbers)
