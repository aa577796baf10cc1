"""BalancEdit (Guo et al., ICML 2025, arXiv 2505.01343): a codebook of tuned copies of one layer.

Key: the mean activation entering one down-projection over all prompt positions, the picture's included and
the answer's excluded. Value: that layer's weights, tuned on the one edit. Radius: between the distance of a
paraphrase (positive anchor) and that of a black picture with the same question (negative anchor),
eps = w_pos * d(pos) + (1 - w_pos) * d(neg). The paper prints the formula both ways round; this is the
orientation of its Appendix D, its ablation and its Table 10 (w_pos = alpha).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.editors.base import BadEditor, EditFailed, Editor, EditorConfig, Traits, need
from testbed.editors.codebook import Codebook, Entry, Metric, direct
from testbed.encode import Ask, Batch, answer_ids, collate
from testbed.events import EditBatch, EditEvent
from testbed.models import project
from testbed.predictor import ModelPredictor, Predictor
from testbed.registry import EDITORS
from testbed.tail import Tail, capture, pooled


@dataclass(frozen=True)
class BalancEditConfig(EditorConfig):
    layer: int = -1
    """Decoder layer whose down-projection is wrapped (paper: the last)."""
    w_pos: float = 0.2
    """alpha: weight of the positive anchor's distance in the radius, in [0, 1] (paper: 0.2 on MiniGPT-4)."""
    lr: float = 5e-3
    """Adam's step size (paper: 1e-4 at widths of 11,008; a narrow layer needs larger steps)."""
    steps: int = 50
    """Optimiser steps an edit (paper: 50)."""
    metric: Metric = "euclidean"
    """Distance between keys (paper: Euclidean; cosine ablated)."""

    def problems(self) -> list[str]:
        out = []
        if not 0 <= self.w_pos <= 1:
            out.append(f"w_pos must lie in [0, 1], got {self.w_pos}")
        if self.lr <= 0 or self.steps < 1:
            out.append(f"lr must be positive and steps 1 or more, got {self.lr} and {self.steps}")
        return out


