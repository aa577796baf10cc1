# pyright: strict
"""The report of a batch from those of the parts in which it was made, and what belongs to a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from testbed.core.events import EditEvent
from testbed.core.schema import EditReport
from testbed.core.timing import NOTE_PREFIX


def joined(report: EditReport, parts: Sequence[EditReport]) -> EditReport:
    """One report of a batch's parts. Seconds are added up; other numbers are those of the last part that was made."""
    made = [p for p in parts if not p.failed]
    notes = dict(made[-1].notes) if made else {}
    notes |= {k: sum(p.notes.get(k, 0.0) for p in made) for k in notes if k.startswith(NOTE_PREFIX)}
    notes |= {"parts": float(len(parts))} if len(parts) > 1 else {}
    failed = {i: reason for p in parts for i, reason in p.failed.items()}
    return replace(report, notes=notes, failed=failed, skipped={i: reason for p in parts for i, reason in p.skipped.items()})


def of_events(events: Sequence[EditEvent], by_id: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a mapping by event id that belong to these events."""
    return {e.id: by_id[e.id] for e in events if e.id in by_id}
