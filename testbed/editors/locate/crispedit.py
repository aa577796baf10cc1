"""CrispEdit (Ikram et al., ICML 2026, arXiv 2602.15823): fine-tuning along directions of low curvature of general text.

The down-projections of a few layers are trained on the answers' tokens, breadth first with LocFT-BF's stops, by Adam on the
projected gradient P(G) (`kfac.py`, equations 1 and 2). Adam rescales entry by entry, so that its step S leaves the subspace:

    project=gradient    W <- W + S(P(G))            as released
    project=step        W <- W + P(S(P(G)))         every step lies in the subspace                     (3)

The factors are those of general text, merged with those of the edits made so far by their numbers of tokens. Before a batch, where
a weight has moved by more than `renew` of its norm since the factors of the text were estimated, they are estimated anew:

    |W - W_r|_F > renew |W_r|_F     for some layer,   W_r the weights of the last estimate              (4)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import EditBatch
from testbed.core.ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.adapters.lowrank import AdaptedSuffix, TargetModule
from testbed.editors.base import EditorConfig, WeightEditor, need, require_same
from testbed.editors.baselines.locft import in_epochs
from testbed.editors.hyperparameters import LLAMA_3_8B, MISTRAL_7B, QWEN_25_7B, SHALLOW, PublishedRow, Table, Values
from testbed.editors.locate.general_text import corpus_of, corpus_problem
from testbed.editors.locate.kfac import Factors, Subspace, batches, factors, merged, text_factors
from testbed.editors.locate.targets import RowAdam
from testbed.editors.traits import Traits
from testbed.editors.work import Work, down_shape
from testbed.model.handle import as_matrix, as_stored
from testbed.model.packed_linear import packed_layers

PUBLISHED: Table = {
    LLAMA_3_8B: PublishedRow("CrispEdit's repository, hparams/CrispEdit/llama3-8b.yaml", {"layers": (19, 20, 21, 22, 23), "lr": 5e-4}),
    MISTRAL_7B: PublishedRow("CrispEdit's repository, hparams/CrispEdit/mistral-7b.yaml", {"layers": (19, 20, 21, 22, 23), "lr": 5e-4}),
    QWEN_25_7B: PublishedRow("CrispEdit's repository, hparams/CrispEdit/qwen2.5-7b.yaml", {"layers": (15, 16, 17, 18, 19), "lr": 5e-4}),
}
_A_DIRECTION = 5
"""Positions of general text for each input of a weight; 140 texts of 512 tokens for Llama-3 (published: 100 or 1,000)."""


@dataclass(frozen=True)
class CrispEditConfig(EditorConfig):
    """Fields that are None come from the hyper-parameters of the model."""

    layers: tuple[NonNegativeInt, ...] | None = None
    """Layers whose down-projections are trained together, in rising order."""
    lr: PositiveFloat | None = None
    """Adam's step size (paper: 5e-4)."""
    gamma: Fraction = 0.99
    """gamma: share of the curvature whose directions are held fixed (released files: 0.99, README: 0.8); 0 is plain Adam."""
    project: Literal["step", "gradient"] = "step"
    """What is projected last: the step itself, or the gradient before Adam rescales it (as released)."""
    epochs: PositiveInt = 25
    """Most epochs over the edits of a step (paper: 25)."""
    rows: PositiveInt = 32
    """Edits in one mini-batch (paper: 32)."""
    stop: NonNegativeFloat = 1e-2
    """Loss (nats a token) under which a mini-batch is skipped, and an epoch's mean ends training (released code: 0.01)."""
    past: bool = True
    """The factors of edits made so far are merged in (the paper's sequential form)."""
    renew: PositiveFloat = 0.25
    """Share of its norm that a weight may move before the factors of the text are estimated anew (released code: 0.25)."""
    corpus: str | None = None
    """General text: a file, one text a line, or hub:DATASET[:CONFIG[:SPLIT[:FIELD]]]; by default as for locate-then-edit methods."""

    def problems(self) -> list[str]:
        rising = self.layers is None or (bool(self.layers) and sorted(set(self.layers)) == list(self.layers))
        found = corpus_problem(self.corpus) if self.corpus is not None else None
        return super().problems() + ([found] if found else []) + ([] if rising else ["layers must be one or more layers, rising"])


