"""The schedule as a small plot for a terminal: edits a year, by kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count

from rich.table import Table
from rich.text import Text

from testbed.core.events import KINDS, EditEvent

ROWS, WIDTH = 16, 48
"""Most rows, and the longest bar in characters."""
_MARKS = {"add": "█", "revise": "▓", "revert": "▒", "retire": "░"}
_STYLES = {"add": "blue", "revise": "yellow", "revert": "magenta", "retire": "red"}


def timeline(events: Sequence[EditEvent], axis: str) -> Table:
    """A bar for each year or span of years, its parts by kind; spans that hold nothing are shown as such.

    events: one or more, in order of time. axis: what the years are ("dated", "scheduled", "simulated").
    """
    first, last = events[0].year, events[-1].year
    span = next(s for s in _spans() if last // s - first // s < ROWS)
    rows = {start: Counter[str]() for start in range(first - first % span, last + 1, span)}
    for e in events:
        rows[e.year - e.year % span][e.kind] += 1
    most = max(c.total() for c in rows.values())
    kinds = [k for k in KINDS if any(c[k] for c in rows.values())]
    table = Table(title=f"Edits by year ({axis})", title_justify="left", caption_justify="left", box=None, show_header=False)
    table.caption = "   ".join(f"{_MARKS[k]} {k}" for k in kinds)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for start, counts in rows.items():
        label = str(start) if span == 1 else f"{start}-{min(start + span, last + 1) - 1}"
        table.add_row(label, f"{counts.total():,}", _bar(counts, most))
    return table


def _spans() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ... without end."""
    yield from (step * 10**power for power in count() for step in (1, 2, 5))


def _bar(counts: Counter[str], most: int) -> Text:
    """Kinds side by side; ends are rounded, so that the whole is as long as its total says."""
    bar, done, drawn = Text(), 0, 0
    for kind in KINDS:
        done += counts[kind]
        end = math.ceil(WIDTH * done / most)
        bar.append(_MARKS[kind] * (end - drawn), _STYLES[kind])
        drawn = end
    return bar
