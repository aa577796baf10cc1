"""A codebook: keys with radii, the core of the editors that answer for prompts near an edit's.

Every edit is a row: a key, a raw radius, and the answer's tokens (its label). Nothing is overwritten. A log of
insertions and removals says which rows are alive, and everything else is a function of the alive rows in their
order, so that a removal leaves what would be there if the rows had never been inserted:

* a later row supersedes an earlier one with another label if one of the two keys lies in the other's positive radius;
* where the balls of two active rows (alive and not superseded) with different labels meet, each is capped in
  proportion to its raw radius, so that no two overlap, whatever the order of insertion;
* null keys (inputs that no edit is about) silence an edit that is not nearer than they are, unless they lie in
  the positive radius of an active row.

Retrieval is nearest-then-check (GRACE, BalancEdit): the nearest key, the lowest row on a tie, hits when its
distance is at most its radius. The other rule is containing-nearest: the nearest of the balls that hold the query.
Under the first rule a small ball punches a hole into a larger one.

What an insertion needs to know of a new ball (which row is nearest, which are superseded, whose cap becomes tighter,
which of its own caps binds) depends on few distances, and `distance_bounds` tells which. Where all balls meet, as they
do at BalancEdit's published settings, an insertion among 20,000 rows 512 wide takes 7 ms with it and 100 ms without.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from testbed.editors.codebook.nearest import Keys, Metric, Nearest, Rule, to_all

NONE = -1
_SHARE = 1 - 1e-12
"""What two balls that meet keep of the distance of their keys: less than all, so that rounding never makes them overlap."""
_MARGIN = 1 + 1e-9
"""More than float64 loses in a quotient."""
_TENSORS = ("raw", "caps", "alive", "superseded", "capped_by", "silenced")


@dataclass(frozen=True)
class Entry:
    """What a codebook knows of an edit's row besides its key and radius."""

    event_id: str
    label: tuple[int, ...]
    """The answer's tokens."""
    separable: bool = True
    """The positive anchor is nearer to the key than the negative one."""
    positive: float = 0.0
    """Positive radius: the distance of the farthest positive anchor, within which the entry must answer."""
    member_of: str | None = None
    """The older entry with the same label whose scope it fell into when it was inserted."""

    def json(self) -> list[Any]:
        """The fields in their order, as JSON holds them."""
        return [list(x) if isinstance(x, tuple) else x for x in astuple(self)]

    @staticmethod
    def of(json: list[Any]) -> Entry:
        """The entry that `json` was made from."""
        event_id, label, *rest = json
        return Entry(event_id, tuple(label), *rest)


def distance_bounds(
    active: Bool[Tensor, " n"],
    rival: Bool[Tensor, " n"],
    positive: Float64[Tensor, " n"],
    both: Float64[Tensor, " n"],
    cap: Float64[Tensor, " n"],
    low: Float64[Tensor, " n"],
    high: Float64[Tensor, " n"],
) -> Float64[Tensor, " n"]:
    """(n,) float64 distances beyond which rows do not matter to a ball; negative for rows that never matter.

    active: (n,) bool. rival: (n,) bool, active with another label. positive: (n,) the distance within which the row or the ball
    supersedes the other. both: (n,) the sum of their raw radii, within which they meet. cap: (n,) the row's cap as a share of its
    raw radius, inf for none. low, high: (n,) between which the distances lie.

    A row beyond its bound is superseded by none and supersedes none, is not the nearest one that is met, keeps its cap, and is
    not the one whose cap binds the ball, even when those that the ball supersedes are gone.
    """
    stays = rival & (low > positive) & (high < both)
    least = _least(high / both, stays)
    capped = both * torch.maximum(cap.nan_to_num(torch.inf, torch.inf), least).clamp_max(1.0) * _MARGIN
    first = torch.minimum(_least(high, active & (high < both)), both)
    return torch.where(rival, torch.maximum(torch.maximum(positive, capped), first), torch.where(active, first, -1.0))


