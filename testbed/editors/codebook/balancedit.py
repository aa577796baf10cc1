"""BalancEdit (Guo et al., ICML 2025, arXiv 2505.01343): a codebook of tuned copies of one layer.

The paper's parts, and the code for them:

* key h(x): the mean input of one down-projection over all prompt positions, the picture's included and the answer's
  excluded (`keys.read_keys`);
* entry weights: that layer's weights, tuned on the cross-entropy of the one edit (`train`);
* anchors: a paraphrase with the same picture (positive), a black picture with the same question (negative);
* radius: eps = alpha * d(h, h_pos) + (1 - alpha) * d(h, h_neg) (`radius`). The paper prints the formula both ways round;
  this is the orientation of its Appendix D, its ablation and its Table 10. alpha is called `w_pos` here;
* retrieval: the entry of the nearest key answers if the query lies within its radius, else the untouched layer
  (`nearest.Nearest`), decided once at prefill (`gate.Gate`);
* insertion: an edit is new, continues an entry with the same answer, or replaces one that conflicts (`codebook.Codebook`).

The paper gives no test for a conflict. By default only an edit with the very same key conflicts, and balls may overlap.
`revision=zone` (an edit of another answer within a paraphrase's distance conflicts) and `caps` (rival balls are kept apart)
are ours; they cost locality and earlier edits that lie near. A run names the rules it used.

`balancedit-plus` is not published. Its keys see the question and the picture apart, it has more anchors, null entries
and low-rank entry weights; each of these is a field that can be set on either name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, EditEvent
from testbed.core.ranges import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.base import EditFailed, EditorConfig, Traits, minimise, need, require_same
from testbed.editors.codebook.codebook import Codebook, Entry
from testbed.editors.codebook.gate import CodebookEditor, Hits
from testbed.editors.codebook.keys import TextAndImageKey, dimmed, read_keys, reading_error, spread_of, uniform
from testbed.editors.codebook.nearest import Metric, Rule, direct
from testbed.editors.hyperparameters import ModelKey, PublishedRow, Table
from testbed.model.encoding import answer_ids
from testbed.model.handle import as_matrix, project
from testbed.model.predictor import Predictor
from testbed.model.suffix import DownProjectionSuffix, mean_over_prompt, suffix_from_down_projection

_RULES_BEFORE = {"revision": "zone", "caps": True}
"""The rules of states that do not name theirs: they were written when these were the defaults."""
_TEXT_NEGATIVES = 32
"""Questions of the train pool that serve as negative anchors of an edit without a picture."""


class FullCopyWeights:
    """A copy of the whole matrix of a layer for each entry, as published. weight: the layer's own, float32."""

    def __init__(self, module: nn.Module, weight: Tensor) -> None:
        self.module, self.weight = module, weight
        self.shape = tuple(weight.shape)
        """Shape of the weights of one entry."""

    def fresh(self, generator: torch.Generator) -> Tensor:
        """Weights that change nothing yet."""
        return self.weight

    def outputs(self, suffix: DownProjectionSuffix, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """The layer as a function of the suffix's activations, with each row of the batch under its own weights (B, *shape)."""
        if len(weights) == 1:
            return lambda act: project(self.module, act, weights[0])
        return lambda act: torch.stack([project(self.module, a, w) for a, w in zip(act, weights)])

    def answer(self, hits: Hits, weights: Sequence[Tensor]) -> Tensor:
        """(h, T, d) the layer's output for rows that hit, each under its entry's weights."""
        return torch.stack([project(self.module, x, w.to(x.device)) for x, w in zip(hits.act, weights)])


class LowRankWeights:
    """Two thin matrices U (r, f) and V (r, d) side by side, whose product V^T U x is added to the layer's output."""

    def __init__(self, module: nn.Module, weight: Tensor, rank: int) -> None:
        self.module, self.weight = module, weight
        d, self.f = as_matrix(module, weight).shape
        self.shape = rank, self.f + d

    def fresh(self, generator: torch.Generator) -> Tensor:
        """U from a normal distribution of variance 1/f, V zero: weights that change nothing yet."""
        rank, width = self.shape
        u = torch.randn(rank, self.f, generator=generator) / self.f**0.5
        return torch.cat([u, torch.zeros(rank, width - self.f)], 1).to(self.weight.device)

    def outputs(self, suffix: DownProjectionSuffix, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """As for full copies; all rows in two products."""
        with torch.no_grad():
            own = project(self.module, suffix.act, self.weight)
        return lambda act: own + self._add(act.float(), weights).to(own.dtype)

    def _add(self, x: Tensor, weights: Tensor) -> Tensor:
        return x @ weights[..., : self.f].mT @ weights[..., self.f :]

    def answer(self, hits: Hits, weights: Sequence[Tensor]) -> Tensor:
        """As for full copies."""
        return hits.out + self._add(hits.act.float(), torch.stack(list(weights)).to(hits.act.device)).to(hits.out.dtype)


EntryWeights = FullCopyWeights | LowRankWeights


@timed("train")
def train(form: EntryWeights, suffix: DownProjectionSuffix, starts: Sequence[Tensor], lr: float, steps: int) -> tuple[Tensor, list[float]]:
    """Entry weights (B, *shape) of a batch, trained with Adam, and the last loss of each edit, nats a token.

    Raises `EditFailed` on a loss that is not finite.
    """
    weights = torch.stack(list(starts)).to(suffix.act.device, torch.float32).clone().requires_grad_(True)
    layer = form.outputs(suffix, weights)
    losses = minimise([weights], lambda: suffix.losses(layer), lr, steps)
    return weights.detach(), losses.tolist()


_BLIP2 = PublishedRow("BalancEdit's repository, BLIP-2's file for Euclidean distances", {"w_pos": 0.05, "lr": 1e-4})
PUBLISHED: Table = {ModelKey("opt", 32, 2560, vocabulary): _BLIP2 for vocabulary in (50272, 50304)}
"""BLIP-2 with OPT-2.7B, before and after its image token. MiniGPT-4, the paper's other model, wraps an up-projection."""


@dataclass(frozen=True)
class BalancEditConfig(EditorConfig):
    layer: int = -1
    """Decoder layer whose down-projection is wrapped (paper: the last)."""
    w_pos: Fraction | None = None
    """alpha: weight of the positive anchor's distance in the radius (paper: 0.2 on MiniGPT-4)."""
    lr: PositiveFloat | None = None
    """Adam's step size (paper: 1e-4 at widths of 11,008; a narrow layer needs larger steps)."""
    steps: PositiveInt = 50
    """Optimiser steps an edit (paper: 50)."""
    metric: Metric = "euclidean"
    """Distance between keys (paper: Euclidean; cosine ablated)."""
    rule: Rule = "nearest-then-check"
    """Which ball answers (paper: the nearest key's, if it holds the query)."""
    overlap: Literal["continue", "fresh"] = "continue"
    """Where an edit falls into the scope of an entry with the same answer, tune on from that entry's weights (paper) or from the base's."""
    revision: Literal["zone", "key"] = "key"
    """Which earlier edit with another answer an edit replaces: only one with its own key, or (ours) one whose key lies in the positive
    radius of either (the distance of its paraphrase)."""
    caps: bool = False
    """Cap the balls of edits with other answers where they meet, so that none overlap (ours)."""
    negative: Literal["black", "white", "random"] = "black"
    """The negative anchor's picture (paper: black; white and a random one ablated)."""
    key: Literal["mean", "blocks"] = "mean"
    """h: mean over all prompt positions (paper), or last prompt token beside the picture's mean, each divided by its spread."""
    positives: PositiveInt = 1
    """Paraphrases used as positive anchors; the farthest counts (paper: 1)."""
    jitter: bool = False
    """Use the picture at nine tenths of its brightness as a positive anchor too."""
    others: NonNegativeInt = 0
    """Pictures of the train pool, with the edit's question, used as negative anchors; the nearest counts."""
    siblings: NonNegativeInt = 0
    """Questions of the train pool, with the edit's picture, used as negative anchors; the nearest counts."""
    nulls: NonNegativeInt = 0
    """Number of un-edited questions of the train pool that silence an edit which is not nearer to a prompt than they are."""
    rank: NonNegativeInt = 0
    """r: rank of an entry's addition to the layer; 0 is a full copy (paper)."""


@dataclass(frozen=True)
class Scope:
    """Where an edit will answer: its key (f,), its radius, and its row of the codebook."""

    key: Tensor
    radius: float
    entry: Entry


@EDITORS.register("balancedit")
class BalancEdit(CodebookEditor):
    """Each edit is a row of the codebook with entry weights; the nearest row answers a prompt within its radius."""

    summary = "codebook of tuned copies of one layer, radius between a paraphrase and a black picture (BalancEdit)"
    traits = Traits(gated=True, undo=True, uses=frozenset({"paraphrase", "train_pool"}))
    Config = BalancEditConfig
    published, defaults = PUBLISHED, {"w_pos": 0.2, "lr": 5e-3}

    def _prepare(self, pool: TrainPool) -> None:
        self._prepare_layer()
        rank = self.config.rank
        self.form: EntryWeights = LowRankWeights(self.module, self.weight, rank) if rank else FullCopyWeights(self.module, self.weight)
        seen = [q for q in pool.questions if self.handle.reads_pictures or q.image is None]
        self._questions = list(dict.fromkeys(q.prompt for q in seen))
        self._pictures = list({q.image.key: q.image for q in seen if q.image is not None}.values())
        self._prepare_keys([q.ask() for q in seen])
        self._text = self._read([Ask(q) for q in self._questions[:_TEXT_NEGATIVES] or ["What is this?"]])

    def _prepare_keys(self, bank: list[Ask]) -> None:
        width = self.weight.numel() // self.handle.width
        self._key = mean_over_prompt
        nulls = None
        if self.config.key == "blocks":
            width *= 2
            sample = read_keys(self._prefixes, _spaced(bank, 256), TextAndImageKey(torch.ones(2))) if bank else torch.zeros(0, width)
            self._key = TextAndImageKey(spread_of(sample))
        if self.config.nulls and bank:
            nulls = self._read(_spaced(bank, self.config.nulls))
        self.book = Codebook(width, self.config.metric, self.config.rule, nulls, self.config.caps)
        self.notes.append(self._rules_used())

    def _rules_used(self) -> str:
        """Which rules of insertion hold, and which of them are ours."""
        same = {"key": "with its own key alone (the paper names no test)", "zone": "within a paraphrase's distance (ours)"}
        balls = "capped where they meet (ours)" if self.config.caps else "left to overlap (the paper)"
        rule, replaced = self.config.rule, same[self.config.revision]
        return f"retrieval {rule}; an edit replaces one of another answer {replaced}; balls of other answers are {balls}"

    def _read(self, asks: Sequence[Ask]) -> Tensor:
        return read_keys(self._prefixes, asks, self._key)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        scopes = self._scopes(batch)
        near = [self.book.overlapping(s.key, s.radius, s.entry.label) if self.config.overlap == "continue" else None for s in scopes]
        starts = [self.tensors[i] if i is not None else self._fresh(e) for i, e in zip(near, batch.events)]
        asks, targets = [e.ask() for e in batch.events], [e.target for e in batch.events]
        suffix = suffix_from_down_projection(self.handle, asks, targets, self.config.layer, prefixes=self._prefixes)
        trained, losses = train(self.form, suffix, starts, self.hyper.lr, self.config.steps)
        superseded = [self._insert(scope) for scope in scopes]
        self._add_tensors(batch, trained)
        return {
            "loss": sum(losses) / len(scopes),
            "radius": sum(s.radius for s in scopes) / len(scopes),
            "continued": float(sum(i is not None for i in near)),
            "superseded": float(sum(map(len, superseded))),
            "not_separable": float(sum(not s.entry.separable for s in scopes)),
            "entries": float(len(self.book)),
        }

    def _fresh(self, event: EditEvent) -> Tensor:
        """Weights that change nothing yet. They depend on the edit alone, not on the batch it stands in."""
        return self.form.fresh(self.generator(int(event.id, 16)))

    @timed("insert")
    def _insert(self, scope: Scope) -> list[str]:
        try:
            return self.book.insert(scope.key, scope.radius, scope.entry)
        except ValueError as e:
            raise EditFailed(str(e)) from e

    @timed("keys")
    def _scopes(self, batch: EditBatch) -> list[Scope]:
        """Keys and radii of a batch's edits, from one reading of all prompts. Raises `EditFailed` where a key is not finite."""
        positive = [self._positive(e, batch.paraphrases.get(e.id, ())) for e in batch.events]
        negative = [self._negative(e) for e in batch.events]
        keys = self._read([a for e, p, n in zip(batch.events, positive, negative) for a in (e.ask(), *p, *n)])
        if not torch.isfinite(keys).all():
            raise EditFailed("activations of the edit or its anchors are not finite")
        parts = keys.split([1 + len(p) + len(n) for p, n in zip(positive, negative)])
        return [self._scope(e, part[0], part[1 : 1 + len(p)], part[1 + len(p) :]) for e, p, part in zip(batch.events, positive, parts)]

    def _scope(self, event: EditEvent, key: Tensor, positive: Tensor, negative: Tensor) -> Scope:
        if not len(negative):
            others = [i for i, q in enumerate(self._questions[:_TEXT_NEGATIVES]) if q != event.prompt]
            negative = self._text[others] if others else self._text
        metric = self.config.metric
        least = reading_error(key, metric)
        d_pos, d_neg = float(direct(positive, key, metric).max()), float(direct(negative, key, metric).min())
        label = tuple(answer_ids(self.handle, event.ask(), event.target))
        positive_radius = max(d_pos, least) if self.config.revision == "zone" else least
        entry = Entry(event.id, label, d_pos < d_neg, positive_radius)
        return Scope(key, max(radius(self.hyper.w_pos, d_pos, d_neg), least), entry)

    def _positive(self, event: EditEvent, paraphrases: tuple[str, ...]) -> list[Ask]:
        out = [replace(event.ask(), prompt=p) for p in paraphrases[: self.config.positives]] or [event.ask()]
        if self.config.jitter and event.image is not None:
            out.append(Ask(event.prompt, dimmed(event.image)))
        return out

    def _negative(self, event: EditEvent) -> list[Ask]:
        """Prompts that the entry must not answer. An edit without a picture has none here; `_scope` takes questions of the train pool."""
        if event.image is None:
            return []
        pictures = [p for p in self._pictures if p.key != event.image.key]
        questions = [q for q in self._questions if q != event.prompt]
        if self.config.negative == "random" and pictures:
            anchor = pictures[int(event.id, 16) % len(pictures)]
        else:
            anchor = uniform(event.image.load().shape, 255 if self.config.negative == "white" else 0)
        return [
            Ask(event.prompt, anchor),
            *(Ask(event.prompt, p) for p in pictures[: self.config.others]),
            *(Ask(q, event.image) for q in questions[: self.config.siblings]),
        ]

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "rules": {"revision": self.config.revision, "caps": self.config.caps}}

    def _go_on_with(self, rules: dict[str, Any]) -> None:
        """Keep the rules of a stored state, because its entries were made by them, and say so where the configuration has others."""
        if any(getattr(self.config, name) != value for name, value in rules.items()):
            self.config = replace(self.config, **rules)
            self.book.capped = self.config.caps
            self.notes.append(f"the stored run goes on by the rules it began with: {self._rules_used()}")

    def as_of(self, operation: int) -> Predictor:
        """The edited model as it was after the first `operation` insertions and removals of the codebook's log."""
        return self._predictor_with(self.book.as_of(operation))

    def _answer(self, hits: Hits, book: Codebook) -> Tensor:
        return self.form.answer(hits, [self.tensors[book.entries[i].event_id] for i in hits.rows])

    def _load(self, state: dict[str, Any]) -> None:
        need(state, "keys", (None, self.book.width))
        need(state, "nulls", (None, self.book.width))
        require_same(state, {**self._own, "metric": self.config.metric, "rule": self.config.rule})
        self._go_on_with(state.get("rules", _RULES_BEFORE))
        self.book.load(state)
        self._load_tensors(state, [e.event_id for e in self.book.entries], self.form.shape)


@dataclass(frozen=True)
class BalancEditPlusConfig(BalancEditConfig):
    revision: Literal["zone", "key"] = "zone"
    caps: bool = True
    key: Literal["mean", "blocks"] = "blocks"
    positives: PositiveInt = 4
    jitter: bool = True
    others: NonNegativeInt = 4
    siblings: NonNegativeInt = 4
    nulls: NonNegativeInt = 256
    rank: NonNegativeInt = 4


@EDITORS.register("balancedit-plus")
class BalancEditPlus(BalancEdit):
    """BalancEdit with the unpublished fields on."""

    summary = "BalancEdit with keys by modality, several anchors, null entries and low-rank values (ours)"
    Config = BalancEditPlusConfig


def radius(w_pos: float, d_pos: float, d_neg: float) -> float:
    """eps = alpha * d_pos + (1 - alpha) * d_neg, with alpha = w_pos.

    Where the anchors cannot be separated (d_pos >= d_neg) it is just under d_neg, so that the negative anchor still misses.
    """
    eps = w_pos * d_pos + (1 - w_pos) * d_neg
    return min(eps, d_neg * (1 - 1e-6)) if d_pos >= d_neg else eps


def _spaced(asks: list[Ask], n: int) -> list[Ask]:
    """At most n of the prompts, evenly spaced."""
    return [asks[i * len(asks) // n] for i in range(n)] if len(asks) > n else asks
