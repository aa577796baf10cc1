"""A codebook: keys with radii, the one core of the editors that answer near what they were taught.

Every edit is a row: a key, a raw radius, the answer's tokens (its label). Nothing is overwritten. A log of
insertions and removals says which rows are alive, and all else is a function of the alive rows in their
order, so that taking rows out leaves what would be there had they never been put in:

* a later row with another label, where one lies in the other's positive zone, supersedes the earlier row;
* where the balls of two active rows with different labels meet, each is capped in proportion to its raw
  radius: no two overlap, whatever the order of insertion;
* null keys (inputs that no edit is about) silence an edit that is not nearer than they are, unless they lie in
  the positive zone of an active row.

Retrieval is nearest-then-check (GRACE, BalancEdit): the nearest key, the lowest row on a tie, hits when its
distance is at most its radius. Containing-nearest, the nearest of the balls that hold the query, is the other
rule; under the first a small ball punches a hole into a larger one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from testbed.editors.codebook.entry import Entry
from testbed.editors.codebook.nearest import Keys, Metric, Nearest, Rule, to_all
from testbed.editors.codebook.reach import Met, reach

NONE = -1
_SHARE = 1 - 1e-12
_TENSORS = ("raw", "caps", "alive", "superseded", "capped_by", "silenced")


class Codebook:
    """Rows in insertion order, n of them alive or not. All changes make new tensors; old ones stay as they were.

    keys: (n, width) float32. raw, caps: (n,) float64 radii. alive: (n,) bool.
    superseded: (n,) the row that took this one's place, or -1. capped_by: (n,) the row of the binding cap, or -1.
    """

    def __init__(self, width: int, metric: Metric = "euclidean", rule: Rule = "nearest-then-check", nulls: Tensor | None = None) -> None:
        self.width = width
        self.metric: Metric = metric
        self.rule: Rule = rule
        self._clear(torch.zeros(0, width) if nulls is None else nulls)

    def _clear(self, nulls: Tensor, keys: Tensor | None = None) -> None:
        real = torch.zeros(0, dtype=torch.float64)
        self._keys = Keys(torch.zeros(0, self.width) if keys is None else keys, self.metric)
        self._nulls = Keys(nulls, self.metric)
        self.raw, self.caps, self._positive = real, real, real
        self.alive = torch.zeros(0, dtype=torch.bool)
        self.superseded = self.capped_by = self._label = torch.zeros(0, dtype=torch.long)
        self.entries: list[Entry] = []
        self._json: list[list[Any]] = []
        self.log: list[list[Any]] = []
        self.silenced = torch.zeros(len(self.nulls), dtype=torch.long)
        self._labels: dict[tuple[int, ...], int] = {}
        self._row: dict[str, int] = {}
        self._find: dict[torch.device, tuple[Nearest, Nearest]] = {}

    def __len__(self) -> int:
        """Alive rows, superseded ones included."""
        return len(self._row)

    keys = property(lambda self: self._keys.all)
    nulls = property(lambda self: self._nulls.all)

    @property
    def active(self) -> Tensor:
        """(n,) bool: alive and not superseded."""
        return self.alive & (self.superseded == NONE)

    @property
    def radii(self) -> Tensor:
        """(n,) radii in force: raw radii under the caps of conflicting neighbours; -1 for rows that are not active."""
        return torch.where(self.active, torch.minimum(self.raw, self.caps), -1.0)

    def insert(self, key: Tensor, radius: float, entry: Entry) -> list[str]:
        """Add a row, as a member of the entry whose scope it falls into; the edits it supersedes. Raises ValueError for what cannot be."""
        key = self._checked(key, radius, entry)
        d = self._distances(key, radius, entry.positive, self._labels.get(entry.label, NONE))
        near = self._scope(d, radius, entry.label)
        head = self.entry_of(near) if near is not None else None
        self.log = [*self.log, ["insert", len(self.entries)]]
        self._append(key, radius, replace(entry, member_of=head))
        return [self.entries[i].event_id for i in self._enter(len(self.entries) - 1, d)]

    def remove(self, event_ids: Iterable[str]) -> None:
        """Take rows out, at once; a superseded row too. Raises KeyError for an id that is unknown or out already, and changes nothing."""
        ids = sorted(set(event_ids))
        missing = [i for i in ids if i not in self._row]
        if missing:
            raise KeyError(f"no entry of {', '.join(missing)}")
        self.log = [*self.log, ["remove", ids]]
        self._leave([self._row.pop(i) for i in ids])

    def overlapping(self, key: Tensor, radius: float, label: tuple[int, ...]) -> str | None:
        """The edit whose scope a new key falls into: the nearest active row whose ball meets the new one, if it has this label."""
        row = self._scope(self._distances(key.detach().float().cpu(), radius, 0.0, self._labels.get(label, NONE)), radius, label)
        return None if row is None else self.entries[row].event_id

    def _scope(self, d: Tensor, radius: float, label: tuple[int, ...]) -> int | None:
        d = torch.where(self.active & (d <= self.raw + radius), d, torch.inf)
        if not len(d) or not bool(d.isfinite().any()):
            return None
        row = int(d.argmin())
        return row if self.entries[row].label == label else None

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, width) to (B,) the row that fires, or -1, and (B,) the distance that was decisive, on their device."""
        q = queries.detach().float()
        book, nulls = self._search(q.device)
        found = book(q)
        return torch.where(found.distance < nulls(q).distance, found.row, NONE), found.distance

    def entry_of(self, row: int) -> str:
        """The id that a row answers under: of the entry that absorbed it while that one is active, else its own."""
        e = self.entries[row]
        head = self._row.get(e.member_of or "")
        return e.event_id if head is None or self.superseded[head] != NONE else self.entries[head].event_id

    def members(self, event_id: str) -> list[str]:
        """The alive edits that were absorbed by an entry, oldest first."""
        return [e for e, row in self._row.items() if self.entries[row].member_of == event_id]

    def history(self, event_id: str) -> list[str]:
        """The edits whose place this one took, newest first. Raises KeyError for an unknown id."""
        older = (self.superseded == self._row[event_id]) & self.alive
        return [self.entries[i].event_id for i in reversed(older.nonzero()[:, 0].tolist())]

    def as_of(self, step: int) -> Codebook:
        """The codebook as it was after the first `step` operations of its log."""
        if not 0 <= step <= len(self.log):
            raise ValueError(f"the log has {len(self.log)} operations, there is no state after {step}")
        out = Codebook(self.width, self.metric, self.rule, self.nulls)
        for op, what in self.log[:step]:
            if op == "remove":
                out.remove(what)
            else:
                out.insert(self.keys[what], float(self.raw[what]), self.entries[what])
        return out

    def _checked(self, key: Tensor, radius: float, entry: Entry) -> Tensor:
        key = key.detach().float().cpu().reshape(-1)
        if key.shape != (self.width,) or not bool(key.isfinite().all()):
            raise ValueError(f"a key must be {self.width} finite numbers")
        if self.metric == "cosine" and not bool(key.any()):
            raise ValueError("a key of zeros has no direction: it cannot be used with the cosine metric")
        if not 0 <= radius < float("inf") or not 0 <= entry.positive < float("inf"):
            raise ValueError(f"radius and positive distance must be finite and 0 or more, got {radius} and {entry.positive}")
        if entry.event_id in self._row:
            raise ValueError(f"{entry.event_id} is in the codebook already")
        return key

    def _distances(self, key: Tensor, radius: float, positive: float, label: int) -> Tensor:
        """(n,) distances of a key to those of the active rows for which they matter; to the others inf."""
        low, high = self._keys.bounds(key)
        rival, zone = self.active & (self._label != label), self._positive.clamp_min(positive)
        reached = reach(Met(self.active, rival, zone, self.raw + radius, self.caps / self.raw), low, high)
        return self._keys.exact(key, low <= reached)

    def _from(self, row: int) -> Tensor:
        return self._distances(self.keys[row], float(self.raw[row]), float(self._positive[row]), int(self._label[row]))

    def _from_all(self, row: int) -> Tensor:
        """(n,) distances of a row to the alive ones whose balls or positive zones it may meet; to the others inf."""
        meets = torch.maximum(self.raw + self.raw[row], self._positive.clamp_min(float(self._positive[row])))
        return self._keys.within(self.keys[row], torch.where(self.alive, meets, -1.0))

    def _append(self, key: Tensor, radius: float, entry: Entry) -> None:
        """A row that is not yet alive."""
        self._keys.add(key[None])
        self.raw = torch.cat([self.raw, torch.tensor([radius], dtype=torch.float64)])
        self.caps = torch.cat([self.caps, torch.tensor([torch.inf], dtype=torch.float64)])
        self._note(entry)
        none = torch.tensor([NONE])
        self.superseded, self.capped_by = torch.cat([self.superseded, none]), torch.cat([self.capped_by, none])
        self.alive = torch.cat([self.alive, torch.tensor([False])])

    def _note(self, *entries: Entry) -> None:
        self.entries = [*self.entries, *entries]
        self._json = [*self._json, *(e.json() for e in entries)]
        labels = [self._labels.setdefault(e.label, len(self._labels)) for e in entries]
        self._label = torch.cat([self._label, torch.tensor(labels, dtype=torch.long)])
        self._positive = torch.cat([self._positive, torch.tensor([e.positive for e in entries], dtype=torch.float64)])

    def _enter(self, row: int, d: Tensor) -> list[int]:
        """Make the newest row alive; d: (row,) distances to those before it. Returns the rows it supersedes."""
        self._row[self.entries[row].event_id] = row
        self.alive = _set(self.alive, [row], True)
        d = torch.cat([d, torch.zeros(1, dtype=torch.float64)])
        stale = (self.active & self._rivals(row, d)).nonzero()[:, 0].tolist()
        self.superseded = _set(self.superseded, stale, row)
        self._release(stale)
        self._silence(stale, -1)
        self._settle(row, d)
        self._seek()
        return stale

    def _leave(self, rows: list[int]) -> None:
        """Take rows out of the living; what they superseded comes back or passes to the next that supersedes it."""
        self._silence([r for r in rows if bool(self.active[r])], -1)
        gone = torch.tensor(rows)
        self.alive = _set(self.alive, rows, False)
        back = (self.alive & torch.isin(self.superseded, gone)).nonzero()[:, 0].tolist()
        self.superseded = _set(self.superseded, rows, NONE)
        self._release(rows)
        distances = {i: self._from_all(i) for i in back}
        for i, d in distances.items():
            later = (self.alive & self._rivals(i, d))[i:].nonzero()[:, 0]
            self.superseded = _set(self.superseded, [i], i + int(later[0]) if len(later) else NONE)
        for i, d in distances.items():
            if self.superseded[i] == NONE:
                self._settle(i, d)
        self._seek()

    def _seek(self) -> None:
        """Searches from here on go over the active rows, and few others."""
        self._keys.search_among(self.active)
        self._find = {}

    def _rivals(self, row: int, d: Tensor) -> Tensor:
        """(n,) bool: rows with another label of which one lies in the other's positive zone."""
        return (self._label != self._label[row]) & (d <= self._positive.clamp_min(float(self._positive[row])))

    def _shares(self, row: int, d: Tensor) -> Tensor:
        """(n,) the part of their raw radii that a row and each active rival may keep where their balls meet; inf where not."""
        both = self.raw + self.raw[row]
        meets = self.active & (self._label != self._label[row]) & (both > d)
        return torch.where(meets, d / both.clamp_min(torch.finfo(torch.float64).tiny) * _SHARE, torch.inf)

    def _cap(self, row: int, share: Tensor) -> None:
        by = int(share.argmin())
        bound = bool(share[by].isfinite())
        self.caps = _set(self.caps, [row], float(share[by] * self.raw[row]) if bound else torch.inf)
        self.capped_by = _set(self.capped_by, [row], by if bound else NONE)

    def _settle(self, row: int, d: Tensor) -> None:
        """Caps between a row that became active and all others; the nulls that it silences."""
        share = self._shares(row, d)
        tighter = share.isfinite() & (share * self.raw < self.caps)
        self.caps = torch.where(tighter, share * self.raw, self.caps)
        self.capped_by = torch.where(tighter, row, self.capped_by)
        self._cap(row, share)
        self._silence([row], 1)

    def _release(self, gone: list[int]) -> None:
        """Rows that no longer take space: those whose binding cap came from them find their next one."""
        freed = (self.active & torch.isin(self.capped_by, torch.tensor(gone, dtype=torch.long))).nonzero()[:, 0].tolist()
        self.caps, self.capped_by = _set(self.caps, gone, torch.inf), _set(self.capped_by, gone, NONE)
        for i in freed:
            self._cap(i, self._shares(i, self._from(i)))

    def _silence(self, rows: list[int], sign: int) -> None:
        """Count the nulls in the positive zones of rows in or out: a counted null does not speak."""
        for i in rows if len(self.nulls) else []:
            self.silenced = self.silenced + sign * (to_all(self.nulls, self.keys[i], self.metric) <= self._positive[i])

    def _search(self, device: torch.device) -> tuple[Nearest, Nearest]:
        """The active rows, and the nulls that speak, ready for search."""
        if device not in self._find:
            book = Nearest(self._keys.on(device), self.radii.to(device), self.rule)
            speaks = torch.where(self.silenced == 0, torch.inf, -1.0).double()
            self._find[device] = book, Nearest(self._nulls.on(device), speaks.to(device))
        return self._find[device]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "nulls": self.nulls, **{name: getattr(self, name) for name in _TENSORS}}

    def state(self) -> dict[str, Any]:
        """Tensors and JSON values that make the codebook again."""
        return {**self._tensors(), "entries": list(self._json), "log": self.log, "metric": self.metric, "rule": self.rule}

    def load(self, state: dict[str, Any]) -> None:
        """The reverse of `state`; the caller has checked that it fits."""
        self._clear(state["nulls"], state["keys"])
        for name in _TENSORS:
            setattr(self, name, state[name])
        self._note(*map(Entry.of, state["entries"]))
        self._row = {self.entries[i].event_id: i for i in self.alive.nonzero()[:, 0].tolist()}
        self.log = [list(op) for op in state["log"]]
        self._seek()


def _set(t: Tensor, rows: list[int], value: Any) -> Tensor:
    """A copy with some rows changed."""
    if not rows:
        return t
    out = t.clone()
    out[rows] = value
    return out
