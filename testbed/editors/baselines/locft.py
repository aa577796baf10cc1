"""LocFT-BF (Yang, Sun et al., ICLR 2026, arXiv 2509.22072): fine-tuning of one localised matrix, in epochs over the edits, breadth first.

    min_W  1/n sum_i  1/|y_i| sum_t -log p(y_i,t | x_i, y_i,<t; W)

by Adam on mini-batches, at most 25 epochs over the edits of a step. A mini-batch under a loss of 0.01 is skipped, and training
ends where an epoch's mean is under it. The end token is part of y. Fine-tuning as papers report it makes one edit after the
other, depth first, which is `finetune[order=depth]`.

`replay` mixes a share of earlier edits into every epoch, drawn from a reservoir (Vitter 1985, algorithm R) that holds as many as
`memory`: their prompts and answers are part of the state, and of its bytes. `locft-yearly` trains once a year.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch
from testbed.core.ranges import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.base import EditorConfig, WeightEditor, need, require_finite_loss
from testbed.editors.hyperparameters import LLAMA_3_8B, QWEN_25_7B, SHALLOW, PublishedRow, Table, Values
from testbed.editors.work import Work
from testbed.editors.year_buffer import YearBuffer
from testbed.model.handle import project
from testbed.model.suffix import DownProjectionSuffix, suffix_from_down_projection

PUBLISHED: Table = {
    LLAMA_3_8B: PublishedRow("LocFT-BF's repository, down-projection of layer 22", {"layer": 22, "lr": 5e-4}),
    QWEN_25_7B: PublishedRow("LocFT-BF's repository, down-projection of layer 6", {"layer": 6, "lr": 5e-4}),
}
Row = tuple[str, str, str]
"""Prompt, answer and relation of an edit in the reservoir."""


@dataclass(frozen=True)
class LocFTConfig(EditorConfig):
    layer: int | None = None
    """Decoder layer whose down-projection is trained; negative counts from the last."""
    lr: PositiveFloat | None = None
    """Adam's step size (paper: 5e-4)."""
    epochs: PositiveInt = 25
    """Most epochs over the edits of a step (paper: 25)."""
    rows: PositiveInt = 100
    """Edits in one mini-batch (paper: 100)."""
    stop: NonNegativeFloat = 1e-2
    """Loss (nats a token) under which a mini-batch is skipped, and an epoch's mean ends training (paper: 0.01)."""
    replay: Fraction = 0.0
    """Earlier edits that are mixed in, for each new one (ours); edits about pictures are not kept."""
    memory: PositiveInt = 1_000
    """Edits in the reservoir, where `replay` is on."""


def in_epochs(parts: Sequence[Callable[[], torch.Tensor]], learn: Callable[[torch.Tensor], None], h: Any) -> tuple[float, int]:
    """Train breadth first, with both stops: (the last epoch's mean loss, the epochs).

    parts: the loss of each mini-batch. learn: takes an optimiser step on a loss. h: hyper-parameters with `epochs`, `stop` and `lr`.
    Raises `EditFailed` where a loss is not finite.
    """
    mean = torch.nan
    for epoch in range(1, h.epochs + 1):
        losses = []
        for part in parts:
            loss = part()
            require_finite_loss(loss, h.lr)
            losses.append(float(loss.detach()))
            if losses[-1] >= h.stop:
                learn(loss)
        mean = sum(losses) / len(losses)
        if mean < h.stop:
            return mean, epoch
    return mean, h.epochs


