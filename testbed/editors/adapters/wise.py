"""WISE (Wang et al., NeurIPS 2024, arXiv 2405.14768): edits in a side memory, a copy of one down-projection, with routing.

The routing signal is D(x) = mean over prompt positions of ||a(x) (W' - W)||: how differently the side memory W' and
the main memory W answer. Training adds to the edits' cross-entropy
    relu(D(irrelevant) - alpha) + relu(beta - D(edit)) + relu(gamma - (D(edit) - D(irrelevant))).
A prompt is answered by the side memory with the largest D among those whose D reaches their threshold, which is the
smallest D seen in editing times a ratio. A shard of edits trains a random part of the matrix; TIES merges the shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch
from testbed.core.ranges import PositiveFloat, PositiveFraction, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.base import Editor, EditorConfig, Traits, need, require_finite_loss, require_same
from testbed.editors.codebook.gate import Answer, Gate
from testbed.editors.hyperparameters import (
    GPT_J,
    LLAMA_2_7B,
    LLAMA_3_8B,
    LLAMA_32_3B,
    MISTRAL_7B,
    QWEN_25_7B,
    SHALLOW,
    PublishedRow,
    Table,
    Values,
)
from testbed.model.encoding import Batch, collate
from testbed.model.handle import ModelHandle, project
from testbed.model.packed_linear import packed_layers
from testbed.model.predictor import ModelPredictor, Predictor
from testbed.model.suffix import DownProjectionSuffix, mean_by_row, suffix_from_down_projection

_SAMPLE = 32
"""Prompts over which the unit of the margins is measured."""
_SETTLED = 1e-4
"""Change of the loss under which a batch counts as settled (released code)."""
_CACHED = 4
"""Edited matrices that a predictor keeps; others are added up again when a prompt needs them."""


DEFAULTS: Values = {"lr": 1.0, "steps": 70, "clamp": 1.0, "alpha": 5.0, "beta": 20.0, "gamma": 10.0, "ratio": 0.88, "relative": False}
"""The paper's values."""

PUBLISHED: Table = {
    GPT_J: PublishedRow("EasyEdit, hparams/WISE/gpt-j-6B.yaml", {"layer": 21, "alpha": 15.0, "beta": 40.0, "gamma": 20.0}),
    LLAMA_2_7B: PublishedRow("EasyEdit, hparams/WISE/llama-7b.yaml", {"layer": 27}),
    LLAMA_3_8B: PublishedRow(
        "EasyEdit, hparams/WISE/llama3-8b.yaml; the file for 3.1 has alpha 5, beta 10, ratio 0.88",
        {"layer": 29, "lr": 0.9, "steps": 30, "alpha": 2.0, "ratio": 0.5},
    ),
    LLAMA_32_3B: PublishedRow("EasyEdit, hparams/WISE/llama3.2-3b.yaml", {"layer": 27}),
    MISTRAL_7B: PublishedRow("EasyEdit, hparams/WISE/mistral-7b.yaml", {"layer": 27}),
    QWEN_25_7B: PublishedRow("EasyEdit, hparams/WISE/qwen2.5-7b.yaml", {"layer": 23}),
}


def derived(handle: ModelHandle) -> Values:
    """Values for a model without published ones, with margins relative to the layer's output.

    A shallow model is edited at 27/32 of its depth (chosen on a development stream of the committed model), others at two
    thirds with ten times the step (chosen on SmolLM2).
    """
    depth = handle.n_layers
    layer, lr = (min(depth - 1, round(depth * 27 / 32)), 0.3) if depth < SHALLOW else (round(depth * 2 / 3), 3.0)
    margins = {"alpha": 0.25, "beta": 1.0, "gamma": 0.5, "relative": True}
    return {"layer": layer, "lr": lr, **margins}


