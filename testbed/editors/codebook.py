"""A codebook: keys with radii, the one core of the editors that answer near what they were taught.

An entry holds a key, a raw radius, the answer's tokens (its label) and the edit it came from. Radii in force
are derived, never overwritten: where two balls with different labels meet, each is capped in proportion to
its raw radius, so caps are a function of the set of entries. Hence insertion order does not matter, deleting
an entry restores its neighbours exactly, and no two balls with different labels overlap.

Retrieval is nearest-then-check (GRACE, BalancEdit): the nearest key, the lowest entry on a tie, hits when its
distance is at most its radius. Distances are fp32 whatever the model's dtype; the nearest candidates are
measured again by direct differences, so a key's distance to itself is exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Metric = Literal["euclidean", "cosine"]
RULE = "nearest-then-check"
_RECHECK = 4


@dataclass(frozen=True)
class Entry:
    """What is known of an entry besides its key and radius."""

    event_id: str
    label: tuple[int, ...]
    separable: bool
    positive: float
    """Distance of the farthest positive anchor: the zone in which the entry must answer."""
    superseded_by: str | None = None
    """The edit that took this one's place; it comes back when that edit is removed."""


class Codebook:
    """Entries in insertion order. All changes make new tensors; old ones stay as they were."""

    def __init__(self, width: int, metric: Metric = "euclidean") -> None:
        self.width, self.metric = width, metric
        self.keys = torch.zeros(0, width)
        self.raw = torch.zeros(0)
        self.caps = torch.zeros(0)
        self.entries: tuple[Entry, ...] = ()
        self._find: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def radii(self) -> Tensor:
        """(n,) radii in force: raw radii under the caps of conflicting neighbours; -1 for superseded entries."""
        gone = torch.tensor([e.superseded_by is not None for e in self.entries], dtype=torch.bool)
        return torch.where(gone, -1.0, torch.minimum(self.raw, self.caps))

    def insert(self, key: Tensor, radius: float, entry: Entry) -> list[str]:
        """Add an entry. Returns the edits it supersedes: those with another label so near that each lies in
        the other's positive zone."""
        key = key.detach().float().cpu()
        d = direct(self.keys, key, self.metric) if self.entries else torch.zeros(0)
        stale = {i for i, e in enumerate(self.entries) if _replaces(entry, e, float(d[i]))}
        old = [replace(e, superseded_by=entry.event_id) if i in stale else e for i, e in enumerate(self.entries)]
        self.keys = torch.cat([self.keys, key.reshape(1, -1)])
        self.raw = torch.cat([self.raw, torch.tensor([radius])])
        self.caps = torch.cat([self.caps, torch.tensor([torch.inf])])
        self.entries = (*old, entry)
        self._find = None
        if stale:
            self._cap_all()
        else:
            self._cap(len(self) - 1, d)
        return [self.entries[i].event_id for i in sorted(stale)]

    def remove(self, event_ids: set[str]) -> None:
        """Take entries out. Neighbours get back the reach, and superseded ones the place, that they had without
        them. Raises KeyError for unknown ids and changes nothing."""
        missing = event_ids - {e.event_id for e in self.entries}
        if missing:
            raise KeyError(f"no entry of {', '.join(sorted(missing))}")
        keep = [i for i, e in enumerate(self.entries) if e.event_id not in event_ids]
        self.keys, self.raw = self.keys[keep], self.raw[keep]
        left = [self.entries[i] for i in keep]
        self.entries = tuple(replace(e, superseded_by=None) if e.superseded_by in event_ids else e for e in left)
        self._find = None
        self._cap_all()

    def _cap(self, new: int, d: Tensor) -> None:
        """Cap entry `new` and the entries before it where their balls meet under different labels; d: (new,) distances."""
        e = self.entries[new]
        other = torch.tensor([o.label != e.label and o.superseded_by is None for o in self.entries[:new]], dtype=torch.bool)
        both = self.raw[:new] + self.raw[new]
        meets = other & (both > d)
        if e.superseded_by is not None or not bool(meets.any()):
            return
        share = d.double() / both.double().clamp_min(1e-300) * (1 - 1e-6)
        caps = self.caps.clone()
        caps[:new] = torch.where(meets, torch.minimum(caps[:new], (share * self.raw[:new]).float()), caps[:new])
        caps[new] = (share * self.raw[new])[meets].min().float()
        self.caps = caps

    def _cap_all(self) -> None:
        """All caps afresh from the raw radii; the same whatever the order."""
        self.caps = torch.full((len(self),), torch.inf)
        for i in range(1, len(self)):
            self._cap(i, direct(self.keys[:i], self.keys[i], self.metric))

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(B, f) queries to (B,) index of the entry that fires, or -1, and (B,) distance of the nearest key (inf if none)."""
        b = queries.shape[0]
        if not self.entries:
            return torch.full((b,), -1, dtype=torch.long), torch.full((b,), torch.inf)
        if self._find is None:
            live = (self.radii >= 0).nonzero()[:, 0]
            self._find = live, self.radii
        live, radii = self._find
        q = queries.detach().float().cpu()
        near = live[distances(q, self.keys[live], self.metric).topk(min(_RECHECK, len(live)), largest=False).indices].sort(1).values
        exact = direct(q.unsqueeze(1), self.keys[near], self.metric)
        best = exact.argmin(1, keepdim=True)
        index, d = near.gather(1, best)[:, 0], exact.gather(1, best)[:, 0]
        return torch.where(d <= radii[index], index, -1), d

    def state(self) -> dict[str, Any]:
        """Tensors and JSON values that make the codebook again."""
        rows = [[e.event_id, list(e.label), e.separable, e.positive, e.superseded_by] for e in self.entries]
        return {"keys": self.keys, "raw": self.raw, "caps": self.caps, "entries": rows, "metric": self.metric, "rule": RULE}

    def load(self, state: dict[str, Any]) -> None:
        """The reverse of `state`; the caller has checked the shapes."""
        self.keys, self.raw, self.caps, self.metric = state["keys"], state["raw"], state["caps"], state["metric"]
        self.entries = tuple(Entry(i, tuple(label), sep, pos, by) for i, label, sep, pos, by in state["entries"])
        self._find = None


def _replaces(new: Entry, old: Entry, d: float) -> bool:
    return old.superseded_by is None and old.label != new.label and d <= max(new.positive, old.positive)


def distances(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """(B, n) distances by one matrix product; good enough to choose candidates, not to judge them."""
    if metric == "cosine":
        return 1 - unit(a) @ unit(b).T
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")


def direct(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """(...,) distances by direct differences along the last axis. Cosine of a zero vector counts as distance 1."""
    if metric == "euclidean":
        return (a - b).square().sum(-1).sqrt()
    # half the squared chord: exactly zero for equal vectors, 1 - cosine otherwise
    chord = (unit(a) - unit(b)).square().sum(-1) / 2
    zero = (a.abs().amax(-1) == 0) | (b.abs().amax(-1) == 0)
    return torch.where(zero, torch.ones_like(chord), chord)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
