"""What an edit and a question cost late in a stream against early, read from the reports and answers of a run that was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.dataset as ds

from testbed.core.schema import folder_name
from testbed.core.timing import NOTE_PREFIX
from testbed.storage.files import StoreError, read_json

HELD = ("entries", "facts", "past_keys", "memory")
"""Numbers of a report that say how much a method searches or solves over; the first that is there is shown."""
_WINDOW = 100
"""Edits up to a point over which a cost is taken."""


@dataclass(frozen=True)
class Cost:
    """One editor at one point of its stream. Times are wall times of the last 100 edits up to here."""

    editor: str
    edits: int
    milliseconds: float
    """Of an edit: the median."""
    times_first: float
    """That, over the cost at the first point asked for."""
    stages: str
    """Milliseconds of an edit by stage, medians too, the dearest first; what no stage names is left out."""
    question_milliseconds: float | None
    """Mean over the questions asked; absent where none was."""
    entries: float | None
    """Entries, facts or past keys; absent where the method tells none."""
    state_bytes: int


@dataclass(frozen=True)
class Whole:
    """Where the minutes of an editor's run went."""

    editor: str
    edits: int
    questions: int
    edit_minutes: float
    question_minutes: float
    peak_bytes: int


def costs(run: Path, points: Sequence[int]) -> list[Cost]:
    """A line an editor and point that its reports reach. Raises `StoreError` for a folder that is no run, or too short for any."""
    out = [c for name in read_json(run / "manifest.json")["editors"] for c in _of_editor(run / folder_name(name), name, points)]
    if not out:
        raise StoreError(f"no editor of {run} has made {min(points)} edits: choose smaller --at, or a longer run")
    return out


def wholes(run: Path) -> list[Whole]:
    """A line an editor that has made an edit. Raises `StoreError` for a folder that is no run."""
    return [w for name in read_json(run / "manifest.json")["editors"] for w in _whole(run / folder_name(name), name)]


def _of_editor(folder: Path, name: str, points: Sequence[int]) -> Iterator[Cost]:
    lines, asked, first = _reports(folder), _seconds_asked(folder), None
    made = _cumulated(lines)
    for point in points:
        if not made or made[-1] < point:
            continue
        near = [x for x, n in zip(lines, made) if point - _WINDOW < n <= point] or [lines[0]]
        now = _median(near, {"edit": [x["seconds"] for x in near]})["edit"]
        first = first or now
        held = next((near[-1]["notes"][k] for k in HELD if k in near[-1]["notes"]), None)
        counts, seconds = zip(*(asked.get(x["step"], (0, 0.0)) for x in near))
        question = 1000 * sum(seconds) / sum(counts) if sum(counts) else None
        yield Cost(name, point, now, now / first, _stages(near), question, held, near[-1]["state_bytes"])


def _whole(folder: Path, name: str) -> Iterator[Whole]:
    lines, asked = _reports(folder), _seconds_asked(folder)
    if lines:
        edits, questions = _cumulated(lines)[-1], sum(n for n, _ in asked.values())
        minutes = sum(x["seconds"] for x in lines) / 60, sum(s for _, s in asked.values()) / 60
        yield Whole(name, edits, questions, *minutes, max(x["peak_bytes"] for x in lines))


def _stages(near: Sequence[dict[str, Any]]) -> str:
    names = dict.fromkeys(k for x in near for k in x["notes"] if k.startswith(NOTE_PREFIX))
    found = _median(near, {k.removeprefix(NOTE_PREFIX): [x["notes"].get(k, 0.0) for x in near] for k in names})
    return ", ".join(f"{k} {found[k]:.1f}" for k in sorted(found, key=found.__getitem__, reverse=True))


def _median(near: Sequence[dict[str, Any]], seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Milliseconds of an edit, from seconds of its step."""
    sizes = [max(1, len(x["event_ids"])) for x in near]
    return {k: 1000 * median(s / n for s, n in zip(v, sizes)) for k, v in seconds.items()}


def _reports(folder: Path) -> list[dict[str, Any]]:
    path = folder / "edits.jsonl"
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _seconds_asked(folder: Path) -> dict[int, tuple[int, float]]:
    """Questions and their seconds by step."""
    parts = sorted((folder / "records").glob("*.parquet"))
    if not parts:
        return {}
    table = ds.dataset(parts, format="parquet").to_table(columns=["probe_step", "seconds"])
    steps = table.group_by("probe_step").aggregate([("seconds", "count"), ("seconds", "sum")])
    return {r["probe_step"]: (r["seconds_count"], r["seconds_sum"]) for r in steps.to_pylist()}


def _cumulated(lines: Sequence[dict[str, Any]]) -> list[int]:
    """Edits made up to each report, itself included."""
    out, n = [], 0
    for x in lines:
        n += len(x["event_ids"])
        out.append(n)
    return out
