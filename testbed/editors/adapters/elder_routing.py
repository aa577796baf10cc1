"""ELDER's routing: allocation codes, the mixture of adapters that a linear router chooses from, and the gate that applies it.

A code is one k-subset of the N adapters at each of L target modules, as L N bits of which L k are ones. Distances of
codes are Hamming distances: even, from 0 to 2 L min(k, N - k).

A target module puts out y = W v + b + sum over the chosen i of s_i V_i^T U_i v, with s = softmax(W_r x) over all N. x is
the input of the first target module at the last prompt token: no adapter changes it, so that every router's choice is
known before any adapter acts. The chosen scores do not sum to one, unless the configuration renormalises them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from testbed.editors.adapters.lowrank import Add, TargetModule
from testbed.editors.codebook.gate import Gate, Hits
from testbed.editors.codebook.keys import last_position
from testbed.model.encoding import Batch
from testbed.model.handle import ModelHandle

_TRIES = 64
"""Random draws before the codes are gone through in order."""


@dataclass(frozen=True)
class MixtureShape:
    """L target modules, N adapters at each, k of them active."""

    targets: int
    experts: int
    active: int

    @property
    def bits(self) -> int:
        return self.targets * self.experts

    @property
    def bytes(self) -> int:
        """Size of one stored code."""
        return -(-self.bits // 8)

    @property
    def capacity(self) -> int:
        """How many codes there are."""
        return math.comb(self.experts, self.active) ** self.targets


def experts_for(targets: int, active: int, edits: int, at_least: int) -> int:
    """The smallest N, not under `at_least`, that gives every planned edit a hundred codes to choose from."""
    n = max(at_least, active)
    while MixtureShape(targets, n, active).capacity < 100 * edits:
        n += 1
    return n


class AllocationCodes:
    """Stored codes in the order of their edits. An instance never changes; `plus` makes another.

    packed: (M, bytes) uint8. ids: the edit of each row. collisions: edits that had to share a code with another fact.
    """

    def __init__(
        self, shape: MixtureShape, device: torch.device, packed: Tensor | None = None, ids: Sequence[str] = (), collisions: int = 0
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
        """(L, N) bool code of an edit; None for an edit without one."""
        row = self._row.get(event_id or "")
        return None if row is None else self._dense[row].bool().cpu().reshape(self.shape.targets, self.shape.experts)

    def draw(self, generator: torch.Generator, taken: Sequence[Tensor] = ()) -> tuple[Tensor, bool]:
        """A random (L, N) bool code, and whether it is new. It is shared only where all codes are stored or among `taken`."""
        used = self._used | {_packed_bytes(t) for t in taken}
        code = self._random(generator)
        for _ in range(_TRIES):
            if _packed_bytes(code) not in used:
                return code, True
            code = self._random(generator)
        if len(used) < self.shape.capacity:
            return self._first_free(used), True
        return code, False

    def _random(self, generator: torch.Generator) -> Tensor:
        s = self.shape
        chosen = torch.rand(s.targets, s.experts, generator=generator).topk(s.active, dim=1).indices
        return torch.zeros(s.targets, s.experts, dtype=torch.bool).scatter(1, chosen, True)

    def _first_free(self, used: set[bytes]) -> Tensor:
        s = self.shape
        for choice in itertools.product(itertools.combinations(range(s.experts), s.active), repeat=s.targets):
            code = torch.zeros(s.targets, s.experts, dtype=torch.bool).scatter(1, torch.tensor(choice), True)
            if _packed_bytes(code) not in used:
                return code
        raise RuntimeError("fewer codes in use than there are, and none is free")

    def plus(self, ids: Sequence[str], codes: Tensor, shared: int = 0) -> AllocationCodes:
        """These codes and the codes (n, L, N) bool of new edits, of which `shared` had to share one."""
        packed = torch.cat([self.packed, _pack(codes.cpu())])
        return AllocationCodes(self.shape, self.device, packed, [*self.ids, *ids], self.collisions + shared)

    def nearest(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, L N) bool or {0, 1} to (B,) the row of the nearest stored code, the newest of equals, and (B,) its distance."""
        if not len(self):
            return torch.full((len(codes),), -1, device=codes.device), torch.full((len(codes),), torch.inf, device=codes.device)
        shared = codes.float() @ self._dense.T
        most, back = shared.flip(1).max(1)  # the first of equals in reversed order is the newest
        return len(self) - 1 - back, 2 * (self.shape.targets * self.shape.active - most)


