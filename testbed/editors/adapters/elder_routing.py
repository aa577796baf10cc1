"""Allocation codes of ELDER: which adapters an edit is given, and how near a prompt's own choice comes to it.

A code is one k-subset of the N adapters at each of L sites, as L N bits of which L k are ones. Distances are
Hamming: even, from 0 to 2 L min(k, N - k).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_TRIES = 64
"""Random draws before the codes are gone through in order."""


@dataclass(frozen=True)
class Shape:
    """L sites, N adapters at each, k of them active."""

    sites: int
    experts: int
    active: int

    @property
    def bits(self) -> int:
        return self.sites * self.experts

    @property
    def bytes(self) -> int:
        """Of one stored code."""
        return -(-self.bits // 8)

    @property
    def capacity(self) -> int:
        """How many codes there are."""
        return math.comb(self.experts, self.active) ** self.sites


def experts_for(sites: int, active: int, edits: int, at_least: int) -> int:
    """The smallest N, not under `at_least`, that gives every planned edit a hundred codes to choose from."""
    n = max(at_least, active)
    while Shape(sites, n, active).capacity < 100 * edits:
        n += 1
    return n


class Codes:
    """Stored codes in the order of their edits; never changed, `plus` makes another.

    packed: (M, bytes) uint8. ids: the edit of each row. collisions: edits that had to share a code with another fact.
    """

    def __init__(
        self, shape: Shape, device: torch.device, packed: Tensor | None = None, ids: Sequence[str] = (), collisions: int = 0
    ) -> None:
        self.shape, self.device, self.ids, self.collisions = shape, device, list(ids), collisions
        self.packed = torch.zeros(0, shape.bytes, dtype=torch.uint8) if packed is None else packed
        self._row = {i: n for n, i in enumerate(self.ids)}
        self._used = {bytes(row) for row in self.packed.numpy()}
        bits = np.unpackbits(self.packed.numpy(), axis=1, count=shape.bits)
        self._dense = torch.from_numpy(bits).float().to(device)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def distinct(self) -> int:
        return len(self._used)

    def of(self, event_id: str | None) -> Tensor | None:
        """(L, N) bool code of an edit; None for one that has none."""
        row = self._row.get(event_id or "")
        return None if row is None else self._dense[row].bool().cpu().reshape(self.shape.sites, self.shape.experts)

    def draw(self, generator: torch.Generator, taken: Sequence[Tensor] = ()) -> tuple[Tensor, bool]:
        """A random (L, N) bool code that no edit has, nor is among `taken`, and whether it is new: it is not where all are in use."""
        used = self._used | {bytes(_pack(t[None])[0].numpy()) for t in taken}
        code = self._random(generator)
        for _ in range(_TRIES):
            if bytes(_pack(code[None])[0].numpy()) not in used:
                return code, True
            code = self._random(generator)
        if len(used) < self.shape.capacity:
            return self._first_free(used), True
        return code, False

    def _random(self, generator: torch.Generator) -> Tensor:
        s = self.shape
        chosen = torch.rand(s.sites, s.experts, generator=generator).topk(s.active, dim=1).indices
        return torch.zeros(s.sites, s.experts, dtype=torch.bool).scatter(1, chosen, True)

    def _first_free(self, used: set[bytes]) -> Tensor:
        s = self.shape
        for choice in itertools.product(itertools.combinations(range(s.experts), s.active), repeat=s.sites):
            code = torch.zeros(s.sites, s.experts, dtype=torch.bool).scatter(1, torch.tensor(choice), True)
            if bytes(_pack(code[None])[0].numpy()) not in used:
                return code
        raise RuntimeError("fewer codes in use than there are, and none is free")

    def plus(self, ids: Sequence[str], codes: Tensor, shared: int = 0) -> Codes:
        """With the codes (n, L, N) bool of new edits, of which some share one."""
        packed = torch.cat([self.packed, _pack(codes.cpu())])
        return Codes(self.shape, self.device, packed, [*self.ids, *ids], self.collisions + shared)

    def nearest(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, L N) bool or {0, 1} to (B,) the row of the nearest stored code, the newest of equals, and (B,) its distance."""
        if not len(self):
            return torch.full((len(codes),), -1, device=codes.device), torch.full((len(codes),), torch.inf, device=codes.device)
        shared = codes.float() @ self._dense.T
        most, back = shared.flip(1).max(1)  # the first of equals in reversed order is the newest
        return len(self) - 1 - back, 2 * (self.shape.sites * self.shape.active - most)


def _pack(codes: Tensor) -> Tensor:
    """(n, L, N) bool to (n, bytes) uint8."""
    return torch.from_numpy(np.packbits(codes.flatten(1).numpy(), axis=1))