class Black:
    """A black picture of the size of another: the paper's negative anchor."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.key = f"black-{shape[0]}x{shape[1]}"

    def load(self) -> np.ndarray:
        return np.zeros(self.shape, dtype=np.uint8)


@EDITORS.register("balancedit")
class BalancEdit(Editor):
    """One entry an edit; the nearest key fires within its radius, decided once at prefill."""

    summary = "codebook of tuned copies of one layer, radius between a paraphrase and a black picture (BalancEdit)"
    traits = Traits(gated=True, undo=True, uses=frozenset({"paraphrase", "train_pool"}))
    Config = BalancEditConfig

    def _prepare(self, pool: TrainPool) -> None:
        self.module = self.handle.down(self.config.layer)
        self.base = self.handle.parameter(self.handle.down_weight(self.config.layer)).detach().float()
        self.book = Codebook(self._key_width(), self.config.metric)
        self.values: dict[str, Tensor] = {}
        self._others = [Ask(q.prompt) for q in pool.questions if q.image is None][:32]

    def _key_width(self) -> int:
        return self.base.shape[1] if isinstance(self.module, torch.nn.Linear) else self.base.shape[0]

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        notes = {"loss": 0.0, "radius": 0.0, "superseded": 0.0, "not_separable": 0.0}
        tail = capture(self.handle, [_ask(e) for e in batch.events], [e.target for e in batch.events], self.config.layer)
        values, losses = self._train(tail)
        for event, value, loss in zip(batch.events, values, losses):
            entry, superseded = self._insert(event, batch.paraphrases.get(event.id, ()), value)
            notes["superseded"] += len(superseded)
            notes["loss"] += loss / len(batch)
            notes["radius"] += float(self.book.raw[-1]) / len(batch)
            notes["not_separable"] += not entry.separable
        return {**notes, "entries": float(len(self.book))}

    def _train(self, tail: Tail) -> tuple[list[Tensor], list[float]]:
        """A tuned copy of the layer for every row, all rows together. Raises `EditFailed` on a loss that is not finite."""
        rows = tail.batch.answer.shape[0]
        weights = self.base.expand(rows, *self.base.shape).clone().requires_grad_(True)
        adam = torch.optim.Adam([weights], lr=self.config.lr)
        losses = torch.zeros(rows)
        for _ in range(self.config.steps):
            adam.zero_grad()
            losses = tail.loss(lambda act: self._rowwise(act, tail, weights))
            if not torch.isfinite(losses).all():
                raise EditFailed(f"the loss became {losses.tolist()} at lr {self.config.lr}; try a smaller one")
            losses.sum().backward()
            adam.step()
        return list(weights.detach()), losses.tolist()

    def _rowwise(self, act: Tensor, tail: Tail, weights: Tensor) -> Tensor:
        """The projection with each row's own weight; `act` is (B, T, f), or (n, f) at the last layer."""
        if weights.shape[0] == 1:
            return project(self.module, act, weights[0])
        if act.ndim == 3:
            return torch.stack([project(self.module, a, w) for a, w in zip(act, weights)])
        parts = [project(self.module, act[tail.row == i], w) for i, w in enumerate(weights)]
        return torch.cat(parts)

    def _insert(self, event: EditEvent, paraphrases: tuple[str, ...], value: Tensor) -> tuple[Entry, list[str]]:
        key, positive, negative = self._anchors(event, paraphrases)
        d_pos, d_neg = float(direct(positive, key, self.config.metric).max()), float(direct(negative, key, self.config.metric).min())
        label = tuple(answer_ids(self.handle, _ask(event), event.target))
        entry = Entry(event.id, label, d_pos < d_neg, d_pos)
        superseded = self.book.insert(key, radius(self.config.w_pos, d_pos, d_neg), entry)
        self.values = {**self.values, event.id: value}
        return entry, superseded

    def _anchors(self, event: EditEvent, paraphrases: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys of the edit (f,), of its paraphrases (p, f) and of its negative anchors (n, f)."""
        positive = [Ask(p, event.image) for p in paraphrases[:1]] or [_ask(event)]
        if event.image is not None:
            negative = [Ask(event.prompt, Black(event.image.load().shape))]
        else:
            negative = [a for a in self._others if a.prompt != event.prompt] or [Ask("What is this?")]
        keys = self._keys([_ask(event), *positive, *negative])
        if not torch.isfinite(keys).all():
            raise EditFailed("activations of the edit are not finite")
        return keys[0], keys[1 : 1 + len(positive)], keys[1 + len(positive) :]

    @torch.no_grad()
    def _keys(self, asks: list[Ask]) -> Tensor:
        """(n, f) float32 keys of prompts, none of which holds an answer."""
        out = []
        for ask in asks:
            batch = collate(self.handle, [ask], side="left")
            kept: list[Tensor] = []
            with self.handle.hooked(self.module, lambda m, args, kept=kept: kept.append(args[0]), pre=True):
                self.handle.model(**batch.inputs, use_cache=False)
            out.append(pooled(kept[0].reshape(*batch.prompt.shape, -1), batch)[0].cpu())
        return torch.stack(out)

    def predictor(self) -> Predictor:
        gate = Gate(self)
        return ModelPredictor(self.handle, gate.around, gate.explain)

    def revert(self, event_ids: Iterable[str]) -> None:
        """Take entries out; those they superseded come back. Raises `BadEditor` for an unknown id."""
        ids = set(event_ids)
        try:
            self.book.remove(ids)
        except KeyError as e:
            raise BadEditor(f"cannot undo: {e.args[0]}") from e
        self.values = {k: v for k, v in self.values.items() if k not in ids}

    def _state(self) -> dict[str, Any]:
        return {**self.book.state(), **{f"value.{k}": v for k, v in self.values.items()}}

    def _load(self, state: dict[str, Any]) -> None:
        need(state, "keys", (None, self.book.width))
        if state["metric"] != self.config.metric:
            raise BadEditor(f"the state was made with {state['metric']} distances, the config says {self.config.metric}")
        self.book.load(state)
        self.values = {e.event_id: need(state, f"value.{e.event_id}", tuple(self.base.shape)) for e in self.book.entries}


def radius(w_pos: float, d_pos: float, d_neg: float) -> float:
    """eps = w_pos * d_pos + (1 - w_pos) * d_neg; under d_neg whatever the anchors, so that the negative one misses."""
    eps = w_pos * d_pos + (1 - w_pos) * d_neg
    return min(eps, d_neg * (1 - 1e-6)) if d_pos >= d_neg else eps


def _ask(event: EditEvent) -> Ask:
    return Ask(event.prompt, event.image)


class Gate:
    """Decides for each row of a batch which entry fires: once, at the first call of the wrapped layer."""

    def __init__(self, editor: BalancEdit) -> None:
        self.editor, self.book, self.values = editor, editor.book, editor.values
        self.index = self.distance = torch.zeros(0)
        self.decided = False

    @contextmanager
    def around(self, batch: Batch) -> Iterator[None]:
        self.decided = False

        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.decided:
                act = args[0].reshape(*batch.prompt.shape, -1)
                self.index, self.distance = self.book.retrieve(pooled(act, batch))
                self.decided = True
            return self._replace(args[0], output)

        with ExitStack() as stack:
            if len(self.book):
                stack.enter_context(self.editor.handle.hooked(self.editor.module, hook))
            yield

    def _replace(self, act: Tensor, output: Tensor) -> Tensor | None:
        """The layer's output with the rows that hit computed by their entry; None (the base's own tensor) when none does."""
        rows = (self.index >= 0).nonzero()[:, 0].tolist()
        if not rows:
            return None
        b = len(self.index)
        x, out = act.reshape(b, -1, act.shape[-1]), output.clone().reshape(b, -1, output.shape[-1])
        for i in rows:
            value = self.values[self.book.entries[int(self.index[i])].event_id].to(act.device)
            out[i] = project(self.editor.module, x[i], value)
        return out.reshape(output.shape)

    def explain(self, batch: Batch) -> list[dict[str, Any]]:
        """The entry that fired (its edit's id) or null, and the distance to the nearest key."""
        if not len(self.book):
            return [{} for _ in batch.asks]
        return [
            {"entry": self.book.entries[int(i)].event_id if i >= 0 else None, "distance": round(float(d), 6)}
            for i, d in zip(self.index, self.distance)
        ]