@EDITORS.register("locft")
class LocFT(WeightEditor):
    """One layer's down-projection, trained in epochs on each batch from where the last one left it."""

    summary = "fine-tunes one localised matrix in epochs over the batch, breadth first (LocFT-BF)"
    Config = LocFTConfig
    published, defaults = PUBLISHED, {"layer": -1, "lr": 2.5e-3}

    def _derived(self) -> Values:
        """Two thirds of the depth, near Llama-3's published layer, and the published step, larger where weights are."""
        depth, lr = self.handle.n_layers, 5e-4 * (4096 / self.handle.width) ** 0.5
        return {} if depth < SHALLOW else {"layer": round(depth * 22 / 32), "lr": float(f"{lr:.1g}")}

    def work(self, batch: int) -> Work:
        """A training step for each mini-batch of each epoch, for half of the epochs."""
        layer = self.handle.layer_index(self.hyper.layer)
        parts = -(-batch // self.config.rows)
        steps, layers = self.config.epochs / 2 * parts, self.handle.n_layers - 1 - layer + 0.5
        return Work(
            forwards=2.0,
            steps=steps,
            rows=1.0 / parts,
            layers=layers,
            trained=float(self.handle.parameter(self.handle.down_weight(layer)).numel()),
        )

    def _prepare(self, pool: TrainPool) -> None:
        self.weight_name = self.handle.down_weight(self.hyper.layer)
        self.weight = self.handle.parameter(self.weight_name).detach().float().clone()
        self.reservoir: tuple[Row, ...] = ()
        self.seen = 0

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        kept = [(e.prompt, e.target, e.relation or "") for e in batch.events if e.image is None]
        return self._learn([(e.ask(), e.target) for e in batch.events], kept, batch.step)

    def _learn(self, new: Sequence[tuple[Ask, str]], kept: Sequence[Row], step: int) -> dict[str, float]:
        """Train on new edits, with earlier ones mixed in, and remember those of them that can be kept."""
        generator = self.generator(step)
        old = self._drawn(round(self.config.replay * len(new)), generator)
        pairs = [*new, *old]
        parts = [pairs[at : at + self.config.rows] for at in range(0, len(pairs), self.config.rows)]
        suffixes = [
            suffix_from_down_projection(self.handle, [ask for ask, _ in part], [answer for _, answer in part], self.hyper.layer)
            for part in parts
        ]
        self.weight, loss, epochs = self._train(suffixes)
        if self.config.replay:
            self._remember(kept, generator)
        return {"loss": loss, "epochs": float(epochs), "replayed": float(len(old))}

    @timed("train")
    def _train(self, suffixes: Sequence[DownProjectionSuffix]) -> tuple[torch.Tensor, float, int]:
        """(the new weight, the last epoch's mean loss, the epochs). Raises `EditFailed` where a loss is not finite."""
        module, weight = self.handle.down(self.hyper.layer), self.weight.clone().requires_grad_(True)
        adam = torch.optim.Adam([weight], lr=self.hyper.lr, fused=True)

        def learn(loss: torch.Tensor) -> None:
            adam.zero_grad()
            loss.backward()
            adam.step()

        parts = [lambda s=s: s.losses(lambda act: project(module, act, weight)).mean() for s in suffixes]
        mean, epochs = in_epochs(parts, learn, self.hyper)
        return weight.detach(), mean, epochs

    def _drawn(self, n: int, generator: torch.Generator) -> list[tuple[Ask, str]]:
        """n different edits of the reservoir, or all where it holds fewer."""
        order = torch.randperm(len(self.reservoir), generator=generator)[:n].tolist()
        return [(Ask(prompt, relation=relation), answer) for prompt, answer, relation in (self.reservoir[i] for i in order)]

    def _remember(self, rows: Sequence[Row], generator: torch.Generator) -> None:
        """Each edit so far is in the reservoir with the same probability."""
        kept, size = list(self.reservoir), self.config.memory
        for row in rows:
            self.seen += 1
            if len(kept) < size:
                kept.append(row)
            elif (at := int(torch.randint(self.seen, (1,), generator=generator))) < size:
                kept[at] = row
        self.reservoir = tuple(kept)

    def edited_weights(self) -> dict[str, torch.Tensor]:
        return {self.weight_name: self.weight}

    def state_bytes(self) -> int:
        """The weight, and the text of the reservoir."""
        return super().state_bytes() + sum(len(text.encode()) for row in self.reservoir for text in row)

    def _state(self) -> dict[str, Any]:
        return {"weight": self.weight, "reservoir": [list(row) for row in self.reservoir], "seen": self.seen}

    def _load(self, state: dict[str, Any]) -> None:
        base = self.handle.parameter(self.weight_name)
        self.weight = need(state, "weight", tuple(base.shape)).to(base.device)
        self.reservoir = tuple((prompt, answer, relation) for prompt, answer, relation in state["reservoir"])
        self.seen = state["seen"]


@EDITORS.register("locft-yearly")
class YearlyLocFT(LocFT):
    """LocFT-BF with a year as the batch: edits wait until it ends, and the model answers with the old weights until then."""

    summary = "LocFT-BF once a year, over all edits of the year; edits wait until then"

    def _prepare(self, pool: TrainPool) -> None:
        super()._prepare(pool)
        self.buffer = YearBuffer()

    @property
    def waits(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self.buffer.waiting)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        """Take the edits in. One whose loss is not finite fails here, where it would take the others of its year with it."""
        asks, targets = [e.ask() for e in batch.events], [e.target for e in batch.events]
        suffix, module = suffix_from_down_projection(self.handle, asks, targets, self.hyper.layer), self.handle.down(self.hyper.layer)
        with torch.no_grad():
            loss = suffix.losses(lambda act: project(module, act, self.weight))
        require_finite_loss(loss, self.hyper.lr)
        self.buffer = self.buffer.with_edits(batch.events)
        return {"loss": float(loss.mean()), "waiting": float(len(self.buffer.waiting))}

    def _close_year(self, step: int) -> dict[str, float]:
        waiting, self.buffer = self.buffer.waiting, YearBuffer()
        kept = [(w.ask.prompt, w.target, w.ask.relation) for w in waiting if w.ask.image is None]
        return self._learn([(w.ask, w.target) for w in waiting], kept, step) | {"waiting": 0.0}

    def state_bytes(self) -> int:
        """What `locft` keeps, and the edits that wait, with their pictures."""
        return super().state_bytes() + self.buffer.nbytes

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), **self.buffer.state()}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.buffer = YearBuffer.load(state)
