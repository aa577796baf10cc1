"""A gate around one or several layers: which entry answers a prompt is decided once, at prefill, and kept for the sequence.

The first call of the first layer in a batch is the prefill. It sees whole prompts, so that keys can be read there.
Every later call (one token at a time with a cache, ever longer rows without one) uses the decision. Beam search
gives a prompt several rows that lie together and are reordered among themselves only, so that a decision that
belongs to the prompt holds for all of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from testbed.core.events import EditBatch
from testbed.editors.base import BadEditor, Editor, need
from testbed.model.encoding import Batch
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor, Predictor
from testbed.model.prefix_cache import ImagePrefixes


class EntryRouter(Protocol):
    """Decides which entry answers a prompt."""

    def __len__(self) -> int: ...

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, width) to (B,) the row of the entry that answers, or -1, and (B,) the number that was decisive."""
        ...

    def entry_of(self, row: int) -> str:
        """The id that a row answers under."""
        ...


@dataclass(frozen=True)
class Hits:
    """The rows of one call of a layer that an entry answers.

    rows: for each, the router's row. sources: (h,) for each, the index of its prompt in the batch.
    act: (h, T, f) input of the layer. out: (h, T, d) its output.
    prompt: (h, T) bool prompt positions at prefill (and whenever the whole sequence is run again), None at later steps with a cache.
    """

    rows: list[int]
    sources: Tensor
    act: Tensor
    out: Tensor
    prompt: Tensor | None


Answer = Callable[[Hits], Tensor]
"""The new output (h, T, d) of a layer for the rows that hit."""


@dataclass
class HitCounts:
    """The number of queries so far, and how many each entry answered. Hits and misses add up to the queries."""

    queries: int = 0
    hits: Counter[str] = field(default_factory=Counter)

    @property
    def misses(self) -> int:
        return self.queries - sum(self.hits.values())


