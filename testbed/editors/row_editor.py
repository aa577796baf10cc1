"""Editors whose change of the weights follows from rows that each edit leaves, so that an edit can be taken out again.

A row is a pair (h, g) at every edited matrix: what stands on its input side (f numbers) and on its output side (d numbers). A
method says which rows an edit leaves and which change rows make that were added together; the rows alone are the state. An edit
whose rows are removed leaves what the remaining rows give, in the same steps and the same order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testbed.core.events import EditBatch, EditEvent
from testbed.core.timing import timed
from testbed.editors.adapters.lowrank import TargetModule
from testbed.editors.base import BadEditor, WeightEditor, appended, need, require_same
from testbed.model.handle import as_stored


@dataclass(frozen=True)
class Rows:
    """h (n, f) and g (n, d) by target, float32; owner: the event of each row."""

    h: tuple[Tensor, ...]
    g: tuple[Tensor, ...]
    owner: tuple[str, ...]

    def part(self, first: int, stop: int) -> Rows:
        """The rows from `first` to `stop` - 1."""
        return Rows(tuple(t[first:stop] for t in self.h), tuple(t[first:stop] for t in self.g), self.owner[first:stop])


class RowEditor(WeightEditor):
    """Rows of every edit at the target modules, and the weights that follow from them.

    A method calls `_start` in `_prepare`, and gives `_rows_of` and `_changes_of`. `sizes` holds how many rows were added together.
    """

    targets: list[TargetModule]
    rows: Rows
    sizes: tuple[int, ...]
    changes: tuple[Tensor, ...]
    """(d, f) float64 by target."""

    def _start(self, targets: list[TargetModule]) -> None:
        """Begin without a row, at these targets."""
        self.targets = targets
        self.bases = tuple(self.handle.parameter(t.weight).detach().float() for t in targets)
        self.sizes: tuple[int, ...] = ()
        self.rows = self._none()
        self._rebuild()

    @abstractmethod
    def _rows_of(self, events: Sequence[EditEvent]) -> Rows:
        """The rows that these edits leave under the weights as they are. Raises `EditFailed`."""

    @abstractmethod
    def _changes_of(self, rows: Rows) -> Sequence[Tensor]:
        """(d, f) by target, what rows that are added together change, behind all that were added before. Raises `EditFailed`."""

    def _restart(self) -> None:
        """Forget what a method keeps beside the rows and makes of them, before all rows are added again."""

    def _none(self) -> Rows:
        h, g = (tuple(torch.zeros(0, getattr(t, n), device=b.device) for t, b in zip(self.targets, self.bases)) for n in ("f", "d"))
        return Rows(h, g, ())

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        return {"tokens": float(self._add(batch.events))}

    def _add(self, events: Sequence[EditEvent]) -> int:
        """Make these edits together; how many rows they left."""
        new = self._rows_of(events)
        self._take(new)
        self.rows, self.sizes = self._grown(new), (*self.sizes, len(new.owner))
        return len(new.owner)

    def _grown(self, new: Rows) -> Rows:
        """All rows with the new ones; what was handed out before does not change."""
        h = tuple(self._longer(f"h.{i}", old, rows) for i, (old, rows) in enumerate(zip(self.rows.h, new.h)))
        g = tuple(self._longer(f"g.{i}", old, rows) for i, (old, rows) in enumerate(zip(self.rows.g, new.g)))
        return Rows(h, g, (*self.rows.owner, *new.owner))

    def _longer(self, name: str, old: Tensor, rows: Tensor) -> Tensor:
        self._buffers[name] = appended(self._buffers.get(name, old), len(old), rows)
        return self._buffers[name][: len(old) + len(rows)]

    @timed("solve")
    def _take(self, rows: Rows) -> None:
        """Add the change of these rows to the weights."""
        self.changes = tuple(done + more for done, more in zip(self.changes, self._changes_of(rows)))

    def _rebuild(self) -> None:
        """The weights from the rows."""
        self._buffers: dict[str, Tensor] = {}
        self._restart()
        self.changes = tuple(torch.zeros(t.d, t.f, dtype=torch.float64, device=b.device) for t, b in zip(self.targets, self.bases))
        at = 0
        for n in self.sizes:
            self._take(self.rows.part(at, at + n))
            at += n

    def revert(self, event_ids: Iterable[str]) -> None:
        """Remove the rows of these edits: what is left is what the other rows give. Raises `BadEditor` for an unknown id."""
        gone, at, sizes = set(event_ids), 0, []
        if unknown := gone - set(self.rows.owner):
            raise BadEditor(f"{self.name} made no edit {', '.join(sorted(unknown))}")
        for n in self.sizes:
            sizes.append(sum(own not in gone for own in self.rows.owner[at : at + n]))
            at += n
        kept = torch.tensor([i for i, own in enumerate(self.rows.owner) if own not in gone], dtype=torch.long)
        h, g = (tuple(t[kept.to(t.device)] for t in side) for side in (self.rows.h, self.rows.g))
        self.rows = Rows(h, g, tuple(own for own in self.rows.owner if own not in gone))
        self.sizes = tuple(n for n in sizes if n)
        self._rebuild()

    def edited_weights(self) -> dict[str, Tensor]:
        return {t.weight: b + as_stored(t.module, c).to(b.dtype) for t, b, c in zip(self.targets, self.bases, self.changes)}

    def _own(self) -> dict[str, Any]:
        return {"model": self.handle.hash, "modules": [t.name for t in self.targets]}

    def _state(self) -> dict[str, Any]:
        rows = {f"{name}.{i}": t for name, side in (("h", self.rows.h), ("g", self.rows.g)) for i, t in enumerate(side)}
        return {**rows, "owners": list(self.rows.owner), "sizes": list(self.sizes), **self._own()}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())
        owner = tuple(state["owners"])
        h = (need(state, f"h.{i}", (len(owner), t.f)).to(b.device) for i, (t, b) in enumerate(zip(self.targets, self.bases)))
        g = (need(state, f"g.{i}", (len(owner), t.d)).to(b.device) for i, (t, b) in enumerate(zip(self.targets, self.bases)))
        self.rows, self.sizes = Rows(tuple(h), tuple(g), owner), tuple(state["sizes"])
        self._rebuild()