def _least(x: Tensor, among: Tensor) -> Tensor:
    """The least of some numbers (n,); inf where there is none."""
    return torch.cat([x[among], x.new_tensor([torch.inf])]).min()


class Codebook:
    """n rows in the order of insertion, alive or not. Every change makes new tensors; old ones stay as they were.

    keys: (n, width) float32. raw, caps: (n,) float64 radii. alive: (n,) bool.
    superseded: (n,) the row that superseded this one, or -1. capped_by: (n,) the row of the binding cap, or -1.
    capped: rival balls that meet are capped; without it they may overlap, and the nearest key decides (as published).
    """

    def __init__(
        self, width: int, metric: Metric = "euclidean", rule: Rule = "nearest-then-check", nulls: Tensor | None = None, capped: bool = True
    ) -> None:
        self.width, self.capped = width, capped
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
        """The number of alive rows, superseded ones included."""
        return len(self._row)

    keys = property(lambda self: self._keys.all)
    nulls = property(lambda self: self._nulls.all)

    @property
    def active(self) -> Bool[Tensor, " n"]:
        """(n,) bool: alive and not superseded."""
        return self.alive & (self.superseded == NONE)

    @property
    def radii(self) -> Float64[Tensor, " n"]:
        """(n,) radii in force: raw radii under the caps of conflicting neighbours; -1 for rows that are not active."""
        return torch.where(self.active, torch.minimum(self.raw, self.caps), -1.0)

    def insert(self, key: Float[Tensor, "*width"], radius: float, entry: Entry) -> list[str]:
        """Add a row, as a member of the entry whose scope it falls into, and return the edits that it supersedes.

        Raises ValueError for a key or a radius that is not finite, and for an edit that is in the codebook already.
        """
        key = self._checked(key, radius, entry)
        d = self._distances(key, radius, entry.positive, self._labels.get(entry.label, NONE))
        near = self._scope(d, radius, entry.label)
        head = self.entry_of(near) if near is not None else None
        self.log = [*self.log, ["insert", len(self.entries)]]
        self._append(key, radius, replace(entry, member_of=head))
        return [self.entries[i].event_id for i in self._activate(len(self.entries) - 1, d)]

    def remove(self, event_ids: Iterable[str]) -> None:
        """Take rows out together, superseded ones too. Raises KeyError for an id that is unknown or out already, and changes nothing."""
        ids = sorted(set(event_ids))
        missing = [i for i in ids if i not in self._row]
        if missing:
            raise KeyError(f"no entry of {', '.join(missing)}")
        self.log = [*self.log, ["remove", ids]]
        self._deactivate([self._row.pop(i) for i in ids])

    def overlapping(self, key: Float[Tensor, " width"], radius: float, label: tuple[int, ...]) -> str | None:
        """The edit whose scope a new key falls into: the nearest active row whose ball meets the new one, if it has this label."""
        d = self._distances(key.detach().float().cpu(), radius, 0.0, self._labels.get(label, NONE))
        row = self._scope(d, radius, label)
        return None if row is None else self.entries[row].event_id

    def _scope(self, d: Tensor, radius: float, label: tuple[int, ...]) -> int | None:
        d = torch.where(self.active & (d <= self.raw + radius), d, torch.inf)
        if not len(d) or not bool(d.isfinite().any()):
            return None
        row = int(d.argmin())
        return row if self.entries[row].label == label else None

    def retrieve(self, queries: Float[Tensor, "B width"]) -> tuple[Int[Tensor, " B"], Float64[Tensor, " B"]]:
        """Queries (B, width) to (B,) the row that fires, or -1, and (B,) the distance that was decisive, on their device."""
        q = queries.detach().float()
        book, nulls = self._search(q.device)
        row, distance = book(q)
        return torch.where(distance < nulls(q)[1], row, NONE), distance

    def entry_of(self, row: int) -> str:
        """The id that a row answers under: that of the entry which absorbed it while that entry is active, else its own."""
        e = self.entries[row]
        head = self._row.get(e.member_of or "")
        return e.event_id if head is None or self.superseded[head] != NONE else self.entries[head].event_id

    def members(self, event_id: str) -> list[str]:
        """The alive edits that were absorbed by an entry, oldest first."""
        return [e for e, row in self._row.items() if self.entries[row].member_of == event_id]

    def history(self, event_id: str) -> list[str]:
        """The alive edits that this one supersedes, newest first. Raises KeyError for an unknown id."""
        older = (self.superseded == self._row[event_id]) & self.alive
        return [self.entries[i].event_id for i in reversed(older.nonzero()[:, 0].tolist())]

    def as_of(self, step: int) -> Codebook:
        """The codebook as it was after the first `step` operations of its log."""
        if not 0 <= step <= len(self.log):
            raise ValueError(f"the log has {len(self.log)} operations, there is no state after {step}")
        out = Codebook(self.width, self.metric, self.rule, self.nulls, self.capped)
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
        """(n,) distances of a key to those of the active rows for which they matter; inf to the others."""
        low, high = self._keys.bounds(key)
        rival, positive_radii = self.active & (self._label != label), self._positive.clamp_min(positive)
        bounds = distance_bounds(self.active, rival, positive_radii, self.raw + radius, self.caps / self.raw, low, high)
        return self._keys.exact(key, low <= bounds)

    def _distances_from(self, row: int) -> Tensor:
        return self._distances(self.keys[row], float(self.raw[row]), float(self._positive[row]), int(self._label[row]))

    def _append(self, key: Tensor, radius: float, entry: Entry) -> None:
        """Append a row that is not yet alive."""
        self._keys.add(key[None])
        self.raw = torch.cat([self.raw, torch.tensor([radius], dtype=torch.float64)])
        self.caps = torch.cat([self.caps, torch.tensor([torch.inf], dtype=torch.float64)])
        self._append_entries(entry)
        none = torch.tensor([NONE])
        self.superseded, self.capped_by = torch.cat([self.superseded, none]), torch.cat([self.capped_by, none])
        self.alive = torch.cat([self.alive, torch.tensor([False])])

    def _append_entries(self, *entries: Entry) -> None:
        self.entries = [*self.entries, *entries]
        self._json = [*self._json, *(e.json() for e in entries)]
        labels = [self._labels.setdefault(e.label, len(self._labels)) for e in entries]
        self._label = torch.cat([self._label, torch.tensor(labels, dtype=torch.long)])
        self._positive = torch.cat([self._positive, torch.tensor([e.positive for e in entries], dtype=torch.float64)])

    def _activate(self, row: int, d: Tensor) -> list[int]:
        """Make the newest row alive and return the rows that it supersedes. d: (row,) distances to those before it."""
        self._row[self.entries[row].event_id] = row
        self.alive = _set(self.alive, [row], True)
        d = torch.cat([d, torch.zeros(1, dtype=torch.float64)])
        stale = (self.active & self._conflicting(row, d)).nonzero()[:, 0].tolist()
        self.superseded = _set(self.superseded, stale, row)
        self._release(stale)
        self._silence_nulls(stale, -1)
        self._fit(row, d)
        self._refresh_search()
        return stale

    def _deactivate(self, rows: list[int]) -> None:
        """Make rows dead. A row that one of them superseded comes back, or is superseded by the next later rival."""
        self._silence_nulls([r for r in rows if bool(self.active[r])], -1)
        gone = torch.tensor(rows)
        self.alive = _set(self.alive, rows, False)
        back = (self.alive & torch.isin(self.superseded, gone)).nonzero()[:, 0].tolist()
        self.superseded = _set(self.superseded, rows, NONE)
        self._release(rows)
        distances = {i: self._keys.exact(self.keys[i], self.alive) for i in back}
        for i, d in distances.items():
            later = (self.alive & self._conflicting(i, d))[i:].nonzero()[:, 0]
            self.superseded = _set(self.superseded, [i], i + int(later[0]) if len(later) else NONE)
        for i, d in distances.items():
            if self.superseded[i] == NONE:
                self._fit(i, d)
        self._refresh_search()

    def _refresh_search(self) -> None:
        """Let later searches go over the active rows, and few others."""
        self._keys.search_among(self.active)
        self._find = {}

    def _conflicting(self, row: int, d: Tensor) -> Tensor:
        """(n,) bool: rows with another label whose key lies in this row's positive radius, or this row's key in theirs."""
        return (self._label != self._label[row]) & (d <= self._positive.clamp_min(float(self._positive[row])))

    def _shares(self, row: int, d: Tensor) -> Tensor:
        """(n,) the share of their raw radii that a row and each active rival may keep where their balls meet; inf elsewhere."""
        both = self.raw + self.raw[row]
        meets = self.active & (self._label != self._label[row]) & (both > d) & self.capped
        return torch.where(meets, d / both.clamp_min(torch.finfo(torch.float64).tiny) * _SHARE, torch.inf)

    def _cap(self, row: int, share: Tensor) -> None:
        """Cap a row by the rival that leaves it least."""
        by = int(share.argmin())
        bound = bool(share[by].isfinite())
        self.caps = _set(self.caps, [row], float(share[by] * self.raw[row]) if bound else torch.inf)
        self.capped_by = _set(self.capped_by, [row], by if bound else NONE)

    def _fit(self, row: int, d: Tensor) -> None:
        """Cap a row that became active and its rivals, and silence the nulls in its positive radius."""
        share = self._shares(row, d)
        tighter = share.isfinite() & (share * self.raw < self.caps)
        self.caps = torch.where(tighter, share * self.raw, self.caps)
        self.capped_by = torch.where(tighter, row, self.capped_by)
        self._cap(row, share)
        self._silence_nulls([row], 1)

    def _release(self, gone: list[int]) -> None:
        """Drop the caps that rows caused and no longer do, and find the next binding cap of the rows that they bound."""
        freed = (self.active & torch.isin(self.capped_by, torch.tensor(gone, dtype=torch.long))).nonzero()[:, 0].tolist()
        self.caps, self.capped_by = _set(self.caps, gone, torch.inf), _set(self.capped_by, gone, NONE)
        for i in freed:
            self._cap(i, self._shares(i, self._distances_from(i)))

    def _silence_nulls(self, rows: list[int], sign: int) -> None:
        """Count (sign 1) or no longer count (-1) the nulls in the positive radii of rows. A null that is counted silences no edit."""
        for i in rows if len(self.nulls) else []:
            self.silenced = self.silenced + sign * (to_all(self.nulls, self.keys[i], self.metric) <= self._positive[i])

    def _search(self, device: torch.device) -> tuple[Nearest, Nearest]:
        """Searches among the active rows, and among the nulls that are in no positive radius."""
        if device not in self._find:
            book = Nearest(self._keys.on(device), self.radii.to(device), self.rule)
            free = torch.where(self.silenced == 0, torch.inf, -1.0).double()
            self._find[device] = book, Nearest(self._nulls.on(device), free.to(device))
        return self._find[device]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "nulls": self.nulls, **{name: getattr(self, name) for name in _TENSORS}}

    def state(self) -> dict[str, Any]:
        """Tensors and JSON values, for `load`."""
        return {**self._tensors(), "entries": list(self._json), "log": self.log, "metric": self.metric, "rule": self.rule}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned. The caller has checked that it fits."""
        self._clear(state["nulls"], state["keys"])
        for name in _TENSORS:
            setattr(self, name, state[name])
        self._append_entries(*map(Entry.of, state["entries"]))
        self._row = {self.entries[i].event_id: i for i in self.alive.nonzero()[:, 0].tolist()}
        self.log = [list(op) for op in state["log"]]
        self._refresh_search()


def _set(t: Tensor, rows: list[int], value: Any) -> Tensor:
    """A copy with some rows changed."""
    if not rows:
        return t
    out = t.clone()
    out[rows] = value
    return out
