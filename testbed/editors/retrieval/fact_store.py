"""Edits as a store of facts: one entry a fact, with its history.

The store is a log of versions and a list of what was withdrawn; everything else follows from these two. A
revision, or another edit of the same fact, supersedes; withdrawing a version brings back the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from testbed.core.events import EditEvent, content_id


class UnknownFact(KeyError):
    """An event id that no live version has."""


class Version(NamedTuple):
    """One value of one fact."""

    event_id: str
    entry: int
    """Number of the fact; its versions share it."""
    since: int
    """Step at which it was stated."""
    prompt: str
    target: str
    key: str
    """Hash of what the edit says it changes (`EditEvent.fact`)."""


class FactStore:
    """Facts by entry, as of now and as of any past step.

    Args:
        log: versions in the order in which they were stated; a version's place is its row.
        gone: row of a withdrawn version -> step from which it no longer counts.
    """

    def __init__(self, log: Iterable[Version] = (), gone: dict[int, int] | None = None) -> None:
        self.log: list[Version] = []
        self.gone: dict[int, int] = dict(gone or {})
        self.bytes = 0
        self._entry: dict[str, int] = {}
        self._row: dict[str, int] = {}
        self._rows: list[list[int]] = []
        for version in log:
            self._append(version)

    def add(self, event: EditEvent, step: int) -> int:
        """State a fact; returns the row of its new version, which supersedes what its entry held."""
        key = content_id("fact", *event.fact)
        known = self._row.get(event.revises) if event.revises else None
        entry = self.log[known].entry if known is not None else self._entry.get(key, len(self._rows))
        self._append(Version(event.id, entry, step, event.prompt, event.target, key))
        return len(self.log) - 1

    def withdraw(self, event_id: str, step: int) -> int:
        """Take a version back as of `step`; returns its row. Raises `UnknownFact` where it is not there."""
        row = self._row.get(event_id)
        if row is None or row in self.gone:
            raise UnknownFact(event_id)
        self.gone[row] = step
        return row

    def row_of(self, entry: int) -> int | None:
        """Row of the version that an entry has now; None where all were withdrawn."""
        return next((row for row in reversed(self._rows[entry]) if row not in self.gone), None)

    def rows_of(self, entry: int) -> list[int]:
        """Rows of all versions of a fact, in order."""
        return list(self._rows[entry])

    def rows_with(self, event_id: str) -> list[int]:
        """Rows of all versions of the fact that an event once stated, in order; none for an unknown event."""
        row = self._row.get(event_id)
        return self.rows_of(self.log[row].entry) if row is not None else []

    def rows_as_of(self, step: int) -> list[int]:
        """Rows of the versions that held after `step`, one a fact."""
        held = {}
        for row, version in enumerate(self.log):
            if version.since <= step and self.gone.get(row, step + 1) > step:
                held[version.entry] = row
        return list(held.values())

    def as_of(self, step: int) -> dict[int, Version]:
        """Entry -> the version it had after `step`."""
        return {self.log[row].entry: self.log[row] for row in self.rows_as_of(step)}

    def _append(self, version: Version) -> None:
        row = len(self.log)
        if version.entry == len(self._rows):
            self._rows.append([])
        self.log.append(version)
        self._rows[version.entry].append(row)
        self._entry[version.key] = version.entry
        self._row[version.event_id] = row
        self.bytes += sum(len(text.encode()) for text in (version.event_id, version.prompt, version.target, version.key))
