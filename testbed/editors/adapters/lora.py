"""LoRA in sequence: the continual fine-tuning baselines of the lifelong-editing literature.

`lora` trains one adapter on every batch in turn. `lora-yearly` is LoRA-Merge of WikiBigEdit (Thede et al., ICML
2025, arXiv 2503.05683) with a year as the increment: each year trains an adapter of its own, of which a share is
added to the weights, W <- W + share scale V^T U; the model answers with that share, in the year itself too. With `buffer` the
edits of a year wait until it ends, and then train the adapter for `epochs` epochs in mini-batches, as published; until then the
model answers with the weights of the year before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch
from testbed.core.ranges import PositiveFloat, PositiveFraction, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.adapters import elder, lowrank
from testbed.editors.base import EditorConfig, WeightEditor, minimise, need, require_finite_loss, require_same
from testbed.editors.hyperparameters import GPT2_XL, GPT_J, LLAMA_2_7B, LLAMA_3_8B, LLAMA_32_3B, SHALLOW, PublishedRow, Table, Values
from testbed.editors.work import Work
from testbed.editors.year_buffer import YearBuffer
from testbed.model.packed_linear import packed_layers

_ATTENTION: Values = {"modules": r"\.self_attn\.(q|v)_proj$", "scale": 4.0, "lr": 5e-3, "steps": 70}
"""What EasyEdit's files for LoRA on the Llama family agree on."""

PUBLISHED: Table = {
    GPT2_XL: PublishedRow("EasyEdit, hparams/LoRA/gpt2-xl.yaml, AdaLoRA there", {**_ATTENTION, "modules": r"\.attn\.c_attn$", "steps": 30}),
    GPT_J: PublishedRow(
        "EasyEdit, hparams/LoRA/gpt-j-6B.yaml, AdaLoRA there", {**_ATTENTION, "modules": r"\.mlp\.fc_(in|out)$", "steps": 50}
    ),
    LLAMA_2_7B: PublishedRow("EasyEdit, hparams/LoRA/llama-7b.yaml, AdaLoRA there", _ATTENTION),
    LLAMA_3_8B: PublishedRow("EasyEdit, hparams/LoRA/llama3-8b.yaml, AdaLoRA there", _ATTENTION),
    LLAMA_32_3B: PublishedRow("EasyEdit, hparams/LoRA/llama3.2-3b.yaml, AdaLoRA there", _ATTENTION),
}

Pairs = tuple[tuple[Tensor, Tensor], ...]
"""U and V of each target module."""
_WARM_UP = 10
"""One in so many steps of a year's training is part of the warm-up."""


@dataclass(frozen=True)
class LoraConfig(EditorConfig):
    modules: str | None = None
    """Regular expression over the names of the decoder's linear maps; without a published row those that ELDER adapts."""
    rank: PositiveInt = 8
    """r (ELDER's baseline: 8; WikiBigEdit: 4)."""
    scale: PositiveFloat | None = None
    """alpha / r, the factor on the product of the two matrices (WikiBigEdit: 2, EasyEdit: 4)."""
    lr: PositiveFloat | None = None
    """Adam's step size."""
    steps: PositiveInt | None = None
    """Optimiser steps a batch. The optimiser starts afresh for each batch."""