@dataclass(frozen=True)
class WiseConfig(EditorConfig):
    """Fields that are None come from the hyper-parameters of the model."""

    layer: int | None = None
    """Decoder layer whose down-projection is copied; negative counts from the last (paper: 27 of Llama-2-7B)."""
    lr: PositiveFloat | None = None
    """Step size of plain gradient descent (paper: 1.0)."""
    steps: PositiveInt | None = None
    """Optimiser steps a batch, at most (paper: 70)."""
    clamp: PositiveFloat | None = None
    """Largest change of any entry of the matrix (paper: 1.0)."""
    alpha: PositiveFloat | None = None
    """alpha: D of irrelevant prompts is pushed under it (paper: 5)."""
    beta: PositiveFloat | None = None
    """beta: D of edits is pushed over it (paper: 20)."""
    gamma: PositiveFloat | None = None
    """gamma: the amount by which D of an edit must exceed that of an irrelevant prompt (paper: 10)."""
    relative: bool | None = None
    """alpha, beta and gamma are multiples of the mean norm of the layer's output over irrelevant prompts (paper: not)."""
    ratio: PositiveFraction | None = None
    """Share of the smallest D seen in editing that a prompt must reach (act_ratio; paper: 0.88)."""
    density: PositiveFraction = 0.2
    """rho: share of the matrix that one shard of edits may change (mask_ratio; paper: 0.2)."""
    shard: PositiveInt = 500
    """Edits that share one random part of the matrix (save_freq; paper: 500)."""
    merge: PositiveInt = 1_000
    """Edits after which shards are merged; a multiple of `shard` (merge_freq; paper: 1,000)."""
    keep: PositiveFraction = 0.53
    """Share of a shard's entries that TIES keeps (densities; paper: 0.53)."""
    retrieve: bool = True
    """Keep merged memories side by side and take the one with the largest D (WISE-Retrieve); false merges all into one (WISE-Merge)."""
    stop: float = 0.02
    """Loss under which a batch counts as learned (released code: 0.02)."""

    def problems(self) -> list[str]:
        uneven = self.shard >= 1 and self.merge % self.shard
        return super().problems() + ([f"merge must be a multiple of shard ({self.shard}), got {self.merge}"] if uneven else [])


@dataclass(frozen=True)
class SideMemory:
    """One side memory. change: W' - W, float32, as the model stores W. least: the smallest D seen in editing it."""

    change: Tensor
    least: float


@dataclass(frozen=True)
class PromptActivations:
    """Inputs of the layer at the prompt positions of n prompts: act (P, f) float32, row (P,) the prompt of each."""

    act: Tensor
    row: Tensor
    n: int

    def before(self, others: PromptActivations) -> PromptActivations:
        """These prompts, then others."""
        return PromptActivations(torch.cat([self.act, others.act]), torch.cat([self.row, others.row + self.n]), self.n + others.n)


