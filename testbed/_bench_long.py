"""What an edit costs late in a stream against early, read from the reports of a run that was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from testbed.files import StoreError, read_json
from testbed.schema import folder_name

HELD = ("entries", "facts", "past_keys", "memory")
"""Numbers of a report that say how much a method searches or solves over; the first that is there is shown."""
_WINDOW = 100
"""Edits up to a point over which the cost is a median."""


@dataclass(frozen=True)
class Cost:
    """One editor at one point of its stream."""

    editor: str
    edits: int
    milliseconds: float
    """Median of the last 100 edits up to here."""
    times_first: float
    """That, over the cost at the first point asked for."""
    entries: float | None
    """Entries, facts or past keys; absent where the method tells none."""
    state_bytes: int


def costs(run: Path, points: Sequence[int]) -> list[Cost]:
    """A line an editor and point that its reports reach. Raises `StoreError` for a folder that is no run, or too short for any."""
    out = [c for name in read_json(run / "manifest.json")["editors"] for c in _of_editor(run, name, points)]
    if not out:
        raise StoreError(f"no editor of {run} has made {min(points)} edits: choose smaller --at, or a longer run")
    return out


def _of_editor(run: Path, name: str, points: Sequence[int]) -> Iterator[Cost]:
    path, first = run / folder_name(name) / "edits.jsonl", None
    lines = [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    made = _cumulated(lines)
    for point in points:
        if not made or made[-1] < point:
            continue
        near = [x for x, n in zip(lines, made) if point - _WINDOW < n <= point] or [lines[0]]
        now = 1000 * median(x["seconds"] / max(1, len(x["event_ids"])) for x in near)
        first = first or now
        held = next((near[-1]["notes"][k] for k in HELD if k in near[-1].get("notes", {})), None)
        yield Cost(name, point, now, now / first, held, near[-1]["state_bytes"])


def _cumulated(lines: Sequence[dict[str, Any]]) -> list[int]:
    """Edits made up to each report, itself included."""
    out, n = [], 0
    for x in lines:
        n += len(x["event_ids"])
        out.append(n)
    return out