@EDITORS.register("lora")
class Lora(WeightEditor):
    """Two thin matrices at each target module, trained further on every batch."""

    summary = "one LoRA adapter, trained edit after edit"
    Config = LoraConfig
    published, defaults = PUBLISHED, {**elder.DEFAULTS, "scale": 1.0}
    share = 1.0
    """The share of the adapter that the answers are given with."""

    def _derived(self) -> Values:
        """ELDER's target modules, so that the two compare, with a step that was chosen on SmolLM2 for deeper models."""
        found = elder.derived(self.handle)
        return found if self.handle.n_layers < SHALLOW else {**found, "lr": 5e-4}

    def _prepare(self, pool: TrainPool) -> None:
        self.targets = lowrank.find_target_modules(self.handle, self.hyper.modules)
        lowrank.check_rank(self.targets, self.config.rank)
        self.pairs = self._fresh(0)

    def work(self, batch: int) -> Work:
        targets = lowrank.find_target_modules(self.handle, self.hyper.modules)
        return lowrank.adapter_work(targets, self.config.rank, self.hyper.steps, self.handle.n_layers)

    def _fresh(self, step: int) -> Pairs:
        """An adapter that changes nothing, drawn from the randomness of a step."""
        generator = self.generator(step)
        return tuple(lowrank.fresh(s, self.config.rank, generator) for s in self.targets)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        asks = [e.ask() for e in batch.events]
        with self.handle.swapped(self._below()):
            suffix = lowrank.AdaptedSuffix(self.handle, self.targets, asks, [e.target for e in batch.events])
            self.pairs, loss = self._train(suffix)
        return {"loss": loss}

    def _below(self) -> dict[str, Tensor]:
        """The weights on which the adapter is trained, where they are not the base's."""
        return {}

    @timed("train")
    def _train(self, suffix: lowrank.AdaptedSuffix) -> tuple[Pairs, float]:
        """The adapter after one batch and the last loss (nats a token). Raises `EditFailed` when the loss is not finite."""
        pairs = [(u.clone().requires_grad_(True), v.clone().requires_grad_(True)) for u, v in self.pairs]
        adds = [lowrank.Adapter(u, v, self.hyper.scale) for u, v in pairs]
        tensors = [t for pair in pairs for t in pair]
        with packed_layers(self.handle, self.targets[0].layer):
            loss = minimise(tensors, lambda: suffix.losses(adds).mean(), self.hyper.lr, self.hyper.steps)
        return tuple((u.detach(), v.detach()) for u, v in pairs), float(loss)

    def _changes(self) -> list[Tensor]:
        """The change of each target module's weight, float32."""
        return [lowrank.delta(target, adapter) for target, adapter in zip(self.targets, self._adapters())]

    def _adapters(self) -> list[lowrank.Adapter]:
        return [lowrank.Adapter(u, v, self.share * self.hyper.scale) for u, v in self.pairs]

    def edited_weights(self) -> dict[str, Tensor]:
        return self._changed_by(self._changes())

    def _changed_by(self, changes: Sequence[Tensor]) -> dict[str, Tensor]:
        """The base weights plus changes of the target modules, float32."""
        return {t.weight: self.handle.parameter(t.weight).detach().float() + change for t, change in zip(self.targets, changes)}

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as PEFT loads it: on the base for `lora`, on what was merged before for a yearly one."""
        lowrank.save_peft(folder, self.handle, {t.name: a for t, a in zip(self.targets, self._adapters())})

    def _state(self) -> dict[str, Any]:
        tensors = {f"{k}.{i}": t for i, pair in enumerate(self.pairs) for k, t in zip("uv", pair)}
        return {**tensors, **self._own()}

    def _own(self) -> dict[str, Any]:
        return {"model": self.handle.hash, "modules": [t.name for t in self.targets]}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())
        self.pairs = tuple((_like(state, f"u.{i}", u), _like(state, f"v.{i}", v)) for i, (u, v) in enumerate(self.pairs))


def _like(state: dict[str, Any], name: str, mine: Tensor) -> Tensor:
    return need(state, name, tuple(mine.shape)).to(mine.device)


@dataclass(frozen=True)
class YearlyConfig(LoraConfig):
    rank: PositiveInt = 4
    scale: PositiveFloat = 2.0
    share: PositiveFraction = 0.25
    """The share of a year's adapter that is added to the weights (WikiBigEdit's code: merge_alpha 0.25)."""
    buffer: bool = False
    """Edits wait, and a year trains at its end (as published); off: each batch trains `steps` steps when it comes."""
    epochs: PositiveInt = 10
    """Epochs over the edits of a year, with `buffer` (paper: 10)."""
    rows: PositiveInt = 5
    """Edits in one mini-batch, with `buffer` (WikiBigEdit's file for Llama-3: 5)."""


@EDITORS.register("lora-yearly")
class YearlyLora(Lora):
    """One adapter a year; a share of it stays in the weights when the next year begins."""

    summary = "one LoRA adapter a year, a share of each merged into the weights (LoRA-Merge of WikiBigEdit)"
    Config = YearlyConfig
    published = {}

    def _prepare(self, pool: TrainPool) -> None:
        super()._prepare(pool)
        self.share = self.config.share
        self.year: int | None = None
        self.buffer = YearBuffer()
        self.merged = tuple(torch.zeros_like(self.handle.parameter(s.weight), dtype=torch.float32) for s in self.targets)

    @property
    def waits(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self.buffer.waiting)

    def work(self, batch: int) -> Work:
        found = super().work(batch)
        parts = -(-batch // self.config.rows)
        return replace(found, steps=float(self.config.epochs * parts), rows=found.rows / parts) if self.config.buffer else found

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        if self.config.buffer:
            return self._wait(batch)
        year = batch.events[0].year
        if self.year is not None and year != self.year:
            self.merged = tuple(self._changes())
            self.pairs = self._fresh(batch.step)
        self.year = year
        return super()._edit(batch)

    def _wait(self, batch: EditBatch) -> dict[str, float]:
        """Take edits in. One whose loss is not finite fails here, where it would take the others of its year with it."""
        with self.handle.swapped(self._below()), torch.no_grad():
            suffix = lowrank.AdaptedSuffix(self.handle, self.targets, [e.ask() for e in batch.events], [e.target for e in batch.events])
            loss = suffix.losses([])
        require_finite_loss(loss, self.hyper.lr)
        self.buffer = self.buffer.with_edits(batch.events)
        return {"loss": float(loss.mean()), "waiting": float(len(self.buffer.waiting))}

    def _close_year(self, step: int) -> dict[str, float]:
        """Train a fresh adapter on the year, and add its share to the weights."""
        waiting, self.buffer, self.pairs = self.buffer.waiting, YearBuffer(), self._fresh(step)
        with self.handle.swapped(self._below()):
            self.pairs, loss = self._train_year([(w.ask, w.target) for w in waiting], self.generator(step))
        self.merged, self.pairs = tuple(self._changes()), self._fresh(step)
        return {"loss": loss, "waiting": 0.0}

    @timed("train")
    def _train_year(self, edits: Sequence[tuple[Ask, str]], generator: torch.Generator) -> tuple[Pairs, float]:
        """(the adapter, the mean loss of the last epoch) after all epochs; the step size rises over a tenth of the steps and falls as a
        cosine. Each epoch takes the mini-batches in another order. Raises `EditFailed` where a loss is not finite."""
        from transformers import get_cosine_schedule_with_warmup  # loads peft and model files, seconds that other editors need not wait

        parts = [edits[at : at + self.config.rows] for at in range(0, len(edits), self.config.rows)]
        suffixes = [lowrank.AdaptedSuffix(self.handle, self.targets, [a for a, _ in part], [x for _, x in part]) for part in parts]
        pairs = [(u.clone().requires_grad_(True), v.clone().requires_grad_(True)) for u, v in self.pairs]
        adds = [lowrank.Adapter(u, v, self.hyper.scale) for u, v in pairs]
        adam = torch.optim.Adam([t for pair in pairs for t in pair], lr=self.hyper.lr, fused=True)
        steps, losses = self.config.epochs * len(parts), []
        schedule = get_cosine_schedule_with_warmup(adam, steps // _WARM_UP, steps)
        with packed_layers(self.handle, self.targets[0].layer):
            for _ in range(self.config.epochs):
                losses = []
                for part in torch.randperm(len(parts), generator=generator).tolist():
                    adam.zero_grad()
                    loss = suffixes[part].losses(adds).mean()
                    require_finite_loss(loss, self.hyper.lr)
                    loss.backward()
                    adam.step()
                    schedule.step()
                    losses.append(float(loss.detach()))
        return tuple((u.detach(), v.detach()) for u, v in pairs), sum(losses) / len(losses)

    def state_bytes(self) -> int:
        """The tensors, and the edits that wait, with their pictures."""
        return super().state_bytes() + self.buffer.nbytes

    def _below(self) -> dict[str, Tensor]:
        return self._changed_by(self.merged)

    def _changes(self) -> list[Tensor]:
        return [m + c for m, c in zip(self.merged, super()._changes())]

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), **{f"merged.{i}": m for i, m in enumerate(self.merged)}, "year": self.year, **self.buffer.state()}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.merged = tuple(_like(state, f"merged.{i}", m) for i, m in enumerate(self.merged))
        self.year = state["year"]
        self.buffer = YearBuffer.load(state)
