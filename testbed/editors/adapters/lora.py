"""LoRA in sequence: the continual fine-tuning baselines of the lifelong-editing literature.

`lora` trains one adapter on every batch in turn. `lora-yearly` is LoRA-Merge of WikiBigEdit (Thede et al., ICML
2025, arXiv 2503.05683) with a year as the increment: each year trains an adapter of its own, of which a share is
added to the weights; the model answers with that share, in the year itself too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import EditBatch
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.adapters import lowrank
from testbed.editors.adapters.elder_hyper import hyper_of
from testbed.editors.base import BadEditor, EditFailed, Editor, EditorConfig, Traits, need
from testbed.model.predictor import ModelPredictor, Predictor


@dataclass(frozen=True)
class LoraConfig(EditorConfig):
    modules: str | None = None
    """Regular expression over the names of the decoder's linear maps; none is where ELDER puts its adapters, so that the two compare."""
    rank: int = 8
    """r (ELDER's baseline: 8; WikiBigEdit: 4)."""
    scale: float = 1.0
    """alpha / r, what the product of the two matrices is multiplied by (WikiBigEdit: 2)."""
    lr: float | None = None
    """Adam's step size; none is ELDER's for the model."""
    steps: int | None = None
    """Optimiser steps a batch; none is ELDER's for the model. The optimiser starts afresh for each batch."""

    def problems(self) -> list[str]:
        given = {n: getattr(self, n) for n in ("rank", "steps")}
        out = [f"{n} must be 1 or more, got {v}" for n, v in given.items() if v is not None and v < 1]
        given = {n: getattr(self, n) for n in ("scale", "lr")}
        return out + [f"{n} must be positive, got {v}" for n, v in given.items() if v is not None and not v > 0]


@EDITORS.register("lora")
class Lora(Editor):
    """Two thin matrices at each site, trained on, batch after batch."""

    summary = "one LoRA adapter, trained edit after edit"
    traits = Traits(weights=True)
    Config = LoraConfig
    share = 1.0
    """How much of the adapter counts in the answers."""

    def _prepare(self, pool: TrainPool) -> None:
        found, note = hyper_of(self.handle)
        self.notes = [note] if note and None in (self.config.modules, self.config.lr, self.config.steps) else []
        self.lr = self.config.lr if self.config.lr is not None else found.lr
        self.steps = self.config.steps if self.config.steps is not None else found.steps
        self.targets = lowrank.find_target_modules(self.handle, self.config.modules or found.modules)
        lowrank.check_rank(self.targets, self.config.rank)
        self.pairs = self._fresh(0)

    def _fresh(self, step: int) -> tuple[tuple[Tensor, Tensor], ...]:
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
        """The weights that the adapter is trained on top of, where they are not the base's."""
        return {}

    @timed("train")
    def _train(self, suffix: lowrank.AdaptedSuffix) -> tuple[tuple[tuple[Tensor, Tensor], ...], float]:
        """The adapter after one batch and the last loss (nats a token). Raises `EditFailed` when the loss is not finite."""
        pairs = [(u.clone().requires_grad_(True), v.clone().requires_grad_(True)) for u, v in self.pairs]
        adam = torch.optim.Adam([t for pair in pairs for t in pair], lr=self.lr)
        adds = [lowrank.Adapter(u, v, self.config.scale) for u, v in pairs]
        value = float("nan")
        for _ in range(self.steps):
            adam.zero_grad()
            loss = suffix.losses(adds).mean()
            value = float(loss.detach())
            if not torch.isfinite(loss):
                raise EditFailed(f"the loss became {value} at lr {self.lr}; try a smaller one")
            loss.backward()
            adam.step()
        return tuple((u.detach(), v.detach()) for u, v in pairs), value

    def _changes(self) -> list[Tensor]:
        """The change of each site's weight, float32."""
        return [lowrank.delta(s, lowrank.Adapter(u, v, self.share * self.config.scale)) for s, (u, v) in zip(self.targets, self.pairs)]

    def edited_weights(self) -> dict[str, Tensor]:
        changed = zip(self.targets, self._changes())
        return {s.weight: self.handle.parameter(s.weight).detach().float() + change for s, change in changed}

    def predictor(self) -> Predictor:
        weights = self.edited_weights()
        return ModelPredictor(self.handle, around=lambda batch: self.handle.swapped(weights))

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as PEFT loads it: on the base for `lora`, on what was merged before for a yearly one."""
        adapters = {s.name: lowrank.Adapter(u, v, self.share * self.config.scale) for s, (u, v) in zip(self.targets, self.pairs)}
        lowrank.save_peft(folder, self.handle, adapters)

    def _state(self) -> dict[str, Any]:
        tensors = {f"{k}.{i}": t for i, pair in enumerate(self.pairs) for k, t in zip("uv", pair)}
        return {**tensors, "model": self.handle.hash, "modules": [s.name for s in self.targets]}

    def _load(self, state: dict[str, Any]) -> None:
        for name, value in {"model": self.handle.hash, "modules": [s.name for s in self.targets]}.items():
            if state.get(name) != value:
                raise BadEditor(f"the state was made with {name} {state.get(name)}, this editor has {value}")
        self.pairs = tuple((_like(state, f"u.{i}", u), _like(state, f"v.{i}", v)) for i, (u, v) in enumerate(self.pairs))


def _like(state: dict[str, Any], name: str, mine: Tensor) -> Tensor:
    return need(state, name, tuple(mine.shape)).to(mine.device)


@dataclass(frozen=True)
class YearlyConfig(LoraConfig):
    rank: int = 4
    scale: float = 2.0
    share: float = 0.25
    """How much of a year's adapter is added to the weights (WikiBigEdit's code: merge_alpha 0.25)."""

    def problems(self) -> list[str]:
        return super().problems() + ([] if 0 < self.share <= 1 else [f"share must lie in (0, 1], got {self.share}"])


@EDITORS.register("lora-yearly")
class YearlyLora(Lora):
    """One adapter a year; a share of it stays in the weights when the next year begins."""

    summary = "one LoRA adapter a year, a share of each merged into the weights (LoRA-Merge of WikiBigEdit)"
    Config = YearlyConfig

    def _prepare(self, pool: TrainPool) -> None:
        super()._prepare(pool)
        self.share = self.config.share
        self.year: int | None = None
        self.merged = tuple(torch.zeros_like(self.handle.parameter(s.weight), dtype=torch.float32) for s in self.targets)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        year = batch.events[0].year
        if self.year is not None and year != self.year:
            self.merged = tuple(self._changes())
            self.pairs = self._fresh(batch.step)
        self.year = year
        return super()._edit(batch)

    def _below(self) -> dict[str, Tensor]:
        return {s.weight: self.handle.parameter(s.weight).detach().float() + m for s, m in zip(self.targets, self.merged)}

    def _changes(self) -> list[Tensor]:
        return [m + c for m, c in zip(self.merged, super()._changes())]

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), **{f"merged.{i}": m for i, m in enumerate(self.merged)}, "year": self.year}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.merged = tuple(_like(state, f"merged.{i}", m) for i, m in enumerate(self.merged))
        self.year = state["year"]
