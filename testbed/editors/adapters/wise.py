"""WISE (Wang et al., NeurIPS 2024, arXiv 2405.14768): edits in a side memory, a copy of one down-projection, with routing.

Routing signal: D(x) = mean over prompt positions of ||a(x) (W' - W)||, how differently side memory and main memory
answer. Training adds to the edits' cross-entropy
    relu(D(irrelevant) - alpha) + relu(beta - D(edit)) + relu(gamma - (D(edit) - D(irrelevant)));
a prompt is answered by the side memory with the largest D among those over their threshold, the smallest D seen in
editing times a ratio. A shard of edits trains a random part of the matrix; shards are merged with TIES.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.adapters.ties_merging import ties
from testbed.editors.adapters.wise_hyper import Hyper, hyper_of, overlaid
from testbed.editors.base import BadEditor, EditFailed, Editor, EditorConfig, Traits, need
from testbed.editors.codebook.gate import Gate, Hits
from testbed.model.encoding import Batch, collate
from testbed.model.handle import project
from testbed.model.predictor import ModelPredictor, Predictor
from testbed.model.suffix import DownProjectionSuffix, mean_by_row, suffix_from_down_projection

_SAMPLE = 32
"""Prompts over which the unit of the margins is measured."""
_STILL = 1e-4
"""Change of the loss under which a batch counts as settled (released code)."""
_HELD = 4
"""Edited matrices that are held while questions are asked; others are added up when they are called for."""


@dataclass(frozen=True)
class WiseConfig(EditorConfig):
    layer: int | None = None
    """Decoder layer whose down-projection is copied; negative counts from the last (paper: 27 of Llama-2-7B)."""
    lr: float | None = None
    """Step size of plain gradient descent (paper: 1.0)."""
    steps: int | None = None
    """Optimiser steps a batch, at most (paper: 70)."""
    clamp: float | None = None
    """Largest change of any entry of the matrix (paper: 1.0)."""
    alpha: float | None = None
    """alpha: D of irrelevant prompts is pushed under it (paper: 5)."""
    beta: float | None = None
    """beta: D of edits is pushed over it (paper: 20)."""
    gamma: float | None = None
    """gamma: by how much D of an edit must exceed that of an irrelevant prompt (paper: 10)."""
    ratio: float = 0.88
    """Share of the smallest D seen in editing that a prompt must reach (act_ratio; paper: 0.88)."""
    density: float = 0.2
    """rho: share of the matrix that one shard of edits may change (mask_ratio; paper: 0.2)."""
    shard: int = 500
    """Edits that share one random part of the matrix (save_freq; paper: 500)."""
    merge: int = 1_000
    """Edits after which shards are merged; a multiple of `shard` (merge_freq; paper: 1,000)."""
    keep: float = 0.53
    """Share of a shard's entries that TIES keeps (densities; paper: 0.53)."""
    retrieve: bool = True
    """Keep merged memories side by side and take the one with the largest D (WISE-Retrieve); false merges all into one (WISE-Merge)."""
    stop: float = 0.02
    """Loss under which a batch counts as learned (released code: 0.02)."""

    def problems(self) -> list[str]:
        out = [f"{n} must be 1 or more, got {getattr(self, n)}" for n in ("shard", "merge") if getattr(self, n) < 1]
        if not out and self.merge % self.shard:
            out.append(f"merge must be a multiple of shard ({self.shard}), got {self.merge}")
        out += [f"{n} must lie in (0, 1], got {getattr(self, n)}" for n in ("ratio", "density", "keep") if not 0 < getattr(self, n) <= 1]
        given = {n: getattr(self, n) for n in ("lr", "steps", "clamp", "alpha", "beta", "gamma")}
        return out + [f"{n} must be positive, got {v}" for n, v in given.items() if v is not None and not v > 0]


@dataclass(frozen=True)
class Memory:
    """One side memory. change: W' - W, float32, as the model stores W. least: the smallest D seen in editing it."""

    change: Tensor
    least: float


@dataclass(frozen=True)
class Prompts:
    """What enters the layer at the prompt positions of n prompts: act (P, f) float32, row (P,) the prompt of each."""

    act: Tensor
    row: Tensor
    n: int