def _pack(codes: Tensor) -> Tensor:
    """(n, L, N) bool to (n, bytes) uint8."""
    return torch.from_numpy(np.packbits(codes.flatten(1).numpy(), axis=1))


def _packed_bytes(code: Tensor) -> bytes:
    return bytes(_pack(code[None])[0].numpy())


@dataclass(frozen=True)
class Mixture:
    """The trained tensors, float32.

    router: (L, N, f) with f the input width of the first target module. u, v: for each target module (N, r, f) and (N, r, d).
    """

    shape: MixtureShape
    router: Tensor
    u: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    renormalise: bool = False

    def tensors(self) -> list[Tensor]:
        return [self.router, *self.u, *self.v]

    def like(self, tensors: Sequence[Tensor]) -> Mixture:
        """A mixture of the same shape with other tensors, in the order of `tensors()`."""
        n = len(self.u)
        return Mixture(self.shape, tensors[0], tuple(tensors[1 : 1 + n]), tuple(tensors[1 + n :]), self.renormalise)

    def log_scores(self, x: Tensor) -> Tensor:
        """(B, L, N) log s of prompts by their x (B, f)."""
        return torch.einsum("bf,lnf->bln", x.float(), self.router).log_softmax(-1)

    def chosen(self, log_scores: Tensor) -> Tensor:
        """(B, L, N) bool: the k highest scores at each target module."""
        top = log_scores.topk(self.shape.active, dim=-1).indices
        return torch.zeros_like(log_scores, dtype=torch.bool).scatter(-1, top, True)

    def adds(self, log_scores: Tensor) -> list[Add]:
        """What each target module adds for sequences with these scores (B, L, N)."""
        return [lambda act, i=i: self._add(i, log_scores[:, i], act) for i in range(self.shape.targets)]

    def _add(self, target: int, log_scores: Tensor, act: Tensor) -> Tensor:
        """(B, T, d): the k adapters of each row side by side as one of rank k r."""
        top = log_scores.to(act.device).topk(self.shape.active, dim=-1)
        s = top.values.exp()
        s = s / s.sum(-1, keepdim=True) if self.renormalise else s
        u, v = self.u[target][top.indices].flatten(1, 2), self.v[target][top.indices].flatten(1, 2)
        weight = s.repeat_interleave(self.u[target].shape[1], dim=1)
        return (act.float() @ u.mT * weight[:, None]) @ v


class CodeRouter:
    """Routes a prompt's code to the edit whose code is nearest, if the distance is under `eps`, or (with None) always."""

    def __init__(self, codes: AllocationCodes, eps: int | None) -> None:
        self.codes, self.eps = codes, eps

    def __len__(self) -> int:
        return len(self.codes)

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, L N) to (B,) the row of the edit, or -1, and (B,) the distance of the nearest code."""
        row, distance = self.codes.nearest(queries)
        return (row if self.eps is None else torch.where(distance < self.eps, row, -1)), distance

    def entry_of(self, row: int) -> str:
        return self.codes.ids[row]


class MixtureGate(Gate):
    """Applies a mixture at its target modules for prompts that the router sends there; all others keep the base's own tensors."""

    def __init__(self, handle: ModelHandle, targets: Sequence[TargetModule], mixture: Mixture, router: CodeRouter) -> None:
        answers = [(target.module, partial(self._answer, i)) for i, target in enumerate(targets)]
        super().__init__(handle, answers, router, self._key)
        self.mixture, self.scores = mixture, torch.zeros(0)

    def _key(self, act: Tensor, batch: Batch) -> Tensor:
        self.scores = self.mixture.log_scores(last_position(act, batch))
        return self.mixture.chosen(self.scores).flatten(1)

    def _answer(self, target: int, hits: Hits) -> Tensor:
        add = self.mixture.adds(self.scores[hits.sources])[target]
        return hits.out + add(hits.act).to(hits.out.dtype)