@EDITORS.register("crispedit")
class CrispEdit(WeightEditor):
    """A change for each layer, trained further on every batch, and the curvature that it must respect."""

    summary = "fine-tunes a few matrices where the curvature of general text is low (CrispEdit)"
    traits = Traits(weights=True, uses=frozenset({"train_pool"}))
    Config = CrispEditConfig
    published, defaults = PUBLISHED, {"lr": 2.5e-3}

    def _derived(self) -> Values:
        """The published layers, by their share of the depth, and LocFT's step; of a shallow model the last layer."""
        depth, lr = self.handle.n_layers, 5e-4 * (4096 / self.handle.width) ** 0.5
        first, last = (round(depth * n / 32) for n in (19, 23))
        return {"layers": (depth - 1,)} if depth < SHALLOW else {"layers": tuple(range(first, last + 1)), "lr": float(f"{lr:.1g}")}

    def work(self, batch: int) -> Work:
        """Training as LocFT's, of several layers; text is read forward and back, which counts as three times."""
        layers, parts = self.hyper.layers, -(-batch // self.config.rows)
        d, f = down_shape(self.handle, layers[0])
        numbers = float(len(layers) * d * f)
        return Work(
            text_tokens=3.0 * _A_DIRECTION * f,
            eigen=(f, d) * len(layers),
            forwards=2.0,
            steps=self.config.epochs / 2 * parts,
            rows=1.0 / parts,
            layers=float(self.handle.n_layers - layers[0]),
            trained=numbers,
            state=numbers + (len(layers) * float(f * f + d * d) if self.config.past else 0.0),
        )

    def _prepare(self, pool: TrainPool) -> None:
        self.pool = pool
        self.layers: tuple[int, ...] = tuple(self.handle.layer_index(n) for n in self.hyper.layers)
        names = {n: self.handle.down_weight(n) for n in self.layers}
        shapes = {n: down_shape(self.handle, n) for n in self.layers}
        self.targets = [
            TargetModule(names[n].removesuffix(".weight"), self.handle.down(n), n, shapes[n][1], shapes[n][0]) for n in self.layers
        ]
        self.bases = {n: as_matrix(self.handle.down(n), self.handle.parameter(names[n]).detach()).float() for n in self.layers}
        self.changes = {n: torch.zeros_like(w) for n, w in self.bases.items()}
        self.anchors = self.changes
        """The changes under which the factors of the text were estimated last."""
        self.past: dict[int, Factors] = {}
        self._forget()

    def _forget(self) -> None:
        """Let what follows from the state be computed anew."""
        self._of_text: dict[int, Factors] | None = None
        self._spaces: dict[int, Subspace] | None = None

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        asks, targets = [e.ask() for e in batch.events], [e.target for e in batch.events]
        size, n = self.config.rows, len(asks)
        parts = [AdaptedSuffix(self.handle, self.targets, asks[at : at + size], targets[at : at + size]) for at in range(0, n, size)]
        renewed = self._renew()
        loss, epochs = self._train(parts, self._subspaces())
        if self.config.past:
            self._count(parts)
        notes = {"loss": loss, "epochs": float(epochs), "renewed": float(renewed)}
        return notes | {"free": self._free}

    @timed("train")
    def _train(self, parts: Sequence[AdaptedSuffix], spaces: dict[int, Subspace]) -> tuple[float, int]:
        """Equation 3 until a stop: (the last epoch's mean loss, the epochs). Raises `EditFailed` where a loss is not finite."""
        changes = {n: c.clone().requires_grad_(True) for n, c in self.changes.items()}
        adams = {n: RowAdam(c, self.hyper.lr) for n, c in changes.items()}
        adds = [lambda act, c=c: act.float() @ c.mT for c in changes.values()]

        def learn(loss: Tensor) -> None:
            gradients = torch.autograd.grad(loss, [*changes.values()])
            with torch.no_grad():
                for (n, change), gradient in zip(changes.items(), gradients):
                    step = adams[n].step(spaces[n].project(gradient))
                    change += spaces[n].project(step) if self.config.project == "step" else step

        with packed_layers(self.handle, self.layers[0]):
            found = in_epochs([lambda p=p: p.losses(adds).mean() for p in parts], learn, self.hyper)
        self.changes = {n: c.detach() for n, c in changes.items()}
        return found

    @timed("factors")
    def _renew(self) -> bool:
        """Equation 4; whether the factors of the text were estimated anew."""
        moved = [(self.changes[n] - self.anchors[n]).norm() / (self.bases[n] + self.anchors[n]).norm() for n in self.layers]
        if max(moved) <= self.config.renew:
            return False
        self.anchors = self.changes
        self._forget()
        return True

    @timed("factors")
    def _subspaces(self) -> dict[int, Subspace]:
        """The subspace of each layer, from the factors of the text and of past edits."""
        if self._of_text is None:
            corpus = corpus_of(self.handle, self.pool, self.config.corpus)
            positions = _A_DIRECTION * self.targets[0].f
            if any(c.any() for c in self.anchors.values()):
                with self.handle.swapped(self._weights(self.anchors)):
                    self._of_text = factors(self.handle, batches(self.handle, corpus), self.layers, positions)
            else:
                self._of_text = text_factors(self.handle, corpus, self.layers, positions, self.notes)
        if self._spaces is None:
            parts = {n: [self._of_text[n], *([self.past[n]] if n in self.past else [])] for n in self.layers}
            self._spaces = {n: Subspace(merged(p), self.config.gamma) for n, p in parts.items()}
        return self._spaces

    @property
    def _free(self) -> float:
        """Share of the directions that may change."""
        spaces = self._subspaces().values()
        return sum(float(s.free.float().mean()) for s in spaces) / len(spaces)

    @timed("factors")
    def _count(self, parts: Sequence[AdaptedSuffix]) -> None:
        """Merge the factors of a batch that was just learned."""
        with self.handle.swapped(self.edited_weights()):
            new = factors(self.handle, (p.batch for p in parts), self.layers)
        both = {n: merged([self.past[n], f]) if n in self.past else f for n, f in new.items()}
        self.past = {n: replace(f, a=f.a.float(), b=f.b.float()) for n, f in both.items()}
        self._spaces = None

    def _weights(self, changes: dict[int, Tensor]) -> dict[str, Tensor]:
        return {t.weight: as_stored(t.module, self.bases[t.layer] + changes[t.layer]) for t in self.targets}

    def edited_weights(self) -> dict[str, Tensor]:
        return self._weights(self.changes)

    def _own(self) -> dict[str, Any]:
        return {"model": self.handle.hash, "layers": list(self.layers)}

    def _state(self) -> dict[str, Any]:
        tensors = {f"change.{n}": c for n, c in self.changes.items()}
        if self.anchors is not self.changes and any(c.any() for c in self.anchors.values()):
            tensors |= {f"anchor.{n}": c for n, c in self.anchors.items()}
        of_edits = {f"{name}.{n}": getattr(f, name) for n, f in self.past.items() for name in ("a", "b")}
        return {**tensors, **of_edits, "tokens": {str(n): f.n for n, f in self.past.items()}, **self._own()}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())

        def found(name: str, n: int, shape: tuple[int, ...]) -> Tensor:
            return need(state, f"{name}.{n}", shape).to(self.bases[n].device)

        shapes = {n: tuple(w.shape) for n, w in self.bases.items()}
        self.changes = {n: found("change", n, s) for n, s in shapes.items()}
        renewed = f"anchor.{self.layers[0]}" in state
        self.anchors = {n: found("anchor", n, s) if renewed else torch.zeros_like(self.bases[n]) for n, s in shapes.items()}
        counts = {int(n): count for n, count in state["tokens"].items()}
        self.past = {n: Factors(found("a", n, (f, f)), found("b", n, (d, d)), counts[n]) for n, (d, f) in shapes.items() if n in counts}
        self._forget()
