"""The fact store: edits as facts, each with its history of versions.

The store is a log of versions and the rows of the log that were withdrawn; everything else follows from these two. A
revision of a fact, or another edit of the same fact, supersedes its version; withdrawing a version brings back the
one before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from testbed.core.events import EditEvent, content_id
from testbed.editors.retrieval.prompts import statement


class Version(NamedTuple):
    """One value of one fact."""

    event_id: str
    entry: int
    """Number of the fact, which its versions share."""
    since: int
    """Step of the edit that stated it."""
    prompt: str
    target: str
    key: str
    """Hash of the fact that the edit changes (`EditEvent.fact`)."""

    @property
    def statement(self) -> str:
        """The fact as one sentence, as prompts state it and as it is compared with questions."""
        return statement(self.prompt, self.target)


class FactStore:
    """Facts by entry, as of now and as of any past step.

    Args:
        log: versions in the order in which they were stated; a version's index in the log is its row.
        gone: row of a withdrawn version -> step from which it no longer counts.
    """

    def __init__(self, log: Iterable[Version] = (), gone: dict[int, int] | None = None) -> None:
        self.log: list[Version] = []
        self.gone: dict[int, int] = dict(gone or {})
        self.bytes = 0
        self._entry: dict[str, int] = {}
        self._row: dict[str, int] = {}
        self._rows: list[list[int]] = []
        self._alive = bytearray()
        for version in log:
            self._append(version)

    def add(self, event: EditEvent, step: int) -> int:
        """State a fact; returns the row of its new version, which supersedes the one before it."""
        key = content_id("fact", *event.fact)
        known = self._row.get(event.revises) if event.revises else None
        entry = self.log[known].entry if known is not None else self._entry.get(key, len(self._rows))
        self._append(Version(event.id, entry, step, event.prompt, event.target, key))
        return len(self.log) - 1

    def withdraw(self, event_id: str, step: int) -> None:
        """Take a version back as of `step`. Raises KeyError for one that is not in the store or was withdrawn before."""
        row = self._row.get(event_id)
        if row is None or row in self.gone:
            raise KeyError(event_id)
        self.gone[row] = step
        self._mark_alive(self.log[row].entry)

    def rows_with(self, event_id: str) -> list[int]:
        """Rows of all versions of the fact that an event once stated, oldest first; none for an unknown event."""
        row = self._row.get(event_id)
        return list(self._rows[self.log[row].entry]) if row is not None else []

    def alive(self, step: int | None = None) -> np.ndarray:
        """(versions,) bool: the versions that hold now, or that held after a past step; at most one for each fact."""
        if step is None:
            return np.array(self._alive, bool)
        newest: dict[int, int] = {}
        for row, version in enumerate(self.log):
            if version.since <= step and self.gone.get(row, step + 1) > step:
                newest[version.entry] = row
        out = np.zeros(len(self.log), bool)
        out[list(newest.values())] = True
        return out

    def _append(self, version: Version) -> None:
        row = len(self.log)
        if version.entry == len(self._rows):
            self._rows.append([])
        self.log.append(version)
        self._rows[version.entry].append(row)
        self._entry[version.key] = version.entry
        self._row[version.event_id] = row
        self.bytes += sum(len(text.encode()) for text in (version.event_id, version.prompt, version.target, version.key))
        self._alive.append(False)
        self._mark_alive(version.entry)

    def _mark_alive(self, entry: int) -> None:
        """Of the versions of a fact, mark the newest that was not withdrawn."""
        newest = next((row for row in reversed(self._rows[entry]) if row not in self.gone), None)
        for row in self._rows[entry]:
            self._alive[row] = row == newest