@EDITORS.register("wise")
class Wise(Editor):
    """The shard that is being trained, and the memories of earlier ones."""

    summary = "side memory beside one down-projection, routed by how differently it answers, sharded and merged (WISE)"
    traits = Traits(gated=True, uses=frozenset({"train_pool"}))
    Config = WiseConfig

    def _prepare(self, pool: TrainPool) -> None:
        self.irrelevant = [q.ask() for q in pool.questions if self.handle.reads_pictures or q.image is None]
        found, note = hyper_of(self.handle)
        self.notes = [note] if note else []
        if not self.irrelevant:
            self.notes.append("the stream has no train pool: D of edits is pushed up, and no irrelevant prompt's is pushed down")
        self.hyper: Hyper = overlaid(found, self.config)
        self.module, self.weight_name = self.handle.down(self.hyper.layer), self.handle.down_weight(self.hyper.layer)
        self.weight = self.handle.parameter(self.weight_name).detach().float()
        self.unit = self._unit() if self.hyper.relative else 1.0
        self._remember(self.weight.new_zeros(0, *self.weight.shape), [])
        self.made = 0
        self._start_shard(0)

    @torch.no_grad()
    def _unit(self) -> float:
        """Mean norm of what the down-projection adds at a prompt position, over some prompts of the train pool."""
        prompts = self._read(self.irrelevant[:_SAMPLE] or [Ask("What is this?")])
        return float(_through(self.module, prompts.act, self.weight).norm(dim=-1).mean())

    def _remember(self, changes: Tensor, least: Sequence[float]) -> None:
        """Closed shards, their changes (S, *shape) in one tensor, which a state hands out as it is."""
        self._changes = changes
        self.memories = tuple(Memory(c, x) for c, x in zip(changes, least, strict=True))

    def _start_shard(self, step: int) -> None:
        """A side memory equal to the main one, and the random part of it that this shard may change."""
        self.began = step
        self.working = Memory(torch.zeros_like(self.weight), float("inf"))
        draw = torch.rand(self.weight.shape, generator=self.generator(step))
        self.mask = (draw < self.config.density).to(self.weight.device)

    @timed("keys")
    def _read(self, asks: Sequence[Ask]) -> Prompts:
        """One forward over prompts without answers."""
        batch = collate(self.handle, asks)
        kept: list[Tensor] = []
        with torch.no_grad(), self.handle.hooked(self.module, lambda m, args: kept.append(args[0]), pre=True):
            self.handle.model(**batch.inputs, use_cache=False)
        return _prompts(kept[0], batch)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        asks = [e.ask() for e in batch.events]
        suffix = suffix_from_down_projection(self.handle, asks, [e.target for e in batch.events], self.hyper.layer)
        edits, others = self._read(asks), self._drawn(batch)
        self.working, loss, steps = self._train(suffix, edits, others)
        self.made += len(batch.events)
        notes = {"loss": loss, "steps": float(steps), "threshold": self.working.least * self.config.ratio}
        with torch.no_grad():
            notes["signal_irrelevant"] = float(self._signal(others, self.working.change).mean()) if others else 0.0
        self._shard(batch.step, self.made - len(batch.events))
        return {**notes, "entries": float(len(self._live()))}

    def _drawn(self, batch: EditBatch) -> Prompts | None:
        """As many irrelevant prompts as there are edits, drawn from the train pool."""
        if not self.irrelevant:
            return None
        at = torch.randint(len(self.irrelevant), (len(batch.events),), generator=self.generator(batch.step))
        return self._read([self.irrelevant[i] for i in at.tolist()])

    def _signal(self, prompts: Prompts, change: Tensor) -> Tensor:
        """(n,) D of each prompt."""
        return mean_by_row(_norm(_through(self.module, prompts.act, change)), prompts.row, prompts.n)

    @timed("train")
    def _train(self, suffix: DownProjectionSuffix, edits: Prompts, others: Prompts | None) -> tuple[Memory, float, int]:
        """The shard after one batch, the last loss and the steps taken. Raises `EditFailed` when a loss is not finite."""
        change, h = self.working.change, self.hyper
        before, value, step = float("inf"), float("nan"), 0
        for step in range(h.steps + 1):
            change = change.detach().requires_grad_(True)
            margins = self._margins(edits, others, change)
            loss = suffix.losses(partial(project, self.module, weight=self.weight + change)).mean().to(margins.device) + margins
            value = float(loss.detach())
            if not torch.isfinite(loss):
                raise EditFailed(f"the loss became {value} at lr {h.lr}; try a smaller one")
            if step == h.steps or value <= self.config.stop or abs(before - value) <= _STILL:
                break
            before = value
            (grad,) = torch.autograd.grad(loss, change)
            change = (change - h.lr * self.mask * grad).clamp(-h.clamp, h.clamp)
        change = change.detach()
        least = min(self.working.least, float(self._signal(edits, change).min()))
        return Memory(change, least), value, step

    def _margins(self, edits: Prompts, others: Prompts | None, change: Tensor) -> Tensor:
        """The three hinges on D, batch means."""
        h, near = self.hyper, self._signal(edits, change)
        loss = torch.relu(h.beta * self.unit - near).mean()
        if others is not None:
            far = self._signal(others, change)
            loss = loss + torch.relu(far - h.alpha * self.unit).mean() + torch.relu(h.gamma * self.unit - (near - far)).mean()
        return loss

    def _shard(self, step: int, before: int) -> None:
        """Close the shard after every so many edits, and merge shards after every so many more; a batch is not split."""
        shard, merge = self.config.shard, self.config.merge
        if before // shard == self.made // shard:
            return
        closed = (*self.memories, self.working)
        self._start_shard(step)
        if before // merge != self.made // merge:
            n = merge // shard if self.config.retrieve else len(closed)
            first, last = closed[:-n], closed[-n:]
            change = ties([m.change for m in last], [1.0] * len(last), self.config.keep)
            closed = (*first, Memory(change, min(m.least for m in last)))
        self._remember(torch.stack([m.change for m in closed]), [m.least for m in closed])

    def _live(self) -> tuple[Memory, ...]:
        """The memories that hold an edit."""
        return tuple(m for m in (*self.memories, self.working) if m.least < float("inf"))

    def predictor(self) -> Predictor:
        live = self._live()
        book = Router([m.least * self.config.ratio for m in live])
        gate = Gate(self.handle, self.module, book, lambda act, batch: self._signals(act, batch, live), self._answering(live))
        return ModelPredictor(self.handle, gate.around, gate.explain)

    def _signals(self, act: Tensor, batch: Batch, live: Sequence[Memory]) -> Tensor:
        """(B, S) D of each prompt under each memory."""
        prompts = _prompts(act, batch)
        return torch.stack([self._signal(prompts, m.change) for m in live], 1)

    def _answering(self, live: Sequence[Memory]) -> Callable[[Hits], Tensor]:
        edited = lru_cache(_HELD)(lambda i: self.weight + live[i].change)
        return lambda hits: torch.stack([project(self.module, x, edited(i)) for x, i in zip(hits.act, hits.rows)])

    def _state(self) -> dict[str, Any]:
        every = (*self.memories, self.working)
        least = torch.tensor([m.least for m in every], dtype=torch.float64)
        facts = {"made": self.made, "began": self.began, "model": self.handle.hash, "weight": self.weight_name}
        return {"change": self.working.change, "memories": self._changes, "least": least, **facts}

    def _load(self, state: dict[str, Any]) -> None:
        for name, value in {"model": self.handle.hash, "weight": self.weight_name}.items():
            if state.get(name) != value:
                raise BadEditor(f"the state was made with {name} {state.get(name)}, this editor has {value}")
        change = need(state, "change", tuple(self.weight.shape)).to(self.weight.device)
        saved = need(state, "memories", (None, *self.weight.shape)).to(self.weight.device)
        least = need(state, "least", (len(saved) + 1,)).tolist()
        self.made = state["made"]
        self._start_shard(state["began"])
        self.working = Memory(change, least[-1])
        self._remember(saved, least[:-1])


class Router:
    """Memories by their thresholds, as a gate's book: of those whose D reaches its threshold, the one with the largest D."""

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = list(thresholds)

    def __len__(self) -> int:
        return len(self.thresholds)

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """D (B, S) to (B,) the memory, or -1, and (B,) the largest D."""
        over = queries >= torch.tensor(self.thresholds, device=queries.device)
        largest = torch.where(over, queries, -torch.inf).max(1)
        return torch.where(over.any(1), largest.indices, -1), queries.max(1).values

    def entry_of(self, row: int) -> str:
        return f"memory {row}"


def _prompts(act: Tensor, batch: Batch) -> Prompts:
    """The prompt positions of activations (B, T, f)."""
    batch, act = batch.on(act.device), act.reshape(*batch.prompt.shape, -1)
    return Prompts(act[batch.prompt].float(), batch.prompt.nonzero()[:, 0], len(act))


def _through(module: nn.Module, act: Tensor, matrix: Tensor) -> Tensor:
    """(P, d) activations through a matrix of the layer's shape, without its bias."""
    return project(module, act, matrix, bias=False)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm along the last axis, with gradient zero where it is zero."""
    square = x.square().sum(-1)
    return torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