@EDITORS.register("wise")
class Wise(Editor):
    """The side memory of the shard that is being trained, and those of earlier shards."""

    summary = "side memory beside one down-projection, routed by how differently it answers, sharded and merged (WISE)"
    traits = Traits(gated=True, uses=frozenset({"train_pool"}))
    Config = WiseConfig
    published, defaults = PUBLISHED, DEFAULTS

    def _derived(self) -> Values:
        own = derived(self.handle)
        relative = ("alpha", "beta", "gamma", "relative") if self.config.relative is False else ()
        return {k: v for k, v in own.items() if k not in relative}

    def _prepare(self, pool: TrainPool) -> None:
        self.irrelevant = [q.ask() for q in pool.questions if self.handle.reads_pictures or q.image is None]
        if not self.irrelevant:
            self.notes.append("the stream has no train pool: D of edits is pushed up, and no irrelevant prompt's is pushed down")
        self.module, self.weight_name = self.handle.down(self.hyper.layer), self.handle.down_weight(self.hyper.layer)
        self.weight = self.handle.parameter(self.weight_name).detach().float()
        self.unit = self._unit() if self.hyper.relative else 1.0
        self._remember(self.weight.new_zeros(0, *self.weight.shape), [])
        self.edits_made = 0
        self._start_shard(0)

    @torch.no_grad()
    def _unit(self) -> float:
        """Mean norm of the down-projection's output at a prompt position, without bias, over some prompts of the train pool."""
        prompts = self._read(self.irrelevant[:_SAMPLE] or [Ask("What is this?")])
        return float(project(self.module, prompts.act, self.weight, bias=False).norm(dim=-1).mean())

    def _remember(self, changes: Tensor, least: Sequence[float]) -> None:
        """Take over closed shards, with their changes (S, *shape) in one tensor that a state holds without a copy."""
        self._changes = changes
        self.memories = tuple(SideMemory(c, x) for c, x in zip(changes, least, strict=True))

    def _start_shard(self, step: int) -> None:
        """Begin with a side memory equal to the main one, and draw the random part of it that this shard may change."""
        self.shard_step = step
        self.working = SideMemory(torch.zeros_like(self.weight), float("inf"))
        draw = torch.rand(self.weight.shape, generator=self.generator(step))
        self.mask = (draw < self.config.density).to(self.weight.device)

    @timed("keys")
    def _read(self, asks: Sequence[Ask]) -> PromptActivations:
        """Inputs of the layer on prompts without answers, from one forward."""
        batch = collate(self.handle, asks)
        kept: list[Tensor] = []
        with torch.no_grad(), self.handle.hooked(self.module, lambda m, args: kept.append(args[0]), pre=True):
            self.handle.model(**batch.inputs, use_cache=False)
        return _prompts(kept[0], batch)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        asks = [e.ask() for e in batch.events]
        suffix = suffix_from_down_projection(self.handle, asks, [e.target for e in batch.events], self.hyper.layer)
        edits, others = self._read(asks), self._draw_irrelevant(batch)
        with packed_layers(self.handle, suffix.upper.first):
            self.working, loss, steps = self._train(suffix, edits, others)
        self.edits_made += len(batch.events)
        notes = {"loss": loss, "steps": float(steps), "threshold": self.working.least * self.hyper.ratio}
        with torch.no_grad():
            notes["signal_irrelevant"] = float(self._signal(others, self.working.change).mean()) if others else 0.0
        self._shard(batch.step, self.edits_made - len(batch.events))
        return {**notes, "entries": float(len(self._live()))}

    def _draw_irrelevant(self, batch: EditBatch) -> PromptActivations | None:
        """As many irrelevant prompts as there are edits, drawn from the train pool."""
        if not self.irrelevant:
            return None
        at = torch.randint(len(self.irrelevant), (len(batch.events),), generator=self.generator(batch.step))
        return self._read([self.irrelevant[i] for i in at.tolist()])

    def _signal(self, prompts: PromptActivations, change: Tensor) -> Tensor:
        """(n,) D of each prompt."""
        return mean_by_row(_norm(project(self.module, prompts.act, change, bias=False)), prompts.row, prompts.n)

    @timed("train")
    def _train(
        self, suffix: DownProjectionSuffix, edits: PromptActivations, others: PromptActivations | None
    ) -> tuple[SideMemory, float, int]:
        """The shard after one batch, the last loss and the steps taken. Raises `EditFailed` when a loss is not finite."""
        change, h = self.working.change, self.hyper
        before, value, step = float("inf"), float("nan"), 0
        for step in range(h.steps + 1):
            change = change.detach().requires_grad_(True)
            margins = self._margins(edits, others, change)
            loss = suffix.losses(partial(project, self.module, weight=self.weight + change)).mean().to(margins.device) + margins
            require_finite_loss(loss, h.lr)
            value = float(loss.detach())
            if step == h.steps or value <= self.config.stop or abs(before - value) <= _SETTLED:
                break
            before = value
            (grad,) = torch.autograd.grad(loss, change)
            change = (change - h.lr * self.mask * grad).clamp(-h.clamp, h.clamp)
        change = change.detach()
        least = min(self.working.least, float(self._signal(edits, change).min()))
        return SideMemory(change, least), value, step

    def _margins(self, edits: PromptActivations, others: PromptActivations | None, change: Tensor) -> Tensor:
        """The three hinge losses on D, each a mean over the batch."""
        h, signals = self.hyper, self._signal(edits if others is None else edits.before(others), change)
        near, far = signals[: edits.n], signals[edits.n :]
        loss = torch.relu(h.beta * self.unit - near).mean()
        if others is not None:
            loss = loss + torch.relu(far - h.alpha * self.unit).mean() + torch.relu(h.gamma * self.unit - (near - far)).mean()
        return loss

    def _shard(self, step: int, before: int) -> None:
        """Close the shard after `shard` edits, and merge shards after `merge` edits. A batch is never split between shards."""
        shard, merge = self.config.shard, self.config.merge
        if before // shard == self.edits_made // shard:
            return
        closed = (*self.memories, self.working)
        self._start_shard(step)
        if before // merge != self.edits_made // merge:
            n = merge // shard if self.config.retrieve else len(closed)
            first, last = closed[:-n], closed[-n:]
            change = ties([m.change for m in last], [1.0] * len(last), self.config.keep)
            closed = (*first, SideMemory(change, min(m.least for m in last)))
        self._remember(torch.stack([m.change for m in closed]), [m.least for m in closed])

    def _live(self) -> tuple[SideMemory, ...]:
        """The memories that hold an edit."""
        return tuple(m for m in (*self.memories, self.working) if m.least < float("inf"))

    def predictor(self) -> Predictor:
        live = self._live()
        router = MemoryRouter([m.least * self.hyper.ratio for m in live])
        gate = Gate(self.handle, [(self.module, self._answer(live))], router, lambda act, batch: self._signals(act, batch, live))
        return ModelPredictor(self.handle, gate.around, gate.explain)

    def _signals(self, act: Tensor, batch: Batch, live: Sequence[SideMemory]) -> Tensor:
        """(B, S) D of each prompt under each memory."""
        prompts = _prompts(act, batch)
        return torch.stack([self._signal(prompts, m.change) for m in live], 1)

    def _answer(self, live: Sequence[SideMemory]) -> Answer:
        edited = lru_cache(_CACHED)(lambda i: self.weight + live[i].change)
        return lambda hits: torch.stack([project(self.module, x, edited(i)) for x, i in zip(hits.act, hits.rows)])

    def _state(self) -> dict[str, Any]:
        every = (*self.memories, self.working)
        least = torch.tensor([m.least for m in every], dtype=torch.float64)
        counts = {"made": self.edits_made, "began": self.shard_step}
        return {"change": self.working.change, "memories": self._changes, "least": least, **counts, **self._own()}

    def _own(self) -> dict[str, Any]:
        return {"model": self.handle.hash, "weight": self.weight_name}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())
        change = need(state, "change", tuple(self.weight.shape)).to(self.weight.device)
        saved = need(state, "memories", (None, *self.weight.shape)).to(self.weight.device)
        least = need(state, "least", (len(saved) + 1,)).tolist()
        self.edits_made = state["made"]
        self._start_shard(state["began"])
        self.working = SideMemory(change, least[-1])
        self._remember(saved, least[:-1])


