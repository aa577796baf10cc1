"""ELDER's layers: at each site N adapters, of which a prompt gets the k that a linear router scores highest.

y = W v + b + sum over the chosen i of s_i V_i^T U_i v, with s = softmax(W_r x) over all N; x is what enters the
first site at the last prompt token, so that no adapter changes it and every router's choice is known before any
adapter acts. The chosen scores are not made to sum to one, unless asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from testbed.editors.adapters.elder_routing import Codes, Shape
from testbed.editors.adapters.lowrank import Add, TargetModule
from testbed.editors.codebook import keys as _sites
from testbed.editors.codebook.gate import Gate
from testbed.model.encoding import Batch
from testbed.model.handle import ModelHandle


@dataclass(frozen=True)
class Mixture:
    """The trained tensors, float32.

    router: (L, N, f) with f the width entering the first site. u, v: for each site (N, r, f) and (N, r, d).
    """

    shape: Shape
    router: Tensor
    u: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    renormalise: bool = False

    def tensors(self) -> list[Tensor]:
        return [self.router, *self.u, *self.v]

    def like(self, tensors: Sequence[Tensor]) -> Mixture:
        """The same with other tensors, in the order of `tensors()`."""
        n = len(self.u)
        return Mixture(self.shape, tensors[0], tuple(tensors[1 : 1 + n]), tuple(tensors[1 + n :]), self.renormalise)

    def log_scores(self, x: Tensor) -> Tensor:
        """(B, L, N) log s of prompts by their x (B, f)."""
        return torch.einsum("bf,lnf->bln", x.float(), self.router).log_softmax(-1)

    def chosen(self, log_scores: Tensor) -> Tensor:
        """(B, L, N) bool: the k highest at each site."""
        top = log_scores.topk(self.shape.active, dim=-1).indices
        return torch.zeros_like(log_scores, dtype=torch.bool).scatter(-1, top, True)

    def adds(self, log_scores: Tensor, rows: Tensor | None = None) -> list[Add]:
        """What each site adds for sequences with these scores (B, L, N), or with those of some rows of them."""
        scores = log_scores if rows is None else log_scores[rows]
        return [lambda act, i=i: self._add(i, scores[:, i], act) for i in range(self.shape.sites)]

    def _add(self, site: int, log_scores: Tensor, act: Tensor) -> Tensor:
        """(B, T, d): the k adapters of each row side by side as one of rank k r."""
        top = log_scores.to(act.device).topk(self.shape.active, dim=-1)
        s = top.values.exp()
        s = s / s.sum(-1, keepdim=True) if self.renormalise else s
        u, v = self.u[site][top.indices].flatten(1, 2), self.v[site][top.indices].flatten(1, 2)
        weight = s.repeat_interleave(self.u[site].shape[1], dim=1)
        return (act.float() @ u.mT * weight[:, None]) @ v


class MixtureGate(Gate):
    """Lays a mixture over its sites for prompts that are near a stored code; all others keep the base's own tensors.

    within: the Hamming distance under which a prompt counts as edited; None sends every prompt through the adapters.
    """

    def __init__(self, handle: ModelHandle, sites: Sequence[TargetModule], mixture: Mixture, book: CodeBook) -> None:
        super().__init__(handle, sites[0].module, book, self._key, lambda hits: hits.out)
        self.targets, self.mixture = sites, mixture
        self.scores = torch.zeros(0)

    def _key(self, act: Tensor, batch: Batch) -> Tensor:
        self.scores = self.mixture.log_scores(_sites.last(act, batch))
        return self.mixture.chosen(self.scores).flatten(1)

    @contextmanager
    def around(self, batch: Batch) -> Iterator[None]:
        """For the length of one batch."""
        self.beams = 0
        with ExitStack() as stack:
            for i, site in enumerate(self.targets if len(self.book) else ()):
                stack.enter_context(
                    self.handle.hooked(site.module, lambda m, args, out, i=i: self._at(i, args[0], out, batch)),
                )
            yield

    def _at(self, site: int, act: Tensor, output: Tensor, batch: Batch) -> Tensor | None:
        if not self.beams:
            self.decide(act, batch.on(act.device))
        at = (self.row.repeat_interleave(self.beams) >= 0).nonzero()[:, 0]
        if not len(at):
            return None  # the very tensor that the base produced
        n = len(self.row) * self.beams
        x, out = act.reshape(n, -1, act.shape[-1]), output.clone().reshape(n, -1, output.shape[-1])
        add, at = self.mixture.adds(self.scores, at // self.beams)[site], at.to(out.device)
        out[at] = out[at] + add(x[at]).to(out.dtype)
        return out.reshape(output.shape)


class CodeBook:
    """The deferral rule as a gate's book: a prompt's code to the edit whose code is nearest, or to none."""

    def __init__(self, codes: Codes, within: int | None) -> None:
        self.codes, self.within = codes, within

    def __len__(self) -> int:
        return len(self.codes)

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        row, distance = self.codes.nearest(queries)
        return (row if self.within is None else torch.where(distance < self.within, row, -1)), distance

    def entry_of(self, row: int) -> str:
        return self.codes.ids[row]
