"""BalancEdit (Guo et al., ICML 2025, arXiv 2505.01343): a codebook of tuned copies of one layer.

Key: the mean activation entering one down-projection over all prompt positions, the picture's included and
the answer's excluded. Value: that layer's weights, tuned on the one edit. Radius: between the distance of a
paraphrase (positive anchor) and that of a black picture with the same question (negative anchor),
eps = w_pos * d(pos) + (1 - w_pos) * d(neg). The paper prints the formula both ways round; this is the
orientation of its Appendix D, its ablation and its Table 10 (w_pos = alpha).

`balancedit-plus` is not published: keys that see the question and the picture apart, more anchors, null
entries and low-rank values, each a field that can be set on either name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, EditEvent
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.base import BadEditor, EditFailed, Editor, EditorConfig, Traits, need
from testbed.editors.codebook import keys as _sites
from testbed.editors.codebook.codebook import Codebook, Entry
from testbed.editors.codebook.entry_weights import FullCopies, LowRank, Values, train
from testbed.editors.codebook.gate import Gate, Hits
from testbed.editors.codebook.nearest import Metric, Rule, direct
from testbed.model.encoding import answer_ids
from testbed.model.predictor import ModelPredictor, Predictor
from testbed.model.prefix_cache import ImagePrefixes
from testbed.model.suffix import suffix_from_down_projection

_TEXT_NEGATIVES = 32


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
    rule: Rule = "nearest-then-check"
    """Which ball answers (paper: the nearest key's, if it holds the query)."""
    overlap: Literal["continue", "fresh"] = "continue"
    """Where an edit falls into the scope of an entry with the same answer, tune on from that entry's weights (paper) or from the base's."""
    revision: Literal["zone", "key"] = "zone"
    """Which earlier edit with another answer an edit replaces: one within reach of either's paraphrases, or only one with its own key."""
    negative: Literal["black", "white", "random"] = "black"
    """The negative anchor's picture (paper: black; white and a random one ablated)."""
    key: Literal["mean", "blocks"] = "mean"
    """h: mean over all prompt positions (paper), or last prompt token beside the picture's mean, each divided by its spread."""
    positives: int = 1
    """Paraphrases used as positive anchors; the farthest counts (paper: 1)."""
    jitter: bool = False
    """Use the picture at nine tenths of its brightness as a positive anchor too."""
    others: int = 0
    """Pictures of the train pool, with the edit's question, used as negative anchors; the nearest counts."""
    siblings: int = 0
    """Questions of the train pool, with the edit's picture, used as negative anchors; the nearest counts."""
    nulls: int = 0
    """Un-edited questions of the train pool that silence an edit which is not nearer than they are."""
    rank: int = 0
    """r: rank of an entry's addition to the layer; 0 is a full copy (paper)."""

    def problems(self) -> list[str]:
        out = []
        if not 0 <= self.w_pos <= 1:
            out.append(f"w_pos must lie in [0, 1], got {self.w_pos}")
        if self.lr <= 0 or self.steps < 1:
            out.append(f"lr must be positive and steps 1 or more, got {self.lr} and {self.steps}")
        if self.positives < 1:
            out.append(f"positives must be 1 or more, got {self.positives}")
        out += [f"{n} must be 0 or more, got {getattr(self, n)}" for n in ("others", "siblings", "nulls", "rank") if getattr(self, n) < 0]
        return out


@dataclass(frozen=True)
class Scope:
    """Where an edit will answer: its key (f,), the radius, and what the codebook notes of it."""

    key: Tensor
    radius: float
    entry: Entry


@EDITORS.register("balancedit")
class BalancEdit(Editor):
    """One row of the codebook an edit; the nearest key fires within its radius, decided once at prefill."""

    summary = "codebook of tuned copies of one layer, radius between a paraphrase and a black picture (BalancEdit)"
    traits = Traits(gated=True, undo=True, uses=frozenset({"paraphrase", "train_pool"}))
    Config = BalancEditConfig

    def _prepare(self, pool: TrainPool) -> None:
        self.module = self.handle.down(self.config.layer)
        self._prefixes = ImagePrefixes(self.handle, self.module)
        self.weight = self.handle.parameter(self.handle.down_weight(self.config.layer)).detach().float()
        self.family: Values = (
            LowRank(self.module, self.weight, self.config.rank) if self.config.rank else FullCopies(self.module, self.weight)
        )
        self.values: dict[str, Tensor] = {}
        seen = [q for q in pool.questions if self.handle.reads_pictures or q.image is None]
        self._words = list(dict.fromkeys(q.prompt for q in seen))
        self._pictures = list({q.image.key: q.image for q in seen if q.image is not None}.values())
        self._prepare_keys([q.ask() for q in seen])
        self._text = self._read([Ask(w) for w in self._words[:_TEXT_NEGATIVES] or ["What is this?"]])

    def _prepare_keys(self, bank: list[Ask]) -> None:
        width = self.weight.numel() // self.handle.width
        self._key = _sites.mean
        nulls = None
        if self.config.key == "blocks":
            width *= 2
            sample = _sites.read(self._prefixes, _spaced(bank, 256), _sites.Blocks(torch.ones(2))) if bank else torch.zeros(0, width)
            self._key = _sites.Blocks(_sites.spread_of(sample))
        if self.config.nulls and bank:
            nulls = self._read(_spaced(bank, self.config.nulls))
        self.book = Codebook(width, self.config.metric, self.config.rule, nulls)

    def _read(self, asks: Sequence[Ask]) -> Tensor:
        return _sites.read(self._prefixes, asks, self._key)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        scopes = self._scopes(batch)
        near = [self.book.overlapping(s.key, s.radius, s.entry.label) if self.config.overlap == "continue" else None for s in scopes]
        starts = [self.values[i] if i is not None else self._fresh(e) for i, e in zip(near, batch.events)]
        asks, targets = [e.ask() for e in batch.events], [e.target for e in batch.events]
        suffix = suffix_from_down_projection(self.handle, asks, targets, self.config.layer, prefixes=self._prefixes)
        trained = train(self.family, suffix, starts, self.config.lr, self.config.steps)
        superseded = [self._insert(scope) for scope in scopes]
        self.values = {**self.values, **{s.entry.event_id: v for s, v in zip(scopes, trained.values)}}
        return {
            "loss": sum(trained.losses) / len(scopes),
            "radius": sum(s.radius for s in scopes) / len(scopes),
            "continued": float(sum(i is not None for i in near)),
            "superseded": float(sum(map(len, superseded))),
            "not_separable": float(sum(not s.entry.separable for s in scopes)),
            "entries": float(len(self.book)),
        }

    def _fresh(self, event: EditEvent) -> Tensor:
        """A value that changes nothing yet, the same whatever batch the edit stands in."""
        return self.family.fresh(self.generator(int(event.id, 16)))

    @timed("insert")
    def _insert(self, scope: Scope) -> list[str]:
        try:
            return self.book.insert(scope.key, scope.radius, scope.entry)
        except ValueError as e:
            raise EditFailed(str(e)) from e

    @timed("keys")
    def _scopes(self, batch: EditBatch) -> list[Scope]:
        """Keys and radii of a batch's edits, all prompts read together. Raises `EditFailed` where a key is not finite."""
        positive = [self._positive(e, batch.paraphrases.get(e.id, ())) for e in batch.events]
        negative = [self._negative(e) for e in batch.events]
        keys = self._read([a for e, p, n in zip(batch.events, positive, negative) for a in (e.ask(), *p, *n)])
        if not torch.isfinite(keys).all():
            raise EditFailed("activations of the edit or its anchors are not finite")
        parts = keys.split([1 + len(p) + len(n) for p, n in zip(positive, negative)])
        return [self._scope(e, part[0], part[1 : 1 + len(p)], part[1 + len(p) :]) for e, p, part in zip(batch.events, positive, parts)]

    def _scope(self, event: EditEvent, key: Tensor, positive: Tensor, negative: Tensor) -> Scope:
        if not len(negative):
            others = [i for i, w in enumerate(self._words[:_TEXT_NEGATIVES]) if w != event.prompt]
            negative = self._text[others] if others else self._text
        metric = self.config.metric
        least = _sites.slack(key, metric)
        d_pos, d_neg = float(direct(positive, key, metric).max()), float(direct(negative, key, metric).min())
        label = tuple(answer_ids(self.handle, event.ask(), event.target))
        zone = max(d_pos, least) if self.config.revision == "zone" else least
        entry = Entry(event.id, label, d_pos < d_neg, zone)
        return Scope(key, max(radius(self.config.w_pos, d_pos, d_neg), least), entry)

    def _positive(self, event: EditEvent, paraphrases: tuple[str, ...]) -> list[Ask]:
        out = [Ask(p, event.image) for p in paraphrases[: self.config.positives]] or [event.ask()]
        if self.config.jitter and event.image is not None:
            out.append(Ask(event.prompt, _sites.Dimmed(event.image.key, event.image.load())))
        return out

    def _negative(self, event: EditEvent) -> list[Ask]:
        """Prompts that the entry must not answer; none of its own for an edit without a picture (see `_scope`)."""
        if event.image is None:
            return []
        first, second = self.config.others, self.config.siblings
        pictures = [p for p in self._pictures if p.key != event.image.key]
        plain = _sites.Plain(event.image.load().shape, 255 if self.config.negative == "white" else 0)
        drawn = pictures[int(event.id, 16) % len(pictures)] if self.config.negative == "random" and pictures else plain
        words = [w for w in self._words if w != event.prompt]
        return [
            Ask(event.prompt, drawn),
            *(Ask(event.prompt, p) for p in pictures[:first]),
            *(Ask(w, event.image) for w in words[:second]),
        ]

    def predictor(self) -> Predictor:
        return self._through(self.book)

    def as_of(self, operation: int) -> Predictor:
        """The edited model as it was after the first so many operations of the log (insertions and removals)."""
        return self._through(self.book.as_of(operation))

    def gate(self, book: Codebook) -> Gate:
        """A codebook laid around the layer, with the values that its entries have."""
        return Gate(self.handle, self.module, book, self._key, lambda hits: self._answer(hits, book))

    def _answer(self, hits: Hits, book: Codebook) -> Tensor:
        return self.family.answer(hits, [self.values[book.entries[i].event_id] for i in hits.rows])

    def _through(self, book: Codebook) -> Predictor:
        gate = self.gate(book)
        return ModelPredictor(self.handle, gate.around, gate.explain)

    def revert(self, event_ids: Iterable[str]) -> None:
        """Take entries out; those they superseded come back. Raises `BadEditor` for an unknown id."""
        try:
            self.book.remove(event_ids)
        except KeyError as e:
            raise BadEditor(f"cannot undo: {e.args[0]}") from e

    def _state(self) -> dict[str, Any]:
        where = {"model": self.handle.hash, "layer": self.handle.down_weight(self.config.layer)}
        return {**self.book.state(), **where, **self.values}

    def state_bytes(self) -> int:
        """Bytes of the tensors in the state: the codebook's, and one value an edit."""
        return self.book.nbytes + self.weight.element_size() * math.prod(self.family.shape) * len(self.values)

    def _load(self, state: dict[str, Any]) -> None:
        need(state, "keys", (None, self.book.width))
        need(state, "nulls", (None, self.book.width))
        mine = {"model": self.handle.hash, "layer": self.handle.down_weight(self.config.layer)}
        for name, value in {**mine, "metric": self.config.metric, "rule": self.config.rule}.items():
            if state[name] != value:
                raise BadEditor(f"the state was made with {name} {state[name]}, this editor has {value}")
        self.book.load(state)
        self.values = {e.event_id: need(state, e.event_id, self.family.shape).to(self.weight.device) for e in self.book.entries}
        self._prefixes.kept.clear()  # of pictures that this state may never have met


@dataclass(frozen=True)
class BalancEditPlusConfig(BalancEditConfig):
    key: Literal["mean", "blocks"] = "blocks"
    positives: int = 4
    jitter: bool = True
    others: int = 4
    siblings: int = 4
    nulls: int = 256
    rank: int = 4


@EDITORS.register("balancedit-plus")
class BalancEditPlus(BalancEdit):
    """The same machinery with the unpublished fields on."""

    summary = "BalancEdit with keys by modality, several anchors, null entries and low-rank values (ours)"
    Config = BalancEditPlusConfig


def radius(w_pos: float, d_pos: float, d_neg: float) -> float:
    """eps = w_pos * d_pos + (1 - w_pos) * d_neg; under d_neg whatever the anchors, so that the negative one misses."""
    eps = w_pos * d_pos + (1 - w_pos) * d_neg
    return min(eps, d_neg * (1 - 1e-6)) if d_pos >= d_neg else eps


def _spaced(asks: list[Ask], n: int) -> list[Ask]:
    """At most n of them, evenly spaced."""
    return [asks[i * len(asks) // n] for i in range(n)] if len(asks) > n else asks
