"""Reorder the edits that a run takes: easy or hard ones first, or those of one subject together.

Ids stay, and the changes of one fact keep their own order, so two orders of one run can be compared edit by edit.
Unlike the order that `streams.transforms` draws, the result depends on how many edits are taken: a longer run is no
extension of a shorter one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from streams import transforms
from streams.base import Stream
from testbed.core.events import EditEvent

Losses = Callable[[Sequence[EditEvent]], Mapping[str, float]]
"""Function from the first event of each fact to the unedited model's loss on its target, by event id."""


def arrange(stream: Stream, events: Sequence[EditEvent], losses: Losses) -> list[EditEvent]:
    """The events in the order of the stream's configuration.

    A dated stream loses its dates in another order: its years are then numbered like those of a schedule, and its
    `time_axis` becomes "scheduled".
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
    if stream.time_axis == "dated":
        stream.time_axis = "scheduled"
        return renumbered(stream, moved)
    return [replace(e, seq=i, time=old.time) for i, (e, old) in enumerate(zip(moved, events))]


def renumbered(stream: Stream, events: Sequence[EditEvent]) -> list[EditEvent]:
    """The events in this order, at the times of a schedule without gaps; events of a dated stream keep their dates."""
    if stream.time_axis == "dated":
        return [replace(e, seq=i) for i, e in enumerate(events)]
    c = stream.config
    times = transforms.calendar(c.edits_per_year, c.bursts, transforms.generator(c.seed, "years"))
    return [replace(e, seq=i, time=t) for i, (e, t) in enumerate(zip(events, times))]


def by_rank(events: Sequence[EditEvent], rank: Mapping[str, float]) -> list[EditEvent]:
    """The events with their facts by rising rank of the first event; `rank` maps the id of a first event to a number.

    The k-th fact by rank begins where the k-th fact began before, and its changes keep their distances from its first
    event. Raises KeyError for a first event without a rank.
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
    """For each event the position of the first event of its fact."""
    at: dict[str, int] = {}
    for i, e in enumerate(events):
        at[e.id] = at[e.revises] if e.revises is not None else i
    return [at[e.id] for e in events]