class MemoryRouter:
    """Routes a prompt to the side memory with the largest D among those whose D reaches their threshold."""

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = list(thresholds)

    def __len__(self) -> int:
        return len(self.thresholds)

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """D (B, S) of each prompt under each memory to (B,) the memory that answers, or -1, and (B,) the largest D."""
        over = queries >= torch.tensor(self.thresholds, device=queries.device)
        largest = torch.where(over, queries, -torch.inf).max(1)
        return torch.where(over.any(1), largest.indices, -1), queries.max(1).values

    def entry_of(self, row: int) -> str:
        return f"memory {row}"


def _prompts(act: Tensor, batch: Batch) -> PromptActivations:
    """The rows of activations (B, T, f) at prompt positions."""
    batch, act = batch.on(act.device), act.reshape(*batch.prompt.shape, -1)
    return PromptActivations(act[batch.prompt].float(), batch.prompt.nonzero()[:, 0], len(act))


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm along the last axis; its gradient is zero where the norm is."""
    square = x.square().sum(-1)
    return torch.where(square > 0, square, 1.0).sqrt() * (square > 0)


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES merging (Yadav et al., NeurIPS 2023, arXiv 2306.01708): changes of one shape, each with a positive weight, to one change.

    Of each change the share `density` of its entries with the largest magnitude is kept; the sign of every entry is
    that of the weighted sum; entries of the other sign are left out, and those that stay are averaged by weight.
    """
    kept = torch.stack([trimmed(c, density) for c in changes])
    weight = torch.tensor(list(weights), dtype=kept.dtype, device=kept.device).reshape(-1, *[1] * (kept.ndim - 1))
    sign = (weight * kept).sum(0).sign()
    agree = (kept.sign() == sign) & (kept != 0)
    total = (weight * kept * agree).sum(0)
    return total / (weight * agree).sum(0).clamp(min=torch.finfo(kept.dtype).tiny)


def trimmed(change: Tensor, density: float) -> Tensor:
    """A change with its largest entries by magnitude, at least one, and zeros elsewhere."""
    n = max(1, round(density * change.numel()))
    if n == change.numel():
        return change
    at = change.abs().flatten().topk(n).indices
    return torch.zeros_like(change.flatten()).index_copy(0, at, change.flatten()[at]).reshape(change.shape)
