"""A gate around one layer: which entry answers a prompt is decided once, at prefill, and kept for the sequence.

The first call of the layer in a batch is the prefill: it sees whole prompts, so keys can be read there. Every
later call (one token at a time with a cache, ever longer rows without one) uses the decision. Beam search
gives a prompt several rows that lie together and are reordered among themselves only, so a decision that
belongs to the prompt follows them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from testbed.model.encoding import Batch
from testbed.model.handle import ModelHandle


class Book(Protocol):
    """What a gate needs of a codebook."""

    def __len__(self) -> int: ...

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]: ...

    def entry_of(self, row: int) -> str: ...


@dataclass(frozen=True)
class Hits:
    """The rows of one call of the layer that an entry answers.

    rows: for each, the codebook's row. act: (h, T, f) what entered the layer. out: (h, T, d) what left it.
    prompt: (h, T) bool prompt positions at prefill (and whenever the whole sequence is run again), None at later steps with a cache.
    """

    rows: list[int]
    act: Tensor
    out: Tensor
    prompt: Tensor | None


@dataclass
class Ledger:
    """Queries so far, and how many each entry answered: hits and misses add up to the queries."""

    queries: int = 0
    hits: Counter[str] = field(default_factory=Counter)

    @property
    def misses(self) -> int:
        return self.queries - sum(self.hits.values())


class Gate:
    """Lays a codebook around one layer. A row that misses keeps the very numbers of the base.

    key: (B, T, f) entering activations and their batch to (B, width) queries.
    answer: the layer's new output (h, T, d) for the rows that hit.
    """

    enabled = True

    def __init__(
        self, handle: ModelHandle, module: nn.Module, book: Book, key: Callable[[Tensor, Batch], Tensor], answer: Callable[[Hits], Tensor]
    ) -> None:
        self.handle, self.module, self.book, self.key, self.answer = handle, module, book, key, answer
        self.ledger = Ledger()
        self.row = self.distance = torch.zeros(0)
        self.beams = 0

    @contextmanager
    def around(self, batch: Batch) -> Iterator[None]:
        """For the length of one batch."""
        self.beams = 0
        if not self.enabled or not len(self.book):
            yield
            return
        with self.handle.hooked(self.module, lambda module, args, output: self._call(args[0], output, batch)):
            yield

    def _call(self, act: Tensor, output: Tensor, batch: Batch) -> Tensor | None:
        batch = batch.on(act.device)
        if not self.beams:
            self.decide(act, batch)
        hit = self.row.repeat_interleave(self.beams)
        at = (hit >= 0).nonzero()[:, 0]
        if not len(at):
            return None  # the very tensor that the base produced
        n = len(hit)
        x, out = act.reshape(n, -1, act.shape[-1]), output.clone().reshape(n, -1, output.shape[-1])
        new = self.answer(Hits(hit[at].tolist(), x[at], out[at], self._prompt(batch, x.shape[1], at)))
        out[at] = new.to(out.dtype)
        return out.reshape(output.shape)

    def decide(self, act: Tensor, batch: Batch) -> None:
        """Choose the entry of each prompt from the prefill's activations."""
        b, t = batch.prompt.shape
        self.beams = max(1, act[..., 0].numel() // (b * t))
        queries = self.key(act.reshape(b * self.beams, t, -1)[:: self.beams], batch)
        self.row, self.distance = self.book.retrieve(queries)
        self.ledger.queries += b
        self.ledger.hits.update(self.book.entry_of(i) for i in self.row.tolist() if i >= 0)

    def _prompt(self, batch: Batch, length: int, at: Tensor) -> Tensor | None:
        """The prompt's positions in a call of this length: all of it, grown on the right without a cache; None for single tokens."""
        t = batch.prompt.shape[1]
        if length < t or (length == 1 and t > 1):
            return None
        more = torch.zeros(len(batch.prompt), length - t, dtype=torch.bool, device=batch.prompt.device)
        return torch.cat([batch.prompt, more], 1).repeat_interleave(self.beams, 0)[at]

    def explain(self, batch: Batch) -> list[dict[str, Any]]:
        """The entry that answered, or null, and the distance that was decisive."""
        if not self.beams:
            return [{} for _ in batch.asks]
        return [
            {"entry": self.book.entry_of(i) if i >= 0 else None, "distance": round(d, 6) if d < float("inf") else None}
            for i, d in zip(self.row.tolist(), self.distance.tolist())
        ]