class Gate:
    """Puts entries' answers in place of the outputs of layers. A row that misses keeps the very numbers of the base model.

    answers: layers in the order in which they run, each with what gives its new output. The keys are read at the first.
    key: its input (B, T, f) and the batch to (B, width) queries.
    """

    enabled = True

    def __init__(
        self,
        handle: ModelHandle,
        answers: Sequence[tuple[nn.Module, Answer]],
        router: EntryRouter,
        key: Callable[[Tensor, Batch], Tensor],
    ) -> None:
        self.handle, self.answers, self.router, self.key = handle, answers, router, key
        self.hit_counts = HitCounts()
        self.row = self.distance = torch.zeros(0)
        self.beams = 0
        """Rows of each prompt; 0 as long as nothing is decided."""

    @contextmanager
    def around(self, batch: Batch) -> Iterator[None]:
        """Keep the gate in place for the length of one batch."""
        self.beams = 0
        with ExitStack() as hooks:
            for module, answer in self.answers if self.enabled and len(self.router) else ():
                hook = self.handle.hooked(module, lambda m, args, out, answer=answer: self._call(args[0], out, batch, answer))
                hooks.enter_context(hook)
            yield

    def _call(self, act: Tensor, output: Tensor, batch: Batch, answer: Answer) -> Tensor | None:
        batch = batch.on(act.device)
        if not self.beams:
            self.decide(act, batch)
        hit = self.row.repeat_interleave(self.beams)
        at = (hit >= 0).nonzero()[:, 0]
        if not len(at):
            return None  # the very tensor that the base produced
        n, rows, sources, at = len(hit), hit[at].tolist(), at // self.beams, at.to(act.device)
        x, out = act.reshape(n, -1, act.shape[-1]), output.clone().reshape(n, -1, output.shape[-1])
        new = answer(Hits(rows, sources, x[at], out[at], self._prompt(batch, x.shape[1], at)))
        out[at] = new.to(out.dtype)
        return out.reshape(output.shape)

    def decide(self, act: Tensor, batch: Batch) -> None:
        """Choose the entry of each prompt from the prefill's activations."""
        b, t = batch.prompt.shape
        self.beams = max(1, act[..., 0].numel() // (b * t))
        queries = self.key(act.reshape(b * self.beams, t, -1)[:: self.beams], batch)
        self.row, self.distance = self.router.retrieve(queries)
        self.hit_counts.queries += b
        self.hit_counts.hits.update(self.router.entry_of(i) for i in self.row.tolist() if i >= 0)

    def _prompt(self, batch: Batch, length: int, at: Tensor) -> Tensor | None:
        """The prompt's positions in a call of this length. Without a cache the rows have grown on the right; None for single tokens."""
        t = batch.prompt.shape[1]
        if length < t or (length == 1 and t > 1):
            return None
        more = torch.zeros(len(batch.prompt), length - t, dtype=torch.bool, device=batch.prompt.device)
        return torch.cat([batch.prompt, more], 1).repeat_interleave(self.beams, 0)[at]

    def explain(self, batch: Batch) -> list[dict[str, Any]]:
        """For each prompt the entry that answered, or null, and the number that was decisive."""
        if not self.beams:
            return [{} for _ in batch.asks]
        return [
            {"entry": self.router.entry_of(i) if i >= 0 else None, "distance": round(d, 6) if d < float("inf") else None}
            for i, d in zip(self.row.tolist(), self.distance.tolist())
        ]


class CodebookEditor(Editor):
    """An editor whose entries answer at one down-projection for prompts near their keys, each with a trained tensor; undo is removal."""

    book: Any
    _key: Callable[[Tensor, Batch], Tensor]
    """Inputs of the layer (B, T, f) and their batch to (B, width) float32 keys of prompts."""

    def _prepare_layer(self) -> None:
        self.layer = self.handle.layer_index(self.hyper.layer)
        self.module, weight_name = self.handle.down(self.layer), self.handle.down_weight(self.layer)
        self.weight = self.handle.parameter(weight_name).detach().float()
        self._prefixes = ImagePrefixes(self.handle, self.module)
        self._own = {"model": self.handle.hash, "layer": weight_name}
        self.tensors: dict[str, Tensor] = {}
        """By edit, the tensor that its entry answers with."""

    @abstractmethod
    def _answer(self, hits: Hits, book: Any) -> Tensor:
        """(h, T, d) the layer's output for rows that hit."""

    def gate(self, book: Any) -> Gate:
        """A gate around the layer that answers with the tensors of a codebook's entries."""
        return Gate(self.handle, [(self.module, lambda hits: self._answer(hits, book))], book, self._key)

    def predictor(self) -> Predictor:
        return self._predictor_with(self.book)

    def _predictor_with(self, book: Any) -> Predictor:
        gate = self.gate(book)
        return ModelPredictor(self.handle, gate.around, gate.explain)

    def _add_tensors(self, batch: EditBatch, trained: Tensor) -> None:
        self.tensors = {**self.tensors, **{e.id: t for e, t in zip(batch.events, trained)}}

    def revert(self, event_ids: Iterable[str]) -> None:
        """Take edits out of the codebook; what they had displaced comes back. Raises `BadEditor` for an unknown id."""
        try:
            self.book.remove(event_ids)
        except KeyError as e:
            raise BadEditor(f"cannot undo: {e.args[0]}") from e

    def _state(self) -> dict[str, Any]:
        return {**self.book.state(), **self._own, **self.tensors}

    def _load_tensors(self, state: dict[str, Any], event_ids: Iterable[str], shape: tuple[int, ...]) -> None:
        self.tensors = {i: need(state, i, shape).to(self.weight.device) for i in event_ids}
        self._prefixes.kept.clear()  # of pictures that this state may never have met

    def state_bytes(self) -> int:
        """Bytes of the tensors in the state: those of the codebook, and one tensor of the same shape for each edit."""
        return self.book.nbytes + len(self.tensors) * next((t.nbytes for t in self.tensors.values()), 0)
