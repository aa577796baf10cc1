"""Another order of the edits that a run takes: easy or hard ones first, or those of one subject together.

The same edits come in another order, so two orders of one run can be compared edit by edit: ids stay, and the
changes of one fact stay in their own order. Unlike what `streams.transforms` draws, the result depends on how
many edits are taken: a longer run is no extension of a shorter one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from streams import transforms
from streams.base import Stream
from testbed.core.events import EditEvent

Losses = Callable[[Sequence[EditEvent]], Mapping[str, float]]
"""For the first event of each fact: what the unedited model loses on its target, by event id."""


def arrange(stream: Stream, events: Sequence[EditEvent], losses: Losses) -> list[EditEvent]:
    """The events in the order that the stream's configuration asks for.

    A dated stream that is put in another order loses its dates: its years are then numbered like those of a
    schedule, and its `time_axis` becomes "scheduled".
    """
    order = stream.config.order
    if order == "drawn":
        return list(events)
    if order == "subjects":
        moved = by_subject(events)
    else:
        loss_of = losses([e for e in events if e.revises is None])
        sign = -1 if order == "hardest" else 1
        moved = by_rank(events, {name: sign * loss for name, loss in loss_of.items()})
    times: Iterable[float] = (e.time for e in events)
    if stream.time_axis == "dated":
        stream.time_axis = "scheduled"
        c = stream.config
        times = transforms.calendar(c.edits_per_year, c.bursts, transforms.generator(c.seed, "years"))
    return [replace(e, seq=i, time=t) for i, (e, t) in enumerate(zip(moved, times))]


def by_rank(events: Sequence[EditEvent], rank: Mapping[str, float]) -> list[EditEvent]:
    """Facts by rising rank of their first event (an id to a number).

    The k-th fact begins about where the k-th fact began, and its changes keep their distances from that.
    Raises KeyError for a first event without a rank.
    """
    first = _first_positions(events)
    additions = [i for i, e in enumerate(events) if e.revises is None]
    ranked = sorted(additions, key=lambda i: (rank[events[i].id], events[i].id))
    moved = dict(zip(ranked, additions))
    order = sorted(range(len(events)), key=lambda i: (moved[first[i]] + i - first[i], i))
    return [events[i] for i in order]


def by_subject(events: Sequence[EditEvent]) -> list[EditEvent]:
    """All events of one subject one after another, subjects in order of first mention; a fact without subject is its own."""
    first = _first_positions(events)
    mention: dict[str, int] = {}
    for i, e in enumerate(events):
        mention.setdefault(e.subject or events[first[i]].id, i)
    order = sorted(range(len(events)), key=lambda i: (mention[events[i].subject or events[first[i]].id], i))
    return [events[i] for i in order]


def _first_positions(events: Sequence[EditEvent]) -> list[int]:
    """For each event the position of its fact's first one."""
    at: dict[str, int] = {}
    for i, e in enumerate(events):
        at[e.id] = at[e.revises] if e.revises is not None else i
    return [at[e.id] for e in events]
